"""Quantized checkpoints: which scheme it is, and its linears as stacked `QuantizedTensor`s on their devices.

Linears of experts are stacked by layer and by expert; a router is never quantized.

Codes are repacked once, into the one form that kernels read; nothing is ever expanded to a float.
"""

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxmodels.cache import Scales
from jaxmodels.checkpoints.huggingface import Checkpoint, read_json
from jaxmodels.checkpoints.mapping import Row, aligned_empty
from jaxmodels.quantization.awq import Awq, Paroquant
from jaxmodels.quantization.compressed_tensors import CompressedTensors, fixed_scale
from jaxmodels.quantization.fp8 import Fp8Blocks
from jaxmodels.quantization.gptq import Gptq
from jaxmodels.quantization.modelopt import ModelOpt
from jaxmodels.quantization.source import Linear, Scheme
from pallas_kernels.quantized_matmul import QuantizedTensor, Rotation

METHODS: dict[str, Callable[[Mapping[str, Any]], Scheme]] = {
    "awq": Awq.from_hf,
    "gptq": Gptq.from_hf,
    "paroquant": Paroquant.from_hf,
    "compressed-tensors": CompressedTensors.from_hf,
    "fp8": Fp8Blocks.from_hf,
}
FIELDS = ("quantization_config", "compression_config")
SEPARATE = "hf_quant_config.json"


def find_scheme(directory: Path, hf_config: Mapping[str, Any]) -> Scheme | None:
    """How the linears of a model directory are stored; None when they are not quantized.

    Raises ValueError naming the field and its value for methods and variants that are not implemented.
    """
    blocks = {field: hf_config[field] for field in FIELDS if hf_config.get(field) is not None}
    if len(blocks) > 1:
        raise ValueError(f"config.json has both {' and '.join(blocks)}: which one holds is not known")
    separate = directory / SEPARATE
    if not blocks:
        if not separate.is_file():
            return None
        block = read_json(separate).get("quantization")
        if not isinstance(block, Mapping):
            raise ValueError(f"{separate}: field 'quantization' must be an object; got {block!r}")
        return ModelOpt.from_hf(block, str(separate))
    field, block = next(iter(blocks.items()))
    if not isinstance(block, Mapping):
        raise ValueError(f"field {field!r} must be an object; got {block!r}")
    method = block.get("quant_method")
    if method in ("modelopt", "modelopt_fp4"):
        return ModelOpt.from_hf(block, field)
    if method not in METHODS:
        raise ValueError(
            f"field {field!r}: quant_method {method!r} is not implemented; known: {[*METHODS, 'modelopt']}"
        )
    return METHODS[method](block)


def quantized_modules(scheme: Scheme, names: Collection[str]) -> set[str]:
    """The modules that a checkpoint stores quantized."""
    suffix = f".{scheme.marker}"
    for name in names:
        if ".qlinear." in name:
            raise ValueError(f"tensor {name!r} is of ParoQuant's older native layout; convert it to the HF one")
    return {name.removesuffix(suffix) for name in names if name.endswith(suffix)}


def dense_names(scheme: Scheme | None, names: Collection[str]) -> set[str]:
    """Names of the tensors as if nothing was quantized: what tells about the structure of the model."""
    if scheme is None:
        return set(names)
    return set(names) | {f"{module}.weight" for module in quantized_modules(scheme, names)}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which parameters of a checkpoint are dense, and which quantized.

    Attributes:
      dense: rows of dense parameters.
      quantized: rows of quantized ones.
      names: every tensor of them all that is there.
    """

    dense: tuple[Row, ...]
    quantized: tuple[Row, ...]
    names: tuple[str, ...]


def plan(scheme: Scheme | None, source: Checkpoint, rows: Sequence[Row], layers: int) -> Plan:
    """Sorts the rows of a model's table.

    Raises ValueError naming a linear that only some layers have quantized, and a quantized embedding.

    A quantized linear may have a bias that the model has not, as some tools write it; it must be 0.
    """
    if scheme is None:
        names = tuple(name for row in rows for name in row.names(layers))
        return Plan(tuple(rows), (), names)
    modules, present = quantized_modules(scheme, source.names()), set(source.names())
    biases = {name for row in rows if row.key.endswith(".bias") for name in row.names(layers)}
    dense, quantized, used = [], [], []
    for row in rows:
        own = row.names(layers)
        linears = [name.removesuffix(".weight") for name in own]
        stored = [linear in modules for linear in linears]
        if any(stored) and not all(stored):
            raise ValueError(
                f"checkpoint {source}: {linears[stored.index(False)]} is not quantized, but "
                f"{linears[stored.index(True)]} is: layers that differ are not implemented"
            )
        if not any(stored):
            dense.append(row)
            used += own
            continue
        if row.path == ("embed",):
            raise ValueError(f"checkpoint {source}: {linears[0]} is quantized, which embeddings cannot be here")
        if row.path[-1] == "router":
            raise ValueError(f"checkpoint {source}: {linears[0]} is quantized, which routers of experts cannot be here")
        quantized.append(row)
        common = shared_turn(scheme, row, present)
        used += [f"{linear.name}_{suffix}" for linear in _shared(source, row, layers) for suffix in sorted(common)]
        for linear in linears:
            needed, possible = scheme.suffixes(linear)
            needed = needed - common
            used += [f"{linear}.{suffix}" for suffix in sorted(needed)]
            used += [name for suffix in sorted(possible) if (name := f"{linear}.{suffix}") in present]
            if (bias := f"{linear}.bias") in present - biases:
                if np.asarray(source.view(bias), np.float32).any():
                    raise ValueError(f"{source.describe(bias)[2]}: tensor {bias!r} is a bias that the model has not")
                used.append(bias)
    for scales in _kv_names(rows, layers):
        used += [name for name in scales if name in present]
    if not quantized:
        raise ValueError(f"checkpoint {source}: should be {scheme.title}, but has no tensor {scheme.marker!r}")
    return Plan(tuple(dense), tuple(quantized), tuple(used))


def shared_turn(scheme: Scheme, row: Row, names: Collection[str]) -> frozenset[str]:
    """Suffixes of what the experts of a row share in a checkpoint with these names; empty when they do not."""
    if not isinstance(scheme, Paroquant) or row.shared is None:
        return frozenset()
    beginning = row.shared.format(0) + "_"
    return scheme.turn if any(f"{beginning}{suffix}" in names for suffix in scheme.turn) else frozenset()


def _shared(source: Checkpoint, row: Row, layers: int, outputs: int = 0, inputs: int = 0) -> list[Linear]:
    """Where the experts' shared tensors are, layer by layer."""
    if row.shared is None:
        return []
    return [Linear(source, row.shared.format(layer), outputs, inputs, joint="_") for layer in range(layers)]


def _kv_names(rows: Sequence[Row], layers: int) -> list[list[str]]:
    """Where ModelOpt puts the scales of cached keys, and those of values, one name per layer."""
    found = []
    for last in ("k", "v"):
        row = next(row for row in rows if row.path == ("layers", "attention", last))
        found.append([f"{row.name(n).removesuffix('.weight')}.{last}_scale" for n in range(layers)])
    return found


def load_kv_scales(source: Checkpoint, rows: Sequence[Row], layers: int) -> Scales | None:
    """Scales of an 8-bit cache, float32 `[L]` of keys and of values; None when the checkpoint has none.

    Raises ValueError naming a scale that is missing while others are there, or is no positive number.
    """
    kinds = _kv_names(rows, layers)
    if not any(name in source.names() for names in kinds for name in names):
        return None
    values = []
    for names in kinds:
        own = []
        for name in names:
            if name not in source.names():
                raise ValueError(f"checkpoint {source}: lacks {name}, which other layers have")
            module, _, suffix = name.rpartition(".")
            own.append(fixed_scale(Linear(source, module, 0, 0), suffix))
        values.append(np.stack(own))
    return Scales(*values)


def load_quantized(
    scheme: Scheme,
    source: Checkpoint,
    row: Row,
    shape: tuple[int, ...],
    sharding: Sharding | None,
) -> QuantizedTensor:
    """One parameter of a model, stacked as its row is; one staging copy in host memory, which a CPU goes on to use.

    Args:
      scheme: of the checkpoint.
      source: the checkpoint.
      row: of the parameter.
      shape: of the dense parameter, with the axes that it is stacked along.
      sharding: of the dense parameter; None: the default device.
    """
    stack, own = shape[: row.stacked], shape[row.stacked :]
    outputs, inputs = row.stored_shape(own)
    linears = [Linear(source, name.removesuffix(".weight"), outputs, inputs) for name in row.names(shape[0])]
    if shared_turn(scheme, row, source.names()):
        assert isinstance(scheme, Paroquant)
        weight = _stacked(scheme.read_codes, linears, stack)
        scales, rotation = _stacked(scheme.read_turn, _shared(source, row, shape[0], outputs, inputs), stack[:1])
        weight = dataclasses.replace(weight, input_scales=scales, rotation=rotation)
    else:
        weight = _stacked(scheme.read, linears, stack)
    if weight.zeros is not None and not weight.zeros.any():
        weight = dataclasses.replace(weight, zeros=None)
    if weight.order is not None and (weight.order == np.arange(inputs)).all():
        weight = dataclasses.replace(weight, order=None)
    weight = dataclasses.replace(weight, shape=own, num_inputs=num_inputs(row))
    return _place(weight, sharding, linears[0].name)


def _stacked(read: Callable[[Linear], Any], linears: Sequence[Linear], stack: tuple[int, ...]) -> Any:
    """What `read` makes of each linear, a tree of arrays, in one tree of arrays with the axes `stack` in front."""
    leaves, treedef = jax.tree.flatten(read(linears[0]))
    stacks = [aligned_empty((len(linears), *leaf.shape), leaf.dtype) for leaf in leaves]
    codes = getattr(jax.tree.unflatten(treedef, stacks), "codes", [None] * len(linears))
    del leaves

    def fill(n: int) -> None:
        # Repacked codes are written where they stay: staged ones would leave holes of their size in the heap.
        parts, other = jax.tree.flatten(read(dataclasses.replace(linears[n], room=codes[n])))
        if str(other) != str(treedef) or any(a.dtype != b.dtype for a, b in zip(parts, stacks, strict=True)):
            raise ValueError(f"{linears[n].name} is stored differently from {linears[0].name}")
        for room, part in zip(stacks, parts, strict=True):
            if not np.may_share_memory(room, part):
                room[n] = part

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # each expands one linear to a byte per code
        for _ in pool.map(fill, range(len(linears))):
            pass
    return jax.tree.unflatten(treedef, [room.reshape(*stack, *room.shape[1:]) for room in stacks])


def num_inputs(row: Row) -> int:
    """Contracted axes of a parameter: the letters of the last dimension in the checkpoint."""
    return len(row.axes[-1])


def _place(weight: QuantizedTensor, sharding: Sharding | None, name: str) -> QuantizedTensor:
    if sharding is None:
        return jax.block_until_ready(jax.tree.map(jax.device_put, weight))
    if not isinstance(sharding, NamedSharding):
        raise ValueError(f"{name}: quantized weights need a NamedSharding; got {sharding}")
    specs = partition_specs(weight, sharding, name)

    def place(leaf: np.ndarray, spec: PartitionSpec) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, NamedSharding(sharding.mesh, spec), lambda index: leaf[index])

    return jax.block_until_ready(jax.tree.map(place, weight, specs))


def partition_specs(weight: QuantizedTensor, sharding: NamedSharding, name: str) -> QuantizedTensor:
    """How the parts of a weight lie where the dense one would lie as `sharding` says: a tensor of PartitionSpecs.

    Raises:
      ValueError: the parts would cut through groups, or through more than the first axis of outputs or inputs.
    """
    axes = len(weight.shape)
    stack: tuple = (None,) * (weight.codes.ndim - 2)
    spec = (*sharding.spec, *(None,) * (len(stack) + axes - len(sharding.spec)))
    if any(part is not None for part in spec[: len(stack)]):
        raise ValueError(f"{name}: stacks of quantized weights are on every device whole; got {spec}")
    spec = spec[len(stack) : len(stack) + axes]
    produced, contracted = spec[: axes - weight.num_inputs], spec[axes - weight.num_inputs :]
    if any(part is not None for part in (*produced[1:], *contracted[1:])):
        raise ValueError(f"{name}: quantized weights are cut along the first axis of outputs and of inputs; got {spec}")
    out, into = produced[0], contracted[0]
    names = (into,) if isinstance(into, str) else into or ()
    ways = int(np.prod([sharding.mesh.shape[axis] for axis in names]))
    if weight.scales.shape[-2] > 1 and weight.scales.shape[-2] % ways:
        raise ValueError(
            f"{name}: mesh axes {names} cut {weight.inputs} inputs {ways} ways, through groups of {weight.group_size}"
        )
    grid = PartitionSpec(*stack, into if weight.scales.shape[-2] > 1 else None, out)
    whole = PartitionSpec()
    turned = stack[:-1] if weight.shares_turn else stack
    turn = PartitionSpec(*turned, None, into)
    return dataclasses.replace(
        weight,
        codes=PartitionSpec(*stack, out, into),
        scales=grid,
        zeros=None if weight.zeros is None else grid,
        global_scale=None if weight.global_scale is None else whole,
        input_scales=None if weight.input_scales is None else PartitionSpec(*turned, into),
        rotation=None if weight.rotation is None else Rotation(turn, turn),
        order=None if weight.order is None else whole,
        activation_scale=None if weight.activation_scale is None else whole,
    )
