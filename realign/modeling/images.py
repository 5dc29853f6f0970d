"""Image inputs of a model: bundles of the processor, their batches, and features of each image.

The output of a processor for one image is a *bundle*, a dict of tensors. It holds pixels, tiles or
patches, and in some families sizes, grids or masks. A batch concatenates the bundles of its
distinct images. The output of the vision tower is split by image again, and placed in the prompts.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import PreTrainedModel

from realign.data.errors import RecordError, short_error
from realign.data.images import StoredImage
from realign.modeling.layouts import Layout
from realign_kernels import array_digest

Bundle = dict[str, torch.Tensor]
"""Output of the processor for one image, by the argument names of `get_image_features`."""

Features = dict[str, torch.Tensor]
"""Output of the vision tower for one image, by name (`features`)."""

_OF_TOKENS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels"}
_SEVERAL = "batch_num_images"  # LLaVA-OneVision cuts tiles only for a prompt's single image


@dataclass(frozen=True)
class Images:
    """The I distinct images of a batch.

    Attributes:
        inputs: arguments of `get_image_features`.
        rows: number of rows of `pixel_values` for each output.
        order: for each image, the index of its output.
        tokens: number of tokens of each image in a prompt.
    """

    inputs: Bundle
    rows: tuple[int, ...]
    order: tuple[int, ...]
    tokens: tuple[int, ...]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Images:
        """The same on `device`, with floating-point tensors in `dtype`."""
        moved = {
            name: value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
            for name, value in self.inputs.items()
        }
        return Images(moved, self.rows, self.order, self.tokens)


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
    rows = tuple(len(bundle["pixel_values"]) for bundle in ordered)
    return Images(inputs, rows, tuple(order), tuple(tokens))


def _of_several(bundle: Bundle) -> bool:
    return _SEVERAL in bundle and int(bundle[_SEVERAL]) > 1


def _stack(values: Sequence[torch.Tensor]) -> torch.Tensor:
    largest = [max(sizes) for sizes in zip(*(v.shape[1:] for v in values), strict=True)]

    def padded(value: torch.Tensor) -> torch.Tensor:
        padding = [(0, size - n) for size, n in zip(largest, value.shape[1:], strict=True)]
        return F.pad(value, [n for pair in reversed(padding) for n in pair])

    return torch.cat([padded(value) for value in values])


def features(vlm: PreTrainedModel, images: Images) -> list[Features]:
    """Compute the features of each image by the vision tower, in order: tensors of (tokens, H).

    Their name is "list" or "tensor", after the form in which the model takes several images.
    Further features for layers of the language model are "deepstack.0", ...

    Raises:
        ValueError: when an image has more or fewer features than tokens in a prompt.
    """
    output = vlm.model.get_image_features(**images.inputs)
    kind = "tensor" if isinstance(output.pooler_output, torch.Tensor) else "list"
    parts = {kind: _by_image(output.pooler_output, images)}
    for level, deeper in enumerate(getattr(output, "deepstack_features", None) or ()):
        parts[f"deepstack.{level}"] = _by_image(deeper, images)
    for rows, expected in zip(parts[kind], images.tokens, strict=True):
        if len(rows) != expected:
            raise ValueError(
                f"an image takes {expected} image tokens in a prompt, and the model produces "
                f"{len(rows)} image features. The processor does not belong to this model. Check "
                "its patch_size, vision_feature_select_strategy, num_additional_image_tokens and "
                "image size."
            )
    return [dict(zip(parts, one, strict=True)) for one in zip(*parts.values(), strict=True)]


def _by_image(
    output: torch.Tensor | Sequence[torch.Tensor],  # (rows, tokens, H), or I of (..., H)
    images: Images,
) -> list[torch.Tensor]:
    """Features of each image, (tokens, H), in the order of the images."""
    parts = output.split(images.rows) if isinstance(output, torch.Tensor) else output
    return [parts[place].flatten(0, -2) for place in images.order]


def in_slots(images: Sequence[Features], slots: Sequence[int]) -> SimpleNamespace:
    """Features for every image place, in the form that `get_image_features` returns."""
    placed = {name: [images[image][name] for image in slots] for name in images[0]}
    pooled = placed.pop("list", None)
    if pooled is None:
        pooled = torch.cat(placed.pop("tensor"))
    return SimpleNamespace(pooler_output=pooled, deepstack_features=list(placed.values()))


class ImageStore:
    """The distinct preprocessed images of a data set.

    Args:
        processor: a Hugging Face processor.
        layout: layout of the processor's model.
        cache_bytes: size of the cache of preprocessed images. The least recently used image is
            evicted first, and preprocessed again when needed.

    Attributes:
        features: outputs of the vision tower by key, which batches hold instead of pixels. If
            None, every forward computes them.
    """

    CACHE_BYTES = 1 << 30

    def __init__(self, processor, layout: Layout, cache_bytes: int = CACHE_BYTES) -> None:
        self.layout = layout
        self.features: Mapping[str, Features] | None = None
        self._processor = processor
        self._sources: dict[str, tuple[str, StoredImage, bool]] = {}
        self._tokens: dict[str, int] = {}
        self._grids: dict[str, Bundle] = {}
        self._bundles: OrderedDict[str, Bundle] = OrderedDict()
        self._room = cache_bytes
        self._lock = (
            threading.Lock()
        )  # batches are built in threads; processors are not thread-safe

    def __len__(self) -> int:
        return len(self._sources)

    def keys(self) -> Iterable[str]:
        """Keys of all images, in the order of their first use."""
        return self._sources.keys()

    def add(self, record: str, stored: StoredImage, several: bool = False) -> str:
        """Add an image. Returns its key, the digest of its bundle.

        Args:
            record: name of its record, for error messages.
            stored: the image.
            several: whether its prompt has several images.
        """
        several = several and _SEVERAL in self._processor.image_processor.model_input_names
        bundle, tokens = self._make(record, stored, several)
        return self.keep(record, stored, bundle, tokens, several)

    def keep(
        self, record: str, stored: StoredImage, bundle: Bundle, tokens: int, several: bool = False
    ) -> str:
        """Add a preprocessed image with `tokens` tokens in a prompt. Returns its key.

        Raises:
            RecordError: when a value is NaN or infinite.
        """
        if not all(value.isfinite().all() for value in bundle.values()):
            raise RecordError(
                record,
                f"its image {stored.path or 'in the pairs file'} has NaN or infinity after "
                "preprocessing.",
                "Check the image, and mean and std in the model's preprocessor_config.json.",
            )
        key = digest(bundle)
        self._sources.setdefault(key, (record, stored, several))
        self._tokens[key] = tokens
        self._grids[key] = {n: t for n, t in bundle.items() if n in self.layout.grids}
        self._hold(key, bundle)
        return key

    def tokens(self, key: str) -> int:
        """Number of tokens of the image in a prompt."""
        return self._tokens[key]

    def grids(self, keys: Sequence[str]) -> Bundle:
        """The image inputs that positions depend on, concatenated; empty for most families."""
        grids = [self._grids[key] for key in keys]
        return {name: torch.cat([grid[name] for grid in grids]) for name in (grids or [{}])[0]}

    def bundle(self, key: str) -> Bundle:
        """The preprocessed image. Thread-safe.

        Raises:
            RecordError: when its file is missing or has changed.
        """
        with self._lock:
            if key not in self._bundles:
                record, stored, several = self._sources[key]
                bundle, _ = self._make(record, stored, several)
                if digest(bundle) != key:
                    raise RecordError(
                        record,
                        f"its image {stored.path} has changed since the records were checked.",
                        "Do not change image files during a run.",
                    )
                self._hold(key, bundle)
            self._bundles.move_to_end(key)
            return self._bundles[key]

    def batch(self, keys: Sequence[str]) -> Images:
        """A batch of distinct images."""
        return collate([self.bundle(key) for key in keys], [self._tokens[key] for key in keys])

    def _make(self, record: str, stored: StoredImage, several: bool) -> tuple[Bundle, int]:
        """Preprocess an image in a prompt of its own. Returns bundle and number of tokens."""
        count = 2 if several else 1
        text = self._processor.image_token * count
        outputs = processed(self._processor, record, [stored.open(record)] * count, text=[text])
        tokens = int((outputs["input_ids"] == self.layout.image_token_id).sum()) // count
        bundle = bundle_of(outputs)
        if several:  # both copies are equal, so one is kept
            bundle = {name: value[:1] for name, value in bundle.items()}
            bundle[_SEVERAL] = torch.tensor([count])
        return bundle, tokens

    def _hold(self, key: str, bundle: Bundle) -> None:
        if key in self._bundles:
            return
        self._bundles[key] = bundle
        self._room -= _bytes(bundle)
        while self._room < 0 and len(self._bundles) > 1:
            _, old = self._bundles.popitem(last=False)
            self._room += _bytes(old)


def processed(
    processor, record: str, images: Sequence[Image.Image], **inputs: Any
) -> Mapping[str, torch.Tensor]:
    """Call a processor on the images of one prompt.

    Raises:
        RecordError: when the processor raises any error.
    """
    try:
        return processor(images=[[*images]], return_tensors="pt", **inputs)
    except Exception as error:  # image processors raise errors of various types
        sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
        raise RecordError(
            record,
            f"the processor cannot process its prompt with image(s) of {sizes} pixels "
            f"({short_error(error)}).",
            "Replace the image or remove the record.",
        ) from error


def bundle_of(outputs: Mapping[str, torch.Tensor]) -> Bundle:
    """The image inputs among the outputs of a processor for a prompt."""
    return {
        name: value
        for name, value in outputs.items()
        if name not in _OF_TOKENS and isinstance(value, torch.Tensor)
    }


def digest(bundle: Bundle) -> str:
    """128-bit digest of a bundle's tensors and their names."""
    named = "".join(f"{name} {array_digest(bundle[name].numpy())} " for name in sorted(bundle))
    return hashlib.blake2b(named.encode(), digest_size=16).hexdigest()


def _bytes(bundle: Bundle) -> int:
    return sum(value.nbytes for value in bundle.values())
