"""Pure decoding steps shared by training and inference; drivers (text, files, clocks) live in `infer`.

`sampling`          logits -> token: temperature, top-k, top-p, min-p, penalties, as traced per-row arrays
`autoregressive`    prefill and the one-token step over a cache
`block_diffusion`   corrupt, bound, denoise, commit
"""
