"""Preference training of a vision-language model: `python -m realign.train --help`.

    python -m realign.train                          # the shipped digits
    python -m realign.train --model DIR --pairs P    # a model of docs/families.md

`train` calls the stages in order: set-up, reference log-probs, steps and export. They are in
training/setup.py, training/step.py and training/export.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from realign import distributed
from realign.config import TrainConfig, parse
from realign.files import read_jsonl
from realign.modeling import attention
from realign.modeling.loading import DTYPES
from realign.pairs.pipeline import PairsConfig, build_pairs
from realign.terminal import show
from realign.third_party import silence_third_party
from realign.training import dry_run, fsdp
from realign.training.checkpoint import Checkpoints
from realign.training.evaluation import choose_weights, held_out_facts
from realign.training.export import export_trained
from realign.training.metrics import is_evaluation
from realign.training.model_card import model_card, settings_of
from realign.training.run_dir import check_outputs, sole_writer, steps_done
from realign.training.serving import commands
from realign.training.setup import Run, reference_pass, restore, set_up
from realign.training.step import train_steps
from realign.training.trackers import check_packages

_DIGESTS = {"base": "base weights", "pairs": "records", "reference": "reference weights"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, with its own workers under --fsdp. Returns an exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    silence_third_party()
    try:
        config = parse(arguments)
        check_packages(config.run)
        is_rank0 = os.environ.get("RANK", "0") == "0"  # only rank 0 writes
        if is_rank0:
            check_outputs(config.run)
        if config.run.dry_run:
            if is_rank0:
                show(dry_run.make(config, prepare_pairs))
            return 0
        if config.scale.fsdp and not distributed.under_launcher():
            prepare_pairs(config)  # once, before there are ranks
            return distributed.launch("realign.train", arguments, config.scale.nproc_per_node)
        train(config)
    except (ValueError, OSError, RuntimeError) as error:
        if not distributed.report(error):
            raise
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        distributed.stop()
    return 0


def train(config: TrainConfig) -> Path | None:
    """Train as configured. Returns the folder of the final model, or None after a signal.

    Raises:
        ValueError: before the first step, for unusable settings, records or models.
        NonFiniteStep: if the loss or the gradient is not finite. The last checkpoint is kept.
        CheckpointError: if no checkpoint is intact, or the last one cannot be written.
    """
    scale, output = config.scale, Path(config.run.output)
    device = distributed.start(single=config.sharded, fsdp=scale.fsdp)
    fsdp.check(scale, device, distributed.world_size())
    attends, reason = attention.choose(
        config.model.attention, device, DTYPES[config.model.dtype], compiled=scale.compile
    )
    with sole_writer(output):
        if reason:
            distributed.log_rank0(reason)
        checkpoints = Checkpoints(output / "checkpoints", config.run.keep)
        done = steps_done(config, checkpoints)
        pairs = prepare_pairs(config)
        config, reason = dry_run.with_checkpointing(config, pairs)
        if reason:
            distributed.log_rank0(f"activation checkpointing is {reason}")
        run = set_up(config, pairs, device, attends, checkpoints, done)
        references = reference_pass(run)
        restore(run)
        return export(run) if train_steps(run, references) else None


def prepare_pairs(config: TrainConfig) -> Path:
    """The pairs file to train on. Without one, pairs of the digits are built once.

    Raises:
        ValueError: if a model is given without pairs.
    """
    if config.data.pairs is not None:
        return Path(config.data.pairs)
    if config.model.model is not None:
        raise ValueError(
            "--model is given without --pairs. Build pairs for it with `python -m realign.pairs` "
            "and pass the file."
        )
    path = Path(config.run.output) / f"pairs-seed{config.run.seed}.parquet"
    if not path.exists() and distributed.rank() == 0:
        build_pairs(PairsConfig(output=str(path), seed=config.run.seed, quiet=config.run.quiet))
    distributed.barrier()
    return path


def export(run: Run) -> Path:
    """Write the final model with its card. Returns its folder.

    Raises:
        CheckpointError: when the best checkpoint should be exported, and is damaged.
    """
    config, inputs, output = run.config, run.inputs, Path(run.config.run.output)
    folder, log = output / "model", output / "metrics.jsonl"
    step = choose_weights(run)

    def card(written: Path) -> str:
        entries = [entry for entry in read_jsonl(log) if entry["step"] == step]
        adapter = run.adapter is not None and not config.run.merge
        kind = inputs.model.vlm.config.model_type
        return model_card(
            inputs.objective.name,
            settings_of(config),
            base=inputs.base,
            adapter=adapter,
            commands=commands(written, adapter=adapter, base=inputs.base, model_type=kind),
            records=len(inputs.training),
            images=inputs.training_images,
            digests={about: run.digests[n] for n, about in _DIGESTS.items() if run.digests[n]},
            last=next((entry for entry in entries if not is_evaluation(entry)), {}),
            held_out=held_out_facts(run, step, entries),
        )

    export_trained(
        folder,
        inputs.model,
        run.adapter,
        inputs.processor,
        base=inputs.base,
        merged=config.run.merge,
        card=card,
    )
    if config.model.quantize and config.run.merge:
        distributed.log_rank0("the adapter was merged into the base without quantization")
    distributed.log_rank0(f"wrote {folder} (model), {log} (curves)")
    return folder


if __name__ == "__main__":
    distributed.exit_rank(main())
