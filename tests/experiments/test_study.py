"""The study: statistics against scipy, small runs, and sentences that depend on numbers."""

import json
import re
import shutil
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from benchmarks.tables import put
from experiments.digits_pretrain import _completion
from experiments.study import analysis, page, runs
from experiments.study.__main__ import main
from experiments.study.arms import (
    ARMS,
    ARMS_OF,
    COMPARISONS,
    HIGHEST,
    LEARNING_RATES,
    LOSS_COMPARISONS,
    LOSS_RUNS,
    LOSS_SECTIONS,
    LOSSES,
    LOWEST,
    PRIMARY,
    SECTIONS,
    Arm,
    Pairs,
)
from experiments.study.testbed import (
    TESTBEDS,
    TUNING_SEED,
    Testbed,
    make_base,
    source_records,
    test_scenes,
)
from realign.data.records import read_pairs
from realign.digits import ASSETS
from realign.digits.scenes import PLACES, WORDS, Scene, caption_of, digits_in
from realign.evaluate import answer
from realign.evaluate.paired import holm
from realign.modeling.loading import load_processor, load_trained
from realign_kernels import objectives

SMALL = Testbed(
    noise=0.2, follow=0.97, records=24, steps=3, batch_size=8, scenes=20, biased_scenes=10
)
TINY = replace(SMALL, records=16, steps=1, scenes=4, biased_scenes=2)
KINDS = ("retrieved", "random", "crop", "noise", "blank")
Testbed.__test__ = test_scenes.__test__ = False  # pytest would collect them by their names


def result(arm, seed, rate, learning_rate=1e-4, **metrics):
    metrics = {"hallucination_rate": rate, "exact_captions": 0.5, "f1": 0.5} | metrics
    settings = {"pairs_used": 1000 + seed} if arm != "base" else {}
    return {
        "arm": arm, "seed": seed, "learning_rate": learning_rate, "settings": settings,
        "metrics": metrics,
    }  # fmt: skip


def both(dpo, rdpo):
    """Results of two arms and a base, with one seed for each value."""
    arms = {"dpo": dpo, "rdpo": rdpo, "base": [0.25] * len(dpo)}
    return [result(a, s, v) for a, found in arms.items() for s, v in enumerate(found)]


def test_mean_and_difference_are_student_s():
    dpo, rdpo = [0.30, 0.34, 0.33, 0.41, 0.36], [0.25, 0.31, 0.24, 0.30, 0.33]
    (found,) = analysis.differences(both(dpo, rdpo), [("dpo", "rdpo")], "hallucination_rate")
    paired = stats.ttest_rel(rdpo, dpo)
    interval = paired.confidence_interval(0.95)
    assert found.mean.value == pytest.approx(np.mean(rdpo) - np.mean(dpo))
    assert (found.mean.low, found.mean.high) == pytest.approx((interval.low, interval.high))
    assert found.p == pytest.approx(paired.pvalue)
    assert found.adjusted == found.p  # one comparison
    assert found.seeds == 5


def test_holm_by_hand():
    # The running maximum of (0.01, 0.02, 0.03, 0.04) * (4, 3, 2, 1).
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    adjusted = holm([float("nan"), 0.01])  # a comparison of one seed is not counted
    assert np.isnan(adjusted[0]) and adjusted[1] == pytest.approx(0.01)


def test_one_seed_has_no_interval_and_tuning_is_no_seed():
    found = [*both([0.3], [0.2]), result("rdpo", TUNING_SEED, 0.9)]
    assert analysis.values(found, "rdpo", "hallucination_rate") == {0: 0.2}
    (one,) = analysis.differences(found, [("dpo", "rdpo")], "hallucination_rate")
    assert one.mean.value == pytest.approx(-0.1)
    assert np.isnan([one.mean.low, one.mean.high, one.p, one.adjusted]).all()
    with pytest.raises(ValueError, match="Run the study first"):
        analysis.mean([])


@pytest.mark.parametrize(
    "rdpo, words",
    [
        ([0.20, 0.22, 0.21], " fewer digits after rDPO than after DPO: 21.0 against 30.0 %"),
        ([0.40, 0.41, 0.42], " more digits after rDPO than after DPO: 41.0 against 30.0 %"),
        (
            [0.20, 0.40, 0.30],
            "neither clearly fewer nor clearly more digits after rDPO than after DPO: 30.0",
        ),
        ([0.20, 0.40, 0.20], "It is below 0 for 2 of 3 seeds. The base misnames 25.0 %."),
        ([0.20], "neither clearly"),  # one seed has no interval
    ],
)
def test_the_finding_follows_the_numbers(rdpo, words):
    assert words in page.finding("digits", both([0.30] * len(rdpo), rdpo))


def test_a_best_rate_at_an_end_adds_rates():
    low, high = min(LEARNING_RATES), max(LEARNING_RATES)
    tried = {rate: 0.3 for rate in LEARNING_RATES}
    assert runs.best_rate(tried) == low  # the lower one of equal rates
    assert runs.next_rate(tried | {1e-4: 0.2}) is None
    assert runs.next_rate(tried | {high: 0.2}) == 2 * high
    assert runs.next_rate(tried | {low: 0.2}) == low / 2
    assert runs.next_rate(tried | {low: 0.2, low / 2: 0.25}) is None
    assert runs.next_rate(tried | {LOWEST: 0.1}) is runs.next_rate(tried | {HIGHEST: 0.1}) is None


def test_every_arm_is_in_a_table_and_comparisons_name_arms():
    names = {arm.name for arm in ARMS}
    assert len(names) == len(ARMS)
    assert names | {"base"} == {name for group in SECTIONS.values() for name in group}
    compared = {name for pair in (PRIMARY, *COMPARISONS) for name in pair}
    assert compared <= {arm.name for arm in ARMS if arm.tuned} | {"base"}
    assert all(arm.tuned_as in names | {""} for arm in ARMS)
    losses = {arm.name for arm in LOSSES}
    assert len(losses) == len(LOSSES)
    assert losses | {"base"} == {name for group in LOSS_SECTIONS.values() for name in group}
    assert {name for pair in LOSS_COMPARISONS for name in pair} == losses
    assert {name.removesuffix("-losses") for name in ARMS_OF} == TESTBEDS.keys()
    for arms in ARMS_OF.values():  # each arm's learning rate is tuned on its testbed
        assert {arm.tuned_as or arm.name for arm in arms} <= {arm.name for arm in arms}


def test_a_completion_hides_one_place_and_names_its_digit():
    other, seen = (Scene(Image.new("RGB", (16, 16)), d) for d in ((7, 7, 2, 7), (1, 3, 4, 9)))
    rng, places = np.random.default_rng(0), set()
    for _ in range(40):
        asked, completed = _completion(other, seen, rng)
        masked = re.search(r"<answer>\n(.*)\n</answer>", asked)[1]
        place = digits_in(masked).index(None)
        digits = [*other.digits]
        hidden = f"{PLACES[place]} {WORDS[digits[place]]}"
        assert masked == caption_of(other.digits).replace(hidden, f"{PLACES[place]} [MASK]")
        digits[place] = seen.digits[place]
        assert completed == caption_of(tuple(digits))
        places.add(place)
    assert places == {0, 1, 2, 3}


@pytest.fixture
def one_thread():
    """One thread, as in the processes of the study, because more threads change the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A study with the shipped base and pairs for the tuning seed."""
    folder = tmp_path_factory.mktemp("study")
    home = folder / f"seed{TUNING_SEED}"
    shutil.copytree(ASSETS, home / "base")
    runs.prepare(folder, SMALL, TUNING_SEED, [Pairs(kind) for kind in KINDS])
    return folder


def test_the_arms_of_losses_train_these_objectives(folder, monkeypatch):
    wanted = {
        "dpo": objectives.dpo(0.1),
        "rdpo": objectives.rdpo(0.1, 1.0),
        "mpo": objectives.mpo(0.1, 0.8, 0.2, 1.0),
        "simpo": objectives.simpo(2.0, 1.0),
        "rdpo mpo": objectives.with_visual(objectives.mpo(0.1, 0.8, 0.2, 1.0), 1.0),
        "rdpo simpo": objectives.with_visual(objectives.simpo(2.0, 1.0), 1.0),
    }
    trained, written = {}, {}

    def train(config):
        trained[arm.name] = config.loss.build()
        (folder / "runs" / f"seed{TUNING_SEED}-{arm.name.replace(' ', '-')}-1").mkdir(parents=True)

    monkeypatch.setattr("realign.train.train", train)
    monkeypatch.setattr(runs, "read_jsonl", lambda file: [{}])
    monkeypatch.setattr(runs, "_judge", lambda *_: {"metrics": {}})
    monkeypatch.setattr(runs, "_write_result", lambda file, **about: written.update({arm: about}))
    for arm in LOSSES:
        runs.run_arm(folder, SMALL, arm, TUNING_SEED, 1.0)
    assert trained == wanted
    settings = {arm.name: about["settings"] for arm, about in written.items()}
    assert {name: (s["beta"], s.get("gamma"), s["link"]) for name, s in settings.items()} == {
        "dpo": (0.1, None, None),
        "rdpo": (0.1, None, None),
        "mpo": (0.1, None, None),
        "simpo": (2.0, 1.0, None),
        "rdpo mpo": (0.1, None, "mpo"),
        "rdpo simpo": (2.0, 1.0, "simpo"),
    }


def test_the_base_of_the_demo_is_the_shipped_model(tmp_path):
    make_base(tmp_path / "base", TESTBEDS["demo"], 3)
    copied = {file.name: file.read_bytes() for file in (tmp_path / "base").iterdir()}
    shipped = {file.name: file.read_bytes() for file in ASSETS.iterdir()}
    assert copied == shipped and [*tmp_path.iterdir()] == [tmp_path / "base"]


def test_pairs_of_each_kind_have_responses_for_symmpo(folder):
    sources = {record.name: record for record in source_records(SMALL, TUNING_SEED)}
    kinds = {}
    for kind in KINDS:
        records = read_pairs(runs.pairs_file(folder, TUNING_SEED, Pairs(kind)))
        assert len(records) > 12
        kinds[kind] = records
        for record in records:
            assert record.rejected != record.chosen == sources[record.name].chosen
            neighbour = sources[record.provenance["neighbour"]]
            assert record.retrieved_chosen == neighbour.chosen
            if kind == "retrieved":
                shown = record.retrieved_images[0].open("")
                assert shown.tobytes() == neighbour.images[0].open("").tobytes()
    texts = {kind: [(r.name, r.rejected) for r in found] for kind, found in kinds.items()}
    assert all(found == texts["retrieved"] for found in texts.values())  # only images differ


def test_a_run_is_kept_whole_and_repeats(folder, one_thread):
    arm = Arm("symmpo", "symmpo")
    for rate in (1e-4, 3e-3):
        runs.run_arm(folder, SMALL, arm, TUNING_SEED, rate)
    runs.run_base(folder, SMALL, TUNING_SEED)
    files = sorted((folder / "results").glob("*.json"))
    before = [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    runs.run_arm(folder, SMALL, arm, TUNING_SEED, 1e-4)  # its result exists
    assert [(file.read_bytes(), file.stat().st_mtime_ns) for file in files] == before
    files[-1].unlink()
    runs.run_arm(folder, SMALL, arm, TUNING_SEED, 3e-3)
    runs.run_arm(folder, SMALL, arm, TUNING_SEED, 1e-4)
    assert [file.read_bytes() for file in files] == [content for content, _ in before]

    base, slow, fast = runs.results(folder)
    assert [r["arm"] for r in (base, slow, fast)] == ["base", "symmpo", "symmpo"]
    assert slow["metrics"]["rewards/margins"] != fast["metrics"]["rewards/margins"]
    tried = {r["learning_rate"]: r["metrics"]["hallucination_rate"] for r in (slow, fast)}
    assert runs.tuning_of([base, slow, fast]) == {"symmpo": tried}
    with pytest.raises(ValueError, match="symmpo-0.0001.json is of an arm with different settings"):
        runs.run_arm(folder, SMALL, replace(arm, beta=0.2), TUNING_SEED, 1e-4)

    scenes, seed = test_scenes(SMALL, TUNING_SEED)
    found = answer(load_trained(ASSETS), load_processor(ASSETS), scenes, seed)
    named = ["".join("?" if d is None else str(d) for d in digits_in(c)) for c in found.captions]
    assert base["named"].split() == named
    truth = "".join(str(digit) for scene in scenes for digit in scene.digits)
    wrong = [a != b for a, b in zip("".join(named), truth, strict=True)]
    assert base["metrics"]["hallucination_rate"] == pytest.approx(np.mean(wrong))
    assert found.rates()["hallucination_rate"].value == pytest.approx(np.mean(wrong))
    prior, seed = test_scenes(SMALL, TUNING_SEED, biased=True)
    found_prior = answer(load_trained(ASSETS), load_processor(ASSETS), prior, seed)
    wrong_prior = np.mean(found_prior.named != found_prior.digits)
    assert base["metrics"]["hallucination_rate_biased"] == pytest.approx(wrong_prior)
    lines = list(found.lines(scenes))
    assert sum(line["misnamed"] for line in lines) == sum(wrong)
    assert lines[3]["truth"] == scenes[3].caption
    json.dumps(lines)


class InProcess:
    """A pool that runs submitted jobs in this process, so that no process imports torch."""

    def submit(self, call, job):
        done = Future()
        done.set_result(call(job))
        return done


def test_a_whole_study_tunes_and_takes_the_best_rate(folder, monkeypatch, one_thread):
    monkeypatch.setattr(runs, "_pool", lambda jobs: nullcontext(InProcess()))
    whole = folder.parent / f"{folder.name}-whole"
    for seed in (TUNING_SEED, 0):
        shutil.copytree(ASSETS, whole / f"seed{seed}" / "base")
    monkeypatch.setattr(runs, "LEARNING_RATES", (3e-3,))
    monkeypatch.setattr(runs, "LOWEST", 1.5e-3)
    monkeypatch.setattr(runs, "HIGHEST", 3e-3)
    arms = (Arm("dpo", "dpo"), Arm("dpo beta 0.5", "dpo", beta=0.5, tuned_as="dpo"))
    found = runs.run_all(whole, TINY, arms, seeds=1, jobs=2)
    tried = runs.tuning_of(found)
    assert tried.keys() == {"dpo"} and 3e-3 in tried["dpo"]
    assert runs.next_rate(tried["dpo"]) is None  # the best rate is inside or at a limit
    used_rates = {(r["seed"], r["arm"]): r["learning_rate"] for r in found if r["seed"] == 0}
    rate = runs.best_rate(tried["dpo"])
    assert used_rates == {(0, "base"): None, (0, "dpo"): rate, (0, "dpo beta 0.5"): rate}
    stray = json.loads((whole / "results" / f"seed0-dpo-{rate:g}.json").read_text())
    stray |= {"learning_rate": 9.0}  # left by an earlier tuning
    (whole / "results" / "seed0-dpo-9.json").write_text(json.dumps(stray))
    assert runs.run_all(whole, TINY, arms, seeds=1, jobs=1) == found
    simpo = Arm("simpo", "simpo", beta=None)
    added = runs.run_all(whole, TINY, (simpo,), seeds=1, jobs=1, known={"simpo": 1e-3})
    assert [(r["seed"], r["arm"], r["learning_rate"]) for r in added] == [
        (0, "base", None),
        (0, "simpo", 1e-3),
        (TUNING_SEED, "base", None),
    ]
    assert added[0] == found[0]  # the same base


def test_a_comparison_of_losses_has_the_rates_and_the_folder_of_its_testbed(tmp_path, monkeypatch):
    tuned = [
        result("rdpo", TUNING_SEED, v, learning_rate=lr) for lr, v in ((1e-4, 0.3), (2e-4, 0.2))
    ]
    docs = tmp_path / "docs"
    runs.save_archive(
        docs / "study" / "digits.jsonl", TESTBEDS["digits"], both([0.3], [0.2]) + tuned
    )
    before = page.blocks(*runs.read_archive(docs / "study"))
    names = ("findings", "digits", "losses", *LOSS_RUNS)
    lines = "".join(f"<!-- {name}: generated -->\n<!-- /{name} -->\n" for name in names)
    (docs / "study.md").write_text(lines)
    asked = []

    def run_all(folder, bed, arms, seeds, jobs, known):
        asked.append((folder, bed, arms, known))
        return both([0.3, 0.4], [0.2, 0.1])

    monkeypatch.setattr(runs, "run_all", run_all)
    output = ["--output", str(tmp_path / "out"), "--docs", str(docs)]
    assert main(["--testbed", "digits-losses", *output]) == 0
    assert asked == [(tmp_path / "out" / "digits", TESTBEDS["digits"], LOSSES, {"rdpo": 2e-4})]
    text = (docs / "study.md").read_text()
    assert all(block in text for block in before.values())  # the other run counts as before
    assert "This run has no results for: mpo, simpo, rdpo mpo, rdpo simpo." in text
    assert text.count("This run has not been made.") == 2
    asked.clear()
    (docs / "study" / "digits.jsonl").unlink()
    assert main(["--testbed", "digits-losses", *output]) == 0
    assert asked[0][-1] == {}  # all arms are tuned


def losses(**rates):
    """Results of arms of losses, with one seed for each value."""
    return [
        result(name.replace("_", " "), seed, rate, **{"rewards/margins": 1.25})
        for name, found in rates.items()
        for seed, rate in enumerate(found)
    ]


def test_findings_of_losses_are_clear_after_correction_only():
    rdpo, dpo = [0.20, 0.22, 0.21, 0.23, 0.19], [0.40, 0.41, 0.42, 0.40, 0.41]
    mpo = [0.30, 0.31, 0.33, 0.32, 0.30]
    fewer, unclear = [0.18, 0.20, 0.19, 0.20, 0.17], [0.19, 0.20, 0.20, 0.23, 0.17]
    beds = {"digits-losses": TESTBEDS["digits"]}
    found = losses(dpo=dpo, rdpo=rdpo, mpo=mpo, simpo=fewer)
    sentences = page.loss_findings({"digits-losses": found}, beds)
    assert len(sentences) == 4  # the two links have no results
    assert "more digits after MPO than after rDPO: 31.2 against 21.0 %" in sentences[0]
    assert "fewer digits after SimPO than after rDPO: 18.8 against 21.0 %" in sentences[1]
    assert "fewer digits after SimPO than after DPO: 18.8 against 40.8 %" in sentences[3]
    assert 0.025 < stats.ttest_rel(unclear, rdpo).pvalue < 0.05
    found = losses(rdpo=rdpo, mpo=unclear, simpo=unclear)  # two equal p-values are doubled
    words = "neither clearly fewer nor clearly more digits after"
    sentences = page.loss_findings({"digits-losses": found}, beds)
    assert [words in sentence for sentence in sentences] == [True, True]
    one = losses(rdpo=[0.2], mpo=[0.3])
    assert words in page.loss_findings({"digits-losses": one}, beds)[0]


def test_a_table_of_losses_has_margins_of_log_ratios_only():
    rates = dict.fromkeys(("dpo", "rdpo", "mpo", "simpo", "rdpo_mpo", "rdpo_simpo"), [0.2, 0.3])
    found = losses(base=[0.4, 0.5], **rates)
    block = page.run_block("photographs-losses", found, "photographs")
    tables = block.split("### Paired tests")[0]
    rows = {row.split(" | ")[0][2:]: row.split(" | ") for row in tables.splitlines() if "|" in row}
    margin = rows[""].index("margin, text")
    assert rows["mpo"][margin] == rows["rdpo mpo"][margin] == "1.25 [1.25, 1.25]"
    assert rows["simpo"][margin] == rows["rdpo simpo"][margin] == ""
    assert "no results" not in block
    assert "The visual term over other losses" in block
    part = page.run_block("photographs-losses", losses(base=[0.4], dpo=[0.3]), "photographs")
    assert "This run has no results for: rdpo, mpo, simpo, rdpo mpo, rdpo simpo." in part


def test_runs_of_losses_do_not_count_among_the_findings():
    found = {"digits": both([0.30, 0.32], [0.20, 0.24])}
    beds = {"digits": TESTBEDS["digits"]}
    before = page.findings(found, beds), page.summary(found, beds)
    found |= {name: both([0.1, 0.1], [0.5, 0.5]) for name in LOSS_RUNS}
    beds |= {name: TESTBEDS[name.removesuffix("-losses")] for name in LOSS_RUNS}
    assert (page.findings(found, beds), page.summary(found, beds)) == before


def test_errors_of_another_testbed_and_of_jobs(folder, tmp_path, capsys):
    runs._claim(tmp_path, SMALL)
    assert main(["--seeds", "101"]) == 1
    assert "seeds is 101. It must be from 1 to 100" in capsys.readouterr().err
    with pytest.raises(ValueError, match="another testbed"):
        runs._claim(tmp_path, Testbed())
    with (
        runs._pool(1) as pool,
        pytest.raises(ValueError, match=r"arms: run_base .*same command again"),
    ):
        runs._run(pool, "arms", [(runs.run_base, (tmp_path, SMALL, 3))])
    assert main(["--report", "--docs", str(tmp_path)]) == 1
    assert "omit --report" in capsys.readouterr().err


def test_blocks_and_plots_come_from_the_kept_runs(tmp_path, capsys):
    found = both([0.30, 0.32], [0.20, 0.24]) + [
        result("rdpo", TUNING_SEED, rate, learning_rate=lr)
        for lr, rate in ((5e-5, 0.28), (1e-4, 0.26))
    ]
    found += [
        result(name, 0, 0.4) for name in SECTIONS["Methods"] if name not in ("base", "dpo", "rdpo")
    ]
    run = {r["arm"] for r in found}
    every = found + [result(arm.name, 0, 0.5) for arm in ARMS if arm.name not in run]
    for name, results in (("digits", every), ("photographs", found)):
        runs.save_archive(tmp_path / "study" / f"{name}.jsonl", TESTBEDS[name], results)
    names = ("findings", "digits", "photographs")
    lines = "".join(f"<!-- {name}: generated -->\n<!-- /{name} -->\n" for name in names)
    (tmp_path / "study.md").write_text(lines)
    assert main(["--report", "--docs", str(tmp_path)]) == 0
    text, printed = (tmp_path / "study.md").read_text(), capsys.readouterr().out
    digits, photographs = text.split("<!-- photographs: generated -->")
    for name, results in (("digits", every), ("photographs", found)):
        sentence = page.finding(name, results)
        assert sentence in digits and sentence in printed
        assert (tmp_path / "study" / f"{name}.png").stat().st_size > 5000
    assert re.search(r"\| dpo \| 31\.0 \[18\.3, 43\.7\] \|.*\| 1000 \|", digits)  # 12.706 * 0.01
    assert re.search(r"\| base \| 25\.0 \[25\.0, 25\.0\] \|", digits)
    assert re.search(r"\| dpo \| rdpo \| -9\.0 \[.*\| 0\.\d+ \|  \|", digits)  # not corrected
    assert "| rdpo | 28.0 | **26.0** |" in digits
    assert "### Methods" in photographs and "### Beta" in digits
    assert "### Beta" not in photographs  # has no results
    assert "### Infill" not in photographs  # dpo and rdpo are above
    assert (tmp_path / "study" / "digits-curves.png").stat().st_size > 5000
    assert not (tmp_path / "study" / "photographs-curves.png").exists()


def test_two_runs_of_the_same_seeds_count_each_seed_once():
    runs_ = [both([0.30, 0.32], [0.20, 0.24]), both([0.40, 0.40], [0.20, 0.30])]
    gap = analysis.together(runs_, PRIMARY, "hallucination_rate")
    # (-0.10 - 0.20) / 2 and (-0.08 - 0.10) / 2 are -0.15 and -0.09; t of one degree is 12.706.
    assert (gap.value, gap.low) == pytest.approx((-0.12, -0.12 - 12.7062 * 0.03), abs=1e-5)
    found = {"digits": runs_[0], "digits-again": runs_[1]}
    beds = dict.fromkeys(found, TESTBEDS["digits"])
    first, *each = page.findings(found, beds)["digits"]
    assert "23.5 against 35.5 %. The difference is -12.0 [-50.1, +26.1] points, averaged" in first
    assert len(each) == 2 and page.finding("digits", runs_[0])[1:] in each[0]
    assert each[1].startswith("In the run `digits-again`, the model misnames")
    short = " ".join(page.summary(found, beds).split())
    assert "35.5 % (-12.0 [-50.1, +26.1] points, 2 runs of the same 2 seeds)." in short
    blocks = page.blocks(found, beds)
    assert blocks.keys() == {"findings", "digits", "digits-again"}


def test_the_summary_names_runs_with_clearly_better_retrieved_negatives():
    def random(rates):
        return [result("rdpo random", seed, rate) for seed, rate in enumerate(rates)]

    found = {"digits": both([0.3, 0.3], [0.2, 0.2]) + random([0.2, 0.3])}
    beds = {"digits": TESTBEDS["digits"], "photographs": TESTBEDS["photographs"]}
    one = page.summary(found, {"digits": beds["digits"]})
    assert "not clearly better than random ones in any run." in " ".join(one.split())
    found["photographs"] = both([0.3, 0.3], [0.2, 0.2]) + random([0.3, 0.31])
    two = " ".join(page.summary(found, beds).split())
    assert two.endswith("Retrieved negatives are clearly better than random ones in `photographs`.")


def test_page_and_readme_have_the_figures_of_the_kept_runs(tmp_path):
    root = Path(__file__).parents[2]
    found, beds = runs.read_archive(root / "docs" / "study")
    blocks = page.blocks(found, beds), {"study": page.summary(found, beds)}
    for file, new in zip(("docs/study.md", "README.md"), blocks, strict=True):
        copy = tmp_path / Path(file).name
        copy.write_text((root / file).read_text())
        put(copy, new)
        assert copy.read_text() == (root / file).read_text()
    text = (root / "docs" / "study.md").read_text()
    written = re.sub(r"(?s)<!-- (\S+): generated -->.*?<!-- /\1 -->", "", text)
    quoted = re.findall(r"(\d+\.\d) % \[(\d+\.\d), (\d+\.\d)\]", " ".join(written.split()))
    assert len(quoted) >= 4 and all(f"| {v} [{a}, {b}] |" in text for v, a, b in quoted)
