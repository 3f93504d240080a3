"""Pure decisions of the coordinator: no clock, no randomness, no I/O."""
