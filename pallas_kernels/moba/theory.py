"""How well routing by mean keys finds a block: signal and noise of block scores (FlashMoBA, arXiv 2511.11571).

For one query, D is the score of the block that holds what it looks for (the signal) minus that of a block that does
not. With keys and query of unit norm and noise keys in random directions, E[D] = gap / B and Var[D] = 2 / (H * B).
"""

import math
from statistics import NormalDist


def effective_gap(signal_gap: float, *, related: int = 1, related_gap: float = 0.0) -> float:
    """The gap of a block in which `related` tokens go together: one has `signal_gap`, the others `related_gap`.

    A gap is how much larger the mean product with the query is than that of a noise key. Clustering, which the key
    convolution encourages, raises `related`.
    """
    if related < 1:
        raise ValueError(f"related must be at least 1: the signal token itself; got {related}")
    return signal_gap + (related - 1) * related_gap


def routing_snr(gap: float, head_dim: int, block_size: int) -> float:
    """E[D] / std[D] = gap * sqrt(head_dim / (2 * block_size)): halving the block gains a factor of sqrt(2)."""
    _check_sizes(head_dim=head_dim, block_size=block_size)
    return gap * math.sqrt(head_dim / (2 * block_size))


def routing_failure_probability(snr: float) -> float:
    """Probability that one noise block outranks the signal block."""
    return NormalDist().cdf(-snr)


def required_snr(top_k: int, num_blocks: int) -> float:
    """The SNR beyond which the signal block is among the `top_k` best of `num_blocks`; -inf when all are taken."""
    _check_sizes(top_k=top_k, num_blocks=num_blocks)
    if top_k >= num_blocks:
        return -math.inf
    return NormalDist().inv_cdf(1 - top_k / num_blocks)


def required_gap(head_dim: int, block_size: int, top_k: int, length: int) -> float:
    """The smallest effective gap that routing finds among `length` keys: `required_snr` solved for the gap."""
    _check_sizes(length=length, block_size=block_size)
    num_blocks = -(-length // block_size)
    return required_snr(top_k, num_blocks) / routing_snr(1.0, head_dim, block_size)


def scoring_cost(length: int, block_size: int, top_k: int) -> float:
    """Arithmetic of scoring all past centroids over that of attention to the selected blocks, for a causal sequence.

    A query scores length / (2 * block_size) centroids on average, two operations per channel, and attends to
    block_size * top_k keys, four.
    """
    _check_sizes(length=length, block_size=block_size, top_k=top_k)
    return length / (4 * block_size**2 * top_k)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1; got {size}")
