"""Preference training of a vision-language model: `python -m realign.train --help`.

    python -m realign.train                          # rDPO on the shipped digits, one process
    python -m realign.train --fsdp                   # the same, sharded over ranks
    python -m realign.train --model DIR --pairs P    # any LLaVA-1.5-type model and pairs file

Read `train` below from top to bottom: load, check the records, reference log-probs, steps, export.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from realign import checkpoint, metrics, parallel, reference
from realign.config import TrainConfig, parse
from realign.digits import ASSETS
from realign.encode import encode_records, make_objective
from realign.export import export
from realign.forest import Example, build_batch
from realign.model import (
    DTYPES,
    ForestModel,
    adapter_base,
    add_lora,
    load_model,
    load_processor,
)
from realign.noise import hush_libraries
from realign.records import read_pairs
from realign_kernels import Objective, ReferenceCache


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, start workers if asked to, train; returns an exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    hush_libraries()
    try:
        config = parse(arguments)
        if config.run.fsdp and not parallel.under_launcher():
            prepare_pairs(config)  # once, before there are ranks
            return parallel.launch("realign.train", arguments, config.run.nproc_per_node)
        train(config)
    except (ValueError, OSError, RuntimeError) as error:
        if not parallel.report(error):
            raise
        return 1
    finally:
        parallel.stop()
    return 0


class NonFiniteStep(ValueError):
    """Loss or gradient is not finite; raised before the optimizer step."""


def train(config: TrainConfig) -> Path:
    """Train as configured; returns the folder of the final model.

    Raises:
        ValueError: for settings, records or a model that cannot be trained on; before any step.
        NonFiniteStep: when loss or gradient is not finite; the last checkpoint stays.
    """
    dtype = DTYPES[config.model.dtype]
    sharded = config.run.fsdp or dtype != torch.float32
    device = parallel.start(alone=sharded)
    run, output = config.run, Path(config.run.output)
    say = print if parallel.rank() == 0 else lambda *_: None
    bars = not run.quiet and parallel.rank() == 0
    share = _share_of_rank(config)
    done = _steps_done(config)

    base = config.model.model or str(ASSETS)
    if Path(base).is_dir():  # the adapter will name its base, to be found from anywhere
        base = str(Path(base).resolve())
    if adapter_base(base) and config.model.tune == "lora" and not run.merge:
        raise ValueError(
            f"{base} is an adapter itself; one for it on top could not be loaded elsewhere."
            " Add --merge, which writes whole weights, or --tune full."
        )
    processor = load_processor(base)
    frozen_dtype = dtype if config.model.tune == "lora" else torch.float32
    vlm = load_model(base, frozen_dtype)
    records = read_pairs(prepare_pairs(config))
    objective = make_objective(config.loss, records)
    model = ForestModel(vlm, train_vision=config.model.train_vision, dtype=dtype)
    examples, store = encode_records(
        records,
        processor,
        objective,
        image_tokens=model.image_tokens(processor),
        max_response_tokens=config.data.max_response_tokens,
        max_tokens=vlm.config.text_config.max_position_embeddings,
        progress=bars,
    )
    row_tokens = config.data.row_tokens or max(example.longest_tree for example in examples)
    fingerprint = reference.fingerprint(vlm, processor, dtype, device)
    identity = {
        "config": config.to_dict(),
        "base": fingerprint["weights"],
        "pairs": reference.digest_of(examples),
    }
    if done:
        _check_same_run(output, identity)

    adapter = None
    if config.model.tune == "lora":
        torch.manual_seed(run.seed)
        adapter = add_lora(vlm, config.model.lora_rank, config.model.lora_alpha)
    model.to(device)
    if sharded:
        parallel.shard(model, device, dtype)
    # Nothing is trained or restored yet, and adapters are off: this is the reference.
    directory = run.reference_cache or reference.default_directory()
    parallel.ranks_part()
    with ReferenceCache.open(directory, fingerprint) as cache:
        references = reference.fill(
            cache,
            model.eval(),
            examples,
            store,
            row_tokens=row_tokens,
            batch_rows=config.optim.micro_batch_size * len(examples[0].roots),
            device=device,
            progress=bars,
            say=say,
        ).float()
    if sharded:
        model.reshard()  # a forward without backward leaves the root gathered
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=config.optim.learning_rate, weight_decay=config.optim.weight_decay
    )
    total = config.optim.steps or max(
        1, round(config.optim.epochs * len(examples) / config.optim.batch_size)
    )
    if done:
        checkpoint.load(output / "checkpoints", done, model, optimizer)
        say(f"resumed from step {done} of {total}")
    say(
        f"{objective.name}: {len(examples)} records, {len(store)} distinct images, "
        f"{sum(p.numel() for p in trained):,} trained parameters, {total} steps of "
        f"{config.optim.batch_size} on {parallel.world_size()} rank(s)"
    )
    log = None
    if parallel.rank() == 0:
        log = metrics.JsonlLog(output / "metrics.jsonl", keep_steps=done)
        metrics.write_whole(output / "run.json", json.dumps(identity, indent=2) + "\n")

    model.train()
    bar = tqdm(total=total, initial=done, desc=objective.name, unit="step", disable=not bars)
    for step, batch in _batches(len(examples), config, first=done, last=total):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, total, config)
        mine = batch[share]
        totals = _accumulate(model, mine, examples, references, store, objective, config, device)
        norm = _clip(trained, config.optim.clip)
        means = _means(totals, config.optim.batch_size)
        if not (math.isfinite(means["loss"]) and math.isfinite(norm)):
            raise NonFiniteStep(_non_finite(step, means["loss"], norm, mine, examples, output))
        optimizer.step()
        optimizer.zero_grad()
        if log:
            means |= {"grad_norm": norm, "learning_rate": optimizer.param_groups[0]["lr"]}
            epoch = step * config.optim.batch_size / len(examples)
            log.write(
                {"step": step, "epoch": epoch, "seconds": time.perf_counter() - began, **means}
            )
        bar.set_postfix(_shown(means), refresh=False)
        bar.update()
        if step == total or (run.save_every and step % run.save_every == 0):
            checkpoint.save(output / "checkpoints", step, model, optimizer)
    bar.close()
    final = output / "model"
    export(final, model, adapter, processor, base=base, merge=run.merge)
    if log:
        log.close()
    say(f"wrote {final} (model), {output / 'metrics.jsonl'} (curves)")
    return final


def _steps_done(config: TrainConfig) -> int:
    """Steps of the run in the output folder to go on from; an earlier run is never overwritten."""
    output = Path(config.run.output)
    done = checkpoint.last_step(output / "checkpoints")
    if not config.run.resume and (done or (output / "metrics.jsonl").exists()):
        raise ValueError(
            f"{output} holds a run with a checkpoint at step {done}. Add --resume to go on with "
            "it, or name another --output."
        )
    return done


def _check_same_run(output: Path, new: dict) -> None:
    """A run goes on only as it began: same settings, base weights and pairs."""
    old = json.loads((output / "run.json").read_text())
    free = {"row_tokens", "micro_batch_size"}  # change no result beyond rounding
    sections = {name: new["config"][name] for name in ("model", "data", "loss", "optim")}
    sections["run"] = {"seed": new["config"]["run"]["seed"]}
    changed = [
        f"{name} ({old['config'][section].get(name)!r} -> {value!r})"
        for section, values in sections.items()
        for name, value in values.items()
        if name not in free and old["config"][section].get(name) != value
    ]
    changed += [f"the {name}" for name in ("base", "pairs") if old[name] != new[name]]
    if changed:
        raise ValueError(
            f"{output} was trained otherwise; changed since: {', '.join(changed)}. Resume with "
            "what it began with, or name another --output."
        )


def prepare_pairs(config: TrainConfig) -> Path:
    """The pairs file to train on; builds the digits default once when none is named."""
    if config.data.pairs is not None:
        return Path(config.data.pairs)
    if config.model.model is not None:
        raise ValueError(
            "--model is given without --pairs. Build pairs for it with `python -m realign.pairs` "
            "and pass the file."
        )
    path = Path(config.run.output) / f"pairs-seed{config.run.seed}.parquet"
    if not path.exists() and parallel.rank() == 0:
        from realign.pairs.pipeline import PairsConfig, build_pairs

        build_pairs(PairsConfig(output=str(path), seed=config.run.seed, quiet=config.run.quiet))
    parallel.barrier()
    return path


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine to zero; `step` counts from 0."""
    warm = max(1, round(config.optim.warmup * total))
    if step < warm:
        return config.optim.learning_rate * (step + 1) / warm
    progress = (step - warm) / max(1, total - warm)
    return config.optim.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class _Micro:
    """One forward's worth of a step."""

    indices: np.ndarray
    last: bool


def _share_of_rank(config: TrainConfig) -> slice:
    """Which part of every global batch this rank takes."""
    if parallel.world_size() > 1 and not config.run.fsdp:
        raise ValueError(
            f"this is one of {parallel.world_size()} ranks, but without --fsdp nothing is shared "
            "between them. Add --fsdp, or start one process."
        )
    ranks, size = parallel.world_size(), config.optim.batch_size
    if size % ranks:
        raise ValueError(
            f"batch_size {size} does not divide among {ranks} ranks; choose a multiple of {ranks}."
        )
    return slice(parallel.rank() * size // ranks, (parallel.rank() + 1) * size // ranks)


def _batches(
    count: int, config: TrainConfig, *, first: int, last: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(step, example indices) of steps first+1 .. last: a fresh permutation for each epoch.

    Batches run on from one epoch into the next, so all are full; they depend on the seed alone.
    """
    size = config.optim.batch_size
    for step in range(first + 1, last + 1):
        wanted = np.arange((step - 1) * size, step * size)
        orders = {
            epoch: np.random.default_rng([config.run.seed, epoch]).permutation(count)
            for epoch in set((wanted // count).tolist())
        }
        yield step, np.array([orders[i // count][i % count] for i in wanted.tolist()])


def _micros(mine: np.ndarray, config: TrainConfig) -> Iterator[_Micro]:
    size = config.optim.micro_batch_size
    for start in range(0, len(mine), size):
        yield _Micro(mine[start : start + size], start + size >= len(mine))


def _accumulate(
    model: ForestModel,
    mine: np.ndarray,
    examples: Sequence[Example],
    references: torch.Tensor,  # (L, examples) fp32
    store,
    objective: Objective,
    config: TrainConfig,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Forward and backward over this rank's examples; returns sums of the metrics."""
    totals: dict[str, torch.Tensor] = {}
    # FSDP averages gradients over ranks; the loss is a mean over the global batch.
    scale = parallel.world_size() / config.optim.batch_size
    for micro in _micros(mine, config):
        part = [examples[i] for i in micro.indices]
        row_tokens = config.data.row_tokens or max(example.longest_tree for example in part)
        batch = build_batch(part, store, row_tokens=row_tokens).to(device)
        parallel.sync_gradients(model, micro.last)
        out = model(batch, objective, references[:, micro.indices].to(device))
        (out.loss * scale).backward()
        for name, value in metrics.sums(out, objective).items():
            totals[name] = totals.get(name, 0) + value
    return totals


def _clip(parameters: Sequence[torch.nn.Parameter], limit: float) -> float:
    """Clip the gradient to norm `limit` (0: do not); returns its norm before."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit or math.inf)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _means(totals: dict[str, torch.Tensor], batch_size: int) -> dict[str, float]:
    values = parallel.sum_over_ranks(torch.stack(list(totals.values())))
    return dict(zip(totals, (values / batch_size).tolist(), strict=True))


def _non_finite(
    step: int, loss: float, norm: float, mine: np.ndarray, examples: Sequence[Example], output: Path
) -> str:
    names = ", ".join(examples[i].name for i in mine)
    return (
        f"step {step}: loss {loss}, gradient norm {norm}. Nothing was updated; the last checkpoint "
        f"in {output / 'checkpoints'} is whole. Records of this rank in the step: {names}. "
        "Remove the faulty one, or lower --learning-rate, and go on with --resume."
    )


def _shown(means: dict[str, float]) -> dict[str, str]:
    names = {"loss": "loss", "rewards/margins": "margin", "rewards/visual_margins": "visual"}
    return {short: f"{means[name]:.3f}" for name, short in names.items() if name in means}


if __name__ == "__main__":
    sys.exit(main())
