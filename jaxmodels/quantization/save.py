"""Writing quantized linears in the layouts that other tools read.

int4                             AWQ ("gemm")
int4, scaled and rotated inputs  ParoQuant; what experts share is stored once, for gate and up projections together
int8, fp8, nvfp4                 compressed-tensors
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxmodels.checkpoints.mapping import Row
from jaxmodels.checkpoints.safetensors import LazyTensor
from jaxmodels.quantization.packing import pack_int4
from pallas_kernels.quantized_matmul import QuantizedTensor

Fetch = Callable[[Any, tuple[int, ...]], np.ndarray]
FP8 = ml_dtypes.float8_e4m3fn


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of a quantized linear: its dtype and shape, and how it is made of the weight in NumPy arrays."""

    dtype: Any
    shape: tuple[int, ...]
    make: Callable[[Any], np.ndarray]


def layout_of(weight: QuantizedTensor, name: str) -> str:
    """ "awq", "paroquant" or "compressed-tensors"; ValueError naming a weight that none of them can hold."""
    turned = weight.input_scales is not None or weight.rotation is not None
    if weight.order is not None:
        raise ValueError(f"{name}: inputs in an order of their own (GPTQ with desc_act) have no layout to be saved in")
    if weight.activation_scale is not None:
        raise ValueError(f"{name}: a fixed scale of activations has no layout to be saved in")
    if weight.format != "int4":
        if turned:
            raise ValueError(f"{name}: scaled or rotated inputs of {weight.format} have no layout to be saved in")
        if weight.scales.shape[-2] > 1 and weight.format != "nvfp4":
            raise ValueError(f"{name}: {weight.format} codes with scales of groups have no layout to be saved in")
        return "compressed-tensors"
    if weight.outputs % 8:
        raise ValueError(f"{name}: AWQ packs eight outputs into a word; got {weight.outputs}")
    if turned and (weight.rotation is None or weight.input_scales is None):
        raise ValueError(
            f"{name}: ParoQuant has both a rotation and scales of inputs; this weight has only one of them"
        )
    return "paroquant" if turned else "awq"


def stored(weight: QuantizedTensor) -> dict[str, Stored]:
    """The tensors of one linear by suffix; of `weight` only shapes are used."""
    outputs, inputs, groups = weight.outputs, weight.inputs, weight.scales.shape[-2]
    if weight.format == "nvfp4":
        return {
            "weight_packed": Stored(np.uint8, (outputs, inputs // 2), lambda w: w.codes),
            "weight_scale": Stored(FP8, (outputs, groups), lambda w: w.scales.T),
            "weight_global_scale": Stored(np.float32, (1,), lambda w: 1 / w.global_scale.reshape(1)),
        }
    if weight.format != "int4":
        codes = np.int8 if weight.format == "int8" else FP8
        return {
            "weight": Stored(codes, (outputs, inputs), lambda w: w.codes),
            "weight_scale": Stored(np.float32, (outputs, 1), lambda w: w.scales.astype(np.float32).T),
        }
    tensors = {
        "qweight": Stored(np.int32, (inputs, outputs // 8), lambda w: pack_int4(_unsigned(w).T, "awq")),
        "qzeros": Stored(np.int32, (groups, outputs // 8), lambda w: pack_int4(_zeros(w), "awq")),
        "scales": Stored(np.float16, (groups, outputs), lambda w: _half(w.scales, "scales")),
    }
    if weight.rotation is not None and not weight.shares_turn:
        tensors |= stored_turn(weight)
    return tensors


def stored_turn(weight: QuantizedTensor) -> dict[str, Stored]:
    """The tensors of the rotation of one linear's inputs, or of those of all experts."""
    assert weight.rotation is not None
    inputs, steps = weight.inputs, weight.rotation.theta.shape[-2]
    return {
        "theta": Stored(np.float16, (steps, inputs // 2), lambda w: _half(w.rotation.theta, "theta")),
        "pairs": Stored(np.int16, (steps, inputs), lambda w: w.rotation.pairs.astype(np.int16)),
        "channel_scales": Stored(np.float16, (1, inputs), lambda w: _half(w.input_scales, "channel_scales")[None]),
    }


def _unsigned(weight: Any) -> np.ndarray:
    """Codes 0..15 `[O, I]`."""
    packed = weight.codes
    both = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    return both ^ 8  # a signed nibble plus 8


def _zeros(weight: Any) -> np.ndarray:
    return np.full(weight.scales.shape, 8) if weight.zeros is None else weight.zeros.astype(np.int32) + 8


def _half(array: np.ndarray, name: str) -> np.ndarray:
    """float16; ValueError for what would overflow there or become 0."""
    array = np.asarray(array, np.float32)
    half = array.astype(np.float16)
    if not np.isfinite(half).all() or ((half == 0) & (array != 0) & (name != "theta")).any():
        raise ValueError(f"{name} do not fit into float16: {np.abs(array).min()} to {np.abs(array).max()}")
    return half


def config_block(weights: Mapping[str, QuantizedTensor], dense: Sequence[Row]) -> dict[str, Any]:
    """The `quantization_config` of a model with these linears; ValueError when they are not all of one kind.

    `dense` are the rows of what stays dense, whose linears it names: readers take all others for quantized.
    """
    (first, weight), *others = weights.items()
    kind = _kind(weight, first)
    for name, other in others:
        if _kind(other, name) != kind:
            raise ValueError(f"{name} is quantized differently from {first}: {_kind(other, name)} and {kind}")
    matrices = (row.key.rpartition("{}.")[2] for row in dense if row.stacked and len(row.axes) == 2)
    modules = [name.removesuffix(".weight") for name in matrices]
    if kind["layout"] == "awq":
        return {
            "quant_method": "awq", "bits": 4, "group_size": kind["group_size"], "zero_point": True, "version": "gemm",
            "modules_to_not_convert": modules or None,  # readers look for the string
        }  # fmt: skip
    if kind["layout"] == "paroquant":
        return {"quant_method": "paroquant", "bits": 4, "group_size": kind["group_size"], "krot": kind["steps"]}
    name, number, bits = {
        "int8": ("int-quantized", "int", 8), "fp8": ("float-quantized", "float", 8),
        "nvfp4": ("nvfp4-pack-quantized", "float", 4),
    }[weight.format]  # fmt: skip
    options = {"num_bits": bits, "type": number, "symmetric": True}
    own = {"strategy": "tensor_group", "group_size": 16} if bits == 4 else {"strategy": "channel"}
    inputs = None if weight.activations is None else options | {"strategy": "token", "dynamic": True}
    heads = [] if "head" in weights else ["lm_head"]  # also of a tied head, which has no tensor
    group = {"targets": ["Linear"], "weights": options | own | {"dynamic": False}, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors", "format": name, "quantization_status": "compressed",
        "config_groups": {"group_0": group | {"output_activations": None}},
        "ignore": [*heads, *(f"re:.*{module}$" for module in modules)],
        "kv_cache_scheme": None,
    }  # fmt: skip


def _kind(weight: QuantizedTensor, name: str) -> dict[str, Any]:
    group_size = -1 if weight.scales.shape[-2] == 1 else weight.group_size
    steps = None if weight.rotation is None else weight.rotation.theta.shape[-2]
    layout = layout_of(weight, name)
    sized = {"group_size": group_size, "steps": steps} if layout != "compressed-tensors" else {}
    return {"layout": layout, "format": weight.format, "activations": weight.activations} | sized


def quantized_tensors(rows: Sequence[Row], weights: Mapping[tuple[str, ...], QuantizedTensor], fetch: Fetch) -> dict:
    """The checkpoint's tensors of quantized parameters, made when the writer comes to them.

    `fetch(array, index)` brings one array, or what a stacked one has at an index of its first axes, to the host.
    """
    tensors: dict[str, LazyTensor] = {}
    shared: dict[str, list[Callable[[], np.ndarray]]] = {}
    for row in rows:
        weight = weights[row.path]
        if weight.shares_turn:
            if row.shared is None:
                raise ValueError(f"{'.'.join(row.path)}: experts that share a rotation have no layout to be saved in")
            for layer in range(weight.codes.shape[0]):
                for suffix, tensor in stored_turn(weight).items():
                    name = f"{row.shared.format(layer)}_{suffix}"
                    shared.setdefault(name, []).append(_reader(weight, (layer,), tensor, name, fetch))
                    tensors[name] = LazyTensor(tensor.shape, np.dtype(tensor.dtype), _agreed(shared[name], name))
        for index in row.indices(weight.codes.shape[0]):
            module = row.name(*index).removesuffix(".weight")
            for suffix, tensor in stored(weight).items():
                tensors[f"{module}.{suffix}"] = LazyTensor(
                    tensor.shape, np.dtype(tensor.dtype), _reader(weight, index, tensor, f"{module}.{suffix}", fetch)
                )
    return tensors


def _agreed(readers: list[Callable[[], np.ndarray]], name: str) -> Callable[[], np.ndarray]:
    """The one value that all readers give."""

    def read() -> np.ndarray:
        first, *others = (reader() for reader in readers)
        if any(not np.array_equal(first, other) for other in others):
            raise ValueError(f"{name}: gate and up projections of experts must share it; theirs differ")
        return first

    return read


class _One:
    """The arrays of a weight, or of one in its stack, on the host as they are asked for."""

    def __init__(self, weight: QuantizedTensor, index: tuple[int, ...], fetch: Fetch):
        self._weight, self._index, self._fetch = weight, index, fetch

    def __getattr__(self, name: str) -> Any:
        return jax.tree.map(lambda leaf: self._fetch(leaf, self._index), getattr(self._weight, name))


def _reader(
    weight: QuantizedTensor, index: tuple[int, ...], tensor: Stored, name: str, fetch: Fetch
) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        try:
            made = tensor.make(_One(weight, index, fetch))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        return np.ascontiguousarray(made, dtype=tensor.dtype)

    return read
