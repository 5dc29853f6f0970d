"""GPU check: failing parts, a second call, the rehearsal, the table, and exact results."""

import os
import time
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.contestants import CONTESTANTS, forward_backward
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import facts, head, record, table, truth
from realign_kernels import reference

ROOT = Path(__file__).parents[2]
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
"""Source of the modules of invented parts."""


@pytest.fixture
def run_parts(tmp_path, monkeypatch, capsys):
    """run_parts(*parts, limit=12): runs the command on probes; returns (exit code, table, lines).

    A limit of 1 is 5 s.
    """
    folder = tmp_path / "probes"
    folder.mkdir()
    (folder / "__init__.py").touch()

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(tmp_path))))

    def call(*parts, limit=12):
        for part in parts:
            lines = PROBES[part].replace("\n        ", "\n")
            (folder / f"{part}.py").write_text(f"{lines}\n")
        names = ",".join(f"probes.{part}" for part in parts)
        given = ["--out", str(tmp_path / "out"), "--rehearse", "--limit", str(limit)]
        code = gpu.main([*given, "--parts", names])
        return code, capsys.readouterr().out, record.read(tmp_path / "out" / record.RESULTS)

    return call


def figures(lines, part):
    return {k[1]: line for k, line in record.latest(lines).items() if k[0] == part}


def test_other_parts_run_after_a_failure_and_a_second_call_runs_missing_parts(run_parts, tmp_path):
    code, out, first = run_parts("raises", "killed", "lost", "half", "good")
    assert code == 1
    assert [f["u"] for f in figures(first, "good").values()] == [2.5] * 3
    assert figures(first, "raises")["before"]["ms"] == 1.0
    ends = {line["part"]: line for line in first if "case" not in line}
    assert ends["raises"]["failed"] == "exit code 1"
    assert "RuntimeError: this part is broken" in ends["raises"]["tail"]
    assert ends["killed"]["failed"] == "exit code -9"
    assert ends["good"]["done"] is True
    for part, why in (("raises", "exit code 1"), ("killed", "-9")):
        assert f"{part}: missing: " in out and why in out
    assert "group  b 2.5u  c 2.5u" in out
    # After the loss of a CUDA context the part restarts for its other cases.
    assert list(figures(first, "lost")) == ["first", "second", "third"]
    assert "bad  missing: ValueError: a bad case" in out and "1 FAILED" in out
    assert "raise ValueError" in figures(first, "half")["bad"]["error"]

    (tmp_path / "out" / "fixed").touch()
    code, out, lines = run_parts("good", "half")
    assert code == 0 and "FAILED" not in out
    added = [(line["part"], line.get("case")) for line in lines[len(first) :]]
    assert added == [record.DEVICE, ("half", "bad"), ("half", None)]
    assert gpu.main(["--out", str(tmp_path / "out"), "--rehearse", "--parts", "good,half"]) == 0
    assert record.read(tmp_path / "out" / record.RESULTS) == lines
    assert len(list((tmp_path / "out").iterdir())) <= 8


def test_a_part_that_hangs_ends_at_its_limit_with_its_child(run_parts):
    code, out, lines = run_parts("hangs", limit=2)
    assert code == 1 and "hangs: missing: " in out and "time limit 10 s" in out
    (end,) = (line for line in lines if line["part"] == "hangs" and "case" not in line)
    assert end["failed"] == "time limit 10 s"
    assert "time.sleep(600)" in end["tail"] or "in run" in end["tail"]
    child = figures(lines, "hangs")["child"]["pid"]
    until = time.monotonic() + 20
    while _runs(child):
        assert time.monotonic() < until
        time.sleep(0.05)


def _runs(pid):
    """Whether a process runs. A killed one stays a zombie if no init process collects it."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_device_comes_from_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    fake = tmp_path / "nvidia-smi"
    fields = "--query-gpu=name,driver_version,power.limit,clocks.max.sm"
    printed = "Fast Card, 1.2, 700.00 W, 1980 MHz"
    fake.write_text(f'#!/bin/sh\ntest "$1" = {fields} && echo "{printed}"\n')
    fake.chmod(0o755)
    found = {"name": "Fast Card", "driver": "1.2", "power_limit": "700.00 W"}
    assert record.device(rehearse=False) == found | {"max_clock": "1980 MHz"}
    fake.write_text("#!/bin/sh\necho no driver\nexit 9\n")
    assert record.device(rehearse=False) == {"name": "unknown", "smi": "no driver"}
    fake.unlink()
    assert "nvidia-smi" in record.device(rehearse=False)["smi"]


def test_a_part_that_cannot_start_is_reported(capsys, tmp_path):
    given = ["--out", str(tmp_path), "--rehearse", "--parts"]
    assert gpu.main([*given, "nosuch", "--budget", "30"]) == 1
    assert "nosuch: missing: exit code 1" in capsys.readouterr().out
    (line,) = [line for line in record.read(tmp_path / record.RESULTS) if "tail" in line]
    assert "No module named 'benchmarks.gpu.nosuch'" in line["tail"]
    assert gpu.main([*given, "facts", "--budget", "1"]) == 1
    assert "facts: missing: the budget is spent" in capsys.readouterr().out


def test_the_error_without_a_gpu_suggests_rehearse(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path / "out")])
    assert "no CUDA device: add --rehearse" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_table_has_at_most_100_lines_and_counts_cut_lines():
    lines = [
        {"part": part, "case": f"case {i}", "call": 1, "ms": float(i)}
        for part in ("one", "two")
        for i in range(90 if part == "one" else 20)
    ]
    rows = table.table(lines, ["one", "two", "three"])
    assert len(rows) == table.MOST_LINES
    assert rows[0] == "one: missing: not run" and rows[-1] == "three: missing: not run"
    second = rows.index("two: missing: not run")
    assert rows[second - 1] == f"  ... {90 - (second - 2)} more lines in results.jsonl"
    assert len(rows[second:-1]) == 1 + 20  # the shorter part is complete


def test_a_rehearsal_gives_every_result(tmp_path, monkeypatch, capsys):
    """All cases run at toy sizes, and missing libraries are reported."""
    pytest.importorskip("triton")
    monkeypatch.chdir(ROOT)
    with torch._dynamo.config.patch(disable=True):  # as in the part `head`, but only in this test
        for part in (facts, head):  # these interpret no kernels
            name = part.__name__.rpartition(".")[2]
            part.run(record.Record(tmp_path, name, rehearse=True, seconds=300, call=1))
    given = ["--out", str(tmp_path), "--rehearse", "--parts", "correct,variants"]
    assert gpu.main(given) == 0
    cases, shown = record.latest(record.read(tmp_path / record.RESULTS)), capsys.readouterr().out
    assert not any(map(record.failed, cases.values())), shown
    lacking = {name for name in cases.get(("head", "absent"), {}) if name in CONTESTANTS}
    assert lacking <= {"Liger DPO, two calls", "CCE", "F.linear_cross_entropy"}
    found = {case: line for (part, case), line in cases.items() if part == "correct"}
    kernels = {case.split("/")[0] for case in found if case.startswith("E by ")}
    assert {"E by triton", "E by rows"} <= kernels  # and cutlass if it was built
    assert len(found) == 42 + 3 * len(kernels) and found["opcheck"]["operators"]
    shares = [line["of_budget"] for line in found.values() if "of_budget" in line]
    assert len(shares) == 36 + 3 * len(kernels) and all(0 < share <= 1 for share in shares)
    heads = sum(part == "head" and case != "absent" for part, case in cases)
    assert heads == 40 - 4 * len(lacking)
    for (part, case), line in cases.items():  # the limit and the peers take turns with ours
        assert ("ratio" in line) == (part == "head" and not case.endswith(("ours", "absent")))
    assert sum(part == "variants" for part, _ in cases) == 23
    differences = [line["difference"] for key, line in cases.items() if key[0] == "variants"]
    assert max(differences) < 2e-3  # fp16
    assert len(shown.splitlines()) <= table.MOST_LINES


def test_a_torn_line_does_not_affect_the_others(tmp_path):
    path = tmp_path / record.RESULTS
    record.append(path, {"part": "a", "case": "x", "figures": {"ms": 1.0}})
    with path.open("a") as file:
        file.write('{"part": "a", "case": "y", "figures": {"ms": 2.0}')
    record.append(path, {"part": "a", "case": "z"})
    assert [line["case"] for line in record.read(path)] == ["x", "z"]


def test_exact_gradients_are_computed_without_grad_mode():
    head.truth_of.cache_clear()
    with torch.no_grad():
        exact = head.truth_of(head.TOYS[1], "cpu")
    assert all(t is not None for t in exact)


OPTIONS = {
    "plain": {},
    "capped": {"bias": True, "softcap": 4.0, "temperature": 1.3},
    "rival": {"rival": True},
}


# A wrong exact result widens the budget, which the cases of a rehearsal cannot detect.
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_plain_torch_agrees_with_the_specification(options):
    case, head = truth.make((9, 8, 23), torch.float32, "cpu", **options)
    value, kept = truth.eager(case, torch.float64, block=4, **head), case.labels != truth.IGNORE
    hidden, weight, labels = case.hidden[kept].double(), case.weight.double(), case.labels[kept]
    if "rival" in head:
        strongest = reference.runner_up(hidden @ weight.T, labels)
        labels = torch.where(head["rival"][kept], strongest, labels)
    bias = None if case.bias is None else case.bias.double()
    given = hidden, weight, labels, bias, head.get("softcap"), head.get("temperature", 1.0)
    grads = reference.linear_logprobs_backward(case.upstream[kept].double(), *given)
    found = value.logps[kept], value.hidden[kept], value.weight, value.bias
    for mine, true in zip(found, (reference.linear_logprobs(*given), *grads), strict=True):
        if mine is not None:
            torch.testing.assert_close(mine, true)
    assert not value.logps[~kept].any()


def test_the_truth_of_the_loss_and_its_gradients():
    batch = truth.preference(2, 5, 8, 23, torch.float32, "cpu")
    loss, answer = truth.preference_truth(batch)

    def exact(hidden, weight, labels):
        logps = torch.log_softmax(hidden @ weight.T, -1).gather(-1, labels[..., None])
        return reference.rdpo_loss(logps[..., 0].sum(-1), torch.zeros(3, 2))

    inputs = batch.hidden.double(), batch.weight.double(), batch.labels
    value, hidden, weight = forward_backward(exact, *inputs, trainable=True)
    torch.testing.assert_close(loss, value)
    torch.testing.assert_close(answer.hidden.view_as(hidden), hidden)
    torch.testing.assert_close(answer.weight, weight)


def test_an_error_over_its_budget_fails():
    problem = truth.make((9, 8, 23), torch.float32, "cpu")
    value = truth.ours(problem, "all")
    assert truth.check(problem, value)["of_budget"] <= 1
    for name in ("logps", "hidden", "weight"):
        for factor, words in ((1 + 1e-5, "of their budget"), (torch.nan, "inf of their")):
            wrong = value._replace(**{name: getattr(value, name) * factor})
            with pytest.raises(AssertionError, match=words):
                truth.check(problem, wrong)


def test_every_listed_wheel_is_pinned():
    lines = (ROOT / "benchmarks" / "gpu" / "wheels.txt").read_text().splitlines()
    names = [line.split("#")[0].strip() for line in lines]
    pins = (ROOT / "constraints.txt").read_text()
    assert all(f"\n{name}==" in pins for name in filter(None, names))
    assert not {"torch", "triton"} & set(names)
