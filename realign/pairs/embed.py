"""Image embeddings for retrieval: unit vectors whose inner product is the cosine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor

from realign.model import ForestModel


def embed_images(
    images: Sequence[Image.Image],
    *,
    name: str | None,
    model: ForestModel,
    processor,
    batch_size: int = 64,
    progress: bool = True,
) -> np.ndarray:
    """Embed images.

    Args:
        images: RGB pictures.
        name: folder or hub name of a CLIP or SigLIP model; None takes the VLM's own vision tower,
            its last states averaged over the patches.
        model: the VLM.
        processor: the VLM's processor.
        batch_size: images in one forward.
        progress: whether to show a bar.

    Returns:
        (images, D) fp32 unit vectors.

    Raises:
        ValueError: when the named model has no image features.
    """
    if name is None:
        encode, image_processor = model.embed_images, processor.image_processor
    else:
        encoder = AutoModel.from_pretrained(name).eval().to(model.vlm.device)
        if not hasattr(encoder, "get_image_features"):
            raise ValueError(
                f"--embed-model {name} is a {encoder.config.model_type!r} model without image "
                "features; name a CLIP or SigLIP model, or leave it out to use the VLM's own tower."
            )
        encode = _features_of(encoder)
        image_processor = AutoProcessor.from_pretrained(name).image_processor
    parts = []
    starts = range(0, len(images), batch_size)
    for start in tqdm(starts, desc="embed", unit="batch", disable=not progress):
        batch = list(images[start : start + batch_size])
        pixels = image_processor(images=batch, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            found = encode(pixels)
        parts.append(torch.nn.functional.normalize(found.float(), dim=-1).cpu().numpy())
    return np.concatenate(parts)


def _features_of(encoder):
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        found = encoder.get_image_features(pixel_values=pixels.to(encoder.device))
        return found if isinstance(found, torch.Tensor) else found.pooler_output

    return encode
