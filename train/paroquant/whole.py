"""Every block of a model, one after the other, each from what the quantized blocks before it give.

Hidden states of all calibration samples are kept on the host, once as the original blocks make them and once as the
quantized ones do; the device holds one block and one batch. Each finished block is a file, and a run that was stopped
goes on after the last one.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from jaxmodels.checkpoints.mapping import flatten, unflatten
from jaxmodels.checkpoints.safetensors import SafetensorsFile, write_safetensors
from jaxmodels.functional import Params
from jaxmodels.layers import embed
from jaxmodels.qwen.model import CausalLM
from pallas_kernels.masks import BlockCausal, Causal, Mask
from pallas_kernels.quantized_matmul import QuantizedTensor, Rotation, dequantize
from pallas_kernels.quantized_matmul.rounding import round_weight
from train.mesh import batch_sharding, replicated
from train.paroquant.config import ParoquantConfig
from train.paroquant.joined import ParamPath, joined_linears
from train.paroquant.optimize import optimize_block

Batch = dict[str, np.ndarray]
KINDS = ("codes", "scales", "zeros", "input_scales", "theta", "pairs")


@dataclasses.dataclass(frozen=True)
class BlockReport:
    """How well one quantized block does what the original does, on validation samples.

    Signal-to-noise ratios are those of the block's output for the inputs that the blocks before it give, in decibels:
    10 log10(|y|² / |y - y'|²), y what the original block makes of the original inputs. So errors of earlier blocks
    count.
    """

    layer: int
    snr_before: float | None
    """With the block itself as it was: what comes from the blocks before. None: nothing does."""
    snr_nearest: float
    """Its weights rounded to the nearest codes."""
    snr: float
    """Quantized."""
    weight_snr: dict[str, float]
    """Of each linear's weight, in decibels; by the names of its path."""
    losses: dict[str, list[float]]
    """Validation loss before the first epoch and after each, of both stages."""


def run_of_block(lm: CausalLM, layer: int, dtype: Any) -> Callable[[Params, Any, Params], Array]:
    """The block as `apply(weights, inputs, rest)`; the same object for all blocks that are the same function."""
    return _run(lm, layer if len(set(lm.config.layer_attention)) > 1 else 0, dtype)


@functools.lru_cache(maxsize=64)
def _run(lm: CausalLM, layer: int, dtype: Any) -> Callable[[Params, Any, Params], Array]:
    mask: Mask = Causal() if lm.config.block_size is None else BlockCausal(lm.config.block_size)
    linears = joined_linears(lm)

    def apply(weights: Params, inputs: Any, rest: Params) -> Array:
        leaves = dict(flatten(rest))
        for name, weight in weights.items():
            leaves |= linears[name].split(weight)
        params = jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, leaves)
        return lm.block(
            unflatten(params),
            inputs["states"].astype(dtype),
            layer=layer,
            positions=inputs["positions"],
            mask=mask,
            segment_ids=inputs["segment_ids"],
        )

    return apply


@functools.partial(jax.jit, static_argnames=("lm", "layer", "dtype"))
def _forward(params: Params, inputs: Any, *, lm: CausalLM, layer: int, dtype: Any) -> Array:
    """One block with whatever weights, quantized or not."""

    def cast(leaf: Any) -> Any:
        return leaf if isinstance(leaf, QuantizedTensor) else leaf.astype(dtype)

    own = jax.tree.map(cast, params, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))
    mask: Mask = Causal() if lm.config.block_size is None else BlockCausal(lm.config.block_size)
    return lm.block(
        own, inputs["states"].astype(dtype), layer=layer, positions=inputs["positions"], mask=mask,
        segment_ids=inputs["segment_ids"],
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("num_inputs", "group_size", "is_experts"))
def _rounded(weight: Array, num_inputs: int, group_size: int, is_experts: bool) -> QuantizedTensor:
    def one(weight: Array) -> QuantizedTensor:
        return round_weight(weight, "int4", num_inputs=num_inputs, group_size=group_size)

    return jax.lax.map(one, weight) if is_experts else one(weight)


def quantize_model(
    lm: CausalLM,
    params: Params,
    samples: Batch,
    validation: Batch,
    config: ParoquantConfig,
    *,
    directory: Path,
    mesh: Mesh,
    dtype: Any,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[Params, list[BlockReport]]:
    """The parameters with every linear of every block quantized, and how well each block turned out.

    Experts of a mixture share scales and rotations (`joined_linears`); their router stays dense.

    Args:
      lm: the model.
      params: its parameters, stacked.
      samples: rows to optimise on: "tokens", "positions" and "segment_ids", each int32 `[S, T]`; every token counts.
      validation: other rows.
      config: see there.
      directory: gets one file per finished block; those that are there already are taken as they are.
      mesh: batches are spread over its rows, parameters are on every device.
      dtype: of forward and backward passes; weights and optimiser are float32.
      report: called with lines for people.

    Raises:
      ValueError: a linear whose inputs are no multiple of the group size, or too few samples.
      FloatingPointError: the loss of an untouched block is not finite.
    """
    directory.mkdir(parents=True, exist_ok=True)
    layers = flatten(params["layers"])
    names = joined_linears(lm)
    quantized_paths = [path for joined in names.values() for path in joined.paths]
    on_rows, everywhere = batch_sharding(mesh), replicated(mesh)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]

    def place(batch: Any) -> Any:
        """A batch over the mesh; one that it does not divide goes to every device."""
        count = len(jax.tree.leaves(batch)[0])
        return jax.device_put(batch, everywhere if count % ways else on_rows)

    def passed(layer: int, own: Params, inputs: Batch, *, in_place: bool = False) -> np.ndarray:
        """What a block makes of all rows, batch by batch; if asked for where the inputs were."""
        same = layer if len(set(lm.config.layer_attention)) > 1 else 0
        out = inputs["states"] if in_place else np.empty_like(inputs["states"])
        own = jax.device_put(own, everywhere)
        with jax.set_mesh(mesh):  # in whose scope each device sorts the rows that it has by expert, and no others
            for i in range(0, len(out), config.batch_size):
                batch = place({name: x[i : i + config.batch_size] for name, x in inputs.items()})
                out[i : i + config.batch_size] = _forward(own, batch, lm=lm, layer=same, dtype=dtype)
        return out

    original = {name: _embedded(params, rows) for name, rows in (("samples", samples), ("validation", validation))}
    quantized = {name: rows | {"states": rows["states"].copy()} for name, rows in original.items()}
    reports: list[BlockReport] = []
    finished: list[dict[ParamPath, Any]] = []
    for layer in range(lm.config.layers):
        own = {path: np.asarray(jax.device_get(leaf[layer])) for path, leaf in layers.items()}
        targets = {name: passed(layer, unflatten(own), rows, in_place=True) for name, rows in original.items()}
        file = directory / f"block_{layer:03}.safetensors"
        matrices = {name: joined.join(own) for name, joined in names.items()}
        if file.is_file():
            linears, block = _read_block(file, names, matrices, config)
            report(f"block {layer + 1}/{lm.config.layers}  from {file}")
        else:
            rest = {path: leaf for path, leaf in own.items() if path not in quantized_paths}
            with jax.set_mesh(mesh):
                result = optimize_block(
                    run_of_block(lm, layer, dtype),
                    {name: jax.device_put(matrix, everywhere) for name, matrix in matrices.items()},
                    (quantized["samples"], targets["samples"]),
                    (quantized["validation"], targets["validation"]),
                    config,
                    layer=layer,
                    seeds={name: joined.seed for name, joined in names.items()},
                    rest=jax.device_put(unflatten(rest), everywhere),
                    place=place,
                    report=lambda stage, epoch, loss, layer=layer: report(
                        f"block {layer + 1}/{lm.config.layers}  {stage} {epoch}  validation loss {loss:.3e}"
                    ),
                )
            linears, block = jax.device_get(result.linears), None
            losses = result.losses
        done: dict[ParamPath, Any] = dict(own)
        for name, joined in names.items():
            done |= joined.split_quantized(linears[name])
        if block is None:
            nearest: dict[ParamPath, Any] = dict(own)
            for joined in names.values():
                for path in joined.paths:
                    nearest[path] = _rounded(own[path], joined.num_inputs, config.group_size, joined.is_experts)
            held, target = quantized["validation"], targets["validation"]
            block = BlockReport(
                layer=layer,
                snr_before=None if layer == 0 else snr(target, passed(layer, unflatten(own), held)),
                snr_nearest=snr(target, passed(layer, unflatten(nearest), held)),
                snr=snr(target, passed(layer, unflatten(done), held)),
                weight_snr={
                    name: snr(matrices[name], np.asarray(jax.jit(dequantize)(linears[name]))) for name in names
                },
                losses=losses,
            )
            _write_block(file, linears, block)
        before = "" if block.snr_before is None else f", errors of earlier blocks alone {block.snr_before:.1f}"
        report(
            f"block {layer + 1}/{lm.config.layers}  output SNR {block.snr:.1f} dB (nearest {block.snr_nearest:.1f}"
            f"{before})"
        )
        reports.append(block)
        finished.append({path: done[path] for path in quantized_paths})
        for rows in quantized.values():
            passed(layer, unflatten(done), rows, in_place=True)
    stacked = {
        path: jax.tree.map(lambda *leaves: np.stack(leaves), *(block[path] for block in finished))
        for path in quantized_paths
    }
    return params | {"layers": unflatten(layers | stacked)}, reports


def _embedded(params: Params, rows: Batch) -> Batch:
    """Rows with their embeddings, on the host."""
    table = params["embed"]
    states = [np.asarray(embed(table, jnp.asarray(tokens[None])))[0] for tokens in rows["tokens"]]
    return {
        "states": np.stack(states),
        "positions": np.asarray(rows["positions"], np.int32),
        "segment_ids": np.asarray(rows["segment_ids"], np.int32),
    }


def snr(signal: np.ndarray, found: np.ndarray) -> float:
    """Signal-to-noise ratio in decibels; infinite for no noise."""
    signal, found = np.asarray(signal, np.float64), np.asarray(found, np.float64)
    noise = float(((signal - found) ** 2).sum())
    return math.inf if noise == 0 else 10 * math.log10(max(float((signal**2).sum()), 1e-300) / noise)


def _write_block(file: Path, linears: dict[str, QuantizedTensor], block: BlockReport) -> None:
    tensors: dict[str, np.ndarray] = {}
    for name, weight in linears.items():
        assert weight.rotation is not None
        arrays = (weight.codes, weight.scales, weight.zeros, weight.input_scales, *weight.rotation)
        tensors |= {f"{name}.{kind}": np.asarray(array) for kind, array in zip(KINDS, arrays, strict=True)}
    write_safetensors(file, tensors, {"report": json.dumps(dataclasses.asdict(block))})


def _read_block(
    file: Path, names: Collection[str], matrices: dict[str, np.ndarray], config: ParoquantConfig
) -> tuple[dict[str, QuantizedTensor], BlockReport]:
    stored = SafetensorsFile(file)
    if set(stored) != {f"{name}.{kind}" for name in names for kind in KINDS} or "report" not in stored.metadata:
        raise ValueError(f"{file}: is no finished block of this model; remove it to quantize the block again")
    linears = {}
    for name in names:
        codes, scales, zeros, input_scales, theta, pairs = (np.array(stored[f"{name}.{kind}"]) for kind in KINDS)
        linears[name] = QuantizedTensor(
            codes=codes, scales=scales, zeros=zeros, input_scales=input_scales, rotation=Rotation(theta, pairs),
            format="int4", shape=matrices[name].shape,
        )  # fmt: skip
        linears[name].check(f"{file}: {name}")
    return linears, BlockReport(**json.loads(stored.metadata["report"]))
