"""One module that owns the vision-language model and turns a forest batch into log-probs or a loss.

`ForestModel.forward` is the only forward of training and of the reference pass: the backbone runs
once over the rows, the response positions are gathered, and only they meet the vocabulary. Being
the root module it also is what FSDP2 wraps, so the head's weight is gathered with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from realign.forest import ForestBatch
from realign_kernels import (
    NonFiniteError,
    Objective,
    PreferenceOutput,
    head_inputs,
    linear_logprobs,
    linear_preference_loss,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""What a model may compute in, by the names of the settings."""


class NonFiniteRecords(ValueError):
    """Log-probs of some records are NaN or infinite; the message names the records."""


def load_processor(path: str | Path):
    """Load a model folder's processor; a text-only model is refused.

    Raises:
        ValueError: when the model is text-only, or its processor has no chat template.
    """
    _vision_config(path)
    processor = _from_pretrained(AutoProcessor, path)
    if not processor.chat_template:
        raise ValueError(
            f"the processor of {path} has no chat template, so prompts cannot be rendered. Save "
            "one with it (processor.chat_template = ...; processor.save_pretrained(...))."
        )
    return processor


def model_config(path: str | Path):
    """The configuration of a model that forests are laid out for; raises as `load_model`."""
    config = _vision_config(path)
    if config.model_type != "llava":
        raise ValueError(
            f"{path} is of type {config.model_type!r}; forests are laid out for 'llava' models so "
            "far. Pass a LLaVA-1.5-type model to --model."
        )
    return config


def empty_model(path: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """What `load_model` gives, on the meta device: no weights are read, no memory is taken."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(
            model_config(path), dtype=dtype, attn_implementation="sdpa"
        )


def load_model(path: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a LLaVA-type model from a folder or hub name; an adapter is merged into its base.

    Raises:
        ValueError: for a text-only model, or one that is not of the LLaVA type.
    """
    model_config(path)
    auto, attention = AutoModelForImageTextToText, "sdpa"
    if (base := adapter_base(path)) is None:
        return _from_pretrained(auto, path, dtype=dtype, attn_implementation=attention)
    wide = _from_pretrained(auto, base, dtype=torch.float32, attn_implementation=attention)
    merged = PeftModel.from_pretrained(wide, str(path)).merge_and_unload()
    return merged.to(dtype).requires_grad_(True)  # PEFT froze them


def load_trained(path: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a final model for inference: full weights, or an adapter with the base it names."""
    return _from_pretrained(AutoModelForImageTextToText, path, dtype=dtype).eval()


def adapter_base(path: str | Path) -> str | None:
    """The base model that an adapter folder names; None for a folder or name of a whole model."""
    adapter = Path(path) / "adapter_config.json"
    return json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.exists() else None


def _vision_config(path: str | Path):
    """The configuration of a vision-language model; that of an adapter is its base's."""
    config = _from_pretrained(AutoConfig, adapter_base(path) or path)
    if not hasattr(config, "vision_config"):
        raise ValueError(
            f"{path} is a text-only model ({config.model_type}). Pass a vision-language model of "
            "the LLaVA type to --model."
        )
    return config


def _from_pretrained(auto_class, path: str | Path, **options):
    """`auto_class.from_pretrained`, with one line where there is no model."""
    try:
        return auto_class.from_pretrained(path, **options)
    except OSError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"no model could be loaded from {path} ({reason}). Pass a folder that holds a Hugging "
            "Face model with its processor, or the name of one on the hub."
        ) from error


def add_lora(model: PreTrainedModel, rank: int, alpha: float) -> PeftModel:
    """Put LoRA on every linear layer of the language model, and freeze everything else."""
    language = model.model.language_model
    names = {n.rsplit(".", 1)[-1] for n, m in language.named_modules() if isinstance(m, nn.Linear)}
    pattern = rf".*language_model\..*\.({'|'.join(sorted(names))})"
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base model, exactly: every LoRA layer in `model` passes on what its base layer gives.

    PEFT's own `disable_adapter` also toggles `requires_grad`, which FSDP2 reads when it sets its
    groups up, so that LoRA would not train afterwards.
    """
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    layers = [m for m in model.modules() if isinstance(m, kinds) and not m.disable_adapters]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


class ForestModel(nn.Module):
    """A LLaVA-type model that takes forest batches.

    Args:
        vlm: the Hugging Face model, with or without LoRA layers in it.
        train_vision: whether the vision tower learns; frozen by default.
        dtype: fp32 or bf16, in which the forward computes: that of `vlm`'s parameters, or what
            FSDP2 casts them to (`parallel.shard`).
    """

    def __init__(
        self,
        vlm: PreTrainedModel,
        *,
        train_vision: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        attention = vlm.model.language_model.config._attn_implementation
        if attention != "sdpa":
            raise ValueError(
                f"the language model's attention is {attention!r}, which does not read the forest's"
                " boolean mask as one. Load it with attn_implementation='sdpa'."
            )
        self.vlm = vlm
        self.dtype = dtype
        if not train_vision:
            vlm.model.vision_tower.requires_grad_(False)
        self.softcap = getattr(vlm.config.text_config, "final_logit_softcapping", None)

    @property
    def layers(self) -> list[nn.Module]:
        """The repeated layers of both towers, which FSDP shards one by one."""
        parts = (self.vlm.model.language_model, self.vlm.model.vision_tower)
        lists = [m for part in parts for m in part.modules() if isinstance(m, nn.ModuleList)]
        return [layer for layers in lists for layer in layers]

    def forward(
        self,
        batch: ForestBatch,
        objective: Objective | None = None,
        reference_logps: torch.Tensor | None = None,  # (L, B) fp32
    ) -> torch.Tensor | PreferenceOutput:
        """Compute log-probs, or the loss when an objective is given.

        Returns:
            Without an objective the log-probs of the batch's response tokens, (N,) fp32
            (`ForestBatch.leaf_sums` adds them up). With one the `PreferenceOutput`, whose loss is
            the *sum* over the batch's examples.

        Raises:
            NonFiniteRecords: when a log-prob is NaN or infinite.
        """
        hidden = self._hidden(batch).to(self.dtype)
        # Not lm_head.weight: LoRA on the head, or a trained copy of it, would be left out.
        hidden, weight, bias = head_inputs(self.vlm.get_output_embeddings(), hidden)
        weight = weight.to(hidden.dtype)
        bias = None if bias is None else bias.to(hidden.dtype)
        shared = {"bias": bias, "softcap": self.softcap}
        try:
            if objective is None:
                return linear_logprobs(hidden, weight, batch.labels, rival=batch.rival, **shared)
            output = linear_preference_loss(
                hidden,
                weight,
                batch.labels,
                reference_logps,
                objective,
                sequence_ids=batch.sequence_ids,
                reduction="sum",
                **shared,
            )
        except NonFiniteError as error:
            owners = batch.sequence_ids.cpu()[error.rows] % batch.examples
            names = sorted({batch.names[i] for i in owners.tolist()})
            raise NonFiniteRecords(
                f"record(s) {', '.join(names)}: {error}. Nothing was updated. If one record is "
                "named, look at its image and text; if all are, at the model's weights."
            ) from error
        return output._replace(logps=output.logps.detach())  # FSDP hooks what carries grad

    def image_tokens(self, processor) -> int:
        """Tokens that one image takes: what the vision tower makes of a blank one."""
        blank = processor.image_processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")
        pixels = blank["pixel_values"].to(self.vlm.device)
        with torch.inference_mode():
            return self._image_features(pixels)[0].shape[0]

    def embed_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Mean-pooled image features of the model's own vision tower, (I, C, H, W) -> (I, D)."""
        with torch.inference_mode():
            tower = self.vlm.model.vision_tower
            states = tower(pixel_values.to(tower.device, tower.dtype)).last_hidden_state
            return states.mean(1).float()

    def _image_features(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        config = self.vlm.config
        return self.vlm.model.get_image_features(
            pixel_values=pixel_values.to(self.dtype),
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        ).pooler_output

    def _hidden(self, batch: ForestBatch) -> torch.Tensor:
        """Last hidden states at the batch's predicting positions, (N, H)."""
        distinct = self._image_features(batch.pixel_values)
        slots = tuple(distinct[i] for i in batch.image_order.tolist())
        states = self.vlm.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask(),
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=slots)},
            use_cache=False,
        ).last_hidden_state
        return states.flatten(0, 1)[batch.rows]
