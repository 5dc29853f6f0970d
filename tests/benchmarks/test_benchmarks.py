"""Benchmark harness: turns, ratios, gate, targets, generated blocks, charts, roofline."""

import json
import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks import compare, plots, race, readme, report, results, roofline, targets
from benchmarks.results import LIMIT, Entry, Run
from benchmarks.tables import put

ROOT = Path(__file__).parents[2]
MACHINE = {
    "cpu": "a CPU", "gpu": None, "cores": 2, "threads": 2, "capability": "AVX512", "python": "3.11",
    "versions": {
        "torch": "2.13.0", "liger-kernel": "0.8.5", "trl": None, "cut-cross-entropy": "25.1.1",
    },
}  # fmt: skip
NAMES = {LIMIT: 0.8, "eager logits": 2.0, "CCE": 0.9, "TRL chunked log-prob": 5.0}
"""theirs / ours of an invented head."""


def run(name="default", noise=0.02, seed=0, ours=1.0, machine=1.0, groups=6, **extra):
    """A run of `groups` heads. Ours takes `ours` seconds; `machine` scales all times."""
    rng, entries = np.random.default_rng(seed), []
    for g in range(groups):
        group = f"head, frozen, bf16, shape {g}"
        case = {"dtype": "bf16", "head": "frozen", "V": 1000 * (g + 1), "N": 10, "rows": "equal"}
        mine = tuple(machine * ours * rng.lognormal(0, noise, 9))
        error = {"loss": 1e-6, "gradient": 1e-3}
        entries.append(Entry("head", group, case, "ours", "ours", mine, None, error, dict(extra)))
        for who, factor in NAMES.items():
            theirs = machine * factor * rng.lognormal(0, noise, 9)
            beside = machine * ours * rng.lognormal(0, noise, 9)
            ratio = tuple(np.quantile(theirs / beside, (0.25, 0.5, 0.75)))
            role = "limit" if who == LIMIT else "peer"
            error = {} if role == "limit" else {"loss": 1e-5, "gradient": 2e-3}
            entries.append(Entry("head", group, case, who, role, tuple(theirs), ratio, error))
    return Run(name, MACHINE, "0123456789ab", "2026-01-01 00:00:00", tuple(entries), ())


def step_run(peers):
    """A run of one step; `peers` maps a contestant to its time over ours and its bytes."""
    case = {"tune": "lora", "dtype": "bf16", "examples": 4}
    entries = [Entry("step", "step", case, "ours", "ours", (1.0,), extra={"bytes": 100})]
    for name, (ratio, size) in peers.items():
        sizes = {"bytes": size}
        entries.append(Entry("step", "step", case, name, "peer", (1.0,), (ratio,) * 3, {}, sizes))
    return Run("slow", MACHINE, "0123456789ab", "2026-01-01 00:00:00", tuple(entries), ())


def changed(one, change):
    """The run with `change(entry)` instead of each entry; None drops it."""
    return replace(one, entries=tuple(e for e in map(change, one.entries) if e is not None))


def test_contestants_alternate_and_go_first_equally_often():
    calls = []
    theirs, ours = race.turns(
        lambda: calls.append("t"), lambda: calls.append("o"), budget=0.0, least=4
    )
    assert "".join(calls[2:]) == "ottoott" + "o" and len(theirs) == len(ours) == 4
    theirs, ours = race.turns(lambda: 2.0, lambda: 0.5, budget=0.0)  # these time themselves
    assert theirs == [2.0] * race.LEAST and ours == [0.5] * race.LEAST
    replay = race.Replay()
    replay.load([0.25, 4.0])
    assert [-(replay() - replay()) for _ in range(2)] == [0.25, 4.0]


class TestCompare:
    def flagged(self, old, new):
        return [change for change in compare.changes(old, new) if change.flagged]

    def test_a_slowdown_of_20_percent_is_flagged_and_a_rerun_is_not(self):
        old = run()
        for seed in range(1, 20):
            assert self.flagged(old, run(seed=seed, machine=1.7)) == []
        found = self.flagged(old, run(seed=99, ours=1.2))
        assert len(found) == 6
        assert np.mean([c.factor for c in found]) == pytest.approx(1.2, rel=0.03)

    def test_contestants_of_our_code_and_one_changed_peer_do_not_count(self):
        old, new = run(noise=0.0), run(noise=0.0, ours=1.2)

        def shared(entry):
            if entry.contestant != "CCE":
                return entry
            return replace(entry, contestant="ours, torch backend", ratio=(1.1, 1.1, 1.1))

        found = self.flagged(changed(old, shared), changed(new, shared))
        assert [c.factor for c in found] == pytest.approx([1.2] * 6)
        faster = changed(
            old, lambda e: replace(e, ratio=(0.8,) * 3) if e.contestant == "CCE" else e
        )
        assert self.flagged(old, faster) == []

    def test_thresholds_of_one_ratio_and_of_times(self):
        def only(one):
            return changed(one, lambda e: e if e.contestant in ("ours", "eager logits") else None)

        assert self.flagged(only(run()), only(run(seed=1, ours=1.2))) == []
        assert len(self.flagged(only(run()), only(run(seed=1, ours=1.5)))) == 6

        def with_pack(one, seconds):
            own = Entry("cache", "pack", {}, "ours", "ours", (seconds,) * 5)
            return replace(one, entries=(*one.entries, own))

        old, new = with_pack(run(), 1.0), run(seed=1, machine=2.0)
        assert self.flagged(old, with_pack(new, 3.0)) == []
        (found,) = self.flagged(old, with_pack(new, 4.8))  # less the drift of 2
        assert found.measure.startswith("time")
        assert found.factor == pytest.approx(2.4, rel=0.05)

    def test_memory_errors_and_missing_benchmarks_are_flagged(self):
        assert self.flagged(run(bytes=100_000), run(bytes=900_000)) == []  # less than a MiB more
        old, new = run(bytes=10 * 2**20), run(bytes=12 * 2**20)
        assert {c.measure for c in self.flagged(old, new)} == {"peak memory"}
        worse = changed(old, lambda e: replace(e, error={n: 3 * v for n, v in e.error.items()}))
        measures = {c.measure for c in self.flagged(old, worse)}
        assert measures == {"error of loss", "error of gradient"}
        fewer = changed(old, lambda e: None if e.group.endswith("5") else e)
        (found,) = self.flagged(old, fewer)
        assert found.measure == "gone" and found.group.endswith("5")
        others = changed(old, lambda e: replace(e, case=e.case | {"N": 20}))
        assert compare.pairs(old, others) == []

    def test_exit_codes(self, tmp_path, capsys):
        runs = {"old": run(), "same": run(seed=1), "slow": run(seed=2, ours=1.2),
                "other": run(groups=0)}  # fmt: skip
        files = {name: str(tmp_path / f"{name}.json") for name in (*runs, "none")}
        for name, one in runs.items():
            Path(files[name]).write_text(json.dumps(as_json(one)))
        assert compare.main([files["old"], files["same"]]) == 0
        assert compare.main([files["old"], files["slow"]]) == 1
        assert "6 of 18 comparisons flagged" in capsys.readouterr().out
        assert compare.main([files["old"], files["other"]]) == 2
        assert compare.main([files["old"], files["none"]]) == 2
        errors = capsys.readouterr().err
        assert "no benchmark in common" in errors and "`make bench`" in errors


def as_json(one):
    """JSON of a run, as `conftest.py` writes it."""
    benches = []
    for e in one.entries:
        info = {"suite": e.suite, "case": e.case, "contestant": e.contestant, "role": e.role}
        info |= {"error": e.error, **({"ratio": e.ratio} if e.ratio else {}), **e.extra}
        benches.append({"group": e.group, "stats": {"data": e.seconds}, "extra_info": info})
    return {
        "machine_info": one.machine,
        "commit_info": {"id": one.commit, "dirty": False},
        "datetime": "2026-01-01T00:00:00.5",
        "benchmarks": benches,
        "skipped": [],
    }


def test_results_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "default.json"
    path.write_text(json.dumps(as_json(run(bytes=5))))
    assert results.read(path) == run(bytes=5)


def test_former_names_of_contestants_are_read(tmp_path):
    path = tmp_path / "default.json"
    former = {now: before for before, now in results.RENAMED.items()}
    old = changed(run(), lambda e: replace(e, contestant=former.get(e.contestant, e.contestant)))
    assert {e.contestant for e in old.entries} & set(results.RENAMED)
    path.write_text(json.dumps(as_json(old)))
    assert results.read(path) == run()


def test_targets_by_each_measure():
    one = run(noise=0.0, bytes=100, rate=7.0)

    def value(measure, group="head, frozen, bf16, shape 0", **settings):
        bounds = {"at_least": 1.9} if measure in ("time", "memory") else {"at_most": 1.2}
        target = targets.Target("t", group, measure, "because", **bounds, **settings)
        found = target.value([run(groups=0), one])
        return found, targets.verdict(target, found)

    assert value("time", of=LIMIT) == (pytest.approx(0.8), "missed")
    assert value("time", of="eager logits") == (pytest.approx(2.0), "met")
    stepped = step_run({"TRL DPO": (2.0, 250)})
    target = targets.Target("t", "step", "memory", "because", at_least=2.5, of="TRL DPO")
    assert target.value([stepped]) == 2.5 and targets.verdict(target, 2.5) == "met"
    assert target.bound == "at least 2.50x" and target.shown(2.0) == "2.00x"
    assert value("rate") == (7.0, "missed") and value("seconds")[0] == pytest.approx(1.0)
    assert value("memory growth", base="head, frozen, bf16, shape 1") == (1.0, "met")
    missing = None, "not measured"
    assert value("rate", group="none") == value("time", of="nobody") == missing
    found = [*targets.read()[0], *targets.read()[1]]
    assert len({t.name for t in found}) == len(found) > 30
    (bound,) = {t.at_least for t in found if t.name.startswith("step, LoRA, fp32, against TRL's")}
    assert bound == 1 / 0.75
    assert all(math.isinf(t.at_least) != math.isinf(t.at_most) for t in found)


class TestPages:
    def test_blocks_show_ratios_errors_and_losses(self):
        found = report.blocks([run(noise=0.0)])
        assert "**Ours is slower** in these cases" in found["head"]
        assert "- CCE: 0.90x in *head, frozen, bf16, shape 0*" in found["head"]
        assert "the bare GEMMs by torch take 0.80x in bf16" in found["head"]
        assert "**ours** | 1 s | 9 | 1x | 1.0e-06 | 1.0e-03" in found["head"]
        assert "| CCE | 900 ms | 9 | 0.90x [0.90, 0.90] | 1.0e-05 | 2.0e-03" in found["head"]
        assert "commit 0123456789ab" in found["machines"]
        assert found["memory"] == "Not measured."

    def test_put_replaces_a_block_and_raises_without_it(self, tmp_path):
        page = tmp_path / "README.md"
        page.write_text("a\n<!-- head: generated -->\nold\n<!-- /head -->\nb\n")
        put(page, {"head": "new"})
        assert page.read_text() == "a\n<!-- head: generated -->\nnew\n<!-- /head -->\nb\n"
        with pytest.raises(ValueError, match="no block 'step'"):
            put(page, {"step": "new"})

    def test_the_first_run_with_an_entry_counts(self):
        first, second = run(groups=1), run(groups=2, seed=1)
        found = results.groups_of([first, second], "head")
        assert found["head, frozen, bf16, shape 0"] == list(first.entries)
        assert found["head, frozen, bf16, shape 1"] == list(second.entries[5:])

    def test_committed_pages_have_the_figures_of_the_committed_results(self, tmp_path):
        for page, blocks in report.pages().items():
            copy = tmp_path / page.name
            copy.write_text((ROOT / page).read_text())
            put(copy, blocks)
            assert copy.read_text() == (ROOT / page).read_text(), f"{page}: run `make report`"

    def test_committed_charts_have_the_figures_of_the_committed_results(self):
        charts = report.charts()
        assert set(map(str, charts)) == set(readme.CHARTS.values())
        for path, chart in charts.items():
            assert (ROOT / path).read_text() == chart, f"{path}: run `make report`"

    def test_readme_shows_theirs_over_ours_and_the_fair_peer_first(self):
        stepped = step_run({"TRL DPO": (1.9, 250), "TRL DPO, labelled rows": (0.91, 120)})
        block = " ".join((readme.step_block(stepped) or "").split())
        fair = (
            "0.9x, slower than TRL None's DPO, with logits of responses only (as on CUDA). "
            "It takes 1.2x less memory"
        )
        assert block.startswith(f"A step of rDPO by `realign.train` is {fair}: <picture>")
        other = (
            "1.9x faster than TRL None's DPO, with logits of every token (its CPU default). "
            "It takes 2.5x"
        )
        assert f"Ours is {fair}. Ours is {other} less memory" in block
        for theme in readme.CHARTS:
            drawing = ElementTree.fromstring(readme.chart(stepped, theme))
            values = [text.text for text in drawing.iter() if text.get("class") == "value"]
            assert values == ["0.91x", "1.20x", "1.90x", "2.50x"]
            widths = [float(bar.get("width")) for bar in drawing.iter() if bar.tag.endswith("rect")]
            assert widths == [
                pytest.approx(readme.SCALE * ratio, abs=0.05) for ratio in (0.91, 1.2, 1.9, 2.5)
            ]
        assert readme.step_block(run()) is None and readme.chart(run(), "light") is None

    def test_charts_are_drawn(self, tmp_path):
        plots.head(results.groups_of([run()], "head"), tmp_path)
        assert {p.name for p in tmp_path.iterdir()} == {"head.png", "error.png"}
        for name in ("head", "error", "memory", "step", "scaling"):
            assert (report.CHARTS / f"{name}.png").stat().st_size > 10_000


class TestRoofline:
    def test_one_chunk_by_hand(self):
        N, H, V = 512, 4096, 32000
        product, all_zero = 2.0 * N * H * V, 0.0
        found = roofline.ours(N, H, V, trainable=False).found
        assert [f for f, _ in found] == [product, all_zero, product, all_zero, all_zero]
        logits, row, grad, last, after = (size for _, size in found)
        assert logits == 2 * (N * H + H * V) + 4 * N * V
        assert row == (4 + 2) * N * V and grad == 2 * (N * V + V * H) + 4 * N * H
        assert last == (4 + 2 + 4) * N * H and after == (4 + 4 + 2) * N * H
        (_, label), (_, e), *rest = roofline.ours(N, H, V, trainable=False, fused=True).found
        assert label == 4 * N * H and e == logits - 2 * N * V
        assert rest == found[2:]

    def test_a_trained_head_in_one_product_by_hand(self):
        N, H, V = 3072, 4096, 32000
        products = [size for flop, size in roofline.ours(N, H, V, trainable=True).found if flop]
        weight = 2 * (V * N + N * H) + 2 * V * H
        assert len(products) == 3 and products[2] == weight  # to bf16, and no sum is rounded

    @pytest.mark.parametrize(("trainable", "count"), [(False, 2), (True, 3)])
    def test_flop_equal_the_claimed_units(self, trainable, count):
        N, H, V = 6144, 2048, 151936
        flop = sum(flop for flop, _ in roofline.ours(N, H, V, trainable).found)
        assert flop == count * 2.0 * N * H * V

    def test_time_is_the_longer_of_compute_and_bandwidth(self):
        kernels = roofline.Kernels([(roofline.PEAK, 0.0), (0.0, 2 * roofline.BANDWIDTH)])
        assert kernels.seconds(roofline.PEAK) == pytest.approx(3)
        assert kernels.seconds(roofline.PEAK / 2) == pytest.approx(4)

    def test_chunks_equal_those_of_the_kernels(self):
        assert roofline.chunks(8190, 4096, 6183) == [4096, 4094]
        assert roofline.chunks(6 * 192, 4096, 1000, examples=True) == [960, 192]
