import jax.numpy as jnp
import numpy as np
import pytest

from train.drift import weight_drift


def test_drift_is_the_mean_absolute_change_of_the_projections():
    def tree(q, norm, up, embed):
        return {
            "embed": jnp.full((3, 2), embed),
            "layers": {
                "attention": {"q": jnp.asarray(q), "q_norm": jnp.full((2, 2), norm), "q_bias": jnp.full((2, 2), norm)},
                "mlp": {"up": jnp.asarray(up)},
            },
        }

    before = tree(np.ones((2, 4)), 1.0, np.zeros((2, 3)), 0.0)
    q = np.ones((2, 4))
    q[0], q[1, :2] = 0.5, 3.0
    drift = weight_drift(tree(q, 9.0, np.full((2, 3), -2.0), 5.0), before)
    assert drift["drift_attention_layers"] == pytest.approx([0.5, 1.0])
    assert drift["drift_attention"] == pytest.approx(0.75)
    assert drift["drift_mlp"] == pytest.approx(2.0)
    assert set(drift) == {"drift_attention", "drift_attention_layers", "drift_mlp", "drift_mlp_layers"}
