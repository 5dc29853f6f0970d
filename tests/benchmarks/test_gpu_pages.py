"""Blocks generated from the results of a GPU check, and results of several calls."""

import pytest
import torch

from benchmarks import readme, roofline, targets
from benchmarks.gpu import attention, check, head, pages
from benchmarks.results import LIMIT, RENAMED, Run
from realign.modeling.attention import forest_mask

SHAPE = "3072x4096x32000 frozen"


def case(part, of, call=1, **figures):
    return {"part": part, "case": of, "call": call, **figures}


def measured():
    """A check with invented results."""
    return check.Check([
        case("facts", "device", name="Fast Card", driver="1.2"),
        case("facts", "versions", torch="2.11.0", triton="3.6.0"),
        case("facts", "GEMM", tflops=385.0),
        case("correct", "good", of_budget=0.2),
        case("correct", "bad", error="Traceback: over budget"),
        case("head", f"{SHAPE}/{LIMIT}", ms=2.0, busy_ms=1.6, ratio=0.3),
        case("head", f"{SHAPE}/ours", ms=6.0, busy_ms=2.5, peak_gib=0.71, loss_error=3e-6),
        case("head", f"{SHAPE}/eager logits", ms=98.7, busy_ms=4.5, ratio=0.9),
        case("head", f"{SHAPE}/CCE", error="No module named 'cce'"),
        case("step", "ours", seconds=0.5, positions=10000, each=[0.4, 0.5]),
        case("step", "TRL DPO", seconds=0.9, positions=20000, each=[0.9]),
        {"part": "head", "call": 1, "seconds": 99.0, "failed": "time limit 120 s", "tail": ""},
    ])  # fmt: skip


def test_blocks_have_the_measured_figures():
    found = pages.blocks(measured())
    text = " ".join(found["measured"].split())
    assert "**Measured** on one Fast Card, driver 1.2, torch 2.11.0, triton 3.6.0" in text
    assert "within the error budget: 1 of 2" in text
    assert "`head` (time limit 120 s)" in text and "`attention` (not run)" in text
    (row,) = (r for r in found["frozen"].splitlines() if r.startswith("| LLaVA-1.5-7B 4096"))
    calculated = 1e3 * roofline.ours(3072, 4096, 32000, False).seconds(roofline.REACHED)
    assert f"/ {calculated:.3g} | " in row
    row = found["where"].splitlines()[2]
    assert row.startswith(f"| {SHAPE} | 6 | 2.5 | 3.5 | 2 | 1.6 | 0.33x |")
    assert row.endswith("| 0.64x | 6.00u | 805 |")  # 4 N H V FLOP in 2 ms
    assert (
        "Error of a column: +25 to +25 % (wall time of the bare GEMMs less their busy time)."
        in found["where"]
    )
    contestants = " ".join(found["contestants"].split())
    assert "| 98.7 / 4.5 (**0.90x**) | - | 0.71 |" in contestants, "CCE failed, ours has a peak"
    assert "slower** where the ratio is bold: - eager logits: 1 of 1 cases, 0.90x" in contestants
    assert "less than half of the wall time: - eager logits: 5 % at 3072x" in contestants
    assert "| TRL DPO | 0.9 | 0.9 to 0.9 | - | - | 20,000 | - | 1.80x |" in found["step"]
    assert "| facts | GEMM | 770 tflops | 385 tflops | 0.50 |" in found["ratios"]
    assert "| step | ours | 0.361 seconds | 0.5 seconds | 1.38 |" in found["ratios"]
    assert "head: missing: time limit 120 s" in found["check"]
    assert "bad  missing: Traceback" in found["check"]


def test_target_verdicts_and_limits():
    text, one = pages.target_block(measured()), targets.read()[1]
    assert text.startswith(f"1 met, 1 missed, {len(one) - 2} not measured.")
    assert "| at most 2.15 u | 6 u | **missed** | 2 ms |" in text
    assert "| at least 1.67x | 1.80x | **met** | - |" in text


def test_every_gpu_target_names_a_case_of_the_check():
    names = set(head.cases(head.SHAPES, ()))
    for one in targets.read()[1]:
        known = names if one.part == "head" else set(pages.STEPS)
        assert {one.case, one.over} <= known | {""}


MACHINE = {"cpu": "a CPU", "capability": "AVX512", "threads": 2, "versions": {"torch": "2.1+x"}}
RUN = Run("slow", MACHINE, "0123456789ab", "2026-11-25 01:42:37", (), ())


def test_summary_and_sentences_follow_from_the_results():
    words = " ".join(pages.summary(measured()).split())
    assert "was 1.80x faster than TRL's DPO. It was - faster than three" in words
    assert "bare GEMMs by cuBLAS took 0.33x of our time" in words
    assert "eager logits is faster in 1 of 1 cases (0.90x)." in words
    assert "Targets: 1 met, 1 missed" in words
    words = " ".join(readme.measured_line(RUN, measured()).split())
    assert "on a CPU (a CPU, 2 threads, commit 0123456 of 2026-11-25;" in words
    assert "(one Fast Card), only an earlier version was timed" in words
    assert "slower than eager logits in 1 of 1 cases" in words
    assert "was 1.80x faster than TRL's DPO" in words
    assert "On one Fast Card, 1 of 2 cases" in pages.kernels_sentence(measured())


class TestSeveralCalls:
    """Results of several calls, concatenated in one file."""

    HEAD = "8x4x16 frozen"

    def test_the_last_line_of_a_case_counts_and_ratios_are_of_one_call(self):
        lines = [
            case("facts", "device", name="Card"),
            case("head", f"{self.HEAD}/ours", ms=5.0),
            case("head", f"{self.HEAD}/eager logits", ms=4.0, ratio=0.8),
        ]
        before = check.Check(lines)
        assert before.over_ours(self.HEAD, "eager logits") == 0.8
        again = [
            case("facts", "device", name="Card"),  # another folder also counts calls from 1
            case("head", f"{self.HEAD}/ours", ms=3.0),
        ]
        after = check.Check(lines + again)
        assert after.figure("head", f"{self.HEAD}/ours", "ms") == 3.0
        assert after.figure("head", f"{self.HEAD}/eager logits", "ms") == 4.0
        assert after.over_ours(self.HEAD, "eager logits") is None  # 4 ms are no longer 0.8 of ours
        assert not after.elsewhere

    def test_cases_of_another_device_are_ignored_and_counted(self):
        (former,) = RENAMED
        found = check.Check([
            case("facts", "device", name="Card A"),
            case("head", f"{self.HEAD}/ours", ms=5.0, busy_ms=4.0),
            case("head", f"{self.HEAD}/{former}", ms=2.0, busy_ms=2.0),
            {"part": "step", "call": 1, "seconds": 9.0, "done": True},
            case("facts", "device", 2, name="Card B"),
            case("head", f"{self.HEAD}/ours", 2, ms=3.0, busy_ms=2.0),
        ])  # fmt: skip
        assert found.card == "Card B"
        assert found.figure("head", f"{self.HEAD}/ours", "ms") == 3.0
        assert pages.gemms_over_ours(found, self.HEAD) is None  # no quotient of two devices
        assert "`step` (not run)" in found.missing
        assert "2 cases of Card A are ignored" in pages.blocks(found)["measured"]


def test_gemms_of_a_step_follow_from_its_parameters():
    """LLaMA-7B's linear layers, and PEFT's count of LoRA 128 on all of them."""
    flop = roofline.step_seconds(1) * roofline.REACHED
    assert flop == pytest.approx(4 * 6_476_005_376 + 6 * 319_815_680)


def test_attention_pairs_equal_those_of_the_mask():
    batch = attention.batch_of(attention.TOY)
    mask = forest_mask(batch, "sdpa", torch.float32)
    seen = int((mask if mask.dtype == torch.bool else mask == 0).sum())
    seconds = roofline.attention_seconds(batch.trees[0], 10)
    assert seconds * roofline.REACHED == pytest.approx(14 * seen * 10)
