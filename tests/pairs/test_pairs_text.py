"""Masks and text filters of the pairs pipeline, against spans and values written by hand."""

import re
import sys
import types

import numpy as np
import pytest
from huggingface_hub import constants
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
from realign.pairs.masking.mask import CATEGORIES, MASK, Masked, mask_response, masked_from
from realign.pairs.masking.segments import find_segments

SENTENCE = "Two small red dogs sit near a big tree, behind the house."
DIGITS = "top left seven , top right two , bottom left zero , bottom right nine ."
NUMBERS = ["seven", "two", "zero", "nine"]


def rng(seed=0):
    return np.random.default_rng(seed)


def spans_of(marked):
    """(text, texts of its spans) for a text with brackets around its spans."""
    return re.sub(r"[][]", "", marked), re.findall(r"\[(.*?)\]", marked)


# --- the rules ---


@pytest.mark.parametrize(
    "marked",
    [
        "[A man] riding [a wave] [on top of] [a surfboard].",
        "The image features [a group] of [people] standing [around] [a dining table] with [several "
        "bowls] of [fruit] and [a bottle] of [wine].",
        "There are [two giraffes] in the image, [one] [on the left side] and the other [on the "
        "right].",
        "[A woman] [in] [a blue dress] is holding [an orange umbrella], walking [across] [the "
        "street].",
        "[A black and white cat] is lying [on] [the keyboard] of [a laptop computer].",
        "Yes, [the man] [on the left] is wearing [a red baseball cap], and he has [a tennis "
        "racket] [in] [his right hand].",
        "[A double-decker bus] is parked [in front of] [a two-story brick building] at [10:30].",
        "[In the background], there are [three parked cars] and [a traffic light] [above] [the "
        "crowded street].",
        "[An elderly couple] sits [on] [a park bench] [under] [a big green tree] overlooking [the "
        "ocean].",
        "[a desk] with [two computer monitors], [a keyboard], and [a wireless mouse] [next to] it",
        "[The woman] scolds [the dog]; [a pizza] sits [on] [a white plate], with [a fork] [to the "
        "left of] it.",
        "[top left] [seven] , [top right] [two] , [bottom left] [zero] , [bottom right] [nine] .",
    ],
)
def test_the_segments_of_captions_and_answers(marked):
    text, expected = spans_of(marked)
    spans = find_segments(text)
    assert [text[start:stop] for start, stop in spans] == expected
    assert spans == sorted(spans)


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
def test_segments_of_each_kind(categories, masked):
    result = mask_response(SENTENCE, categories, 0, rng())
    assert str(result) == masked
    assert result.fill(result.hidden) == SENTENCE


@pytest.mark.parametrize(
    ("kind", "marked"),
    [
        # Nouns that may also be colours, and colours that may also be nouns.
        ("objects", "[An orange] and [a banana]"),
        ("attributes", "an [orange] cat"),
        ("attributes", "The stop sign is [red] with [white] letters."),
        ("attributes", "its fur is [brown and white]"),
        # Verbs that are spelled like nouns.
        ("objects", "[The men] watch [a play]; [the watch] stops."),
        ("objects", "[a coffee shop] near [the park]"),
        ("objects", "[a skier] skis on [skis]"),
        ("attributes", "a [smiling] woman is smiling"),
        # Numbers in words, digits and phrases.
        ("numbers", "[a couple of] dogs, [12] cats, [3.5] m, [twenty-one]"),
        ("numbers", "the [2nd] bus on [42nd] Street"),
        ("numbers", "[12] cafés_x"),
        ("numbers", "a dog"),
        ("relations", "In this photo there are no dogs"),
        ("relations", "[on the top left corner of] the box, [at the bottom of] it"),
        ("relations", "the [top] shelf, his [back] pocket, the [left] hand, [on the left]"),
        ("relations", "the dog is [on the left], not [on top]"),
        ("objects", "the top [shelf] on [the wall]"),
        ("objects", "[un café noir]"),
        ("objects", "[日本] の 犬"),
        ("objects", "It is at a of no !"),
        ("objects", ""),
        ("objects", "[The TV] and the U-shaped [sofa]"),
    ],
)
def test_kinds_of_words_in_context(kind, marked):
    text, expected = spans_of(marked)
    masked = mask_response(text, (kind,), 0, rng())
    assert (list(masked.hidden) if masked else []) == expected


def test_as_many_segments_as_asked():
    picked = set()
    for segments in (1, 2, 3, 4, 9):
        for seed in range(20):
            masked = mask_response(DIGITS, ("numbers",), segments, rng(seed))
            assert len(masked.hidden) == min(segments, 4) == len(masked.pieces) - 1
            assert masked.fill(masked.hidden) == DIGITS
            assert str(masked).count(MASK) == len(masked.hidden)
            assert set(masked.hidden) <= set(NUMBERS)
            picked.add(masked.hidden)
    assert {(word,) for word in NUMBERS} <= picked  # drawn at random
    ones = "top left one , top right one , bottom left one , bottom right one ."
    assert masked.fill(("one", "one", "one", "one")) == ones


@pytest.mark.parametrize(
    ("share", "segments", "count"),
    [(0.1, 0, 1), (0.25, 0, 1), (0.5, 0, 2), (0.6, 1, 2), (0.7, 0, 3), (1.0, 1, 4), (0.1, 3, 3)],
)
def test_a_share_of_the_segments(share, segments, count):
    masked = mask_response(DIGITS, ("numbers",), segments, rng(), share=share)
    assert len(masked.hidden) == count
    assert mask_response(DIGITS, ("numbers",), segments, rng(), share=share) == masked


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mask_response("a", ("verbs",), 0, rng()), "categories contains verbs; the kinds"),
        (lambda: mask_response("a", CATEGORIES, -1, rng()), "segments is -1"),
        (lambda: mask_response("a", CATEGORIES, 0, rng(), share=0.0), "share is 0.0"),
        (lambda: mask_response("a", CATEGORIES, 0, rng(), share=1.5), "share is 1.5"),
    ],
)
def test_invalid_arguments_of_masks(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=60) | st.lists(st.sampled_from(SENTENCE.split())).map(" ".join))
def test_filling_a_mask_restores_the_text(text):
    masked = mask_response(text, CATEGORIES, 0, rng())
    if masked is not None:
        assert masked.fill(masked.hidden) == text
        assert all(hidden.strip() == hidden != "" for hidden in masked.hidden)
        assert all(piece.strip() for piece in masked.pieces[1:-1])  # adjacent segments are joined


# --- segments that a language model lists ---


@pytest.mark.parametrize(
    ("spans", "masked"),
    [
        (["Two", "near"], "[MASK] small red dogs sit [MASK] a big tree, behind the house."),
        (["house", "Two"], "[MASK] small red dogs sit near a big tree, behind the [MASK]."),
        (["two SMALL", '"big tree",'], "[MASK] red dogs sit near a [MASK], behind the house."),
        (["big  tree", "big", "Two"], "[MASK] small red dogs sit near a [MASK], behind the house."),
        (["dog", "us", "e", "", " . ", "cat", "hous"], None),  # parts of words, nothing
        (["small", "red"], "Two [MASK] dogs sit near a big tree, behind the house."),
        ([SENTENCE], "[MASK]."),
    ],
)
def test_listed_segments_are_found_as_whole_words(spans, masked):
    result = masked_from(SENTENCE, spans)
    assert (result and str(result)) == masked
    assert result is None or result.fill(result.hidden) == SENTENCE


def test_a_word_that_is_listed_again_is_its_next_place():
    text = "a dog and a dog near a cat's dog."
    assert str(masked_from(text, ["dog"])) == "a [MASK] and a dog near a cat's dog."
    assert str(masked_from(text, ["dog", "dog"])) == "a [MASK] and a [MASK] near a cat's dog."
    assert str(masked_from(text, ["near", "dog"])) == "a dog and a dog [MASK] a cat's [MASK]."
    assert str(masked_from(text, ["dog"] * 5)) == "a [MASK] and a [MASK] near a cat's [MASK]."
    assert str(masked_from(text, ["DOG", "a cat's"])) == "a [MASK] and a dog near [MASK] dog."


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40), st.lists(st.text(max_size=8), max_size=5))
def test_any_list_of_a_model_is_accepted(text, spans):
    assert masked_from(text, []) is None
    masked = masked_from(text, spans)
    if masked is not None:
        assert masked.fill(masked.hidden) == text and all(masked.hidden)


def test_the_masks_of_digit_captions():
    for i, scene in enumerate(make_scenes(15, biased=True, seed=3)):
        every = mask_response(scene.caption, ("numbers",), 0, rng())
        around = ("top left ", " , top right ", " , bottom left ", " , bottom right ", " .")
        assert every.pieces == around
        one = mask_response(scene.caption, ("numbers",), 1, rng(i))
        assert len(one.hidden) == 1 and one.hidden[0] in every.hidden
    with pytest.raises(ValueError):
        Masked(("a ", " near ", "."), ("dog", "a tree")).fill(("cat",))


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
def test_responses_that_count_as_the_same(a, b, same):
    assert same_response(a, b) is same and same_response(b, a) is same


@pytest.mark.parametrize(
    ("completion", "tau", "reason"),
    [
        ("A cat sat, down!", 2.0, "same as chosen"),
        ("The cat sat down", 2.0, "same as chosen"),
        ("a cat sat up", 0.75, "too similar"),  # 3 of 4 words match
        ("a cat sat up", 0.76, None),
        ("one two three four", 0.01, None),
        ("sat a cat down", 1.0, None),
        (" ... ", 1.0, "no text"),
    ],
)
def test_reasons_to_drop(completion, tau, reason):
    assert reason_to_drop("a cat sat down", completion, tau) == reason


class FakeSentences:
    """A fake of the package. It embeds a text as the counts of its letters a to c."""

    def __init__(self, name, *, trust_remote_code, model_kwargs, **_):
        if name == "none":
            raise OSError("none is no model\nmore")
        assert trust_remote_code is False and model_kwargs == {"use_safetensors": True}
        self.texts = []

    def encode(self, texts, *, convert_to_numpy, normalize_embeddings, **_):
        assert convert_to_numpy and normalize_embeddings
        self.texts += texts
        counts = np.array([[text.count(c) for c in "abc"] for text in texts], float)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def test_sentence_similarity_is_the_cosine(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = FakeSentences
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    measure = SentenceSimilarity("some/model")
    values = measure([("a", "b"), ("aab", "ab"), ("a", "a"), ("aab", "a")])
    assert values.dtype == np.float32
    assert values == pytest.approx([0, 3 / 10**0.5, 1, 2 / 5**0.5], abs=1e-6)
    assert measure._model.texts == ["a", "b", "aab", "ab"]  # each text is embedded once
    assert measure([]).shape == (0,)
    with pytest.raises(ValueError, match=r"from none \(none is no model\). Pass a folder or a Hub"):
        SentenceSimilarity("none")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'realign\[sentences\]'"):
        SentenceSimilarity("some/model")
