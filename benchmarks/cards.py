"""Table of models, methods and cards in docs/card.md, estimated as by `--dry-run`.

    python -m benchmarks.cards          # writes the table, in minutes

Two models with few layers are traced, and the rest follows, since memory is linear in the layers.
cards.json holds the sizes of public models, from the config.json of each on the Hub. The number of
parameters that they give equals the published one exactly.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from realign.config import TrainConfig, parse
from realign.modeling import quantized
from realign.modeling.attention import IMPLEMENTATIONS, row_budget
from realign.modeling.examples import Example, Leaf, Root
from realign.modeling.forest import ForestBatch, build_batch
from realign.modeling.loading import add_lora
from realign.modeling.model import ForestModel
from realign.training import fsdp
from realign.training.dry_run import rank_memory

PAGE = Path(__file__).parents[1] / "docs" / "card.md"
MODELS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text())
METHODS = {
    "QLoRA": ["--quantize", "4bit"],
    "LoRA": [],
    "full": ["--tune", "full"],
}
"""Method -> flags."""
CARDS = (24, 48, 80)  # GB
USABLE = 0.9  # of a card, as in `dry_run.gpu_memory`
PROMPT, RESPONSE = 64, 128  # tokens of text
FORWARDS = 8  # of one record, in a step
_IN_A_TENSOR = ("gemma3", "internvl")
"""Model types that take the features of several images as one tensor, not as a list."""
_BEGIN, _END = "<!-- cards -->\n", "<!-- /cards -->"


def built(name: str, layers: int | None = None) -> PreTrainedModel:
    """A model on the meta device in bf16, with all layers or fewer."""
    kinds = {"": "sdpa", "text_config": IMPLEMENTATIONS["flash"]}
    settings = copy.deepcopy(MODELS[name]["config"])
    settings["text_config"]["num_hidden_layers"] = layers or _layers(name)
    config = AutoConfig.for_model(**settings)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(
            config, dtype=torch.bfloat16, attn_implementation=kinds
        )


def one_record(model: ForestModel, image_tokens: int) -> ForestBatch:
    """The forest of an rDPO record: two images, a prompt, and three responses.

    The image features are given, since the frozen tower keeps nothing for the backward. Those for
    deeper layers are left out, as in `memory.measure`.
    """
    text = model.vlm.config.get_text_config()
    form = "tensor" if model.vlm.config.model_type in _IN_A_TENSOR else "list"
    feature = torch.empty(image_tokens, text.hidden_size, dtype=model.dtype)
    store = SimpleNamespace(
        layout=model.layout,
        features={key: {form: feature} for key in ("own", "retrieved")},
        grids=lambda keys: {},
    )
    image = np.full(image_tokens, model.layout.image_token_id)
    prompt = np.concatenate([image, np.arange(10, 10 + PROMPT)])
    roots = tuple(Root((key,), prompt) for key in ("own", "retrieved"))
    leaves = [
        Leaf(root, np.arange(10, 10 + RESPONSE) + place) for place, root in enumerate((0, 0, 1))
    ]
    example = Example("record", roots, tuple(leaves))
    budget = row_budget(model.attention, [example])
    store_of_features: Any = store
    return build_batch([example], store_of_features, row_tokens=budget)


def estimate(name: str, method: str, *, checkpointed: bool) -> float:
    """Peak GiB of one process on a GPU."""
    flags = ["--dtype", "bf16", "--model", name, "--pairs", "pairs", *METHODS[method]]
    config = parse(flags)
    config = replace(config, scale=replace(config.scale, activation_checkpointing=checkpointed))
    few = 6 if MODELS[name]["config"]["model_type"] == "gemma3" else 2  # its sixth layer differs
    low, high = (sum(_parts(name, config, layers).values()) for layers in (few, 2 * few))
    return (low + (_layers(name) - few) * (high - low) / few) / 2**30


def _layers(name: str) -> int:
    return MODELS[name]["config"]["text_config"]["num_hidden_layers"]


def _parts(name: str, config: TrainConfig, layers: int) -> dict[str, int]:
    settings, vlm = config.model, built(name, layers)
    if settings.tune == "full":
        vlm.float()  # trained weights, and frozen ones beside them
    model = ForestModel(vlm, dtype=torch.bfloat16)
    replaced = quantized.linears(vlm) if settings.quantize else []
    sizes = [layer.get_parameter("weight").numel() for layer in replaced]
    if settings.tune == "lora":
        assert settings.lora_rank is not None and settings.lora_alpha is not None
        add_lora(vlm, settings.lora_rank, settings.lora_alpha)
    fsdp.wrap_layers(
        fsdp.trained_layers(model),
        compiled=False,
        checkpointed=bool(config.scale.activation_checkpointing),
    )
    batch = one_record(model, MODELS[name]["image_tokens"])
    cpu = torch.device("cpu")
    return rank_memory(model, batch, config, cpu, forwards=FORWARDS, quantized_weights=sizes)


def row(name: str, method: str) -> str:
    """A row of the table."""
    needed, less = (estimate(name, method, checkpointed=on) for on in (False, True))
    cells = [
        f"{name}, {MODELS[name]['parameters'] / 1e9:.1f}B",
        method,
        f"{needed:.0f}",
        f"{less:.0f}",
    ]
    for card in CARDS:
        room = USABLE * card
        cells.append("yes" if needed <= room else "checkpointed" if less <= room else "no")
    return f"| {' | '.join(cells)} |"


def table(names: Sequence[str] = tuple(MODELS)) -> str:
    """The table in Markdown."""
    head = ["model", "method", "GiB", "GiB, checkpointed", *(f"{card} GB" for card in CARDS)]
    lines = [f"| {' | '.join(head)} |", "|---|---|---|---|---|---|---|"]
    for name in names:
        for method in METHODS:
            lines.append(row(name, method))
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table to the page."""
    before, rest = PAGE.read_text(encoding="utf-8").split(_BEGIN)
    after = rest.split(_END)[1]
    PAGE.write_text(f"{before}{_BEGIN}\n{table()}\n{_END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
