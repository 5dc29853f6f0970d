"""Time of every function that reads replies of servers and texts of data sets, on hostile texts.

Eight times the text may take 20 times the time. A quadratic function takes 64 times the time.
"""

import contextlib
import gc
import time

import numpy as np
import pytest

from realign.data.entries import entry_of
from realign.data.errors import Malformed
from realign.data.messages import split_at_tags, tags_with
from realign.evaluate.chair import Vocabulary
from realign.evaluate.yesno import RULES
from realign.pairs import prompts
from realign.pairs.filters.text import reason_to_drop
from realign.pairs.io.texts import problem_of
from realign.pairs.io.words import LONGEST, words_of
from realign.pairs.masking.mask import CATEGORIES, Masked, mask_response, masked_from
from realign.pairs.stats import changed_words, difference

VOCABULARY = Vocabulary()
GAP = Masked(("a ", " ", " a"), ("b", "c"))


def gaps_of(text):
    """A masked response with every second word of a text hidden."""
    words = text.split(" ")
    return Masked((*(f" {word} " for word in words[::2]), ""), tuple(words[::2]))


def row_of(text):
    prompt = [{"role": "user", "content": text}] * 2
    with contextlib.suppress(Malformed):
        entry_of({"prompt": prompt, "chosen": text, "rejected": "a"})


def parsed(text):
    prompts.parse_answer(text)
    prompts.parse_segments(text)
    prompts.parse_completion(text, GAP)
    prompts.parse_verdict(text)


def kept(text):
    prompts.keeps_pieces(gaps_of(text), text)


def sent(text):
    prompts.mask_chat(text)
    prompts.complete_chat(text, Masked((text, ""), ("a",)), [])


def masked_by_rules(text):
    mask_response(text, CATEGORIES, 0, np.random.default_rng(0))


def masked_by_a_model(text):
    masked_from(text, [*text.split(" "), *(text[:i] for i in range(1, 100))])


def compared(text):
    reason_to_drop(text, f"{text[::2]} x", 0.9)
    changed_words(difference(text, f"x {text[::2]}")[0])


def scored(text):
    VOCABULARY.objects(text)
    for rule in RULES.values():
        rule(text)


def checked(text):
    problem_of(text)
    split_at_tags(text)
    row_of(text)


MANY = 96_000  # characters of a text without a limit
CASES = [  # function, size, and texts that are repeated up to that size
    *(
        (parsed, LONGEST - 100, start, unit)
        for start in ("", "```", "<answer>", "[", "<think>", "{")
        for unit in (
            " ", "\n", "`", "[", "{", "(", "'", ",'", ',"a', ",'a'", "<", "<answer>", "</think>",
            '{"a":', "-", "1", "\u0301\u0316", "answer is yes ", "\ud800", "\x1b[", "\u4e00",
        )
    ),
    *((kept, 12_000, "", unit) for unit in ("a ", "a b ", "\u4e00 ", "1 2 ", "\ufdfa ", " -")),
    *((sent, MANY, "", unit) for unit in ("<", "<image>", "<|image_pad|>", "<img>a", "answer2>")),
    *(
        (masked_by_rules, MANY // 2, "", unit)
        for unit in ("red ", "the red ", "1.", ".1", "a-", "black and ", "running ", "a's", "\n")
    ),
    *(
        (masked_by_a_model, LONGEST - 100, "", unit)
        for unit in ("a ", "A ", "aa", "a'b", "ab cd ", "\u4e00", " \n", "[MASK]")
    ),
    *(
        (compared, MANY // 2, "", unit)
        for unit in ("a ", "a b c ", "a'b", "\u4e00", "\u0301\u0316", "\uff9e\u0300", "\ufdfa")
    ),
    *(
        (checked, MANY, "", unit)
        for unit in ("<", "<a", "<image", "<img>a", "<|image_pad|>", "(", " ", "[ ", "<|", "\ud800")
    ),
    *((checked, MANY, start, "<|image_pad|>") for start in ("<|vision_start|>",)),
    *((checked, MANY, start, "<IMG_CONTEXT>") for start in ("<img>",)),
    *((scored, MANY, "", unit) for unit in ("a'", "a-", "toilet ", ", ", "1,1 ", "no. ", "'s ")),
]  # fmt: skip


def seconds(call, text):
    start = time.process_time()  # other programs do not count
    call(text)
    return time.process_time() - start


@pytest.mark.parametrize("call", dict.fromkeys(case[0] for case in CASES))
def test_the_time_of_a_hostile_text_is_linear(call):
    gc.disable()
    try:
        for function, size, start, unit in CASES:
            if function is not call:
                continue
            short, long = (start + unit * (n // len(unit)) + "x" for n in (size // 8, size))
            limit = 20 * max(seconds(call, short), 0.01)
            if (taken := seconds(call, long)) >= limit:  # once more, against noise
                taken = min(taken, seconds(call, long))
            assert taken < limit, (start, unit)
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("image", "start"), [("a", "a"), ("a", "aa"), ("ab", "ba"), ("ab", "abab"), ("a", "ba")]
)
def test_image_tokens_of_a_model_take_linear_time(image, start):
    tags, run = tags_with(image, start, "c"), image * (MANY // len(image))
    for text in (run, start + run, (start + image) * (MANY // len(start + image))):
        assert seconds(lambda text: split_at_tags(text, tags), text) < 2


def test_a_numbered_tag_takes_linear_time():
    text = " ".join(f"<response{number or ''}>" for number in range(30_000))
    start = time.process_time()
    (sent,) = prompts.mask_chat(text).messages
    assert "<response30000>\n" in sent["content"] and time.process_time() - start < 1


@pytest.mark.parametrize("unit", ["a", "ab ", "\u4e00", "1", "a'"])
def test_a_thousand_segments_of_a_repeated_text_take_less_than_two_seconds(unit):
    text = (unit * LONGEST)[:LONGEST]
    start = time.process_time()
    masked_from(text, [text[:k] for k in range(1, 1000)])
    masked_from(text, [f"{text[:k]} x" for k in range(1, 1000)])
    assert time.process_time() - start < 2


def test_long_replies_are_refused_and_not_cut():
    text = "a dog " * (LONGEST // 6 + 1)
    assert prompts.parse_answer(text) == ""
    assert prompts.parse_segments(f'["{text}"]') == []
    assert prompts.parse_completion(text, GAP) is None
    assert prompts.parse_verdict("no " + text) is None
    assert masked_from(text, ["dog"]) is None
    # NFKC makes four words of this character.
    assert not prompts.keeps_pieces(Masked(("", ""), ("a " * LONGEST,)), "\ufdfa" * (LONGEST // 2))
    assert prompts.parse_answer(f"<think>{text * 9}</think>a dog") == "a dog"
    for reply in (" " * 2**24, "<think>" + "\n" * 2**24, "[" * 2**24, "```" + "\n" * 2**24 + "x"):
        assert seconds(parsed, reply) < 1


def test_deeply_nested_segments_are_read():
    for depth in (300, 900, 9000):
        nested = "[" * depth + '"a dog"' + "]" * depth
        assert prompts.parse_segments(nested) in (["a dog"], [])


def test_long_rows_of_accents_are_one_word():
    accents = "\u0301\u0316" * 100
    (word,) = words_of("e" + accents)
    assert len(word) > 200 and word[0] == "\u00e9" and words_of("e\u0301 a") == ["\u00e9", "a"]
    assert words_of("\uff76\uff9e") == ["\u30ac"]
