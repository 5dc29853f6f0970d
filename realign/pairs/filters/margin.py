"""The visual margin of a pair: whether the chosen response fits its own image better.

It is log p(w | v) - log p(w | v') of the reference model, w the chosen response, v its image and v'
the visual negative. Where it is not above 0 the response holds of the negative as well, or better,
and the visual term would teach the wrong thing. Both log-probs are leaves of the objectives that
are trained: they are kept in the reference cache, under the keys and the fingerprint of training,
which finds them there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import PreTrainedModel

from realign.data.records import Record, RecordError
from realign.modeling import reference_logps
from realign.modeling.encode import encode_records
from realign.modeling.forest import Example
from realign.modeling.images import ImageStore
from realign.modeling.model import ForestModel
from realign_kernels import Objective, ReferenceCache, objectives

MARGIN = Objective(
    "visual margin",
    (objectives.CHOSEN, objectives.VISUAL),
    (objectives.PairSigmoid(name="visual", positive=0, negative=1),),
)
"""The chosen response under both images."""

_seen: WeakKeyDictionary = WeakKeyDictionary()
"""Fingerprint of each model, and why its responses cannot share a prompt. Both take a while."""


def visual_margins(
    vlm: PreTrainedModel,
    processor,
    records: Sequence[Record],
    *,
    cache: str | None = None,
    max_response_tokens: int = 1024,
    batch_rows: int = 32,
    progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
    on_bad: Callable[[Record, RecordError], None] | None = None,
) -> np.ndarray:
    """Visual margins of records.

    Args:
        vlm: the reference, as `loading.load_model` gives it for training, in the dtype of training
            and on its device. Its weights must not change between calls.
        processor: its processor.
        records: with `retrieved_images`, of which the first as many as `images` count. A rejected
            response is not needed.
        cache: folder of reference log-probs; that which training uses by default, if absent.
        max_response_tokens: longest chosen response.
        batch_rows: rows in one forward.
        progress: whether to show bars.
        say: told how many log-probs were known, and what is done otherwise than asked for.
        on_bad: called with records that cannot be computed and the reason; their margin is NaN.

    Returns:
        (records,) fp64, in nats.

    Raises:
        RecordError: for a record that cannot be computed, where `on_bad` is absent.
        ValueError: for a model that forests cannot be laid out for.
    """
    device, dtype = vlm.device, vlm.dtype
    training = vlm.training
    model = ForestModel(vlm, dtype=dtype).eval()
    examples, store, kept = _encoded(
        model, processor, records, max_response_tokens, progress, on_bad
    )
    margins = np.full(len(records), np.nan)
    try:
        if examples:
            fingerprint = _known(model, processor, examples[0], store, device, say)
            directory = cache or reference_logps.default_directory()
            with ReferenceCache.open(directory, fingerprint) as table:
                logps = reference_logps.fill(
                    table,
                    model,
                    examples,
                    store,
                    row_tokens=max(example.longest_tree for example in examples),
                    batch_rows=batch_rows,
                    device=device,
                    progress=progress,
                    log=say,
                )
            margins[kept] = (logps[0] - logps[1]).numpy()
    finally:
        vlm.train(training)
    return margins


def _encoded(
    model: ForestModel,
    processor,
    records: Sequence[Record],
    most: int,
    progress: bool,
    on_bad: Callable[[Record, RecordError], None] | None,
) -> tuple[list[Example], ImageStore, list[int]]:
    """Examples of the records that can be computed, their images, and which they are."""
    bad: set[int] = set()

    def leave_out(record: Record, error: RecordError) -> None:
        if on_bad is None:
            raise error
        bad.add(id(record))
        on_bad(record, error)

    examples, store = encode_records(
        records,
        processor,
        MARGIN,
        layout=model.layout,
        max_response_tokens=most,
        max_tokens=model.vlm.config.get_text_config().max_position_embeddings,
        progress=progress,
        on_bad=leave_out,
    )
    return examples, store, [i for i, record in enumerate(records) if id(record) not in bad]


def _known(
    model: ForestModel,
    processor,
    example: Example,
    store: ImageStore,
    device: torch.device,
    say: Callable[[str], None],
) -> dict[str, str]:
    """The fingerprint that training computes for this model; its layout is checked as there."""
    if model.vlm not in _seen:
        fingerprint = reference_logps.fingerprint(model.vlm, processor, model.dtype, device)
        for line in model.check_forest(example, store, device):
            say(line)
        _seen[model.vlm] = fingerprint, model.layout.separate
    fingerprint, model.layout.separate = _seen[model.vlm]
    return fingerprint
