"""FP8 in blocks, as Qwen and DeepSeek publish it: `weight` float8_e4m3fn [O, I], `weight_scale_inv` [O / 128, I / 128].

In spite of its name the scale multiplies. Activations stay in 16 bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxmodels.quantization.awq import HALF, WHERE
from jaxmodels.quantization.compressed_tensors import FP8, block_shape, from_blocks
from jaxmodels.quantization.source import Linear, fields_of
from pallas_kernels.quantized_matmul import QuantizedTensor


@dataclass(frozen=True)
class Fp8Blocks:
    """One scale for each block of 128 x 128."""

    marker = "weight_scale_inv"
    title = "FP8, blocks of 128 x 128"

    @classmethod
    def from_hf(cls, block: Mapping[str, Any]) -> "Fp8Blocks":
        known: dict[str, tuple[Any, ...] | None] = {
            "quant_method": ("fp8",), "weight_block_size": ([128, 128],), "activation_scheme": ("dynamic",),
            "fmt": ("e4m3",), "modules_to_not_convert": None, "scale_fmt": (None, "ue8m0"), "dequantize": None,
        }  # fmt: skip
        if block.get("weight_block_size") is None:
            raise ValueError(f"{WHERE}: field 'weight_block_size' is missing; implemented: [128, 128]")
        fields_of(block, known, WHERE)
        return cls()

    def suffixes(self, name: str) -> tuple[set[str], set[str]]:
        return {"weight", "weight_scale_inv"}, set()

    def read(self, linear: Linear) -> QuantizedTensor:
        shape = (linear.outputs, linear.inputs)
        scales = linear.view("weight_scale_inv", HALF, block_shape(linear), finite=True)
        codes = linear.view("weight", [FP8], shape)
        return QuantizedTensor(codes=codes, scales=from_blocks(linear, scales), format="fp8", shape=shape)
