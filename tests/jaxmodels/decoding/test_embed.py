import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.decoding.embed import embed
from jaxmodels.qwen import QwenConfig, build
from pallas_kernels.masks import Causal, Full


@pytest.mark.smoke
def test_embeddings_are_means_over_real_tokens_in_both_directions():
    lm = build(QwenConfig.tiny(layers=2))
    leaves, tree = jax.tree.flatten(jax.eval_shape(lm.init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.unflatten(tree, [jnp.asarray(rng.normal(size=s.shape) * 0.3, jnp.float32) for s in leaves])
    tokens = jnp.asarray(rng.integers(3, 97, (3, 8)), jnp.int32)
    lengths = jnp.asarray([8, 3, 0])
    for attention, mask in (("bidirectional", Full()), ("causal", Causal())):
        got = embed(lm, params, tokens, lengths, attention=attention)
        for row, length in enumerate((8, 3)):
            alone = lm.hidden(params, tokens[row : row + 1, :length], mask=mask).states[0].mean(0)
            np.testing.assert_allclose(got[row], alone, atol=1e-5)
        assert not np.asarray(got[2]).any()
        # What stands in the padding does not matter.
        other = embed(lm, params, tokens.at[1, 3:].set(5), lengths, attention=attention)
        np.testing.assert_allclose(got[1], other[1], atol=1e-6)
    unit = embed(lm, params, tokens, lengths, normalize=True)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), [1, 1, 0], atol=1e-5)
    with pytest.raises(ValueError, match="attention must be 'bidirectional' or 'causal'; got 'sideways'"):
        embed(lm, params, tokens, lengths, attention="sideways")
