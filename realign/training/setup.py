"""Setup of a run: model, checked records, adapters, sharding, optimizer, references."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule

from realign import distributed
from realign.config import EvalConfig, LossConfig, TrainConfig
from realign.data.ranks import first_on_machine
from realign.data.record_table import RecordTable, open_table
from realign.modeling import feature_cache, lora_targets, projector, quantized, reference_logps
from realign.modeling.encode import encode_table, make_objective
from realign.modeling.examples import Examples, key_array
from realign.modeling.feature_cache import FeatureCache
from realign.modeling.images import ImageStore
from realign.modeling.layouts import max_tokens
from realign.modeling.loading import (
    DTYPES,
    add_lora,
    check_unquantized,
    load_model,
    load_processor,
)
from realign.modeling.model import ForestModel
from realign.modeling.reference_logps import digest_of
from realign.progress import track
from realign.training import fsdp, held_out, optimizers, reference
from realign.training.checkpoint import Checkpoints
from realign.training.run_dir import base_of, check_settings
from realign.training.schedule import rank_slice, total_steps
from realign.training.throughput import image_flop
from realign_kernels import Objective, objectives


@dataclass
class Inputs:
    """A model, the examples to train it on, and those held out."""

    base: str  # folder (absolute) or Hub name of the model
    processor: Any
    model: ForestModel
    objective: Objective
    examples: Examples  # all, with those held out
    store: ImageStore
    held_out: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # indices

    @cached_property
    def training(self) -> np.ndarray:
        """Indices of the examples to train on."""
        return np.setdiff1d(np.arange(len(self.examples)), self.held_out)

    def digests(self) -> dict[str, str]:
        """Digests of the pairs and of the held-out pairs; "" if there are none."""
        parts = {"pairs": self.training, "held_out_pairs": self.held_out}
        return {n: digest_of(self.examples, part) if len(part) else "" for n, part in parts.items()}

    @property
    def training_images(self) -> int:
        """Number of distinct images of the examples to train on."""
        parts = [chunk.images for chunk in self.examples.chunks]
        counts = np.concatenate([np.diff(part.offsets.to_numpy()) for part in parts])
        owners = np.repeat(np.arange(len(self.examples)), counts)
        keys = np.concatenate([key_array(part.values.field("key")) for part in parts])
        return len(np.unique(keys[np.isin(owners, self.training)].view("S16")))

    @cached_property
    def text_only(self) -> bool:
        """Whether any example to train on has no image."""
        return not self.examples.image_tokens[self.training].any(axis=1).all()


def load_inputs(
    base: str | Path,
    pairs: str | Path,
    loss: LossConfig,
    *,
    dtype: torch.dtype,
    weights_dtype: torch.dtype,
    attention: str = "tree",
    meta: bool = False,
    quantize: str | None = None,
    train_vision: bool,
    max_response_tokens: int,
    progress: bool,
    image_folder: str | None = None,
    split: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    workers: int = 1,
    evaluation: EvalConfig | None = None,
    seed: int = 0,
) -> Inputs:
    """Load a model and encode the pairs for it. With a process group, every rank calls it.

    Args:
        base: folder or Hub name of the model, or of an adapter.
        pairs: see `stream_pairs`.
        loss: defines the responses and images that an example needs.
        dtype: compute dtype.
        weights_dtype: dtype of the weights.
        attention: attention of the language model, a key of `attention.IMPLEMENTATIONS`.
        meta: build the model without weights, which rank 0 will send.
        quantize: see `load_model`.
        train_vision: whether the vision tower is trained.
        max_response_tokens: maximum number of tokens in a response. A longer one is an error.
        progress: whether to show a progress bar.
        image_folder: see `stream_pairs`.
        split: see `stream_pairs`.
        min_pixels: see `set_pixels`.
        max_pixels: see `set_pixels`.
        workers: threads that decode and preprocess images.
        evaluation: which records to hold out; None holds out none.
        seed: seed of the split of records.

    Raises:
        ValueError: for an unusable model or record.
    """
    if Path(base).is_dir():  # the adapter's configuration names its base by an absolute path
        base = Path(base).resolve()
    processor = load_processor(base, min_pixels=min_pixels, max_pixels=max_pixels)
    convert = partial(track, title="reading records", unit="records", quiet=not progress)

    def opened(source: str | Path, image_folder: str | None, split: str | None) -> RecordTable:
        table = first_on_machine(
            lambda: open_table(source, image_folder, split=split, progress=convert)
        )
        if table.skipped:
            distributed.log_rank0(f"skipped records of {source}: {table.skipped_text}")
        return table

    table = opened(pairs, image_folder, split)
    objective = make_objective(loss, table)
    check_unquantized(base, quantize)
    vlm = load_model(base, weights_dtype, attention, meta=meta, quantize=quantize)
    model = ForestModel(vlm, train_vision=train_vision, dtype=dtype)
    encoded = partial(
        encode_table,
        processor=processor,
        layout=model.layout,
        max_response_tokens=max_response_tokens,
        max_tokens=max_tokens(vlm),
        progress=progress,
    )
    examples, indices = encoded(table, objective=objective), np.zeros(0, np.int64)
    if evaluation is not None:
        source = held_out.Source(opened, partial(make_objective, loss), encoded)
        examples, indices = held_out.add(
            examples, table, objective, source, evaluation, image_folder=image_folder, seed=seed
        )
    store = ImageStore(processor, model.layout, examples, workers=workers)
    return Inputs(str(base), processor, model, objective, examples, store, indices)


def training_inputs(
    config: TrainConfig,
    pairs: Path,
    attention: str,
    *,
    meta: bool,
    progress: bool = False,
    base: str | None = None,
) -> Inputs:
    """`load_inputs` with the settings of a run. `base` is another model, which is not trained."""
    dtype = DTYPES[config.model.dtype]
    trains_all = config.model.tune == "full" and base is None
    return load_inputs(
        base or base_of(config),
        pairs,
        config.loss,
        dtype=dtype,
        weights_dtype=torch.float32 if trains_all else dtype,
        attention=attention,
        meta=meta,
        quantize=config.model.quantize,
        train_vision=config.model.train_vision,
        max_response_tokens=config.data.max_response_tokens,
        progress=progress,
        image_folder=config.data.image_folder,
        split=config.data.split,
        min_pixels=config.data.min_pixels,
        max_pixels=config.data.max_pixels,
        workers=distributed.workers_of_rank(config.data.workers),
        evaluation=config.eval,
        seed=config.run.seed,
    )


@dataclass
class Run:
    """State of a training run.

    Attributes:
        config: its settings.
        device: device of this rank.
        local: slice of every global batch for this rank.
        inputs: model, objective, examples and their images.
        adapter: the PEFT model around `inputs.model.vlm`; None for full fine-tuning.
        trained: the trained parameters.
        optimizer: optimizer of the trained parameters.
        fingerprint: fingerprint of the model's log-probs, before adapters and sharding.
        digests: digests of base weights, pairs, held-out pairs and the weights of another
            reference, "" for those that are absent. They must be equal when the run is resumed.
        references: (L, examples) fp32 log-probs of another reference; None for the model itself.
        state: numbers that checkpoints keep and that do not follow from the step, as JSON.
        image_flop: FLOP of the vision tower per image token.
        checkpoints: checkpoints in the output folder.
        done: number of steps done: at first those of the checkpoint to resume from.
        progress: whether this rank shows progress bars.
    """

    config: TrainConfig
    device: torch.device
    local: slice
    inputs: Inputs
    adapter: PeftModel | None
    trained: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    fingerprint: dict[str, str]
    digests: dict[str, str]
    references: torch.Tensor | None
    image_flop: float
    checkpoints: Checkpoints
    done: int
    progress: bool
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def rewards(self) -> objectives.RunningMean:
        """Running mean of the rewards of all steps, for an objective that subtracts it."""
        return objectives.RunningMean(**self.state.get("rewards", {}))

    @property
    def objective(self) -> Objective:
        """The objective with that running mean."""
        return self.inputs.objective.at(self.rewards.value)

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return total_steps(len(self.inputs.training), self.config.optim)


def set_up(
    config: TrainConfig,
    pairs: Path,
    device: torch.device,
    attention: str,
    checkpoints: Checkpoints,
    done: int,
) -> Run:
    """Load a model and its records, add adapters, shard the model, and create the optimizer.

    Args:
        config: the settings.
        pairs: the pairs to train on.
        device: device of this rank.
        attention: attention of the language model, a key of `attention.IMPLEMENTATIONS`.
        checkpoints: checkpoints in the run's output folder.
        done: step of the checkpoint to resume from, 0 for none.

    Raises:
        ValueError: for an unusable model or record, and for settings that have changed since the
            run began.
    """
    settings, optim, rank = config.model, config.optim, distributed.rank()
    progress = not config.run.quiet and rank == 0
    local = rank_slice(optim.batch_size, rank, distributed.world_size())
    meta = rank > 0  # weights come from rank 0
    load = partial(training_inputs, config, pairs, attention)
    kernels, quantize = config.scale.kernels, settings.quantize
    digest = partial(shared_fingerprint, device=device, kernels=kernels, quantize=quantize)
    other = None
    if settings.reference_model:
        other = reference.of_other_model(config, device, load, digest, progress=progress)
    inputs = load(meta=meta, progress=progress)
    model, total = inputs.model, total_steps(len(inputs.training), optim)
    held_out.check(config, inputs.objective, total)
    fingerprint = digest(inputs)
    digests = {"base": fingerprint["weights"], "reference": other.weights if other else ""}
    digests |= inputs.digests()
    if done:
        check_settings(config, **digests)
    adapter = None
    if settings.quantize:
        text = quantized.summary(model.vlm, settings.quantize)
        distributed.log_rank0(f"the language model is quantized: {text}")
    if settings.tune == "lora":
        torch.manual_seed(config.run.seed)
        adapter = add_adapters(model, config)
        distributed.log_rank0(lora_targets.share(model.vlm))
    fsdp.place(model, config, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model is trained. Train with --lora-rank above 0.")
    of_projector = projector.trained(model.vlm) if optim.projector_learning_rate else []
    if of_projector:
        distributed.log_rank0(projector.summary(model.vlm, optim.projector_learning_rate))
    return Run(
        config=config,
        device=device,
        local=local,
        inputs=inputs,
        adapter=adapter,
        trained=trained,
        optimizer=optimizers.make(optim, trained, of_projector),
        fingerprint=fingerprint,
        digests=digests,
        references=other.logps if other else None,
        image_flop=image_flop(model.eval(), inputs.store.first(), device),
        checkpoints=checkpoints,
        done=done,
        progress=progress,
    )


def add_adapters(model: ForestModel, config: TrainConfig) -> PeftModel:
    """Add LoRA, and copies of the projector's modules if it is trained, by the settings.

    Raises:
        ValueError: for settings that the model does not support. The message names the setting.
    """
    settings, vlm = config.model, model.vlm
    assert settings.lora_rank is not None and settings.lora_alpha is not None
    adapter = add_lora(
        vlm,
        settings.lora_rank,
        settings.lora_alpha,
        targets=settings.lora_targets,
        dropout=settings.lora_dropout,
        rslora=settings.use_rslora,
        dora=settings.use_dora,
        save=projector.modules_to_save(vlm) if config.optim.projector_learning_rate else (),
    )
    if any(p.requires_grad for p in model.frozen_parameters()):  # adapters in the tower
        model.freeze(train_vision=True)
    parts = (vlm.model.get_decoder(), vlm.get_output_embeddings())
    of_language = {p for part in parts if part is not None for p in part.parameters()}
    trained = {p for p in vlm.parameters() if p.requires_grad}
    if config.run.cache_vision and not trained <= of_language:
        raise ValueError(
            "--cache-vision keeps image features for the whole run, and --lora-targets "
            f"{settings.lora_targets} adapts layers that compute them. Leave one of them out."
        )
    return adapter


def shared_fingerprint(
    inputs: Inputs,
    device: torch.device,
    kernels: str = "eager",
    quantize: str | None = None,
    weights: str | None = None,
) -> dict[str, str]:
    """`reference_logps.fingerprint` on all ranks, with the weights' digest of rank 0 if absent."""
    vlm, dtype = inputs.model.vlm, inputs.model.dtype
    weights = weights or distributed.broadcast_from_rank0(
        lambda: reference_logps.weights_digest(vlm, dtype)
    )
    processor = inputs.processor
    return reference_logps.fingerprint(vlm, processor, dtype, device, kernels, weights, quantize)


def reference_pass(run: Run) -> torch.Tensor:
    """Compute or look up the reference log-probs of all examples, (L, examples) fp32.

    The model must be as it was loaded: before training and restoring. Adapters are off.
    """
    config, inputs = run.config, run.inputs
    distributed.mark_ranks_diverged()
    for line in inputs.model.check_forest(inputs.examples[0], inputs.store, run.device):
        distributed.log_rank0(line)
    if config.run.cache_vision:
        features = FeatureCache(feature_cache.default_directory(), run.fingerprint)
        size, store = config.optim.micro_batch_size, inputs.store
        feature_cache.fill(features, inputs.model, store, run.device, size, progress=run.progress)
        inputs.store.features = features
    if not inputs.objective.needs_reference:
        distributed.log_rank0(f"{inputs.objective.name} needs no reference log-probs")
        return torch.zeros(len(inputs.objective.leaves), len(inputs.examples))
    references = run.references
    if references is None:
        references = reference.logps(
            config, inputs, run.fingerprint, run.device, progress=run.progress
        )
    if isinstance(inputs.model, FSDPModule):
        inputs.model.reshard()  # without a backward the root stays gathered
    return references


def restore(run: Run) -> None:
    """Load the checkpoint that the run resumes from, and print a summary of the run."""
    config, inputs = run.config, run.inputs
    if run.done:
        run.state = run.checkpoints.load(run.done, inputs.model, run.optimizer)
        distributed.log_rank0(f"resumed from step {run.done} of {run.total}")
    elif config.run.resume:
        distributed.log_rank0(
            f"there is no checkpoint in {config.run.output} yet; starting at the first step"
        )
    trained, settings = sum(p.numel() for p in run.trained), config.model
    recipe = f", recipe {settings.recipe}" * (settings.recipe is not None)
    distributed.log_rank0(
        f"training {settings.how}, peak learning rate {config.optim.learning_rate:g}, "
        f"{settings.dtype}{recipe}"
    )
    distributed.log_rank0(
        f"{inputs.objective.name}: {len(inputs.training):,} records, {inputs.training_images:,} "
        f"distinct images, {trained:,} trained parameters, {run.total:,} steps of "
        f"{config.optim.batch_size} records on {distributed.world_size()} rank(s), in "
        f"{config.model.dtype}"
    )
