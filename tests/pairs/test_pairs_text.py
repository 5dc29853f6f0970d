"""Masks and text filters of the pairs pipeline, against spans and numbers written down by hand."""

import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realign.digits.scenes import make_scenes
from realign.pairs.filters.text import (
    SentenceSimilarity,
    reason_to_drop,
    same_response,
    text_similarity,
)
from realign.pairs.io.words import words_of
from realign.pairs.masking.mask import CATEGORIES, MASK, mask_response, masked_from
from realign.pairs.masking.segments import find_segments

SENTENCE = "Two small red dogs sit near a big tree, behind the house."
DIGITS = "top left seven , top right two , bottom left zero , bottom right nine ."


def rng(seed=0):
    return np.random.default_rng(seed)


# --- the rules ---


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        (
            "A man riding a wave on top of a surfboard.",
            ["A man", "a wave", "on top of", "a surfboard"],
        ),
        (
            "The image features a group of people standing around a dining table with several "
            "bowls of fruit and a bottle of wine.",
            ["a group", "people", "around", "a dining table", "several bowls", "fruit", "a bottle"]
            + ["wine"],
        ),
        (
            "There are two giraffes in the image, one on the left side and the other on the right.",
            ["two giraffes", "one", "on the left side", "on the right"],
        ),
        (
            "A woman in a blue dress is holding an orange umbrella, walking across the street.",
            ["A woman", "in", "a blue dress", "an orange umbrella", "across", "the street"],
        ),
        (
            "A black and white cat is lying on the keyboard of a laptop computer.",
            ["A black and white cat", "on", "the keyboard", "a laptop computer"],
        ),
        (
            "Yes, the man on the left is wearing a red baseball cap, and he has a tennis racket in "
            "his right hand.",
            ["the man", "on the left", "a red baseball cap", "a tennis racket", "in"]
            + ["his right hand"],
        ),
        (
            "A double-decker bus is parked in front of a two-story brick building at 10:30.",
            ["A double-decker bus", "in front of", "a two-story brick building", "10:30"],
        ),
        (
            "In the background, there are three parked cars and a traffic light above the crowded "
            "street.",
            ["In the background", "three parked cars", "a traffic light", "above"]
            + ["the crowded street"],
        ),
        (
            "An elderly couple sits on a park bench under a big green tree overlooking the ocean.",
            ["An elderly couple", "on", "a park bench", "under", "a big green tree", "the ocean"],
        ),
        (
            "a desk with two computer monitors, a keyboard, and a wireless mouse next to it",
            ["a desk", "two computer monitors", "a keyboard", "a wireless mouse", "next to"],
        ),
        (
            "The woman scolds the dog; a pizza sits on a white plate, with a fork to the left of "
            "it.",
            ["The woman", "the dog", "a pizza", "on", "a white plate", "a fork", "to the left of"],
        ),
        (
            DIGITS,
            ["top left", "seven", "top right", "two", "bottom left", "zero"]
            + ["bottom right", "nine"],
        ),
    ],
)
def test_the_segments_of_captions_and_answers(text, segments):
    found = find_segments(text)
    assert [text[start:stop] for start, stop in found] == segments
    assert found == sorted(found)


@pytest.mark.parametrize(
    ("categories", "masked"),
    [
        (("numbers",), "[MASK] small red dogs sit near a big tree, behind the house."),
        (("attributes",), "Two [MASK] dogs sit near a [MASK] tree, behind the house."),
        (("relations",), "Two small red dogs sit [MASK] a big tree, [MASK] the house."),
        (("objects",), "Two small red [MASK] sit near a big [MASK], behind [MASK]."),
        (("attributes", "objects"), "Two [MASK] sit near [MASK], behind [MASK]."),
        (CATEGORIES, "[MASK] sit [MASK], [MASK]."),
    ],
)
def test_what_is_hidden_of_each_kind(categories, masked):
    found = mask_response(SENTENCE, categories, 0, rng())
    assert str(found) == masked
    assert found.fill(found.hidden) == SENTENCE


@pytest.mark.parametrize(
    ("text", "kind", "hidden"),
    [
        # A thing for all that its word may say a colour, and the other way round.
        ("An orange and a banana", "objects", ["An orange", "a banana"]),
        ("an orange cat", "attributes", ["orange"]),
        ("The stop sign is red with white letters.", "attributes", ["red", "white"]),
        ("its fur is brown and white", "attributes", ["brown and white"]),
        # Verbs are no things, though a word of the same letters is.
        ("The men watch a play; the watch stops.", "objects", ["The men", "a play", "the watch"]),
        ("a coffee shop near the park", "objects", ["a coffee shop", "the park"]),
        ("a skier skis on skis", "objects", ["a skier", "skis"]),
        ("a smiling woman is smiling", "attributes", ["smiling"]),
        # Numbers in words, digits and phrases.
        ("a couple of dogs, 12 cats, 3.5 m, twenty-one", "numbers")
        + (["a couple of", "12", "3.5", "twenty-one"],),
        ("the 2nd bus on 42nd Street", "numbers", ["2nd", "42nd"]),
        ("In this picture there are no dogs", "relations", None),
        ("on the top left corner of the box, at the bottom of it", "relations")
        + (["on the top left corner of", "at the bottom of"],),
        ("the top shelf, his back pocket, the left hand, on the left", "relations")
        + (["top", "back", "left", "on the left"],),
        ("the top shelf on the wall", "objects", ["shelf", "the wall"]),
        ("the dog is on the left, not on top", "relations", ["on the left", "on top"]),
        ("12 cafés_x", "numbers", ["12"]),
        ("un café noir", "objects", ["un café noir"]),
        ("日本 の 犬", "objects", ["日本"]),
        ("It is at a of no !", "objects", None),
        ("a dog", "numbers", None),
        ("", "objects", None),
        ("The TV and the U-shaped sofa", "objects", ["The TV", "sofa"]),
    ],
)
def test_kinds_of_words_where_they_stand(text, kind, hidden):
    found = mask_response(text, (kind,), 0, rng())
    assert (found and list(found.hidden)) == hidden


def test_as_many_segments_as_asked():
    picked = set()
    for segments in (1, 2, 3, 4, 9):
        for seed in range(20):
            masked = mask_response(DIGITS, ("numbers",), segments, rng(seed))
            assert len(masked.hidden) == min(segments, 4)
            assert len(masked.pieces) == len(masked.hidden) + 1
            assert masked.fill(masked.hidden) == DIGITS
            assert str(masked).count(MASK) == len(masked.hidden)
            assert set(masked.hidden) <= {"seven", "two", "zero", "nine"}
            picked.add(masked.hidden)
    assert {(word,) for word in ("seven", "two", "zero", "nine")} <= picked  # drawn at random
    with pytest.raises(ValueError):
        masked.fill(("one",))
    assert masked.fill(("one", "one", "one", "one")) == (
        "top left one , top right one , bottom left one , bottom right one ."
    )


@pytest.mark.parametrize(
    ("share", "segments", "count"),
    [(0.1, 0, 1), (0.25, 0, 1), (0.5, 0, 2), (0.6, 1, 2), (0.7, 0, 3), (1.0, 1, 4), (0.1, 3, 3)],
)
def test_a_share_of_the_segments(share, segments, count):
    masked = mask_response(DIGITS, ("numbers",), segments, rng(), share=share)
    assert len(masked.hidden) == count
    same = mask_response(DIGITS, ("numbers",), segments, rng(), share=share)
    assert same == masked


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mask_response("a", ("verbs",), 0, rng()), "categories names verbs; the kinds"),
        (lambda: mask_response("a", CATEGORIES, -1, rng()), "segments is -1"),
        (lambda: mask_response("a", CATEGORIES, 0, rng(), share=0.0), "share is 0.0"),
        (lambda: mask_response("a", CATEGORIES, 0, rng(), share=1.5), "share is 1.5"),
    ],
)
def test_what_a_mask_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=60) | st.lists(st.sampled_from(SENTENCE.split())).map(" ".join))
def test_any_text_is_put_together_again(text):
    masked = mask_response(text, CATEGORIES, 0, rng())
    if masked is not None:
        assert masked.fill(masked.hidden) == text
        assert all(hidden.strip() == hidden != "" for hidden in masked.hidden)
        assert all(piece.strip() for piece in masked.pieces[1:-1])  # neighbours are joined


# --- segments that a language model lists ---


@pytest.mark.parametrize(
    ("spans", "masked"),
    [
        (["Two", "near"], "[MASK] small red dogs sit [MASK] a big tree, behind the house."),
        (["house", "Two"], "[MASK] small red dogs sit near a big tree, behind the [MASK]."),
        (["two SMALL", '"big tree",'], "[MASK] red dogs sit near a [MASK], behind the house."),
        (["big  tree", "big", "Two"], "[MASK] small red dogs sit near a [MASK], behind the house."),
        (["dog", "us", "e", "", " . "], None),  # parts of words, nothing
        (["cat", "hous"], None),
        (["small", "red"], "Two [MASK] dogs sit near a big tree, behind the house."),
        ([SENTENCE], "[MASK]."),
    ],
)  # fmt: skip
def test_listed_segments_are_found_as_whole_words(spans, masked):
    found = masked_from(SENTENCE, spans)
    assert (found and str(found)) == masked
    assert found is None or found.fill(found.hidden) == SENTENCE


def test_a_word_that_is_listed_again_is_its_next_place():
    text = "a dog and a dog near a cat's dog."
    assert str(masked_from(text, ["dog"])) == "a [MASK] and a dog near a cat's dog."
    assert str(masked_from(text, ["dog", "dog"])) == "a [MASK] and a [MASK] near a cat's dog."
    assert str(masked_from(text, ["near", "dog"])) == "a dog and a dog [MASK] a cat's [MASK]."
    assert str(masked_from(text, ["dog"] * 5)) == "a [MASK] and a [MASK] near a cat's [MASK]."
    assert str(masked_from(text, ["DOG", "a cat's"])) == "a [MASK] and a dog near [MASK] dog."


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40), st.lists(st.text(max_size=8), max_size=5))
def test_whatever_a_model_lists(text, spans):
    masked = masked_from(text, spans)
    if masked is not None:
        assert masked.fill(masked.hidden) == text and all(masked.hidden)


# --- filters ---


def test_words_and_similarity_by_hand():
    assert words_of("A cat, TWO-legged!") == ["a", "cat", "two", "legged"]
    assert words_of("ﬁve cafe\u0301s STRASSE straße") == ["five", "cafés", "strasse", "strasse"]
    assert words_of("नमस्ते दुनिया") == ["नमस्ते", "दुनिया"]
    assert text_similarity("a b c d", "A, b! c e") == 2 * 3 / 8
    assert text_similarity("a b", "c d") == 0
    assert text_similarity("a b c", "a b") == 2 * 2 / 5
    assert text_similarity("same words", "Same words.") == 1


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("The 2 dogs.", "two dogs", True),
        ("A cat near an apple", "the cat near apple!", True),
        ("two dogs", "three dogs", False),
        ("cat dog", "dog cat", False),
        ("12 cats", "twelve cats", True),
        ("13 cats", "thirteen cats", False),
    ],
)
def test_what_counts_as_the_same(a, b, same):
    assert same_response(a, b) is same and same_response(b, a) is same


@pytest.mark.parametrize(
    ("completion", "tau", "reason"),
    [
        ("A cat sat, down!", 2.0, "same as chosen"),
        ("The cat sat down", 2.0, "same as chosen"),
        ("a cat sat up", 0.75, "too similar"),  # 3 of 4 words match
        ("a cat sat up", 0.76, None),
        ("a cat sat up", 1.0, None),
        ("one two three four", 0.01, None),
        ("sat a cat down", 1.0, None),
        (" ... ", 1.0, "no text"),
    ],
)
def test_what_is_dropped(completion, tau, reason):
    assert reason_to_drop("a cat sat down", completion, tau) == reason


class FakeSentences:
    """The part of the package that is used; embeds a text as the counts of its letters a to c."""

    def __init__(self, name, *, trust_remote_code, model_kwargs):
        if name == "none":
            raise OSError("none is no model\nmore")
        assert trust_remote_code is False and model_kwargs == {"use_safetensors": True}
        self.texts = []

    def encode(self, texts, *, batch_size, convert_to_numpy, normalize_embeddings, **_):
        assert convert_to_numpy and normalize_embeddings and batch_size == 64
        self.texts += texts
        counts = np.array([[text.count(c) for c in "abc"] for text in texts], float)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def test_sentence_similarity_is_the_cosine(monkeypatch):
    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = FakeSentences
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    measure = SentenceSimilarity("some/model")
    found = measure([("a", "b"), ("aab", "ab"), ("a", "a"), ("aab", "a")])
    assert found.dtype == np.float32
    assert found == pytest.approx([0, 3 / 10**0.5, 1, 2 / 5**0.5], abs=1e-6)
    assert measure._model.texts == ["a", "b", "aab", "ab"]  # each once
    assert measure([]).shape == (0,)
    with pytest.raises(ValueError, match=r"from none \(none is no model\). Pass a folder or a hub"):
        SentenceSimilarity("none")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'realign\[sentences\]'"):
        SentenceSimilarity("some/model")


def test_the_masks_of_digit_captions():
    pieces = "top left [MASK] , top right [MASK] , bottom left [MASK] , bottom right [MASK] ."
    for scene in make_scenes(50, biased=True, seed=3):
        assert str(mask_response(scene.caption, ("numbers",), 0, rng())) == pieces
