"""AWQ ("gemm" layout), and ParoQuant, which stores a rotation beside the same tensors.

Of a linear with O outputs and I inputs in G groups: `qweight` int32 [I, O / 8], `qzeros` int32 [G, O / 8], `scales`
float16 [G, O]; weight = (code - zero) * scale. ParoQuant adds `theta` [R, I / 2], `pairs` int16 [R, I] and
`channel_scales` [1, I], which multiply the activations. Experts of a layer share those: `experts.gate_up_weight_theta`
and so on are of all their gate and up projections, `experts.down_weight_theta` of all their down projections.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from jaxmodels.quantization.packing import by_outputs, unpack_int4
from jaxmodels.quantization.source import Linear, fields_of, group_size_of, groups_of
from pallas_kernels.quantized_matmul import QuantizedTensor, Rotation

WHERE = "quantization_config"
HALF = (np.float16, ml_dtypes.bfloat16, np.float32)


@dataclass(frozen=True)
class Awq:
    """Asymmetric 4-bit groups."""

    group_size: int
    marker = "qweight"

    @classmethod
    def from_hf(cls, block: Mapping[str, Any]) -> "Awq":
        known: dict[str, tuple[Any, ...] | None] = {
            "quant_method": ("awq",), "bits": (4,), "group_size": None, "zero_point": (True,),
            "version": ("gemm", "GEMM"), "modules_to_not_convert": None,
            # how another library is to run it
            "do_fuse": None, "fuse_max_seq_len": None, "modules_to_fuse": None, "exllama_config": None, "backend": None,
            "q_group_size": None, "w_bit": (4,),
        }  # fmt: skip
        fields_of(block, known, WHERE)
        return cls(group_size_of(block, WHERE))

    @property
    def title(self) -> str:
        return f"AWQ, 4 bits, groups of {self.group_size}"

    def suffixes(self, name: str) -> tuple[set[str], set[str]]:
        return {"qweight", "qzeros", "scales"}, set()

    def read(self, linear: Linear) -> QuantizedTensor:
        return read_gemm(linear, self.group_size)


def read_gemm(linear: Linear, group_size: int) -> QuantizedTensor:
    """The tensors of the "gemm" layout."""
    outputs, inputs, groups = linear.outputs, linear.inputs, groups_of(linear, group_size)
    if outputs % 8:
        raise ValueError(f"{linear.name}: AWQ packs eight outputs into a word; got {outputs}")
    words = linear.view("qweight", [np.int32], (inputs, outputs // 8))
    zeros = linear.view("qzeros", [np.int32], (groups, outputs // 8))
    scales = linear.view("scales", HALF, (groups, outputs), finite=True)
    return QuantizedTensor(
        codes=by_outputs(words, "awq", out=linear.room),
        scales=scales,
        zeros=unpack_int4(zeros, "awq").astype(np.int8) - np.int8(8),
        format="int4",
        shape=(outputs, inputs),
    )


@dataclass(frozen=True)
class Paroquant:
    """Asymmetric 4-bit groups of rotated and scaled channels (arXiv 2511.10645)."""

    group_size: int
    num_rotations: int
    marker = "qweight"
    turn = frozenset({"theta", "pairs", "channel_scales"})  # tensors that experts share

    @classmethod
    def from_hf(cls, block: Mapping[str, Any]) -> "Paroquant":
        known: dict[str, tuple[Any, ...] | None] = {
            "quant_method": ("paroquant",), "bits": (4,), "group_size": None, "krot": None,
            "modules_to_not_convert": None,
        }  # fmt: skip
        steps = fields_of(block, known, WHERE)["krot"]
        size = group_size_of(block, WHERE)
        if type(steps) is not int or steps < 1:
            raise ValueError(f"{WHERE}: field 'krot' must be a positive integer; got {steps!r}")
        if size % 2:
            raise ValueError(f"{WHERE}: pairs need groups of even size; got group_size {size}")
        return cls(size, steps)

    @property
    def title(self) -> str:
        return f"ParoQuant, 4 bits, groups of {self.group_size}, {self.num_rotations} rotations"

    def suffixes(self, name: str) -> tuple[set[str], set[str]]:
        return {"qweight", "qzeros", "scales", *self.turn}, set()

    def read(self, linear: Linear) -> QuantizedTensor:
        weight = self.read_codes(linear)
        scales, rotation = self.read_turn(linear)
        return dataclasses.replace(weight, input_scales=scales, rotation=rotation)

    def read_codes(self, linear: Linear) -> QuantizedTensor:
        """The weight without its rotation."""
        return read_gemm(linear, self.group_size)

    def read_turn(self, linear: Linear) -> tuple[np.ndarray, Rotation]:
        """Scales and rotation of the inputs."""
        inputs = linear.inputs
        size = inputs // groups_of(linear, self.group_size)
        theta = linear.view("theta", HALF, (self.num_rotations, inputs // 2), finite=True)
        pairs = linear.view("pairs", [np.int16], (self.num_rotations, inputs))
        scales = linear.view("channel_scales", HALF, (1, inputs), (inputs,), finite=True)
        groups = np.sort(pairs.reshape(self.num_rotations, -1, size), axis=2)
        wrong = np.argwhere((groups != np.arange(size)).any(axis=2))
        if len(wrong):
            step, group = wrong[0]
            raise linear.error("pairs", f"is no permutation of 0..{size - 1} in rotation {step}, group {group}")
        if not (scales > 0).all():
            raise linear.error("channel_scales", f"must be positive; the smallest is {scales.min()}")
        return scales.reshape(inputs), Rotation(theta, pairs)
