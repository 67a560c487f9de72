"""Kernels: arrays in, arrays out; one folder per operation."""
