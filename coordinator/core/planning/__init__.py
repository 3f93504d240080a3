"""Planners: what each device is asked to do in a round, and why."""
