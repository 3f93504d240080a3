"""The operator's side of Muster and the only documented import."""
