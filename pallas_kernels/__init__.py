"""Kernels: arrays in, arrays out; one folder per operation.

`masks`               which keys a query sees: structured masks and their tile schedules
`flash_attention`     softmax attention over any such mask, differentiable
`decode_attention`    a few new queries against a stacked key-value cache
`moba`                block-routed attention: selection, attention both ways, decode step, key convolution

Importing this package creates no devices.
"""

from pallas_kernels import masks, moba
from pallas_kernels.attention import flash_attention
from pallas_kernels.decode_attention import decode_attention

__all__ = ["decode_attention", "flash_attention", "masks", "moba"]
