"""Milliseconds per training step on a CPU: this project against transformers on PyTorch, alternating.

    python -m benchmarks.train_step --peer-python /path/to/python/with/torch --shape small

Both train the same decoder (Qwen3 structure, float32, random weights) with AdamW and clipping on rows of random
tokens: forward, backward, update. Ours is the step of `python -m train lm`, segment ids included. The two run in
processes of their own that answer in turns, so both see the same machine; the table gives medians over the rounds
and the median of the paired ratios.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# name -> decoder sizes and batch. "small" is about what the quickstart trains.
SHAPES = {
    "small": dict(vocab=2048, dim=256, layers=4, heads=4, kv_heads=2, head_dim=64, mlp=768, rows=16, length=128),
    "medium": dict(vocab=8192, dim=512, layers=6, heads=8, kv_heads=4, head_dim=64, mlp=1536, rows=8, length=256),
}


def ours(shape: dict) -> Callable[[], float]:
    """One step of this project as a function that returns the loss."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxmodels.qwen import build
    from jaxmodels.qwen.config import QwenConfig
    from train.config import OptimConfig
    from train.objectives.next_token import make_next_token_loss
    from train.optimizers import make_optimizer
    from train.state import TrainState
    from train.step import make_train_step

    config = QwenConfig(
        vocab_size=shape["vocab"], dim=shape["dim"], layers=shape["layers"], heads=shape["heads"],
        kv_heads=shape["kv_heads"], head_dim=shape["head_dim"], mlp_dim=shape["mlp"], qk_norm=True, tied_head=True,
    )  # fmt: skip
    lm = build(config)
    optimizer, schedule = make_optimizer(OptimConfig(schedule="constant"), 10**6)
    step: Any = make_train_step(make_next_token_loss(lm), optimizer, schedule=schedule)
    state = TrainState.create(lm.init(jax.random.key(0)), optimizer, jax.random.key(1))
    tokens = np.random.default_rng(0).integers(0, shape["vocab"], (shape["rows"], shape["length"]), dtype=np.int32)
    batch = {
        "tokens": jnp.asarray(tokens),
        "segment_ids": jnp.ones_like(tokens),
        "positions": jnp.broadcast_to(jnp.arange(shape["length"], dtype=jnp.int32), tokens.shape),
        "loss_mask": jnp.ones(tokens.shape, bool),
    }
    compiled = step.lower(state, batch).compile()
    box = [state]

    def run() -> float:
        box[0], metrics = compiled(box[0], batch)
        return float(metrics["loss"])

    return run


def peer(shape: dict) -> Callable[[], float]:
    """The same with transformers."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=shape["vocab"],
            hidden_size=shape["dim"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["kv_heads"],
            head_dim=shape["head_dim"],
            intermediate_size=shape["mlp"],
            tie_word_embeddings=True,
            attn_implementation="sdpa",
            use_cache=False,
        )
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, shape["vocab"], (shape["rows"], shape["length"]))

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return run


def answer(role: str, shape: dict) -> None:
    """Child process: a number of steps on stdin, their mean milliseconds on stdout."""
    run = {"ours": ours, "peer": peer}[role](shape)
    run()
    for line in sys.stdin:
        steps = int(line)
        before, cpu_before = time.perf_counter(), time.process_time()
        for _ in range(steps):
            loss = run()
        seconds, cpu_seconds = time.perf_counter() - before, time.process_time() - cpu_before
        print(json.dumps({"ms": 1e3 * seconds / steps, "cpu_ms": 1e3 * cpu_seconds / steps, "loss": loss}), flush=True)


def versions(python: str, *names: str) -> str:
    code = f"import importlib.metadata as m; print(' '.join(f'{{n}} {{m.version(n)}}' for n in {names!r}))"
    return subprocess.run([python, "-c", code], text=True, capture_output=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter with torch and transformers")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="steps per round")
    parser.add_argument("--role", choices=("ours", "peer"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    if options.role:
        answer(options.role, shape)
        return

    root = Path(__file__).resolve().parents[1]
    env = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    children = {
        role: subprocess.Popen(
            [python, str(Path(__file__).resolve()), "--role", role, "--shape", options.shape],
            env=env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for role, python in (("ours", sys.executable), ("peer", options.peer_python))
    }
    times: dict[str, list[float]] = {role: [] for role in children}
    cpu_times: dict[str, list[float]] = {role: [] for role in children}
    try:
        for number in range(options.rounds + 1):
            for role, child in children.items():
                assert child.stdin is not None and child.stdout is not None
                child.stdin.write(f"{options.steps}\n")
                child.stdin.flush()
                line = child.stdout.readline()
                if not line:
                    raise SystemExit(f"the process of {role!r} ended; see its error above")
                if number:  # the first round warms up
                    times[role].append(json.loads(line)["ms"])
                    cpu_times[role].append(json.loads(line)["cpu_ms"])
    finally:
        for child in children.values():
            child.stdin.close()  # type: ignore[union-attr]
            child.wait()

    tokens = shape["rows"] * shape["length"]
    print(f"shape {options.shape}: {shape}")
    print(f"{os.cpu_count()} CPU cores, float32, {options.rounds} paired rounds of {options.steps} steps")
    print(f"ours: {versions(sys.executable, 'jax')}; peer: {versions(options.peer_python, 'torch', 'transformers')}")
    print("| | median ms | min | max | tokens/s | CPU ms, all threads |\n|---|---|---|---|---|---|")
    for role, values in times.items():
        median = statistics.median(values)
        cpu = statistics.median(cpu_times[role])
        rate = 1e3 * tokens / median
        print(f"| {role} | {median:.1f} | {min(values):.1f} | {max(values):.1f} | {rate:,.0f} | {cpu:.0f} |")
    ratios = [p / o for o, p in zip(times["ours"], times["peer"], strict=True)]
    print(f"peer / ours, median of paired rounds: {statistics.median(ratios):.2f}")

    from benchmarks import report

    peer_versions = versions(options.peer_python, "torch", "transformers")
    rows = {role: {"ms": times[role], "cpu_ms": cpu_times[role]} for role in times}
    report.write(
        f"train_step-{options.shape}",
        {"shape": shape, "peer": peer_versions, "paired_ratios": ratios, "load_average": os.getloadavg()[0], **rows},
    )


if __name__ == "__main__":
    main()
