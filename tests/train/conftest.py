import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

HERE = Path(__file__).parent


def _load(name):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def compiled_programs(tmp_path_factory):
    """XLA's persistent cache for a module's tests: every `fit` compiles the same few programs again."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    compilation_cache.reset_cache()
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def toy(compiled_programs):
    """The module toy_run.py."""
    return _load("toy_run")


@pytest.fixture(scope="session")
def clean_env(tmp_path_factory):
    """Environment for subprocesses: one CPU device, no cluster, one compilation cache for all of them."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "JAX_", "XLA_", "JAXSTREAM_"))}
    cache = tmp_path_factory.mktemp("xla")
    return env | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS", "0"),  # as here
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "PYTHONPATH": str(HERE.parent.parent),
    }


@pytest.fixture(scope="session")
def start_toy(clean_env):
    """Starts toy_run.py with options in a process of its own."""

    def start(options):
        command = [sys.executable, str(HERE / "toy_run.py"), json.dumps(options)]
        return subprocess.Popen(command, env=clean_env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    return start


def records(directory):
    """Lines of metrics.jsonl."""
    return [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def losses():
    """step -> training loss of a run directory."""
    return lambda directory: {r["step"]: r["train/loss"] for r in records(directory) if "train/loss" in r}


@pytest.fixture(scope="session")
def read_records():
    return records
