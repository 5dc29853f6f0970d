"""Messages of a prompt and of responses, read from a row, and responses of several turns.

A response is one turn. TRL's DPOTrainer scores every message of `chosen` and `rejected`. Messages
that both share add the same log-probs to both, so they move into the prompt without a change of
TRL's margin. Messages in which they differ before the last one are an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from realign.data.errors import Malformed, shown
from realign.data.image_tags import split_at_tags

Message = dict[str, Any]  # "role", and "content": text, or parts of type text and image
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_ROLES |= {"system": "system"}
_MESSAGE_KEYS = ("role", "from", "content", "value")
_GIVE_MESSAGE = "Give a role and, as content, text or a list of parts of type text and image."
_ENCODED = re.compile(r"\s*\[\s*\{\s*['\"](role|content|from|value)['\"]\s*:")


def dialogue_of(
    prompt: Any, responses: Mapping[str, Any]
) -> tuple[list[Message], dict[str, str | None]]:
    """Read a prompt and the responses to it.

    Args:
        prompt: text, messages, or None where it is what the responses share.
        responses: by column: text, messages of which the last is the response, or None.

    Returns:
        The messages of the prompt, and the text of each response, None where there is none.

    Raises:
        Malformed: for values that are no messages, and for responses whose messages before the last
            differ, or neither repeat nor continue the prompt.
    """
    given = None if _is_empty(prompt) else _prompt(prompt)
    read = {n: (None, []) if _is_empty(v) else _response(v, n) for n, v in responses.items()}
    behind: dict[str, list[Message]] = {}
    for name, (text, turns) in read.items():
        if text is not None:
            given, behind[name] = _without_prompt(given, turns)
    (first, shared), *others = behind.items() or [("", [])]
    for name, turns in others:
        if list(map(_said, turns)) != list(map(_said, shared)):
            raise Malformed(
                f"its {first} and {name} differ before their last message, and TRL scores all of "
                "them.",
                "Give responses of one message each, with the messages before it in `prompt`.",
            )
    if not given and not shared:
        raise Malformed("it has no prompt.", "Add one or remove the record.")
    messages = [*(given or []), *shared]
    _check_order(messages, first, len(messages) - len(shared))
    if not any(_text(message).strip() for message in messages):
        raise Malformed("its prompt is empty.", "Write one or remove the record.", "empty text")
    return messages, {name: text for name, (text, _) in read.items()}


def messages_of(value: Any, what: str) -> list[Message]:
    """The messages of a column, with keys `role` and `content`, or `from` and `value`.

    One message may be without its list, and several may be a struct of lists.

    Raises:
        Malformed: for another value, role, key or part.
    """
    value = _listed(value) if isinstance(value, Mapping) else value
    if not isinstance(value, list | tuple) or not value:
        raise Malformed(
            f"its {what} is {shown(value)}, no text or messages.",
            "Give text, or messages with a role and content.",
        )
    return [_message(message, what) for message in value]


def _listed(value: Mapping[str, Any]) -> list[Any]:
    """One message, or those of a struct of lists, as `datasets` stores a Sequence of objects."""
    columns = {key: column for key, column in value.items() if column is not None}
    roles = _either(columns, "role", "from")
    if not isinstance(roles, list) or any(
        not isinstance(column, list) or len(column) != len(roles) for column in columns.values()
    ):
        return [value]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def with_system(prompt: list[Message], system: Any) -> list[Message]:
    """A prompt with a system message at its beginning.

    Raises:
        Malformed: where it has one, or for another type than text.
    """
    if not isinstance(system, str):
        raise Malformed(f"its system is {shown(system)}.", "Give text.")
    if prompt[0]["role"] == "system":
        raise Malformed("it has `system` and a system message in its prompt.", "Keep one of them.")
    return [{"role": "system", "content": _readable(system, "system")}, *prompt]


def _prompt(value: Any) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "user", "content": _readable(value, "prompt")}]
    return messages_of(value, "prompt")


def _response(value: Any, what: str) -> tuple[str, list[Message]]:
    """The text of a response, and the messages before it."""
    if isinstance(value, str):
        return _readable(value, what), []
    *turns, last = messages_of(value, what)
    if last["role"] != "assistant":
        raise Malformed(
            f"its {what} does not end with the assistant.", "Put the assistant's response last."
        )
    parts = last["content"]
    if isinstance(parts, str):
        return parts, turns
    if any(part["type"] == "image" for part in parts):
        raise Malformed(f"its {what} holds an image.", "A response is text.")
    return "".join(part["text"] for part in parts), turns


def _message(message: Any, what: str) -> Message:
    def malformed(why: str) -> Malformed:
        return Malformed(f"its {what} has the message {shown(message)}: {why}.", _GIVE_MESSAGE)

    if not isinstance(message, Mapping):
        raise malformed("it is no object")
    role = _either(message, "role", "from")
    if not isinstance(role, str) or role not in _ROLES:
        raise malformed(f"the role {shown(role)} is none of {', '.join(_ROLES)}")
    if foreign := _foreign(message, _MESSAGE_KEYS):
        raise malformed(f"{foreign} would be lost")
    content = _either(message, "content", "value")
    if isinstance(content, str):
        return {"role": _ROLES[role], "content": _readable(content, what)}
    content = [content] if isinstance(content, Mapping) else content
    if not isinstance(content, list | tuple):
        raise malformed(f"its content is {shown(content)}")
    parts: list[dict[str, str]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str) or kind not in ("text", "image"):
            raise malformed(f"the part {shown(part)} is not of type text or image")
        # Arrow gives every part every field; an image part has no text.
        if foreign := _foreign(part, ("type", "text")[: 2 if kind == "text" else 1]):
            raise malformed(f"{foreign} of a part would be lost")
        if kind == "text" and not isinstance(part.get("text"), str):
            raise malformed(f"the part {shown(part)} has no text")
        text = {"text": _readable(part["text"], what)} if kind == "text" else {}
        parts.append({"type": kind} | text)
    return {"role": _ROLES[role], "content": parts}


def _readable(text: str, what: str) -> str:
    """The text, unless no tokenizer can read it as it is meant."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Malformed(
            f"its {what} holds half of a surrogate pair.", "Write it as UTF-8.", "not Unicode"
        ) from None
    if "\0" in text:
        raise Malformed(f"its {what} holds a null character.", "Remove it.", "control characters")
    if _ENCODED.match(text):
        raise Malformed(
            f"its {what} is the text {shown(text)}, which holds messages as JSON.",
            "Decode it with json.loads.",
        )
    return str(text)


def _without_prompt(
    prompt: list[Message] | None, turns: list[Message]
) -> tuple[list[Message] | None, list[Message]]:
    """The prompt, and the messages of a response behind it, where these may repeat the prompt."""
    if prompt is None or not turns:
        return prompt, turns
    (system, asked), (own_system, own) = _split(prompt), _split(turns)
    repeated = own[: len(asked)]
    same = len(repeated) == len(asked) and all(map(_is_same, asked, repeated))
    if not same or (system and own_system and system != own_system):
        return prompt, turns
    # One of the two may place the image, or hold the system message.
    kept = [max(pair, key=_places) for pair in zip(asked, repeated, strict=True)]
    return [*(system or own_system), *kept], own[len(asked) :]


def _check_order(messages: Sequence[Message], response: str, start: int) -> None:
    """Whether the messages from `start` on, moved out of a response, continue the prompt."""
    for last, message in zip(
        messages[max(start - 1, 0) :], messages[max(start, 1) :], strict=False
    ):
        if {last["role"], message["role"]} != {"user", "assistant"} and last["role"] != "system":
            raise Malformed(
                f"its {response} has a message of the {message['role']} behind one of the "
                f"{last['role']}, so it does not continue the prompt; TRL scores all messages.",
                "Put the dialogue into `prompt`, and only the response into chosen and rejected.",
            )
    if messages[-1]["role"] != "user":
        raise Malformed(
            f"its prompt ends with a message of the {messages[-1]['role']}.",
            "End it with a user message, which chosen and rejected answer.",
        )


def _split(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """A system message at the beginning, if any, and the rest."""
    count = int(messages[0]["role"] == "system")
    return messages[:count], messages[count:]


def _parts(message: Message) -> list[dict[str, str]]:
    content = message["content"]
    if isinstance(content, str):
        return split_at_tags(content)
    return [
        found
        for part in content
        for found in ([part] if part["type"] == "image" else split_at_tags(part["text"]))
    ]


def _said(message: Message) -> tuple[str, list[dict[str, str]]]:
    return message["role"], _parts(message)


def _text(message: Message) -> str:
    """The text of a message without image tags."""
    texts = (part["text"].strip() for part in _parts(message) if part["type"] == "text")
    return " ".join(text for text in texts if text)


def _places(message: Message) -> int:
    return sum(part["type"] == "image" for part in _parts(message))


def _is_same(one: Message, other: Message) -> bool:
    """Whether two messages ask the same, where one of them may leave out the image's place."""
    if one["role"] != other["role"] or _text(one) != _text(other):
        return False
    return 0 in (_places(one), _places(other)) or _parts(one) == _parts(other)


def _is_empty(value: Any) -> bool:
    """Whether a value holds nothing; Arrow fills absent keys with null, some writers with ""."""
    return value is None or (isinstance(value, str | list | tuple | Mapping) and not value)


def _either(item: Mapping[str, Any], *names: str) -> Any:
    return next((item[name] for name in names if item.get(name) is not None), None)


def _foreign(item: Mapping[str, Any], known: Sequence[str]) -> str:
    """The keys beside those known that hold something, for a message."""
    keys = [key for key, value in item.items() if key not in known and not _is_empty(value)]
    return ", ".join(map(shown, keys))
