"""What a number needs to mean anything: the machine, versions, date and command behind it. Imports nothing but JAX."""

import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Devices, processor, date and versions, for the record of a run."""
    import jax

    return {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cpu": cpu_name(),
        "cpu_cores": cpu_cores(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }


def command_line() -> str:
    """The command, ready to be typed, where Python was started as `python -m MODULE`."""
    return shlex.join(["python", *(["-m", *sys.orig_argv[2:]] if "-m" in sys.orig_argv else sys.argv)])


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def cpu_cores() -> int | None:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
