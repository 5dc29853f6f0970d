"""Time of every function that reads replies of servers and texts of data sets, on hostile texts.

The time of twice the text must be less than three times the time.
"""

import time

import numpy as np
import pytest

from realign.data.entries import entry_of
from realign.data.errors import Malformed
from realign.data.messages import split_at_tags
from realign.evaluate.chair import Vocabulary
from realign.evaluate.yesno import RULES
from realign.pairs import prompts
from realign.pairs.filters.text import reason_to_drop
from realign.pairs.io.texts import problem_of
from realign.pairs.io.words import LONGEST, words_of
from realign.pairs.masking.mask import CATEGORIES, Masked, mask_response, masked_from
from realign.pairs.stats import changed_words, difference

UNITS = (
    " ", "\n", "`", "[", "(", "'", "\"", ",'", ",\"a", "<", "<answer>", "</think>", "[MASK]",
    "a ", "a\n", "a-", "1.", "1,1 ", "red ", "the a ", "no. ", "\u0301\u0316", "\uff9e\u0300",
    "\ufdfa", "\u4e00", "{\"a\":", "\ud800", "\x1b[", "<img>a", "<|image_pad|>", "a'b",
    "answer is yes ", "ab cd ", "<answer2> ",
)  # fmt: skip
FRAMES = (("", ""), ("```", "x"), ("<answer>", "x"), ("[", "a"), ("<|vision_start|>", "1a"))
VOCABULARY = Vocabulary()
GAP = Masked(("a ", " ", " a"), ("b", "c"))


def gaps_of(text):
    """A masked response with every second word of a text hidden."""
    words = text.split(" ")
    return Masked((*(f" {word} " for word in words[::2]), ""), tuple(words[::2]))


def row_of(text):
    try:
        entry_of({"prompt": [{"role": "user", "content": text}] * 2, "chosen": text, "rejected": "a"})
    except Malformed:
        pass


CALLS = {
    "parse_answer": prompts.parse_answer,
    "parse_segments": prompts.parse_segments,
    "parse_completion": lambda text: prompts.parse_completion(text, GAP),
    "parse_verdict": prompts.parse_verdict,
    "keeps_pieces": lambda text: prompts.keeps_pieces(gaps_of(text), f"{text} {text}"),
    "mask_chat": prompts.mask_chat,
    "complete_chat": lambda text: prompts.complete_chat(text, Masked((text, ""), ("a",)), []),
    "mask_response": lambda text: mask_response(text, CATEGORIES, 0, np.random.default_rng(0)),
    "masked_from": lambda text: masked_from(text, [text[:i] for i in range(1, 200)]),
    "masked_from words": lambda text: masked_from(text, text.split(" ")),
    "words_of": words_of,
    "reason_to_drop": lambda text: reason_to_drop(text, f"{text[::2]} x", 0.9),
    "difference": lambda text: changed_words(difference(text, f"x {text[::2]}")[0]),
    "problem_of": problem_of,
    "split_at_tags": split_at_tags,
    "entry_of": row_of,
    "objects": VOCABULARY.objects,
    "yes or no": lambda text: [rule(text) for rule in RULES.values()],
}


def seconds(call, text):
    times = []
    for _ in range(2):
        start = time.perf_counter()
        call(text)
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.parametrize("name", CALLS)
def test_the_time_of_a_hostile_text_is_linear(name):
    call = CALLS[name]
    for unit in UNITS:
        for before, after in FRAMES:
            size, earlier = 2500, 0.0
            while size <= 40_000:
                taken = seconds(call, before + unit * (size // len(unit)) + after)
                assert taken < 0.05 or not earlier or taken < 3 * earlier, (unit, before, size)
                if taken > 0.2:
                    break
                size, earlier = 2 * size, taken
