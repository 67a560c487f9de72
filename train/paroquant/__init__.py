"""ParoQuant: scales, rotations and rounding of INT4 weights, optimised one decoder block at a time."""
