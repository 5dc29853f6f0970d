"""The specification (`realign_kernels.reference`) as a backend: all logits at once."""

import torch
from torch import Tensor

from realign_kernels import reference
from realign_kernels.backends.base import Backend, Gradients, NeedsGrad
from realign_kernels.lm_head import Head


class ReferenceBackend(Backend):
    """Plain PyTorch, for small inputs."""

    def forward(
        self,
        hidden: Tensor,  # (n, H)
        head: Head,
        labels: Tensor,  # (n,)
        runner_up: Tensor | None,  # (n,) bool
        *,
        chunk_rows: int | None,
        keep_dlogp_dh: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # (n,), (n,), (n, H)
        weight, settings = head.weight, _settings(head)
        if runner_up is not None:
            strongest = reference.runner_up(
                reference.linear_logits(hidden, weight, *settings), labels
            )
            labels = torch.where(runner_up, strongest, labels)
        logps = reference.linear_logprobs(hidden, weight, labels, *settings, ignore_index=-1)
        if not keep_dlogp_dh:
            return logps, labels, None
        ones = torch.ones_like(logps)
        grads = reference.linear_logprobs_backward(ones, hidden, weight, labels, *settings)
        return logps, labels, grads[0]

    def backward(
        self,
        grad: Tensor,  # (n,)
        hidden: Tensor,  # (n, H)
        head: Head,
        targets: Tensor,  # (n,)
        *,
        chunk_rows: int | None,
        needs_grad: NeedsGrad,
    ) -> Gradients:
        weight, settings = head.weight, _settings(head)
        grads = reference.linear_logprobs_backward(grad, hidden, weight, targets, *settings)
        for_hidden, for_weight, for_bias = (
            g.to(weight.dtype) if need else None for g, need in zip(grads, needs_grad, strict=True)
        )
        return for_hidden, for_weight, for_bias


def _settings(head: Head) -> tuple[Tensor | None, float | None, float]:
    if head.shard is not None:
        raise ValueError(
            "the reference backend does not support a vocabulary-parallel head. Use torch."
        )
    return head.bias, head.softcap, head.temperature
