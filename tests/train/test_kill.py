"""Runs that are killed with SIGKILL and started again with the same command."""

import random
import time

import pytest


@pytest.fixture(scope="module")
def reference(toy, tmp_path_factory, losses):
    directory = tmp_path_factory.mktemp("reference")
    toy.run({"directory": str(directory)})
    return losses(directory)


def wait_for(condition, process, timeout=120):
    """True once `condition()`; False if the process ends first."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.001)
    raise AssertionError("nothing happened in time")


def kill(process):
    process.kill()
    process.communicate()


def finish(start_toy, options):
    process = start_toy(options)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output, errors


def complete(directory):
    """Steps of the complete checkpoints."""
    checkpoints = directory / "checkpoints"
    return {int(p.name) for p in checkpoints.iterdir() if p.name.isdecimal()} if checkpoints.exists() else set()


@pytest.mark.timeout(400)
def test_killed_inside_a_checkpoint_write_and_between(start_toy, tmp_path, reference, losses):
    options = {"directory": str(tmp_path), "checkpoint_every": 1, "delay": 0.05}

    def writing():
        return complete(tmp_path) and [*(tmp_path / "checkpoints").glob("*.orbax-checkpoint-tmp")]

    process = start_toy(options)
    assert wait_for(writing, process)
    kill(process)
    assert [*(tmp_path / "checkpoints").glob("*tmp*")]  # the kill did hit a write
    before = max(complete(tmp_path))
    process = start_toy(options)
    assert wait_for(lambda: max(complete(tmp_path)) >= before + 4, process)
    kill(process)
    reached = max(complete(tmp_path))
    assert before < reached < 20
    _, errors = finish(start_toy, options)
    assert f"continuing from step {reached}" in errors
    assert not [*(tmp_path / "checkpoints").glob("*tmp*")]
    assert losses(tmp_path) == reference


# Last run 2026-11-26 on two idle cores: all passed, 27 to 35 s each.
@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments(start_toy, tmp_path, reference, losses, seed):
    """Including start-up, compilation and the last checkpoint; ten times, then once to the end."""
    draw = random.Random(seed)
    every = draw.choice([1, 3])
    started = time.monotonic()
    finish(start_toy, {"directory": str(tmp_path / "timed"), "checkpoint_every": every, "delay": 0.1})
    whole = time.monotonic() - started
    options = {"directory": str(tmp_path / "killed"), "checkpoint_every": every, "delay": 0.1}
    for _ in range(10):
        process = start_toy(options)
        # A continued run has less to do, so it may be over by then; the first one, killed within a whole one, is not.
        time.sleep(draw.uniform(0.0, 0.8 * whole))
        kill(process)
    finish(start_toy, options)
    assert losses(tmp_path / "killed") == reference
