"""Checks of a stranger's model files, before transformers reads them.

transformers takes names of files, classes and other models from a model's JSON files. Some of them
lead outside of the folder, to `torch.load`, or to code on the Hub. Its own checks depend on the
version, so the checks here come first. They cover 5.23, key by key.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file, extract_commit_hash

from realign.data.errors import short_repr
from realign.files import open_regular, read_json

INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"
_JSON = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "chat_template.json", "audio_tokenizer_config.json",
)  # fmt: skip
_PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json")
_PLAIN_NAME = re.compile(r"[^/\\\0]+")
_CLASS_NAME = re.compile(r"\w*(Processor|FeatureExtractor|Tokenizer|Backend)(Fast|Pil|Mixin)?")
_TIMM_NAME = re.compile(r"[\w.\-]+")
_CLASSES = (
    "processor_class", "tokenizer_class", "image_processor_type", "image_processor_class",
    "feature_extractor_type", "feature_extractor_class", "video_processor_type",
    "video_processor_class", "audio_tokenizer_class",
)  # fmt: skip
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_IMPLEMENTATIONS = {
    None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4",
    "flex_attention", "grouped_mm", "batched_mm",
}  # fmt: skip
_REFUSED = {
    "transformers_weights": "a file of weights in another place",
    "audio_tokenizer": "another model",
    "audio_tokenizer_name_or_path": "another model",
    "extra_files": "more files of weights",
    "class_info_file": "a file in another repository",
    "gguf_file": "a file in a format that is not read here",
    "custom_generate": "code",
    "use_kernels": "code on the Hub",
    "kernel_config": "code on the Hub",
    "fusion_config": "changes of the model's classes",
    "distributed_config": "changes of the model's classes",
    "checkpoint_path": "a file of weights in another place",
    "tokenizer_object": "a file",
    "init_inputs": "files",
}
"""Keys of configurations -> what transformers opens for them."""
_UNREAD = {"name_or_path", "_name_or_path", "special_tokens_map_file", "tokenizer_file"}
"""Keys of a tokenizer's configuration that often hold old paths, which transformers replaces."""
_OPENED = re.compile(r".*(file|files|path|dir)|vocab|merges|.*_spm")
_QUANTIZED = ("bitsandbytes", "fp8", "mxfp4")
_MODULES = re.compile(r"[\w.\-^$]*(\*[\w.\-^$]*){0,2}")
"""Names of modules. transformers matches them as expressions, such as model.layers.*.mlp."""
_LAYERS = re.compile(r".*(layers?|depths?)")
_MOST_LAYERS = 1024  # The deepest known model has 126. A list with an entry per layer is built.
_MOST_LABELS = 1_000_000  # a name per label is built
_NUMBER = (int, float)
COUNTS_PIXELS = re.compile(
    r"(CohereCompass|Cosmos3Edge|Ernie4_5_?VL_?Moe|Glm\w*|HunYuanVL|MiniMaxM3VL|NeoMME|PaddleOCRVL|"
    r"Qwen[\d_]*VL|VideoLlama3)(Image|Video)Processor(Fast|Pil)?"
)
"""Classes whose two edges are numbers of pixels."""
_SHORTEST_SIDE = 1024  # known models use up to 800
FEWEST_PIXELS = 1 << 24  # smaller images are enlarged to this number
_LONGEST_SIDE = 8192
_MOST_TILES = 4096  # Pix2Struct has 2048. InternVL tries every pair of numbers up to its own.
_MOST_OF_PROCESSOR = 1 << 24  # of other numbers, such as ids, tokens of an image and samples
_TEMPLATES = "additional_chat_templates"
_NEEDED = (".json", ".jinja", ".safetensors", ".model", ".tiktoken", ".spm")
_TEXTS = (".txt", ".bpe", ".codes", ".tokenizer")
"""Suffixes of files that transformers, PEFT and sentence-transformers open."""
_SHARD = re.compile(r"shard-.*\.safetensors")


def check_model(path: str | Path, place: str = "", *, weights: bool = False) -> str | None:
    """Check the files of a model, processor or adapter, in a folder or on the Hub.

    Args:
        path: folder or Hub name.
        place: subfolder of the files, "" for the folder itself.
        weights: also check the index of the weights.

    Returns:
        The commit on the Hub that was checked. Load the same one. None for a folder.

    Raises:
        ValueError: for a file or a field that loading would not survive, or that opens, imports or
            downloads something else.
        OSError: for a file that cannot be read.
    """
    commit = None
    if Path(path).is_dir():
        _check_folder(Path(path), place)
    else:
        names = ("config.json", "adapter_config.json", "modules.json")
        files = (find_file(path, str(Path(place, name))) for name in names)
        if (found := next(filter(None, files), None)) is None:
            return None  # loading reports it
        commit = extract_commit_hash(found, None)
        _check_folder(Path(found).parents[len(Path(place).parts)], place, hub=True)
    for name in _JSON:
        if file := find_file(path, str(Path(place, name)), commit):
            _check_fields(Path(file), read_json(file))
    if weights and (file := find_file(path, str(Path(place, INDEX)), commit)):
        _check_index(Path(file))
    return commit


def most_numbers(path: str | Path, commit: str | None = None) -> int:
    """Numbers that a model may register for its safetensors files, see `limits.limited`.

    One per byte, or four for quantized weights. A byte holds two numbers in 4 bits, and
    transformers builds each quantized layer twice.
    """
    names = {_WEIGHTS}
    if not find_file(path, _WEIGHTS, commit) and (file := find_file(path, INDEX, commit)):
        names = set(read_json(file)["weight_map"].values())
    files = [file for name in names if (file := find_file(path, name, commit))]
    config = find_file(path, "config.json", commit)
    quantized = config and any(
        key == "quantization_config" for key, _ in _entries(read_json(config))
    )
    return sum(os.path.getsize(file) for file in files) * (4 if quantized else 1)


def find_file(path: str | Path, name: str, commit: str | None = None) -> str | None:
    """The path of the file `name` in a folder or a model on the Hub; None if it is missing."""
    if Path(path).is_dir():
        file = Path(path, name)
        return str(file) if os.path.lexists(file) else None
    return _remote_file(str(path), name, commit)


@functools.cache  # avoids a request to the Hub per call
def _remote_file(repository: str, name: str, commit: str | None) -> str | None:
    try:
        return cached_file(
            repository,
            name,
            revision=commit,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # an invalid Hub name, which loading reports
        return None


def _check_folder(folder: Path, place: str, *, hub: bool = False) -> None:
    """Check that files in `place` of a folder are regular, and that links stay in the folder.

    The files of a snapshot in the Hub's cache are links to its blobs. huggingface_hub made them if
    `hub` is set, and it replaces missing blobs.
    """
    root = folder.resolve()
    for parent in (root, *root.parents):
        if parent.name.startswith("models--") and root.is_relative_to(parent / "snapshots"):
            root = parent
    for inside in (folder / place, folder / place / _TEMPLATES):
        for entry in os.scandir(inside) if inside.is_dir() else ():
            file = Path(entry.path)
            if not _is_read(file, hub):
                continue
            if not hub and not file.resolve().is_relative_to(root):
                raise ValueError(
                    f"{file} leads to {file.resolve()}, outside of the model's folder, and such "
                    "files are not read. Replace the link by the file or by a hard link (ln), copy "
                    "the folder with cp -rL, or pass the model's Hub name."
                )
            if not entry.is_dir():
                open_regular(file).close()
            if _SHARD.fullmatch(entry.name):
                raise ValueError(
                    f"{file} belongs to a distributed checkpoint, which is not read as a model. "
                    "Save the model with save_pretrained."
                )


def _is_read(file: Path, hub: bool) -> bool:
    """Whether loading, or the export of a model card, reads a file of this name."""
    if not file.exists() and (hub or file.suffix not in _NEEDED):  # a link that leads nowhere
        return False
    return file.suffix in (*_NEEDED, *_TEXTS) or file.name == "README.md"


def _check_fields(file: Path, fields: dict[str, Any]) -> None:
    """Check the fields of a configuration, at any depth."""
    checks: list[Callable[[str, Any], str | None]] = [_why_refused]
    if file.name in _TOKENIZER:
        checks.append(_why_opened)
    if file.name in _PROCESSOR:
        checks.append(_why_large)
        _check_edges(file, fields)
    for key, value in _entries(fields):
        if why := next(filter(None, (check(key, value) for check in checks)), None):
            raise ValueError(
                f"{file} sets {short_repr(key)} to {short_repr(value)}: {why}. Use another model, "
                "or remove the entry if you trust its author."
            )
    if file.name == "special_tokens_map.json":  # its entries replace arguments of the tokenizer
        for key in fields:
            if not key.endswith(("_token", "_tokens")):
                raise ValueError(f"{file} sets {short_repr(key)}, which is no token. Remove it.")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """(key, value) at every depth of JSON. Entries of lists have the key of the list."""
    waiting = [("", value)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            under = key if _IMPLEMENTATION.fullmatch(key) else None
            waiting += [(under or name, item) for name, item in value.items()]
            yield from ((name, item) for name, item in value.items() if isinstance(item, dict))
        elif isinstance(value, list):
            waiting += [(key, item) for item in value]
        else:
            yield key, value


def _why_refused(key: str, value: Any) -> str | None:
    if not value:
        return None
    if key in _REFUSED:
        return f"it names {_REFUSED[key]}"
    if _IMPLEMENTATION.fullmatch(key) and not isinstance(value, dict):
        if value not in _IMPLEMENTATIONS:
            return "it may name code on the Hub"
    elif key in _CLASSES:
        if not isinstance(value, str) or not _CLASS_NAME.fullmatch(value):
            return "it names another kind of class"
    elif key in ("architecture", "backbone") and isinstance(value, str):
        if not _TIMM_NAME.fullmatch(value):
            return "timm may read it as a name on the Hub"
    elif key == "quantization_config":
        if not isinstance(value, dict) or value.get("quant_method") not in _QUANTIZED:
            return f"of quantized weights only {', '.join(_QUANTIZED)} are read"
        texts = (text for _, text in _entries(value) if isinstance(text, str))
        if not all(_MODULES.fullmatch(text) for text in texts):
            return "one of its names is an expression"
    elif isinstance(value, int) and not isinstance(value, bool):
        if value > _MOST_LAYERS and _LAYERS.fullmatch(key):
            return f"no model has more than {_MOST_LAYERS:,}"
        if value > _MOST_LABELS and key == "num_labels":
            return f"no model has more than {_MOST_LABELS:,}"
    return None


def _why_opened(key: str, value: Any) -> str | None:
    """Why an entry of a tokenizer's configuration is refused: it is a path that may be opened."""
    if not isinstance(value, str) or key in _UNREAD or not _OPENED.fullmatch(key):
        return None
    old = key in ("vocab_file", "merges_file") and Path(value).is_absolute()
    if old and not os.path.lexists(value):  # of the author's machine; never opened if missing
        return None
    if key in ("vocab", "merges") or not _PLAIN_NAME.fullmatch(value) or value == "..":
        return "it names a file in another place"
    return None


def _why_large(key: str, value: Any) -> str | None:
    """Why a size in a processor's configuration is refused: an image would take gigabytes."""
    most = _MOST_OF_PROCESSOR
    if "edge" in key or key.endswith("max_length"):
        return None
    if key.endswith("pixels") and "min" not in key:  # a budget, such as total_pixels of a video
        return None
    elif key in ("height", "width") or key.endswith("size"):
        most = _LONGEST_SIDE
    elif "patches" in key or "tiles" in key:
        most = _MOST_TILES
    return f"the limit is {most:,}" if isinstance(value, _NUMBER) and value > most else None


def _check_edges(file: Path, fields: dict[str, Any]) -> None:
    """Refuse a `size` in a processor's configuration that enlarges images to gigabytes.

    `shortest_edge` enlarges an image of any aspect ratio up to `longest_edge`. In some classes the
    two are numbers of pixels, and smaller images are enlarged to the first.
    """
    parts = [(file.name, fields)]
    while parts:
        name, part = parts.pop()
        of_video = name.startswith("video_p")
        kind = part.get("video_processor_type" if of_video else "image_processor_type")
        counts = isinstance(kind, str) and COUNTS_PIXELS.fullmatch(kind)
        for key, value in part.items():
            inner = value if isinstance(value, list) else [value]
            parts += [(key, item) for item in inner if isinstance(item, dict)]
            sides = (
                {"shortest_edge": value} if key == "size" and isinstance(value, _NUMBER) else value
            )
            if not isinstance(sides, dict):
                continue
            shortest, longest = _edge(sides, "shortest_edge"), _edge(sides, "longest_edge")
            edge, most, given = "shortest_edge", _SHORTEST_SIDE, shortest
            if longest and counts:
                most = FEWEST_PIXELS
            elif not shortest:
                edge, most, given = "longest_edge", _LONGEST_SIDE, longest
            elif 0 < longest <= _LONGEST_SIDE:
                continue
            if given > most:
                raise ValueError(
                    f"{file} sets {short_repr(key)} to {short_repr(value)}: the limit of {edge} is "
                    f"{most:,}. Use another model, or lower the number."
                )


def _edge(size: dict[str, Any], name: str) -> float:
    return value if isinstance(value := size.get(name), _NUMBER) else 0


def _check_index(file: Path) -> None:
    """Check that an index names safetensors files in its own folder."""
    index = read_json(file, most=256 << 20)
    names = index.get("weight_map")
    if not isinstance(names, dict) or not isinstance(index.get("metadata", {}), dict):
        raise ValueError(f"{file} is not an index of weights. Copy it again.")
    for name in sorted(map(str, set(map(json.dumps, names.values())))):
        shard = json.loads(name)
        if (
            not isinstance(shard, str)
            or not _PLAIN_NAME.fullmatch(shard)
            or not shard.endswith(".safetensors")
        ):
            raise ValueError(
                f"{file} names the weights {short_repr(shard)}. Weights are read only from "
                "safetensors files in the model's own folder. Save the model again with "
                "save_pretrained."
            )
