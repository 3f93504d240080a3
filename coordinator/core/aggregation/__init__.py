"""Aggregators: how the updates of a round become the next global adapter."""
