"""From records of runs to means, intervals over seeds, and verdicts on the predictions. No JAX in here."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scipy.special import stdtrit

from train.ablation.arms import ARMS, BLOCK, BLOCKS, DEFAULT

EQUAL = 0.02
"""Shares of valid completions that differ by no more are called equal: the 2 points that faster decoding may cost."""

Values = dict[str, dict[str, dict[int, float]]]
"""metric -> arm -> seed -> value"""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Mean over seeds; `half` is half of its 95 % t interval, NaN for a single seed."""

    mean: float
    half: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        n = len(values)
        if not n:
            raise ValueError("no values to average")
        mean = math.fsum(values) / n
        if n == 1:
            return cls(mean, math.nan, 1)
        variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
        return cls(mean, float(stdtrit(n - 1, 0.975)) * math.sqrt(variance / n), n)

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def metrics_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one run by name: bound/BLOCK, bound/own, drift, rise, WAY/RULE/valid and the like."""
    arm = next(arm for arm in ARMS if arm.name == record["arm"])
    values = {f"bound/{block}": value for block, value in record["bound"].items()}
    values["bound/own"] = record["bound"][str(arm.own_block) if arm.own_block else "row"]
    values |= record["drift"]
    if "offsets" in record:
        # Second half of the block against the first: no single offset decides.
        offsets = record["offsets"]
        middle = len(offsets) // 2
        values["rise"] = math.fsum(offsets[middle:]) / (len(offsets) - middle) - math.fsum(offsets[:middle]) / middle
    for way, rules in record["decode"].items():
        for rule, numbers in rules.items():
            for name in ("tokens_per_forward", "valid", "parses"):
                if name in numbers:
                    values[f"{way}/{rule}/{name}"] = numbers[name]
    return values


def collect(records: Sequence[Mapping[str, Any]]) -> Values:
    """Records of runs, each with "arm" and "seed"."""
    values: Values = {}
    for record in records:
        for metric, value in metrics_of(record).items():
            values.setdefault(metric, {}).setdefault(record["arm"], {})[record["seed"]] = value
    return values


def difference(values: Values, minuend: tuple[str, str], subtrahend: tuple[str, str] | None) -> Estimate | None:
    """Paired over the seeds that both have; each is (metric, arm). None: no common seed. No subtrahend: the value."""
    first = values.get(minuend[0], {}).get(minuend[1], {})
    if subtrahend is None:
        return Estimate.of(list(first.values())) if first else None
    second = values.get(subtrahend[0], {}).get(subtrahend[1], {})
    seeds = sorted(first.keys() & second.keys())
    return Estimate.of([first[s] - second[s] for s in seeds]) if seeds else None


@dataclasses.dataclass(frozen=True)
class Claim:
    """A prediction about one difference, written before the runs.

    Attributes:
        question: the ablation it belongs to.
        text: what is compared.
        minuend: (metric, arm).
        subtrahend: the same; None: the value itself.
        sign: predicted sign of minuend - subtrahend; 0: no difference beyond `EQUAL`.
    """

    question: str
    text: str
    minuend: tuple[str, str]
    subtrahend: tuple[str, str] | None
    sign: int

    def verdict(self, values: Values) -> tuple[str, Estimate | None]:
        """("yes", "no", "undecided", "one seed" or "not run", the difference).

        "yes": the interval lies on the predicted side of 0, or within `EQUAL` of it where no difference was predicted;
        "no": it leaves 0 out and is not there; "undecided": too few seeds to tell.
        """
        found = difference(values, self.minuend, self.subtrahend)
        if found is None:
            return "not run", None
        if math.isnan(found.half):
            return "one seed", found
        if self.sign == 0 and max(-found.low, found.high) <= EQUAL:
            return "yes", found
        if found.low <= 0 <= found.high:
            return "undecided", found
        return ("yes" if math.copysign(1, found.mean) == self.sign else "no"), found


def claims() -> list[Claim]:
    """The predictions of docs/efficient_dlm.md as differences."""
    result = []

    def add(question: str, text: str, minuend: tuple[str, str], subtrahend: tuple[str, str] | None, sign: int):
        result.append(Claim(question, text, minuend, subtrahend, sign))

    own = f"bound/{BLOCK}"
    add("attention pattern", "bound, noisy - clean context", (own, "noisy-context"), (own, DEFAULT), +1)
    add("attention pattern", "bound, bidirectional - noisy context", (own, "bidirectional"), (own, "noisy-context"), +1)
    add("start", "bound, from scratch - converted", (own, "scratch"), (own, DEFAULT), +1)
    for part in ("attention", "mlp"):
        drift = f"drift_{part}"
        pairs = (("bidirectional", "noisy-context"), ("noisy-context", DEFAULT))
        for more, less in pairs:
            add("weight drift", f"{part}, {more} - {less}", (drift, more), (drift, less), +1)
        add("weight drift", f"{part}, block 32 - block 4", (drift, "block-32"), (drift, "block-4"), +1)
    for small, large in itertools.pairwise(BLOCKS):
        text = f"bound at the own block, {large} - {small}"
        add("training block", text, (f"bound/{large}", arm_of(large)), (f"bound/{small}", arm_of(small)), +1)
    few = "4 tokens/valid"
    add("decoding block", "valid at 4 tokens per pass, block 32 - 4", (f"32/{few}", DEFAULT), (f"4/{few}", DEFAULT), +1)
    far = "bound/32"
    add("decoding block", "bound at 32, trained on 4 - on 32", (far, "block-4"), (far, "block-32"), +1)
    one = "one token/valid"
    add("decoding block", "valid, trained on 4: block 32 - 4", (f"32/{one}", "block-4"), (f"4/{one}", "block-4"), -1)
    for name in ("inf", "0.25", "0.05", "0"):
        for rule, sign in (("4 tokens", 1), ("2 tokens", 1), ("one token", 0)):
            metric = f"{BLOCK}/{rule}/valid"
            text = f"valid at {rule.replace('tokens', 'tokens per pass')}, 0.1 - {name}"
            add("half-life ratio", text, (metric, DEFAULT), (metric, f"lambda-{name}"), sign)
    add("token shift", "bound, on - off", (own, "shift"), (own, DEFAULT), +1)
    add("steps of conversion", "bound, 10 % - 20 % of the steps", (own, "steps-half"), (own, DEFAULT), +1)
    add("steps of conversion", "bound, 20 % - 40 % of the steps", (own, DEFAULT), (own, "steps-double"), +1)
    add("offset in the block", "nats, second - first half of the block", ("rise", DEFAULT), None, +1)
    add("LoRA", "bound, rank 64 - all weights", (own, "lora-64"), (own, DEFAULT), +1)
    add("LoRA", "bound, rank 16 - rank 64", (own, "lora-16"), (own, "lora-64"), +1)
    way = f"{BLOCK}-bidirectional/{one}"
    add("prompt attention", "valid, bidirectional - block-causal", (way, DEFAULT), (f"{BLOCK}/{one}", DEFAULT), -1)
    return result


def arm_of(block: int) -> str:
    """The arm that was trained on blocks of this size."""
    return DEFAULT if block == BLOCK else f"block-{block}"


def summarise(
    records: Sequence[Mapping[str, Any]], ar: Mapping[int, float], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that a table or a picture needs, JSON-able.

    Args:
        records: of runs.
        ar: exact nats per held-out token of each seed's autoregressive model.
        about: configuration and machine, copied.
    """
    values = collect(records)

    def entry(estimate: Estimate | None) -> list[float | int | None] | None:
        if estimate is None:
            return None
        half = None if math.isnan(estimate.half) else round(estimate.half, 6)
        return [round(estimate.mean, 6), half, estimate.seeds]

    table = {
        metric: {arm: entry(Estimate.of(list(seeds.values()))) for arm, seeds in arms.items()}
        for metric, arms in values.items()
    }
    to_default = {
        metric: {arm: entry(difference(values, (metric, arm), (metric, DEFAULT))) for arm in arms if arm != DEFAULT}
        for metric, arms in values.items()
        if DEFAULT in arms
    }
    offsets: dict[str, Any] = {}
    for arm in dict.fromkeys(r["arm"] for r in records if "offsets" in r):
        columns = zip(*(r["offsets"] for r in records if r["arm"] == arm), strict=True)
        offsets[arm] = [entry(Estimate.of(column)) for column in columns]
    verdicts = []
    for claim in claims():
        verdict, found = claim.verdict(values)
        verdicts.append(
            {
                "question": claim.question,
                "difference": claim.text,
                "predicted": {1: "> 0", -1: "< 0", 0: "0"}[claim.sign],
                "found": entry(found),
                "verdict": verdict,
            }
        )
    return {
        "about": dict(about),
        "entries": "[mean over seeds, half of its 95 % t interval, seeds]",
        "ar_nats": entry(Estimate.of(list(ar.values()))) if ar else None,
        "verdicts": verdicts,
        "values": table,
        "minus_default": to_default,
        "offsets": offsets,
    }


def markdown(summary: Mapping[str, Any]) -> str:
    """The summary as tables."""
    values, lines = summary["values"], []

    def number(entry: Sequence | None, scale: float = 1.0, digits: int = 3, sign: str = "") -> str:
        if entry is None:
            return ""
        mean, half, _ = entry
        return f"{scale * mean:{sign}.{digits}f}" + ("" if half is None else f" ± {scale * half:.{digits}f}")

    def add(header: Sequence[str], rows: Sequence[Sequence[str]]):
        lines.append("| " + " | ".join(header) + " |")
        lines.append("|" + "---|" * len(header))
        lines.extend("| " + " | ".join(row) + " |" for row in rows)
        lines.append("")

    lines += ["## Predictions", ""]
    rows = []
    for v in summary["verdicts"]:
        percent = "valid" in v["difference"]
        found = number(v["found"], 100.0 if percent else 1.0, 1 if percent else 4, "+") + (" points" if percent else "")
        rows.append([v["question"], v["difference"], v["predicted"], found if v["found"] else "", v["verdict"]])
    add(["question", "difference", "predicted", "found", "verdict"], rows)

    lines += ["## Bounds (nats per token) and drift", ""]
    blocks = [*map(str, BLOCKS), "row"]
    rows = []
    for arm in values.get("bound/own", {}):
        bounds = [number(values.get(f"bound/{block}", {}).get(arm)) for block in blocks]
        change = number(summary["minus_default"].get(f"bound/{BLOCK}", {}).get(arm), sign="+")
        drift = [number(values[f"drift_{part}"].get(arm), digits=5) for part in ("attention", "mlp")]
        rows.append([arm, *bounds, change, *drift])
    names = [f"block {b}" for b in BLOCKS]
    add(["arm", *names, "whole row", f"block {BLOCK}, − default", "drift, attention", "drift, MLP"], rows)
    if summary["ar_nats"]:
        lines += [f"Autoregressive, exact: {number(summary['ar_nats'])} nats per token.", ""]

    lines += ["## Completions", ""]
    rows = []
    for metric, arms in values.items():
        way, _, name = metric.rpartition("/")
        if name != "tokens_per_forward":
            continue
        for arm, entry in arms.items():
            shares = [number(values.get(f"{way}/{kind}", {}).get(arm), 100.0, 1) for kind in ("parses", "valid")]
            rows.append([arm, *way.split("/"), number(entry, digits=2), *shares])
    rows.sort(key=lambda row: [list(values["bound/own"]).index(row[0]), row[1].zfill(20)])
    add(["arm", "decoding block", "rule", "tokens per forward", "parses, %", "valid, %"], rows)
    return "\n".join(lines)


def judged(
    record: Mapping[str, Any], tokens: Mapping[str, Any], judge: Callable[[Any], dict[str, float]]
) -> dict[str, Any]:
    """The record with what `judge` says of each set of completions, given as token ids [prompts, length]."""
    decode = {
        way: {rule: numbers | judge(tokens[f"{way}/{rule}"]) for rule, numbers in rules.items()}
        for way, rules in record["decode"].items()
    }
    return {**record, "decode": decode}
