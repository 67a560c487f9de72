"""Model directories: refused layouts, sharding, and replacement that survives kills and full disks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from jaxmodels.checkpoints.huggingface import (
    INDEX,
    SINGLE,
    Checkpoint,
    read_json,
    replaced_directory,
    resolve,
    write_weights,
)
from jaxmodels.checkpoints.safetensors import write_safetensors

A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(5, np.float32)


def listed(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def index(directory: Path, weight_map: dict) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_single_file(tmp_path):
    write_weights(tmp_path, {"a": A, "b": B}, max_shard_bytes=1000)
    assert listed(tmp_path) == [SINGLE]
    checkpoint = Checkpoint(tmp_path)
    np.testing.assert_array_equal(checkpoint.view("a"), A)
    assert checkpoint.describe("b") == (np.dtype(np.float32), (5,), str(tmp_path / SINGLE))


@pytest.mark.parametrize("limit", [1, 20, 24, 44, 64])
def test_shards_respect_the_limit_and_their_index(tmp_path, limit):
    tensors = {"a": A, "b": B, "c": A + 1}  # 24, 20 and 24 bytes
    write_weights(tmp_path, tensors, max_shard_bytes=limit)
    table = read_json(tmp_path / INDEX)
    assert table["metadata"]["total_size"] == 68
    files = sorted(set(table["weight_map"].values()))
    assert files == [f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))]
    for name in files:
        shard = safetensors.numpy.load_file(tmp_path / name)
        assert len(shard) == 1 or sum(array.nbytes for array in shard.values()) <= limit
    checkpoint = Checkpoint(tmp_path)
    assert set(checkpoint.names()) == set(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(checkpoint.view(name), array)


def test_max_shard_bytes_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="max_shard_bytes must be positive; got 0"):
        write_weights(tmp_path, {"a": A}, max_shard_bytes=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../evil.safetensors", "leaves the directory"),
        ("sub/../../evil.safetensors", "leaves the directory"),
        ("/etc/evil.safetensors", "leaves the directory"),
        ("C:/evil.safetensors", "leaves the directory"),
        ("..\\evil.safetensors", "leaves the directory"),
        ("pytorch_model-00001-of-00002.bin", "pickled weights are refused"),
        ("weights.pt", "pickled weights are refused"),
        ("weights.npz", "no .safetensors file"),
        ("absent.safetensors", "does not exist"),
        (7, "no file name"),
    ],
)
def test_index_entries_that_are_refused(tmp_path, name, message):
    directory = tmp_path / "model"
    directory.mkdir()
    write_safetensors(tmp_path / "evil.safetensors", {"a": A})
    (directory / "weights.pt").write_bytes(b"")
    index(directory, {"a": name})
    with pytest.raises(ValueError, match=message) as error:
        Checkpoint(directory)
    assert INDEX in str(error.value) and "'a'" in str(error.value)


def test_index_and_shards_must_agree(tmp_path):
    write_safetensors(tmp_path / "1.safetensors", {"a": A, "b": B})
    write_safetensors(tmp_path / "2.safetensors", {"b": B})
    index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    with pytest.raises(ValueError, match=r"tensor 'b' is in both 1\.safetensors and 2\.safetensors"):
        Checkpoint(tmp_path)
    index(tmp_path, {"a": "1.safetensors"})
    with pytest.raises(ValueError, match=r"tensor 'b' of 1\.safetensors is not in weight_map"):
        Checkpoint(tmp_path)
    index(tmp_path, {"a": "1.safetensors", "b": "1.safetensors", "c": "1.safetensors"})
    with pytest.raises(ValueError, match=r"tensor 'c' is not in 1\.safetensors"):
        Checkpoint(tmp_path)
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}')
    with pytest.raises(ValueError, match="duplicate key 'a'"):
        Checkpoint(tmp_path)
    for broken in ("{}", '{"weight_map": []}'):
        (tmp_path / INDEX).write_text(broken)
        with pytest.raises(ValueError, match="weight_map must be a non-empty object"):
            Checkpoint(tmp_path)


def test_directories_without_usable_weights(tmp_path):
    with pytest.raises(ValueError, match=f"neither {SINGLE} nor {INDEX}"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: pickled weights .* refused"):
        Checkpoint(tmp_path)
    write_safetensors(tmp_path / "1.safetensors", {"a": A})
    write_safetensors(tmp_path / SINGLE, {"a": A})
    index(tmp_path, {"a": "1.safetensors"})
    with pytest.raises(ValueError, match="an index of other files"):
        Checkpoint(tmp_path)
    index(tmp_path, {"a": SINGLE})
    Checkpoint(tmp_path)  # safetensors are there; the pickle beside them is never opened


def test_json_errors_name_the_file(tmp_path):
    path = tmp_path / "config.json"
    for content, message in ((b"\xff", "not UTF-8"), (b"[1]", "JSON object; got list"), (b"{", "not valid JSON")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            read_json(path)
        assert "config.json" in str(error.value)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_replacement_keeps_other_files_and_drops_old_weights(tmp_path):
    directory = tmp_path / "model"
    with replaced_directory(directory) as new:
        write_weights(new, {"a": A, "b": B}, max_shard_bytes=1)
        (new / "tokenizer.json").write_text("old")
        (new / "notes.txt").write_text("mine")
        assert not directory.exists()
    with replaced_directory(directory) as new:
        write_weights(new, {"a": A}, max_shard_bytes=1000)
        (new / "tokenizer.json").write_text("new")
    assert sorted(content(directory)) == [SINGLE, "notes.txt", "tokenizer.json"]
    assert content(directory)["tokenizer.json"] == b"new" and content(directory)["notes.txt"] == b"mine"
    assert listed(tmp_path) == ["model"]


def test_a_failure_leaves_everything_as_it_was(tmp_path):
    directory = tmp_path / "model"
    with replaced_directory(directory) as new:
        write_weights(new, {"a": A}, max_shard_bytes=1000)
    before = content(directory)
    with pytest.raises(KeyboardInterrupt), replaced_directory(directory) as new:
        write_weights(new, {"a": A + 1}, max_shard_bytes=1000)
        raise KeyboardInterrupt
    assert content(directory) == before and listed(tmp_path) == ["model"]


def test_replacement_without_an_exchange_of_directories(tmp_path, monkeypatch):
    """File systems without RENAME_EXCHANGE: two renames, undone when the second fails."""
    monkeypatch.setattr("jaxmodels.checkpoints.huggingface._exchange", lambda first, second: False)
    directory = tmp_path / "model"
    for number in range(2):
        with replaced_directory(directory) as new:
            (new / "config.json").write_text(str(number))
        assert content(directory) == {"config.json": str(number).encode()}
    rename = Path.rename

    def fail(self, target):
        if self.suffix == ".new":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="No space"), replaced_directory(directory) as new:
        (new / "config.json").write_text("2")
    assert content(directory) == {"config.json": b"1"} and listed(tmp_path) == ["model"]


def test_directories_that_hold_more_than_a_model_are_refused(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="run holds the directory 'checkpoints'"), replaced_directory(tmp_path / "run"):
        pass
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"), replaced_directory(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "x"


KILLED = """
import os, sys, itertools
from pathlib import Path
import numpy as np
from jaxmodels.checkpoints.huggingface import replaced_directory, write_weights
for round in range(int(sys.argv[2])):
    if (child := os.fork()) == 0:
        for n in itertools.count(round * 1000):
            with replaced_directory(sys.argv[1]) as new:
                write_weights(new, {f"t{i}": np.full(50_000, n, np.int32) for i in range(4)}, max_shard_bytes=200_000)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
    sys.stdin.readline()
"""


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    """Writers of one directory are killed in the middle; what is there is always of one piece."""
    directory, rounds = tmp_path / "model", 8
    writer = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(directory), str(rounds)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    random = np.random.default_rng(0)
    seen = set()
    for _ in range(rounds):
        child = int(writer.stdout.readline())
        deadline = time.monotonic() + 60
        while not directory.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
        assert writer.stdout.readline() == "dead\n"
        checkpoint = Checkpoint(directory)
        values = {int(v) for name in checkpoint.names() for v in checkpoint.view(name)[[0, -1]]}
        assert set(checkpoint.names()) == {"t0", "t1", "t2", "t3"} and len(values) == 1
        seen |= values
        writer.stdin.write("\n")
        writer.stdin.flush()
    assert writer.wait(60) == 0
    assert len(seen) > 1
    with replaced_directory(directory) as new:  # removes what the killed ones left
        (new / "config.json").write_text("{}")
    assert listed(tmp_path) == ["model"]


def cached(home: Path, repo_id: str = "org/name") -> Path:
    """A repository in the cache of the hub, with its links into a blob store."""
    root = home / "hub" / ("models--" + repo_id.replace("/", "--"))
    commit = "a" * 40
    snapshot = root / "snapshots" / commit
    for folder in (snapshot, root / "refs", root / "blobs"):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    write_safetensors(root / "blobs" / "b1", {"a": A})
    (snapshot / SINGLE).symlink_to("../../blobs/b1")
    return snapshot


def test_repository_ids_without_huggingface_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # import raises ImportError
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    with pytest.raises(ValueError, match=r"'org/name' .* install the extra: pip install 'jaxstream\[hf\]'"):
        resolve("org/name")
    snapshot = cached(tmp_path)
    assert resolve("org/name") == snapshot
    np.testing.assert_array_equal(Checkpoint(resolve("org/name")).view("a"), A)


def test_repository_ids_come_from_the_cache_when_offline(tmp_path):
    snapshot = cached(tmp_path)
    code = """
from jaxmodels.checkpoints.huggingface import resolve
print(resolve("org/name"))
try:
    resolve("org/other")
except ValueError as error:
    print(error)
"""
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_CACHE"} | {
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
    }
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    first, second = result.stdout.splitlines()
    assert first == str(snapshot)
    assert second.startswith("'org/other' is no local directory and could not be downloaded:")


def test_paths_that_are_no_model(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; give the directory"):
        resolve(tmp_path / "file")
    for name in (tmp_path / "absent", "./absent/model", "a/b/c", "absent"):
        with pytest.raises(ValueError, match="is no directory"):
            resolve(name)
