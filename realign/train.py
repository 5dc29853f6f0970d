"""Preference training of a vision-language model: `python -m realign.train --help`.

    python -m realign.train                          # rDPO on the shipped digits, one process
    python -m realign.train --fsdp                   # the same, sharded over ranks
    python -m realign.train --model DIR --pairs P    # any model of docs/families.md

Read `train` below from top to bottom: load, check the records, reference log-probs, steps, export.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from realign import distributed
from realign.config import TrainConfig, parse
from realign.export import export
from realign.files import read_jsonl
from realign.modeling import attention, feature_cache, reference_logps
from realign.modeling.loading import DTYPES, add_lora
from realign.modeling.prefetch import ahead
from realign.third_party import silence_third_party
from realign.training import dry_run, fsdp, liger
from realign.training.checkpoint import Checkpoints
from realign.training.inputs import load_inputs
from realign.training.model_card import model_card, settings_of
from realign.training.run_dir import (
    StopSignal,
    base_of,
    check_outputs,
    check_settings,
    prepare_pairs,
    sole_writer,
    steps_done,
    write_identity,
)
from realign.training.schedule import batches, learning_rate, seed_step, share_of_rank, total_steps
from realign.training.step import (
    Feed,
    NonFiniteStep,
    accumulate,
    clip,
    culprits,
    heap_frozen,
    micro_batches,
    update_and_read,
)
from realign.training.throughput import Meter, image_flop
from realign.training.trackers import Trackers, check_packages
from realign_kernels import ReferenceCache


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, start workers if asked to, train; returns an exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    silence_third_party()
    try:
        config = parse(arguments)
        check_packages(config.run)
        first = os.environ.get("RANK", "0") == "0"  # it writes
        if first:
            check_outputs(config.run)
        if config.run.dry_run:
            if first:
                print(dry_run.make(config))
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
    """Train as configured; returns the folder of the final model, None when stopped by a signal.

    Raises:
        ValueError: for settings, records or a model that cannot be trained on; before any step.
        NonFiniteStep: when loss or gradient is not finite; the last checkpoint stays.
        CheckpointError: when none is whole, or the last one cannot be written.
    """
    scale = config.scale
    device = distributed.start(alone=config.sharded, fsdp=scale.fsdp)
    fsdp.check(scale, device, distributed.world_size())
    attends, why = attention.choose(
        config.model.attention, device, DTYPES[config.model.dtype], compiled=scale.compile
    )
    with sole_writer(Path(config.run.output)):
        return _train(config, device, attends, why)


def _train(config: TrainConfig, device: torch.device, attends: str, why: str | None) -> Path | None:
    run, optim, scale, output = config.run, config.optim, config.scale, Path(config.run.output)
    dtype = DTYPES[config.model.dtype]
    say = print if distributed.rank() == 0 else lambda *_: None
    if why:
        say(why)
    bars = not run.quiet and distributed.rank() == 0 and sys.stderr.isatty()
    share = share_of_rank(optim.batch_size, distributed.rank(), distributed.world_size())
    checkpoints = Checkpoints(output / "checkpoints", run.keep)
    done = steps_done(config, checkpoints)

    base, lora = base_of(config), config.model.tune == "lora"
    inputs = load_inputs(
        base,
        prepare_pairs(config),
        config.loss,
        dtype=dtype,
        weights_dtype=dtype if lora else torch.float32,
        attention=attends,
        meta=distributed.rank() > 0,  # weights come from rank 0
        train_vision=config.model.train_vision,
        max_response_tokens=config.data.max_response_tokens,
        progress=bars,
    )
    model, examples, objective = inputs.model, inputs.examples, inputs.objective
    weights = distributed.broadcast_from_rank0(
        lambda: reference_logps.weights_digest(model.vlm, dtype)
    )
    fingerprint = reference_logps.fingerprint(
        model.vlm, inputs.processor, dtype, device, scale.kernels, weights
    )
    identity = {"base": fingerprint["weights"], "pairs": reference_logps.digest_of(examples)}
    if done:
        check_settings(config, **identity)

    adapter = None
    if lora:
        torch.manual_seed(run.seed)
        adapter = add_lora(model.vlm, config.model.lora_rank, config.model.lora_alpha)
    layers = fsdp.trained_layers(model)
    if scale.liger:
        say(liger.use(layers, device))
    fsdp.wrap_layers(layers, compiled=scale.compile, checkpointed=scale.activation_checkpointing)
    if config.sharded:
        fsdp.shard(model, device, dtype, replicas=scale.replicas, cpu_offload=scale.cpu_offload)
    else:
        model.to(device)
    # Nothing is trained or restored yet, and adapters are off: this is the reference.
    directory = run.reference_cache or reference_logps.default_directory()
    model.eval()
    per_image_token = image_flop(model, inputs.store, device)
    distributed.ranks_part()
    if run.cache_vision:
        inputs.store.features = feature_cache.keep(
            fingerprint,
            model,
            inputs.store,
            device,
            batch_images=optim.micro_batch_size,
            progress=bars,
            say=say,
        )
    for line in model.check_forest(examples[0], inputs.store, device):
        say(line)
    with ReferenceCache.open(directory, fingerprint) as cache:
        references = reference_logps.fill(
            cache,
            model,
            examples,
            inputs.store,
            row_tokens=config.data.row_tokens or inputs.longest_tree,
            batch_rows=optim.micro_batch_size * len(examples[0].roots),
            device=device,
            progress=bars,
            say=say,
        ).float()
    if config.sharded:
        model.reshard()  # a forward without backward leaves the root gathered
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=optim.learning_rate, weight_decay=optim.weight_decay, fused=True
    )
    total = total_steps(len(examples), optim)
    if done:
        checkpoints.load(done, model, optimizer)
        say(f"resumed from step {done} of {total}")
    elif run.resume:
        say(f"there is no checkpoint in {output} yet: starting at the first step")
    say(
        f"{objective.name}: {len(examples)} records, {len(inputs.store)} distinct images, "
        f"{sum(p.numel() for p in trained):,} trained parameters, {total} steps of "
        f"{optim.batch_size} on {distributed.world_size()} rank(s), in {config.model.dtype}"
    )
    meter, first = Meter(model, device, dtype, per_image_token), distributed.rank() == 0
    trackers = Trackers(config, objective.name, total=total, done=done, first_rank=first)
    if first:
        write_identity(config, **identity)

    model.train()
    feed = Feed(examples, references, inputs.store, model.attention, config.data.row_tokens, device)
    forward_backward = partial(
        accumulate, model, objective=objective, batch_size=optim.batch_size, device=device
    )
    order = partial(batches, len(examples), optim.batch_size, run.seed, first=done, last=total)
    tasks = (
        partial(feed, *part)
        for _, batch in order()
        for part in micro_batches(batch[share], optim.micro_batch_size)
    )
    forwards = -(-(share.stop - share.start) // optim.micro_batch_size)
    with (
        StopSignal() as stop,
        checkpoints,
        trackers,
        heap_frozen(),
        ahead(tasks, device) as ready,
    ):
        for step, batch in order():
            began = time.perf_counter()
            seed_step(run.seed, step, distributed.rank())
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step - 1, total, optim)
            totals = forward_backward(islice(ready, forwards))
            norm = clip(trained, optim.clip)
            found, stopping = update_and_read(
                optimizer, totals, norm, optim.batch_size, bool(stop.name)
            )
            if not (math.isfinite(found["loss"]) and math.isfinite(found["grad_norm"])):
                one_by_one = culprits(
                    lambda part: forward_backward([feed(part)]), batch[share], trained
                )
                guilty = [examples[i].name for i in one_by_one]
                raise NonFiniteStep(step, found, guilty, optim.batch_size)
            optimizer.zero_grad()
            rates = meter.read(found, optim.batch_size, time.perf_counter() - began)
            found["learning_rate"] = optimizer.param_groups[0]["lr"]
            epoch = step * optim.batch_size / len(examples)
            trackers.write({"step": step, "epoch": epoch, **found, **rates})
            if stopping or step == total or (run.save_every and step % run.save_every == 0):
                checkpoints.save(step, model, optimizer, wait=stopping or step == total)
            if stopping and step < total:
                say(f"stopped after step {step} of {total}; the same with --resume goes on")
                return None
    final = output / "model"
    export(
        final,
        model,
        adapter,
        inputs.processor,
        base=inputs.base,
        merge=run.merge,
        card=lambda: model_card(
            config.loss.objective,
            settings_of(config),
            base=inputs.base,
            adapter=lora and not run.merge,
            records=len(examples),
            images=len(inputs.store),
            digests={"base weights": identity["base"], "records": identity["pairs"]},
            last=read_jsonl(output / "metrics.jsonl")[-1],
        ),
    )
    say(f"wrote {final} (model), {output / 'metrics.jsonl'} (curves)")
    return final


if __name__ == "__main__":
    distributed.exit_rank(main())
