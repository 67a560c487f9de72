import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.layers import embed


def test_gradient_equals_that_of_indexing():
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(11, 4)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 11, (3, 7)))
    weight = jnp.asarray(rng.normal(size=(3, 7, 4)), jnp.float32)
    got = jax.grad(lambda t: jnp.sum(embed(t, tokens) * weight))(table)
    want = jax.grad(lambda t: jnp.sum(t[tokens] * weight))(table)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_a_frequent_token_keeps_its_whole_gradient_in_bfloat16():
    """4096 gradients of 1 sum to 256 when added one by one in bfloat16 (256 + 1 rounds to 256)."""
    table = jnp.zeros((3, 2), jnp.bfloat16)
    tokens = jnp.full((8, 512), 2)
    gradient = jax.grad(lambda t: jnp.sum(embed(t, tokens).astype(jnp.float32)))(table)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(gradient, np.float32), [[0, 0], [0, 0], [4096, 4096]])
