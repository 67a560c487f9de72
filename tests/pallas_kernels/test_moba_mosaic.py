"""The Hopper kernels of block-routed attention: interpreted with race detection, lowered for CUDA; choice and errors.

The oracle is the XLA path, which tests of its own hold to NumPy in float64; gradients are compared with its gradients
in the same dtype. By default few cases run; the others are slow and last passed on 2026-11-30. On a GPU
`python -m benchmarks.moba check` compares with NumPy.
"""

import functools
import importlib.util
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks import dispatch_table, moba_memory
from benchmarks import moba as benchmark
from pallas_kernels import compat, dispatch
from pallas_kernels.moba import api, layout, lists, moba_attention, moba_select, mosaic_sm90, routing, xla
from pallas_kernels.moba.mosaic_sm90 import rows, select

INTERPRET = compat.interpret_params(detect_races=True)
HOPPER = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0")


def arrays(batch, queries, keys, heads, kv_heads, head_dim, dtype="bfloat16", seed=0):
    rng = np.random.default_rng(seed)
    sizes = ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    return tuple(jnp.asarray(rng.normal(size=(batch, *size, head_dim)), dtype) for size in sizes)


@pytest.fixture
def races(monkeypatch):
    """Fails a test whose interpreted kernels race; JAX 0.11 only notes it, in a record of each kernel."""
    callbacks = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks")
    records, record = [], callbacks.GPURaceDetectionState

    def keep(*args, **kwargs):
        records.append(record(*args, **kwargs))
        return records[-1]

    monkeypatch.setattr(callbacks, "GPURaceDetectionState", keep)
    jax.clear_caches()  # the kernels are jitted: a trace of another test must not stand in for this one
    yield
    callbacks.reset_gpu_interpret_mode_state()
    assert not any(record.races_found for record in records), "race detected"


def distance(a, b):
    """Relative, in the L2 norm."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


PACKED = np.r_[np.zeros(150, int), np.ones(130, int), -np.ones(20, int)][None]
# B, T, S, N, K, H, dtype; block_size, top_k; segments
CASES = {
    "grouped heads, a partial block": ((1, 200, 200, 2, 1, 64), 64, 3, None),
    "packed, padding": ((1, 300, 300, 2, 2, 64), 64, 3, PACKED),
    "blocks in pieces": ((1, 520, 520, 1, 1, 64), 256, 2, None),
    "fewer queries than keys, wide heads": ((2, 70, 304, 4, 2, 128), 128, 2, None),
    "float16, own blocks alone": ((1, 130, 130, 1, 1, 64, "float16"), 64, 1, None),
    "float16, more ranks than blocks": ((1, 140, 140, 1, 1, 64, "float16"), 64, 6, None),
}
PARAMETERS = [
    pytest.param(*case, id=name, marks=[pytest.mark.slow] if i else []) for i, (name, case) in enumerate(CASES.items())
]


@pytest.mark.parametrize("shape, block_size, top_k, segments", PARAMETERS)
@pytest.mark.usefixtures("races")
def test_outputs_selection_and_gradients(monkeypatch, shape, block_size, top_k, segments):
    monkeypatch.setattr(mosaic_sm90, "LONGEST_PIECE", 1)  # so that lists are of several pieces, which are added up
    q, k, v = arrays(*shape)
    rng = np.random.default_rng(1)
    weights = jnp.asarray(rng.normal(size=q.shape), jnp.float32)
    lse_weights = jnp.asarray(rng.normal(size=(q.shape[0], q.shape[2], q.shape[1])), jnp.float32)
    pair = None if segments is None else (jnp.asarray(segments),) * 2
    options = {"block_size": block_size, "top_k": top_k, "causal": True, "scale": 0.1, "own_implementation": "xla"}

    def value(run):
        def loss(q, k, v):
            out, lse, indices = run(q, k, v, pair, **options)
            total = (out * weights).sum() + (jnp.where(lse == -jnp.inf, 0.0, lse) * lse_weights).sum()
            return total, (out, lse, indices)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    (_, (out, lse, indices)), gradients = value(functools.partial(mosaic_sm90.run, interpret=INTERPRET))
    (_, (right, right_lse, right_indices)), right_gradients = value(xla.run)
    np.testing.assert_array_equal(indices, right_indices)
    assert out.dtype == q.dtype and distance(out, right) < 4e-3
    np.testing.assert_allclose(lse, right_lse, atol=1e-5)
    for got, want in zip(gradients, right_gradients, strict=True):
        assert got.dtype == want.dtype and distance(got, want) < 6e-3


@pytest.mark.usefixtures("races")
def test_the_routing_kernel_has_the_tie_rule_and_ignores_nan():
    """Equal scores, NaN, infinities, sequences that begin anywhere, and more tiles of centroids than one."""
    rng = np.random.default_rng(0)
    queries, candidates, ranks = 150, 300, 4
    q = jnp.asarray(rng.integers(-2, 3, (1, queries, 2, 64)), jnp.bfloat16)  # small integers: many equal scores
    means = rng.integers(-1, 2, (1, candidates, 1, 64)).astype(np.float32)
    means[:, 20:40] = means[:, 40:60] = means[:, 200:220]
    means[0, 100, 0, 3], means[0, 101] = np.nan, 0
    means = jnp.asarray(means, jnp.bfloat16)
    first = jnp.asarray(np.where(np.arange(queries) < 60, 0, 90), jnp.int32)[None]
    eligible = jnp.asarray(np.minimum(np.arange(queries) * 3 % 211, candidates - np.asarray(first[0])), jnp.int32)[None]
    zeros = jnp.zeros((1, candidates), jnp.int32)
    found = select.run(q, means, layout.Layout(zeros, zeros, first, eligible, first), ranks=ranks, interpret=INTERPRET)
    choose = jax.jit(functools.partial(routing.choose, ranks=ranks))
    for head in range(2):
        right = choose(q[0, :, head], means[0, :, 0], first[0], eligible[0])
        np.testing.assert_array_equal(found[0, :, head], right)
    scores = np.asarray(q, np.float64)[0, 59, 0] @ np.nan_to_num(np.asarray(means[0, :, 0], np.float64)).T
    assert np.unique(scores[:177]).size < 177, "there are ties"
    assert (np.asarray(found)[0, np.asarray(eligible[0]) == 0] == -1).all()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_rows_lie_in_shared_memory_as_the_tensor_core_reads_them(head_dim):
    """Tiles of 8 rows by 128 bytes; bits 4 to 6 of an address are those of the plain one xor its bits 7 to 9."""
    num_rows, chunks = 64, head_dim * 2 // rows.CHUNK
    tiled = np.arange(num_rows * chunks).reshape(num_rows // 8, 8, chunks // 8, 8).transpose(0, 2, 1, 3).reshape(-1)
    plain = np.arange(tiled.size) * rows.CHUNK
    row, chunk = np.divmod(tiled, chunks)
    np.testing.assert_array_equal(rows.place(row, chunk, chunks), plain ^ (plain >> 7 & 7) << 4)
    # What a thread adds to its first address is the same for each of its rows.
    step = rows.THREADS // chunks
    row, chunk = np.divmod(np.arange(rows.THREADS), chunks)
    for first in range(0, num_rows, step):
        expected = rows.place(row + first, chunk, chunks)
        np.testing.assert_array_equal(rows.place(row, chunk, chunks) + rows.place(first, 0, chunks), expected)


@pytest.mark.usefixtures("races")
def test_rows_are_read_and_written_where_they_lie():
    """The first and the last, some twice; a negative index reads zeros, though row 0 is NaN, and writes nothing."""
    rng, num_rows = np.random.default_rng(0), 32
    x = jnp.asarray(rng.normal(size=(100, 64)), jnp.float16).at[0].set(jnp.nan)
    numbers = jnp.arange(num_rows, dtype=jnp.float32)
    source = jnp.asarray(np.r_[99, 1, 0, -1, 17, 15, 17, -3, rng.integers(1, 100, num_rows - 8)], jnp.int32)
    target = jnp.asarray(rng.permutation(50)[:num_rows], jnp.int32).at[3:6].set(-1).at[8].set(0)

    def copy(x_ref, numbers_ref, source_ref, target_ref, out_ref, of_numbers_ref, smem_ref, number_smem_ref):
        rows.start(source_ref, (x_ref, smem_ref), interpreted=True)
        rows.wait(interpreted=True)
        number_smem_ref[...] = numbers_ref[...]
        rows.store(target_ref, (smem_ref, out_ref), (number_smem_ref, of_numbers_ref), interpreted=True)

    out, of_numbers = compat.kernel(
        copy,
        out_type=(jax.ShapeDtypeStruct((50, 64), x.dtype), jax.ShapeDtypeStruct((50,), jnp.float32)),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((num_rows, 64), x.dtype, transforms=compat.swizzled(x.dtype, 64)),
            plgpu.SMEM((num_rows,), jnp.float32),
        ],
        interpret=INTERPRET,
    )(x, numbers, source, target)
    read = np.where(np.asarray(source)[:, None] < 0, 0, np.asarray(x)[source])
    expected, of_expected = np.full((50, 64), np.nan, np.float16), np.full(50, np.nan, np.float32)
    kept = np.asarray(target) >= 0
    expected[target[kept]], of_expected[target[kept]] = read[kept], np.asarray(numbers)[kept]
    np.testing.assert_array_equal(out, expected)  # the interpreter's memory begins as NaN
    np.testing.assert_array_equal(of_numbers, of_expected)


def test_pieces_cover_every_tile_once():
    rng = np.random.default_rng(0)
    blocks = jnp.asarray(np.r_[np.zeros(700, int), rng.integers(-1, 9, 300)][:, None])  # block 9 is nobody's
    of_blocks = lists.invert_selection(blocks, 10)
    num_tiles = lists.most_tiles(blocks.size, 10, 16)
    tiles = lists.cut(of_blocks, 16, num_tiles)
    pieces = lists.pieces(of_blocks, 16, num_tiles, 4)
    seen = []
    for block, first, size in zip(pieces.block, pieces.first, pieces.size, strict=True):
        assert size <= 4
        seen += [int(first) + i for i in range(int(size))]
        assert all(tiles.block[tile] == block for tile in seen[len(seen) - int(size) :])
    assert seen == [*range(int(tiles.total))]
    assert int(pieces.per_block[0]) > 10 and int(pieces.per_block[9]) == 1
    for block in range(10):
        own = slice(int(pieces.begin[block]), int(pieces.begin[block] + pieces.per_block[block]))
        assert (pieces.block[own] == block).all() and (pieces.size[own] > 0).all()


def test_lowers_for_cuda():
    q, k, v = arrays(1, 512, 512, 2, 1, 128)
    options = {"block_size": 128, "top_k": 3, "causal": True, "scale": 0.1, "own_implementation": "xla"}

    def loss(q, k, v):
        return mosaic_sm90.run(q, k, v, None, **options)[0].astype(jnp.float32).sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    text = gradients.trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    assert all(f"moba_{name}" in text for name in ("select", "attend", "dq", "dk_dv", "add_pieces"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the extra gpu-compile")
@pytest.mark.parametrize("use", ["forward", "gradient"])
def test_memory_is_that_of_dense_attention_and_little_more(use):
    """Compiled for an H200 in the published setting; one array of all heads more would be 1/4 more forward."""
    sizes = moba_memory.Sizes(batch=2)
    moba, dense = (moba_memory.compiled_memory(name, use, sizes, "h200")["peak_mib"] for name in ("moba", "dense"))
    assert dense >= 4 * 512  # queries, keys, values and output
    assert moba < 1.2 * dense


@pytest.mark.parametrize(
    "change, message",
    [
        ({"causal": False}, "needs causal=True"),
        ({"dtype": "float32"}, "needs bfloat16 or float16; got float32"),
        ({"head_dim": 32}, "needs a head dim of 64 or 128; got 32"),
        ({"top_k": 17}, "needs top_k of at most 16; got 17"),
        ({"block_size": 96}, "needs block_size 64 or a multiple of 128; got 96"),
        ({"length": 40}, "needs at least one block of keys; got 40"),
        ({}, "needs an NVIDIA GPU"),
    ],
)
def test_what_the_kernels_cannot_do(monkeypatch, change, message):
    monkeypatch.setattr(dispatch, "undivided", lambda: None)
    options = {
        "causal": True,
        "dtype": "bfloat16",
        "head_dim": 64,
        "top_k": 2,
        "block_size": 64,
        "length": 128,
    } | change
    dtype, head_dim, length = (options.pop(name) for name in ("dtype", "head_dim", "length"))
    q, k, v = arrays(1, length, length, 1, 1, head_dim, dtype)
    with pytest.raises(NotImplementedError, match=f'moba_attention "mosaic": {message}'):
        moba_attention(q, k, v, implementation="mosaic", **options)
    if "block" not in message:
        with pytest.raises(NotImplementedError, match=f'moba_select "mosaic": {message}'):
            moba_select(q, k, implementation="mosaic", **options)


# ---------------------------------------------------------------------------------------------------------------
# As the automatic choice


@pytest.fixture
def hopper(monkeypatch):
    """An H200 whose kernels are XLA's path in disguise; whether each call had the kernels' gradients."""
    calls = []

    def run(*arguments, gradients, **options):
        calls.append(gradients)
        return xla.run(*arguments, **options | {"own_implementation": "xla"})

    monkeypatch.setattr(mosaic_sm90, "run", run)
    monkeypatch.setattr(compat, "missing_hopper", lambda: None)
    monkeypatch.setattr(dispatch, "undivided", lambda: None)
    monkeypatch.setattr(dispatch, "default_device", lambda: HOPPER)
    return calls


def test_kernels_are_taken_where_they_were_checked(hopper, monkeypatch):
    kinds = {"forward": ["bfloat16 128 blocks of 128 packed"], "gradients": ["bfloat16 128 blocks of 128"]}
    of_device = {"checked": {"mosaic": kinds | {"failed": []}}, "timed": []}
    table = dispatch.table() | {"moba_attention": {HOPPER.device_kind: of_device}}
    monkeypatch.setattr(dispatch, "table", lambda: table)
    options = {"block_size": 128, "top_k": 2}
    q, k, v = arrays(1, 300, 300, 1, 1, 128)
    attend = lambda **o: jax.eval_shape(functools.partial(moba_attention, **options | o), q, k, v)  # noqa: E731
    attend()
    assert hopper == [True]
    segments = jnp.zeros((1, 300), jnp.int32)
    attend(segment_ids=segments)  # gradients of packed rows were not checked
    assert hopper == [True, False]
    attend(block_size=64)
    attend(implementation="xla")
    assert hopper == [True, False]
    choice = api.automatic(q, k, v, block_size=64, top_k=2, causal=True, packed=False)
    assert choice[:2] == ("xla", "xla")
    assert choice.reasons["forward"] == "no committed GPU check covers bfloat16 128 blocks of 64 forward"
    choice = api.automatic(q, k, v, block_size=64, top_k=2, causal=False, packed=False)
    assert choice.reasons["gradient"] == "mosaic: needs causal=True"


def test_a_call_is_of_the_kind_of_its_shape_in_the_benchmark(hopper, monkeypatch):
    kinds = []
    proven = dispatch.proven
    monkeypatch.setattr(dispatch, "proven", lambda op, kind, **o: kinds.append(kind) or proven(op, kind, **o))
    for shape in benchmark.check_shapes():
        kind, _, by = dispatch_table.moba_call(shape.name)
        q, k, v = jax.eval_shape(shape.arguments)
        options = {"block_size": shape.block_size, "top_k": shape.top_k, "causal": True}
        api.automatic(q, k, v, packed=shape.segments > 1, **options)
        assert kinds[-1] == kind and by == "mosaic", shape.name
