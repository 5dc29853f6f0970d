"""The start-up check: forests compared with plain forwards on the processor's own output.

Two records are made, one with two images of different sizes and one with a third. Their truth is a
plain forward of the model over everything that its processor returns for prompt and response, with
eager attention. What the language model receives there is compared part by part with what it
receives in a forest: token columns, image features, positions and masks. So a message names the
part that differs. Finally the log-probs are compared, with the attention of the run.

Bounds come from the model's own rounding: the truth is computed again with inputs that differ by
one unit in the last place.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from realign.data.errors import RecordError, short_error
from realign.data.images import StoredImage
from realign.data.records import Record
from realign.distributed import broadcast_from_rank0
from realign.modeling import layouts
from realign.modeling.chat import ChatTemplate, TextInputs
from realign.modeling.encode import encode_records
from realign.modeling.examples import Example
from realign.modeling.forest import ForestBatch, build_batch
from realign.modeling.images import ImageStore, bundle_of, columns_of, moved
from realign.modeling.layouts import TESTED, Layout, repeated
from realign_kernels import objectives

if TYPE_CHECKING:
    from realign.modeling.model import ForestModel

_SIZES = ((224, 224), (160, 320), (320, 160))  # width, height
_QUESTIONS = {1: "What is in the image?", 2: "First <image> and then <image> is left or right?"}
_ANSWERS = ("one red dot", "two small blue dots")
_NOISES = 16
"""Largest accepted difference, as a multiple of the model's own rounding."""
_LEAST = {torch.float32: 1e-3, torch.bfloat16: 0.02}
"""Accepted mean difference per token, also if the rounding is smaller."""
_LEAST_OF_RECORD = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""Accepted mean difference per token between a shared copy of a prompt and separate ones."""
_LEAST_OF_FEATURES = 1e-3
"""The same for what the language model receives, relative to its mean."""


class _Differs(Exception):
    """A part of a forest differs from the truth.

    Attributes:
        shared_only: whether separate copies of the prompt may still be right.
        of_images: whether the part is the output of the vision tower.
    """

    def __init__(self, what: str, shared_only: bool = False, of_images: bool = False) -> None:
        super().__init__(what)
        self.shared_only, self.of_images = shared_only, of_images


@dataclass
class _Seen:
    """What a language model receives in a forward.

    Attributes:
        inputs: tensors by name of the parameter.
        positions: positions by name of the rotary embedding.
        masks: masks by index of the layer, True where a query sees a key, (R, 1, T, T).
    """

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    positions: dict[str, torch.Tensor] = field(default_factory=dict)
    masks: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Truth:
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
    seen: _Seen
    logps: torch.Tensor


def run(
    model: ForestModel, example: Example, store: ImageStore, device: torch.device
) -> Iterator[str]:
    """Compare forests with plain forwards. See `ForestModel.check_forest`."""
    kind = model.vlm.config.model_type
    _check_trained(model)
    training = model.vlm.training
    model.vlm.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            gap, lines = _gap(model, store, device)
            yield from lines
            yield from _first_record(model, example, store, device)
    except (AttributeError, IndexError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or kind in TESTED:
            raise
        raise _refusal(kind, f"its start-up check failed: {short_error(error)}") from error
    finally:
        model.vlm.train(training)
    if kind not in TESTED:
        yield (
            f"models of type {kind!r} are untested: log-probs of a forest differ from plain "
            f"forwards by {gap:.1g} per token"
        )
    if not model.layout.shares_prefix:
        yield f"each response gets its own copy of the prompt: {model.layout.separate}"


def _refusal(kind: str, what: str) -> ValueError:
    return ValueError(
        f"models of type {kind!r} are not trained: {what}. Use a model of a tested type "
        f"({', '.join(sorted(TESTED))}), or its processor of the same version."
    )


def _check_trained(model: ForestModel) -> None:
    """Check that no parameter of a frozen tower is trained."""
    names = {p: name for name, p in model.vlm.named_parameters()}
    for parameter in model.frozen_parameters():
        if parameter.requires_grad:
            raise ValueError(
                f"{names[parameter]} is trained, and belongs to a part that is frozen. Pass "
                "--train-vision to train the vision tower."
            )


def _gap(model: ForestModel, store: ImageStore, device: torch.device) -> tuple[float, list[str]]:
    """Mean difference per token between forests and the truth, and lines about deviations.

    Raises:
        ValueError: when they differ by more than rounding.
    """
    kind, layout, lines = model.vlm.config.model_type, model.layout, []
    records, examples, own = _examples(store)
    _check_names(model, own, records)
    with _attends(model, "eager"), _of_processor(kind):
        truths, noise = _truths(model, own, records, examples, device)
    while True:
        shared = layout.shares_prefix
        if own.layout.one_by_one != layout.one_by_one:
            records, examples, own = _examples(store)
        batch = build_batch(examples, own, row_tokens=1 << 30, shared=shared).to(device)
        try:
            with _attends(model, "eager"), _joint_errors(layout):
                _compare_parts(model, batch, truths, noise)
            found = _logps(model, batch)
            gap = _mean([found[t.leaf] - t.logps.to(found[t.leaf].device) for t in truths])
            if not gap <= max(_LEAST[model.dtype], _NOISES * noise.logps):
                raise _Differs(
                    f"log-probs with {model.attention} attention differ from plain forwards by "
                    f"{gap:.2g} per token, and rounding is {noise.logps:.1g}",
                    shared_only=True,
                )
            failed = None
        except _Differs as error:
            failed = error
        # Rounding may differ between ranks, so rank 0 decides.
        failed = broadcast_from_rank0(lambda outcome=failed: outcome)
        if failed is None:
            return gap, lines
        if failed.of_images and not layout.one_by_one:
            layout.one_by_one = True
            lines.append(f"images pass the vision tower one by one: {failed}")
        elif failed.shared_only and shared:
            layout.separate = str(failed)
        else:
            raise _refusal(kind, str(failed))


def _first_record(
    model: ForestModel, example: Example, store: ImageStore, device: torch.device
) -> Iterator[str]:
    """Compare a forest of the data set with separate copies of its prompt."""
    layout = model.layout
    if not layout.shares_prefix:
        return
    shared = build_batch([example], store, row_tokens=example.longest_tree)
    separate = build_batch([example], store, row_tokens=0, shared=False)
    change = model.logps(shared.to(device)) - model.logps(separate.to(device))
    local_gap = float(change.abs().mean())
    gap = broadcast_from_rank0(lambda: local_gap)
    if not gap <= _LEAST_OF_RECORD[model.dtype]:
        layout.separate = (
            f"with a shared copy, log-probs of record {example.name!r} differ by {gap:.2g} per "
            "token"
        )
    yield from ()


def _examples(store: ImageStore) -> tuple[list[Record], Sequence[Example], ImageStore]:
    """Records of two images and of one, or of one image each if the template takes no more."""
    images = [_image(size, seed) for seed, size in enumerate(_SIZES)]
    try:
        return _encoded(store, [images[:2], images[2:]])
    except RecordError:
        return _encoded(store, [images[:1], images[1:2]])


def _encoded(
    store: ImageStore, images: Sequence[Sequence[StoredImage]]
) -> tuple[list[Record], Sequence[Example], ImageStore]:
    records = [
        Record(
            f"check {index}",
            ({"role": "user", "content": _QUESTIONS[len(shown)]},),
            *_ANSWERS,
            tuple(shown),
        )
        for index, shown in enumerate(images)
    ]
    examples, own = encode_records(
        records,
        store.processor,
        objectives.dpo(),
        layout=store.layout,
        max_response_tokens=1 << 20,
        max_tokens=1 << 20,
        progress=False,
    )
    return records, examples, own


def _image(size: tuple[int, int], seed: int) -> StoredImage:
    """An image of colored noise over a ramp."""
    width, height = size
    random = np.random.default_rng(seed)
    ramp = np.linspace(0, 160, width)[None, :, None] * random.random(3)
    noise = random.integers(0, 96, (height, width, 3))
    return StoredImage.from_pil(Image.fromarray((ramp + noise).astype(np.uint8)))


def _check_names(model: ForestModel, store: ImageStore, records: Sequence[Record]) -> None:
    """Check that every output of the processor that the model takes is passed on."""
    layout, kind = store.layout, model.vlm.config.model_type
    accepted = layouts.parameters(model.vlm.model, "forward")
    accepted |= layouts.parameters(model.vlm.model, "get_image_features")
    for record in records:
        text = ChatTemplate(store.processor).prompt(record.prompt, len(record.images)).text
        outputs = _processed(store.processor, record, text)
        bundle, columns = bundle_of(outputs, layout), columns_of(outputs, layout)
        passed = layout.tower_inputs | {*layout.grids}
        for name in accepted & (outputs.keys() - {"input_ids", "attention_mask", "labels"}):
            if name not in (layout.accepts if name in columns else passed):
                raise _refusal(kind, f"its processor returns {name!r}, which is not passed on")
        for name in layout.tower_inputs & outputs.keys():
            if name not in bundle:
                form = type(outputs[name]).__name__
                raise _refusal(kind, f"its processor returns {name!r} as a {form}, not a tensor")


def _processed(processor: Any, record: Record, text: str) -> dict[str, Any]:
    images = [image.open(record.name) for image in record.images]
    inputs = TextInputs(processor)([text])
    return dict(processor(images=[images], return_tensors="pt", **inputs))


@dataclass
class _Noise:
    """Mean effect of rounding: on log-probs, and relative on inputs of the language model."""

    logps: float
    inputs: dict[str, float]


def _truths(
    model: ForestModel,
    store: ImageStore,
    records: Sequence[Record],
    examples: Sequence[Example],
    device: torch.device,
) -> tuple[list[_Truth], _Noise]:
    """The truth for a response to each prompt, the second one first, and the rounding."""
    count = len(examples[0].leaves)
    truths = []
    for index, (record, example) in enumerate(zip(records, examples, strict=True)):
        place = (index + 1) % count
        inputs = _plain_inputs(model, store, record, example, place)
        prompt = len(example.roots[0].ids)
        with _recorded(model) as seen:
            logps = _plain(model, inputs, prompt, device)
        truths.append(_Truth(index * count + place, prompt, inputs, seen, logps))
    first = truths[0]
    with _rounding(model), _recorded(model) as seen:
        logps = _plain(model, first.inputs, first.prompt, device)
    inputs = {
        name: _mean([value - seen.inputs[name]]) / _scale(value)
        for name, value in first.seen.inputs.items()
        if value.is_floating_point()
    }
    return truths, _Noise(_mean([logps - first.logps]), inputs)


def _plain_inputs(
    model: ForestModel, store: ImageStore, record: Record, example: Example, place: int
) -> dict[str, torch.Tensor]:
    """Everything that the processor returns for a prompt with a response, (1, T) tokens.

    If it tokenizes them differently as one text, the tokens of the response are appended. Their
    columns continue with the last value, which is that of text.
    """
    processor, layout = store.processor, store.layout
    template = ChatTemplate(processor)
    prompt = template.prompt(record.prompt, len(record.images))
    root, leaf = example.roots[0], example.leaves[place]
    ids = torch.from_numpy(np.concatenate([root.ids, leaf.ids]))[None]
    scored = template.scored(prompt, _ANSWERS[place])
    outputs = _processed(processor, record, prompt.text + scored)
    if layout.both_ways == "prompt" or not torch.equal(outputs["input_ids"], ids):
        outputs = _processed(processor, record, prompt.text)
        if not np.array_equal(outputs["input_ids"][0], root.ids):
            raise _Differs("token ids of a prompt differ from those of the processor")
        for name, column in columns_of(outputs, layout).items():
            last = torch.ones_like(column) if layout.both_ways == "prompt" else column
            outputs[name] = torch.cat([column, last[:, -1:].expand(-1, len(leaf.ids))], 1)
        outputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    names = layouts.parameters(model.vlm, "forward") - {"labels"}
    names |= layouts.parameters(model.vlm.model, "forward")
    return {n: v for n, v in outputs.items() if n in names and isinstance(v, torch.Tensor)}


def _plain(
    model: ForestModel, inputs: dict[str, torch.Tensor], prompt: int, device: torch.device
) -> torch.Tensor:
    """Log-probs of the response in a plain forward, (R,) fp64."""
    ids = inputs["input_ids"][0, prompt:].to(device)
    logits = model.plain_logits(moved(inputs, device, model.dtype))[0, prompt - 1 : -1]
    return logits.double().log_softmax(-1).gather(1, ids[:, None])[:, 0]


def _logps(model: ForestModel, batch: ForestBatch) -> dict[int, torch.Tensor]:
    """Log-probs of each leaf of a forest by its index, (R,) fp64."""
    logps = model.logps(batch).double()
    leaves = int(batch.sequence_ids.max()) // batch.examples + 1
    return {
        example * leaves + leaf: logps[batch.sequence_ids == leaf * batch.examples + example]
        for leaf in range(leaves)
        for example in range(batch.examples)
    }


def _compare_parts(
    model: ForestModel, batch: ForestBatch, truths: Sequence[_Truth], noise: _Noise
) -> None:
    """Compare what the language model receives in a forest and in plain forwards.

    Raises:
        _Differs: for the first part that differs.
    """
    with _recorded(model) as forest:
        model.logps(batch)
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
            raise _Differs("token ids differ from those of the processor")
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
            raise _Differs(
                f"{what} differ in a forest: {self.name(at)} has {values[0]}, and {values[1]} in a "
                "plain forward",
                shared_only,
            )


def _compare_inputs(
    model: ForestModel,
    batch: ForestBatch,
    place: _Place,
    forest: _Seen,
    truth: _Truth,
    noise: _Noise,
    others: torch.Tensor,  # (tokens, H) embeddings of all image tokens in plain forwards
) -> None:
    """Compare embeddings and other tensors that the language model receives."""
    image = batch.input_ids == model.layout.image_token_id
    numbers = image.flatten().cumsum(0).view_as(image) - 1  # of image tokens, in row-major order
    own = image[place.row, place.columns]
    for name, expected in truth.seen.inputs.items():
        if name not in forest.inputs:
            raise _Differs(f"{name!r} does not reach the language model")
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
        scale = _scale(expected)
        bound = max(_LEAST_OF_FEATURES, _NOISES * noise.inputs.get(name, 0.0))
        for tokens, what in ((~of_images, "embeddings of text"), (of_images, "image features")):
            if not tokens.any():
                continue
            gap = _mean([found[tokens] - expected[tokens]]) / scale
            if not gap <= bound:
                gap = f"{what} ({name!r}) differ in a forest by {gap:.2g} of their size"
                if _in_other_places(found[tokens], others, bound * scale):
                    gap += ", and are those of other image tokens"
                raise _Differs(gap, of_images=tokens is of_images)


def _image_embeddings(model: ForestModel, truths: Sequence[_Truth]) -> torch.Tensor:
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
        raise _Differs(
            f"the attention mask of layer {layer} differs in a forest: {place.name(query)} {sees} "
            f"{place.name(key)}",
            shared_only=True,
        )
    if rows is not None and int(rows.sum()) != int(seen.sum()):
        raise _Differs(
            f"in layer {layer}, tokens of a forest see other responses or prompts", shared_only=True
        )


@contextmanager
def _of_processor(kind: str) -> Iterator[None]:
    """Name the processor in errors of a plain forward."""
    try:
        yield
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"a plain forward of the model of type {kind!r} fails on what its processor returns "
            f"({short_error(error)}). The processor does not belong to this model, or not in this "
            "version. Check its patch_size, vision_feature_select_strategy, "
            "num_additional_image_tokens and image size."
        ) from error


@contextmanager
def _joint_errors(layout: Layout) -> Iterator[None]:
    """Turn errors of a tower that gets several images in one call into `_Differs`."""
    try:
        yield
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if layout.one_by_one or isinstance(error, torch.OutOfMemoryError):
            raise
        raise _Differs(
            f"with several images, the vision tower fails ({short_error(error)})", of_images=True
        ) from error


@contextmanager
def _attends(model: ForestModel, implementation: str) -> Iterator[None]:
    """Set the attention implementation of the language model."""
    config = model.vlm.model.get_decoder().config
    before = model.attention, config._attn_implementation
    model.attention = config._attn_implementation = implementation
    try:
        yield
    finally:
        model.attention, config._attn_implementation = before


@contextmanager
def _recorded(model: ForestModel) -> Iterator[_Seen]:
    """Record what the language model receives in a forward."""
    decoder, seen = model.vlm.model.get_decoder(), _Seen()

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


@contextmanager
def _rounding(model: ForestModel) -> Iterator[None]:
    """Change the outputs of all layers, and what the language model receives, by rounding."""
    half = torch.finfo(model.dtype).eps / 2
    random: dict[torch.device, torch.Generator] = {}

    def changed(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(changed(one) for one in value[:1]) + value[1:]
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        generator = random.setdefault(value.device, torch.Generator(value.device).manual_seed(0))
        up = torch.empty_like(value).bernoulli_(0.5, generator=generator)
        return value * (1 + half * (2 * up - 1))

    with ExitStack() as stack:
        for layer in model.layers:
            handle = layer.register_forward_hook(lambda _, args, output: changed(output))
            stack.callback(handle.remove)
        yield


def _mean(differences: Sequence[torch.Tensor]) -> float:
    return float(torch.cat([one.double().abs().flatten() for one in differences]).mean())


def _scale(value: torch.Tensor) -> float:
    return max(float(value.double().abs().mean()), 1e-30)
