"""Pairs of digits and of user records: contents of the pairs, and errors of the command."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_refill import slow_infill

from realign.data.records import Record, StoredImage, read_pairs, write_pairs
from realign.digits.scenes import CAPTION_PROMPT
from realign.pairs.__main__ import main
from realign.pairs.filters.text import same_response, text_similarity
from realign.pairs.masking.mask import MASK, Masked
from realign.pairs.pipeline import PairsConfig, build_pairs, digit_sources
from realign.pairs.retrieval.embed import Embedder
from realign.pairs.retrieval.phash import perceptual_hash

PROMPT = [{"role": "user", "content": CAPTION_PROMPT}]


def test_contents_of_a_pair(pairs_config, pairs_file, vlm, processor):
    sources = {record.name: record for record in digit_sources(pairs_config)}
    order = list(sources)
    images = [record.images[0].open("") for record in sources.values()]
    vectors = Embedder(None, dtype="fp32")(images)
    cosine = vectors @ vectors.T
    usable = cosine.copy()
    np.fill_diagonal(usable, -np.inf)
    usable[cosine >= pairs_config.ceiling] = -np.inf
    hashes = [perceptual_hash(image) for image in images]
    bits = np.array([[(one ^ other).bit_count() for other in hashes] for one in hashes])
    usable[bits <= pairs_config.hash_distance] = -np.inf
    records = read_pairs(pairs_file)
    assert 16 <= len(records) <= 24 and [r.name for r in records] == sorted(r.name for r in records)
    for record in records[::3]:
        source, facts = sources[record.name], record.provenance
        assert (record.prompt, record.chosen) == (source.prompt, source.chosen)
        assert record.images == source.images
        # The visual negative is the neighbour with this rank.
        ranked = np.argsort(-usable[order.index(record.name)], kind="stable")
        nearest = [order[i] for i in ranked]
        neighbour = sources[nearest[facts["neighbour_rank"]]]
        assert facts["neighbour"] == facts["negative_record"] == neighbour.name
        assert record.retrieved_images == neighbour.images != record.images
        similarity = cosine[order.index(record.name), order.index(neighbour.name)]
        assert facts["similarity"] == pytest.approx(float(similarity), abs=1e-5)
        # The rejected response was completed on it. Completions on nearer images were dropped.
        pieces = tuple(facts["masked"].split(MASK))
        masked = Masked(pieces, ("",) * (len(pieces) - 1))
        assert len(pieces) == 2  # one segment
        for rank in range(facts["neighbour_rank"] + 1):
            image = sources[nearest[rank]].images[0].open("")
            completion = slow_infill(vlm, processor, image, masked, 8).text
            accepted = rank == facts["neighbour_rank"]
            assert (completion == record.rejected) == accepted
            assert same_response(completion, record.chosen) != accepted
        assert facts["text_similarity"] == text_similarity(record.chosen, record.rejected)
        assert (facts["embed_model"], facts["refill_model"]) == ("digits", "digits")
        assert (facts["masker"], facts["negative"], facts["seed"]) == ("rules", "retrieved", 0)
        assert {"visual_margin", "judge", "answer_model"}.isdisjoint(facts)


def _sources(folder, records, name="sources.parquet") -> str:
    write_pairs(folder / name, records)
    return str(folder / name)


@pytest.fixture
def own(scenes) -> list[Record]:
    """User records: six scenes with captions."""
    return [
        Record(f"own-{i}", tuple(PROMPT), s.caption, "", (StoredImage.from_pil(s.image),))
        for i, s in enumerate(scenes[:6])
    ]


def test_user_records(tmp_path, own, capsys):
    parts = [{"type": "image"}, {"type": "text", "text": CAPTION_PROMPT}]
    typed = replace(own[0], prompt=({"role": "user", "content": parts},))
    yes = replace(own[1], name="yes", chosen="yes")
    data = _sources(tmp_path, [typed, *own[1:], yes])
    out = tmp_path / "new" / "pairs.parquet"
    arguments = ["--data", data, "--output", str(out), "--mask", "numbers", "--quiet"]
    assert main(arguments) == 0
    records = read_pairs(out)
    assert records[0].prompt == typed.prompt
    assert {r.name for r in records} <= {r.name for r in own}
    printed = capsys.readouterr().out
    assert f"wrote {out}: {len(records)} pairs in" in printed
    assert f"dropped {7 - len(records)} (" in printed and "1 nothing to mask" in printed


def test_neighbours_have_the_same_number_of_images(tmp_path, own):
    double = [
        replace(own[i], name=f"double-{i}", images=own[i].images + own[i + 1].images)
        for i in range(3)
    ]
    data = _sources(tmp_path, [*own, *double])
    out = tmp_path / "pairs.parquet"
    build_pairs(PairsConfig(output=str(out), data=data, mask="numbers", segments=0, quiet=True))
    records = read_pairs(out)
    assert {len(r.images) for r in records} == {1, 2}
    for record in records:
        assert len(record.retrieved_images) == len(record.images)


def _torn(own):
    return [*own, replace(own[0], name="torn", images=(StoredImage(b"x"),))]


def _placed(own):
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "name it"}]
    return [*own, replace(own[0], name="odd", prompt=({"role": "user", "content": parts},))]


def _yes(own):
    return [replace(record, chosen="yes") for record in own]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_torn, "allows (embed: 1 corrupt). For example, record 'torn'"),
        (_placed, "record 'odd': its messages place 2 image(s), by image parts, and 1 are given."),
        (_yes, "no record gave a pair; dropped 6 (6 nothing to mask). Name other kinds"),
        (lambda own: own[:1], "dropped 1 (1 no neighbour). Add images"),
        (lambda own: own[:1], " Without --model, the shipped digits model fills the gaps"),
    ],
)
def test_the_command_reports_invalid_records_in_one_error(tmp_path, own, change, message, capsys):
    out = tmp_path / "out.parquet"
    arguments = ["--data", _sources(tmp_path, change(own)), "--output", str(out), "--quiet"]
    assert main([*arguments, "--mask", "numbers"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "0"], "--k is 0"),
        (["--data", "no/such/file"], "there is nothing at 'no/such/file'"),
        (
            ["--data", "no/such/file", "--model", "no/such/model"],
            "there is no folder no/such/model",
        ),
        (["--data", "rows.parquet"], "rows.parquet lacks the column(s) images."),
    ],
)
def test_the_command_reports_bad_settings_in_one_error(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"prompt": ["a"], "chosen": ["b"]}), "rows.parquet")
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and "Traceback" not in err
