"""The table of docs/adapters.md: every PEFT kind, in every way of loading, on four families.

    PYTHONPATH=. python tests/helpers/adapter_matrix.py            # print it (half an hour)
    PYTHONPATH=. python tests/helpers/adapter_matrix.py --write    # into docs/adapters.md

A figure is the largest difference of a log-prob (nats), or that of the first loss from 2 ln 2. Each
kind is tried fresh on all families, and loaded in each way on one, which changes with the kind. A
kind that cannot be trained here is merged, exported and evaluated as if it had been elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import os
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from adapter_kinds import (
    FAMILIES,
    KINDS,
    SPECIAL,
    inputs_of,
    load_base,
    logps,
    quiet,
    save_base,
    save_trained,
)
from hf_matrix import WAYS, Bench, trainer_of
from hf_runs import history
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from tiny_vlms import make, random_record

from realign.hf import adapters
from realign.modeling.loading import load_model, load_trained
from realign.third_party import silence_third_party
from realign.training.export import export_whole

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
BEGIN, END = "<!-- table: tests/helpers/adapter_matrix.py --write -->", "<!-- end of table -->"
HEADS = {
    "PeftModel.from_pretrained": "PeftModel",
    "by a name of its own": "named",
    "one of several": "several",
    "model.load_adapter": "load_adapter",
    "AutoModel on the adapter's folder": "AutoModel",
}
AFTER = ("reload", "resume", "merge", "export", "evaluate")
EQUAL = torch.tensor(2 * math.log(2)).item()  # in fp32
OUTSIDE = sorted(
    kind.value
    for kind in set(PEFT_TYPE_TO_CONFIG_MAPPING) - {config.peft_type for config in KINDS.values()}
)
"""Kinds that have no entry in KINDS: all of them are refused by name."""

Cells = dict[str, list[float | str]]


def bench_of(family: str, folder: Path) -> Bench:
    """A tiny model of a family on disk, and two records."""
    base = save_base(family, folder / family)
    processor = make(family)[1]
    rng = np.random.default_rng(0)
    records = [random_record(family, processor, rng) for _ in range(2)]
    return Bench(base, load_base(base), processor, records)


class Attempts:
    """All columns of one kind, loaded in one way: figures, and reasons of refusals."""

    def __init__(self, bench: Bench, kind: str, way: str, folder: Path, found: Cells) -> None:
        self.bench, self.kind, self.way, self.folder, self.found = bench, kind, way, folder, found
        self.inputs = inputs_of(bench.processor)

    def run(self) -> None:
        """Train, reload, resume, and use what was saved."""
        if self._attempt(self.way, self._first):
            self._attempt("reload", self._reloaded)
            self._attempt("resume", self._resumed)
            self.use()

    def take_trained(self) -> None:
        """Use an adapter that was trained elsewhere."""
        self.place = self.folder / "adapter"
        self.after = logps(save_trained(self.bench.base, self.kind, self.place), self.inputs)
        self.use()

    def use(self) -> None:
        """Merge, export and evaluate the folder of an adapter."""
        self._attempt("merge", lambda: self._off(load_model(self.place)))
        self._attempt(
            "export",
            lambda: self._off(load_base(export_whole(str(self.place), self.folder / "whole"))),
        )
        self._attempt("evaluate", lambda: self._off(load_trained(self.place)))

    def _attempt(self, column: str, measure: Callable[[], float]) -> bool:
        try:
            with quiet(), open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
                value = measure()
        except ValueError as error:
            value = str(error)
        self.found[column].append(value)
        return isinstance(value, float)

    def _trainer(self):
        settings = {"save_strategy": "steps", "save_steps": 1}
        return trainer_of(self.bench, self.kind, self.way, self.folder, **settings)

    def _first(self) -> float:
        trainer = self._trainer()
        trainer.train()
        self.after = logps(trainer.model.vlm, self.inputs)
        trainer.save_model(str(self.folder / "saved"))
        self.place = adapters.place_of(trainer.adapter, self.folder / "saved")
        return abs(history(trainer)[0] - EQUAL)

    def _reloaded(self) -> float:
        return self._off(PeftModel.from_pretrained(load_base(self.bench.base), self.place))

    def _resumed(self) -> float:
        trainer = self._trainer()
        trainer.train(resume_from_checkpoint=str(self.folder / "out" / "checkpoint-1"))
        return self._off(trainer.model.vlm)

    def _off(self, model: torch.nn.Module) -> float:
        return float((logps(model, self.inputs) - self.after).abs().max())


def tried(number: int) -> list[tuple[str, str]]:
    """Families and ways for a kind: fresh on all families, and each other way on one."""
    fresh, *others = WAYS
    turns = [(FAMILIES[(number + i) % len(FAMILIES)], way) for i, way in enumerate(others)]
    return [(family, fresh) for family in FAMILIES] + turns


def measured(kinds: list[str]) -> dict[str, Cells]:
    """{kind: {column: figures and refusals}}."""
    found: dict[str, Cells] = {}
    with tempfile.TemporaryDirectory() as root:
        benches = {family: bench_of(family, Path(root)) for family in FAMILIES}
        gc.collect()
        gc.freeze()  # Trainer collects garbage twice a run
        for number, kind in enumerate(KINDS):
            if kind not in kinds:
                continue
            found[kind] = defaultdict(list)
            for family, way in tried(number):
                with tempfile.TemporaryDirectory(dir=root) as folder:
                    Attempts(benches[family], kind, way, Path(folder), found[kind]).run()
            for family in FAMILIES if "merge" not in found[kind] else ():
                with tempfile.TemporaryDirectory(dir=root) as folder:
                    Attempts(benches[family], kind, "", Path(folder), found[kind]).take_trained()
            print(kind, file=sys.stderr, flush=True)
    return found


def table(found: dict[str, Cells]) -> str:
    """The table, and below it what the letters of refusals stand for."""
    notes: dict[str, str] = {}

    def cell(values: list[float | str]) -> str:
        figures = [value for value in values if isinstance(value, float)]
        reasons = dict.fromkeys(_general(value) for value in values if isinstance(value, str))
        letters = [notes.setdefault(reason, chr(97 + len(notes))) for reason in reasons]
        shown = [_shown(max(figures))] if figures else []
        return " ".join([*shown, *(f"({letter})" for letter in letters)]) or "-"

    columns = [*WAYS, *AFTER]
    heads = [HEADS.get(name, name) for name in columns]
    lines = [f"| kind | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|"]
    for kind, values in found.items():
        lines.append(f"| {kind} | {' | '.join(cell(values[name]) for name in columns)} |")
    for kind in [*OUTSIDE, *(name for name in SPECIAL if name.startswith("LoRA"))]:
        lines.append(f"| {kind} |{' refused |' * len(columns)}")
    return "\n".join([*lines, "", *(f"- ({letter}) {text}" for text, letter in notes.items())])


def _shown(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-") if value else "0"


def _general(reason: str) -> str:
    """A message without the names of this run."""
    for pattern, general in (
        (r"\bmodel\.[\w.]+ has", "a layer has"),
        (r"(peft_config|adapter '\w+' of the model) (is of kind|has)", r"it \2"),
        (r" '(default|mine|first|second)'", ""),
        (r"PeftType\.\w+", "this kind"),
        (r"its base \w+", "its base"),
        (r"/\S*/", ""),
    ):
        reason = re.sub(pattern, general, reason)
    return reason


def main() -> None:
    """Measure, and print the table or write it into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), help="all of them")
    given = parser.parse_args()
    silence_third_party()
    made = table(measured(given.kinds))
    if not given.write:
        print(made)
        return
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
