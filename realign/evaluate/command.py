"""Benchmarks of photographs: `python -m realign.evaluate BENCHMARK FILE --model MODEL ...`.

A benchmark asks a model its questions and prints the figures. All answers are saved in JSON-lines
files (`answering`), so a stopped run resumes. `compare` compares such files, or folders of them,
and `gallery` shows them. `handoff` prepares a model for lmms-eval and VLMEvalKit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from realign.cli import CommandParser
from realign.config import check_pixels
from realign.data.errors import shorten
from realign.evaluate import amber, chair, compare, files, gallery, sets, tables
from realign.evaluate.answering import Question, Sheet, answer, prepare, unanswered
from realign.evaluate.benchmarks import BENCHMARKS, report
from realign.evaluate.handoff import hand_off
from realign.files import check_file, check_folder, read_json, write_whole
from realign.terminal import show

SHORT = "\nAnswer the question using a single word or phrase."
"""Suffix of a short question in LLaVA and lmms-eval."""
YES_NO = "\nPlease answer yes or no."
"""Suffix of AMBER's yes/no questions in VLMEvalKit."""
UNANSWERABLE = (
    f"\nWhen the provided information is insufficient, respond with 'Unanswerable'.{SHORT}"
)
"""Suffix of VizWiz's questions in lmms-eval."""
CAPTION = "Please describe this image in detail."
"""Usual prompt of CHAIR in papers on hallucination."""

_LEAST = {"limit": 0, "most": 0, "seed": 0, "batch_size": 1, "max_tokens": 1, "workers": 0}
_PIXELS = ("min_pixels", "max_pixels")
_PART = 4  # batches between two writes to the disk


@dataclass(frozen=True)
class Asked:
    """How a benchmark is asked.

    Attributes:
        summary: for the list of commands.
        read: reader of its questions.
        files: what to give, for the help.
        example: arguments of an example.
        suffix: text appended to every question by default.
        images: image folder of an example.
        max_tokens: default limit on an answer.
        several: whether several files may be given.
    """

    summary: str
    read: Callable[[sets.Source], sets.Sheets]
    files: str
    example: str
    suffix: str = sets.LETTER
    images: str = "images"
    max_tokens: int = 16
    several: bool = True


ASKED = {
    "pope": Asked(
        "POPE: yes/no questions about objects, scored by three rules",
        sets.pope,
        "POPE file, such as coco_pope_random.json.",
        "coco_pope_random.json",
        SHORT,
        "val2014",
    ),
    "hallusionbench": Asked(
        "HallusionBench, scored by rules instead of GPT-4",
        sets.hallusion,
        "HallusionBench.json.",
        "HallusionBench.json",
        SHORT,
        several=False,
    ),
    "amber": Asked(
        "AMBER: objects in captions by word lists, and yes/no questions",
        sets.amber,
        "Folder `data` of AMBER's repository.",
        "AMBER/data",
        YES_NO,
        several=False,
    ),
    "mme": Asked(
        "MME: pairs of yes/no questions, perception and cognition",
        sets.mme,
        "Folder of MME's release, which is also the --image-folder, or Parquet or TSV files.",
        "MME.tsv",
        "",
    ),
    "mmstar": Asked(
        "MMStar: multiple choice",
        sets.mmstar,
        "mmstar.parquet or MMStar.tsv.",
        "mmstar.parquet",
    ),
    "mmbench": Asked(
        "MMBench's dev split: multiple choice in all rotations",
        sets.mmbench,
        "TSV or Parquet files of the dev split, such as MMBench_DEV_EN.tsv.",
        "MMBench_DEV_EN.tsv",
    ),
    "mmvp": Asked(
        "MMVP: multiple choice in pairs of similar images",
        sets.mmvp,
        "Questions.csv, or the Parquet file.",
        "Questions.csv",
    ),
    "realworldqa": Asked(
        "RealWorldQA: multiple choice and short answers",
        sets.realworldqa,
        "annotations.jsonl, the Parquet files, or RealWorldQA.tsv.",
        "annotations.jsonl",
        "",
    ),
    "scienceqa": Asked(
        "ScienceQA: multiple choice, with and without images",
        sets.scienceqa,
        "problems.json, with pid_splits.json beside it, or the Parquet files.",
        "problems.json",
    ),
    "textvqa": Asked(
        "TextVQA's val split, by VQA accuracy",
        sets.textvqa,
        "TextVQA_0.5.1_val.json, or the Parquet files.",
        "TextVQA_0.5.1_val.json",
        SHORT,
        max_tokens=32,
    ),
    "vizwiz": Asked(
        "VizWiz's val split, by VQA accuracy",
        sets.vizwiz,
        "val.json, or the Parquet files.",
        "val.json",
        UNANSWERABLE,
        max_tokens=32,
    ),
}
"""Command -> how its benchmark is asked."""


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


def ask(args: argparse.Namespace) -> str:
    """Ask the questions of a benchmark, and score the answers by its rules.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: for a file of another kind, or answers of another model in `--output`.
    """
    words = _words(args)
    options = {name: getattr(args, name) for name in ("split", "part") if hasattr(args, name)}
    source = sets.Source(args.questions, args.image_folder, args.limit, **options)
    sheets: dict[str, Sheet] = {}
    for name, questions in ASKED[args.command].read(source).items():
        captions = name == "amber-generative"
        sheets[name] = _sheet(
            args,
            questions,
            name,
            benchmark=name if name in BENCHMARKS else args.command,
            max_tokens=args.caption_tokens if captions else args.max_tokens,
            suffix="" if captions else args.suffix,
        )
    lists = None
    if "amber-generative" in sheets:
        check_file("--output", Path(args.output) / "amber-generative-objects.json")
        folder = Path(args.questions[0])
        lists = amber.Lists(folder / "relation.json", folder / "safe_words.txt")
        for question in sheets["amber-generative"].questions:
            amber.caption("", question.facts, lists)  # an unknown object is found before the model
    answers = _answers(args, sheets)
    parts: dict[str, list[dict[str, Any]]] = {}
    for name, lines in answers.items():
        benchmark = sheets[name].benchmark or args.command
        if name == "amber-generative":
            assert lists is not None
            parts[f"AMBER, captions, by {words.name}"] = _amber_captions(args, lines, lists, words)
            continue
        file = {"file": name} if args.command == "pope" else {}
        rows = [file | row for row in report(lines, benchmark)]
        parts.setdefault(BENCHMARKS[benchmark].title, []).extend(rows)
    if args.command == "amber" and len(parts) == 2:
        (figures,), questions = parts.values()
        for row in questions:  # the paper's score of both parts
            both = (1 - figures["CHAIR"] + row["F1"]) / 2
            row["AMBER score"] = both if row["group"] == "all" else None
    return _write_scores(args, parts, answers)


def _words(args: argparse.Namespace) -> amber.Words:
    return amber.authors_words() if getattr(args, "authors_words", False) else amber.OWN_WORDS


def _amber_captions(
    args: argparse.Namespace,
    lines: Sequence[Mapping[str, Any]],
    lists: amber.Lists,
    words: amber.Words,
) -> list[dict[str, Any]]:
    counted = [amber.caption(line["answer"], line, lists, words) for line in lines]
    found = [caption.hallucinated for caption in counted]
    content = [sorted(lists.related.items()), sorted(lists.safe)]
    used = {"words": words.name, "word lists": _digest(content)}
    _write_objects(args, "amber-generative", lines, found, used)
    figures = amber.generative(counted)
    return [
        {"captions": figures.captions, "CHAIR": figures.chair, "Cover": figures.cover}
        | {"Hal": figures.hal, "Cog": figures.cog}
    ]


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
    sheet = _sheet(args, items, "chair", benchmark="chair", max_tokens=args.max_tokens)
    check_file("--output", Path(args.output) / "chair-objects.json")
    answers = _answers(args, {"chair": sheet})
    lines = answers["chair"]
    texts = {int(line["id"]): line["answer"] for line in lines}
    objects = [
        chair.hallucinated(vocabulary.objects(text), visible[image])
        for image, text in texts.items()
    ]
    shown = sorted((image, sorted(names)) for image, names in visible.items())
    used = {"synonyms": _digest(vocabulary.content), "annotations": _digest(shown)}
    _write_objects(args, "chair", lines, objects, used)
    found = asdict(chair.score(texts, visible, vocabulary))
    # The folder of the synonyms is private.
    synonyms = Path(args.synonyms).name if args.synonyms else chair.OWN
    heads = {"chair_s": "CHAIR-s", "chair_i": "CHAIR-i"}
    row = {heads.get(name, name): value for name, value in found.items()}
    return _write_scores(args, {f"CHAIR, objects by {synonyms}": [row]}, answers)


def handoff(args: argparse.Namespace) -> str:
    """Write a model folder for lmms-eval and VLMEvalKit."""
    return hand_off(args.model, args.output, args.base)


def _sheet(
    args: argparse.Namespace,
    items: Sequence[Question],
    name: str,
    *,
    benchmark: str,
    max_tokens: int,
    suffix: str = "",
) -> Sheet:
    """Check the questions and the output paths."""
    check_folder("--output", args.output)
    _check_scores(Path(args.output) / f"{args.command}.json")
    return prepare(
        items,
        args.image_folder,
        Path(args.output) / f"{name}.jsonl",
        model=args.model,
        max_tokens=max_tokens,
        suffix=suffix,
        settings={name: getattr(args, name) for name in _PIXELS} | {"dtype": _dtype(args)},
        benchmark=benchmark,
    )


def _dtype(args: argparse.Namespace) -> str:
    """Dtype of the computation, which the engine chooses by the device."""
    return args.dtype or ("bf16" if torch.cuda.is_available() else "fp32")


def _answers(
    args: argparse.Namespace, sheets: Mapping[str, Sheet]
) -> dict[str, list[dict[str, Any]]]:
    """Answer the questions of all sheets. Returns the answers by sheet name."""
    from realign.pairs.engines import make_engine

    names = ("batch_size", "dtype", "workers", *_PIXELS)
    options = {name: getattr(args, name) for name in names}
    engine = make_engine(f"transformers:{args.model}", **options)
    part = _PART * args.batch_size
    try:
        answers = {
            name: answer(engine, sheet, batch=part, progress=not args.quiet)
            for name, sheet in sheets.items()
        }
    finally:
        engine.close()
    for lines in answers.values():
        if failed := unanswered(lines):
            why = shorten(str(failed[0]["error"]))
            show(f"{len(failed)} of {len(lines)} questions have no answer ({why})")
    return answers


def _write_objects(
    args: argparse.Namespace,
    name: str,
    lines: Sequence[Mapping[str, Any]],
    objects: Sequence[list[str]],
    lists: Mapping[str, str],
) -> None:
    """Write the hallucinated objects of each caption, for `compare` and `gallery`.

    `lists` identifies what they come from. Captions that were scored by others are not compared.
    """
    rows = [{**line, "hallucinated": found} for line, found in zip(lines, objects, strict=True)]
    content = {"lists": lists, "captions": rows}
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_whole(Path(args.output) / f"{name}-objects.json", text)


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def _check_scores(path: Path) -> None:
    """Check that a file can be written, and that it is missing or holds scores.

    Raises:
        ValueError: for another file, such as the questions of a benchmark of the same name.
    """
    check_file("--output", path)
    if not path.is_file() or not path.stat().st_size:
        return
    try:
        scores = "scores" in read_json(path)
    except ValueError:
        scores = False
    if not scores:
        raise ValueError(
            f"{path} holds no scores, so it would be overwritten by them. Name another --output."
        )


def _write_scores(
    args: argparse.Namespace,
    parts: Mapping[str, list[dict[str, Any]]],
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
) -> str:
    """Write the scores to the folder of the answers. Returns their tables."""
    path = Path(args.output) / f"{args.command}.json"
    scores: dict[str, Any] = {"parts": parts}
    if failed := sum(len(unanswered(lines)) for lines in answers.values()):
        scores["unanswered"] = failed
    content = {"model": args.model, "scores": scores}
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    shown = [f"{table.title}\n{tables.text(table)}" for table in tables.tables_of(scores)]
    return "\n\n".join(shown) + f"\nwrote {path}"


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

    def add_amber(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--part",
            choices=("all", "generative", "discriminative"),
            default="all",
            help="Part of the benchmark: captions, yes/no questions, or both.",
        )
        command.add_argument(
            "--authors-words",
            action="store_true",
            help="Find nouns and similar words with the packages of the authors.",
        )
        command.add_argument(
            "--caption-tokens",
            type=int,
            default=512,
            metavar="N",
            help="Maximum number of tokens in a caption.",
        )

    answers = "\\\n    --model runs/llava/model --image-folder {} --output answers"
    for name, asked in ASKED.items():
        command = add(name, ask, f"{asked.example} {answers.format(asked.images)}")
        several = asked.several
        command.add_argument(
            "questions",
            nargs="+" if several else 1,
            metavar="FOLDER" if name == "amber" else "FILE",
            help=asked.files,
        )
        if name == "scienceqa":
            command.add_argument(
                "--split", default="test", metavar="NAME", help="Split of pid_splits.json."
            )
        if name == "amber":
            add_amber(command)
        shown = asked.suffix.strip().replace("\n", " ").replace("%", "%%")
        command.add_argument(
            "--suffix",
            default=asked.suffix,
            metavar="TEXT",
            help="Text appended to every question. Default: "
            + (f"a new line and '{shown}'" if shown else "none, since the file has it."),
        )
        command.add_argument(
            "--max-tokens",
            type=int,
            default=asked.max_tokens,
            metavar="N",
            help="Maximum number of tokens in an answer.",
        )
        add_model(command)
    command = add(
        "chair",
        captions,
        "\\\n    --instances instances_val2014.json --reference captions_val2014.json "
        + answers.format("val2014"),
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
    compare.add_parser(add)
    gallery.add_parser(add)
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
    **{name: asked.summary for name, asked in ASKED.items()},
    "chair": "CHAIR: objects in captions that are not in the image",
    "compare": "Compare models by McNemar's and other paired tests",
    "gallery": "Write an HTML page of two models' answers",
    "handoff": "Write a merged folder for lmms-eval and VLMEvalKit",
}
"""Command -> summary."""
