"""Pure decisions of the daemon: no clock, no randomness, no I/O."""
