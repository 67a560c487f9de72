"""ModelOpt, as NVIDIA's checkpoints come: `hf_quant_config.json`, or the same in config.json.

Of a linear with O outputs and I inputs:

    FP8                         weight float8_e4m3fn [O, I], weight_scale [], input_scale []
    FP8_PER_CHANNEL_PER_TOKEN   weight float8_e4m3fn [O, I], weight_scale [O]; inputs by token
    FP8_PB_WO                   weight float8_e4m3fn [O, I], weight_scale [O / 128, I / 128] or [O / 128, 1, I / 128, 1]
    NVFP4                       weight uint8 [O, I / 2], weight_scale float8_e4m3fn [O, I / 16], weight_scale_2 [];
                                input_scale [] is for hardware that multiplies in four bits
    W4A16_AWQ                   weight uint8 [O / 2, I], two outputs in a byte, weight_scale [O, I / g],
                                pre_quant_scale [I]

`k_proj.k_scale` and `v_proj.v_scale` are those of an 8-bit cache.
"""

import dataclasses
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmodels.quantization.awq import HALF
from jaxmodels.quantization.compressed_tensors import FP8, block_shape, fixed_scale, from_blocks, nvfp4
from jaxmodels.quantization.source import Linear, fields_of, groups_of
from pallas_kernels.quantized_matmul import QuantizedTensor, nibbles

ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_AWQ")
KV_ALGORITHMS = (None, "FP8", "INT8")


@dataclass(frozen=True)
class ModelOpt:
    """One algorithm for all quantized linears, or one for each (MIXED_PRECISION)."""

    algorithm: str
    group_size: int | None  # of W4A16_AWQ
    layers: tuple[tuple[str, str, int | None], ...]  # MIXED_PRECISION: module (or pattern), algorithm, group size
    kv: str | None
    marker = "weight_scale"

    @property
    def title(self) -> str:
        kinds = sorted({algorithm for _, algorithm, _ in self.layers}) or [self.algorithm]
        return f"ModelOpt {' and '.join(kinds)}" + ("" if self.kv is None else f", {self.kv} cache")

    @classmethod
    def from_hf(cls, block: Mapping[str, Any], where: str) -> "ModelOpt":
        """From the object "quantization" of hf_quant_config.json, or "quantization_config" of config.json."""
        known: dict[str, tuple[Any, ...] | None] = {
            "quant_algo": None, "kv_cache_quant_algo": KV_ALGORITHMS, "group_size": None, "exclude_modules": None,
            "quantized_layers": None, "has_zero_point": (False, None), "pre_quant_scale": None,
            # only in config.json
            "quant_method": ("modelopt", "modelopt_fp4", None), "ignore": None, "producer": None, "config_groups": None,
            "kv_cache_scheme": None,
        }  # fmt: skip
        fields = fields_of(block, known, where)
        algorithm, listed = fields["quant_algo"], fields["quantized_layers"] or {}
        if algorithm == "MIXED_PRECISION" and not listed:
            raise ValueError(f"{where}: quant_algo 'MIXED_PRECISION' needs 'quantized_layers'")
        layers = []
        for name, of_layer in listed.items():
            of_layer = fields_of(of_layer, {"quant_algo": ALGORITHMS, "group_size": None, "awq_block_size": None,
                                            "has_zero_point": (False, None), "pre_quant_scale": None},
                                 f"{where}: quantized_layers.{name}")  # fmt: skip
            layers.append((name, of_layer["quant_algo"], of_layer["group_size"] or of_layer["awq_block_size"]))
        if algorithm != "MIXED_PRECISION" and algorithm not in ALGORITHMS:
            raise ValueError(f"{where}: quant_algo {algorithm!r} is not implemented; known: {[*ALGORITHMS]}")
        kv = fields["kv_cache_quant_algo"]
        if kv is None and fields["kv_cache_scheme"] is not None:
            scheme = fields["kv_cache_scheme"]
            if not isinstance(scheme, Mapping) or (scheme.get("num_bits"), scheme.get("type")) != (8, "float"):
                raise ValueError(f"{where}: kv_cache_scheme {scheme!r} is not implemented; known: 8-bit float")
            kv = "FP8"
        return cls(algorithm, fields["group_size"], tuple(layers), kv)

    def _of(self, name: str) -> tuple[str, int | None]:
        """Algorithm and group size of one module."""
        if self.algorithm != "MIXED_PRECISION":
            return self.algorithm, self.group_size
        for pattern, algorithm, group_size in self.layers:
            if fnmatch.fnmatchcase(name, pattern):
                return algorithm, group_size
        raise ValueError(f"{name}: has quantized tensors, but no entry of quantized_layers names it")

    def suffixes(self, name: str) -> tuple[set[str], set[str]]:
        algorithm, _ = self._of(name)
        needed = {
            "FP8": {"weight", "weight_scale", "input_scale"},
            "NVFP4": {"weight", "weight_scale", "weight_scale_2"},
        }.get(algorithm, {"weight", "weight_scale"})
        possible = {"NVFP4": {"input_scale", "pre_quant_scale"}, "W4A16_AWQ": {"pre_quant_scale"}}.get(algorithm, set())
        return needed, possible

    def read(self, linear: Linear) -> QuantizedTensor:
        algorithm, group_size = self._of(linear.name)
        outputs, inputs = shape = (linear.outputs, linear.inputs)
        pre = None
        if linear.has("pre_quant_scale"):
            pre = linear.view("pre_quant_scale", HALF, (inputs,), (1, inputs), finite=True).reshape(inputs)
            if not (pre > 0).all():
                raise linear.error("pre_quant_scale", f"must be positive; the smallest is {pre.min()}")
        if algorithm == "NVFP4":
            weight = nvfp4(linear, "weight", fixed_scale(linear, "weight_scale_2"))
            return dataclasses.replace(weight, input_scales=pre)
        if algorithm == "W4A16_AWQ":
            groups = groups_of(linear, group_size or 128)
            if outputs % 2:
                raise ValueError(f"{linear.name}: ModelOpt packs two outputs into a byte; got {outputs}")
            packed = linear.view("weight", [np.uint8], (outputs // 2, inputs))
            codes = np.stack([packed & 15, packed >> 4], axis=1).reshape(shape)  # already in two's complement
            scales = linear.view("weight_scale", HALF, (outputs, groups), finite=True)
            return QuantizedTensor(
                codes=nibbles.pack(codes), scales=scales.T, input_scales=pre, format="int4", shape=shape
            )
        codes = linear.view("weight", [FP8], shape)
        if algorithm == "FP8_PB_WO":
            rows, columns = block_shape(linear)
            scales = linear.view("weight_scale", HALF, (rows, columns), (rows, 1, columns, 1), finite=True)
            return QuantizedTensor(
                codes=codes, scales=from_blocks(linear, scales.reshape(rows, columns)), format="fp8", shape=shape
            )
        static = algorithm == "FP8"
        wanted = [(), (1,)] if static else [(outputs,), (outputs, 1)]
        scales = linear.view("weight_scale", HALF, *wanted, finite=True).reshape(1, -1)
        return QuantizedTensor(
            codes=codes,
            scales=np.broadcast_to(scales, (1, outputs)),
            activation_scale=fixed_scale(linear, "input_scale") if static else None,
            format="fp8",
            shape=shape,
            activations="fp8",
        )
