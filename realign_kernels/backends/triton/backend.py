"""`TritonKernels`: the Triton kernels of the chunked backend."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from realign_kernels.backends.base import RowStats, Scores
from realign_kernels.backends.torch import TorchKernels
from realign_kernels.backends.triton import (
    epilogue,
    exp_head,
    forward,
    loss,
    row_kernel,
    scatter,
)
from realign_kernels.lm_head import Head
from realign_kernels.objectives import Objective


class TritonKernels(TorchKernels):
    """Overrides of `TorchKernels` in Triton. GEMMs and buffers stay those of torch."""

    def row_stats(
        self,
        logits: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        temperature: float,
        runner_up: Tensor | None,
        exp_logits: Tensor | None,
    ) -> RowStats:
        head = (bias, softcap, temperature)
        return row_kernel.row_stats(logits, labels, *head, runner_up, exp_logits)

    def hidden_grad_epilogue(
        self, exp_w: Tensor, weight: Tensor, scores: Scores, factor: Tensor, out: Tensor
    ) -> None:
        epilogue.hidden_grad_epilogue(exp_w, weight, scores, factor, out)

    def scale(self, values: Tensor, factor: Tensor) -> None:
        epilogue.scale(values, factor)

    def add_rows(self, total: Tensor, index: Tensor, rows: Tensor) -> None:
        scatter.add_rows(total, index, rows)

    def fuses(self, hidden: Tensor, head: Head) -> bool:
        return exp_head.choice(hidden, head) != "rows"

    def fused(self, *args: Any) -> Scores:
        return exp_head.fused(*args)

    def head_stats(self, hidden: Tensor, labels: Tensor, head: Head) -> RowStats:
        settings = (head.bias, head.softcap, head.temperature)
        return forward.head_stats(hidden, head.weight, labels, *settings)

    def fused_loss(self, objective: Objective) -> Callable | str:
        table = loss.encode(objective)
        return table if isinstance(table, str) else loss.preference_sums
