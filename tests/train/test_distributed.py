"""Two real processes with four simulated devices each against one process with eight."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from train.config import HostsConfig
from train.distributed import initialize

MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"data": 4, "tensor": 2},
    "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
}


@pytest.fixture
def start(clean_env):
    """Starts mesh_run.py with options in a process of its own."""

    def start(options):
        script = Path(__file__).parent / "mesh_run.py"
        return subprocess.Popen(
            [sys.executable, str(script), json.dumps(options)],
            env=clean_env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    return start


@pytest.fixture
def run_meshes(start, tmp_path):
    """`run_meshes(model, one, two, timeout)`: losses per mesh of one process, and of two, run side by side."""

    def run(model, one, two, timeout, more=None):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{s.getsockname()[1]}"
        common = {"model": model, "more": more or {}}
        processes = [start(common | {"devices": 8, "directory": str(tmp_path / "one"), "meshes": one})]
        for rank in range(2):
            hosts = {"coordinator": coordinator, "num_processes": 2, "process_id": rank}
            options = {"devices": 4, "directory": str(tmp_path / "two"), "meshes": two, "hosts": hosts}
            processes.append(start(common | options))
        try:
            outputs = [p.communicate(timeout=timeout)[0] for p in processes]
        finally:
            for p in processes:
                p.kill()
        assert all(p.returncode == 0 for p in processes), "\n".join(outputs)
        return [losses_in(output) for output in outputs[:2]]

    return run


def losses_in(output):
    return json.loads(output.split("LOSSES ")[1].splitlines()[0])


def assert_equal_losses(one, two, steps=20):
    assert one.keys() == two.keys()
    for name in one:
        assert len(one[name]) == steps
        np.testing.assert_allclose(one[name], two[name], rtol=1e-5, err_msg=name)


@pytest.mark.timeout(400)
def test_two_processes_have_the_losses_of_one(run_meshes, toy, tmp_path):
    mixed = {"mixed": MESHES["mixed"]}
    more = {"stopped": {"stop_at": [10, 1]}}  # SIGTERM to the second process only
    one, two = run_meshes("toy", mixed, mixed | {"stopped": {"data": 4, "tensor": 2}}, 380, more)
    first = two.pop("stopped")
    assert len(first) == 10  # both stopped after the same step
    assert_equal_losses(one, two)
    # Continued on another number of processes and devices, from the checkpoint that two processes wrote.
    toy.run({"directory": str(tmp_path / "two" / "stopped")})
    lines = (tmp_path / "two" / "stopped" / "metrics.jsonl").read_text().splitlines()
    continued = [r["train/loss"] for r in map(json.loads, lines) if "train/loss" in r]
    assert continued[:10] == first
    np.testing.assert_allclose(continued, one["mixed"], rtol=1e-5)


@pytest.mark.timeout(400)
def test_parts_of_a_batch_add_up_on_a_mesh(start, tmp_path):
    """Every device has its share of every part; targets are spread unevenly, so a mean of means would differ."""
    common = {"noise": 0.0, "steps": 8}
    more = {"whole": common, "parts": common | {"accumulate": 4}}
    meshes = dict.fromkeys(more, MESHES["mixed"])
    process = start({"model": "toy", "devices": 8, "directory": str(tmp_path), "meshes": meshes, "more": more})
    try:
        output = process.communicate(timeout=380)[0]
    finally:
        process.kill()
    assert process.returncode == 0, output
    found = losses_in(output)
    assert len(found["whole"]) == 8 and found["whole"][-1] < found["whole"][0]
    np.testing.assert_allclose(found["parts"], found["whole"], rtol=1e-5)


def test_slurm_is_detected_and_flags_win(monkeypatch):
    calls = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *args: calls.append(args))
    for name in ("SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    initialize(HostsConfig())
    assert not calls  # one process on a workstation
    monkeypatch.setenv("SLURM_NTASKS", "2")
    initialize(HostsConfig())
    assert not calls  # inside salloc, but not a task of srun
    monkeypatch.setenv("SLURM_PROCID", "1")
    initialize(HostsConfig())
    initialize(HostsConfig("host:1", 2, 0))
    assert calls == [(), ("host:1", 2, 0)]


# Last run 2026-11-27 on two cores: decoder passed in 48 s, toy in 24 s.
@pytest.mark.slow  # four meshes compile
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("model, drop", [("toy", 0.2), ("decoder", 0.5)])
def test_every_axis_by_itself(run_meshes, model, drop):
    more = {"mixed": {"accumulate": 2}} if model == "decoder" else {}  # the toy's noise depends on the parts
    one, two = run_meshes(model, MESHES, MESHES, 1400, more)
    assert_equal_losses(one, two)
    np.testing.assert_allclose(one["data"], one["mixed"], rtol=1e-5)
    np.testing.assert_allclose(one["data"], one["fsdp"], rtol=1e-5)
    assert one["data"][-1] < one["data"][0] - drop
