"""The reference pass: fingerprint of reference log-probs, and forwards for missing leaves.

The reference is the model before its first step. Its log-probs are constant, so every distinct leaf
is computed once and kept in a `ReferenceCache` that all runs share.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_torchvision_available

from realign.data.images import decoder
from realign.distributed import log_rank0, world_size
from realign.modeling import quantized
from realign.modeling.examples import Example, Leaf, leaves_of
from realign.modeling.forest import build_batch
from realign.modeling.layouts import image_tower
from realign.modeling.loading import adapters_off
from realign.modeling.model import ForestModel
from realign.modeling.prefetch import pinned
from realign.progress import Progress
from realign_kernels import ReferenceCache, linear_logprobs

_LAYOUT = "forest-6"
"""Version of the forward; changed when the same leaf would get a different log-prob."""

_NO_EFFECT = {
    "_name_or_path", "architectures", "dtype", "quantization_config", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip


def default_directory() -> Path:
    """Default folder of log-probs: $REALIGN_CACHE/reference, or ~/.cache/realign/reference."""
    root = os.environ.get("REALIGN_CACHE") or Path.home() / ".cache" / "realign"
    return Path(root) / "reference"


def fingerprint(
    vlm: PreTrainedModel,
    processor,
    dtype: torch.dtype,
    device: torch.device,
    kernels: str = "eager",
    weights: str | None = None,
    quantize: str | None = None,
) -> dict[str, str]:
    """Fingerprint: everything besides the leaf that a log-prob depends on, by name.

    Weights are digested in `dtype`, as the forward uses them. The fingerprint is therefore the same
    whether they were loaded in fp32 or bf16. Preprocessing and chat template also change the leaf's
    key.

    Args:
        vlm: the reference, before LoRA is added.
        processor: its processor.
        dtype: compute dtype of the forward.
        device: device of the forward. Its type counts, since bf16 rounds differently on a CPU.
        kernels: kernels of the layers, which also round differently (`ScaleConfig.kernels`).
        weights: digest of the weights, if `vlm` has none (`fsdp.shard`).
        quantize: how `vlm` is quantized, '4bit' or '8bit', if it is.
    """
    about = description(vlm, processor, dtype, device, kernels, quantize)
    return about | {"weights": weights or weights_digest(vlm, dtype)}


def description(
    vlm: PreTrainedModel,
    processor,
    dtype: torch.dtype,
    device: torch.device,
    kernels: str = "eager",
    quantize: str | None = None,
) -> dict[str, str]:
    """The fingerprint without the weights, so that they need not be loaded.

    `quantize` names what is done to them, so `vlm` may be without quantization here.
    """
    parts: tuple[Any, ...] = (vlm, vlm.model.get_decoder(), image_tower(vlm) or vlm)
    attention = {str(part.config._attn_implementation) for part in parts}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "attention": ",".join(sorted(attention)),
        "device": device.type,
        "kernels": kernels,
        "matmul": torch.get_float32_matmul_precision(),
        "logits": "rounded" if _logits_are_rounded(dtype, device) else "exact",
        "decoder": decoder(),
        "processor": processor_digest(processor),
        "config": _digest(_without(vlm.config.to_dict(), _NO_EFFECT)),
        "transformers": transformers.__version__,
        "layout": _LAYOUT,
    } | ({"quantize": quantized.describe(quantize)} if quantize else {})


def processor_digest(processor) -> str:
    """Digest of the classes and settings that turn pixels into inputs of the model."""
    image_processor = processor.image_processor
    classes = [type(processor).__qualname__, type(image_processor).__qualname__]
    if is_torchvision_available():  # its resampling may differ between versions
        classes.append(importlib.metadata.version("torchvision"))
    return _digest([*classes, image_processor.to_dict()])


def weights_digest(model: torch.nn.Module, dtype: torch.dtype | None = None) -> str:
    """128-bit digest of all parameters and buffers.

    Tensors of the state dict are first cast to `dtype`, if it is given. Threads hash the tensors,
    since hashlib releases the GIL: about 1 GB/s per core.
    """

    def digest_of_tensor(item: tuple[str, torch.Tensor]) -> bytes:
        name, tensor = item
        cast = name in saved and tensor.is_floating_point()
        tensor = tensor.detach().to("cpu", dtype if cast else None)
        header = f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        digest = hashlib.blake2b(header, digest_size=16)
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.digest()

    saved = model.state_dict()
    # Rotary frequencies and scales of quantized weights are in no state dict.
    tensors = dict(model.named_buffers()) | quantized.scales(model) | saved
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(digest_of_tensor, sorted(tensors.items()))
        return hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()


def _logits_are_rounded(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the head rounds logits to bf16 here, which changes a log-prob by up to 0.1 nats.

    This depends on CPU, extension and backend, so a small head is compared with the definition.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 64, generator=generator).to(dtype)
    weight = torch.randn(256, 64, generator=generator).to(dtype)
    labels = torch.arange(64)
    logps = linear_logprobs(hidden.to(device), weight.to(device), labels.to(device))
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)[labels, labels]
    return bool((logps.cpu().double() - exact).abs().max() > 1e-3)  # exact: 1e-5, rounded: 6e-2


def digest_of(
    examples: Sequence[Example],
    chosen: np.ndarray | slice = slice(None),  # (chosen,) indices of examples
) -> str:
    """128-bit digest of the leaves of a data set, or of chosen examples, in order."""
    keys = leaves_of(examples).keys.reshape(len(examples), -1)[chosen]
    return hashlib.blake2b(keys.tobytes(), digest_size=16).hexdigest()


def fill(
    cache: ReferenceCache,
    model: ForestModel,
    examples: Sequence[Example],
    store,
    *,
    row_tokens: int,
    batch_rows: int,
    device: torch.device,
    adapters: bool = False,
    progress: bool = True,
    log: Callable[[str], None] = log_rank0,
) -> torch.Tensor:
    """Compute the log-probs that are missing from `cache`. Every rank calls it for a part of them.

    Args:
        cache: the cache of this model's log-probs.
        model: the reference, on `device`.
        examples: the forests of the data set.
        store: the images of the data set.
        row_tokens: maximum number of tokens in a row of the forest.
        batch_rows: rows in one forward.
        device: device of the model.
        adapters: whether adapters in the model are part of the reference. If not, they are off.
        progress: whether to show a progress bar.
        log: receives a line with the number of cached leaves and their folder.

    Returns:
        Reference log-probs of all leaves, (L, examples) fp64.
    """

    def build(pairs: Sequence[tuple[int, int]]):
        """A batch on `device`, built by `cache.fill` in a thread ahead of the forward."""
        single = [_single_leaf(examples[i], leaf) for i, leaf in pairs]
        return pinned(build_batch(single, store, row_tokens=row_tokens), device).to(device)

    leaves = leaves_of(examples)
    absent = cache.missing(leaves)
    log(
        f"reference log-probs: {len(absent) - absent.sum():,} of {len(absent):,} leaves known in "
        f"{cache.folder}{_nearest(cache)}"
    )
    distinct = len(np.unique(leaves.keys[absent].view("S16")))
    leaves_of_rank, tokens = -(-distinct // world_size()), 0
    quiet = not progress or leaves_of_rank == 0
    bar = Progress("reference log-probs", "leaves", leaves_of_rank, quiet=quiet)

    def on_batch(leaves: int, computed: int) -> None:
        nonlocal tokens
        tokens += computed
        # Ranks take unequal parts of the leaves.
        bar.update(
            min(leaves, leaves_of_rank - bar.done),
            f"{tokens / max(bar.seconds, 1e-9):7,.0f} tokens/s",
        )

    with bar, nullcontext() if adapters else adapters_off(model):
        cache.fill(
            model.logps,
            leaves,
            build=build,
            row_tokens=row_tokens,
            batch_rows=batch_rows,
            on_batch=on_batch,
        )
    logps = cache.lookup(leaves).logps
    return torch.from_numpy(logps.reshape(len(examples), -1).T.copy())


def _nearest(cache: ReferenceCache) -> str:
    """For an empty table: the differences from the most similar other table."""
    if len(cache) or (nearest := cache.nearest()) is None:
        return ""
    folder, differences = nearest
    return f"; those in {folder.name} do not fit: they differ in {', '.join(differences)}"


def _single_leaf(example: Example, index: int) -> Example:
    """One leaf of an example under its root; a batch merges equal roots again."""
    leaf = example.leaves[index]
    return Example(example.name, (example.roots[leaf.root],), (Leaf(0, leaf.ids, leaf.rival),))


def _without(tree, names: set[str]):
    """A nested configuration without the keys `names`."""
    if isinstance(tree, dict):
        return {key: _without(value, names) for key, value in tree.items() if key not in names}
    return tree


def _digest(tree) -> str:
    canonical = json.dumps(tree, sort_keys=True, default=str).encode()
    return hashlib.blake2b(canonical, digest_size=16).hexdigest()
