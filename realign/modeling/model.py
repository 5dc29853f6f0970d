"""`ForestModel`: a vision-language model that computes the loss or log-probs of a forest batch.

Training calls `forward`, and the reference pass calls `logps`. In both the backbone runs once over
the rows, and only the gathered response positions are multiplied with the vocabulary. FSDP2 wraps
this module as the root, so the head's weight is gathered with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from realign.distributed import most_of_ranks
from realign.modeling import norms, projector, start_check, tree_attention
from realign.modeling.attention import forest_mask, suitable
from realign.modeling.forest import Example, ForestBatch
from realign.modeling.images import Features, Images, ImageStore, features, in_slots
from realign.modeling.layouts import (
    SLIDING,
    image_tower,
    layout_of,
    repeated,
)
from realign_kernels import (
    NonFiniteError,
    Objective,
    PreferenceOutput,
    head_inputs,
    linear_logprobs,
    linear_preference_loss,
)


class NonFiniteRecords(ValueError):
    """Log-probs of some records are NaN or infinite. The message names the records."""


class ForestModel(nn.Module):
    """A vision-language model with a forest batch as its input.

    Args:
        vlm: the Hugging Face model, with or without LoRA layers in it.
        train_vision: whether the vision tower is trained; frozen by default. The projector between
            tower and language model stays trainable either way.
        dtype: compute dtype, fp32 or bf16. It is the dtype of `vlm`'s parameters, or the dtype that
            FSDP2 casts them to (`fsdp.shard`).

    Raises:
        ValueError: for a model that does not support forest batches.
    """

    def __init__(
        self,
        vlm: PreTrainedModel,
        *,
        train_vision: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.vlm = vlm
        self.dtype = dtype
        self.layout = layout_of(vlm)
        decoder = vlm.model.get_decoder()
        norms.use(decoder)
        # The reason is printed, since the attention then differs from the setting.
        self.attention, self.instead = suitable(decoder, self.layout)
        decoder.config._attn_implementation = self.attention
        self.softcap = getattr(vlm.config.get_text_config(), "final_logit_softcapping", None)
        self.freeze(train_vision)

    def freeze(self, train_vision: bool) -> None:
        """Freeze the parts that are not trained. Adapters that are added later are not frozen.

        Args:
            train_vision: whether the vision tower is trained.
        """
        self._train_vision = train_vision
        for parameter in self.frozen_parameters():
            parameter.requires_grad_(False)

    def frozen_parameters(self) -> list[nn.Parameter]:
        """Parameters of towers that are not trained, and of parts that images do not use."""
        return projector.frozen_parameters(self.vlm, self._train_vision)

    @property
    def layers(self) -> list[nn.Module]:
        """The repeated layers of language model and vision tower, which FSDP shards one by one."""
        parts = (self.vlm.model.get_decoder(), image_tower(self.vlm))
        return [layer for part in parts if part is not None for layer in repeated(part)]

    def forward(
        self,
        batch: ForestBatch,
        objective: Objective,
        reference_logps: torch.Tensor,  # (L, B) fp32
    ) -> PreferenceOutput:
        """Compute the loss of a batch, the *sum* over its examples.

        If a log-prob is NaN or infinite, all results are NaN.
        """
        hidden, weight, bias = self._head_inputs(self._hidden(batch))
        try:
            output = linear_preference_loss(
                hidden,
                weight,
                batch.labels,
                reference_logps,
                objective,
                sequence_ids=batch.sequence_ids,
                reduction="sum",
                bias=bias,
                softcap=self.softcap,
            )
        except NonFiniteError:  # every rank must run a backward before the step is rejected
            return _not_a_number(hidden, weight, bias, objective, reference_logps)
        return output._replace(logps=output.logps.detach())  # FSDP hooks tensors that require grad

    def logps(self, batch: ForestBatch) -> torch.Tensor:
        """Compute the log-probs of the batch's response tokens, (N,) fp32.

        `ForestBatch.leaf_sums` sums them per leaf.

        Raises:
            NonFiniteRecords: when a log-prob is NaN or infinite.
        """
        hidden = self._hidden(batch)
        try:
            return self.head_logps(hidden, batch.labels, batch.rival)
        except NonFiniteError as error:
            owners = batch.sequence_ids[error.rows] % batch.examples
            names = sorted({batch.names[i] for i in owners.tolist()})
            raise NonFiniteRecords(
                f"record(s) {', '.join(names)}: {error} Nothing was updated. If one record is "
                "named, check its image and text. If all are, check the model's weights."
            ) from error

    def head_logps(
        self,
        hidden: torch.Tensor,  # (N, H)
        labels: torch.Tensor,  # (N,)
        rival: torch.Tensor | None = None,  # (N,)
    ) -> torch.Tensor:
        """Compute log-probs of labels from last hidden states, (N,) fp32."""
        hidden, weight, bias = self._head_inputs(hidden)
        return linear_logprobs(hidden, weight, labels, rival=rival, bias=bias, softcap=self.softcap)

    def image_features(self, images: Images) -> list[Features]:
        """Compute the features of each image, in order (`images.features`).

        If the model is sharded, every rank must call it.
        """
        return self._image_features(images)

    def plain_logits(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The logits of a plain forward of the model, (B, T, V) in the model's dtype.

        Args:
            inputs: output of the model's processor.
        """
        return self.vlm(**inputs, use_cache=False).logits

    def check_forest(
        self, example: Example, store: ImageStore, device: torch.device
    ) -> Iterator[str]:
        """Compare forests with plain forwards, before the model is used (`start_check`).

        Every rank must call it, since the forwards contain collectives.

        Args:
            example: an example of the data set.
            store: the images of the data set.
            device: device of the model.

        Yields:
            Lines to print: each deviation from the settings, with the reason.

        Raises:
            ValueError: when no form of a batch gives the log-probs of a plain forward. The message
                names what differs.
        """
        if self.instead:
            yield f"attention is {self.attention}: {self.instead}"
        yield from start_check.run(self, example, store, device)

    def _image_features(self, images: Images) -> list[Features]:
        calls = len(images.calls)
        if self.layout.one_by_one and isinstance(self, FSDPModule):
            calls = most_of_ranks(calls, next(iter(images.calls[0].values())).device)
        return features(self.vlm, images, calls=calls)

    def _head_inputs(
        self, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # (N, H), (V, H), (V,)
        hidden = hidden.to(self.dtype)
        # Reading lm_head.weight would omit LoRA on the head, or a trained copy of it.
        head = self.vlm.get_output_embeddings()
        assert head is not None  # `layout_of` rejects models without a head
        hidden, weight, bias = head_inputs(head, hidden)
        return hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)

    def _hidden(self, batch: ForestBatch) -> torch.Tensor:
        """Last hidden states that predict the batch's labels, (N, H)."""
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
        if batch.slots:
            by_image = batch.features
            if by_image is None:
                assert batch.images is not None
                by_image = self._image_features(batch.images.to(batch.input_ids.device, self.dtype))
            inputs["mm_encoder_outputs"] = {"image": in_slots(by_image, batch.slots)}
        inputs |= batch.columns | batch.grids
        masks: dict = {}
        if batch.shared:
            masks = {kind: self._mask(batch, kind) for kind in self.layout.kinds}
            inputs["attention_mask"] = masks[self.layout.kinds[0]]
            inputs["position_ids"] = batch.position_ids
            if self.attention == tree_attention.CALLS:
                inputs["trees"] = batch.trees
            elif self.attention == tree_attention.VARLEN:
                inputs["sequences"] = batch.sequences
        else:
            inputs["attention_mask"] = (batch.segment >= 0).long()
        decoder = self.vlm.model.get_decoder()
        with takes_masks(decoder, masks) if len(masks) > 1 else nullcontext():
            states = self.vlm.model(**inputs).last_hidden_state
        # The last row of a root occurs once per leaf. An index would sum its gradients in varying
        # order (CPU threads; index_select on CUDA), but an embedding sums them in a fixed order.
        return F.embedding(batch.rows, states.flatten(0, 1))

    def _mask(self, batch: ForestBatch, kind: str) -> torch.Tensor | BlockMask:
        window = self.layout.window if kind == SLIDING else None
        beyond = self.layout.beyond_window
        blocks = kind in self.layout.both_ways_kinds
        return forest_mask(batch, self.attention, self.dtype, window, beyond, blocks)


@contextmanager
def takes_masks(decoder: nn.Module, masks: Mapping) -> Iterator[None]:
    """Pass the language model a mask for each kind of its layers.

    PaliGemma accepts only one mask, but the language model in it accepts several.
    """

    def replace(module, args, kwargs):
        return args, kwargs | {"attention_mask": dict(masks)}

    handle = decoder.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _not_a_number(
    hidden: torch.Tensor,  # (N, H)
    weight: torch.Tensor,  # (V, H)
    bias: torch.Tensor | None,  # (V,)
    objective: Objective,
    reference_logps: torch.Tensor,  # (L, B)
) -> PreferenceOutput:
    """The output for log-probs that are NaN or infinite: NaN, with a gradient for every input."""
    nan = torch.full_like(reference_logps, torch.nan)
    inputs = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    return PreferenceOutput(
        loss=sum((t.float().sum() for t in inputs), torch.zeros_like(nan[0, 0])) * torch.nan,
        logps=nan,
        rewards=nan,
        token_counts=torch.zeros_like(nan, dtype=torch.int64),
        term_losses=nan.new_full((len(objective.terms), nan.shape[1]), torch.nan),
    )
