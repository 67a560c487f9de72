"""The Hopper kernel of decode_attention: interpreted with race detection, lowered for CUDA, explained; its work list.

The interpreter is slow (10 to 70 ms per tile and head), so sizes are a few tiles; what varies is the edge. By default
few cases run; the others are slow.
"""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat, masks
from pallas_kernels.decode_attention import mosaic_sm90, reference
from pallas_kernels.decode_attention.mosaic_sm90 import Config
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
    window: int | None = None
    num_sinks: int = 0
    config: Config = SMALL

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
            positions = jnp.asarray(np.where(rng.random(positions.shape) < 0.1, -1, positions), jnp.int32)
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
    "one token, two splits": Call((150,)),
    "int8 per token, more rows than one warpgroup": Call((190,), 17, codes="int8", per_token=True, own=masks.Causal()),
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

    def __init__(self):
        package = "jax._src.pallas.mosaic_gpu.interpret"
        self.calls = importlib.import_module(f"{package}.interpret_pallas_call")
        self.callbacks = importlib.import_module(f"{package}.gpu_callbacks")

    def reset(self):
        self.callbacks.reset_gpu_interpret_mode_state()

    def run(self, call):
        """The kernel's results; fails on a race."""
        q, k, v, operands = call.arguments()
        results = mosaic_sm90.run(
            q, k, v, operands=operands, own_mask=call.own_mask, scale=0.3, config=call.config,
            interpret=compat.interpret_params(detect_races=True),
        )  # fmt: skip
        results = jax.block_until_ready(results)
        assert not self.calls.get_races().races_found, "race detected"
        return results


@pytest.fixture
def interpreter():
    jax.clear_caches()  # the kernel is jitted: a trace of another test must not stand in for this one
    found = Interpreter()
    found.reset()
    yield found
    found.reset()


@pytest.mark.parametrize("call", PARAMETERS)
def test_interpreted_kernel_agrees_with_the_definition(interpreter, call):
    q, k, v, operands = call.arguments()

    def wide(x):
        return x.astype(jnp.float32) if x is not None and x.dtype in (jnp.bfloat16, jnp.float16) else x

    exact = operands._replace(own_k=wide(operands.own_k), own_v=wide(operands.own_v))
    expected, expected_lse = reference.run(*map(wide, (q, k, v)), operands=exact, own_mask=call.own_mask, scale=0.3)
    out, lse = interpreter.run(call)
    assert out.dtype == q.dtype and lse.dtype == jnp.float32
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
