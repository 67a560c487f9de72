"""Runs of a toy model through `fit`: what continues, what is refused, what is kept."""

import json
import os
import resource
import signal
import time

import jax
import numpy as np
import pytest

from train.checkpointing import CheckpointError, Checkpoints, RunLock, check_identity
from train.loop import TrainingError
from train.metrics import MetricsLog


@pytest.fixture(scope="module")
def reference(toy, tmp_path_factory):
    """An undisturbed run of 20 steps."""
    directory = tmp_path_factory.mktemp("reference")
    return directory, toy.run({"directory": str(directory), "eval_every": 10})


def assert_same(a, b):
    """Bit for bit, keys included."""
    plain = lambda x: np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)  # noqa: E731
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(plain(x), plain(y)), a, b)


def signal_at(step, number=signal.SIGTERM):
    return lambda index: os.kill(os.getpid(), number) if index == step else None


def test_training_learns_and_reports(reference, toy, read_records):
    directory, result = reference
    records = read_records(directory)
    train = [r for r in records if "train/loss" in r]
    assert [r["step"] for r in train] == list(range(1, 21))
    assert train[-1]["train/loss"] < train[0]["train/loss"] - 0.2
    assert {"train/grad_norm", "train/learning_rate", "train/rejected", "perf/tokens_per_second"} <= train[0].keys()
    assert train[5]["train/nll"] == pytest.approx(train[5]["train/loss"])
    assert len(train[5]["train/by_position"]) == toy.T
    evaluated = [r["step"] for r in records if "eval/loss" in r]
    assert evaluated == [10, 20] and result.evaluation["eval/loss"] < 3.4
    config = json.loads((directory / "config.json").read_text())
    assert config["identity"]["model"] == {"dim": toy.D, "layers": 1} and config["identity"]["batch_size"] == 16
    assert sorted(p.name for p in (directory / "checkpoints").iterdir()) == ["15", "20"]  # keep=2
    assert not (directory / "tb").exists() and not (directory / "profile").exists()


@pytest.mark.smoke
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_and_continued_equals_undisturbed(number, reference, toy, tmp_path, losses, read_records):
    before = signal.getsignal(number)
    options = {"directory": str(tmp_path), "eval_every": 10}
    stopped = toy.run(options, signal_at(10, number))
    assert stopped.interrupted and int(stopped.state.step) == 10
    assert signal.getsignal(number) is before
    assert Checkpoints(tmp_path / "checkpoints").latest == 10
    ended = toy.run(options)
    assert not ended.interrupted
    assert_same(ended.state, reference[1].state)
    assert losses(tmp_path) == losses(reference[0])
    keep = ("eval/loss", "eval/by_position")
    assert ended.evaluation["eval/loss"] == reference[1].evaluation["eval/loss"]
    assert [[r.get(k) for k in keep] for r in read_records(tmp_path)] == [
        [r.get(k) for k in keep] for r in read_records(reference[0])
    ]


def test_finished_run_started_again_does_nothing(reference, toy, read_records):
    directory, result = reference
    before = (directory / "metrics.jsonl").read_bytes()

    def fail(index):
        raise AssertionError("no batch is needed")

    again = toy.run({"directory": str(directory), "eval_every": 10}, fail)
    assert_same(again.state, result.state)
    assert again.evaluation == result.evaluation
    assert (directory / "metrics.jsonl").read_bytes() == before


def test_saving_does_not_see_later_updates(toy, tmp_path, reference):
    """Checkpoints are written while training goes on in donated buffers."""
    toy.run({"directory": str(tmp_path), "checkpoint_every": 1, "keep": 30, "log_every": 20})
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=30)
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), reference[1].state)
    stopped = toy.run({"directory": str(tmp_path / "stopped")}, signal_at(7)).state
    seventh = checkpoints._orbax.load_checkpointables(7, {"state": target, "data": None})
    assert_same(seventh["state"], stopped)
    assert seventh["data"] == {"index": 7}


def test_callers_weights_survive_donation(toy, tmp_path):
    from train import mesh as meshes
    from train.config import MeshConfig, OptimConfig, RunConfig
    from train.loop import Weights, fit

    mesh = meshes.make_mesh(MeshConfig())
    weights = toy.weights_for(mesh)
    mine = jax.device_put(weights.create(), jax.tree.map(lambda s: s.sharding, weights.shapes))
    before = jax.tree.map(np.array, mine)
    config = RunConfig(directory=tmp_path, steps=20, batch_size=16)
    optim = OptimConfig(learning_rate=3e-3, warmup_steps=3)
    fit(config, optim, mesh, Weights(weights.shapes, lambda: mine), toy.loss_fn, toy.Rows(16), identity={})
    assert_same(mine, before)


def test_initial_weights_that_do_not_fit_are_named(toy, tmp_path):
    from train import mesh as meshes
    from train.config import MeshConfig, OptimConfig, RunConfig
    from train.loop import Weights, fit

    mesh = meshes.make_mesh(MeshConfig())
    weights = toy.weights_for(mesh)
    other = Weights(weights.shapes, lambda: weights.create() | {"up": np.zeros((16, 8), np.float32)})
    config = RunConfig(directory=tmp_path, steps=2, batch_size=16)
    with pytest.raises(ValueError, match=r"up must be \(16, 64\); got \(16, 8\)"):
        fit(config, OptimConfig(), mesh, other, toy.loss_fn, toy.Rows(16), identity={})


def test_extending_a_run_and_other_harmless_changes_are_allowed(toy, tmp_path):
    options = {"directory": str(tmp_path), "steps": 4, "optim": {"schedule": "constant"}}
    toy.run(options)
    more = options | {"steps": 6, "log_every": 3, "accumulate": 2, "keep": 1}
    assert int(toy.run(more).state.step) == 6
    with pytest.raises(ValueError, match="steps must be at least 6"):
        toy.run(options)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"identity": {"model": {"dim": 32, "layers": 1}, "data": {"seed": 0}}}, r"model\.dim was 16 and is now 32"),
        ({"identity": {"model": {"dim": 16, "layers": 1}, "data": {"seed": 1}}}, r"data\.seed was 0 and is now 1"),
        ({"optim": {"learning_rate": 1e-2}}, r"optim\.learning_rate was 0.003 and is now 0.01"),
        ({"batch_size": 8}, "batch_size was 16 and is now 8"),
        ({"seed": 3}, "seed was 0 and is now 3"),
    ],
)
def test_changed_run_is_refused(change, message, reference, toy):
    directory, _ = reference
    before = sorted(p.name for p in (directory / "checkpoints").iterdir()), (directory / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=message):
        toy.run({"directory": str(directory)} | change)
    assert before == (
        sorted(p.name for p in (directory / "checkpoints").iterdir()),
        (directory / "metrics.jsonl").read_text(),
    )


def test_identity_fields_that_appear_or_vanish_are_named(tmp_path):
    check_identity({"a": [1, 2], "b": None}, {"a": (1, 2), "b": None}, tmp_path)
    with pytest.raises(ValueError, match=r"a\.x was 1 and is now absent; a\.y was absent and is now 2"):
        check_identity({"a": {"x": 1}}, {"a": {"y": 2}}, tmp_path)


def test_second_run_in_one_directory_is_refused(toy, tmp_path):
    lock = RunLock(tmp_path)
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on"):
        toy.run({"directory": str(tmp_path)})
    lock.release()
    assert toy.run({"directory": str(tmp_path)}, signal_at(2)).interrupted


@pytest.mark.timeout(120)
def test_full_disk_in_a_checkpoint(reference, toy, tmp_path):
    """A file size limit from step 7 on: the checkpoint of step 10 cannot be written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(index):
        if index == 7:
            while not (tmp_path / "checkpoints" / "5").exists():
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    options = {"directory": str(tmp_path), "eval_every": 10, "log_every": 5}
    try:
        with pytest.raises(CheckpointError, match=r"step 10 could not be written .*intact: 5\).*File too large"):
            toy.run(options, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["5"]
    assert_same(toy.run(options).state, reference[1].state)  # room again: the same command continues


def test_rejected_steps_are_counted_and_end_the_run(toy, tmp_path, read_records):
    options = {"directory": str(tmp_path / "few"), "poison": [3, 4, 9], "log_every": 4, "max_rejected": 3}
    result = toy.run(options)
    assert int(result.state.rejected) == 3 and int(result.state.rejected_in_a_row) == 0
    train = [r for r in read_records(tmp_path / "few") if "train/rejected" in r]
    assert "train/loss" not in train[1]  # step 5 alone, rejected
    assert {r["step"]: r["train/rejected"] for r in train} == {4: 1, 5: 2} | {8: 2, 10: 3} | dict.fromkeys(
        (12, 15, 16, 20), 3
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.state.params))

    options = options | {
        "directory": str(tmp_path / "many"),
        "poison": list(range(6, 20)),
        "log_every": 100,
    }
    with pytest.raises(TrainingError, match=r"not finite in 3 steps in a row, up to step 9 .*checkpoint of step 5 is"):
        toy.run(options)
    assert Checkpoints(tmp_path / "many" / "checkpoints").latest == 5


def test_checkpoint_of_other_shapes_names_the_parameter(reference):
    directory, result = reference
    checkpoints = Checkpoints(directory / "checkpoints")
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), result.state)
    assert_same(checkpoints.load_state(target), result.state)
    wider = jax.ShapeDtypeStruct((16, 65), np.float32)
    with pytest.raises(CheckpointError, match=r"params\.up is float32\[16, 64\] there and float32\[16, 65\] in this"):
        checkpoints.load_state(target.replace(params=target.params | {"up": wider}))
    without = {k: v for k, v in target.params.items() if k != "down"}
    with pytest.raises(CheckpointError, match=r"params\.down is float32\[64, 16\] there and absent in this"):
        checkpoints.load_state(target.replace(params=without))


def test_opt_in_sinks(toy, tmp_path, read_records):
    pytest.importorskip("tensorboardX")
    toy.run({"directory": str(tmp_path), "tensorboard": True, "profile": "1:2"})
    events = b"".join(p.read_bytes() for p in (tmp_path / "tb").iterdir())
    for name in (b"train/loss", b"train/by_position/3", b"perf/tokens_per_second", b"eval/loss"):
        assert name in events
    assert [*(tmp_path / "profile").rglob("*.xplane.pb")]


def test_metrics_after_the_checkpoint_are_dropped(tmp_path):
    log = MetricsLog(tmp_path, step=0)
    for step in range(1, 6):
        log.write(step, {"train/loss": float("nan") if step == 2 else step})
    log.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "train')  # cut short by a kill
    log = MetricsLog(tmp_path, step=3)
    log.write(4, {"train/loss": [0.5, float("inf")]})
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["step"], r["train/loss"]) for r in lines] == [(1, 1), (2, None), (3, 3), (4, [0.5, None])]


def test_wrong_batches_are_named(toy, tmp_path):
    original = toy.Rows.__next__
    try:
        toy.Rows.__next__ = lambda self: {k: v[:-1] for k, v in original(self).items()}
        with pytest.raises(ValueError, match="'tokens' has 15"):
            toy.run({"directory": str(tmp_path)})
    finally:
        toy.Rows.__next__ = original
