"""A fleet's authority: who may speak as whom, until when, and who no longer."""
