"""Throughput and cost of a step: tokens, model FLOP, MFU, peak memory.

The *work* of a batch is counted from its layout and reduced over ranks together with the metrics.
`Meter` converts it to rates. Model FLOP are those that the forest needs: matrix products over real
tokens, and attention over the pairs that the mask allows. A multiplication and an addition count as
two. Padding, masked pairs and recomputed activations do not count, so they lower MFU (model FLOP
utilization, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from realign import distributed
from realign.modeling.forest import Example, ForestBatch
from realign.modeling.images import Images
from realign.modeling.layouts import head_width, image_tower
from realign.modeling.model import ForestModel

TIMING = (
    "seconds",
    "tokens_per_second",
    "response_tokens_per_second",
    "peak_memory_gib",
    "mfu",
    "eval/seconds",
)
"""Metrics that differ between runs. All others are equal for equal settings."""

WORK = ("work/tokens", "work/separate", "work/responses", "work/pairs", "work/images")
"""Names of the counts that `work_of` returns, in order."""

PEAK_TFLOPS = {
    "A100": (312, 156, 19.5),
    "H100 PCIe": (756, 378, 51.2),
    "H100 NVL": (835, 417, 60.0),
    "H100": (989, 494, 66.9),
    "H200 NVL": (835, 417, 60.0),
    "H200": (989, 494, 66.9),
    "L40S": (362, 183, 91.6),
    "L4": (121, 60, 30.3),
}
"""Dense bf16, TF32 and fp32 peaks by words of the device's name; the first match counts. From
NVIDIA's data sheets of these products. Figures with sparsity are halved."""


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of matrix products on a device; None for an unknown device.

    fp32 products run as TF32 where `torch.set_float32_matmul_precision` allows it.
    """
    words = device_name.replace("-", " ").split()
    for name, (bf16, tf32, fp32) in PEAK_TFLOPS.items():
        if all(word in words for word in name.split()):
            exact = torch.get_float32_matmul_precision() == "highest"
            return 1e12 * (bf16 if dtype == torch.bfloat16 else fp32 if exact else tf32)
    return None


def separate_tokens(example: Example) -> int:
    """Number of tokens of an example with a separate sequence per leaf."""
    return sum(len(example.roots[leaf.root].ids) + len(leaf.ids) for leaf in example.leaves)


def work_of(batch: ForestBatch, examples: Sequence[Example]) -> torch.Tensor:
    """Work of a batch, (5,) fp64 in the order of `WORK`. Work of several batches is summed.

    - `tokens`: tokens in the rows, without padding
    - `separate`: tokens with a separate sequence per leaf
    - `responses`: rows of the head
    - `pairs`: (query, key) pairs of the attention mask, without windows and two-way blocks
    - `images`: tokens of the distinct images, 0 if their features are cached

    Args:
        batch: a batch on the CPU, as built.
        examples: the examples in it.
    """
    real = batch.segment >= 0
    segment, parent = batch.segment[real], batch.parent[real]
    lengths = torch.bincount(segment)
    above = torch.zeros_like(lengths)
    above[segment] = torch.where(parent == segment, 0, lengths[parent])
    counts = [
        int(lengths.sum()),
        sum(separate_tokens(example) for example in examples),
        len(batch.labels),
        int((lengths * (lengths + 1) // 2 + lengths * above).sum()),
        sum(batch.images.tokens) if batch.images else 0,
    ]
    return torch.tensor(counts, dtype=torch.float64)


@dataclass(frozen=True)
class Cost:
    """FLOP for one unit of each kind of work."""

    token: float
    """FLOP of a token in the linear layers of the language model."""
    response: float
    """FLOP of a response token in the head."""
    pair: float
    """FLOP of a (query, key) pair in the attention of all layers."""
    image: float
    """FLOP of an image token in the vision tower."""

    def of(self, work: dict[str, float]) -> float:
        """FLOP of a batch with this work."""
        units = {"tokens": self.token, "responses": self.response, "pairs": self.pair}
        units["images"] = self.image
        return sum(work[f"work/{name}"] * each for name, each in units.items())


def image_flop(model: ForestModel, images: Images | None, device: torch.device) -> float:
    """FLOP of vision tower and projector for one image token, counted on one image.

    This runs one forward of the tower. Under FSDP2 every rank must call it.

    Args:
        model: on `device`, sharded or not.
        images: a batch of one image, or None for a data set without images.
        device: device of the model.

    Raises:
        ValueError: when the processor does not belong to the model.
    """
    if images is None:
        return 0.0
    counter = FlopCounterMode(display=False)  # counts matrix products, not attention kernels
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.image_features(images.to(device, model.dtype))
    return counter.get_total_flops() / images.tokens[0]


def cost_of(model: ForestModel, per_image_token: float = 0.0, *, backward: bool = True) -> Cost:
    """FLOP of a unit of work: in training, or with adapters off and no backward.

    A product with n weights takes 2n FLOP forward, 2n for the gradient of its input and 2n for that
    of trained weights. Attention takes 4 x width per pair and layer, and 8 x width backward.

    Args:
        model: the model, sharded or not.
        per_image_token: result of `image_flop`.
        backward: whether to count the backward pass and adapters.
    """
    vlm, text = model.vlm, model.vlm.config.get_text_config()
    head = vlm.get_output_embeddings()
    assert head is not None
    trains_tower = backward and _is_trained(image_tower(vlm) or nn.Module())
    width = text.num_attention_heads * head_width(text)
    return Cost(
        token=_linear(vlm.model.get_decoder(), backward),
        response=2 * _weights(head) * (1 + backward + (backward and _is_trained(head))),
        pair=4 * width * text.num_hidden_layers * (3 if backward else 1),
        image=per_image_token * (3 if trains_tower else 1),
    )


def _linear(part: nn.Module, backward: bool) -> float:
    """FLOP of one token in all matrix products of a module."""
    total, trained = 0, backward and _is_trained(part)
    for name, layer in part.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and (backward or "lora_" not in name):
            weights = layer.weight.numel()
            total += 2 * weights * (1 + trained + (trained and layer.weight.requires_grad))
    return total


def _weights(head: Any) -> int:
    return getattr(head, "base_layer", head).weight.numel()


def _is_trained(part: nn.Module) -> bool:
    return any(p.requires_grad for p in part.parameters())


class Meter:
    """Rates of the steps of a run.

    Args:
        model: the trained model.
        device: device of this rank. Other ranks must have the same kind.
        dtype: compute dtype.
        per_image_token: result of `image_flop`.
    """

    def __init__(
        self,
        model: ForestModel,
        device: torch.device,
        dtype: torch.dtype,
        per_image_token: float = 0.0,
    ) -> None:
        self._cost, self._device = cost_of(model, per_image_token), device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self._peak_flops = peak_flops(name, dtype)

    def read(self, metrics: dict[str, float], batch_size: int, seconds: float) -> dict[str, float]:
        """Rates of a step from its work, which is removed from `metrics`.

        Args:
            metrics: metrics and work, as means over the examples of the global batch.
            batch_size: size of the global batch.
            seconds: duration of the step.
        """
        work = {name: metrics.pop(name) * batch_size for name in WORK}
        rates = {
            "tokens": work["work/tokens"],
            "tokens_saved": 1 - work["work/tokens"] / work["work/separate"],
            "seconds": seconds,
            "tokens_per_second": work["work/tokens"] / seconds,
            "response_tokens_per_second": work["work/responses"] / seconds,
            "peak_memory_gib": peak_memory(self._device) / 2**30,
        }
        if self._peak_flops:
            limit = self._peak_flops * distributed.world_size()
            rates["mfu"] = self._cost.of(work) / seconds / limit
        return rates


def peak_memory(device: torch.device) -> int:
    """Peak memory so far in bytes: of tensors on CUDA, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return process_memory("VmHWM")


def process_memory(field: str) -> int:
    """Resident memory of this process in bytes: current (VmRSS) or peak (VmHWM).

    On Linux it is read from /proc, since `getrusage` would include the parent process. Other
    systems use `getrusage`, which always gives the peak.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(e for e in status.read_text().splitlines() if e.startswith(field))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
