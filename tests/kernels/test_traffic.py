"""Memory traffic of the Triton kernels, counted in the interpreter.

It is compared with the traffic that the calculation of docs/gpu.md assumes.
"""

from collections import Counter

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import triton_cases as tc
from triton_cases import DEVICE, epilogue, exp_head, row_kernel

from benchmarks import roofline
from realign_kernels.backends.base import Scores
from realign_kernels.lm_head import Head

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="counted by the interpreter, on a CPU")
N, H, V = 16, 96, 1536


@pytest.fixture
def traffic(monkeypatch):
    """Bytes by direction. A load or store counts the elements that its mask enables."""
    from triton.runtime import interpreter

    found = Counter()
    builder = interpreter.interpreter_builder

    def count(name, direction, place):
        plain = getattr(builder, name)

        def counted(pointers, *rest):
            size = pointers.get_element_ty().primitive_bitwidth // 8
            found[direction] += size * int(np.count_nonzero(rest[place].data))
            return plain(pointers, *rest)

        monkeypatch.setattr(builder, name, counted)

    count("create_masked_load", "read", 0)
    count("create_masked_store", "written", 1)
    with tc.interpreted():
        yield found


def bf16(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)


def near(found, expected):
    """Checks the bytes. Vectors with one number per row add 3 % here."""
    assert expected <= found <= 1.03 * expected, (found, expected)


def test_the_row_kernel_reads_once(traffic):
    logits, labels = torch.randn(N, V), torch.arange(N)
    row_kernel.row_stats(logits, labels, None, None, 1.0, None, bf16(N, V))
    near(sum(traffic.values()), roofline.ROW_BYTES * N * V)
    traffic.clear()
    row_kernel.row_stats(logits, labels, None, None, 1.0)
    near(sum(traffic.values()), roofline.FP32 * N * V)


def test_the_last_step(traffic):
    vectors = [torch.ones(N) for _ in range(4)]
    scores = Scores(*vectors[:2], torch.arange(N), *vectors[2:])
    epilogue.hidden_grad_epilogue(
        torch.randn(N, H), bf16(V, H), scores, vectors[0], torch.empty(N, H)
    )
    found = sum(traffic.values())
    assert 0 <= found - roofline.FINISH * N * H <= N * 24  # five numbers per row


def test_the_labels_logit(traffic):
    exp_head.label_logits(bf16(N, H), torch.arange(N), Head(bf16(V, H), None, None, 1.0))
    found = sum(traffic.values())
    assert 0 <= found - roofline.LABEL * N * H <= N * 24


def test_the_scaling_by_one_moves_nothing(traffic):
    values = torch.ones(N, H)
    epilogue.scale(values, torch.tensor(1.0))
    assert sum(traffic.values()) == 4 * epilogue.SCALE_PROGRAMS  # the factor
    traffic.clear()
    epilogue.scale(values, torch.tensor(2.0))
    assert sum(traffic.values()) == 4 * epilogue.SCALE_PROGRAMS + 8 * N * H
