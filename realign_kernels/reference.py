"""The specification: every operator in plain PyTorch, in fp32 (fp64 for fp64 inputs).

These functions define the operators, and tests compare against them. They compute all logits at
once, so they are for small inputs. `backends.reference` makes them available as a backend
(`use_backend("reference")`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of log-probs and accumulators: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def linear_logits(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    temperature: float,
) -> Tensor:  # (N, V), wide
    """Logits: softcap first (Gemma 2: cap * tanh(z / cap)), then division by the temperature."""
    wide = acc_dtype(hidden.dtype)
    logits = hidden.to(wide) @ weight.to(wide).T
    if bias is not None:
        logits = logits + bias.to(wide)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def linear_logprobs(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,) int64
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:  # (N,), wide
    """log softmax(logits)[label]. Ignored rows are 0 and are not read."""
    rows = (labels != ignore_index).nonzero().squeeze(1)
    logits = linear_logits(hidden[rows], weight, bias, softcap, temperature)
    logps = F.log_softmax(logits, dim=1).gather(1, labels[rows, None]).squeeze(1)
    return logps.new_zeros(len(labels)).index_put((rows,), logps)


def linear_logprobs_backward(
    grad: Tensor,  # (N,)
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,) int64, none ignored
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # (N, H), (V, H), (V,), wide
    """Gradients from d logp / d z = (onehot - softmax(z)) / temperature * (1 - (z / cap)^2)."""
    logits = linear_logits(hidden, weight, bias, softcap, temperature)
    residual = F.one_hot(labels, len(weight)) - logits.softmax(1)
    grad_logits = grad[:, None] * residual / temperature
    if softcap is not None:
        grad_logits = grad_logits * (1 - (logits * temperature / softcap) ** 2)
    wide = logits.dtype
    return grad_logits @ weight.to(wide), grad_logits.T @ hidden.to(wide), grad_logits.sum(0)


def sequence_sums(
    logps: Tensor,  # (N,)
    labels: Tensor,  # (N,) int64
    sequence_ids: Tensor,  # (N,) int64
    sequences: int,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:  # (sequences,) in the dtype of logps, (sequences,) int64
    """Sum of the log-probs of each sequence, and the number of its labels that are not ignored."""
    of_sequence = sequence_ids == torch.arange(sequences, device=labels.device)[:, None]
    of_sequence = of_sequence & (labels != ignore_index)
    return of_sequence.double().mv(logps.double()).to(logps.dtype), of_sequence.sum(1)


def rdpo_loss(
    logps: Tensor,  # (3, B): chosen, rejected, visual
    reference_logps: Tensor,  # (3, B)
    beta: float = 0.1,
    visual_weight: float = 1.0,
) -> Tensor:  # ()
    """rDPO loss (arXiv 2502.13146), mean over the examples."""
    chosen, rejected, visual = logps - reference_logps
    text_loss = -F.logsigmoid(beta * (chosen - rejected))
    visual_loss = -F.logsigmoid(beta * (chosen - visual))
    return (text_loss + visual_weight * visual_loss).mean()


def runner_up(
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,) int64
) -> Tensor:  # (N,) int64
    """The strongest token except the label, which objective `released` scores."""
    return logits.scatter(1, labels[:, None], float("-inf")).argmax(1)
