"""Images as a model takes them: what its processor makes of each, kept once and put together.

What a processor makes of one image is a *bundle*, a dict of tensors: pixels, tiles or patches, and
with some families sizes, grids or masks. A batch concatenates the bundles of its distinct images;
what the vision tower makes of them is split by image again, and put wherever an image stands.
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
from realign.data.pictures import StoredImage
from realign.modeling.layouts import Layout
from realign_kernels import array_digest

Bundle = dict[str, torch.Tensor]
"""What the processor makes of one image, by the names `get_image_features` takes."""

Features = dict[str, torch.Tensor]
"""What the vision tower makes of one image, by name (`features`)."""

_OF_TOKENS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels"}
_COMPANY = "batch_num_images"  # LLaVA-OneVision: tiles for the one image of a prompt, no others


@dataclass(frozen=True)
class Images:
    """The I distinct images of a batch.

    Attributes:
        inputs: what `get_image_features` takes.
        rows: rows of `pixel_values` that each output comes from.
        order: which output is each image's.
        tokens: tokens that each image has in a prompt.
    """

    inputs: Bundle
    rows: tuple[int, ...]
    order: tuple[int, ...]
    tokens: tuple[int, ...]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Images:
        """On `device`; floating point in `dtype`."""
        moved = {
            name: value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
            for name, value in self.inputs.items()
        }
        return Images(moved, self.rows, self.order, self.tokens)


def collate(bundles: Sequence[Bundle], tokens: Sequence[int]) -> Images:
    """Put bundles together along the first axis; other axes are padded with zeros to the largest.

    Images without tiles come last, and never alone: so they can be told by a count (`_COMPANY`).
    """
    together = [_in_company(bundle) for bundle in bundles]
    placed = sorted(range(len(bundles)), key=together.__getitem__)
    order = [0] * len(bundles)
    for output, image in enumerate(placed):
        order[image] = output
    if sum(together) == 1:
        placed.append(placed[-1])
    laid = [bundles[image] for image in placed]
    inputs = {name: _stack([bundle[name] for bundle in laid]) for name in laid[0]}
    if _COMPANY in inputs:
        alone = [1] * (len(together) - sum(together))
        rest = [len(laid) - len(alone)] if any(together) else []
        inputs[_COMPANY] = torch.tensor(alone + rest)
    rows = tuple(len(bundle["pixel_values"]) for bundle in laid)
    return Images(inputs, rows, tuple(order), tuple(tokens))


def _in_company(bundle: Bundle) -> bool:
    return _COMPANY in bundle and int(bundle[_COMPANY]) > 1


def _stack(values: Sequence[torch.Tensor]) -> torch.Tensor:
    largest = [max(sizes) for sizes in zip(*(v.shape[1:] for v in values), strict=True)]

    def padded(value: torch.Tensor) -> torch.Tensor:
        room = [(0, size - have) for size, have in zip(largest, value.shape[1:], strict=True)]
        return F.pad(value, [n for pair in reversed(room) for n in pair])

    return torch.cat([padded(value) for value in values])


def features(vlm: PreTrainedModel, images: Images) -> list[Features]:
    """What the vision tower makes of each image, in order: tensors of (tokens, H).

    They are named "list" or "tensor", as the model takes back features of several images, and
    "deepstack.0", ... for the layers of the language model that take some as well.

    Raises:
        ValueError: when an image has not as many features as tokens in the prompt.
    """
    found = vlm.model.get_image_features(**images.inputs)
    kind = "tensor" if isinstance(found.pooler_output, torch.Tensor) else "list"
    parts = {kind: _by_image(found.pooler_output, images)}
    for level, deeper in enumerate(getattr(found, "deepstack_features", None) or ()):
        parts[f"deepstack.{level}"] = _by_image(deeper, images)
    for made, expected in zip(parts[kind], images.tokens, strict=True):
        if len(made) != expected:
            raise ValueError(
                f"an image takes {expected} image tokens in a prompt where the model produces "
                f"{len(made)} image features. The processor does not belong to this model: check "
                "its patch_size, vision_feature_select_strategy, num_additional_image_tokens and "
                "image size."
            )
    return [dict(zip(parts, one, strict=True)) for one in zip(*parts.values(), strict=True)]


def _by_image(
    found: torch.Tensor | Sequence[torch.Tensor],  # (rows, tokens, H), or I of (..., H)
    images: Images,
) -> list[torch.Tensor]:
    """Features of each image, (tokens, H), in the order of the images."""
    parts = found.split(images.rows) if isinstance(found, torch.Tensor) else found
    return [parts[output].flatten(0, -2) for output in images.order]


def in_slots(found: Sequence[Features], slots: Sequence[int]) -> SimpleNamespace:
    """Features for every place of an image, as `get_image_features` would return them."""
    placed = {name: [found[image][name] for image in slots] for name in found[0]}
    pooled = placed.pop("list", None)
    if pooled is None:
        pooled = torch.cat(placed.pop("tensor"))
    return SimpleNamespace(pooler_output=pooled, deepstack_features=list(placed.values()))


class ImageStore:
    """The preprocessed images of a data set, each distinct one once.

    Args:
        processor: a Hugging Face processor.
        layout: of the model whose processor it is.
        cache_bytes: how much preprocessed memory to keep; the least recently used goes first, and
            is made again when needed.

    Attributes:
        features: what the vision tower made of images, by key; where it has one, batches take that
            instead of pixels. None computes all in every forward.
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
        self._lock = threading.Lock()  # batches are built in threads; processors are not safe there

    def __len__(self) -> int:
        return len(self._sources)

    def keys(self) -> Iterable[str]:
        """Of all images, in the order of their first use."""
        return self._sources.keys()

    def add(self, record: str, stored: StoredImage, company: bool = False) -> str:
        """Take an image; returns the digest of what the processor makes of it.

        Args:
            record: whose image it is, for messages.
            stored: the image.
            company: whether it shares its prompt with other images.
        """
        company = company and _COMPANY in self._processor.image_processor.model_input_names
        bundle, tokens = self._make(record, stored, company)
        return self.keep(record, stored, bundle, tokens, company)

    def keep(
        self, record: str, stored: StoredImage, bundle: Bundle, tokens: int, company: bool = False
    ) -> str:
        """Take an image that is preprocessed already, and takes `tokens` tokens in a prompt.

        Raises:
            RecordError: when a value is NaN or infinite.
        """
        if not all(value.isfinite().all() for value in bundle.values()):
            raise RecordError(
                record,
                f"its image {stored.path or 'in the pairs file'} has NaN or infinity once it is "
                "preprocessed.",
                "Look at the image, and at mean and std in the model's preprocessor_config.json.",
            )
        key = digest(bundle)
        self._sources.setdefault(key, (record, stored, company))
        self._tokens[key] = tokens
        self._grids[key] = {n: t for n, t in bundle.items() if n in self.layout.grids}
        self._hold(key, bundle)
        return key

    def tokens(self, key: str) -> int:
        """Tokens that the image takes in a prompt."""
        return self._tokens[key]

    def grids(self, keys: Sequence[str]) -> Bundle:
        """What positions depend on, of images in a row; empty with most families."""
        found = [self._grids[key] for key in keys]
        return {name: torch.cat([grid[name] for grid in found]) for name in (found or [{}])[0]}

    def bundle(self, key: str) -> Bundle:
        """The preprocessed image; any thread may ask.

        Raises:
            RecordError: when its file is gone or has changed.
        """
        with self._lock:
            if key not in self._bundles:
                record, stored, company = self._sources[key]
                made, _ = self._make(record, stored, company)
                if digest(made) != key:
                    raise RecordError(
                        record,
                        f"its image {stored.path} is not what it was when the records were "
                        "checked.",
                        "Let no image file change during a run.",
                    )
                self._hold(key, made)
            self._bundles.move_to_end(key)
            return self._bundles[key]

    def batch(self, keys: Sequence[str]) -> Images:
        """Distinct images put together."""
        return collate([self.bundle(key) for key in keys], [self._tokens[key] for key in keys])

    def _make(self, record: str, stored: StoredImage, company: bool) -> tuple[Bundle, int]:
        """The bundle of an image and its tokens in a prompt, from a prompt of nothing else."""
        count = 2 if company else 1
        text = self._processor.image_token * count
        made = processed(self._processor, record, [stored.open(record)] * count, text=[text])
        tokens = int((made["input_ids"] == self.layout.image_token_id).sum()) // count
        found = bundle_of(made)
        if company:  # both are the same
            found = {name: value[:1] for name, value in found.items()}
            found[_COMPANY] = torch.tensor([count])
        return found, tokens

    def _hold(self, key: str, bundle: Bundle) -> None:
        if key in self._bundles:
            return
        self._bundles[key] = bundle
        self._room -= _bytes(bundle)
        while self._room < 0 and len(self._bundles) > 1:
            _, old = self._bundles.popitem(last=False)
            self._room += _bytes(old)


def processed(
    processor, record: str, pictures: Sequence[Image.Image], **inputs: Any
) -> Mapping[str, torch.Tensor]:
    """Call a processor on the images of one prompt.

    Raises:
        RecordError: when the processor raises anything; names `record`.
    """
    try:
        return processor(images=[[*pictures]], return_tensors="pt", **inputs)
    except Exception as error:  # each family's image processor raises errors of its own
        sizes = ", ".join(f"{picture.width} x {picture.height}" for picture in pictures)
        raise RecordError(
            record,
            f"the processor refuses its prompt with image(s) of {sizes} pixels "
            f"({short_error(error)}).",
            "Replace the image or remove the record.",
        ) from error


def bundle_of(made: Mapping[str, torch.Tensor]) -> Bundle:
    """The image inputs among what a processor made of a prompt."""
    return {
        name: value
        for name, value in made.items()
        if name not in _OF_TOKENS and isinstance(value, torch.Tensor)
    }


def digest(bundle: Bundle) -> str:
    """128-bit digest of all its tensors, by name."""
    named = "".join(f"{name} {array_digest(bundle[name].numpy())} " for name in sorted(bundle))
    return hashlib.blake2b(named.encode(), digest_size=16).hexdigest()


def _bytes(bundle: Bundle) -> int:
    return sum(value.nbytes for value in bundle.values())
