"""Reference log-probs of another model, for `--reference-model`.

They are computed before the model that is trained is loaded, so the two are never in memory
together. The reference is loaded only if log-probs are missing in the cache, or its weights have no
known digest. `--quantize` applies to both models. Without it, rewards would contain the rounding of
the policy's weights.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.distributed.fsdp import FSDPModule

from realign import distributed
from realign.config import TrainConfig
from realign.files import read_limited, write_whole
from realign.modeling import quantized, reference_logps
from realign.modeling.merging import adapter_base
from realign.modeling.model_files import find_file
from realign.modeling.reference_logps import digest_of, processor_digest
from realign.training import fsdp
from realign_kernels import ReferenceCache

_DIGEST = re.compile(r"[0-9a-f]{32}")
_OF_MODEL = ("*.safetensors", "*.json")


@dataclass(frozen=True)
class Reference:
    """The log-probs of another model.

    Attributes:
        logps: (L, examples) fp32 log-probs.
        weights: digest of its weights.
    """

    logps: torch.Tensor
    weights: str


def logps(
    config: TrainConfig,
    inputs: Any,
    fingerprint: dict[str, str],
    device: torch.device,
    *,
    progress: bool,
) -> torch.Tensor:
    """Compute or look up the log-probs of all examples, (L, examples) fp32. Adapters are off.

    Args:
        config: the settings.
        inputs: `Inputs` of the reference.
        fingerprint: fingerprint of its log-probs.
        device: device of the model.
        progress: whether to show a progress bar.
    """
    directory = config.run.reference_cache or reference_logps.default_directory()
    with ReferenceCache.open(directory, fingerprint) as cache:
        return reference_logps.fill(
            cache,
            inputs.model,
            inputs.examples,
            inputs.store,
            row_tokens=config.data.row_tokens or inputs.examples.longest_tree,
            batch_rows=config.optim.micro_batch_size * len(inputs.examples[0].roots),
            device=device,
            progress=progress,
        ).float()


def check_encodings(policy: Any, other: Any, setting: str) -> None:
    """Check that two models encode the records alike: token ids and preprocessed images.

    Args:
        policy: `Inputs` of the model that is trained.
        other: `Inputs` of the reference, for the same records.
        setting: the setting that names the reference, with its value, for the message.

    Raises:
        ValueError: when a record differs. The message names what differs.
    """
    same = digest_of(policy.examples) == digest_of(other.examples)
    one, two = policy.processor, other.processor
    if same and processor_digest(one) == processor_digest(two):
        return
    parts = {
        "vocabulary": lambda inputs, p: p.tokenizer.get_vocab(),
        "chat template": lambda inputs, p: p.chat_template,
        "image processor": lambda inputs, p: (
            type(p.image_processor).__name__,
            p.image_processor.to_dict(),
        ),
        "image token": lambda inputs, p: inputs.model.layout.image_token_id,
        "end tokens": lambda inputs, p: inputs.model.layout.ends,
    }
    differ = [name for name, of in parts.items() if of(policy, one) != of(other, two)]
    pairs = zip(policy.examples, other.examples, strict=False)
    names = (repr(a.name) for a, b in pairs if digest_of([a]) != digest_of([b]))
    what = "images" if same else f"record {next(names, '')}"
    raise ValueError(
        f"{setting} encodes {what} differently from {policy.base}: they differ "
        f"in {', '.join(differ) or 'classes of their processors'}. Their log-probs cannot be "
        "compared. Use a reference with the same processor."
    )


def of_other_model(
    config: TrainConfig,
    device: torch.device,
    load: Callable[..., Any],
    fingerprint: Callable[..., dict[str, str]],
    *,
    progress: bool,
) -> Reference:
    """Compute or look up the log-probs of `--reference-model`. Every rank calls it.

    Args:
        config: the settings.
        device: device of this rank.
        load: `training_inputs` with the settings of the run. It takes `base` and `meta`.
        fingerprint: `shared_fingerprint` with the settings of the run.
        progress: whether to show a progress bar.

    Raises:
        ValueError: for a model that encodes records differently, or that cannot be used.
    """
    path = config.model.reference_model
    assert path is not None
    setting = f"--reference-model {path}"
    with distributed.silent():  # the model that is trained reads the same records
        policy = load(meta=True)
        with named(setting):
            inputs = load(base=path, meta=True)
        check_encodings(policy, inputs, setting)
    memo = _memo(path, config)
    weights = distributed.broadcast_from_rank0(lambda: _known(memo))
    about = fingerprint(inputs, weights=weights or "unknown")
    loaded = weights is None or _any_missing(config, about, inputs)
    if loaded:
        with distributed.silent():
            inputs = load(base=path, meta=distributed.rank() > 0)
        about = fingerprint(inputs)
        if distributed.rank() == 0:
            memo.parent.mkdir(parents=True, exist_ok=True)
            write_whole(memo, about["weights"])
    kind = inputs.model.vlm.config.model_type
    distributed.log_rank0(f"references are those of {path}: {kind}, weights {about['weights']}")
    inputs.model.eval()
    if loaded and _any_missing(config, about, inputs):
        fsdp.place(inputs.model, config, device)
        distributed.mark_ranks_diverged()
        for line in inputs.model.check_forest(inputs.examples[0], inputs.store, device):
            distributed.log_rank0(f"reference: {line}")
    found = Reference(logps(config, inputs, about, device, progress=progress), about["weights"])
    if isinstance(inputs.model, FSDPModule):
        inputs.model.reshard()
    del inputs
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


@contextmanager
def named(setting: str) -> Iterator[None]:
    """A context in which errors name the setting, since the policy's model could have the same.

    Args:
        setting: the setting with its value.

    Raises:
        ValueError: for any ValueError or OSError.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{setting} cannot be used: {error}") from error


def _any_missing(config: TrainConfig, about: dict[str, str], inputs: Any) -> bool:
    """Whether the cache lacks log-probs of the examples, on rank 0."""
    directory = config.run.reference_cache or reference_logps.default_directory()

    def missing() -> bool:
        with ReferenceCache.open(directory, about) as cache:
            return bool(cache.missing(inputs.examples.leaves).any())

    return distributed.broadcast_from_rank0(missing)


def _memo(path: str, config: TrainConfig) -> Path:
    """The file that keeps the digest of a model's weights, named by the state of its files.

    The state is name, size and time of change, so a digest is not read for changed files.
    """
    quantize = config.model.quantize
    state: list[Any] = [config.model.dtype, torch.__version__, transformers.__version__]
    state += [quantized.describe(quantize)] if quantize else []
    for folder in filter(None, (path, adapter_base(path))):
        if file := find_file(folder, "config.json") or find_file(folder, "adapter_config.json"):
            files = [f for kind in _OF_MODEL for f in Path(file).parent.glob(kind)]
            state += [
                (str(f), (about := f.stat()).st_size, about.st_mtime_ns) for f in sorted(files)
            ]
    name = hashlib.blake2b(json.dumps(state).encode(), digest_size=16).hexdigest()
    root = os.environ.get("REALIGN_CACHE") or Path.home() / ".cache" / "realign"
    return Path(root) / "digests" / name


def _known(memo: Path) -> str | None:
    """The digest in a file of `_memo`, or None."""
    try:
        content = read_limited(memo, 64).decode("ascii")
    except (OSError, ValueError):
        return None
    return content if _DIGEST.fullmatch(content) else None
