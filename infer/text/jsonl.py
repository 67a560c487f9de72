"""Requests from a JSONL file, results to another, so that a killed run goes on where it was. Imports no JAX."""

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from infer.text.requests import Request

# Field of a request line -> (what is accepted, in words, check). None means absent.
_NUMBER = ("a number", lambda v: isinstance(v, int | float) and not isinstance(v, bool))
_INTEGER = ("an integer", lambda v: isinstance(v, int) and not isinstance(v, bool))
_STRING = ("a string", lambda v: isinstance(v, str))
_STRINGS = ("a list of strings", lambda v: isinstance(v, list) and all(isinstance(s, str) for s in v))
_IDS = (
    "a list of integers from 0 to 2**31 - 1",
    lambda v: isinstance(v, list) and all(_INTEGER[1](i) and 0 <= i < 2**31 for i in v),
)
_MESSAGES = (
    'a list of objects with "role" and "content"',
    lambda v: isinstance(v, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in v),
)
FIELDS = {
    "prompt": _STRING,
    "ids": _IDS,
    "messages": _MESSAGES,
    "max_new_tokens": _INTEGER,
    "stop": _STRINGS,
    "temperature": _NUMBER,
    "top_k": _INTEGER,
    "top_p": _NUMBER,
    "min_p": _NUMBER,
    "repetition_penalty": _NUMBER,
    "presence_penalty": _NUMBER,
    "seed": _INTEGER,
    "eos_ids": _IDS,
    "logprobs": ("true or false", lambda v: isinstance(v, bool)),
    "top_logprobs": _INTEGER,
    "infill": ("true or false", lambda v: isinstance(v, bool)),
    "options": ("an object", lambda v: isinstance(v, dict)),
}


def request_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object's fields for `Request`, types checked; raises ValueError naming the first bad one."""
    unknown = sorted(record.keys() - FIELDS.keys())
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}; known: {', '.join(['id', *FIELDS])}")
    values = {name: value for name, value in record.items() if value is not None}
    for name, value in values.items():
        words, good = FIELDS[name]
        if not good(value):
            raise ValueError(f"{name} must be {words}; got {value!r}")
        if words == "a number":
            values[name] = float(value)
    return values


def read_requests(lines: Iterable[bytes], source: str, defaults: Mapping[str, Any]) -> list[tuple[str, Request]]:
    """(id, request) of each line; empty lines are skipped.

    A line is a JSON object with exactly one of `prompt`, `ids` and `messages`, any other field of `Request`, and an
    optional `id` (a string or integer; the line number otherwise). `defaults` fill in what a line does not say.
    Raises ValueError naming `source` and line for anything else, so a bad file stops the run before it starts.
    """
    requests: dict[str, Request] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
            except RecursionError:
                raise ValueError("not JSON that can be read (nested too deeply)") from None
            try:
                json.dumps(record, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise ValueError("holds half of a UTF-16 surrogate pair, which is no character") from None
            if not isinstance(record, dict):
                raise ValueError(f"must be a JSON object; got {type(record).__name__}")
            key = record.pop("id", number)
            if not isinstance(key, str | int) or isinstance(key, bool):
                raise ValueError(f"id must be a string or an integer; got {key!r}")
            if str(key) in requests:
                raise ValueError(f"id {str(key)!r} occurs twice")
            requests[str(key)] = Request(**{**defaults, **request_fields(record)})
        except ValueError as error:
            raise ValueError(f"{source}, line {number}: {error}") from None
    return list(requests.items())


class ResultFile:
    """Results appended line by line; opening it again continues it.

    Each line is written whole and forced to the disk, so that a kill loses at most the line being written; a line cut
    off by one is removed when the file is opened. Two runs on one file are refused (`flock`).

    Attributes:
      done: ids that have a result already; a line with an `error` is no result.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)  # held, with its lock, until close
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"{path}: another run is writing to it") from None
        self.path = path
        self.done = self._recover()

    def _recover(self) -> set[str]:
        self._file.seek(0)
        done, end = set(), 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                self._file.truncate(end)  # cut off by a kill or a full disk
                break
            end += len(line)
            try:
                record = json.loads(line)
                if "error" not in record:
                    done.add(str(record["id"]))
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{self.path}, line {number}: no result line; is this the right file?") from None
        return done

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one line; raises OSError (the file then ends with the last whole line) when the disk is full."""
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        end = self._file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(end)
            raise

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "ResultFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
