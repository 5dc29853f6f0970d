"""Held-out records of a run: loading, the split by image, the steps of evaluations, checks.

They are encoded like the training records and follow them in one list of examples. So both share
images, references and caches, and a split is a list of indices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from realign import distributed
from realign.config import EvalConfig, TrainConfig
from realign.data import split
from realign.data.errors import RecordError
from realign.data.record_table import RecordTable
from realign.modeling.examples import Examples
from realign.training.metrics import better_direction, by_example
from realign_kernels import Objective, PreferenceOutput

_NONE = np.zeros(0, np.int64)


class Source(NamedTuple):
    """How the records of a run are read: functions of a table, bound to its settings.

    Attributes:
        open: opens the pairs of a path, image folder and split.
        objective: the objective for a table.
        encode: encodes a table, with the arguments `objective` and `log` of `encode_table`.
    """

    open: Callable[[str, str | None, str | None], RecordTable]
    objective: Callable[[RecordTable], Objective]
    encode: Callable[..., Examples]


def add(
    examples: Examples,
    table: RecordTable,
    objective: Objective,
    source: Source,
    config: EvalConfig,
    *,
    image_folder: str | None,
    seed: int,
) -> tuple[Examples, np.ndarray]:
    """Hold out records for evaluation. With a process group, every rank calls it.

    Args:
        examples: the encoded pairs.
        table: their records.
        objective: their objective.
        source: how records are read.
        config: which records to hold out.
        image_folder: image folder of the pairs.
        seed: seed of the split.

    Returns:
        All examples, and the indices of the held-out ones, (held-out,) int64.

    Raises:
        ValueError: for unusable records, none at all, or an impossible split.
    """
    if not config.given:
        return examples, _NONE
    rows = table_rows(examples)
    if config.eval_pairs is None:
        held_out = np.flatnonzero(split.held_out(table, rows, config.eval_share, seed))
        share = len(held_out) / len(rows)
        distributed.log_rank0(
            f"held out {len(held_out):,} of {len(rows):,} records, {share:.1%}; no image of them "
            "is in the others"
        )
        return examples, held_out
    try:
        other = source.open(
            config.eval_pairs, config.eval_image_folder or image_folder, config.eval_split
        )
        _check_objective(objective, source.objective(other))
        added = source.encode(other, objective=objective, log=_of_evaluation)
    except RecordError as error:  # both files may have a record of that name
        error.args = (f"--eval-pairs {config.eval_pairs}: {error}",)
        raise
    if warning := split.shared_warning("held-out records", other, table_rows(added), table, rows):
        distributed.log_rank0(f"{warning} Remove them from --eval-pairs, or use --eval-share.")
    return examples + added, np.arange(len(examples), len(examples) + len(added))


def _of_evaluation(line: str) -> None:
    distributed.log_rank0(f"--eval-pairs: {line}")


def table_rows(examples: Examples) -> np.ndarray:
    """Index of each example in its table, (examples,) int64."""
    rows = [chunk.row(index) for chunk in examples.chunks for index in range(len(chunk))]
    return np.array(rows, np.int64)


def _check_objective(training: Objective, evaluation: Objective) -> None:
    if training != evaluation:
        raise ValueError(
            f"the objective {training.name!r} has {len(training.leaves)} leaves for the training "
            f"records and {len(evaluation.leaves)} for --eval-pairs. Give all records the same "
            "number of `retrieved_images`."
        )


def interval(config: TrainConfig) -> int:
    """Steps between evaluations; 0 evaluates only at the start and at the end."""
    return config.eval.eval_every or config.run.save_every


def is_due(config: TrainConfig, step: int, total: int) -> bool:
    """Whether an evaluation follows a step. Step 0 is the start."""
    every = interval(config)
    return step in (0, total) or (every > 0 and step % every == 0)


def evaluations(config: TrainConfig, total: int) -> int:
    """Number of evaluations after a step. One more precedes the first step."""
    every = interval(config)
    return -(-total // every) if every else 1


def sign(metric: str, objective: Objective) -> int:
    """1 if a higher value of a metric is better, -1 if a lower one is.

    Raises:
        ValueError: for a metric that the objective lacks, or without a better direction.
    """
    leaves, terms = torch.zeros(len(objective.leaves), 1), torch.zeros(len(objective.terms), 1)
    fields = dict.fromkeys(PreferenceOutput._fields, leaves) | {"term_losses": terms}
    output = PreferenceOutput(**fields)  # only its names are used
    signs = {name: better_direction(name) for name in ("loss", *by_example(output, objective))}
    if found := signs.get(metric):
        return found
    names = ", ".join(name for name, one in signs.items() if one)
    raise ValueError(f"--best-metric is {metric!r}; it must be one of {names}.")


def check(config: TrainConfig, objective: Objective, total: int) -> None:
    """Check the settings of evaluations for the steps of a run; called before any work.

    Raises:
        ValueError: for an unknown metric, or an early stop that never happens.
    """
    if not config.eval.given:
        return
    sign(config.eval.best_metric, objective)
    patience, count = config.eval.early_stopping, evaluations(config, total)
    if patience and count < patience + 2:
        every = interval(config)
        remedy = f"lower --eval-every, which is {every}" if every else "set --eval-every"
        raise ValueError(
            f"--early-stopping {patience} would have no effect: the run has {count} evaluation(s), "
            f"and {patience + 2} are needed. Leave it out, or {remedy}."
        )
