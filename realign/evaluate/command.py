"""Benchmarks of photographs: `python -m realign.evaluate pope|chair|hallusionbench|...`.

`pope`, `chair` and `hallusionbench` ask a model the questions of a benchmark and print the figures.
They save all answers in JSON-lines files (`answering`), so a stopped run resumes. `compare`
compares two such files, or two folders. `handoff` prepares a model for lmms-eval and VLMEvalKit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from realign.cli import CommandParser
from realign.config import check_pixels
from realign.data.errors import short_repr, shorten
from realign.evaluate import chair, compare, files, hallusionbench, tables, yesno
from realign.evaluate.answering import Question, Sheet, answer, prepare
from realign.evaluate.handoff import hand_off
from realign.files import check_file, check_folder, write_whole
from realign.terminal import show

SHORT = "\nAnswer the question using a single word or phrase."
"""Suffix of a yes/no question in LLaVA and lmms-eval."""
CAPTION = "Please describe this image in detail."
"""Usual prompt of CHAIR in papers on hallucination."""

_LEAST = {"limit": 0, "most": 0, "seed": 0, "batch_size": 1, "max_tokens": 1, "workers": 0}

_PIXELS = ("min_pixels", "max_pixels")

_POPE = {
    "question_id": files.KEY,
    "text": files.TEXT,
    "image": files.TEXT,
    "label": (lambda value: str(value).strip().lower() in ("yes", "no"), "yes or no"),
}
_POPE_FILE = "Give a file of POPE, such as coco_pope_random.json."
_HALLUSION = {"question": files.TEXT} | dict.fromkeys(hallusionbench.NEEDED, files.KEY)
_HALLUSION["gt_answer"] = (lambda value: str(value) in ("0", "1"), "0 or 1")
_HALLUSION_FILE = "Give HallusionBench.json."


def run(words: Sequence[str]) -> int:
    """Run one command. Returns an exit code.

    Raises:
        ValueError: for invalid input.
        OSError: for missing files.
    """
    args = _parser().parse_args(words)
    for name, minimum in _LEAST.items():
        value = getattr(args, name, None)
        if value is not None and value < minimum:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is {value}; it must be {minimum} or more.")
    check_pixels(*(getattr(args, name, None) for name in _PIXELS))
    show(args.run(args))
    return 0


def pope(args: argparse.Namespace) -> str:
    """Ask the questions of each POPE file, and score the answers by every rule.

    Raises:
        ValueError: for two files of the same name, whose answers would share a file.
    """
    sheets: dict[str, Sheet] = {}
    for file in args.questions:
        if (name := Path(file).stem) in sheets:
            raise ValueError(
                f"two files are called {name}, so their answers would share one file. Rename one."
            )
        items = [
            Question(
                str(item["question_id"]), item["text"], item["image"], {"label": item["label"]}
            )
            for item in files.read_rows(file, _POPE, _POPE_FILE, args.limit)
        ]
        sheets[name] = _sheet(args, items, name, max_tokens=16, suffix=args.suffix)
    scores: dict[str, Any] = {}
    for name, lines in _answers(args, sheets).items():
        texts, labels = _column(lines, "answer"), _column(lines, "label")
        scores[name] = {rule: asdict(yesno.score(texts, labels, rule)) for rule in yesno.RULES}
    return _write_scores(args, scores, _lines(tables.pope(scores)))


def captions(args: argparse.Namespace) -> str:
    """Generate captions, and score the objects that they mention.

    Raises:
        ValueError: for an image without a file name, or a file of another kind.
    """
    vocabulary = chair.Vocabulary(args.synonyms or chair.OWN_SYNONYMS)
    names = {
        image["id"]: image.get("file_name")
        for image in files.read_instances(args.instances)["images"]
    }
    images = sorted(names)
    if args.most and args.most < len(images):
        images = sorted(np.random.default_rng(args.seed).permutation(images)[: args.most].tolist())
    images = images[: args.limit] if args.limit else images
    visible = chair.shown_objects(args.instances, args.reference, vocabulary, images)
    for image in images:
        if not files.is_text(names[image]):
            raise ValueError(f"{args.instances}: image {image} has no file_name.")
    items = [Question(str(image), args.prompt, names[image]) for image in images]
    sheet = _sheet(args, items, "chair", max_tokens=args.max_tokens)
    check_file("--output", Path(args.output) / "chair-objects.json")
    lines = _answers(args, {"chair": sheet})["chair"]
    texts = {int(line["id"]): line["answer"] for line in lines}
    chair_figures = chair.score(texts, visible, vocabulary)
    details = [
        line | {"hallucinated": chair.hallucinated(vocabulary.objects(text), visible[image])}
        for line, (image, text) in zip(lines, texts.items(), strict=True)
    ]
    objects = json.dumps(details, indent=1, ensure_ascii=False) + "\n"
    write_whole(Path(args.output) / "chair-objects.json", objects)
    scores = {"synonyms": args.synonyms or tables.OWN, **asdict(chair_figures)}
    table = f"{_lines(tables.chair(scores))}\nobjects by {scores['synonyms']}"
    return _write_scores(args, scores, table)


def hallusion(args: argparse.Namespace) -> str:
    """Ask the questions of HallusionBench, and score the answers by every rule.

    Raises:
        ValueError: for a file name that is not text, or a file of another kind.
    """
    rows = files.read_rows(args.questions, _HALLUSION, _HALLUSION_FILE, args.limit)
    items = []
    for row in rows:
        names = [str(row[n]) for n in hallusionbench.NEEDED[:-1]]
        file = row.get("filename")
        if file is not None and not files.is_text(file):
            raise ValueError(f"{args.questions}: filename is {short_repr(file)}, not text.")
        has_image = str(row.get("visual_input", "1")) != "0" and file
        items.append(
            Question("_".join(names), row["question"], file if has_image else None, dict(row))
        )
    for item in items:
        item.facts.pop("question")
    sheet = _sheet(args, items, "hallusionbench", max_tokens=16, suffix=args.suffix)
    texts = _column(_answers(args, {"hallusionbench": sheet})["hallusionbench"], "answer")
    scores = {
        rule: asdict(hallusionbench.score(hallusionbench.correct(texts, rows, rule), rows))
        for rule in yesno.RULES
    }
    return _write_scores(args, scores, _lines(tables.hallusionbench(scores)))


def handoff(args: argparse.Namespace) -> str:
    """Write a model folder for lmms-eval and VLMEvalKit."""
    return hand_off(args.model, args.output, args.base)


def _sheet(
    args: argparse.Namespace,
    items: Sequence[Question],
    name: str,
    *,
    max_tokens: int,
    suffix: str = "",
) -> Sheet:
    """Check the questions and the output paths."""
    check_folder("--output", args.output)
    check_file("--output", Path(args.output) / f"{args.command}.json")
    return prepare(
        items,
        args.image_folder,
        Path(args.output) / f"{name}.jsonl",
        model=args.model,
        max_tokens=max_tokens,
        suffix=suffix,
        pixels={name: getattr(args, name) for name in _PIXELS},
    )


def _answers(
    args: argparse.Namespace, sheets: Mapping[str, Sheet]
) -> dict[str, list[dict[str, Any]]]:
    """Answer the questions of all sheets. Returns the answers by sheet name."""
    from realign.pairs.engines import make_engine

    names = ("batch_size", "dtype", "workers", *_PIXELS)
    options = {name: getattr(args, name) for name in names}
    engine = make_engine(f"transformers:{args.model}", **options)
    try:
        answers = {
            name: answer(engine, sheet, progress=not args.quiet) for name, sheet in sheets.items()
        }
    finally:
        engine.close()
    for lines in answers.values():
        if failed := [line for line in lines if line.get("error") and line["answer"] == ""]:
            why = shorten(str(failed[0]["error"]))
            show(f"{len(failed)} of {len(lines)} questions have no answer ({why})")
    return answers


def _column(lines: Sequence[dict[str, Any]], name: str) -> list[str]:
    return [line[name] for line in lines]


def _write_scores(args: argparse.Namespace, scores: dict[str, Any], table: str) -> str:
    """Write the scores to the folder of the answers. Returns the table."""
    path = Path(args.output) / f"{args.command}.json"
    content = {"model": args.model, "scores": scores}
    write_whole(path, json.dumps(content, indent=2) + "\n")
    return f"{table}\nwrote {path}"


def _lines(table: tables.Table) -> str:
    widths = [max(map(len, column)) for column in zip(table.heads, *table.rows, strict=True)]
    lines = [table.heads, ["-" * width for width in widths], *table.rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _parser() -> argparse.ArgumentParser:
    prog = "python -m realign.evaluate"
    parser = CommandParser(prog=prog)
    commands = parser.add_subparsers(
        dest="command", required=True, prog=prog, parser_class=CommandParser
    )

    def add(name: str, function: Callable, example: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            description=COMMANDS[name] + ".",
            example=f"python -m realign.evaluate {name} {example}",
        )
        command.set_defaults(run=function)
        return command

    def add_model(command: argparse.ArgumentParser) -> None:
        add = command.add_argument
        add("--model", required=True, help="Folder or Hub name of a model or an adapter. Required.")
        add(
            "--image-folder",
            required=True,
            metavar="FOLDER",
            help="Folder of the images. Required.",
        )
        add(
            "--output",
            required=True,
            metavar="FOLDER",
            help="Folder for answers and figures. A stopped run resumes from it. Required.",
        )
        add("--batch-size", type=int, default=16, metavar="N", help="Answers generated together.")
        add(
            "--workers",
            type=int,
            metavar="N",
            help="Threads that decode and preprocess images ahead of the model. 0 uses none. "
            "Without it, the cores of this process, at most 8.",
        )
        add(
            "--dtype",
            choices=("fp32", "bf16"),
            help="Precision of the computation. Without it, bf16 on a GPU and fp32 on a CPU.",
        )
        for limit, about in (("min", "Enlarge smaller"), ("max", "Reduce larger")):
            add(
                f"--{limit}-pixels",
                type=int,
                metavar="N",
                help=f"{about} images to this number of pixels, for processors that count pixels, "
                "as Qwen's do. Without it, the processor's, which a trained model keeps.",
            )
        add("--limit", type=int, default=0, metavar="N", help="Questions to use. 0 uses all.")
        add("--quiet", action="store_true", help="Print no progress.")

    def add_suffix(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--suffix",
            default=SHORT,
            metavar="TEXT",
            help="Text appended to every question. Default: a new line and "
            f"'{SHORT.strip().replace('%', '%%')}'",
        )

    files = "\\\n    --model runs/llava/model --image-folder val2014 --output answers"
    command = add("pope", pope, f"coco_pope_random.json {files}")
    command.add_argument(
        "questions", nargs="+", metavar="FILE", help="POPE file, such as coco_pope_random.json."
    )
    add_suffix(command)
    add_model(command)
    command = add(
        "chair",
        captions,
        "\\\n    --instances instances_val2014.json --reference captions_val2014.json " + files,
    )
    for flag in ("instances", "reference"):
        file = {"instances": "instances_val2014.json", "reference": "captions_val2014.json"}[flag]
        command.add_argument(
            f"--{flag}", required=True, metavar="FILE", help=f"COCO's {file}. Required."
        )
    command.add_argument(
        "--synonyms",
        metavar="FILE",
        help="synonyms.txt of the authors of CHAIR. Without it, the list of this package is used.",
    )
    command.add_argument("--prompt", default=CAPTION, metavar="TEXT", help="Prompt for a caption.")
    command.add_argument(
        "--max-tokens",
        type=int,
        default=512,
        metavar="N",
        help="Maximum number of tokens in a caption.",
    )
    command.add_argument(
        "--most", type=int, default=500, metavar="N", help="Images to sample. 0 uses all images."
    )
    command.add_argument(
        "--seed", type=int, default=0, metavar="N", help="Seed of the sample of images."
    )
    add_model(command)
    command = add("hallusionbench", hallusion, f"HallusionBench.json {files}")
    command.add_argument("questions", metavar="FILE", help="HallusionBench.json.")
    add_suffix(command)
    add_model(command)
    compare.add_parser(add)
    command = add("handoff", handoff, "\\\n    --model runs/llava/model --output llava-merged")
    command.add_argument(
        "--model",
        required=True,
        help="Folder or Hub name. An adapter is merged into its base. Required.",
    )
    command.add_argument(
        "--base",
        metavar="MODEL",
        help="Folder or Hub name of the model before training. Required unless --model is an "
        "adapter, which names its base.",
    )
    command.add_argument(
        "--output", required=True, metavar="FOLDER", help="Folder to write. Required."
    )
    return parser


COMMANDS = {
    "pope": "POPE: yes/no questions about objects, scored by three rules",
    "chair": "CHAIR: objects in captions that are not in the image",
    "hallusionbench": "HallusionBench, scored by rules instead of GPT-4",
    "compare": "Compare two models by McNemar's test and a bootstrap",
    "handoff": "Write a merged folder for lmms-eval and VLMEvalKit",
}
"""Command -> summary."""
