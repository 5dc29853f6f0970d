"""What the kernels compile to for 80, 90 and 100: no GPU is needed, and none is used.

In processes of their own, one per architecture: the tests beside this one interpret the kernels.
"""

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

ARCHITECTURES = (80, 90, 100)
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}
SMALLER_SIBLINGS = 101376  # of 86 and 89, which use the tiles of 80
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: r"UTC\w*MMA"}
COMMAND = (sys.executable, "-m", "realign_kernels.backends.triton.compile")


def environment():
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture(scope="module")
def reports():
    """Per architecture, by case. 90 also compiles for arguments that are 1."""
    running = {}
    for architecture in ARCHITECTURES:
        command = [*COMMAND, "--json", "--arch", str(architecture)]
        command += ["--ones"] if architecture == 90 else []
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running[architecture] = subprocess.Popen(command, env=environment(), **pipes)
    found = {}
    for architecture, process in running.items():
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        found[architecture] = {report["case"]: report for report in json.loads(out)}
    for report in (r for cases in found.values() for r in cases.values()):
        print(
            "{architecture:4} {case:26} {registers:4} registers {shared:7} shared".format(**report)
        )
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills_or_outgrows_shared_memory(reports, architecture):
    assert len(reports[architecture]) >= 12
    limit = SMALLER_SIBLINGS if architecture == 80 else SHARED_MEMORY[architecture]
    for report in reports[architecture].values():
        assert report["spills"] == 0, report
        assert report["shared"] <= limit, report


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_runs_on_tensor_cores(reports, architecture):
    heads = {c: r for c, r in reports[architecture].items() if c.startswith("head")}
    assert len(heads) >= 6
    for report in heads.values():
        assert re.fullmatch(TENSOR_CORES[architecture], report["tensor_cores"]), report
        assert not report["serialized"], report
    for case in ("head wide", "head narrow", "head few rows"):
        fetch = "LDGSTS" if architecture == 80 else "UTMALDG"
        assert heads[case]["fetches"] == fetch, heads[case]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_four_rows_share_a_multiprocessor(reports, architecture):
    """8 warps of 64 registers are a quarter of its registers: reads of four rows overlap."""
    cases = reports[architecture]
    for case in ("rows fp32 to bf16", "rows bf16 in place", "rows fp32, no derivative"):
        assert cases[case]["registers"] * 32 * cases[case]["warps"] <= 65536 // 4, cases[case]


def test_arguments_that_are_one_compile(reports):
    assert {"head of one", "rows of one token", "loss of one"} <= set(reports[90])


def test_interpreted_kernels_are_refused():
    done = subprocess.run(
        COMMAND, env={**environment(), "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode != 0 and "TRITON_INTERPRET is set: unset it" in done.stderr


def test_the_package_imports_without_triton():
    """realign_kernels never loads it; realign_kernels.backends.triton only with its modules."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import realign_kernels, realign_kernels.backends.triton\n"
        "assert not any(name.startswith('triton.') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)
