"""The Hopper kernels of four-bit products: interpreted with race detection, lowered for CUDA, explained; their cut.

The oracle is NumPy in float64. Codes minus zeros are exact in bfloat16 and everything after them is float32, so what
separates a kernel from the oracle is float32 rounding; a bfloat16 result adds half a unit of its last place, 2^-9.
Prefills round the weight of groups to bfloat16, and so does their oracle (`check`).
By default few cases run; the others are slow. All slow ones, races included, last passed on 2026-11-30.
"""

import dataclasses
import importlib
import importlib.util
import itertools
import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks import quantized_matmul as benchmark
from pallas_kernels import compat, dispatch
from pallas_kernels.partial import Partial, made
from pallas_kernels.quantized_matmul import (
    QuantizedTensor,
    Rotation,
    api,
    interleave,
    is_better_interleaved,
    mosaic_sm90,
    quantized_matmul,
    quantized_matmuls,
    xla,
)
from pallas_kernels.quantized_matmul.mosaic_sm90 import Config, PrefillConfig, decode, parts, prefill
from pallas_kernels.quantized_matmul.rounding import round_weight

HAS_PLUGIN = importlib.util.find_spec("jax_cuda13_plugin") is not None


@dataclasses.dataclass(frozen=True)
class Call:
    """A product; three layers, of which the middle one is read. M tokens, I inputs, O outputs."""

    rows: int
    inputs: int
    outputs: int
    group_size: int = 128
    zeros: bool = True
    scales: str = "float16"
    dtype: str = "float32"
    config: Config | PrefillConfig | None = None

    @property
    def groups(self):
        return 1 if self.group_size == -1 else self.inputs // self.group_size

    def arguments(self):
        """Of `run`. The scales of the other layers are NaN."""
        rng = np.random.default_rng(0)
        grid = (3, self.groups, self.outputs)
        scales = rng.lognormal(-4, 1, grid)
        scales[::2] = np.nan
        return (
            jnp.asarray(rng.normal(size=(self.rows, self.inputs)) + 0.5, jnp.bfloat16),
            jnp.asarray(rng.integers(0, 256, (3, self.outputs, self.inputs // 2)), jnp.uint8),
            jnp.asarray(scales, self.scales),
            jnp.asarray(rng.integers(-8, 8, grid), jnp.int8) if self.zeros else None,
            jnp.int32(1),
        )

    def run(self, *arguments, **options):
        options = {"group_size": self.group_size, "config": self.config, "dtype": self.dtype} | options
        return mosaic_sm90.run(*(arguments or self.arguments()), **options)


def oracle(x, codes, scales, zeros, layer, *, is_rounded=False):
    """float64, one code at a time as its definition has it; the weight rounded to bfloat16 or not."""
    packed, s = np.asarray(codes[layer]).astype(int), np.asarray(scales[layer], np.float64)
    codes = np.empty((packed.shape[0], 2 * packed.shape[1]))
    codes[:, 0::2], codes[:, 1::2] = packed % 16, packed // 16
    codes[codes > 7] -= 16
    group = np.arange(codes.shape[1]) // (codes.shape[1] // s.shape[0])
    if zeros is not None:
        codes -= np.asarray(zeros[layer], np.float64).T[:, group]
    weight = codes * s.T[:, group]
    if is_rounded:
        weight = weight.astype(ml_dtypes.bfloat16).astype(np.float64)
    return np.asarray(x, np.float64) @ weight.T


def error(out, expected):
    """Relative, in the L2 norm."""
    return np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected)


def check(call, out, limit=1e-6):
    """Prefills of groups against the rounded weight; what scales have beyond bfloat16 may turn 1 rounding in 512."""
    assert out.shape == (call.rows, call.outputs) and out.dtype == call.dtype
    form = parts.form_of(mosaic_sm90.Operands(*call.arguments()), "int4", call.dtype)
    is_rounded = mosaic_sm90.rounds_weight(form, call.config)
    if is_rounded and call.scales != "bfloat16":
        limit = max(limit, 2**-8 * 512**-0.5)
        assert call.dtype == "bfloat16" or error(out, oracle(*call.arguments())) < 2e-3  # as XLA's
    expected = oracle(*call.arguments(), is_rounded=is_rounded)
    assert error(out, expected) < (limit if call.dtype == "float32" else 2**-9)


SPLIT = Config(warpgroups=2, stages=2, num_sms=3)
ONE = Config(warpgroups=2, stages=2, num_sms=1)
SMALL = PrefillConfig(block_m=64, stages=2, code_stages=2, cluster=1, num_sms=2)

# The first ones run by default: outputs and tokens beyond the tile, a ring that wraps, tiles split unevenly.
CALLS = {
    "as few tokens have it, on one multiprocessor": Call(
        3, 1024, 320, config=Config(warpgroups=4, block_k=256, stages=3, num_sms=1)
    ),
    "one token, tiles in three": Call(1, 384, 208, config=SPLIT),
    "prefill, a cluster of two": Call(70, 384, 208, config=PrefillConfig(block_m=64, stages=3, num_sms=2)),
    "groups of 32, inputs no multiple of 64": Call(17, 160, 144, 32, config=SPLIT),
    "steps of 256": Call(3, 896, 208, config=Config(warpgroups=2, block_k=256, stages=2, num_sms=3)),
    "groups of 64": Call(8, 448, 80, 64, scales="float32", config=SPLIT),
    "one group, inputs no multiple of 128": Call(3, 416, 144, -1, config=SPLIT),
    "fewer inputs than a product": Call(2, 32, 64, 32, config=SPLIT),
    "no zeros": Call(9, 256, 64, zeros=False, config=SPLIT),
    "two tiles of outputs, the second narrow": Call(5, 256, 144, scales="float32", config=SPLIT),
    "groups of 256": Call(2, 768, 64, 256, config=SPLIT),
    "four warpgroups, one CTA": Call(2, 384, 304, config=Config(warpgroups=4, stages=3, num_sms=1)),
    "four warpgroups, a CTA for each unit": Call(2, 384, 304, config=Config(warpgroups=4, stages=6)),
    "more stages than units": Call(24, 256, 64, config=Config(warpgroups=2, stages=8, num_sms=1)),
    "a cluster of two, tiles split unevenly": Call(
        40, 384, 400, config=Config(warpgroups=2, stages=2, cluster=2, num_sms=6)
    ),
    "steps of 256, groups of 64, a cluster of two": Call(
        24, 832, 304, 64, config=Config(warpgroups=2, block_k=256, stages=2, cluster=2, num_sms=4)
    ),
    "a cluster of four": Call(64, 384, 208, config=Config(warpgroups=2, stages=2, cluster=4, num_sms=8)),
    "two tiles of tokens": Call(130, 256, 144, config=Config(warpgroups=2, stages=3, num_sms=3)),
    "to bfloat16": Call(3, 256, 64, dtype="bfloat16", config=SPLIT),
    "prefill": Call(65, 256, 80, config=SMALL),
    "prefill, groups of 32": Call(64, 160, 144, 32, dtype="bfloat16", config=SMALL),
    "prefill, groups of 64": Call(64, 192, 144, 64, scales="float32", config=SMALL),
    "prefill, groups of 256": Call(64, 512, 80, 256, config=SMALL),
    "prefill, one group": Call(200, 416, 64, -1, config=PrefillConfig(stages=3)),
    "prefill, wide, to bfloat16": Call(130, 384, 304, dtype="bfloat16", config=PrefillConfig(num_sms=2)),
    "prefill, wide, to float32": Call(300, 256, 208, config=PrefillConfig(code_stages=2, cluster=1, num_sms=1)),
    "prefill, 192 tokens": Call(193, 256, 80, config=PrefillConfig(block_m=192, cluster=1, num_sms=1)),
    "prefill, more slots than steps": Call(65, 128, 144, config=PrefillConfig(block_m=64, stages=8, num_sms=4)),
    "prefill, a cluster of four": Call(70, 384, 608, config=PrefillConfig(block_m=64, stages=2, cluster=4)),
    "prefill, no zeros": Call(70, 256, 144, zeros=False, scales="bfloat16", config=PrefillConfig(stages=2)),
}
PARAMETERS = [
    pytest.param(call, id=name, marks=[pytest.mark.slow] if i > 6 else [])
    for i, (name, call) in enumerate(CALLS.items())
]


class Interpreter:
    """The interpreter's private state, which JAX 0.11 does not export."""

    def __init__(self):
        self.callbacks = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks")
        self.interpret = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call")

    def reset(self):
        self.callbacks.reset_gpu_interpret_mode_state()

    def run(self, call):
        """The kernel's result; fails on a race."""
        out = jax.block_until_ready(call.run(interpret=compat.interpret_params(detect_races=True)))
        assert not self.interpret.get_races().races_found, "race detected"
        return out


@pytest.fixture
def interpreter():
    jax.clear_caches()  # the kernels are jitted: a trace of another test must not stand in for this one
    found = Interpreter()
    found.reset()
    yield found
    found.reset()


@pytest.mark.parametrize("call", PARAMETERS)
def test_interpreted_kernel_agrees_with_the_oracle(interpreter, call):
    check(call, interpreter.run(call))


def test_the_public_function_runs_the_kernel_on_a_stack(interpreter, monkeypatch):
    """Scaled and rotated activations, the middle layer of a stack and one that is none: as XLA has them."""
    weights = [round_weight(jax.random.normal(jax.random.key(n), (64, 128)), "int4", group_size=64) for n in range(3)]
    for n in range(3):  # every layer has a rotation and scales of its own
        pairs = np.concatenate([np.random.default_rng(2 * n + g).permutation(64) for g in range(2)])[None]
        rotation = Rotation(jnp.full((1, 64), 0.3 + n), jnp.asarray(pairs, jnp.int16))
        scales = jnp.linspace(0.5, 2 + n, 128)
        weights[n] = dataclasses.replace(weights[n], rotation=rotation, input_scales=scales)
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)
    x = jax.random.normal(jax.random.key(9), (2, 3, 128), jnp.bfloat16)

    def interpreted(*arrays, **options):
        return run(*arrays, **options, interpret=compat.interpret_params(detect_races=True))

    run = mosaic_sm90.run_together
    monkeypatch.setattr(mosaic_sm90, "run_together", interpreted)
    monkeypatch.setattr(compat, "missing_hopper", lambda: None)
    for weight in (stack.of_layer(1), weights[1]):
        found = quantized_matmul(x, weight, dtype=jnp.float32, implementation="mosaic")
        expected = quantized_matmul(x, weights[1], dtype=jnp.float32, implementation="reference")
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    assert np.abs(found - quantized_matmul(x, weights[0], dtype=jnp.float32)).max() > 0.1


TOGETHER = {
    "the first ends within a tile": (SPLIT, 1, (208, 64)),
    "a cluster of two": (Config(warpgroups=2, stages=2, cluster=2, num_sms=6), 40, (400, 64, 144)),
    "by the shape": (None, 3, (64, 304)),
}


@pytest.mark.parametrize("config, rows, outputs", TOGETHER.values(), ids=TOGETHER)
def test_several_weights_in_one_launch_agree_with_the_oracle(interpreter, config, rows, outputs):
    """Activations, scales, layer and outputs of each are its own."""
    calls = [Call(rows, 256, count, 64) for count in outputs]
    operands = [
        mosaic_sm90.Operands(x * (i + 1), codes, scales.at[i].set(scales[1]), zeros, i)
        for i, (x, codes, scales, zeros, _) in enumerate(call.arguments() for call in calls)
    ]
    options = {"group_size": 64, "config": config, "interpret": compat.interpret_params(detect_races=True)}
    results = jax.block_until_ready(mosaic_sm90.run_together(operands, **options))
    assert not interpreter.interpret.get_races().races_found, "race detected"
    for result, of_weight, call in zip(results, operands, calls, strict=True):
        assert result.shape == (rows, call.outputs) and error(result, oracle(*of_weight[:5])) < 1e-6


@pytest.mark.parametrize("outputs, is_even", [((256, 64), True), ((512,), False)])
def test_results_may_be_left_in_parts(outputs, is_even):
    """Where every tile has as many; what is in no row and no column of a result nobody may read."""
    config = Config(warpgroups=2, num_sms=8 if is_even else 3)
    calls = [Call(9, 384, count, 64) for count in outputs]
    operands = [mosaic_sm90.Operands(*call.arguments()) for call in calls]
    options = {"group_size": 64, "config": config, "interpret": compat.interpret_params()}
    results = mosaic_sm90.run_together(operands, **options, merged=False)
    assert all(isinstance(result, Partial) == is_even for result in results)
    for result, call, merged in zip(results, calls, mosaic_sm90.run_together(operands, **options), strict=True):
        assert result.shape == (9, call.outputs) and result.dtype == jnp.float32
        if is_even:
            assert result.parts.shape == results[0].parts.shape and len(result.parts) > 1
            own = np.full(result.parts.shape, np.nan, np.float32)
            here = (slice(None), slice(9), slice(result.first, result.first + result.width))
            own[here] = result.parts[here]
            result = dataclasses.replace(result, parts=jnp.asarray(own))
        np.testing.assert_array_equal(made(result), merged)


def test_products_of_different_kinds_have_no_launch_in_common():
    operands = [mosaic_sm90.Operands(*Call(2, 256, 64, size).arguments()) for size in (64, 128)]
    with pytest.raises(NotImplementedError, match="whole groups of 64"):
        mosaic_sm90.run_together(operands, group_size=64)
    operands = [mosaic_sm90.Operands(*Call(rows, 256, 64).arguments()) for rows in (2, 3)]
    with pytest.raises(ValueError, match="outputs and layers alone"):
        mosaic_sm90.run_together(operands, group_size=128)


@pytest.mark.parametrize(
    "width, config",
    [
        *((width, SPLIT) for width in (32, 64, 128, 256)),
        *(pytest.param(width, SMALL, marks=pytest.mark.slow) for width in (32, 64, 256)),
    ],
)
def test_interleaved_codes_take_activations_as_they_are(interpreter, width, config):
    call = Call(9, 512, 64, width, config=config)
    x, *weight = call.arguments()
    whole = interleave(QuantizedTensor(*weight[:3], layer=weight[3], shape=(64, 512)))
    assert whole.interleaved
    operands = mosaic_sm90.Operands(x, whole.codes, *weight[1:])
    options = {"group_size": width, "config": config, "interpret": compat.interpret_params()}
    (result,) = mosaic_sm90.run_together([operands], interleaved=True, **options)
    check(call, result)


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("rows", [1, 3, 8, 17, 64, 130])
@pytest.mark.parametrize("outputs", [64, 208])
def test_automatic_configuration_agrees_with_the_oracle(interpreter, rows, outputs, group_size):
    call = Call(rows, 256, outputs, group_size)
    check(call, interpreter.run(call))


@pytest.mark.slow
def test_real_sizes_agree_with_the_oracle(interpreter):
    call = Call(3, 4096, 1024)
    check(call, interpreter.run(call))


def test_the_oracle_sees_wrong_zeros_scales_and_nibbles():
    x, codes, scales, zeros, layer = CALLS["one token, tiles in three"].arguments()
    expected = oracle(x, codes, scales, zeros, layer)
    swapped = (codes >> 4) | (codes << 4)
    wrong = [(codes, scales, jnp.roll(zeros, 1, 1)), (codes, jnp.roll(scales, 1, 1), zeros), (swapped, scales, zeros)]
    for arrays in wrong:
        assert error(oracle(x, *arrays, layer), expected) > 0.1


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


@pytest.mark.slow
@pytest.mark.parametrize(
    "where, function, chosen",
    [
        pytest.param(parts, "barrier_wait", 0, id="a step does not wait for its copies"),
        pytest.param(parts, "barrier_wait", 1, id="a step does not wait for the second copy of codes"),
        pytest.param(decode, "barrier_wait", 0, id="a copy does not wait for its slot"),
        pytest.param(decode, "commit_smem", 0, id="a copy does not wait for ordinary reads"),
        pytest.param(parts, "commit_smem", 0, id="the store does not wait for the result"),
        pytest.param(parts, "wait_smem_to_gmem", 0, id="the kernel does not wait for the store"),
    ],
)
def test_a_missing_synchronisation_is_caught(interpreter, monkeypatch, where, function, chosen):
    """With so few tokens that codes come in two copies."""
    assert_caught(interpreter, monkeypatch, where, function, chosen, ONE, rows=parts.MOST_TOKENS_IN_HALVES)


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize(
    "where, function, chosen",
    [
        pytest.param(prefill, "barrier_wait", 0, id="a step does not wait for its codes"),
        pytest.param(prefill, "barrier_wait", 1, id="the first half does not wait for its activations"),
        pytest.param(prefill, "barrier_wait", 2, id="the second half does not wait for its activations"),
        pytest.param(prefill, "barrier_wait", 3, id="a copy of codes does not wait for its slot"),
        pytest.param(prefill, "barrier_wait", 4, id="a copy of activations does not wait for its slot"),
        pytest.param(prefill, "barrier_wait", 6, id="the kernel does not wait for the last codes to be free"),
        pytest.param(prefill, "barrier_wait", 7, id="the kernel does not wait for the last activations to be free"),
        pytest.param(prefill, "commit_smem", 0, id="a copy of codes does not wait for ordinary reads"),
        pytest.param(parts, "commit_smem", 0, id="the store does not wait for the result"),
        pytest.param(parts, "wait_smem_to_gmem", 1, id="the kernel does not wait for the store"),
    ],
)
def test_a_missing_synchronisation_of_prefills_is_caught(interpreter, monkeypatch, cluster, where, function, chosen):
    """With so many slots of activations that waiting for one says nothing of codes."""
    config = PrefillConfig(block_m=64, stages=8, code_stages=2, cluster=cluster, num_sms=2)
    assert_caught(interpreter, monkeypatch, where, function, chosen, config)


def assert_caught(interpreter, monkeypatch, module, function, chosen, config, rows=128):
    """That the interpreter finds the kernel wrong without one call, of a product with several tiles to a CTA."""
    sabotaged = Sabotaged(function, {chosen})
    monkeypatch.setattr(module, "plgpu", sabotaged)
    with pytest.raises(Exception, match=r"(?i)race|deadlock|barrier|wait|complet"):
        interpreter.run(Call(rows, 640, 256, config=config))
    assert sabotaged.count > chosen


def test_no_rows_give_no_rows():
    assert Call(0, 256, 64).run().shape == (0, 64)


# ---------------------------------------------------------------------------------------------------------------
# Layout, cut, configurations


def form(rows, outputs, inputs):
    """With zeros, groups of 128 and float16 scales, to float32."""
    return parts.Form(rows, inputs, outputs, 1, inputs // 128, jnp.dtype("float16"), True, jnp.dtype("float32"))


@pytest.mark.parametrize("width", [32, 64, 128])
def test_activations_are_in_the_order_of_the_weights_in_registers(width):
    """By the figure of wgmma's left operand: a thread's register holds columns 2t and 2t + 1 of 8 of its quarter t."""
    groups = 1 if width == 128 else 3
    call = form(1, 64, width * groups)._replace(groups=groups)
    order = np.asarray(parts.permuted(jnp.arange(call.inputs, dtype=jnp.int32)[None], call))[0, :width]
    words = width // 32
    seen = []
    for quarter in range(4):
        for register in range(4 * words):  # one for each 8 columns
            word, pair = divmod(register, 4)
            first = 8 * (quarter * words + word)  # code of the word that the thread loads
            columns = [8 * register + 2 * quarter + i for i in (0, 1)]
            assert order[columns].tolist() == [first + pair, first + pair + 4]
            seen += columns
    assert sorted(seen) == list(range(width))


@pytest.mark.parametrize(
    "rows, outputs, inputs, num_sms",
    [
        (8, 4096, 4096, 132),
        (8, 12288, 4096, 132),
        (8, 4096, 12288, 132),
        (1, 28672, 8192, 132),
        (130, 200, 256, 7),
        (4, 1024, 4096, 132),
    ],
)
def test_every_unit_of_work_has_one_cluster_and_every_partial_result_one_place(rows, outputs, inputs, num_sms):
    for warpgroups, block_k, cluster in ((2, 128, 1), (4, 256, 1), (2, 256, 2), (2, 128, 4)):
        config = Config(warpgroups=warpgroups, block_k=block_k, cluster=cluster, num_sms=num_sms)
        cut = decode.cut_of((form(rows, outputs, inputs),), config)
        assert cut.clusters * cluster <= num_sms
        places = set()
        for nth in range(cut.clusters):
            units = range(nth * cut.share, min((nth + 1) * cut.share, cut.tiles * cut.steps))
            assert len(units) > 0
            for tile in {unit // cut.steps for unit in units}:
                place = (nth - tile * cut.steps // cut.share, tile)
                assert 0 <= place[0] < cut.counts.flat[tile] and place not in places
                places.add(place)
        assert len(places) == cut.counts.sum()


@pytest.mark.parametrize("outputs", [4096, 12288, 28672])
@pytest.mark.parametrize("rows", [8, 64])
def test_the_cut_fills_the_machine(rows, outputs):
    config = mosaic_sm90.heuristic_config(form(rows, outputs, 4096))
    cut = decode.cut_of((form(rows, outputs, 4096),), config)
    assert cut.tiles * cut.steps * config.cluster / (cut.share * config.num_sms) > 0.9


@pytest.mark.parametrize("outputs", [4096, 12288, 28672])
@pytest.mark.parametrize("rows", [600, 1024, 2100, 4096])
def test_the_tiles_of_prefills_fill_the_machine(rows, outputs):
    """As far as rows and outputs allow, and better than with the largest tiles alone."""
    call = form(rows, outputs, 4096)
    config = mosaic_sm90.heuristic_config(call)
    assert config.cluster == 2 and config.stages == 4
    time = prefill.turns_of(call, config) * config.block_m
    assert time <= prefill.turns_of(call, PrefillConfig()) * 256
    assert rows * outputs / (time * config.num_sms * prefill.BLOCK_O) > 0.7


def test_partial_results_that_nobody_wrote_do_not_count():
    call, config = form(130, 200, 384), Config(warpgroups=2, num_sms=3)
    counts = decode.cut_of((call,), config).counts
    assert counts.tolist() == [[1, 2], [2, 1]]
    tokens = decode.tokens_of(call)
    partial = np.random.default_rng(0).normal(size=(2, 130, 200)).astype(np.float32)
    expected = partial[0].copy()
    expected[tokens:, :128] += partial[1, tokens:, :128]
    expected[:tokens, 128:] += partial[1, :tokens, 128:]
    partial[1, :tokens, :128] = partial[1, tokens:, 128:] = np.nan
    for rows, columns in ((130, slice(0, 200)), (130, slice(100, 150)), (3, slice(128, 200))):
        found = decode.merge(jnp.asarray(partial), (call,), config, rows=rows, columns=columns)
        np.testing.assert_array_equal(found, expected[:rows, columns])


@pytest.mark.parametrize("rows", [1, 8, 32, 33, 64, 65, 128, 300, 1000])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_automatic_configurations_fit_into_shared_memory(rows, group_size, dtype):
    groups = 1 if group_size == -1 else 4096 // group_size
    for outputs in (256, 4096, 12288):
        call = form(rows, outputs, 4096)._replace(
            groups=groups, scale_dtype=jnp.dtype("float32"), dtype=jnp.dtype(dtype)
        )
        config = mosaic_sm90.heuristic_config(call)
        assert config.smem_bytes(call) <= compat.SHARED_MEMORY_BYTES and config.stages >= 2


def test_wrong_configurations_say_so():
    for wrong in ({"warpgroups": 3}, {"stages": 1}, {"num_sms": 0}, {"cluster": 3}, {"block_k": 64}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Config(**wrong)
    for wrong in ({"block_m": 96}, {"stages": 1}, {"code_stages": 0}, {"cluster": 3}, {"num_sms": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PrefillConfig(**wrong)
    with pytest.raises(ValueError, match="shared memory"):
        Call(64, 256, 64, config=Config(stages=8, block_k=256)).run()


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"x": jnp.zeros((2, 256))}, "bfloat16 activations; got float32"),
        ({"scales": jnp.zeros((3, 2, 64), jnp.float8_e4m3fn)}, "got float8_e4m3fn"),
        ({"codes": jnp.zeros((3, 64, 256), jnp.int8)}, "uint8 codes of 256 inputs"),
        ({"zeros": jnp.zeros((3, 2, 64), jnp.int32)}, "int8 zeros; got int32"),
        ({"group_size": 64}, "whole groups of 64"),
        ({"dtype": "float16"}, "asked for float16"),
    ],
)
@pytest.mark.usefixtures("plain_calls")
def test_what_is_not_supported_is_named(change, reason):
    names = ("x", "codes", "scales", "zeros", "layer")
    arguments = dict(zip(names, Call(2, 256, 64).arguments(), strict=True)) | {"group_size": 128} | change
    assert reason in mosaic_sm90.unsupported(**arguments)
    with pytest.raises(NotImplementedError, match=re.escape(reason)):
        mosaic_sm90.run(**arguments)


def test_inputs_and_groups_that_do_not_fit_are_named():
    explain = lambda call: mosaic_sm90.unsupported(*call.arguments(), group_size=call.group_size)  # noqa: E731
    assert "multiple of 32 inputs; got 240" in explain(Call(2, 240, 64, -1))
    assert "multiple of 16 outputs; got 200" in explain(Call(2, 256, 200))  # an illegal instruction on a GPU
    assert "got 96" in explain(Call(2, 192, 64, 96))
    if compat.missing_hopper() is not None:
        assert "needs" in explain(Call(2, 256, 64))
    call = Call(2, 256, 64)
    assert mosaic_sm90.unsupported(*call.arguments(), group_size=128, interpret=compat.interpret_params()) is None


# ---------------------------------------------------------------------------------------------------------------
# Lowered and compiled


def scanned(call):
    """The product with each layer of the stack in turn, in a scan."""

    def run(x, codes, scales, zeros):
        def body(x, layer):
            return x, call.run(x, codes, scales, zeros, layer)

        return jax.lax.scan(body, x, jnp.arange(codes.shape[0]))[1]

    return run


@pytest.mark.smoke
@pytest.mark.parametrize(
    "call", [Call(1, 512, 384), Call(600, 256, 256, 32, dtype="bfloat16")], ids=["decode", "prefill"]
)
def test_lowers_for_cuda_and_takes_the_whole_stack(call):
    text = jax.jit(scanned(call)).trace(*call.arguments()[:4]).lower(lowering_platforms=("cuda",)).as_text()
    stack = f"tensor<3x{call.outputs}x{call.inputs // 2}xui8>"
    (kernel,) = [line for line in text.splitlines() if "mosaic_gpu" in line]
    assert stack in kernel
    sliced = [line for line in text.splitlines() if "dynamic_slice" in line and "ui8" in line]
    assert not sliced


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_call_lowers_for_cuda(call):
    """Catches what the interpreter accepts and the compiler does not."""
    x, codes, scales, zeros, layer = call.arguments()
    jitted = jax.jit(lambda x, codes, scales, layer: call.run(x, codes, scales, zeros, layer))
    assert "mosaic_gpu" in jitted.trace(x, codes, scales, layer).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 17, 31, 33, 40, 57, 65, 130, 257, 600, 1001])
@pytest.mark.parametrize("outputs, inputs, group_size", [(64, 128, 128), (208, 256, 64), (144, 416, -1), (80, 160, 32)])
def test_automatic_configurations_lower_for_cuda(rows, outputs, inputs, group_size):
    test_every_call_lowers_for_cuda(Call(rows, inputs, outputs, group_size))
    test_every_call_lowers_for_cuda(Call(rows, inputs, outputs, group_size, dtype="bfloat16", zeros=False))


PROGRAM = """
import re, sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_platforms", "cpu")
from pallas_kernels.compile_gate import hopper_sharding
from pallas_kernels.quantized_matmul import Rotation, mosaic_sm90, quantized_matmul

layers, outputs, inputs = 4, 4096, 4096
rows = int(sys.argv[1])

def step(x, codes, scales, zeros):
    def body(x, layer):
        y = mosaic_sm90.run(x, codes, scales, zeros, layer, group_size=128)
        return jnp.tanh(y).astype(x.dtype), None
    return jax.lax.scan(body, x, jnp.arange(layers))[0]

gpu = hopper_sharding()

def array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=gpu)

arguments = (
    array((rows, inputs), jnp.bfloat16), array((layers, outputs, inputs // 2), jnp.uint8),
    array((layers, inputs // 128, outputs), jnp.float16), array((layers, inputs // 128, outputs), jnp.int8),
)
compiled = jax.jit(step).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
made = set(re.findall(r"= u8\\[[\\d,]*\\]\\S* ([a-z-]+)\\(", compiled.as_text()))
assert made <= {"parameter", "get-tuple-element", "bitcast"}, made
made = set(re.findall(r"= (?:f16|s8)\\[[\\d,]*\\]\\S* ([a-z-]+)\\(", compiled.as_text()))
assert made <= {"parameter", "get-tuple-element", "bitcast"}, made
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_PLUGIN, reason="needs the extra gpu-compile")
@pytest.mark.parametrize("rows", [1, 1024])
def test_a_scan_copies_no_weights(rows):
    """Compiled for a GPU: no codes, scales or zeros are made by anything but a parameter."""
    command = [sys.executable, "-c", PROGRAM, str(rows)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


# What a weight may cost: all instructions of the loop, for the 8 weights of a thread in each product.
LOOP = """
import re, sys, tempfile
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
from pallas_kernels import compile_gate
from pallas_kernels.quantized_matmul.mosaic_sm90 import prefill

(case,) = [case for case in compile_gate.cases(name_contains=sys.argv[1]) if case.name == sys.argv[1]]
with tempfile.TemporaryDirectory() as directory:
    compile_gate.compile_case(case, keep=Path(directory))
    (sass,) = Path(directory).glob("*.sass*")
    lines = sass.read_text().splitlines()
labels = {found[1]: i for i, line in enumerate(lines) if (found := re.match(r"(\\.L_x_\\d+):", line))}
products = [i for i, line in enumerate(lines) if "HGMMA" in line]
for end in range(products[-1], len(lines)):
    branch = re.search(r"BRA `\\((\\.L_x_\\d+)\\)", lines[end])
    if branch and labels[branch[1]] <= products[0]:
        break
loop = [line for line in lines[labels[branch[1]] : end + 1] if re.search(r"/\\*[0-9a-f]{4,}\\*/\\s+\\S", line)]
assert not [line for line in loop if re.search(r"I2F|F2I|LDL|STL|SHFL", line)], loop
if "M=4096" in sys.argv[1]:  # after the products of 64 inputs, all but these are waited for, and none before
    order = re.findall(r"HGMMA|DEPBAR.LE gsb0, 0x\\d", "\\n".join(loop))
    assert order == 2 * [*4 * ["HGMMA"], f"DEPBAR.LE gsb0, 0x{prefill.IN_FLIGHT}"], order
print(len(loop) / len(products) / 8)
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_PLUGIN, reason="needs the extra gpu-compile")
@pytest.mark.parametrize(
    "kind, groups, rows, most",
    [
        *(("w4a16", "128 float16 zeros", rows, most) for rows, most in ((1, 2.4), (64, 2.9), (4096, 4.8))),
        *(("w8a16 int8", "-1 float32", rows, most) for rows, most in ((1, 2.8), (64, 3.3), (4096, 3.4))),
        *(("w8a16 fp8", "-1 float32", rows, most) for rows, most in ((1, 3.1), (64, 3.5), (4096, 3.6))),
        *(("w8a16 fp8", "128 float32", rows, most) for rows, most in ((1, 3.1), (64, 3.6), (4096, 4.9))),
        *(("nvfp4", "16 float8_e4m3fn", rows, most) for rows, most in ((1, 3.2), (64, 3.7), (4096, 4.3))),
    ],
)
def test_the_inner_loop_is_short(kind, groups, rows, most):
    """In instructions per weight of a thread, everything counted, and none of slow kinds."""
    dtype = "bfloat16" if rows > 512 else "float32"
    name = f"{kind} M={rows} 4096x4096 groups of {groups} to {dtype}"
    result = subprocess.run([sys.executable, "-c", LOOP, name], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) <= most


def test_the_benchmark_times_and_checks_what_the_kernels_take():
    shapes = [*benchmark.check_shapes(), *benchmark.time_shapes()]
    assert len({shape.name for shape in shapes}) > 100
    for shape in shapes:
        options = {"group_size": shape.group_size, "dtype": shape.dtype, "interpret": compat.interpret_params()}
        layer = jax.ShapeDtypeStruct((), jnp.int32)
        assert mosaic_sm90.unsupported(**shape.avals(), layer=layer, format=shape.codes, **options) is None, shape.name
        configs = [mosaic_sm90.heuristic_config(shape.form()), *mosaic_sm90.candidates(shape.form())]
        assert len(configs) > 5
        assert all(config.smem_bytes(shape.form()) <= compat.SHARED_MEMORY_BYTES for config in configs), shape.name


def test_the_benchmark_checks_against_the_definition():
    shape = benchmark.Shape(rows=3, outputs=72, inputs=256)
    arguments = shape.arguments()
    parts = [arguments[name] for name in ("x", "codes", "scales", "zeros")]
    right = oracle(*parts, 1)
    assert error(benchmark.expected(shape, arguments, 1), right) < 1e-12
    assert 0 < error(shape.product("xla")(arguments["x"], 1, arguments), right) < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 8, 17, 64, 130, 1000])
@pytest.mark.parametrize("outputs, inputs", [(64, 128), (208, 256), (1024, 4096), (4096, 4096)])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_on_a_gpu(rows, outputs, inputs, group_size):
    call = Call(rows, inputs, outputs, group_size)
    if (reason := mosaic_sm90.unsupported(*call.arguments(), group_size=group_size)) is not None:
        pytest.skip(reason)
    out = call.run()
    check(call, out, 1e-5)
    assert all(bool((call.run() == out).all()) for _ in range(3))
    assert math.isfinite(float(out.sum()))


@pytest.mark.parametrize(
    "format, inputs, groups, interleaved, unit",
    [
        ("int4", 1024, 8, False, 128),
        ("int4", 1024, 8, True, 128),
        ("int4", 1024, 32, False, 32),
        ("int4", 1024, 32, True, 128),  # a group of 32 alone is read in another order than several
        ("int4", 192, 3, True, 192),
        ("int4", 1024, 1, False, 32),
        ("int8", 1024, 1, False, 16),
        ("int8", 1024, 1, True, 128),
        ("fp8", 1024, 4, False, 256),
        ("nvfp4", 1024, 64, False, 32),
    ],
)
def test_the_unit_of_inputs(format, inputs, groups, interleaved, unit):
    """Each part of a weight is one that the kernels take, and is read in the order of the whole."""
    assert mosaic_sm90.unit_of_inputs(inputs, groups, format, interleaved=interleaved) == unit
    codes, scale = mosaic_sm90.CODES[format], {"nvfp4": "float8_e4m3fn"}.get(format, "float16")

    def part(inputs, groups):
        array = jax.ShapeDtypeStruct
        stack = array((2, 64, codes.bytes(inputs)), codes.dtype), array((2, groups, 64), scale)
        return mosaic_sm90.Operands(array((8, inputs), jnp.bfloat16), *stack, None, 0)

    for ways in (ways for ways in range(1, inputs // unit + 1) if inputs // unit % ways == 0):
        operands = part(inputs // ways, max(groups // ways, 1))
        options = {"group_size": -1 if groups == 1 else inputs // groups, "format": format}
        assert mosaic_sm90._unsupported_arrays(operands, *options.values(), jnp.float32) is None
        if interleaved:
            widths = {mosaic_sm90.form_of(each, format).width for each in (operands, part(inputs, groups))}
            assert len(widths) == 1


# ---------------------------------------------------------------------------------------------------------------
# As the automatic choice


@pytest.fixture
def hopper(monkeypatch):
    """A Hopper GPU whose kernel is XLA's path in disguise; the rows of each call that was traced."""
    traced = []

    def product(x, codes, scales, zeros, layer, global_scale, **options):
        shape = (codes.shape[1], x.shape[1])
        weight = QuantizedTensor(codes, scales, zeros, global_scale, layer=layer, shape=shape, **options)
        return xla.run(x, weight.sliced())

    def run_together(operands, *, group_size, dtype, merged=True, **options):
        rows = operands[0].x.shape[0]
        traced.append((rows, len(operands)) if len(operands) > 1 else rows)
        results = [product(*of_weight, **options) for of_weight in operands]
        if merged:
            return tuple(result.astype(dtype) for result in results)
        parts = jnp.concatenate([jnp.full((rows, 5), jnp.nan), *results], axis=1)
        parts = jnp.stack([parts * share for share in (0.25, 0.75)])
        parts = jnp.pad(parts, ((0, 0), (0, -rows % 8), (0, 0)), constant_values=jnp.nan)
        firsts = itertools.accumulate((result.shape[1] for result in results), initial=5)
        return tuple(
            Partial(parts, first, result.shape[1], result.shape, jnp.dtype(dtype))
            for first, result in zip(firsts, results, strict=False)
        )

    monkeypatch.setattr(mosaic_sm90, "run_together", run_together)
    monkeypatch.setattr(compat, "missing_hopper", lambda: None)
    monkeypatch.setattr(dispatch, "undivided", lambda **_: None)

    def preferred(op, *_, **__):
        return (("mosaic", "xla") if op == "quantized_matmul" else ("xla",)), ""

    monkeypatch.setattr(dispatch, "preferred", preferred)
    return traced


def stack(seed=0, layers=2):
    keys = jax.random.split(jax.random.key(seed), layers)
    weights = [round_weight(jax.random.normal(key, (16, 64)), "int4", group_size=32) for key in keys]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)


@pytest.mark.parametrize("layers", [(), (2,), (2, 3)], ids=["alone", "of layers", "of layers and experts"])
def test_weights_are_better_interleaved_where_the_kernel_multiplies(hopper, layers):
    keys = jax.random.split(jax.random.key(0), math.prod(layers))
    weights = [round_weight(jax.random.normal(key, (16, 64)), "int4", group_size=32) for key in keys]
    weight = jax.tree.map(lambda *leaves: jnp.stack(leaves).reshape(*layers, *leaves[0].shape), *weights)
    assert is_better_interleaved(weight, jnp.bfloat16)
    found = interleave(weight)
    assert found.interleaved and found.codes.shape == weight.codes.shape
    assert found.codes.sharding == weight.codes.sharding and found.scales is weight.scales
    assert not is_better_interleaved(found, jnp.bfloat16)
    assert not is_better_interleaved(weight, jnp.float32), "its activations are not the kernel's"
    few = round_weight(jnp.ones((6, 64)), "int4", group_size=32)
    assert not is_better_interleaved(few, jnp.bfloat16), "nor are so few outputs"
    assert not is_better_interleaved(round_weight(jnp.ones((16, 64)), "nvfp4"), jnp.bfloat16)


def test_products_in_parts(hopper):
    """Shapes, derivatives, and rows that are mapped over."""
    weights = [stack(seed).of_layer(seed) for seed in (0, 1)]
    x = jax.random.normal(jax.random.key(2), (2, 3, 64), jnp.bfloat16)

    def value(x, scales, merged):
        own = [dataclasses.replace(weight, scales=scale) for weight, scale in zip(weights, scales, strict=True)]
        results = quantized_matmuls(x, own, merged=merged)
        assert all(isinstance(result, Partial) != merged for result in results)
        assert all(result.shape == (2, 3, 16) and result.dtype == jnp.bfloat16 for result in results)
        return sum(jnp.sin(made(result).astype(jnp.float32) * (i + 1)).sum() for i, result in enumerate(results))

    scales = [weight.scales for weight in weights]
    whole, parts = (jax.value_and_grad(value, argnums=(0, 1))(x, scales, merged) for merged in (True, False))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-2), whole, parts)
    assert hopper == [(6, 2)] * 2

    def rows(x, merged):
        return tuple(made(result) for result in quantized_matmuls(x, weights, merged=merged))

    jax.tree.map(np.testing.assert_array_equal, *(jax.vmap(lambda x, m=m: rows(x, m))(x) for m in (True, False)))


def test_eight_bit_activations_leave_no_parts(hopper):
    """Their scales come after the sum."""
    weight = round_weight(jax.random.normal(jax.random.key(0), (16, 64)), "int8", activations="int8")
    (result,) = quantized_matmuls(jnp.ones((2, 64), jnp.bfloat16), [weight], merged=False)
    assert isinstance(result, jax.Array) and hopper == [2]


def test_what_parts_can_be_reshaped_to():
    partial = Partial(jnp.ones((2, 8, 40)), 3, 32, (6, 32), jnp.dtype("float32"))
    assert partial.rows == 6 and partial.reshape((2, 3, 4, 8)).rows == 6
    np.testing.assert_array_equal(made(partial.reshape((2, 3, 4, 8))), jnp.full((2, 3, 4, 8), 2))
    for shape in ((2, 96), (6, 16), (96, 2), (3, 64)):
        with pytest.raises(ValueError, match="cannot bring"):
            partial.reshape(shape)


def test_weights_of_one_launch_are_prepared_alike(hopper, monkeypatch):
    """Though the kernel is not worth it for those with few outputs alone."""

    def preferred(op, kind, sizes, **_):
        return (("mosaic",) if sizes["outputs"] > 1024 else ("xla",)), ""

    monkeypatch.setattr(dispatch, "preferred", preferred)
    weights = [round_weight(jnp.ones((outputs, 64)), "int4", group_size=32) for outputs in (2048, 512)]
    x = jnp.ones((2, 64), jnp.bfloat16)
    assert all(is_better_interleaved(weight, jnp.bfloat16) for weight in weights)
    quantized_matmuls(x, [interleave(weight) for weight in weights])
    assert hopper == [(2, 2)]
    alone = interleave(weights[1])
    quantized_matmul(x, alone)
    assert hopper[1:] == [2], "XLA would have to bring its codes back"
    quantized_matmul(x, weights[1])
    assert hopper[2:] == []


def test_steps_are_of_whole_groups_or_within_one(interpreter):
    call = Call(3, 768, 64, 384, config=None)
    x, *weight = call.arguments()
    options = {"group_size": 384, "interpret": compat.interpret_params()}
    (result,) = mosaic_sm90.run_together([mosaic_sm90.Operands(x, *weight)], **options)
    check(call, result)
    wide = Config(warpgroups=2, block_k=256, stages=2)
    with pytest.raises(ValueError, match="groups of 384 inputs need steps of 128; got Config"):
        mosaic_sm90.run_together([mosaic_sm90.Operands(x, *weight)], **options, config=wide)
    shape = parts.Form(3, 768, 64, 1, 2, jnp.dtype("float16"), True, jnp.dtype("float32"))
    tried = [config.block_k for config in mosaic_sm90.candidates(shape) if isinstance(config, Config)]
    assert tried and set(tried) == {128}


def test_interleaved_weights_multiply_alike(hopper):
    """In one launch, and those that are not in another; for gradients, too."""
    x = jax.random.normal(jax.random.key(1), (2, 3, 64), jnp.bfloat16)
    weights = [stack(seed, 2).of_layer(1) for seed in range(3)]
    mixed = [interleave(weights[0]), weights[1], interleave(weights[2])]
    results = quantized_matmuls(x, mixed)
    assert sorted(hopper, key=str) == [(6, 2), 6]
    for result, weight in zip(results, weights, strict=True):
        np.testing.assert_array_equal(result, quantized_matmul(x, weight, implementation="xla"))
    gradient = jax.grad(lambda x, weight: quantized_matmul(x, weight).astype(jnp.float32).sum())
    np.testing.assert_array_equal(gradient(x, mixed[0]), gradient(x, weights[0]))


def test_gradients_of_the_automatic_choice_are_those_of_xla(hopper):
    x = jax.random.normal(jax.random.key(1), (2, 3, 64), jnp.bfloat16)
    weights = stack()

    def loss(implementation):
        def value(x, scales):
            weight = dataclasses.replace(weights, scales=scales).of_layer(1)
            out = quantized_matmul(x, weight, dtype=jnp.float32, implementation=implementation)
            return (out * jnp.arange(16)).sum()

        return jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(x, weights.scales.astype(jnp.float32))

    found, expected = loss(None), loss("xla")
    assert hopper == [6]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), found, expected)


def test_vmap_of_rows_is_more_rows_and_of_layers_one_call_after_another(hopper):
    x = jax.random.normal(jax.random.key(1), (2, 3, 64), jnp.bfloat16)
    weights = stack()
    rows = jax.vmap(lambda x: quantized_matmul(x, weights.of_layer(0)))(x)
    np.testing.assert_array_equal(rows, quantized_matmul(x, weights.of_layer(0), implementation="xla"))
    assert hopper[-1] == 6
    layers = jax.vmap(lambda layer: quantized_matmul(x[0], weights.of_layer(layer)))(jnp.arange(2))
    own = [quantized_matmul(x[0], weights.of_layer(i), implementation="xla") for i in range(2)]
    np.testing.assert_array_equal(layers, jnp.stack(own))
    assert hopper[-1] == 3


def rotated(weight, seed):
    """The stack behind rotations of one step."""
    rng = np.random.default_rng(seed)
    theta = jnp.asarray(rng.normal(size=(2, 1, 32)), jnp.float32)
    pairs = jnp.asarray(np.argsort(rng.random((2, 1, 2, 32)), axis=-1).reshape(2, 1, 64), jnp.int16)
    return dataclasses.replace(weight, rotation=Rotation(theta, pairs))


@pytest.mark.parametrize("implementation", [None, "mosaic"])
def test_weights_of_a_kind_are_multiplied_in_one_launch(hopper, implementation):
    """With rotations and without, but interleaved ones apart from the others; also gradients."""
    x = jax.random.normal(jax.random.key(1), (2, 3, 64), jnp.bfloat16)
    plain = [stack(seed) for seed in range(4)]
    kinds = [plain[0], interleave(rotated(plain[1], 1)), rotated(plain[2], 3), interleave(plain[3])]
    weights = [weight.of_layer(i % 2) for i, weight in enumerate(kinds)]

    def value(implementation):
        def loss(x, scales):
            own = [dataclasses.replace(weight, scales=s) for weight, s in zip(weights, scales, strict=True)]
            results = quantized_matmuls(x, own, dtype=jnp.float32, implementation=implementation)
            return sum((result * jnp.arange(16) * (i + 1)).sum() for i, result in enumerate(results)), results

        scales = [weight.scales.astype(jnp.float32) for weight in weights]
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, scales)

    found, expected = value(implementation), value("xla")
    assert hopper == [(6, 2), (6, 2)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-2), found, expected)
    many = quantized_matmuls(jnp.tile(x, (11, 1, 1)), weights, implementation=implementation)
    assert hopper[2:] == [66, 66, 66, 66]
    for result, right in zip(many, quantized_matmuls(x, weights, implementation="xla"), strict=True):
        np.testing.assert_allclose(result[:2].astype(np.float32), right.astype(np.float32), rtol=0.02, atol=0.02)


def test_the_choice_for_several_weights_is_by_the_sum_of_their_outputs(hopper, monkeypatch):
    asked = []

    def preferred(op, kind, sizes, **_):
        asked.append(sizes["outputs"])
        return ("xla",), ""

    monkeypatch.setattr(dispatch, "preferred", preferred)
    quantized_matmuls(jnp.ones((2, 64), jnp.bfloat16), [stack(seed).of_layer(0) for seed in range(3)])
    assert asked == [48] and not hopper


def test_what_the_automatic_choice_says(hopper, monkeypatch):
    x, weight = jnp.ones((2, 64), jnp.bfloat16), stack().of_layer(0)
    assert api.automatic(x, weight, dtype=jnp.bfloat16) == ("mosaic", "")
    assert api.automatic(x[:0], weight, dtype=jnp.bfloat16) == ("xla", "nothing to do")
    float32 = x.astype(jnp.float32)
    assert api.automatic(float32, weight, dtype=jnp.float32) == (
        "xla",
        "mosaic: needs bfloat16 activations; got float32",
    )
    narrow = round_weight(jnp.ones((8, 64)), "int8")
    assert api.automatic(x, narrow, dtype=x.dtype) == ("xla", "mosaic: needs a multiple of 16 outputs; got 8")
    monkeypatch.setattr(dispatch, "undivided", lambda **_: "2 devices")
    assert api.automatic(x, weight, dtype=x.dtype) == ("xla", "mosaic: 2 devices")
