"""Option letters in answers to multiple-choice questions, extracted as VLMEvalKit does.

`letter` gives the letter that VLMEvalKit's function `can_infer` gives, without its judge. Only its
text for a failed request has no special meaning here. An answer without a letter is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_VERBOSE = re.compile(r"answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_TAIL = 4  # words at the end of an answer in which its letter is looked for


def letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The option that an answer chooses.

    1. Marks become spaces. If exactly one option's letter is a word of the answer, and it first
       occurs among the last four words, it is chosen.
    2. The letter after "answer is" is chosen, for A to D.
    3. If the answer is not longer than twice all options, and contains the text of exactly one
       option, that option is chosen. Upper and lower case are equal.

    Args:
        answer: answer of the model.
        options: letter -> text of the option. The texts may be empty if they are unknown.

    Returns:
        A letter of `options`, or None for a refusal or an answer without a choice.
    """
    if any(refusal in answer for refusal in _REFUSALS):
        return None
    words = answer.translate(_MARKS).split()
    named = [option for option in options if option in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - _TAIL:
        return named[0]
    if not named and "Z" in words:  # the letter for "no option"
        return None
    if (found := _VERBOSE.search(answer)) and found[1].upper() in options:
        return found[1].upper()
    if len(answer) > 2 * sum(map(len, options.values())):
        return None
    lower = answer.lower()
    contained = [option for option, text in options.items() if text.lower() in lower]
    return contained[0] if len(contained) == 1 else None
