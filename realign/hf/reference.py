"""`RDPOConfig.reference_model`: another model than the one that is trained, as the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

from realign.hf import adapters, parts
from realign.modeling.attention import IMPLEMENTATIONS
from realign.modeling.examples import Examples
from realign.modeling.loading import check_unquantized, load_model, load_processor, set_pixels
from realign.modeling.model_files import COUNTS_PIXELS
from realign.training.reference import check_encodings, named


@dataclass(frozen=True)
class Encoded:
    """A model, which may be without weights, and all records encoded for it."""

    base: str
    processor: Any
    model: parts.Module
    examples: Examples


def check(
    path: str,
    policy: Encoded,
    encode: Callable[[Any, parts.Module], Sequence[Examples]],
) -> None:
    """Check that another model encodes the records as the policy does. Its weights are not read.

    Args:
        path: folder or Hub name of the other model.
        policy: the model that is trained. Limits on its images' pixels apply to both models.
        encode: encodes the data sets, given a processor and a module.

    Raises:
        ValueError: for a model that encodes a record differently, or that cannot be used.
    """
    setting = f"reference_model {path}"
    with named(setting):
        check_unquantized(path, None)
        processor = load_processor(path)
        own = policy.processor.image_processor
        if COUNTS_PIXELS.fullmatch(type(processor.image_processor).__name__):
            size = dict(own.size)
            set_pixels(processor, size.get("shortest_edge"), size.get("longest_edge"))
        vlm = load_model(path, policy.model.dtype, meta=True)
        module = parts.Module(vlm, train_vision=False, dtype=policy.model.dtype)
    other = Encoded(path, processor, module, reduce(add, encode(processor, module)))
    check_encodings(policy, other, setting)


def load(path: str, policy: parts.Module) -> parts.Module:
    """Load another model, with the policy's dtypes and attention, for a forward like the policy's.

    Args:
        path: folder or Hub name.
        policy: the model that is trained.
    """
    attention = next(name for name, kind in IMPLEMENTATIONS.items() if kind == policy.attention)
    weights = adapters.base_state(policy.vlm).values()
    dtype = next(weight.dtype for weight in weights if weight.is_floating_point())
    vlm = load_model(path, dtype, attention)
    return parts.Module(vlm, train_vision=False, dtype=policy.dtype)
