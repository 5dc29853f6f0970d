"""The rDPO loss over an LM head, as each library lets its users compute it.

All contestants get hidden states (3, B, T, H), labels (3, B, T) and reference log-probs of zero.
The first axis is chosen, rejected, visual. A label of -100 marks a position without a target.
Without such labels all contestants compute the same rows. With them, each contestant treats image
and prompt rows as it does for its users. Ours and CCE skip unlabelled rows. TRL skips them on CUDA.
The others project every row. Making a contestant raises ImportError if its library is missing.
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
    """rDPO loss (both terms) from the log-probs of sequences, (3, B)."""
    chosen, rejected, visual = BETA * logps
    return -(F.logsigmoid(chosen - rejected) + F.logsigmoid(chosen - visual)).mean()


def relative(value: Tensor, exact: Tensor) -> float:
    """Norm of the error divided by the norm of the exact value."""
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
    """Loss and, with `derivative`, the gradients of hidden and of a trainable weight."""
    hidden = hidden.detach().requires_grad_(derivative)
    weight = weight.detach().requires_grad_(trainable)
    value = loss(hidden, weight, labels)
    if derivative:
        value.backward()
    return value.detach(), hidden.grad, weight.grad


def ours(backend: str | None = None) -> Loss:
    """`realign_kernels.rdpo_loss` on a backend; None: its default backend."""

    def loss(hidden, weight, labels):
        zeros = torch.zeros(labels.shape[:2], device=labels.device)
        with use_backend(backend) if backend else nullcontext():
            return rdpo_loss(hidden, weight, labels, zeros, beta=BETA).loss

    return loss


def eager_tokens(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Log-probs from full logits, as in the authors' release and most scripts."""
    logits = (hidden @ weight.T).float()
    return F.log_softmax(logits, -1).gather(-1, labels[:, None])[:, 0]


def torch_fused() -> Tokens:
    """torch's F.linear_cross_entropy with its defaults, which do not chunk on the CPU."""
    fused = F.linear_cross_entropy  # needs torch 2.13
    return lambda *head: -fused(*head, reduction="none").float()


def trl() -> Tokens:
    """TRL's chunked log-prob. TRL's trainers pass all rows on the CPU, labelled rows on CUDA."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk

    def logps(hidden, weight, labels):
        args = (hidden, weight, None, labels, 1.0, chunk, None, 1.0, ())
        return ChunkedLogProbFunction.apply(*args)[0]

    return logps


def cce() -> Tokens:
    """Cut Cross-Entropy: Triton kernels on CUDA, its torch.compile version on the CPU."""
    from cut_cross_entropy import linear_cross_entropy

    def logps(hidden, weight, labels):
        impl = "cce" if hidden.is_cuda else "torch_compile"
        return -linear_cross_entropy(hidden, weight, labels, reduction="none", impl=impl).float()

    return logps


def both_terms(
    make: Callable[[], Tokens], ignores: bool = False, compacts: bool = False
) -> Callable[[], Loss]:
    """rDPO loss from a library's per-token log-probs.

    Args:
        make: Returns the function for the log-probs.
        ignores: The library skips rows with a label of -100. If not, it projects them, and they
            are masked here.
        compacts: The library's trainer passes only labelled rows.
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
    """Liger's fused DPO in two calls: it computes one of the two terms per call."""
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
    """The limit: only the matrix products, by torch, in the chunks of ours, into buffers."""
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


OURS, EAGER, TRL = "ours", "eager logits", "TRL chunked log-prob"
CONTESTANTS: dict[str, Callable[[], Loss]] = {
    OURS: ours,
    "ours, torch backend": lambda: ours("torch"),
    EAGER: both_terms(lambda: eager_tokens),
    "F.linear_cross_entropy": both_terms(torch_fused, ignores=True),
    TRL: both_terms(trl, compacts=DEVICE == "cuda"),
    "Liger DPO, two calls": liger,
    "CCE": both_terms(cce, ignores=True),
}
