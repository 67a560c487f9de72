"""The Hopper kernels with int8, fp8 and nvfp4 codes: every code, interpreted with race detection, lowered, dispatched.

The oracles are NumPy in float64 and the tables of `ml_dtypes`. As with int4 all that separates a kernel from the oracle
is float32 summation, and half a unit of the last place of a bfloat16 result, 2^-9.
"""

import dataclasses
import importlib
import importlib.util
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from benchmarks import quantized_matmul as benchmark
from pallas_kernels import compat, dispatch
from pallas_kernels.quantized_matmul import api, mosaic_sm90, quantized_matmul, quantized_matmuls
from pallas_kernels.quantized_matmul.mosaic_sm90 import Config, Operands, PrefillConfig
from pallas_kernels.quantized_matmul.mosaic_sm90.codes import (
    CODES,
    Integers,
    int4_bias,
    nvfp4_scales,
    scaled,
    split_scale,
)
from pallas_kernels.quantized_matmul.mosaic_sm90.parts import form_of
from pallas_kernels.quantized_matmul.rounding import round_weight

HAS_PLUGIN = importlib.util.find_spec("jax_cuda13_plugin") is not None
E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)

# ---------------------------------------------------------------------------------------------------------------
# Codes


def numbers(pairs):
    """Low and high bfloat16 number of registers, `[2, ...]` in float64."""
    pairs = np.asarray(pairs, np.uint32)
    halves = np.stack([pairs & 0xFFFF, pairs >> 16]).astype(np.uint16)
    return halves.view(ml_dtypes.bfloat16).astype(np.float64)


def words(codes, bits):
    """`[words, codes in one]` as they lie in memory."""
    shifts = bits * np.arange(32 // bits, dtype=np.uint32)
    return jnp.asarray((codes.astype(np.uint32) << shifts).sum(axis=1, dtype=np.uint32))


def unpacked(format, codes, side=None):
    """What the kernel's instructions make of codes `[words, codes in one]`, in the order of the codes."""
    found = CODES[format]
    pairs = found.pairs(Integers(), words(codes, found.bits), found.side if side is None else side)
    assert len(pairs) == codes.shape[1] // 2
    return np.concatenate(numbers(jnp.stack(pairs))).T  # the low halves are the first half of the codes


def every_code(format):
    """All codes in every place of a word, beside others."""
    count = 2 ** CODES[format].bits
    return (np.arange(count)[:, None] + 37 * np.arange(CODES[format].per_word)) % count


def test_every_int8_code_is_exact():
    codes = every_code("int8")
    np.testing.assert_array_equal(unpacked("int8", codes), codes.astype(np.uint8).view(np.int8))


def test_every_fp8_code_is_exact_and_those_for_no_number_are_480():
    codes = every_code("fp8")
    expected = codes.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    expected = np.where(codes == 0x7F, 480, np.where(codes == 0xFF, -480, expected))
    np.testing.assert_array_equal(unpacked("fp8", codes), expected)


def test_every_int4_code_less_every_zero_is_exact():
    zeros, codes = np.tile(np.arange(-8, 8), 16), np.repeat(every_code("int4"), 16, axis=0)
    (bias,) = int4_bias(Integers(), [jnp.asarray(zeros, jnp.int32).astype(jnp.uint32)])
    signed = np.where(codes > 7, codes - 16, codes)
    factor = CODES["int4"].factor
    np.testing.assert_array_equal(unpacked("int4", codes, bias) * factor, signed - zeros[:, None])
    np.testing.assert_array_equal(unpacked("int4", codes) * factor, signed)


def test_every_nvfp4_code_times_every_scale_is_exact():
    scale = np.setdiff1d(np.arange(256), [0x7F, 0xFF])
    values = scale.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    both = nvfp4_scales(Integers(), [jnp.asarray(part, jnp.uint32) for part in (scale, scale[::-1])])
    codes = np.repeat(every_code("nvfp4"), len(scale), axis=0)
    for side, expected in zip(both, (values, values[::-1]), strict=True):
        found = unpacked("nvfp4", codes, jnp.tile(side, 16)) * CODES["nvfp4"].factor
        np.testing.assert_array_equal(found, E2M1[codes] * np.tile(expected, 16)[:, None])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_code_times_a_scale_is_rounded_as_their_product_is(dtype):
    """The nearest bfloat16 number, but for 1 in 512, which lies so near to the middle that the next one is taken."""
    scales = np.random.default_rng(0).lognormal(-4, 2, (1, 4000)).astype(jnp.dtype(dtype)).astype(np.float32)
    differences = np.arange(-23, 24)[:, None] / CODES["int4"].factor  # of int4 codes and zeros
    bits = (
        (differences * np.array([1, -1]).reshape(2, 1, 1)).astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint32)
    )
    split = split_scale(Integers(), jnp.asarray(scales.view(np.uint32)), jnp.dtype(dtype))
    found = numbers(scaled(Integers(), jnp.asarray(bits[0] | bits[1] << 16), *split))
    exact = differences * np.stack([scales, -scales]).astype(np.float64)
    nearest = exact.astype(ml_dtypes.bfloat16).astype(np.float64)
    wrong = found != nearest
    assert wrong.mean() <= (0 if split[1] is None else 1 / 512)
    half_unit = 2.0 ** (np.frexp(exact)[1] - 9)  # of the last of 8 bits
    assert (np.abs(found - exact)[wrong] < (1 + 2**-7) * half_unit[wrong]).all()


@pytest.mark.parametrize("selector", [0xA280, 0xB391, 0xC480, 0x1010, 0x3232])
def test_a_permutation_of_bytes_is_that_of_its_definition(selector):
    a, b = 0x80C1047F, 0xF27381E4
    source = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")]
    expected = 0
    for place in range(4):
        choice = selector >> 4 * place & 15
        byte = source[choice & 7]
        expected |= (255 * (byte > 127) if choice > 7 else byte) << 8 * place
    assert int(Integers().bytes_of(jnp.uint32(a), jnp.uint32(b), selector)) == expected


# ---------------------------------------------------------------------------------------------------------------
# Interpreted


@dataclasses.dataclass(frozen=True)
class Call:
    """A product; three layers, of which the middle one is read. M tokens, I inputs, O outputs."""

    format: str
    rows: int
    inputs: int
    outputs: int
    group_size: int = -1
    scales: str = "float32"
    zeros: bool = False
    overall: bool = False
    dtype: str = "float32"
    config: Config | PrefillConfig | None = None

    def parts(self):
        """Names to arrays. The scales of the other layers are NaN."""
        rng, kind = np.random.default_rng(0), CODES[self.format]
        grid = (3, 1 if self.group_size == -1 else self.inputs // self.group_size, self.outputs)
        bits = rng.integers(0, 256, (3, self.outputs, kind.bytes(self.inputs)), np.uint8)
        if self.format == "fp8":
            bits[bits & 0x7F == 0x7F] = 0
        if self.format == "nvfp4":
            scales = rng.integers(0, 0x7F, grid, np.uint8).view(ml_dtypes.float8_e4m3fn)
        else:
            scales = rng.lognormal(-4, 1, grid).astype(jnp.dtype(self.scales))
        scales[::2] = np.nan
        return {
            "codes": jnp.asarray(bits.view(kind.dtype)),
            "scales": jnp.asarray(scales),
            "zeros": jnp.asarray(rng.integers(-8, 8, grid), jnp.int8) if self.zeros else None,
            "global_scale": jnp.asarray([np.nan, 0.037, np.nan], jnp.float32) if self.overall else None,
        }

    def x(self):
        return jnp.asarray(np.random.default_rng(1).normal(size=(self.rows, self.inputs)) + 0.5, jnp.bfloat16)

    def run(self, **options):
        options = {"group_size": self.group_size, "format": self.format, "dtype": self.dtype} | options
        return mosaic_sm90.run(self.x(), **self.parts(), layer=jnp.int32(1), config=self.config, **options)

    def weight(self):
        """float64, from the tables."""
        parts = {name: None if part is None else np.asarray(part[1]) for name, part in self.parts().items()}
        bits = parts["codes"].view(np.uint8)
        if CODES[self.format].bits == 4:
            bits = np.stack([bits & 15, bits >> 4], axis=-1).reshape(self.outputs, -1)
        if self.format == "nvfp4":
            values = E2M1[bits]
        elif self.format == "int4":
            values = np.where(bits > 7, bits - 16.0, bits)
        else:
            values = parts["codes"].astype(np.float64)
        group = np.arange(self.inputs) // (self.inputs // len(parts["scales"]))
        if self.zeros:
            values = values - parts["zeros"].T[:, group]
        overall = 1.0 if parts["global_scale"] is None else float(parts["global_scale"])
        values = values * parts["scales"].astype(np.float64).T[:, group]
        if self.is_rounded:
            values = values.astype(ml_dtypes.bfloat16).astype(np.float64)
        return values * overall

    @property
    def is_rounded(self):
        form = form_of(Operands(self.x(), **self.parts(), layer=1), self.format)
        return mosaic_sm90.rounds_weight(form, self.config)

    def check(self, out):
        expected = np.asarray(self.x(), np.float64) @ self.weight().T
        assert out.shape == expected.shape and out.dtype == self.dtype
        error = np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected)
        turned = self.is_rounded and self.scales != "bfloat16"  # 1 rounding in 512
        assert error < (2**-9 if self.dtype == "bfloat16" else 2**-8 * 512**-0.5 if turned else 1e-6)


SPLIT = Config(warpgroups=2, stages=2, num_sms=3)
SMALL = PrefillConfig(block_m=64, stages=2, code_stages=2, cluster=1, num_sms=2)

# The first ones run by default: outputs and inputs that are no whole tiles, rings that wrap, tiles split unevenly.
CALLS = {
    "int8 per output": Call("int8", 3, 400, 208, scales="bfloat16", config=SPLIT),
    "fp8 in groups of 128": Call("fp8", 9, 384, 80, 128, config=SPLIT),
    "nvfp4": Call("nvfp4", 3, 416, 80, 16, overall=True, config=SPLIT),
    "nvfp4, prefill": Call("nvfp4", 70, 256, 80, 16, overall=True, dtype="bfloat16", config=SMALL),
    "fp8 per output and a scale of all, prefill": Call("fp8", 66, 272, 80, overall=True, config=SMALL),
    "fp8 per output": Call("fp8", 1, 384, 208, config=SPLIT),
    "int8 in groups of 32": Call("int8", 5, 160, 80, 32, scales="float16", config=SPLIT),
    "int8 in groups of 64": Call("int8", 5, 320, 80, 64, config=SPLIT),
    "int8 in groups of 256": Call("int8", 5, 768, 80, 256, config=SPLIT),
    "int8, steps of 256": Call("int8", 5, 896, 208, config=Config(warpgroups=2, block_k=256, stages=2, num_sms=3)),
    "nvfp4, steps of 256": Call("nvfp4", 5, 896, 208, 16, config=Config(block_k=256, stages=2, num_sms=3)),
    "nvfp4, a cluster of two": Call(
        "nvfp4", 40, 384, 400, 16, overall=True, config=Config(warpgroups=2, stages=2, cluster=2, num_sms=6)
    ),
    "nvfp4, two tiles of tokens": Call("nvfp4", 130, 256, 144, 16, config=Config(warpgroups=2, stages=3, num_sms=3)),
    "int8, prefill, a cluster of two": Call(
        "int8", 70, 384, 208, dtype="bfloat16", config=PrefillConfig(block_m=64, stages=2)
    ),
    "fp8 in groups of 128, prefill": Call("fp8", 130, 256, 80, 128, scales="bfloat16", config=PrefillConfig(stages=3)),
    "int8 in groups of 32, prefill": Call("int8", 65, 160, 80, 32, config=SMALL),
    "int8 in groups of 64, prefill": Call("int8", 65, 192, 80, 64, scales="float16", overall=True, config=SMALL),
    "int4 and a scale of all": Call("int4", 3, 384, 80, 128, "float16", zeros=True, overall=True, config=SPLIT),
    "int4 per output": Call("int4", 3, 416, 80, scales="bfloat16", zeros=True, overall=True, config=SPLIT),
}
PARAMETERS = [
    pytest.param(call, id=name, marks=[pytest.mark.slow] if i > 3 else [])
    for i, (name, call) in enumerate(CALLS.items())
]


@pytest.fixture
def interpreted(monkeypatch):
    """Calls of the kernel are interpreted; what the fixture gives fails on a race in the one that made its argument.

    JAX 0.11 exports neither the interpreter's state nor its races.
    """
    jax.clear_caches()  # the kernels are jitted: a trace of another test must not stand in for this one
    callbacks = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks")
    interpret = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call")
    callbacks.reset_gpu_interpret_mode_state()
    run_together = mosaic_sm90.run_together

    def run(operands, **options):
        return run_together(operands, **options | {"interpret": compat.interpret_params(detect_races=True)})

    def without_races(results):
        jax.block_until_ready(results)
        assert not interpret.get_races().races_found, "race detected"
        return results

    monkeypatch.setattr(mosaic_sm90, "run_together", run)
    monkeypatch.setattr(compat, "missing_hopper", lambda: None)
    yield without_races
    callbacks.reset_gpu_interpret_mode_state()


@pytest.mark.parametrize("call", PARAMETERS)
def test_interpreted_kernel_agrees_with_the_oracle(interpreted, call):
    call.check(interpreted(call.run()))


@pytest.mark.slow
@pytest.mark.parametrize("format", CODES)
@pytest.mark.parametrize("config", [SPLIT, SMALL], ids=["decode", "prefill"])
def test_every_code_by_itself(interpreted, format, config):
    """What the benchmark checks on a GPU: each weight read by a row of a unit matrix, exactly."""
    shape, arguments = benchmark.every_code(format, 128)
    out = interpreted(shape.product(config)(arguments["x"], 0, arguments))
    np.testing.assert_array_equal(np.asarray(out, np.float64), benchmark.expected(shape, arguments, 0))


def stacked(format, *, outputs=80, inputs=128, layers=3, **options):
    """Rounded weights of some layers, those but the middle one poisoned."""
    rng = np.random.default_rng(outputs)
    weights = [round_weight(jnp.asarray(rng.normal(size=(outputs, inputs)), "f4"), format, **options) for _ in "012"]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)
    poisoned = stack.scales.at[::2].set(jnp.nan)
    return dataclasses.replace(stack, scales=poisoned), weights[1]


@pytest.mark.parametrize("format", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_rounded_activations_agree_with_the_product_in_eight_bits(interpreted, format):
    """Of float32 activations too: their codes are what the kernel gets."""
    stack, middle = stacked(format, activations=format)
    if format == "fp8":
        fixed = jnp.asarray([1.0, 0.01, 1.0], jnp.float32)
        stack = dataclasses.replace(stack, activation_scale=fixed)
        middle = dataclasses.replace(middle, activation_scale=fixed[1])
    x = jax.random.normal(jax.random.key(9), (2, 3, 128)) * jnp.logspace(-2, 2, 3)[:, None]
    found = interpreted(quantized_matmul(x, stack.of_layer(1), implementation="mosaic"))
    expected = quantized_matmul(x, middle, implementation="xla")
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "format, outputs",
    [
        ("int8", (80, 64)),
        pytest.param("fp8", (80, 272, 64), marks=pytest.mark.slow),
        pytest.param("nvfp4", (80, 272), marks=pytest.mark.slow),
    ],
)
def test_products_of_several_weights_in_one_launch(interpreted, format, outputs):
    """Scales that wait for the sums are those of the weight whose tile it is."""
    x = jax.random.normal(jax.random.key(9), (3, 128), jnp.bfloat16)
    stacks, middles = zip(*(stacked(format, outputs=count) for count in outputs), strict=True)
    layers = [stack.of_layer(1) for stack in stacks]
    found = interpreted(quantized_matmuls(x, layers, dtype=jnp.float32, implementation="mosaic"))
    for out, middle in zip(found, middles, strict=True):
        expected = quantized_matmul(x, middle, dtype=jnp.float32, implementation="reference")
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", benchmark.FORMATS)
@pytest.mark.parametrize("rows", [1, 40, 130])
def test_automatic_configurations_agree_with_the_oracle(interpreted, name, rows):
    shape = benchmark.of_format(name, rows=rows, outputs=208, inputs=256)
    arguments = shape.arguments()
    out = np.asarray(interpreted(shape.product("mosaic")(arguments["x"], 1, arguments)))
    expected = benchmark.expected(shape, arguments, 1)
    assert np.linalg.norm(out - expected) < 1e-6 * np.linalg.norm(expected)


def test_the_benchmark_rounds_weights_as_the_kernel_does(interpreted):
    """By a scale in two parts: the nearest bfloat16 number is another for some weights, and one part alone for most."""
    shape = benchmark.of_format("fp8 by block", rows=513, outputs=64, inputs=256, layers=1)
    assert mosaic_sm90.rounds_weight(shape.form())
    arguments = shape.arguments()
    out = np.asarray(interpreted(shape.product("mosaic")(arguments["x"], 0, arguments)))
    expected = benchmark.expected(shape, arguments, 0)
    assert np.linalg.norm(out - expected) < 1e-6 * np.linalg.norm(expected)


# ---------------------------------------------------------------------------------------------------------------
# Configurations, lowering


@pytest.mark.parametrize("name", benchmark.FORMATS)
@pytest.mark.parametrize("rows", [1, 8, 32, 33, 64, 65, 128, 300, 1000])
def test_automatic_configurations_fit_into_shared_memory(name, rows):
    for outputs in (256, 4096, 12288):
        form = benchmark.of_format(name, rows=rows, outputs=outputs).form()
        config = mosaic_sm90.heuristic_config(form)
        assert config.smem_bytes(form) <= compat.SHARED_MEMORY_BYTES and config.stages >= 2


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_call_lowers_for_cuda_and_takes_the_whole_stack(call):
    run = lambda x, parts, layer: mosaic_sm90.run(  # noqa: E731
        x, **parts, layer=layer, group_size=call.group_size, format=call.format, dtype=call.dtype, config=call.config
    )
    parts = jax.tree.map(lambda part: jax.ShapeDtypeStruct(part.shape, part.dtype), call.parts())
    traced = jax.jit(run).trace(call.x(), parts, jnp.int32(1))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (kernel,) = [line for line in text.splitlines() if "mosaic_gpu" in line]
    assert f"tensor<3x{'x'.join(map(str, parts['codes'].shape[1:]))}x" in kernel


# ---------------------------------------------------------------------------------------------------------------
# What is taken, and what is not


BASE: dict[str, Any] = {"format": "int8", "group_size": -1, "dtype": "float32"}


@pytest.mark.parametrize(
    "format, change, reason",
    [
        ("int8", {"codes": jnp.zeros((3, 80, 256), jnp.uint8)}, "needs int8 codes of 256 inputs; got uint8"),
        ("fp8", {"codes": jnp.zeros((3, 80, 256), jnp.float8_e5m2)}, "needs float8_e4m3fn codes of 256 inputs"),
        ("nvfp4", {"codes": jnp.zeros((3, 80, 256), jnp.uint8)}, "uint8 codes of 256 inputs, two to a byte"),
        ("int8", {"scales": jnp.zeros((3, 1, 80), jnp.float8_e4m3fn)}, "got float8_e4m3fn"),
        ("nvfp4", {"scales": jnp.zeros((3, 16, 80), jnp.float16)}, "needs nvfp4 scales in ('float8_e4m3fn',)"),
        ("nvfp4", {"scales": jnp.zeros((3, 8, 80), jnp.float8_e4m3fn)}, "whole groups of 16"),
        ("fp8", {"scales": jnp.zeros((3, 4, 80)), "group_size": -1}, "got scales of 4 groups"),
        ("int8", {"scales": jnp.zeros((3, 16, 80)), "group_size": 16}, "got 16"),
        ("int8", {"zeros": jnp.zeros((3, 1, 80), jnp.int8)}, "no zeros of int8 codes"),
        ("nvfp4", {"global_scale": jnp.ones(3, jnp.bfloat16)}, "float32 scale of all weights; got bfloat16"),
        ("int3", {}, "knows codes of ['int4', 'int8', 'fp8', 'nvfp4']; got 'int3'"),
    ],
)
@pytest.mark.usefixtures("plain_calls")
def test_what_is_not_supported_is_named(format, change, reason):
    call = Call("int8" if format == "int3" else format, 2, 256, 80, 16 if format == "nvfp4" else -1)
    arguments = {"x": call.x(), **call.parts(), "layer": 0, "group_size": call.group_size, "format": format} | change
    assert reason in mosaic_sm90.unsupported(**arguments)
    with pytest.raises(NotImplementedError, match=re.escape(reason)):
        mosaic_sm90.run(**arguments)


def test_inputs_that_do_not_fit_are_named():
    explain = lambda call: mosaic_sm90.unsupported(  # noqa: E731
        call.x(), **call.parts(), layer=0, group_size=call.group_size, format=call.format
    )
    assert "multiple of 16 inputs; got 248" in explain(Call("int8", 2, 248, 80))
    assert "multiple of 32 inputs; got 240" in explain(Call("nvfp4", 2, 240, 80, 16))
    assert "multiple of 16 outputs; got 200" in explain(Call("nvfp4", 2, 256, 200, 16))
    assert "needs groups of (32, 64)" in explain(Call("fp8", 2, 192, 80, 96))


@pytest.mark.parametrize("name", benchmark.FORMATS)
def test_the_automatic_choice_asks_for_the_kind_of_the_call(monkeypatch, name):
    """Of every format, and of rounded activations apart from others; the kernel only where that kind was checked."""
    asked = []

    def preferred(op, kind, sizes, *, gradients):
        asked.append(kind.name)
        return ("mosaic", "xla"), ""

    monkeypatch.setattr(dispatch, "preferred", preferred)
    monkeypatch.setattr(dispatch, "undivided", lambda **_: None)
    monkeypatch.setattr(compat, "missing_hopper", lambda: None)
    shape = benchmark.of_format(name, rows=8, outputs=64, inputs=256)
    weight = shape.tensor(shape.avals()).of_layer(0)
    x = jax.ShapeDtypeStruct((8, 256), jnp.bfloat16)
    assert api.automatic(x, weight, dtype=jnp.bfloat16) == ("mosaic", "")
    result = "bfloat16" if shape.activations is None else "float32"
    codes = shape.name.split("64x256 ")[1].split(" to ")[0]
    assert asked == [f"{codes} to {result}"]
    float32 = jax.ShapeDtypeStruct((8, 256), jnp.float32)
    expected = "xla" if shape.activations is None else "mosaic"
    assert api.automatic(float32, weight, dtype=jnp.float32)[0] == expected


def test_no_committed_check_covers_what_never_ran_on_a_gpu():
    table = dispatch.table()["quantized_matmul"]
    covered = {kind for row in table.values() for kinds in row["checked"].values() for kind in kinds["forward"]}
    for shape in benchmark.check_formats():
        weight = shape.tensor(shape.avals()).of_layer(0)
        implementation, reason = api.automatic(shape.avals()["x"], weight, dtype=shape.dtype)
        if not any(kind in shape.name for kind in covered):
            assert implementation == "xla" and reason


def test_gradients_are_those_of_xla(interpreted):
    stack, _ = stacked("int8", outputs=64)
    weight = dataclasses.replace(stack, scales=jnp.ones_like(stack.scales)).of_layer(1)
    x = jax.random.normal(jax.random.key(1), (2, 128), jnp.bfloat16)

    def gradient(implementation):
        def value(x):
            out = quantized_matmul(x, weight, dtype=jnp.float32, implementation=implementation)
            return (out * jnp.arange(64)).sum()

        return jax.grad(value)(x)

    np.testing.assert_array_equal(gradient("mosaic"), gradient("xla"))


# ---------------------------------------------------------------------------------------------------------------
# Compiled for a GPU


PROGRAM = """
import re, sys
import jax, jax.numpy as jnp
jax.config.update("jax_platforms", "cpu")
from benchmarks import quantized_matmul as benchmark
from pallas_kernels.compile_gate import hopper_sharding

shape = benchmark.of_format(sys.argv[1], rows=int(sys.argv[2]), layers=4)

def step(x, arguments):
    def body(x, layer):
        return jnp.tanh(shape.product("mosaic")(x, layer, arguments)).astype(x.dtype), None
    return jax.lax.scan(body, x, jnp.arange(shape.layers))[0]

gpu = hopper_sharding()
avals = shape.avals()
avals = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=gpu), avals)
from pallas_kernels import compat
compat.missing_hopper = lambda: None
compiled = jax.jit(step).trace(avals["x"], avals).lower(lowering_platforms=("cuda",)).compile()
text = compiled.as_text()
for name, dtype in (("codes", "u8|s8|f8e4m3fn"), ("scales", "f32|f8e4m3fn")):
    dims = ",".join(map(str, avals[name].shape))
    size = 1
    for length in avals[name].shape:
        size *= length
    made = re.findall(rf"= (?:{dtype})\\[(?:{dims}|{size})\\]\\S* ([a-z-]+)\\(", text)
    assert made, name
    assert set(made) <= {"parameter", "get-tuple-element", "bitcast"}, (name, made)
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_PLUGIN, reason="needs the extra gpu-compile")
@pytest.mark.parametrize("name", benchmark.FORMATS)
@pytest.mark.parametrize("rows", [1, 1024])
def test_a_scan_copies_no_weights(name, rows):
    """No codes or scales are made by anything but a parameter."""
    command = [sys.executable, "-c", PROGRAM, name, str(rows)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


# ---------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("format", CODES)
@pytest.mark.parametrize("rows", [128, 129])
def test_every_code_by_itself_on_a_gpu(format, rows):
    if (reason := compat.missing_hopper()) is not None:
        pytest.skip(reason)
    row = benchmark.check_every_code(format, rows)
    assert row["passes"], row


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*benchmark.check_formats()], ids=lambda shape: shape.name)
def test_on_a_gpu(shape):
    if (reason := compat.missing_hopper()) is not None:
        pytest.skip(reason)
    row = benchmark.check_shape(shape, shape.arguments())
    assert row["passes"], row
