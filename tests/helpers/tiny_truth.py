"""The reference for forests: one plain transformers forward per response."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image


def encode(processor, images: Sequence[Image.Image], text: str) -> dict[str, torch.Tensor]:
    """All outputs of the processor for the images of one rendered prompt, which may have none."""
    given = {"images": [list(images)]} if images else {}
    return dict(processor(**given, text=[text], return_tensors="pt"))


def with_response(inputs: dict, response: Sequence[int], family: str) -> dict[str, torch.Tensor]:
    """Append response ids to the prompt, and a column per token to every other token input.

    Token inputs are those with the shape of the ids. Those of a response are 1 in the attention
    mask, and 0 in the others, for text. `token_type_ids` of PaliGemma are 1, for the suffix.
    """
    ids, prompt = torch.as_tensor(response)[None], inputs["input_ids"]
    filler = {"attention_mask": 1} | ({"token_type_ids": 1} if family == "paligemma" else {})
    longer = {}
    for name, value in inputs.items():
        if name == "labels":
            continue
        if isinstance(value, torch.Tensor) and value.shape == prompt.shape:
            column = torch.full_like(ids, filler.get(name, 0))
            value = torch.cat([value, ids if name == "input_ids" else column.to(value.dtype)], 1)
        longer[name] = value
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
