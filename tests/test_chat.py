"""Chat templates: a prompt and its scored text are the template's own, or an error names why."""

import re
import warnings
from pathlib import Path

import pytest
import trl
from chat_templates import FINE, REFUSED
from tiny_tokenizers import byte_level

from realign.chat import ChatTemplate
from realign.messages import ChatError

SHIPPED = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
SYSTEM = ("system", "Be brief &\nkind.")
ASKED = ("user", "What is <it> & why?\nSay so.")
TURNS = (ASKED, ("assistant", "A cat & <mouse>."), ("user", "What colour?"))
THOUGHTS = (ASKED, ("assistant", "<think>\nhm & hm\n</think>\n\nA cat."), ("user", "Why?"))
DIALOGUES = ((ASKED,), (SYSTEM, ASKED), TURNS, (SYSTEM, *TURNS), THOUGHTS)
ANSWERS = ("red", " It is red & <green>.\n\nTruly 'so' ", "<think>\nlook\n</think>\n\nred")


refused = {}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level(["a few words"], 300)


def messages_of(dialogue, typed=False):
    return [
        {"role": role, "content": [{"type": "text", "text": text}] if typed else text}
        for role, text in dialogue
    ]


def truth(tokenizer, template, dialogue):
    """What transformers renders of plain strings, or of typed parts where only these work."""
    for typed in (False, True):
        try:
            text = tokenizer.apply_chat_template(
                messages_of(dialogue, typed), chat_template=template, tokenize=False
            )
        except Exception:
            continue
        if dialogue[-1][1].strip() in text and "'type'" not in text:
            return text
    return None


def rendered(tokenizer, template, dialogue, answer):
    """(prompt, scored text) as training takes them."""
    tokenizer.chat_template = template
    chat = ChatTemplate(tokenizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the chat template opens a generation")
        prompt = chat.prompt(messages_of(dialogue), 0)
        return prompt.text, chat.scored(prompt, answer)


def assert_own(tokenizer, template, dialogue, answer, prompt, scored):
    """Both together are the template's text, the response whole and once behind the prompt."""
    whole, text = truth(tokenizer, template, (*dialogue, ("assistant", answer))), answer.strip()
    ended = whole.rstrip() + "</s>" if whole.rstrip().endswith(text) else whole
    assert prompt + scored == ended
    if prompt.endswith("<think>\n"):
        text = text.removeprefix("<think>\n")
    assert scored.count(text) == 1
    # Tokenized, it stays the same: this tokenizer keeps every character.
    assert tokenizer.decode(tokenizer(prompt + scored)["input_ids"]) == ended


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_trls_templates(tokenizer, path):
    template, fine = path.read_text(), 0
    for dialogue in DIALOGUES:
        for answer in ANSWERS:
            own = truth(tokenizer, template, (*dialogue, ("assistant", answer)))
            try:
                found = rendered(tokenizer, template, dialogue, answer)
            except ChatError:  # some refuse a system role, or change a response's own thoughts
                assert own is None or "<think>" in answer
            else:
                assert_own(tokenizer, template, dialogue, answer, *found)
                fine += 1
    assert fine >= 6
    refused[path.stem] = len(DIALOGUES) * len(ANSWERS) - fine


@pytest.mark.parametrize("name", FINE)
def test_templates_of_many_habits(tokenizer, name):
    template = FINE[name]
    for dialogue in DIALOGUES:
        for answer in ANSWERS[:2]:
            if name == "microseconds":  # no two renderings agree
                prompt, scored = rendered(tokenizer, template, dialogue, answer)
                assert prompt[6:].startswith("<|") and scored == answer + "</s>"
                continue
            found = rendered(tokenizer, template, dialogue, answer)
            assert_own(tokenizer, template, dialogue, answer, *found)


@pytest.mark.parametrize("name", REFUSED)
def test_templates_that_are_refused(tokenizer, name):
    """Dialogues that they do not spoil are taken."""
    template, message = REFUSED[name]
    errors = []
    for dialogue in DIALOGUES:
        for answer in ANSWERS[:2]:
            try:
                found = rendered(tokenizer, template, dialogue, answer)
            except ChatError as error:
                errors.append(str(error))
            else:
                assert_own(tokenizer, template, dialogue, answer, *found)
    assert any(re.search(message, error) for error in errors), errors
