"""The coordinator: plans each round, collects updates, aggregates them."""
