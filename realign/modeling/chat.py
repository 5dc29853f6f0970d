"""Chat templates: rendering of a prompt and of the scored text of a response.

Training, pairs and evaluation render here. Messages are also rendered with marks instead of texts,
which shows the text that the template writes around them. A template that drops, changes or repeats
a text is therefore always an error.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from os.path import commonprefix
from typing import Any

from realign.data.errors import Malformed, short_error, short_repr
from realign.data.messages import (
    TAGS,
    VIDEO_TAGS,
    place_images,
    tags_with,
    text_part,
    texts_of,
)

_ANSWER = "KqAnswerVx"  # mixed case, so that a template's `upper` or `lower` shows
_MARK = re.compile(r"Kq(\d+|Answer)Vx")
_NOW = re.compile(r"strftime_now\(\s*(['\"])([^'\"\n]{0,200})\1\s*\)")
_STARTS = ("boi_token", "image_start_token", "start_image_token", "vision_start_token")
_ENDS = ("eoi_token", "image_end_token", "end_image_token", "vision_end_token")
_FRAMES = {  # text around an image token, where the template writes it and not the processor
    "<|image_pad|>": ("<|vision_start|>", "<|vision_end|>"),
    "<|image|>": ("<|begin_of_image|>", "<|end_of_image|>"),
}
_NO_THOUGHTS = re.compile(r"<think>\s*</think>\s*$")
_TURNS = ("user", "assistant")
_FIX_TEMPLATE = "Use the chat template that the model was trained with, or one without that step."


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt.

    Attributes:
        text: rendered text before the scored text, the same for every response.
        messages: the messages in typed parts, with every image in its place.
        lead: scored text before a response.
        close: scored text after a response.
    """

    text: str
    messages: tuple[dict[str, Any], ...]
    lead: str
    close: str


class ChatTemplate:
    """The chat template of a processor, or of a tokenizer for prompts without images.

    Args:
        processor: the processor, or a tokenizer.
        ends: ids of the tokens at which the model stops (`Layout.ends`). Without them, the
            tokenizer's eos_token ends a response that the template leaves open.
    """

    def __init__(self, processor, ends: Sequence[int] = ()) -> None:
        self._processor = processor
        self.tokenizer: Any = getattr(processor, "tokenizer", processor)
        self._image: str | None = getattr(processor, "image_token", None)
        tokenizer, image = self.tokenizer, self._image
        named = [_first(processor, tokenizer, names) for names in (_STARTS, _ENDS)]
        self.tags = tags_with(image, *named) if image else TAGS
        added = tokenizer.added_tokens_decoder.values()
        start, end = _FRAMES.get(image or "", ("", ""))
        framed = {start, end} <= {token.content for token in added}
        self._image_text = f"{start}{image}{end}" if framed else image
        special = {token.content for token in added if token.special}
        special |= {*tokenizer.all_special_tokens, *filter(None, [image, *named])}
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._options = {"tokenize": False} | _frozen_date(getattr(processor, "chat_template", ""))
        self._strings: dict[tuple[str, bool], bool] = {}  # by role, and whether it holds images
        self._frames: dict[tuple, list[str]] = {}
        known = [end for end in ends if end < len(tokenizer)]
        self._ends: list[str] = tokenizer.convert_ids_to_tokens(known)
        self._warned: set[str] = set()

    def prompt(self, messages: Sequence[Mapping[str, Any]], images: int) -> Prompt:
        """Render prompt messages for a response.

        Some templates begin a response with other text than their generation prompt. The prompt
        then ends where the template writes the response, and a warning reports this once.

        Args:
            messages: messages with a role, and content as text or typed parts; see `place_images`.
            images: number of images in the prompt.

        Raises:
            Malformed: when a text holds a special token, messages place a different number of
                images, or the template rejects, drops or changes a message.
        """
        typed = place_images(messages, images, self.tags)
        for text in (text for message in typed for text in (message["role"], *texts_of(message))):
            self._refuse_special(text, "its prompt")
        opened = self._render(typed, add_generation_prompt=True)
        answered = self._render([*typed, _answer(_ANSWER)])
        if not _follows(answered, self._expected(typed)):
            raise Malformed("the chat template changes the text of its prompt.", _FIX_TEMPLATE)
        before, _, close = answered.partition(_ANSWER)
        text, lead = before, ""
        if before.startswith(opened):
            text, lead = opened, before[len(opened) :]
        else:
            shared = len(commonprefix([opened, before]))
            self._warn(
                f"the chat template's generation prompt ends with {opened[shared:]!r}, but "
                f"responses in it follow {before[shared:]!r}. Prompts end with the latter in "
                "training and evaluation."
            )
        if (placed := text.count(self._image) if self._image else 0) != images:
            raise Malformed(
                f"its prompt places {placed} image(s) ({self._image!r}) for {images} given.",
                "Use a chat template that writes an image token for each image of a user message.",
            )
        return Prompt(text, tuple(typed), lead, close)

    def scored(self, prompt: Prompt, answer: str, name: str = "response") -> str:
        """The scored text of a response: the text that the template writes after the prompt.

        If the template writes nothing after a response, an end token of the model is added.

        Args:
            prompt: output of `prompt`.
            answer: the response.
            name: its name in error messages.

        Raises:
            Malformed: when the response holds an image tag or a special token, or the template
                does not write it in full, once, after the prompt.
        """
        self.check_answer(answer, name)
        rendered, text = self._render([*prompt.messages, _answer(answer)]), answer.strip()
        if not rendered.startswith(prompt.text):
            raise Malformed(
                f"the chat template writes a different prompt before its {name}.", _FIX_TEMPLATE
            )
        body = rendered[len(prompt.text) :]
        parts = [*_around(body, text)]
        if prompt.text.rstrip().endswith("<think>"):  # the response may continue these thoughts
            parts += _around(body, text.removeprefix("<think>").strip())
        frames = (p for p in parts if _within(p[0], prompt.lead) and _within(p[1], prompt.close))
        if (frame := next(frames, None)) is None:
            raise Malformed(
                f"the chat template does not write its {name} {short_repr(text)} whole and once. "
                f"It writes {short_repr(body)}.",
                _FIX_TEMPLATE,
            )
        if close := frame[1].strip():
            if not self._special.search(close) and not any(end in close for end in self._ends):
                self._warn(
                    f"the chat template ends responses with {short_repr(close)}, which holds no "
                    "special token, so the model may not learn to stop."
                )
            return body
        if self._end is None:
            self._warn(
                "the chat template writes no end of a response, and neither the generation "
                "settings nor the tokenizer name one. Responses are scored without an end."
            )
            return body
        return body.rstrip() + self._end  # as LLaVA-1.5 is trained

    @cached_property
    def _end(self) -> str | None:
        """The token that ends a response after which the template writes nothing.

        In dialogues of GLM a response ends where <|user|> begins the next turn, and the model stops
        there. Other models stop at the eos_token.
        """
        turns = [{"role": role, "content": [text_part(_ANSWER)]} for role in (*_TURNS, "user")]
        try:
            behind = self._render(turns).split(_ANSWER)[2].lstrip()
        except (Malformed, IndexError):  # it takes one question only
            behind = ""
        eos = self.tokenizer.eos_token
        opening = [end for end in self._ends if behind.startswith(end)]
        ends = [*opening, *(end for end in self._ends if end == eos), *self._ends, eos]
        return ends[0]

    def check_answer(self, answer: str, name: str = "response") -> None:
        """Check that a response holds no image tag and no special token.

        Raises:
            Malformed: when it holds an image tag or a special token.
        """
        if tag := self.tags.search(answer):
            raise Malformed(
                f"its {name} contains the image tag {tag[0]!r}.", "Remove it from the text."
            )
        self._refuse_special(answer, f"its {name}")

    def _refuse_special(self, text: str, where: str) -> None:
        if tag := VIDEO_TAGS.search(text):
            raise Malformed(
                f"{where} holds the video tag {tag[0]!r}, and videos are not supported.",
                "Give frames of the video as images, or remove the record.",
            )
        if token := self._special.search(text):
            raise Malformed(
                f"{where} holds {token[0]!r}, which the model reads as a special token.",
                "Remove it from the text.",
            )

    def _expected(self, typed: Sequence[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
        """The expected parts of the rendered messages and answer, each with its alternatives."""
        texts = [(m["role"], text) for m in typed for text in texts_of(m) if text.strip()]
        frame = self._frame(typed)
        for fixed, mark in zip(frame[::2], [*frame[1::2], ""], strict=True):
            role, text = texts[int(mark)] if mark.isdigit() else ("", _ANSWER if mark else "")
            if role == "assistant" and "</think>" in text:
                # Templates of reasoning models drop the thoughts of earlier turns, or replace
                # empty thoughts with them.
                yield fixed.strip(), _NO_THOUGHTS.sub("", fixed).strip()
                yield text.strip(), text.rpartition("</think>")[2].strip()
            else:
                yield (fixed.strip(),)
                yield (text.strip(),)

    def _frame(self, typed: Sequence[dict[str, Any]]) -> list[str]:
        """The template's fixed text, alternating with the numbers of the texts between it."""
        kinds = [
            (m["role"], *(p["text"] if _is_blank(p) else p["type"] for p in m["content"]))
            for m in typed
        ]
        key = tuple(kinds)
        if key not in self._frames:
            roles: list[str] = []
            marked = []
            for message in typed:
                parts = []
                for part in message["content"]:
                    if part["type"] == "text" and not _is_blank(part):
                        part = {"type": "text", "text": f"Kq{len(roles)}Vx"}
                        roles.append(message["role"])
                    parts.append(part)
                marked.append({"role": message["role"], "content": parts})
            frame = _MARK.split(self._render([*marked, _answer(_ANSWER)]))
            _check_marks(frame[1::2], roles)
            self._frames[key] = frame
        return self._frames[key]

    def _render(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        laid_out = [{"role": m["role"], "content": self._content(m)} for m in messages]
        return self._apply(laid_out, **options)

    def _apply(self, messages: list[dict[str, Any]], **options: Any) -> str:
        try:
            return self._processor.apply_chat_template(messages, **self._options, **options)
        except Exception as error:  # Jinja's errors, and any error of an expression
            raise Malformed(
                f"the chat template cannot render its messages ({short_error(error)}).",
                "Change the roles or the order of its messages, or the processor's chat template.",
            ) from error

    def _content(self, message: dict[str, Any]) -> Any:
        """The content in the form that the template accepts: a string, or typed parts."""
        role, parts = message["role"], message["content"]
        images = any(part["type"] == "image" for part in parts)
        if (role, images) not in self._strings:
            word = [text_part(_ANSWER)]
            probes = [{"type": "image"}, *word] if images else word
            typed, string = self._takes(role, probes), self._takes(role, self._as_text(probes))
            self._strings[role, images] = string and not typed if images else string or not typed
        return self._as_text(parts) if self._strings[role, images] else parts

    def _takes(self, role: str, content: Any) -> bool:
        """Whether the template writes all text and image tokens of content in this form."""
        turns = [{"role": role, "content": content}]
        if role != "user":
            question = self._content({"role": "user", "content": [text_part("word")]})
            turns.insert(role != "assistant", {"role": "user", "content": question})
        try:
            text = self._apply(turns)
        except Malformed:
            return False
        if isinstance(content, list) and len(content) > 1 and text.count(str(self._image)) != 1:
            return False
        return _ANSWER in text and not re.search("['\"]type['\"]", text)

    def _as_text(self, parts: Sequence[dict[str, str]]) -> str:
        """Typed parts as one string, with each image token on its own line, as LLaVA does."""
        text, last = "", None
        for part in parts:
            line = last is not None and "image" in (last, part["type"])
            piece = part["text"] if part["type"] == "text" else str(self._image_text)
            text += "\n" * line + piece
            last = part["type"]
        return text

    def _warn(self, line: str) -> None:
        if line not in self._warned:
            self._warned.add(line)
            warnings.warn(line, stacklevel=4)


def chat_prompt(processor, messages: Sequence[dict], images: int) -> tuple[str, list[dict]]:
    """Render prompt messages for a response. Returns the text and the messages in typed parts."""
    prompt = ChatTemplate(processor).prompt(messages, images)
    return prompt.text, list(prompt.messages)


class TextInputs:
    """Arguments `text` and `add_special_tokens` of a processor, for one start and no end token."""

    def __init__(self, processor) -> None:
        tokenizer: Any = getattr(processor, "tokenizer", processor)
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        ids = tokenizer("a")["input_ids"]
        first = next((i for i in range(len(ids)) if ids[i : i + len(bare)] == bare), 0)
        self._added = "".join(tokenizer.convert_ids_to_tokens(ids[:first]))
        self._ends = bool(ids[first + len(bare) :])  # an end token would end the prompt
        self._starts = tuple(filter(None, (tokenizer.bos_token, self._added)))

    def __call__(self, texts: Sequence[str]) -> dict[str, Any]:
        """The arguments for texts that all start in the same way."""
        if texts[0].startswith(self._starts):
            return {"text": [*texts], "add_special_tokens": False}  # as `apply_chat_template` does
        if self._ends:
            return {"text": [self._added + text for text in texts], "add_special_tokens": False}
        return {"text": [*texts], "add_special_tokens": True}


def text_inputs(processor, texts: Sequence[str]) -> dict[str, Any]:
    """Arguments `text` and `add_special_tokens` of a processor. See `TextInputs`."""
    return TextInputs(processor)(texts)


class BatchTokenizer:
    """A tokenizer that encodes many texts at once, and then returns the result for each.

    One call for 1,000 texts takes a quarter of the time of 1,000 calls.
    """

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def prepare(self, texts: Iterable[str]) -> None:
        """Encode texts without special tokens, and forget earlier ones."""
        distinct = list(dict.fromkeys(texts))
        self._known = {}
        try:
            encoded = self._tokenizer(distinct, add_special_tokens=False)["input_ids"]
        except Exception:  # such as a lone surrogate; the call for that text raises it again
            return
        self._known = dict(zip(distinct, encoded, strict=True))

    def __call__(self, text: str, **options: Any) -> Any:
        """The encoding of a text."""
        if text in self._known and options == {"add_special_tokens": False}:
            return {"input_ids": self._known[text]}
        return self._tokenizer(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def tokens_behind(tokenizer, prompt: str, text: str, **options: Any) -> tuple[Any, int, int]:
    """Tokenize a text that follows a prompt, since its first token may depend on the prompt.

    Returns:
        An encoding, and the numbers of its tokens and of its characters that precede the text.

    Raises:
        Malformed: when the tokenizer rejects the text, or cannot split it from the prompt.
    """

    def encoding(of: str) -> Any:
        try:
            return tokenizer(of, add_special_tokens=False, **options)
        except Exception as error:  # such as a lone surrogate
            raise Malformed(
                f"the tokenizer cannot encode {short_repr(text)} ({short_error(error)}).",
                "Correct the text.",
            ) from error

    prompt_ids, joint = encoding(prompt)["input_ids"], encoding(prompt + text)
    if joint["input_ids"][: len(prompt_ids)] == prompt_ids:
        return joint, len(prompt_ids), len(prompt)
    # One token holds the end of the prompt and the start of the text: split it.
    expected = tokenizer.decode(joint["input_ids"])
    for before in ("", "\n"):  # some tokenizers add a space before the first word of a text
        before_ids, joint = encoding(before)["input_ids"], encoding(before + text)
        tail = joint["input_ids"][len(before_ids) :]
        same = before_ids + tail == joint["input_ids"]
        if same and tokenizer.decode(prompt_ids + tail) == expected:
            return joint, len(before_ids), len(before)
    end = f"...{prompt[-40:]}"
    raise Malformed(
        f"the tokenizer cannot split {short_repr(text)} from the prompt {end!r}.",
        "Use a chat template that ends the prompt with a separate token.",
    )


def shorten(error: Exception) -> str:
    """An exception of another library in one short line."""
    line = " ".join(str(error).split())
    return f"{type(error).__name__}: {line[:200]}{'...' if len(line) > 200 else ''}"


def _check_marks(marks: Sequence[str], roles: Sequence[str]) -> None:
    """Raise Malformed unless all marks are present in order, and the answer's once, at the end."""
    for number, role in enumerate(roles):
        if str(number) not in marks:
            raise Malformed(
                f"the chat template drops or changes the text of a message of the {role}.",
                "Take that message out of the prompt, or use a chat template that writes it.",
            )
    if (times := marks.count("Answer")) != 1:
        change = "drops or changes" if times == 0 else "repeats"
        raise Malformed(f"the chat template {change} responses.", _FIX_TEMPLATE)
    # A system message may be written later: Pixtral's template does.
    order = [int(n) for n in dict.fromkeys(marks) if n != "Answer" and roles[int(n)] in _TURNS]
    if order != sorted(order) or marks[-1] != "Answer":
        raise Malformed("the chat template changes the order of the messages.", _FIX_TEMPLATE)


def _follows(text: str, expected: Iterable[tuple[str, ...]]) -> bool:
    """Whether a text consists of the expected parts in order, up to white space between them."""
    at = 0
    for alternatives in expected:
        at += len(text) - at - len(text[at:].lstrip())
        piece = next((p for p in alternatives if text.startswith(p, at)), None)
        if piece is None:
            return False
        at += len(piece)
    return not text[at:].strip()


def _around(body: str, text: str) -> Iterator[tuple[str, str]]:
    """The text before and after each occurrence of a text."""
    at = body.find(text)
    while at >= 0:
        yield body[:at], body[at + len(text) :]
        at = body.find(text, at + 1)


def _within(part: str, frame: str) -> bool:
    """Whether a part is the frame, or a piece of it: a response may have its own thoughts."""
    part, frame = part.strip(), frame.strip()
    return frame.startswith(part) or frame.endswith(part)


def _answer(answer: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [text_part(answer)]}


def _is_blank(part: Mapping[str, str]) -> bool:
    return part["type"] == "text" and not part["text"].strip()


def _first(processor, tokenizer, names: Sequence[str]) -> str | None:
    """The first attribute of processor or tokenizer among `names` that is a string."""
    values = (getattr(owner, name, None) for name in names for owner in (processor, tokenizer))
    return next((value for value in values if isinstance(value, str)), None)


def _frozen_date(template: Any) -> dict[str, str]:
    """The template with clock calls replaced by the current date, so that all renderings agree."""
    template = template.get("default") if isinstance(template, Mapping) else template
    if not isinstance(template, str) or "strftime_now" not in template:
        return {}
    now = datetime.now()
    return {"chat_template": _NOW.sub(lambda call: repr(now.strftime(call[2])), template)}
