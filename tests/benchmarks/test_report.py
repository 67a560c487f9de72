"""What benchmarks share: a run of shapes is recorded whole, whatever some of them do."""

import json
import types

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
