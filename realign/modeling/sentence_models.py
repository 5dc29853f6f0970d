"""Loading of models of the sentence-transformers package, from folders and Hub names.

Such a folder names the classes and subfolders of its modules. Only modules that load safetensors
weights by transformers, or a few weights of their own, are read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers.utils.hub import extract_commit_hash

from realign.data.errors import short_repr
from realign.files import read_json
from realign.modeling.model_files import check_model, find_file
from realign.terminal import printable

_MODULES = (
    "CLIPModel", "Dense", "Dropout", "LayerNorm", "Normalize", "Pooling", "StaticEmbedding",
    "Transformer", "WeightedLayerPooling",
)  # fmt: skip
_PACKAGES = "models|base.modules|sentence_transformer.modules"
_TYPE = re.compile(rf"sentence_transformers\.({_PACKAGES})(\.[a-z_]+)?\.({'|'.join(_MODULES)})")
_PLACE = re.compile(r"(?!\.)[\w.\-]*")
_ARGUMENTS = {
    "add_pooling_layer", "do_lower_case", "dtype", "max_length", "model_max_length",
    "padding_side", "torch_dtype", "truncation_side",
}  # fmt: skip
"""Arguments of transformers that a folder may set. Others name files or code."""
_SETTINGS = (
    "bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet",
)  # fmt: skip
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def load_sentence_model(name: str, device: str | None = None) -> Any:
    """Load a sentence-transformers model, without its code and only from safetensors weights.

    Args:
        name: folder or Hub name of the model.
        device: device of the model; the package's choice if None.

    Raises:
        ValueError: when the package is missing, or the model cannot be loaded or is refused.
    """
    try:
        from sentence_transformers import (  # pyright: ignore[reportMissingImports]
            SentenceTransformer,
        )
    except ImportError as error:
        raise ValueError(
            f"the model {name} needs the package sentence-transformers, which is not installed. "
            "Run pip install 'realign[sentences]'."
        ) from error
    try:
        options: dict[str, Any] = {"model_kwargs": {"use_safetensors": True}}
        if commit := check_sentence_model(name):
            options["revision"] = commit
        if device is not None:
            options["device"] = device
        return SentenceTransformer(name, trust_remote_code=False, **options)
    except Exception as error:  # a wrong value in a file raises errors of many types
        reason = printable(str(error).split("\n")[0])[:400] or type(error).__name__
        raise ValueError(
            f"no sentence-transformers model could be loaded from {name} ({reason}). "
            "Pass a folder or a Hub name, such as sentence-transformers/all-mpnet-base-v2."
        ) from error


def check_sentence_model(name: str) -> str | None:
    """Check a model's modules, and the files of each.

    Returns:
        The commit on the Hub that was checked, or None for a folder.

    Raises:
        ValueError: for a module of another type or in another place, or a refused file.
        OSError: for a file that cannot be read.
    """
    if (file := find_file(name, "modules.json")) is None:
        return check_model(name, weights=True)  # a model of transformers
    commit = None if Path(name).is_dir() else extract_commit_hash(file, None)
    check_model(name, weights=True)
    for module in read_json(file, list):
        kind, place = module.get("type"), module.get("path")
        if not isinstance(kind, str) or not _TYPE.fullmatch(kind):
            raise ValueError(
                f"{file} names a module of type {short_repr(kind)}, and its code is never run here"
            )
        if not isinstance(place, str) or not _PLACE.fullmatch(place):
            raise ValueError(f"{file} names a module in {short_repr(place)}, outside of its folder")
        _check_module(name, place, commit)
    return commit


def _check_module(name: str, place: str, commit: str | None) -> None:
    """Check the files of one module of a model."""
    check_model(name, place, weights=True)
    safe, pickled = (find_file(name, str(Path(place, file)), commit) for file in _WEIGHTS)
    if pickled and not safe:
        raise ValueError(f"{pickled} is a pickle, and weights are read only from safetensors files")
    for kind in _SETTINGS:
        if file := find_file(name, str(Path(place, f"sentence_{kind}_config.json")), commit):
            for key, value in read_json(file).items():
                given = (
                    value if isinstance(value, dict) and key.endswith(("_args", "_kwargs")) else {}
                )
                if others := given.keys() - _ARGUMENTS:
                    raise ValueError(f"{file} sets {short_repr(min(others))} in {key}")
