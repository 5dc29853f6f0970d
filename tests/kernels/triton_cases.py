"""Triton kernels in tests: compiled if there is a GPU, else interpreted on the CPU.

The interpreter does not simulate races and barriers. It truncates fp32 to bf16, and multiplies bf16
incorrectly in tl.dot. TRITON_DTYPES therefore has bf16 on a GPU only.
"""

import contextlib
import importlib
import os
from collections.abc import Iterator

import pytest
import torch
from kernel_cases import DEVICE, TRITON_DTYPES

pytest.importorskip("triton")


def _set_interpret(value: str | None) -> None:
    if value is None:
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["TRITON_INTERPRET"] = value


# triton.jit reads the variable when it decorates a function, so it is set only during the import of
# the kernels. torch.compile in other tests must not see it.
_before = os.environ.get("TRITON_INTERPRET")
if DEVICE == "cpu":
    _set_interpret("1")
try:
    from realign_kernels.backends.triton import (
        epilogue,
        exp_head,
        forward,
        loss,
        row_kernel,
        scatter,
    )
finally:
    _set_interpret(_before)

__all__ = [
    "DEVICE",
    "TRITON_DTYPES",
    "exp_head",
    "epilogue",
    "forward",
    "interpreted",
    "loss",
    "problem",
    "row_kernel",
    "row_truth",
    "scatter",
]


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Makes functions such as tl.max callable by interpreted kernels.

    They are decorated at the import of Triton. Another package may have imported it before the
    variable was set. On a GPU this does nothing.
    """
    if DEVICE == "cuda":
        yield
        return
    # The interpreter imports this module at first use, and needs the original tl.
    importlib.import_module("triton.experimental.gluon.language")
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    assert isinstance(row_kernel.row_kernel, InterpretedFunction), (
        "the kernels were imported before"
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, function in list(vars(tl.standard).items()):
            if isinstance(function, JITFunction):
                replacement = InterpretedFunction(function.fn)
                patch.setattr(tl.standard, name, replacement)
                if getattr(tl, name, None) is function:
                    patch.setattr(tl, name, replacement)
        yield


def logit_gap(stats) -> torch.Tensor:  # (r,)
    """The label's logit relative to all others: logp = logsigmoid(logit_gap)."""
    return stats.logit - stats.max_logit - stats.sum_exp.log() + (stats.logit - stats.logit)


def row_truth(logits, labels, bias, softcap, temperature, runner_up):
    """target, logit, max_logit, sum_exp, dz_dlogit (r,), and E (r, V), in fp64."""
    x = logits.double() if bias is None else logits.double() + bias.double()
    dz_dlogit = torch.full_like(x, 1 / temperature)
    z = x / temperature
    if softcap is not None:
        tanh = torch.tanh(x / softcap)
        z = softcap * tanh / temperature
        dz_dlogit *= 1 - tanh**2
    columns = torch.arange(x.shape[1], device=x.device)
    target = labels.clone()
    if runner_up is not None:
        no_label = z.masked_fill(columns == labels[:, None], -torch.inf)
        if x.shape[1] > 1:
            target = torch.where(runner_up, no_label.argmax(1), labels)
        else:
            target = torch.where(runner_up, torch.where(labels == 0, -1, 0), labels)
    is_target = columns == target[:, None]
    exp_logits = z.masked_fill(is_target, -torch.inf)
    max_logit = exp_logits.amax(1).clamp(min=torch.finfo(torch.float32).min)
    e = (exp_logits - max_logit[:, None]).exp()
    there = target >= 0
    picked = target.clamp(min=0)[:, None]
    logit = torch.where(there, z.gather(1, picked).squeeze(1), -torch.inf)
    label_slope = torch.where(there, dz_dlogit.gather(1, picked).squeeze(1), 0.0)
    return (target, logit, max_logit, e.sum(1), label_slope), e * dz_dlogit


def problem(rows=37, width=40, vocabulary=203, spread=3.0, lift=0.0):
    """fp32 inputs: logits with standard deviation `spread`, and labels `lift` nats higher."""
    g = torch.Generator().manual_seed(rows + vocabulary)
    hidden = torch.randn(rows, width, generator=g)
    weight = torch.randn(vocabulary, width, generator=g) * spread / width**0.5
    labels = torch.randint(vocabulary, (rows,), generator=g)
    up = weight[labels]
    hidden += lift * up / up.square().sum(1, keepdim=True)
    return hidden.to(DEVICE), weight.to(DEVICE), labels.to(DEVICE)
