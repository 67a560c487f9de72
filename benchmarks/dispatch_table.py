"""Derives `pallas_kernels/measured.json`, the data of the automatic choice, from the committed GPU results.

    python -m benchmarks.dispatch_table            # writes it
    python -m benchmarks.dispatch_table --check    # fails if it is not what the results give

Run it after new results of `benchmarks.attention_gpu`, `decode_attention_gpu`, `quantized_matmul`, `rotation`,
`norm_rope` or `moba` were committed. Newer results replace older ones: a kind of call that fails its latest check is
not covered, whatever earlier checks said. Timings count only where XLA took part, in the same process. For gradients
cuDNN is charged a second forward pass: what it keeps for the backward has no name, so a rematerialisation policy that
keeps "attention" cannot keep it.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS
from pallas_kernels import dispatch
from pallas_kernels.dispatch import OWN_KEYS, Kind, MobaKind, NormRopeKind, ProductKind, RotationKind

GRADIENTS = " + gradients"
IMPLEMENTATIONS = {
    "flash_attention": ("mosaic", "cudnn", "xla"),
    "decode_attention": ("mosaic", "xla"),
    "quantized_matmul": ("mosaic", "xla"),
    "pairwise_rotation": ("mosaic", "xla"),
    "norm_rope": ("mosaic", "xla"),
    "moba_attention": ("mosaic", "xla"),
}
RECORDS = {
    "flash_attention": "attention_gpu",
    "decode_attention": "decode_attention_gpu",
    "quantized_matmul": "quantized_matmul",
    "pairwise_rotation": "rotation",
    "norm_rope": "norm_rope",
    "moba_attention": "moba",
}

FLASH = re.compile(
    r"(?P<mask>\w+)\((?P<options>[^)]*)\) (?:(?P<limits>[a-z ]+) )?B=(?P<B>\d+) T=(?P<T>\d+) S=(?P<S>\d+) N=(?P<N>\d+) "
    r"K=\d+ H=(?P<H>\d+) (?P<dtype>\w+)(?: Hv=(?P<Hv>\d+))?(?P<skip> skipping, [\d.]+ small)?(?: by (?P<by>\w+))?"
    r"(?P<mapped> under vmap)?"
)
DECODE = re.compile(
    r"B=(?P<B>\d+) T=(?P<T>\d+) S=(?P<S>\d+) K=\d+ G=(?P<G>\d+) H=(?P<H>\d+) (?P<dtype>\w+)"
    r"(?: (?P<codes>int8|float8_e4m3fn) per (?P<scales>\w+))? (?P<own>no own|own \w+)(?P<own_lengths> own_lengths)?"
    r"(?P<ring> ring)?(?: window (?P<window>\d+))?(?: ragged| live \d+)"
    r"(?: skipping (?P<skip>\d+ chains \d+), [\d.]+ small)?"
)
PRODUCT = re.compile(
    r"M=(?P<rows>\d+) (?P<outputs>\d+)x(?P<inputs>\d+) "
    r"(?:(?P<codes>int8|fp8|nvfp4) )?(?:by (?P<activations>int8|fp8) )?"  # int4 has no name
    r"groups of (?P<size>-?\d+) (?P<scales>\w+) (?P<zeros>zeros|symmetric) to (?P<result>\w+)"
)
ROTATION = re.compile(
    r"M=(?P<rows>\d+) I=(?P<channels>\d+) x(?P<rotations>\d+) (?P<steps>\d+) steps in groups of (?P<size>\d+) "
    r"(?P<dtype>\w+)(?: (?P<source>normed(?: sum)?|gated))?( ordered)?"
)
NORM_ROPE = re.compile(
    r"M=(?P<rows>\d+) N=(?P<heads>\d+(?:\+\d+)*) H=(?P<H>\d+) (?P<dtype>\w+) weights (?P<weights>\w+)"
    r"(?: in (?P<parts>\d+) parts)?"
)
MOBA = re.compile(
    r"B=(?P<B>\d+) T=(?P<T>\d+) N=(?P<N>\d+) K=\d+ H=(?P<H>\d+) (?P<dtype>\w+) block=(?P<block>\d+) k=\d+"
    r"(?P<segments> \d+ segments)?"
)
SKIP_TILE = "64x128"  # of every timed and checked call of flash_attention so far


def flash_call(shape: str) -> tuple[Kind, dict[str, int], str]:
    """Kind, sizes and implementation of a shape's name. Raises ValueError for a name of another form."""
    if (found := FLASH.fullmatch(shape)) is None:
        raise ValueError(f"not a shape of benchmarks.attention_gpu: {shape!r}")
    mask = found["mask"] + "(token)" * ("'token'" in found["options"])
    batch, queries, keys, heads = (int(found[name]) for name in "BTSN")
    kind = Kind(
        mask=mask,
        dtype=found["dtype"],
        head_dims=f"{found['H']}/{found['Hv'] or found['H']}",
        limits=found["limits"] or "",
        skip=SKIP_TILE if found["skip"] else "",
        square=queries == keys,
    )
    return kind, {"queries": queries, "keys": keys, "work": batch * heads * queries}, found["by"] or "mosaic"


def decode_call(shape: str) -> tuple[Kind, dict[str, int], str]:
    """The same for `decode_attention`."""
    if (found := DECODE.fullmatch(shape)) is None:
        raise ValueError(f"not a shape of benchmarks.decode_attention_gpu: {shape!r}")
    given = {
        "own_lengths": found["own_lengths"],
        "positions": found["ring"],
        "window": found["ring"] or found["window"],
    }
    kind = Kind(
        mask=f"no {OWN_KEYS}" if found["own"] == "no own" else OWN_KEYS,
        dtype=found["dtype"],
        head_dims=f"{found['H']}/{found['H']}",
        limits=" ".join(name for name, value in given.items() if value),
        cache=f"{found['codes']} per {found['scales']}" if found["codes"] else "",
        skip=found["skip"] or "",
    )
    sizes = {"batch": int(found["B"]), "rows": int(found["T"]) * int(found["G"]), "keys": int(found["S"])}
    return kind, sizes, "mosaic"


def product_call(shape: str) -> tuple[ProductKind, dict[str, int], str]:
    """The same for `quantized_matmul`."""
    if (found := PRODUCT.fullmatch(shape)) is None:
        raise ValueError(f"not a shape of benchmarks.quantized_matmul: {shape!r}")
    size = -1 if found["size"] == found["inputs"] else int(found["size"])
    codes, activations = found["codes"] or "int4", found["activations"] or ""
    kind = ProductKind(codes, size, found["zeros"] == "zeros", found["scales"], found["result"], activations)
    return kind, {name: int(found[name]) for name in ("rows", "outputs", "inputs")}, "mosaic"


def rotation_call(shape: str) -> tuple[RotationKind, dict[str, int], str]:
    """The same for `pairwise_rotations`."""
    if (found := ROTATION.fullmatch(shape)) is None:
        raise ValueError(f"not a shape of benchmarks.rotation: {shape!r}")
    kind = RotationKind(int(found["size"]), int(found["steps"]), found["dtype"], found["source"] or "")
    return kind, {name: int(found[name]) for name in ("rows", "channels", "rotations")}, "mosaic"


def norm_rope_call(shape: str) -> tuple[NormRopeKind, dict[str, int], str]:
    """The same for `norm_rope`."""
    if (found := NORM_ROPE.fullmatch(shape)) is None:
        raise ValueError(f"not a shape of benchmarks.norm_rope: {shape!r}")
    kind = NormRopeKind(int(found["H"]), found["dtype"], found["weights"], bool(found["parts"]))
    return kind, {"rows": int(found["rows"]), "heads": sum(map(int, found["heads"].split("+")))}, "mosaic"


def moba_call(shape: str) -> tuple[MobaKind, dict[str, int], str]:
    """The same for `moba_attention`."""
    if (found := MOBA.fullmatch(shape)) is None:
        raise ValueError(f"not a shape of benchmarks.moba: {shape!r}")
    kind = MobaKind(found["dtype"], int(found["H"]), int(found["block"]), bool(found["segments"]))
    return kind, {"batch": int(found["B"]), "length": int(found["T"]), "heads": int(found["N"])}, "mosaic"


PARSERS = {
    "flash_attention": flash_call,
    "decode_attention": decode_call,
    "quantized_matmul": product_call,
    "pairwise_rotation": rotation_call,
    "norm_rope": norm_rope_call,
    "moba_attention": moba_call,
}


def times_of(op: str, results: dict[str, Any]) -> dict[bool, dict[str, float]]:
    """Device milliseconds by implementation, without and with gradients."""
    found: dict[bool, dict[str, float]] = {False: {}, True: {}}
    for name in IMPLEMENTATIONS[op]:
        for gradients in (False, True):
            row = results.get(name + GRADIENTS * gradients, {})
            ms = row.get("device_ms", row["device_us"] / 1e3 if "device_us" in row else None)
            if ms is not None:
                found[gradients][name] = ms
    if "cudnn" in found[True]:
        found[True]["cudnn"] += found[False]["cudnn"]
    return found


def derive(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The table that results give, oldest first: `[{"op", "device", "rows"}]`."""
    checked: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    timed: dict[tuple[str, str], dict[tuple[str, bool, tuple], dict[str, Any]]] = {}
    for record in records:
        where = (record["op"], record["device"])
        verdicts: dict[tuple[str, str], list[tuple[bool, bool]]] = {}
        for row in record["rows"]:
            kind, sizes, by = PARSERS[record["op"]](row["shape"])
            if "passes" in row:
                has_gradients = "dq_error" in row
                verdicts.setdefault((by, kind.name), []).append((bool(row["passes"]), has_gradients))
            for gradients, ms in times_of(record["op"], row.get("results", {})).items():
                if "xla" in ms and len(ms) > 1:
                    point = {"kind": kind.name, "gradients": gradients, "sizes": sizes}
                    point["ms"] = {name: float(f"{value:.4g}") for name, value in sorted(ms.items())}
                    timed.setdefault(where, {})[kind.name, gradients, tuple(sizes.items())] = point
        for key, found in verdicts.items():
            passed = all(passes for passes, _ in found)
            gradients = any(has for _, has in found)
            checked.setdefault(where, {})[key] = ("gradients" if gradients else "forward") if passed else "failed"
    result: dict[str, Any] = {op: {} for op in RECORDS}
    for op, device in sorted({*checked, *timed}):
        names: dict[str, dict[str, list[str]]] = {}
        for (by, kind), how in sorted(checked.get((op, device), {}).items()):
            names.setdefault(by, {"forward": [], "gradients": [], "failed": []})[how].append(kind)
        points = [timed[op, device][key] for key in sorted(timed.get((op, device), {}))]
        result[op][device] = {"checked": names, "timed": points}
    return result


def committed(results: Path = RESULTS) -> list[dict[str, Any]]:
    """The GPU results of all operations, oldest first. Checks of before gradients were compared are left out."""
    records = []
    for op, prefix in RECORDS.items():
        for path in results.glob(f"{prefix}-*.json"):
            content = json.loads(path.read_text())
            rows = [row for row in content.get("rows", []) if "config" not in row or op != "flash_attention"]
            rows = [row for row in rows if "shape" in row]
            environment = content["environment"]
            records.append({"op": op, "device": environment["device"], "date": environment["date"], "rows": rows})
    return sorted(records, key=lambda record: record["date"])


def text() -> str:
    return json.dumps(derive(committed()), indent=1) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    if not parser.parse_args(argv).check:
        dispatch.TABLE.write_text(text())
        print(dispatch.TABLE)
        return 0
    if dispatch.TABLE.read_text() == text():
        return 0
    print(f"{dispatch.TABLE} is not what the results give: run python -m benchmarks.dispatch_table", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
