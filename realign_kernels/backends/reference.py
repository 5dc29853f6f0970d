"""The specification (`realign_kernels.reference`) as a backend: all logits at once."""

from collections.abc import Callable

import torch
from torch import Tensor

from realign_kernels import reference
from realign_kernels.backends.base import Backend, Gradients, NeedsGrad
from realign_kernels.lm_head import Head


class ReferenceBackend(Backend):
    """Plain PyTorch, for small inputs."""

    def example_rows(
        self, hidden: Tensor, head: Head, runner_up: bool, chunk_rows: int | None
    ) -> int:
        return len(hidden)

    def scale(self, values: Tensor, factor: Tensor) -> None:
        values.mul_(factor)

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

    def forward_backward_by_example(
        self,
        hidden: Tensor,  # (n, H)
        head: Head,
        labels: Tensor,  # (n,)
        runner_up: Tensor | None,  # (n,) bool
        lengths: list[int],
        grad_logps_fn: Callable[[int, int, Tensor], Tensor],
        *,
        chunk_rows: int | None,
        needs_grad: NeedsGrad,
    ) -> tuple[Tensor, Tensor, Gradients]:  # (n,), (n,)
        logps, targets, _ = self.forward(
            hidden, head, labels, runner_up, chunk_rows=chunk_rows, keep_dlogp_dh=False
        )
        grad = grad_logps_fn(0, len(lengths), logps)
        grads = self.backward(
            grad, hidden, head, targets, chunk_rows=chunk_rows, needs_grad=needs_grad
        )
        return logps, targets, grads


def _settings(head: Head) -> tuple[Tensor | None, float | None, float]:
    if head.shard is not None:
        raise ValueError("the reference backend has no vocabulary-parallel head: use torch")
    return head.bias, head.softcap, head.temperature


def backend() -> ReferenceBackend:
    """See `dispatch.MODULES`."""
    return ReferenceBackend()
