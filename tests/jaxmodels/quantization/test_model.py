"""Whole quantized models: saved and loaded, decoded, spread over devices, and how much memory they take."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import load_pretrained, save_pretrained
from jaxmodels.cache import KVCache
from jaxmodels.checkpoints.mapping import flatten, unflatten
from jaxmodels.checkpoints.safetensors import SafetensorsFile
from jaxmodels.decoding.autoregressive import Prompt, init_state, make_prefill, make_step
from jaxmodels.decoding.complete import complete_autoregressive, complete_blocks
from jaxmodels.decoding.sampling import Sampling, SamplingOptions
from jaxmodels.quantization import round_head, round_params
from jaxmodels.quantization.save import config_block
from jaxmodels.qwen import QwenConfig, build
from jaxmodels.qwen.load import Layout, table
from pallas_kernels import compat, dispatch
from pallas_kernels.norm_rope import mosaic_sm90 as norm_rope_kernel
from pallas_kernels.partial import Partial
from pallas_kernels.quantized_matmul import QuantizedTensor, Rotation, dequantize
from pallas_kernels.quantized_matmul import mosaic_sm90 as product_kernel
from pallas_kernels.rotation import mosaic_sm90 as rotation_kernel

CONFIG = QwenConfig.tiny(layers=2, dim=64, heads=4, kv_heads=2, head_dim=32, mlp_dim=96)
LM = build(CONFIG)
TOKENS = jnp.array([[3, 14, 15, 92, 65, 35, 89, 79, 32]])
FORMATS = {
    "int4": dict(format="int4", group_size=32),
    "int4 symmetric": dict(format="int4", group_size=32, symmetric=True),
    "int8": dict(format="int8"),
    "int8 by token": dict(format="int8", activations="int8"),
    "fp8": dict(format="fp8"),
    "fp8 by token": dict(format="fp8", activations="fp8"),
    "nvfp4": dict(format="nvfp4"),
}
AWQ_COLUMNS = [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, LM.init(jax.random.key(0)))


def rotated(params, seed=0, lm=LM):
    """int4 parameters as ParoQuant has them, the rotation at random."""
    leaves = flatten(round_params(lm, params, "int4", group_size=32))
    rng = np.random.default_rng(seed)
    for path in lm.linears:
        weight, steps = leaves[path], 3
        shape = (CONFIG.layers, steps, weight.inputs // 32)
        pairs = rng.permuted(np.broadcast_to(np.arange(32), (*shape, 32)), axis=-1).reshape(*shape[:2], -1)
        leaves[path] = dataclasses.replace(
            weight,
            input_scales=jnp.asarray(rng.uniform(0.5, 2, (CONFIG.layers, weight.inputs)), jnp.float16),
            rotation=Rotation(
                jnp.asarray(rng.normal(0, 0.5, (CONFIG.layers, steps, weight.inputs // 2)), jnp.float16),
                jnp.asarray(pairs, jnp.int16),
            ),
        )
    return unflatten(leaves)


def expand(params):
    """The same parameters with dense weights."""

    def dense(leaf):
        if not isinstance(leaf, QuantizedTensor):
            return leaf
        if leaf.codes.ndim == 2:
            return dequantize(leaf)
        return jnp.stack([dequantize(leaf.of_layer(layer)) for layer in range(len(leaf.codes))])

    return jax.tree.map(dense, params, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", [*FORMATS, "paroquant"])
def test_saved_and_loaded(params, tmp_path, name):
    quantized = rotated(params) if name == "paroquant" else round_params(LM, params, **FORMATS[name])
    save_pretrained(tmp_path / "model", LM, quantized)
    loaded = load_pretrained(tmp_path / "model")
    if name == "nvfp4":  # the file has the inverse of one factor
        quantized = jax.tree.map(lambda x: 1 / (1 / x) if x.shape == (2,) else x, quantized)
    if name == "int4 symmetric":
        assert loaded.params["layers"]["mlp"]["up"].zeros is None
    assert_same(loaded.params, quantized)
    stored = sum(a.nbytes for a in jax.tree.leaves(loaded.params))
    assert stored <= 1.1 * (tmp_path / "model" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("name", ["int4", "paroquant"])
def test_an_independent_reader_understands_what_is_saved(params, tmp_path, name):
    quantized = rotated(params) if name == "paroquant" else round_params(LM, params, **FORMATS[name])
    save_pretrained(tmp_path / "model", LM, quantized, dtype=jnp.float16)
    tensors = SafetensorsFile(tmp_path / "model" / "model.safetensors")
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == {"int4": "awq"}.get(name, name) and config["group_size"] == 32
    down = quantized["layers"]["mlp"]["down"]
    for layer in range(CONFIG.layers):
        own = {
            s: np.asarray(tensors[f"model.layers.{layer}.mlp.down_proj.{s}"]) for s in ("qweight", "qzeros", "scales")
        }
        columns = {key: np.zeros((len(own[key]), 64), np.int64) for key in ("qweight", "qzeros")}
        for key, codes in columns.items():
            for bit, column in enumerate(AWQ_COLUMNS):
                codes[:, column::8] = own[key].view(np.uint32) >> np.uint32(4 * bit) & np.uint32(15)
        weight = (columns["qweight"] - columns["qzeros"].repeat(32, 0)) * own["scales"].astype(np.float32).repeat(32, 0)
        one = dataclasses.replace(down.of_layer(layer).sliced(), rotation=None, input_scales=None)
        np.testing.assert_array_equal(weight.T.astype(np.float32), dequantize(one))
        if name == "paroquant":
            assert tensors[f"model.layers.{layer}.mlp.down_proj.channel_scales"].shape == (1, 96)
            theta = tensors[f"model.layers.{layer}.mlp.down_proj.theta"]
            np.testing.assert_array_equal(theta, down.rotation.theta[layer])
            np.testing.assert_array_equal(
                tensors[f"model.layers.{layer}.mlp.down_proj.pairs"], down.rotation.pairs[layer]
            )
    assert np.asarray(tensors["model.embed_tokens.weight"]).dtype == np.float16


def test_what_no_layout_can_hold(params, tmp_path):
    quantized = flatten(round_params(LM, params, "int4", group_size=32))
    down = ("layers", "mlp", "down")
    order = jnp.tile(jnp.arange(96, dtype=jnp.int32), (2, 1))
    cases = {
        "inputs in an order of their own": {down: dataclasses.replace(quantized[down], order=order)},
        "only one of them": {down: dataclasses.replace(quantized[down], input_scales=jnp.ones((2, 96)))},
        "is quantized differently from": {down: flatten(round_params(LM, params, "int8"))[down]},
        "do not fit into float16": {down: dataclasses.replace(quantized[down], scales=jnp.full((2, 3, 64), 1e6))},
    }
    for message, change in cases.items():
        with pytest.raises(ValueError, match=rf"down.*{message}"):
            save_pretrained(tmp_path / "model", LM, unflatten(quantized | change))
        assert not (tmp_path / "model").exists()
    with pytest.raises(ValueError, match=r"layers.attention.q.*quantized already \(int4\)"):
        round_params(LM, unflatten(quantized), "int8")
    with pytest.raises(ValueError, match=r"layers.attention.q.*divide the 64 inputs; got 48"):
        round_params(LM, params, "int4", group_size=48)


def test_what_stays_dense_is_named_for_other_readers(params):
    """compressed-tensors and AWQ take every linear for quantized that the configuration does not name."""
    shapes = lambda *args, **options: flatten(jax.eval_shape(lambda p: round_params(LM, p, *args, **options), params))  # noqa: E731
    quantized = shapes("int8") | {("head",): jax.eval_shape(lambda p: round_head(LM, p, "int8")[1]["head"], params)}
    rows = table(LM.config, Layout())
    for dense, ignored in (
        ((), []),
        (("head",), ["lm_head"]),
        (("down", "head"), ["lm_head", "re:.*mlp.down_proj$"]),
        (("q", "o"), ["re:.*self_attn.q_proj$", "re:.*self_attn.o_proj$"]),
    ):
        is_quantized = lambda row: isinstance(quantized[row.path], QuantizedTensor) and row.path[-1] not in dense  # noqa: B023, E731
        own = {".".join(row.path): quantized[row.path] for row in rows if is_quantized(row)}
        assert config_block(own, [row for row in rows if not is_quantized(row)])["ignore"] == ignored
    awq = {"layers.mlp.up": shapes("int4", group_size=32)["layers", "mlp", "up"]}
    attention = [row for row in rows if row.path[:2] == ("layers", "attention")]
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    assert config_block(awq, attention)["modules_to_not_convert"] == names


@pytest.mark.parametrize("name, unrolled", [pytest.param("int4", True, marks=pytest.mark.slow), ("paroquant", False)])
def test_completions_are_those_of_the_dense_weights(params, name, unrolled):
    quantized = rotated(params) if name == "paroquant" else round_params(LM, params, **FORMATS[name])
    own = LM.unstack(quantized) if unrolled else quantized
    prompts = [[5, 6, 7], [44], [9] * 8]
    found = complete_autoregressive(LM, own, prompts, max_new_tokens=8, batch=3)
    assert found == complete_autoregressive(LM, expand(quantized), prompts, max_new_tokens=8, batch=3)
    assert found != complete_autoregressive(LM, params, prompts, max_new_tokens=8, batch=3)


def test_block_diffusion_with_quantized_weights(params):
    config = dataclasses.replace(CONFIG, block_size=4)
    lm, quantized = build(config), rotated(params)
    found = complete_blocks(lm, quantized, [[5, 6, 7], [44]], max_new_tokens=8, batch=2)
    assert found == complete_blocks(lm, expand(quantized), [[5, 6, 7], [44]], max_new_tokens=8, batch=2)


def test_steps_compile_once(params):
    quantized, traces = rotated(params), 0
    step = make_step(LM)

    def counted(params, state):
        nonlocal traces
        traces += 1
        return step(params, state)

    run = jax.jit(counted, donate_argnums=1)
    state = init_state(KVCache.init(CONFIG, batch=1, capacity=32, dtype=jnp.float32), CONFIG.vocab_size)
    prompt = Prompt(
        tokens=jnp.array([[5, 6, 7]]), lengths=jnp.array([3]), rows=jnp.array([0]), remaining=jnp.array([30]),
        eos=jnp.full((1, 8), -1), sampling=Sampling.stack([SamplingOptions()]),
    )  # fmt: skip
    state, _ = jax.jit(make_prefill(LM))(quantized, state, prompt)
    for _ in range(12):
        state, _ = run(quantized, state)
    assert traces == 1


@pytest.mark.parametrize(
    "tied, format, activations",
    [(True, "int8", None), (False, "fp8", "fp8"), pytest.param(True, "fp8", "fp8", marks=pytest.mark.slow)],
)
def test_a_head_in_eight_bits(tied, format, activations):
    lm = build(dataclasses.replace(CONFIG, tied_head=tied))
    params = jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, lm.init(jax.random.key(1)))
    rounded, own = round_head(lm, params, format, activations=activations)
    logits, expected = rounded.apply(own, TOKENS), lm.apply(params, TOKENS)
    error = float(jnp.linalg.norm(logits - expected) / jnp.linalg.norm(expected))
    assert 1e-4 < error < 0.05
    np.testing.assert_array_equal(own["embed"], params["embed"])
    both = round_params(rounded, own, "int4", group_size=32)
    assert rounded.apply(both, TOKENS).shape == (1, 9, CONFIG.vocab_size)
    with pytest.raises(ValueError, match="the head is quantized already"):
        round_head(rounded, own, "int8")


MESH = """
import sys, jax, numpy as np
from jax.sharding import AxisType
from jaxmodels import load_pretrained
tokens = np.array([[3, 14, 15, 92, 65, 35, 89, 79, 32]])
for directory in sys.argv[1:]:
    one = load_pretrained(directory)
    expected = np.asarray(one.apply(one.params, tokens))
    stored = sum(x.nbytes for x in jax.tree.leaves(one.params))
    for shape in ((1, 1, 2), (2, 2, 2)):
        mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
        model = load_pretrained(directory, mesh=mesh)
        held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(model.params))
        with jax.set_mesh(mesh):
            logits = np.asarray(jax.jit(model.lm.apply)(model.params, tokens))
        print(shape[1] * shape[2], held / stored, np.abs(logits - expected).max(), np.abs(expected).max())
mesh = jax.make_mesh((1, 4, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
try:
    load_pretrained(directory, mesh=mesh)
except ValueError as error:
    print(error)
"""


def test_on_a_mesh(tmp_path):
    """Logits of one device, and every device holds its part. Groups are never cut."""
    config = dataclasses.replace(CONFIG, vocab_size=96, mlp_dim=128)
    lm = build(config)
    params = jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, lm.init(jax.random.key(0)))
    models = {name: round_params(lm, params, **FORMATS[name]) for name in ("int4", "fp8 by token")}
    for name, own in (models | {"paroquant": rotated(params)}).items():
        save_pretrained(tmp_path / name, lm, own)
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", MESH, *(str(tmp_path / name) for name in (*models, "paroquant"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *lines, error = done.stdout.strip().splitlines()
    assert len(lines) == 6
    for line in lines:
        parts, held, difference, largest = map(float, line.split())
        assert held < 1.25 / parts + 0.05 and difference < 2e-5 * max(1, largest)
    assert "cut 64 inputs 4 ways, through groups of 32" in error


KERNELS = """
import re, sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import stand_ins
from jaxmodels import load_pretrained
stand_ins.install()
tokens = np.array([[3, 14, 15, 92, 65, 35, 89, 79, 32], [1, 4, 1, 5, 9, 2, 6, 5, 3]])
one = load_pretrained(sys.argv[1], dtype="bfloat16")
own = jax.device_put(one.params, jax.devices()[0])
expected = np.asarray(jax.jit(lambda *given: one.lm.apply(*given))(own, tokens), np.float32)
for record in (stand_ins.products, stand_ins.rotations, stand_ins.norms):
    del record[:]
mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
model = load_pretrained(sys.argv[1], dtype="bfloat16", mesh=mesh)
given = model.params, jax.device_put(tokens, NamedSharding(mesh, P("data")))
with jax.set_mesh(mesh):
    compiled = jax.jit(lambda *given: model.lm.apply(*given)).lower(*given).compile()
logits = np.asarray(compiled(*given), np.float32)
is_local = lambda shape: shape[0] == 9
print(sorted({products for products in stand_ins.products if is_local(products[1][0])}))
print(sorted({rows for rows, *_ in stand_ins.rotations if is_local(rows)}))
print(sorted({heads for heads in stand_ins.norms if is_local(heads[0])}))
pattern = r"= ([^ {]*)[^ ]* ((?:all|collective)-[a-z-]*|reduce-scatter)[(]"
print(sorted(" ".join(words) for words in re.findall(pattern, compiled.as_text())))
print(np.sqrt(((logits - expected) ** 2).mean() / (expected**2).mean()))
"""


@pytest.mark.slow
def test_kernels_on_a_mesh(tmp_path):
    """Kernels of a forward pass get their parts of rows, heads, outputs or inputs, and nothing but sums is sent."""
    config = QwenConfig.tiny(layers=2, vocab_size=96, dim=128, heads=4, kv_heads=2, head_dim=64, mlp_dim=256)
    lm = build(config)
    params = jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, lm.init(jax.random.key(0)))
    save_pretrained(tmp_path, lm, rotated(params, lm=lm))
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2] / "pallas_kernels")
    command = [sys.executable, "-c", KERNELS, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    products, rotations, norms, sent, difference = done.stdout.splitlines()
    rows, stack = 9, 1  # a scan takes the stack apart
    layers = {
        "q, k, v": ("bfloat16", *(((rows, 128), (stack, outputs, 64)) for outputs in (128, 64, 64))),
        "gate, up": ("bfloat16", *(((rows, 128), (stack, 128, 64)),) * 2),
        "o, down": ("float32", ((rows, 128), (stack, 128, 64))),
    }
    assert products == str(sorted(layers.values()))
    assert rotations == str([(rows, 128)]) and norms == str([((rows, 2, 64), (rows, 1, 64))])
    sums = ["f32[1,9,128]", *["f32[9,128]"] * 2]  # of the embedding, and of a layer's attention and mlp
    assert sent == str([f"{shape} all-reduce" for shape in sums]) and float(difference) < 1e-2


COMPILED = """
import dataclasses, re, jax, jax.numpy as jnp
from unittest import mock
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxmodels.checkpoints.mapping import flatten, unflatten
from jaxmodels.quantization import round_params
from jaxmodels.quantization.load import partition_specs
from jaxmodels.qwen import QwenConfig, build
from jaxmodels.sharding import param_shardings
from pallas_kernels import compat, dispatch
from pallas_kernels.compile_gate import hopper_mesh
from pallas_kernels.quantized_matmul import QuantizedTensor, Rotation
jax.config.update("jax_platforms", "cpu")
mesh = Mesh(hopper_mesh("h100", 2).devices.reshape(1, 2), ("data", "tensor"))
lm = build(QwenConfig.tiny(layers=2, vocab_size=96, dim=1024, heads=8, kv_heads=4, head_dim=128, mlp_dim=2048))
def init():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), lm.init(jax.random.key(0)))
    return round_params(lm, params, "int4", group_size=128)
array, shardings, params = jax.ShapeDtypeStruct, flatten(param_shardings(lm, mesh)), flatten(jax.eval_shape(init))
def lying(leaf, spec):
    return array(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
for path, leaf in params.items():
    if isinstance(leaf, QuantizedTensor):
        turns = Rotation(array((2, 8, leaf.inputs // 2), jnp.float16), array((2, 8, leaf.inputs), jnp.int16))
        leaf = dataclasses.replace(leaf, rotation=turns)
        params[path] = jax.tree.map(lying, leaf, partition_specs(leaf, shardings[path], str(path)))
    else:
        params[path] = lying(leaf, shardings[path].spec)
tokens = array((2, 16), jnp.int32, sharding=NamedSharding(mesh, P()))
with (
    mock.patch.object(jax, "device_count", lambda: 2),
    mock.patch.object(compat, "missing_hopper", lambda: None),
    mock.patch.object(dispatch, "preferred", lambda *_, **__: (("mosaic", "xla"), "")),
    jax.set_mesh(mesh),
):
    traced = jax.jit(lm.apply).trace(unflatten(params), tokens)
    text = traced.lower(lowering_platforms=("cuda",)).compile().as_text()
kernels = [line for line in text.splitlines() if 'custom_call_target="mosaic_gpu' in line]
print(len(kernels))
print(sorted(set(re.findall(r"u8\\[[0-9,]*\\]", " ".join(kernels)))))
print(sorted(re.findall(r" ((?:all|collective)-[a-z-]*|reduce-scatter)[(]", re.sub("-start|-done[(]", "", text))))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the extra gpu-compile")
def test_layers_compile_for_two_gpus():
    """A layer on two imaginary H100s: every kernel with its half of heads, outputs or inputs, and two sums are sent."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels, codes, sent = done.stdout.splitlines()
    assert kernels == "10", "four rotations and products, norms of heads, attention"
    halves = [(outputs, inputs) for outputs, inputs in ((1024, 512), (1024, 1024), (256, 1024), (512, 1024))]
    assert codes == str([f"u8[1,{outputs},{inputs // 2}]" for outputs, inputs in halves])
    assert sent == str(["all-reduce"] * 3), "of attention, mlp and embedding"


TRANSFORMERS = """
import sys, numpy as np, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
tokens = torch.tensor(np.load(sys.argv[1] + "/tokens.npy"))
for directory in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
    dense = CompressedTensorsConfig(run_compressed=False)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, quantization_config=dense)
    with torch.no_grad():
        np.save(f"{directory}.npy", model.eval()(tokens).logits.float().numpy())
"""
PEER = os.environ.get("JAXSTREAM_TORCH_PYTHON")


@pytest.mark.slow
@pytest.mark.skipif(not PEER, reason="JAXSTREAM_TORCH_PYTHON names no interpreter with compressed-tensors")
def test_transformers_reads_what_is_saved(params, tmp_path):
    """The same logits in a second interpreter. compressed-tensors decodes NVFP4 in bfloat16.

    Last run: 2026-11-27, transformers 5.24, compressed-tensors 0.20, passed in 25 s.
    """
    np.save(tmp_path / "tokens.npy", np.asarray(TOKENS))
    expected = {}
    for name in ("int8", "fp8", "nvfp4"):
        quantized = round_params(LM, params, **FORMATS[name])
        save_pretrained(tmp_path / name, LM, quantized)
        expected[name] = LM.apply(quantized, TOKENS)
    result = subprocess.run([PEER, "-c", TRANSFORMERS, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name, logits in expected.items():
        size = float(jnp.abs(logits).max())
        np.testing.assert_allclose(
            np.load(tmp_path / f"{name}.npy"), logits, atol=(6e-2 if name == "nvfp4" else 2e-5) * max(1.0, size)
        )


@pytest.mark.parametrize("form", [pytest.param("int4", marks=pytest.mark.slow), "paroquant"])
def test_kernels_hand_on_what_they_leave_in_parts(form, monkeypatch):
    """Two layers of a decode step by the interpreted kernels, each of which adds up what the one before left."""
    config = QwenConfig.tiny(layers=2, dim=128, heads=2, kv_heads=1, head_dim=64, mlp_dim=128)
    lm = build(config)
    params = jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, lm.init(jax.random.key(0)))
    norms = iter(jax.random.split(jax.random.key(1), 99))
    params = jax.tree.map_with_path(
        lambda path, x: 1 + jax.random.normal(next(norms), x.shape) / 4 if "norm" in path[-1].key else x, params
    )
    params = round_params(lm, params, "int4", group_size=32) if form == "int4" else rotated(params, lm=lm)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, params)
    tokens = jnp.array([[3], [14], [15]])
    cache = KVCache.init(config, batch=3, capacity=8, dtype=jnp.bfloat16)
    steps = lambda: lm.hidden(params, tokens, cache=cache, unroll=True)  # noqa: E731
    expected = steps()
    launches = []

    def interpreted(module, name):
        run = getattr(module, name)

        def call(first, *rest, **options):
            given = jax.tree.leaves((first, rest), is_leaf=lambda node: isinstance(node, Partial))
            launches.append((module.__name__.split(".")[1], any(isinstance(x, Partial) for x in given)))
            return run(first, *rest, **options, interpret=compat.interpret_params())

        monkeypatch.setattr(module, name, call)

    interpreted(product_kernel, "run_together")
    interpreted(rotation_kernel, "run")
    interpreted(norm_rope_kernel, "run")
    monkeypatch.setattr(compat, "missing_hopper", lambda: None)
    ours = ("quantized_matmul", "pairwise_rotation", "norm_rope")
    monkeypatch.setattr(dispatch, "preferred", lambda op, *_, **__: (("mosaic", "xla") if op in ours else ("xla",), ""))
    found = steps()
    product, turn = ("quantized_matmul", False), [("rotation", False)] * (form == "paroquant")
    gate = [("rotation", True)] * (form == "paroquant")
    rest = [product, ("norm_rope", True), *turn, product, ("rotation", True), product, *gate, product]
    assert launches == [("rotation", False), *rest, ("rotation", True), *rest]
    both = (jax.tree.leaves((result.states, result.kv)) for result in (found, expected))
    for a, b in zip(*both, strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.linalg.norm(a - b) < 2e-2 * np.linalg.norm(b)
