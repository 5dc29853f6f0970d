"""The final model as a Hugging Face folder: full weights, a LoRA adapter, or the two merged.

`python -m realign.export --model runs/rdpo/model --output merged` merges an adapter afterwards.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoConfig

from realign.cli import parse_sections
from realign.distributed import broadcast_from_rank0
from realign.evaluate.tables import table_of, with_table
from realign.files import check_folder
from realign.modeling.loading import DTYPES, load_model, load_processor
from realign.modeling.merging import adapter_base, cast, merge, put_on
from realign.modeling.model import ForestModel
from realign.third_party import silence_third_party
from realign.training.model_card import with_evaluation, without_adapter


@dataclass
class ExportConfig:
    model: str | None = None
    """Folder of an adapter or a whole model, or a name on the hub."""
    output: str | None = None
    """Folder to write: merged safetensors, the processor and the model card."""
    dtype: str | None = None
    """Keep the weights in fp32 or bf16; as the base keeps them when absent."""
    metrics: str | None = None
    """JSON file that realign.evaluate wrote with --output, to show in the model card: that of the
    digits, or pope.json, chair.json or hallusionbench.json."""

    def __post_init__(self) -> None:
        for name, needed in (("model", "a model"), ("output", "the folder to write")):
            if getattr(self, name) is None:
                raise ValueError(f"--{name} is missing; give {needed}.")
        if Path(self.output).resolve() == Path.cwd():
            raise ValueError(
                f"--output is {self.output!r}, the folder that you are in, and it is replaced when "
                "the new one is complete; name another, such as ./merged."
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}.")


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
        merge: merge the adapter into the base weights, kept in the base's dtype, instead of writing
            the adapter.
        card: makes the text of its README.md.

    Raises:
        CommonError: when it cannot be written: the ValueError of rank 0, on all ranks.
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
        except (OSError, SafetensorError, ValueError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise ValueError(
                f"{folder} could not be written ({error}). All steps are kept as checkpoints. "
                "Leave out --merge if that failed, else make room, and run the same with --resume."
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

    broadcast_from_rank0(write)


def _merge(folder: Path, base: str) -> None:
    """Replace the adapter in `folder` by the base weights with the adapter added in fp32."""
    merged = merge(put_on(load_model(base), folder))
    cast(merged, kept_dtype(base)).save_pretrained(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        (folder / name).unlink(missing_ok=True)


def kept_dtype(model: str) -> torch.dtype:
    """The dtype that a whole model, or the base of an adapter, is kept in."""
    return AutoConfig.from_pretrained(adapter_base(model) or model).dtype or torch.float32


def export_whole(config: ExportConfig) -> Path:
    """Write a model that needs nothing beside transformers; an adapter is merged in fp32.

    Its model card comes along; that of an adapter which another trainer wrote does not.

    Returns:
        The folder, loadable by `AutoModelForImageTextToText` and `AutoProcessor`.

    Raises:
        ValueError: when the folder is there already, or there is no model or metrics file.
        OSError: when it cannot be written; then nothing is left.
    """
    folder, model = Path(config.output), config.model
    check_folder("--output", folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is there already and not empty; name another --output.")
    evaluated = None if config.metrics is None else _evaluated(Path(config.metrics))
    processor = load_processor(model)
    dtype = DTYPES[config.dtype] if config.dtype else kept_dtype(model)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)  # or an error before the model is loaded
        cast(load_model(model), dtype).save_pretrained(partial)
        processor.save_pretrained(partial)
        card = None
        if (old := Path(model) / "README.md").exists():
            card = old.read_text(encoding="utf-8")
            card = without_adapter(card) if adapter_base(model) else card
        shown = evaluated(card) if card and evaluated else card
        if evaluated and shown == card:
            raise ValueError(
                f"{model} has no model card of ours to show metrics in; leave out --metrics."
            )
        if shown:
            (partial / "README.md").write_text(shown, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # it is empty
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _evaluated(file: Path) -> Callable[[str], str]:
    """What puts the figures in a file of `realign.evaluate --output` into a card."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not found.get("scores", found):
            raise ValueError("it is empty")
        if "scores" in found:
            table = table_of(found["scores"])
            return lambda card: with_table(card, table)
        rates = {name: {k: float(rate[k]) for k in _RATE} for name, rate in found.items()}
        return lambda card: with_evaluation(card, rates)
    except FileNotFoundError:
        raise ValueError(f"there is no {file}; realign.evaluate --output writes it.") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{file} holds no figures as realign.evaluate --output writes them ({error!r}). Give "
            "its JSON file for digits, or pope.json, chair.json or hallusionbench.json."
        ) from error


_RATE = ("value", "low", "high")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, export; returns an exit code."""
    silence_third_party()
    try:
        config = parse_sections(
            {"export": ExportConfig},
            prog="python -m realign.export",
            description="A trained model as one folder of safetensors with its model card.",
            arguments=arguments,
        )["export"]
        print(f"wrote {export_whole(config)}")
    except (ValueError, OSError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
