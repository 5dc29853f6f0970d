"""Stages that ask an engine, and the visual negatives, in small runs of the pairs pipeline."""

import json
import re
from collections import Counter
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from pair_runs import ORDER, SHARDS, config_in, rejected_in, shard_times, stage_folder

from realign.data.records import read_pairs
from realign.pairs.__main__ import main
from realign.pairs.engines import Reply
from realign.pairs.filters import rules as filters
from realign.pairs.filters.margin import visual_margins
from realign.pairs.io import shards
from realign.pairs.pipeline import PairsConfig, build_pairs, digit_sources, run_stages
from realign.pairs.stages import assemble, infill
from realign.pairs.stages.base import Stage
from realign.pairs.stages.read import Read
from realign.pairs.stages.runner import Limit, make_shard

# Engines.


def test_missing_responses_are_written_by_the_engine(tmp_path, engine, capsys):
    sources = digit_sources(PairsConfig(scenes=40))
    asked = iter(["top left one , top right two .", Reply("", "too long"), Reply("cut", cut=True)])
    fake = engine(lambda _: next(asked))
    mixed = [replace(s, chosen="") if i < 3 else s for i, s in enumerate(sources)]
    path = tmp_path / "data.jsonl"
    _as_lines(path, mixed)
    config = PairsConfig(
        output=str(tmp_path / "pairs.parquet"),
        data=str(path),
        answer="transformers:x",
        mask="numbers",
        max_bad=0.1,
    )
    outcome = run_stages(config, "mask")
    assert len(fake.asked) == 3 and fake.asked[0].images[0].size == (16, 16)
    rows = pq.read_table(outcome.folders["answer"] / "00000.parquet").to_pylist()
    assert rows[0]["chosen"] == "top left one , top right two ."
    assert rows[0]["answer_model"] == "transformers:x" and rows[1]["answer_model"] is None
    assert [row["chosen"] for row in rows[1:]] == [s.chosen for s in sources[3:]]
    assert [reason for *_, reason in rejected_in(tmp_path)] == ["no reply", "reply cut off"]
    assert "answer: 3 of 3 requests cost nothing" in capsys.readouterr().out
    with pytest.raises(ValueError, match="3 of 40 records have no response.* --answer"):
        run_stages(replace(config, answer=None, max_bad=0.05), "mask")
    _as_lines(path, sources)
    with pytest.raises(ValueError, match="--answer would have no effect"):
        run_stages(config, "mask")


def _as_lines(path, records):
    """A folder format file: pictures beside JSON lines."""
    lines = []
    for record in records:
        picture = path.parent / f"{record.name}.png"
        picture.write_bytes(record.images[0].data)
        line = {"id": record.name, "image": picture.name, "prompt": record.prompt[0]["content"]}
        lines.append(json.dumps(line | ({"chosen": record.chosen} if record.chosen else {})))
    path.write_text("\n".join(lines) + "\n")


def test_an_engine_masks_and_completes(tmp_path, engine):
    def say(text):
        if "Find every segment" in text:
            return '["left", "purple"]'  # the second is not in the text
        body = re.search(r"<answer>\n(.*)\n</answer>", text)[1]
        assert "[MASK]" in body
        return body.replace("[MASK]", "nine")

    engine(say)
    config = config_in(
        tmp_path, scenes=12, masker="http://localhost:1/v1#m", refill="prompt", engine="vllm:m"
    )
    build_pairs(config)
    records = read_pairs(config.output)
    assert len(records) == 12
    for record in records:
        facts = record.provenance
        assert record.rejected == record.chosen.replace("left", "nine", 1)
        assert facts["masked"] == record.chosen.replace("left", "[MASK]", 1)
        assert facts["masker"] == "http://localhost:1/v1#m" and facts["refill_model"] == "vllm:m"
        assert facts["neighbour_rank"] == 0


def test_completions_that_change_other_words_are_not_taken(tmp_path, engine):
    answers = {
        0: lambda body: "something else altogether",
        1: lambda body: body,  # still masked
        2: lambda body: Reply(body.replace("[MASK]", "nine"), cut=True),
        3: lambda body: body.replace("[MASK]", "nine"),
    }
    place = Counter()

    def say(text):
        body = re.search(r"<answer>\n(.*)\n</answer>", text)[1]
        place[body] += 1
        return answers[place[body] - 1](body)

    engine(say)
    config = config_in(tmp_path, scenes=8, refill="prompt")
    folders = run_stages(config, "refill").folders
    rows = pq.read_table(folders["refill"] / "00000.parquet").to_pylist()
    reasons = [[attempt["reason"] for attempt in row["attempts"]] for row in rows]
    first = ["other words changed", "not completed", "cut off"]
    assert all(found[:3] == first[: len(found)] for found in reasons)
    assert any(found == [*first, ""] for found in reasons)


def test_the_judge_drops_what_is_true_and_takes_the_next_candidate(tmp_path, engine):
    """The judge finds the first candidate true of the image; the second one is taken."""
    seen = Counter()

    def say(text):
        response = re.search(r"<response>\n(.*)\n</response>", text)[1]
        seen[response] += 1
        return "no" if response in rejected_first else "Yes."

    config = config_in(tmp_path, candidates=2, judge="http://localhost:1/v1#m", temperature=1.0)
    engine(lambda text: "yes")
    folders = run_stages(config, "refill").folders
    rows = [r for f in sorted(folders["refill"].glob("[0-9]*.parquet")) for r in _rows(f)]
    passed = {r["id"]: [a for a in r["attempts"] if not a["reason"]] for r in rows}
    assert all(len(found) <= 2 for found in passed.values())
    rejected_first = {found[0]["text"] for found in passed.values() if found}
    engine(say)
    build_pairs(config)
    records = read_pairs(config.output)
    for record in records:
        second = passed[record.name][1]
        assert second["text"] not in rejected_first
        assert (record.rejected, record.provenance["neighbour_rank"]) == (
            second["text"],
            second["rank"],
        )
        verdicts = json.loads(record.provenance["judge"])
        assert verdicts == {"rejected": False, "chosen on the negative": False}
    usable = {n for n, f in passed.items() if len(f) == 2 and f[1]["text"] not in rejected_first}
    assert {record.name for record in records} == usable != set()


@pytest.mark.parametrize(
    ("rejected", "chosen", "reason"),
    [
        ("no", "yes", "rejected is true of the image"),
        ("yes", "no", "chosen is true of the negative"),
        ("yes", "hard to say", "no verdict"),
    ],
)
def test_what_the_judge_drops(tmp_path, engine, rejected, chosen, reason):
    captions = {s.chosen for s in digit_sources(PairsConfig(scenes=8))}

    def say(text):
        response = re.search(r"<response>\n(.*)\n</response>", text)[1]
        return chosen if response in captions else rejected

    engine(say)
    config = config_in(tmp_path, scenes=8, judge="http://localhost:1/v1#m")
    assert run_stages(config, "filter").dropped == {reason: 8}
    with pytest.raises(ValueError, match=f"no record gave a pair.*{reason}"):
        build_pairs(config)


def test_each_try_of_a_refill_has_a_seed_of_its_own():
    stage = infill.Refill(PairsConfig(temperature=1.0))
    records = digit_sources(PairsConfig(scenes=2))
    tasks = [infill._Task(record, None, []) for record in records]
    seeds = [stage._seed(task, place) for task in tasks for place in (0, 1)]
    assert len(set(seeds)) == 4
    assert seeds == [stage._seed(task, place) for task in tasks for place in (0, 1)]


def _rows(file):
    return pq.read_table(file).to_pylist()


def test_an_engine_that_is_gone_stops_the_run_and_keeps_the_shards(tmp_path, engine, capsys):
    def say(text):
        if len(fake.asked) > 8:
            raise ConnectionError("nobody answers at localhost")
        return re.search(r"<answer>\n(.*)\n</answer>", text)[1].replace("[MASK]", "nine")

    fake = engine(say)
    flags = ["--output", str(tmp_path / "pairs.parquet"), "--scenes", "16", "--k", "2"]
    flags += ["--shard", "4", "--refill", "prompt", "--quiet"]
    assert main(flags) == 1
    shown = capsys.readouterr().err
    assert "refill stopped at shard" in shown and "nobody answers at localhost" in shown
    assert len(shard_times(stage_folder(tmp_path / "pairs.work", "refill"))) >= 1


def test_meaning_in_place_of_words(tmp_path, monkeypatch):
    """A measure that finds every text with a "one" too similar: the next candidate is taken."""

    class Fake:
        def __init__(self, name):
            assert name == "some/model"

        def __call__(self, pairs):
            return [0.96 if "one" in rejected.split() else 0.5 for _, rejected in pairs]

    monkeypatch.setattr(filters, "SentenceSimilarity", Fake)
    config = config_in(tmp_path, similarity="some/model", tau=0.95, candidates=3, segments=0)
    report = build_pairs(config)
    refilled = [
        row
        for file in sorted(run_stages(config, "refill").folders["refill"].glob("*.parquet"))
        for row in _rows(file)
    ]
    expected, dropped = {}, Counter()
    for row in refilled:
        passed = [a["text"] for a in row["attempts"] if not a["reason"]]
        kept = [text for text in passed if "one" not in text.split()]
        if kept:
            expected[row["id"]] = kept[0]
        else:
            last = row["attempts"][-1]["reason"] if row["attempts"] else "no neighbour"
            dropped["too similar" if passed else last] += 1
    records = read_pairs(config.output)
    assert {r.name: r.rejected for r in records} == expected
    assert {r.provenance["text_similarity"] for r in records} == {0.5}
    assert report.dropped == dropped and dropped["too similar"] > 0


def test_margins_are_those_of_the_visual_negative(whole_run, tmp_path, vlm, processor):
    config = replace(whole_run.config, margin=True, negative="noise", candidates=3)
    config = replace(config, output=str(tmp_path / "pairs.parquet"))
    report = build_pairs(config)
    records = read_pairs(config.output)
    assert report.dropped["visual margin not above 0"] > 0
    truth = visual_margins(vlm, processor, records, cache=str(tmp_path / "cache"))
    found = [record.provenance["visual_margin"] for record in records]
    assert found == pytest.approx(truth.tolist(), abs=1e-3) and min(found) > 0
    kept = {record.name for record in records}
    noised = replace(config, margin=False, candidates=1, output=str(tmp_path / "all.parquet"))
    build_pairs(noised)
    left = [record for record in read_pairs(noised.output) if record.name not in kept]
    assert left and visual_margins(vlm, processor, left, cache=str(tmp_path / "cache")).max() <= 0


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
    for seed in range(8):  # of 320 draws, eight would be the record itself
        config = replace(whole_run.config, seed=seed)
        assembler = assemble.Assembler(config, folders)
        for number in range(SHARDS):
            for row in shards.Shards(folders["read"]).read(number):
                _, drawn = assembler._random(row, number, {"shard": 0, "id": "nothing"})
                assert drawn not in (row["id"], "nothing")


@pytest.mark.parametrize("error", [OSError, ValueError])
def test_an_error_without_text_is_no_success(tmp_path, error):
    class Fails(Stage):
        name, needs, schema = "fails", ("read",), Read.schema

        def run(self, inputs, number):
            raise error

    stage = Fails()
    stage.folder, stage.folders = tmp_path / "fails", {"read": tmp_path / "read"}
    row = {"id": "a", "prompt": "[]", "chosen": "A", "images": []}
    shards.Shards(tmp_path / "read", Read.schema).write(0, [row], [])
    assert make_shard(stage, 0, Limit(0, set())).error == error.__name__
