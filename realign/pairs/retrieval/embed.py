"""Image embeddings for retrieval, as unit vectors."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from realign.digits import ASSETS
from realign.modeling.images import bundle_of, collate, features
from realign.modeling.layouts import layout_of
from realign.modeling.loading import DTYPES, from_pretrained, load_model, load_processor
from realign.modeling.sentence_models import load_sentence_model

Encode = Callable[[list[Image.Image]], torch.Tensor]
"""Function from a batch of images to embeddings, (images, D)."""

_SIDE = 448
"""Maximum side in pixels for towers that accept any size. Larger images are reduced."""
_LONGEST = 20
"""Maximum aspect ratio. Of longer images only the middle is embedded."""
_THREADS = min(8, os.cpu_count() or 1)


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
        self._encode: Encode | None = None

    def open(self) -> None:
        """Load the encoder.

        Raises:
            ValueError: when it is not found, has no image features, or needs a missing package.
        """
        if self.name is None:
            self._encode = self._open_tower()
        elif self.name.startswith(("st:", "sentence-transformers/")):
            self._encode = self._open_sentence_transformer(self.name.removeprefix("st:"))
        else:
            self._encode = self._open_encoder(self.name)

    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Embed RGB images.

        Returns:
            (images, D) fp32 unit vectors.

        Raises:
            ValueError: when an embedding is not finite.
        """
        if self._encode is None:
            self.open()
        assert self._encode is not None
        parts = [] if images else [np.empty((0, 0), dtype=np.float32)]
        for start in range(0, len(images), self.batch_size):
            batch = [_crop_strip(image) for image in images[start : start + self.batch_size]]
            with torch.inference_mode():
                states = torch.nn.functional.normalize(self._encode(batch).float(), dim=-1)
            parts.append(states.cpu().numpy())
        vectors = np.concatenate(parts)
        if not np.isfinite(vectors).all():
            remedy = "use --dtype fp32" if self.dtype != torch.float32 else "check its weights"
            raise ValueError(
                f"embeddings by {self.name or self.vlm_name or 'the digits model'} are not finite; "
                f"{remedy}."
            )
        return vectors

    def _inputs(self, processor: Any, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        """Processor outputs for a batch, computed in threads."""
        size = -(-len(images) // _THREADS)
        chunks = [images[i : i + size] for i in range(0, len(images), size)]
        with ThreadPoolExecutor(_THREADS) as pool:
            encoded = pool.map(lambda part: processor(images=part, return_tensors="pt"), chunks)
            parts = list(map(bundle_of, encoded))
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in tensors.items()
        }

    def _open_encoder(self, name: str) -> Encode:
        try:
            encoder = from_pretrained(AutoModel, name, dtype=self.dtype)
            processor = from_pretrained(AutoImageProcessor, name)
        except ValueError as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"no image encoder could be loaded from --embed-model {self.name} ({reason}). Pass "
                "a folder or the Hub name of a CLIP or SigLIP model, with its image processor."
            ) from error

        def encode(images: list[Image.Image]) -> torch.Tensor:
            output = encoder.get_image_features(**self._inputs(processor, images))
            return output if isinstance(output, torch.Tensor) else output.pooler_output

        if hasattr(encoder, "get_image_features") and not hasattr(encoder, "language_model"):
            encoder.text_model = None  # not needed, and half of the weights
            encoder = encoder.eval().to(self.device)
            with torch.inference_mode():
                probe = encode([Image.new("RGB", (32, 32))])
            if isinstance(probe, torch.Tensor) and probe.ndim == 2:
                return encode
        raise ValueError(
            f"--embed-model {name} is a {encoder.config.model_type!r} model without a single "
            "feature vector per image. Pass a CLIP or SigLIP model, or omit --embed-model to use "
            "the VLM's own tower."
        )

    def _open_sentence_transformer(self, name: str) -> Encode:
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
        return encode

    def _open_tower(self) -> Encode:
        base = self.vlm_name or str(ASSETS)
        processor = load_processor(base)
        vlm: Any = load_model(base, self.dtype).eval()
        tower = vlm.model.get_encoder("image")
        if _is_plain(processor):
            tower = tower.to(self.device)

            def states(images: list[Image.Image]) -> torch.Tensor:
                pixels = self._inputs(processor.image_processor, images)["pixel_values"]
                return tower(pixel_values=pixels).last_hidden_state.float().mean(1)

            return states
        image_token, decoder = layout_of(vlm).image_token_id, vlm.model.get_decoder()
        for part in [n for n, child in vlm.model.named_children() if child is decoder]:
            setattr(vlm.model, part, None)
        encoder: Any = SimpleNamespace(model=vlm.model.to(self.device))

        def encode(images: list[Image.Image]) -> torch.Tensor:
            encoded = [_bundle(processor, image, image_token) for image in images]
            bundles, tokens = zip(*encoded, strict=True)
            batch = collate(bundles, tokens).to(self.device, self.dtype)
            by_image = features(encoder, batch)
            return torch.stack([next(iter(f.values())).float().mean(0) for f in by_image])

        return encode


def _is_plain(processor: Any) -> bool:
    """Whether a processor returns only `pixel_values`, with one size for all images."""
    bundles = [_bundle(processor, Image.new("RGB", size), 0)[0] for size in ((64, 64), (440, 110))]
    shapes = [tuple(b["pixel_values"].shape) for b in bundles if set(b) == {"pixel_values"}]
    return len(shapes) == 2 and len(set(shapes)) == 1 and len(shapes[0]) == 4 and shapes[0][0] == 1


def _bundle(
    processor: Any, image: Image.Image, image_token: int
) -> tuple[dict[str, torch.Tensor], int]:
    """Image inputs of a prompt with one image, and the number of its image tokens."""
    if max(image.size) > _SIDE:
        image = image.copy()
        image.thumbnail((_SIDE, _SIDE))
    encoded = processor(images=[[image]], text=[processor.image_token], return_tensors="pt")
    return bundle_of(encoded), int((encoded["input_ids"] == image_token).sum())


def _crop_strip(image: Image.Image) -> Image.Image:
    """Crops a long strip to its middle. A processor would enlarge the whole strip to gigabytes."""
    longest = _LONGEST * min(image.size)
    if max(image.size) <= longest:
        return image
    width, height = (min(side, longest) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
