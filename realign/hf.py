"""rDPO on transformers' own Trainer.

    trainer = RDPOTrainer(
        "llava-hf/llava-1.5-7b-hf",
        RDPOConfig(output_dir="out", bf16=True),
        train_dataset=load_dataset("parquet", data_files="pairs.parquet", split="train"),
        peft_config=LoraConfig(r=128, lora_alpha=256, target_modules=r".*language_model.*_proj"),
    )
    trainer.train()

Its callbacks, schedulers, checkpoints and accelerate are theirs; records, forest, loss and cached
references are those of `realign.train`, so a step costs what it costs there. A batch is indices
of examples: images and tokens are laid out in the forward, on the rank that needs them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from realign import metrics, reference
from realign.attention import IMPLEMENTATIONS, row_budget
from realign.card import model_card
from realign.config import LossConfig
from realign.encode import encode_records, make_objective
from realign.forest import build_batch
from realign.hf_records import Records, records_of
from realign.loading import load_model, load_processor
from realign.model import ForestModel
from realign_kernels import ReferenceCache

_REFUSED = {  # arguments of the Trainer that another loss than ours would read
    "label_smoothing_factor": 0.0,
    "neftune_noise_alpha": None,
    "use_liger_kernel": False,
    "torch_compile": False,
    "fp16": False,
}


@dataclass
class RDPOConfig(TrainingArguments):
    """TrainingArguments, and what rDPO needs beside them.

    Attributes:
        objective: one of `realign_kernels.objectives.PRESETS`.
        beta: strength of the tie to the reference model.
        visual_weight: weight of the visual term, for objectives that have one.
        max_response_tokens: longest response; a longer one is an error, never cut.
        row_tokens: most tokens in a row of the forest; 0 takes what suits the attention.
        reference_cache: folder of reference log-probs; $REALIGN_CACHE/reference, or
            ~/.cache/realign/reference, when absent.
        learning_rate: peak, 1e-5 as in the paper.
    """

    learning_rate: float = 1e-5
    objective: str = "rdpo"
    beta: float = 0.1
    visual_weight: float = 1.0
    max_response_tokens: int = 1024
    row_tokens: int = 0
    reference_cache: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.remove_unused_columns = False  # a batch is indices
        self.loss = LossConfig(self.objective, self.beta, self.visual_weight)
        for name, default in _REFUSED.items():
            if getattr(self, name, default) not in (default, None):
                raise ValueError(f"{name} would have no effect on rDPO's loss here; leave it out.")


class RDPOTrainer(Trainer):
    """Trains a vision-language model with rDPO or another objective over images.

    Args:
        model: folder or hub name, a model of transformers, or one with PEFT adapters. Its
            reference is itself without adapters, as it is when training begins.
        args: settings.
        train_dataset: preference records; TRL's vision columns `prompt` (or implicit), `chosen`,
            `rejected`, `images`, and `retrieved_images` for objectives with a visual term.
        eval_dataset: more of them, for `evaluate`.
        processing_class: the processor; that of the model's folder when absent.
        peft_config: adapters to train; without them all weights but the vision tower's learn.
        kwargs: callbacks, optimizers and other arguments of `Trainer`.

    Raises:
        ValueError: for a model that forests cannot be laid out for, or settings without effect.
        RecordError: for a record that cannot be trained on; it is named.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
        args: RDPOConfig,
        train_dataset: Records,
        eval_dataset: Records | None = None,
        processing_class: Any = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, RDPOConfig):
            raise ValueError(f"args is a {type(args).__name__}; give an RDPOConfig.")
        vlm, self.adapter = self._load(model, args, peft_config)
        path = model if isinstance(model, str | Path) else vlm.config._name_or_path
        processor = processing_class or load_processor(path)
        dtype = torch.bfloat16 if args.bf16 else vlm.dtype
        # Before adapters, so that those on the vision tower learn where somebody asks for them.
        module = _Module(vlm, dtype=dtype)
        self._base, self._digest = (
            str(path),
            reference.weights_digest(_WithoutAdapters(vlm), vlm.dtype),
        )
        self._fingerprint = reference.fingerprint(
            vlm,
            processor,
            dtype,
            args.device,
            kernels="autocast" if args.bf16 else "eager",
            weights=self._digest,
        )
        set_seed(args.seed)  # adapters draw their weights, on every rank the same
        if peft_config is not None:
            self.adapter = get_peft_model(vlm, peft_config)
        records = [*records_of(train_dataset)]
        count = len(records)
        records += records_of(eval_dataset) if eval_dataset is not None else []
        self.objective = make_objective(args.loss, records)
        self.examples, self.store = encode_records(
            records,
            processor,
            self.objective,
            layout=module.layout,
            max_response_tokens=args.max_response_tokens,
            max_tokens=vlm.config.get_text_config().max_position_embeddings,
            progress=not args.disable_tqdm,
        )
        self.references: torch.Tensor | None = None  # (L, examples) fp32
        self._sums: dict[str, torch.Tensor] = {}
        super().__init__(
            module,
            args,
            data_collator=_indices,
            train_dataset=_Places(0, count),
            eval_dataset=_Places(count, len(records)) if eval_dataset is not None else None,
            processing_class=processor,
            **kwargs,
        )
        self.label_names = []
        self.can_return_loss = True
        self.model_accepts_loss_kwargs = False  # a mean over examples, averaged over micro-batches

    @staticmethod
    def _load(
        model: str | Path | PreTrainedModel | PeftModel,
        args: RDPOConfig,
        peft_config: PeftConfig | None,
    ) -> tuple[PreTrainedModel, PeftModel | None]:
        if isinstance(model, PeftModel):
            if peft_config is not None:
                raise ValueError("the model has adapters already; leave out peft_config.")
            return model.get_base_model(), model
        if isinstance(model, str | Path):
            frozen = peft_config is not None and args.bf16
            return load_model(model, torch.bfloat16 if frozen else torch.float32), None
        kind = model.model.get_decoder().config._attn_implementation
        if kind not in IMPLEMENTATIONS.values():
            raise ValueError(
                f"the model attends by {kind!r}; load it with attn_implementation= one of "
                f"{', '.join(IMPLEMENTATIONS.values())}."
            )
        return model, None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; reference log-probs that no run has computed before come first."""
        self._fill_references()
        return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer.evaluate`: loss, rewards, accuracies and margins under `eval_`."""
        self._fill_references()
        return super().evaluate(*args, **kwargs)

    def _fill_references(self) -> None:
        """References of all examples. Nothing is wrapped and no step is made yet."""
        if self.references is not None:
            return
        args, device = self.args, self.args.device
        module = self.accelerator.unwrap_model(self.model)
        module.to(device)
        training = module.training
        module.eval()
        say = print if args.process_index == 0 and not args.disable_tqdm else lambda line: None
        directory = args.reference_cache or reference.default_directory()
        longest = max(example.longest_tree for example in self.examples)
        with self.compute_loss_context_manager():
            for line in module.check_forest(self.examples[0], self.store, device):
                say(line)
            with ReferenceCache.open(directory, self._fingerprint) as cache:
                self.references = reference.fill(
                    cache,
                    module,
                    self.examples,
                    self.store,
                    row_tokens=args.row_tokens or longest,
                    batch_rows=args.per_device_train_batch_size * len(self.examples[0].roots),
                    device=device,
                    progress=not args.disable_tqdm and args.process_index == 0,
                    say=say,
                ).float()
        module.train(training)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The mean loss of a batch of example indices.

        Raises:
            ValueError: when the loss is not finite; names the records.
        """
        places = inputs["places"].cpu().numpy()
        chosen = [self.examples[i] for i in places]
        module = self.accelerator.unwrap_model(model)
        budget = self.args.row_tokens or row_budget(module.attention, chosen)
        batch = build_batch(chosen, self.store, row_tokens=budget).to(self.args.device)
        output = model(batch, self.objective, self.references[:, places].to(self.args.device))
        loss = output.loss / len(places)
        if not math.isfinite(loss.item()):
            names = ", ".join(example.name for example in chosen)
            raise ValueError(
                f"the loss of records {names} is {loss.item()}. Look at their images and texts, or "
                "lower the learning rate; checkpoints are kept."
            )
        for name, value in metrics.sums(output, self.objective).items():
            self._sums[name] = self._sums.get(name, 0) + value
        self._sums["examples"] = self._sums.get("examples", 0) + value.new_tensor(len(places))
        return (loss, {"logps": output.logps}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss alone; there are no logits."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Metrics of the evaluation, apart from those of the steps around it."""
        kept, self._sums = self._sums, {}
        found = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        found.metrics.update({f"{prefix}_{k}": v for k, v in self._means().items()})
        self._sums = kept
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`, with TRL's `rewards/*` and `logps/*` of the steps since the last."""
        if "loss" in logs and self._sums:
            logs |= self._means()
            self._sums = {}
        super().log(logs, start_time)

    def _means(self) -> dict[str, float]:
        """Means over all examples of all ranks."""
        names = sorted(self._sums)
        values = torch.stack([self._sums[name].to(self.args.device) for name in names])
        total = self.accelerator.reduce(values, "sum").tolist()
        found = dict(zip(names, total, strict=True))
        count = found.pop("examples")
        found.pop("loss")
        return {name: value / count for name, value in found.items()}

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The model or its adapter as transformers and PEFT load them, with the processor."""
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        if self.adapter is not None:  # the base is neither saved nor gathered
            trained = {n for n, p in self.model.named_parameters() if p.requires_grad}
            state_dict = {n: value for n, value in state_dict.items() if n in trained}
        weights = {n.removeprefix("vlm."): _whole(value) for n, value in state_dict.items()}
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if self.adapter is None:
            self.model.vlm.save_pretrained(folder, state_dict=weights)
        else:
            prefixed = {f"base_model.model.{name}": value for name, value in weights.items()}
            self.adapter.save_pretrained(folder, state_dict=prefixed)
        self.processing_class.save_pretrained(folder)
        (folder / "README.md").write_text(self._card(), encoding="utf-8")
        torch.save(self.args, folder / "training_args.bin")

    def _card(self) -> str:
        args, logged = self.args, [line for line in self.state.log_history if "loss" in line]
        return model_card(
            self.objective.name,
            {
                "beta": args.beta,
                "visual weight": args.visual_weight,
                "peak learning rate": args.learning_rate,
                "schedule": args.lr_scheduler_type,
                "records in a step": args.train_batch_size
                * args.gradient_accumulation_steps
                * args.world_size,
                "computed in": "bf16" if args.bf16 else "fp32",
                "seed": args.seed,
            },
            base=self._base,
            adapter=self.adapter is not None,
            records=len(self.train_dataset),
            images=len(self.store),
            digests={"base weights": self._digest},
            last=logged[-1] if logged else {},
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        folder, vlm = Path(resume_from_checkpoint), self.model.vlm
        if self.adapter is not None:
            file = folder / "adapter_model.safetensors"
            if not file.exists():
                raise ValueError(f"{folder} holds no adapter_model.safetensors to go on from.")
            set_peft_model_state_dict(self.adapter, load_file(file))
            return
        saved = type(vlm).from_pretrained(folder, dtype=vlm.dtype)
        vlm.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class _Module(ForestModel):
    """A ForestModel with what Trainer asks of a model."""

    @property
    def config(self) -> Any:
        return self.vlm.config

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        self.vlm.gradient_checkpointing_enable(*args, **kwargs)


class _Places(Dataset):
    """Indices first .. last - 1 of the examples."""

    def __init__(self, first: int, last: int) -> None:
        self._range = range(first, last)

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, i: int) -> int:
        return self._range[i]


def _indices(places: Sequence[int]) -> dict[str, torch.Tensor]:
    return {"places": torch.tensor(places)}


def _whole(value: torch.Tensor) -> torch.Tensor:
    """A tensor that FSDP2 shards, gathered on the CPU: every rank must ask."""
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


class _WithoutAdapters:
    """A model's tensors under the names they have without adapters, for their digest."""

    def __init__(self, vlm: PreTrainedModel) -> None:
        self._vlm = vlm

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._plain(self._vlm.state_dict().items())

    def named_buffers(self) -> Iterable[tuple[str, torch.Tensor]]:
        return self._plain(self._vlm.named_buffers()).items()

    @staticmethod
    def _plain(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {n.replace(".base_layer.", "."): t for n, t in tensors if ".lora_" not in n}
