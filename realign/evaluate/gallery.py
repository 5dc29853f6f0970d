"""Gallery of two models' answers: `python -m realign.evaluate gallery BASE ALIGNED`.

The gallery is one HTML file that needs no network (`realign.pairs.page`). A card shows a question
with its image, both answers with the differing words marked, and the verdict of each rule.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePath
from typing import Any

from realign.data.errors import shorten
from realign.data.images import DataFolder, StoredImage
from realign.evaluate.benchmarks import BENCHMARKS, Answered, Line, units
from realign.evaluate.compare import match, read_models
from realign.files import check_file, check_overwritten
from realign.pairs.page import (
    Album,
    Answer,
    Card,
    Figure,
    Order,
    Page,
    Turn,
    check_numbers,
    spread,
    write_page,
)
from realign.pairs.stats import changed_words, difference

_STATES = {"fixed": "good", "broken": "bad", "both wrong": "low", "both right": "high"}
"""State of a question by a rule -> its tone. Fixed and broken mean that the score rose or fell."""
_DIFFER = "answers differ"
_CLASSES = ("fixed or broken by any rule", "both wrong", "both right")
"""Classes of questions in the order of their selection, named in the output and on the page."""
_GOLD = ("label", "answers")  # fields with the true answer
_SHOWN = {"id", "question", "image", "answer", *_GOLD}  # fields with a place of their own on a card
_OWN = {"hallucinated", "error"}  # fields of an answer, not of its question
_ORDERS: tuple[Order, ...] = (
    ("place", "Order of the file", "place", 1),
    ("most", "Most changed words", "changed", -1),
    ("fewest", "Fewest changed words", "changed", 1),
)


@dataclass(frozen=True)
class _Item:
    """A unit of a benchmark: usually one question, or the rotations of a question.

    Attributes:
        file: name of its file.
        titles: names of the two models.
        lines: answers of both models to each of its questions.
        scores: rule -> score of each model in [0, 1]. The first is the default rule.
        rules: the benchmark's rules, which score one answer.
    """

    file: str
    titles: tuple[str, str]
    lines: list[tuple[Line, Line]]
    scores: dict[str, tuple[float, float]]
    rules: Mapping[str, Callable[[Line], float]]

    def by(self, rule: str) -> tuple[float, float]:
        """The scores by a rule, or by the default rule if the benchmark does not have it."""
        return self.scores.get(rule) or next(iter(self.scores.values()))

    def verdict(self, rule: str, line: Line) -> tuple[str, str]:
        """Tone and word of one answer by a rule, or by the default rule."""
        return _verdict(self.rules.get(rule, next(iter(self.rules.values())))(line))

    def state(self, rule: str) -> str:
        """The state by a rule."""
        before, after = self.by(rule)
        if before != after:
            return "fixed" if after > before else "broken"
        return "both right" if after > 0.5 else "both wrong"

    @property
    def kind(self) -> int:
        """Place in `_CLASSES`."""
        states = {self.state(rule) for rule in self.scores}
        return 0 if states & {"fixed", "broken"} else int("both wrong" not in states) + 1


def write_gallery(
    first: str | Path,
    second: str | Path,
    output: str | Path,
    *,
    image_folder: str | Path | None = None,
    most: int = 500,
    side: int = 320,
) -> str:
    """Write the gallery.

    The page contains the images, so an image outside the folder is not read.

    Args:
        first: answers of the first model, such as the base: a file, or the folder of a run.
        second: answers of the second model to the same questions.
        output: HTML file to write.
        image_folder: folder that contains the images. None means the folder of `first`.
        most: maximum number of questions to show, chosen in the order of `_CLASSES`. The files
            share the room of a class, and each is sampled evenly. 0 shows all.
        side: longer side of a thumbnail, in pixels.

    Returns:
        The report: the numbers of each state by file and rule, the selection, and images that are
        not shown.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: for answers to different questions or without labels, a number out of range, or
            an output that would overwrite an input.
    """
    check_numbers(most=most, side=side)
    inputs = [Path(path) for path in (first, second, image_folder) if path is not None]
    check_overwritten("--output", output, inputs, (".html", ".htm"))
    items = _read(first, second)
    album = Album(side, DataFolder.of_images(Path(first), image_folder))
    choices = dict.fromkeys(rule for i in items if len(i.scores) > 1 for rule in i.scores)
    shown, selection = _selection(items, most)
    cards = [_card(item, [*choices, ""], album) for item in shown]
    by_file = {file: list(group) for file, group in groupby(items, lambda item: item.file)}
    files, table = list(by_file), _table(by_file)
    rules = {"": list(choices)} | {file: list(own[0].scores) for file, own in by_file.items()}
    totals = {
        file: {rule: _totals(members, rule) for rule in rules[file] or [""]}
        for file, members in {"": items, **by_file}.items()
    }
    count = f"{len(items):,} questions"
    count = count if len(shown) == len(items) else f"{len(shown):,} of {count}"
    heading = " → ".join(items[0].titles)
    page = Page(
        heading=heading,
        about=f"{count} in {files[0] if len(files) == 1 else f'{len(files)} files'}",
        figures=("Totals of all questions by file and rule", table),
        thing="question",
        all="All questions",
        cards=cards,
        images=album.images,
        orders=_ORDERS,
        labels=(*_STATES, _DIFFER),
        rules=rules,
        groups=files,
        totals=totals,
        notes=[note for note in (selection, album.report()) if note],
    )
    write_page(output, f"Answers: {heading}", page)
    wrote = f"wrote {output}: {count}, {Path(output).stat().st_size / 1e6:.1f} MB"
    return "\n".join([wrote, table, *page.notes])


def _read(first: str | Path, second: str | Path) -> list[_Item]:
    """Read and score the answers of both models. Single files may have any names."""
    before, after = read_models([Path(first), Path(second)], "ALIGNED")
    matched = match(str(first), before, str(second), after)
    items = []
    for file, one in before.items():
        models = _distinct(one.model, after[file].model) or _distinct(str(first), str(second))
        items += _items(file, one, matched[file], models or ("first model", "second model"))
    return items


def _items(
    file: str, one: Answered, second: Sequence[Line], titles: tuple[str, str]
) -> list[_Item]:
    """The units of a file, in the order of the first model's answers."""
    pairs = list(zip(one.lines, second, strict=True))
    benchmark = BENCHMARKS[one.benchmark]
    scored = [units(lines, benchmark) for lines in (one.lines, second)]
    groups: dict[str, list[tuple[Line, Line]]] = {name: [] for name in scored[0].ids}
    for pair in pairs:
        groups[benchmark.unit(pair[0])].append(pair)
    return [
        _Item(
            file,
            titles,
            group,
            {
                rule: (float(scored[0].scores[rule][place]), float(scored[1].scores[rule][place]))
                for rule in benchmark.rules
            },
            benchmark.rules,
        )
        for place, group in enumerate(groups.values())
    ]


def _distinct(first: str, second: str) -> tuple[str, str] | None:
    """Names without folders. Equal names have as many folders as they need; None if equal."""
    parts = [PurePath(name).parts for name in (first, second)]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if names[0] != names[1]:
            return names[0], names[1]
    return None


def _selection(items: list[_Item], most: int) -> tuple[list[_Item], str]:
    """The questions to show, in the order of their files, and a sentence about their selection."""
    if not most or most >= len(items):
        return items, ""
    taken: list[int] = []
    parts = []
    for kind, name in enumerate(_CLASSES):
        files: dict[str, list[int]] = {}
        for place, item in enumerate(items):
            if item.kind == kind:
                files.setdefault(item.file, []).append(place)
        before = len(taken)
        # A small file that needs less than its share leaves the rest to the larger ones.
        for place, members in enumerate(sorted(files.values(), key=len)):
            room = (most - len(taken)) // (len(files) - place)
            taken += [members[i] for i in spread(len(members), room)]
        parts.append(f"{len(taken) - before:,} of {sum(map(len, files.values())):,} {name}")
    several = ", with equal room for each file" * (len({item.file for item in items}) > 1)
    sampling = f"Each part is sampled evenly{several} (--most {most})."
    shown = [items[place] for place in sorted(taken)]
    return shown, f"Questions shown: {', '.join(parts)}. {sampling}"


def _totals(items: list[_Item], rule: str) -> list[tuple[str, int, str]]:
    counts = Counter(item.state(rule) for item in items)
    return [(state, counts[state], tone) for state, tone in _STATES.items()]


def _table(by_file: Mapping[str, list[_Item]]) -> str:
    """Totals of each file by each of its rules."""
    rows = [("file", "rule", "questions", *_STATES)]
    for file, members in by_file.items():
        for rule in members[0].scores:
            numbers = [f"{number:,}" for _, number, _ in _totals(members, rule)]
            rows.append((file, rule, f"{len(members):,}", *numbers))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _card(item: _Item, rules: list[str], album: Album) -> Card:
    """The card of a question. The rule "" is the default rule."""
    images = list(
        dict.fromkeys(line["image"] for line, _ in item.lines if line["image"] is not None)
    )
    places = album.places_of(StoredImage(path=image) for image in images)
    states = {rule: item.state(rule) for rule in rules}
    extra = [_DIFFER] * any(one["answer"] != two["answer"] for one, two in item.lines)
    extra += ["no answer"] * any(_failed(line) for pair in item.lines for line in pair)
    extra += ["image not shown"] * any("problem" in album.images[place] for place in places)
    turns, facts, changed = [], [("file", item.file)] + [("image", image) for image in images], 0
    for pair in item.lines:
        sides = difference(*(line["answer"] for line in pair))
        changed += max(map(changed_words, sides))
        own = [key for key in {**pair[0], **pair[1]} if key not in _SHOWN]
        shared = [k for k in own if k not in _OWN and pair[0].get(k) == pair[1].get(k)]
        facts += [(key.replace("_", " "), _text(pair[0][key])) for key in shared]
        gold = [("gold label", _text(pair[0][key])) for key in _GOLD if key in pair[0]]
        answers = [
            Answer(
                title,
                side,
                {rule: item.verdict(rule, pair[place]) for rule in rules},
                _note(pair[place], [key for key in own if key not in shared]),
            )
            for place, (title, side) in enumerate(zip(item.titles, sides, strict=True))
        ]
        turns.append(Turn([("", pair[0]["question"]), *gold[:1]], answers))
    return Card(
        id=item.lines[0][0]["id"],
        figures=[Figure("Image", places, ", ".join(PurePath(i).name for i in images))]
        * bool(images),
        turns=turns,
        labels={rule: [state, *extra] for rule, state in states.items()},
        sort={"changed": changed},
        states={rule: (_STATES[state], state) for rule, state in states.items()},
        chips=_chips(item),
        facts=facts,
        group=item.file,
    )


def _chips(item: _Item) -> list[dict[str, str]]:
    """The verdicts of all rules. Rules with the same verdicts share one entry."""
    named: dict[tuple[float, float], list[str]] = {}
    for rule, scores in item.scores.items():
        named.setdefault(scores, []).append(rule)
    return [
        {
            "name": ", ".join(names),
            "value": " → ".join(_verdict(score)[1] for score in scores),
            "tone": "" if scores[0] == scores[1] else "good" if scores[1] > scores[0] else "bad",
        }
        for scores, names in named.items()
    ]


def _verdict(score: float) -> tuple[str, str]:
    """Tone and word of a score."""
    return {1.0: ("good", "right"), 0.0: ("bad", "wrong")}.get(score, ("part", f"{score:.2f}"))


def _note(line: Line, keys: list[str]) -> str:
    return "; ".join(f"{key.replace('_', ' ')}: {_text(line[key])}" for key in keys if key in line)


def _failed(line: Mapping[str, Any]) -> bool:
    return bool(line.get("error")) and line["answer"] == ""


def _text(value: Any) -> str:
    """A value of an answers file as text. Equal items of a list are counted, such as coke x 7."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        counts = Counter(map(_text, value)).most_common()
        once = len(counts) == len(value)
        return ", ".join(text if once else f"{text} x {n}" for text, n in counts) or "none"
    return "none" if value is None else shorten(str(value))


def gallery(args: argparse.Namespace) -> str:
    """Write the gallery of two models' answers. Returns a report."""
    check_file("--output", args.output)
    options = {"image_folder": args.image_folder, "most": args.most, "side": args.side}
    return write_gallery(args.base, args.aligned, args.output, **options)


def add_parser(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command to the parser of `realign.evaluate`."""
    command = add("gallery", gallery, "before after --image-folder val2014")
    for name, model in (("base", "first"), ("aligned", "second")):
        command.add_argument(
            name, metavar=name.upper(), help=f"Answers of the {model} model: a file or a folder."
        )
    command.add_argument(
        "--image-folder",
        metavar="FOLDER",
        help="Folder of the images. Images outside of it are not shown. Without it, the folder of "
        "BASE.",
    )
    command.add_argument(
        "--output", default="gallery.html", metavar="FILE", help="HTML file to write."
    )
    command.add_argument(
        "--most",
        type=int,
        default=500,
        metavar="N",
        help="Maximum number of questions to show: first fixed and broken ones, then both wrong, "
        "then both right. 0 shows all.",
    )
    command.add_argument(
        "--side", type=int, default=320, metavar="PIXELS", help="Longer side of a thumbnail."
    )
