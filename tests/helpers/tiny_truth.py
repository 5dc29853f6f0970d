"""The reference for forests: one plain transformers forward per response."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

_OF_RESPONSE = {"attention_mask": 1, "mm_token_type_ids": 0}


def encode(processor, images: Sequence[Image.Image], text: str) -> dict[str, torch.Tensor]:
    """The processor's output for images and a rendered prompt: (1, P) ids and image inputs."""
    made = processor(images=list(images), text=[text], return_tensors="pt")
    return {name: value for name, value in made.items() if name != "labels"}


def with_response(inputs: dict, response: Sequence[int], family: str) -> dict[str, torch.Tensor]:
    """Append response ids to the prompt, and a column per token to the other token inputs.

    `token_type_ids` of a response are 0 for Gemma 3 (no image) and 1 for PaliGemma (suffix).
    """
    ids = torch.as_tensor(response)[None]
    filler = _OF_RESPONSE | {"token_type_ids": int(family == "paligemma")}
    longer = dict(inputs)
    longer["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
    for name in filler.keys() & inputs.keys():
        longer[name] = torch.cat([inputs[name], torch.full_like(ids, filler[name])], 1)
    return longer


def separate_logps(vlm, inputs: dict, responses: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Per-token log-probs of responses to one prompt, each in its own forward, (R,) fp64.

    They have gradients unless the caller turned gradients off.
    """
    prompt = inputs["input_ids"].shape[1]
    logps = []
    for response in responses:
        longer = with_response(inputs, response, vlm.config.model_type)
        logits = vlm(**longer, use_cache=False).logits[0, prompt - 1 : -1]
        picked = torch.as_tensor(response)[:, None]
        logps.append(logits.double().log_softmax(-1).gather(1, picked)[:, 0])
    return logps
