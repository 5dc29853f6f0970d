"""Parts of RDPOTrainer: module and batches, checks of losses, and the saved reference."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainingArguments

from realign.data import sources
from realign.data.ranks import first_on_machine
from realign.data.record_table import RecordTable, open_converted, open_table, table_of
from realign.data.records import Record
from realign.data.split import shared_warning
from realign.files import read_json
from realign.hf.records import records_of, stream_rows
from realign.modeling import projector
from realign.modeling.encode import encode_table
from realign.modeling.examples import Examples
from realign.modeling.forest import Example
from realign.modeling.layouts import max_tokens
from realign.modeling.loading import adapter_base, from_pretrained
from realign.modeling.model import ForestModel
from realign.progress import track
from realign.training.held_out import table_rows
from realign_kernels import Objective, leaf_keys, objectives


class Module(ForestModel):
    """ForestModel with the attributes and methods that Trainer needs."""

    @property
    def config(self) -> Any:
        return self.vlm.config

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        self.vlm.gradient_checkpointing_enable(*args, **kwargs)


def check_projector(vlm: PreTrainedModel) -> None:
    """Check that the projector is trained, for `projector_learning_rate`.

    Raises:
        ValueError: when no parameter of it is trained.
    """
    if not projector.trained(vlm):
        names = projector.modules_to_save(vlm)
        raise ValueError(
            "projector_learning_rate would have no effect: the projector is frozen. Leave it out, "
            f"or set modules_to_save={names} in peft_config."
        )


def give_projector_a_rate(optimizer: torch.optim.Optimizer, module: Module, rate: float) -> None:
    """Move the projector's parameters to groups of their own, with the same other settings.

    Args:
        optimizer: an optimizer before its first step.
        module: the model that is trained.
        rate: learning rate of the projector.
    """
    apart = set(projector.trained(module.vlm))
    for group in list(optimizer.param_groups):
        own = [p for p in group["params"] if p in apart]
        if own:
            group["params"] = [p for p in group["params"] if p not in apart]
            optimizer.add_param_group(group | {"params": own, "lr": rate})


def undo_preparation(accelerator: Accelerator, model: Module) -> None:
    """Undo the preparation of a model by an evaluation before the training.

    accelerate prepares no model twice. So it would train this one without DDP, and each rank would
    train a model of its own.
    """
    if getattr(model, "_is_accelerate_prepared", False):
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        del model._is_accelerate_prepared


def batch_of(indices: Sequence[int]) -> dict[str, torch.Tensor]:
    """Collate a batch of example indices, (B,) int64."""
    return {"indices": torch.tensor(indices)}


def check_finite(
    losses: Sequence[tuple[torch.Tensor, tuple[str, ...]]],
    norm: torch.Tensor | float | None = None,
) -> None:
    """Check that numbers are finite, after reading them from the device in one copy.

    Args:
        losses: losses with the names of their records.
        norm: the gradient norm before an update.

    Raises:
        ValueError: if a loss is not finite, with the names of its records, or the norm is not.
    """
    numbers = [loss for loss, _ in losses]
    if norm is not None:
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        like = numbers[0] if numbers else torch.zeros(())
        numbers.append(torch.as_tensor(whole, dtype=like.dtype, device=like.device).detach())
    values = torch.stack(numbers).tolist() if numbers else []
    for value, (_, names) in zip(values[: len(losses)], losses, strict=True):
        if not math.isfinite(value):
            raise ValueError(
                f"the loss of records {', '.join(names)} is {value}. Look at their images and "
                "texts, or lower the learning rate. Checkpoints are kept."
            )
    if norm is not None and not math.isfinite(values[-1]):
        raise ValueError(
            f"the gradient norm is {values[-1]}, though the losses of process "
            f"{os.environ.get('RANK', 0)} are finite. The weights were not updated. Look for "
            "records in the messages of other processes, or lower the learning rate. Checkpoints "
            "are kept."
        )


def reporter(args: TrainingArguments) -> Callable[[str], None]:
    """Return a function that prints a line on the first process."""
    return print if args.process_index == 0 else lambda line: None


def load_weights(vlm: PreTrainedModel, folder: Path) -> None:
    """Load all weights of a checkpoint into a model without adapters.

    Raises:
        ValueError: if the checkpoint holds an adapter.
    """
    if adapter_base(folder):
        raise ValueError(f"{folder} holds an adapter. Resume with its peft_config.")
    saved = from_pretrained(type(vlm), folder, dtype=vlm.dtype)
    vlm.load_state_dict(saved.state_dict())


def record_table(
    rows: Any,
    *,
    split: str | None,
    image_folder: str | None,
    progress: bool,
    log: Callable[[str], None],
) -> RecordTable:
    """The table of preference records. With a process group, every rank calls it.

    Args:
        rows: one of the forms of `Records`.
        split: see `RDPOConfig`.
        image_folder: see `RDPOConfig`.
        progress: whether to show a progress bar.
        log: receives a line with the number of skipped records.

    Raises:
        RecordError: for an invalid record.
        FileNotFoundError, ValueError: like `records_of`.
    """
    convert = partial(track, title="reading records", unit="records", quiet=not progress)
    if isinstance(rows, str | Path):
        table = first_on_machine(
            lambda: open_table(rows, image_folder, split=split, progress=convert)
        )
    else:
        table = _table_of(rows, convert)
    if table.skipped:
        log(f"skipped records: {table.skipped_text}")
    return table


def warn_of_shared(
    names: Iterable[str],
    tables: Sequence[RecordTable],
    encoded: Sequence[Examples],
    log: Callable[[str], None],
) -> None:
    """Warn of evaluation records that share images with the training records.

    Args:
        names: names of the evaluation sets.
        tables: the table of the training records, then one for each name.
        encoded: the examples of each table.
        log: receives the lines.
    """
    for name, table, examples in zip(names, tables[1:], encoded[1:], strict=True):
        training = tables[0], table_rows(encoded[0])
        what = f"records of eval_dataset {name}".strip()
        if warning := shared_warning(what, table, table_rows(examples), *training):
            log(warning)


def _table_of(rows: Any, progress: Callable[[Iterable[Record]], Iterable[Record]]) -> RecordTable:
    is_data_set = hasattr(rows, "with_format") and hasattr(rows, "__len__")
    if isinstance(rows, Mapping):  # such as a dictionary of data sets
        return table_of(records_of(rows))
    if is_data_set and len(rows) and rows.format["type"] != "custom":
        # Paths in rows are relative to the current directory.
        content = f"datasets {sources.VERSION} {os.getcwd()} {rows._fingerprint}"
        return first_on_machine(
            lambda: open_converted(
                content, content, lambda count: progress(stream_rows(rows, skipped=count))
            )
        )
    return table_of(records_of(rows))


def encode_tables(
    tables: Sequence[RecordTable],
    objective: Objective,
    processor: Any,
    module: Module,
    *,
    max_response_tokens: int,
    progress: bool,
    log: Callable[[str], None] = lambda line: None,
) -> list[Examples]:
    """Encode the records of several tables for a model (`encode_table`)."""
    return [
        encode_table(
            table,
            processor,
            objective,
            layout=module.layout,
            max_response_tokens=max_response_tokens,
            max_tokens=max_tokens(module.vlm),
            progress=progress,
            log=log,
        )
        for table in tables
    ]


def check_objective(training: Objective, evaluation: Objective) -> None:
    """Check that training and evaluation records have the same number of visual negatives.

    Raises:
        ValueError: if their objectives differ.
    """
    if training != evaluation:
        raise ValueError(
            f"the objective {training.name!r} has {len(training.leaves)} leaves for the training "
            f"records and {len(evaluation.leaves)} for the evaluation records. Give all records "
            "the same number of `retrieved_images`."
        )


_FILE = "reference.json"
_COMPARED = 8  # examples of a checkpoint whose references are kept
_ROUNDING = {"float32": 1e-4, "bfloat16": 0.02}
"""Largest mean difference per token between log-probs that differ only by rounding."""


class RunReference:
    """The reference of a run, saved with its checkpoints: a digest and a few log-probs.

    Adapters with random initial weights can have different digests and equal outputs. If the
    digests differ, the log-probs are compared.

    Args:
        fingerprint: fingerprint of the reference.
        examples: examples of the run.
        references: reference log-probs of the examples, (L, examples).
        known: whether they are the log-probs of a reference. An objective may need none.
        base: digest of the trained model's base, if the reference is another model.
    """

    def __init__(
        self,
        fingerprint: dict[str, str],
        examples: Sequence[Example],
        references: torch.Tensor,
        *,
        known: bool = True,
        base: str | None = None,
    ) -> None:
        self._known = known
        compared = examples[:_COMPARED]
        values = references[:, : len(compared)].T.flatten().tolist()
        keys = [bytes(key).hex() for key in leaf_keys(compared)]
        self._tokens = sum(len(leaf.ids) for example in compared for leaf in example.leaves)
        self._about = {"weights": fingerprint["weights"], "dtype": fingerprint["dtype"]}
        self._about |= {"base": base} if base else {}
        self._logps = dict(zip(keys, values, strict=True))

    def save(self, folder: Path, shift: objectives.RunningMean) -> None:
        """Write the reference file into a checkpoint, with the run's mean of rewards."""
        mean = {"reward_mean": shift.value, "rewards": shift.count}
        text = json.dumps(self._about | mean | {"logps": self._logps}, indent=1)
        (folder / _FILE).write_text(text, encoding="utf-8")

    def check(self, folder: Path) -> objectives.RunningMean:
        """Compare this reference with that of a checkpoint. Returns its mean of rewards.

        Raises:
            ValueError: if the references differ, or the checkpoint has none.
        """
        file = folder / _FILE
        if not file.exists():
            raise ValueError(
                f"{folder} holds no {_FILE}, so its reference is unknown. Another trainer, or an "
                "earlier version of this one, wrote it. Resume with that one, or begin a new run."
            )
        saved = read_json(file)
        mean = objectives.RunningMean(saved.get("reward_mean", 0.0), saved.get("rewards", 0))
        if ("base" in saved) != ("base" in self._about):
            word = "with" if "base" in saved else "without"
            raise ValueError(
                f"the run of the checkpoint {folder} began {word} a reference_model. Resume it "
                f"{word} one."
            )
        same_base = saved.get("base") == self._about.get("base")
        if same_base and saved["weights"] == self._about["weights"]:
            return mean
        if not self._known or not same_base:
            raise ValueError(
                f"the weights of the checkpoint {folder} belong to another base. Give the same "
                "model with the same adapters."
            )
        shared = self._logps.keys() & saved["logps"].keys()
        gap = sum(abs(self._logps[key] - saved["logps"][key]) for key in shared)
        if len(shared) < len(self._logps) or gap / self._tokens > _ROUNDING[self._about["dtype"]]:
            difference = "the first records differ"
            if len(shared) == len(self._logps):
                difference = f"log-probs differ by {gap / self._tokens:.2g} per token"
            raise ValueError(
                f"the reference of the checkpoint {folder} is not the given model ({difference}). "
                "Give the same model with the same adapters. Save them before the first run and "
                "load them for both runs, or give a peft_config and a seed."
            )
        return mean
