"""Training step of LLaVA-1.5-7B with random weights: ours, TRL's DPOTrainer, plain rDPO.

Every step has four examples of two images. No two lengths are equal, so that no shape repeats. All
contestants start from the same policy, LoRA of rank 128 with noise, and store activations. If a
forward over all examples runs out of memory, a contestant gets half of them at a time.
`step_contestants.py` describes the contestants and the timed parts.
"""

import itertools
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import profile
from transformers import LlavaForConditionalGeneration

from benchmarks import step_contestants
from benchmarks.gpu.measure import WATCHED, kernel_seconds, kernels
from benchmarks.gpu.record import RESULTS, Record, free, latest, read
from benchmarks.models import (
    LLAVA_7B,
    TEMPLATE_TOKENS,
    encode,
    llava_config,
    random_on,
    random_records,
    word_processor,
)
from benchmarks.step_contestants import BETA, DEVICE, now
from realign import distributed
from realign.data.records import write_pairs
from realign.modeling import attention
from realign.modeling.forest import Example
from realign.modeling.images import ImageStore
from realign.modeling.layouts import Layout, layout_of
from realign.modeling.loading import DTYPES
from realign.modeling.model import ForestModel
from realign.modeling.prefetch import ahead
from realign.training import fsdp, step
from realign.training.setup import Inputs
from realign_kernels import objectives

BATCH = 4
"""Examples in a step."""
WARM, TIMED = 2, 5
"""Warm-up and timed steps. One further step is profiled."""
STEPS = WARM + TIMED + 1
TOY = {
    "vision": (32, 64, 3, 2), "text": (64, 128, 2, 2), "vocabulary": 192, "image_id": 128,
    "size": 28,
}  # fmt: skip
PROMPTS, RESPONSES = (20, 100), (40, 180)
"""Ranges of the words in prompts and responses, before up to 20 more. The toy has a fifth."""

CUDA = DEVICE == "cuda"


class Setting:
    """Records and processor of all contestants, and the model that each creates for itself.

    The model is the 7B in bf16, or a toy in fp32 in a rehearsal.
    """

    def __init__(self, record: Record, folder: Path) -> None:
        self.folder = folder
        sizes, shrink = (TOY, 5) if record.rehearse else (LLAVA_7B, 1)
        self.dtype = "fp32" if record.rehearse else "bf16"
        self.kind = DTYPES[self.dtype]
        self.config = llava_config(**sizes)
        rng = np.random.default_rng(0)
        # Each step covers the whole range, so that shapes differ between steps, but times hardly.
        lengths = [
            np.concatenate([rng.permutation(np.linspace(*ends, BATCH)) for _ in range(STEPS)])
            + rng.uniform(0, 20, STEPS * BATCH)
            for ends in (PROMPTS, RESPONSES, RESPONSES)
        ]
        words = (np.stack(lengths, 1) // shrink).astype(int) + TEMPLATE_TOKENS + 1
        image_id, size = sizes["image_id"], sizes["size"]
        self.records = random_records(words.tolist(), image_id, size)
        self.processor = word_processor(image_id, size)
        write_pairs(folder / "pairs.parquet", self.records)

    def model(self, attention: str) -> LlavaForConditionalGeneration:
        """The reference model on the device."""
        return random_on(DEVICE, self.config, self.kind, attention)

    def encode(self, layout: Layout) -> tuple[list[Example], ImageStore]:
        """Forests of all records, with preprocessed images."""
        return encode(self.records, self.processor, layout)


class Watch:
    """Watch that times steps: two for warm-up, five timed, and one profiled.

    It also counts the positions in the language model, including padding and reference passes.
    """

    words = ()  # every step is the contestant's default step

    def __init__(self, record: Record, decoder: torch.nn.Module, micro: int) -> None:
        self.left, self.micro = record.left, micro
        self.first: tuple[float, float] | None = None
        self.seconds: list[float] = []
        self.positions = 0
        self.busy: float | None = None
        self.profiler: profile | None = None
        decoder.register_forward_pre_hook(self._count, with_kwargs=True)
        if CUDA:
            torch.cuda.reset_peak_memory_stats()

    def _count(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.positions += kwargs["inputs_embeds"].shape[:2].numel()

    @property
    def step(self) -> int:
        """Number of the next step."""
        return len(self.seconds)

    @property
    def over(self) -> bool:
        """Whether all steps are done, or no time is left for another step."""
        timed = self.seconds[WARM:]
        return self.step == STEPS or (bool(timed) and self.left() < 2 * max(timed))

    def begin(self) -> None:
        """Starts the clock of a step."""
        if self.step == STEPS - 1:
            self.profiler = profile(activities=[WATCHED])
            self.profiler.start()
        self.began = now()

    def end(self) -> None:
        """Stops the clock of a step."""
        self.seconds.append(now() - self.began)
        if self.profiler is not None:
            self.profiler.stop()
            self.busy = kernel_seconds(self.profiler)

    def report(self, loss: float, norm: float) -> None:
        """Keeps the loss and gradient norm of the first step."""
        self.first = self.first or (loss, norm)

    def figures(self) -> dict[str, Any]:
        """Median time of the timed steps and first loss; on CUDA also busy time and peak memory."""
        timed = self.seconds[WARM : WARM + TIMED]
        median = statistics.median(timed)
        found = {"seconds": median, "examples_per_second": BATCH / median}
        found |= {"positions": self.positions // self.step, "each": [round(s, 4) for s in timed]}
        if CUDA:
            found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            if self.busy is not None:
                found |= {"busy_seconds": self.busy, "busy_share": self.busy / median}
        loss, norm = self.first
        return found | {"micro_batch": self.micro, "loss": loss, "grad_norm": norm}


class Ours(step_contestants.Ours):
    """`realign.train` in one process, with references from the cache."""

    def __init__(self, setting: Setting, micro: int) -> None:
        self.device = torch.device(distributed.start())
        attends, _ = attention.choose("tree", self.device, setting.kind)
        model = ForestModel(setting.model(attends), dtype=setting.kind)
        objective = objectives.rdpo(beta=BETA)
        inputs = Inputs("", setting.processor, model, objective, *setting.encode(model.layout))
        self.prepare(
            inputs, setting.folder / f"cache-{micro}", "lora", setting.kind, self.device,
            sharded=False, weights="random",
        )  # fmt: skip
        self.micro = micro

    def tasks(self, name: str, number: int) -> list[Callable[[], step.MicroBatch]]:
        """Calls that each build a micro-batch of a step."""
        indices = np.arange(BATCH) + number * BATCH
        feed = self.feeds[name]
        return [partial(feed, *part) for part in step.micro_batches(indices, self.micro)]

    def first(self, name: str) -> tuple[float, float]:
        """Loss and gradient norm of an objective before the first update."""
        return self.step(name, [task() for task in self.tasks(name, 0)], BATCH, update=False)

    def timed(
        self, record: Record, case: str, name: str, first: tuple[float, float], **about: float
    ) -> Watch:
        """Runs steps with prefetched micro-batches, and records their figures."""
        watch = Watch(record, self.model.vlm.model.get_decoder(), self.micro)
        watch.report(*first)
        tasks = [self.tasks(name, number) for number in range(STEPS)]
        with step.heap_frozen(), ahead(itertools.chain(*tasks), self.device) as ready:
            while not watch.over:
                watch.begin()
                self.step(name, itertools.islice(ready, BATCH // self.micro), BATCH)
                watch.end()
        record(case, **about, **watch.figures())
        return watch


class Released(step_contestants.Released):
    """Plain rDPO: three padded sequences, a live reference, and full logits in fp32."""

    def __init__(self, setting: Setting, micro: int) -> None:
        plain = setting.model("sdpa")
        examples, store = setting.encode(layout_of(plain))
        parts = (
            self.collate(examples[i : i + micro], store) for i in range(0, len(examples), micro)
        )
        self.steps = zip(*[parts] * (BATCH // micro), strict=True)
        self.prepare(plain, None, setting.kind)


def ours(record: Record, setting: Setting, micro: int) -> None:
    """Runs all cases of ours with one model."""
    contestant = Ours(setting, micro)
    tokens = sum(example.tokens for example in contestant.feeds["rdpo"].examples)
    spent = contestant.reference_seconds
    record("reference pass", seconds=spent, tokens_per_second=tokens / spent)
    firsts = {name: contestant.first(name) for name in ("rdpo", "dpo")}
    watch = contestant.timed(record, "ours", "rdpo", firsts["rdpo"])
    with record.attempt("kernels of ours"):
        listed = kernels(watch.profiler)
        record("kernels of ours", ms=sum(ms for ms, _ in listed.values()), kernels=listed)
    if CUDA:
        with record.attempt("allocator of ours"):
            settings = torch.cuda.memory._snapshot()["allocator_settings"]
            record("allocator of ours", expandable=bool(settings["expandable_segments"]))
    with record.attempt("ours, DPO"):
        contestant.timed(record, "ours, DPO", "dpo", firsts["dpo"])


def compiled(record: Record, setting: Setting, micro: int) -> None:
    """Runs ours with `--compile`. The first step compiles. A rehearsal runs the layers eagerly."""
    contestant = Ours(setting, micro)
    layers = fsdp.trained_layers(contestant.model)
    fsdp.wrap_layers(layers, compiled=True, checkpointed=False)
    with torch.compiler.set_stance("default" if CUDA else "force_eager"):
        began = now()
        first = contestant.first("rdpo")
        seconds = now() - began
        contestant.timed(record, "ours, compiled", "rdpo", first, first_seconds=seconds)


def trl(record: Record, setting: Setting, micro: int) -> None:
    """Runs TRL's DPO, with two sequences per example."""
    trainer = step_contestants.dpo_trainer(
        setting.model("sdpa"), setting.processor, setting.folder, "lora",
        dtype=setting.dtype, per_device_train_batch_size=micro,
        gradient_accumulation_steps=BATCH // micro, max_steps=STEPS,
    )  # fmt: skip
    watch = Watch(record, trainer.model.get_base_model().model.get_decoder(), micro)
    step_contestants.train_trl(trainer, watch)
    rows = [trainer.train_dataset[i] for i in range(BATCH)]
    began = time.perf_counter()
    trainer.data_collator(rows)
    record("TRL DPO", **watch.figures(), collate_ms=1e3 * (time.perf_counter() - began))


def released(record: Record, setting: Setting, micro: int) -> None:
    """Runs plain rDPO as in the release, with three sequences per example."""
    contestant = Released(setting, micro)
    watch = Watch(record, contestant.model.get_base_model().model.get_decoder(), micro)
    contestant.train(watch)
    record("released", **watch.figures())


GROUPS: dict[Callable[[Record, Setting, int], None], tuple[str, ...]] = {
    ours: ("ours", "reference pass", "kernels of ours", "ours, DPO"),
    trl: ("TRL DPO",),
    released: ("released",),
    compiled: ("ours, compiled",),
}
"""Contestants and their cases, most valuable first. An exception of a contestant is recorded as the
error of its first case."""
EQUALS = {"TRL DPO": ("ours, DPO", "ours"), "released": ("ours", "ours")}
"""Peers, each with the case of ours that has the same loss, and the case to compare times with."""


def largest_that_fits(call: Callable[[int], None]) -> None:
    """Calls with the number of examples per forward, and halves it if memory runs out."""
    for micro in (BATCH, BATCH // 2, 1):
        try:
            return call(micro)
        except torch.OutOfMemoryError as error:
            if micro == 1:
                raise
            traceback.clear_frames(error.__traceback__)
        give_back()


def give_back() -> None:
    """Frees the resources of the last contestant."""
    distributed.stop()
    free()


def compare(record: Record) -> None:
    """Records ratios (theirs / ours), and differences of first losses and gradient norms."""
    lines = latest(read(record.folder / RESULTS))
    cases = {case: line for (part, case), line in lines.items() if part == record.part}
    for peer, (like, against) in EQUALS.items():
        if not all("seconds" in cases.get(case, {}) for case in (peer, like, against)):
            continue
        theirs, equal, mine = cases[peer], cases[like], cases[against]
        found = {"times_faster": theirs["seconds"] / mine["seconds"]}
        found["times_faster_same_loss"] = theirs["seconds"] / equal["seconds"]
        for name in ("loss", "grad_norm"):
            found[f"{name}_difference"] = abs(theirs[name] / equal[name] - 1)
        if CUDA:
            found["times_less_memory"] = theirs["peak_gib"] / mine["peak_gib"]
        record(f"ours against {peer}", **found)


def run(record: Record) -> None:
    """Runs the contestants one after another, each with a separate model."""
    # Off, because cuDNN would plan attention for every new shape and slow down the peers.
    torch.backends.cuda.enable_cudnn_sdp(False)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(record, Path(folder))
        for contestant, cases in GROUPS.items():
            if any(record.missing(cases)):
                with record.attempt(cases[0]):
                    largest_that_fits(partial(contestant, record, setting))
                give_back()
            if contestant is released:
                compare(record)  # before the last contestant, which the time limit may cut
