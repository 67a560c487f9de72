"""GPTQ.

Of a linear with O outputs and I inputs in G groups: `qweight` int32 [I / 8, O], `qzeros` int32 [G, O / 8], `scales`
[G, O], `g_idx` int32 [I], the group of each input. In version 1 a stored zero is one less than the zero, modulo 16.
With `desc_act` the groups are spread over the inputs; the codes are sorted here, once, and activations at every call.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmodels.quantization.awq import HALF, WHERE
from jaxmodels.quantization.packing import by_outputs, unpack_int4
from jaxmodels.quantization.source import Linear, fields_of, group_size_of, groups_of
from pallas_kernels.quantized_matmul import QuantizedTensor


@dataclass(frozen=True)
class Gptq:
    """4-bit groups, of consecutive inputs or of any."""

    group_size: int
    zero_offset: int  # what is added to a stored zero
    marker = "qweight"

    @classmethod
    def from_hf(cls, block: Mapping[str, Any]) -> "Gptq":
        known: dict[str, tuple[Any, ...] | None] = {
            "quant_method": ("gptq",), "bits": (4,), "group_size": None, "desc_act": (False, True),
            "sym": (True, False), "checkpoint_format": ("gptq", None, "gptq_v2"),
            "is_marlin_format": (False, None), "use_exllama": None, "pack_dtype": ("int32", None),
            "dynamic": ({}, None), "format": ("gptq", None, "gptq_v2"), "modules_in_block_to_quantize": None,
            # how it was quantized, and how another library is to run it
            "dataset": None, "damp_percent": None, "damp_auto_increment": None, "true_sequential": None,
            "static_groups": None, "model_name_or_path": None, "model_file_base_name": None, "tokenizer": None,
            "lm_head": None, "quantizer": None, "meta": None, "model_seqlen": None, "block_name_to_quantize": None,
            "module_name_preceding_first_block": None, "batch_size": None, "pad_token_id": None, "backend": None,
            "disable_exllama": None, "exllama_config": None, "max_input_length": None, "use_cuda_fp16": None,
            "cache_block_outputs": None, "modules_to_not_convert": None, "mse": None,
        }  # fmt: skip
        fields = fields_of(block, known, WHERE)
        versions = {fields[name] for name in ("checkpoint_format", "format") if block.get(name) is not None}
        if len(versions) > 1:
            raise ValueError(f"{WHERE}: fields 'checkpoint_format' and 'format' disagree: {sorted(versions)}")
        return cls(group_size_of(block, WHERE), 0 if versions == {"gptq_v2"} else 1)

    @property
    def title(self) -> str:
        return f"GPTQ, 4 bits, groups of {self.group_size}"

    def suffixes(self, name: str) -> tuple[set[str], set[str]]:
        return {"qweight", "qzeros", "scales"}, {"g_idx"}

    def read(self, linear: Linear) -> QuantizedTensor:
        outputs, inputs, groups = linear.outputs, linear.inputs, groups_of(linear, self.group_size)
        if outputs % 8 or inputs % 8:
            raise ValueError(f"{linear.name}: GPTQ packs eights of inputs and outputs; got {inputs} and {outputs}")
        words = linear.view("qweight", [np.int32], (inputs // 8, outputs))
        zeros = linear.view("qzeros", [np.int32], (groups, outputs // 8))
        scales = linear.view("scales", HALF, (groups, outputs), finite=True)
        order = np.arange(inputs, dtype=np.int32)
        if linear.has("g_idx"):
            group_of = linear.view("g_idx", [np.int32, np.int64], (inputs,))
            counts = np.bincount(group_of, minlength=groups) if group_of.min() >= 0 else np.zeros(0)
            if len(counts) != groups or (counts != inputs // groups).any():
                raise linear.error("g_idx", f"must name each of {groups} groups {inputs // groups} times")
            order = np.argsort(group_of, kind="stable").astype(np.int32)
        true_zeros = (unpack_int4(zeros, "sequential") + np.uint8(self.zero_offset)) & np.uint8(15)
        return QuantizedTensor(
            codes=by_outputs(words, "gptq", order, out=linear.room),
            scales=scales,
            zeros=true_zeros.astype(np.int8) - np.int8(8),
            order=order,
            format="int4",
            shape=(outputs, inputs),
        )
