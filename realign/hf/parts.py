"""Parts of `realign.hf`: the module that Trainer trains, its data, losses to check, references."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainingArguments

from realign.modeling.forest import Example
from realign.modeling.loading import adapter_base, load_processor
from realign.modeling.model import ForestModel
from realign_kernels import leaf_keys


class Module(ForestModel):
    """A ForestModel with the attributes and methods that Trainer asks for."""

    @property
    def config(self) -> Any:
        return self.vlm.config

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        self.vlm.gradient_checkpointing_enable(*args, **kwargs)


class Places(Dataset):
    """Indices first .. last - 1 of the examples."""

    def __init__(self, first: int, last: int) -> None:
        self._range = range(first, last)

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, i: int) -> int:
        return self._range[i]


def indices(places: Sequence[int]) -> dict[str, torch.Tensor]:
    """A batch, collated: its indices, (B,) int64."""
    return {"places": torch.tensor(places)}


class Losses:
    """Losses that are still on the device, read together by `check`."""

    def __init__(self) -> None:
        self._pending: list[tuple[torch.Tensor, tuple[str, ...]]] = []

    def add(self, loss: torch.Tensor, names: tuple[str, ...]) -> None:
        """Keep a scalar loss of the records of these names."""
        self._pending.append((loss.detach(), names))

    def clear(self) -> None:
        """Forget them."""
        self._pending = []

    def check(self) -> None:
        """Read all in one copy, and forget them.

        Raises:
            ValueError: when one is not finite; names its records.
        """
        pending, self._pending = self._pending, []
        values = torch.stack([loss for loss, _ in pending]).tolist() if pending else []
        for value, (_, names) in zip(values, pending, strict=True):
            if not math.isfinite(value):
                raise ValueError(
                    f"the loss of records {', '.join(names)} is {value}. Look at their images and "
                    "texts, or lower the learning rate; checkpoints are kept."
                )


def reporter(args: TrainingArguments) -> Callable[[str], None]:
    """Prints a line for the user, on the first process only, and never with disable_tqdm."""
    return print if args.process_index == 0 and not args.disable_tqdm else lambda line: None


def checked_processor(processor: Any, path: str | Path, vlm: PreTrainedModel) -> Any:
    """The processor given, or that of the model's folder when it is None.

    Raises:
        ValueError: when it is no processor of images and text, or one of another model.
    """
    remedy = "give the model's processor, as AutoProcessor.from_pretrained(...) returns it."
    if processor is None:
        if not str(path):
            raise ValueError(f"processing_class is None, and the model has no name; {remedy}")
        processor = load_processor(path)
    kind = type(processor).__name__
    for part in ("tokenizer", "image_processor", "apply_chat_template"):
        if not hasattr(processor, part):
            raise ValueError(f"processing_class is a {kind}, which has no {part}; {remedy}")
    if not getattr(processor, "chat_template", None):
        raise ValueError(
            f"processing_class is a {kind} without a chat template, so prompts cannot be rendered; "
            "set its chat_template."
        )
    tokens, rows = len(processor.tokenizer), vlm.get_input_embeddings().weight.shape[0]
    mine = vlm.config.image_token_id
    # Gemma 3's processor has the token before an image; its tokenizer that of the features.
    theirs = {getattr(part, "image_token_id", mine) for part in (processor, processor.tokenizer)}
    if tokens > rows or mine not in theirs:
        raise ValueError(
            f"processing_class is of another model: {kind} has {tokens} tokens, image token "
            f"{min(theirs)}, and the model ({vlm.config.model_type}) {rows}, {mine}; {remedy}"
        )
    return processor


def check_whole(vlm: PreTrainedModel) -> None:
    """Refuse a model without adapters that learns nothing, or that could not be saved.

    Raises:
        ValueError: with the remedy.
    """
    if not any(parameter.requires_grad for parameter in vlm.parameters()):
        raise ValueError("no weight of the model learns; set requires_grad_(True).")
    try:
        with TemporaryDirectory() as folder:
            vlm.generation_config.save_pretrained(folder)
    except ValueError as error:
        raise ValueError(
            "the model's generation_config was changed, and transformers would not save it "
            f"({textwrap.shorten(str(error), 250, placeholder=' ...')}). Set do_sample=True in it, "
            "or leave out the sampling settings."
        ) from error


def load_weights(vlm: PreTrainedModel, folder: Path) -> None:
    """Load all weights of a checkpoint into a model without adapters.

    Raises:
        ValueError: when the checkpoint holds an adapter.
    """
    if adapter_base(folder):
        raise ValueError(f"{folder} holds an adapter. Resume with the peft_config that it had.")
    saved = type(vlm).from_pretrained(folder, dtype=vlm.dtype)
    vlm.load_state_dict(saved.state_dict())


def agreed(fingerprint: dict[str, str]) -> dict[str, str]:
    """The fingerprint of a reference that all processes have; every one calls it.

    Raises:
        ValueError: when they were handed different weights, as random adapters without a seed.
    """
    if len(set(gather_object([fingerprint["weights"]]))) > 1:
        raise ValueError(
            "the processes were handed models with different weights. Call set_seed before "
            "get_peft_model, or give a peft_config."
        )
    return fingerprint


_FILE = "reference.json"
_COMPARED = 8  # examples of a checkpoint whose references are kept
_ROUNDING = {"float32": 1e-4, "bfloat16": 0.02}
"""Mean difference of a token's log-prob, up to which two references are one that is rounded."""


class KeptReference:
    """The reference of a run, kept beside its checkpoints: a digest, and a few log-probs.

    Adapters that begin with random numbers compute the same under many digests, so where digests
    differ log-probs decide.

    Args:
        fingerprint: of `reference.fingerprint`.
        examples: of the run.
        references: their log-probs, (L, examples).
    """

    def __init__(
        self, fingerprint: dict[str, str], examples: Sequence[Example], references: torch.Tensor
    ) -> None:
        few = examples[:_COMPARED]
        values = references[:, : len(few)].T.flatten().tolist()
        keys = [bytes(key).hex() for key in leaf_keys(few)]
        self._tokens = sum(len(leaf.ids) for example in few for leaf in example.leaves)
        self._about = {"weights": fingerprint["weights"], "dtype": fingerprint["dtype"]}
        self._logps = dict(zip(keys, values, strict=True))

    def save(self, folder: Path) -> None:
        """Write the file that `check` reads."""
        text = json.dumps(self._about | {"logps": self._logps}, indent=1)
        (folder / _FILE).write_text(text, encoding="utf-8")

    def check(self, folder: Path) -> None:
        """Compare with the reference of a checkpoint.

        Raises:
            ValueError: when it is another one, or there is none.
        """
        file = folder / _FILE
        if not file.exists():
            raise ValueError(
                f"{folder} holds no {_FILE}, so its reference is not known: another trainer wrote "
                "it, or an earlier version of this one. Resume it with that, or begin a new run."
            )
        theirs = json.loads(file.read_text(encoding="utf-8"))
        if theirs["weights"] == self._about["weights"]:
            return
        shared = self._logps.keys() & theirs["logps"].keys()
        gap = sum(abs(self._logps[key] - theirs["logps"][key]) for key in shared)
        if len(shared) < len(self._logps) or gap / self._tokens > _ROUNDING[self._about["dtype"]]:
            found = "its first records are others"
            if len(shared) == len(self._logps):
                found = f"log-probs differ by {gap / self._tokens:.2g} a token"
            raise ValueError(
                f"the reference of the checkpoint {folder} is another model than the one handed "
                f"over ({found}). Hand over the same model, with the same adapters: save them "
                "before the first run and load them for both, or give a peft_config and a seed."
            )
