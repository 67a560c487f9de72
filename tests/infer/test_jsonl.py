"""Requests from JSONL with precise errors; results that survive kills, full disks and a second run."""

import json

import pytest

from infer.text.jsonl import ResultFile, read_requests
from infer.text.requests import Request


def read(*lines, **defaults):
    return read_requests([line if isinstance(line, bytes) else line.encode() for line in lines], "in.jsonl", defaults)


def test_lines_become_requests():
    result = read(
        '{"prompt": "a"}',
        "",
        '{"id": "x", "ids": [1, 2], "temperature": 1, "stop": ["."], "seed": null}',
        '{"id": 7, "messages": [{"role": "user", "content": "hi"}], "top_k": 3}',
        top_k=9,
        seed=5,
    )
    assert result == [
        ("1", Request(prompt="a", top_k=9, seed=5)),
        ("x", Request(ids=[1, 2], temperature=1.0, stop=["."], top_k=9, seed=5)),
        ("7", Request(messages=[{"role": "user", "content": "hi"}], top_k=3, seed=5)),
    ]


BAD = [
    ("{", "not JSON"),
    ("[1]", "must be a JSON object; got list"),
    (b'{"prompt": "\xff"}', "not UTF-8"),
    ('{"promt": "a"}', "unknown option 'promt'"),
    ("{}", "exactly one of prompt, ids and messages"),
    ('{"prompt": "a", "ids": [1]}', "exactly one of"),
    ('{"prompt": 1}', "prompt must be a string; got 1"),
    ('{"prompt": "a", "top_k": 1.5}', "top_k must be an integer; got 1.5"),
    ('{"prompt": "a", "top_k": true}', "top_k must be an integer; got True"),
    ('{"prompt": "a", "temperature": "hot"}', "temperature must be a number; got 'hot'"),
    ('{"prompt": "a", "stop": "END"}', "stop must be a list of strings; got 'END'"),
    ('{"ids": [1, "2"]}', "ids must be a list of integers"),
    ('{"ids": [1, 4294967297]}', r"ids must be a list of integers from 0 to 2\*\*31 - 1"),
    ('{"ids": [1], "eos_ids": [-1]}', "eos_ids must be a list of integers from 0"),
    ('{"prompt": "\\ud800"}', "half of a UTF-16 surrogate pair"),
    ("[" * 100_000, "nested too deeply"),
    ('{"prompt": "a", "infill": 1}', "infill must be true or false; got 1"),
    ('{"prompt": "a", "top_logprobs": 21}', r"top_logprobs must lie in 0..20; got 21"),
    ('{"messages": [{"role": "user"}]}', "messages must be a list of objects"),
    ('{"prompt": "a", "id": 1.5}', "id must be a string or an integer; got 1.5"),
    ('{"prompt": "a", "id": "ok"}', "id 'ok' occurs twice"),
]


@pytest.mark.parametrize("line, message", BAD, ids=[message for _, message in BAD])
def test_a_bad_line_is_named(line, message):
    with pytest.raises(ValueError, match=f"in.jsonl, line 2: .*{message}"):
        read('{"prompt": "a", "id": "ok"}', line)


def test_results_are_appended_and_found_again(tmp_path):
    path = tmp_path / "new" / "out.jsonl"
    with ResultFile(path) as results:
        assert results.done == set()
        results.append({"id": "a", "text": "é\n"})
        results.append({"id": "b", "error": "too long"})
    with ResultFile(path) as results:
        assert results.done == {"a"}  # what failed is tried again
        results.append({"id": "c", "text": ""})
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [line["id"] for line in lines] == ["a", "b", "c"] and lines[0]["text"] == "é\n"


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_line_cut_off_by_a_kill_is_removed(tmp_path, cut):
    path = tmp_path / "out.jsonl"
    with ResultFile(path) as results:
        results.append({"id": "a", "text": "x"})
        results.append({"id": "b", "text": "y"})
    path.write_bytes(path.read_bytes()[:-cut])
    with ResultFile(path) as results:
        assert results.done == {"a"}
        results.append({"id": "b", "text": "y"})
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "b"]


def test_a_full_disk_leaves_whole_lines(tmp_path):
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    path = tmp_path / "out.jsonl"
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with ResultFile(path) as results:
        results.append({"id": "a", "text": "x"})
        size = path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, old[1]))
        try:
            with pytest.raises(OSError):
                results.append({"id": "b", "text": "y" * 100})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
            signal.signal(signal.SIGXFSZ, handler)
        assert path.stat().st_size == size
        results.append({"id": "b", "text": "now"})
    with ResultFile(path) as results:
        assert results.done == {"a", "b"}


def test_two_runs_on_one_file_are_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    with ResultFile(path), pytest.raises(ValueError, match=r"out\.jsonl: another run is writing to it"):
        ResultFile(path)
    ResultFile(path).close()


def test_a_file_of_something_else_is_refused_and_kept(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("dear diary\nmore\n")
    with pytest.raises(ValueError, match=r"notes\.txt, line 1: no result line"):
        ResultFile(path)
    assert path.read_text() == "dear diary\nmore\n"
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
