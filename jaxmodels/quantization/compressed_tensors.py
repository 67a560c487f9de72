"""compressed-tensors, as LLM Compressor writes it.

Of a linear with O outputs and I inputs:

    pack-quantized         weight_packed int32 [O, I / 8], weight_scale [O, G], weight_zero_point int32 [O / 8, G]
                           packed along the outputs (asymmetric only), weight_shape [2]; codes and zeros are stored
                           plus 8
    int-quantized          weight int8 [O, I], weight_scale [O, 1], [O, G] or [1]
    float-quantized        weight float8_e4m3fn [O, I], weight_scale [O, 1], [1] or [O / 128, I / 128]
    nvfp4-pack-quantized   weight_packed uint8 [O, I / 2], weight_scale float8_e4m3fn [O, I / 16], weight_global_scale
                           [1], which is the inverse of the factor

`input_scale` [1] is there when activations have one fixed scale.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from jaxmodels.quantization.awq import HALF, WHERE
from jaxmodels.quantization.packing import by_outputs, unpack_int4
from jaxmodels.quantization.source import Linear, fields_of, groups_of
from pallas_kernels.quantized_matmul import QuantizedTensor
from pallas_kernels.quantized_matmul.tensor import Activations

FP8 = ml_dtypes.float8_e4m3fn
FORMATS = {
    "pack-quantized": ("int", 4),
    "int-quantized": ("int", 8),
    "float-quantized": ("float", 8),
    "nvfp4-pack-quantized": ("float", 4),
}


@dataclass(frozen=True)
class CompressedTensors:
    """One scheme for all quantized linears."""

    format: str  # a key of FORMATS
    strategy: str  # what shares a scale: "tensor", "channel", "group", "tensor_group" or "block"
    group_size: int  # of "group"; -1 elsewhere
    symmetric: bool
    activations: Activations | None
    static: bool  # activations have one fixed scale

    @property
    def marker(self) -> str:
        return "weight_scale"

    @property
    def title(self) -> str:
        kind, bits = FORMATS[self.format]
        scales = f"groups of {self.group_size}" if self.strategy == "group" else f"scales per {self.strategy}"
        also = (
            "" if self.activations is None else f", {'static' if self.static else 'dynamic'} {self.activations} inputs"
        )
        return f"compressed-tensors {self.format}, {kind}{bits}, {scales}{also}"

    @classmethod
    def from_hf(cls, block: Mapping[str, Any]) -> "CompressedTensors":
        known: dict[str, tuple[Any, ...] | None] = {
            "quant_method": ("compressed-tensors",), "config_groups": None, "format": None, "ignore": None,
            "kv_cache_scheme": (None,), "quantization_status": ("compressed",), "global_compression_ratio": None,
            "sparsity_config": ({}, None), "transform_config": ({}, None), "version": None,
            "moe_sparsity_config": (None,),
        }  # fmt: skip
        fields = fields_of(block, known, WHERE)
        groups = fields["config_groups"]
        if not isinstance(groups, Mapping) or len(groups) != 1:
            raise ValueError(f"{WHERE}: field 'config_groups' must hold one group; got {groups!r}")
        name, group = next(iter(groups.items()))
        where = f"{WHERE}: config_groups.{name}"
        if not isinstance(group, Mapping):
            raise ValueError(f"{where} must be an object; got {group!r}")
        group = fields_of(
            group,
            {
                "targets": None,
                "weights": None,
                "input_activations": None,
                "output_activations": (None,),
                "format": None,
            },
            where,
        )
        if group["targets"] != ["Linear"]:
            raise ValueError(f"{where}: field 'targets' is {group['targets']!r}; implemented: ['Linear']")
        layout = group["format"] or fields["format"]
        if layout not in FORMATS:
            raise ValueError(f"{WHERE}: format {layout!r} is not implemented; known: {[*FORMATS]}")
        kind, bits = FORMATS[layout]
        strategies = {"pack-quantized": ("group", "channel"), "nvfp4-pack-quantized": ("tensor_group",)}
        known = {
            "num_bits": (bits,), "type": (kind,), "symmetric": (True, False) if layout == "pack-quantized" else (True,),
            "strategy": strategies.get(layout, ("channel", "tensor", "group" if kind == "int" else "block")),
            "dynamic": (False, None), "actorder": (None, False, "weight", "static"), "group_size": None,
            "block_structure": ([128, 128], None), "observer": None, "observer_kwargs": None,
            "scale_dtype": None, "zp_dtype": None,
        }  # fmt: skip
        if not isinstance(group["weights"], Mapping):
            raise ValueError(f"{where}: field 'weights' must be an object; got {group['weights']!r}")
        weights = fields_of(group["weights"], known, f"{where}.weights")
        size = weights["group_size"] if weights["strategy"] == "group" else -1
        if type(size) is not int or (size < 1 and size != -1):
            raise ValueError(f"{where}.weights: field 'group_size' must be positive; got {size!r}")
        if weights["strategy"] == "tensor_group" and weights["group_size"] not in (None, 16):
            raise ValueError(f"{where}.weights: NVFP4 has groups of 16; got {weights['group_size']!r}")
        inputs, static = _inputs(layout, group["input_activations"], weights["strategy"], f"{where}.input_activations")
        return cls(layout, weights["strategy"], size, weights["symmetric"], inputs, static)

    def suffixes(self, name: str) -> tuple[set[str], set[str]]:
        if self.format == "pack-quantized":
            zeros = set() if self.symmetric else {"weight_zero_point"}
            return {"weight_packed", "weight_scale", "weight_shape"} | zeros, set()
        if self.format == "nvfp4-pack-quantized":
            return {"weight_packed", "weight_scale", "weight_global_scale"}, {"input_global_scale"}
        return {"weight", "weight_scale"} | ({"input_scale"} if self.static else set()), set()

    def read(self, linear: Linear) -> QuantizedTensor:
        outputs, _ = shape = (linear.outputs, linear.inputs)
        if self.format == "pack-quantized":
            return self._packed(linear)
        if self.format == "nvfp4-pack-quantized":
            factor = linear.view("weight_global_scale", [np.float32], (1,), (), finite=True)
            if not factor.reshape(()) > 0:
                raise linear.error("weight_global_scale", f"must be positive; got {factor}")
            return nvfp4(linear, "weight_packed", np.asarray(1 / factor.reshape(()), np.float32))
        integers = self.format == "int-quantized"
        codes = linear.view("weight", [np.int8 if integers else FP8], shape)
        if self.strategy == "block":
            scales = from_blocks(linear, linear.view("weight_scale", HALF, block_shape(linear), finite=True))
        else:
            groups = groups_of(linear, self.group_size)
            per = [(1,), (1, 1)] if self.strategy == "tensor" else [(outputs, groups)]
            scales = linear.view("weight_scale", HALF, *per, finite=True)
            scales = np.broadcast_to(scales.reshape(-1, groups), (outputs, groups)).T
        return QuantizedTensor(
            codes=codes,
            scales=scales,
            activation_scale=fixed_scale(linear, "input_scale") if self.static else None,
            format="int8" if integers else "fp8",
            shape=shape,
            activations=self.activations,
        )

    def _packed(self, linear: Linear) -> QuantizedTensor:
        outputs, inputs = shape = (linear.outputs, linear.inputs)
        groups = groups_of(linear, self.group_size)
        if inputs % 8:
            raise ValueError(f"{linear.name}: eight inputs are packed into a word; got {inputs}")
        stored = linear.view("weight_shape", [np.int32, np.int64], (2,))
        if tuple(stored) != shape:
            raise linear.error("weight_shape", f"is {tuple(map(int, stored))}; the model has {shape}")
        words = linear.view("weight_packed", [np.int32], (outputs, inputs // 8))
        scales = linear.view("weight_scale", HALF, (outputs, groups), finite=True)
        zeros = None
        if not self.symmetric:
            packed = linear.view("weight_zero_point", [np.int32], (math.ceil(outputs / 8), groups))
            zeros = unpack_int4(packed, "gptq")[:outputs].T.astype(np.int8) - np.int8(8)
        return QuantizedTensor(
            codes=by_outputs(words, "sequential", out=linear.room),
            scales=scales.T,
            zeros=zeros,
            format="int4",
            shape=shape,
        )


def _inputs(layout: str, block: Any, strategy: str, where: str) -> tuple[Activations | None, bool]:
    """What activations are rounded to, and if by a fixed scale. Those of NVFP4 and of blocks stay as they are."""
    if block is None:
        return None, False
    kind, bits = FORMATS[layout]
    if layout == "pack-quantized":
        raise ValueError(f"{where}: quantized inputs with format {layout!r} are not implemented; got {block!r}")
    if not isinstance(block, Mapping):
        raise ValueError(f"{where} must be an object; got {block!r}")
    known: dict[str, tuple[Any, ...] | None] = {
        "num_bits": (bits,), "type": (kind,), "symmetric": (True,), "dynamic": (False, True, "local", None),
        "strategy": None, "group_size": None, "actorder": (None,), "block_structure": (None,), "observer": None,
        "observer_kwargs": None, "scale_dtype": None, "zp_dtype": None,
    }  # fmt: skip
    fields = fields_of(block, known, where)
    if layout == "nvfp4-pack-quantized" or strategy == "block":
        return None, False
    static = not fields["dynamic"]
    expected = "tensor" if static else "token"
    if fields["strategy"] != expected or strategy == "group":
        raise ValueError(
            f"{where}: field 'strategy' is {fields['strategy']!r} of {'static' if static else 'dynamic'} inputs and "
            f"weights by {strategy}; implemented: {expected!r}, and weights by channel or tensor"
        )
    return "int8" if kind == "int" else "fp8", static


def fixed_scale(linear: Linear, suffix: str) -> np.ndarray:
    """One positive float32 factor."""
    value = linear.view(suffix, HALF, (1,), (), (1, 1), finite=True).astype(np.float32).reshape(())
    if not value > 0:
        raise linear.error(suffix, f"must be positive; got {value}")
    return value


def nvfp4(linear: Linear, codes: str, factor: np.ndarray) -> QuantizedTensor:
    """NVFP4 whose values are times `factor`."""
    if linear.inputs % 16:
        raise ValueError(f"{linear.name}: NVFP4 has groups of 16; got {linear.inputs} inputs")
    scales = linear.view("weight_scale", [FP8], (linear.outputs, linear.inputs // 16), finite=True)
    return QuantizedTensor(
        codes=linear.view(codes, [np.uint8], (linear.outputs, linear.inputs // 2)),
        scales=scales.T,
        global_scale=np.asarray(factor, np.float32),
        format="nvfp4",
        shape=(linear.outputs, linear.inputs),
    )


def block_shape(linear: Linear) -> tuple[int, int]:
    """Blocks of 128 x 128; ValueError naming the linear when its inputs end within one."""
    if linear.inputs % 128:
        raise ValueError(
            f"{linear.name}: scales of 128 x 128 blocks need a multiple of 128 inputs; got {linear.inputs}"
        )
    return math.ceil(linear.outputs / 128), linear.inputs // 128


def from_blocks(linear: Linear, scales: np.ndarray) -> np.ndarray:
    """Scales `[G, O]` of blocks of 128 x 128."""
    return np.repeat(scales, 128, axis=0)[: linear.outputs].T
