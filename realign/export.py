"""The final model as a Hugging Face folder: full weights, a LoRA adapter, or the two merged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from realign.loading import load_model
from realign.model import ForestModel
from realign.parallel import from_rank_0


def export(
    folder: Path,
    model: ForestModel,
    adapter: PeftModel | None,
    processor,
    *,
    base: str,
    merge: bool,
    card: Callable[[], str] = str,
) -> None:
    """Write `folder`, loadable by `AutoModelForImageTextToText` and `AutoProcessor`.

    Every rank calls it; rank 0 writes. It is written beside its name and renamed when complete.

    Args:
        folder: where to write.
        model: the trained module, sharded or not.
        adapter: the PEFT model around `model.vlm` when LoRA was trained, else None.
        processor: saved beside the weights.
        base: folder or hub name of the base model.
        merge: merge the adapter into the base weights instead of writing the adapter.
        card: makes the text of its README.md.

    Raises:
        CommonError: when it cannot be written.
    """
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapter is not None
    )
    whole = get_model_state_dict(model, options=options)

    def write() -> None:
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            write_into(partial)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise ValueError(
                f"{folder} could not be written ({error}). All steps are kept as checkpoints: make "
                "room, and run the same with --resume."
            ) from error
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)

    def write_into(folder: Path) -> None:
        weights = {name.removeprefix("vlm."): value for name, value in whole.items()}
        if adapter is None:
            model.vlm.save_pretrained(folder, state_dict=weights)
        else:
            prefixed = {f"base_model.model.{name}": value for name, value in weights.items()}
            adapter.save_pretrained(folder, state_dict=prefixed)
            if merge:
                _merge(folder, base)
        processor.save_pretrained(folder)
        (folder / "README.md").write_text(card(), encoding="utf-8")

    from_rank_0(write)


def _merge(folder: Path, base: str) -> None:
    """Replace the adapter in `folder` by the base weights with the adapter added, in fp32."""
    merged = PeftModel.from_pretrained(load_model(base, torch.float32), str(folder))
    merged.merge_and_unload().save_pretrained(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        (folder / name).unlink(missing_ok=True)
