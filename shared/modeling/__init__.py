"""The only place that knows torch."""
