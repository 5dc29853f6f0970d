"""The plan of a run: `python -m realign.train --dry-run`.

Settings and records are checked as in training, so that errors in them show here. No weights are
read and nothing is written. Counts are exact. Memory and time are estimates.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from realign import distributed, recipes
from realign.config import TrainConfig
from realign.data.errors import short_error
from realign.modeling import attention, quantized, reference_logps
from realign.modeling.attention import row_budget
from realign.modeling.forest import Example, ForestBatch, build_batch
from realign.modeling.images import ImageStore
from realign.modeling.loading import DTYPES, load_model
from realign.modeling.model import ForestModel
from realign.training import fsdp, held_out, memory, optimizers
from realign.training.checkpoint import Checkpoints
from realign.training.export import stored_dtype
from realign.training.reference import check_encodings, named
from realign.training.run_dir import base_of, check_inputs, check_settings, steps_done
from realign.training.schedule import batches, rank_slice, total_steps
from realign.training.setup import add_adapters, training_inputs
from realign.training.step import micro_batches
from realign.training.throughput import WORK, cost_of, image_flop, process_memory, work_of
from realign_kernels import ReferenceCache, refcache

_SAMPLED = 64  # forwards laid out to estimate rows and padding
_FEW = 4  # forwards laid out to choose activation checkpointing
_USABLE = 0.9  # of a GPU's memory. The rest is for CUDA's context and fragments; not measured.


def make(config: TrainConfig, prepare_pairs: Callable[[TrainConfig], Path]) -> str:
    """The plan as lines of text.

    Args:
        config: the settings.
        prepare_pairs: returns the pairs file of given settings.

    Raises:
        ValueError: for settings and records that are an error in training.
    """
    imports = process_memory("VmRSS")
    with tempfile.TemporaryDirectory() as scratch:
        pairs_of_run = Path(config.run.output) / f"pairs-seed{config.run.seed}.parquet"
        # Digit pairs are built in a scratch folder, since a dry run writes no output.
        scratch_config = replace(config, run=replace(config.run, output=scratch))
        pairs = prepare_pairs(config if pairs_of_run.exists() else scratch_config)
        config, reason = with_checkpointing(config, pairs)
        plan = Plan(config, pairs)
        recipe = config.model.recipe
        rows = recipes.rows(recipe, config.to_dict()) if recipe else {}
        rows |= plan.model_rows() | plan.forest() | {"steps": plan.schedule()} | plan.evaluation()
        rows |= {"checkpointing": reason} if reason else {}
        rows |= plan.memory(imports) | {"time": plan.duration(), "disk": plan.disk()}
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows.items())


def with_checkpointing(config: TrainConfig, pairs: Path) -> tuple[TrainConfig, str]:
    """The settings with activation checkpointing on or off, and the reason if it was chosen here.

    If the setting is absent, it is on if the memory without it is estimated to exceed the GPU's.
    With a process group, every rank calls it. Rank 0 decides.

    Raises:
        ValueError: for settings and records that are an error in training.
    """
    room, on, reason = gpu_memory(), bool(config.scale.activation_checkpointing), ""

    def given(value: bool) -> TrainConfig:
        return replace(config, scale=replace(config.scale, activation_checkpointing=value))

    if room is not None and config.scale.activation_checkpointing is None:
        try:
            plan = Plan(given(False), pairs, sampled=_FEW)
            needed = sum(plan.memory_parts().values())
            reason = f"without it {_gib(needed)} of {_gib(room)} are needed, as estimated"
        except Exception as error:  # models raise errors of many types for fake tensors
            needed, reason = 0, f"the memory cannot be estimated ({short_error(error)})"
        on, reason = distributed.broadcast_from_rank0(lambda: (needed > room, reason))
        reason = f"{'on' if on else 'off'}: {reason}"
    return given(on), reason


def gpu_memory() -> int | None:
    """Bytes of the GPU that a run may use, or None without a GPU."""
    if not torch.cuda.is_available():
        return None
    return int(_USABLE * torch.cuda.get_device_properties("cuda").total_memory)


@dataclass
class _Layout:
    """Rows, work and examples of a forward."""

    rows: int
    columns: int
    work: dict[str, float]
    batch: Sequence[Example]


class Plan:
    """The plan of a run, from its settings and records.

    Args:
        config: the settings.
        pairs: the pairs file.
        sampled: number of forwards to sample.

    Raises:
        ValueError: for settings, records or a model that cannot be trained on.
    """

    def __init__(self, config: TrainConfig, pairs: Path, *, sampled: int = _SAMPLED) -> None:
        self.config, self.dtype, self.sampled = config, DTYPES[config.model.dtype], sampled
        self.base = base_of(config)
        self.lora = config.model.tune == "lora"
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if cuda else "cpu")
        self.ranks = distributed.planned_ranks(config.scale.fsdp, config.scale.nproc_per_node)
        fsdp.check(config.scale, self.device, self.ranks)
        attends, _ = attention.choose(
            config.model.attention, self.device, self.dtype, compiled=config.scale.compile
        )
        # Fake tensors cannot run flex. sdpa has the same rows.
        self.layout_attention = "sdpa" if attends == "flex" else attends
        self.shards = self.ranks // config.scale.replicas
        checkpoints = Checkpoints(Path(config.run.output) / "checkpoints", config.run.keep)
        self.done = checkpoints.last() if config.run.resume else 0
        if not self.done:
            steps_done(config, checkpoints)
        check_inputs(config)
        if self.done:
            check_settings(config)
        self.local = rank_slice(config.optim.batch_size, 0, self.ranks)

        inputs = training_inputs(config, pairs, self.layout_attention, meta=True)
        self.model, self.objective = inputs.model, inputs.objective
        self.examples, self.store, self.vlm = inputs.examples, inputs.store, inputs.model.vlm
        other = inputs
        if path := config.model.reference_model:
            load = partial(training_inputs, config, pairs, self.layout_attention, meta=True)
            with named(setting := f"--reference-model {path}"):
                other = load(base=path)
            check_encodings(inputs, other, setting)
        self.description = reference_logps.description(
            other.model.vlm,
            other.processor,
            self.dtype,
            self.device,
            config.scale.kernels,
            config.model.quantize,
        )
        self.per_image_token = self._per_image_token()
        self.forward_cost = cost_of(self.model, self.per_image_token, backward=False)
        self.parameters = sum(p.numel() for p in self.vlm.parameters())
        layers = quantized.linears(self.vlm) if config.model.quantize else []
        self.quantized = [layer.get_parameter("weight") for layer in layers]
        if self.lora:
            add_adapters(self.model, config)
        fsdp.wrap_layers(
            fsdp.trained_layers(self.model),
            compiled=False,  # compiled layers keep the same tensors
            checkpointed=bool(config.scale.activation_checkpointing),
        )
        self.cost = cost_of(self.model, self.per_image_token)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.learning = sum(p.numel() for p in self.trained)
        state = optimizers.state_bytes(config.optim, self.learning)
        self.checkpoint = 4 * self.learning + state  # bytes
        self.trained_records, self.held_out = inputs.training, inputs.held_out
        self.trained_images = inputs.training_images
        self.total = total_steps(len(self.trained_records), config.optim)
        held_out.check(config, self.objective, self.total)
        self.layouts = self._layouts()

    def _per_image_token(self) -> float:
        """FLOP of the tower, 0 if it reads values, which fake tensors lack (Qwen's grids)."""
        weights_dtype = self.dtype if self.lora else torch.float32
        vlm = load_model(self.base, weights_dtype, self.layout_attention, meta=True)
        model = ForestModel(vlm, dtype=self.dtype)
        cpu, images = torch.device("cpu"), self.store.first()
        with memory.fake_tensors(cpu):
            memory.give_fake_storage(model, cpu, self.dtype)
            try:
                return image_flop(model, images, cpu)
            except memory.READS_VALUES:
                return 0.0

    def _parts(self) -> list[np.ndarray]:
        """Example indices of the first forwards of rank 0."""
        optim, parts = self.config.optim, []
        trained = self.trained_records
        steps = batches(
            len(trained), optim.batch_size, self.config.run.seed, first=0, last=self.total
        )
        for _, places in steps:
            batch = trained[places][self.local]
            parts += [part for part, _ in micro_batches(batch, optim.micro_batch_size)]
            if len(parts) >= self.sampled:
                break
        return parts

    def _batch(self, microbatch: Sequence[Example]) -> ForestBatch:
        budget = self.config.data.row_tokens or row_budget(self.model.attention, microbatch)
        return build_batch(microbatch, self.store, row_tokens=budget)

    def _layouts(self) -> list[_Layout]:
        layouts = []
        for part in self._parts():
            microbatch = [self.examples[i] for i in part]
            batch = self._batch(microbatch)
            counts = work_of(batch, microbatch).tolist()
            work: dict[str, float] = dict(zip(WORK, counts, strict=True))
            rows, columns = batch.input_ids.shape
            layouts.append(_Layout(rows, columns, work, microbatch))
        return layouts

    @property
    def forwards(self) -> int:
        """Number of forwards of a rank in a step."""
        return -(-(self.local.stop - self.local.start) // self.config.optim.micro_batch_size)

    def _mean(self, name: str) -> float:
        """Mean work of a forward."""
        return float(np.mean([layout.work[f"work/{name}"] for layout in self.layouts]))

    def model_rows(self) -> dict[str, str]:
        """Rows for objective, model and trained parameters."""
        settings, kind = self.config.model, self.vlm.config
        stored = settings.dtype
        if settings.quantize:
            stored = f"{sum(w.numel() for w in self.quantized):,} of them in {settings.quantize}, "
            stored += f"the rest in {settings.dtype}"
        everything = sum(p.numel() for p in self.model.parameters())
        separate = self.model.layout.separate
        sharing = "shared prompts" if separate is None else f"a prompt per response: {separate}"
        return {
            "objective": f"{self.objective.name}, {len(self.objective.leaves)} leaves",
            "model": f"{self.base}: {kind.model_type}, {self.parameters:,} parameters, "
            f"{stored}, {self.model.attention} attention, {sharing}",
            "trains": f"{settings.how}: {self.learning:,} parameters, "
            f"{self.learning / everything:.1%}",
        }

    def forest(self) -> dict[str, str]:
        """Rows for records, tokens, and the tokens saved by shared prompts."""
        leaves = self.examples.leaves
        distinct = len(np.unique(leaves.keys.view("S16")))
        images = self.examples.image_tokens.mean()
        prompt = self.examples.root_lengths.mean() - images
        longest = self.examples.longest_tree
        tokens, separate = self._mean("tokens"), self._mean("separate")
        cells = np.mean([layout.rows * layout.columns for layout in self.layouts])
        cached, folder = self._cached_leaves(leaves)
        return {
            "records": f"{len(self.trained_records):,}, {self.trained_images:,} distinct images",
            "tokens": f"{images:.0f} of images and {prompt:.0f} of text in a prompt, "
            f"{leaves.lengths.mean():.0f} in a response (mean, {leaves.lengths.max()} at most); "
            f"longest tree {longest:,}",
            "forest": f"{tokens:,.0f} tokens in a forward instead of {separate:,.0f} as separate "
            f"sequences: {1 - tokens / separate:.1%} saved",
            "rows": f"{np.mean([layout.rows for layout in self.layouts]):.1f} in a forward, "
            f"{1 - tokens / cells:.1%} padding",
            "references": f"{distinct:,} distinct leaves, {cached:,} of them known{folder}"
            + (f", of {other}" if (other := self.config.model.reference_model) else "")
            if self.objective.needs_reference
            else f"none, since {self.objective.name} needs no reference",
        }

    def _cached_leaves(self, leaves) -> tuple[int, str]:
        """Cached leaves in the fullest table with this description. Weights are not compared."""
        directory = Path(self.config.run.reference_cache or reference_logps.default_directory())
        most, where = 0, ""
        for folder, parts in (refcache.tables(directory) if directory.is_dir() else {}).items():
            if {k: v for k, v in parts.items() if k != "weights"} != self.description:
                continue
            with ReferenceCache.open(directory, parts, read_only=True) as cache:
                present = leaves.keys[~cache.missing(leaves)]
            if (count := len(np.unique(present.view("S16")))) > most:
                most, where = count, f" in {folder} if its weights are the same"
        return most, where

    @property
    def evaluations(self) -> int:
        """Number of evaluations that remain, with that before the first step."""
        if not len(self.held_out):
            return 0
        steps = range(self.done, self.total + 1)
        return sum(held_out.is_due(self.config, step, self.total) for step in steps)

    def evaluation(self) -> dict[str, str]:
        """A row for held-out records and evaluations, if there are any."""
        count, config = len(self.held_out), self.config
        if not count:
            return {}
        every, patience = held_out.interval(config), config.eval.early_stopping
        share = count / len(self.examples)
        forwards = -(-count // (self.ranks * config.optim.micro_batch_size))
        when = f", every {every:,} steps" * bool(every)
        stop = f", stops after {patience} without a new best" * bool(patience)
        exported = "best" if config.eval.exports_best else "last"
        return {
            "evaluation": f"{count:,} held-out records, {share:.1%} of all; {self.evaluations:,} "
            f"evaluations of {forwards:,} forward(s){when}, by {config.eval.best_metric}{stop}; "
            f"the {exported} weights are exported"
        }

    def schedule(self) -> str:
        """Number of steps, and their division among ranks and forwards."""
        optim = self.config.optim
        epochs = self.total * optim.batch_size / len(self.trained_records)
        resumed = f", {self.done:,} of them done" if self.done else ""
        return (
            f"{self.total:,} of {optim.batch_size} examples, {epochs:.2f} epochs{resumed}; "
            f"{self.ranks} rank(s), {self.forwards} forward(s) of each in a step"
        )

    def memory(self, imports: int) -> dict[str, str]:
        """Rows for the peak memory of a rank, by part."""
        try:
            parts = self.memory_parts()
        except memory.READS_VALUES:
            kind = self.vlm.config.model_type
            return {"memory": f"not estimated: {kind} reads values that fake tensors lack"}
        if self.device.type == "cpu":
            parts["imported libraries"] = imports
        room = gpu_memory() or _physical_memory() // self.ranks
        total = sum(parts.values())
        rows = {f"  {name}": _gib(size) for name, size in parts.items()}
        verdict = "" if total < room else "; it will NOT fit"
        summary = f"{_gib(total)} of {_gib(room)} for a rank, estimated{verdict}"
        return {f"memory, {self.device.type}": summary} | rows

    def memory_parts(self) -> dict[str, int]:
        """Peak bytes of a rank by part, without imports."""
        largest = max(self.layouts, key=lambda layout: layout.rows * layout.columns)
        batch = self._batch(largest.batch)
        images = batch.images or self.store.first()
        calls = images.calls if images else ()
        image = sum(value.nbytes for call in calls for value in call.values())
        image //= len(images.tokens) if images else 1
        parts = rank_memory(
            self.model,
            batch,
            self.config,
            self.device,
            forwards=self.forwards,
            ranks=self.ranks,
            quantized_weights=[weight.numel() for weight in self.quantized],
            heap=memory.HEAP if self.device.type == "cpu" else 1.0,
        )
        if self.device.type == "cpu":
            parts["checkpoint being written"] = self.checkpoint // self.shards
            parts["images"] = min(len(self.store) * image, ImageStore.CACHE_BYTES)
            parts["process"] = memory.PROCESS
        return {name: size for name, size in parts.items() if size}

    def duration(self) -> str:
        """Lower bound of the time: that of the matrix products."""
        rate = _matmul_rate(self.device, self.dtype)
        machine = rate * (self.ranks if self.device.type == "cuda" else 1)
        flop = fmean(self.cost.of(layout.work) for layout in self.layouts)
        forward = fmean(self.forward_cost.of(layout.work) for layout in self.layouts)
        step = flop * self.forwards * self.ranks
        size = fmean(len(layout.batch) for layout in self.layouts)
        reference_pass = forward / size * len(self.examples) / machine
        seconds = step / machine
        remaining = seconds * (self.total - self.done)
        held = forward / size * len(self.held_out) * self.evaluations / machine
        parts = f", {_clock(held)} for evaluations" * bool(self.evaluations)
        parts += f", and up to {_clock(reference_pass)} for references" * (
            self.objective.needs_reference
        )
        return (
            f"at least {_clock(remaining)} for steps of {seconds:.2g} s{parts}. A step is "
            f"{step / 1e12:,.3g} TFLOP, at {machine / 1e12:,.3g} TFLOP/s measured for matrix "
            "products"
        )

    def disk(self) -> str:
        """Size of the outputs, and free disk space."""
        writes_model = not self.lora or self.config.run.merge
        stored = stored_dtype(self.base).itemsize if self.lora else 4
        final = self.parameters * stored if writes_model else self.learning * 4
        best = ", one is the best" * bool(len(self.held_out))
        kept = self.config.run.keep + 1 + bool(best)
        place = Path(self.config.run.output).absolute()
        while not place.exists():
            place = place.parent
        return (
            f"{kept} checkpoints of {_gib(self.checkpoint)} (one is being written{best}), "
            f"final model {_gib(final)}; {_gib(shutil.disk_usage(place).free)} free"
        )


def rank_memory(
    model: ForestModel,
    batch: ForestBatch,
    config: TrainConfig,
    device: torch.device,
    *,
    forwards: int,
    ranks: int = 1,
    quantized_weights: Sequence[int] = (),
    heap: float = 1.0,
) -> dict[str, int]:
    """Peak bytes of one rank for weights, optimizer, activations and gradients.

    Args:
        model: the model on the meta device, with its adapters and wrapped layers. It gets fake
            tensors, so it cannot be used again.
        batch: the largest micro-batch, on the CPU.
        config: the settings.
        device: device of the fake tensors.
        forwards: micro-batches in a step of one rank.
        ranks: number of ranks.
        quantized_weights: sizes of the weights that `config` quantizes.
        heap: resident bytes per byte of live tensors in a step.
    """
    dtype, shards = model.dtype, ranks // config.scale.replicas
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    stored = sum(p.numel() * (4 if p.requires_grad else p.itemsize) for p in model.parameters())
    dequantized = gathered = 0
    if method := config.model.quantize:
        total = sum(quantized_weights)
        stored -= total * dtype.itemsize - quantized.stored_bytes(total, method)
        dequantized = max(quantized_weights) * quantized.transient_bytes(method, dtype)
    if config.sharded:
        offloads = config.scale.cpu_offload
        unsharded = fsdp.unsharded_parameters(model, dtype, ranks, offloads)
        everything, *layers = (
            sum(p.numel() for p in part.parameters() if p not in unsharded)
            for part in (model, *model.layers)
        )
        root = everything - sum(layers)
        gathered = (root + 2 * max(layers)) * dtype.itemsize
    with memory.fake_tensors(device):
        memory.give_fake_storage(model, device, dtype)
        step = memory.measure(
            model, batch, device, forwards=forwards, ranks=shards, sharded=config.sharded
        )
    in_step = round(max(step.training, step.reference) * heap)
    parts = {
        "weights": stored // shards,
        "dequantized weight": dequantized,
        "gathered weights": gathered,
        "optimizer": optimizers.state_bytes(config.optim, trained // shards),
        "activations, gradients": max(in_step, step.gradients),
    }
    if config.scale.cpu_offload:  # weights and optimizer are in host memory
        parts |= {"weights": 0, "optimizer": 0, "activations, gradients": in_step}
    return parts


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of square matrix products, measured for a third of a second."""
    size = 4096 if device.type == "cuda" else 1024
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    count, began = 0, None
    while began is None or time.perf_counter() - began < 0.33:
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if began is None:  # the first call initializes
            began = time.perf_counter()
        else:
            count += 1
    return 2 * size**3 * count / (time.perf_counter() - began)


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 3600:.2f} h"
