"""Quantized checkpoints of every layout, written here bit by bit, load exactly and run like their dense weights."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmodels import load_pretrained
from jaxmodels.pretrained import save_pretrained
from jaxmodels.qwen.config import QwenConfig
from jaxmodels.qwen.model import build
from pallas_kernels.quantized_matmul import QuantizedTensor, dequantize

CONFIG = QwenConfig.tiny(dim=64, layers=2, heads=4, kv_heads=2, head_dim=32, mlp_dim=96, qk_norm=False, qkv_bias=True)
GROUP = 32
FP8 = ml_dtypes.float8_e4m3fn
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
AWQ_COLUMNS = [0, 2, 4, 6, 1, 3, 5, 7]


class Stored(NamedTuple):
    """One linear in a checkpoint, and the float32 weight it stands for."""

    tensors: dict[str, np.ndarray]
    dense: np.ndarray  # [O, I]


def words(nibbles: list[np.ndarray]) -> np.ndarray:
    """Eight arrays of codes into the bits of one int32, the first in the lowest."""
    total = sum(code.astype(np.uint64) << np.uint64(4 * j) for j, code in enumerate(nibbles))
    return np.ascontiguousarray(total.astype(np.uint32)).view(np.int32)  # safetensors writes memory as it lies


def int4_parts(rng: np.random.Generator, outputs: int, inputs: int, groups: int) -> tuple[np.ndarray, ...]:
    """Codes [O, I], zeros [O, G] and float16 scales [O, G] at random, so that no decision hides behind another."""
    codes = rng.integers(0, 16, (outputs, inputs))
    zeros = rng.integers(0, 16, (outputs, groups))
    return codes, zeros, rng.uniform(0.002, 0.02, (outputs, groups)).astype(np.float16)


def expand(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, group_of: np.ndarray) -> np.ndarray:
    return (codes - zeros[:, group_of]).astype(np.float32) * scales.astype(np.float32)[:, group_of]


def consecutive(inputs: int, groups: int) -> np.ndarray:
    return np.arange(inputs) // (inputs // groups)


def gemm(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> dict[str, np.ndarray]:
    columns = lambda matrix: words([matrix[:, column::8] for column in AWQ_COLUMNS])  # noqa: E731
    return {"qweight": columns(codes.T), "qzeros": columns(zeros.T), "scales": scales.T.copy()}


def awq(rng: np.random.Generator, outputs: int, inputs: int, group: int = GROUP) -> Stored:
    groups = inputs // group if group > 0 else 1
    codes, zeros, scales = int4_parts(rng, outputs, inputs, groups)
    return Stored(gemm(codes, zeros, scales), expand(codes, zeros, scales, consecutive(inputs, groups)))


def gptq(rng, outputs: int, inputs: int, *, offset: int, shuffled: bool, symmetric: bool = False) -> Stored:
    groups = inputs // GROUP
    codes, zeros, scales = int4_parts(rng, outputs, inputs, groups)
    zeros = np.full_like(zeros, 8) if symmetric else zeros
    group_of = rng.permutation(consecutive(inputs, groups)) if shuffled else consecutive(inputs, groups)
    stored = (zeros - offset) % 16
    tensors = {
        "qweight": words([codes.T[row::8] for row in range(8)]),
        "qzeros": words([stored.T[:, column::8] for column in range(8)]),
        "scales": scales.T.copy(),
        "g_idx": group_of.astype(np.int32),
    }
    return Stored(tensors, expand(codes, zeros, scales, group_of))


def paroquant(rng, outputs: int, inputs: int) -> Stored:
    groups, steps = inputs // GROUP, 3
    codes, zeros, scales = int4_parts(rng, outputs, inputs, groups)
    pairs = np.stack([np.concatenate([rng.permutation(GROUP) for _ in range(groups)]) for _ in range(steps)])
    theta = rng.normal(0, 0.7, (steps, inputs // 2)).astype(np.float16)
    factors = rng.uniform(0.3, 3, (1, inputs)).astype(np.float16)
    dense = expand(codes, zeros, scales, consecutive(inputs, groups)).astype(np.float64)
    for step in reversed(range(steps)):  # the activations' rotation, transposed
        for pair in range(inputs // 2):
            first = 2 * pair // GROUP * GROUP
            i, j = first + pairs[step, 2 * pair], first + pairs[step, 2 * pair + 1]
            cos, sin = np.cos(np.float64(theta[step, pair])), np.sin(np.float64(theta[step, pair]))
            dense[:, i], dense[:, j] = cos * dense[:, i] - sin * dense[:, j], cos * dense[:, j] + sin * dense[:, i]
    tensors = gemm(codes, zeros, scales) | {"theta": theta, "pairs": pairs.astype(np.int16), "channel_scales": factors}
    return Stored(tensors, (dense * factors.astype(np.float64)).astype(np.float32))


def packed(rng, outputs: int, inputs: int, *, symmetric: bool, group: int = GROUP) -> Stored:
    groups = inputs // group if group > 0 else 1
    codes, zeros, scales = int4_parts(rng, outputs, inputs, groups)
    zeros = np.full_like(zeros, 8) if symmetric else zeros
    tensors = {
        "weight_packed": words([codes[:, column::8] for column in range(8)]),
        "weight_scale": scales,
        "weight_shape": np.array([outputs, inputs]),
    }
    if not symmetric:
        padded = np.concatenate([zeros, np.zeros((-outputs % 8, groups), int)])
        tensors["weight_zero_point"] = words([padded[row::8] for row in range(8)])
    return Stored(tensors, expand(codes, zeros, scales, consecutive(inputs, groups)))


def bytes_of(rng, outputs: int, inputs: int, *, kind: str, scale_shape: tuple[int, ...], extra: dict) -> Stored:
    if kind == "int8":
        codes = rng.integers(-127, 128, (outputs, inputs)).astype(np.int8)
    else:
        codes = rng.normal(0, 60, (outputs, inputs)).clip(-448, 448).astype(FP8)
    scales = rng.uniform(1e-4, 1e-3, scale_shape).astype(np.float32)
    by_row = scales.reshape(-1, 1)
    return Stored({"weight": codes, "weight_scale": scales} | extra, codes.astype(np.float32) * by_row)


def blocks(rng, outputs: int, inputs: int) -> Stored:
    codes = rng.normal(0, 60, (outputs, inputs)).clip(-448, 448).astype(FP8)
    scales = rng.uniform(1e-4, 1e-3, (-(-outputs // 128), inputs // 128)).astype(np.float32)
    by_element = scales.repeat(128, 0)[:outputs].repeat(128, 1)
    return Stored({"weight": codes, "weight_scale": scales}, codes.astype(np.float32) * by_element)


def nvfp4(rng, outputs: int, inputs: int, *, name: str, factor: str, inverse: bool) -> Stored:
    codes = rng.integers(0, 16, (outputs, inputs)).astype(np.uint8)
    scales = rng.uniform(0.5, 440, (outputs, inputs // 16)).astype(FP8)
    overall = np.float32(2.0**-16)  # a power of two: its inverse is exact
    values = np.where(codes & 8, -1, 1) * E2M1[codes & 7]
    dense = values.astype(np.float32) * (scales.astype(np.float32).repeat(16, 1) * overall)
    tensors = {
        name: codes[:, ::2] | codes[:, 1::2] << 4,
        "weight_scale": scales,
        factor: np.array([1 / overall] if inverse else overall, np.float32),
    }
    return Stored(tensors, dense)


def modelopt_int4(rng, outputs: int, inputs: int) -> Stored:
    codes = rng.integers(-8, 8, (outputs, inputs))
    scales = rng.uniform(0.002, 0.02, (outputs, inputs // GROUP)).astype(np.float32)
    factors = rng.uniform(0.5, 2, inputs).astype(np.float32)
    bits = (codes & 15).astype(np.uint8)
    tensors = {"weight": bits[::2] | bits[1::2] << 4, "weight_scale": scales, "pre_quant_scale": factors}
    return Stored(tensors, codes.astype(np.float32) * scales.repeat(GROUP, 1) * factors)


def ct(layout: str, weights: dict, inputs: dict | None = None) -> dict[str, Any]:
    kind, bits = {"pack-quantized": ("int", 4), "int-quantized": ("int", 8), "float-quantized": ("float", 8)}.get(
        layout, ("float", 4)
    )
    group = {"targets": ["Linear"], "weights": {"num_bits": bits, "type": kind, "symmetric": True} | weights}
    if inputs is not None:
        group["input_activations"] = {"num_bits": bits, "type": kind, "symmetric": True} | inputs
    return {
        "quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"],
    }  # fmt: skip


AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False}
PARO = {"quant_method": "paroquant", "bits": 4, "group_size": GROUP, "krot": 3}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
SCALAR = {"input_scale": np.array(0.01, np.float32)}
one = lambda shape: lambda outputs: tuple(outputs if n == "O" else n for n in shape)  # noqa: E731


def by(kind: str, *shape: int | str, extra: dict | None = None) -> Callable[..., Stored]:
    return lambda rng, o, i: bytes_of(rng, o, i, kind=kind, scale_shape=one(shape)(o), extra=extra or {})


LAYOUTS: dict[str, tuple[dict[str, Any], Callable[..., Stored]]] = {
    "awq": (AWQ, awq),
    "awq by output": (AWQ | {"group_size": -1}, lambda rng, o, i: awq(rng, o, i, -1)),
    "gptq v1": (GPTQ, lambda rng, o, i: gptq(rng, o, i, offset=1, shuffled=False)),
    "gptq v2": (
        GPTQ | {"checkpoint_format": "gptq_v2"},
        lambda rng, o, i: gptq(rng, o, i, offset=0, shuffled=False),
    ),
    "gptq symmetric": (
        GPTQ | {"sym": True},
        lambda rng, o, i: gptq(rng, o, i, offset=1, shuffled=False, symmetric=True),
    ),
    "gptq desc_act": (GPTQ | {"desc_act": True}, lambda rng, o, i: gptq(rng, o, i, offset=1, shuffled=True)),
    "paroquant": (PARO, paroquant),
    "pack-quantized": (
        ct("pack-quantized", {"strategy": "group", "group_size": GROUP}),
        lambda rng, o, i: packed(rng, o, i, symmetric=True),
    ),
    "pack-quantized asymmetric": (
        ct("pack-quantized", {"strategy": "group", "group_size": GROUP, "symmetric": False}),
        lambda rng, o, i: packed(rng, o, i, symmetric=False),
    ),
    "pack-quantized by channel": (
        ct("pack-quantized", {"strategy": "channel"}),
        lambda rng, o, i: packed(rng, o, i, symmetric=True, group=-1),
    ),
    "int-quantized weights": (ct("int-quantized", {"strategy": "channel"}), by("int8", "O", 1)),
    "float-quantized weights": (ct("float-quantized", {"strategy": "channel"}), by("fp8", "O", 1)),
    "float-quantized by tensor": (ct("float-quantized", {"strategy": "tensor"}), by("fp8", 1)),
    "nvfp4-pack-quantized": (
        ct("nvfp4-pack-quantized", {"strategy": "tensor_group", "group_size": 16}),
        lambda rng, o, i: nvfp4(rng, o, i, name="weight_packed", factor="weight_global_scale", inverse=True),
    ),
    "modelopt nvfp4": (
        MODELOPT | {"quant_algo": "NVFP4", "group_size": 16},
        lambda rng, o, i: nvfp4(rng, o, i, name="weight", factor="weight_scale_2", inverse=False),
    ),
    "modelopt int4": (MODELOPT | {"quant_algo": "W4A16_AWQ", "group_size": GROUP}, modelopt_int4),
}
ROUNDED_INPUTS = {
    "int-quantized by token": (
        ct("int-quantized", {"strategy": "channel"}, {"strategy": "token", "dynamic": True}),
        by("int8", "O", 1),
    ),
    "float-quantized static": (
        ct("float-quantized", {"strategy": "tensor"}, {"strategy": "tensor", "dynamic": False}),
        by("fp8", 1, extra={"input_scale": np.array([0.01], np.float32)}),
    ),
    "modelopt fp8": (MODELOPT, by("fp8", extra=SCALAR)),
    "modelopt fp8 by token": (MODELOPT | {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, by("fp8", "O")),
}
LINEARS = re.compile(r"(.*\.(?:[qkvo]|gate|up|down)_proj)\.weight")


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A dense model with random norms and biases."""
    directory = tmp_path_factory.mktemp("dense") / "model"
    lm = build(CONFIG)
    params = lm.init(jax.random.key(0))
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys)]
    save_pretrained(directory, lm, jax.tree.unflatten(treedef, leaves))
    return directory


def write(
    dense: Path, directory: Path, block: dict[str, Any], store: Callable[..., Stored], *, dtype: Any = np.float32
) -> dict[str, np.ndarray]:
    """A quantized copy of `dense` with linears by `store`; returns the tensors of the dense model it stands for."""
    directory.mkdir()
    rng = np.random.default_rng(7)
    tensors, expanded = {}, {}
    for name, value in load_file(dense / "model.safetensors").items():
        if linear := LINEARS.fullmatch(name):
            stored = store(rng, *value.shape)
            tensors |= {f"{linear[1]}.{suffix}": array for suffix, array in stored.tensors.items()}
            expanded[name] = stored.dense
        else:
            tensors[name] = expanded[name] = value.astype(dtype)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, directory / "model.safetensors")
    config = json.loads((dense / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": block}))
    return expanded


def expanded_model(dense: Path, directory: Path, expanded: dict[str, np.ndarray]) -> Any:
    directory.mkdir()
    save_file(expanded, directory / "model.safetensors")
    (directory / "config.json").write_text((dense / "config.json").read_text())
    return load_pretrained(directory)


TOKENS = np.array([[3, 14, 15, 92, 65, 35, 89, 79, 32]])


@pytest.mark.parametrize("layout", [*LAYOUTS, *ROUNDED_INPUTS])
def test_weights_are_those_of_an_independent_unpacker(dense, tmp_path, layout):
    block, store = (LAYOUTS | ROUNDED_INPUTS)[layout]
    expanded = write(dense, tmp_path / "quantized", block, store)
    model = load_pretrained(tmp_path / "quantized")
    assert model.quantization
    plain = expanded_model(dense, tmp_path / "dense", expanded)
    exact = "paroquant" not in layout
    for part, name in (("attention", "q"), ("attention", "o"), ("mlp", "gate"), ("mlp", "down")):
        weight, expected = model.params["layers"][part][name], plain.params["layers"][part][name]
        assert isinstance(weight, QuantizedTensor)
        for layer in range(CONFIG.layers):
            found = np.asarray(dequantize(weight.of_layer(layer)))
            if exact:
                np.testing.assert_array_equal(found, expected[layer])
            else:
                np.testing.assert_allclose(found, expected[layer], atol=1e-6)


@pytest.mark.parametrize("layout", [*LAYOUTS])
def test_logits_are_those_of_the_dense_weights(dense, tmp_path, layout):
    block, store = LAYOUTS[layout]
    expanded = write(dense, tmp_path / "quantized", block, store)
    model = load_pretrained(tmp_path / "quantized")
    plain = expanded_model(dense, tmp_path / "dense", expanded)
    logits, expected = model.apply(model.params, TOKENS), plain.apply(plain.params, TOKENS)
    assert float(jnp.abs(expected).max()) > 0.5
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("layout", [*ROUNDED_INPUTS])
def test_rounded_activations_change_little_and_something(dense, tmp_path, layout):
    block, store = ROUNDED_INPUTS[layout]
    expanded = write(dense, tmp_path / "quantized", block, store)
    model = load_pretrained(tmp_path / "quantized")
    plain = expanded_model(dense, tmp_path / "dense", expanded)
    logits, expected = model.apply(model.params, TOKENS), plain.apply(plain.params, TOKENS)
    error = float(jnp.linalg.norm(logits - expected) / jnp.linalg.norm(expected))
    assert 1e-4 < error < 0.15
