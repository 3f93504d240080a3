"""Emulated fleets: real processes, real broker, unequal cgroups."""
