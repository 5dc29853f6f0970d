"""Answers of a model to a list of questions, written as they come: a run that stops goes on.

One JSON object per line: the question's own fields, `answer`, and `error` where there is none. The
first line says whose answers they are, so that those of two models are never mixed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from realign.metrics import read_jsonl, write_whole
from realign.pairs.engines import Chat, Engine
from realign.pairs.pictures import PictureError, inside, load_picture
from realign.pairs.rows import mark_of
from realign.records import StoredImage


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        id: of it, unique in its file.
        text: what is asked.
        image: name of the picture in the image folder; None asks without one.
        facts: further fields, carried into the answers: label, category, ...
    """

    id: str
    text: str
    image: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def answer(
    engine: Engine,
    questions: Sequence[Question],
    images: str | Path,
    output: Path,
    *,
    model: str,
    max_tokens: int,
    suffix: str = "",
    batch: int = 64,
    desc: str = "answers",
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Answer questions greedily; those that `output` holds are not asked again.

    Args:
        engine: answers; opened here if there is something to ask.
        questions: with distinct ids.
        images: folder of the pictures, which no name may leave.
        output: JSON-lines file of the answers.
        model: which model the engine asks: a folder's files, or a name, tell it from others.
        max_tokens: of an answer.
        suffix: put behind every question.
        batch: questions between two writes to the disk.
        desc: name of the bar.
        progress: whether to show it.

    Returns:
        The lines of `output`, one for each question, in the order of `questions`.

    Raises:
        ValueError: for ids that come twice, a picture that cannot be read, or an `output` that
            holds the answers of another model or to other questions.
    """
    if len({question.id for question in questions}) != len(questions):
        raise ValueError(f"the questions of {output.stem} do not have distinct ids.")
    asked = {"model": model, "mark": mark_of(model), "max_tokens": max_tokens, "suffix": suffix}
    done = _read(output, asked)
    for question in questions:
        known = done.get(question.id)
        if known is not None and (known["question"], known["image"]) != (
            question.text,
            question.image,
        ):
            raise ValueError(
                f"{output} answers another question under the id {question.id!r}; name another "
                "--output."
            )
    missing = [question for question in questions if question.id not in done]
    with tqdm(
        desc=desc,
        unit="question",
        total=len(questions),
        initial=len(questions) - len(missing),
        disable=not progress,
    ) as bar:
        if missing:
            engine.open()
            if not output.exists():
                write_whole(output, json.dumps({"asked": asked}) + "\n")
        for start in range(0, len(missing), batch):
            part = missing[start : start + batch]
            chats = [_chat(question, Path(images), suffix, max_tokens) for question in part]
            replies = engine.chat(chats)
            lines = []
            for question, reply in zip(part, replies, strict=True):
                line = {"id": question.id, "question": question.text, "image": question.image}
                line |= question.facts | {"answer": reply.text}
                line |= {"error": reply.error} if reply.error else {}
                done[question.id] = line
                lines.append(json.dumps(line) + "\n")  # ASCII: no text can break a line
            with output.open("a", encoding="utf-8") as file:
                file.write("".join(lines))
            bar.update(len(part))
    return [done[question.id] for question in questions]


def read_answers(path: str | Path) -> list[dict[str, Any]]:
    """The answers in a file, or in all `*.jsonl` files of a folder.

    Raises:
        ValueError: for a file that holds none.
    """
    path = Path(path)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    lines = [line | {"file": file.name} for file in files for line in _lines(file)[1:]]
    if not lines:
        raise ValueError(f"{path} holds no answers; name what `python -m realign.evaluate` wrote.")
    return lines


def _read(output: Path, asked: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Answers by id. A line that a crash cut short is taken off, so that the next is whole."""
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        return {}
    head, *lines = _lines(output)
    if head.get("asked") != asked:
        changed = [n for n, v in asked.items() if head.get("asked", {}).get(n) != v]
        raise ValueError(
            f"{output} holds answers that were asked for with another {', '.join(changed)}; name "
            "another --output."
        )
    text = output.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        write_whole(output, text[: text.rfind("\n") + 1])
    return {line["id"]: line for line in lines}


def _lines(file: Path) -> list[dict[str, Any]]:
    try:
        found = read_jsonl(file)
    except ValueError as error:
        raise ValueError(f"{file} is no file of answers ({error}).") from error
    if not found or "asked" not in found[0]:
        raise ValueError(f"{file} is no file of answers: its first line does not say whose.")
    return found


def _chat(question: Question, folder: Path, suffix: str, max_tokens: int) -> Chat:
    images = []
    if question.image is not None:
        try:
            images = [load_picture(StoredImage(path=inside(folder, question.image)))]
        except PictureError as error:
            raise ValueError(f"the picture of question {question.id!r}: {error}") from error
    content = question.text + suffix
    return Chat([{"role": "user", "content": content}], images, max_tokens)
