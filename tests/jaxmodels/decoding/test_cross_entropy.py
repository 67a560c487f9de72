import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodels.decoding import cross_entropy
from jaxmodels.decoding.cross_entropy import default_chunk_size, token_nll


def problem(M=37, D=8, V=29, dtype=jnp.float32, seed=0):
    k = jax.random.split(jax.random.key(seed), 4)
    states = jax.random.normal(k[0], (M, D), dtype)
    head = jax.random.normal(k[1], (D, V), dtype)
    targets = jax.random.randint(k[2], (M,), 0, V)
    return states, head, targets, jax.random.uniform(k[3], (M,))


def head_fn(head):
    return lambda s: jnp.einsum("md,dv->mv", s, head, preferred_element_type=jnp.float32)


def oracle(states, head, targets):
    logits = states.astype(jnp.float32) @ head.astype(jnp.float32)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets), jax.nn.logsumexp(logits, -1)


@pytest.mark.smoke
@pytest.mark.parametrize("chunk", [None, 1, 5, 8, 36, 37, 100])
def test_values_and_gradients_equal_optax(chunk):
    states, head, targets, weight = problem()

    def ours(states, head):
        nll, z = token_nll(head_fn(head), states, targets, chunk_size=chunk, z_loss=0.3)
        return jnp.sum(weight * nll) + jnp.sum(weight**2 * z), (nll, z)

    def theirs(states, head):
        nll, lse = oracle(states, head, targets)
        return jnp.sum(weight * nll) + jnp.sum(weight**2 * 0.3 * lse**2), (nll, 0.3 * lse**2)

    grads, outputs = jax.jit(jax.grad(ours, (0, 1), has_aux=True))(states, head)
    want_grads, want = jax.grad(theirs, (0, 1), has_aux=True)(states, head)
    for a, b in zip(outputs + grads, want + want_grads):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_suppressed_ids_get_no_probability_and_no_gradient():
    states, head, targets, _ = problem()
    targets = jnp.where(targets == 3, 4, targets)
    for chunk in (None, 8):
        f = lambda h: token_nll(head_fn(h), states, targets, chunk_size=chunk, suppress=(3,))[0].sum()  # noqa: B023, E731
        value, grad = jax.value_and_grad(f)(head)
        kept = jnp.delete(head, 3, axis=1)
        want = oracle(states, kept, jnp.where(targets > 3, targets - 1, targets))[0].sum()
        np.testing.assert_allclose(value, want, rtol=1e-5)
        assert not grad[:, 3].any() and jnp.isfinite(grad).all()


def test_bfloat16_weight_gradient_is_summed_in_float32():
    states, head, targets, _ = problem(M=1024, D=16, V=33, dtype=jnp.bfloat16)
    f = lambda h, chunk: token_nll(head_fn(h), states, targets, chunk_size=chunk)[0].sum()  # noqa: E731
    exact = jax.grad(lambda h: oracle(states, h, targets)[0].sum())(head.astype(jnp.float32))
    error = jnp.abs(jax.grad(f)(head, 4).astype(jnp.float32) - exact).max() / jnp.abs(exact).max()
    assert error < 2**-8  # one rounding to bfloat16; summing 256 chunks in bfloat16 gives about 4e-2


@pytest.mark.parametrize("chunk, allowed", [(128, 0.2), (None, 4.0)])
def test_logits_of_all_positions_are_never_held(chunk, allowed):
    """M x V float32 is 32 MiB here; weights and their gradients are small beside it."""
    M, D, V = 4096, 16, 2048
    states = jax.ShapeDtypeStruct((M, D), jnp.float32)
    head = jax.ShapeDtypeStruct((D, V), jnp.float32)
    targets = jax.ShapeDtypeStruct((M,), jnp.int32)
    f = jax.grad(lambda s, h, t: token_nll(head_fn(h), s, t, chunk_size=chunk)[0].sum(), (0, 1))
    used = jax.jit(f).lower(states, head, targets).compile().memory_analysis().temp_size_in_bytes
    full = M * V * 4
    assert used < allowed * full
    if chunk is None:
        assert used >= full  # the fast path keeps the logits: the measure sees them


def test_default_chunk_bounds_logits(monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOGIT_ELEMENTS", 1000)
    assert default_chunk_size(10, 100) == 10
    assert default_chunk_size(96, 100) == 8  # ten rows fit; 96 = 12 * 8
    assert default_chunk_size(97, 100) == 10  # prime: padded
    assert default_chunk_size(5, 10_000) == 1
    states, head, targets, _ = problem(M=97, V=100)
    np.testing.assert_allclose(
        token_nll(head_fn(head), states, targets)[0], oracle(states, head, targets)[0], rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow  # many programs to compile
def test_closure_over_jit_constants_and_tracers():
    """A head closing over nothing traced, and one inside an outer scan."""
    states, head, targets, _ = problem(M=12)
    want = oracle(states, head, targets)[0]
    np.testing.assert_allclose(token_nll(head_fn(head), states, targets, chunk_size=4)[0], want, atol=1e-5)

    def loss(h):
        return token_nll(head_fn(h), states, targets, chunk_size=4)[0].sum()

    def step(h, _):
        return h - 0.1 * jax.grad(loss)(h), None

    plain = head
    for _ in range(3):
        plain = plain - 0.1 * jax.grad(lambda h: oracle(states, h, targets)[0].sum())(plain)
    np.testing.assert_allclose(jax.lax.scan(step, head, None, length=3)[0], plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [({"chunk_size": 0}, "chunk_size"), ({"z_loss": -1.0}, "z_loss"), ({"suppress": (29,)}, "suppress")],
)
def test_bad_arguments_are_named(options, message):
    states, head, targets, _ = problem()
    with pytest.raises(ValueError, match=message):
        token_nll(head_fn(head), states, targets, **options)
