"""Comparison of what a language model receives in a forest and in plain forwards."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from realign.modeling.forest import ForestBatch
from realign.modeling.images import columns_of
from realign.modeling.layouts import Layout, repeated

NOISES = 16
"""Largest accepted difference, as a multiple of the model's own rounding."""
_LEAST_OF_FEATURES = 1e-3
"""Accepted difference of embeddings, relative to their mean, if the rounding is smaller."""


class Model(Protocol):
    """The members of `ForestModel` that the check uses."""

    vlm: PreTrainedModel
    dtype: torch.dtype
    layout: Layout
    attention: str

    @property
    def layers(self) -> list[nn.Module]: ...
    def logps(self, batch: ForestBatch) -> torch.Tensor: ...
    def plain_logits(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor: ...
    def head_logps(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor: ...
    def frozen_parameters(self) -> list[nn.Parameter]: ...


class Differs(Exception):
    """A part of a forest differs from the truth.

    Attributes:
        shared_only: whether separate copies of the prompt may still be right.
        of_images: whether the part is the output of the vision tower.
    """

    def __init__(self, what: str, shared_only: bool = False, of_images: bool = False) -> None:
        super().__init__(what)
        self.shared_only, self.of_images = shared_only, of_images


@dataclass
class Seen:
    """What a language model receives in a forward.

    Attributes:
        inputs: tensors by name of the parameter.
        positions: positions by name of the rotary embedding.
        masks: masks by index of the layer, True where a query sees a key, (R, 1, T, T).
        states: input of the head, (..., H). None if the head was not called.
    """

    states: torch.Tensor | None = None
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    positions: dict[str, torch.Tensor] = field(default_factory=dict)
    masks: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Truth:
    """A plain forward over prompt and response.

    Attributes:
        leaf: index of the response in the batch, as in `ForestBatch.segment`.
        prompt: tokens of the prompt.
        inputs: output of the processor, with the response.
        seen: what the language model received.
        logps: (R,) fp64 log-probs of the response.
    """

    leaf: int
    prompt: int
    inputs: dict[str, torch.Tensor]
    seen: Seen
    logps: torch.Tensor


@dataclass
class Noise:
    """Mean effect of rounding.

    Attributes:
        logps: on log-probs, if all layers round differently.
        head: on log-probs, if only logits do.
        inputs: on inputs of the language model by name, relative to their mean.
    """

    logps: float
    head: float
    inputs: dict[str, float]


def compare_parts(
    model: Model, batch: ForestBatch, forest: Seen, truths: Sequence[Truth], noise: Noise
) -> None:
    """Compare what the language model receives in a forest and in plain forwards.

    Raises:
        Differs: for the first part that differs.
    """
    trees = int(batch.parent.max()) + 1
    others = _image_embeddings(model, truths)
    for truth in truths:
        leaf = (batch.segment == trees + truth.leaf).nonzero()
        row = int(leaf[0, 0])
        tree = batch.parent[row, leaf[0, 1]]
        root = (batch.segment[row] == tree).nonzero()[:, 0]
        place = _Place(row, torch.cat([root, leaf[:, 1]]), len(root))
        ids = truth.inputs["input_ids"][0].to(batch.input_ids.device)
        if not torch.equal(batch.input_ids[row, place.columns], ids):
            raise Differs("token ids differ from those of the processor")
        _compare_rows(batch, truth, place)
        for name, column in columns_of(truth.inputs, model.layout).items():
            if name not in batch.columns:
                continue  # the model does not read it
            found = batch.columns[name][row, place.columns]
            place.compare(f"the token column {name!r}", found, column[0].to(found.device))
        _compare_inputs(model, batch, place, forest, truth, noise, others)
        for name, expected in truth.seen.positions.items():
            found = forest.positions[name]
            found = found[..., min(row, found.shape[-2] - 1), place.columns]
            place.compare("positions", found, expected[..., 0, :], shared_only=True)
        for layer in truth.seen.masks.keys() | forest.masks.keys():
            _compare_masks(place, layer, forest.masks.get(layer), truth.seen.masks.get(layer))


def of_leaf(batch: ForestBatch, leaf: int) -> torch.Tensor:
    """Which labels of a batch belong to a leaf, by its index as in `Truth.leaf`, (N,) bool."""
    leaves = int(batch.sequence_ids.max()) // batch.examples + 1
    example, number = divmod(leaf, leaves)
    return batch.sequence_ids == number * batch.examples + example


def logps_of_head(model: Model, truth: Truth) -> torch.Tensor:
    """Log-probs of a response by our head, on the hidden states of a plain forward, (R,) fp32."""
    if truth.seen.states is None:
        return truth.logps
    states = truth.seen.states.flatten(0, -2)[truth.prompt - 1 : -1]
    return model.head_logps(states, truth.inputs["input_ids"][0, truth.prompt :])


def compare_heads(heads: Sequence[torch.Tensor], truths: Sequence[Truth], bound: float) -> None:
    """Compare results of `logps_of_head` with plain forwards.

    Raises:
        Differs: for log-probs that differ by more than `bound` per token.
    """
    gap = mean_size([head - truth.logps for head, truth in zip(heads, truths, strict=True)])
    if not gap <= bound:
        raise Differs(
            f"log-probs of the head differ by {gap:.2g} per token on the same hidden states, as by "
            "a scale or softcap of logits"
        )


@dataclass(frozen=True)
class _Place:
    """Place of a sequence in a batch: its row, its columns, and the length of its prompt."""

    row: int
    columns: torch.Tensor
    prompt: int

    def name(self, token: int) -> str:
        """A token in words."""
        if token < self.prompt:
            return f"token {token} of a prompt"
        return f"token {token - self.prompt} of a response"

    def compare(
        self,
        what: str,
        found: torch.Tensor,  # (..., T)
        expected: torch.Tensor,  # (..., T)
        shared_only: bool = False,
    ) -> None:
        """Compare whole numbers of each token."""
        different = (found != expected).flatten(0, -2) if found.ndim > 1 else found != expected
        if different.any():
            at = int(different.view(-1, found.shape[-1]).any(0).nonzero()[0, 0])
            values = [t[..., at].flatten().tolist() for t in (found, expected)]
            raise Differs(
                f"{what} differ in a forest: {self.name(at)} has {values[0]}, and {values[1]} in a "
                "plain forward",
                shared_only,
            )


def _compare_rows(batch: ForestBatch, truth: Truth, place: _Place) -> None:
    """Compare the labels of a response, and the positions that predict them."""
    scored = of_leaf(batch, truth.leaf)
    rows, labels = batch.rows.cpu()[scored], batch.labels[scored]
    first = place.row * batch.input_ids.shape[1]
    before = first + place.columns.cpu()[place.prompt - 1 : -1]
    if not torch.equal(rows, before):
        raise Differs("tokens of a response are predicted at other positions than before them")
    if not torch.equal(labels, truth.inputs["input_ids"][0, place.prompt :]):
        raise Differs("labels differ from the tokens of a response")


def _compare_inputs(
    model: Model,
    batch: ForestBatch,
    place: _Place,
    forest: Seen,
    truth: Truth,
    noise: Noise,
    others: torch.Tensor,  # (tokens, H) embeddings of all image tokens in plain forwards
) -> None:
    """Compare embeddings and other tensors that the language model receives."""
    image = batch.input_ids == model.layout.image_token_id
    numbers = image.flatten().cumsum(0).view_as(image) - 1  # of image tokens, in row-major order
    own = image[place.row, place.columns]
    for name, expected in truth.seen.inputs.items():
        if name not in forest.inputs:
            raise Differs(f"{name!r} does not reach the language model")
        found = forest.inputs[name]
        if expected.shape[:2] == (1, len(place.columns)):
            found, expected = found[place.row, place.columns], expected[0]
            of_images = own
        elif expected.ndim == 2 and len(expected) == int(own.sum()):
            found = found[numbers[place.row, place.columns][own]]
            of_images = torch.ones_like(own[own])
        else:
            continue
        if not expected.is_floating_point():
            place.compare(f"{name!r}", found.movedim(0, -1), expected.movedim(0, -1))
            continue
        scale = max(mean_size([expected]), 1e-30)
        bound = max(_LEAST_OF_FEATURES, NOISES * noise.inputs.get(name, 0.0))
        for tokens, what in ((~of_images, "embeddings of text"), (of_images, "image features")):
            if not tokens.any():
                continue
            gap = mean_size([found[tokens] - expected[tokens]]) / scale
            if not gap <= bound:
                gap = f"{what} ({name!r}) differ in a forest by {gap:.2g} of their size"
                if _in_other_places(found[tokens], others, bound * scale):
                    gap += ", and are those of other image tokens"
                raise Differs(gap, of_images=tokens is of_images)


def _image_embeddings(model: Model, truths: Sequence[Truth]) -> torch.Tensor:
    """Embeddings of the image tokens of plain forwards, (tokens, H)."""
    found = []
    for truth in truths:
        embeddings = truth.seen.inputs["inputs_embeds"][0]
        image = truth.inputs["input_ids"][0] == model.layout.image_token_id
        found.append(embeddings[image.to(embeddings.device)])
    return torch.cat(found)


def _in_other_places(found: torch.Tensor, others: torch.Tensor, bound: float) -> bool:
    """Whether embeddings are right, but in the places of others."""
    if found.shape[1:] != others.shape[1:]:
        return False
    nearest = torch.cdist(found.float(), others.float(), p=1).amin(1) / found.shape[-1]
    return float(nearest.mean()) <= bound


def _compare_masks(
    place: _Place, layer: int, found: torch.Tensor | None, expected: torch.Tensor | None
) -> None:
    """Compare the attention masks of a layer; None means causal."""
    if found is None and expected is None:
        return
    size = len(place.columns)
    causal = torch.ones(size, size, dtype=torch.bool, device=place.columns.device).tril()
    expected = causal if expected is None else expected[0, 0]
    rows = None if found is None else found[min(place.row, len(found) - 1), 0][place.columns]
    seen = causal if rows is None else rows[:, place.columns]
    if not torch.equal(seen, expected):
        query, key = (seen != expected).nonzero()[0].tolist()
        sees = "sees" if seen[query, key] else "does not see"
        raise Differs(
            f"the attention mask of layer {layer} differs in a forest: {place.name(query)} {sees} "
            f"{place.name(key)}",
            shared_only=True,
        )
    if rows is not None and int(rows.sum()) != int(seen.sum()):
        raise Differs(
            f"in layer {layer}, tokens of a forest see other responses or prompts", shared_only=True
        )


@contextmanager
def recorded(model: Model) -> Iterator[Seen]:
    """Record what the language model receives in a forward."""
    decoder, seen = model.vlm.model.get_decoder(), Seen()

    def of_head(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.states = args[0]

    def of_decoder(module: nn.Module, args: tuple, kwargs: dict) -> None:
        for name, value in _arguments(module, args, kwargs).items():
            if name in ("attention_mask", "position_ids", "input_ids"):
                continue
            if isinstance(value, torch.Tensor) and value.ndim > 1:
                seen.inputs[name] = value
            elif isinstance(value, list | tuple):
                tensors = [one for one in value if isinstance(one, torch.Tensor)]
                seen.inputs |= {f"{name}.{i}": one for i, one in enumerate(tensors)}

    def of_rotary(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        positions = _arguments(module, args, kwargs).get("position_ids")
        if isinstance(positions, torch.Tensor) and positions.ndim > 1:
            seen.positions[name] = positions

    def of_layer(layer: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        mask = _arguments(module, args, kwargs).get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.ndim == 4:
            seen.masks[layer] = mask if mask.dtype == torch.bool else mask > -1

    with ExitStack() as stack:

        def hook(module: nn.Module, function: Any, *first: Any) -> None:
            def call(hooked: nn.Module, args: tuple, kwargs: dict) -> None:
                function(*first, hooked, args, kwargs)

            handle = module.register_forward_pre_hook(call, with_kwargs=True)
            stack.callback(handle.remove)

        hook(decoder, of_decoder)
        if (head := model.vlm.get_output_embeddings()) is not None:
            hook(head, of_head)
        for name, module in decoder.named_modules():
            if "rotary_emb" in name.rsplit(".", 1)[-1]:
                hook(module, of_rotary, name)
        for layer, module in enumerate(repeated(decoder)):
            hook(module, of_layer, layer)
        yield seen


def _arguments(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a call of a module by name."""
    bound = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
    rest = [name for name, value in bound.items() if isinstance(value, dict)]
    return bound | {name: value for one in rest for name, value in bound[one].items()}


def mean_size(values: Sequence[torch.Tensor]) -> float:
    """Mean absolute value of the entries of all tensors."""
    return float(torch.cat([one.double().abs().flatten() for one in values]).mean())
