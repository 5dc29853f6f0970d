"""Pairs: retrieval, masking, infill, filters, the pipeline, each against an independent truth."""

import importlib.util
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_refill import slow_infill
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from realign.digits.scenes import CAPTION_PROMPT, make_scenes
from realign.pairs import index
from realign.pairs.__main__ import main
from realign.pairs.embed import embed_images
from realign.pairs.filters import reason_to_drop, text_similarity, words_of
from realign.pairs.mask import CATEGORIES, MASK, Masked, mask_response
from realign.pairs.pipeline import PairsConfig, build_pairs, digit_sources
from realign.records import Record, RecordError, StoredImage, read_pairs, write_pairs

PROMPT = [{"role": "user", "content": CAPTION_PROMPT}]
SENTENCE = "Two small red dogs sit near a big tree, behind the house."


@pytest.fixture(params=["faiss", "torch"])
def search(request, monkeypatch):
    """Neighbour search with FAISS and without it."""
    found = importlib.util.find_spec
    if request.param == "faiss" and not found("faiss"):
        pytest.skip("FAISS is not installed")
    if request.param == "torch":
        hidden = lambda name: None if name == "faiss" else found(name)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", hidden)
    return request.param


def _unit(values) -> np.ndarray:
    values = np.asarray(values, dtype=np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@pytest.mark.parametrize(("count", "k"), [(50, 1), (50, 7), (50, 80), (3, 2), (1, 3)])
def test_neighbours_are_those_of_brute_force(search, count, k):
    rng = np.random.default_rng(count)
    vectors = _unit(rng.normal(size=(count, 6)))
    for copy in range(10, 40 if count == 50 else 0, 4):  # eight copies of image 3
        vectors[copy] = vectors[3]
    places, similarities = index.neighbours(vectors, k, ceiling=0.999)
    assert places.shape == similarities.shape == (count, k)
    cosine = vectors.astype(float) @ vectors.astype(float).T
    allowed = cosine < 0.999
    np.fill_diagonal(allowed, False)
    for i in range(count):
        best = np.sort(cosine[i][allowed[i]])[::-1][:k]
        there = len(best)
        np.testing.assert_allclose(similarities[i, :there], best, atol=1e-6)
        np.testing.assert_allclose(cosine[i, places[i, :there]], best, atol=1e-6)
        assert allowed[i, places[i, :there]].all()  # neither itself nor a duplicate
        assert len(set(places[i, :there])) == there
        assert (places[i, there:] == -1).all() and (similarities[i, there:] == -np.inf).all()


def test_nothing_is_left_when_all_are_duplicates(search):
    places, similarities = index.neighbours(np.tile(_unit([[1, 2]]), (5, 1)), 3, ceiling=0.999)
    assert (places == -1).all() and (similarities == -np.inf).all()


def test_ties_go_to_the_lower_index(search):
    # Corners of a cube have exact cosines -1, -1/2, 0, 1/2, 1 and many ties.
    corners = np.array(np.meshgrid(*[[-0.5, 0.5]] * 4)).reshape(4, -1).T.astype(np.float32)
    for k in (1, 3, 5, 15):
        places, _ = index.neighbours(corners, k, ceiling=0.999)
        cosine = corners @ corners.T
        np.fill_diagonal(cosine, -np.inf)
        expected = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
        assert np.array_equal(places, expected)


def test_the_backend_says_what_searches(search):
    assert index.backend().startswith("FAISS" if search == "faiss" else "exact search in torch")


def test_embeddings_are_unit_vectors_of_the_tower(forest_model, processor, scenes):
    pictures = [scene.image for scene in scenes[:10]]

    def embedded(images, batch_size):
        return embed_images(
            images,
            name=None,
            model=forest_model,
            processor=processor,
            batch_size=batch_size,
            progress=False,
        )

    vectors = embedded(pictures, 4)
    assert vectors.dtype == np.float32 and len(vectors) == 10
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(vectors, embedded(pictures, 10), atol=1e-5)
    twice = embedded([pictures[0], pictures[1], pictures[0]], 3)
    assert twice[0] @ twice[2] == pytest.approx(1, abs=1e-6) and twice[0] @ twice[1] < 0.999


@pytest.mark.parametrize(
    ("categories", "masked"),
    [
        (("numbers",), "[MASK] small red dogs sit near a big tree, behind the house."),
        (("attributes",), "Two [MASK] dogs sit near a [MASK] tree, behind the house."),
        (("relations",), "Two small red dogs sit [MASK] a big tree, [MASK] the house."),
        (("objects",), "Two small red [MASK] near a big [MASK], behind the [MASK]."),
        (CATEGORIES, "[MASK] a [MASK], [MASK] the [MASK]."),
    ],
)
def test_what_is_hidden(categories, masked):
    found = mask_response(SENTENCE, categories, 0, np.random.default_rng(0))
    assert str(found) == masked
    assert found.fill(found.hidden) == SENTENCE


def test_digits_and_letters_of_any_script_are_words():
    rng = np.random.default_rng(0)
    assert str(mask_response("12 cafés_x", ("numbers",), 0, rng)) == "[MASK] cafés_x"
    assert str(mask_response("un café noir", ("objects",), 0, rng)) == "un [MASK]"
    assert mask_response("It is at a of no !", CATEGORIES, 0, rng) is None
    assert mask_response("a dog", ("numbers",), 0, rng) is None
    assert mask_response("", CATEGORIES, 0, rng) is None


def test_as_many_segments_as_asked():
    rng = np.random.default_rng(0)
    caption = "top left seven , top right two , bottom left zero , bottom right nine ."
    picked = set()
    for segments in (1, 2, 3, 4, 9):
        for _ in range(20):
            masked = mask_response(caption, ("numbers",), segments, rng)
            assert len(masked.hidden) == min(segments, 4)
            assert len(masked.pieces) == len(masked.hidden) + 1
            assert masked.fill(masked.hidden) == caption
            assert str(masked).count(MASK) == len(masked.hidden)
            assert set(masked.hidden) <= {"seven", "two", "zero", "nine"}
            picked.add(masked.hidden)
    assert {(word,) for word in ("seven", "two", "zero", "nine")} <= picked  # drawn at random
    assert masked.fill(("one", "one", "one", "one")) == (
        "top left one , top right one , bottom left one , bottom right one ."
    )


def test_words_and_similarity_by_hand():
    assert words_of("A cat, TWO-legged!") == ["a", "cat", "two", "legged"]
    assert text_similarity("a b c d", "A, b! c e") == 2 * 3 / 8
    assert text_similarity("a b", "c d") == 0
    assert text_similarity("a b c", "a b") == 2 * 2 / 5
    assert text_similarity("same words", "Same words.") == 1


@pytest.mark.parametrize(
    ("completion", "tau", "reason"),
    [
        ("A cat sat, down!", 2.0, "same as chosen"),
        ("a cat sat up", 0.75, "too similar"),  # 3 of 4 words match
        ("a cat sat up", 0.76, None),
        ("a cat sat up", 1.0, None),
        ("one two three four", 0.01, None),
        ("sat a cat down", 1.0, None),
    ],
)
def test_what_is_dropped(completion, tau, reason):
    assert reason_to_drop("a cat sat down", completion, tau) == reason


def test_the_pairs_of_a_configuration_are_these_bytes(tmp_path, pairs_config, pairs_file):
    again = replace(pairs_config, output=str(tmp_path / "again.parquet"))
    build_pairs(again)
    assert (tmp_path / "again.parquet").read_bytes() == pairs_file.read_bytes()


def test_what_a_pair_holds(pairs_config, pairs_file, vlm, processor, forest_model):
    sources = {record.name: record for record in digit_sources(pairs_config)}
    order = list(sources)
    pictures = [record.images[0].open("") for record in sources.values()]
    vectors = embed_images(
        pictures, name=None, model=forest_model, processor=processor, progress=False
    )
    cosine = vectors @ vectors.T
    np.fill_diagonal(cosine, -np.inf)
    cosine[cosine >= pairs_config.ceiling] = -np.inf
    records = read_pairs(pairs_file)
    assert 16 <= len(records) <= 24 and [r.name for r in records] == sorted(r.name for r in records)
    for record in records[::3]:
        source, facts = sources[record.name], record.provenance
        assert (record.prompt, record.chosen) == (source.prompt, source.chosen)
        assert record.images == source.images
        # The visual negative is the neighbour of that rank ...
        ranked = np.argsort(-cosine[order.index(record.name)], kind="stable")
        nearest = [order[i] for i in ranked]
        neighbour = sources[nearest[facts["neighbour_rank"]]]
        assert record.retrieved_images == neighbour.images != record.images
        similarity = cosine[order.index(record.name), order.index(neighbour.name)]
        assert facts["similarity"] == pytest.approx(float(similarity), abs=1e-5)
        # ... and the image that the rejected response was completed on; nearer ones were dropped.
        pieces = tuple(facts["masked"].split(MASK))
        masked = Masked(pieces, ("",) * (len(pieces) - 1))
        assert len(pieces) == 2  # one segment
        for rank in range(facts["neighbour_rank"] + 1):
            picture = sources[nearest[rank]].images[0].open("")
            completion = slow_infill(vlm, processor, picture, masked, 8).text
            accepted = rank == facts["neighbour_rank"]
            assert (completion == record.rejected) == accepted
            assert (words_of(completion) == words_of(record.chosen)) != accepted
        assert facts["text_similarity"] == text_similarity(record.chosen, record.rejected)
        assert (facts["embed_model"], facts["refill_model"], facts["seed"]) == ("digits",) * 2 + (
            0,
        )


def _sources(folder, records, name="sources.parquet") -> str:
    write_pairs(folder / name, records)
    return str(folder / name)


@pytest.fixture
def own(scenes) -> list[Record]:
    """A user's own records: six scenes with captions."""
    return [
        Record(f"own-{i}", tuple(PROMPT), s.caption, "", (StoredImage.from_pil(s.image),))
        for i, s in enumerate(scenes[:6])
    ]


def test_records_of_ones_own(tmp_path, own, capsys):
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


def test_a_neighbour_has_as_many_images(tmp_path, own):
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


def _no_image(own, folder):
    return _sources(folder, [*own, replace(own[0], name="bare", images=())])


def _no_column(own, folder):
    pq.write_table(pa.table({"prompt": ["a"], "chosen": ["b"]}), folder / "rows.parquet")
    return str(folder / "rows.parquet")


def _unreadable(own, folder):
    return _sources(folder, [*own, replace(own[0], name="torn", images=(StoredImage(b"x"),))])


def _literal(own, folder):
    messages = ({"role": "user", "content": "<image> name it"},)
    return _sources(folder, [*own, replace(own[0], name="odd", prompt=messages)])


def _nothing_to_mask(own, folder):
    return _sources(folder, [replace(record, chosen="yes") for record in own])


def _alone(own, folder):
    return _sources(folder, own[:1])


def _missing(own, folder):
    return str(folder / "none.parquet")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_no_image, "record 'bare': it has no image"),
        (_no_column, "lacks the column(s) images"),
        (_unreadable, "record 'torn': its image 1 embedded bytes cannot be read"),
        (_literal, "record 'odd': its prompt places 2 image(s)"),
        (_nothing_to_mask, "no pair passed the filters ({'nothing to mask': 6}). Raise --k"),
        (_alone, "no pair passed the filters ({'no neighbour': 1})"),
        (_missing, "there is nothing at"),
    ],
)
def test_the_command_reports_unusable_records_in_one_error(tmp_path, own, data, message, capsys):
    out = tmp_path / "out.parquet"
    path = data(own, tmp_path)
    assert main(["--data", path, "--output", str(out), "--quiet", "--mask", "numbers"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "0"], "k is 0"),
        (["--mask", "verbs"], "mask names verbs"),
        (["--model", "x"], "--model is given without --data"),
        (["--data", "x", "--model", "no/such/model-folder"], "no/such/model-folder"),
    ],
)
def test_the_command_reports_bad_settings_in_one_error(arguments, message, capsys):
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and "Traceback" not in err


def test_build_pairs_raises_what_the_command_reports(tmp_path, own):
    config = PairsConfig(output=str(tmp_path / "out.parquet"), mask="numbers", quiet=True)
    with pytest.raises(RecordError, match="'bare'"):
        build_pairs(replace(config, data=_no_image(own, tmp_path)))
    with pytest.raises(ValueError, match="nothing to mask"):
        build_pairs(replace(config, data=_nothing_to_mask(own, tmp_path)))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_embeddings_of_a_named_encoder(kind, tmp_path, processor, forest_model):
    """A tiny CLIP or SigLIP folder by name: unit vectors of its own image features."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision = {**small, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    text = {**small, "num_attention_heads": 2, "vocab_size": 20}
    classes = {"clip": (CLIPConfig, CLIPModel), "siglip": (SiglipConfig, SiglipModel)}[kind]
    config = classes[0](vision_config=vision, text_config=text)
    encoder = classes[1](config).eval()
    encoder.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)  # any image processor of the right size serves
    images = [scene.image for scene in make_scenes(5, biased=False)]
    found = embed_images(
        images,
        name=str(tmp_path),
        model=forest_model,
        processor=processor,
        batch_size=2,
        progress=False,
    )
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        pooled = encoder.vision_model(pixel_values=pixels).pooler_output
        truth = encoder.visual_projection(pooled) if kind == "clip" else pooled
    truth = torch.nn.functional.normalize(truth, dim=-1).numpy()
    assert np.abs(found - truth).max() < 1e-6
    own = embed_images(images, name=None, model=forest_model, processor=processor, progress=False)
    assert own.shape == (5, 128) and np.allclose(np.linalg.norm(own, axis=1), 1, atol=1e-6)
