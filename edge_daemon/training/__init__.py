"""The agent: the training subprocess."""
