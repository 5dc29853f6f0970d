"""Image inputs of a model: bundles of the processor, their batches, and features of each image.

The output of a processor for one image is a *bundle*, a dict of tensors. It holds pixels, tiles or
patches, and in some families sizes, grids or masks. A batch concatenates the bundles of its
distinct images. The output of the vision tower is split by image again, and placed in the prompts.
"""

from __future__ import annotations

import copy
import inspect
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import PreTrainedModel

from realign.data.errors import RecordError, short_error
from realign.data.images import ImageError, StoredImage, digest_of_bytes
from realign.data.record_table import ImageFacts, RecordTable
from realign.modeling.examples import BLANK, COLUMNS, Chunk, Examples, Root, UsedImage, key_array
from realign.modeling.layouts import Layout, parameters
from realign.modeling.prefetch import Copies
from realign_kernels import refcache

Bundle = dict[str, torch.Tensor]
"""Output of the processor for one image, by the argument names of `get_image_features`."""

Features = dict[str, torch.Tensor]
"""Output of the vision tower for one image, by name (`features`)."""

_OF_TOKENS = ("input_ids", "attention_mask", "labels")
_SEVERAL = "batch_num_images"  # LLaVA-OneVision cuts tiles only for a prompt's single image
_PIXELS = "pixel_values"
_DEEPER = "deepstack_features"
_KNOWN_FIELDS = {"last_hidden_state", "pooler_output", "hidden_states", "attentions", _DEEPER}


@dataclass(frozen=True)
class Images:
    """The I distinct images of a batch.

    Attributes:
        calls: arguments of `get_image_features`: one call for all images, or one for each.
        rows: number of rows of pixels for each output, if there is one call.
        order: for each image, the index of its output.
        tokens: number of tokens of each image in a prompt.
    """

    calls: tuple[Bundle, ...]
    rows: tuple[int, ...]
    order: tuple[int, ...]
    tokens: tuple[int, ...]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Images:
        """The same on `device`, with floating-point tensors in `dtype`."""
        calls = tuple(moved(inputs, device, dtype) for inputs in self.calls)
        return Images(calls, self.rows, self.order, self.tokens)


def moved(
    inputs: Mapping[str, torch.Tensor], device: torch.device | str, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Tensors on `device`, those of floating point in `dtype`."""
    return {
        name: value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
        for name, value in inputs.items()
    }


def one_by_one(bundles: Sequence[Bundle], tokens: Sequence[int]) -> Images:
    """A batch whose images pass the tower one by one, as the processor returned them."""
    return Images(tuple(bundles), (), tuple(range(len(bundles))), tuple(tokens))


def collate(bundles: Sequence[Bundle], tokens: Sequence[int]) -> Images:
    """Concatenate bundles along the first axis, zero-padded to the largest size on other axes.

    Images without tiles come last, and at least two, since the model identifies them by `_SEVERAL`.
    """
    several = [_of_several(bundle) for bundle in bundles]
    placed = sorted(range(len(bundles)), key=several.__getitem__)
    order = [0] * len(bundles)
    for output, image in enumerate(placed):
        order[image] = output
    if sum(several) == 1:
        placed.append(placed[-1])
    ordered = [bundles[image] for image in placed]
    inputs = {name: _stack([bundle[name] for bundle in ordered]) for name in ordered[0]}
    if _SEVERAL in inputs:
        without_tiles = [1] * (len(several) - sum(several))
        with_tiles = [len(ordered) - len(without_tiles)] if any(several) else []
        inputs[_SEVERAL] = torch.tensor(without_tiles + with_tiles)
    pixels = next(name for name in ordered[0] if name.startswith(_PIXELS))
    rows = tuple(len(bundle[pixels]) for bundle in ordered)
    return Images((inputs,), rows, tuple(order), tuple(tokens))


def _of_several(bundle: Bundle) -> bool:
    return _SEVERAL in bundle and int(bundle[_SEVERAL]) > 1


def _stack(values: Sequence[torch.Tensor]) -> torch.Tensor:
    largest = [max(sizes) for sizes in zip(*(v.shape[1:] for v in values), strict=True)]

    def padded(value: torch.Tensor) -> torch.Tensor:
        padding = [(0, size - n) for size, n in zip(largest, value.shape[1:], strict=True)]
        return F.pad(value, [n for pair in reversed(padding) for n in pair])

    return torch.cat([padded(value) for value in values])


def features(vlm: PreTrainedModel, images: Images, *, calls: int = 0) -> list[Features]:
    """Compute the features of each image by the vision tower, in order: tensors of (tokens, H).

    Their name is "list" or "tensor", after the form in which the model takes several images.
    Further features for layers of the language model are "deepstack.0", ..., and other fields that
    the model reads, equal for all images, are "shared.NAME".

    Args:
        vlm: the model.
        images: the images.
        calls: minimum number of calls of the tower. The last image is repeated for them, so that
            all ranks make the same number.

    Raises:
        ValueError: when an image has more or fewer features than tokens in a prompt.
    """
    model = vlm.model
    accepted = parameters(model, "get_image_features")
    given = [*images.calls, *images.calls[-1:] * (calls - len(images.calls))]
    outputs = [
        model.get_image_features(**{n: v for n, v in inputs.items() if n in accepted})
        for inputs in given
    ]
    output, several = outputs[0], len(images.calls) > 1 or not images.rows
    kind = "tensor" if isinstance(output.pooler_output, torch.Tensor) else "list"
    found = [_named(one, kind) for one in outputs]
    parts = {
        name: (
            [_whole(one[name]) for one in found[: len(images.calls)]]
            if several
            else _by_image(found[0][name], images)
        )
        for name in found[0]
    }
    for rows, expected in zip(parts[kind], images.tokens, strict=True):
        if len(rows) != expected:
            raise ValueError(
                f"an image takes {expected} image tokens in a prompt, and the model of type "
                f"{vlm.config.model_type!r} produces {len(rows)} image features. If the model is "
                "not of a tested type (docs/families.md), its images are in an unknown form. Else "
                "the processor does not belong to this model. Check its patch_size, "
                "vision_feature_select_strategy, num_additional_image_tokens and image size."
            )
    read = inspect.unwrap(type(model).forward).__code__.co_names
    shared = {
        name: value
        for name, value in vars(output).items()
        if name in read and name not in _KNOWN_FIELDS and isinstance(value, torch.Tensor)
    }
    for extra in found[len(images.calls) :]:  # backward must run through every call
        parts[kind][-1] = parts[kind][-1] + 0 * _whole(extra[kind]).sum()
    per_image = zip(*parts.values(), strict=True)
    return [
        dict(zip(parts, one, strict=True)) | {f"shared.{n}": v.clone() for n, v in shared.items()}
        for one in per_image
    ]


def _named(output: Any, kind: str) -> dict[str, Any]:
    """The features in an output by name."""
    deeper = getattr(output, _DEEPER, None) or ()
    return {kind: output.pooler_output} | {f"deepstack.{i}": one for i, one in enumerate(deeper)}


def _by_image(
    output: torch.Tensor | Sequence[torch.Tensor],  # (rows, tokens, H), or I of (..., H)
    images: Images,
) -> list[torch.Tensor]:
    """Features of each image, (tokens, H), in the order of the images."""
    parts = output.split(images.rows) if isinstance(output, torch.Tensor) else output
    return [parts[place].flatten(0, -2) for place in images.order]


def _whole(output: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """All features of an output for one image, (tokens, H)."""
    parts = [output] if isinstance(output, torch.Tensor) else output
    return torch.cat([part.flatten(0, -2) for part in parts])


def in_slots(images: Sequence[Features], slots: Sequence[int]) -> SimpleNamespace:
    """Features for every image place, in the form that `get_image_features` returns."""
    shared = {n.removeprefix("shared."): f for n, f in images[0].items() if n.startswith("shared.")}
    names = [name for name in images[0] if not name.startswith("shared.")]
    placed = {name: [images[image][name] for image in slots] for name in names}
    pooled = placed.pop("list", None)
    if pooled is None:
        pooled = torch.cat(placed.pop("tensor"))[None]
    deeper = {_DEEPER: list(placed.values())}
    return SimpleNamespace(pooler_output=pooled, **deeper, **shared)


@dataclass(frozen=True)
class SizeFacts:
    """Facts of all images of one size in a prompt.

    Attributes:
        tokens: image tokens of an image.
        grids: the image inputs that the language model depends on (`flat_grids`).
    """

    tokens: int
    grids: tuple[int, ...]


def flat_grids(bundle: Bundle, names: Sequence[str]) -> tuple[int, ...]:
    """The tensors of a bundle with these names, as whole numbers.

    Each is written as the index of its name, its number of axes, their sizes, and its values.
    """
    flat: list[int] = []
    for index, name in enumerate(names):
        if name in bundle:
            value = bundle[name]
            flat += [index, value.ndim, *value.shape, *value.flatten().tolist()]
    return tuple(flat)


def unflat_grids(flat: Sequence[int], names: Sequence[str]) -> Bundle:
    """The inverse of `flat_grids`."""
    found, at = {}, 0
    while at < len(flat):
        name, axes = names[flat[at]], flat[at + 1]
        shape = flat[at + 2 : at + 2 + axes]
        at += 2 + axes
        size = math.prod(shape)
        found[name] = torch.tensor(flat[at : at + size], dtype=torch.int64).view(*shape)
        at += size
    return found


def image_key(facts: ImageFacts, several: bool) -> bytes:
    """Key of a preprocessed image: that of its bytes, or different if its prompt has several."""
    return digest_of_bytes(facts.key + b"several") if several else facts.key


def blank_key(facts: ImageFacts, several: bool) -> bytes:
    """Key of a blank image of the size of an image."""
    return digest_of_bytes(f"blank {facts.width} {facts.height} {several}".encode())


def cuts_tiles(processor) -> bool:
    """Whether several images in a prompt are processed differently from a single one."""
    return _SEVERAL in processor.image_processor.model_input_names


def preprocess(
    processor, layout: Layout, record: str, image: Image.Image, several: bool
) -> tuple[Bundle, SizeFacts]:
    """Preprocess an image in a prompt of its own.

    Args:
        processor: a Hugging Face processor.
        layout: layout of the processor's model.
        record: name of its record, for error messages.
        image: an RGB image.
        several: whether the image is processed as one of several, for families with tiles.

    Returns:
        The bundle, and the facts that it has in common with all images of its size.

    Raises:
        RecordError: when the processor raises any error.
    """
    count = 2 if several else 1
    text = processor.image_token * count
    outputs = processed(processor, record, [image] * count, text=[text])
    tokens = int((outputs["input_ids"] == layout.image_token_id).sum()) // count
    bundle = bundle_of(outputs, layout)
    if several:  # both copies are equal, so one is kept
        bundle = {name: value[:1] for name, value in bundle.items()}
        bundle[_SEVERAL] = torch.tensor([count])
    return bundle, SizeFacts(tokens, flat_grids(bundle, layout.grids))


class ImageStore:
    """The distinct images of encoded examples, decoded and preprocessed when they are needed.

    Workers are threads, since Pillow and numpy release the interpreter's lock while they compute.
    Each has a copy of the image processor. Preprocessed images are kept up to `cache_bytes`. They
    are never evicted. An epoch reads all images in turn. A cache of the latest images finds none
    again if it is slightly too small.

    Args:
        processor: a Hugging Face processor.
        layout: layout of the processor's model.
        examples: the encoded examples.
        workers: threads that decode and preprocess the images of a batch. 0 uses the thread that
            builds the batch.
        cache_bytes: size of the cache of preprocessed images. None means `CACHE_BYTES`.

    Attributes:
        layout: layout of the processor's model.
        processor: the processor.
        features: outputs of the vision tower by key, which batches hold instead of pixels. If
            None, every forward computes them.
        text_only: whether any example has no image.
    """

    CACHE_BYTES = 256 << 20

    def __init__(
        self,
        processor,
        layout: Layout,
        examples: Examples,
        *,
        workers: int = 0,
        cache_bytes: int | None = None,
    ) -> None:
        self.layout, self.processor = layout, processor
        self.features: Mapping[str, Features] | None = None
        shared = copy.copy(processor)
        shared.tokenizer = _OneAtATime(processor.tokenizer)
        self._processors = Copies(shared)
        self._chunks = examples.chunks
        numbers = [np.diff(chunk.images.offsets.to_numpy()) for chunk in self._chunks]
        self.text_only = any(not number.all() for number in numbers)
        self._bundles: dict[str, Bundle] = {}
        self._room = self.CACHE_BYTES if cache_bytes is None else cache_bytes
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(workers, "images") if workers else None
        # Places of all images, in the order of their first use.
        chunks = [np.full(len(c.images.values), i, np.int32) for i, c in enumerate(self._chunks)]
        keys = [key_array(chunk.images.values.field("key")) for chunk in self._chunks]
        self._sorted, first = np.unique(
            np.concatenate([*keys, np.zeros(0, refcache.KEY)]).view("S16"), return_index=True
        )
        starts = np.append(0, np.cumsum([len(part) for part in chunks], dtype=np.int64))
        self._chunk_of = np.concatenate([*chunks, np.zeros(0, np.int32)])[first]
        self._place_of = first - starts[self._chunk_of]
        self._order = np.argsort(first, kind="stable")

    def __len__(self) -> int:
        return len(self._sorted)

    def keys(self) -> Iterator[str]:
        """Keys of all images, in the order of their first use."""
        return (bytes(key).hex() for key in self._sorted.view(refcache.KEY)[self._order])

    def _used(self, key: str) -> tuple[Chunk, int, UsedImage]:
        """The chunk, index of the record in it, and the place of an image."""
        number = int(np.searchsorted(self._sorted, np.bytes_(bytes.fromhex(key))))
        chunk, place = self._chunks[self._chunk_of[number]], int(self._place_of[number])
        index = int(np.searchsorted(chunk.images.offsets.to_numpy(), place, "right")) - 1
        fields = chunk.images.values[place].as_py()
        return chunk, index, UsedImage(**fields | {"grids": tuple(fields["grids"])})

    def tokens(self, key: str) -> int:
        """Number of tokens of the image in a prompt."""
        return self._used(key)[2].tokens

    def grids(self, keys: Sequence[str]) -> Bundle:
        """The image inputs that the language model depends on, concatenated."""
        names = self.layout.grids
        found = [unflat_grids(self._used(key)[2].grids, names) for key in keys] if names else []
        return {name: torch.cat([one[name] for one in found]) for name in (found or [{}])[0]}

    def bundle(self, key: str) -> Bundle:
        """The preprocessed image. Thread-safe.

        Raises:
            RecordError: when the image cannot be decoded, is missing, or has changed since the
                records were checked.
        """
        held = self._bundles.get(key)
        if held is not None:
            return held
        bundle = self._make(key)
        size = _bytes(bundle)
        with self._lock:
            if key not in self._bundles and size <= self._room:
                self._bundles[key] = bundle
                self._room -= size
        return bundle

    def with_images_of(self, other: ImageStore) -> ImageStore:
        """This store, with the preprocessed images of another one."""
        self._bundles, self._room = other._bundles, other._room
        return self

    def first(self) -> Images | None:
        """A batch of the first image, if there is any."""
        return self.batch([next(self.keys())]) if len(self) else None

    @cached_property
    def spare(self) -> Root | None:
        """The shortest prompt with an image among the first examples, if there is any."""
        for chunk in self._chunks if self.text_only else ():
            lengths = np.where(chunk.image_tokens > 0, chunk.root_lengths, np.inf)
            if np.isfinite(lengths).any():  # an example has one root, for its own images
                return next(chunk.roots(int(lengths.argmin()), self.layout.image_token_id))
        return None

    def batch(self, keys: Sequence[str]) -> Images:
        """A batch of distinct images."""
        make = map if self._pool is None else self._pool.map
        join = one_by_one if self.layout.one_by_one else collate
        return join(list(make(self.bundle, keys)), [self.tokens(key) for key in keys])

    def _make(self, key: str) -> Bundle:
        chunk, index, used = self._used(key)
        record = chunk.name(index)
        row = chunk.table[chunk.row(index)]
        column = COLUMNS[used.column]
        if column == BLANK:
            facts = row.images[used.place]
            image, named = Image.new("RGB", (facts.width, facts.height)), "blank image"
        else:
            facts = getattr(row, column)[used.place]
            image, named = _opened(chunk.table, facts, record), facts.path or "in the pairs file"
        with self._processors.borrow() as processor:
            bundle, found = preprocess(processor, self.layout, record, image, used.several)
        if found != SizeFacts(used.tokens, used.grids):
            raise RecordError(
                record,
                f"its image {named} takes {found.tokens} image tokens, and a blank image of its "
                f"size {used.tokens}.",
                "The processor depends on pixels, which is not supported.",
            )
        if not all(value.isfinite().all() for value in bundle.values()):
            raise RecordError(
                record,
                f"its image {named} has NaN or infinity after preprocessing.",
                "Check the image, and mean and std in the model's preprocessor_config.json.",
            )
        return bundle


class _OneAtATime:
    """A tokenizer that threads share. Copies of Qwen's would take 100 MB each."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._lock = tokenizer, threading.Lock()

    def __call__(self, *args: Any, **options: Any) -> Any:
        with self._lock:
            return self._tokenizer(*args, **options)

    def __deepcopy__(self, memo: Any) -> _OneAtATime:
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def _opened(table: RecordTable, facts: ImageFacts, record: str) -> Image.Image:
    """Decode an image, whose bytes must not have changed."""
    try:
        return table.image(facts).open(record)
    except ImageError as error:
        if error.reason != "changed":
            raise StoredImage(path=facts.path).named(error, record) from error
        raise RecordError(
            record,
            f"its image {facts.path or 'in the pairs file'} has changed since the records were "
            "checked.",
            "Do not change image files during a run.",
        ) from error


def processed(
    processor, record: str, images: Sequence[Image.Image], **inputs: Any
) -> Mapping[str, torch.Tensor]:
    """Call a processor on the images of one prompt, which may have none.

    Raises:
        RecordError: when the processor raises any error.
    """
    try:
        return processor(**given(images), return_tensors="pt", **inputs)
    except Exception as error:  # image processors raise errors of various types
        sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
        which = f"with image(s) of {sizes} pixels" if images else "without an image"
        raise RecordError(
            record,
            f"the processor cannot process its prompt {which} ({short_error(error)}).",
            f"{'Replace the' if images else 'Add an'} image, or remove the record.",
        ) from error


def given(images: Sequence[Image.Image]) -> dict[str, Any]:
    """The argument of a processor for the images of one prompt; none if it has no image."""
    return {"images": [[*images]]} if images else {}


def bundle_of(outputs: Mapping[str, torch.Tensor], layout: Layout | None = None) -> Bundle:
    """The image inputs among the outputs of a processor, or of an image processor."""
    columns = {} if layout is None else columns_of(outputs, layout)
    return {
        name: value
        for name, value in outputs.items()
        if name not in _OF_TOKENS and name not in columns and isinstance(value, torch.Tensor)
    }


def columns_of(outputs: Mapping[str, torch.Tensor], layout: Layout) -> dict[str, torch.Tensor]:
    """The token columns among the outputs of a processor: integers shaped like `input_ids`."""
    return {
        name: value
        for name, value in outputs.items()
        if name not in _OF_TOKENS
        and name not in layout.tower_inputs
        and isinstance(value, torch.Tensor)
        and not value.is_floating_point()
        and value.shape == outputs["input_ids"].shape
    }


def _bytes(bundle: Bundle) -> int:
    return sum(value.nbytes for value in bundle.values())
