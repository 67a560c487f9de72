"""Checkpoints of a run: the whole state and the position in the data, asynchronous and atomic, by orbax."""

import contextlib
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from train import distributed
from train.state import TrainState

__all__ = ["CheckpointError", "Checkpoints", "RunLock", "check_identity"]

UNFINISHED = "*.orbax-checkpoint-tmp"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or does not fit; what was already written is intact."""


class RunLock:
    """Holds a run directory for one process (process 0 of a run) until it ends, however it ends.

    An advisory lock of the kernel: `kill -9` releases it, a stale file does not matter.
    """

    def __init__(self, directory: Path):
        self.path = Path(directory) / ".lock"
        self._file = self.path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            self._file.close()
            raise ValueError(
                f"run directory {directory} is in use by {owner}; wait for it or choose another directory"
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        self._file.close()


class Checkpoints:
    """The checkpoints of one run directory. With several processes all of them make the same calls."""

    def __init__(self, directory: Path, keep: int = 2):
        self.directory = Path(directory).absolute()
        self._pending: tuple[int, Any] | None = None
        try:
            self._orbax = ocp.training.Checkpointer(
                self.directory,
                cleanup_tmp_directories=True,  # of a run that was killed while writing
                preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            )
        except OSError as error:
            raise CheckpointError(f"checkpoints cannot be opened in {self.directory}: {error}") from error

    @property
    def latest(self) -> int | None:
        """Number of updates in the latest complete checkpoint."""
        return None if self._orbax.latest is None else self._orbax.latest.step

    def save(self, step: int, state: TrainState, data_state: dict, identity: dict) -> None:
        """Starts to write the state after `step` updates; waits for an earlier write first.

        The state may be donated as soon as this returns. Failures appear in the next `save` or in `wait`.
        """
        self.wait()
        try:
            response = self._orbax.save_checkpointables_async(
                step,
                {"state": state, "data": data_state},
                force=True,
                custom_metadata={"identity": identity},
            )
        except (OSError, ValueError) as error:
            raise self._failure(step, error) from error
        self._pending = (step, response)

    def wait(self) -> None:
        """Returns once the last checkpoint is complete on disk."""
        if self._pending is None:
            return
        (step, response), self._pending = self._pending, None
        try:
            written = response is not None and response.result()
        except (OSError, ValueError) as error:
            raise self._failure(step, error) from error
        if not written:
            raise CheckpointError(f"checkpoint of step {step} in {self.directory} was not written")

    def identity(self) -> dict:
        """What the run of the latest checkpoint was, as given to `save`."""
        return self._orbax.checkpointables_metadata(self.latest).custom_metadata["identity"]

    def load_data_state(self) -> dict:
        """Position in the data of the latest checkpoint."""
        return self._orbax.load_checkpointables(self.latest, {"data": None})["data"]

    def load_state(self, target: TrainState) -> TrainState:
        """State of the latest checkpoint; `target` gives shape, dtype and sharding of every array."""
        step = self.latest
        metadata = self._orbax.checkpointables_metadata(step).metadata["state"]
        saved, wanted = _shapes(metadata), _shapes(target)
        # Our own comparison: orbax would report a wrong shape as a missing handler.
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise CheckpointError(
                    f"checkpoint {self.directory / str(step)} does not fit: {name} is "
                    f"{saved.get(name, 'absent')} there and {wanted.get(name, 'absent')} in this run"
                )
        return self._orbax.load_checkpointables(step, {"state": target})["state"]

    def close(self) -> None:
        """Waits for the last write. Safe to call after a failure."""
        try:
            self.wait()
        finally:
            # After a failed write, which `wait` has reported, orbax raises the same error once more.
            with contextlib.suppress(OSError, ValueError):
                self._orbax.close()
            self._remove_unfinished()

    def _failure(self, step: int, error: Exception) -> CheckpointError:
        self._remove_unfinished()
        complete = sorted(p.name for p in self.directory.iterdir() if p.name.isdecimal())
        kept = f"intact: {', '.join(complete)}" if complete else "there is no earlier one"
        return CheckpointError(
            f"checkpoint of step {step} could not be written to {self.directory} ({kept}): {_first_line(error)}"
        )

    def _remove_unfinished(self) -> None:
        if distributed.is_main():
            for path in self.directory.glob(UNFINISHED):
                shutil.rmtree(path, ignore_errors=True)


def check_identity(saved: dict, current: dict, directory: Path) -> None:
    """Refuses to continue a run under a configuration that would make it another run, naming the fields."""
    changed = [
        f"{name} was {_short(old)} and is now {_short(new)}"
        for name, old, new in _differences(saved, plain_json(current))
    ]
    if changed:
        raise ValueError(
            f"run directory {directory} holds a run with another configuration: {'; '.join(changed)}. "
            "Restore the old values, or start in another directory"
        )


def plain_json(value: Any) -> Any:
    """`value` as it looks after a round trip through JSON: tuples are lists, keys are strings."""
    return json.loads(json.dumps(value))


_ABSENT = object()


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            inner = f"{name}.{key}" if name else key
            yield from _differences(old.get(key, _ABSENT), new.get(key, _ABSENT), inner)
    elif old != new:
        yield name, old, new


def _short(value: Any) -> str:
    text = "absent" if value is _ABSENT else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no details'}"


def _shapes(tree: Any) -> dict[str, str]:
    """Dotted path -> "dtype[shape]" of every array; keys in the form in which they are stored."""
    result = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = ".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        result[name] = f"{leaf.dtype}{list(leaf.shape)}"
    return result
