"""Contestants of the training step, each in a separate process (`serve`).

A message asks for an optimizer step. It is a tuple of the words `keep`, `labelled` and `dpo`. All
contestants start from the same policy: the reference plus noise seeded by parameter names. The
timed part is forward, backward, clipping and optimizer, without preprocessing. A watch (`Requests`,
or `Watch` of the GPU check) times the steps and keeps their losses.
"""

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import time
import zlib
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

BETA, LEARNING_RATE, CLIP = 0.1, 1e-6, 1.0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANK, ALPHA = 128, 256.0  # from the paper, as --recipe paper of realign.train
LORA = {
    "r": RANK, "lora_alpha": ALPHA, "target_modules": r".*language_model\..*_proj",
    "task_type": "CAUSAL_LM",
}  # fmt: skip
"""PEFT configuration equal to that of `realign.modeling.loading.add_lora` for LLaMA."""


class Worker:
    """Process that runs `serve(*arguments, pipe)`. An exception in it ends the process."""

    def __init__(self, serve, *arguments, silence: float | None = 120) -> None:
        """`silence`: Seconds without an answer after which `read` raises TimeoutError."""
        self.silence = silence
        spawn = multiprocessing.get_context("spawn")
        self.pipe, there = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(*arguments, there), daemon=True)
        self.process.start()
        there.close()  # so that the end of the process closes the pipe

    def ask(self, message):
        """Sends a message and returns the answer."""
        self.pipe.send(message)
        return self.read()

    def read(self):
        if not self.pipe.poll(self.silence):
            raise TimeoutError(f"A process of the benchmark sent nothing for {self.silence} s.")
        return self.pipe.recv()

    def close(self) -> None:
        self.process.kill()
        self.process.join()


def memory():
    """Peak and current resident memory of this process in bytes; on CUDA, of its tensors."""
    if DEVICE == "cuda":
        peak, present = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        return {"VmHWM": peak, "VmRSS": present}
    status = Path("/proc/self/status").read_text()
    found = dict(line.split(":", 1) for line in status.splitlines())
    return {name: 1024 * int(found[name].split()[0]) for name in ("VmHWM", "VmRSS")}


def now():
    """Time in seconds, after all work of the device is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def allocate(mode):
    """Sets how malloc treats freed large blocks: `return`, `keep`, or `usual` (glibc's default).

    With `return`, peak memory is that of live tensors. glibc would hold 1.7 times as much. With
    `keep`, as in a GPU's caching allocator, a step has no page faults, which take a third of it.
    """
    trim, top_pad, threshold, most = -1, -2, -3, -4  # M_TRIM_THRESHOLD, ... of mallopt(3)
    libc = ctypes.CDLL(None)
    if mode == "return":
        libc.mallopt(threshold, 1 << 20)
    elif mode == "usual":  # glibc's initial values
        libc.mallopt(most, 65536)
        libc.mallopt(threshold, 128 << 10)
        libc.mallopt(trim, 128 << 10)
        libc.mallopt(top_pad, 128 << 10)
    else:
        libc.mallopt(most, 0)
        libc.mallopt(trim, -1)
        libc.mallopt(top_pad, 64 << 20)


@torch.no_grad()
def move(model, tune):
    """Adds the same noise to the trained parameters of every contestant."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own = name.removeprefix("vlm.").removeprefix("base_model.model.")
        generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(own.encode()))
        noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if tune == "lora":  # sets both matrices, because PEFT starts from B = 0
            local.copy_(0.01 * noise)
        else:
            local.add_((0.002 * noise).to(local))


def adamw(model):
    """Trained parameters, and their AdamW optimizer."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return trained, torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)


class Ours:
    """A step of `realign.train` in one process.

    The timed part is batch layout, forward, backward, clipping and AdamW. Reference log-probs come
    from `reference_logps.fill` before timing, and `ImageStore` keeps the pixels.
    """

    def __init__(self, folder, tune, dtype):
        import benchmarks.models  # noqa: F401
        import realign.train  # noqa: F401 - counts as imports
        from realign import distributed
        from realign.config import LossConfig
        from realign.modeling.loading import DTYPES
        from realign.training.setup import load_inputs

        self.imported = memory()
        kind = DTYPES[dtype]
        sharded = tune == "full" and kind != torch.float32
        device = distributed.start(single=sharded)
        inputs = load_inputs(
            folder / "model",
            folder / "pairs.parquet",
            LossConfig(objective="rdpo", beta=BETA),
            dtype=kind,
            weights_dtype=kind if tune == "lora" else torch.float32,
            train_vision=False,
            max_response_tokens=1024,
            progress=False,
        )
        self.prepare(inputs, folder / "cache", tune, kind, device, sharded=sharded)

    def prepare(self, inputs, cache, tune, dtype, device, *, sharded, weights=None):
        """Setup of `realign.train` from the loaded model to the first step."""
        from benchmarks.models import fill
        from realign.modeling import reference_logps
        from realign.modeling.forest import Example
        from realign.modeling.loading import add_lora
        from realign.training import fsdp
        from realign.training.step import Feed
        from realign_kernels import objectives

        model, examples, store = inputs.model, inputs.examples, inputs.store
        described = (model.vlm, inputs.processor, dtype, device)
        fingerprint = reference_logps.fingerprint(*described, weights=weights)
        if tune == "lora":
            with torch.device(device):
                add_lora(model.vlm, RANK, ALPHA)
        if sharded:
            fsdp.shard(model, device, dtype)
        else:
            model.to(device)
        settings = {"batch_rows": 8, "device": device}
        few = [examples[0], examples[1]]  # compiles kernels and loads libraries
        fill(cache.with_name("warm-up"), fingerprint, model, few, store, **settings)
        began = now()
        found = fill(cache, fingerprint, model, examples, store, **settings)
        self.reference_seconds, references = now() - began, found.float()
        if sharded:
            model.reshard()
        move(model, tune)
        self.model, self.device = model.train(), device
        feed = Feed(examples, references, store, model.attention, row_tokens=0, device=device)
        pairs = [Example(e.name, e.roots[:1], e.leaves[:2]) for e in examples]
        of_pairs = replace(feed, examples=pairs, references=references[:2])
        self.feeds = {"rdpo": feed, "dpo": of_pairs}
        self.objectives = {"rdpo": inputs.objective, "dpo": objectives.get("dpo", beta=BETA)}
        self.trained, self.optimizer = adamw(model)

    def step(self, name, parts, examples, update=True):
        """Step over micro-batches with `examples` in total; returns loss and gradient norm."""
        from realign.training import step

        options = {"batch_size": examples, "device": self.device}
        totals = step.accumulate(self.model, parts, self.objectives[name], **options)
        norm = step.clip(self.trained, CLIP if update else 0)
        if not update:
            self.optimizer.zero_grad()
            return float(totals["loss"]) / examples, float(norm)
        found, _ = step.update_and_read(self.optimizer, totals, norm, examples, False)
        self.optimizer.zero_grad()
        return found["loss"], found["grad_norm"]

    def train(self, watch):
        """Runs steps until the watch is over."""
        while not watch.over:
            watch.begin()
            name = "dpo" if "dpo" in watch.words else "rdpo"
            feed = self.feeds[name]
            count = len(feed.examples)
            figures = self.step(name, [feed(range(count))], count, update=name == "rdpo")
            watch.end()
            watch.report(*figures)


class Released:
    """Plain rDPO: three sequences per example with a live reference, as in the authors' release.

    Chosen, rejected, and chosen under the retrieved image have a forward each, with full logits in
    fp32, log_softmax and gather. The reference has the same forwards. It is the policy without its
    adapter for LoRA, and a second model for full fine-tuning. bf16 has weights in bf16 under
    autocast. The loss is that of the paper, which differs from the release's. Collation is not
    timed.
    """

    def __init__(self, folder, tune, dtype):
        import peft  # noqa: F401 - counts as imports
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from benchmarks.models import encode
        from realign.data.records import read_pairs
        from realign.modeling.layouts import layout_of

        self.imported = memory()
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        processor = AutoProcessor.from_pretrained(folder / "model")

        def load():
            loaded = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=kind)
            return loaded.to(DEVICE)

        model = load()
        layout = layout_of(model)
        self.prepare(model, None if tune == "lora" else load().requires_grad_(False), kind)
        forests = encode(read_pairs(folder / "pairs.parquet"), processor, layout)
        self.steps = itertools.repeat([self.collate(*forests)])

    def prepare(self, model, reference, kind):
        """Prepares policy and optimizer. Without a reference model the policy gets LoRA."""
        from peft import LoraConfig, get_peft_model

        model.model.vision_tower.requires_grad_(False)
        if reference is None:
            model = get_peft_model(model, LoraConfig(**LORA))
        move(model.train(), "lora" if reference is None else "full")
        self.model, self.reference = model, reference
        self.autocast = torch.autocast(DEVICE, kind, enabled=kind != torch.float32)
        self.trained, self.optimizer = adamw(model)

    @staticmethod
    def collate(examples, store):
        """(labels, inputs) of each leaf, with one padded sequence per example."""
        batches = []
        for leaf in range(3):
            roots = [e.roots[e.leaves[leaf].root] for e in examples]
            prompts = [torch.from_numpy(root.ids) for root in roots]
            responses = [torch.from_numpy(e.leaves[leaf].ids) for e in examples]
            pairs = [*zip(prompts, responses, strict=True)]
            masked = [torch.cat([torch.full_like(p, -100), r]) for p, r in pairs]
            pixels = [store.bundle(root.images[0])["pixel_values"] for root in roots]
            inputs = {
                "input_ids": pad_sequence([torch.cat(pair) for pair in pairs], True),
                "attention_mask": pad_sequence([torch.ones_like(row) for row in masked], True),
                "pixel_values": torch.cat(pixels),
            }
            labels = pad_sequence(masked, True, -100).to(DEVICE)
            batches.append((labels, {name: value.to(DEVICE) for name, value in inputs.items()}))
        return batches

    def logps(self, model, labels, inputs):
        with self.autocast:
            logits = model(**inputs, use_cache=False).logits
        labels, logits = labels[:, 1:], logits[:, :-1].float()
        mask = labels != -100
        found = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return (found * mask).sum(-1)

    def loss(self, batches):
        """Mean loss over the examples; `batches` has one batch per leaf."""
        off = contextlib.nullcontext() if self.reference else self.model.disable_adapter()
        with torch.no_grad(), off:
            constants = [self.logps(self.reference or self.model, *batch) for batch in batches]
        policy = [self.logps(self.model, *batch) for batch in batches]
        chosen, rejected, visual = (BETA * (a - b) for a, b in zip(policy, constants, strict=True))
        sigmoid = torch.nn.functional.logsigmoid
        return -(sigmoid(chosen - rejected) + sigmoid(chosen - visual)).mean()

    def train(self, watch):
        """Runs steps of collated micro-batches until the watch is over."""
        steps = iter(self.steps)
        while not watch.over:
            parts, total = next(steps), 0.0
            watch.begin()
            for batches in parts:
                loss = self.loss(batches) / len(parts)
                loss.backward()
                total += loss.detach()
            norm = torch.nn.utils.clip_grad_norm_(self.trained, CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad()
            watch.end()
            watch.report(float(total), float(norm))


def dpo_trainer(model, processor, folder, tune, *, dtype, **options):
    """TRL's `DPOTrainer` on the pairs of `folder`, in their order.

    Args:
        model: The model or its folder.
        processor: Processor of the model.
        folder: Folder with pairs.parquet, and for the trainer's files.
        tune: "lora" or "full".
        dtype: "bf16" for autocast, or "fp32".
        options: Further options of `DPOConfig`.
    """
    import datasets
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    rows = datasets.load_dataset(
        "parquet", data_files=str(folder / "pairs.parquet"), split="train",
        cache_dir=str(folder / "datasets"),
    ).select_columns(["prompt", "chosen", "rejected", "images"])  # fmt: skip
    trainer = DPOTrainer(
        model=model,
        processing_class=processor,
        train_dataset=rows,
        peft_config=LoraConfig(**LORA) if tune == "lora" else None,
        args=DPOConfig(
            output_dir=str(folder / "trl"),
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            beta=BETA,
            max_grad_norm=CLIP,
            max_length=None,
            gradient_checkpointing=False,
            bf16=dtype == "bf16",
            use_cpu=DEVICE == "cpu",
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            logging_first_step=True,
            logging_steps=1000,
            disable_tqdm=True,
            **options,
        ),
    )
    trained = trainer.model
    tower = (trained.get_base_model() if tune == "lora" else trained).model.vision_tower
    tower.requires_grad_(False)
    move(trained, tune)
    return trainer


def train_trl(trainer, watch):
    """Runs `DPOTrainer.train` until the watch is over.

    The word `labelled` makes the head project only labelled rows on a CPU, as TRL does on CUDA.
    """
    from transformers import TrainerCallback
    from trl.trainer import utils

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            watch.begin()
            if DEVICE == "cpu":
                # Switches `add_fused_lm_head` only: the kernel keeps its torch path.
                utils._use_triton = lambda device: "labelled" in watch.words

        def on_step_end(self, args, state, control, **_):
            watch.end()
            control.should_training_stop |= watch.over
            if state.global_step > 1:
                watch.report(None, None)

        def on_log(self, args, state, control, logs, **_):
            if state.global_step == 1:
                watch.report(logs["loss"], logs["grad_norm"])

    trainer.add_callback(Clock())
    trainer.train()


class Trl:
    """TRL's `DPOTrainer` on its vision path, with its own collator.

    It has TRL's defaults, except for the settings that all contestants share: learning rate, LoRA,
    frozen tower, and no gradient checkpointing (which would cost time). bf16 is TRL's default:
    autocast over fp32 weights. The timed part is from `on_step_begin` to `on_step_end`, without
    collation.
    """

    def __init__(self, folder, tune, dtype):
        import datasets  # noqa: F401 - counts as imports
        import peft  # noqa: F401
        from pyarrow.parquet import read_metadata
        from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: F401
        from trl import DPOConfig, DPOTrainer  # noqa: F401

        self.imported = memory()
        self.trainer = dpo_trainer(
            str(folder / "model"),
            AutoProcessor.from_pretrained(folder / "model"),
            folder,
            tune,
            dtype=dtype,
            per_device_train_batch_size=read_metadata(folder / "pairs.parquet").num_rows,
            max_steps=1000,
        )

    def train(self, watch):
        train_trl(self.trainer, watch)


class Requests:
    """Watch that times the steps requested through a pipe, and answers each."""

    over = False  # the parent kills this process

    def __init__(self, pipe):
        self.pipe = pipe

    def begin(self):
        """Waits for the words of the next step."""
        self.words = self.pipe.recv()
        if "keep" in self.words:
            allocate("keep")
        self.began = now()

    def end(self):
        self.seconds = now() - self.began

    def report(self, loss, norm):
        """Answers with seconds, loss, gradient norm and memory."""
        self.pipe.send({"seconds": self.seconds, "loss": loss, "norm": norm} | memory())


CONTESTANTS = {"ours": Ours, "trl": Trl, "released": Released}


def serve(name, folder, tune, dtype, pipe):
    """Worker process: sends the memory of its imports, then runs a step per tuple of words."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    allocate("return")
    contestant = CONTESTANTS[name](Path(folder), tune, dtype)
    pipe.send({"imported": contestant.imported["VmRSS"]})
    contestant.train(Requests(pipe))
