"""Judging models: what they generate, and how sure the numbers are."""
