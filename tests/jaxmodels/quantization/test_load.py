"""Quantized checkpoints of every layout, written here bit by bit, load exactly and run like their dense weights."""

import dataclasses
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
from jaxmodels.checkpoints.huggingface import Checkpoint
from jaxmodels.checkpoints.safetensors import SafetensorsFile
from jaxmodels.pretrained import save_pretrained
from jaxmodels.quantization import find_scheme
from jaxmodels.quantization.source import Linear
from jaxmodels.qwen.config import MoeConfig, QwenConfig
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


def paroquant(rng, outputs: int, inputs: int, turn: dict[str, np.ndarray] | None = None) -> Stored:
    """With a scaling and rotation of its own, or one that is given."""
    groups = inputs // GROUP
    codes, zeros, scales = int4_parts(rng, outputs, inputs, groups)
    turn = turn_of(rng, inputs) if turn is None else turn
    pairs, theta, factors = turn["pairs"], turn["theta"], turn["channel_scales"]
    steps = len(pairs)
    dense = expand(codes, zeros, scales, consecutive(inputs, groups)).astype(np.float64)
    for step in reversed(range(steps)):  # the activations' rotation, transposed
        for pair in range(inputs // 2):
            first = 2 * pair // GROUP * GROUP
            i, j = first + pairs[step, 2 * pair], first + pairs[step, 2 * pair + 1]
            cos, sin = np.cos(np.float64(theta[step, pair])), np.sin(np.float64(theta[step, pair]))
            dense[:, i], dense[:, j] = cos * dense[:, i] - sin * dense[:, j], cos * dense[:, j] + sin * dense[:, i]
    return Stored(gemm(codes, zeros, scales) | turn, (dense * factors.astype(np.float64)).astype(np.float32))


def turn_of(rng, inputs: int) -> dict[str, np.ndarray]:
    steps, groups = 3, inputs // GROUP
    pairs = np.stack([np.concatenate([rng.permutation(GROUP) for _ in range(groups)]) for _ in range(steps)])
    return {
        "theta": rng.normal(0, 0.7, (steps, inputs // 2)).astype(np.float16),
        "pairs": pairs.astype(np.int16),
        "channel_scales": rng.uniform(0.3, 3, (1, inputs)).astype(np.float16),
    }


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
def test_weights_are_those_of_an_independent_unpacker_and_logits_those_of_dense_ones(dense, tmp_path, layout):
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
    logits, expected = model.apply(model.params, TOKENS), plain.apply(plain.params, TOKENS)
    assert float(jnp.abs(expected).max()) > 0.5
    if layout in LAYOUTS:
        np.testing.assert_allclose(logits, expected, atol=1e-4)
    else:  # activations are rounded too, which changes little and something
        assert 1e-4 < float(jnp.linalg.norm(logits - expected) / jnp.linalg.norm(expected)) < 0.15


EXPERTS = QwenConfig.tiny(dim=64, layers=2, heads=2, kv_heads=1, head_dim=32, mlp_dim=32, moe=MoeConfig(3, 2))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    """A dense mixture of experts with a router that decides."""
    directory = tmp_path_factory.mktemp("mixture") / "model"
    lm = build(EXPERTS)
    params = jax.jit(lm.init)(jax.random.key(0))
    params["layers"]["mlp"]["router"] *= 20
    save_pretrained(directory, lm, params)
    return directory


OTHERS = ("awq", "pack-quantized asymmetric", "nvfp4-pack-quantized")  # slow; last run: all pass, 2026-11-30


@pytest.mark.parametrize("layout", ["gptq desc_act", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_experts_of_a_mixture_one_by_one(mixture, tmp_path, layout):
    """Every layer's and expert's weight is where it belongs, and the model is that of the dense weights."""
    block, store = LAYOUTS[layout]
    expanded = write(mixture, tmp_path / "quantized", block, store)
    model, plain = load_pretrained(tmp_path / "quantized"), expanded_model(mixture, tmp_path / "dense", expanded)
    assert not isinstance(model.params["layers"]["mlp"]["router"], QuantizedTensor)
    for name in ("gate", "up", "down"):
        weight, expected = model.params["layers"]["mlp"][name], plain.params["layers"]["mlp"][name]
        assert weight.codes.shape[:2] == (2, 3) and weight.shape == expected.shape[2:]
        every = jax.jit(lambda w: jax.vmap(jax.vmap(dequantize))(w))(weight)
        np.testing.assert_array_equal(every, expected)
    logits, expected = (jax.jit(m.lm.apply)(m.params, jnp.asarray(TOKENS)) for m in (model, plain))
    assert float(jnp.abs(expected).max()) > 0.3
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.fixture(scope="module")
def shared_rotations(mixture, tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """A ParoQuant mixture of experts, written here bit by bit, and the dense tensors it stands for."""
    directory = tmp_path_factory.mktemp("shared") / "model"
    expanded = write(mixture, directory, PARO, paroquant)
    file, rng = directory / "model.safetensors", np.random.default_rng(3)
    tensors = {name: value for name, value in load_file(file).items() if ".experts." not in name}
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        turns = {"gate_up": turn_of(rng, 64), "down": turn_of(rng, 32)}
        for shared, turn in turns.items():
            tensors |= {f"{experts}.{shared}_weight_{suffix}": value for suffix, value in turn.items()}
        for expert in range(3):
            for name, shape, shared in (
                ("gate", (32, 64), "gate_up"), ("up", (32, 64), "gate_up"), ("down", (64, 32), "down")
            ):  # fmt: skip
                one = paroquant(rng, *shape, turns[shared])
                module = f"{experts}.{expert}.{name}_proj"
                tensors |= {f"{module}.{suffix}": one.tensors[suffix] for suffix in ("qweight", "qzeros", "scales")}
                expanded[f"{module}.weight"] = one.dense
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, file)
    return directory, expanded


def test_experts_that_share_a_rotation(mixture, shared_rotations, tmp_path):
    directory, expanded = shared_rotations
    model, plain = load_pretrained(directory), expanded_model(mixture, tmp_path / "dense", expanded)
    assert model.params["layers"]["mlp"]["gate"].rotation.theta.shape == (2, 3, 32)
    logits, expected = (jax.jit(m.lm.apply)(m.params, jnp.asarray(TOKENS)) for m in (model, plain))
    assert float(jnp.abs(expected).max()) > 0.3
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    unturned = jax.tree.map(lambda x: x, model.params)
    down = unturned["layers"]["mlp"]["down"]
    no_angles = down.rotation._replace(theta=jnp.zeros_like(down.rotation.theta))
    unturned["layers"]["mlp"] |= {"down": dataclasses.replace(down, rotation=no_angles)}
    assert float(jnp.abs(jax.jit(model.lm.apply)(unturned, jnp.asarray(TOKENS)) - expected).max()) > 1e-3


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        ("down_weight_theta", None, "lacks model.layers.1.mlp.experts.down_weight_theta"),
        (
            "gate_up_weight_pairs",
            lambda x: x * 0,
            "gate_up_weight_pairs' is no permutation of 0..31 in rotation 0, group 0",
        ),
        ("down_weight_channel_scales", lambda x: -x, "down_weight_channel_scales' must be positive"),
    ],
)
def test_a_shared_rotation_that_is_damaged_is_named(shared_rotations, tmp_path, suffix, change, message):
    directory, _ = shared_rotations
    tensors = load_file(directory / "model.safetensors")
    name = f"model.layers.1.mlp.experts.{suffix}"
    value = tensors.pop(name)
    if change is not None:
        tensors[name] = change(value)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    with pytest.raises(ValueError, match=re.escape(message)):
        load_pretrained(tmp_path)


def test_what_is_refused_of_quantized_mixtures(mixture, tmp_path):
    expanded = write(mixture, tmp_path / "quantized", AWQ, awq)
    file = tmp_path / "quantized" / "model.safetensors"
    tensors = load_file(file)
    router = {
        f"model.layers.{n}.mlp.gate.{s}": x
        for n in range(2)
        for s, x in awq(np.random.default_rng(0), 8, 64)[0].items()
    }
    save_file({k: v for k, v in tensors.items() if not k.endswith("mlp.gate.weight")} | router, file)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate is quantized, which routers of experts cannot be here"):
        load_pretrained(tmp_path / "quantized")
    one = "model.layers.1.mlp.experts.2.up_proj"
    mixed = {k: v for k, v in tensors.items() if not k.startswith(one)} | {f"{one}.weight": expanded[f"{one}.weight"]}
    save_file(mixed, file)
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.experts\.2\.up_proj is not quantized, but .*experts\.0\.up_proj"
    ):
        load_pretrained(tmp_path / "quantized")


# ----------------------------------------------------------------------------------------------------
# One linear at a time


GOLDENS = Path(__file__).with_name("goldens")
PRESETS = ["W4A16", "W4A16_ASYM", "W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "NVFP4"]


def read_linear(directory: Path, block: dict[str, Any], tensors: dict[str, np.ndarray], shape: tuple[int, int]) -> Any:
    directory.mkdir(exist_ok=True)
    tensors = {f"linear.{suffix}": np.ascontiguousarray(tensor) for suffix, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors")
    scheme = find_scheme(directory, {"quantization_config": block})
    needed, possible = scheme.suffixes("linear")
    assert {f"linear.{suffix}" for suffix in needed} <= set(tensors)
    assert set(tensors) <= {f"linear.{suffix}" for suffix in needed | possible}
    return jax.tree.map(jnp.asarray, scheme.read(Linear(Checkpoint(directory), "linear", *shape)))


@pytest.mark.parametrize("preset", PRESETS)
def test_linears_that_compressed_tensors_wrote(tmp_path, preset):
    block = json.loads((GOLDENS / "compressed_tensors.json").read_text())[preset]
    tensors = SafetensorsFile(GOLDENS / "compressed_tensors.safetensors")
    own = {name.partition(".")[2]: np.asarray(tensors[name]) for name in tensors if name.startswith(f"{preset}.")}
    expected = own.pop("expected")
    weight = read_linear(tmp_path / "golden", block, own, expected.shape)
    assert weight.activations == {"W8A8": "int8", "FP8": "fp8", "FP8_DYNAMIC": "fp8"}.get(preset)
    if preset.startswith("NVFP4"):  # the package multiplies scales and codes in bfloat16
        np.testing.assert_allclose(dequantize(weight), expected, rtol=2**-8 + 2**-9)
    else:
        np.testing.assert_array_equal(dequantize(weight), expected)


def test_blocks_as_qwen_publishes_them(tmp_path):
    stored = blocks(np.random.default_rng(0), 136, 256)
    block = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
    tensors = {"weight": stored.tensors["weight"], "weight_scale_inv": stored.tensors["weight_scale"]}
    weight = read_linear(tmp_path / "one", block, tensors, (136, 256))
    np.testing.assert_array_equal(dequantize(weight), stored.dense)
    for field, value in (("weight_block_size", [64, 64]), ("activation_scheme", "static"), ("weight_block_size", None)):
        with pytest.raises(ValueError, match=f"'{field}' is"):
            find_scheme(tmp_path, {"quantization_config": block | {field: value}})


@pytest.mark.parametrize("separate", [False, True], ids=["[rows, columns]", "[rows, 1, columns, 1]"])
def test_modelopt_blocks(tmp_path, separate):
    stored = blocks(np.random.default_rng(0), 136, 256)
    tensors = dict(stored.tensors)
    if separate:
        tensors["weight_scale"] = tensors["weight_scale"][:, None, :, None]
    weight = read_linear(tmp_path / "one", MODELOPT | {"quant_algo": "FP8_PB_WO"}, tensors, (136, 256))
    np.testing.assert_array_equal(dequantize(weight), stored.dense)


# ----------------------------------------------------------------------------------------------------
# What is refused, and what is named


def model(dense: Path, directory: Path, layout: str, change: Callable[[dict[str, np.ndarray]], Any], **fields) -> Path:
    """A model in one layout, its tensors changed in place."""
    block, store = LAYOUTS[layout]
    write(dense, directory, block | fields, store)
    file = SafetensorsFile(directory / "model.safetensors")
    tensors = {name: np.array(file[name]) for name in file}
    change(tensors)
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, directory / "model.safetensors")
    return directory


DOWN, K = "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.k_proj"


def put(name: str, index: Any, value: float) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda tensors: tensors[name].__setitem__(index, value)


def replace(name: str, value: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda tensors: tensors.__setitem__(name, value(tensors[name]))


def undo(tensors: dict[str, np.ndarray]) -> None:
    """The second layer's down projection dense."""
    for suffix in ("qweight", "qzeros", "scales"):
        del tensors[f"{DOWN}.{suffix}"]
    tensors[f"{DOWN}.weight"] = np.ones((64, 96), np.float32)


@pytest.mark.parametrize(
    "layout, change, message",
    [
        ("awq", lambda t: t.pop(f"{DOWN}.qzeros"), f"lacks {DOWN}.qzeros"),
        ("awq", lambda t: t.pop(f"{DOWN}.qweight"), f"{DOWN} is not quantized, but model.layers.0.mlp.down_proj is"),
        ("awq", undo, f"{DOWN} is not quantized, but .* layers that differ"),
        ("awq", put(f"{DOWN}.scales", (1, 2), np.nan), f"'{DOWN}.scales' holds values that are not finite"),
        ("awq", replace(f"{K}.scales", lambda x: x[:1]), rf"'{K}.scales' has shape \(1, 64\); .* needs \(2, 64\)"),
        ("awq", replace(f"{K}.qweight", lambda x: x[:, :-1]), rf"'{K}.qweight' has shape \(64, 7\)"),
        (
            "awq",
            replace(f"{K}.qweight", lambda x: x.astype(np.int64)),
            f"'{K}.qweight' has dtype int64; expected int32",
        ),
        ("awq", lambda t: t.update({f"{DOWN}.bias": np.ones(64, np.float32)}), f"'{DOWN}.bias' is a bias that"),
        ("awq", lambda t: t.update({f"{K}.g_idx": np.zeros(64, np.int32)}), f"nothing uses: {K}.g_idx"),
        (
            "awq",
            lambda t: t.update({"model.embed_tokens.qweight": t[f"{K}.qweight"]}),
            "model.embed_tokens is quantized, which embeddings cannot be here",
        ),
        ("gptq desc_act", put(f"{K}.g_idx", 0, 7), f"'{K}.g_idx' must name each of 2 groups 32 times"),
        ("gptq desc_act", put(f"{K}.g_idx", slice(None), 0), f"'{K}.g_idx' must name each of 2 groups"),
        ("gptq desc_act", put(f"{K}.g_idx", 3, -1), f"'{K}.g_idx' must name each of 2 groups"),
        ("paroquant", put(f"{K}.pairs", (2, 33), 40), f"'{K}.pairs' is no permutation of 0..31 in rotation 2, group 1"),
        ("paroquant", put(f"{K}.theta", (0, 0), np.inf), f"'{K}.theta' holds values that are not finite"),
        ("paroquant", put(f"{K}.channel_scales", (0, 5), 0), f"'{K}.channel_scales' must be positive"),
        ("paroquant", put(f"{K}.channel_scales", (0, 5), -1), f"'{K}.channel_scales' must be positive"),
        ("paroquant", put(f"{K}.channel_scales", (0, 5), np.inf), f"'{K}.channel_scales' holds values that are not"),
        ("paroquant", lambda t: t.pop(f"{K}.theta"), f"lacks {K}.theta"),
        ("paroquant", lambda t: t.update({f"{K}.qlinear.qweight": t[f"{K}.qweight"]}), "native layout"),
        ("pack-quantized", put(f"{K}.weight_shape", 0, 65), rf"'{K}.weight_shape' is \(65, 64\); the model has"),
        ("nvfp4-pack-quantized", put(f"{K}.weight_global_scale", 0, 0), f"'{K}.weight_global_scale' must be positive"),
        ("nvfp4-pack-quantized", put(f"{K}.weight_scale", (0, 0), np.nan), f"'{K}.weight_scale' holds values"),
        ("modelopt int4", put(f"{K}.pre_quant_scale", 3, 0), f"'{K}.pre_quant_scale' must be positive"),
        ("modelopt nvfp4", lambda t: t.pop(f"{K}.weight_scale_2"), f"lacks {K}.weight_scale_2"),
    ],
)
def test_damaged_tensors_are_named(dense, tmp_path, layout, change, message):
    directory = model(dense, tmp_path / "damaged", layout, change)
    with pytest.raises(ValueError, match=message):
        load_pretrained(directory)


@pytest.mark.parametrize(
    "block, message",
    [
        (AWQ | {"bits": 8}, "'bits' is 8; implemented: 4"),
        (AWQ | {"version": "gemv_fast"}, "'version' is 'gemv_fast'; implemented: 'gemm'"),
        (AWQ | {"version": "marlin"}, "'version' is 'marlin'"),
        (AWQ | {"zero_point": False}, "'zero_point' is False"),
        (AWQ | {"group_size": 0}, "'group_size' must be -1 or a positive integer; got 0"),
        (AWQ | {"group_size": 48}, r"q_proj: group_size 48 does not divide its 64 inputs"),
        (AWQ | {"outliers": True}, "unknown field 'outliers' = True"),
        (GPTQ | {"bits": 3}, "'bits' is 3; implemented: 4"),
        (GPTQ | {"is_marlin_format": True}, "'is_marlin_format' is True"),
        (GPTQ | {"checkpoint_format": "marlin"}, "'checkpoint_format' is 'marlin'"),
        (GPTQ | {"dynamic": {"-:.*": {}}}, "'dynamic' is"),
        (GPTQ | {"checkpoint_format": "gptq", "format": "gptq_v2"}, "'checkpoint_format' and 'format' disagree"),
        (PARO | {"krot": 0}, "'krot' must be a positive integer; got 0"),
        (PARO | {"bits": 3}, "'bits' is 3"),
        (ct("marlin-24", {}), "format 'marlin-24' is not implemented"),
        (ct("pack-quantized", {"strategy": "group", "group_size": 32, "actorder": "group"}), "'actorder' is 'group'"),
        (ct("pack-quantized", {"strategy": "group", "group_size": 32, "num_bits": 8}), "'num_bits' is 8"),
        (ct("pack-quantized", {"strategy": "channel"}, {"strategy": "token"}), "quantized inputs with format 'pack-q"),
        (ct("int-quantized", {"strategy": "channel", "symmetric": False}), "'symmetric' is False"),
        (ct("int-quantized", {"strategy": "channel"}, {"strategy": "group"}), "'strategy' is 'group' of static inputs"),
        (ct("float-quantized", {"strategy": "channel"}) | {"kv_cache_scheme": {"num_bits": 8}}, "'kv_cache_scheme'"),
        (ct("float-quantized", {"strategy": "channel"}) | {"config_groups": {}}, "must hold one group"),
        (MODELOPT | {"quant_algo": "W8A16"}, "quant_algo 'W8A16' is not implemented"),
        (MODELOPT | {"quant_algo": "MIXED_PRECISION"}, "needs 'quantized_layers'"),
        (MODELOPT | {"kv_cache_quant_algo": "NVFP4"}, "'kv_cache_quant_algo' is 'NVFP4'"),
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' is not implemented; known: .*awq"),
        ("awq", "'quantization_config' must be an object; got 'awq'"),
    ],
)
def test_variants_are_refused_by_name(dense, tmp_path, block, message):
    with pytest.raises(ValueError, match=message):
        write(dense, tmp_path / "model", block, awq)
        load_pretrained(tmp_path / "model")


def test_a_config_without_quantized_tensors_and_the_reverse(dense, tmp_path):
    config = json.loads((dense / "config.json").read_text())
    (tmp_path / "dense").mkdir()
    save_file(load_file(dense / "model.safetensors"), tmp_path / "dense" / "model.safetensors")
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config | {"quantization_config": AWQ}))
    with pytest.raises(ValueError, match="should be AWQ, 4 bits, groups of 32, but has no tensor 'qweight'"):
        load_pretrained(tmp_path / "dense")
    write(dense, tmp_path / "awq", AWQ, awq)
    (tmp_path / "awq" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lacks .*down_proj.weight.*nothing uses: .*down_proj.qweight"):
        load_pretrained(tmp_path / "awq")
    both = config | {"quantization_config": AWQ, "compression_config": AWQ}
    (tmp_path / "awq" / "config.json").write_text(json.dumps(both))
    with pytest.raises(ValueError, match="has both quantization_config and compression_config"):
        load_pretrained(tmp_path / "awq")


def test_biases_of_zero_are_ignored_and_a_separate_config_is_found(dense, tmp_path):
    directory = model(
        dense, tmp_path / "gptq", "gptq v1", lambda t: t.update({f"{DOWN}.bias": np.zeros(64, np.float16)})
    )
    load_pretrained(directory)
    block, store = ROUNDED_INPUTS["modelopt fp8"]
    write(dense, tmp_path / "modelopt", block, store)
    expected = load_pretrained(tmp_path / "modelopt")
    (tmp_path / "modelopt" / "config.json").write_text((dense / "config.json").read_text())
    separate = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (tmp_path / "modelopt" / "hf_quant_config.json").write_text(json.dumps(separate))
    found = load_pretrained(tmp_path / "modelopt")
    assert found.quantization == expected.quantization == "ModelOpt FP8"
    np.testing.assert_array_equal(found.apply(found.params, TOKENS), expected.apply(expected.params, TOKENS))


@pytest.mark.smoke
def test_mixed_precision_goes_by_the_list(dense, tmp_path):
    """Four-bit floats in the MLP, eight-bit ones in attention."""
    kinds = {}

    def store(rng, outputs, inputs):
        wide = 96 in (outputs, inputs)
        return (
            LAYOUTS["modelopt nvfp4"][1](rng, outputs, inputs)
            if wide
            else ROUNDED_INPUTS["modelopt fp8"][1](rng, outputs, inputs)
        )

    for layer in range(CONFIG.layers):
        for part, names in (("mlp", ("gate", "up", "down")), ("self_attn", ("q", "k", "v", "o"))):
            algorithm = {"quant_algo": "NVFP4", "group_size": 16} if part == "mlp" else {"quant_algo": "FP8"}
            kinds |= {f"model.layers.{layer}.{part}.{name}_proj": algorithm for name in names}
    block = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": kinds}
    write(dense, tmp_path / "model", block, store)
    found = load_pretrained(tmp_path / "model")
    layers = found.params["layers"]
    assert (layers["mlp"]["up"].format, layers["attention"]["q"].format) == ("nvfp4", "fp8")
    del kinds[K]
    (tmp_path / "less").mkdir()
    (tmp_path / "less" / "model.safetensors").write_bytes((tmp_path / "model" / "model.safetensors").read_bytes())
    config = json.loads((dense / "config.json").read_text()) | {"quantization_config": block}
    (tmp_path / "less" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{K}: has quantized tensors, but no entry of quantized_layers"):
        load_pretrained(tmp_path / "less")


def test_scales_of_a_cache(dense, tmp_path):
    """ModelOpt's scales are found by layer; one that is missing or no positive number is named."""
    block, store = ROUNDED_INPUTS["modelopt fp8"]
    write(dense, tmp_path / "none", block | {"kv_cache_quant_algo": "FP8"}, store)
    assert load_pretrained(tmp_path / "none").kv_scales is None
    file = SafetensorsFile(tmp_path / "none" / "model.safetensors")
    tensors = {name: np.array(file[name]) for name in file}
    scales = {
        f"model.layers.{layer}.self_attn.{part}_proj.{part}_scale": np.array(1 + layer + (part == "v") / 2, np.float32)
        for layer in range(CONFIG.layers)
        for part in "kv"
    }
    config = (tmp_path / "none" / "config.json").read_text()

    def load(name, changed):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        save_file(tensors | changed, tmp_path / name / "model.safetensors")
        return load_pretrained(tmp_path / name)

    found = load("all", scales)
    assert found.quantization == "ModelOpt FP8, FP8 cache"
    np.testing.assert_array_equal(found.kv_scales.k, [1, 2])
    np.testing.assert_array_equal(found.kv_scales.v, [1.5, 2.5])
    last = "model.layers.1.self_attn.v_proj.v_scale"
    with pytest.raises(ValueError, match=f"lacks {last}, which other layers have"):
        load("less", {name: scale for name, scale in scales.items() if name != last})
    with pytest.raises(ValueError, match=f"'{last}' must be positive"):
        load("zero", scales | {last: np.array(0, np.float32)})
