"""Pages from the results of a GPU check: targets, tables, sentences, results of several calls."""

from pathlib import Path

import pytest
import torch

from benchmarks import report, results, roofline
from benchmarks.gpu import attention, check, head, pages, record, targets
from realign.modeling.attention import forest_mask

ROOT = Path(__file__).parents[2]


@pytest.fixture
def measured(tmp_path):
    """A check with made-up results, and the folder that holds them."""
    head = "3072x4096x32000 frozen"
    lines = [
        {"part": "facts", "case": "device", "name": "Fast Card", "driver": "1.2"},
        {"part": "facts", "case": "versions", "torch": "2.11.0", "triton": "3.6.0"},
        {"part": "facts", "case": "GEMM", "tflops": 385.0},
        {"part": "correct", "case": "good", "of_budget": 0.2},
        {"part": "correct", "case": "bad", "error": "Traceback: over budget"},
        {"part": "head", "case": f"{head}/GEMMs alone", "ms": 2.0, "busy_ms": 1.6, "ratio": 0.3},
        {
            "part": "head",
            "case": f"{head}/ours",
            "ms": 6.0,
            "busy_ms": 2.5,
            "peak_gib": 0.71,
            "loss_error": 3e-6,
        },
        {"part": "head", "case": f"{head}/eager logits", "ms": 98.7, "busy_ms": 4.5, "ratio": 0.9},
        {"part": "head", "case": f"{head}/CCE", "error": "No module named 'cce'"},
        {
            "part": "step",
            "case": "ours",
            "seconds": 0.5,
            "positions": 10000,
            "each": [0.4, 0.5],
        },
        {"part": "step", "case": "TRL DPO", "seconds": 0.9, "positions": 20000, "each": [0.9]},
        {"part": "head", "seconds": 99.0, "failed": "time limit 120 s", "tail": ""},
    ]
    for line in lines:
        record.append(tmp_path / check.NAME, line | {"call": 1})
    return check.load(tmp_path)


class TestPages:
    def test_the_calculation_stands_behind_what_was_measured(self, measured):
        text = roofline.page(measured)
        assert "**Measured** on one Fast Card, driver 1.2, torch 2.11.0, triton 3.6.0" in text
        assert max(map(len, text[: text.index("|")].splitlines())) <= 110
        assert "Nothing on this page was measured" not in text and "has run on a GPU" not in text
        (row,) = [
            r for r in text.splitlines() if r.startswith("| LLaVA-1.5-7B 4096 x 32000 | 1.63")
        ]
        calculated = 1e3 * roofline.ours(3072, 4096, 32000, False).seconds(roofline.REACHED)
        assert f"/ {calculated:.3g} | " in row
        where, rows = [r for r in text.splitlines() if r.startswith("| 3072x4096x32000 frozen")]
        assert where.startswith("| 3072x4096x32000 frozen | 6 | 2.5 | 3.5 | 2 | 1.6 | 3.00 |")
        assert where.endswith("| 1.56 | 6.00u | 805 |")  # 4 N H V FLOP in 2 ms
        assert "| 98.7 / 4.5 (0.90) | - / - | 0.71 |" in rows, "CCE failed, ours has a peak"
        words = " ".join(text.split())
        assert "wall time differs from busy time by +25 to +25 %" in words
        assert "within the error budget: 1 of 2" in words
        assert "eager logits takes 0.90 at 3072x4096x32000 frozen." in words
        assert "busy for less than half of the wall time: eager logits 5 % at 3072x" in words
        assert "`head` was cut (time limit 120 s)" in words and "`attention` was not run" in words
        assert "| TRL DPO | 0.9 | 0.9 to 0.9 | - | - | 20,000 | - | 1.80 |" in text

    def test_targets_are_met_or_missed_and_have_their_limit_beside_them(self, measured):
        verdicts = {one.name: one.verdict(measured) for one in targets.read()}
        assert verdicts["frozen head, 3072 x 4096 x 32000"] == "missed"
        assert verdicts["LoRA step of LLaVA-1.5-7B over TRL's DPO"] == "met"  # 0.5 / 0.9
        assert list(verdicts.values()).count("not measured") == len(verdicts) - 2
        text = pages.target_table(measured)
        assert "| at most 2.15 u | 6 u | **missed** | 2 ms |" in text
        assert "| at most 0.6 of its time | 0.556 of its time | **met** | - |" in text
        assert pages.target_counts(measured) == f"1 met, 1 missed, {len(verdicts) - 2} not measured"
        assert pages.missed(measured).splitlines()[-1] == (
            "- frozen head, 3072 x 4096 x 32000: 6 ms, GPU busy 2.5; its GEMMs 2 ms, GPU busy 1.6."
        )
        large = "8190x4096x151936 trained"
        for name, ms in (("ours", 56.0), ("GEMMs alone", 47.0)):
            line = case("head", f"{large}/{name}", 1, ms=ms, busy_ms=ms - 1, peak_gib=5.0)
            measured.cases["head", f"{large}/{name}"] = line
        assert pages.missed(measured).splitlines()[-3:-1] == [
            "- trained head, 8192 x 4096 x 151936: 56 ms, GPU busy 55; its GEMMs 47 ms, GPU busy "
            "46. The GEMMs alone exceed the bound.",
            "- trained head, 8192 x 4096 x 151936, memory: 5 GiB. 1.16 GiB are the gradient of the "
            "weight in bf16.",
        ]

    def test_every_gpu_target_names_a_case_of_the_check(self):
        names = set(head.cases(head.SHAPES, ()))
        found = targets.read()
        for one in found:
            known = names if one.part == "head" else set(pages.STEPS)
            assert {one.case, one.over} <= known | {""}
        assert len({one.name for one in found}) == len(found) == 11

    def test_the_report_shows_ratios_and_what_is_missing(self, measured):
        machine = {"gpu": "x", "versions": {}, "python": "3"}
        run = results.Run("default", machine, "0", "2026-01-01", (), ())
        text = report.page([run], None, draw=False, check=measured)
        gpu_part = text[text.index("## On a GPU") :]
        assert "No GPU timing has been measured" not in text
        assert "`make bench-gpu` runs the suites" in gpu_part and "It was not run" in gpu_part
        assert "| facts | GEMM | 770 tflops | 385 tflops | 0.50 |" in text
        assert "head: missing: time limit 120 s" in text and "bad  missing: Traceback" in text
        assert "| step | ours | 0.361 seconds | 0.5 seconds | 1.38 |" in text
        before = report.page([run], None, draw=False)
        assert "No GPU timing has been measured" in before and "Fast Card" not in before

    def test_sentences_follow_from_the_results(self, measured, tmp_path):
        (tmp_path / "docs").mkdir()
        for name in ("README.md", "docs/kernels.md"):
            (tmp_path / name).write_text((ROOT / name).read_text())
        report.put_gpu_sentences(tmp_path, measured)
        text = (tmp_path / "README.md").read_text()
        assert "No GPU timing has been measured" not in text
        words = " ".join(text.split())
        assert "was 1.80 times faster than TRL's DPO and - times faster than three" in words
        assert "The head took 3.00 times" in words and "GPU targets: 1 met, 1 missed" in words
        assert "eager logits is faster in 1 of 1 cases (0.90 of ours)" in words
        kernels = (tmp_path / "docs" / "kernels.md").read_text()
        assert "On one Fast Card, 1 of 2 cases" in kernels and "has run on a GPU" not in kernels
        report.put_gpu_sentences(tmp_path, check.load(results.FOLDER))
        for name in ("README.md", "docs/kernels.md"):
            assert (tmp_path / name).read_text() == (ROOT / name).read_text(), "generated"


def case(part, of, call, **figures):
    return {"part": part, "case": of, "call": call, **figures}


class TestSeveralCalls:
    """Results of several calls in one file, one after the other."""

    HEAD = "8x4x16 frozen"

    def test_the_last_line_of_a_case_counts_and_ratios_are_of_one_call(self):
        lines = [
            case("facts", "device", 1, name="Card"),
            case("head", f"{self.HEAD}/ours", 1, ms=5.0),
            case("head", f"{self.HEAD}/eager logits", 1, ms=4.0, ratio=0.8),
        ]
        before = check.Check(lines)
        assert before.over_ours(self.HEAD, "eager logits") == 0.8
        again = [
            case("facts", "device", 1, name="Card"),  # a folder of its own counts from 1, too
            case("head", f"{self.HEAD}/ours", 1, ms=3.0),
        ]
        after = check.Check(lines + again)
        assert after.figure("head", f"{self.HEAD}/ours", "ms") == 3.0
        assert after.figure("head", f"{self.HEAD}/eager logits", "ms") == 4.0
        assert after.over_ours(self.HEAD, "eager logits") is None  # 4 ms are no longer 0.8 of ours
        assert not after.elsewhere

    def test_cases_of_another_device_are_left_out_and_counted(self):
        lines = [
            case("facts", "device", 1, name="Card A"),
            case("head", f"{self.HEAD}/ours", 1, ms=5.0, busy_ms=4.0),
            case("head", f"{self.HEAD}/GEMMs alone", 1, ms=2.0, busy_ms=2.0),
            {"part": "step", "call": 1, "seconds": 9.0, "done": True},
            case("facts", "device", 2, name="Card B"),
            case("head", f"{self.HEAD}/ours", 2, ms=3.0, busy_ms=2.0),
        ]
        found = check.Check(lines)
        assert found.card == "Card B"
        assert found.figure("head", f"{self.HEAD}/ours", "ms") == 3.0
        assert pages.over_gemms(found, self.HEAD) is None  # no quotient of two devices
        assert "2 cases of Card A are left out" in found.missing
        assert "`step` was not run" in found.missing
        assert "2 cases of Card A are left out" in roofline.page(found)


def test_a_steps_gemms_are_those_of_its_parameters():
    """LLaMA-7B's linear layers, and PEFT's count of LoRA 128 on all of them."""
    flop = roofline.step_seconds(1) * roofline.REACHED
    assert flop == pytest.approx(4 * 6_476_005_376 + 6 * 319_815_680)


def test_attentions_pairs_are_those_of_the_mask():
    batch = attention.batch_of(attention.TOY)
    mask = forest_mask(batch, "sdpa", torch.float32)
    seen = int((mask if mask.dtype == torch.bool else mask == 0).sum())
    seconds = roofline.attention_seconds(batch.trees[0], 10)
    assert seconds * roofline.REACHED == pytest.approx(14 * seen * 10)
