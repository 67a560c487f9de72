"""What benchmarks share: a run of shapes is recorded whole, whatever some of them do."""

import json
import types

import pytest

from benchmarks import report


def test_shapes_that_raise_are_rows_that_do_not_pass(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXSTREAM_RESULTS", str(tmp_path))
    shapes = [types.SimpleNamespace(name=name) for name in ("right", "wrong", "raises")]

    def row_of(shape):
        if shape.name == "raises":
            raise NotImplementedError("no such shape")
        return {"shape": shape.name, "error": 0.0, "passes": shape.name == "right"}

    assert report.record_shapes("kernel", shapes[:1], row_of) == 0
    assert report.record_shapes("kernel", [], row_of) == 1
    assert report.record_shapes("kernel", shapes, row_of) == 1
    (path,) = tmp_path.glob("kernel-*-3.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["passes"] for row in rows] == [True, False, False]
    assert rows[2]["failure"] == "NotImplementedError: no such shape"


def test_a_profile_has_the_time_of_each_operation_and_the_idle_time_before_it():
    """Of two streams: "b" begins before "a" has ended, "c" half a millisecond after "b" has; "d" is too short."""
    events = [("a", 0, 4e6), ("c", 6.5e6, 2e6), ("b", 3e6, 3e6), ("d", 8.5e6, 1e3), ("a", 9.501e6, 1e6)]
    profile = report.profile_of([report.Event(*event) for event in events], calls=2)
    assert profile["device_ms"] == pytest.approx(5.0005) and profile["span_ms"] == pytest.approx(5.2505)
    rows = {row["name"]: (row["launches"], row["ms"], row["idle_ms"]) for row in profile["operations"]}
    assert [*rows] == ["a", "b", "c"]
    assert rows["a"] == pytest.approx((1, 2.5, 0.5)) and rows["b"] == pytest.approx((0.5, 1.5, 0))
    assert rows["c"] == pytest.approx((0.5, 1.0, 0.25))
