"""Parts of `realign.hf`: the module that Trainer trains, its data, losses to check, references."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from realign.modeling.forest import Example
from realign.modeling.loading import adapter_base
from realign.modeling.model import ForestModel
from realign_kernels import leaf_keys


class Module(ForestModel):
    """A ForestModel with the attributes and methods that Trainer needs."""

    @property
    def config(self) -> Any:
        return self.vlm.config

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        self.vlm.gradient_checkpointing_enable(*args, **kwargs)


def batch_of(indices: Sequence[int]) -> dict[str, torch.Tensor]:
    """A batch, collated: its example indices, (B,) int64."""
    return {"indices": torch.tensor(indices)}


def check_finite(losses: Sequence[tuple[torch.Tensor, tuple[str, ...]]]) -> None:
    """Read losses from the device in one copy.

    Args:
        losses: each with the names of its records.

    Raises:
        ValueError: when one is not finite; names its records.
    """
    values = torch.stack([loss for loss, _ in losses]).tolist() if losses else []
    for value, (_, names) in zip(values, losses, strict=True):
        if not math.isfinite(value):
            raise ValueError(
                f"the loss of records {', '.join(names)} is {value}. Look at their images and "
                "texts, or lower the learning rate; checkpoints are kept."
            )


def reporter(args: TrainingArguments) -> Callable[[str], None]:
    """A function that prints a line on the first process, unless disable_tqdm is set."""
    return print if args.process_index == 0 and not args.disable_tqdm else lambda line: None


def load_weights(vlm: PreTrainedModel, folder: Path) -> None:
    """Load all weights of a checkpoint into a model without adapters.

    Raises:
        ValueError: when the checkpoint holds an adapter.
    """
    if adapter_base(folder):
        raise ValueError(f"{folder} holds an adapter. Resume with the peft_config that it had.")
    saved = type(vlm).from_pretrained(folder, dtype=vlm.dtype)
    vlm.load_state_dict(saved.state_dict())


_FILE = "reference.json"
_COMPARED = 8  # examples of a checkpoint whose references are kept
_ROUNDING = {"float32": 1e-4, "bfloat16": 0.02}
"""Mean difference of a token's log-prob up to which two references differ only by rounding."""


class RunReference:
    """The reference of a run, saved with its checkpoints: a digest, and a few log-probs.

    Adapters that begin with random numbers have many digests for one output, so where digests
    differ log-probs decide.

    Args:
        fingerprint: the fingerprint of the references.
        examples: examples of the run.
        references: their log-probs, (L, examples).
    """

    def __init__(
        self, fingerprint: dict[str, str], examples: Sequence[Example], references: torch.Tensor
    ) -> None:
        compared = examples[:_COMPARED]
        values = references[:, : len(compared)].T.flatten().tolist()
        keys = [bytes(key).hex() for key in leaf_keys(compared)]
        self._tokens = sum(len(leaf.ids) for example in compared for leaf in example.leaves)
        self._about = {"weights": fingerprint["weights"], "dtype": fingerprint["dtype"]}
        self._logps = dict(zip(keys, values, strict=True))

    def save(self, folder: Path) -> None:
        """Write the file that `check` reads."""
        text = json.dumps(self._about | {"logps": self._logps}, indent=1)
        (folder / _FILE).write_text(text, encoding="utf-8")

    def check(self, folder: Path) -> None:
        """Compare with the reference of a checkpoint.

        Raises:
            ValueError: when the reference differs, or the checkpoint has none.
        """
        file = folder / _FILE
        if not file.exists():
            raise ValueError(
                f"{folder} holds no {_FILE}, so its reference is not known: another trainer wrote "
                "it, or an earlier version of this one. Resume with that one, or begin a new run."
            )
        saved = json.loads(file.read_text(encoding="utf-8"))
        if saved["weights"] == self._about["weights"]:
            return
        shared = self._logps.keys() & saved["logps"].keys()
        gap = sum(abs(self._logps[key] - saved["logps"][key]) for key in shared)
        if len(shared) < len(self._logps) or gap / self._tokens > _ROUNDING[self._about["dtype"]]:
            difference = "its first records are others"
            if len(shared) == len(self._logps):
                difference = f"log-probs differ by {gap / self._tokens:.2g} a token"
            raise ValueError(
                f"the reference of the checkpoint {folder} is another model than the one handed "
                f"over ({difference}). Hand over the same model, with the same adapters: save them "
                "before the first run and load them for both, or give a peft_config and a seed."
            )
