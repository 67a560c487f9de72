"""Training, bounds and completions of the arms. Each distinct program is compiled once and serves all seeds.

Rows live on the device and a program runs many steps, so a small model is not held up by the host.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels import lora
from jaxmodels.decoding.block_diffusion import (
    BlockDecoding,
    BlockStream,
    RevealOptions,
    ar_nll,
    generate,
    nelbo,
)
from jaxmodels.decoding.block_diffusion.bound import suppressed_ids
from jaxmodels.decoding.block_diffusion.patterns import segment_positions
from train.ablation.arms import BLOCKS, Arm, Decode
from train.config import OptimConfig
from train.data.rows import RowStore
from train.drift import weight_drift
from train.loop import TrainingError, compute_dtype
from train.objectives.block_diffusion import make_block_diffusion_loss
from train.objectives.next_token import make_next_token_loss
from train.optimizers import make_optimizer
from train.state import TrainState
from train.step import make_train_step

EVAL_BATCH = 32
"""Held-out rows in memory at once."""


def reveals(new_tokens: int) -> dict[str, RevealOptions]:
    """The rules by which completions are revealed, by name."""
    rules = {"one token": RevealOptions()}
    rules |= {f"threshold {value:g}": RevealOptions(threshold=value) for value in (0.9, 0.7, 0.5)}
    return rules | {f"{count} tokens": RevealOptions(steps=max(1, new_tokens // count)) for count in (2, 4)}


class Rows:
    """A split of a row store as arrays: on the device everything but the order in which rows are taken."""

    def __init__(self, store: RowStore, *, max_rows: int | None = None):
        chosen = np.arange(len(store))
        if max_rows is not None and max_rows < len(store):
            chosen = np.linspace(0, len(store) - 1, max_rows).round().astype(int)
        dtype = np.uint16 if store.manifest["vocab_size"] <= 2**16 else np.int32
        tokens = np.empty((len(chosen), store.seq_len), dtype)
        segments = np.empty((len(chosen), store.seq_len), np.uint16)
        for i, index in enumerate(chosen):
            row = store[int(index)]
            tokens[i], segments[i] = row["tokens"], row["segment_ids"]
        self.arrays = {"tokens": jnp.asarray(tokens), "segment_ids": jnp.asarray(segments)}

    def __len__(self) -> int:
        return len(self.arrays["tokens"])

    def order(self, steps: int, batch_size: int, seed: int) -> np.ndarray:
        """Row numbers [steps, batch_size]: shuffled passes over all rows, one after the other."""
        rng = np.random.default_rng(seed)
        needed = steps * batch_size
        passes = [rng.permutation(len(self)) for _ in range(-(-needed // len(self)))]
        return np.concatenate(passes)[:needed].reshape(steps, batch_size).astype(np.int32)


def take(arrays: dict[str, jax.Array], chosen: jax.Array) -> dict[str, jax.Array]:
    """A batch as objectives take it: the stores of this recipe hold no prompts, so all real tokens are targets."""
    tokens, segments = (arrays[name][chosen].astype(jnp.int32) for name in ("tokens", "segment_ids"))
    return {
        "tokens": tokens,
        "segment_ids": segments,
        "positions": jnp.where(segments > 0, segment_positions(segments), 0),
        "loss_mask": segments > 0,
    }


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What all arms share.

    Attributes:
        batch_size: rows per step, of the training and of the conversions.
        ar_steps: steps of the autoregressive training.
        ar_optim: its optimiser; `optim` makes that of a conversion from its number of steps.
        optim: see `ar_optim`.
        eval_samples: draws of the bound per held-out row.
        new_tokens: length of a completion.
    """

    batch_size: int
    ar_steps: int
    ar_optim: OptimConfig
    optim: Callable[[int], OptimConfig]
    eval_samples: int
    new_tokens: int

    def steps(self, arm: Arm) -> int:
        return max(1, round(arm.share * self.ar_steps))


@dataclasses.dataclass(frozen=True)
class _Training:
    """Compiled: weights and key to (state, frozen); many steps; the trained weights to those of an ordinary model."""

    begin: Any
    many: Any
    finish: Any
    steps: int
    chunk: int


class Bench:
    """Everything that runs on the device."""

    def __init__(
        self,
        lm: Any,
        sizes: Sizes,
        train: Rows,
        held_out: Rows,
        prompts: Sequence[Sequence[int]],
        *,
        workers: int,
    ):
        if len(held_out) % min(EVAL_BATCH, len(held_out)):
            raise ValueError(f"eval_rows must be a multiple of {EVAL_BATCH}; got {len(held_out)}")
        self.lm, self.sizes, self.rows, self.held_out, self.prompts = lm, sizes, train, held_out, prompts
        self.dtype = jnp.dtype(compute_dtype(None))
        self._pool = ThreadPoolExecutor(workers)
        self._programs: dict[Any, Future] = {}
        self._shapes = jax.eval_shape(lambda: lm.init(jax.random.key(0)))
        self._key = jax.eval_shape(lambda: jax.random.key(0))
        self._init = jax.jit(lambda key: lm.init(key))
        self._for_decoding = jax.jit(lambda params: jax.tree.map(lambda w: w.astype(self.dtype), params))
        self._rounded = jax.jit(lambda p: jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), p))

    def close(self) -> None:
        """Forgets what nobody waits for."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    # -- programs

    def _program(self, key: Any, make: Callable[[], Any]) -> Future:
        if key not in self._programs:
            self._programs[key] = self._pool.submit(make)
        return self._programs[key]

    def prepare(self, arms: Sequence[Arm], *, with_ar: bool) -> None:
        """Starts to compile all that these arms need, in the order in which it will be needed."""
        if with_ar:
            self._training(None)
        self._score(None)
        for arm in arms:
            self._training(arm)
            for block in (*BLOCKS, None):
                self._score((block, arm.objective.token_shift))
            for decode in arm.decodes if self.prompts else ():
                self._decoder(arm, decode)

    def _training(self, arm: Arm | None) -> Future:
        """Steps of an arm (None: of the autoregressive training), many in one program."""
        if arm is None:
            return self._program("ar", lambda: self._compile_training(None, self.sizes.ar_steps, 0))
        steps = self.sizes.steps(arm)
        key = (arm.objective, steps, arm.lora_rank)
        return self._program(key, lambda: self._compile_training(arm.objective, steps, arm.lora_rank))

    def _compile_training(self, objective: Any, steps: int, rank: int) -> "_Training":
        lm = self.lm
        loss = make_next_token_loss(lm) if objective is None else make_block_diffusion_loss(lm, objective)
        optim = self.sizes.ar_optim if objective is None else self.sizes.optim(steps)
        optimizer, _ = make_optimizer(optim, steps)
        merge = functools.partial(lora.merge, rank=rank, alpha=2.0 * rank)

        def adapted(params, batch, key, frozen):
            return loss(merge(frozen, params["dense"], params["adapters"]), batch, key)

        step = make_train_step(adapted if rank else loss, optimizer, compute_dtype=self.dtype)

        def begin(params, key):
            frozen: tuple = ()
            if rank:
                fixed, dense = lora.split(params)
                adapters = lora.init_adapters(key, lora.adapter_shapes(fixed, rank))
                params = {"adapters": adapters, "dense": dense}
                frozen = (jax.tree.map(lambda w: w.astype(self.dtype), fixed),)
            # Copies, since `many` gives its state away.
            return TrainState.create(jax.tree.map(jnp.copy, params), optimizer, key), frozen

        def many(state, arrays, order, *frozen):
            def one(state, chosen):
                state, metrics = step(state, take(arrays, chosen), *frozen)
                return state, metrics["sums"]

            state, sums = jax.lax.scan(one, state, order)
            return state, jax.tree.map(lambda x: x.sum(0), sums)

        def finish(params, *frozen):
            if not rank:
                return params
            whole = jax.tree.map(lambda w: w.astype(jnp.float32), frozen[0])
            return merge(whole, params["dense"], params["adapters"])

        chunk = max(n for n in range(1, min(50, steps) + 1) if steps % n == 0)
        state, frozen = jax.eval_shape(begin, self._shapes, self._key)
        arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.rows.arrays)
        order = jax.ShapeDtypeStruct((chunk, self.sizes.batch_size), jnp.int32)
        return _Training(
            begin=jax.jit(begin).lower(self._shapes, self._key).compile(),
            many=jax.jit(many, donate_argnums=0).lower(state, arrays, order, *frozen).compile(),
            finish=jax.jit(finish).lower(state.params, *frozen).compile(),
            steps=steps,
            chunk=chunk,
        )

    def _score(self, what: tuple[int | None, bool] | None) -> Future:
        """Sums over the held-out rows; what: (block, token shift) of the bound, None: exact next-token likelihood."""

        def make():
            lm, samples = self.lm, self.sizes.eval_samples
            count = len(self.held_out)
            batch_rows = min(EVAL_BATCH, count)

            def one(params, arrays, item):
                number, chosen = item
                batch = take(arrays, chosen)
                segments = batch["segment_ids"]
                if what is None:
                    out = ar_nll(lm, params, batch["tokens"], segment_ids=segments)
                else:
                    first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
                    out = nelbo(
                        lm, params, batch["tokens"], jax.random.fold_in(jax.random.key(1), number),
                        block_size=what[0], num_samples=samples, loss_mask=batch["loss_mask"] & ~first,
                        segment_ids=segments, token_shift=what[1],
                    )  # fmt: skip
                scored = batch["loss_mask"] & (batch["positions"] > 0)
                return out.nats.sum(), out.tokens.sum(), out.per_token.sum(0), scored.sum(0)

            def score(params, arrays):
                order = jnp.arange(count).reshape(-1, batch_rows)
                parts = jax.lax.map(functools.partial(one, params, arrays), (jnp.arange(len(order)), order))
                return jax.tree.map(lambda x: x.sum(0), parts)

            arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.held_out.arrays)
            return jax.jit(score).lower(self._shapes, arrays).compile()

        return self._program(("score", what), make)

    def _decoding(self, arm: Arm, decode: Decode) -> BlockDecoding:
        config = self.lm.config
        return BlockDecoding(
            block_length=decode.block,
            mask_id=config.mask_id,
            suppress=suppressed_ids(config),
            token_shift=arm.objective.token_shift,
            prompt_attention=decode.prompt_attention,
            prompt_block_size=arm.objective.block_size,
        )

    def _decoder(self, arm: Arm, decode: Decode) -> Future:
        """Compiles the programs of a way of decoding, by using them once; they are then found by `generate`."""
        decoding = self._decoding(arm, decode)

        def make():
            self._generate(self._for_decoding(self.random(0)), decoding, RevealOptions(threshold=0.0))

        return self._program(("decode", decoding), make)

    def _generate(self, params: Any, decoding: BlockDecoding, reveal: RevealOptions):
        capacity = max(map(len, self.prompts)) + -(-self.sizes.new_tokens // max(BLOCKS)) * max(BLOCKS)
        stream = BlockStream(self.lm, params, decoding, batch=len(self.prompts), capacity=capacity)
        return generate(
            self.lm, params, self.prompts, max_new_tokens=self.sizes.new_tokens, reveal=reveal, stream=stream
        )

    # -- runs

    def random(self, seed: int) -> Any:
        """Random weights."""
        return self._init(jax.random.key(seed))

    def train_ar(self, seed: int) -> tuple[Any, dict[str, Any]]:
        """(weights rounded to bfloat16 as a shipped model's are, record)."""
        params, record = self._train(None, self.random(seed), seed)
        return self._rounded(params), record

    def ar_record(self, params: Any) -> dict[str, Any]:
        """Exact nats per held-out token."""
        nats, tokens, *_ = jax.device_get(self._score(None).result()(params, self.held_out.arrays))
        return {"nats": float(nats / tokens), "tokens": int(tokens)}

    def convert(self, arm: Arm, ar: Any, seed: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Trains and evaluates an arm.

        Returns:
            The record: steps, seconds, training loss at the end, "bound" by block ("row": whole rows), "offsets" (the
            bound by offset in the own block), "drift"; under "decode" per way and rule of decoding the tokens per
            forward. And the completions' tokens [prompts, new_tokens], -1 behind their ends, under "way/rule".
        """
        start = self.random(seed + 1_000_000) if arm.from_scratch else ar
        before = time.perf_counter()
        params, record = self._train(arm, start, seed)
        trained = time.perf_counter()
        record["bound"] = {}
        for block in (*BLOCKS, None):
            score = self._score((block, arm.objective.token_shift)).result()
            nats, tokens, per_token, scored = jax.device_get(score(params, self.held_out.arrays))
            record["bound"]["row" if block is None else str(block)] = float(nats / tokens)
            if block is not None and block == arm.own_block:
                record["offsets"] = _by_offset(per_token, scored, block)
        drift = weight_drift(params, start)
        record["drift"] = {name: value for name, value in drift.items() if isinstance(value, float)}
        scored_at = time.perf_counter()
        record["decode"], tokens = self._complete(arm, params)
        record["seconds"] = {
            "training": round(trained - before, 2),
            "bounds": round(scored_at - trained, 2),
            "completions": round(time.perf_counter() - scored_at, 2),
        }
        return record, tokens

    def _train(self, arm: Arm | None, start: Any, seed: int) -> tuple[Any, dict[str, Any]]:
        training = self._training(arm).result()
        # The same rows in the same order for all arms of a seed, others than the autoregressive model's last ones.
        order = self.rows.order(training.steps, self.sizes.batch_size, seed=2 * seed + (arm is not None))
        state, frozen = training.begin(start, jax.random.fold_in(jax.random.key(seed), 7))
        sums = []
        for at in range(0, training.steps, training.chunk):
            chosen = jnp.asarray(order[at : at + training.chunk])
            state, part = training.many(state, self.rows.arrays, chosen, *frozen)
            sums.append(part)
        if rejected := int(state.rejected):
            name = arm.name if arm else "the autoregressive model"
            raise TrainingError(f"{rejected} of {training.steps} steps of {name} were not finite")
        params = training.finish(state.params, *frozen)
        last = jax.device_get(sums[-1])
        values = {name: np.asarray(total) / np.asarray(weight) for name, (total, weight) in last.items()}
        return params, {"steps": training.steps, "train": {name: value.tolist() for name, value in values.items()}}

    def _complete(self, arm: Arm, params: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        record: dict[str, Any] = {}
        tokens: dict[str, np.ndarray] = {}
        weights = self._for_decoding(params)
        for decode in arm.decodes if self.prompts else ():
            self._decoder(arm, decode).result()
            record[decode.name] = {}
            for name, reveal in reveals(self.sizes.new_tokens).items():
                done, stats = self._generate(weights, self._decoding(arm, decode), reveal)
                record[decode.name][name] = {
                    "tokens_per_forward": stats.tpf_total,
                    "tokens": stats.tokens,
                    "forwards": stats.denoise_steps + stats.commits,
                }
                ids = np.full((len(done), self.sizes.new_tokens), -1, np.int32)
                for row, completion in zip(ids, done, strict=True):
                    row[: len(completion.tokens)] = completion.tokens
                tokens[f"{decode.name}/{name}"] = ids
        return record, tokens


def _by_offset(per_token: np.ndarray, scored: np.ndarray, block: int) -> list[float]:
    """Mean by offset in the block of sums by position in the row."""
    sums, counts = (np.asarray(x, np.float64).reshape(-1, block).sum(0) for x in (per_token, scored))
    return [float(value) for value in sums / np.maximum(counts, 1)]


def save_weights(path: Path, params: Any) -> None:
    """Weights that are exact in bfloat16, as one file."""
    leaves = {jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in jax.tree.leaves_with_path(params)}
    temporary = path.with_name(f".{path.name}.tmp.npz")
    arrays: dict[str, Any] = {n: np.asarray(x.astype(jnp.bfloat16)).view(np.uint16) for n, x in leaves.items()}
    np.savez(temporary, **arrays)
    temporary.replace(path)


def load_weights(path: Path, shapes: Any) -> Any:
    """What `save_weights` wrote, in float32.

    Raises:
        ValueError: the file holds another model.
    """
    with np.load(path) as file:
        arrays = {name: file[name].view(jnp.bfloat16) for name in file.files}

    def one(tree_path: tuple, shape: Any) -> jax.Array:
        name = jax.tree_util.keystr(tree_path, simple=True, separator=".")
        if name not in arrays or arrays[name].shape != shape.shape:
            raise ValueError(f"{path} holds another model: {name} must be {shape.shape}")
        return jnp.asarray(arrays[name].astype(np.float32))

    return jax.tree.map_with_path(one, shapes)
