"""Image embeddings for retrieval, as unit vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from realign.digits import ASSETS
from realign.modeling.images import Bundle, bundle_of, collate, features, one_by_one
from realign.modeling.layouts import Layout, layout_of
from realign.modeling.loading import DTYPES, from_pretrained, load_model, load_processor
from realign.modeling.prefetch import Copies
from realign.modeling.sentence_models import load_sentence_model


class Encoder(NamedTuple):
    """The two steps of an embedding.

    Attributes:
        prepare: preprocesses an image on the CPU. Thread-safe.
        encode: turns a batch of results of `prepare` into embeddings, (images, D).
    """

    prepare: Callable[[Image.Image], Any]
    encode: Callable[[list[Any]], torch.Tensor]


_SIDE = 448
"""Maximum side in pixels for towers that accept any size. Larger images are reduced."""
_LONGEST = 20
"""Maximum aspect ratio. Of longer images only the middle is embedded."""


class Embedder:
    """Embeds images, on the GPU if there is one.

    Without a `name`, the VLM's own vision tower is used. The embedding is the average of its last
    hidden states over the patches. In families with tiles or images of any size, it is the average
    of the features that the language model sees. These images are reduced to 448 pixels.

    Args:
        name: folder or Hub name of a CLIP or SigLIP model, or None. "st:NAME" and
            "sentence-transformers/..." name a model of the sentence-transformers package.
        vlm_name: folder or Hub name of the VLM; None means the shipped digits model. Its language
            model is discarded.
        batch_size: number of images in one forward pass.
        dtype: "fp32", "bf16" or "auto". "auto" is bf16 on a GPU and fp32 on a CPU.

    Raises:
        ValueError: for an unknown dtype or a batch size below 1.
    """

    def __init__(
        self,
        name: str | None,
        vlm_name: str | None = None,
        *,
        batch_size: int = 64,
        dtype: str = "auto",
    ) -> None:
        if dtype not in ("auto", *DTYPES):
            raise ValueError(f"dtype is {dtype!r}; it must be auto, {' or '.join(DTYPES)}.")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        default = "bf16" if self.device.type == "cuda" else "fp32"
        self.dtype = DTYPES[default if dtype == "auto" else dtype]
        self.name, self.vlm_name, self.batch_size = name, vlm_name, batch_size
        self._encoder: Encoder | None = None

    def open(self) -> None:
        """Load the encoder.

        Raises:
            ValueError: when it is not found, has no image features, or needs a missing package.
        """
        if self.name is None:
            self._encoder = self._open_tower()
        elif self.name.startswith(("st:", "sentence-transformers/")):
            self._encoder = self._open_sentence_transformer(self.name.removeprefix("st:"))
        else:
            self._encoder = self._open_encoder(self.name)

    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Embed RGB images in the caller's thread. See `encode`."""
        size = self.batch_size
        starts = range(0, max(1, len(images)), size)
        batches = ([self.prepare(i) for i in images[start : start + size]] for start in starts)
        return np.concatenate([self.encode(batch) for batch in batches])

    def prepare(self, image: Image.Image) -> Any:
        """Preprocess an RGB image for `encode`. Several threads may call it after `open`."""
        if self._encoder is None:
            self.open()
        assert self._encoder is not None
        return self._encoder.prepare(_crop_strip(image))

    def encode(self, prepared: list[Any]) -> np.ndarray:
        """Embed results of `prepare` in one batch.

        Returns:
            (images, D) fp32 unit vectors.

        Raises:
            ValueError: when an embedding is not finite.
        """
        if not prepared:
            return np.empty((0, 0), dtype=np.float32)
        assert self._encoder is not None
        with torch.inference_mode():
            states = torch.nn.functional.normalize(self._encoder.encode(prepared).float(), dim=-1)
        vectors = states.cpu().numpy()
        if not np.isfinite(vectors).all():
            remedy = "use --dtype fp32" if self.dtype != torch.float32 else "check its weights"
            raise ValueError(
                f"embeddings by {self.name or self.vlm_name or 'the digits model'} are not finite; "
                f"{remedy}."
            )
        return vectors

    def _inputs(self, bundles: list[Bundle]) -> Bundle:
        """The bundles of a batch, concatenated on the device."""
        tensors = {name: torch.cat([bundle[name] for bundle in bundles]) for name in bundles[0]}
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in tensors.items()
        }

    def _open_encoder(self, name: str) -> Encoder:
        try:
            encoder = from_pretrained(AutoModel, name, dtype=self.dtype)
            processor = from_pretrained(AutoImageProcessor, name)
        except ValueError as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"no image encoder could be loaded from --embed-model {self.name} ({reason}). Pass "
                "a folder or the Hub name of a CLIP or SigLIP model, with its image processor."
            ) from error

        prepare = _preprocessing(processor)

        def encode(bundles: list[Bundle]) -> torch.Tensor:
            output = encoder.get_image_features(**self._inputs(bundles))
            return output if isinstance(output, torch.Tensor) else output.pooler_output

        if hasattr(encoder, "get_image_features") and not hasattr(encoder, "language_model"):
            encoder.text_model = None  # not needed, and half of the weights
            encoder = encoder.eval().to(self.device)
            with torch.inference_mode():
                probe = encode([prepare(Image.new("RGB", (32, 32)))])
            if isinstance(probe, torch.Tensor) and probe.ndim == 2:
                return Encoder(prepare, encode)
        raise ValueError(
            f"--embed-model {name} is a {encoder.config.model_type!r} model without a single "
            "feature vector per image. Pass a CLIP or SigLIP model, or omit --embed-model to use "
            "the VLM's own tower."
        )

    def _open_sentence_transformer(self, name: str) -> Encoder:
        encoder = load_sentence_model(name, device=str(self.device))
        try:
            encoder = encoder.to(self.dtype)

            def encode(images: list[Image.Image]) -> torch.Tensor:
                return encoder.encode(
                    images,
                    batch_size=self.batch_size,
                    convert_to_tensor=True,
                    show_progress_bar=False,
                )

            encode([Image.new("RGB", (32, 32))])
        except Exception as error:  # text models raise errors of many types for an image
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"--embed-model {self.name} cannot embed an image ({reason}). Pass a CLIP model of "
                "sentence-transformers, such as sentence-transformers/clip-ViT-L-14."
            ) from error
        return Encoder(lambda image: image, encode)  # the package preprocesses in `encode`

    def _open_tower(self) -> Encoder:
        base = self.vlm_name or str(ASSETS)
        processor = load_processor(base)
        vlm: Any = load_model(base, self.dtype).eval()
        tower = vlm.model.get_encoder("image")
        if _is_plain(processor):
            tower = tower.to(self.device)

            def states(bundles: list[Bundle]) -> torch.Tensor:
                pixels = self._inputs(bundles)["pixel_values"]
                return tower(pixel_values=pixels).last_hidden_state.float().mean(1)

            return Encoder(_preprocessing(processor.image_processor), states)
        layout, decoder = layout_of(vlm), vlm.model.get_decoder()
        for part in [n for n, child in vlm.model.named_children() if child is decoder]:
            setattr(vlm.model, part, None)
        encoder: Any = SimpleNamespace(model=vlm.model.to(self.device))

        processors = Copies(processor)

        def prepare(image: Image.Image) -> tuple[Bundle, int]:
            with processors.borrow() as own:
                return _bundle(own, image, layout)

        def encode(prepared: list[tuple[Bundle, int]]) -> torch.Tensor:
            bundles, tokens = zip(*prepared, strict=True)
            join = one_by_one if layout.one_by_one else collate
            batch = join(bundles, tokens).to(self.device, self.dtype)
            by_image = features(encoder, batch)
            return torch.stack([next(iter(f.values())).float().mean(0) for f in by_image])

        return Encoder(prepare, encode)


def _preprocessing(processor: Any) -> Callable[[Image.Image], Bundle]:
    """Thread-safe preprocessing of an image by an image processor."""
    processors = Copies(processor)

    def prepare(image: Image.Image) -> Bundle:
        with processors.borrow() as own:
            return bundle_of(own(images=[image], return_tensors="pt"))

    return prepare


def _is_plain(processor: Any) -> bool:
    """Whether a processor returns only `pixel_values`, with one size for all images."""
    bundles = [
        _bundle(processor, Image.new("RGB", size), Layout(0))[0] for size in ((64, 64), (440, 110))
    ]
    shapes = [tuple(b["pixel_values"].shape) for b in bundles if set(b) == {"pixel_values"}]
    return len(shapes) == 2 and len(set(shapes)) == 1 and len(shapes[0]) == 4 and shapes[0][0] == 1


def _bundle(processor: Any, image: Image.Image, layout: Layout) -> tuple[Bundle, int]:
    """Image inputs of a prompt with one image, and the number of its image tokens."""
    if max(image.size) > _SIDE:
        image = image.copy()
        image.thumbnail((_SIDE, _SIDE))
    encoded = processor(images=[[image]], text=[processor.image_token], return_tensors="pt")
    return bundle_of(encoded, layout), int((encoded["input_ids"] == layout.image_token_id).sum())


def _crop_strip(image: Image.Image) -> Image.Image:
    """Crops a long strip to its middle. A processor would enlarge the whole strip to gigabytes."""
    longest = _LONGEST * min(image.size)
    if max(image.size) <= longest:
        return image
    width, height = (min(side, longest) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
