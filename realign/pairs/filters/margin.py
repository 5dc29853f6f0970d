"""Visual margin filter: compares the chosen response on its image and on the visual negative.

The margin is log p(w | v) - log p(w | v') under the reference model. Here w is the chosen response,
v its image and v' the visual negative. If the margin is not above 0, the response is at least as
likely on the negative, and the visual term would train the wrong preference.

Both log-probs are leaves of the training objectives. They are stored in the reference cache with
the keys and the fingerprint of training, so training finds them there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from transformers import PreTrainedModel

from realign.data.records import Record, RecordError
from realign.modeling import reference_logps
from realign.modeling.encode import encode_records
from realign.modeling.forest import Example
from realign.modeling.images import ImageStore
from realign.modeling.layouts import max_tokens
from realign.modeling.model import ForestModel
from realign.pairs.config import PairsConfig
from realign.pairs.engines import Reply
from realign.pairs.filters.base import Candidate, PairFilter
from realign.pairs.infill.refill import load_vlm
from realign.pairs.io.rows import model_digest
from realign_kernels import Objective, ReferenceCache, objectives

MARGIN = Objective(
    "visual margin",
    (objectives.CHOSEN, objectives.VISUAL),
    (objectives.PairSigmoid(name="visual", positive=0, negative=1),),
)
"""The chosen response on both images."""

_fingerprints: WeakKeyDictionary = WeakKeyDictionary()
"""Model -> (fingerprint, layout after the start-up check). Both take seconds to compute."""


class VisualMargin(PairFilter):
    """Keeps pairs whose chosen response has a higher log-prob on its own image."""

    columns = ("visual_margin",)
    needs_record = True
    uses_gpu = True

    _model: tuple[PreTrainedModel, Any] | None = None  # with its processor

    @classmethod
    def enabled(cls, config: PairsConfig) -> bool:
        """Whether `--margin` is given."""
        return config.margin

    def settings(self) -> dict[str, Any]:
        """The reference model."""
        config = self.config
        return {"margin": [config.base, model_digest(config.base), config.computed]}

    def open(self) -> None:
        """Loads the reference model."""
        self._model = load_vlm(self.config.base, self.config.dtype, **self.config.pixels)

    def close(self) -> None:
        """Releases the reference model."""
        self._model = None

    def check(self, candidates: Sequence[Candidate], replies: Sequence[Reply]) -> None:
        """Computes the margins, and drops candidates whose margin is not above 0."""
        assert self._model is not None
        by_name = {candidate.name: candidate for candidate in candidates}

        def mark_invalid(record: Record, error: RecordError) -> None:
            by_name[record.name].invalid = "no margin", str(error)

        margins = visual_margins(*self._model, [c.pair for c in candidates], on_bad=mark_invalid)
        for candidate, margin in zip(candidates, margins.tolist(), strict=True):
            if candidate.invalid is None:
                candidate.columns["visual_margin"] = margin
                if not margin > 0:
                    candidate.reason = "visual margin not above 0"


def visual_margins(
    vlm: PreTrainedModel,
    processor: Any,
    records: Sequence[Record],
    *,
    cache: str | None = None,
    log: Callable[[str], None] = lambda line: None,
    on_bad: Callable[[Record, RecordError], None] | None = None,
) -> np.ndarray:
    """Visual margins of records.

    Args:
        vlm: the reference model from `loading.load_model`, in the dtype of training and on its
            device. Its weights must not change between calls.
        processor: its processor.
        records: records with `retrieved_images`. Only the nearest negative is used, with as many
            images as `images`. A rejected response is not needed.
        cache: folder of reference log-probs. None means the default folder of training.
        log: called with the number of cached log-probs, and with settings that were replaced.
        on_bad: called with each invalid record and its error. Its margin is NaN.

    Returns:
        (records,) fp64, in nats.

    Raises:
        RecordError: for an invalid record, if `on_bad` is None.
        ValueError: for a model that has no forest layout.
    """
    training = vlm.training
    model = ForestModel(vlm, dtype=vlm.dtype).eval()
    invalid: set[int] = set()

    def exclude(record: Record, error: RecordError) -> None:
        if on_bad is None:
            raise error
        invalid.add(id(record))
        on_bad(record, error)

    examples, store = encode_records(
        records,
        processor,
        MARGIN,
        layout=model.layout,
        max_response_tokens=1024,
        max_tokens=max_tokens(vlm),
        progress=False,
        on_bad=exclude,
    )
    margins = np.full(len(records), np.nan)
    try:
        if not examples:
            return margins
        fingerprint = _fingerprint(model, processor, examples[0], store, log)
        directory = cache or reference_logps.default_directory()
        with ReferenceCache.open(directory, fingerprint) as table:
            logps = reference_logps.fill(
                table,
                model,
                examples,
                store,
                row_tokens=max(example.longest_tree for example in examples),
                batch_rows=32,
                device=vlm.device,
                progress=False,
                log=log,
            )
        margins[[id(record) not in invalid for record in records]] = (logps[0] - logps[1]).numpy()
    finally:
        vlm.train(training)
    return margins


def _fingerprint(
    model: ForestModel,
    processor: Any,
    example: Example,
    store: ImageStore,
    log: Callable[[str], None],
) -> dict[str, str]:
    """The fingerprint of this model in training, after the same check of its layout."""
    vlm = model.vlm
    if vlm not in _fingerprints:
        fingerprint = reference_logps.fingerprint(vlm, processor, model.dtype, vlm.device)
        for line in model.check_forest(example, store, vlm.device):
            log(line)
        _fingerprints[vlm] = fingerprint, model.layout
    fingerprint, checked = _fingerprints[vlm]
    store.layout.separate, store.layout.one_by_one = checked.separate, checked.one_by_one
    return fingerprint
