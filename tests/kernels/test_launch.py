"""Triton kernels without a GPU: compiled code and launches.

For sm_90 and sm_100 a separate process (launch_worker.py) launches the kernels through Triton's
JIT, launcher and tensor maps. A stub of libcuda records the launches. The checker below compares
each launch with the kernel's contract and with the limits of the architecture. For sm_80 the
kernels are only compiled.
"""

import copy
import functools
import importlib.util
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
SHARED = 232448  # largest shared memory of a block on sm_90 and sm_100, in bytes
SMALLER_SIBLINGS = 101376  # the same on 86 and 89, which use the tiles of 80
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: r"UTC\w*MMA"}
DESCRIBED = ("head wide", "head narrow", "head few rows")  # tiles loaded through tensor maps
QUARTERS = ("rows fp32 to bf16", "rows bf16 in place", "rows fp32, no derivative")
"""8 warps of 64 registers use a quarter of a multiprocessor, so reads of four rows overlap."""
COMMAND = (sys.executable, "-m", "realign_kernels.backends.triton.compile")
SIZES = {6: 2, 7: 4, 9: 2}  # bytes of an element, by CUtensorMapDataType: fp16, fp32, bf16
SWIZZLES = {0: math.inf, 1: 32, 2: 64, 3: 128}  # bytes of the innermost box, by CUtensorMapSwizzle
INT32 = range(-(2**31), 2**31)


UNSPECIALIZED = {
    "loss_kernel": "rows", "head_kernel": "count", "exp_kernel": "count", "score_kernel": "count",
    "add_rows_kernel": "count",
}  # fmt: skip
"""Kernel -> argument whose value 1 Triton does not compile into it (`do_not_specialize`)."""


def flat(value, unspecialized=False):
    """(letter, value) of each kernel parameter of an argument. A constant has none."""
    if value is None or (isinstance(value, int) and value == 1 and not unspecialized):
        return  # Triton compiles both into the kernel
    if isinstance(value, list):
        for entry in value:
            yield from flat(entry)
    elif isinstance(value, float):
        yield "f", struct.unpack("f", struct.pack("f", value))[0]
    elif isinstance(value, int):
        yield "i" if value in INT32 else "l", value
    elif "pointer" in value:
        yield "p", value["pointer"]
    else:
        yield "t", value["map"]
        yield from (("i", size) for size in value["shape"])
        yield from (("l", pitch) for pitch in value["strides"])


def map_problems(found, expected):
    """Errors in a tensor map: violations of driver limits, and differences from the tensor."""
    inner = found["box"][0] * SIZES[found["type"]]
    rules = {
        "an address off 16 bytes": found["address"] % 16,
        "a stride off 16 bytes": any(stride % 16 for stride in found["strides"]),
        "a stride of 2**40 bytes": any(stride >= 2**40 for stride in found["strides"]),
        "a dimension out of range": any(not 0 < size <= 2**32 for size in found["dims"]),
        "a box out of range": any(not 0 < size <= 256 for size in found["box"]),
        "a box off 16 bytes": inner % 16,
        "a box wider than its swizzle": inner > SWIZZLES[found["swizzle"]],
    }
    plain = {"steps": [1] * len(found["dims"]), "interleave": 0, "fill": 0}  # 0 fills with zeros
    yield from (name for name, broken in rules.items() if broken)
    for name, value in {**expected, **plain}.items():
        if found[name] != value:
            yield f"{name} of a map is {found[name]}, not {value}"


def problems(case):
    """All errors in a launch."""
    *maps, launch = case["records"]
    maps = {record["map"]: record for record in maps}
    x, y, z = launch["grid"]
    rules = {
        "an empty grid": min(x, y, z) < 1,
        "a grid too large": x >= 2**31 or max(y, z) > 65535,
        "too much shared memory": launch["shared"] > SHARED,
        "a cluster or another attribute": launch["attributes"],
        "a grid that is not the contract's": launch["grid"] != case["grid"],
        "other warps": launch["block"] != [32 * case["warps"], 1, 1],
    }
    found = [name for name, broken in rules.items() if broken]
    for name, value in case["constants"].items():
        if value != case["expected"][name]:
            found.append(f"{name} is {value}, not {case['expected'][name]}")
    named = [name for name in case["names"] if name not in case["constants"]]
    wanted = [
        (name, pair)
        for name in named
        for pair in flat(case["expected"][name], name == UNSPECIALIZED.get(case["kernel"]))
    ]
    wanted += [("scratch", ("p", 0))] * 2  # Triton's scratch arguments
    if len(wanted) != len(launch["parameters"]):
        return [*found, f"{len(launch['parameters'])} parameters, not {len(wanted)}"]
    for (name, (letter, value)), given in zip(wanted, launch["parameters"], strict=True):
        if letter == "t" and given[0] == "t":
            found += map_problems(maps[given[1]], value)
        elif tuple(given) != (letter, value):
            found.append(f"{name} is {given}, not {(letter, value)}")
    return found


def environment(**changes):
    """This file compiles kernels, but other test files interpret them."""
    return {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"} | changes


@pytest.fixture(scope="module")
def reports_80():
    """The report of the command for sm_80, which runs in parallel with the worker."""
    words = [*COMMAND, "--json", "--arch", "80"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env=environment(), **pipes) as process:

        def reports():
            out, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
            return json.loads(out)

        yield functools.cache(reports)


@pytest.fixture(scope="module")
def cases(reports_80, tmp_path_factory):
    """The launches that launch_worker.py recorded."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler builds the stand-in for libcuda")
    triton = Path(importlib.util.find_spec("triton").origin).parent
    include = triton / "backends" / "nvidia" / "include"  # cuda.h comes with Triton
    folder = tmp_path_factory.mktemp("launches")
    command = [compiler, "-shared", "-fPIC", f"-I{include}", "-o", str(folder / "libcuda.so.1")]
    subprocess.run([*command, str(HERE / "driver_stub.c")], check=True)
    variables = environment(
        LD_LIBRARY_PATH=str(folder),
        OMP_NUM_THREADS="1",
        STUB_RECORDS=str(folder / "records"),
        TRITON_CACHE_DIR=str(folder / "cache"),
        TRITON_LIBCUDA_PATH=str(folder),
    )
    worker = [sys.executable, str(HERE / "launch_worker.py"), str(folder)]
    done = subprocess.run(worker, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder / "memory").unlink()
    return [json.loads(line) for line in (folder / "launches").read_text().splitlines()]


def test_launches_match_their_contracts(cases):
    found = [(case["kernel"], case["case"], problems(case)) for case in cases]
    assert not [wrong for wrong in found if wrong[2]]


STEPS = """
import torch
from realign_kernels.backends.triton import compile, exp_head

def both(count):
    head = compile.Head(compile._empty(32000, 4096), None, None, 1.3)
    logits = compile._empty(count, 32000)
    narrow = compile._empty(count, dtype=torch.int32), compile._empty(count, dtype=torch.float32)
    sums = exp_head.exp_rows(compile._empty(count, 4096), head, *narrow, logits)
    exp_head.score_sums(sums, narrow[1], 1.3)

calls = [both, lambda n: compile._head(n, 4096, 32000), lambda n: compile._loss("rdpo", n, 4)]
calls.append(lambda n: compile._scatter(n, 4096))
for call in calls:
    found = []
    for count in (2048, 2047, 2040, 2044):  # divisible by 16, by nothing, by 8 and by 4
        with compile._recorded(90) as launches:
            call(count)
        found.append([(one.source.hash(), one.warps, one.stages) for one in launches])
    assert found[0] and all(other == found[0] for other in found), found
"""


def test_other_numbers_of_rows_compile_no_kernel():
    """They differ from step to step. A compilation takes as long as a step."""
    command = [sys.executable, "-c", STEPS]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, check=False, cwd=HERE.parents[1]
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_new_shift_compiles_no_kernel(cases):
    """As a number and as a tensor. Both change from step to step in a run with BCO."""
    compiled = [case["report"] is not None for case in cases if case["case"] == "mpo mean"]
    assert compiled == [True, True, False, False]


def test_compiled_kernels(cases, reports_80):
    compiled = [
        (r, r["case"], r["case"].startswith("head"), r["case"] in DESCRIBED) for r in reports_80()
    ]
    for case in (case for case in cases if case["report"]):
        name = case["kernel"].replace("row_kernel", "rows") + " " + case["case"]
        by_tiles = case["kernel"] in ("head_kernel", "exp_kernel")
        described = case["constants"].get("DESCRIPTORS", by_tiles)
        compiled.append((case["report"], name, by_tiles, described))
    assert {80, 90, 100} == {report["architecture"] for report, *_ in compiled}
    for report, name, by_tiles, described in compiled:
        architecture = report["architecture"]
        assert report["spills"] == 0 and not report["serialized"], (name, report)
        assert report["shared"] <= (SMALLER_SIBLINGS if architecture == 80 else SHARED), report
        if by_tiles:
            assert re.fullmatch(TENSOR_CORES[architecture], report["tensor_cores"]), (name, report)
        if described:
            fetch = "LDGSTS" if architecture == 80 else "UTMALDG"
            assert report["fetches"] == fetch, (name, report)
        if name in QUARTERS:
            # The version with one read keeps sums in registers: 80 on sm_80 and 73 on sm_100.
            rows = 3 if name == "rows fp32 to bf16" and architecture != 90 else 4
            assert report["registers"] * 32 * report["warps"] <= 65536 // rows, (name, report)
    names = [(report["architecture"], name) for report, name, *_ in compiled]
    assert {(a, name) for a in (80, 90, 100) for name in QUARTERS} <= set(names)


def test_interpreted_kernels_are_refused():
    variables = environment(TRITON_INTERPRET="1")
    done = subprocess.run(COMMAND, env=variables, capture_output=True, text=True)
    assert done.returncode != 0 and "TRITON_INTERPRET is set. Unset it" in done.stderr


def test_the_package_imports_without_triton():
    """realign_kernels does not import triton. Only modules of backends.triton do."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import realign_kernels, realign_kernels.backends.triton\n"
        "assert not any(name.startswith('triton.') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


def launch(case):
    return case["records"][-1]


def swap(parameters, one, other):
    parameters[one], parameters[other] = parameters[other], parameters[one]


FAULTS = {
    "an address off 16 bytes": lambda case: case["records"][0].update(address=4098),
    "a stride off 16 bytes": lambda case: case["records"][0].update(strides=[8190]),
    "a stride of 2**40 bytes": lambda case: case["records"][0].update(strides=[2**40]),
    "a dimension out of range": lambda case: case["records"][1].update(dims=[4096, 0]),
    "a box out of range": lambda case: case["records"][1].update(box=[64, 512]),
    "a box off 16 bytes": lambda case: case["records"][1].update(box=[12, 256]),
    "a box wider than its swizzle": lambda case: case["records"][1].update(box=[128, 256]),
    "dims of a map is [64, 64], not": lambda case: case["records"][0].update(dims=[64, 64]),
    "fill of a map is 1, not 0": lambda case: case["records"][0].update(fill=1),
    "an empty grid": lambda case: launch(case).update(grid=[4000, 0, 1]),
    "a grid too large": lambda case: launch(case).update(grid=[1, 65536, 1]),
    "too much shared memory": lambda case: launch(case).update(shared=SHARED + 1),
    "a cluster or another attribute": lambda case: launch(case).update(attributes=1),
    "a grid that is not the contract's": lambda case: launch(case).update(grid=[3999, 1, 1]),
    "other warps": lambda case: launch(case).update(block=[128, 1, 1]),
    "GROUP is 8, not 16": lambda case: case["constants"].update(GROUP=8),
    "parameters, not": lambda case: launch(case)["parameters"].pop(),
    "address of a map is": lambda case: swap(launch(case)["parameters"], 0, 5),
    "labels is ['p'": lambda case: swap(launch(case)["parameters"], 10, 11),
    "vocabulary is ['i', 4096], not ('i', 32000)": lambda case: swap(
        launch(case)["parameters"], 14, 15
    ),
    "inverse_temperature is ['f', 1.0]": lambda case: launch(case)["parameters"].__setitem__(
        -3, ["f", 1.0]
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_checker_finds(cases, fault):
    case = copy.deepcopy(cases[0])
    assert case["case"] == "wide" and not problems(case)
    FAULTS[fault](case)
    assert any(fault in problem for problem in problems(case)), problems(case)
