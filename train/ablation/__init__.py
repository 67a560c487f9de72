"""Many small conversions that differ in one choice each, and what they say about it."""
