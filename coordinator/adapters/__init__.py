"""The coordinator's edges: event log, blob store, worker processes."""
