"""Subprocesses that need torch."""
