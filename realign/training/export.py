"""Export of a model as a Hugging Face folder: full weights, a LoRA adapter, or the two merged."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoConfig

from realign.distributed import broadcast_from_rank0
from realign.files import check_folder
from realign.modeling.loading import load_model, load_processor
from realign.modeling.merging import adapter_base, cast, merge, put_on
from realign.modeling.model import ForestModel
from realign.training.model_card import with_evaluation, without_adapter


def stored_dtype(model: str) -> torch.dtype:
    """The dtype in which a whole model, or the base of an adapter, is stored."""
    dtype = AutoConfig.from_pretrained(adapter_base(model) or model).dtype or torch.float32
    assert isinstance(dtype, torch.dtype)
    return dtype


def export_trained(
    folder: Path,
    model: ForestModel,
    adapter: PeftModel | None,
    processor,
    *,
    base: str,
    merged: bool,
    card: Callable[[], str],
) -> None:
    """Write `folder`, loadable by `AutoModelForImageTextToText` and `AutoProcessor`.

    Every rank calls it; rank 0 writes.

    Args:
        folder: folder to write.
        model: the trained module, sharded or not.
        adapter: the PEFT model around `model.vlm` when LoRA was trained, else None.
        processor: saved beside the weights.
        base: folder or hub name of the base model.
        merged: write the base weights with the adapter merged in, in the base's dtype, instead of
            the adapter.
        card: returns the text of its README.md; called on rank 0.

    Raises:
        CommonError: when it cannot be written: the ValueError of rank 0, on all ranks.
    """
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapter is not None
    )
    state = get_model_state_dict(model, options=options)

    def write() -> None:
        try:
            with _replaced(folder) as partial:
                _save(partial, state, model, adapter, base if merged else None)
                processor.save_pretrained(partial)
                (partial / "README.md").write_text(card(), encoding="utf-8")
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(
                f"{folder} could not be written ({error}). All steps are kept as checkpoints. "
                "Leave out --merge if that failed, else make room, and run the same with --resume."
            ) from error

    broadcast_from_rank0(write)


def export_whole(
    model: str,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    evaluation: str | None = None,
) -> Path:
    """Write a model that needs nothing beside transformers; an adapter is merged in fp32.

    A model card of this project is copied; the card of an adapter by another trainer is not.

    Args:
        model: folder of an adapter or a whole model, or a name on the hub.
        folder: folder to write.
        dtype: dtype of the weights; that of the base when absent.
        evaluation: Markdown for the section "Evaluation" of the card.

    Returns:
        The folder, loadable by `AutoModelForImageTextToText` and `AutoProcessor`.

    Raises:
        ValueError: when the folder exists already, or there is no model or no card.
        OSError: when it cannot be written; then no file remains.
    """
    check_folder("--output", folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is there already and not empty; name another --output.")
    processor = load_processor(model)
    with _replaced(folder) as partial:
        cast(load_model(model), dtype or stored_dtype(model)).save_pretrained(partial)
        processor.save_pretrained(partial)
        card = None
        if (old_card := Path(model) / "README.md").exists():
            card = old_card.read_text(encoding="utf-8")
            card = without_adapter(card) if adapter_base(model) else card
        if evaluation is not None:
            evaluated = with_evaluation(card, evaluation) if card else None
            if evaluated == card:
                raise ValueError(
                    f"{model} has no model card of ours to show metrics in; leave out --metrics."
                )
            card = evaluated
        if card:
            (partial / "README.md").write_text(card, encoding="utf-8")
    return folder


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that replaces it at the end; an error removes the new folder."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save(
    folder: Path,
    state: dict[str, Any],
    model: ForestModel,
    adapter: PeftModel | None,
    base: str | None,
) -> None:
    """Save weights, or the adapter, or with `base` the base with the adapter merged in fp32."""
    weights = {name.removeprefix("vlm."): value for name, value in state.items()}
    if adapter is None:
        model.vlm.save_pretrained(folder, state_dict=weights)
        return
    prefixed = {f"base_model.model.{name}": value for name, value in weights.items()}
    adapter.save_pretrained(str(folder), state_dict=prefixed)
    if base is not None:
        merged = merge(put_on(load_model(base), folder))
        cast(merged, stored_dtype(base)).save_pretrained(folder)
        for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
            (folder / name).unlink(missing_ok=True)
