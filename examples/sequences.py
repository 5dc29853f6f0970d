"""Shared code of the examples: three padded sequences for each record, and their log-probs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from realign.data.records import Record, read_pairs
from realign.digits import ASSETS
from realign.modeling.loading import from_pretrained
from realign.pairs.pipeline import PairsConfig, build_pairs
from realign_kernels import linear_logprobs


def options(description: str) -> argparse.Namespace:
    """Parse the flags of an example."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--model", default=str(ASSETS), help="folder or Hub name of the model (default: the digits)"
    )
    parser.add_argument("--pairs", help="Parquet file of pairs (default: of the digits)")
    parser.add_argument(
        "--output", default="runs/example", help="output folder (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=16, help="optimizer steps (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=16, help="records in a step (default: %(default)s)"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    return parser.parse_args()


def load(given: argparse.Namespace) -> tuple[nn.Module, object, list[Record]]:
    """Load the model with a frozen vision tower, its processor, and the records."""
    # In fp32, since bf16 weights would lose small updates.
    model = from_pretrained(AutoModelForImageTextToText, given.model, dtype=torch.float32)
    model.model.get_encoder("image").requires_grad_(False)
    path = given.pairs
    if path is None:
        path = f"{given.output}/pairs.parquet"
        build_pairs(PairsConfig(output=path, scenes=256, quiet=True))
    return model, from_pretrained(AutoProcessor, given.model), read_pairs(path)


def batch_of(processor, records: Sequence[Record]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Sequences of the chosen, the rejected, and the chosen response under the retrieved image.

    Returns:
        Inputs of 3 B padded sequences, and labels (3, B, T). The hidden state at t predicts
        `labels[..., t]`, which is -100 for tokens outside of the response.
    """
    prompts, texts, images = [], [], []
    variants = [(r.chosen, r.images) for r in records]
    variants += [(r.rejected, r.images) for r in records]
    variants += [(r.chosen, r.retrieved_images) for r in records]
    for record, (response, stored) in zip([*records] * 3, variants, strict=True):
        question = [{"type": "image"}, {"type": "text", "text": record.prompt[0]["content"]}]
        asked = [{"role": "user", "content": question}]
        replied = [{"role": "assistant", "content": [{"type": "text", "text": response}]}]
        prompts.append(processor.apply_chat_template(asked, add_generation_prompt=True))
        texts.append(processor.apply_chat_template(asked + replied))
        images.append([stored[0].open(record.name)])
    inputs = processor(
        text=texts, images=images, padding=True, padding_side="right", return_tensors="pt"
    )
    short = processor(text=prompts, images=images, padding=True, padding_side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for row, mask in zip(labels, short["attention_mask"], strict=True):
        row[: sum(mask)] = -100
    ahead = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    return dict(inputs), ahead.unflatten(0, (3, len(records)))


def hidden_states(model: nn.Module, inputs: dict[str, torch.Tensor], count: int) -> torch.Tensor:
    """Last hidden states, (3, B, T, H). The loss applies the head."""
    states = model.model(**inputs, use_cache=False).last_hidden_state
    return states.unflatten(0, (3, count))


@torch.no_grad()
def reference_logps(
    model: nn.Module, inputs: dict[str, torch.Tensor], labels: torch.Tensor
) -> torch.Tensor:
    """Summed log-probs of the responses, (3, B), computed before training."""
    hidden = hidden_states(model, inputs, labels.shape[1])
    return linear_logprobs(hidden, model.lm_head.weight, labels).sum(-1)


def places(count: int, steps: int, batch_size: int, seed: int = 0) -> list[list[int]]:
    """Indices of the records of each step, shuffled in each pass."""
    generator = torch.Generator().manual_seed(seed)
    passes = -(-steps * batch_size // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])
    return order[: steps * batch_size].view(steps, batch_size).tolist()
