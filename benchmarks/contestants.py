"""The rDPO loss over a head, as each library lets its users compute it.

All get the same labelled rows, (3 * B * T, H), chosen then rejected then visual, and references of
zero. A library that is not installed raises ImportError when its contestant is made.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from realign_kernels import rdpo_loss, use_backend

BETA = 0.1
Tokens = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden (N, H), weight (V, H), labels (N,)) -> log-probs (N,)."""
Loss = Callable[..., Tensor]
"""(hidden (N, H), weight (V, H), labels (N,), examples=int) -> loss."""


def from_logps(logps: Tensor, examples: int) -> Tensor:
    """Both terms, from per-token log-probs (N,)."""
    chosen, rejected, visual = BETA * logps.view(3, examples, -1).sum(-1)
    return -(F.logsigmoid(chosen - rejected) + F.logsigmoid(chosen - visual)).mean()


def ours(backend: str) -> Loss:
    def loss(hidden, weight, labels, *, examples):
        shape = (3, examples, len(labels) // (3 * examples))
        zeros = torch.zeros(3, examples)
        with use_backend(backend):
            padded = hidden.view(*shape, -1)
            return rdpo_loss(padded, weight, labels.view(shape), zeros, beta=BETA).loss

    return loss


def eager() -> Tokens:
    """All logits at once, as the authors' release and most scripts do."""

    def logps(hidden, weight, labels):
        logits = (hidden @ weight.T).float()
        return F.log_softmax(logits, -1).gather(-1, labels[:, None])[:, 0]

    return logps


def torch_fused() -> Tokens:
    """torch's own F.linear_cross_entropy."""
    return lambda *head: -F.linear_cross_entropy(*head, reduction="none").float()


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


def both_terms(make: Callable[[], Tokens]) -> Callable[[], Loss]:
    """The loss of a library that has per-token log-probs."""

    def made() -> Loss:
        logps = make()
        return lambda *head, examples: from_logps(logps(*head), examples)

    return made


def liger() -> Loss:
    """Liger's fused DPO makes one term, so two calls: chosen and rejected, chosen and visual."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    fused = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, compiled=False)

    def loss(hidden, weight, labels, *, examples):
        rows, targets = hidden.view(3, examples, -1, hidden.shape[1]), labels.view(3, examples, -1)
        total = 0
        for other in (1, 2):
            pair = torch.cat([rows[0], rows[other]]), torch.cat([targets[0], targets[other]])
            total = total + fused(weight, *pair)[0]
        return total

    return loss


CONTESTANTS: dict[str, Callable[[], Loss]] = {
    "ours": lambda: ours("cpp"),
    "ours, torch backend": lambda: ours("torch"),
    "eager": both_terms(eager),
    "F.linear_cross_entropy": both_terms(torch_fused),
    "TRL chunked log-prob": both_terms(trl),
    "Liger DPO, two calls": liger,
    "CCE, torch.compile": both_terms(cce),
}
