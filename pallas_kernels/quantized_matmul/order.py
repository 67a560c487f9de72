"""The order in which the Hopper kernels multiply the inputs of a weight.

A thread reads codes that lie next to each other and holds them in the registers of the tensor core's left operand,
whose layout is another one. Either the activations are put into the order in which threads then hold the weights, or
the codes lie in memory in such an order that activations stay as they are ("interleaved").
"""

import numpy as np

MAX_WIDTH = 128  # inputs in whose order a thread reads codes


def input_order(width: int, bits: int) -> tuple[int, ...]:
    """The place of the code, among `width` of so many bits, that is multiplied with each of `width` activations."""
    per_word = 32 // bits
    # Threads of a row, their words, low or high half of a word, code in it; then words, codes, threads, halves.
    places = np.arange(width).reshape(4, width // (4 * per_word), 2, per_word // 2)
    return tuple(places.transpose(1, 3, 0, 2).ravel().tolist())
