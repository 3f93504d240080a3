"""The daemon's edges: the agent's supervisor, telemetry, disk, systemd."""
