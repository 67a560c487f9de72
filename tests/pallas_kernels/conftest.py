"""An oracle of attention that shares nothing with the project, in NumPy and float64, and a strict interpreter."""

from collections.abc import Callable

import jax
import numpy as np
import pytest


def dense_attention(q, k, v, seen, scale, d_out=None, d_lse=None):
    """softmax(scale q k^T where seen) v for q [B, T, N, H], k [B, S, K, H], v [B, S, K, Hv], seen bool [B, T, S].

    Returns (out, lse [B, N, T]) and, with cotangents, (dq, dk, dv) too. Loops over rows and heads.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, num_queries, num_heads, _ = q.shape
    group = num_heads // k.shape[2]
    out, lse = np.zeros((*q.shape[:3], v.shape[3])), np.full((batch, num_heads, num_queries), -np.inf)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b, i, n in np.ndindex(batch, num_queries, num_heads):
        keys, head = np.flatnonzero(seen[b, i]), n // group
        if keys.size == 0:
            continue
        scores = scale * k[b, keys, head] @ q[b, i, n]
        weights = np.exp(scores - scores.max())
        p = weights / weights.sum()
        out[b, i, n] = p @ v[b, keys, head]
        lse[b, n, i] = np.log(weights.sum()) + scores.max()
        if d_out is None:
            continue
        dp = v[b, keys, head] @ np.asarray(d_out, np.float64)[b, i, n]
        ds = scale * p * (dp - p @ dp + (0.0 if d_lse is None else np.asarray(d_lse, np.float64)[b, n, i]))
        dq[b, i, n] = ds @ k[b, keys, head]
        dk[b, keys, head] += np.outer(ds, q[b, i, n])
        dv[b, keys, head] += np.outer(p, np.asarray(d_out, np.float64)[b, i, n])
    return (out, lse) if d_out is None else (out, lse, dq, dk, dv)


@pytest.fixture(scope="session")
def oracle() -> Callable:
    return dense_attention


@pytest.fixture(autouse=True, scope="session")
def no_reads_before_an_array():
    """The interpreter refuses reads beyond the end of an array but takes an index below 0 from its end.

    A GPU reads what lies before the array there, or faults. JAX 0.12 is left as it is: few kernels run there in tests.
    """
    if jax.__version_info__ >= (0, 12):
        yield
        return
    from jax._src.pallas.mosaic_gpu.interpret.shared_memory import GPUSharedMemory

    read = GPUSharedMemory.get_buffer_content

    def checked(self, key, access, *args, **kwargs):
        first = [index.start if isinstance(index, slice) else index for index in access.range]
        if min(first, default=0) < 0:
            raise IndexError(f"read of {key} at {first}, before the array")
        return read(self, key, access, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPUSharedMemory, "get_buffer_content", checked)
        yield
