"""Export of a model to a Hugging Face folder: full weights, an adapter, or a merged adapter."""

from __future__ import annotations

import errno
import shutil
import uuid
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
from realign.files import check_folder, read_limited
from realign.modeling.loading import from_pretrained, load_model, load_processor
from realign.modeling.merging import adapter_base, cast, merge, put_on
from realign.modeling.model import ForestModel
from realign.modeling.model_files import find_file
from realign.training.model_card import with_evaluation, without_adapter
from realign.training.serving import commands

_MOST_CARD = 16 << 20  # bytes


def stored_dtype(model: str) -> torch.dtype:
    """The stored dtype of a whole model, or of an adapter's base."""
    config = from_pretrained(AutoConfig, adapter_base(model) or model)
    dtype = config.dtype or torch.float32
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
    card: Callable[[Path], str],
) -> None:
    """Write a trained model to `folder`, for `AutoModelForImageTextToText` and `AutoProcessor`.

    Every rank calls it, and rank 0 writes.

    Args:
        folder: folder to write.
        model: the trained module, sharded or not.
        adapter: the PEFT model around `model.vlm` if LoRA was trained, or None.
        processor: saved beside the weights.
        base: folder or Hub name of the base model.
        merged: merge the adapter into the base and write whole weights, in the base's dtype.
        card: returns the text of README.md for the written files; called on rank 0.

    Raises:
        CommonError: on all ranks, when rank 0 cannot write the folder (a ValueError on rank 0).
    """
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapter is not None
    )
    state = get_model_state_dict(model, options=options)

    def write() -> None:
        try:
            with _replacing(folder, old=True) as partial:
                _save(partial, state, model, adapter, base if merged else None)
                processor.save_pretrained(partial)
                (partial / "README.md").write_text(card(partial), encoding="utf-8")
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(
                f"{folder} could not be written ({error}). The trained weights are kept in a "
                "checkpoint. Leave out --merge if the merge failed. If the disk is full, free some "
                "space, and run the same command with --resume."
            ) from error

    broadcast_from_rank0(write)


def export_whole(
    model: str,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    evaluation: str | None = None,
) -> Path:
    """Write a whole model that transformers loads by itself. An adapter is merged in fp32.

    The model card is copied, except for an adapter's card by another trainer. `missing_card` gives
    the reason if there is none.

    Args:
        model: folder of an adapter or a whole model, or a name on the Hub.
        folder: folder to write.
        dtype: dtype of the weights; the base's if absent.
        evaluation: Markdown for the section "Evaluation" of the card.

    Returns:
        The folder, for `AutoModelForImageTextToText` and `AutoProcessor`.

    Raises:
        ValueError: when the folder is not empty, there is no model, or `evaluation` is given and
            there is no card.
        OSError: when the folder cannot be written. No file is left behind.
    """
    check_folder("--output", folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists already and is not empty. Name another --output.")
    processor = load_processor(model)
    card = _whole_card(model, evaluation)
    with _replacing(folder) as partial:
        vlm = cast(load_model(model), dtype or stored_dtype(model))
        vlm.save_pretrained(partial)
        processor.save_pretrained(partial)
        if card:
            (partial / "README.md").write_text(card, encoding="utf-8")
    return folder


def read_card(model: str) -> str:
    """The text of a model's card with line ends of Unix, "" without one.

    Args:
        model: folder or Hub name.

    Raises:
        OSError: for a card that cannot be read.
        ValueError: for a card that is too large.
    """
    file = find_file(model, "README.md")
    if file is None or not Path(file).exists():  # a link may lead nowhere
        return ""
    # Some editors write a byte order mark and line ends of Windows.
    text = read_limited(file, _MOST_CARD).decode("utf-8-sig", errors="replace")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def missing_card(model: str, folder: Path) -> str | None:
    """A line with the reason why an exported folder has no model card; None if it has one."""
    if (folder / "README.md").exists():
        return None
    why = f"{model} has none"
    if read_card(model):
        why = f"that of {model} is by another trainer and describes an adapter"
    return f"{folder} has no model card: {why}"


def _whole_card(model: str, evaluation: str | None) -> str | None:
    """The card of the whole model; None without one. See `export_whole`."""
    card = read_card(model) or None
    if card and (base := adapter_base(model)):
        kind = from_pretrained(AutoConfig, base, adapter=model).model_type
        use = commands(Path(model), adapter=False, base=base, model_type=kind)
        card = without_adapter(card, use)
    if evaluation is None:
        return card
    if not card or (card := with_evaluation(card, evaluation)) is None:
        raise ValueError(
            f"{model} has no model card of this project to add metrics to. Leave out --metrics."
        )
    return card


@contextmanager
def _replacing(folder: Path, *, old: bool = False) -> Iterator[Path]:
    """A new folder that is renamed to `folder` at the end of the context. An error removes it.

    Its name is unpredictable, so it is no folder of the user or of another export.

    Args:
        folder: the folder to write. Missing parents are created.
        old: whether files in `folder` are replaced. Without it they are an error.
    """
    folder = folder.resolve()  # rename replaces no link
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        if old:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            partial.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise ValueError(
                f"another process wrote files to {folder} during the export. Name another --output."
            ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save(
    folder: Path,
    state: dict[str, Any],
    model: ForestModel,
    adapter: PeftModel | None,
    base: str | None,
) -> None:
    """Save weights, the adapter, or (with `base`) the base with the adapter merged in fp32."""
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
