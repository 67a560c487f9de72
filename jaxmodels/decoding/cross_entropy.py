"""Next-token and masked-token cross-entropy that never holds the float32 logits of all positions.

Letters: M positions (any flattened set of tokens), D model dim, V vocab, C rows of a chunk.

With a vocabulary of 150 000 the float32 logits of 8 192 positions take 5 GB, their gradient as much
again, while the hidden states they come from take 64 MB. So the head is applied to C rows at a time
and applied again in the backward pass. Small problems (M <= C) take one plain pass that keeps the
logits instead, which saves that second head matmul.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = ["default_chunk_size", "token_nll"]

# Float32 logits alive at once when `chunk_size` is None: 2**27 elements are 512 MiB. Larger chunks do
# not run faster (the head's weights are read once per chunk and 512 rows already hide that), smaller
# ones re-read a large head more often than they multiply with it.
LOGIT_ELEMENTS = 2**27

HeadFn = Callable[[Array], Array]


def default_chunk_size(num_rows: int, vocab_size: int) -> int:
    """Rows per chunk for M = `num_rows`: at most `LOGIT_ELEMENTS / vocab_size`, dividing M if possible."""
    most = max(1, LOGIT_ELEMENTS // vocab_size)
    if num_rows <= most:
        return max(1, num_rows)
    fewest = -(-num_rows // most)  # chunks
    for chunks in range(fewest, 2 * fewest + 1):
        if num_rows % chunks == 0:
            return num_rows // chunks
    return most  # M has no suitable divisor: the last chunk is padded


def token_nll(
    head_fn: HeadFn,
    states: Float[Array, "M D"],
    targets: Int[Array, "M"],
    *,
    chunk_size: int | None = None,
    z_loss: float = 0.0,
    suppress: tuple[int, ...] = (),
) -> tuple[Float[Array, "M"], Float[Array, "M"]]:
    """Negative log-likelihood of `targets` (nats) and the z-loss term, both float32, per position.

    nll = logsumexp(logits) - logits[target];  z = z_loss * logsumexp(logits)**2 (PaLM, section 5).

    Reductions over V run in float32. For M > chunk_size the gradient of everything `head_fn` closes over
    is summed over chunks in float32 and cast once at the end (a plain scan would sum in bfloat16 for
    bfloat16 weights), and only reverse-mode differentiation is defined. Chunk j holds rows
    j, j + n, j + 2n, ...: on a mesh whose devices own contiguous rows every device works on every chunk.

    Args:
        head_fn: maps hidden states [C, D] to logits [C, V]; may close over traced parameters.
        states: hidden states after the final norm, any float dtype.
        targets: ids in [0, V). A suppressed target has infinite loss; do not give it a weight.
        chunk_size: rows per head call; None: `default_chunk_size`.
        z_loss: coefficient of the z term; 0 returns zeros.
        suppress: ids whose logits count as -inf (a mask or padding id that may never be predicted).
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 or None; got {chunk_size}")
    if z_loss < 0.0:
        raise ValueError(f"z_loss must not be negative; got {z_loss}")
    num_rows, dim = states.shape
    vocab = jax.eval_shape(head_fn, jax.ShapeDtypeStruct((1, dim), states.dtype)).shape[-1]
    if bad := [i for i in suppress if not 0 <= i < vocab]:
        raise ValueError(f"suppress must hold ids in [0, {vocab}); got {bad}")
    chunk = default_chunk_size(num_rows, vocab) if chunk_size is None else chunk_size

    if num_rows <= chunk:
        nll, lse = _nll_lse(_suppressed(head_fn(states), suppress), targets)
    else:
        # Parameters inside `head_fn` become explicit arguments, so that our backward can return their
        # gradients. Arrays that are not being differentiated stay in the closure.
        pure_head, weights = jax.closure_convert(head_fn, jax.ShapeDtypeStruct((chunk, dim), states.dtype))
        chunks = -(-num_rows // chunk)
        pad = chunk * chunks - num_rows
        rows = jnp.pad(states, ((0, pad), (0, 0))).reshape(chunk, chunks, dim).swapaxes(0, 1)
        ids = jnp.pad(targets, (0, pad)).reshape(chunk, chunks).T
        nll, lse = _chunked(pure_head, suppress, tuple(weights), rows, ids)
        nll, lse = (x.T.reshape(-1)[:num_rows] for x in (nll, lse))
    return nll, z_loss * lse**2 if z_loss else jnp.zeros_like(nll)


def _suppressed(logits: Array, suppress: tuple[int, ...]) -> Array:
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    for i in suppress:
        logits = jnp.where(jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == i, -jnp.inf, logits)
    return logits


@jax.custom_vjp
def _nll_lse(logits: Array, targets: Array) -> tuple[Array, Array]:
    lse = jax.nn.logsumexp(logits, axis=-1)
    return lse - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0], lse


def _nll_lse_forward(logits: Array, targets: Array):
    nll, lse = _nll_lse(logits, targets)
    return (nll, lse), (logits, targets, lse)


def _nll_lse_backward(residuals, cotangents):
    logits, targets, lse = residuals
    return _logit_gradient(logits, targets, lse, *cotangents), None


# Written out because autodiff turns the gather of the target into a scatter over [M, V]; this is one
# elementwise pass that fuses into the head's transposed matmuls.
_nll_lse.defvjp(_nll_lse_forward, _nll_lse_backward)


def _logit_gradient(logits: Array, targets: Array, lse: Array, d_nll: Array, d_lse: Array) -> Array:
    is_target = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 1) == targets[:, None]
    softmax = jnp.exp(logits - lse[:, None])
    return (d_nll + d_lse)[:, None] * softmax - jnp.where(is_target, d_nll[:, None], 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(head, suppress, weights, rows, ids):
    """(nll, lse), both [n, C], of rows [n, C, D] and ids [n, C]."""

    def one(_, chunk):
        return None, _nll_lse(_suppressed(head(chunk[0], *weights), suppress), chunk[1])

    return jax.lax.scan(one, None, (rows, ids))[1]


def _chunked_forward(head, suppress, weights, rows, ids):
    nll, lse = _chunked(head, suppress, weights, rows, ids)
    return (nll, lse), (weights, rows, ids, lse)


def _chunked_backward(head, suppress, residuals, cotangents):
    weights, rows, ids, lse = residuals

    def one(sums, chunk):
        states, targets, chunk_lse, d_nll, d_lse = chunk
        logits, transpose = jax.vjp(lambda s, w: _suppressed(head(s, *w), suppress), states, weights)
        d_states, d_weights = transpose(_logit_gradient(logits, targets, chunk_lse, d_nll, d_lse))
        return jax.tree.map(lambda a, g: a + g.astype(a.dtype), sums, d_weights), d_states

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32)), weights)
    sums, d_rows = jax.lax.scan(one, zeros, (rows, ids, lse, *cotangents))
    return jax.tree.map(lambda s, w: s.astype(w.dtype), sums, weights), d_rows, None


_chunked.defvjp(_chunked_forward, _chunked_backward)
