"""What a step reports: TRL's names for the text side, the same words with `visual` for the other.

`rewards/*` are beta times the log-ratio of policy and reference, in nats; `accuracies` the share of
examples whose chosen response has the higher reward; `logps/*` summed log-probs in nats; `loss/*`
the losses of an objective's terms before they are weighted. Leaves without a name of their own are
called `{response}_under_{image}`.
"""

from __future__ import annotations

import json
import re
import sys
import uuid
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from realign_kernels import Leaf, Objective, PreferenceOutput

_NAMES = {("chosen", "image"): "chosen", ("rejected", "image"): "rejected"}


def leaf_names(objective: Objective) -> list[str]:
    """The metric name of each leaf of an objective.

    The chosen response under the retrieved images is visual, visual_2, ... A rival leaf's name
    says so, and it has no margins: its rewards are of other tokens than the response's.
    """
    return [_name(leaf) for leaf in objective.leaves]


def _name(leaf: Leaf) -> str:
    name = _NAMES.get(leaf[:2], f"{leaf.response}_under_{leaf.image}")
    if leaf.response == "chosen" and leaf.image.startswith("retrieved_image"):
        name = leaf.image.replace("retrieved_image", "visual")
    return name + "_detached" * leaf.detached + "_rival" * leaf.rival


def by_example(output: PreferenceOutput, objective: Objective) -> dict[str, torch.Tensor]:
    """Everything that is reported of a batch beside its loss, each (B,) fp64."""
    names = leaf_names(objective)
    rewards = dict(zip(names, output.rewards.double(), strict=True))
    logps = dict(zip(names, output.logps.detach().double(), strict=True))
    found = {}
    if len(objective.terms) > 1:
        parts = output.term_losses.detach().double()
        found |= {f"loss/{t.name}": part for t, part in zip(objective.terms, parts, strict=True)}
    found |= {f"rewards/{name}": value for name, value in rewards.items()}
    for other in names:
        if "chosen" in rewards and re.fullmatch(r"rejected|visual(_\d+)?", other):
            prefix = "" if other == "rejected" else f"{other}_"
            margin = rewards["chosen"] - rewards[other]
            found[f"rewards/{prefix}accuracies"] = (margin > 0).double()
            found[f"rewards/{prefix}margins"] = margin
    return found | {f"logps/{name}": value for name, value in logps.items()}


def sums(output: PreferenceOutput, objective: Objective) -> dict[str, torch.Tensor]:
    """Sums over a batch's examples of everything that is reported, as fp64 scalars."""
    found = {name: value.sum() for name, value in by_example(output, objective).items()}
    return {"loss": output.loss.detach().double()} | found


def step_line(entry: dict[str, Any], total: int) -> str:
    """One line about a step, its columns under those of the line before, 120 characters at most.

    `margin` and `acc` are of the text side, then of the visual side where there is one.
    """
    width = len(str(total))
    parts = [f"{entry['step']:{width}}/{total}", f"loss {entry['loss']:6.3f}"]
    for title, name, form in (("margin", "margins", "+7.3f"), ("acc", "accuracies", ".2f")):
        sides = [entry.get(f"rewards/{side}{name}") for side in ("", "visual_")]
        shown = " ".join(f"{value:{form}}" for value in sides if value is not None)
        parts += [f"{title} {shown}"] if shown else []
    parts += [f"grad {entry['grad_norm']:.1e}", f"lr {entry['learning_rate']:.1e}"]
    parts += [f"{entry['tokens_per_second']:7,.0f} tok/s"]
    parts += [f"mfu {entry['mfu']:3.0%}"] if "mfu" in entry else []
    parts += [f"{entry['peak_memory_gib']:.1f}G"]
    return "  ".join(parts)


class JsonlLog:
    """One JSON object per line, on the disk as soon as it takes it.

    While the disk is full entries wait in memory, which is said once; no line is torn for good.

    Args:
        path: the file; made with its folder.
        keep_steps: lines of later steps are dropped first, as a resumed run writes them anew.
    """

    def __init__(self, path: Path, keep_steps: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [e for e in read_jsonl(path) if e["step"] <= keep_steps] if path.exists() else []
        write_whole(path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self._file = path.open("ab", buffering=0)
        self._waiting = b""
        self._warned = False

    def write(self, entry: dict[str, Any]) -> None:
        self._waiting += json.dumps(entry).encode() + b"\n"
        try:
            self._flush()
        except OSError as error:
            if not self._warned:
                print(
                    f"warning: {self._file.name} takes no more ({error}); its next lines wait in "
                    "memory. Make room.",
                    file=sys.stderr,
                )
            self._warned = True

    def __enter__(self) -> JsonlLog:
        return self

    def __exit__(self, kind, *_) -> None:
        """Write what waits; that it cannot be written is an OSError, unless another error ends us.

        A resumed run writes the lines after its checkpoint anew.
        """
        with self._file, nullcontext() if kind is None else suppress(OSError):
            self._flush()

    def _flush(self) -> None:
        while self._waiting:  # a disk may take a part
            self._waiting = self._waiting[self._file.write(self._waiting) :]


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")  # others may write it, too
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The entries of a log; a last line cut short by a crash is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
