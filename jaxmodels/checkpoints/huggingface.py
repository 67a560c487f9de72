"""The Hugging Face directory layout: finding, checking, reading and atomically replacing model directories.

A model directory holds `config.json`, optionally `generation_config.json` and tokenizer files, and the
weights as `model.safetensors` or as shards named by `model.safetensors.index.json`. Nothing in it is
executed: pickled weights and custom code are never opened.
"""

import contextlib
import ctypes
import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from jaxmodels.checkpoints.safetensors import (
    LazyTensor,
    SafetensorsFile,
    atomic_file,
    parse_json,
    sync_directory,
    write_safetensors,
    writing_order,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DOWNLOADED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "LICENSE*")


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """A JSON object from a file; ValueError naming the file for anything else, also for duplicate keys."""
    path = Path(path)
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from None
    value = parse_json(text, str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object; got {type(value).__name__}")
    return value


def write_json(path: str | os.PathLike, value: Mapping[str, Any]) -> None:
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


class Checkpoint:
    """The weights of one directory: names, descriptions and views from all its shards.

    `bytes_read` counts what `view`s were really copied from (see `count`).

    Raises ValueError naming the file and the tensor for: no weights, pickled weights, both a single file
    and an index that names others, index entries that leave the directory or are no safetensors, missing
    shards, tensors that the index and the shards do not agree on, and tensors present in two shards.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        self._files: dict[str, SafetensorsFile] = {}
        self._lock = threading.Lock()
        self.bytes_read = 0
        index, single = self.directory / INDEX, self.directory / SINGLE
        if index.exists():
            self._open_index(index)
            if single.exists() and SINGLE not in {file.path.name for file in self._files.values()}:
                raise ValueError(f"{self.directory}: holds {SINGLE} and an index of other files; remove one")
        elif single.exists():
            file = SafetensorsFile(single)
            self._files = dict.fromkeys(file, file)
        else:
            self._explain_missing()

    def _explain_missing(self) -> None:
        pickled = sorted(p.name for p in self.directory.iterdir() if p.suffix in PICKLED)
        if pickled:
            raise ValueError(
                f"{self.directory / pickled[0]}: pickled weights can run code when opened and are refused; "
                "convert them to safetensors"
            )
        raise ValueError(f"{self.directory}: has neither {SINGLE} nor {INDEX}")

    def _open_index(self, index: Path) -> None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: weight_map must be a non-empty object; got {weight_map!r}")
        shards: dict[str, SafetensorsFile] = {}
        for tensor, name in weight_map.items():
            if not isinstance(name, str):
                raise ValueError(f"{index}: tensor {tensor!r} maps to {name!r}, which is no file name")
            if name in shards:
                continue
            pure = PurePosixPath(name)
            if pure.is_absolute() or PureWindowsPath(name).drive or "\\" in name or ".." in pure.parts:
                raise ValueError(f"{index}: tensor {tensor!r} maps to {name!r}, which leaves the directory")
            if pure.suffix in PICKLED:
                raise ValueError(f"{index}: tensor {tensor!r} maps to {name!r}; pickled weights are refused")
            if pure.suffix != ".safetensors":
                raise ValueError(f"{index}: tensor {tensor!r} maps to {name!r}, no .safetensors file")
            if not (self.directory / name).exists():
                raise ValueError(f"{index}: tensor {tensor!r} maps to {name!r}, which does not exist")
            shards[name] = SafetensorsFile(self.directory / name)
        for name, shard in shards.items():
            for tensor in shard:
                if tensor in self._files:
                    raise ValueError(
                        f"{index}: tensor {tensor!r} is in both {self._files[tensor].path.name} and {name}"
                    )
                if tensor not in weight_map:
                    raise ValueError(f"{index}: tensor {tensor!r} of {name} is not in weight_map")
                self._files[tensor] = shard
        for tensor, name in weight_map.items():
            if tensor not in shards[name]:
                raise ValueError(f"{index}: tensor {tensor!r} is not in {name}")

    def __str__(self) -> str:
        return str(self.directory)

    def names(self) -> Collection[str]:
        return self._files.keys()

    def describe(self, name: str) -> tuple[np.dtype, tuple[int, ...], str]:
        """dtype, shape, and the file it is in."""
        info = self._files[name].tensors[name]
        return info.dtype, info.shape, str(self._files[name].path)

    def view(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the memory map."""
        return self._files[name][name]

    def count(self, nbytes: int) -> None:
        """Adds to `bytes_read`; called by whoever copies out of a view."""
        with self._lock:
            self.bytes_read += nbytes


def write_weights(
    directory: Path,
    tensors: Mapping[str, np.ndarray | LazyTensor],
    *,
    max_shard_bytes: int,
    write: bool = True,
) -> None:
    """`model.safetensors`, or shards of at most `max_shard_bytes` of data and their index.

    Tensors keep their order; one that is larger than the limit gets a shard of its own. With `write=False`
    the tensors are produced in the same order and thrown away: what a process other than the first has to
    do when producing them is a collective operation.

    Raises ValueError for max_shard_bytes < 1.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be positive; got {max_shard_bytes}")
    shards: list[dict[str, np.ndarray | LazyTensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.nbytes > max_shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.nbytes
    # Other loaders look at this entry to learn how the file was made; "pt" is the only value all of them
    # take.
    metadata = {"format": "pt"}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, name)
        if write:
            write_safetensors(directory / name, shard, metadata)
        else:
            for value in (shard[key] for key in writing_order(shard)):
                if isinstance(value, LazyTensor):
                    value.read()
    if write and len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _is_model_file(name: str) -> bool:
    """Files that a new save replaces as a whole, so that no old shard survives beside new weights."""
    return name in (SINGLE, INDEX, "config.json", "generation_config.json") or bool(
        re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)
    )


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two paths in one step (Linux renameat2 with RENAME_EXCHANGE); False where that does not exist."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_fdcwd, rename_exchange = -100, 2
    return renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange) == 0


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def replaced_directory(directory: str | os.PathLike) -> Iterator[Path]:
    """Yields an empty sibling directory to fill, which then takes the place of `directory` in one step.

    Until the block ends `directory` keeps what it holds; after an exception it still does, and the sibling is
    removed. What a killed process left behind is removed by the next call on the same path. Other files of
    the old directory (tokenizer, notes) are kept unless the block wrote new ones; weights and configs are
    not.

    On file systems that cannot exchange two directories the swap is two renames; the old directory then
    stands as `.NAME.HOST-PID.old` in between.

    Raises ValueError when `directory` is a file or holds subdirectories, which a replacement would lose.
    """
    directory = Path(directory).resolve()  # a link stays, what it points to is replaced
    if directory.exists():
        if not directory.is_dir():
            raise ValueError(f"directory {directory} is a file")
        inside = sorted(p.name for p in directory.iterdir() if p.is_dir() and not p.is_symlink())
        if inside:
            raise ValueError(f"directory {directory} holds the directory {inside[0]!r}; a model needs its own")
    directory.parent.mkdir(parents=True, exist_ok=True)
    host = re.sub(r"\W", "_", socket.gethostname())
    for stale in directory.parent.glob(f".{directory.name}.{host}-*.new"):
        pid = stale.name.rsplit("-", 1)[1].removesuffix(".new")
        if pid.isdigit() and (int(pid) == os.getpid() or not _alive(int(pid))):
            shutil.rmtree(stale)
    temporary = directory.with_name(f".{directory.name}.{host}-{os.getpid()}.new")
    old = temporary.with_suffix(".old")
    temporary.mkdir()
    try:
        yield temporary
        if not directory.exists():
            sync_directory(temporary)
            temporary.rename(directory)
        else:
            for file in directory.iterdir():
                target = temporary / file.name
                if not _is_model_file(file.name) and not target.exists():
                    if file.is_symlink():
                        target.symlink_to(file.readlink())
                    else:
                        try:
                            os.link(file, target)
                        except OSError:
                            shutil.copy2(file, target)
            sync_directory(temporary)
            if _exchange(temporary, directory):
                old = temporary  # which now holds the previous content
            else:
                directory.rename(old)
                try:
                    temporary.rename(directory)
                except OSError:
                    old.rename(directory)
                    raise
        sync_directory(directory.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def resolve(directory_or_repo_id: str | os.PathLike) -> Path:
    """A local model directory: the given one, or a snapshot of the repository `org/name`.

    Repositories go through huggingface_hub, which honours HF_HOME, HF_HUB_OFFLINE and HF_TOKEN and reuses its
    cache; without that package only its cache is looked at. Only configs, safetensors and tokenizer files are
    ever downloaded.

    Raises ValueError when there is no such directory, and for a repository that cannot be had.
    """
    path = Path(directory_or_repo_id).expanduser()
    if path.is_dir():
        return path
    name = str(directory_or_repo_id)
    if path.exists():
        raise ValueError(f"{name} is a file; give the directory that holds config.json")
    if not isinstance(directory_or_repo_id, str) or not REPO_ID.fullmatch(name):
        raise ValueError(f"{name!r} is no directory (and no repository id org/name)")
    try:
        import huggingface_hub
    except ImportError:
        cached = _cached_snapshot(name)
        if cached is None:
            raise ValueError(
                f"{name!r} is no local directory and not in the Hugging Face cache; "
                "to download it install the extra: pip install 'jaxstream[hf]'"
            ) from None
        return cached
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[*DOWNLOADED], ignore_patterns=["*/*"]))
    except Exception as error:  # the hub raises a dozen types, some from its HTTP client
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{name!r} is no local directory and could not be downloaded: "
            f"{type(error).__name__}: {reason[0] if reason else ''}"
        ) from error


def _cached_snapshot(repo_id: str) -> Path | None:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / ("models--" + repo_id.replace("/", "--"))
    reference = cache / "refs" / "main"
    if not reference.is_file():
        return None
    snapshot = cache / "snapshots" / reference.read_text().strip()
    return snapshot if snapshot.is_dir() else None
