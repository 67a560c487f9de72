"""Benchmarks. Each module runs as `python -m benchmarks.NAME`, prints a table and writes its raw numbers as JSON."""
