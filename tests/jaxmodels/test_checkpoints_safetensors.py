"""The safetensors reader and writer against the `safetensors` package, and against damaged files."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.checkpoints.safetensors import DTYPES, LazyTensor, SafetensorsFile, atomic_file, write_safetensors

PACKAGE_READS = [n for n in DTYPES if not n.startswith("F8")]  # its NumPy front end fails on float8


def random_array(dtype: np.dtype, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    raw = np.random.default_rng(seed).integers(0, 256, int(np.prod(shape)) * dtype.itemsize, np.uint8)
    if dtype == np.bool_:
        raw %= 2
    return raw.view(dtype).reshape(shape)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit for bit, so that NaN payloads count."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.smoke
@pytest.mark.parametrize("name", DTYPES)
def test_round_trip_of_each_dtype(tmp_path, name):
    array = random_array(DTYPES[name], (3, 5))
    write_safetensors(tmp_path / "x", {"a": array, "scalar": array[0, 0], "empty": array[:0]}, {"k": "v"})
    file = SafetensorsFile(tmp_path / "x")
    assert file.metadata == {"k": "v"}
    assert same(file["a"], array) and same(file["scalar"], np.asarray(array[0, 0])) and file["empty"].shape == (0, 5)
    assert not file["a"].flags.writeable
    if name in PACKAGE_READS:
        loaded = safetensors.numpy.load_file(tmp_path / "x")
        assert same(loaded["a"], array) and same(loaded["scalar"], np.asarray(array[0, 0]))


@pytest.mark.parametrize("name", PACKAGE_READS)
def test_files_of_the_package_are_read(tmp_path, name):
    array = random_array(DTYPES[name], (4, 3))
    safetensors.numpy.save_file({"a": array, "b": array[1:]}, tmp_path / "x", {"format": "pt"})
    file = SafetensorsFile(tmp_path / "x")
    assert same(file["a"], array) and same(file["b"], array[1:])


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=8).filter(lambda s: s != "__metadata__"),
        st.tuples(st.sampled_from(PACKAGE_READS), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    )
)
def test_any_set_of_tensors_is_read_by_the_package(tmp_path_factory, spec):
    path = tmp_path_factory.mktemp("any") / "x"
    tensors = {key: random_array(DTYPES[name], tuple(shape)) for key, (name, shape) in spec.items()}
    write_safetensors(path, tensors)
    loaded, own = safetensors.numpy.load_file(path), SafetensorsFile(path)
    assert loaded.keys() == own.keys() == tensors.keys()
    assert all(same(loaded[key], array) and same(own[key], array) for key, array in tensors.items())


def test_views_are_stored_as_their_values(tmp_path):
    """The package's writer stores the memory of a view instead."""
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    views = {"transposed": array.transpose(2, 0, 1), "strided": array[:, ::2, 1:], "big": array.astype(">f4")}
    write_safetensors(tmp_path / "x", views)
    loaded = safetensors.numpy.load_file(tmp_path / "x")
    for key, view in views.items():
        np.testing.assert_array_equal(loaded[key], view)


def test_data_is_aligned(tmp_path):
    tensors = {"bytes": np.zeros(3, np.uint8), "double": np.zeros(2), "half": np.zeros(3, np.float16)}
    write_safetensors(tmp_path / "x", tensors)
    file = SafetensorsFile(tmp_path / "x")
    assert all(file[key].ctypes.data % file[key].itemsize == 0 for key in tensors)


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": GOOD}, bytes(7), "tensor 'a': data ends at byte 8 .* has 7; the file is truncated"),
        ({"a": GOOD}, bytes(9), "1 bytes after the last tensor"),
        ({"a": GOOD | {"dtype": "F33"}}, bytes(8), "tensor 'a': dtype 'F33' is not one of"),
        ({"a": GOOD | {"dtype": ["F32"]}}, bytes(8), r"tensor 'a': dtype \['F32'\]"),
        ({"a": GOOD | {"dtype": "F4"}}, bytes(8), "tensor 'a': dtype 'F4'"),
        ({"a": GOOD | {"shape": [3]}}, bytes(8), r"tensor 'a': data_offsets 0..8 hold 8 bytes; shape \(3,\) .* 12"),
        ({"a": GOOD | {"shape": [-2]}}, bytes(8), "tensor 'a': shape must be a list of integers"),
        ({"a": GOOD | {"shape": [True]}}, bytes(8), "tensor 'a': shape must be"),
        ({"a": GOOD | {"shape": "2"}}, bytes(8), "tensor 'a': shape must be"),
        ({"a": GOOD | {"data_offsets": [0]}}, bytes(8), r"tensor 'a': data_offsets must be \[start, stop\]"),
        ({"a": GOOD | {"data_offsets": [8, 0]}}, bytes(8), "tensor 'a': data_offsets 8..0 hold -8"),
        ({"a": GOOD | {"data_offsets": [0.0, 8]}}, bytes(8), "tensor 'a': data_offsets must be a list"),
        ({"a": GOOD | {"extra": 1}}, bytes(8), "tensor 'a': entry must have exactly"),
        ({"a": 3}, b"", "tensor 'a': entry must have exactly"),
        ({"a": GOOD, "b": GOOD}, bytes(8), "tensor 'b': data_offsets start at 0, overlaps"),
        ({"a": GOOD | {"data_offsets": [4, 12]}}, bytes(12), "tensor 'a': data_offsets start at 4, leaves a gap"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__ must map strings"),
        ([GOOD], bytes(8), "header must be a JSON object; got list"),
        (b'{"a": 1, "a": 2}', b"", "duplicate key 'a'"),
        (b'{"a": ', b"", "not valid JSON"),
        (b'{"a": ' + b"[" * 9000 + b"]" * 9000 + b"}", b"", "not valid JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", b"", "not valid JSON"),
        (b'{"\xff": 1}', b"", "not UTF-8"),
    ],
)
def test_damaged_headers_are_refused_by_name(tmp_path, header, data, message):
    path = raw_file(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(ValueError, match=message) as error:
        SafetensorsFile(path)
    assert "bad.safetensors" in str(error.value)


@pytest.mark.parametrize("size", [0, 7])
def test_files_without_a_header_are_refused(tmp_path, size):
    (tmp_path / "x").write_bytes(bytes(size))
    with pytest.raises(ValueError, match="too few"):
        SafetensorsFile(tmp_path / "x")


def test_every_truncation_is_refused(tmp_path):
    write_safetensors(tmp_path / "whole", {"a": np.arange(6, dtype=np.int16), "b": np.ones(3)})
    content = (tmp_path / "whole").read_bytes()
    for size in range(len(content)):
        (tmp_path / "part").write_bytes(content[:size])
        with pytest.raises(ValueError, match="part"):
            SafetensorsFile(tmp_path / "part")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_random_damage_gives_a_value_error_or_tensors_inside_the_file(tmp_path_factory, changes):
    path = tmp_path_factory.mktemp("damage") / "x"
    write_safetensors(path, {"a": np.arange(6, dtype=np.int16), "b": np.ones((3, 1))}, {"format": "pt"})
    content = bytearray(path.read_bytes())
    for position, byte in changes:
        content[position % len(content)] = byte
    path.write_bytes(content)
    try:
        file = SafetensorsFile(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert sum(array.nbytes for array in file.values()) <= len(content)


def test_a_failing_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    write_safetensors(path, {"a": np.ones(4)})
    before = path.read_bytes()

    def fail():
        raise RuntimeError("device lost")

    with pytest.raises(RuntimeError, match="device lost"):
        write_safetensors(path, {"b": np.ones(4), "a": LazyTensor((4,), np.dtype(np.float64), fail)})
    wrong = LazyTensor((4,), np.dtype(np.float64), lambda: np.ones(5))
    with pytest.raises(ValueError, match=r"'a' was announced as float64 \(4,\), came as float64 \(5,\)"):
        write_safetensors(path, {"a": wrong})
    with pytest.raises(ValueError, match="'a' of dtype int4"):
        write_safetensors(path, {"a": np.ones(4, ml_dtypes.int4)})
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [tmp_path / "x"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """A file size limit stands for the full disk: both are an OSError in the middle of a write."""
    code = """
import resource, sys
import numpy as np
from jaxmodels.checkpoints.safetensors import write_safetensors
write_safetensors(sys.argv[1], {"a": np.ones(4)})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_safetensors(sys.argv[1], {"a": np.ones(4096)})
except OSError as error:
    print("refused", error.errno)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("refused")
    np.testing.assert_array_equal(SafetensorsFile(tmp_path / "x")["a"], np.ones(4))
    assert [*tmp_path.iterdir()] == [tmp_path / "x"]


def test_atomic_file_is_invisible_until_it_is_complete(tmp_path):
    with atomic_file(tmp_path / "x") as file:
        file.write(b"half")
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x").read_bytes() == b"half"
