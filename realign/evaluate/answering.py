"""Answers of a model to questions, saved after each batch, so that a stopped run resumes.

Each line of the file is a JSON object: the fields of the question, `answer`, and `error` if there
is no answer. The first line holds the model and the settings, so answers of two models are never
mixed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from realign.data.errors import short_repr, shorten
from realign.data.images import DataFolder, ImageError, StoredImage
from realign.evaluate.files import read_text
from realign.files import check_file, write_whole
from realign.pairs.engines import Chat, Engine
from realign.pairs.io.images import load_image
from realign.pairs.io.rows import files_digest
from realign.progress import Progress

UNUSED = "unused"
"""Field of an earlier answer to a question that the last run did not have."""
_PIXELS_OF_TOKEN = 28 * 28  # of Qwen2-VL
_LETTERS_OF_TOKEN = 4


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        id: unique in its file.
        text: the question.
        image: file name in the image folder; None for a question without an image.
        facts: further fields that are copied into the answers, such as label and category.
    """

    id: str
    text: str
    image: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Sheet:
    """Checked questions, and the answers that their file already holds.

    Attributes:
        questions: the questions in order, with distinct ids.
        folder: folder of the images.
        output: JSON-lines file of the answers.
        asked: settings that the answers depend on, the first line of `output`.
        done: question id -> line of `output`.
        benchmark: name in `benchmarks.BENCHMARKS`, for the first line of `output`.
        sizes: image -> its number of pixels.
    """

    questions: Sequence[Question]
    folder: DataFolder
    output: Path
    asked: dict[str, Any]
    done: dict[str, dict[str, Any]]
    benchmark: str | None = None
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def missing(self) -> list[Question]:
        """Questions without an answer."""
        return [question for question in self.questions if question.id not in self.done]


def prepare(
    questions: Sequence[Question],
    images: str | Path,
    output: Path,
    *,
    model: str,
    max_tokens: int,
    suffix: str = "",
    settings: Mapping[str, Any] | None = None,
    benchmark: str | None = None,
) -> Sheet:
    """Check questions, their images and the file of answers, without a model.

    Args:
        questions: questions to ask.
        images: folder of the images. A file name outside of it is an error.
        output: JSON-lines file of the answers.
        model: folder or name of the model. A folder is also identified by its files.
        max_tokens: maximum number of tokens in an answer.
        suffix: text appended to every question.
        settings: further settings that the answers depend on, such as the dtype.
        benchmark: name of the benchmark, for the first line of the file.

    Raises:
        ValueError: for repeated ids, a missing image, or an `output` that cannot be written or
            holds answers of a different model or to different questions.
    """
    if twice := [name for name, number in Counter(q.id for q in questions).items() if number > 1]:
        raise ValueError(
            f"the questions of {output.stem} do not have distinct ids: {len(twice)} occur twice or "
            f"more, such as {short_repr(twice[0])}. Give each question once."
        )
    check_file("--output", output)
    mark = files_digest(model)
    asked = {"model": model, "mark": mark, "max_tokens": max_tokens, "suffix": suffix}
    asked |= {name: value for name, value in (settings or {}).items() if value is not None}
    sheet = Sheet(questions, DataFolder(images), output, asked, _read(output, asked), benchmark)
    for question in questions:
        earlier = sheet.done.get(question.id)
        if earlier is not None and (earlier.get("question"), earlier.get("image")) != (
            question.text,
            question.image,
        ):
            raise ValueError(
                f"{output} answers a different question under the id {question.id!r}. Name another "
                "--output."
            )
        if earlier is not None:  # a corrected file may have another label
            own = {key: value for key, value in earlier.items() if key != UNUSED}
            sheet.done[question.id] = own | question.facts
    _measure_images(sheet)
    return sheet


def answer(
    engine: Engine,
    sheet: Sheet,
    *,
    batch: int = 64,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Answer the questions of a sheet that have no answer yet, with greedy decoding.

    Questions of similar length are answered together, the longest first, so that little of a batch
    is padding. The groups do not depend on earlier answers, so a resumed run has the same batches.

    Args:
        engine: engine of the model, opened if a question has no answer yet.
        sheet: result of `prepare`.
        batch: questions between two writes to the disk.
        progress: whether to show progress.

    Returns:
        One line of the file for each question, in the order of the questions.

    Raises:
        ValueError: if an image cannot be read.
    """
    output = sheet.output
    parts = [part for part in _parts(sheet, batch) if part]
    with Progress(
        output.stem,
        "questions",
        len(sheet.questions),
        done=len(sheet.questions) - len(sheet.missing),
        quiet=not progress,
    ) as bar:
        if parts:
            engine.open()
        _write_done(sheet)
        groups = ([_chat(question, sheet) for question in part] for part in parts)
        with closing(engine.chats(groups)) as answered:
            for part, replies in zip(parts, answered, strict=True):
                lines = []
                for question, reply in zip(part, replies, strict=True):
                    line = {"id": question.id, "question": question.text, "image": question.image}
                    line |= question.facts | {"answer": reply.text}
                    line |= {"error": reply.error} if reply.error else {}
                    sheet.done[question.id] = line
                    lines.append(json.dumps(line) + "\n")  # ASCII: no text can break a line
                with output.open("a", encoding="utf-8") as file:
                    file.write("".join(lines))
                bar.update(len(part))
    _write_done(sheet)
    return [sheet.done[question.id] for question in sheet.questions]


def _parts(sheet: Sheet, batch: int) -> list[list[Question]]:
    """Unanswered questions by length, in groups that do not depend on the answered ones."""

    def length(question: Question) -> float:
        """Rough number of tokens. Processors of one size of image take any order of images."""
        pixels = sheet.sizes.get(question.image or "", 0)
        return pixels / _PIXELS_OF_TOKEN + len(question.text) / _LETTERS_OF_TOKEN

    order = sorted(sheet.questions, key=length, reverse=True)
    groups = (order[start : start + batch] for start in range(0, len(order), batch))
    return [[question for question in group if question.id not in sheet.done] for group in groups]


def _write_done(sheet: Sheet) -> None:
    """Write the first line and the answers in the order of the questions, unless it is so."""
    lines = [{"asked": sheet.asked} | ({"benchmark": sheet.benchmark} if sheet.benchmark else {})]
    ids = dict.fromkeys(question.id for question in sheet.questions)
    lines += [sheet.done[name] for name in ids if name in sheet.done]
    lines += [line | {UNUSED: True} for name, line in sheet.done.items() if name not in ids]
    if not sheet.output.exists() or read_sheet(sheet.output) != lines:
        sheet.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(sheet.output, "".join(json.dumps(line) + "\n" for line in lines))


def read_answers(path: str | Path) -> list[dict[str, Any]]:
    """The answers in a file, or in all `*.jsonl` files of a folder.

    Raises:
        ValueError: for a file without answers.
    """
    path = Path(path)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    lines = [line | {"file": file.name} for file in files for line in read_sheet(file)[1:]]
    if not lines:
        raise ValueError(
            f"{path} holds no answers. Name the output of `python -m realign.evaluate`."
        )
    return lines


def unanswered(lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines without an answer because of an error. Scores take them as empty answers."""
    return [line for line in lines if line.get("error") and line["answer"] == ""]


def _read(output: Path, asked: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Read answers by id, and remove an incomplete last line, left by a crash, from the file."""
    if not output.exists():
        return {}
    head, *lines = read_sheet(output)
    if head.get("asked") != asked:
        before = head["asked"]
        changed = [n for n in before | asked if before.get(n) != asked.get(n)]
        raise ValueError(
            f"{output} holds answers for a different {', '.join(changed)}. Name another --output."
        )
    text = read_text(output)
    if not text.endswith("\n"):
        write_whole(output, text[: text.rfind("\n") + 1])
    return {line["id"]: line for line in lines}


def read_sheet(file: Path, *, whole: bool = False) -> list[dict[str, Any]]:
    """The lines of an answers file: the first with the settings, then one for each answer.

    A last line without its end, left by a crash, is left out, or an error with `whole`.

    Raises:
        ValueError: for another file.
    """
    try:
        *texts, rest = read_text(file).split("\n")
        lines = [json.loads(text) for text in texts if text.strip()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not a file of answers ({shorten(str(error))}).") from error
    if whole and rest:
        raise ValueError(f"{file} ends in a cut line. Run its command again, which resumes.")
    objects = lines and all(isinstance(line, dict) for line in lines)
    if not objects or not isinstance(lines[0].get("asked"), dict):
        raise ValueError(f"{file} is not a file of answers: its first line does not name a model.")
    for number, line in enumerate(lines[1:], 2):
        if not (isinstance(line.get("id"), str) and isinstance(line.get("answer"), str)):
            raise ValueError(f"{file}: line {number} has no id or no answer.")
    return lines


def _measure_images(sheet: Sheet) -> None:
    """Check that the image of every unanswered question is an image in the folder, and note sizes.

    Raises:
        ValueError: for missing images, with the first question and file and the number of images,
            and for an image with an invalid header.
    """
    images: dict[str, Question] = {}
    for question in sheet.missing:
        if question.image is not None:
            images.setdefault(question.image, question)
    if images and not Path(sheet.folder.path).is_dir():
        raise ValueError(
            f"--image-folder {sheet.folder.given} is not a folder. Name the folder of the images."
        )
    places = {name: _place(sheet.folder, question) for name, question in images.items()}
    absent = [name for name, place in places.items() if not Path(place).is_file()]
    if absent:
        first = absent[0]
        raise ValueError(
            f"the image of question {images[first].id!r} of {sheet.output.stem} is missing: "
            f"{shorten(places[first])}. {len(absent)} of {len(images)} images are missing. Check "
            "--image-folder."
        )
    # The order of the questions must not depend on which of them are answered.
    for question in sheet.questions:
        if question.image is None or question.image in sheet.sizes:
            continue
        try:
            width, height = StoredImage(path=_place(sheet.folder, question)).size()
        except ImageError as error:
            if question.image not in images:
                continue
            raise ValueError(f"the image of question {question.id!r}: {error}") from error
        sheet.sizes[question.image] = width * height


def _place(folder: DataFolder, question: Question) -> str:
    """The file of a question's image."""
    assert question.image is not None
    try:
        return folder.file(question.image)
    except ImageError as error:
        raise ValueError(f"the image of question {question.id!r}: {error}") from error


def _load(folder: DataFolder, question: Question) -> Image.Image:
    try:
        return load_image(StoredImage(path=_place(folder, question)))
    except ImageError as error:
        raise ValueError(f"the image of question {question.id!r}: {error}") from error


def _chat(question: Question, sheet: Sheet) -> Chat:
    """A request whose image is decoded by the engine's workers."""
    images = [] if question.image is None else [partial(_load, sheet.folder, question)]
    content = question.text + sheet.asked["suffix"]
    return Chat([{"role": "user", "content": content}], images, sheet.asked["max_tokens"])
