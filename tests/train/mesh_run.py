"""Runs of a small model on several meshes, in one process or as one of several; prints their losses as JSON.

python mesh_run.py '{"model": "toy" or "decoder", "devices": 8, "directory": "...", "hosts": {...},
                     "meshes": {"a": {"fsdp": 8}, ...}, "more": {"a": {options of toy_run}, ...}}'
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from jaxmodels.qwen import build
from jaxmodels.qwen.config import QwenConfig
from train import distributed
from train import mesh as meshes
from train.config import HostsConfig, MeshConfig, OptimConfig, RunConfig
from train.loop import fit, weights_of
from train.objectives.next_token import make_next_token_loss

T = 16


class Rows:
    """Packed rows, two documents each, in memory."""

    def __init__(self, rows, part):
        self.rows, self.part, self.index = rows, part, 0

    def __next__(self):
        rng = np.random.default_rng(self.index)
        self.index += 1
        shape = (self.rows, T)
        cut = rng.integers(1, T, (self.rows, 1))
        second = np.arange(T) >= cut
        batch = {
            "tokens": np.cumsum(rng.integers(0, 3, shape), axis=1).astype(np.int32) % 29,
            "segment_ids": (1 + second).astype(np.int32),
            "positions": (np.arange(T) - cut * second).astype(np.int32),
            "loss_mask": rng.random(shape) < 0.8,
        }
        index, count = self.part
        return {k: x[index * self.rows // count : (index + 1) * self.rows // count] for k, x in batch.items()}

    def get_state(self):
        return {"index": self.index}

    def set_state(self, state):
        self.index = state["index"]


def decoder(directory, mesh, accumulate=1):
    mesh = meshes.make_mesh(MeshConfig(**mesh))
    config = QwenConfig.tiny(vocab_size=32, dim=32, layers=2, heads=4, kv_heads=2, head_dim=16, mlp_dim=64)
    lm = build(config)
    return fit(
        RunConfig(directory=Path(directory), steps=20, batch_size=8, log_every=1, accumulate=accumulate),
        OptimConfig(learning_rate=1e-2, schedule="constant", warmup_steps=2),
        mesh,
        weights_of(lm, mesh, None),
        make_next_token_loss(lm),
        Rows(8, meshes.data_shard(mesh)),
        identity={"model": "tiny"},
    )


def toy(directory, mesh, **more):
    import toy_run

    return toy_run.run({"directory": str(directory), "mesh": mesh} | more)


def losses(directory):
    lines = (Path(directory) / "metrics.jsonl").read_text().splitlines()
    return [record["train/loss"] for line in lines if "train/loss" in (record := json.loads(line))]


def main(options):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options["devices"])
    distributed.initialize(HostsConfig(**options.get("hosts", {})))
    result = {}
    for name, mesh in options["meshes"].items():
        directory = Path(options["directory"]) / name
        {"toy": toy, "decoder": decoder}[options["model"]](directory, mesh, **options.get("more", {}).get(name, {}))
        if distributed.is_main():
            result[name] = losses(directory)
    if distributed.is_main():
        print("LOSSES " + json.dumps(result))
    if jax.process_count() > 1:
        jax.distributed.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
