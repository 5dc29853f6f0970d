"""The harness of the benchmarks: turns, ratios, the gate, targets, and pages that are true."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import compare, race, readme, report, results, roofline, targets
from benchmarks.gpu.check import load
from benchmarks.results import Entry, Run

ROOT = Path(__file__).parents[2]
MACHINE = {
    "cpu": "a CPU", "gpu": None, "cores": 2, "threads": 2, "capability": "AVX512", "python": "3.11",
    "versions": {
        "torch": "2.13.0", "liger-kernel": "0.8.5", "trl": None, "cut-cross-entropy": "25.1.1",
    },
}  # fmt: skip
NAMES = {"GEMMs alone": 0.8, "eager logits": 2.0, "CCE": 0.9, "TRL chunked log-prob": 5.0}
"""theirs / ours of a made-up head."""


def run(name="default", noise=0.02, seed=0, ours=1.0, machine=1.0, groups=6, **extra):
    """A run of `groups` heads: ours takes `ours` s, and all takes `machine` times as long."""
    rng, entries = np.random.default_rng(seed), []
    for g in range(groups):
        group = f"head, frozen, bf16, shape {g}"
        case = {"dtype": "bf16", "head": "frozen", "V": 1000 * (g + 1), "N": 10, "rows": "equal"}
        mine = machine * ours * rng.lognormal(0, noise, 9)
        entries.append(
            Entry("head", group, case, "ours", "ours", tuple(mine), None,
                  {"loss": 1e-6, "gradient": 1e-3}, dict(extra))
        )  # fmt: skip
        for who, factor in NAMES.items():
            theirs = machine * factor * rng.lognormal(0, noise, 9)
            beside = machine * ours * rng.lognormal(0, noise, 9)
            ratio = tuple(np.quantile(theirs / beside, (0.25, 0.5, 0.75)))
            role = "limit" if who == "GEMMs alone" else "peer"
            error = {} if role == "limit" else {"loss": 1e-5, "gradient": 2e-3}
            entries.append(Entry("head", group, case, who, role, tuple(theirs), ratio, error))
    return Run(name, MACHINE, "0123456789ab", "2026-01-01 00:00:00", tuple(entries), ())


class TestRace:
    def test_contestants_take_turns_and_each_goes_first_as_often(self):
        calls = []
        theirs, ours = race.turns(
            lambda: calls.append("t"), lambda: calls.append("o"), budget=0.0, least=4
        )
        assert "".join(calls[2:]) == "ottoott" + "o"
        assert len(theirs) == len(ours) == 4

    def test_a_call_that_returns_seconds_has_timed_itself(self):
        theirs, ours = race.turns(lambda: 2.0, lambda: 0.5, budget=0.0)
        assert theirs == [2.0] * race.LEAST and ours == [0.5] * race.LEAST

    def test_replay_gives_pytest_benchmark_the_durations(self):
        replay = race.Replay()
        replay.load([0.25, 4.0])
        assert [-(replay() - replay()) for _ in range(2)] == [0.25, 4.0]


def test_time_over_the_limit_is_the_quotient_of_the_two_ratios():
    group = next(iter(run(noise=0.0).groups("head").values()))
    limits = results.over_limit(group)
    assert {name: three[1] for name, three in limits.items()} == pytest.approx(
        {"ours": 1.25, "eager logits": 2.5, "CCE": 1.125, "TRL chunked log-prob": 6.25}
    )
    assert results.over_limit([e for e in group if e.role != "limit"]) == {}


class TestCompare:
    def flagged(self, old, new, threshold=0.1):
        return [c for c in compare.changes(old, new, threshold) if c.flagged]

    @pytest.mark.parametrize("noise", [0.0, 0.03, 0.06])
    def test_a_rerun_is_silent_and_a_slow_down_of_20_percent_is_flagged(self, noise):
        old = run(noise=noise)
        for seed in range(1, 20):
            assert self.flagged(old, run(noise=noise, seed=seed, machine=1.7)) == []
        found = self.flagged(old, run(noise=noise, seed=99, ours=1.2))
        assert len(found) == 6 if noise < 0.05 else len(found) >= 4  # one would do
        assert np.mean([c.factor for c in found]) == pytest.approx(1.2, rel=0.03)

    def test_a_peer_that_changes_moves_the_group_little(self):
        old = run()
        entries = tuple(
            replace(e, ratio=tuple(0.8 * part for part in e.ratio)) if e.contestant == "CCE" else e
            for e in old.entries
        )
        assert self.flagged(old, replace(old, entries=entries)) == []

    def test_groups_of_ours_alone_go_by_time_less_the_drift(self):
        def alone(run, seconds):
            own = Entry("cache", "pack", {}, "ours", "ours", (seconds,) * 5)
            return replace(run, entries=(*run.entries, own))

        old, new = alone(run(), 1.0), run(seed=1, machine=2.0)
        assert self.flagged(old, alone(new, 3.0)) == []
        (found,) = self.flagged(old, alone(new, 4.8))
        assert found.what.startswith("time")
        assert found.factor == pytest.approx(2.4, rel=0.05)

    def test_one_ratio_alone_needs_three_times_the_threshold(self):
        def only(run, name):
            return replace(run, entries=tuple(e for e in run.entries if e.contestant in name))

        names = ("ours", "eager logits")
        old = only(run(), names)
        assert self.flagged(old, only(run(seed=1, ours=1.2), names)) == []
        assert len(self.flagged(old, only(run(seed=1, ours=1.5), names))) == 6

    def test_contestants_that_run_our_code_do_not_count(self):
        """A slow-down of what they share leaves their ratios as they were."""
        old, new = run(noise=0.0), run(noise=0.0, ours=1.2)

        def with_shared(run):
            more = [
                replace(e, contestant="ours, torch backend", ratio=(1.1, 1.1, 1.1))
                for e in run.entries
                if e.contestant == "eager logits"
            ]
            return replace(run, entries=(*run.entries, *more))

        found = self.flagged(with_shared(old), with_shared(new))
        assert [c.factor for c in found] == pytest.approx([1.2] * 6)

    def test_another_case_is_not_compared_and_what_is_gone_is_told(self):
        old = run()
        others = tuple(replace(e, case=e.case | {"N": 20}) for e in old.entries)
        assert compare.pairs(old, replace(old, entries=others)) == []
        fewer = tuple(e for e in old.entries if not e.group.endswith("5"))
        (found,) = self.flagged(old, replace(old, entries=fewer))
        assert found.what == "gone" and found.group.endswith("5")

    def test_memory_and_errors_are_gated_too(self):
        small = run(bytes=100_000), run(bytes=900_000)
        assert self.flagged(*small) == []  # less than a MiB more
        old, new = run(bytes=10 * 2**20), run(bytes=12 * 2**20)
        assert {c.what for c in self.flagged(old, new)} == {"peak memory"}
        worse = tuple(replace(e, error={n: 3 * v for n, v in e.error.items()}) for e in old.entries)
        found = self.flagged(old, replace(old, entries=worse))
        assert {c.what for c in found} == {"error of loss", "error of gradient"}

    def test_the_standard_error_is_that_of_a_median(self):
        rng = np.random.default_rng(0)
        medians, errors = [], []
        for _ in range(400):
            logs = rng.normal(0, 0.1, 15)
            three = tuple(np.exp(np.quantile(logs, (0.25, 0.5, 0.75))))
            entry = Entry("head", "g", {}, "x", "peer", (1.0,) * 15, three)
            middle, error = compare.log_ratio(entry)
            medians.append(middle)
            errors.append(error)
        assert np.mean(errors) == pytest.approx(np.std(medians), rel=0.15)

    def test_exit_codes(self, tmp_path, capsys):
        files = [tmp_path / f"{name}.json" for name in ("old", "same", "slow", "other")]
        runs = [run(), run(seed=1), run(seed=2, ours=1.2), run(groups=0)]
        for file, one in zip(files, runs, strict=True):
            file.write_text(json.dumps(as_json(one)))
        old, same, slow, other = map(str, files)
        assert compare.main([old, same]) == 0
        assert compare.main([old, slow]) == 1
        out = capsys.readouterr().out
        assert "SLOWER" in out and "6 of" in out
        assert compare.main([old, other]) == 2
        assert compare.main([old, str(tmp_path / "none.json")]) == 2
        (tmp_path / "x.json").write_text("[]")
        assert compare.main([old, str(tmp_path / "x.json")]) == 2
        assert compare.main([old, same, "--threshold", "0"]) == 2
        errors = capsys.readouterr().err
        assert errors.count("error:") == 4 and "make bench" in errors


def as_json(run):
    """A run as `conftest.py` writes it, as far as it is read again."""
    benches = [
        {
            "group": e.group,
            "stats": {"data": list(e.seconds)},
            "extra_info": {
                "suite": e.suite, "case": e.case, "contestant": e.contestant, "role": e.role,
                "error": e.error, **({"ratio": e.ratio} if e.ratio else {}), **e.extra,
            },
        }
        for e in run.entries
    ]  # fmt: skip
    return {
        "machine_info": run.machine,
        "commit_info": {"id": run.commit, "dirty": False},
        "datetime": "2026-01-01T00:00:00.5",
        "benchmarks": benches,
        "skipped": list(run.skipped),
    }


def test_results_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "default.json"
    path.write_text(json.dumps(as_json(run(bytes=5))))
    assert results.read(path) == run(bytes=5)


def test_csv_has_ligers_columns(tmp_path):
    one = run(noise=0.0, groups=1, bytes=3 * 2**20)
    results.write_csv(one, tmp_path / "x.csv")
    with (tmp_path / "x.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit",
        "x_name", "x_label", "x_value", "y_value_50", "y_value_20", "y_value_80",
        "extra_benchmark_config_str", "gpu_name", "timestamp", "liger_version",
    ]  # fmt: skip
    speeds = {r["kernel_provider"]: r["y_value_50"] for r in rows if r["metric_name"] == "speed"}
    assert speeds["eager logits"] == "2000" and speeds["ours"] == "1000"
    (memory,) = [r for r in rows if r["metric_name"] == "memory"]
    assert (memory["y_value_50"], memory["metric_unit"], memory["x_value"]) == ("3", "MB", "1000")
    assert json.loads(memory["extra_benchmark_config_str"])["N"] == 10
    assert memory["liger_version"] == "0.8.5"


class TestTargets:
    def target(self, measure, group="head, frozen, bf16, shape 0", **settings):
        return targets.Target("t", group, measure, "because", **settings)

    def test_measures(self):
        one = run(noise=0.0, bytes=100, rate=7.0)
        assert self.target("time over limit", at_most=1).value(one) == pytest.approx(1.25)
        over = self.target("time over", of="eager logits", at_most=1)
        assert over.value(one) == pytest.approx(0.5)
        assert self.target("rate", at_least=1).value(one) == 7.0
        assert self.target("seconds", at_most=1).value(one) == pytest.approx(1.0)
        grown = self.target("memory growth", base="head, frozen, bf16, shape 1", at_most=1)
        assert grown.value(one) == 1.0
        assert self.target("rate", group="none", at_least=1).value(one) is None
        assert self.target("time over", of="nobody", at_most=1).value(one) is None

    def test_verdicts(self):
        one, target = run(noise=0.0), self.target("time over limit", at_most=1.2)
        assert targets.verdict(target, [one]) == (pytest.approx(1.25), "missed")
        assert targets.verdict(replace(target, at_most=1.3), [one])[1] == "met"
        assert targets.verdict(target, [])[1] == "not measured"

    def test_what_makes_no_sense_is_refused(self):
        with pytest.raises(ValueError, match="at_most or at_least"):
            self.target("rate")
        with pytest.raises(ValueError, match="none of"):
            self.target("speed", at_most=1)
        with pytest.raises(ValueError, match="`of` goes with"):
            self.target("time over", at_most=1)

    def test_every_target_has_a_reason_and_a_name_of_its_own(self):
        found = targets.read()
        assert len({t.name for t in found}) == len(found) > 20
        assert all(len(t.reason) >= 10 for t in found)


class TestPages:
    def test_the_report_says_where_we_lose(self):
        text = report.page([run(noise=0.0)], None, draw=False)
        assert "Where we lose: CCE takes 0.90 of ours" in text
        assert "1.25 times in bf16" in text and "commit 0123456789ab" in text
        assert "`make bench-gpu` runs the suites" in text and "It was not run" in text
        assert "**ours** | 1 s | 9 | 1 | 1.25 [1.25, 1.25] | 1.0e-06 | 1.0e-03" in text

    def test_the_readme_gets_its_tables_or_an_error(self, tmp_path):
        one = run(noise=0.0, groups=1)
        group = f"head, frozen, bf16, {readme.QUARTER}"
        one = replace(one, entries=tuple(replace(e, group=group) for e in one.entries))
        page = tmp_path / "README.md"
        page.write_text("a\n<!-- head: generated -->\nold\n<!-- /head -->\nb\n")
        readme.refresh(page, [one])
        text = page.read_text()
        assert "old" not in text and "| **`rdpo_loss`** | **1.25** |" in text
        readme.refresh(page, [one])
        assert page.read_text() == text
        page.write_text("nothing")
        with pytest.raises(ValueError, match="no place for the table 'head'"):
            readme.refresh(page, [one])

    def test_runs_are_put_together(self):
        first, second = run(groups=1), run(groups=2, seed=1)
        found = results.groups_of([first, second], "head")
        assert found["head, frozen, bf16, shape 0"] == list(first.entries)
        assert found["head, frozen, bf16, shape 1"] == list(second.entries[5:])

    def test_pictures_are_drawn(self, tmp_path, monkeypatch):
        monkeypatch.setattr(report, "PICTURES", tmp_path)
        report.page([run()], None)
        assert {p.name for p in tmp_path.iterdir()} == {"head.png", "error.png"}

    def test_committed_pages_are_what_the_committed_results_give(self):
        """Nothing in them is typed by hand."""
        earlier = report.read_earlier(results.FOLDER)
        shown = {"draw": False, "earlier": earlier, "check": load()}
        text = report.page(*report.read_runs(results.FOLDER), **shown)
        assert report.PAGE.read_text() == text
        for name in ("head", "error", "memory", "step", "scaling"):
            assert (report.PICTURES / f"{name}.png").stat().st_size > 10_000

    def test_the_readmes_tables_are_those_of_the_committed_results(self, tmp_path):
        page = tmp_path / "README.md"
        page.write_text((ROOT / "README.md").read_text())
        readme.refresh(page, report.read_runs(results.FOLDER)[0])
        assert page.read_text() == (ROOT / "README.md").read_text()

    def test_the_calculation_for_gpus_is_the_scripts(self):
        assert roofline.FILE.read_text() == roofline.page(load())


class TestRoofline:
    def test_one_chunk_by_hand(self):
        N, H, V = 512, 4096, 32000
        product, all_zero = 2.0 * N * H * V, 0.0
        found = roofline.ours(N, H, V, trainable=False).found
        assert [f for f, _ in found] == [product, all_zero, product, all_zero, all_zero]
        logits, row, pull, last, after = (size for _, size in found)
        assert logits == 2 * (N * H + H * V) + 4 * N * V
        assert row == (4 + 2) * N * V and pull == 2 * (N * V + V * H) + 4 * N * H
        assert last == (4 + 2 + 4) * N * H and after == (4 + 4 + 2) * N * H
        (_, label), (_, e), *rest = roofline.ours(N, H, V, trainable=False, fused=True).found
        assert label == 4 * N * H and e == logits - 2 * N * V
        assert rest == found[2:]

    def test_a_trained_head_in_one_product_by_hand(self):
        N, H, V = 3072, 4096, 32000
        found = roofline.ours(N, H, V, trainable=True).found
        products = [size for flop, size in found if flop]
        weight = 2 * (V * N + N * H) + 2 * V * H
        assert len(products) == 3 and products[2] == weight  # to bf16, and no sum is rounded

    @pytest.mark.parametrize(("trainable", "count"), [(False, 2), (True, 3)])
    def test_flop_are_the_units_claimed(self, trainable, count):
        N, H, V = 6144, 2048, 151936
        flop = sum(flop for flop, _ in roofline.ours(N, H, V, trainable).found)
        assert flop == count * 2.0 * N * H * V

    def test_time_is_the_longer_of_the_two(self):
        kernels = roofline.Kernels([(roofline.PEAK, 0.0), (0.0, 2 * roofline.BANDWIDTH)])
        assert kernels.seconds(roofline.PEAK) == pytest.approx(3)
        assert kernels.seconds(roofline.PEAK / 2) == pytest.approx(4)

    def test_chunks_are_those_of_the_kernels(self):
        assert roofline.chunks(8190, 4096, 6183) == [4096, 4094]
        assert roofline.chunks(6 * 192, 4096, 1000, examples=True) == [960, 192]
