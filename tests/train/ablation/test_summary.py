"""Intervals, paired differences and verdicts, on numbers worked out by hand."""

import math

import pytest

from train.ablation import summary
from train.ablation.arms import ARMS, DEFAULT
from train.ablation.summary import Claim, Estimate


def test_interval_is_students():
    found = Estimate.of([1.0, 2.0, 3.0])
    # t with 2 degrees of freedom, 97.5 %: 4.302653; standard error 1 / sqrt(3).
    assert (found.mean, found.seeds) == (2.0, 3)
    assert found.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert Estimate.of([1.0, 1.0, 4.0, 4.0, 5.0]).half == pytest.approx(2.776445 * math.sqrt(3.5 / 5), rel=1e-6)
    assert math.isnan(Estimate.of([1.0]).half)
    with pytest.raises(ValueError, match="no values"):
        Estimate.of([])


VALUES = {
    "m": {"a": {0: 1.0, 1: 2.0, 2: 10.0}, "b": {0: 0.5, 1: 1.4, 3: 7.0}, "c": {0: 1.0}, "d": {0: 1.1, 1: 1.95, 2: 10.0}}
}


def test_differences_are_paired_over_common_seeds():
    found = summary.difference(VALUES, ("m", "a"), ("m", "b"))
    assert (found.mean, found.seeds) == (pytest.approx(0.55), 2)
    # Unpaired, the spread between seeds (1 to 2) would drown it; 12.7062 for one degree of freedom.
    assert found.half == pytest.approx(12.7062 * 0.05, rel=1e-4)
    assert summary.difference(VALUES, ("m", "a"), ("absent", "b")) is None
    assert summary.difference(VALUES, ("m", "a"), None).mean == pytest.approx(13 / 3)


@pytest.mark.parametrize(
    ("other", "sign", "verdict"),
    [
        ("d", +1, "undecided"),
        ("d", 0, "undecided"),
        ("h", 0, "yes"),
        ("c", +1, "one seed"),
        ("e", +1, "not run"),
        ("f", +1, "yes"),
        ("f", -1, "no"),
        ("f", 0, "no"),
        ("g", -1, "yes"),
    ],
)
def test_verdicts(other, sign, verdict):
    values = {"m": VALUES["m"] | {"f": {0: 0.0, 1: 1.01, 2: 9.0}, "g": {0: 2.0, 1: 3.0, 2: 11.01}}}
    values["m"]["h"] = {0: 1.001, 1: 1.999, 2: 10.001}
    assert Claim("q", "t", ("m", "a"), ("m", other), sign).verdict(values)[0] == verdict


def record(arm: str, seed: int, bound: float, **more):
    own = next(a for a in ARMS if a.name == arm).own_block
    return {
        "arm": arm, "seed": seed,
        "bound": {"4": bound - 0.2, "8": bound - 0.1, "16": bound, "32": bound + 0.1, "row": 9.0},
        "drift": {"drift_attention": 0.01 * (seed + 1), "drift_mlp": 0.02},
        "offsets": [1.0, 2.0, 4.0, 6.0] if own else [], "decode": {},
    } | more  # fmt: skip


def test_summary_tells_means_differences_and_what_is_missing():
    decode = {"16": {"one token": {"tokens_per_forward": 1.0, "tokens": 4, "forwards": 4}}}
    records = [record(DEFAULT, s, 3.0 + 0.5 * s, decode=decode) for s in range(3)]
    records += [record("noisy-context", s, 3.1 + 0.5 * s + 0.01 * s) for s in range(3)]
    records += [{k: v for k, v in record("bidirectional", s, 3.05).items() if k != "offsets"} for s in range(1)]
    judged = summary.judged(records[0], {"16/one token": "tokens"}, lambda tokens: {"valid": 0.25, "parses": 0.5})
    assert judged["decode"]["16"]["one token"]["valid"] == 0.25 and "valid" not in decode["16"]["one token"]
    found = summary.summarise([judged, *records[1:]], {0: 2.0, 1: 2.2}, {"dim": 1})

    assert found["ar_nats"][0] == pytest.approx(2.1) and found["about"] == {"dim": 1}
    assert found["values"]["bound/16"][DEFAULT] == [3.5, pytest.approx(4.302653 * 0.5 / math.sqrt(3), rel=1e-5), 3]
    change = found["minus_default"]["bound/16"]["noisy-context"]
    assert change == [pytest.approx(0.11), pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-4), 3]
    assert found["values"]["bound/own"]["bidirectional"] == [9.0, None, 1]
    assert found["values"]["rise"][DEFAULT][0] == pytest.approx(5.0 - 1.5)
    verdicts = {(v["question"], v["difference"]): v["verdict"] for v in found["verdicts"]}
    assert verdicts["attention pattern", "bound, noisy - clean context"] == "yes"
    assert verdicts["attention pattern", "bound, bidirectional - noisy context"] == "one seed"
    assert verdicts["LoRA", "bound, rank 16 - rank 64"] == "not run"

    text = summary.markdown(found)
    assert "| noisy-context | 2.910" not in text and "+0.110 ± 0.025" in text
    assert "| default | 16 | one token | 1.00 ± 0.00 | 50.0 | 25.0 |" in text
    assert "2.100 ± 1.271 nats per token" in text


def test_every_claim_speaks_of_arms_and_decodings_that_exist():
    arms = {arm.name: arm for arm in ARMS}
    for claim in summary.claims():
        for metric, name in filter(None, (claim.minuend, claim.subtrahend)):
            arm = arms[name]
            if metric.endswith("/valid"):
                assert metric.split("/")[0] in {decode.name for decode in arm.decodes}, claim
    assert len(arms) == len(ARMS)
