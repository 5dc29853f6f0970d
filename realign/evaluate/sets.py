"""Questions of each benchmark, from its own files.

Every function takes a `Source` and returns the questions of each answers file. The facts of a
question are all that its rules need, such as its label, its options, or the answers of people. They
also have its groups for the table, and its unit for comparisons (`benchmarks`).
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from typing import Any

from realign.data.errors import short_repr
from realign.evaluate import files, hallusionbench
from realign.evaluate import mme as mme_scores
from realign.evaluate.amber import read_annotations
from realign.evaluate.answering import Question
from realign.evaluate.files import KEY, TEXT
from realign.evaluate.rows import IMAGE, TABLES, read_table

Sheets = dict[str, list[Question]]
"""Name of an answers file -> its questions."""

LETTER = "\nAnswer with the option's letter from the given choices directly."
"""Suffix of a multiple-choice question in LLaVA and lmms-eval."""
_ROTATIONS = 1_000_000
"""MMBench's rotations of a question have its index plus a multiple of this."""
_YES_NO = (lambda value: str(value).strip().lower() in ("yes", "no"), "yes or no")
_POPE = {"question_id": KEY, "text": TEXT, IMAGE: TEXT, "label": _YES_NO}
_HALLUSION = {"question": TEXT} | dict.fromkeys(hallusionbench.NEEDED, KEY)
_HALLUSION["gt_answer"] = (lambda value: str(value) in ("0", "1"), "0 or 1")
_INLINE = re.compile(r"Options:\s*A: (.*?),? B: (.*?),? C: (.*?),? D: (.*?)\.?\s*$", re.DOTALL)
_LINES = re.compile(r"^([A-H])\. (.+)$", re.MULTILINE)
_RESERVED = ("id", "question", IMAGE, "answer", "error")
"""Fields of a line of the answers that are not facts."""


@dataclass(frozen=True)
class Source:
    """What the command line gives for a benchmark.

    Attributes:
        paths: files, or the folder of a benchmark.
        images: image folder. Images inside a table are written to it.
        limit: number of questions to use; 0 uses all. POPE's files and AMBER's parts have this
            number each. Pairs, sets of figures and rotations are not cut.
        split: split of ScienceQA.
        part: part of AMBER.
    """

    paths: Sequence[str]
    images: str
    limit: int = 0
    split: str = "test"
    part: str = "all"


def pope(source: Source) -> Sheets:
    """POPE's JSON lines. Each file has its own answers file.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: for two files of the same name, whose answers would share a file, or a file of
            another kind.
    """
    sheets: Sheets = {}
    remedy = "Give a file of POPE, such as coco_pope_random.json."
    for file in source.paths:
        if (name := Path(file).stem) in sheets:
            raise ValueError(
                f"two files are called {name}, so their answers would share one file. Rename one."
            )
        if Path(file).suffix.lower() in TABLES:
            sheets[name] = _yes_no_table(replace(source, paths=[file]), remedy)
            continue
        sheets[name] = [
            Question(
                str(row["question_id"]), row["text"], row[IMAGE], {"label": _lower(row["label"])}
            )
            for row in files.read_rows(file, _POPE, remedy, source.limit)
        ]
    return sheets


def _yes_no_table(source: Source, remedy: str) -> list[Question]:
    """Yes/no questions of the Hub's or VLMEvalKit's table."""
    questions = []
    for number, row in enumerate(_table(source, {"question": TEXT, "answer": _YES_NO}, remedy)):
        facts = {"label": _lower(row["answer"]), "groups": _present([row.get("category")])}
        questions.append(Question(str(number), row["question"], row[IMAGE], facts))
    return questions


def hallusion(source: Source) -> Sheets:
    """HallusionBench.json. Some questions have no image.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: for a file of another kind.
    """
    questions = []
    (path,) = source.paths
    for row in files.read_rows(path, _HALLUSION, "Give HallusionBench.json."):
        file = row.get("filename")
        if file is not None and not files.is_text(file):
            raise ValueError(f"{path}: filename is {short_repr(file)}, not text.")
        has_image = str(row.get("visual_input", "1")) != "0" and file
        name = "_".join(str(row[field]) for field in hallusionbench.NEEDED[:-1])
        facts = {key: value for key, value in row.items() if key not in _RESERVED}
        facts["label"] = "yes" if str(row["gt_answer"]) == "1" else "no"
        questions.append(Question(name, row["question"], file if has_image else None, facts))
    sets = [tuple(str(q.facts[field]) for field in hallusionbench.SET) for q in questions]
    return {"hallusionbench": _limited_to(questions, sets, source.limit)}


def mme(source: Source) -> Sheets:
    """MME: the authors' folder with a folder for each subtask, or one table.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: for a file of another kind.
    """
    remedy = "Give the folder of MME's release, or its Parquet or TSV files."
    if len(source.paths) == 1 and Path(source.paths[0]).is_dir():
        questions = _mme_folder(Path(source.paths[0]), remedy)
    else:
        fields = {"question": TEXT, "answer": _YES_NO, "category": TEXT}
        questions = []
        for number, row in enumerate(_table(replace(source, limit=0), fields, remedy)):
            pair = str(row.get("question_id") or row.get("image_path") or row[IMAGE])
            facts = {"label": _lower(row["answer"]), "category": row["category"]}
            facts["pair"] = f"{row['category']}/{pair}"
            questions.append(Question(str(number), row["question"], row[IMAGE], facts))
    for pair, number in Counter(question.facts["pair"] for question in questions).items():
        if number != 2:
            raise ValueError(
                f"MME asks two questions about an image, and {pair} has {number}. Give all files "
                f"of the benchmark. {remedy}"
            )
    return {"mme": _limited(questions, "pair", source.limit)}


def _mme_folder(folder: Path, remedy: str) -> list[Question]:
    """Questions of MME's release. Its other folders, such as that of the scorer, are left out."""
    questions = []
    for category in (*mme_scores.PERCEPTION, *mme_scores.COGNITION):
        place = folder / category
        inside = place / "questions_answers_YN"
        texts, images = (inside, place / "images") if inside.is_dir() else (place, place)
        for file in sorted(texts.glob("*.txt")):
            found = [p for p in images.glob(f"{_escaped(file.stem)}.*") if p.suffix != ".txt"]
            if len(found) != 1:
                raise ValueError(f"{file} has {len(found)} images in {images}, not one. {remedy}")
            pair, image = f"{category}/{file.stem}", str(found[0].relative_to(folder))
            lines = [text for text in files.read_text(file).splitlines() if text.strip()]
            for number, text in enumerate(lines, 1):
                question, _, label = text.rpartition("\t")
                if not question or not _YES_NO[0](label):
                    raise ValueError(f"{file}: line {number} has no question and answer. {remedy}")
                facts = {"label": _lower(label), "category": category, "pair": pair}
                questions.append(Question(f"{pair}/{number}", question, image, facts))
    if not questions:
        raise ValueError(f"{folder} has no questions. {remedy}")
    return questions


def _limited(questions: Sequence[Question], fact: str, limit: int) -> list[Question]:
    """The questions of the first units, at least `limit` questions. 0 keeps all."""
    return _limited_to(questions, [question.facts[fact] for question in questions], limit)


def _limited_to(
    questions: Sequence[Question], units: Sequence[Hashable], limit: int
) -> list[Question]:
    """As `_limited`, with the unit of each question."""
    kept, number = set(), 0
    for unit, size in Counter(units).items():  # in the order of their first questions
        if limit and number >= limit:
            break
        kept.add(unit)
        number += size
    return [question for question, unit in zip(questions, units, strict=True) if unit in kept]


def mmstar(source: Source) -> Sheets:
    """MMStar: the Hub's Parquet file, with options in the question, or VLMEvalKit's TSV.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: for a file of another kind.
    """
    rows = _table(source, {"question": TEXT, "answer": KEY}, "Give mmstar.parquet or MMStar.tsv.")
    questions = []
    for number, row in enumerate(rows):
        options = _options(row)
        text = _with_options(row, options) if options else row["question"]
        if not options and (inline := _INLINE.search(text)):
            options = dict(zip("ABCD", inline.groups(), strict=True))
        options = options or dict.fromkeys("ABCD", "")
        questions.append(_choice(row, number, text, options, [row.get("category")]))
    return {"mmstar": questions}


def mmbench(source: Source) -> Sheets:
    """MMBench's dev split as TSV or Parquet. The rotations of a question are one unit.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: for a file of another kind.
    """
    remedy = "Give the dev split, such as MMBench_DEV_EN.tsv. The test split has no answers."
    fields = {"index": KEY, "question": TEXT, "answer": KEY, "A": KEY, "B": KEY}
    questions = []
    for number, row in enumerate(_table(replace(source, limit=0), fields, remedy)):
        if not str(row["index"]).isdecimal():
            raise ValueError(f"row {number + 1}: index is {row['index']!r}; it must be a number.")
        options = _options(row)
        groups = [row.get("l2_category"), row.get("category")]
        question = _choice(row, number, _with_options(row, options), options, groups)
        question.facts["unit"] = str(int(row["index"]) % _ROTATIONS)
        questions.append(question)
    return {"mmbench": _limited(questions, "unit", source.limit)}


def realworldqa(source: Source) -> Sheets:
    """RealWorldQA: annotations.jsonl of its authors, the Hub's Parquet file, or a TSV.

    The authors' questions contain their options and how to answer. Those of a TSV get both.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: for a file of another kind.
    """
    remedy = "Give annotations.jsonl, the Parquet file, or RealWorldQA.tsv."
    questions = []
    for number, row in enumerate(_table(source, {"question": TEXT, "answer": KEY}, remedy)):
        options = _options(row)
        text = _with_options(row, options) + LETTER if options else row["question"]
        options = options or dict(_LINES.findall(text))
        label = str(row["answer"]).strip()
        if options and len(marked := label.strip("(). ").upper()) == 1 and marked.isalpha():
            questions.append(_choice(row | {"answer": marked}, number, text, options, []))
        else:
            facts = {"label": label}
            questions.append(Question(_key(row, number), text, row[IMAGE], facts))
    return {"realworldqa": questions}


def mmvp(source: Source) -> Sheets:
    """MMVP: Questions.csv of its authors, with images 1.jpg to 300.jpg, or the Hub's table.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: for a file of another kind.
    """
    remedy = "Give Questions.csv, with all pairs."
    questions = []
    texts_of: dict[str, str] = {}
    rows = _table(replace(source, limit=0), {"question": TEXT}, remedy, needs_image=False)
    for number, row in enumerate(rows):
        options = _options(row) or _bracketed(str(row.get("options")))
        row["answer"] = str(row.get("answer") or row.get("correct_answer")).strip("() ").upper()
        if row[IMAGE] is None:
            row[IMAGE] = f"{_key(row, number + 1)}.jpg"
        question = _choice(row, number, _with_options(row, options), options, [])
        place = _key(row, number + 1)
        if not place.isdecimal():
            raise ValueError(f"row {number + 1}: index is {place!r}; it must be a number.")
        questions.append((int(place), question))
        texts_of[question.id] = row["question"]
    first = (
        min((place for place, _ in questions), default=0) % 2
    )  # the Hub's copies start at 0 or 1
    for place, question in questions:
        question.facts["pair"] = str((place - first) // 2)
    asked = [question for _, question in questions]
    for pair, number in Counter(question.facts["pair"] for question in asked).items():
        texts = {texts_of[q.id] for q in asked if q.facts["pair"] == pair}
        if number != 2 or len(texts) != 1:
            raise ValueError(
                f"MMVP asks one question about two images, and pair {pair} has {number} images and "
                f"{len(texts)} questions. {remedy}"
            )
    return {"mmvp": _limited(asked, "pair", source.limit)}


def _bracketed(text: str) -> dict[str, str]:
    """Options of "(a) Open (b) Closed". Other brackets belong to an option."""
    starts = []
    for mark in ascii_lowercase:
        found = re.compile(rf"\({mark}\)", re.IGNORECASE).search(
            text, starts[-1][1] if starts else 0
        )
        if found is None:
            break
        starts.append(found.span())
    ends = [start for start, _ in starts[1:]] + [len(text)]
    texts = (text[start:end].strip() for (_, start), end in zip(starts, ends, strict=True))
    return dict(zip(ascii_uppercase, texts, strict=False))


def scienceqa(source: Source) -> Sheets:
    """ScienceQA: problems.json, with pid_splits.json beside it, or the Hub's Parquet files.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: for a file of another kind.
    """
    remedy = "Give problems.json, with pid_splits.json beside it, or the Parquet files."
    if any(Path(path).suffix.lower() == ".json" for path in source.paths):
        if len(source.paths) > 1:
            raise ValueError(f"there are {len(source.paths)} files. Give one problems.json.")
        rows = _problems(Path(source.paths[0]), source.split, remedy)
        rows = rows[: source.limit] if source.limit else rows
    else:
        rows = _table(source, {"question": TEXT, "answer": KEY}, remedy, needs_image=False)
    questions = []
    for number, row in enumerate(rows):
        if not (options := _options(row)):
            options, row["answer"] = _choices(row, _key(row, number), remedy)
        text = _with_options(row, options)
        questions.append(_choice(row, number, text, options, _science_groups(row)))
    return {"scienceqa": questions}


def _choices(row: Mapping[str, Any], name: str, remedy: str) -> tuple[dict[str, str], str]:
    """Options and letter of the right one, from a list and a place in it."""
    choices, answer = row.get("choices"), str(row["answer"])
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(ascii_uppercase):
        raise ValueError(f"question {name}: choices is {short_repr(choices)}. {remedy}")
    if not answer.isdecimal() or int(answer) >= len(choices):
        raise ValueError(f"question {name}: answer is {short_repr(row['answer'])}, not a choice.")
    options = dict(zip(ascii_uppercase, map(str, choices), strict=False))
    return options, ascii_uppercase[int(answer)]


def _problems(file: Path, split: str, remedy: str) -> list[dict[str, Any]]:
    problems = files.read_object(file, remedy)
    splits = files.read_object(file.with_name("pid_splits.json"), remedy)
    if not isinstance(splits.get(split), list) or not splits[split]:
        raise ValueError(f"pid_splits.json has no split {split!r}. It has {', '.join(splits)}.")
    rows = []
    for name in map(str, splits[split]):
        if not isinstance(row := problems.get(name), dict):
            raise ValueError(f"{file} has no problem {name}, but pid_splits.json has it. {remedy}")
        files.check_row(row, {"question": TEXT, "answer": KEY}, f"problem {name} of {file}", remedy)
        folder = row.get("split", split)
        rows.append(
            row | {"index": name, IMAGE: row.get(IMAGE) and f"{folder}/{name}/{row[IMAGE]}"}
        )
    return rows


def _science_groups(row: Mapping[str, Any]) -> list[str | None]:
    """Groups of ScienceQA's leaderboard."""
    subject = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
    grade = re.search(r"\d+", str(row.get("grade") or ""))
    return [
        subject.get(str(row.get("subject"))),
        "TXT" if row.get("hint") else None,
        "IMG" if row[IMAGE] else None,
        None if row.get("hint") or row[IMAGE] else "NO",
        grade and ("G1-6" if int(grade[0]) <= 6 else "G7-12"),
    ]


def textvqa(source: Source) -> Sheets:
    """TextVQA: TextVQA_0.5.1_val.json, with images named by `image_id`, or the Hub's table.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: for a file of another kind.
    """
    remedy = "Give the val split, such as TextVQA_0.5.1_val.json. The test split has no answers."
    fields = {"question": TEXT, "question_id": KEY, "answers": _ANSWERS, "image_id": KEY}
    rows: list[dict[str, Any]] = []
    tables = [path for path in source.paths if Path(path).suffix.lower() in TABLES]
    for path in source.paths:
        if path in tables:
            continue
        found = files.read_object(path, remedy).get("data")
        if not isinstance(found, list) or not found:
            raise ValueError(f"{path} has no list `data`. {remedy}")
        for number, row in enumerate(found, 1):
            files.check_row(row, fields, f"question {number} of {path}", remedy)
        rows += [row | {IMAGE: f"{row['image_id']}.jpg"} for row in found]
    if tables:
        rows += _table(replace(source, paths=tables, limit=0), {"question": TEXT}, remedy)
    rows = rows[: source.limit] if source.limit else rows
    return {"textvqa": [_open(row, _key(row, place), [], remedy) for place, row in enumerate(rows)]}


def vizwiz(source: Source) -> Sheets:
    """VizWiz: val.json of its authors, or the Hub's Parquet files.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: for a file of another kind.
    """
    remedy = "Give the val split, such as val.json. The test split has no answers."
    rows = _table(source, {"question": TEXT}, remedy)
    named = [str(row.get("question_id") or row[IMAGE]) for row in rows]
    groups = ("answer_type", "category")
    return {
        "vizwiz": [
            _open(row, name, [row.get(group) for group in groups], remedy)
            for row, name in zip(rows, named, strict=True)
        ]
    }


def amber(source: Source) -> Sheets:
    """AMBER's folder `data`: captions and yes/no questions, with the annotations of both.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: for a file of another kind.
    """
    (folder,) = map(Path, source.paths)
    notes = read_annotations(folder / "annotations.json")
    remedy = "Give the folder `data` of AMBER's repository."
    parts = ("generative", "discriminative")
    sheets: Sheets = {}
    for part in parts if source.part == "all" else [source.part]:
        file = folder / "query" / f"query_{part}.json"
        fields = {"id": (lambda v: type(v) is int, "a number"), "query": TEXT, IMAGE: TEXT}
        questions = []
        for row in files.read_rows(file, fields, remedy, source.limit):
            note = notes.get(row["id"])
            if note is None or (note["type"] == "generative") != (part == "generative"):
                raise ValueError(f"{file}: question {row['id']} has no {part} annotation. {remedy}")
            facts = _amber_facts(note)
            questions.append(Question(str(row["id"]), row["query"], row[IMAGE], facts))
        sheets[f"amber-{part}"] = questions
    return sheets


def _amber_facts(note: Mapping[str, Any]) -> dict[str, Any]:
    if note["type"] == "generative":
        return {"truth": note["truth"], "hallu": note["hallu"]}
    group = note["type"].removeprefix("discriminative-")
    names = {"hallucination": ["existence"], "relation": ["relation"]}
    groups = names.get(group, ["attribute", group.removeprefix("attribute-")])
    return {"label": note["truth"], "groups": groups}


def _is_answers(value: Any) -> bool:
    people = [_person(person) for person in value] if isinstance(value, list) else []
    return len(people) >= 2 and all(isinstance(p, str) for p in people) and any(people)


_ANSWERS = (_is_answers, "the answers of at least two people")


def _person(answer: Any) -> Any:
    return answer.get("answer") if isinstance(answer, dict) else answer


def _open(row: Mapping[str, Any], name: str, groups: Sequence[Any], remedy: str) -> Question:
    """A question with the answers of people, which a TSV has as a list in a cell."""
    people = row.get("answers")
    if people is None and isinstance(row.get("answer"), str):
        try:
            people = ast.literal_eval(row["answer"])
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            people = None
    if not isinstance(people, list) or not _is_answers(people):
        raise ValueError(
            f"question {name} has {short_repr(people)} as answers, not {_ANSWERS[1]}. {remedy}"
        )
    facts = {"answers": [_person(answer) for answer in people], "groups": _present(groups)}
    return Question(name, row["question"], row[IMAGE], facts)


def _table(
    source: Source, fields: Mapping[str, files.Field], remedy: str, *, needs_image: bool = True
) -> list[dict[str, Any]]:
    return read_table(
        source.paths, source.images, fields, remedy, source.limit, needs_image=needs_image
    )


def _choice(
    row: Mapping[str, Any],
    number: int,
    text: str,
    options: Mapping[str, str],
    groups: Sequence[Any],
) -> Question:
    """A multiple-choice question.

    Raises:
        ValueError: if the answer is none of the options.
    """
    label = str(row["answer"]).strip()
    if label not in options:
        raise ValueError(
            f"question {_key(row, number)}: its answer is {short_repr(label)}, but its options are "
            f"{', '.join(options) or 'missing'}. Check the file."
        )
    facts = {"label": label, "options": dict(options), "groups": _present(groups)}
    return Question(_key(row, number), text, row[IMAGE], facts)


def _key(row: Mapping[str, Any], number: int) -> str:
    found = (row[name] for name in ("index", "question_id", "id") if row.get(name) is not None)
    return str(next(found, number))


def _options(row: Mapping[str, Any]) -> dict[str, str]:
    """Options in columns A, B, ..."""
    cells = ((letter, row.get(letter)) for letter in ascii_uppercase)
    return {letter: str(cell) for letter, cell in cells if cell is not None}


def _with_options(row: Mapping[str, Any], options: Mapping[str, str]) -> str:
    lines = [str(row["hint"])] if row.get("hint") else []
    return "\n".join([*lines, row["question"], *(f"{k}. {text}" for k, text in options.items())])


def _present(groups: Sequence[Any]) -> list[str]:
    return [str(group) for group in groups if group]


def _lower(value: Any) -> str:
    return str(value).strip().lower()


def _escaped(stem: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", stem)
