"""Preference data of other projects in their published layouts, and the records that they are.

A case is a file with its items, further files beside it, and the expected records. Keys, nesting
and image references are those of each project's loader, data card or sample file (docs/data.md).
The images `a.jpg` to `d.jpg` are beside the file.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from import_cases import assistant, user
from PIL import Image

NAMES = "abcd"
ASK, ASKED = "What is it?", [user("What is it?")]
TAGGED = [user("<image>\nWhat is it?")]
SHARE = [{"from": "human", "value": "<image>\nWhat is it?"}]
TALK = [*SHARE, {"from": "gpt", "value": "A pet."}, {"from": "human", "value": "Which?"}]
TALKED = [*TAGGED, assistant("A pet."), user("Which?")]
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: {} ASSISTANT:"
)


def colour(name: str) -> tuple[int, int, int]:
    return (60 * NAMES.index(name), 100, 200)


def encoded(name: str) -> bytes:
    """The bytes of an image file."""
    return Path(f"{name}.jpg").read_bytes()


def make_images(folder: Path) -> None:
    for name in NAMES:
        Image.new("RGB", (8, 8), colour(name)).save(folder / f"{name}.jpg")


@dataclass(frozen=True)
class Expected:
    """A record: its prompt as in the file, its responses, and the letters of its images."""

    chosen: str = "A cat."
    rejected: str = "A dog."
    prompt: list = field(default_factory=lambda: ASKED)
    placed: list | None = None  # prompt of realign.pairs, which places the images; None is ASKED
    images: str = "a"
    retrieved: str = ""


@dataclass(frozen=True)
class Case:
    """A file of a data set."""

    file: str
    items: list | dict
    records: list[Expected]
    beside: dict[str, Any] = field(default_factory=dict)  # further files
    rows: bool = True  # whether RDPOTrainer gets the items as rows, too
    table: bool = True  # whether the rows fit into one Arrow table


def embedded(name: str) -> dict[str, Any]:
    return {"bytes": encoded(name), "path": f"{name}.jpg"}


def both(**columns: Any) -> dict[str, Any]:
    return {"chosen": "A cat.", "rejected": "A dog.", **columns}


def rating(*aspects: str) -> dict[str, Any]:
    names = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")
    return {
        name: {"Rating": value, "Rationale": "why"}
        for name, value in zip(names, aspects, strict=True)
    }


def cases() -> dict[str, Case]:
    """Name -> case. Call it in the folder of the images."""
    gpt = {name: {"from": "gpt", "value": text} for name, text in both().items()}
    implicit = {
        "chosen": [*ASKED, assistant("A cat.")],
        "rejected": [*ASKED, assistant("A dog.")],
    }
    swift = {"messages": [*TAGGED, assistant("A cat.")], "images": ["a.jpg"]}
    rated = [
        {"model": "m1", "response": "A cow.", "annotations": rating("3", "5", "3")},
        {"model": "m2", "response": "A dog.", "annotations": rating("1", "5", "2")},
        {"model": "m3", "response": "A cat.", "annotations": rating("5", "5", "4")},
        {"model": "m4", "response": "A bat.", "annotations": rating("N/A", "5", "4")},
    ]
    tagged = Expected(prompt=TAGGED)
    numbered = "Image-1: <image>\nImage-2: <image>\nCompare."
    parts = [
        {"type": "text", "text": "Image-1:"},
        {"type": "image"},
        {"type": "text", "text": "Image-2:"},
        {"type": "image"},
        {"type": "text", "text": "Compare."},
    ]
    two = Expected(prompt=[user(numbered)], placed=[user(parts)], images="ab")
    mmpr = [
        {"image": "a.jpg", "question": "<image>\nWhat is it?", **both()},
        {"image": ["a.jpg", "b.jpg"], "question": numbered, **both()},
        {"image": "c.jpg", "question": ASK, **both()},
    ]
    mmpr_records = [tagged, two, Expected(images="c")]
    opa = {
        "queries": "<image>\nWhat is it?",
        "image_bytes": base64.b64encode(encoded("a")).decode(),
        "standard_response": "A tame cat.",
        "AI_pseudo_response": "A cat.",
        "original_generate_response": "A dog.",
        "AI_json_report": "{}",
    }
    return {
        "TRL Parquet": Case(
            "train.parquet",
            [
                {
                    "prompt": ASKED,
                    "chosen": [assistant("A cat.")],
                    "rejected": [assistant("A dog.")],
                    "images": [embedded("a")],
                    "chosen_score": 4.5,
                    "source": "web",
                }
            ],
            [Expected()],
        ),
        "TRL JSON lines, single image": Case(
            "train.jsonl", [both(prompt=ASK, image="a.jpg")], [Expected()]
        ),
        "TRL, implicit prompt": Case(
            "train.json", [implicit | {"images": ["b.jpg"]}], [Expected(images="b")]
        ),
        "RLAIF-V": Case(
            "RLAIF-V-Dataset_000.parquet",
            [
                both(
                    ds_name="RLAIF-V",
                    image=embedded("a"),
                    question=ASK,
                    origin_dataset="coco",
                    origin_split='{"model": "m"}',
                    idx=7,
                    image_path="x/a.jpg",
                )
            ],
            [Expected()],
        ),
        "RLHF-V": Case(
            "RLHF-V-Dataset.parquet",
            [
                {
                    "ds_name": "RLHF-V",
                    "image": embedded("a"),
                    "text": json.dumps(both(question=ASK)),
                    "origin_dataset": "vqav2",
                    "origin_split": "train",
                    "idx": 3,
                    "image_path": "x/a.jpg",
                }
            ],
            [Expected()],
        ),
        "LLaMA-Factory's RLHF-V": Case(
            "rlhf-v.parquet", [gpt | {"conversations": SHARE, "images": [embedded("a")]}], [tagged]
        ),
        "MMPR": Case("annotation.jsonl", mmpr, mmpr_records, table=False),
        "MMPR by its meta file": Case(
            "meta.json",
            {
                "one": {
                    "root": "images/one",
                    "annotation": "annotations/one.jsonl",
                    "data_augment": False,
                    "repeat_time": 1,
                    "length": 2,
                },
                "two": {"root": "", "annotation": "annotations/two.jsonl", "length": 1},
            },
            [Expected(images="d"), two],
            {
                "annotations/one.jsonl": [{"image": "d.jpg", "question": ASK, **both()}],
                "annotations/two.jsonl": [mmpr[1]],
                "images/one/d.jpg": None,
            },
            rows=False,
        ),
        "ms-swift": Case("swift.jsonl", [swift | {"rejected_response": "A dog."}], [tagged]),
        "ms-swift messages": Case(
            "swift.jsonl",
            [
                swift
                | {
                    "rejected_messages": [*TAGGED, assistant("A dog.")],
                    "rejected_images": ["a.jpg"],
                }
            ],
            [tagged],
        ),
        "ms-swift query": Case(
            "swift.jsonl",
            [
                {
                    "query": "<image>Which?",
                    "response": "A cat.",
                    "rejected_response": "A dog.",
                    "history": [["What is it?", "A pet."]],
                    "system": "Be brief.",
                    "images": ["a.jpg"],
                }
            ],
            [
                Expected(
                    prompt=[
                        {"role": "system", "content": "Be brief."},
                        *ASKED,
                        assistant("A pet."),
                        user("<image>Which?"),
                    ],
                    placed=[
                        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
                        user([{"type": "text", "text": ASK}]),
                        assistant([{"type": "text", "text": "A pet."}]),
                        user([{"type": "image"}, {"type": "text", "text": "Which?"}]),
                    ],
                )
            ],
        ),
        "LLaMA-Factory ShareGPT": Case(
            "dpo.json",
            [gpt | {"conversations": TALK, "images": ["a.jpg"], "system": ""}],
            [Expected(prompt=TALKED, placed=[*ASKED, *TALKED[1:]])],
        ),
        "LLaMA-Factory Alpaca": Case(
            "dpo.json",
            [both(instruction="Look.", input=ASK, images=["a.jpg"], system="")],
            [Expected(prompt=[user("Look.\nWhat is it?")], placed=[user("Look.\nWhat is it?")])],
        ),
        "LLaMA-Factory, renamed Alpaca": Case(
            "mine.json",
            [{"ask": ASK, "good": "A cat.", "bad": "A dog.", "pics": ["a.jpg"]}],
            [Expected()],
            {
                "dataset_info.json": {
                    "mine": {
                        "file_name": "mine.json",
                        "ranking": True,
                        "columns": {
                            "prompt": "ask",
                            "chosen": "good",
                            "rejected": "bad",
                            "images": "pics",
                        },
                    }
                }
            },
            rows=False,
        ),
        "LLaMA-Factory, renamed ShareGPT": Case(
            "mine.json",
            [
                {
                    "talk": [{"who": "me", "text": "<image>\nWhat is it?"}],
                    "best": {"who": "bot", "text": "A cat."},
                    "worst": {"who": "bot", "text": "A dog."},
                    "images": ["a.jpg"],
                }
            ],
            [tagged],
            {
                "dataset_info.json": {
                    "mine": {
                        "file_name": "mine.json",
                        "formatting": "sharegpt",
                        "ranking": True,
                        "columns": {"messages": "talk", "chosen": "best", "rejected": "worst"},
                        "tags": {
                            "role_tag": "who",
                            "content_tag": "text",
                            "user_tag": "me",
                            "assistant_tag": "bot",
                        },
                    }
                }
            },
            rows=False,
        ),
        "POVID": Case(
            "POVID_preference_data_for_VLLMs.json",
            [
                {
                    "id": "000000033471",
                    "image": "a.jpg",
                    "conversations": [*SHARE, gpt["chosen"]],
                    "rejected_conversations": [*SHARE, gpt["rejected"]],
                }
            ],
            [tagged],
        ),
        "LLaVA-RLHF": Case(
            "llava_7b_v1_preference.json",
            [
                {
                    "id": "1",
                    "image": "a.jpg",
                    "conversations": [*TALK, {"from": "gpt", "value": "replaced"}],
                    "output_1": {"from": "llava", "value": "A dog."},
                    "output_2": {"from": "llava", "value": "A cat."},
                    "preference": 2,
                    "hallucination": True,
                }
            ],
            [Expected(prompt=TALKED, placed=[*ASKED, *TALKED[1:]])],
        ),
        "mDPO": Case(
            "sample_data.json",
            [
                both(img_path="a.jpg", prompt=VICUNA.format("<image>\nWhat is it?")),
                both(img_path="b.jpg", prompt="Which?"),
            ],
            [tagged, Expected(prompt=[user("Which?")], placed=[user("Which?")], images="b")],
        ),
        "VLFeedback": Case(
            "vlfeedback_80k.jsonl",
            [
                {
                    "id": "v",
                    "prompt": ASK,
                    "models": ["m1"],
                    "completions": rated,
                    "img_path": "a.jpg",
                }
            ],
            [Expected()],
        ),
        "VLFeedback Parquet": Case(  # a Sequence of objects is a struct of lists
            "train-00000-of-00001.parquet",
            [
                {
                    "id": "v",
                    "prompt": ASK,
                    "completions": {key: [c[key] for c in rated] for key in rated[0]},
                    "image": embedded("a"),
                }
            ],
            [Expected()],
        ),
        "SENTINEL": Case(
            "LLaVA_v1_5_7b_SENTINEL_8_6k.json",
            [
                {
                    "image_id": "2315278",
                    "image_path": "a.jpg",
                    "question": ASK,
                    "context": "A room.",
                    "y_win": "A cat sits.",
                    "y_lose": "A dog sits.",
                    "hallu_objects": ["dog"],
                    "sentences_cnt": 4,
                }
            ],
            [Expected("A room. A cat sits.", "A room. A dog sits.")],
        ),
        "BPO": Case(
            "bpo.json",
            [
                {
                    "id": "b-0",
                    "prompt": ASK,
                    "image": "a.jpg",
                    "completions": [
                        {"response": "A dog.", "score": 0, "type": "weakened"},
                        {"response": "A cat.", "score": 1, "type": "gt"},
                    ],
                }
            ],
            [Expected()],
        ),
        "OPA-DPO": Case("opadpo.parquet", [opa], [tagged, Expected("A tame cat.", prompt=TAGGED)]),
        "Re-Align": Case(
            "pref_data.json",
            [
                {
                    "image": "a.jpg",
                    "retrieved_image": "b.jpg",
                    "chosen": [*TAGGED, assistant("A cat.")],
                    "rejected": [*TAGGED, assistant("A dog.")],
                }
            ],
            [Expected(prompt=TAGGED, retrieved="b")],
        ),
    }


def write_case(folder: Path, case: Case) -> Path:
    """Write the files of a case. Returns the file to read."""
    for name, content in ({case.file: case.items} | case.beside).items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            file.write_bytes((folder / file.name).read_bytes())
        elif file.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(content), file)
        elif file.suffix == ".jsonl":
            file.write_text("".join(f"{json.dumps(item)}\n" for item in content))
        else:
            file.write_text(json.dumps(content))
    return folder / case.file
