"""The rDPO loss over a head, as each library lets its users compute it.

All get hidden states (3, B, T, H) in order chosen, rejected, visual, labels (3, B, T) with -100
where there is nothing to predict, and references of zero. With labels everywhere they compute on
equal rows; with an image and a prompt in front each does what it does for its users: ours, and CCE,
leave out what has no label, TRL does on CUDA, the others project every row. A library that is not
installed raises ImportError when its contestant is made.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from realign_kernels import rdpo_loss, use_backend
from realign_kernels.backends.chunk_plan import chunk_step, default_chunk_rows, kept_rows

BETA = 0.1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Tokens = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden (N, H), weight (V, H), labels (N,)) -> log-probs (N,)."""
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden (3, B, T, H), weight (V, H), labels (3, B, T)) -> loss."""


def from_sums(logps: Tensor) -> Tensor:
    """Both terms, from log-probs of sequences (3, B)."""
    chosen, rejected, visual = BETA * logps
    return -(F.logsigmoid(chosen - rejected) + F.logsigmoid(chosen - visual)).mean()


def relative(value: Tensor, exact: Tensor) -> float:
    """Error in norm over the norm of the truth."""
    return float((value.double() - exact).norm() / exact.norm())


def forward_backward(
    loss: Loss,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    trainable: bool,
    derivative: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss and, with `derivative`, the gradients of hidden and of a trainable weight."""
    hidden = hidden.detach().requires_grad_(derivative)
    weight = weight.detach().requires_grad_(trainable)
    value = loss(hidden, weight, labels)
    if derivative:
        value.backward()
    return value.detach(), hidden.grad, weight.grad


def ours(backend: str | None = None) -> Loss:
    """What `from realign_kernels import rdpo_loss` gives; None: the backend it picks itself."""

    def loss(hidden, weight, labels):
        zeros = torch.zeros(labels.shape[:2], device=labels.device)
        with use_backend(backend) if backend else nullcontext():
            return rdpo_loss(hidden, weight, labels, zeros, beta=BETA).loss

    return loss


def eager_tokens(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """All logits at once, as the authors' release and most scripts do."""
    logits = (hidden @ weight.T).float()
    return F.log_softmax(logits, -1).gather(-1, labels[:, None])[:, 0]


def torch_fused() -> Tokens:
    """torch's own F.linear_cross_entropy, with its defaults, which on the CPU do not chunk."""
    fused = F.linear_cross_entropy  # absent before torch 2.13
    return lambda *head: -fused(*head, reduction="none").float()


def trl() -> Tokens:
    """TRL's chunked log-prob. On the CPU its trainers give it all rows, on CUDA labelled ones."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk

    def logps(hidden, weight, labels):
        args = (hidden, weight, None, labels, 1.0, chunk, None, 1.0, ())
        return ChunkedLogProbFunction.apply(*args)[0]

    return logps


def cce() -> Tokens:
    """Cut Cross-Entropy: its own kernels on CUDA, its torch.compile version on the CPU."""
    from cut_cross_entropy import linear_cross_entropy

    def logps(hidden, weight, labels):
        impl = "cce" if hidden.is_cuda else "torch_compile"
        return -linear_cross_entropy(hidden, weight, labels, reduction="none", impl=impl).float()

    return logps


def both_terms(
    make: Callable[[], Tokens], ignores: bool = False, compacts: bool = False
) -> Callable[[], Loss]:
    """The loss of a library that has per-token log-probs.

    Args:
        ignores: It takes labels of -100 and leaves those rows out itself; else they are projected,
            and masked here.
        compacts: Its trainer gives it only the labelled rows.
    """

    def made() -> Loss:
        logps = make()

        def loss(hidden, weight, labels):
            if compacts:
                there = labels != -100
                found = logps(hidden[there], weight, labels[there])
                return from_sums(hidden.new_zeros(labels.shape, dtype=found.dtype)
                                 .masked_scatter(there, found).sum(-1))  # fmt: skip
            rows = labels.flatten() if ignores else labels.flatten().clamp(min=0)
            found = logps(hidden.flatten(0, 2), weight, rows).view(labels.shape)
            return from_sums(torch.where(labels == -100, 0, found).sum(-1))

        return loss

    return made


def liger() -> Loss:
    """Liger's fused DPO makes one term, so two calls: chosen and rejected, chosen and visual."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    fused = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False)

    def loss(hidden, weight, labels):
        total = 0
        for other in (1, 2):
            rows = torch.cat([hidden[0], hidden[other]]), torch.cat([labels[0], labels[other]])
            total = total + fused(weight, *rows)[0]
        return total

    return loss


def gemms(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    *,
    trainable: bool,
    derivative: bool = True,
) -> Callable[[], None]:
    """The limit: only the products, by torch, in chunks of ours, into buffers."""
    limit = default_chunk_rows(len(weight), hidden.device)
    if trainable:
        limit = kept_rows(limit, hidden.shape[1], hidden.device)
    step = chunk_step(len(hidden), limit, hidden.shape[1], hidden.device)
    logits = hidden.new_empty(step, len(weight))
    out, grad = torch.empty_like(hidden), torch.empty_like(weight) if trainable else None

    def call() -> None:
        for start in range(0, len(hidden), step):
            rows = hidden[start : start + step]
            z = torch.mm(rows, weight.T, out=logits[: len(rows)])
            if derivative:
                torch.mm(z, weight, out=out[start : start + step])
            if trainable:
                torch.mm(z.T, rows, out=grad)

    return call


OURS, LIMIT, EAGER, TRL = "ours", "GEMMs alone", "eager logits", "TRL chunked log-prob"
CONTESTANTS: dict[str, Callable[[], Loss]] = {
    OURS: ours,
    "ours, torch backend": lambda: ours("torch"),
    EAGER: both_terms(lambda: eager_tokens),
    "F.linear_cross_entropy": both_terms(torch_fused, ignores=True),
    TRL: both_terms(trl, compacts=DEVICE == "cuda"),
    "Liger DPO, two calls": liger,
    "CCE": both_terms(cce, ignores=True),
}
