"""What a run reads before its first forward: model, processor, and records checked one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from realign.config import LossConfig
from realign.data.records import read_pairs
from realign.modeling.encode import encode_records, make_objective
from realign.modeling.forest import Example
from realign.modeling.images import ImageStore
from realign.modeling.loading import load_model, load_processor
from realign.modeling.model import ForestModel
from realign_kernels import Objective


@dataclass
class Inputs:
    """A model and the forests to train it on."""

    base: str  # folder (absolute) or hub name of the model
    processor: object
    model: ForestModel
    objective: Objective
    examples: Sequence[Example]
    store: ImageStore

    @property
    def longest_tree(self) -> int:
        """Tokens of the longest root with all its leaves."""
        return max(example.longest_tree for example in self.examples)


def load_inputs(
    base: str | Path,
    pairs: str | Path,
    loss: LossConfig,
    *,
    dtype: torch.dtype,
    weights_dtype: torch.dtype,
    attention: str = "tree",
    meta: bool = False,
    train_vision: bool,
    max_response_tokens: int,
    progress: bool,
) -> Inputs:
    """Load a model and encode the pairs for it.

    Args:
        base: folder or hub name of the model, or of an adapter.
        pairs: Parquet file or folder.
        loss: decides which responses under which images are needed.
        dtype: in which the model computes.
        weights_dtype: in which its weights are kept.
        attention: of the language model, a key of `attention.IMPLEMENTATIONS`.
        meta: build the model without weights, which rank 0 will send.
        train_vision: whether the vision tower learns.
        max_response_tokens: a longer response is an error.
        progress: whether to show a bar.

    Raises:
        ValueError: for a model or a record that cannot be trained on, with the remedy.
    """
    if Path(base).is_dir():  # an adapter will name its base, to be found from anywhere
        base = Path(base).resolve()
    processor = load_processor(base)
    records = read_pairs(pairs)
    objective = make_objective(loss, records)
    vlm = load_model(base, weights_dtype, attention, meta=meta)
    model = ForestModel(vlm, train_vision=train_vision, dtype=dtype)
    examples, store = encode_records(
        records,
        processor,
        objective,
        layout=model.layout,
        max_response_tokens=max_response_tokens,
        max_tokens=vlm.config.get_text_config().max_position_embeddings,
        progress=progress,
    )
    return Inputs(str(base), processor, model, objective, examples, store)
