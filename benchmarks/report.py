"""What every benchmark shares: the machine it ran on, timing, device profiles and the raw result file.

Imports nothing beyond JAX and NumPy, so that a bare CUDA + JAX machine can run every benchmark.
"""

import collections
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from train.machine import command_line, cpu_cores, cpu_name

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "numpy", "torch", "transformers", "tokamax")


def environment() -> dict[str, Any]:
    """Hardware, versions, date and command: what a number needs to mean anything."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "python": platform.python_version(),
        "versions": versions,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cpu": cpu_name(),
        "cpu_cores": cpu_cores(),
        "gpu": _nvidia_smi() if device.platform == "gpu" else None,
    }


def _nvidia_smi() -> dict[str, str]:
    return _query(["name", "driver_version", "power.limit", "clocks.sm", "clocks.max.sm", "clocks.mem"])


def _query(fields: list[str]) -> dict[str, str]:
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    values = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    return dict(zip(fields, values, strict=True))


def clocks() -> dict[str, str]:
    """Clocks, power and temperature of the first GPU at this moment."""
    return _query(["clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu"])


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, extremes and count of repeated timings, in milliseconds."""
    milliseconds = sorted(1e3 * s for s in seconds)
    return {
        "median_ms": statistics.median(milliseconds),
        "min_ms": milliseconds[0],
        "max_ms": milliseconds[-1],
        "repeats": len(milliseconds),
    }


def timed(call: Callable[[], Any], *, repeats: int = 20, warm_up: int = 3) -> dict[str, float]:
    """Wall time of `call`, which returns device arrays, from dispatch to the last result ready."""
    for _ in range(warm_up):
        jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return spread(seconds)


class Event(NamedTuple):
    """One operation on the device, in nanoseconds."""

    name: str
    start: float
    duration: float


def device_profile(call: Callable[[], Any], *, calls: int = 5) -> dict[str, Any]:
    """Device time of one `call` by operation, read from a profiler trace of `calls` of them; see `profile_of`.

    XLA launches its operations one by one while it is traced, and not by CUDA graphs, unless `XLA_FLAGS` has
    `--xla_enable_command_buffers_during_profiling=true`. Raises RuntimeError without a GPU trace.
    """
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(calls):
                jax.block_until_ready(call())
        (trace,) = Path(directory).glob("**/*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(trace)).planes
        events = [
            # XLA numbers its fusions.
            Event(re.sub(r"_\d+$", "", event.name), event.start_ns, event.duration_ns)
            for plane in planes
            if plane.name.startswith("/device:GPU:0")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
    if not events:
        raise RuntimeError("the profiler trace has no GPU stream; device_profile needs a GPU")
    return profile_of(events, calls)


def profile_of(events: Iterable[Event], calls: int) -> dict[str, Any]:
    """What the operations of `calls` calls took, per call.

    Returns `device_ms` (sum over all streams), `span_ms` (first start to last end) and `operations`, every one above
    2 % of the device time, with `idle_ms`: how long nothing ran before it.
    """
    durations: dict[str, float] = collections.Counter()
    idle: dict[str, float] = collections.Counter()
    counts: dict[str, int] = collections.Counter()
    events = sorted(events, key=lambda event: event.start)
    begin = end = events[0].start
    for event in events:
        durations[event.name] += event.duration
        counts[event.name] += 1
        idle[event.name] += max(event.start - end, 0)
        end = max(end, event.start + event.duration)
    total = sum(durations.values())
    operations = [
        {
            "name": name,
            "ms": ns / calls / 1e6,
            "share": ns / total,
            "launches": counts[name] / calls,
            "idle_ms": idle[name] / calls / 1e6,
        }
        for name, ns in sorted(durations.items(), key=lambda item: -item[1])
        if ns > 0.02 * total
    ]
    return {"device_ms": total / calls / 1e6, "span_ms": (end - begin) / calls / 1e6, "operations": operations}


def time_layers(calls: dict[str, Callable[[], Any]], layers: int) -> dict[str, dict[str, Any]]:
    """Wall and device time per layer, in microseconds, of calls that run `layers` of them; printed as they come."""
    results = {}
    for name, call in calls.items():
        row: dict[str, Any] = dict(timed(call, repeats=10, warm_up=2))
        profile = device_profile(call, calls=3)
        row |= {"device_us": 1e3 * profile["device_ms"] / layers, "operations": profile["operations"]}
        row["wall_us"] = 1e3 * row["median_ms"] / layers
        results[name] = row
        print(f"  {name:7s} device {row['device_us']:8.2f} us  wall {row['wall_us']:8.2f} us", flush=True)
    return results


def record_shapes(name: str, shapes: Iterable[Any], row_of: Callable[[Any], dict[str, Any]]) -> int:
    """Records the row of each shape, which says whether it `passes`; exit status 1 if one does not or there is none.

    A shape that raises is a row that does not pass, not the end.
    """
    record = Record(name)
    for shape in shapes:
        try:
            row = row_of(shape)
        except Exception as error:
            row = {"shape": shape.name, "failure": f"{type(error).__name__}: {str(error)[:300]}", "passes": False}
        record.add(row)
        print(f"{'ok  ' if row['passes'] else 'FAIL'} {shape.name} {row.get('error', row.get('failure'))}", flush=True)
    failed = sum(not row["passes"] for row in record.rows)
    print(f"{len(record.rows)} shapes, {failed} failed")
    return 1 if failed or not record.rows else 0


def write(name: str, result: dict[str, Any]) -> Path:
    """Writes `{environment, **result}` to `results/NAME-DEVICE-DATE.json` (or under $JAXSTREAM_RESULTS)."""
    env = environment()
    path = _path(name, env)
    path.write_text(json.dumps({"environment": env, **result}, indent=1) + "\n")
    print(f"raw numbers: {path}")
    return path


class Record:
    """A result file that grows by rows and is whole after each, so that a run cut short keeps what it measured.

    Like `write`, but an earlier file of the same day is left alone: the new one gets a number.

    Attributes:
      path: the file.
      rows: what was added so far.
    """

    def __init__(self, name: str, **fields: Any):
        self._content = {"environment": environment(), **fields, "rows": []}
        first = _path(name, self._content["environment"])
        candidates = (first.with_stem(f"{first.stem}-{i}") if i > 1 else first for i in itertools.count(1))
        self.path = next(path for path in candidates if not path.exists())
        self.rows: list[dict[str, Any]] = self._content["rows"]
        self.save()
        print(f"raw numbers: {self.path}", flush=True)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.save()

    def save(self) -> None:
        """Writes the file anew; for rows that changed after they were added."""
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self._content, indent=1) + "\n")
        unfinished.replace(self.path)


def _path(name: str, env: dict[str, Any]) -> Path:
    device = env["device"].lower().replace(" ", "-")
    directory = Path(os.environ.get("JAXSTREAM_RESULTS", RESULTS))
    directory.mkdir(parents=True, exist_ok=True)
    return directory / f"{name}-{device}-{env['date'][:10]}.json"
