"""How checkpoints put four-bit codes into words. NumPy, on the host.

Eight codes go into an int32, code j into bits 4 j to 4 j + 3. What differs is which axis they are taken from, and their
order among the eight:

    "awq"         last axis, in the order 0 2 4 6 1 3 5 7
    "sequential"  last axis, in rising order
    "gptq"        first axis, in rising order
"""

from typing import Literal, get_args

import numpy as np
from jaxtyping import Int32, Integer, UInt8

from pallas_kernels.quantized_matmul import nibbles

Layout = Literal["awq", "sequential", "gptq"]
BLOCK_BYTES = 1 << 20  # of codes that are expanded at a time
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # bits 4 j hold column 8 c + AWQ_ORDER[j]


def _check(layout: str) -> None:
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {get_args(Layout)}; got {layout!r}")


def unpack_int4(words: Int32[np.ndarray, "rows columns"], layout: Layout) -> UInt8[np.ndarray, "rows2 columns2"]:
    """Codes 0..15 of a matrix of words."""
    _check(layout)
    if layout == "gptq":
        return np.ascontiguousarray(unpack_int4(np.ascontiguousarray(words.T), "sequential").T)
    octets = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    codes = np.empty((*octets.shape, 2), np.uint8)
    codes[..., 0], codes[..., 1] = octets & 15, octets >> 4
    codes = codes.reshape(len(words), -1)
    if layout == "awq":
        place = np.argsort(AWQ_ORDER)  # column -> bits
        codes = codes.reshape(len(words), -1, 8)[..., place].reshape(len(words), -1)
    return codes


def pack_int4(codes: Integer[np.ndarray, "rows columns"], layout: Layout) -> Int32[np.ndarray, "rows2 columns2"]:
    """Words of a matrix of codes 0..15; ValueError for other codes and when eight do not divide the packed axis."""
    _check(layout)
    if layout == "gptq":
        return np.ascontiguousarray(pack_int4(np.ascontiguousarray(codes.T), "sequential").T)
    if codes.shape[1] % 8:
        raise ValueError(f"eight codes go into a word; got an axis of {codes.shape[1]}")
    if codes.size and (codes.min() < 0 or codes.max() > 15):
        raise ValueError(f"codes must lie in 0..15; got {codes.min()}..{codes.max()}")
    eights = codes.astype(np.uint8).reshape(len(codes), -1, 8)
    if layout == "awq":
        eights = eights[..., list(AWQ_ORDER)]
    octets = eights[..., ::2] | (eights[..., 1::2] << 4)
    return np.ascontiguousarray(octets).view("<i4").astype(np.int32, copy=False)[..., 0]


def by_outputs(
    words: Int32[np.ndarray, "rows columns"],
    layout: Layout,
    order: Integer[np.ndarray, " I"] | None = None,
    *,
    out: UInt8[np.ndarray, "O half"] | None = None,
) -> UInt8[np.ndarray, "O half"]:
    """Codes 0..15 of a weight as signed ones minus 8, two to a byte along its inputs, as `QuantizedTensor` has them.

    Checkpoints pack "awq" `[I, O / 8]`, "gptq" `[I / 8, O]` and "sequential" `[O, I / 8]`. Goes block by block of
    outputs: beside the result no more than a few megabytes are in use.

    Args:
      words: of the whole weight.
      layout: see above.
      order: input i of the result is input `order[i]` of the checkpoint; None: the same.
      out: the result's place; None: a new array.
    """
    _check(layout)
    rows, columns = words.shape
    inputs = {"awq": rows, "gptq": 8 * rows, "sequential": 8 * columns}[layout]
    outputs = {"awq": 8 * columns, "gptq": columns, "sequential": rows}[layout]
    result = np.empty((outputs, inputs // 2), np.uint8) if out is None else out
    step = max(8, BLOCK_BYTES // inputs // 8 * 8)
    for start in range(0, outputs, step):
        stop = min(start + step, outputs)
        if layout == "sequential":
            codes = unpack_int4(words[start:stop], layout)
        elif layout == "awq":
            codes = unpack_int4(words[:, start // 8 : stop // 8], layout).T
        else:
            codes = unpack_int4(np.ascontiguousarray(words[:, start:stop].T), "sequential")
        result[start:stop] = nibbles.pack((codes if order is None else codes[:, order]) - np.uint8(8))
    return result
