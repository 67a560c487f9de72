"""The training loop: data in, checkpoints and metrics out, around the pure step of `train.step`."""

import contextlib
import dataclasses
import json
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from train import distributed, memory
from train import mesh as meshes
from train.checkpointing import Checkpoints, RunLock, check_identity, plain_json
from train.config import OptimConfig, RunConfig, to_json
from train.metrics import MetricsLog, Reporter, averages
from train.optimizers import make_optimizer
from train.state import TrainState
from train.step import LossFn, make_eval_step, make_train_step

__all__ = ["FitResult", "TrainingError", "Weights", "compute_dtype", "fit", "weights_of"]

Batch = dict[str, np.ndarray]
REMEDIES = ("--accumulate", "--remat", "--mesh.fsdp", "--compute-dtype bfloat16", "--optim.moment-dtype bfloat16")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what is kept."""


@runtime_checkable
class DataIterator(Protocol):
    """Endless batches of this process's rows, and their position as a JSON-able dict."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights a run trains, before any of them exists.

    Attributes:
        shapes: tree of `jax.ShapeDtypeStruct`, float32, with shardings.
        create: makes them, any float dtype; called once, for a new run only. What it returns is copied.
        frozen: weights that are not trained, in the dtype to compute in; passed to the loss as its fourth
            argument unless None. Not part of checkpoints.
    """

    shapes: Any
    create: Callable[[], Any]
    frozen: Any = None


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What a run ended with."""

    state: TrainState
    evaluation: dict[str, Any]  # of the last evaluation, empty if there was none
    interrupted: bool  # by SIGTERM or Ctrl-C: a checkpoint was written, the same command continues


def weights_of(lm: Any, mesh: Mesh, create: Callable[[], Any] | None, *, seed: int = 0) -> Weights:
    """All weights of a `CausalLM`, placed by the rules of `jaxmodels.sharding`; random where `create` is None."""
    from jaxmodels.sharding import param_shardings

    shardings = param_shardings(lm, mesh)
    key = jax.random.fold_in(jax.random.key(seed), 0)
    shapes = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, jnp.float32, sharding=sharding),
        jax.eval_shape(lambda: lm.init(key, jnp.float32)),
        shardings,
    )
    return Weights(shapes, create or jax.jit(lambda: lm.init(key, jnp.float32), out_shardings=shardings))


def compute_dtype(name: str | None) -> str:
    """The dtype to compute in: as named, or the platform's default."""
    if name is not None:
        return name
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def fit(
    run: RunConfig,
    optim: OptimConfig,
    mesh: Mesh,
    weights: Weights,
    loss_fn: LossFn,
    data: DataIterator,
    *,
    identity: dict[str, Any],
    config: Any = None,
    eval_data: Callable[[], Iterable[Batch]] | None = None,
    eval_fn: LossFn | None = None,
    on_eval: Callable[[Any], dict[str, Any]] | None = None,
    remedies: tuple[str, ...] = REMEDIES,
    reporter: Reporter | None = None,
) -> FitResult:
    """Trains until `run.steps` updates are done, continuing from the latest checkpoint in `run.directory`.

    Args:
        run: length of the run and what it writes.
        optim: optimiser and schedule.
        mesh: from `train.mesh.make_mesh`.
        weights: what is trained, see `weights_of`.
        loss_fn: see `train.step.LossFn`.
        data: this process's part of each batch: `run.batch_size / count` rows, where (index, count) =
            `train.mesh.data_shard(mesh)`. Restored to its position when the run continues.
        identity: JSON-able description of what makes this run itself: model, data, objective. Together with
            optimiser, seed and batch size it is stored in checkpoints, and a run is only continued under
            the same one. Steps, mesh, accumulation, dtypes of computation and all that is only reported
            may change.
        config: the recipe's configuration, written to config.json.
        eval_data: makes an iterator over held-out batches, equal in number and shape on all processes;
            rows without targets (padding) count nothing.
        eval_fn: loss to evaluate, `loss_fn` if None. It draws from keys that are equal in every evaluation.
        on_eval: further metrics from the current parameters, called with each evaluation on all processes.
        remedies: flags that lower memory, named with the prediction.
        reporter: where progress goes; stderr of process 0 if None.

    Returns:
        The final state and the last evaluation. The last checkpoint is complete when this returns.

    Raises:
        ValueError: the directory is in use or holds another run, or sizes do not divide.
        CheckpointError: a checkpoint could not be written or read; earlier ones are intact.
        TrainingError: `run.max_rejected` steps in a row were not finite.
    """
    meshes.check_batch(mesh, run.batch_size, run.accumulate)
    optimizer, schedule = make_optimizer(optim, run.steps)
    main = distributed.is_main()
    report = reporter or Reporter(enabled=main)
    directory = Path(run.directory).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    # What may change while the run stays the same: schedules see `steps`, so changing it bends the rest of a
    # decay; that is what extending a run means.
    whole = {"seed": run.seed, "batch_size": run.batch_size, "optim": to_json(optim)} | plain_json(identity)

    with contextlib.ExitStack() as stack:
        distributed.on_main(lambda: stack.callback(RunLock(directory).release))
        checkpoints = Checkpoints(directory / "checkpoints", run.keep)
        stack.callback(checkpoints.close)
        start = checkpoints.latest or 0
        if checkpoints.latest is not None:
            check_identity(checkpoints.identity(), whole, directory)
            data.set_state(checkpoints.load_data_state())
        if start > run.steps:
            raise ValueError(f"steps must be at least {start}, which {directory} already has; got {run.steps}")
        distributed.on_main(
            lambda: _write_json(directory / "config.json", {"config": to_json(config), "identity": whole})
        )
        shapes, step, evaluate, batches = _prepare(run, mesh, weights, loss_fn, eval_fn, data, optimizer, schedule)
        frozen = () if weights.frozen is None else (weights.frozen,)
        log = MetricsLog(directory, step=start, tensorboard=run.tensorboard) if main else None
        if log is not None:
            stack.callback(log.close)

        compiled, work = None, None
        if start < run.steps:
            compiled, work = _compile(step, shapes, batches, frozen, loss_fn, run, mesh, report, remedies)
        if checkpoints.latest is not None:
            state = checkpoints.load_state(shapes)
            report.line(f"continuing from step {start} in {directory}")
        else:
            state = _new_state(weights, optimizer, shapes, run.seed)

        loop = _Loop(run, mesh, batches, compiled, evaluate, frozen, checkpoints, whole, log, report, work)
        return loop.go(state, start, eval_data, on_eval)


def _prepare(run, mesh, weights, loss_fn, eval_fn, data, optimizer, schedule):
    """Abstract state, the two steps, and an iterator of global batches; nothing of size is allocated."""
    param_shardings = jax.tree.map(lambda s: s.sharding, weights.shapes)
    shardings = meshes.state_shardings(mesh, weights.shapes, optimizer, param_shardings)
    key = jax.random.key(run.seed)
    shapes = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        jax.eval_shape(lambda p: TrainState.create(p, optimizer, key), weights.shapes),
        shardings,
    )
    dtype = jnp.dtype(compute_dtype(run.compute_dtype))
    step = make_train_step(
        loss_fn,
        optimizer,
        accumulate=run.accumulate,
        compute_dtype=dtype,
        schedule=schedule,
        state_shardings=shardings,
        batch_sharding=meshes.batch_sharding(mesh),
    )
    evaluate = make_eval_step(eval_fn or loss_fn, compute_dtype=dtype, out_sharding=meshes.replicated(mesh))
    return shapes, step, evaluate, _Batches(data, mesh, run.batch_size)


class _Batches:
    """Global batches from this process's rows; remembers the data position of the batches handed out."""

    def __init__(self, data: DataIterator, mesh: Mesh, batch_size: int):
        self._data, self._mesh, self._rows = data, mesh, batch_size
        self._parts = meshes.data_shard(mesh)[1]
        self._first: dict[str, jax.Array] | None = None
        self.state = data.get_state()
        self.seconds = 0.0

    def place(self, local: Batch) -> dict[str, jax.Array]:
        for name, x in local.items():
            if x.shape[0] * self._parts != self._rows:
                raise ValueError(
                    f"each batch must have batch_size / {self._parts} = {self._rows / self._parts:g} rows on "
                    f"this process; {name!r} has {x.shape[0]}"
                )
        return meshes.global_batch(self._mesh, local, self._parts)

    def peek(self) -> dict[str, jax.Array]:
        """The first batch, which the first `next` will return again."""
        if self._first is None:
            self._first = self.place(next(self._data))
        return self._first

    def next(self) -> dict[str, jax.Array]:
        before = time.perf_counter()
        batch, self._first = self.peek(), None
        self.state = self._data.get_state()
        self.seconds += time.perf_counter() - before
        return batch


def _compile(step, shapes, batches, frozen, loss_fn, run, mesh, report, remedies):
    """The compiled step and the FLOPs of one update; reports both time and predicted memory."""
    batch = batches.peek()
    before = time.perf_counter()
    compiled = step.lower(shapes, batch, *frozen).compile()
    seconds = time.perf_counter() - before
    # The forward pass traced once more without gradient: what remat computes twice is no useful work.
    work = 3 * memory.count_flops(loss_fn, shapes.params, batch, jax.random.key(0), *frozen)
    report.line(f"compiled the training step in {seconds:.1f} s")
    device = mesh.local_devices[0]
    report.line(memory.MemoryEstimate.of(compiled).describe(memory.device_memory(device), remedies))
    return compiled, work


def _new_state(weights: Weights, optimizer: Any, shapes: TrainState, seed: int) -> TrainState:
    shardings = jax.tree.map(lambda s: s.sharding, shapes)
    created = weights.create()
    wanted, given = (
        {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}
        for leaves in map(jax.tree.leaves_with_path, (weights.shapes, created))
    )
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            raise ValueError(
                f"the initial weights do not fit: {name} must be {wanted.get(name, 'absent')}; "
                f"got {given.get(name, 'absent')}"
            )
    # A true copy: the step donates its buffers, the caller's arrays stay alive (and may be views of a file).
    params = jax.jit(
        lambda p: jax.tree.map(lambda a: jnp.array(a, jnp.float32, copy=True), p), out_shardings=shardings.params
    )(jax.device_put(created, shardings.params))
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)

    def scalars() -> TrainState:
        return TrainState.create({}, optax.identity(), jax.random.key(seed))

    rest = shardings.replace(params={}, opt_state=optax.EmptyState())
    return jax.jit(scalars, out_shardings=rest)().replace(params=params, opt_state=opt_state)


class _Loop:
    """The moving parts of one `fit`."""

    def __init__(self, run, mesh, batches, compiled, evaluate, frozen, checkpoints, identity, log, report, work):
        self.run, self.mesh, self.batches = run, mesh, batches
        self.compiled, self.evaluate, self.frozen = compiled, evaluate, frozen
        self.checkpoints, self.identity = checkpoints, identity
        self.log, self.report, self.work = log, report, work
        self.pending: list[dict[str, Any]] = []  # metrics of the steps since the last log line, on device
        self.rejected = 0
        self.paused = 0.0  # seconds of evaluations and checkpoints since the last log line
        self.since = time.perf_counter()

    def go(self, state: TrainState, start: int, eval_data, on_eval) -> FitResult:
        run = self.run
        evaluation: dict[str, Any] = {}
        saved = self.checkpoints.latest
        self.rejected = int(state.rejected)
        interrupted = False
        self.report.start(start, run.steps)
        try:
            with _stop_signals(self.report) as stop, _Profiler(run) as profiler:
                self.since = time.perf_counter()
                step = start
                while step < run.steps and not interrupted:
                    profiler.before(step)
                    state, metrics = self.compiled(state, self.batches.next(), *self.frozen)
                    step += 1
                    self.pending.append(metrics)
                    self._keep_pace(step)
                    profiler.after(step, metrics)
                    self.report.advance(step)

                    last = step == run.steps
                    logs = last or step % run.log_every == 0
                    # One process may stop at any step; several must agree, which costs a collective.
                    if logs or jax.process_count() == 1:
                        interrupted = distributed.any_process(stop.is_set()) and not last
                    saves = last or interrupted or step % run.checkpoint_every == 0
                    if logs or saves:
                        self._flush(step)
                    # Before the checkpoint, so that a run continued from it has no gap in its records.
                    if eval_data and (last or (run.eval_every and step % run.eval_every == 0)):
                        evaluation = self._evaluated(step, state, eval_data, on_eval)
                        if self.log is not None:
                            self.log.write(step, evaluation)
                    if saves:
                        with self._pause(metrics):
                            self.checkpoints.save(step, state, self.batches.state, self.identity)
                        saved = step
            if eval_data and not evaluation and step == run.steps:  # a finished run, started once more
                evaluation = self._evaluated(step, state, eval_data, on_eval)
            self.checkpoints.wait()
        finally:
            self.report.stop()
        if interrupted:
            self.report.line(f"interrupted: saved step {saved}; the same command continues from there")
        return FitResult(state, evaluation, interrupted)

    def _keep_pace(self, step: int) -> None:
        """Lets the host run two steps ahead, no more, and ends a run whose steps are all rejected."""
        if len(self.pending) > 2:
            self._check(step - 2, self.pending[-3])

    def _check(self, step: int, metrics: dict[str, Any]) -> None:
        if int(metrics["rejected_in_a_row"]) < self.run.max_rejected:
            return
        kept = self.checkpoints.latest
        kept_text = "no checkpoint was written yet" if kept is None else f"the checkpoint of step {kept} is intact"
        raise TrainingError(
            f"loss or gradient was not finite in {self.run.max_rejected} steps in a row, up to step {step} "
            f"(loss {float(metrics['loss']):.4g}, gradient norm {float(metrics['grad_norm']):.4g}); {kept_text}. "
            "Lower --optim.learning-rate or --optim.clip-norm, or look for bad data"
        )

    def _flush(self, step: int) -> None:
        """Reports the steps since the last call."""
        steps = jax.device_get(self.pending)
        now = time.perf_counter()
        for i, metrics in enumerate(steps):
            self._check(step - len(steps) + 1 + i, metrics)
        seconds = max(now - self.since - self.paused, 1e-9) / len(steps)
        good = [m for m in steps if not m["rejected"]]
        self.rejected += len(steps) - len(good)
        values: dict[str, Any] = {}
        if good:
            sums = jax.tree.map(lambda *x: np.sum(np.asarray(x, np.float64), axis=0), *[m["sums"] for m in good])
            values |= averages(sums, "train")
            values["train/grad_norm"] = float(np.mean([m["grad_norm"] for m in good]))
        values["train/learning_rate"] = float(steps[-1]["learning_rate"])
        values["train/rejected"] = self.rejected
        values["perf/tokens_per_second"] = float(sum(m["tokens"] for m in steps)) / (seconds * len(steps))
        values["perf/step_seconds"] = seconds
        values["perf/data_seconds"] = self.batches.seconds / len(steps)
        rate = self.work / seconds / self.mesh.size
        values["perf/tflops_per_device"] = rate / 1e12
        peak = memory.peak_flops(self.mesh.devices.flat[0].device_kind, compute_dtype(self.run.compute_dtype))
        if peak is not None:
            values["perf/mfu"] = rate / peak
        if self.log is not None:
            self.log.write(step, values)
        self.report.metrics(step, values, (self.run.steps - step) * seconds)
        self.pending.clear()
        self.batches.seconds, self.paused, self.since = 0.0, 0.0, time.perf_counter()

    def _evaluated(self, step: int, state: TrainState, eval_data, on_eval) -> dict[str, Any]:
        with self._pause(state.step):
            # Equal keys in every evaluation: the same noise on the same rows, so values can be compared.
            key = jax.random.fold_in(jax.random.key(self.run.seed), 2**31 - 1)
            total = None
            for i, local in enumerate(eval_data()):
                if i == self.run.eval_batches:
                    break
                sums = self.evaluate(state.params, self.batches.place(local), jax.random.fold_in(key, i), *self.frozen)
                total = sums if total is None else jax.tree.map(jnp.add, total, sums)
            if total is None:
                raise ValueError("eval_data gave no batch: the held-out split is empty")
            values: dict[str, Any] = averages(jax.device_get(total), "eval")
            if on_eval is not None:
                values |= on_eval(state.params)
        self.report.evaluation(step, values)
        return values

    @contextlib.contextmanager
    def _pause(self, ready: Any) -> Iterator[None]:
        jax.block_until_ready(ready)
        before = time.perf_counter()
        yield
        self.paused += time.perf_counter() - before


@contextlib.contextmanager
def _stop_signals(report: Reporter) -> Iterator[threading.Event]:
    """An event that the first SIGTERM or Ctrl-C sets; the second does what it always did."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to that one only
        yield stop
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            # None: not set from Python, as by JAX's preemption notice in runs of several processes.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def handle(number: int, frame: Any) -> None:
        del frame
        stop.set()
        restore()
        report.line(f"{signal.Signals(number).name}: saving and stopping after this step; repeat to stop at once")

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        restore()


class _Profiler:
    """Records `run.profile` = START:COUNT steps; START counts updates of the whole run."""

    def __init__(self, run: RunConfig):
        self._range = run.profile_range
        self._directory = Path(run.directory).absolute() / "profile"
        self._active = False

    def __enter__(self) -> "_Profiler":
        return self

    def before(self, step: int) -> None:
        if self._range is not None and step == self._range[0]:
            jax.profiler.start_trace(str(self._directory))
            self._active = True

    def after(self, step: int, metrics: Any) -> None:
        if self._active and step == sum(self._range):  # type: ignore[arg-type]
            jax.block_until_ready(metrics)
            self._stop()

    def _stop(self) -> None:
        if self._active:
            self._active = False
            jax.profiler.stop_trace()

    def __exit__(self, *_: Any) -> None:
        self._stop()


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
    temporary.replace(path)
