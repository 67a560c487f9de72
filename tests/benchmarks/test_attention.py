"""The benchmark of attention: its page is what the results give, and it needs no more than JAX and NumPy."""

import json
import subprocess
import sys

import jax

from benchmarks import attention, attention_gpu, attention_page, report

ENVIRONMENT = {
    "date": "2026-01-01T00:00:00",
    "command": "python -m x",
    "device": "h",
    "versions": {"jax": "1"},
    "gpu": {"name": "h", "power.limit": "1 W", "clocks.sm": "2 MHz"},
}


def test_the_page_is_what_the_results_give():
    assert attention.main(["page", "--check"]) == 0


def test_named_cases_run_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAXSTREAM_RESULTS", str(tmp_path))
    assert attention.main(["--filter", "nothing"]) == 0
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["rows"] == []


def test_it_imports_with_what_a_bare_cuda_machine_has():
    code = (
        "import sys; from benchmarks import attention_gpu, attention_page, dispatch_table;"
        "print([name for name in ('grain', 'tyro', 'optax', 'torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def write(directory, name, rows, date="2026-01-01", **fields):
    content = {"environment": ENVIRONMENT | {"date": date}, **fields, "rows": rows}
    (directory / f"{name}.json").write_text(json.dumps(content))


def timed(shape, ms, **fields):
    results = {
        name.replace("_", " + "): {"device_ms": x, "tflops": 9, "percent_of_matmul": 8} for name, x in ms.items()
    }
    return {"shape": shape, "results": results} | fields


def test_a_run_is_compared_with_the_last_committed_one(tmp_path, monkeypatch, capsys):
    device = jax.devices()[0].device_kind
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for date, ms, kind in (("2026-01-02", 4.0, device), ("2026-01-01", 1.0, device), ("2026-01-03", 1.0, "another")):
        write(tmp_path, f"attention_gpu-{date}-{kind}", [timed("s", {"mosaic": ms})], date)
        path = tmp_path / f"attention_gpu-{date}-{kind}.json"
        content = json.loads(path.read_text())
        content["environment"]["device"] = kind
        path.write_text(json.dumps(content))
    monkeypatch.setenv("JAXSTREAM_RESULTS", str(tmp_path / "new"))
    record = report.Record("attention_gpu")
    record.add(timed("s", {"mosaic": 5.0, "xla": 1.0}))
    capsys.readouterr()
    attention_gpu.compare(record)
    assert capsys.readouterr().out == "s: mosaic takes 1.250 of its time of 2026-01-02\n"


def test_losses_and_speed_ups(tmp_path):
    causal = "Causal() B=1 T=64 S=64 N=2 K=2 H=128 bfloat16"
    window = causal.replace("Causal()", "SlidingWindow(window=9, num_sinks=4)")
    segments = causal.replace("Causal()", "Causal() segments")
    write(tmp_path, "attention_gpu-old", [timed(causal, {"mosaic": 9.0, "cudnn": 1.0})])
    rows = [
        timed(causal, {"mosaic": 2.0, "cudnn": 1.6, "torch": 2.5, "mosaic_gradients": 5.0, "torch_gradients": 4.0}),
        timed(window, {"mosaic": 1.5, "cudnn, causal": 1.0}),
        timed(segments, {"mosaic": 1.0}),
        timed(causal + " skipping, 0.9 small", {"mosaic": 1.0, "cudnn": 1.6}, skipped=0.746),
        timed(causal + " skipping, 0.0 small", {"mosaic": 2.2, "cudnn": 3.0}),
    ]
    write(tmp_path, "attention_gpu-new", rows, date="2026-01-02")
    # A later run without gradients leaves the row with gradients to the earlier one.
    write(tmp_path, "attention_gpu-newest", [timed(causal, {"mosaic": 2.0, "cudnn": 1.6})], date="2026-01-03")
    page = attention_page.text(tmp_path)
    losses = page.split("### Where we lose\n")[1].split("\n\n")[0].splitlines()
    assert losses == [
        f"- {causal} skipping, 0.0 small: slower than our dense kernel by 10 %",
        f"- {causal}, with gradients: slower than torch by 25 %",
        f"- {causal}: slower than cudnn by 25 %",
    ]
    assert "| 75 % | 1.000 | " in page and "1.600 (1.60x)" in page
    assert "not recorded" in page and "9.0" not in page
    assert "SlidingWindow(9, 4) B=1 T=64 S=64 N=2 K=2 H=128 bfloat16 | 1.500 | 9 | 8 | (1.000) |" in page
    assert f"| {segments} | 1.000 | - | - |" in page


def test_devices_have_sections_of_their_own_and_skipped_decoding_is_held_against_the_dense_kernel(tmp_path):
    shape = "B=1 T=1 S=64 K=8 G=4 H=128 bfloat16 own full live 64"
    for device, ours in (("h", 50.0), ("i", 25.0)):
        times = {"mosaic": ours, "dense": 40.0, "xla": 90.0}
        results = {by: {"device_us": us, "gb_per_second": 3.0, "percent_of_copy": 2.0} for by, us in times.items()}
        rows = [{"shape": shape, "results": {"mosaic": results["mosaic"]}}]
        rows.append({"shape": shape + " skipping 128 chains 8, 0.5 small", "skipped": 0.48, "results": results})
        content = {"environment": ENVIRONMENT | {"device": device}, "rows": rows}
        (tmp_path / f"decode_attention_gpu-{device}.json").write_text(json.dumps(content))
    first, second = attention_page.text(tmp_path).split("\n## ")[1:3]
    assert first.startswith("h\n") and second.startswith("i\n")
    assert "### Forward" not in first and "### Memory" not in first
    assert f"| {shape} | 50.0 | 3 | 2 | - | - | - |" in first
    assert "chains 8, 0.5 small | 48 % | 50.0 | 40.0 (0.80x) | 90.0 |" in first
    assert "slower than our dense kernel by 25 %" in first and "slower" not in second
    assert "| 25.0 | 40.0 (1.60x) | 90.0 |" in second and "Nowhere that was measured." in second
