"""Safetensors files: a memory-mapped reader and an atomic writer, strict both ways.

A file is an 8-byte little-endian header length, a JSON header, and the raw little-endian data; each tensor's
`data_offsets` count from the end of the header. Nothing is read before it is used: a tensor is a NumPy view
of the memory map, so slicing it reads the pages of the slice and nothing else. The `safetensors` package is
not used here because its NumPy front end neither reads float8 nor writes non-contiguous arrays correctly.

Source of the format: the README of huggingface/safetensors.
"""

import contextlib
import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(scalar)
    for name, scalar in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "C64": np.complex64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    }.items()
}
DTYPE_NAMES: dict[np.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `start` and `stop` count bytes from the beginning of the data section."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def parse_json(text: str, where: str) -> Any:
    """JSON with duplicate object keys refused; `where` is what the ValueError names."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"duplicate key {key!r}")
            result[key] = value
        return result

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None


class SafetensorsFile(Mapping[str, np.ndarray]):
    """One open file: `file[name]` is a read-only view of the memory map, `file.tensors[name]` its
    description.

    Raises ValueError, naming the file and the tensor, for a header that does not fit the file, invalid JSON,
    duplicate keys, unknown dtypes, and offsets that overlap, leave gaps, leave the file, or disagree with
    shape and dtype. A truncated file is one whose offsets leave it.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        size = self.path.stat().st_size
        if size < 8:
            raise ValueError(f"{self.path}: {size} bytes are too few for a safetensors header")
        with self.path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > MAX_HEADER_BYTES or 8 + header_bytes > size:
                raise ValueError(
                    f"{self.path}: header length {header_bytes} does not fit (file has {size} bytes, limit "
                    f"{MAX_HEADER_BYTES}); the file is truncated or no safetensors file"
                )
            raw = file.read(header_bytes)
            if len(raw) != header_bytes:
                raise ValueError(f"{self.path}: header ends after {len(raw)} of {header_bytes} bytes")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            header = parse_json(raw.decode("utf-8"), f"{self.path}: header")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: header is not UTF-8 ({error})") from None
        if not isinstance(header, dict):
            raise ValueError(f"{self.path}: header must be a JSON object; got {type(header).__name__}")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError(f"{self.path}: __metadata__ must map strings to strings; got {metadata!r}")
        self.metadata: dict[str, str] = metadata
        self._data_start = 8 + header_bytes
        self.tensors = {name: self._check(name, entry) for name, entry in header.items()}
        self._check_layout(size - self._data_start)

    def _check(self, name: str, entry: Any) -> TensorInfo:
        where = f"{self.path}: tensor {name!r}"
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{where}: entry must have exactly dtype, shape and data_offsets; got {entry!r}")
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
            raise ValueError(f"{where}: dtype {entry['dtype']!r} is not one of {[*DTYPES]}")
        for field in ("shape", "data_offsets"):
            values = entry[field]
            if not isinstance(values, list) or any(type(v) is not int or v < 0 for v in values):
                raise ValueError(f"{where}: {field} must be a list of integers >= 0; got {values!r}")
        if len(entry["data_offsets"]) != 2:
            raise ValueError(f"{where}: data_offsets must be [start, stop]; got {entry['data_offsets']!r}")
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        start, stop = entry["data_offsets"]
        expected = math.prod(shape) * dtype.itemsize
        if stop - start != expected:
            raise ValueError(
                f"{where}: data_offsets {start}..{stop} hold {stop - start} bytes; shape {shape} of "
                f"{entry['dtype']} needs {expected}"
            )
        return TensorInfo(dtype, shape, start, stop)

    def _check_layout(self, data_bytes: int) -> None:
        position = 0
        for name, info in sorted(self.tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
            where = f"{self.path}: tensor {name!r}"
            if info.start != position:
                what = "overlaps the tensor before it" if info.start < position else "leaves a gap before it"
                raise ValueError(f"{where}: data_offsets start at {info.start}, {what} (expected {position})")
            if info.stop > data_bytes:
                raise ValueError(
                    f"{where}: data ends at byte {info.stop} of the data section, which has {data_bytes}; "
                    "the file is truncated"
                )
            position = info.stop
        if position != data_bytes:
            raise ValueError(f"{self.path}: {data_bytes - position} bytes after the last tensor")

    def __getitem__(self, name: str) -> np.ndarray:
        info = self.tensors[name]
        raw = np.frombuffer(self._map, np.uint8, info.stop - info.start, self._data_start + info.start)
        return raw.view(info.dtype).reshape(info.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that the writer asks for when its turn comes, so that one at a time is in memory."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Any]:
    """A binary file that appears under `path` complete and synced to disk, or not at all.

    On any exception (a full disk, an interrupt) the temporary file is removed and what `path` held stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: str | os.PathLike) -> None:
    """Makes renames inside `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def writing_order(tensors: Mapping[str, np.ndarray | LazyTensor]) -> list[str]:
    """Names in the order in which `write_safetensors` reads and stores them: widest dtypes first."""
    return sorted(tensors, key=lambda name: -np.dtype(tensors[name].dtype).itemsize)  # a stable sort


def write_safetensors(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray | LazyTensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one file atomically; views in any memory order are stored as their logical values.

    `LazyTensor` values are read one at a time. Widest dtypes come first so that every tensor stays aligned
    to its item size; the data section starts at a multiple of 64 bytes.

    Raises ValueError for a dtype that safetensors does not have, and for a lazy tensor that delivers another
    shape or dtype than it announced; OSError when the file cannot be written. In each case `path` is
    untouched.
    """
    order = writing_order(tensors)
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(metadata)
    position = 0
    for name in order:
        tensor = tensors[name]
        dtype = np.dtype(tensor.dtype).newbyteorder("=")
        if name == "__metadata__" or dtype not in DTYPE_NAMES:
            raise ValueError(f"{path}: tensor {name!r} of dtype {dtype} cannot be stored; known: {[*DTYPES]}")
        stop = position + math.prod(tensor.shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": [int(n) for n in tensor.shape],
            "data_offsets": [position, stop],
        }
        position = stop
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-(8 + len(raw)) % 64)
    with atomic_file(path) as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name in order:
            tensor = tensors[name]
            array = tensor.read() if isinstance(tensor, LazyTensor) else tensor
            if tuple(array.shape) != tuple(tensor.shape) or array.dtype != tensor.dtype:
                raise ValueError(
                    f"{path}: tensor {name!r} was announced as {tensor.dtype} {tuple(tensor.shape)}, came as "
                    f"{array.dtype} {tuple(array.shape)}"
                )
            little = np.asarray(array, dtype=np.dtype(array.dtype).newbyteorder("="), order="C")
            file.write(little.reshape(-1).view(np.uint8).data)
