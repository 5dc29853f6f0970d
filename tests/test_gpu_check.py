"""GPU check: a part that fails costs only itself, a second call runs what is missing, rehearsal."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import record, table

ROOT = Path(__file__).parent.parent
PROBES = {
    "good": """
        def run(record):
            for case in record.missing(["a", "group/b", "group/c"]):
                with record.attempt(case):
                    record(case, u=2.5, device=record.device)
    """,
    "raises": """
        def run(record):
            record("before", ms=1.0)
            raise RuntimeError("this part is broken")
    """,
    "hangs": """
        import subprocess, sys, time
        def run(record):
            child = subprocess.Popen(
                [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
            )
            record("child", pid=child.pid)
            time.sleep(600)
    """,
    "killed": """
        import os, signal
        def run(record):
            os.kill(os.getpid(), signal.SIGKILL)
    """,
    "half": """
        import os
        def run(record):
            for case in record.missing(["fine", "bad", "last"]):
                with record.attempt(case):
                    if case == "bad" and not os.path.exists(record.folder / "fixed"):
                        raise ValueError("a bad case")
                    record(case, ms=1.0)
    """,
    "lost": """
        import sys
        from benchmarks.gpu.record import LOST
        def run(record):
            for case in record.missing(["first", "second", "third"]):
                with record.attempt(case):
                    if case == "second":
                        record(case, error="CUDA error: an illegal memory access")
                        sys.exit(LOST)
                    record(case, pid=record.call)
    """,
}
"""Parts: bodies of modules."""


@pytest.fixture
def check(tmp_path):
    """check(*parts, **limits): runs the command on probes; returns (exit code, table, lines)."""
    folder = tmp_path / "probes"
    folder.mkdir()
    (folder / "__init__.py").touch()

    def call(*parts, limit=20.0):
        for part in parts:
            lines = PROBES[part].replace("\n        ", "\n")
            (folder / f"{part}.py").write_text(f"LIMIT = {limit / gpu.REHEARSAL}\n{lines}\n")
        names = ",".join(f"probes.{part}" for part in parts)
        command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "out")]
        done = subprocess.run(
            [*command, "--rehearse", "--parts", names],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.returncode, done.stdout, record.read(tmp_path / "out" / record.RESULTS)

    return call


def figures(lines, part):
    return {k[1]: line for k, line in record.latest(lines).items() if k[0] == part}


def test_a_part_that_raises_hangs_or_is_killed_costs_only_itself(check):
    began = time.monotonic()
    code, out, lines = check("raises", "hangs", "killed", "good", limit=6.0)
    assert code == 1 and time.monotonic() - began < 40
    assert [f["u"] for f in figures(lines, "good").values()] == [2.5] * 3
    assert figures(lines, "raises")["before"]["ms"] == 1.0
    ends = {line["part"]: line for line in lines if "case" not in line}
    assert ends["raises"]["failed"] == "exit code 1"
    assert "RuntimeError: this part is broken" in ends["raises"]["tail"]
    assert ends["hangs"]["failed"] == "time limit 6 s"
    assert "time.sleep(600)" in ends["hangs"]["tail"] or "in run" in ends["hangs"]["tail"]
    assert ends["killed"]["failed"] == "exit code -9"
    assert ends["good"]["done"] is True
    for part, why in (("raises", "exit code 1"), ("hangs", "time limit 6 s"), ("killed", "-9")):
        assert f"{part}: missing: " in out and why in out
    assert "group  b 2.5u  c 2.5u" in out
    child = figures(lines, "hangs")["child"]["pid"]
    # Where no init collects it, a killed process stays as a zombie.
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_second_call_runs_only_what_is_missing(check, tmp_path):
    code, out, first = check("good", "half")
    assert code == 1 and "bad  missing: ValueError: a bad case" in out and "1 FAILED" in out
    assert "raise ValueError" in figures(first, "half")["bad"]["error"]
    (tmp_path / "out" / "fixed").touch()
    code, out, lines = check("good", "half")
    assert code == 0 and "FAILED" not in out
    added = [(line["part"], line.get("case")) for line in lines[len(first) :]]
    assert added == [("half", "bad"), ("half", None)]
    code, _, again = check("good", "half")
    assert code == 0 and again == lines
    assert len(list((tmp_path / "out").iterdir())) <= 8


def test_a_part_without_a_cuda_context_starts_again_for_its_other_cases(check):
    code, _, lines = check("lost")
    assert code == 1
    assert [line.get("case") for line in lines] == ["first", "second", "third", None]


def test_what_cannot_start_is_named(capsys, tmp_path):
    given = ["--out", str(tmp_path), "--rehearse", "--parts"]
    assert gpu.main([*given, "nosuch", "--budget", "30"]) == 1
    assert "nosuch: missing: there is no module benchmarks.gpu.nosuch" in capsys.readouterr().out
    assert gpu.main([*given, "facts", "--budget", "1"]) == 1
    assert "facts: missing: the budget is spent" in capsys.readouterr().out


def test_the_table_has_at_most_100_lines_and_counts_what_it_cuts():
    lines = [
        {"part": part, "case": f"case {i}", "call": 1, "ms": float(i)}
        for part in ("one", "two")
        for i in range(90 if part == "one" else 20)
    ]
    rows = table.table(lines, ["one", "two", "three"])
    assert len(rows) <= table.MOST_LINES
    assert rows[0] == "one: missing: not run" and "two: missing: not run" in rows
    (cut,) = [row for row in rows if "more lines" in row]
    shown = sum(row.startswith("  case") for row in rows)
    assert cut == f"  ... {110 - shown} more lines in results.jsonl" and rows[-1].startswith(
        "three"
    )
    assert (
        sum(row.startswith("  case") for row in rows[rows.index("two: missing: not run") :]) == 20
    )


def test_every_part_has_a_limit():
    limits = {part: gpu.limit_of(gpu.module_of(part)) for part in ("facts",)}
    assert limits["facts"] == 20
