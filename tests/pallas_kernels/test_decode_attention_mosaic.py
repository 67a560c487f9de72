"""The Hopper kernel of decode_attention: interpreted with race detection, lowered for CUDA, explained; its work list.

The interpreter is slow (10 to 70 ms per tile and head), so sizes are a few tiles; what varies is the edge. By default
few cases run; the others are slow. All slow ones, races included, last passed on 2026-11-27.
"""

import dataclasses
import functools
import importlib
import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat, decode_attention, masks
from pallas_kernels.attention import skip as rule
from pallas_kernels.attention.skip import SkipTile
from pallas_kernels.decode_attention import mosaic_sm90, reference
from pallas_kernels.decode_attention.mosaic_sm90 import Config, SkipConfig, dense, parts, skipping
from pallas_kernels.decode_attention.operands import Operands

SMALL = Config(stages=2, code_stages=2, num_sms=2)


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of the kernel; two layers, of which the second is read."""

    lengths: tuple[int, ...]
    num_queries: int = 1
    capacity: int = 200
    kv_heads: int = 1
    group: int = 4
    head_dim: int = 64
    dtype: str = "bfloat16"
    codes: str = ""
    per_token: bool = False
    own: masks.Mask | None = masks.Full()
    own_lengths: tuple[int, ...] | None = None
    ring: bool = False
    empty_tiles: tuple[int, ...] = ()  # of 128 slots, in a ring
    window: int | None = None
    num_sinks: int = 0
    varied: bool = False  # tiles of 128 keys differ in how large their scores are, and tend to be smaller the later
    config: Config | SkipConfig = SMALL

    def arguments(self):
        """Queries, caches and operands; empty slots hold NaN, and so does the other layer."""
        batch, rng = len(self.lengths), np.random.default_rng(0)
        draw = lambda *shape: jnp.asarray(rng.normal(size=shape), self.dtype)  # noqa: E731
        shape = (2, batch, self.capacity, self.kv_heads, self.head_dim)
        lengths = jnp.asarray(self.lengths, jnp.int32)
        positions = None
        if self.ring:
            slots = np.arange(self.capacity)
            positions = np.stack([np.roll(slots, 37 * (b + 1)) for b in range(batch)])
            is_empty = (rng.random(positions.shape) < 0.1) | np.isin(slots // 128, self.empty_tiles)
            positions = jnp.asarray(np.where(is_empty, -1, positions), jnp.int32)
        empty = jnp.arange(self.capacity) >= lengths[:, None]
        if positions is not None:
            empty |= positions < 0
        caches, scales = [], []
        for _ in range(2):
            if not self.codes:
                caches.append(draw(*shape))
            elif self.codes == "int8":
                caches.append(jnp.asarray(rng.integers(-127, 128, shape), jnp.int8))
            else:
                caches.append(jnp.asarray(rng.normal(size=shape) * 50, self.codes))
            if self.codes:
                scale_shape = (2, batch, self.kv_heads, self.capacity) if self.per_token else (2, self.kv_heads)
                scale = jnp.asarray(rng.uniform(0.005, 0.02, scale_shape), jnp.float32)
                scales.append(jnp.where(empty[:, None], jnp.nan, scale) if self.per_token else scale)
        if self.varied:
            tiles = -(-self.capacity // 128)
            sizes = rng.uniform(0.5, 1.5, (2, batch, tiles, self.kv_heads, 1))
            sizes *= np.linspace(1.3, 0.6, tiles)[:, None, None]
            sizes = np.repeat(sizes, 128, axis=2)[:, :, : self.capacity]
            caches[0] = (caches[0] * sizes).astype(self.dtype)
        if self.codes != "int8":
            garbage = empty[None] | (jnp.arange(2) == 0)[:, None, None]
            caches = [jnp.where(garbage[..., None, None], jnp.nan, x).astype(x.dtype) for x in caches]
        own_shape = (batch, self.num_queries, self.kv_heads, self.head_dim)
        own_k, own_v = (None, None) if self.own is None else (draw(*own_shape), draw(*own_shape))
        own_lengths = None
        if self.own_lengths is not None:
            own_lengths = jnp.asarray(self.own_lengths, jnp.int32)
            beyond = (jnp.arange(self.num_queries) >= own_lengths[:, None])[:, :, None, None]
            own_k, own_v = (jnp.where(beyond, jnp.nan, x) for x in (own_k, own_v))
        operands = Operands(
            layer=jnp.int32(1),
            kv_lengths=lengths,
            k_positions=positions,
            q_positions=jnp.minimum(lengths, self.capacity)[:, None] + jnp.arange(self.num_queries),
            own_k=own_k,
            own_v=own_v,
            own_lengths=own_lengths,
            window=self.window,
            num_sinks=self.num_sinks,
            k_scale=scales[0] if self.codes else None,
            v_scale=scales[1] if self.codes else None,
        )
        return draw(batch, self.num_queries, self.kv_heads * self.group, self.head_dim), *caches, operands

    @property
    def own_mask(self):
        return self.own or masks.Full()


# The first two run by default: together a work list of several items per row, both ways to hold rows, an unclean tile,
# codes and scales per token.
CALLS = {
    "one token, two splits": Call((100,)),
    "int8 per token, more rows than one warpgroup": Call(
        (70,), 17, 72, codes="int8", per_token=True, own=masks.Causal()
    ),
    "more rows than one warpgroup": Call((190,), 17, own=masks.Causal()),
    "more rows than one CTA": Call((70,), 36, own=masks.BlockCausal(8)),
    "ragged": Call((0, 70, 300), 4, kv_heads=2, group=2, own_lengths=(0, 3, 4), config=Config(stages=2, num_sms=12)),
    "no own keys, an empty row": Call((0, 70), 3, 136, group=1, own=None),
    "eight heads to one, whole tiles": Call((192,), 2, 192, group=8),
    "window and sinks": Call((260,), 3, 264, group=2, window=100, num_sinks=3, own=masks.Causal()),
    "window within the own keys": Call((100,), 20, window=7, own=masks.Causal()),
    "ring": Call((500, 150), 3, group=2, ring=True),
    "ring and window": Call((500,), 20, ring=True, window=150, num_sinks=3, own=masks.Causal()),
    "int8 per head": Call((150,), 2, codes="int8"),
    "int8 per token, ring": Call((500,), 2, codes="int8", per_token=True, ring=True),
    "fp8 per head": Call((370,), 20, 400, head_dim=128, codes="float8_e4m3fn"),
    "fp8 per token, window": Call((370,), 1, 400, codes="float8_e4m3fn", per_token=True, window=100),
    "float16": Call((150,), 2, dtype="float16"),
    "96": Call((150,), head_dim=96),
    "128, wide tiles": Call((150,), head_dim=128, config=Config(block_k=128, stages=2, num_sms=2)),
    "256": Call((150,), head_dim=256),
}
PARAMETERS = [
    pytest.param(call, id=name, marks=[pytest.mark.slow] if i > 1 else [])
    for i, (name, call) in enumerate(CALLS.items())
]


class Interpreter:
    """The interpreter's private state, which JAX 0.11 does not export."""

    def __init__(self, monkeypatch):
        self.callbacks = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks")
        # Each kernel of a call starts a record of its own and drops the one before: keep them all.
        self.records = []
        record = self.callbacks.GPURaceDetectionState

        def keep(*args, **kwargs):
            self.records.append(record(*args, **kwargs))
            return self.records[-1]

        monkeypatch.setattr(self.callbacks, "GPURaceDetectionState", keep)

    def reset(self):
        self.callbacks.reset_gpu_interpret_mode_state()

    def run(self, call, **options):
        """The kernel's results; fails on a race."""
        q, k, v, operands = call.arguments()
        results = mosaic_sm90.run(
            q, k, v, operands=operands, own_mask=call.own_mask, scale=0.3, config=call.config,
            interpret=compat.interpret_params(detect_races=True), **options,
        )  # fmt: skip
        results = jax.block_until_ready(results)
        assert len(self.records) == 2, "one record for the attention and one for the merge"
        assert not any(record.races_found for record in self.records), "race detected"
        return results


@pytest.fixture
def interpreter(monkeypatch):
    jax.clear_caches()  # the kernel is jitted: a trace of another test must not stand in for this one
    found = Interpreter(monkeypatch)
    found.reset()
    yield found
    found.reset()


@pytest.mark.parametrize("call", PARAMETERS)
def test_interpreted_kernel_agrees_with_the_definition(interpreter, call):
    expected, expected_lse = by_definition(call)
    out, lse = interpreter.run(call)
    check_output(call, out, lse, expected, expected_lse)


def by_definition(call, **options):
    """What the reference gives for the same arguments as float32."""
    q, k, v, operands = call.arguments()

    def wide(x):
        return x.astype(jnp.float32) if x is not None and x.dtype in (jnp.bfloat16, jnp.float16) else x

    exact = operands._replace(own_k=wide(operands.own_k), own_v=wide(operands.own_v))
    return reference.run(*map(wide, (q, k, v)), operands=exact, own_mask=call.own_mask, scale=0.3, **options)


def check_output(call, out, lse, expected, expected_lse):
    assert out.dtype == call.dtype and lse.dtype == jnp.float32
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=2e-2 if call.dtype == "bfloat16" else 2e-3)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4)
    unseen = np.asarray(expected_lse) == -np.inf
    assert (np.swapaxes(np.asarray(out), 1, 2)[unseen] == 0).all()


class Sabotaged:
    """`plgpu` without the calls of one function that `chosen` picks by their order of tracing."""

    def __init__(self, function, chosen):
        self.function, self.chosen, self.count = function, chosen, 0

    def __getattr__(self, name):
        original = getattr(plgpu, name)
        if name != self.function:
            return original

        def call(*args, **kwargs):
            self.count += 1
            return None if self.count - 1 in self.chosen else original(*args, **kwargs)

        return call


@pytest.mark.parametrize(
    "function, chosen",
    [
        pytest.param("barrier_wait", {5}, id="a load of K does not wait for its slot", marks=pytest.mark.slow),
        pytest.param("commit_smem", {2}, id="the store does not wait for the output", marks=pytest.mark.slow),
    ],
)
def test_a_missing_synchronisation_is_caught(interpreter, monkeypatch, function, chosen):
    sabotaged = Sabotaged(function, chosen)
    for module in (dense, parts):
        monkeypatch.setattr(module, "plgpu", sabotaged)
    with pytest.raises(Exception, match=r"(?i)race|deadlock|barrier|wait|complet"):
        interpreter.run(Call((320,), 17, 320, own=None, config=Config(stages=2, num_sms=1)))
    assert sabotaged.count > max(chosen)


# ---------------------------------------------------------------------------------------------------------------
# Skipped tiles

SKIP_SMALL = SkipConfig(stages=2, num_sms=2)


@dataclasses.dataclass(frozen=True)
class SkipCall(Call):
    """A call with a threshold λ for each row of the batch; tiles of 128 slots."""

    thresholds: tuple[float, ...] = (0.3,)
    chains: int = 2
    varied: bool = True
    config: Config | SkipConfig = SKIP_SMALL

    def skip(self):
        threshold = jnp.asarray(self.thresholds, jnp.float32)
        return rule.resolve(
            threshold, None, SkipTile(width=128, chains=self.chains), jnp.asarray(self.lengths, jnp.int32)
        )


# The first ones run by default: both ways to hold rows, own keys or none, several chains to an item, an unclean tile.
SKIP_CALLS = {
    "one token": SkipCall((1000,), capacity=1000),
    "two warpgroups of rows": SkipCall((660,), 17, 664, thresholds=(0.7,), own=masks.Causal()),
    "ragged, a dense row, an empty row": SkipCall(
        (1024, 0, 700, 90), 4, 1024, kv_heads=2, group=2, own_lengths=(0, 3, 4, 1),
        thresholds=(0.5, 0.5, 1.5, 0.5), config=SkipConfig(stages=3, num_sms=12),
    ),
    "no own keys, an empty row": SkipCall((0, 900), 3, 904, group=1, own=None, thresholds=(0.5, 0.3), chains=1),
    "16 queries of 8 heads": SkipCall((800,), 16, 800, group=8, thresholds=(0.8,), own=masks.Causal()),
    "more chains than tiles": SkipCall((1000,), 1, 1000, chains=16, group=1),
    "eight chains": SkipCall((2000,), 1, 2000, chains=8, group=1, config=SkipConfig(stages=2, num_sms=5)),
    "three chains, K one tile ahead": SkipCall((1500,), 2, 1504, chains=3, config=SkipConfig(stages=1, num_sms=2)),
    "64 queries of one head": SkipCall((800,), 64, 800, group=1, thresholds=(0.8,), own=masks.Full()),
    "more rows than one CTA": SkipCall((800,), 36, 800, thresholds=(0.8,), own=masks.BlockCausal(8)),
    "32 queries of 8 heads": SkipCall((800,), 32, 800, group=8, thresholds=(0.9,), own=masks.Full()),
    "positions": SkipCall((1100, 1000), 3, 1000, group=2, ring=True, thresholds=(0.4, 0.6)),
    "positions, a dense row, empty tiles": SkipCall(
        (1000, 1000), 3, 1000, group=2, ring=True, empty_tiles=(0, 3), thresholds=(0.4, 1.5)
    ),
    "positions, two warpgroups of rows": SkipCall((900,), 20, 1000, ring=True, thresholds=(0.7,)),
    "float16": SkipCall((800,), 2, 800, thresholds=(0.4,), dtype="float16"),
    "96": SkipCall((800,), 2, 800, head_dim=96),
    "128": SkipCall((800,), 17, 800, head_dim=128, thresholds=(0.7,)),
}  # fmt: skip
SKIP_PARAMETERS = [
    pytest.param(call, id=name, marks=[pytest.mark.slow] if i > 2 else [])
    for i, (name, call) in enumerate(SKIP_CALLS.items())
]


@functools.cache
def solved(call):
    """Output, log-sum-exp and kept tiles by the definition."""
    return by_definition(call, skip=call.skip())


def check_skipping(call, out, lse, keep):
    expected, expected_lse, expected_keep = solved(call)
    np.testing.assert_array_equal(keep, expected_keep)
    check_output(call, out, lse, expected, expected_lse)


@pytest.mark.parametrize("call", SKIP_PARAMETERS)
def test_interpreted_kernel_skips_what_the_definition_skips(interpreter, call):
    check_skipping(call, *interpreter.run(call, skip=call.skip()))


@pytest.mark.slow
def test_the_skipping_calls_reach_the_decision():
    """Rows with λ inside (0, 1) keep and skip tiles, and no margin lies so near to log λ that rounding decides."""
    for name, call in SKIP_CALLS.items():
        *_, keep = solved(call)
        skip, (q, k, _, operands) = call.skip(), call.arguments()
        seen = reference.visible(operands, call.own_mask, call.capacity)[:, :, : call.capacity]
        all_kept = reference.keep_tiles(
            q, k[1], seen, 0.3, skip._replace(log_threshold=jnp.full((len(keep),), -jnp.inf))
        )
        for sign in (-1, 1):
            shifted = skip._replace(log_threshold=skip.log_threshold + sign * 2e-2)
            np.testing.assert_array_equal(reference.keep_tiles(q, k[1], seen, 0.3, shifted), keep, err_msg=name)
        inside = np.asarray(skip.log_threshold > -jnp.inf)
        assert keep[inside].sum() >= 2, name
        assert (all_kept & ~keep)[inside].any() or name == "more chains than tiles", name
        assert not (all_kept & ~keep)[~inside].any(), name


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param({"log_threshold": jnp.full((1,), -jnp.inf)}, id="never skips"),
        pytest.param({"log_threshold": jnp.zeros((1,))}, id="another threshold", marks=pytest.mark.slow),
        pytest.param({"tile": SkipTile(width=128, chains=3)}, id="another chain", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_decision_is_caught(interpreter, wrong):
    call = SKIP_CALLS["one token"]
    with pytest.raises(AssertionError):
        check_skipping(call, *interpreter.run(call, skip=call.skip()._replace(**wrong)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "num_queries, row", [(1, 0), (1, 3), (17, 0), (17, 63), (17, 64), (17, 67), (36, 130), (36, 143)]
)
@pytest.mark.parametrize("slot", [256, 319, 320, 383])
def test_each_row_and_each_slot_has_a_vote(interpreter, monkeypatch, num_queries, row, slot):
    """Nothing after slot 0 matters to anybody but one key of the third tile to one row."""
    call = SkipCall((512,), num_queries, 512, own=None, chains=1)
    q, k, v, operands = call.arguments()
    q = jnp.zeros_like(q).at[..., 0].set(1.0).at[0, row // 4, row % 4, 1].set(1.0)
    k = jnp.zeros_like(k).at[1, 0, 0, 0, 0].set(10.0).at[1, 0, slot, 0, 1].set(40.0)
    monkeypatch.setattr(SkipCall, "arguments", lambda self: (q, k, v, operands))
    _, _, keep = interpreter.run(call, skip=call.skip())
    assert keep.tolist() == [[[True, False, True, False]]]


@pytest.mark.slow  # many programs to compile
def test_a_score_that_is_not_a_number_reaches_the_output(interpreter, monkeypatch):
    call = SkipCall((640,), 1, 640, own=None)
    q, k, v, operands = call.arguments()
    k = k.at[1, 0, 130, 0, 0].set(jnp.nan)
    monkeypatch.setattr(SkipCall, "arguments", lambda self: (q, k, v, operands))
    out, _, keep = interpreter.run(call, skip=call.skip())
    # That all later tiles of its chain are kept, too, shows on a GPU only: on a CPU XLA's maximum can lose it.
    assert jnp.isnan(out).all() and keep[0, 0, 1]


@pytest.mark.slow
def test_another_threshold_takes_no_compilation(interpreter):
    call = SKIP_CALLS["one token"]
    kept = []
    for threshold in (0.3, 1e-30):
        kept.append(interpreter.run(call, skip=dataclasses.replace(call, thresholds=(threshold,)).skip())[2].sum())
        interpreter.records.clear()
    assert kept[0] < kept[1] == 8
    assert skipping.run._cache_size() == 1


@pytest.mark.parametrize(
    "function, chosen",
    [
        pytest.param("barrier_wait", {1}, id="scores do not wait for K", marks=pytest.mark.slow),
        pytest.param("barrier_wait", {2}, id="P @ V does not wait for V", marks=pytest.mark.slow),
        pytest.param("barrier_wait", {3}, id="a warpgroup does not wait for the decision", marks=pytest.mark.slow),
    ],
)
def test_a_missing_synchronisation_of_skipping_is_caught(interpreter, monkeypatch, function, chosen):
    sabotaged = Sabotaged(function, chosen)
    for module in (skipping, parts):
        monkeypatch.setattr(module, "plgpu", sabotaged)
    call = SkipCall((900,), 1, 904, own=None, config=SkipConfig(stages=2, num_sms=1))
    with pytest.raises(Exception, match=r"(?i)race|deadlock|barrier|wait|complet"):
        interpreter.run(call, skip=call.skip())
    assert sabotaged.count > max(chosen)


@pytest.mark.slow
def test_values_that_come_too_early_are_caught(interpreter, monkeypatch):
    """Two slots for V are needed: with one the next tile's values would overwrite those in use."""
    monkeypatch.setattr(skipping, "V_SLOTS", 1)
    call = SkipCall((900,), 1, 904, own=None, thresholds=(1e-9,), config=SkipConfig(stages=2, num_sms=1))
    with pytest.raises(Exception, match=r"(?i)race|deadlock|barrier|wait|complet"):
        interpreter.run(call, skip=call.skip())


def test_the_public_function_counts_what_the_kernel_skips(interpreter, monkeypatch):
    monkeypatch.setattr(compat, "missing_hopper", lambda: None)
    run = functools.partial(mosaic_sm90.run, config=SKIP_SMALL, interpret=compat.interpret_params(detect_races=False))
    monkeypatch.setattr(mosaic_sm90, "run", run)
    call = SkipCall((660, 300), 2, 664, kv_heads=2, thresholds=(0.3, 1.5))
    q, k, v, operands = call.arguments()
    given = {"layer": 1, "kv_lengths": operands.kv_lengths, "own_k": operands.own_k, "own_v": operands.own_v}
    given |= {"own_mask": call.own_mask, "scale": 0.3, "skip_tile": SkipTile(width=128, chains=2)}
    given |= {"skip_threshold": jnp.asarray(call.thresholds), "return_stats": True}
    got, expected = (decode_attention(q, k, v, implementation=name, **given) for name in ("mosaic", "xla"))
    np.testing.assert_allclose(got[0].astype(jnp.float32), expected[0].astype(jnp.float32), atol=2e-2)
    jax.tree.map(np.testing.assert_array_equal, got[1], expected[1])
    assert got[1].skipped[0].sum() > 0 and got[1].dense_guarded == 1


def skip_plan(lengths, chains=8, *, capacity=131072, num_queries=1, num_sms=132, kv_heads=8):
    """The work list of a call with chains, and for each item the tiles that it walks."""
    batch = len(lengths)
    lengths = jnp.asarray(lengths, jnp.int32)
    operands = Operands(
        layer=jnp.int32(0), kv_lengths=lengths, k_positions=None, q_positions=lengths[:, None] + jnp.zeros(num_queries),
        own_k=None, own_v=None, own_lengths=None, window=None, num_sinks=0,
    )  # fmt: skip
    q = jax.ShapeDtypeStruct((batch, num_queries, 4 * kv_heads, 64), jnp.bfloat16)
    form = parts.form_of(q, jax.ShapeDtypeStruct((1, batch, capacity, kv_heads, 64), jnp.bfloat16), operands)
    form = form._replace(has_own=True)
    return jax.tree.map(np.asarray, skipping.plan_of(operands, form, chains, SkipConfig(num_sms=num_sms)))


@pytest.mark.parametrize("chains", [1, 3, 8])
@pytest.mark.parametrize(
    "lengths",
    [[1024], [0], [5000], [3, 0, 1024, 200, 64], [1024] * 16, [1] * 40, [0, 0], [131072, 5], list(range(0, 4096, 97))],
)
def test_the_work_list_covers_each_chain_once(lengths, chains):
    made = skip_plan(lengths, chains)
    steps, longs, next_chain = [0] * len(lengths), [0] * len(lengths), [0] * len(lengths)
    for index, (has_work, row, first_chain, num_long, shorter, num_own, num_steps) in enumerate(made.items):
        assert 0 <= row < len(lengths)
        assert has_work == (index < made.shares.num.sum())
        if not has_work:
            continue
        assert made.shares.first[row] <= index < made.shares.first[row] + made.shares.num[row]
        assert num_own == (index == made.shares.first[row])
        tiles = -(-lengths[row] // 128)
        assert shorter == tiles // chains and first_chain >= next_chain[row]
        next_chain[row] = first_chain + 1
        steps[row] += num_steps - num_own
        longs[row] += num_long
    for row, length in enumerate(lengths):
        assert steps[row] == -(-length // 128) and longs[row] == -(-length // 128) % chains
    assert (made.shares.num >= 1).all() and made.shares.num.sum() <= len(made.items)


@pytest.mark.parametrize("batch, chains, ctas", [(1, 8, 64), (1, 16, 128), (8, 8, 128), (64, 8, 512)])
def test_how_many_multiprocessors_chains_fill(batch, chains, ctas):
    assert 8 * skip_plan([32768] * batch, chains, capacity=32768).shares.num.sum() == ctas


def plan(lengths, *, capacity=1024, num_queries=1, num_sms=132, kv_heads=8, window=None, positions=None, sinks=0):
    """The work list, as NumPy arrays, and the tile size."""
    batch = len(lengths)
    lengths = jnp.asarray(lengths, jnp.int32)
    operands = Operands(
        layer=jnp.int32(0),
        kv_lengths=lengths,
        k_positions=None if positions is None else jnp.asarray(positions, jnp.int32),
        q_positions=lengths[:, None] + jnp.arange(num_queries),
        own_k=None,
        own_v=None,
        own_lengths=None,
        window=window,
        num_sinks=sinks,
    )
    config = Config(num_sms=num_sms)
    q = jax.ShapeDtypeStruct((batch, num_queries, 4 * kv_heads, 64), jnp.bfloat16)
    form = parts.form_of(q, jax.ShapeDtypeStruct((1, batch, capacity, kv_heads, 64), jnp.bfloat16), operands)
    made = dense.plan_of(operands, form, config)
    return jax.tree.map(np.asarray, made), config.block_k


@pytest.mark.parametrize(
    "lengths", [[1024], [0], [5000], [3, 0, 1024, 200, 64], [1024] * 16, [1] * 40, [0, 0], list(range(0, 1024, 17))]
)
def test_the_work_list_covers_each_live_tile_once(lengths):
    made, block_k = plan(lengths)
    seen = {row: [] for row in range(len(lengths))}
    for index, (has_work, row, start, stop, has_own, used) in enumerate(made.items):
        assert 0 <= row < len(lengths)  # every item's scalars are read, of idle ones too
        assert has_work == (index < made.shares.num.sum())
        if not has_work:
            continue
        assert made.shares.first[row] <= index < made.shares.first[row] + made.shares.num[row]
        assert has_own == (index == made.shares.first[row]) and used == min(lengths[row], 1024)
        seen[int(row)] += range(start, stop)
    for row, length in enumerate(lengths):
        assert seen[row] == list(range(-(-min(length, 1024) // block_k)))
    assert (made.shares.num >= 1).all() and made.shares.num.sum() <= len(made.items)


@pytest.mark.parametrize("batch, waves", [(1, 1), (2, 1), (8, 1), (16, 1), (64, 4)])
def test_long_rows_fill_the_multiprocessors(batch, waves):
    made, block_k = plan([8192] * batch, capacity=8192)
    ctas = 8 * made.shares.num.sum()
    assert 0.9 * 132 * waves < ctas <= 132 * waves
    work = (made.items[:, 3] - made.items[:, 2])[made.items[:, 0] != 0]
    assert work.max() <= 1.1 * (8192 / block_k) * batch * 8 / (132 * waves) + 1


def test_a_long_row_takes_more_of_the_machine():
    made, _ = plan([8192, 64, 64, 64], capacity=8192)
    assert made.shares.num[0] >= 12 and (made.shares.num[1:] == 1).all()


def test_only_tiles_that_some_query_sees_are_listed():
    made, block_k = plan([1000, 30], window=100, sinks=3, num_queries=2)
    # Row 0: the sinks' tile and those of positions 901 and up; row 1: its only tile.
    live = [[2 * tile for tile in (0, 14)] + [2 * 15 + 1], [1]]
    assert block_k == 64
    for row, tiles in enumerate(live):
        items = made.items[(made.items[:, 0] != 0) & (made.items[:, 1] == row)]
        assert items[:, 3].max() == len(tiles)
        assert made.tiles[row, : len(tiles)].tolist() == tiles
    assert (made.positions[0, :1000] == np.arange(1000)).all() and (made.positions[0, 1000:] == -1).all()


@pytest.mark.parametrize("counts", [[10, 1, 1], [4, 4, 4]], ids=["turns of 8", "one turn"])
def test_partial_results_are_merged_by_their_weights(counts):
    """Rows with an even share of the parts take one turn, any others more."""
    form = parts.Form(3, 1, 2, 1, 128, 64, jnp.dtype(jnp.float32), None, True, False, None, None)
    rng = np.random.default_rng(0)
    num_parts = form.lanes * sum(counts)
    values = rng.normal(size=(num_parts, 2, 8, 128)).astype(np.float32)
    lse = rng.normal(size=(num_parts, 2, 64)).astype(np.float32) * 4
    lse[1] = -np.inf  # has seen no key
    first = np.cumsum([0, *counts[:-1]])
    shares = parts.Shares(jnp.asarray(first, jnp.int32), jnp.asarray(counts, jnp.int32))
    out = parts.merge(jnp.asarray(values), jnp.asarray(lse), shares, form, interpret=compat.interpret_params())
    for row, count in enumerate(counts):
        own = slice(form.lanes * first[row], form.lanes * (first[row] + count))
        weights = 2.0 ** lse[own, :, 0].astype(np.float64)
        wanted = (weights[..., None] * values[own, :, 0]).sum(axis=0) / weights.sum(axis=0)[..., None]
        np.testing.assert_allclose(out[row, 0], wanted, rtol=1e-5, atol=1e-5)


START_OF_MEMORY = """
import jax, numpy as np
lengths = jax.device_put(np.full(16, 100, np.int32))  # the first array of the process
others = [jax.device_put(np.zeros(16, np.int32)) for _ in range(8)]
assert lengths.unsafe_buffer_pointer() < min(other.unsafe_buffer_pointer() for other in others)
import jax.numpy as jnp
from pallas_kernels.decode_attention.api import decode_attention
q, own = (jax.random.normal(jax.random.key(n), (16, 1, n, 128), jnp.bfloat16) for n in (32, 8))
cache = jax.random.normal(jax.random.key(1), (2, 16, 128, 8, 128), jnp.bfloat16)
def run(name):
    options = {"layer": 1, "kv_lengths": lengths, "own_k": own, "own_v": own, "implementation": name}
    return np.asarray(decode_attention(q, cache, cache + 1, **options).astype(jnp.float32))
np.testing.assert_allclose(run("mosaic"), run("xla"), atol=0.05)
print("right")
"""


@pytest.mark.gpu
def test_lengths_may_lie_at_the_start_of_memory():
    """Nothing before them is read, where a GPU has no memory: half of the work items of 16 rows have no work."""
    done = subprocess.run([sys.executable, "-c", START_OF_MEMORY], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "right\n", done.stderr[-3000:]


def lower(call):
    """Lowers a call for CUDA: catches what the interpreter accepts and the compiler does not."""
    q, k, v, operands = call.arguments()
    options = {"skip": call.skip()} if isinstance(call, SkipCall) else {}
    run = functools.partial(mosaic_sm90.run, own_mask=call.own_mask, scale=0.3, **options)
    jitted = jax.jit(lambda *arguments: run(*arguments[:3], operands=arguments[3]))
    return jitted.trace(q, k, v, operands).lower(lowering_platforms=("cuda",)).as_text()


LOWERED = {"dense": CALLS, "skipping": SKIP_CALLS}
LOWERED_BY_DEFAULT = ("ring and window", "positions, two warpgroups of rows")


@pytest.mark.smoke
@pytest.mark.parametrize(
    "call",
    [
        pytest.param(call, id=f"{kind}: {name}", marks=[] if name in LOWERED_BY_DEFAULT else [pytest.mark.slow])
        for kind, calls in LOWERED.items()
        for name, call in calls.items()
    ],
)
def test_lowers_for_cuda(call):
    assert lower(call).count("custom_call @mosaic_gpu") == 2  # attention and merge


HAS_PLUGIN = importlib.util.find_spec("jax_cuda13_plugin") is not None
STEP = """
import re, sys
import jax
jax.config.update("jax_platforms", "cpu")
import jax.numpy as jnp, numpy as np
from pallas_kernels import compat, compile_gate, decode_attention, masks
compat.missing_hopper = lambda: None
layers, batch, capacity, kv_heads, heads, head_dim, queries = 4, 1, 8448, 8, 32, 128, int(sys.argv[2])
options = {"skip_threshold": jnp.float32(0.1)} if sys.argv[3] == "skipping" else {}
sharding = compile_gate.hopper_sharding()
array = lambda shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
cache = array((layers, batch, capacity, kv_heads, head_dim))

def step(x, k_cache, v_cache, lengths):
    def layer(x, index):
        own = x[:, :, :kv_heads] * 0.5
        out = decode_attention(x, k_cache, v_cache, layer=index, kv_lengths=lengths, own_k=own, own_v=own,
                               own_mask=masks.Full(), implementation="mosaic", **options)
        return x + out, own
    if sys.argv[1] == "scanned":
        x, own = jax.lax.scan(layer, x, jnp.arange(layers))
    else:
        kept = []
        for index in range(layers):
            x, own = layer(x, index)
            kept.append(own)
        own = jnp.stack(kept)
    x, own = jax.lax.optimization_barrier((x, own))
    at = (0, 0, lengths[0], 0, 0)
    return x, *(jax.lax.dynamic_update_slice(c, own, at) for c in (k_cache, v_cache))

arguments = array((batch, queries, heads, head_dim)), cache, cache, array((batch,), jnp.int32)
compiled = jax.jit(step, donate_argnums=(1, 2)).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
one_layer = int(np.prod(cache.shape[1:]))
made = set()
for dims, kind in re.findall(r"= [a-z]+\\d*\\[([\\d,]*)\\]\\S* ([a-z-]+)\\(", compiled.as_text()):
    if np.prod([int(n) for n in dims.split(",") if n]) >= one_layer:
        made.add(kind)
assert made <= {"parameter", "get-tuple-element", "while", "tuple", "bitcast", "dynamic-update-slice", "fusion"}, made
memory = compiled.memory_analysis()
assert memory.temp_size_in_bytes < 2 * one_layer / 3, memory.temp_size_in_bytes
assert memory.alias_size_in_bytes == 2 * 2 * one_layer * layers
print("in place")
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_PLUGIN, reason="needs the extra gpu-compile")
@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
@pytest.mark.parametrize("num_queries", [1, 32])
@pytest.mark.parametrize("kernel", ["dense", "skipping"])
def test_the_compiled_step_reads_the_cache_in_place(layers, num_queries, kernel):
    """Compiled for sm_90a without a device: nothing of the size of a layer is made but the writes into the donated
    cache, and temporary memory stays below a third of one layer's keys."""
    command = [sys.executable, "-c", STEP, layers, str(num_queries), kernel]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0 and "in place" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dtype": jnp.float32}, "needs bfloat16 or float16 queries; got float32"),
        ({"head_dim": 40}, r"needs head_dim in .*; got 40"),
        ({"num_queries": 65}, "takes at most 64 queries per row; got 65"),
        ({"capacity": 36}, "needs a cache whose slots are a multiple of 8; got 36"),
        ({"codes": jnp.int8, "dtype": jnp.float16}, "needs bfloat16 queries with a cache of codes; got float16"),
        ({"codes": jnp.int8, "head_dim": 256}, r"needs head_dim in \(64, 128\) with a cache of codes; got 256"),
        ({}, "default device is cpu"),
        ({"skip": {}}, "default device is cpu"),
        ({"skip": {}, "codes": jnp.int8}, "skips no tiles of a cache of codes; got int8"),
        (
            {"skip": {"skip_tile": SkipTile(width=64, chains=8)}},
            "skips tiles of 128 slots only; got SkipTile.*width=64",
        ),
        ({"skip": {}, "head_dim": 256}, r"skips tiles with head_dim in \(64, 96, 128\); got 256"),
        ({"skip": {}, "num_queries": 64, "heads": 16}, "at most 256 rows vote; got 512, 64 queries of 8 heads"),
    ],
)
def test_an_unsupported_call_is_explained(changes, message):
    shape = {"dtype": jnp.bfloat16, "head_dim": 64, "num_queries": 1, "capacity": 40, "codes": None, "heads": 4}
    shape |= changes
    q = jnp.zeros((1, shape["num_queries"], shape["heads"], shape["head_dim"]), shape["dtype"])
    cache = jnp.zeros((2, 1, shape["capacity"], 2, shape["head_dim"]), shape["codes"] or shape["dtype"])
    options = {name: jnp.ones((2,)) for name in ("k_scale", "v_scale")} if shape["codes"] else {}
    if "skip" in shape:
        options |= {"skip_threshold": 0.5, **shape["skip"]}
    with pytest.raises(NotImplementedError, match=message):
        decode_attention(q, cache, cache, layer=0, kv_lengths=jnp.array([3]), implementation="mosaic", **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block_k": 96}, "block_k.*96"),
        ({"stages": 3}, "stages.*3"),
        ({"code_stages": 1}, "code_stages.*1"),
        ({"num_sms": 0}, "num_sms.*0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**options)


@pytest.mark.parametrize("options, message", [({"stages": 0}, "stages.*0"), ({"num_sms": 0}, "num_sms.*0")])
def test_a_config_of_skipping_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SkipConfig(**options)


def test_a_config_that_needs_too_much_memory_is_refused():
    q, k, v, operands = Call((150,), head_dim=128).arguments()
    with pytest.raises(ValueError, match=r"stages=8.*shared memory"):
        mosaic_sm90.run(q, k, v, operands=operands, own_mask=masks.Full(), scale=1.0, config=Config(stages=8))


def test_empty_batch():
    call = SkipCall((), thresholds=())
    q, k, v, operands = call.arguments()
    for skip in (None, call.skip()):
        out, lse, *keep = mosaic_sm90.run(q, k, v, operands=operands, own_mask=masks.Full(), scale=1.0, skip=skip)
        assert out.shape == q.shape and lse.shape == (0, 4, 1)
        assert [x.shape for x in keep] == ([] if skip is None else [(0, 1, 2)])
