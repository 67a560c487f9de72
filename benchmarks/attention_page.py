"""Writes `docs/benchmarks/attention.md` from the committed GPU results: the latest run of each shape, wins and losses.

python -m benchmarks.attention page            # writes it
python -m benchmarks.attention page --check    # fails if it is not what the results give
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "attention.md"
GRADIENTS = " + gradients"
PEERS = ("cudnn", "torch", "tokamax")
HEAD = """# Attention on GPUs

Written by `python -m benchmarks.attention page` from `benchmarks/results/`; not edited by hand. Each row is the latest
run of its shape on its device, named by its file. Device time per call (of one layer for decoding). Peers ran in the
same process, in turns. For a mask that cuDNN does not know it computed a causal one over the same length, which is
another task: its time stands in brackets and counts neither as a win nor as a loss. A rate counts the products of the
pairs that the mask shows, and is left out where segments, positions or lengths hide more; percent is of a square bf16
matrix product, or of a device copy, in the same run. "-" is not measured.
"""


Rows = dict[str, tuple[str, dict[str, Any], dict[str, Any]]]
"""shape -> (file name, record, row)"""


def latest(results: Path, prefix: str, ending: str = "") -> dict[str, Rows]:
    """By device, the latest timing of each shape in which our kernel took part."""
    records = [(path.name, json.loads(path.read_text())) for path in results.glob(f"{prefix}-*.json")]
    found: dict[str, Rows] = {}
    for name, record in sorted(records, key=lambda named: named[1]["environment"]["date"]):
        for row in record["rows"]:
            if "mosaic" + ending in row.get("results", {}):
                found.setdefault(record["environment"]["device"], {})[row["shape"]] = (name, record, row)
    return found


def milliseconds(row: dict[str, Any], name: str) -> float | None:
    result = row["results"].get(name, {})
    return result["device_us"] / 1e3 if "device_us" in result else result.get("device_ms")


def table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield from (f"| {' | '.join(head)} |", "|---" * len(head) + "|")
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def short(shape: str) -> str:
    return shape.replace("seq_len=", "").replace("block_size=", "").replace("window=", "").replace("num_sinks=", "")


def flash_rows(rows: Rows, ending: str, losses: list[str]) -> list[list[str]]:
    lines = []
    for shape, (name, _, row) in rows.items():
        ours = milliseconds(row, "mosaic" + ending)
        if ours is None or " skipping" in shape:
            continue
        result = row["results"]["mosaic" + ending]
        is_hidden = not shape.split(") ", 1)[1].startswith("B=")  # run-time limits stand there
        rates = ["-", "-"] if is_hidden else [f"{result['tflops']:.0f}", f"{result['percent_of_matmul']:.0f}"]
        cells = [short(shape), f"{ours:.3f}", *rates]
        times = {peer: milliseconds(row, peer + ending) for peer in (*PEERS, "xla")}
        other = milliseconds(row, "cudnn, causal" + ending)
        for peer, ms in times.items():
            cells.append(f"{ms:.3f}" if ms else f"({other:.3f})" if other and peer == "cudnn" else "-")
        lines.append([*cells, f"`{name.removesuffix('.json')}`"])
        losses += lost(short(shape) + ending.replace(" + ", ", with "), ours, times)
    return lines


def lost(shape: str, ours: float, times: dict[str, float | None]) -> Iterator[str]:
    found = [f"{peer} by {100 * (ours / ms - 1):.0f} %" for peer, ms in times.items() if ms and ours > 1.005 * ms]
    if found:
        yield f"- {shape}: slower than {', '.join(found)}"


def skip_rows(rows: Rows, losses: list[str]) -> list[list[str]]:
    lines = []
    for shape, (name, record, row) in rows.items():
        ours = milliseconds(row, "mosaic")
        if " skipping" not in shape or ours is None:
            continue
        same_run = [other for other in record["rows"] if other["shape"] == shape.split(" skipping")[0]]
        dense = milliseconds(row, "mosaic, dense") or (milliseconds(same_run[0], "mosaic") if same_run else None)
        peer = milliseconds(row, "cudnn")
        sparsity = f"{100 * row['skipped']:.0f} %" if "skipped" in row else "not recorded"
        lines.append(
            [short(shape), sparsity, f"{ours:.3f}"]
            + [f"{ms:.3f} ({ms / ours:.2f}x)" if ms else "-" for ms in (dense, peer)]
            + [f"`{name.removesuffix('.json')}`"]
        )
        losses += lost(short(shape), ours, {"our dense kernel": dense, "cudnn": peer})
    return lines


def decode_rows(rows: Rows, losses: list[str]) -> list[list[str]]:
    lines = []
    for shape, (name, _, row) in rows.items():
        ours = milliseconds(row, "mosaic")
        if ours is None or " skipping" in shape:
            continue
        result = row["results"]["mosaic"]
        times = {peer: milliseconds(row, peer) for peer in ("cudnn", "torch", "xla")}
        cells = [shape, f"{1e3 * ours:.1f}", f"{result['gb_per_second']:.0f}", f"{result['percent_of_copy']:.0f}"]
        cells += [f"{1e3 * ms:.1f}" if ms else "-" for ms in times.values()]
        lines.append([*cells, f"`{name.removesuffix('.json')}`"])
        losses += lost(shape, ours, times)
    return lines


def decode_skip_rows(rows: Rows, losses: list[str]) -> list[list[str]]:
    lines = []
    for shape, (name, _, row) in rows.items():
        ours, dense, xla = (milliseconds(row, by) for by in ("mosaic", "dense", "xla"))
        if ours is None or " skipping" not in shape:
            continue
        cells = [shape, f"{100 * row['skipped']:.0f} %", f"{1e3 * ours:.1f}"]
        cells += [f"{1e3 * dense:.1f} ({dense / ours:.2f}x)" if dense else "-", f"{1e3 * xla:.1f}" if xla else "-"]
        lines.append([*cells, f"`{name.removesuffix('.json')}`"])
        losses += lost(shape, ours, {"our dense kernel": dense, "xla": xla})
    return lines


def memory_rows(results: Path, device: str) -> list[list[str]]:
    lines = []
    for path in sorted(results.glob("attention_gpu-memory-*.json")):
        record = json.loads(path.read_text())
        if record["environment"]["device"] != device:
            continue
        for row in record["rows"]:
            sizes = [row.get(f"{field}_bytes") for field in ("argument", "output", "temp", "peak")]
            cells = [
                record["shape"],
                row["name"],
                *(f"{size / 1e9:.2f}" if size is not None else "-" for size in sizes),
            ]
            lines.append([*cells, f"`{path.stem}`"])
    return lines


def machines(*tables: Rows) -> Iterator[str]:
    """Hardware, clocks and versions of each file that a table names."""
    seen = {name: record["environment"] for rows in tables for name, record, _ in rows.values()}
    for name, environment in sorted(seen.items()):
        gpu, versions = environment["gpu"], environment["versions"]
        packages = ", ".join(f"{p} {versions[p]}" for p in ("jax", "torch", "tokamax") if p in versions)
        yield (
            f"- `{name.removesuffix('.json')}`: {gpu['name']}, {gpu['power.limit']}, SM clock {gpu['clocks.sm']} at "
            f"the start, {packages}, {environment['date'][:10]}, `{environment['command']}`"
        )


FLASH_HEAD = ["shape", "mosaic, ms", "TFLOP/s", "%", *PEERS, "xla", "file"]
SKIP_HEAD = ["shape", "skipped", "mosaic, ms", "our dense kernel (speed-up)", "cuDNN dense (speed-up)", "file"]
DECODE_HEAD = ["shape", "mosaic, us", "GB/s", "%", "cudnn", "torch", "xla", "file"]
DECODE_SKIP_HEAD = ["shape", "skipped", "mosaic, us", "our dense kernel (speed-up)", "xla", "file"]
MEMORY_HEAD = ["shape", "implementation", "arguments, GB", "results", "temporary", "peak of the process", "file"]
SHARES = "The shape says which share of key tiles was drawn small; the second column which share was skipped."


def text(results: Path = RESULTS) -> str:
    flash, both = (latest(results, "attention_gpu", ending) for ending in ("", GRADIENTS))
    decode = latest(results, "decode_attention_gpu")
    lines = [HEAD]
    for device in sorted({*flash, *both, *decode}):
        losses: list[str] = []
        own_flash, own_both, own_decode = (rows.get(device, {}) for rows in (flash, both, decode))
        lines += [f"## {device}", ""]
        for title, note, head, rows in (
            ("Forward", "", FLASH_HEAD, flash_rows(own_flash, "", losses)),
            ("Forward and backward", "", FLASH_HEAD, flash_rows(own_both, GRADIENTS, losses)),
            ("Skipped tiles, forward", SHARES, SKIP_HEAD, skip_rows(own_flash, losses)),
            ("Decoding", "", DECODE_HEAD, decode_rows(own_decode, losses)),
            ("Decoding with skipped tiles", SHARES, DECODE_SKIP_HEAD, decode_skip_rows(own_decode, losses)),
            ("Memory at 128K tokens", "", MEMORY_HEAD, memory_rows(results, device)),
        ):
            if rows:
                lines += [f"### {title}", *([note, ""] if note else []), *table(head, rows)]
        lines += ["### Where we lose", *(sorted(losses) or ["Nowhere that was measured."]), ""]
    lines += ["## Machines", *machines(*flash.values(), *both.values(), *decode.values())]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    if not parser.parse_args(argv).check:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(text())
        print(PAGE)
        return 0
    if PAGE.exists() and PAGE.read_text() == text():
        return 0
    print(f"{PAGE} is not what the results give: run python -m benchmarks.attention page", file=sys.stderr)
    return 1
