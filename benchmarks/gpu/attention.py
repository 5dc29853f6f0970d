"""Attention of one layer over the trees of a real batch, in 24 calls or in one.

The batch has eight examples with two images and three responses each. An example has a root with
two leaves and a root with one leaf, which is three calls by `tree`. Forward and backward are timed.
Errors are those of outputs and gradients against fp32, relative to their norms.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from transformers.integrations.flex_attention import flex_attention_forward

from benchmarks import step_contestants
from benchmarks.contestants import relative
from benchmarks.gpu.measure import Call, figures, kernels, profiled
from benchmarks.gpu.record import Record
from realign.modeling import tree_attention
from realign.modeling.attention import forest_mask
from realign.modeling.forest import Example, ForestBatch, Leaf, Root, build_batch
from realign.modeling.layouts import Layout

Attend = Callable[..., Tensor]
"""(queries, keys, values), each (1, heads, T, D) -> output of that shape."""

TORCH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a layer, and ranges of the lengths of a batch."""

    heads: int
    width: int
    examples: int
    root: tuple[int, int]
    leaf: tuple[int, int]


LLAVA = Sizes(heads=32, width=128, examples=8, root=(600, 700), leaf=(50, 250))
TOY = Sizes(heads=2, width=16, examples=2, root=(12, 20), leaf=(3, 9))


def batch_of(sizes: Sizes) -> ForestBatch:
    """Batch of one row with random lengths, of which only the layout matters."""
    rng = np.random.default_rng(0)
    store: Any = SimpleNamespace(layout=Layout(0), features={}, grids=lambda keys: {})

    def ids(ends: tuple[int, int]) -> np.ndarray:
        return rng.integers(1, 1 << 30, rng.integers(*ends))

    examples = []
    for i in range(sizes.examples):
        roots = Root((), ids(sizes.root)), Root((), ids(sizes.root))
        chosen, rejected = ids(sizes.leaf), ids(sizes.leaf)
        leaves = Leaf(0, chosen), Leaf(0, rejected), Leaf(1, chosen)
        examples.append(Example(str(i), roots, leaves))
    tokens = sum(example.tokens for example in examples)
    return build_batch(examples, store, row_tokens=tokens)


class Layer:
    """Queries, keys and values of a batch, the output's gradient, and the exact result in fp32."""

    def __init__(self, sizes: Sizes, device: str) -> None:
        self.device, self.batch = device, batch_of(sizes).to(device)
        self.trees, self.scale = self.batch.trees, sizes.width**-0.5
        self.module = SimpleNamespace(is_causal=True, num_key_value_groups=1, training=True)
        generator = torch.Generator(device).manual_seed(0)
        shape = (1, sizes.heads, self.batch.input_ids.shape[1], sizes.width)
        *self.states, self.grad = (
            torch.randn(shape, generator=generator, device=device).bfloat16() for _ in range(4)
        )
        with sdpa_kernel(SDPBackend.MATH):
            wide = [state.float() for state in self.states]
            self.truth = both_ways(self.by_tree, wide, self.grad.float())

    def by_tree(self, *states: Tensor) -> Tensor:
        """Output of SDPA for each tree and each of its further leaves."""
        out, _ = tree_attention.forest_attention(self.module, *states, None, trees=self.trees)
        return out.transpose(1, 2)

    def timed(self, call: Call, restore: Callable[[list[Tensor]], list[Tensor]] = list) -> dict:
        """Figures of a call, with relative errors of the output and of the worst gradient.

        Args:
            call: Returns the output, and gradients if any.
            restore: Converts the results of `call` to the shapes of the layer.
        """
        began = step_contestants.now()
        found = call()
        first = 1e3 * (step_contestants.now() - began)
        error, *others = map(relative, restore(found), self.truth)
        errors = {"output_error": error} | ({"gradient_error": max(others)} if others else {})
        return figures(call, self.device) | {"first_ms": first} | errors


def both_ways(attend: Attend, states: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """Output (1, heads, T, D), and the gradients of queries, keys and values."""
    states = [state.detach().requires_grad_() for state in states]
    out = attend(*states)
    return [out.detach(), *torch.autograd.grad(out, states, grad)]


def tree(layer: Layer) -> dict[str, float]:
    """24 calls of SDPA without cuDNN, which takes 0.7 s to plan each (H200)."""
    with sdpa_kernel(TORCH):
        return layer.timed(partial(both_ways, layer.by_tree, layer.states, layer.grad))


def varlen(layer: Layer) -> dict[str, float]:
    """One call of the varlen operator for all trees, with prepared metadata of the batch."""
    from realign.modeling.varlen_attention import forest_attention, sequences

    parts = sequences(layer.trees, layer.grad.shape[2]).to(layer.device)
    # Strides as after a model's projections: token by token.
    given = [s.transpose(1, 2).contiguous().transpose(1, 2) for s in (*layer.states, layer.grad)]

    def attend(*states: Tensor) -> Tensor:
        rows = (state[0].transpose(0, 1) for state in states)
        return forest_attention(*rows, *parts, layer.scale)[0].transpose(0, 1)[None]

    call = partial(both_ways, attend, given[:3], given[3])
    return layer.timed(call) | {"kernels": kernels(profiled(call))}


def padded(layer: Layer) -> dict[str, float]:
    """One causal call over padded sequences: a copy of the root and a leaf each."""
    rows, counted, start, device = [], [], 0, layer.device
    for root, *leaves in layer.trees[0]:
        above, leaf = np.arange(start, start + root), start + root
        for number, size in enumerate(leaves):
            rows.append(torch.from_numpy(np.append(above, np.arange(leaf, leaf + size))))
            counted.append(torch.ones(root + size, dtype=torch.bool))
            counted[-1][:root] = number == 0  # counts the outputs of a root once
            leaf += size
        start = leaf
    index = pad_sequence(rows, True).to(device)
    real = pad_sequence([torch.ones(len(row)) for row in rows], True).to(device, torch.bool)
    first = pad_sequence(counted, True).to(device)
    copies = [state[0][:, index].transpose(0, 1).contiguous() for state in layer.states]
    grad = layer.grad[0][:, index].transpose(0, 1) * first[:, None, :, None]
    attend = partial(F.scaled_dot_product_attention, is_causal=True)

    def summed(found: list[Tensor]) -> list[Tensor]:
        return [
            torch.zeros(layer.grad.shape[1:], device=device).index_add_(
                1, index[which], one.transpose(0, 1)[:, which].float()
            )[None]
            for one, which in zip(found, [first, real, real, real], strict=True)
        ]

    with sdpa_kernel(TORCH):
        return layer.timed(partial(both_ways, attend, copies, grad), summed)


def flex(layer: Layer) -> dict[str, float]:
    """Compiled flex attention with the forest's mask; on a CPU eager and without backward.

    A CPU has no backward for it, and compilation takes 15 s there.
    """
    mask = forest_mask(layer.batch, "flex_attention", torch.bfloat16)

    def attend(*states: Tensor) -> Tensor:
        return flex_attention_forward(layer.module, *states, mask)[0].transpose(1, 2)

    if layer.device == "cuda":
        return layer.timed(partial(both_ways, attend, layer.states, layer.grad))
    with torch.compiler.set_stance("force_eager"):
        return layer.timed(lambda: [attend(*layer.states)])


CASES = {
    "tree, cuDNN off": tree,
    "varlen": varlen,
    "padded, cuDNN off": padded,
    "flex": flex,
}


def run(record: Record) -> None:
    """Runs all implementations on the same tensors."""
    layer = Layer(TOY if record.rehearse else LLAVA, record.device)
    record.each({case: partial(call, layer) for case, call in CASES.items()})
