"""Mixtures of experts: routing and tiles by themselves, padding and company, decoding, meshes, files."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodels import load_pretrained, save_pretrained
from jaxmodels.cache import KVCache
from jaxmodels.checkpoints.huggingface import Checkpoint
from jaxmodels.layers.experts import MAX_TILE, Tiles, expert_linears, route
from jaxmodels.qwen import MoeConfig, QwenConfig, build, moe

CONFIG = QwenConfig.tiny(layers=2, dim=32, mlp_dim=16, head_dim=16, vocab_size=61, moe=MoeConfig(6, 2))
LM = build(CONFIG)
WHOLE = (None,) * 3
ROUTINGS = [(1, 5, 2), (40, 4, 2), (300, 2, 2)]  # rows, experts, experts per row


def random_params(lm=LM, seed=0):
    """Decided routing: weights large enough to matter, norms apart from 1."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(lm.init, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    draw = lambda s: rng.normal(0 if s.ndim > 2 else 1, 0.3, s.shape)  # noqa: E731
    return jax.tree.unflatten(tree, [jnp.asarray(draw(s), jnp.float32) for s in leaves])


PARAMS = random_params()


def routed(rows, num_experts, per_row, seed=0):
    """Rows and their routing; the last expert gets none where there is another choice."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, num_experts))
    if per_row < num_experts:
        logits[:, -1] = -9
    return jnp.asarray(rng.normal(size=(rows, 6)), jnp.float32), *route(jnp.asarray(logits), per_row, normalize=True)


def test_routing_weighs_the_largest_and_breaks_ties_by_index():
    logits = jnp.log(jnp.array([[1.0, 4.0, 1.0, 2.0], [2.0, 2.0, 2.0, 2.0]]))
    weights, experts = route(logits, 2, normalize=False)
    np.testing.assert_array_equal(experts, [[1, 3], [0, 1]])
    np.testing.assert_allclose(weights, [[0.5, 0.25], [0.25, 0.25]], rtol=1e-6)
    weights, _ = route(logits, 2, normalize=True)
    np.testing.assert_allclose(weights, [[2 / 3, 1 / 3], [0.5, 0.5]], rtol=1e-6)
    # Probabilities that differ by less than bfloat16 can tell are compared in float32.
    close = jnp.array([[8.0, -3.0, -3.0625, 8.0625]], jnp.bfloat16)
    weights, experts = route(close, 3, normalize=False)
    assert weights.dtype == jnp.bfloat16
    np.testing.assert_array_equal(experts, [[3, 0, 1]])


@pytest.mark.parametrize(("rows", "num_experts", "per_row"), ROUTINGS)
def test_tiles_hold_every_pair_once(rows, num_experts, per_row):
    x, _, experts = routed(rows, num_experts, per_row)
    tiles = jax.jit(Tiles.of, static_argnums=1)(experts, num_experts)
    assert tiles.rows.shape[1] <= MAX_TILE and (tiles.rows.shape[1] == 1) == (rows * per_row <= num_experts)
    held, slots = np.asarray(tiles.rows).ravel(), np.asarray(tiles.slots)
    assert len(set(slots.ravel())) == rows * per_row
    np.testing.assert_array_equal(held[slots], np.arange(rows)[:, None].repeat(per_row, 1))
    np.testing.assert_array_equal(np.asarray(tiles.experts)[slots // tiles.rows.shape[1]], experts)
    assert (held < rows).sum() == rows * per_row  # the other slots are free, and hold zeros
    np.testing.assert_array_equal(tiles.gather(x).reshape(-1, 6)[held == rows], 0)


@pytest.mark.parametrize(("rows", "num_experts", "per_row"), ROUTINGS[:2])
def test_products_and_gradients_are_those_of_every_expert_on_every_row(rows, num_experts, per_row):
    """Against the sum over all experts with one-hot weights, and `ragged_dot` of the sorted rows."""
    x, weights, experts = routed(rows, num_experts, per_row)
    rng = np.random.default_rng(1)
    up = jnp.asarray(rng.normal(size=(num_experts, 5, 6)), jnp.float32)
    down = jnp.asarray(rng.normal(size=(num_experts, 6, 5)), jnp.float32)

    def tiled(x, weights, up, down):
        tiles = Tiles.of(experts, num_experts)
        first, second = expert_linears(tiles.gather(x), (up, 2 * up), tiles.experts, axes=WHOLE)
        (y,) = expert_linears(jnp.tanh(first) * second, (down,), tiles.experts, axes=WHOLE)
        return tiles.combine(y, weights)

    def dense(x, weights, up, down):
        hidden = jnp.einsum("RI,EOI->REO", x, up, precision="highest")
        y = jnp.einsum("REO,EIO->REI", jnp.tanh(hidden) * 2 * hidden, down, precision="highest")
        share = (jax.nn.one_hot(experts, num_experts) * weights[..., None]).sum(1)
        return jnp.einsum("RE,REI->RI", share, y, precision="highest")

    loss = lambda f: lambda *args: (jnp.sin(f(*args)) ** 2).sum()  # noqa: E731
    arguments = (x, weights, up, down)
    found = jax.jit(jax.value_and_grad(loss(tiled), (0, 1, 2, 3)))(*arguments)
    wanted = jax.jit(jax.value_and_grad(loss(dense), (0, 1, 2, 3)))(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, wanted)
    assert all(float(jnp.abs(g).max()) > 0 for g in found[1])

    order = jnp.argsort(experts.ravel())
    sizes = jnp.bincount(experts.ravel(), length=num_experts).astype(jnp.int32)
    tiles = Tiles.of(experts, num_experts)
    (own,) = expert_linears(tiles.gather(x), (up,), tiles.experts, axes=WHOLE)
    ragged = jax.lax.ragged_dot(x[order // per_row], up.swapaxes(1, 2), sizes)
    np.testing.assert_allclose(own.reshape(-1, 5)[tiles.slots.ravel()[order]], ragged, rtol=1e-5, atol=1e-5)


def test_gradients_of_bfloat16_weights_are_summed_in_float32():
    """256 rows, each of which adds 1/256 to a sum that begins near 1: bfloat16 would lose all of them."""
    rows = 256 * MAX_TILE
    x = jnp.full((rows // MAX_TILE, MAX_TILE, 1), 1.0 / rows, jnp.bfloat16).at[0].set(1.0 / MAX_TILE)
    experts = jnp.zeros((len(x),), jnp.int32)
    weight = jnp.ones((1, 1, 1), jnp.bfloat16)
    grad = jax.jit(jax.grad(lambda w: expert_linears(x, (w,), experts, axes=WHOLE)[0].astype(jnp.float32).sum()))(
        weight
    )
    assert grad.dtype == jnp.bfloat16 and float(grad[0, 0, 0]) == pytest.approx(2, rel=0.01)


def test_padding_and_company_change_nothing():
    """Rows of a padded batch, with NaN for the padding, are what each is alone; so is each token of a mixture."""
    tokens = jax.random.randint(jax.random.key(0), (3, 12), 0, 61)
    lengths = jnp.array([12, 5, 9])
    logits = jax.jit(LM.apply)
    padded = jnp.where(jnp.arange(12) < lengths[:, None], tokens, 10_000)  # beyond the vocabulary: NaN
    together = jax.jit(lambda t, n: LM.apply(PARAMS, t, lengths=n))(padded, lengths)
    for row, length in enumerate(lengths):
        alone = logits(PARAMS, tokens[row : row + 1])[0, :length]  # causal: what follows does not matter
        np.testing.assert_allclose(together[row, :length], alone, rtol=0, atol=2e-5)


def test_many_rows_are_taken_piece_by_piece(monkeypatch):
    """Pieces of 86 rows, the last of them not full: the same results in less than half of the memory."""
    block = moe.Moe(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.dtype(jnp.float32))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 300, 32)), jnp.float32)
    whole = jax.jit(lambda x: block(x)).lower(x).compile()
    monkeypatch.setattr(moe, "MAX_ROWS", 90)
    pieces = jax.jit(lambda x: block(x)).lower(x).compile()
    np.testing.assert_allclose(pieces(x), whole(x), rtol=1e-5, atol=1e-8)
    memory = [compiled.memory_analysis().temp_size_in_bytes for compiled in (whole, pieces)]
    assert memory[1] < memory[0] / 2, memory


@pytest.mark.slow
def test_cached_pieces_equal_one_pass():
    """Last run: 2026-11-30; a fast test of infer/ compares whole streams with one pass."""
    tokens = jax.random.randint(jax.random.key(1), (2, 14), 0, 61)
    expected = jax.jit(LM.apply)(PARAMS, tokens)

    @jax.jit
    def step(params, cache, piece):
        hidden = LM.hidden(params, piece, cache=cache)
        return cache.append(hidden.kv), LM.head(params, hidden.states)

    cache = KVCache.init(CONFIG, batch=2, capacity=14, dtype=jnp.float32)
    outputs, start = [], 0
    for size in (7, *[1] * 7):
        cache, logits = step(PARAMS, cache, tokens[:, start : start + size])
        outputs.append(logits)
        start += size
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), expected, rtol=0, atol=1e-4)


SHARDED = """
    import re, jax, numpy as np
    from jax.sharding import AxisType
    from jaxmodels import load_pretrained, save_pretrained
    from jaxmodels.qwen import MoeConfig, QwenConfig, build
    from jaxmodels.sharding import batch_sharding, param_shardings

    lm = build(QwenConfig.tiny(vocab_size=96, layers=2, mlp_dim=32, moe=MoeConfig(6, 2)))
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    single = jax.tree.map(lambda x: 6 * x if x.ndim > 2 else x, jax.jit(lm.init)(jax.random.key(0)))
    save_pretrained("model", lm, single)
    params = load_pretrained("model", mesh=mesh).params
    gate, down = (params["layers"]["mlp"][name].addressable_shards[0].data.shape for name in ("gate", "down"))
    assert (gate, down) == ((2, 6, 16, 32), (2, 6, 32, 16)), (gate, down)
    tokens = jax.random.randint(jax.random.key(1), (4, 12), 0, 96)

    def loss(params, tokens):
        logits = lm.apply(params, tokens)
        return (logits**2).mean(), logits

    step = jax.value_and_grad(loss, has_aux=True)
    (_, want), want_grads = jax.jit(step)(single, tokens)
    with jax.set_mesh(mesh):
        given = params, jax.device_put(tokens, batch_sharding(mesh))
        compiled = jax.jit(step).lower(*given).compile()
        (_, got), grads = compiled(*given)
        one = jax.jit(lm.apply)(params, tokens[:1])  # fewer rows than devices
    # Loops over tiles add up parts of results and no more: weights are gathered before them, rows not at all.
    text = compiled.as_text()
    computations = dict(re.findall(r"(?ms)^%(\\S+) [^\\n]*{$(.*?)^}", text))
    loops = [own for name in set(re.findall(r"body=%([^ ,]*)", text)) if " while(" not in (own := computations[name])]
    assert len(loops) > 4
    assert not [own for own in loops if re.search("all-gather|all-to-all|permute", own)]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    np.testing.assert_allclose(one, want[:1], rtol=0, atol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())
    save_pretrained("again", lm, params)
    jax.tree.map(np.testing.assert_array_equal, load_pretrained("again").params, single)
    print("equal")
"""


@pytest.mark.slow
def test_sharded_forward_and_gradients_equal_one_device(tmp_path):
    """Eight simulated devices: rows, parameters and the experts' inner width are cut (last run: 2026-11-30)."""
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": root
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SHARDED)], env=environment, capture_output=True, text=True, timeout=300,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr


def test_saved_and_loaded(tmp_path):
    save_pretrained(tmp_path / "model", LM, PARAMS)
    names = Checkpoint(tmp_path / "model").names()
    assert {f"model.layers.1.mlp.experts.5.{n}_proj.weight" for n in ("gate", "up", "down")} <= set(names)
    checkpoint = Checkpoint(tmp_path / "model")
    np.testing.assert_array_equal(
        checkpoint.view("model.layers.1.mlp.experts.4.down_proj.weight"), PARAMS["layers"]["mlp"]["down"][1, 4]
    )
    loaded = load_pretrained(tmp_path / "model")
    assert loaded.config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, loaded.params, PARAMS)


def test_an_expert_that_is_missing_or_of_another_size_is_named(tmp_path):
    wrong = jax.tree.map(lambda x: x, PARAMS)
    wrong["layers"]["mlp"] = wrong["layers"]["mlp"] | {"up": wrong["layers"]["mlp"]["up"][:, :5]}
    with pytest.raises(ValueError, match=r"parameter 'layers\.mlp\.up' has shape \(2, 5, 16, 32\); the model has"):
        save_pretrained(tmp_path / "model", LM, wrong)
    save_pretrained(tmp_path / "model", LM, PARAMS)
    config = (tmp_path / "model" / "config.json").read_text()
    (tmp_path / "model" / "config.json").write_text(config.replace('"num_experts": 6', '"num_experts": 7'))
    with pytest.raises(ValueError, match=r"lacks .*layers\.0\.mlp\.experts\.6\.down_proj\.weight"):
        load_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(
        config.replace('"moe_intermediate_size": 16', '"moe_intermediate_size": 8')
    )
    with pytest.raises(
        ValueError, match=r"experts\.0\.gate_proj\.weight' has shape \(16, 32\); config\.json implies \(8, 32\)"
    ):
        load_pretrained(tmp_path / "model")
