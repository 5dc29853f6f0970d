"""Settings of a training run: a typed tree, filled from TOML and flags.

The `[section]` tables of `--config file.toml` match the classes below. Every field is also a flag
of the same name with dashes (`learning_rate` -> `--learning-rate`). Flags override the file, and
the file overrides `--recipe`.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import get_type_hints

import torch

from realign import recipes
from realign.checks import no_effect, not_negative, one_of, positive
from realign.cli import parse_sections
from realign.loss_config import LossConfig

TUNED = ("lora", "full")
DTYPES = ("auto", "fp32", "bf16")
QUANTIZE = ("4bit", "8bit")
ATTENTIONS = ("auto", "tree", "flash", "sdpa", "eager", "flex")
SCHEDULES = ("cosine", "linear", "constant")
OF_TORCH = ("adamw", "sgd")
"""Optimizers that FSDP2 can shard."""
PAGED = ("paged_adamw_8bit", "paged_adamw_32bit")
OF_ADAM = ("adamw", "adamw_8bit", *PAGED)
"""Optimizers with Adam's betas."""
OPTIMIZERS = (*OF_TORCH, "adafactor", "adamw_8bit", *PAGED, "lion", "lion_8bit")

HEADINGS = {
    "model": "Model",
    "pairs": "Data",
    "objective": "Loss",
    "learning_rate": "Optimizer",
    "fsdp": "Scaling",
    "eval_pairs": "Evaluation",
    "output": "Run",
    "log_every": "Logging",
}
"""First field of a group in the help text -> its heading."""
METAVARS = {
    "recipe": tuple(recipes.RECIPES),
    "tune": TUNED,
    "dtype": DTYPES,
    "attention": ATTENTIONS,
    "quantize": QUANTIZE,
    "lora_rank": "N",
    "lora_alpha": "SCALE",
    "lora_targets": "NAMES",
    "lora_dropout": "SHARE",
    "reference_model": "MODEL",
    "projector_learning_rate": "RATE",
    "min_learning_rate": "RATE",
    "schedule": SCHEDULES,
    "optimizer": "NAME",
    "adam_beta1": "BETA",
    "adam_beta2": "BETA",
    "adam_epsilon": "EPSILON",
    "pairs": "PATH",
    "objective": "NAME",
    "loss_weights": "W,W,...",
    "link": "NAME",
    "visual_weight": "WEIGHT",
    "label_smoothing": "SHARE",
    "nll_weight": "WEIGHT",
    "learning_rate": "RATE",
    "weight_decay": "RATE",
    "warmup": "FRACTION",
    "clip": "NORM",
    "epochs": "N",
    "image_folder": "FOLDER",
    "workers": "N",
    "split": "NAME",
    "eval_pairs": "PATH",
    "eval_split": "NAME",
    "eval_image_folder": "FOLDER",
    "eval_share": "SHARE",
    "best_metric": "NAME",
    "output": "FOLDER",
    "reference_cache": "FOLDER",
    "wandb": "PROJECT",
}
"""Field -> placeholder of its value in the help text, or the valid values."""


@dataclass
class ModelConfig:
    model: str | None = None
    """Folder or Hub name of a vision-language model. Without it the shipped digits model is
    trained."""
    tune: str = "lora"
    """Weights to train: 'lora' trains adapters on all linear layers of the language model, 'full'
    trains the weights themselves."""
    recipe: str | None = None
    """Values in place of the defaults: 'paper' has the settings of the paper, 'recommended' those
    that did best in docs/study.md. Options that are given override them. --dry-run prints them."""
    reference_model: str | None = None
    """Folder or Hub name of another model that computes the reference log-probs, with the same
    processor. Without it, the reference is the model before its first step."""
    lora_rank: int | None = None
    """Rank of the LoRA matrices. Without it, 32, or the recipe's."""
    lora_alpha: float | None = None
    """LoRA scale alpha. Without it, twice the rank."""
    lora_targets: str = "all-linear"
    """Layers that get LoRA: 'all-linear' is all of the language model. 'q_proj,v_proj' are ends of
    names, and anything else is a regular expression of whole names, as in PEFT. A name that the
    language model lacks is searched in the rest of the model."""
    lora_dropout: float = 0.0
    """Share of the inputs of LoRA that is dropped in training. 0 turns it off."""
    use_rslora: bool = False
    """Scale the update of LoRA by alpha / sqrt(rank) instead of alpha / rank (rsLoRA)."""
    use_dora: bool = False
    """Train the size of each output's weights apart from their direction (DoRA)."""
    train_vision: bool = False
    """Train the vision tower too, with --tune full. By default it is frozen."""
    dtype: str = "auto"
    """Compute dtype, 'fp32' or 'bf16'. 'auto' is bf16 on CUDA and fp32 on a CPU. Trained weights
    are kept in fp32 either way."""
    quantize: str | None = None
    """Store the linear layers of the language model in 4 bits (NF4) or 8 bits by bitsandbytes, with
    --tune lora on one GPU or CPU. Head, norms and vision tower are not quantized. The adapter is
    merged into the model without quantization."""
    attention: str = "auto"
    """Attention of the language model. 'tree' computes each tree without a mask, and uses torch's
    flash kernel on CUDA in bf16. Models with windows, two-way blocks or dropout get 'sdpa' instead,
    as does --compile without the flash kernel. 'flash' is 'tree' and requires that kernel. 'sdpa'
    and 'eager' use a mask. 'flex' needs CUDA and skips masked pairs, so rows can be long. 'auto' is
    'tree'."""

    @property
    def how(self) -> str:
        """The trained weights in words."""
        if self.tune == "full":
            vision = "" if self.train_vision else " except the vision tower's"
            return f"all weights{vision}"
        assert self.lora_alpha is not None
        where = "the language model" if self.lora_targets == "all-linear" else self.lora_targets
        more = [f"dropout {self.lora_dropout:g}"] * bool(self.lora_dropout)
        more += ["rsLoRA"] * self.use_rslora + ["DoRA"] * self.use_dora
        line = f"LoRA on {where}, rank {self.lora_rank}, alpha {self.lora_alpha:g}"
        return ", ".join([line, *more])

    def __post_init__(self) -> None:
        one_of("tune", self.tune, TUNED)
        self.dtype = resolve_dtype(self.dtype)
        one_of("attention", self.attention, ATTENTIONS)
        if self.quantize and self.tune == "full":
            raise ValueError(
                "--quantize rounds weights that stay frozen, and --tune full trains them. Leave it "
                "out, or use --tune lora."
            )
        if self.attention == "flash" and self.dtype == "fp32":
            raise ValueError(
                "attention is 'flash', which computes in half precision only, and --dtype is "
                "'fp32'. "
                "Add --dtype bf16, or use --attention tree."
            )
        if self.recipe is not None:
            one_of("recipe", self.recipe, tuple(recipes.RECIPES))
        if self.tune == "lora" and self.train_vision:
            no_effect("train_vision", "LoRA trains the language model only", "add --tune full")
        if self.tune == "full":
            if (self.lora_rank, self.lora_alpha) != (None, None):
                no_effect("--lora-rank or --lora-alpha", "there is no LoRA", "use --tune lora")
            for name, default in (
                ("lora_targets", "all-linear"),
                ("lora_dropout", 0.0),
                ("use_rslora", False),
                ("use_dora", False),
            ):
                if getattr(self, name) != default:
                    no_effect(name, "there is no LoRA", "use --tune lora")
            return
        if self.lora_rank is None:
            self.lora_rank = 32
        if self.lora_alpha is None:
            self.lora_alpha = 2.0 * self.lora_rank
        positive("lora_rank", self.lora_rank)
        positive("lora_alpha", self.lora_alpha)
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}; it must be from 0 to below 1.")
        if not self.lora_targets.strip(" ,"):
            raise ValueError("lora_targets is empty. Give names of layers, or 'all-linear'.")
        try:
            re.compile(self.lora_targets)
        except re.error as error:
            raise ValueError(
                f"lora_targets is {self.lora_targets!r}, neither names nor a regular expression "
                f"({error}). Write names, such as q_proj,v_proj."
            ) from error


@dataclass
class DataConfig:
    pairs: str | None = None
    """File or folder of preference pairs, or the name of a data set on the Hub, as OWNER/NAME.
    Without it pairs of digits are built."""
    split: str | None = None
    """Split of --pairs, if it has several. "a+b" reads two."""
    image_folder: str | None = None
    """Folder that contains the images and that image paths in --pairs are relative to. An image
    outside of it is an error. Without it, the folder of --pairs."""
    min_pixels: int | None = None
    """Enlarge smaller images to this number of pixels, for processors that count pixels, as Qwen's
    do. Without it, the processor's."""
    max_pixels: int | None = None
    """Reduce larger images to this number of pixels, for the same processors. It limits the tokens
    of an image. The final model's processor has the same limits."""
    max_response_tokens: int = 1024
    """Maximum number of tokens in a response. A longer response is an error that names its record.
    Responses are never cut."""
    workers: int | None = None
    """Threads of each rank that decode and preprocess images ahead of the step. 0 uses the thread
    that builds batches. Without it, the rank's cores but one, from 1 to 8."""
    row_tokens: int = 0
    """Maximum number of tokens in a row of the forest. 0 chooses by attention: one row for a whole
    forward ('tree'), at least 8192 ('flex'), or the longest tree (the others)."""

    def __post_init__(self) -> None:
        if self.pairs is None and self.image_folder is not None:
            no_effect("image_folder", "pairs of digits hold their images", "add --pairs")
        if self.pairs is None and self.split is not None:
            no_effect("split", "pairs of digits have no splits", "add --pairs")
        check_pixels(self.min_pixels, self.max_pixels)
        positive("max_response_tokens", self.max_response_tokens)
        not_negative("workers", self.workers or 0)
        not_negative("row_tokens", self.row_tokens)


@dataclass
class OptimConfig:
    learning_rate: float = 0.0
    """Peak learning rate. 0 is 1e-5, or 5e-5 for the digits model without --recipe."""
    projector_learning_rate: float = 0.0
    """Peak learning rate of the projector between tower and language model. With LoRA, the
    projector is trained in full and saved with the adapter. 0 freezes it with LoRA, and is
    --learning-rate with --tune full."""
    schedule: str = "cosine"
    """Learning rate after the warm-up: 'cosine' and 'linear' end at --min-learning-rate."""
    min_learning_rate: float = 0.0
    """Learning rate at the last step. That of the projector ends at the same share of its peak."""
    optimizer: str = "adamw"
    """Optimizer: adamw, sgd, adafactor, or one of bitsandbytes: adamw_8bit, paged_adamw_8bit,
    paged_adamw_32bit, lion, lion_8bit. Those after sgd need one process without --fsdp."""
    adam_beta1: float = 0.9
    """Beta 1 of AdamW: decay of the mean of gradients."""
    adam_beta2: float = 0.999
    """Beta 2 of AdamW: decay of the mean of squared gradients."""
    adam_epsilon: float = 1e-8
    """Epsilon of AdamW, which is added to the denominator."""
    weight_decay: float = 0.0
    """Weight decay. 0 turns it off."""
    warmup: float = 0.03
    """Share of the steps in which the learning rate rises linearly, under each schedule."""
    clip: float = 1.0
    """Norm that gradients are clipped to. 0 turns clipping off."""
    batch_size: int = 32
    """Examples in a step, over all ranks."""
    micro_batch_size: int = 16
    """Examples in one forward of one rank. Gradients of a larger batch are accumulated."""
    epochs: float = 1.0
    """Passes over the pairs. A last batch that is not full is filled from a further pass."""
    steps: int = 0
    """Steps to train, instead of --epochs. 0 uses --epochs."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batch_size", "epochs", "adam_epsilon"):
            positive(name, getattr(self, name))
        for name in (
            "learning_rate", "projector_learning_rate", "min_learning_rate", "weight_decay",
            "warmup", "clip", "steps",
        ):  # fmt: skip
            not_negative(name, getattr(self, name))
        if self.warmup > 1:
            raise ValueError(f"warmup is {self.warmup}; it is a share of the steps, 1 at most.")
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        if self.schedule == "constant" and self.min_learning_rate:
            no_effect("min_learning_rate", "the rate is constant", "use --schedule cosine")
        for name, default in (("adam_beta1", 0.9), ("adam_beta2", 0.999), ("adam_epsilon", 1e-8)):
            value = getattr(self, name)
            if name != "adam_epsilon" and not 0 <= value < 1:
                raise ValueError(f"{name} is {value}; it must be from 0 to below 1.")
            if value != default and self.optimizer not in OF_ADAM:
                no_effect(name, f"{self.optimizer} is no AdamW", "use --optimizer adamw")


@dataclass
class ScaleConfig:
    fsdp: bool = False
    """Shard model and optimizer over ranks with FSDP2. Starts its own workers unless torchrun
    did."""
    nproc_per_node: int = 0
    """Workers to start with --fsdp. 0 starts one per GPU, or two on a CPU."""
    replicas: int = 1
    """Copies of the model (HSDP), each sharded over ranks / replicas consecutive ranks. With one
    copy per node, weights are gathered within nodes only. 1 shards over all ranks."""
    activation_checkpointing: bool | None = None
    """Keep only the input of each trained layer, and compute the layer again in the backward.
    By default, it is on if the run would not fit on the GPU without it."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer in host memory. The GPU holds one layer at a
    time."""
    compile: bool = False
    """Compile each trained layer with torch.compile, for any batch size."""
    liger: bool = False
    """Compute RMSNorm and SwiGLU of the language model by liger-kernel. Needs CUDA."""

    def __post_init__(self) -> None:
        not_negative("nproc_per_node", self.nproc_per_node)
        positive("replicas", self.replicas)
        for name, default in (("nproc_per_node", 0), ("replicas", 1)):
            if getattr(self, name) != default and not self.fsdp:
                no_effect(name, "one process trains", "add --fsdp")
        if self.liger and self.compile:
            raise ValueError(
                "--liger and --compile both fuse the operations of a layer. Leave one of them out."
            )

    @property
    def kernels(self) -> str:
        """Kernels of the layers. Log-probs of different kernels differ by rounding."""
        return "compiled" if self.compile else "liger" if self.liger else "eager"


@dataclass
class EvalConfig:
    eval_pairs: str | None = None
    """File or folder of held-out pairs, or the name of a data set on the Hub, as --pairs. They are
    evaluated and not trained on."""
    eval_split: str | None = None
    """Split of --eval-pairs, if it has several."""
    eval_image_folder: str | None = None
    """Folder of the images of --eval-pairs, as --image-folder. Without it, --image-folder, or the
    folder of --eval-pairs."""
    eval_share: float = 0.0
    """Share of the pairs to hold out, instead of --eval-pairs. No image is on both sides, so the
    share is approximate. 0 holds out none."""
    eval_every: int = 0
    """Steps between evaluations. Further ones are before the first step and after the last. 0
    evaluates at the steps of --save-every."""
    best_metric: str = "loss"
    """Metric of the held-out pairs that chooses the best checkpoint, which is kept: loss,
    rewards/accuracies, rewards/margins, or another loss, accuracy or margin of metrics.jsonl."""
    early_stopping: int = 0
    """Stop after this number of evaluations in a row without a new best. 0 never stops."""
    load_best: bool | None = None
    """Export the weights of the best checkpoint instead of the last. By default, only with
    --early-stopping."""

    def __post_init__(self) -> None:
        for name in ("eval_share", "eval_every", "early_stopping"):
            not_negative(name, getattr(self, name))
        if self.eval_share >= 1:
            raise ValueError(
                f"eval_share is {self.eval_share:g}; it is a share of the pairs, below 1."
            )
        if self.eval_pairs is None:
            for name in ("eval_split", "eval_image_folder"):
                if getattr(self, name) is not None:
                    no_effect(name, "there are no other pairs", "add --eval-pairs")
        elif self.eval_share:
            raise ValueError(
                "--eval-pairs and --eval-share both give held-out pairs. Leave out one of them."
            )
        if not self.given:
            for name in ("eval_every", "best_metric", "early_stopping", "load_best"):
                if getattr(self, name) != EvalConfig.__dataclass_fields__[name].default:
                    no_effect(name, "no pairs are held out", "add --eval-pairs or --eval-share")

    @property
    def given(self) -> bool:
        """Whether there are held-out pairs."""
        return self.eval_pairs is not None or self.eval_share > 0

    @property
    def exports_best(self) -> bool:
        """Whether the final model has the weights of the best checkpoint."""
        return self.early_stopping > 0 if self.load_best is None else self.load_best


@dataclass
class RunConfig:
    output: str = "runs/rdpo"
    """Output folder for metrics, checkpoints and the final model."""
    reference_cache: str | None = None
    """Folder of cached reference log-probs, shared by all runs. The default is
    $REALIGN_CACHE/reference, or ~/.cache/realign/reference."""
    cache_vision: bool = False
    """Cache the frozen vision tower's features of each image, in $REALIGN_CACHE/vision or
    ~/.cache/realign/vision. All runs share the cache."""
    seed: int = 0
    """Seed for the order of the examples, the LoRA initialization and dropout."""
    save_every: int = 50
    """Steps between checkpoints. 0 saves only at the end."""
    keep: int = 2
    """Number of checkpoints to keep. Older ones are deleted, except for the best evaluation's."""
    resume: bool = False
    """Resume from the newest intact checkpoint in the output folder."""
    merge: bool = False
    """Merge the LoRA adapter into the final model, in the base's dtype. By default only the adapter
    is written."""
    dry_run: bool = False
    """Check settings and records, and print the plan: sizes, memory, steps, time. Writes only the
    converted records in $REALIGN_CACHE/data."""
    log_every: int = 1
    """Steps between printed lines. The metrics files get every step."""
    tensorboard: bool = False
    """Write TensorBoard events to the folder `tensorboard` in the output folder."""
    wandb: str | None = None
    """Weights & Biases project to report to. WANDB_MODE=offline keeps the run on this machine."""
    quiet: bool = False
    """Print no step lines and no progress bars."""

    def __post_init__(self) -> None:
        positive("log_every", self.log_every)
        if self.quiet and self.log_every != 1:
            raise ValueError("log_every would have no effect with --quiet. Leave out one of them.")
        for name in ("seed", "save_every"):
            not_negative(name, getattr(self, name))
        positive("keep", self.keep)


@dataclass
class TrainConfig:
    """All settings of a run, by section."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.model.reference_model and not self.loss.build().needs_reference:
            what = f"{self.loss.text_objective} needs no reference"
            no_effect("--reference-model", what, "use --objective dpo")
        if self.run.merge and self.model.tune == "full":
            no_effect("--merge", "there is no adapter to merge", "use --tune lora")
        if self.run.cache_vision and self.model.tune == "full":
            raise ValueError(
                "--cache-vision keeps image features for the whole run, and --tune full trains "
                "the layers that compute them. Leave it out, or use --tune lora."
            )
        if self.model.quantize and self.scale.compile:
            raise ValueError(
                "--compile cannot trace the layers that --quantize stores in few bits. Leave one "
                "of them out."
            )
        sharded = self.scale.fsdp or self.scale.cpu_offload
        check_quantize(self.model.quantize, sharded=sharded)
        self._check_optimizer()
        if self.run.cache_vision and self.optim.projector_learning_rate:
            raise ValueError(
                "--cache-vision keeps image features as the projector returns them, and "
                "--projector-learning-rate trains it. Leave one of them out. A recipe's rate is "
                "turned off by --projector-learning-rate 0."
            )
        if self.model.attention == "auto":
            self.model.attention = "tree"
        if self.optim.learning_rate == 0:
            digits = self.model.model is None and self.model.recipe is None
            self.optim.learning_rate = 5e-5 if digits else 1e-5
        if self.optim.min_learning_rate > self.optim.learning_rate:
            raise ValueError(
                f"--min-learning-rate is {self.optim.min_learning_rate:g}, above "
                f"--learning-rate, {self.optim.learning_rate:g}. Lower it."
            )

    def _check_optimizer(self) -> None:
        """Check that these ranks and this device can run the optimizer.

        Raises:
            ValueError: for FSDP2, a CPU or a missing package. The message names the optimizer.
        """
        name = self.optim.optimizer
        if name in OF_TORCH:
            return
        if self.sharded:
            why = "--fsdp or --cpu-offload"
            if not (self.scale.fsdp or self.scale.cpu_offload):
                why = "--tune full in bf16"
            raise ValueError(
                f"--optimizer {name} keeps a state that FSDP2 cannot shard, and {why} uses FSDP2. "
                "Use --optimizer adamw, or one process with LoRA or --dtype fp32."
            )
        if name == "adafactor":
            return
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(
                f"--optimizer {name} needs bitsandbytes, which is not installed. Run "
                "`pip install 'realign[quantize]'`."
            )
        if name in PAGED and not torch.cuda.is_available():
            no_effect(f"--optimizer {name}", "a CPU has no pages", f"use {name[6:]}")

    @property
    def sharded(self) -> bool:
        """Whether the model uses FSDP2.

        One rank needs it to cast a trained base, or to offload. LoRA layers cast their own weights.
        """
        casts = self.model.tune == "full" and self.model.dtype != "fp32"
        return self.scale.fsdp or self.scale.cpu_offload or casts

    def to_dict(self) -> dict:
        """All settings as nested dictionaries."""
        return asdict(self)


def parse(arguments: Sequence[str] | None = None) -> TrainConfig:
    """Build the configuration from `--config` and flags.

    Raises:
        SystemExit: for an unknown flag, with status 2.
        ValueError: for an unknown key in the file or a bad value.
    """
    sections = parse_sections(
        get_type_hints(TrainConfig),
        presets=recipes.fill,
        prog="python -m realign.train",
        description="Align a vision-language model with rDPO. Without --model and --pairs, the "
        "shipped model of handwritten digits is trained.",
        example="python -m realign.train --model llava-hf/llava-1.5-7b-hf \\\n"
        "    --pairs pairs.parquet --output runs/llava",
        headings=HEADINGS,
        metavars=METAVARS,
        arguments=arguments,
    )
    return TrainConfig(**sections)


def resolve_dtype(dtype: str) -> str:
    """Resolve 'auto' to a dtype: 'bf16' on CUDA, where it is 10x faster, and 'fp32' on a CPU.

    Raises:
        ValueError: for another name.
    """
    one_of("dtype", dtype, DTYPES)
    return ("bf16" if torch.cuda.is_available() else "fp32") if dtype == "auto" else dtype


def check_pixels(min_pixels: int | None, max_pixels: int | None) -> None:
    """Check the settings `min_pixels` and `max_pixels` of a command.

    Raises:
        ValueError: for a value out of range, or a minimum above the maximum.
    """
    for name, value, most in (
        ("--min-pixels", min_pixels, 1 << 24),
        ("--max-pixels", max_pixels, 1 << 31),
    ):
        if value is not None and not 1 <= value <= most:
            raise ValueError(f"{name} is {value}; it must be from 1 to {most:,}.")
    if min_pixels and max_pixels and min_pixels > max_pixels:
        raise ValueError(f"--min-pixels is {min_pixels}, above --max-pixels, {max_pixels}.")


def check_quantize(method: str | None, *, sharded: bool) -> None:
    """Check the setting `quantize` of a command.

    Raises:
        ValueError: for another method, with FSDP2, and without bitsandbytes.
    """
    if method is None:
        return
    one_of("--quantize", method, QUANTIZE)
    if sharded:
        raise ValueError(
            "--quantize works in one process, since --fsdp and --cpu-offload cannot shard or move "
            "quantized weights. Leave out one of them."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "--quantize needs bitsandbytes, which is not installed. Run "
            "`pip install 'realign[quantize]'`."
        )
