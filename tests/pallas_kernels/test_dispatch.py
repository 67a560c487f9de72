"""The automatic choice: each rule, the agreement of table, results and calls, and what a choice must survive."""

import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import attention_gpu, decode_attention_gpu, dispatch_table, norm_rope, quantized_matmul, rotation
from pallas_kernels import compat, decode_attention, dispatch, flash_attention, masks
from pallas_kernels.attention import api, cudnn, mosaic_sm90, xla
from pallas_kernels.attention.limits import Limits
from pallas_kernels.attention.skip import SkipTile
from pallas_kernels.decode_attention import api as decode_api
from pallas_kernels.dispatch import Kind, NormRopeKind, ProductKind, RotationKind
from pallas_kernels.norm_rope import api as norm_rope_api
from pallas_kernels.quantized_matmul import api as product_api
from pallas_kernels.rotation import api as rotation_api

CAUSAL = Kind("Causal", "bfloat16", "128/128")
SIZES = {"queries": 1024, "keys": 1024, "work": 2**16}
HOPPER = types.SimpleNamespace(platform="gpu", device_kind="h", compute_capability="9.0")


def point(kind=CAUSAL, *, gradients=False, **ms):
    return {"kind": kind.name, "gradients": gradients, "sizes": SIZES, "ms": ms}


def measured(*points, op="flash_attention", device="h", **checked):
    """A table; `checked` are lists of kinds by implementation, all with gradients."""
    kinds = {name: {"forward": [], "gradients": [kind.name for kind in kinds]} for name, kinds in checked.items()}
    return {op: {device: {"checked": kinds, "timed": list(points)}}}


def names(table, kind=CAUSAL, sizes=SIZES, *, gradients=False, device=HOPPER):
    return dispatch.preferred("flash_attention", kind, sizes, gradients=gradients, device=device, measured=table)


# ---------------------------------------------------------------------------------------------------------------
# Rules


def test_the_fastest_comes_first_and_xla_last():
    table = measured(point(mosaic=2.0, cudnn=1.0, xla=3.0), mosaic=[CAUSAL], cudnn=[CAUSAL])
    assert names(table) == (("cudnn", "mosaic", "xla"), "")
    table = measured(point(mosaic=4.0, cudnn=1.0, xla=3.0), mosaic=[CAUSAL], cudnn=[CAUSAL])
    assert names(table) == (("cudnn", "xla"), "slower than XLA in the nearest timed call: mosaic")


def test_only_what_was_checked_is_taken():
    table = measured(point(mosaic=2.0, cudnn=1.0, xla=3.0), mosaic=[CAUSAL], cudnn=[])
    assert names(table)[0] == ("mosaic", "xla")
    for change in (
        {"mask": "Full"},
        {"dtype": "float16"},
        {"head_dims": "192/128"},
        {"limits": "lengths"},
        {"skip": "64x128"},
        {"square": False},
    ):
        other = CAUSAL._replace(**change)
        assert names(table, other) == (("xla",), f"no committed GPU check covers {other.name} forward")


def test_gradients_need_a_check_and_a_timing_of_gradients():
    table = measured(point(mosaic=2.0, xla=3.0), mosaic=[CAUSAL])
    assert names(table, gradients=True) == (("xla",), "no committed timing of Causal bfloat16 128/128 with gradients")
    table = measured(point(gradients=True, mosaic=2.0, xla=3.0), mosaic=[CAUSAL])
    assert names(table, gradients=True)[0] == ("mosaic", "xla")
    kinds = table["flash_attention"]["h"]["checked"]["mosaic"]
    kinds["forward"], kinds["gradients"] = kinds["gradients"], []
    assert names(table, gradients=True)[0] == ("xla",)
    assert names(table)[1] == "no committed timing of Causal bfloat16 128/128 forward"


def test_a_kind_borrows_the_times_of_its_like():
    likes = [
        CAUSAL._replace(limits="lengths segments"),
        CAUSAL._replace(dtype="float16"),
        CAUSAL._replace(square=False),
        CAUSAL._replace(limits="lengths", dtype="float16"),
    ]
    strangers = [CAUSAL._replace(skip="64x128"), CAUSAL._replace(head_dims="64/64"), CAUSAL._replace(mask="Full")]
    table = measured(point(mosaic=2.0, xla=3.0), mosaic=[*likes, *strangers])
    assert all(names(table, kind)[0] == ("mosaic", "xla") for kind in likes)
    assert all(names(table, kind)[0] == ("xla",) for kind in strangers)
    # Its own times come before those of its like.
    table = measured(point(mosaic=2.0, xla=3.0), point(likes[0], mosaic=4.0, xla=3.0), mosaic=[CAUSAL, *likes])
    assert names(table, likes[0])[0] == ("xla",)
    assert names(table)[0] == ("mosaic", "xla")


def test_sizes_outside_the_timed_ones():
    table = measured(point(mosaic=2.0, xla=3.0), mosaic=[CAUSAL])
    for name, value in SIZES.items():
        assert names(table, sizes=SIZES | {name: value // 2})[0] == ("mosaic", "xla")
        assert names(table, sizes=SIZES | {name: value // 2 - 1})[0] == ("xla",)
        assert names(table, sizes=SIZES | {name: 64 * value})[0] == ("mosaic", "xla")
    own = Kind("own keys", "bfloat16", "128/128")
    sizes = {"batch": 2, "rows": 64, "keys": 8192}
    timed = {"kind": own.name, "gradients": False, "sizes": sizes, "ms": {"mosaic": 1.0, "xla": 2.0}}
    table = measured(timed, op="decode_attention", mosaic=[own])

    def decode(**changes):
        options = {"gradients": False, "device": HOPPER, "measured": table}
        return dispatch.preferred("decode_attention", own, sizes | changes, **options)[0]

    assert all(
        decode(**fine) == ("mosaic", "xla") for fine in ({}, {"batch": 1}, {"rows": 1}, {"keys": 2**20}, {"keys": 64})
    )
    assert all(decode(**wrong) == ("xla",) for wrong in ({"batch": 3}, {"rows": 65}))


def test_the_nearest_timed_call_decides():
    small, large = point(mosaic=3.0, xla=2.0), point(mosaic=2.0, xla=3.0)
    large = large | {"sizes": {name: 16 * value for name, value in SIZES.items()}}
    table = measured(small, large, mosaic=[CAUSAL])
    for factor, wanted in ((1, ("xla",)), (3, ("xla",)), (5, ("mosaic", "xla")), (100, ("mosaic", "xla"))):
        assert names(table, sizes={name: factor * value for name, value in SIZES.items()})[0] == wanted


@pytest.mark.parametrize(
    "device, first",
    [
        (HOPPER, "mosaic"),
        (types.SimpleNamespace(platform="gpu", device_kind="another", compute_capability="9.0"), "mosaic"),
        (types.SimpleNamespace(platform="gpu", device_kind="another", compute_capability="10.0"), "xla"),
        (types.SimpleNamespace(platform="gpu", device_kind="another"), "xla"),
        (types.SimpleNamespace(platform="cpu", device_kind="h"), "xla"),
        (types.SimpleNamespace(platform="tpu", device_kind="h"), "xla"),
    ],
)
def test_devices(device, first):
    table = measured(point(mosaic=2.0, xla=3.0), mosaic=[CAUSAL])
    order, reason = names(table, device=device)
    assert order[0] == first and order[-1] == "xla"
    assert (reason == "") == (first == "mosaic")
    table["flash_attention"] = {}
    assert names(table)[1] == "nothing is measured on h"


def test_a_device_borrows_what_it_did_not_measure_and_not_what_failed_on_it():
    table = measured(point(mosaic=2.0, xla=3.0), mosaic=[CAUSAL])
    rows = table["flash_attention"]
    rows["other"] = {"checked": {}, "timed": [point(mosaic=4.0, xla=3.0)]}
    other = types.SimpleNamespace(platform="gpu", device_kind="other", compute_capability="9.0")
    assert names(table, device=other) == (("xla",), "slower than XLA in the nearest timed call: mosaic")  # its own time
    rows["other"]["timed"] = []
    assert names(table, device=other) == (("mosaic", "xla"), "")
    rows["other"]["checked"] = {"mosaic": {"forward": [], "gradients": [], "failed": [CAUSAL.name]}}
    assert names(table, device=other)[0] == ("xla",) and "no committed GPU check" in names(table, device=other)[1]
    assert names(table)[0] == ("mosaic", "xla")
    rows["other"]["checked"]["mosaic"] = {"forward": [CAUSAL.name], "gradients": [], "failed": []}
    assert names(table, device=other)[0] == ("mosaic", "xla")


def test_several_devices(monkeypatch):
    q = jnp.zeros((2, 8, 4, 16))
    assert dispatch.partition(q, q) == (None, None) or jax.device_count() > 1
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    spec, reason = dispatch.partition(q, q)
    assert spec is None and "2 devices" in reason
    assert dispatch.partition(q, q, is_cut=True) == (None, None)


# ---------------------------------------------------------------------------------------------------------------
# Table, results and calls


def test_the_table_is_what_the_results_give():
    assert dispatch_table.main(["--check"]) == 0


def test_the_table_names_only_what_exists():
    for op, implementations in (
        ("flash_attention", api.IMPLEMENTATIONS),
        ("decode_attention", decode_api.IMPLEMENTATIONS),
        ("quantized_matmul", product_api.NAMES),
        ("pairwise_rotation", rotation_api.NAMES),
        ("norm_rope", norm_rope_api.NAMES),
    ):
        for row in dispatch.table()[op].values():
            assert set(row["checked"]) <= set(implementations) - {"xla", "reference"}
            assert all("xla" in timed["ms"] and set(timed["ms"]) <= set(implementations) for timed in row["timed"])


def derived(*records):
    given = [{"op": "flash_attention", "device": "h", "rows": rows} for rows in records]
    return dispatch_table.derive(given)["flash_attention"]["h"]


def test_how_the_table_is_derived():
    shape = "Causal() B=1 T=64 S=64 N=2 K=2 H=128 bfloat16"
    passed = {"shape": shape, "passes": True, "dq_error": 0.0}
    longer = passed | {"shape": shape.replace("T=64 S=64", "T=128 S=128")}
    empty = {"forward": [], "gradients": [], "failed": []}
    right, failed = ({"mosaic": empty | {how: [CAUSAL.name]}} for how in ("gradients", "failed"))
    assert derived([passed])["checked"] == right
    assert derived([{"shape": shape, "passes": True}])["checked"]["mosaic"] == empty | {"forward": [CAUSAL.name]}
    assert derived([passed, longer | {"passes": False}])["checked"] == failed  # one failure of a kind is enough
    assert derived([passed], [passed | {"passes": False}])["checked"] == failed  # the later check counts,
    assert derived([passed | {"passes": False}], [passed])["checked"] == right  # either way
    assert derived([passed | {"shape": shape + " by cudnn"}])["checked"] == {"cudnn": right["mosaic"]}

    def timed(**ms):
        return {"shape": shape, "results": {name.replace("_", " + "): {"device_ms": x} for name, x in ms.items()}}

    sizes = {"queries": 64, "keys": 64, "work": 128}
    (row,) = derived([passed, timed(mosaic=1.0, xla=2.0, torch=3.0)])["timed"]
    assert row == {"kind": CAUSAL.name, "gradients": False, "sizes": sizes, "ms": {"mosaic": 1.0, "xla": 2.0}}
    assert derived([passed, timed(mosaic=1.0, cudnn=2.0)])["timed"] == []  # XLA took no part
    (row,) = derived([timed(mosaic=1.0, xla=2.0)], [timed(mosaic=1.5, xla=2.0)])["timed"]
    assert row["ms"]["mosaic"] == 1.5
    rows = derived([timed(cudnn=1.0, xla=2.0, cudnn_gradients=4.0, xla_gradients=9.0)])["timed"]
    assert [row["ms"]["cudnn"] for row in rows] == [1.0, 5.0]  # and another forward pass


FLASH_SHAPES = {
    shape.name: shape
    for shapes in (
        attention_gpu.check_shapes(),
        attention_gpu.time_shapes(),
        attention_gpu.skip_shapes(),
        attention_gpu.gradient_shapes(),
        attention_gpu.dispatch_shapes(),
    )
    for shape in shapes
}


def seen_by(monkeypatch):
    """Collects (kind, sizes) of automatic choices."""
    calls = []

    def preferred(op, kind, sizes, **_):
        calls.append((kind, sizes))
        return ("xla",), ""

    monkeypatch.setattr(dispatch, "preferred", preferred)
    return calls


def test_a_call_is_of_the_kind_of_its_shape_in_the_benchmark(monkeypatch):
    """Otherwise a check would cover other calls than it ran."""
    calls = seen_by(monkeypatch)
    for shape in FLASH_SHAPES.values():
        kind, sizes, by = dispatch_table.flash_call(shape.name)
        head = (shape.batch, shape.keys, shape.num_kv_heads)
        q = jax.ShapeDtypeStruct((shape.batch, shape.num_queries, shape.num_heads, shape.head_dim), shape.dtype)
        k, v = (jax.ShapeDtypeStruct((*head, size), shape.dtype) for size in shape.head_dims)
        options = {"mask": shape.mask, "limits": shape.make_limits(), "scale": 1.0, "return_lse": True}
        skip = shape.make_skip()
        jax.eval_shape(lambda q, k, v, o=options, s=skip: api.automatic(q, k, v, **o, skip=s) and q, q, k, v)
        assert calls[-1] == (kind, sizes) and by == shape.by, shape.name


def one_of_each_kind(shapes, call):
    """The first shape of each kind of call, whose name `call` reads; shapes of a kind differ in their sizes alone."""
    return {call(shape.name)[0]: shape for shape in reversed([*shapes])}.values()


def test_a_decoding_call_is_of_the_kind_of_its_shape_in_the_benchmark(monkeypatch):
    calls = seen_by(monkeypatch)
    timed = (*decode_attention_gpu.time_shapes(10.0), *decode_attention_gpu.skip_shapes())
    shapes = (*decode_attention_gpu.check_shapes(), *timed)
    for shape in one_of_each_kind(shapes, dispatch_table.decode_call):
        kind, sizes, _ = dispatch_table.decode_call(shape.name)
        arguments = jax.eval_shape(shape.arguments)
        options = {"own_mask": shape.own_mask(), **shape.skip_options()}
        jax.eval_shape(lambda a, o=options: decode_attention(layer=0, **o, **a), arguments)
        assert calls[-1] == (kind, sizes), shape.name


def test_a_product_is_of_the_kind_of_its_shape_in_the_benchmark(monkeypatch):
    calls = seen_by(monkeypatch)
    shapes = (*quantized_matmul.check_shapes(), *quantized_matmul.time_shapes())
    for shape in one_of_each_kind(shapes, dispatch_table.product_call):
        kind, sizes, _ = dispatch_table.product_call(shape.name)
        arguments = shape.avals()

        def product(arguments, shape=shape):
            weight = shape.tensor(arguments).of_layer(0)
            return product_api.quantized_matmul(arguments["x"], weight, dtype=shape.dtype)

        jax.eval_shape(product, arguments)
        assert calls[-1] == (kind, sizes), shape.name


def test_a_rotation_is_of_the_kind_of_its_shape_in_the_benchmark(monkeypatch):
    calls = seen_by(monkeypatch)
    for shape in one_of_each_kind((*rotation.check_shapes(), *rotation.time_shapes()), dispatch_table.rotation_call):
        kind, sizes, _ = dispatch_table.rotation_call(shape.name)
        x, turns = jax.eval_shape(shape.arguments)
        jax.eval_shape(lambda x, turns, s=shape: s.call(None)(x, turns, 0), x, turns)
        assert calls[-1] == (kind, sizes), shape.name


def test_a_norm_with_rotation_is_of_the_kind_of_its_shape_in_the_benchmark(monkeypatch):
    calls = seen_by(monkeypatch)
    for shape in one_of_each_kind((*norm_rope.check_shapes(), *norm_rope.time_shapes()), dispatch_table.norm_rope_call):
        kind, sizes, _ = dispatch_table.norm_rope_call(shape.name)
        heads, weights, cos, sin = jax.eval_shape(shape.arguments)
        jax.eval_shape(shape.call(None), heads, weights[0], cos, sin)
        assert calls[-1] == (kind, sizes), shape.name


def test_kinds_have_names_of_their_own():
    for benchmark, call in ((rotation, dispatch_table.rotation_call), (norm_rope, dispatch_table.norm_rope_call)):
        kinds = {call(shape.name)[0] for shape in (*benchmark.check_shapes(), *benchmark.time_shapes())}
        assert len({kind.name for kind in kinds}) == len(kinds)


def test_products_borrow_the_times_of_groups_that_cost_no_less():
    base = ProductKind("int4", 128, True, "float16", "float32")
    sizes = {"rows": 8, "outputs": 4096, "inputs": 4096}
    timed = {"kind": base.name, "gradients": False, "sizes": sizes, "ms": {"mosaic": 1.0, "xla": 2.0}}
    kinds = [base._replace(**change) for change in ({"zeros": False}, {"group_size": -1}, {"result": "bfloat16"})]
    narrow = base._replace(group_size=32)
    table = measured(timed, op="quantized_matmul", mosaic=[base, *kinds, narrow])

    def first(kind, **changes):
        options = {"gradients": False, "device": HOPPER, "measured": table}
        return dispatch.preferred("quantized_matmul", kind, sizes | changes, **options)[0][0]

    assert all(first(kind) == "mosaic" for kind in (base, *kinds)) and first(narrow) == "xla"
    assert first(base, rows=1) == first(base, outputs=10**6, inputs=10**6) == first(base, outputs=2048) == "mosaic"
    assert first(base, rows=9) == first(base, outputs=2047) == "xla"


def test_rotations_borrow_the_times_of_groups_of_128():
    base = RotationKind(128, 8, "bfloat16")
    sizes = {"rows": 64, "channels": 4096, "rotations": 3}
    timed = {"kind": base.name, "gradients": False, "sizes": sizes, "ms": {"mosaic": 1.0, "xla": 2.0}}
    others = [base._replace(group_size=64), base._replace(dtype="float32")]
    table = measured(timed, op="pairwise_rotation", mosaic=[base, *others])

    def first(kind, **changes):
        options = {"gradients": False, "device": HOPPER, "measured": table}
        return dispatch.preferred("pairwise_rotation", kind, sizes | changes, **options)[0][0]

    assert all(first(kind) == "mosaic" for kind in (base, *others)) and first(base._replace(steps=4)) == "xla"
    assert first(base, rows=1, channels=64, rotations=1) == "mosaic" and first(base, rows=65) == "xla"


def test_norms_with_rotation_borrow_the_times_of_128_channels():
    base = NormRopeKind(128, "bfloat16", "bfloat16")
    sizes = {"rows": 64, "heads": 40}
    timed = {"kind": base.name, "gradients": False, "sizes": sizes, "ms": {"mosaic": 1.0, "xla": 2.0}}
    other = NormRopeKind(64, "float32", "float32")
    table = measured(timed, op="norm_rope", mosaic=[base, other])

    def first(kind, **changes):
        options = {"gradients": False, "device": HOPPER, "measured": table}
        return dispatch.preferred("norm_rope", kind, sizes | changes, **options)[0][0]

    assert first(base) == first(other) == "mosaic" and first(base._replace(head_dim=256)) == "xla"
    assert first(base, rows=1, heads=1) == first(base, heads=200) == "mosaic" and first(base, rows=65) == "xla"


def test_partial_limits_and_other_tiles_are_kinds_that_no_check_covers(monkeypatch):
    calls = seen_by(monkeypatch)
    q = jnp.zeros((1, 8, 2, 16))
    flash_attention(q, q, q, q_positions=jnp.zeros((1, 8), int))
    assert calls[-1][0].limits == "q_positions"
    flash_attention(q, q, q, skip_threshold=0.5, skip_tile=SkipTile(64, 64))
    assert calls[-1][0].skip == "64x64"


# ---------------------------------------------------------------------------------------------------------------
# What a choice must survive


@pytest.fixture
def taken(monkeypatch):
    """A Hopper GPU whose kernel is XLA's path in disguise: which implementations ran. `prefer` sets the choice."""
    ran = []
    xla_run = xla.run
    for name, module in (("mosaic", mosaic_sm90), ("cudnn", cudnn), ("xla", xla)):
        monkeypatch.setattr(module, "run", lambda *a, name=name, **o: ran.append(name) or xla_run(*a, **o))
    monkeypatch.setattr(compat, "missing_hopper", lambda: None)
    monkeypatch.setattr(dispatch, "partition", lambda *_, **__: (None, None))

    def prefer(forward, gradient):
        chosen = {False: ((forward, "xla"), ""), True: ((gradient, "xla"), "")}
        monkeypatch.setattr(dispatch, "preferred", lambda *_, gradients, **__: chosen[gradients])
        ran.clear()
        return ran

    return prefer


def inputs(dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, 128, 4, 64)), dtype)
    k, v = (jnp.asarray(rng.normal(size=(2, 128, 2, 64)), dtype) for _ in range(2))
    return q, k, v


def loss(attend, **options):
    def call(q, k, v):
        results = attend(q, k, v, **options)
        out, *rest = results if isinstance(results, tuple) else (results,)
        return (out.astype(jnp.float32) ** 2).sum() + sum(jnp.sin(x).sum() for x in rest[:1])

    return call


TRANSFORMS = {
    "jit": lambda f: jax.jit(f),
    "vmap": lambda f: lambda *x: jax.vmap(f)(*(a[:, None] for a in x)),
    "scan": lambda f: lambda *x: jax.lax.scan(lambda c, a: (c, f(*a)), 0, tuple(a[:, None] for a in x))[1],
    "remat": lambda f: jax.checkpoint(f),
    "remat that keeps the residuals": lambda f: jax.checkpoint(
        f, policy=jax.checkpoint_policies.save_only_these_names("attention")
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("options", [{}, {"return_lse": True}, {"skip_threshold": 0.5, "return_lse": True}], ids=str)
def test_one_choice_for_calls_and_another_for_gradients(taken, transform, options):
    ran = taken("xla", "mosaic")
    f = TRANSFORMS[transform](loss(flash_attention, **options))
    by_name = TRANSFORMS[transform](loss(flash_attention, **options, implementation="xla"))
    np.testing.assert_allclose(f(*inputs()), by_name(*inputs()), rtol=1e-6)
    assert "mosaic" not in ran
    ran.clear()
    got = jax.grad(lambda *x: f(*x).sum(), argnums=(0, 1, 2))(*inputs())
    assert "mosaic" in ran
    want = jax.grad(lambda *x: by_name(*x).sum(), argnums=(0, 1, 2))(*inputs())
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_kept_residuals_are_not_computed_again(taken):
    """The forward pass that a rematerialised one would need is gone, also through `by_derivative`."""
    taken("xla", "mosaic")

    def matmuls(policy):
        f = jax.checkpoint(loss(flash_attention), policy=policy)
        return count(jax.make_jaxpr(jax.grad(f))(*inputs()).jaxpr)

    def count(jaxpr):
        total = 0
        for equation in jaxpr.eqns:
            total += equation.primitive.name == "dot_general"
            inner = jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"))
            total += sum(count(getattr(x, "jaxpr", x)) for x in inner if hasattr(getattr(x, "jaxpr", x), "eqns"))
        return total

    keep = jax.checkpoint_policies.save_only_these_names("attention")
    assert matmuls(keep) < matmuls(jax.checkpoint_policies.nothing_saveable)


def test_cudnn_gives_way_where_a_log_sum_exp_is_wanted(taken, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for options, first in (({}, "cudnn"), ({"return_lse": True}, "xla"), ({"kv_lengths": jnp.full(2, 9)}, "xla")):
        ran = taken("cudnn", "mosaic")
        flash_attention(*inputs(), **options)
        assert ran == [first]
    ran = taken("cudnn", "mosaic")
    jax.grad(loss(flash_attention))(*inputs())
    assert ran == ["mosaic"]


@pytest.mark.slow  # last passed on 2026-11-26; the GPU check has calls under vmap too
def test_the_kernels_under_vmap_are_the_kernels_row_by_row():
    """Interpreted: an automatic choice may take a kernel under `jax.vmap`, which adds an axis to its grid."""
    options = {"mask": masks.Causal(), "scale": 0.1, "interpret": compat.interpret_params(detect_races=False)}

    def row(q, k, v, lengths):
        return mosaic_sm90.run(q, k, v, limits=Limits(kv_lengths=lengths), **options)[0]

    def with_gradients(*given):
        total = lambda *given: (row(*given).astype(jnp.float32) ** 2).sum()  # noqa: E731
        return row(*given), *jax.grad(total, argnums=(0, 1, 2))(*given)

    given = (*(x[:, None] for x in inputs()), jnp.asarray([[128], [37]]))
    got = jax.vmap(with_gradients)(*given)
    want = [with_gradients(*one) for one in zip(*given, strict=True)]
    for a, rows in zip(got, zip(*want, strict=True), strict=True):
        np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (a, jnp.stack(rows))))


def test_a_name_is_never_replaced(taken):
    taken("xla", "xla")
    q, k, v = inputs(jnp.float32)
    with pytest.raises(NotImplementedError, match="'mosaic': needs bfloat16 or float16; got float32"):
        flash_attention(q, k, v, implementation="mosaic")
    ran = taken("mosaic", "mosaic")
    flash_attention(q, k, v)  # what was preferred cannot run
    flash_attention(q, k, v, implementation="xla")
    assert ran == ["xla", "xla"]


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
from pallas_kernels import compat, dispatch, flash_attention
from pallas_kernels.attention import mosaic_sm90, xla
xla_run, shapes = xla.run, []
compat.missing_hopper = lambda: None
dispatch.preferred = lambda *_, **__: (("mosaic", "xla"), "")
mosaic_sm90.run = lambda q, *a, **o: shapes.append(q.shape) or xla_run(q, *a, **o)
rng = np.random.default_rng(0)
q = jnp.asarray(rng.normal(size=(4, 64, 8, 64)), jnp.bfloat16)
k, v = (jnp.asarray(rng.normal(size=(4, 64, 4, 64)), jnp.bfloat16) for _ in range(2))
lengths = jnp.asarray([64, 3, 17, 40])
def loss(q, k, v, lengths, **options):
    out, lse, keep = flash_attention(
        q, k, v, kv_lengths=lengths, return_lse=True, skip_threshold=0.3, return_selection=True, **options)
    return (out.astype(jnp.float32) ** 2).sum() + jnp.where(lse == -jnp.inf, 0, lse).sum(), keep
grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnames="implementation")
want = grad(q, k, v, lengths, implementation="xla")
mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
with jax.set_mesh(mesh):
    cut = [jax.device_put(x, P("data", None, "tensor", None)) for x in (q, k, v)]
    got = grad(*cut, lengths)
assert set(shapes) == {(1, 64, 4, 64)}, shapes
for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=2e-2)
shapes.clear()
mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
# Inside shard_map the kernel is called as it is, but not where JAX follows which axes a value varies over.
def inside(q, k, v):
    return flash_attention(q, k, v)
with jax.set_mesh(mesh):
    for check in (False, True):
        mapped = jax.shard_map(inside, in_specs=P("data", None, "tensor"), out_specs=P("data", None, "tensor"),
                               check_vma=check)
        out = jax.jit(mapped)(q, k, v)
        assert bool(shapes) is not check, (check, shapes)
        shapes.clear()
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
with jax.set_mesh(mesh):
    x = jax.device_put(jnp.zeros((1, 64, 8, 64), jnp.bfloat16), P(None, "data"))
    assert "cut by batch and heads" in dispatch.partition(x, x)[1]
    y = jax.device_put(x, P(None, None, "data"))
    assert "alike" in dispatch.partition(y, x)[1] and dispatch.partition(y, y)[1] is None
print("ok")
"""


def test_sharded_calls():
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    environment |= {"PATH": "/usr/bin:/bin", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stderr[-3000:]
