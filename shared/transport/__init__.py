"""Ways to carry messages: MQTT, and an in-memory network with seeded faults."""
