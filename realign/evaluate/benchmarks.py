"""Benchmarks by name: their rules, and the score of each answer by each rule.

An answers file names its benchmark in its first line. Each later line holds all that its rules
need, such as the label, so answers are scored without the files of the benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from realign.data.errors import shorten
from realign.evaluate import amber, hallusionbench, mme, vqa, yesno
from realign.evaluate.answering import UNUSED, read_sheet
from realign.evaluate.files import is_text, read_object
from realign.evaluate.letters import letter

Line = Mapping[str, Any]
"""A line of an answers file: id, question, image, answer, and the facts of the benchmark."""


def _image(line: Line) -> str:
    return str(line.get("image") or line["id"])


def _id(line: Line) -> str:
    return str(line["id"])


@dataclass(frozen=True)
class Benchmark:
    """How the answers to a benchmark are scored.

    Attributes:
        title: its name in tables.
        rules: name of a rule -> function from a line of the answers to its score in [0, 1].
        facts: fields of a line that its rules need.
        unit: id of the unit that a line belongs to. The score of a unit is its lowest score:
            MMBench's question counts as right if all its rotations are.
        cluster: group of lines that are not independent, for the bootstrap.
    """

    title: str
    rules: Mapping[str, Callable[[Line], float]]
    facts: Sequence[str] = ()
    unit: Callable[[Line], str] = _id
    cluster: Callable[[Line], str] = _image


@dataclass(frozen=True)
class Units:
    """Scores of the units of a file by each rule.

    Attributes:
        ids: id of each unit, in the order of the file.
        clusters: number of the cluster of each unit, (units,) int.
        scores: rule -> score of each unit in [0, 1], (units,) float.
    """

    ids: list[str]
    clusters: np.ndarray
    scores: dict[str, np.ndarray]


def units(lines: Sequence[Line], benchmark: Benchmark) -> Units:
    """Score the lines of a file, and take the lowest score of each unit."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(benchmark.unit(line), []).append(line)
    numbers: dict[str, int] = {}
    places = [benchmark.cluster(group[0]) for group in groups.values()]
    clusters = [numbers.setdefault(place, len(numbers)) for place in places]
    scores = {
        name: np.array([min(map(rule, group)) for group in groups.values()], float)
        for name, rule in benchmark.rules.items()
    }
    return Units(list(groups), np.array(clusters, int), scores)


def _yes_no(rule: str, line: Line) -> float:
    return float(yesno.RULES[rule](line["answer"]) == line["label"])


def _mme(rule: str, line: Line) -> float:
    return float(mme.RULES[rule](line["answer"]) == line["label"])


def _amber(line: Line) -> float:
    return float(amber.verdict(line["answer"]) == line["label"])


def _letter(line: Line) -> float:
    """1 for the right letter. A question without options needs the answer itself."""
    if "options" in line:
        return float(letter(line["answer"], line["options"]) == line["label"])
    answer, label = (line[name].lower().strip().rstrip(".") for name in ("answer", "label"))
    return float(answer == label)


def _vqa(rule: str, line: Line) -> float:
    return vqa.RULES[rule](line["answer"], line["answers"])


def _no_hallucination(line: Line) -> float:
    """1 if a caption names no object that the image does not show."""
    return float(not line["hallucinated"])


def _pair(line: Line) -> str:
    return str(line["pair"])


def _unit(line: Line) -> str:
    return str(line["unit"])


_YES_NO = {rule: partial(_yes_no, rule) for rule in yesno.RULES}
_AMBER = {"authors": _amber} | _YES_NO
_LETTER = {"letter": _letter}
_VQA = {rule: partial(_vqa, rule) for rule in vqa.RULES}
_CAPTIONS = {"no hallucination": _no_hallucination}
_LABEL, _OPTIONS = ("label",), ("label", "options")

BENCHMARKS: dict[str, Benchmark] = {
    "pope": Benchmark("POPE, by each rule for yes and no", _YES_NO, _LABEL),
    "hallusionbench": Benchmark(
        "HallusionBench, scored by rules instead of the leaderboard's judge", _YES_NO, _LABEL
    ),
    "chair": Benchmark("CHAIR", _CAPTIONS),
    "amber-generative": Benchmark("AMBER, captions", _CAPTIONS, ("truth", "hallu")),
    "amber-discriminative": Benchmark("AMBER, yes or no", _AMBER, _LABEL),
    "mme": Benchmark(
        "MME",
        {rule: partial(_mme, rule) for rule in mme.RULES},
        (*_LABEL, "category", "pair"),
        cluster=_pair,
    ),
    "mmstar": Benchmark("MMStar", _LETTER, _OPTIONS),
    "mmbench": Benchmark("MMBench", _LETTER, (*_OPTIONS, "unit"), unit=_unit),
    "mmvp": Benchmark("MMVP", _LETTER, (*_OPTIONS, "pair"), cluster=_pair),
    "realworldqa": Benchmark("RealWorldQA", _LETTER, _LABEL),
    "scienceqa": Benchmark("ScienceQA", _LETTER, _OPTIONS),
    "textvqa": Benchmark("TextVQA", _VQA, ("answers",)),
    "vizwiz": Benchmark("VizWiz", _VQA, ("answers",)),
}
"""Name of a benchmark, as in the first line of an answers file -> how it is scored."""


def report(lines: Sequence[Line], name: str) -> list[dict[str, Any]]:
    """Figures of the answers to a benchmark, for all and for each group of questions.

    Args:
        lines: answers with their facts.
        name: a name in `BENCHMARKS`, except for captions.

    Returns:
        Rows with `rule`, `group`, `questions` (units) and shares in [0, 1], such as `accuracy`.
    """
    benchmark = BENCHMARKS[name]
    rows: list[dict[str, Any]] = []
    for rule, scored in benchmark.rules.items():
        if name == "mme":
            found = mme.score(lines, [scored(line) for line in lines])
        else:
            found = [
                {"group": group}
                | _figures([line for line in lines if _is_in(line, group)], name, rule)
                for group in (
                    "all",
                    *dict.fromkeys(g for line in lines for g in line.get("groups", ())),
                )
            ]
        rows += [{"rule": rule} | row for row in found]
    grouped = any(row["group"] != "all" for row in rows)
    return rows if grouped else [{k: v for k, v in row.items() if k != "group"} for row in rows]


def _is_in(line: Line, group: str) -> bool:
    return group == "all" or group in line["groups"]


def _figures(lines: Sequence[Line], name: str, rule: str) -> dict[str, Any]:
    benchmark = replace(BENCHMARKS[name], rules={rule: BENCHMARKS[name].rules[rule]})
    scores = units(lines, benchmark).scores[rule]
    figures: dict[str, Any] = {"questions": len(scores), "accuracy": float(scores.mean())}
    if name == "mmvp":
        pairs = replace(benchmark, unit=_pair)
        figures["both of a pair"] = float(units(lines, pairs).scores[rule].mean())
    if name == "pope":
        answers, labels = ([line[key] for line in lines] for key in ("answer", "label"))
        found = yesno.score(answers, labels, rule)
        figures |= {"F1": found.f1, "precision": found.precision, "recall": found.recall}
        figures |= {"yes": found.yes_rate, "neither": found.unread}
    if name == "hallusionbench":
        found = hallusionbench.score([benchmark.rules[rule](line) > 0 for line in lines], lines)
        figures = {key.replace("_", " "): value for key, value in asdict(found).items()}
        figures["all questions"] = figures.pop("question")
    if name == "amber-discriminative":
        read = amber.verdict if rule == "authors" else yesno.RULES[rule]
        verdicts = [read(line["answer"]) for line in lines]
        figures |= amber.discriminative([line["label"] for line in lines], verdicts)
        figures["neither"] = sum(verdict is None for verdict in verdicts) / len(verdicts)
    return figures


@dataclass(frozen=True)
class Answered:
    """The answers of one model to one file of a benchmark.

    Attributes:
        file: the answers file.
        model: folder or Hub name of the model.
        benchmark: a name in `BENCHMARKS`.
        lines: the answers.
        asked: the settings that the answers depend on, such as the suffix of the questions.
    """

    file: Path
    model: str
    benchmark: str
    lines: list[dict[str, Any]]
    asked: dict[str, Any]


def read_answered(path: str | Path) -> dict[str, Answered]:
    """Read the answers of one model that can be scored question by question.

    Args:
        path: an answers file, or the folder of a run, with one file for each file of questions.
            Captions are skipped if they have not been scored.

    Returns:
        Name of a file without its suffix -> its answers.

    Raises:
        FileNotFoundError: if `path` does not exist.
        ValueError: for another file, or answers without labels.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no answers file or folder {path}. Pass the --output of a run."
        )
    found: dict[str, Answered] = {}
    for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
        head, *lines = read_sheet(file, whole=True)
        name = head.get("benchmark") or _guess(lines)
        if not isinstance(name, str) or name not in BENCHMARKS:
            raise ValueError(f"{file} answers {name!r}, which is not a benchmark of this version.")
        lines = [line for line in lines if not line.get(UNUSED)]
        asked = head["asked"]
        if BENCHMARKS[name].rules is _CAPTIONS:
            lines, scored = _with_objects(file, lines)
            asked = asked | scored
        for line in lines:
            _check(file, line, name)
        if lines:
            model = str(head["asked"].get("model"))
            found[file.stem] = Answered(file, model, name, lines, asked)
    if not found:
        raise ValueError(
            f"{path} has no answers with labels. Name the --output of a run of "
            "`python -m realign.evaluate`."
        )
    return found


def _guess(lines: Sequence[Line]) -> str:
    """The benchmark of a file whose first line does not name it."""
    if not lines or "label" in lines[0]:
        return "pope"
    return "hallusionbench" if "gt_answer" in lines[0] else "chair"


def _with_objects(
    file: Path, lines: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The lines of captions with their hallucinated objects, and the lists that these come from.

    There are no lines if the captions were not scored.
    """
    objects = file.with_name(f"{file.stem}-objects.json")
    if not objects.exists():
        return [], {}
    content = read_object(objects, "Run the benchmark again.")
    try:
        found = {row["id"]: row for row in content["captions"]}
        if any(found[line["id"]]["answer"] != line["answer"] for line in lines):
            raise ValueError("a caption differs")
        named = [line | {"hallucinated": found[line["id"]]["hallucinated"]} for line in lines]
        return named, dict(content["lists"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{objects} does not fit {file} ({shorten(repr(error))}). Run the benchmark again."
        ) from error


def _check(file: Path, line: dict[str, Any], name: str) -> None:
    """Check a line, and add the label of an answer to HallusionBench of an earlier version."""
    if "gt_answer" in line:
        line.setdefault("label", "yes" if str(line["gt_answer"]) == "1" else "no")
    needed = ("question", "image", *BENCHMARKS[name].facts)
    if missing := [field for field in needed if field not in line]:
        raise ValueError(f"{file}: answer {line['id']!r} has no {', '.join(missing)}.")
    if not is_text(line["question"]) or not isinstance(line["image"], str | None):
        raise ValueError(f"{file}: question or image of answer {line['id']!r} is no text.")
    for fact, kind in (("options", dict), ("answers", list), ("label", str)):
        if fact in BENCHMARKS[name].facts and not isinstance(line[fact], kind):
            raise ValueError(f"{file}: {fact} of answer {line['id']!r} is no {kind.__name__}.")
    label = line.get("label")
    if BENCHMARKS[name].rules in (_YES_NO, _AMBER) or name == "mme":
        label = str(label).strip().lower()
        if label not in ("yes", "no"):
            raise ValueError(
                f"{file}: the label of answer {line['id']!r} is {label!r}, not yes or no."
            )
        line["label"] = label
