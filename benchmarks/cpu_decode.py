"""This project against transformers on the same CPU cores: decode at batch 1 and 8, and a training step.

    python -m benchmarks.cpu_decode --peer-python /path/to/env/with/transformers/bin/python

Random float32 weights of one shape (default: Qwen2.5-0.5B). Both interpreters stay alive and take turns, one round
each, so that whatever else the machine does hits both alike. Every number is a median over rounds; the ratio is the
median of the paired ratios (above 1: this project is faster). `--alone` runs one side after the other instead: two
processes that allocate gigabytes per step can slow each other down through the memory that they give back and fault
in. Decode: greedy steps on a cache that a prompt has filled; a hand-written loop on both sides, without the overhead
of `generate`. Training: forward, mean cross-entropy of the next token, backward, AdamW.
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

FIELDS = ("vocab_size", "dim", "layers", "heads", "kv_heads", "head_dim", "mlp_dim", "qkv_bias", "tied_head")
TASKS = {"decode batch 1": 1, "decode batch 8": 8, "train": 0}


class Ours:
    """Rounds of this project; `path` is how layers run while decoding."""

    def __init__(self, shape: dict[str, Any], prompt: int, steps: int, train: tuple[int, int], path: str):
        import jax
        import jax.numpy as jnp

        from jaxmodels.qwen import QwenConfig, build

        self.jax, self.jnp = jax, jnp
        self.lm = build(QwenConfig(**shape))
        self.prompt, self.steps, self.train, self.path = prompt, steps, train, path

    def prepare(self, batch: int) -> Callable[[], None]:
        """Compiles one task (batch 0: training) and returns one round of it."""
        params = self.jax.jit(self.lm.init)(self.jax.random.key(0))
        return self._decode(params, batch) if batch else self._train(params)

    def _decode(self, params: Any, batch: int) -> Callable[[], None]:
        from jaxmodels.cache import KVCache

        jax, jnp, lm = self.jax, self.jnp, self.lm

        def prefill(params, tokens):
            hidden = lm.hidden(params, tokens, return_kv=True)
            cache = KVCache.init(lm.config, batch=batch, capacity=self.prompt + 512, dtype=jnp.float32)
            return cache.append(hidden.kv), lm.head(params, hidden.states[:, -1:]).argmax(-1).astype(jnp.int32)

        def step(params, cache, token):
            hidden = lm.hidden(params, token, cache=cache)
            return cache.append(hidden.kv), lm.head(params, hidden.states).argmax(-1).astype(jnp.int32)

        tokens = jnp.asarray(prompt_tokens(batch, self.prompt, lm.config.vocab_size), jnp.int32)
        state = list(jax.jit(prefill)(params, tokens))
        if self.path == "unrolled":
            params = lm.unstack(params)
        step = jax.jit(step, donate_argnums=1)

        def run() -> None:
            for _ in range(self.steps):
                state[:] = step(params, *state)
                state[1].block_until_ready()

        return run

    def _train(self, params: Any) -> Callable[[], None]:
        import optax

        from jaxmodels.decoding.cross_entropy import token_nll

        jax, jnp, lm = self.jax, self.jnp, self.lm
        batch, length = self.train
        tokens = jnp.asarray(prompt_tokens(batch, length, lm.config.vocab_size), jnp.int32)
        optimizer = optax.adamw(1e-5)

        def loss_fn(params):
            states = lm.hidden(params, tokens).states[:, :-1].reshape(-1, lm.config.dim)
            return token_nll(lambda states: lm.head(params, states), states, tokens[:, 1:].reshape(-1))[0].mean()

        def step(params, opt_state):
            loss, grads = jax.value_and_grad(loss_fn)(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        state = [params, jax.jit(optimizer.init)(params)]
        step = jax.jit(step, donate_argnums=(0, 1))

        def run() -> None:
            *state[:], loss = step(*state)
            loss.block_until_ready()

        return run


class Transformers:
    """Rounds of transformers with sdpa attention; runs in the other interpreter."""

    def __init__(self, shape: dict[str, Any], prompt: int, steps: int, train: tuple[int, int]):
        import torch
        import transformers

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.torch, self.transformers = torch, transformers
        self.shape, self.prompt, self.steps, self.train = shape, prompt, steps, train

    def prepare(self, batch: int) -> Callable[[], None]:
        torch, shape = self.torch, self.shape
        qwen2 = shape["qkv_bias"]
        config_class = self.transformers.Qwen2Config if qwen2 else self.transformers.Qwen3Config
        model_class = self.transformers.Qwen2ForCausalLM if qwen2 else self.transformers.Qwen3ForCausalLM
        config = config_class(
            vocab_size=shape["vocab_size"], hidden_size=shape["dim"], intermediate_size=shape["mlp_dim"],
            num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"],
            num_key_value_heads=shape["kv_heads"], head_dim=shape["head_dim"],
            tie_word_embeddings=shape["tied_head"], attn_implementation="sdpa", dtype="float32",
        )  # fmt: skip
        torch.manual_seed(0)
        model = model_class(config)
        tokens = torch.tensor(prompt_tokens(batch or self.train[0], self.prompt if batch else self.train[1],
                                            shape["vocab_size"]))  # fmt: skip
        if not batch:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=1e-4)

            def run() -> None:
                logits = model(tokens, use_cache=False).logits[:, :-1]
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                loss.item()

            return run

        model.eval()
        with torch.inference_mode():
            out = model(tokens, use_cache=True)
        state = [out.past_key_values, out.logits[:, -1:].argmax(-1)]

        def run() -> None:
            with torch.inference_mode():
                for _ in range(self.steps):
                    out = model(state[1], past_key_values=state[0], use_cache=True)
                    state[:] = out.past_key_values, out.logits[:, -1:].argmax(-1)

        return run


def prompt_tokens(batch: int, length: int, vocab_size: int) -> list[list[int]]:
    return [[(7919 * (row * length + i) + 17) % vocab_size for i in range(length)] for row in range(batch)]


def serve(side: Any) -> None:
    """Answers lines of JSON on stdin: {"prepare": batch} or {"round": true} with milliseconds."""
    run: Callable[[], None] = lambda: None  # noqa: E731
    for line in sys.stdin:
        request = json.loads(line)
        if "prepare" in request:
            run = lambda: None  # noqa: E731  (frees the last task first)
            run = side.prepare(request["prepare"])
            run()  # warm up, compile
        start = time.perf_counter()
        if "round" in request:
            run()
        print(json.dumps({"ms": 1e3 * (time.perf_counter() - start)}), flush=True)


class Worker:
    """One side in its own interpreter."""

    def __init__(self, python: str, arguments: list[str]):
        command = [python, __file__, *arguments]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, **request: Any) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.process.args} ended with code {self.process.wait()}")
        return json.loads(answer)["ms"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="interpreter that has torch and transformers")
    parser.add_argument("--preset", default="qwen2_5_0_5b", help="classmethod of QwenConfig")
    parser.add_argument("--layers", type=int, help="fewer layers than the preset has")
    parser.add_argument("--tasks", nargs="+", choices=[*TASKS], default=[*TASKS])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="decode steps per round")
    parser.add_argument("--prompt", type=int, default=64, help="tokens in the cache before the first round")
    parser.add_argument("--train-shape", type=int, nargs=2, default=(2, 128), metavar=("BATCH", "LENGTH"))
    parser.add_argument("--alone", action="store_true", help="one side after the other, each alone on the machine")
    parser.add_argument("--scanned", action="store_true", help="also measure our scanned decode path")
    parser.add_argument("--side", choices=("unrolled", "scanned", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work = (arguments.prompt, arguments.steps, tuple(arguments.train_shape))
    if arguments.side == "peer":
        serve(Transformers(json.loads(arguments.shape), *work))
        return
    if arguments.side:
        serve(Ours(json.loads(arguments.shape), *work, arguments.side))
        return
    if not arguments.peer_python:
        parser.error("--peer-python is needed")
    if arguments.rounds < 5:
        parser.error(f"--rounds must be at least 5; got {arguments.rounds}")

    from benchmarks import report
    from jaxmodels.qwen import QwenConfig

    config = getattr(QwenConfig, arguments.preset)()
    shape = {name: getattr(config, name) for name in FIELDS}
    shape["layers"] = arguments.layers or shape["layers"]
    shared = ["--shape", json.dumps(shape), "--prompt", str(arguments.prompt), "--steps", str(arguments.steps)]
    shared += ["--train-shape", *map(str, arguments.train_shape)]
    rows = []
    for task in arguments.tasks:
        batch = TASKS[task]
        sides = {"ours": (sys.executable, "unrolled"), "transformers": (arguments.peer_python, "peer")}
        if arguments.scanned and batch:
            sides["ours, scanned"] = (sys.executable, "scanned")
        times: dict[str, list[float]] = {name: [] for name in sides}
        loads = []
        for group in [[name] for name in sides] if arguments.alone else [[*sides]]:
            workers = {name: Worker(sides[name][0], ["--side", sides[name][1], *shared]) for name in group}
            for worker in workers.values():
                worker.ask(prepare=batch)
            for _ in range(arguments.rounds):
                loads.append(os.getloadavg()[0])
                for name, worker in workers.items():
                    times[name].append(worker.ask(round=True) / (arguments.steps if batch else 1))
            for worker in workers.values():
                worker.close()
        ratios = [theirs / ours for theirs, ours in zip(times["transformers"], times["ours"], strict=True)]
        row: dict[str, Any] = {"task": task, "times_faster": statistics.median(ratios), "paired_ratios": ratios}
        row |= {"load_average": loads}
        for name, values in times.items():
            row[name] = report.spread([ms / 1e3 for ms in values])
            print(f"{task:16s} {name:14s} {row[name]['median_ms']:9.1f} ms [{min(values):.1f}, {max(values):.1f}]")
        print(
            f"{task:16s} {'ratio':14s} {row['times_faster']:9.2f}    [{min(ratios):.2f}, {max(ratios):.2f}]", flush=True
        )
        rows.append(row)
    versions = "import json, torch, transformers; print(json.dumps([torch.__version__, transformers.__version__]))"
    peer = subprocess.run([arguments.peer_python, "-c", versions], capture_output=True, text=True, check=True).stdout
    torch, transformers = json.loads(peer.splitlines()[-1])
    report.write(
        "cpu_decode",
        {
            "shape": shape,
            "prompt": arguments.prompt,
            "train_shape": list(arguments.train_shape),
            "alone": arguments.alone,
            "peer": {"torch": torch, "transformers": transformers},
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
