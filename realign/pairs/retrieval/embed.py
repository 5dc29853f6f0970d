"""Image embeddings for retrieval: unit vectors whose inner product is the cosine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from realign.digits import ASSETS
from realign.modeling.images import bundle_of, collate, features
from realign.modeling.layouts import layout_of
from realign.modeling.loading import DTYPES, load_model, load_processor

Inputs = dict[str, torch.Tensor]
"""What an encoder takes for some images."""

_SIDE = 448  # pixels; larger images are made smaller for towers that take any size
_LONGEST = 20  # times the shorter side; of longer images the middle is embedded


class Embedder:
    """Embeds images, on the GPU where there is one.

    Args:
        name: folder or hub name of a CLIP or SigLIP model; "st:NAME" or "sentence-transformers/..."
            for a model of that package; None takes the VLM's own tower: its last states averaged
            over the patches, or, in families with tiles or images of any size, the features that
            the language model sees, averaged. For the latter, images are at most 448 pixels long.
        vlm_name: folder or hub name of the VLM; the shipped digits model when None. Its language
            model is not kept.
        batch_size: images in one forward.
        dtype: "fp32", "bf16", or "auto", bf16 on a GPU and fp32 on a CPU.

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
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = DTYPES["bf16" if self.device == "cuda" else "fp32"]
        if dtype != "auto":
            self.dtype = DTYPES[dtype]
        self.name, self.vlm_name, self.batch_size = name, vlm_name, batch_size
        self._prepare: Callable[[list[Image.Image]], Inputs] | None = None
        self._encode: Callable[[Inputs], torch.Tensor] | None = None
        self._threads = 1

    def open(self) -> None:
        """Load the encoder.

        Raises:
            ValueError: when it is not found, has no image features, or its package is missing.
        """
        if self.name is None:
            self._open_tower()
        elif self.name.startswith(("st:", "sentence-transformers/")):
            self._open_sentence_transformer()
        else:
            self._open_encoder()

    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Embed RGB pictures; the next ones are prepared meanwhile.

        Returns:
            (images, D) fp32 unit vectors.

        Raises:
            ValueError: when an embedding is not finite.
        """
        if self._encode is None:
            self.open()
        starts = range(0, len(images), self.batch_size)
        batches = [[_tame(i) for i in images[s : s + self.batch_size]] for s in starts]
        parts = [np.empty((0, 0), dtype=np.float32)] if not batches else []
        for inputs in self._prepared(batches):
            with torch.inference_mode():
                found = torch.nn.functional.normalize(self._encode(inputs).float(), dim=-1)
            parts.append(found.cpu().numpy())
        vectors = np.concatenate(parts)
        if not np.isfinite(vectors).all():
            remedy = "take --dtype fp32" if self.dtype != torch.float32 else "check its weights"
            raise ValueError(
                f"embeddings by {self.name or self.vlm_name or 'the digits model'} are not finite; "
                f"{remedy}."
            )
        return vectors

    def _prepared(self, batches: Sequence[list[Image.Image]]) -> Iterator[Inputs]:
        """Inputs of each batch, made in threads while the one before is embedded."""
        with ThreadPoolExecutor(self._threads) as pool:

            def submit(batch: list[Image.Image]) -> list:
                share = -(-len(batch) // self._threads)
                starts = range(0, len(batch), share)
                return [pool.submit(self._prepare, batch[s : s + share]) for s in starts]

            ahead = submit(batches[0]) if batches else []
            for following in [*batches[1:], None]:
                current, ahead = ahead, submit(following) if following else []
                if made := [future.result() for future in current]:
                    yield _together(made)

    def _on_device(self, inputs: Inputs) -> Inputs:
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }

    def _open_encoder(self) -> None:
        options = {"trust_remote_code": False}
        try:
            encoder = AutoModel.from_pretrained(
                self.name, dtype=self.dtype, use_safetensors=True, **options
            )
            processor = AutoImageProcessor.from_pretrained(self.name, **options)
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"no image encoder could be loaded from --embed-model {self.name} ({reason}). Pass "
                "a folder or the hub name of a CLIP or SigLIP model, with its image processor."
            ) from error
        kind = encoder.config.model_type
        pooled = None
        if hasattr(encoder, "get_image_features") and not hasattr(encoder, "language_model"):
            encoder.text_model = None  # not needed, and half of the weights
            encoder = encoder.eval().to(self.device)
            self._use_processor(processor)

            def pooled(inputs: Inputs) -> torch.Tensor:
                found = encoder.get_image_features(**self._on_device(inputs))
                return found if isinstance(found, torch.Tensor) else found.pooler_output

            with torch.inference_mode():
                probe = pooled(self._prepare([Image.new("RGB", (32, 32))]))
            pooled = pooled if isinstance(probe, torch.Tensor) and probe.ndim == 2 else None
        if pooled is None:
            raise ValueError(
                f"--embed-model {self.name} is a {kind!r} model without one feature vector for an "
                "image; name a CLIP or SigLIP model, or leave it out to use the VLM's own tower."
            )
        self._encode = pooled

    def _open_sentence_transformer(self) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ValueError(
                f"--embed-model {self.name} needs sentence-transformers: "
                "pip install 'realign[sentences]'."
            ) from error
        name = self.name.removeprefix("st:")
        try:
            encoder = SentenceTransformer(name, device=self.device, trust_remote_code=False)
            encoder = encoder.to(self.dtype)

            def encode(images: list[Image.Image]) -> torch.Tensor:
                return encoder.encode(
                    images,
                    batch_size=self.batch_size,
                    convert_to_tensor=True,
                    show_progress_bar=False,
                )

            encode([Image.new("RGB", (32, 32))])
        except Exception as error:  # a text model fails in ways of its own on an image
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"--embed-model {self.name} gives no embedding of an image ({reason}). Name a CLIP "
                "model of sentence-transformers, such as sentence-transformers/clip-ViT-L-14."
            ) from error
        self._threads, self._prepare = 1, lambda images: {"images": images}
        self._encode = lambda inputs: encode(inputs["images"])

    def _open_tower(self) -> None:
        base = self.vlm_name or str(ASSETS)
        processor = load_processor(base)
        vlm = load_model(base, self.dtype).eval()
        tower = vlm.model.get_encoder("image")
        if _is_plain(processor):
            tower = tower.to(self.device)
            self._use_processor(processor.image_processor)

            def states(inputs: Inputs) -> torch.Tensor:
                pixels = {"pixel_values": inputs["pixel_values"]}
                return tower(**self._on_device(pixels)).last_hidden_state.float().mean(1)

            self._encode = states
            return
        image, decoder = layout_of(vlm).image_token_id, vlm.model.get_decoder()
        for part in [n for n, child in vlm.model.named_children() if child is decoder]:
            setattr(vlm.model, part, None)
        kept = SimpleNamespace(model=vlm.model.to(self.device))

        def prepare(images: list[Image.Image]) -> Inputs:
            return {"bundles": [_bundle(processor, picture, image) for picture in images]}

        def seen(inputs: Inputs) -> torch.Tensor:
            bundles, tokens = zip(*inputs["bundles"], strict=True)
            placed = collate(bundles, tokens).to(self.device, self.dtype)
            found = features(kept, placed)
            return torch.stack([next(iter(f.values())).float().mean(0) for f in found])

        self._threads, self._prepare, self._encode = 1, prepare, seen  # tokenizers take one thread

    def _use_processor(self, processor) -> None:
        self._threads = min(8, os.cpu_count() or 1)

        def prepare(images: list[Image.Image]) -> Inputs:
            return bundle_of(processor(images=images, return_tensors="pt"))

        self._prepare = prepare


def _is_plain(processor) -> bool:
    """Whether its processor makes one tensor of one size of every image, and nothing else."""
    made = [_bundle(processor, Image.new("RGB", size), 0)[0] for size in ((64, 64), (440, 110))]
    shapes = [tuple(one["pixel_values"].shape) for one in made if set(one) == {"pixel_values"}]
    return len(shapes) == 2 and len(set(shapes)) == 1 and len(shapes[0]) == 4 and shapes[0][0] == 1


def _bundle(processor, image: Image.Image, image_token: int) -> tuple[Inputs, int]:
    """What a processor makes of a prompt of one image, and its tokens there."""
    if max(image.size) > _SIDE:
        image = image.copy()
        image.thumbnail((_SIDE, _SIDE))
    made = processor(images=[[image]], text=[processor.image_token], return_tensors="pt")
    return bundle_of(made), int((made["input_ids"] == image_token).sum())


def _together(made: list[Inputs]) -> Inputs:
    """Inputs of the parts of a batch as those of the batch: tensors or lists, one after another."""
    joined = {}
    for name, first in made[0].items():
        values = [one[name] for one in made]
        joined[name] = torch.cat(values) if isinstance(first, torch.Tensor) else sum(values, [])
    return joined


def _tame(image: Image.Image) -> Image.Image:
    """The middle of a strip, which a processor would enlarge by its shorter side to gigabytes."""
    width, height = image.size
    longest = _LONGEST * min(image.size)
    if max(image.size) <= longest:
        return image
    across, down = min(width, longest), min(height, longest)
    left, top = (width - across) // 2, (height - down) // 2
    return image.crop((left, top, left + across, top + down))
