"""`--keep-target`: the window chosen on a sample, against brute force on images along an arc."""

import copy
import pickle
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from arc_images import (
    COUNT,
    GROUP,
    STEP,
    arc_config,
    brute_force,
    colour,
    killed_on_arc,
    nearest,
    place,
    use_arc,
    write_arc,
)
from killed_runs import exit_code

from realign.data.records import read_pairs
from realign.pairs.config import PairsConfig
from realign.pairs.infill.refill import Completion
from realign.pairs.pipeline import build_pairs
from realign.pairs.stages import on_ray, refill, window
from realign.pairs.stages.shard import InvalidLimit
from realign.pairs.stages.window import SAMPLE, Choice, TrialResult

DEFAULT = brute_force(0.999, 10)


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """Writes the records of the arc, and returns the engine of all runs."""
    write_arc(tmp_path / "data.parquet")
    return use_arc(monkeypatch.setattr)


def _ceiling(rank: int) -> float:
    """The ceiling that leaves out the nearest `rank` images of the median record."""
    values = [np.cos(STEP * (i - nearest(i, 2)[rank - 1])) for i in range(COUNT)]
    return round(1 - float(f"{1 - np.median(values):.2g}"), 12)


def _colours(path) -> list[tuple[str, str]]:
    """Colours of the image and of the visual negative, for each pair."""
    pairs = read_pairs(path)
    return [(colour(place(p.images[0])), colour(place(p.retrieved_images[0]))) for p in pairs]


@pytest.mark.parametrize("given", [{}, {"k": 10}], ids=["all unset", "k given"])
def test_the_window_is_the_nearest_that_brute_force_finds(engine, tmp_path, given):
    windows = {"the given settings": DEFAULT}
    if "k" in given:
        windows |= {f"--ceiling {c}": brute_force(c, 10) for c in (_ceiling(20), _ceiling(50))}
    else:
        windows["--reach 200"] = brute_force(0.999, 200)
    flags = next(name for name, kept in windows.items() if kept >= 0.8 * COUNT)
    assert flags != "the given settings" and len({*windows.values()}) == len(windows)
    report = build_pairs(arc_config(tmp_path, **given))
    assert report.written == windows[flags]
    last = str(report).splitlines()[-1]
    share = f"{windows[flags] / COUNT:.0%}"
    assert last.startswith(f"kept {windows[flags]} of {COUNT} records ({share}) with {flags}. ")
    assert last.endswith("It is the nearest window that reaches --keep-target 0.8.")
    assert all(own != other for own, other in _colours(report.path))


def test_a_hidden_word_that_a_response_lacks_decides_the_order(engine, tmp_path):
    """The negative is the nearest image of another colour, and its rank counts all images."""
    for record in read_pairs(build_pairs(arc_config(tmp_path)).path):
        i, facts = int(record.name), record.provenance
        near, other = nearest(i, 0.999), int(facts["neighbour"])
        distance = min(abs(i - j) for j in near if colour(j) != colour(i))
        assert abs(i - other) == distance and colour(other) != colour(i)
        nearer = sum(abs(i - j) < distance for j in near)
        assert facts["neighbour_rank"] - nearer in (0, 1)  # images on both sides tie
        assert facts["similarity"] == pytest.approx(np.cos(STEP * distance), abs=1e-6)


def test_a_reached_target_changes_nothing(engine, tmp_path):
    report = build_pairs(arc_config(tmp_path, keep_target=0.1))
    data = report.path.read_bytes()
    assert report.written == DEFAULT and "with the given settings" in report.window
    off = build_pairs(arc_config(tmp_path, keep_target=0.0, work=str(tmp_path / "off")))
    assert off.path.read_bytes() == data and str(off).count("\n") == 0
    assert not list((tmp_path / "off").glob("window-*"))


def test_the_margin_decides_among_windows_that_keep_enough(engine, tmp_path, monkeypatch):
    """A model that misreads all images keeps every record, also on an image of the same colour."""

    def infilled(vlm, processor, prompts, images, masked, **_):
        return [Completion(m.fill(("pink",) * len(m.hidden)), True) for m in masked]

    def margins(vlm, processor, records, **_):
        pairs = [(place(r.images[0]), place(r.retrieved_images[0])) for r in records]
        return np.where([colour(a) != colour(b) for a, b in pairs], 1.0, -1.0)

    def of_even(vlm, processor, records, **_):
        even = [int(r.name) % 2 == 0 for r in records]
        return np.where(even, margins(vlm, processor, records), -1.0)

    monkeypatch.setattr(refill, "infill", infilled)
    monkeypatch.setattr(refill, "check_prompt", lambda *_: None)
    monkeypatch.setattr(window, "visual_margins", margins)
    config = arc_config(tmp_path, refill="infill")
    off = build_pairs(replace(config, keep_target=0.0))
    alike = sum(own == other for own, other in _colours(off.path))
    assert off.written == COUNT and alike > 0.2 * COUNT
    moved = build_pairs(config)
    assert moved.written == COUNT and all(own != other for own, other in _colours(moved.path))
    assert f"keep 100% ({1 - alike / COUNT:.0%} with a visual margin above 0)" in moved.window
    # No window has enough positive margins, so the margins decide among those that keep enough.
    for measure, flags in (
        (of_even, "--reach 200"),
        (lambda *a, **_: -np.ones(COUNT), "the given"),
    ):
        monkeypatch.setattr(window, "visual_margins", measure)
        report = build_pairs(replace(config, work=str(tmp_path / flags)))
        assert report.written == COUNT and f"(100%) with {flags}" in report.window
        assert "of 4 windows that reach --keep-target 0.8." in report.window


def test_a_target_out_of_reach_is_stated_and_fails_nothing(engine, tmp_path):
    engine.word = lambda number: "red"
    report = build_pairs(arc_config(tmp_path))
    kept = COUNT - GROUP  # all but the red ones
    assert report.written == kept
    assert report.window == (
        f"kept {kept} of {COUNT} records (75%) with the given settings. On a sample of {COUNT}, "
        "the given settings keep 75% (30 same as chosen). 8 windows tried, and none reaches "
        "--keep-target 0.8. Hide more words with --segments 0, raise --k, or add images."
    )
    assert engine.asked == 9 * (kept + 10 * GROUP)  # eight trials and the run


def test_no_window_is_tried_if_nothing_can_be_moved(engine, tmp_path):
    config = arc_config(tmp_path, k=10, ceiling=0.999, segments=1)
    report = build_pairs(config)
    assert report.written == DEFAULT < 0.8 * COUNT
    assert not list(config.work_folder.glob("window-*"))
    assert report.window == (
        f"kept {DEFAULT} of {COUNT} records ({DEFAULT / COUNT:.0%}). --keep-target 0.8 moved "
        "nothing, because the settings that it can move are given. Hide more words with "
        "--segments 0, raise --k, or add images."
    )


def test_records_without_a_word_to_hide_cost_one_trial(engine, tmp_path):
    write_arc(tmp_path / "data.parquet", lambda i: f"A {colour(i)} box." if i % 2 else "It is.")
    engine.word = lambda number: "white"
    config = arc_config(tmp_path)
    report = build_pairs(config)
    assert report.written == COUNT // 2 and len([*config.work_folder.glob("window-*")]) == 1
    assert "(60 nothing to mask). 1 window tried, and none reaches" in report.window


@pytest.mark.parametrize(
    ("given", "movable"),
    [
        ({}, {"reach", "ceiling", "segments"}),
        ({"margin": True}, {"reach", "ceiling", "segments", "candidates"}),
        ({"k": 10}, {"ceiling", "segments"}),
        ({"reach": 30}, {"ceiling", "segments"}),
        ({"ceiling": 0.999}, {"reach", "segments"}),
        ({"segments": 1}, {"reach", "ceiling"}),
        ({"share": 0.5}, {"reach", "ceiling"}),
        ({"masker": "transformers:m"}, {"reach", "ceiling"}),
        ({"margin": True, "candidates": 1}, {"reach", "ceiling", "segments"}),
    ],
)
def test_only_unset_settings_are_moved(given, movable):
    config = PairsConfig(**given)
    assert config.movable == movable
    assert replace(config, quiet=True).movable == movable
    assert pickle.loads(pickle.dumps(config)).movable == movable


def test_a_killed_run_continues_with_the_same_window(engine, tmp_path):
    config = arc_config(tmp_path)
    whole = build_pairs(config).path.read_bytes()
    again = replace(config, output=str(tmp_path / "again.parquet"))
    for stage, made in (("window", 0), ("refill", 2)):  # the given settings and --reach 200
        code = exit_code(killed_on_arc, stage, "00000.parquet", tmp_path, again.output)
        assert code == -signal.SIGKILL and not Path(again.output).exists()
        trials = [*again.work_folder.glob("window-*/00000.parquet")]
        assert len(trials) == made
    times = {trial: trial.stat().st_mtime_ns for trial in trials}
    engine.asked = 0
    assert build_pairs(again).path.read_bytes() == whole
    assert {trial: trial.stat().st_mtime_ns for trial in trials} == times
    assert engine.asked == COUNT  # one request for each record, and none for a trial


def test_a_changed_image_is_tried_again(engine, tmp_path):
    write_arc(tmp_path / "data.parquet", files=True)
    config = arc_config(tmp_path, shard=30)
    build_pairs(config)
    trials = [*config.work_folder.glob("window-*/00000.parquet")]
    times = [trial.stat().st_mtime_ns for trial in trials]
    (tmp_path / "119.png").write_bytes((tmp_path / "0.png").read_bytes())  # in the last shard
    build_pairs(config)
    assert [*config.work_folder.glob("window-*/00000.parquet")] == trials
    again = [trial.stat().st_mtime_ns for trial in trials]
    assert all(after > before for before, after in zip(times, again, strict=True))


def test_a_worker_of_ray_makes_the_same_trial(engine, tmp_path, monkeypatch):
    made = {}
    make = window.Trial.run

    def run(self, inputs, number):
        if self.folder not in made:
            sent = copy.copy(self)
            sent.report = None  # as `on_ray.make_shards` does, with the tick of the class
            vars(sent).pop("tick", None)
            made[self.folder] = pickle.dumps(sent)
        return make(self, inputs, number)

    monkeypatch.setattr(window.Trial, "run", run)
    build_pairs(arc_config(tmp_path))
    assert len(made) == 2
    for folder, stage in made.items():
        before = (folder / "00000.parquet").read_bytes()
        (folder / "00000.parquet").unlink()
        batch = {"number": np.array([0])}
        result = on_ray._make(batch, pickle.loads(stage), InvalidLimit(0, set()), 1)
        assert result["error"] == [""]
        assert (folder / "00000.parquet").read_bytes() == before
    on_ray._open_stages.clear()


def test_the_sample_is_bounded(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(window, "SAMPLE", 20)
    engine.word = lambda number: colour(number)
    config = arc_config(tmp_path)
    report = build_pairs(config)
    assert "On a sample of 20, " in report.window and SAMPLE == 200
    assert engine.asked <= 20 * 10 * 8 + COUNT * 10


def test_a_sample_that_keeps_more_is_admitted():
    result = TrialResult(200, 180, Counter({"same as chosen": 20}), None)
    choice = Choice(0.8, {"reach": 200}, TrialResult(200, 20, Counter(), None), result, 2, 1)
    assert choice.line(70, Counter({"same as chosen": 30}), "Remedy.") == (
        "kept 70 of 100 records (70%) with --reach 200. On a sample of 200, the given settings "
        "keep 10%, and this window keeps 90% (20 same as chosen). It is the nearest window that "
        "reaches --keep-target 0.8. The sample kept more than the other records."
    )
