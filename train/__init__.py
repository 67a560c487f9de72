"""Training loop and everything around it."""
