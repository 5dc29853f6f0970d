"""Settings of `realign.hf.RDPOTrainer`: `RDPOConfig`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from realign.checks import no_effect, not_negative
from realign.loss_config import LossConfig
from realign.training.metrics import better_direction

_REFUSED = {  # settings of Trainer without effect on this loss
    "label_smoothing_factor": 0.0,
    "neftune_noise_alpha": None,
    "use_liger_kernel": False,
    "torch_compile": False,
}
_TEXTS = (
    "objective",
    "link",
    "split",
    "eval_split",
    "image_folder",
    "reference_cache",
    "reference_model",
)
_PRECISION = ("fp16", "fp16_full_eval", "bf16_full_eval")


@dataclass
class RDPOConfig(TrainingArguments):
    """TrainingArguments with the settings of rDPO.

    Attributes:
        objective: one of `realign_kernels.objectives.PRESETS`, or a sum, as sigmoid+sft or a list.
        loss_weights: weights of the parts of a sum, 1 by default.
        link: objective, or sum, that rdpo uses for the text and for the image. None is DPO's.
        beta: beta of the objective. A larger beta keeps the model closer to the reference model.
            None is the objective's default.
        visual_weight: weight of the visual term, for objectives that have one.
        label_smoothing: share of flipped pairs that cdpo and robust assume, or epsilon of exo_pair.
        gamma: target margin of simpo.
        nll_weight: weight of the loss of the chosen response's tokens in rpo, mpo and cpo.
        discopop_tau: width of discopop's change between its two losses.
        max_response_tokens: maximum number of tokens in a response. A longer response is an error.
        row_tokens: maximum number of tokens in a row of the forest. 0 chooses by the attention.
        split: split of data sets that are given by a path or a name on the Hub.
        eval_split: the same for `eval_dataset`, which else has that of `split`.
        image_folder: folder that contains the images of such data sets, and that their paths are
            relative to. None means the folder of the file.
        image_workers: threads that decode and preprocess images ahead of the step. 0 uses the
            thread that builds batches. None uses the cores of the process but one, from 1 to 8.
        reference_cache: folder of reference log-probs. The default is $REALIGN_CACHE/reference, or
            ~/.cache/realign/reference.
        reference_model: folder or Hub name of another model as the reference. It must encode the
            records as the trained model does. None is the model before its first step.
        learning_rate: peak learning rate. The default is the paper's.
        metric_for_best_model: a metric of `evaluate`. `greater_is_better` follows from losses,
            accuracies and margins. Give it for other metrics.
        projector_learning_rate: peak learning rate of the projector, in groups of its own. 0 trains
            it at `learning_rate`, if it is trained. With `peft_config`, name its modules in
            `modules_to_save`.
        logging_nan_inf_filter: off, since it reads two values from the device in each micro-batch.
            A loss that is not finite is an error here.
        use_cpu: on without a GPU, so that several processes also work on a CPU.
    """

    learning_rate: float = 1e-5
    projector_learning_rate: float = 0.0
    logging_nan_inf_filter: bool = False
    objective: str | list[str] = "rdpo"
    loss_weights: list[float] | str | None = None
    link: str | None = None
    beta: float | None = None
    visual_weight: float = 1.0
    label_smoothing: float | None = None
    gamma: float | None = None
    nll_weight: float | None = None
    discopop_tau: float | None = None
    max_response_tokens: int = 1024
    row_tokens: int = 0
    split: str | None = None
    eval_split: str | None = None
    image_folder: str | None = None
    image_workers: int | None = None
    reference_cache: str | None = None
    reference_model: str | None = None

    @property
    def autocast(self) -> bool:
        """Whether the forward computes in bf16, set by bf16=True or accelerate's launcher."""
        return self.mixed_precision == "bf16"

    @property
    def kernels(self) -> str:
        """Kernels of the layers, for the fingerprint of a reference.

        Earlier versions computed references without autocast under the name "autocast".
        """
        return "accelerate's autocast" if self.autocast else "eager"

    @property
    def laid_out_late(self) -> bool:
        """Whether each forward lays out its own batch, since workers or rank 0 collate."""
        assert isinstance(self.accelerator_config, AcceleratorConfig)
        return bool(self.dataloader_num_workers or self.accelerator_config.dispatch_batches)

    def __post_init__(self) -> None:
        self._check_strings()
        self._set_better_direction()
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        self.remove_unused_columns = False  # a batch is indices
        # accelerate's copies from pinned memory need not wait for the device.
        assert isinstance(self.accelerator_config, AcceleratorConfig)
        self.accelerator_config.non_blocking |= self.dataloader_pin_memory
        if (self.image_workers or 0) < 0:
            raise ValueError(f"image_workers is {self.image_workers}; it must be 0 or more.")
        not_negative("learning_rate", self.learning_rate)
        not_negative("projector_learning_rate", self.projector_learning_rate)
        weights = self.loss_weights
        if isinstance(weights, int | float):
            weights = str(weights)
        elif weights is not None and not isinstance(weights, str):
            weights = ",".join(map(str, weights))
        given: dict[str, Any] = {
            field.name: getattr(self, field.name) for field in fields(LossConfig)
        }
        given["loss_weights"] = weights
        self.loss = LossConfig(**given)
        if self.reference_model and not self.loss.build().needs_reference:
            what = f"{self.loss.text_objective} needs no reference"
            no_effect("reference_model", what, 'use objective="dpo"')
        for name, default in _REFUSED.items():
            if getattr(self, name, default) not in (default, None):
                raise ValueError(f"{name} would have no effect on rDPO's loss here. Leave it out.")
        for name in _PRECISION:  # the last two would cast trained weights
            if getattr(self, name):
                raise ValueError(
                    f"{name} is not supported. Set bf16=True, or leave it out for fp32."
                )
        if self.mixed_precision not in ("no", "bf16"):  # of accelerate's configuration
            raise ValueError(
                f"accelerate's mixed_precision is {self.mixed_precision!r}, which is not "
                "supported. Launch with --mixed_precision bf16 or no."
            )

    def _check_strings(self) -> None:
        """Join the parts of a sum, make the path of a reference absolute, and check texts.

        Raises:
            ValueError: for an empty text, or a value that is no text.
        """
        if isinstance(self.objective, list | tuple):
            self.objective = "+".join(self.objective)
        if isinstance(self.reference_model, Path):
            self.reference_model = str(self.reference_model)
        for name in _TEXTS:
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, str | Path):
                raise ValueError(f"{name} is a {type(value).__name__}. Give a name or path.")
            if not str(value):
                raise ValueError(f"{name} is empty. Give a value, or leave it out.")
        if self.reference_model and Path(self.reference_model).is_dir():
            self.reference_model = str(Path(self.reference_model).resolve())

    def _set_better_direction(self) -> None:
        """Set `greater_is_better`, which transformers gets wrong for names such as loss/text.

        Raises:
            ValueError: for a metric without a better direction.
        """
        metric = self.metric_for_best_model
        if metric is None or self.greater_is_better is not None:
            return
        direction = better_direction(metric)
        if not direction:
            raise ValueError(
                f"metric_for_best_model is {metric!r}, which is neither a loss nor an accuracy or "
                "margin. Set greater_is_better."
            )
        self.greater_is_better = direction > 0
