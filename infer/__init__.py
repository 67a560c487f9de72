"""Streaming inference: drivers around the shared steps."""
