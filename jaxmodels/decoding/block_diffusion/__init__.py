"""Block diffusion: corrupt and bound for training and scoring, denoise and commit for decoding.

`corruption`   which tokens are masked, at which level
"""
