"""Stages with an engine, filters and visual negatives, in small runs."""

import json
import re
from collections import Counter
from dataclasses import replace

import pytest
from pair_runs import (
    FLAGS,
    ORDER,
    SHARDS,
    config_in,
    copy_run,
    rejected_in,
    shard_times,
    stage_folder,
    stage_rows,
)

from realign.data.records import read_pairs, write_pairs
from realign.pairs.__main__ import main
from realign.pairs.engines import Reply
from realign.pairs.filters import text as text_filters
from realign.pairs.filters.margin import visual_margins
from realign.pairs.infill.refill import Completion
from realign.pairs.io import shards
from realign.pairs.pipeline import PairsConfig, build_pairs, digit_sources, run_stages
from realign.pairs.stages import refill
from realign.pairs.stages.assemble import Assembler
from realign.pairs.stages.refill import Refill, _Task

URL = "http://localhost:1/v1#m"


def _body(text):
    """The masked answer in a completion request."""
    return re.search(r"<answer>\n(.*)\n</answer>", text)[1]


# Engines.


def test_missing_responses_are_written_by_the_engine(tmp_path, engine, capsys):
    sources = digit_sources(PairsConfig(scenes=40))
    asked = iter(["top left one , top right two .", Reply("", "too long"), Reply("cut", cut=True)])
    fake = engine(lambda _: next(asked))
    path = tmp_path / "data.parquet"
    mixed = [replace(s, chosen="") if i < 3 else s for i, s in enumerate(sources)]
    write_pairs(path, mixed)
    config = PairsConfig(
        output=str(tmp_path / "pairs.parquet"),
        data=str(path),
        answer="transformers:x",
        mask="numbers",
        max_bad=0.1,
    )
    outcome = run_stages(config, "mask")
    assert len(fake.asked) == 3 and fake.asked[0].images[0].size == (16, 16)
    rows = stage_rows(outcome.folders["answer"])
    assert rows[0]["chosen"] == "top left one , top right two ."
    assert rows[0]["answer_model"] == "transformers:x" and rows[1]["answer_model"] is None
    assert [row["chosen"] for row in rows[1:]] == [s.chosen for s in sources[3:]]
    assert [reason for *_, reason in rejected_in(tmp_path)] == ["no reply", "reply cut off"]
    assert "answer: 3 of 3 requests cost nothing" in capsys.readouterr().out
    with pytest.raises(ValueError, match="3 of 40 records have no response.* --answer"):
        run_stages(replace(config, answer=None, max_bad=0.05), "mask")
    write_pairs(path, sources)
    with pytest.raises(ValueError, match="--answer would have no effect"):
        run_stages(config, "mask")


def test_an_engine_masks_and_completes(whole_run, tmp_path, engine):
    def reply(text):
        if "Find every segment" in text:
            return '["left", "purple"]'  # the second is not in the text
        return _body(text).replace("[MASK]", "nine")

    engine(reply)
    settings = {"masker": URL, "refill": "prompt", "engine": "transformers:m"}
    config = copy_run(whole_run, tmp_path, ORDER[:3], **settings)
    build_pairs(config)
    records = read_pairs(config.output)
    assert len(records) == 40
    for record in records:
        facts = record.provenance
        assert record.rejected == record.chosen.replace("left", "nine", 1)
        assert facts["masked"] == record.chosen.replace("left", "[MASK]", 1)
        assert (facts["masker"], facts["refill_model"]) == (URL, "transformers:m")
        assert facts["neighbour_rank"] == 0


def test_completions_that_change_other_words_are_not_used(tmp_path, engine):
    answers = [
        lambda body: "something else altogether",
        lambda body: body,  # still masked
        lambda body: Reply(body.replace("[MASK]", "nine"), cut=True),
        lambda body: body.replace("[MASK]", "nine"),
    ]
    place = Counter()

    def reply(text):
        body = _body(text)
        place[body] += 1
        return answers[place[body] - 1](body)

    engine(reply)
    config = config_in(tmp_path, scenes=8, refill="prompt")
    rows = stage_rows(run_stages(config, "refill").folders["refill"])
    reasons = [[attempt["reason"] for attempt in row["attempts"]] for row in rows]
    first = ["other words changed", "not completed", "cut off"]
    assert all(found[:3] == first[: len(found)] for found in reasons)
    assert any(found == [*first, ""] for found in reasons)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("nine \x1b[2J", "control characters"), ("nine <image>", "image token"), ("?!", "empty text")],
)
def test_completions_of_a_local_model_are_checked_too(text, reason, tmp_path, monkeypatch):
    def infilled(vlm, processor, prompts, images, masked, **_):
        return [Completion(text, True) for _ in prompts]

    monkeypatch.setattr(refill, "infill", infilled)
    config = config_in(tmp_path, scenes=8)
    rows = stage_rows(run_stages(config, "refill").folders["refill"])
    assert {attempt["reason"] for row in rows for attempt in row["attempts"]} == {reason}


@pytest.mark.parametrize("length, reason", [(20_001, "reply too long"), (0, "not completed")])
def test_a_reply_that_is_too_long_has_its_own_reason(length, reason, tmp_path, engine):
    engine(lambda text: "nine " * length)
    config = config_in(tmp_path, scenes=8, refill="prompt")
    rows = stage_rows(run_stages(config, "refill").folders["refill"])
    assert {attempt["reason"] for row in rows for attempt in row["attempts"]} == {reason}


def test_an_engine_that_is_gone_stops_the_run_and_keeps_the_shards(
    whole_run, tmp_path, engine, capsys
):
    def reply(text):
        if len(fake.asked) > 16:
            raise ConnectionError("nobody answers at localhost")
        return _body(text).replace("[MASK]", "nine")

    fake = engine(reply)
    config = copy_run(whole_run, tmp_path, ORDER[:4])
    flags = ["--output", config.output, *FLAGS]
    assert main([*flags, "--refill", "prompt"]) == 1
    shown = capsys.readouterr().err
    assert "refill stopped at shard" in shown and "nobody answers at localhost" in shown
    assert len(shard_times(stage_folder(config.work_folder, "refill"))) >= 1


def test_each_attempt_of_a_refill_has_its_own_seed():
    stage = Refill(PairsConfig(temperature=1.0))
    tasks = [_Task(record, None, []) for record in digit_sources(PairsConfig(scenes=2))]
    seeds = [stage._seed(task, place) for task in tasks for place in (0, 1)]
    assert len(set(seeds)) == 4
    assert seeds == [stage._seed(task, place) for task in tasks for place in (0, 1)]


# Filters.


def _passed(config) -> dict[str, list[dict]]:
    """Record -> completions that passed refill."""
    rows = stage_rows(run_stages(config, "refill").folders["refill"])
    return {row["id"]: [a for a in row["attempts"] if not a["reason"]] for row in rows}


def test_the_judge_drops_true_responses_and_the_next_candidate_is_used(whole_run, tmp_path, engine):
    """The judge decides that the first candidate is true of the image."""
    settings = {"candidates": 2, "judge": URL, "temperature": 1.0}
    config = copy_run(whole_run, tmp_path, ORDER[:4], **settings)
    passed = _passed(config)
    assert all(len(found) <= 2 for found in passed.values())
    first = {found[0]["text"] for found in passed.values() if found}

    def reply(text):
        response = re.search(r"<response>\n(.*)\n</response>", text)[1]
        return "no" if response in first else "Yes."

    engine(reply)
    build_pairs(config)
    records = read_pairs(config.output)
    for record in records:
        second = passed[record.name][1]
        assert second["text"] not in first
        assert record.rejected == second["text"]
        assert record.provenance["neighbour_rank"] == second["rank"]
        verdicts = json.loads(record.provenance["judge"])
        assert verdicts == {"rejected": False, "chosen on the negative": False}
    usable = {n for n, f in passed.items() if len(f) == 2 and f[1]["text"] not in first}
    assert {record.name for record in records} == usable != set()


@pytest.mark.parametrize(
    ("rejected", "chosen", "reason"),
    [
        ("no", "yes", "rejected is true of the image"),
        ("yes", "no", "chosen is true of the negative"),
        ("yes", "hard to decide", "no verdict"),
    ],
)
def test_verdicts_that_drop_a_pair(tmp_path, engine, rejected, chosen, reason):
    captions = {s.chosen for s in digit_sources(PairsConfig(scenes=8))}

    def reply(text):
        response = re.search(r"<response>\n(.*)\n</response>", text)[1]
        return chosen if response in captions else rejected

    engine(reply)
    config = config_in(tmp_path, scenes=8, judge=URL)
    assert run_stages(config, "filter").dropped == {reason: 8}
    with pytest.raises(ValueError, match=f"no record gave a pair.*{reason}"):
        build_pairs(config)


def test_meanings_are_compared_with_a_sentence_model(whole_run, tmp_path, monkeypatch):
    """A fake measure finds every text with "one" too similar, so the next candidate is used."""

    class Fake:
        def __init__(self, name):
            assert name == "some/model"

        def __call__(self, pairs):
            return [0.96 if "one" in rejected.split() else 0.5 for _, rejected in pairs]

    monkeypatch.setattr(text_filters, "SentenceSimilarity", Fake)
    settings = {"similarity": "some/model", "tau": 0.95, "candidates": 3, "segments": 0}
    config = copy_run(whole_run, tmp_path, ORDER[:3], **settings)
    report = build_pairs(config)
    expected, dropped = {}, Counter()
    for name, passed in _passed(config).items():
        kept = [a["text"] for a in passed if "one" not in a["text"].split()]
        if kept:
            expected[name] = kept[0]
        else:
            dropped["too similar" if passed else "other"] += 1
    records = read_pairs(config.output)
    assert {r.name: r.rejected for r in records} == expected
    assert {r.provenance["text_similarity"] for r in records} == {0.5}
    assert report.dropped["too similar"] == dropped["too similar"] > 0
    assert report.dropped.total() == dropped.total()


def test_margins_are_those_of_the_visual_negative(whole_run, tmp_path, vlm, processor):
    settings = {"margin": True, "negative": "noise"}
    config = copy_run(whole_run, tmp_path, ORDER[:5], **settings)
    report = build_pairs(config)
    records = read_pairs(config.output)
    assert report.dropped["visual margin not above 0"] > 0
    cache = str(tmp_path / "cache")
    truth = visual_margins(vlm, processor, records, cache=cache)
    found = [record.provenance["visual_margin"] for record in records]
    assert found == pytest.approx(truth.tolist(), abs=1e-3) and min(found) > 0
    kept = {record.name for record in records}
    every = replace(config, margin=False, output=str(tmp_path / "all.parquet"))
    build_pairs(replace(every, work=str(config.work_folder)))
    left = [record for record in read_pairs(every.output) if record.name not in kept]
    assert left and visual_margins(vlm, processor, left, cache=cache).max() <= 0


# Negatives.


def test_negatives_share_the_rejected_text(whole_run, tmp_path):
    base = {r.name: r for r in read_pairs(whole_run.config.output)}
    everyone = {r.name: r.images for r in digit_sources(whole_run.config)}
    found = {}
    for kind in ("random", "crop", "noise", "blank"):
        config = replace(whole_run.config, negative=kind, output=str(tmp_path / f"{kind}.parquet"))
        build_pairs(replace(config, work=str(whole_run.work)))
        found[kind] = {r.name: r for r in read_pairs(config.output)}
        assert found[kind].keys() == base.keys()
        for name, record in found[kind].items():
            assert (record.rejected, record.images) == (base[name].rejected, base[name].images)
            assert record.provenance["negative"] == kind
            assert record.provenance["neighbour"] == base[name].provenance["neighbour"]
            own = record.images[0].open(name)
            other = record.retrieved_images[0].open(name)
            assert other.size == own.size and other.tobytes() != own.tobytes()
            if kind == "random":
                assert record.retrieved_images == everyone[record.provenance["negative_record"]]
            else:
                assert "negative_record" not in record.provenance
    for record in base.values():
        assert record.retrieved_images == everyone[record.provenance["neighbour"]]
        assert record.provenance["negative_record"] == record.provenance["neighbour"]
    drawn = [r.provenance["negative_record"] for r in found["random"].values()]
    assert len(set(drawn)) > 0.4 * len(drawn)
    pixels = {r.retrieved_images[0].open("").tobytes() for r in found["blank"].values()}
    assert len(pixels) == 1
    assert len({r.retrieved_images for r in found["noise"].values()}) == len(base)


def test_a_random_negative_is_another_image(whole_run):
    folders = {stage: stage_folder(whole_run.work, stage) for stage in ORDER}
    for seed in range(8):  # about 8 of 320 draws would be the record itself
        assembler = Assembler(replace(whole_run.config, seed=seed), folders)
        for number in range(SHARDS):
            for row in shards.Shards(folders["read"]).read(number):
                _, drawn = assembler._random(row, number, (0, "nothing"))
                assert drawn not in (row["id"], "nothing")
