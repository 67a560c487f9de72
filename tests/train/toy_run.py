"""A run of `train.loop.fit` on a toy model, small enough to be killed often; a program and a module.

    python toy_run.py '{"directory": "...", "steps": 20, ...}'

prints the final loss records as JSON. The task: next token = (3 * token + 1) mod V, from an embedding and an MLP.
"""

import functools
import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxmodels.decoding.cross_entropy import token_nll
from train import mesh as meshes
from train.config import MeshConfig, OptimConfig, RunConfig
from train.loop import Weights, fit

V, D, F, T = 32, 16, 64, 12


class Rows:
    """Batches of random rows with a position as state, like DATA's iterator but in memory."""

    def __init__(self, rows, part=(0, 1), seed=0, poison=(), delay=0.0, hook=None):
        self.rows, self.part, self.seed, self.poison, self.delay = rows, part, seed, poison, delay
        self.hook = hook  # called with the number of batches so far
        self.index = 0

    def __next__(self):
        rng = np.random.default_rng((self.seed, self.index))
        columns = [rng.integers(0, V, (self.rows, 1))]
        for _ in range(T - 1):
            columns.append((3 * columns[-1] + 1) % V)
        tokens = np.concatenate(columns, 1).astype(np.int32)
        weights = rng.random((self.rows, T)).astype(np.float32)
        if self.index in self.poison:
            weights[0, 0] = np.nan
        self.index += 1
        time.sleep(self.delay)
        if self.hook is not None:
            self.hook(self.index)
        index, count = self.part
        mine = slice(index * self.rows // count, (index + 1) * self.rows // count)
        return {"tokens": tokens[mine], "weights": weights[mine]}

    def get_state(self):
        return {"index": self.index}

    def set_state(self, state):
        self.index = state["index"]


def init(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"embed": (V, D), "up": (D, F), "down": (F, D), "final_norm": (D,)}
    return {k: jnp.asarray(rng.normal(0, 0.3, s), jnp.float32) for k, s in shapes.items()}


SPECS = {
    "embed": PartitionSpec("tensor", "fsdp"),
    "up": PartitionSpec("fsdp", "tensor"),
    "down": PartitionSpec("tensor", "fsdp"),
    "final_norm": PartitionSpec(None),
}


def loss_fn(params, batch, key, *, noise=0.01):
    """Cross-entropy of all but the last position; noise on the states, so the key matters."""
    tokens = batch["tokens"]
    h = params["embed"][tokens]
    h = h + jnp.tanh(h @ params["up"]) @ params["down"]
    h = h * params["final_norm"] + noise * jax.random.normal(key, h.shape, h.dtype)
    targets, weights = jnp.roll(tokens, -1, 1), batch["weights"].at[:, -1].set(0.0)
    head = lambda x: jnp.einsum("md,vd->mv", x, params["embed"], preferred_element_type=jnp.float32)  # noqa: E731
    nll, _ = token_nll(head, h.reshape(-1, D), targets.reshape(-1), chunk_size=64)
    total = (weights.reshape(-1) * nll).sum()
    return total, weights.sum(), {"nll": total, "by_position": (nll.reshape(-1, T).sum(0), jnp.full(T, len(tokens)))}


def weights_for(mesh):
    params = init()
    shapes = {
        k: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=NamedSharding(mesh, SPECS[k])) for k, x in params.items()
    }
    return Weights(shapes, lambda: params)


def run(options, hook=None):
    """One `fit`; `options` are fields of RunConfig and a few more, JSON-able."""
    options = dict(options)
    mesh = meshes.make_mesh(MeshConfig(**options.pop("mesh", {})))
    optim = OptimConfig(**({"learning_rate": 3e-3, "warmup_steps": 3} | options.pop("optim", {})))
    identity = options.pop("identity", {"model": {"dim": D, "layers": 1}, "data": {"seed": 0}})
    stop_at, stop_rank = options.pop("stop_at", (None, None))  # SIGTERM to itself during this step
    if hook is None and stop_at is not None and jax.process_index() == stop_rank:
        hook = lambda index: os.kill(os.getpid(), signal.SIGTERM) if index == stop_at else None  # noqa: E731
    poison, delay = options.pop("poison", ()), options.pop("delay", 0.0)
    defaults = {"batch_size": 16, "log_every": 1, "checkpoint_every": 5, "steps": 20}
    loss = functools.partial(loss_fn, noise=options.pop("noise", 0.01))
    config = RunConfig(**(defaults | options | {"directory": Path(options["directory"])}))
    part = meshes.data_shard(mesh)
    data = Rows(config.batch_size, part, poison=poison, delay=delay, hook=hook)

    def held_out():
        rows = Rows(config.batch_size, part, seed=99)
        return (next(rows) for _ in range(3))

    return fit(config, optim, mesh, weights_for(mesh), loss, data, identity=identity, eval_data=held_out)


if __name__ == "__main__":
    result = run(json.loads(sys.argv[1]))
    if jax.process_index() == 0:
        print(json.dumps({"step": int(result.state.step), "interrupted": result.interrupted}))
