"""`RDPOTrainer`: rDPO on transformers' Trainer.

    trainer = RDPOTrainer(
        "llava-hf/llava-1.5-7b-hf",
        RDPOConfig(output_dir="out", bf16=True),
        train_dataset=load_dataset("parquet", data_files="pairs.parquet", split="train"),
        peft_config=LoraConfig(r=128, lora_alpha=256, target_modules=r".*language_model.*_proj"),
    )
    trainer.train()

Callbacks, schedulers, checkpoints and accelerate are those of Trainer. Records, forest, loss and
cached references are those of `realign.train`, so a step costs the same. A batch consists of the
indices of examples, for samplers, dispatch and resuming. A thread lays out its micro-batch during
the previous forward.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial, reduce
from itertools import pairwise, starmap
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, SchedulerType, Trainer, set_seed

from realign.distributed import disable_cudnn_attention, workers_of_rank
from realign.hf import adapter_checks, adapters, checks, parts, reference
from realign.hf.config import RDPOConfig
from realign.hf.records import Records
from realign.modeling import lora_targets, reference_logps
from realign.modeling.attention import choose
from realign.modeling.encode import make_objective
from realign.modeling.images import ImageStore
from realign.modeling.loading import adapter_base, load_model
from realign.modeling.prefetch import builder
from realign.training import metrics
from realign.training.model_card import loss_settings, model_card, shown_name
from realign.training.serving import commands
from realign.training.step import Feed
from realign_kernels import ReferenceCache, objectives


class RDPOTrainer(Trainer):
    """Trains a vision-language model with rDPO or another objective over images.

    Args:
        model: folder or Hub name, a model of transformers, or a model with PEFT adapters. The
            adapters may be trained, and are in a PeftModel or in the model of transformers. The
            reference is the model as it is passed in, unless `args` names another.
        args: settings of the run.
        train_dataset: preference records with TRL's vision columns: `prompt` (or implicit),
            `chosen`, `rejected` and `images`. Objectives with a visual term also need
            `retrieved_images`.
        eval_dataset: preference records for `evaluate`, or several sets by name.
        processing_class: the processor. The default is the processor of the model's folder.
        peft_config: configuration of a new adapter, for a model without adapters. Without any
            adapter, all weights except those of the vision tower are trained.
        kwargs: callbacks, optimizers and other arguments of `Trainer`.

    Raises:
        ValueError: for an unsupported model, adapter (`adapter_checks`) or dtype, an unsuitable
            processor, arguments without effect, DeepSpeed, or several GPUs in one process.
        RecordError: for a record that cannot be trained on, with its name.
    """

    args: RDPOConfig
    model: parts.Module
    processing_class: Any

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
        args: RDPOConfig,
        train_dataset: Records,
        eval_dataset: Records | dict[str, Records] | None = None,
        processing_class: Any = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        given = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        checks.check_arguments(args, kwargs | given)
        kwargs.pop("ref_model", None)  # it is None, as in scripts for TRL
        disable_cudnn_attention()
        self._log_rank0 = parts.reporter(args)
        vlm, self.adapter = adapters.split(self._load(model, args, peft_config))
        path = model if isinstance(model, str | Path) else vlm.config._name_or_path
        processor = checks.checked_processor(processing_class, path, vlm)
        adapted = peft_config is not None or self.adapter is not None
        checks.check_weights(vlm, adapted=adapted, autocast=args.autocast)
        dtype = torch.bfloat16 if args.autocast else vlm.dtype
        # PEFT decides which weights of adapters are trained. New adapters are added after the
        # tower is frozen, so that only their own weights in it are trained.
        module = parts.Module(vlm, train_vision=self.adapter is not None, dtype=dtype)
        self._base, self._digest = str(path), ""  # digest of the base, set with the references
        self._about = reference_logps.description(vlm, processor, dtype, args.device, args.kernels)
        set_seed(args.seed)  # adapters draw the same weights on every rank
        if peft_config is not None:
            self.adapter = get_peft_model(vlm, peft_config)
            module.freeze(train_vision=True)
        if self.adapter is not None:
            adapter_checks.check(self.adapter, self._log_rank0)
            self._log_rank0(lora_targets.share(vlm))
            checks.widen(self.adapter, autocast=args.autocast, log=self._log_rank0)
        else:
            checks.check_full_model(vlm)
        if args.projector_learning_rate:
            parts.check_projector(vlm)
        shows = not args.disable_tqdm and args.process_index == 0
        as_table = partial(
            parts.record_table,
            image_folder=args.image_folder,
            progress=shows,
            log=self._log_rank0,
        )
        table = as_table(train_dataset, split=args.split)
        self.objective = make_objective(args.loss, table)
        tables = [table]
        several = isinstance(eval_dataset, dict)
        sets: Any = eval_dataset if several else {"": eval_dataset}
        sets = {} if eval_dataset is None else sets
        checks.check_splits(args, train_dataset, sets.values())
        for rows in sets.values():
            of_file = isinstance(rows, str | Path) and Path(rows).is_file()
            split = args.eval_split or (None if of_file else args.split)
            tables.append(table := as_table(rows, split=split))
            parts.check_objective(self.objective, make_objective(args.loss, table))
        encode = partial(
            parts.encode_tables,
            tables,
            self.objective,
            max_response_tokens=args.max_response_tokens,
            progress=shows,
        )
        # Data sets are ranges of examples: first for training, then for evaluation.
        encoded = encode(processor, module, log=self._log_rank0)
        parts.warn_of_shared(sets, tables, encoded, self._log_rank0)
        self.examples = reduce(add, encoded)
        ends = np.cumsum([len(examples) for examples in encoded]).tolist()
        indices: Any = range(ends[0])
        eval_indices: Any = dict(zip(sets, starmap(range, pairwise(ends)), strict=True))
        if args.reference_model:
            policy = reference.Encoded(self._base, processor, module, self.examples)
            reference.check(args.reference_model, policy, encode)
        workers = workers_of_rank(args.image_workers)
        self.store = ImageStore(processor, module.layout, self.examples, workers=workers)
        self._trained = len(indices)
        self.references: torch.Tensor | None = None  # (L, examples) fp32
        self._feed: Feed | None = None  # set with the references
        self._pool: ThreadPoolExecutor | None = None  # lays out batches while a loop runs
        self._losses: list[tuple[torch.Tensor, tuple[str, ...]]] = []  # not read yet
        self._shift = objectives.RunningMean()
        self._step_rewards: list[torch.Tensor] = []  # (leaves, B) of each micro-batch of a step
        self._best_step: int | None = None  # of the weights, after they were those of the best

        # In fp64. For steps since the last log: number of examples and sums, (1, 1 + metrics). For
        # an evaluation: index, loss and metrics of each example of a batch, (B, 2 + metrics).
        self._sums: torch.Tensor | None = None
        self._eval_rows: list[torch.Tensor] | None = None
        super().__init__(
            module,
            args,
            data_collator=parts.batch_of if args.laid_out_late else self._collate,
            train_dataset=indices,
            eval_dataset=eval_indices if several else eval_indices.get(""),
            processing_class=processor,
            **kwargs,
        )
        if self.is_fsdp_enabled:
            checks.check_sharding(self.accelerator)
        self.label_names = []
        self.can_return_loss = True
        self.model_accepts_loss_kwargs = False  # a mean over examples, averaged over micro-batches

    @staticmethod
    def _load(
        model: str | Path | PreTrainedModel | PeftModel,
        args: RDPOConfig,
        peft_config: PeftConfig | None,
    ) -> PreTrainedModel | PeftModel:
        """Load the model, or return the given one, after a check that it can take `peft_config`."""
        if peft_config is not None:
            adapter_checks.check_config(peft_config)
        if not isinstance(model, str | Path):
            if peft_config is not None and adapters.split(model)[1] is not None:
                raise ValueError(
                    "the model already has adapters. Leave out peft_config to train them, or merge "
                    "them first (python -m realign.export) and load the merged folder."
                )
            return model
        if peft_config is not None and adapter_base(model):
            raise ValueError(
                f"{model} is an adapter. Merge it first (python -m realign.export), or give it as "
                "a PeftModel with is_trainable=True and leave out peft_config."
            )
        dtype = torch.bfloat16 if args.autocast else torch.float32
        attends, _ = choose("tree", args.device, dtype)
        weights_dtype = dtype if peft_config is not None else torch.float32
        return load_model(model, weights_dtype, attends)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As `Trainer.create_optimizer`, with groups of their own for the projector."""
        made, optimizer = self.optimizer is None, super().create_optimizer(model)
        if made and (rate := self.args.projector_learning_rate):
            parts.give_projector_a_rate(optimizer, self.accelerator.unwrap_model(self.model), rate)
        return optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`, after missing reference log-probs are computed."""
        self._fill_references()
        self._best_step = None
        if self.accelerator.use_distributed and not self.is_fsdp_enabled:
            parts.undo_preparation(self.accelerator, self.model)
        with self._building():
            return super().train(*args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer.evaluate`: loss, rewards, accuracies and margins under `eval_`.

        Raises:
            ValueError: for data other than the trainer's own `eval_dataset` or one of its sets, and
                with FSDP before `train`.
        """
        if not isinstance(eval_dataset, str | range | None):
            raise ValueError(
                "evaluation records must be passed to the trainer (eval_dataset=, or a dict of "
                "several sets), since their references are computed before the first step."
            )
        if self.is_fsdp_enabled and not self.accelerator._models:
            raise ValueError(
                "evaluate() before train() is not supported with FSDP, since accelerate shards a "
                "model together with its optimizer. Set eval_on_start=True in RDPOConfig."
            )
        self._fill_references()
        with self._building():
            data: Any = eval_dataset
            return super().evaluate(data, *args, **kwargs)

    def predict(self, *_: Any, **__: Any) -> Any:
        """Not supported: there are no logits.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "predict is not supported, since there are no logits. evaluate() gives rewards and "
            "margins."
        )

    def _fill_references(self) -> None:
        """Compute or look up the references of all examples, before the model is wrapped."""
        if self.references is not None:
            return
        args, device = self.args, self.args.device
        module = self.accelerator.unwrap_model(self.model)
        training = module.training
        self._check_forest(module)
        self._digest = adapters.base_digest(module.vlm)  # another trainer may have changed the base
        if path := args.reference_model:
            module.to("cpu")  # during the pass, the reference is on the device
            other = reference.load(path, module)
            about = reference_logps.description(
                other.vlm, self.processing_class, other.dtype, device, args.kernels
            )
            about["weights"] = adapters.base_digest(other.vlm)
            self._log_rank0(f"references are those of {path}: weights {about['weights']}")
            self._check_forest(other)
            self._pass(other, about, adapted=False)
            del other
            gc.collect()
        else:
            adapted = not adapters.changes_nothing(module.vlm)
            weights = adapters.model_digest(module.vlm) if adapted else self._digest
            self._pass(module, self._about | {"weights": weights}, adapted=adapted)
        module.to(device).train(training)
        assert self.references is not None
        self._feed = Feed(
            self.examples, self.references, self.store, module.attention, args.row_tokens, device
        )

    def _check_forest(self, model: parts.Module) -> None:
        """Move a model to the device, and compare its forests with plain forwards."""
        model.to(self.args.device).eval()
        # Trainer's own contexts are empty, since accelerate adds autocast to the prepared forward.
        with self.accelerator.autocast():
            for line in model.check_forest(self.examples[0], self.store, self.args.device):
                self._log_rank0(line)

    def _pass(self, model: parts.Module, about: dict[str, str], *, adapted: bool) -> None:
        """Set `references` to the log-probs of a model, computed or from the cache.

        Args:
            model: the reference.
            about: the fingerprint of its log-probs.
            adapted: whether its adapters have an effect, and are part of the reference.
        """
        args, self._fingerprint = self.args, about
        with self.accelerator.autocast():
            fingerprint = checks.agreed(about)
            if not self.objective.needs_reference:
                self.references = torch.zeros(len(self.objective.leaves), len(self.examples))
                return
            directory = args.reference_cache or reference_logps.default_directory()
            with ReferenceCache.open(directory, fingerprint) as cache:
                self.references = reference_logps.fill(
                    cache,
                    model,
                    self.examples,
                    self.store,
                    adapters=adapted,
                    row_tokens=args.row_tokens or self.examples.longest_tree,
                    batch_rows=args.per_device_train_batch_size * len(self.examples[0].roots),
                    device=args.device,
                    progress=not args.disable_tqdm and args.process_index == 0,
                    log=self._log_rank0,
                ).float()

    @contextmanager
    def _building(self) -> Iterator[None]:
        """A context with a thread that lays out batches, also for evaluations between steps.

        There is no thread if rank 0 (dispatch_batches) or worker processes (dataloader_num_workers)
        collate. Each forward then lays out its own batch.
        """
        if self._pool is not None or self.args.laid_out_late:
            yield
            return
        try:
            with builder(self.args.device) as self._pool:
                yield
        finally:
            self._pool = None

    def _collate(self, indices: Sequence[int]) -> dict[str, torch.Tensor | Future]:
        """Collate example indices. A thread lays out their micro-batch.

        accelerate's loader collates a batch before it returns the previous one.
        """
        batch: dict[str, Any] = parts.batch_of(indices)
        if self._pool is not None:
            assert self._feed is not None
            batch["ahead"] = self._pool.submit(self._feed, indices)
        return batch

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The mean loss of a batch of example indices. It is checked before the update.

        Raises:
            RecordError: if an image cannot be read again.
        """
        if (future := inputs.get("ahead")) is not None:
            part = future.result()
        else:
            assert self._feed is not None
            part = self._feed(inputs["indices"].cpu().numpy())
        part = part.to(self.args.device)
        output = model(part.batch, self.objective.at(self._shift.value), part.references)
        loss = output.loss / part.batch.examples
        self._losses.append((loss.detach(), part.batch.names))
        values = metrics.by_example(output, self.objective)
        self._names = list(values)
        indices = inputs["indices"].to(output.logps.device).double()
        if self._eval_rows is not None:
            losses = metrics.example_losses(output, self.objective)
            self._eval_rows.append(torch.stack([indices, losses, *values.values()], dim=1))
        else:
            sums = torch.stack([torch.ones_like(indices), *values.values()], dim=1).sum(0, True)
            self._sums = sums if self._sums is None else self._sums + sums
            if leaves := self.objective.shifted_leaves:
                self._step_rewards.append(output.rewards[list(leaves)].double())
        return (loss, {"logps": output.logps}) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As in `Trainer`, which calls it before each update, with one check of a step's numbers.

        The running mean of rewards is updated as well.

        Raises:
            ValueError: if the gradient norm or the loss of a micro-batch is not finite.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        losses, self._losses = self._losses, []
        parts.check_finite(losses, norm)
        if self._step_rewards:
            rewards = torch.cat(self._step_rewards, dim=1).mean(0)
            rows = self._gathered(torch.stack([torch.ones_like(rewards), rewards], dim=1))
            self._shift.add(float(rows[:, 1].mean()), len(rows))
            self._step_rewards = []
        return norm

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return the loss only, since there are no logits."""
        with torch.no_grad():
            return self.compute_loss(model, inputs).detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.evaluation_loop`, with metrics separate from those of training steps."""
        self._eval_rows = []
        try:
            output = super().evaluation_loop(*args, **kwargs)
            parts.check_finite(self._losses)
        finally:  # steps after a failed evaluation are training steps again
            rows, self._eval_rows = self._eval_rows, None
            self._losses = []
        assert rows is not None and output.metrics is not None
        prefix = kwargs.get("metric_key_prefix", "eval")
        rows = self._gathered(torch.cat(rows))
        # Records that pad the last batch are duplicates.
        rows = rows[np.unique(rows[:, 0], return_index=True)[1]]
        names = ["loss", *self._names]  # Trainer's loss counts the duplicates
        means = dict(zip(names, rows[:, 1:].mean(0).tolist(), strict=True))
        output.metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`, with TRL's `rewards/*` and `logps/*` since the last log."""
        if "loss" in logs and self._sums is not None:
            count, *total = self._gathered(self._sums).sum(0).tolist()
            logs |= {name: value / count for name, value in zip(self._names, total, strict=True)}
            self._sums = None
        super().log(logs, start_time)

    def _gathered(self, rows: torch.Tensor) -> np.ndarray:
        """The rows of all ranks, on every rank."""
        rows = rows.to(self.args.device)
        padded: Any = self.accelerator.pad_across_processes(rows, pad_index=-1)
        gathered: Any = self.accelerator.gather(padded)
        return gathered[gathered[:, 0] >= 0].cpu().numpy()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write the model or its adapters for transformers and PEFT, with the processor."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self._output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        gathered = None  # whole tensors of a sharded model, on this rank only
        if state_dict is not None:
            gathered = {name.removeprefix("vlm."): value for name, value in state_dict.items()}
        if self.adapter is None:
            self.model.vlm.save_pretrained(folder, state_dict=gathered)
        else:
            adapters.save(self.adapter, folder, gathered)
        self.processing_class.save_pretrained(folder)
        if self.references is not None:
            self._run_reference().save(folder, self._shift)
        (folder / "README.md").write_text(self._card(folder), encoding="utf-8")
        torch.save(self.args, folder / "training_args.bin")

    @property
    def _output_dir(self) -> Path:
        assert self.args.output_dir is not None
        return Path(self.args.output_dir)

    def _run_reference(self) -> parts.RunReference:
        assert self.references is not None
        known = self.objective.needs_reference
        base = self._digest if self.args.reference_model else None
        return parts.RunReference(
            self._fingerprint, self.examples, self.references, known=known, base=base
        )

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write this project's card to `output_dir` instead of Trainer's, for `push_to_hub`."""
        if self.is_world_process_zero():
            (self._output_dir / "README.md").write_text(self._card(), encoding="utf-8")

    def _card(self, folder: Path | None = None) -> str:
        args, log, step = self.args, self.state.log_history, self._best_step
        logged = [line for line in log if "loss" in line and step in (None, line["step"])]
        digests = {"base weights": self._digest or adapters.base_digest(self.model.vlm)}
        more = {}
        if path := args.reference_model:
            more["reference"] = shown_name(path)
            if self.references is not None:
                digests["reference weights"] = self._fingerprint["weights"]
        if args.projector_learning_rate:
            more["peak learning rate of the projector"] = args.projector_learning_rate
        adapter, place = self.adapter, "THIS_FOLDER"
        folder = folder or self._output_dir
        if adapter is not None:
            place = str(adapters.place_of(adapter, place))
            folder = adapters.place_of(adapter, folder)
        kind = self.model.vlm.config.model_type
        return model_card(
            self.objective.name,
            {
                **loss_settings(args.loss),
                **more,
                "peak learning rate": args.learning_rate,
                "schedule": SchedulerType(args.lr_scheduler_type).value,
                "records in a step": args.train_batch_size
                * args.gradient_accumulation_steps
                * args.world_size,
                "compute dtype": "bf16" if self.model.dtype == torch.bfloat16 else "fp32",
                "seed": args.seed,
            },
            base=self._base,
            adapter=adapter is not None,
            commands=commands(
                folder, adapter=adapter is not None, base=self._base, model_type=kind, place=place
            ),
            records=self._trained,
            images=len(self.store),
            digests=digests,
            last=logged[-1] if logged else {},
            held_out=self._held_out_facts(),
        )

    def _held_out_facts(self) -> dict[str, Any]:
        """Facts for the card about one evaluation set, if it was evaluated with these weights."""
        step = self._best_step or self.state.global_step
        lines = [e for e in self.state.log_history if "eval_loss" in e and e["step"] == step]
        held_out: Any = self.eval_dataset
        if not lines or not isinstance(held_out, range):
            return {}
        return {
            "records": len(held_out),
            "digest": reference_logps.digest_of(
                self.examples, slice(held_out.start, held_out.stop)
            ),
            "step": step,
            "chosen_by": str(self.args.metric_for_best_model) if self._best_step else "",
            "metrics": {name.removeprefix("eval_"): value for name, value in lines[-1].items()},
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        self._shift = self._run_reference().check(folder)
        if self.is_fsdp_enabled:
            if self.adapter is not None:
                adapters.check_saved(self.adapter, folder)
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif self.adapter is not None:
            adapters.load(self.adapter, folder)
        else:
            parts.load_weights(self.model.vlm, folder)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))
        self._best_step = self.state.best_global_step
