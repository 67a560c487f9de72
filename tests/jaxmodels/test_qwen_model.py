"""What the goldens cannot show: every field is read, bad input is refused, layer patterns, views, remat, dtypes."""

import ast
import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.cache import KVCache
from jaxmodels.layers import RopeConfig, gated_silu, linear, rope_tables
from jaxmodels.quantization.whole import round_head, round_params
from jaxmodels.qwen import CausalLM, LayerAttention, MoeConfig, QwenConfig, build, model, sliding_windows
from jaxmodels.qwen.model import Run, layer_runs
from pallas_kernels.masks import Causal, Full
from pallas_kernels.quantized_matmul import QuantizedTensor
from pallas_kernels.quantized_matmul.tensor import can_interleave

ROOT = Path(__file__).resolve().parents[2]
BASE = QwenConfig.tiny(layers=2, dim=32, mlp_dim=48, head_dim=8, vocab_size=61)
YARN = RopeConfig(theta=1e4, kind="yarn", factor=4.0, original_max_positions=512, mscale=1.0, mscale_all_dim=0.5)

# A change of each field that shapes the parameters, or the numbers that come out of them.
MODEL_FIELDS = {
    "vocab_size": 62, "dim": 48, "layers": 3, "heads": 6, "kv_heads": 4, "head_dim": 16, "mlp_dim": 64,
    "rope": RopeConfig(theta=500.0), "norm_eps": 1e-2, "qkv_bias": True, "qk_norm": False, "tied_head": True,
    "moe": MoeConfig(4, 2), "layer_attention": sliding_windows(None, 3),
}  # fmt: skip
# The others describe the tokenizer, the trained length and how a diffusion model decodes: loops read them.
OTHER_FIELDS = {
    "max_positions", "eos_ids", "bos_id", "pad_id", "mask_id", "block_size", "token_shift", "prompt_attention",
}  # fmt: skip


def shapes_of(config: QwenConfig):
    return jax.eval_shape(build(config).init, jax.random.key(0))


def logits_of(config: QwenConfig):
    """From parameters that depend on nothing but their shapes."""
    wave = lambda s: jnp.sin(jnp.arange(s.size, dtype=jnp.float32) * 1.7).reshape(s.shape)  # noqa: E731
    tokens = jnp.arange(12, dtype=jnp.int32)[None] * 5 % 61
    return np.asarray(jax.jit(build(config).apply)(jax.tree.map(wave, shapes_of(config)), tokens))


def test_every_field_is_accounted_for():
    assert {field.name for field in dataclasses.fields(QwenConfig)} == MODEL_FIELDS.keys() | OTHER_FIELDS


@pytest.mark.parametrize("name", MODEL_FIELDS)
def test_every_model_field_has_an_effect(name):
    """On the shapes of the parameters, or else on the logits."""
    value = MODEL_FIELDS[name]
    assert value != getattr(BASE, name)
    changed = dataclasses.replace(BASE, **({"layer_attention": ()} if name == "layers" else {}), **{name: value})
    if shapes_of(changed) == shapes_of(BASE):
        assert np.abs(logits_of(changed) - logits_of(BASE)).max() > 1e-4


@pytest.mark.parametrize("name", sorted(OTHER_FIELDS))
def test_every_other_field_is_read_outside_its_definition(name):
    """An attribute `.name` is read somewhere in the packages, other than where it is declared and parsed."""
    readers = []
    for package in ("jaxmodels", "train", "infer"):
        for path in (ROOT / package).rglob("*.py"):
            if path == ROOT / "jaxmodels/qwen/config.py":
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and node.attr == name and isinstance(node.ctx, ast.Load):
                    owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
                    if owner == "config":
                        readers.append(path)
    assert readers, f"nothing reads config.{name}"


ROPE_CHANGES = {
    "theta": 100.0, "kind": "linear", "factor": 8.0, "original_max_positions": 4096, "attention_factor": 0.5,
    "beta_fast": 4.0, "beta_slow": 0.25, "mscale": 2.0, "mscale_all_dim": 0.25, "truncate": False,
}  # fmt: skip


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(RopeConfig)])
def test_every_rope_field_has_an_effect(field):
    positions = jnp.arange(20)[None]
    changed = dataclasses.replace(YARN, **{field: ROPE_CHANGES[field]}) if field != "kind" else RopeConfig(
        theta=1e4, kind="linear", factor=4.0
    )  # fmt: skip
    before, after = (jnp.stack(rope_tables(config, 16, positions)) for config in (YARN, changed))
    assert np.abs(np.asarray(before - after)).max() > 1e-3


def test_dynamic_rope_depends_on_the_row_alone_and_not_on_padding():
    rope = RopeConfig(theta=1e4, kind="dynamic", factor=2.0, original_max_positions=8)
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    cos, _ = rope_tables(rope, 16, positions, jnp.asarray([12, 6]))
    long, _ = rope_tables(rope, 16, positions[:1])
    plain, _ = rope_tables(RopeConfig(theta=1e4), 16, positions[:1])
    np.testing.assert_array_equal(cos[0], long[0])
    np.testing.assert_allclose(cos[1], plain[0], atol=1e-6)
    assert np.abs(np.asarray(cos[0] - cos[1])).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "yarn", "factor": 2.0}, "needs original_max_positions"),
        ({"factor": 2.0}, "'default' does not use factor; got 2.0"),
        ({"kind": "linear", "factor": 2.0, "beta_fast": 3.0}, "'linear' does not use beta_fast"),
        ({"theta": 0.5}, "theta must exceed 1; got 0.5"),
    ],
)
def test_rope_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        RopeConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers must be at least 1; got 0"),
        ({"heads": 5}, "multiple of kv_heads; got 5 and 2"),
        ({"head_dim": 7}, "head_dim must be even.* got 7"),
        ({"norm_eps": 0.0}, "norm_eps must be positive"),
        ({"layer_attention": sliding_windows(None)}, "must name 2 layers; got 1"),
        ({"mask_id": 61}, r"mask_id must lie in \[0, vocab_size=61\); got 61"),
        ({"eos_ids": (3, -1)}, "eos_ids must lie in .* got -1"),
        ({"block_size": 0}, "block_size must be None or at least 1; got 0"),
    ],
)
def test_config_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **changes)


def test_layer_refusals():
    with pytest.raises(ValueError, match="window of a layer must be None or at least 1; got 0"):
        LayerAttention(window=0)


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [(RopeConfig(), "kind", "longrope"), (RopeConfig(), "kind", "llama3"), (BASE, "prompt_attention", "full")],
)
def test_unknown_names_are_refused(config, field, value):
    """Past the annotations, which only tests enforce."""
    config = dataclasses.replace(config)
    object.__setattr__(config, field, value)
    with pytest.raises(ValueError, match=f"must be one of .* got {value!r}"):
        config.__post_init__()


def test_call_refusals():
    lm = build(dataclasses.replace(BASE, layer_attention=sliding_windows(None, 3)))
    params = lm.init(jax.random.key(0))
    tokens = jnp.zeros((1, 4), jnp.int32)
    cache = KVCache.init(lm.config, batch=1, capacity=8, dtype=jnp.float32)
    for message, options in {
        "remat must be None or one of .*'everything'": {"remat": "everything"},
        "own_mask=.* needs a cache": {"own_mask": Full()},
        "mask and segment_ids apply without a cache": {"cache": cache, "mask": Full()},
        r"a layer with a window \(3\) needs the mask Causal": {"mask": Full()},
    }.items():
        with pytest.raises(ValueError, match=message):
            lm.hidden(params, tokens, **options)
    with pytest.raises(ValueError, match="not empty; got shape"):
        lm.hidden(params, jnp.zeros((1, 0), jnp.int32))
    with pytest.raises(ValueError, match="unroll=False scans stacked layers"):
        lm.hidden(lm.unstack(params), tokens, unroll=False)
    with pytest.raises(ValueError, match="outside of jit"):
        jax.jit(lm.unstack)(params)
    with pytest.raises(ValueError, match="contracted axes 'D'"):
        linear(jnp.zeros((1, 2, 3)), jnp.zeros((3, 4)), "BTD,DF->BTF")


@pytest.mark.parametrize(
    ("windows", "runs"),
    [
        ((None,) * 6, [Run(0, 6, (None,))]),
        ((None, 4) * 3, [Run(0, 3, (None, 4))]),
        ((None, 4, 4) * 2, [Run(0, 2, (None, 4, 4))]),
        ((None, None, 4, 4, 4), [Run(0, 2, (None,)), Run(2, 3, (4,))]),
        ((7,), [Run(0, 1, (7,))]),
        ((None, 4, None), [Run(0, 1, (None,)), Run(1, 1, (4,)), Run(2, 1, (None,))]),
    ],
)
def test_layer_runs(windows, runs):
    described = [Run(run.start, run.repeats, sliding_windows(*run.pattern)) for run in runs]
    assert layer_runs(sliding_windows(*windows)) == described


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("windows", "cached"), [pytest.param((None, 3, None, 3), False, marks=pytest.mark.slow), ((None, 3, 3, 3), True)]
)
def test_scanned_equals_unrolled(windows, cached):
    """Stacked and scanned, stacked and unrolled, unstacked; with layer states and keys; without and with a cache."""
    lm = build(dataclasses.replace(BASE, layers=4, layer_attention=sliding_windows(*windows)))
    params = lm.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 61)
    options = {"return_kv": True, "layer_states": True}
    if cached:
        cache = KVCache.init(lm.config, batch=2, capacity=16, dtype=jnp.float32)
        options = {"cache": cache.append(lm.hidden(params, tokens, return_kv=True).kv)}
    expected = lm.hidden(params, tokens, unroll=True, **options)
    for weights in (params, lm.unstack(params)):
        hidden = lm.hidden(weights, tokens, **options)
        assert jax.tree.structure(hidden) == jax.tree.structure(expected)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), hidden, expected)
    assert expected.kv.k.shape == (4, 2, 9, 2, 8)


@pytest.mark.parametrize(("backend", "cached", "scanned"), [("cpu", True, 1), ("gpu", False, 1), ("gpu", True, 0)])
def test_choice_of_the_layer_loop(monkeypatch, backend, cached, scanned):
    lm = build(BASE)
    params = lm.init(jax.random.key(0))
    cache = KVCache.init(lm.config, batch=1, capacity=8, dtype=jnp.float32) if cached else None
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    jaxpr = jax.make_jaxpr(lambda p, t: lm.hidden(p, t, cache=cache).states)(params, jnp.zeros((1, 1), jnp.int32))
    assert sum(equation.primitive.name == "scan" for equation in jaxpr.eqns) == scanned


def test_unstack_makes_views_on_a_cpu():
    lm = build(QwenConfig.tiny())
    params = lm.init(jax.random.key(0))
    stacked = params["layers"]["mlp"]["up"]
    views = lm.unstack(params)["layers"]["mlp"]["up"]
    start = stacked.unsafe_buffer_pointer()
    assert [view.unsafe_buffer_pointer() for view in views] == [start + i * stacked.nbytes // 3 for i in range(3)]
    del params, stacked  # the views keep the memory alive
    np.testing.assert_array_equal(views[2], lm.init(jax.random.key(0))["layers"]["mlp"]["up"][2])


class Gpu:
    platform = "gpu"

    def __init__(self, free):
        self.free = free

    def memory_stats(self):
        return {"bytes_limit": 10**9, "bytes_in_use": 10**9 - self.free}


def test_decoding_takes_one_array_per_layer_where_slices_would_be_copied(monkeypatch, caplog):
    lm = build(QwenConfig.tiny())
    params = lm.init(jax.random.key(0))
    for name in ("attention_norm", "mlp_norm"):  # which are the same in all layers at first
        params["layers"][name] *= jax.random.uniform(jax.random.key(1), params["layers"][name].shape, minval=0.5)
    quantized = round_params(lm, params, "int8")
    layers = sum(leaf.nbytes for leaf in jax.tree.leaves(params["layers"]))
    is_by_layer = lambda params: isinstance(lm.for_decoding(params)["layers"]["mlp_norm"], tuple)  # noqa: E731
    assert is_by_layer(params) and is_by_layer(quantized) and is_by_layer(lm.unstack(params))

    def gpu(free):
        monkeypatch.setattr(type(params["embed"]), "devices", lambda _: {Gpu(free)})

    gpu(free=layers)
    assert is_by_layer(params) and is_by_layer(quantized) and not caplog.records
    mixed = lm.for_decoding(quantized)["layers"]
    assert mixed["mlp"]["up"] is quantized["layers"]["mlp"]["up"], "one argument of a step, not one per layer"
    np.testing.assert_array_equal(mixed["mlp_norm"], quantized["layers"]["mlp_norm"])
    tokens = jnp.asarray([[1, 2, 3]])
    found = lm.apply(quantized | {"layers": mixed}, tokens)
    np.testing.assert_allclose(found, lm.apply(quantized, tokens), rtol=0, atol=1e-5)
    gpu(free=layers - 1)
    assert not is_by_layer(params) and "no room for 0.0 GB of weights by layer" in caplog.text
    gpu(free=sum(leaf.nbytes for leaf in mixed["mlp_norm"]))
    assert not is_by_layer(quantized)


def test_decoding_takes_interleaved_codes_where_kernels_do(monkeypatch, caplog):
    lm = build(QwenConfig.tiny())
    lm, params = round_head(lm, round_params(lm, lm.init(jax.random.key(0)), "int4", group_size=32), "int8")
    monkeypatch.setattr("jaxmodels.qwen.model.is_better_interleaved", lambda weight, _: can_interleave(weight))

    def decoding_with(free):
        monkeypatch.setattr(type(params["embed"]), "devices", lambda _: {Gpu(free)})
        decoding = lm.for_decoding(params)
        is_quantized = lambda node: isinstance(node, QuantizedTensor)  # noqa: E731
        return decoding, [leaf for leaf in jax.tree.leaves(decoding, is_leaf=is_quantized) if is_quantized(leaf)]

    decoding, quantized = decoding_with(free=10**9)
    moved = [leaf for leaf in quantized if leaf.interleaved]
    assert len(quantized) == 8 and len(moved) == 7, "all but a head of 64 inputs"
    by_layer = [leaf for leaf in jax.tree.leaves(params["layers"]) if leaf.ndim == 2]
    needed = sum(leaf.nbytes for leaf in by_layer) + sum(leaf.codes.nbytes for leaf in moved)
    assert all(leaf.interleaved for leaf in moved) and not caplog.records
    assert len([leaf for leaf in decoding_with(free=needed)[1] if leaf.interleaved]) == 7
    less, quantized = decoding_with(free=needed - 1)
    assert not any(leaf.interleaved for leaf in quantized) and isinstance(less["layers"]["mlp_norm"], tuple)
    assert "no room for 0.0 GB of interleaved codes" in caplog.text
    tokens = jnp.asarray([[1, 2, 3]])
    np.testing.assert_allclose(lm.apply(decoding, tokens), lm.apply(params, tokens), rtol=0, atol=1e-5)


def test_init_is_random_and_in_the_dtype():
    lm = build(dataclasses.replace(BASE, qkv_bias=True))
    params = lm.init(jax.random.key(0), jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    up = np.asarray(params["layers"]["mlp"]["up"], np.float32)
    assert 0.015 < up.std() < 0.025 and not np.array_equal(up[0], up[1])
    assert (params["layers"]["attention"]["q_bias"] == 0).all() and (params["final_norm"] == 1).all()
    axes = jax.tree.leaves(lm.logical_axes, is_leaf=lambda node: isinstance(node, tuple))
    assert [len(names) for names in axes] == [leaf.ndim for leaf in jax.tree.leaves(params)]


def test_bfloat16_stays_near_float32_and_logits_are_float32():
    lm = build(BASE)
    params = lm.init(jax.random.key(0))
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 61)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    logits = lm.apply(low, tokens)
    assert logits.dtype == jnp.float32
    assert lm.hidden(low, tokens).states.dtype == jnp.bfloat16
    exact = lm.apply(params, tokens)
    # A few roundings of 2**-9 each along a path of two blocks.
    assert np.abs(np.asarray(logits - exact)).max() < 0.02 * np.abs(np.asarray(exact)).max()


def test_models_are_static_arguments():
    assert build(BASE) is build(dataclasses.replace(BASE))
    assert hash(CausalLM(BASE)) == hash(build(BASE)) and CausalLM(BASE) == build(BASE)


@pytest.mark.slow  # many programs to compile
def test_remat_policies_trade_memory_for_work():
    """From "none" to "full" each keeps less for the backward pass, and computes more."""
    lm = build(QwenConfig.tiny(layers=2))
    params = jax.eval_shape(lm.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)

    def cost(remat):
        grad = jax.grad(lambda p, t: lm.hidden(p, t, remat=remat, mask=Causal()).states.sum())
        compiled = jax.jit(grad).lower(params, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes, compiled.cost_analysis()["flops"]

    memory, work = zip(*(cost(name) for name in ("none", "dots", "attention", "full")), strict=True)
    assert list(memory) == sorted(memory, reverse=True) and len(set(memory)) == 4
    assert list(work) == sorted(work) and len(set(work)) == 4


@pytest.mark.parametrize("remat", [None, "dots", "full"])
def test_a_backward_pass_keeps_no_second_copy_of_the_weights(remat):
    """The weights of a scanned layer are what the scan consumes, not something computed from it and kept."""
    lm = build(QwenConfig.tiny(layers=8, dim=256, heads=16, kv_heads=16, head_dim=64, mlp_dim=1024))
    params = jax.eval_shape(lm.init, jax.random.key(0))
    attention = 4 * sum(x.size for x in jax.tree.leaves(params["layers"]["attention"]))
    grad = jax.grad(lambda p, t: lm.hidden(p, t, remat=remat).states.sum())
    compiled = jax.jit(grad).lower(params, jax.ShapeDtypeStruct((1, 16), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < attention / 2


def test_a_gated_product_keeps_its_two_operands_for_the_backward_pass():
    gate, up = (jax.ShapeDtypeStruct((1, 4, 32), jnp.float32),) * 2
    kept = jax.eval_shape(lambda *x: jax.vjp(gated_silu, *x)[1], gate, up)
    assert [leaf.shape for leaf in jax.tree.leaves(kept)] == [gate.shape] * 2


@pytest.mark.slow
@pytest.mark.parametrize("program", ["prefill", "decode", "decode unrolled", "train forward"])
def test_the_8b_shape_compiles_within_20_seconds(program):
    """Of CPU time, from abstract arrays. Last run 2026-11-23, in this order: 2.2, 1.9, 13.2 and 1.7 s."""
    lm = build(QwenConfig.qwen3_8b())
    params = jax.eval_shape(lambda key: lm.init(key, jnp.bfloat16), jax.random.key(0))
    cache = jax.eval_shape(lambda: KVCache.init(lm.config, batch=1, capacity=4096, dtype=jnp.bfloat16))
    tokens = jax.ShapeDtypeStruct((1, 1 if program.startswith("decode") else 1024), jnp.int32)

    def prefill(params, tokens):
        hidden = lm.hidden(params, tokens, return_kv=True)
        return lm.head(params, hidden.states[:, -1:]), hidden.kv

    def decode(params, cache, tokens):
        hidden = lm.hidden(params, tokens, cache=cache, unroll=program == "decode unrolled")
        return cache.append(hidden.kv), lm.head(params, hidden.states)

    def train_forward(params, tokens):
        return lm.hidden(params, tokens, remat="full").states.astype(jnp.float32).sum()

    start = time.process_time()
    if program.startswith("decode"):
        jax.jit(decode, donate_argnums=1).lower(params, cache, tokens).compile()
    else:
        function = prefill if program == "prefill" else train_forward
        jax.jit(function).lower(params, tokens).compile()
    assert time.process_time() - start < 20


@pytest.mark.parametrize("bias, norm", [(False, True), (True, True), (True, False)])
def test_heads_are_normalised_and_rotated_in_one_step(monkeypatch, bias, norm):
    """Wherever they have norms, also with biases."""
    lm = build(QwenConfig.tiny(layers=2, qkv_bias=bias, qk_norm=norm))
    calls, norm_rope = [], model.norm_rope
    monkeypatch.setattr(model, "norm_rope", lambda *args, **options: calls.append(1) or norm_rope(*args, **options))
    params = jax.eval_shape(lambda: lm.init(jax.random.key(0)))
    jax.eval_shape(lambda params: lm.hidden(params, jnp.ones((1, 3), jnp.int32), unroll=True).states, params)
    assert len(calls) == 2 * norm
