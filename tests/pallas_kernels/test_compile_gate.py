"""The compile gate: what it lets through, and (slow, with the CUDA plugin installed) the shipped kernels themselves."""

import dataclasses
import importlib.util
import subprocess
import sys

import pytest

from pallas_kernels import compat, compile_gate
from pallas_kernels.compile_gate import CompileCase, KernelReport

CASE = CompileCase(name="example", function=lambda: None, avals=())
GOOD = KernelReport(
    registers=168,
    spill_stores=0,
    spill_loads=0,
    shared_memory=150 * 1024,
    instructions={"HGMMA": 8, "UTMALDG": 2},
    wgmma_shapes={"m64n128k16.f32.bf16.bf16": 8},
    warnings=(),
)
HAS_PLUGIN = importlib.util.find_spec("jax_cuda13_plugin") is not None


def test_the_quick_cases_are_shipped_ones():
    names = [case.name for case in compile_gate.cases()]
    assert len(set(names)) == len(names)
    assert set(compile_gate.QUICK) <= set(names)


def test_a_good_kernel_passes():
    assert GOOD.failures(CASE) == []


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"spill_stores": 8}, "spills 8 bytes"),
        ({"spill_loads": 4}, "spills 4 bytes"),
        ({"instructions": {"UTMALDG": 2, "HMMA": 8}}, "no HGMMA"),
        ({"instructions": {"HGMMA": 8}}, "no UTMALDG"),
        ({"warnings": ("C7510: wgmma.mma_async are serialized due to ...",)}, "wgmma serialized"),
        ({"shared_memory": compat.SHARED_MEMORY_BYTES + 1}, "shared memory"),
    ],
)
def test_a_bad_kernel_fails(change, complaint):
    (found,) = dataclasses.replace(GOOD, **change).failures(CASE)
    assert complaint in found


def test_spills_need_a_reason():
    with pytest.raises(ValueError, match=r"'example'.*max_spill=8"):
        dataclasses.replace(CASE, max_spill=8)
    allowed = dataclasses.replace(CASE, max_spill=8, reason="a peer has it too")
    assert dataclasses.replace(GOOD, spill_stores=8).failures(allowed) == []


def test_cases_have_their_own_names_and_few_shipped_ones_may_spill():
    every = list(compile_gate.cases(shipped_only=False))
    assert len({case.name for case in every}) == len(every)
    shipped = list(compile_gate.cases())
    assert 0 < len(shipped) < len(every)
    assert all(case.max_spill == 0 for case in shipped if not case.reason)
    assert sum(case.max_spill > 0 for case in shipped) == 5 and max(case.max_spill for case in shipped) <= 24


def gate(*arguments):
    command = [sys.executable, "-m", "pallas_kernels.compile_gate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_wrong_arguments_and_missing_plugin_have_a_code_of_their_own():
    result = gate("--filter", "no such case")
    assert result.returncode == 3 and "no such case" in result.stderr
    if not HAS_PLUGIN:
        result = gate("--filter", "causal bfloat16 H=64")
        assert result.returncode == 3 and "gpu-compile" in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(not HAS_PLUGIN, reason="needs the extra gpu-compile")
@pytest.mark.parametrize("more", [(), ("--all",)], ids=["shipped", "all"])
def test_kernels_pass_the_gate(more):
    result = gate(*more)
    assert result.returncode == 0, result.stdout + result.stderr
