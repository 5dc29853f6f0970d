"""Row kernel and GEMM of the C++ extension (csrc/rows/rows.h, csrc/gemm/gemm.h), on the CPU.

Logits are never rounded to bf16. With AVX-512 the extension multiplies: its fp32 GEMM is about 2x
faster than MKL on an AMD CPU. Its bf16 GEMM is as fast as oneDNN but has fp32 results. With AMX
oneDNN is up to 2x faster. On aarch64 with BF16 the extension has a bf16 GEMM. In all other cases
torch multiplies, with half-precision inputs widened to fp32.
"""

import functools
import math
import threading

import torch
from torch import Tensor

from realign_kernels._extension import require_extension
from realign_kernels.backends.base import RowStats, Scores
from realign_kernels.backends.torch import TorchKernels

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
DTYPES = tuple(_NAMES)


@functools.cache
def _own_gemm(dtype: torch.dtype) -> bool:
    """Whether the extension has a GEMM for this dtype on this CPU."""
    features = require_extension().cpu_features()
    return features["gemm_bf16"] if dtype == torch.bfloat16 else features["gemm_f32"]


@functools.cache
def _widens(dtype: torch.dtype) -> bool:
    """Whether torch multiplies this dtype in fp32, because the CPU only emulates bf16."""
    return dtype == torch.bfloat16 and not _own_gemm(dtype)


def describe() -> str:
    """Instruction set of the row kernels and source of the GEMM, for `dispatch.explain`."""
    features = require_extension().cpu_features()
    own = [name for dtype, name in _NAMES.items() if _own_gemm(dtype)]
    amx = " (AMX)" if features["amx"] else ""
    return f"{features['level']} rows, GEMM " + (
        f"for {', '.join(own)}{amx}" if own else "of torch"
    )


KEPT = 192 * 2**20
"""Largest chunk buffer in bytes that a thread keeps between calls."""


class _Memory(threading.local):
    """The chunk buffer of each thread, kept between calls. Fresh memory costs 5 % of a step."""

    buffer: Tensor | None = None


_memory = _Memory()
_torch = TorchKernels()


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for a tensor; 8 MiB or more comes from a pool with large pages (csrc: Block)."""
    size = math.prod(shape) * dtype.itemsize
    if size < 2**23:
        return torch.empty(shape, dtype=dtype, device="cpu")  # overrides a torch.device context
    memory = torch.frombuffer(require_extension().Block(size), dtype=torch.uint8, count=size)
    return memory.view(dtype).view(shape)


def _reserve(size: int) -> Tensor:
    """A buffer for one call. The kept buffer is unavailable to others until `release`.

    A term of an objective or an autograd hook may call the head inside a call of the head.
    """
    kept, _memory.buffer = _memory.buffer, None
    if kept is not None and kept.numel() >= size:
        return kept
    del kept  # frees before it allocates
    with torch.inference_mode(False):  # an inference tensor is read-only outside that mode
        return _empty((size,), torch.uint8)


BLOCK = 2**18
"""Elements of a half-precision matrix that are widened at once."""


def _gemm_in_fp32(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> Tensor:
    """`gemm` of half-precision matrices by torch in fp32, with small widened copies.

    If out is half precision, results are rounded at the end.
    """
    (m, k), n = a.shape, b.shape[1]
    if n >= max(m, k):  # by columns: logits
        step = max(1, BLOCK // max(k, 1))
        wide = a.float()
        for i in range(0, n, step):
            _into(out[:, i : i + step], wide, b[:, i : i + step].float(), accumulate)
    elif m >= k:  # by rows: the gradient of the weight
        step = max(1, BLOCK // max(k, 1))
        wide = b.float()
        for i in range(0, m, step):
            _into(out[i : i + step], a[i : i + step].float(), wide, accumulate)
    else:  # by terms: the gradient of hidden
        step = max(1, BLOCK // max(m, n, 1))
        total = torch.zeros(m, n, dtype=torch.float32, device="cpu")
        for i in range(0, k, step):
            total.addmm_(a[:, i : i + step].float(), b[i : i + step].float())
        if accumulate:
            out.add_(total)
        else:
            out.copy_(total)
    return out


def _into(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """`gemm` of fp32 matrices into an fp32 or half-precision out."""
    if out.dtype == torch.float32:
        _torch.gemm(a, b, out, accumulate)
    elif accumulate:
        out.add_(torch.mm(a, b))
    else:
        out.copy_(torch.mm(a, b))


def _strides(matrix: Tensor) -> tuple[int, int]:
    """Strides with a 1 for the extension: a dimension of size 1 may have any stride."""
    row, column = matrix.stride()
    if row != 1 and column != 1:
        return (1, column) if matrix.shape[0] == 1 else (row, 1)
    return row, column


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class CppKernels(TorchKernels):
    """GEMM and row kernel of the extension; torch for everything else."""

    def buffers(
        self, rows: int, hidden: Tensor, vocabulary: int, derivative: bool
    ) -> tuple[Tensor, Tensor | None]:
        """fp32 logits, and exp_logits in the same memory: each row starts where its logits do.

        A row kernel reads ahead of its writes, so it can write bf16 exp_logits over fp32 logits.
        """
        size = rows * vocabulary * 4
        memory = _reserve(size)[:size].view(torch.float32).view(rows, vocabulary)
        return memory, memory.view(hidden.dtype)[:, :vocabulary] if derivative else None

    def release(self, logits: Tensor) -> None:
        memory = logits.untyped_storage()
        if 0 < memory.nbytes() <= KEPT:
            with torch.inference_mode(False):
                _memory.buffer = torch.empty(0, dtype=torch.uint8, device="cpu").set_(memory)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return _empty(shape, dtype)

    def gemm(self, a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
        half_out = out.dtype == torch.bfloat16
        if _widens(a.dtype):
            return _gemm_in_fp32(a, b, out, accumulate)
        if not _own_gemm(a.dtype) or (half_out and accumulate):
            return super().gemm(a, b, out, accumulate)
        a, b = (t if 1 in t.stride() else t.contiguous() for t in (a, b))
        (m, k), n = a.shape, b.shape[1]
        matrices = (a.data_ptr(), *_strides(a), b.data_ptr(), *_strides(b))
        require_extension().gemm(
            _NAMES[a.dtype],
            *(m, n, k),
            *matrices,
            *(out.data_ptr(), out.stride(0), _NAMES[out.dtype]),
            accumulate,
            torch.get_num_threads(),
        )
        return out

    def row_stats(
        self,
        logits: Tensor,  # (r, V)
        labels: Tensor,  # (r,)
        bias: Tensor | None,  # (V,)
        softcap: float | None,
        temperature: float,
        runner_up: Tensor | None,  # (r,) bool
        exp_logits: Tensor | None,  # (r, V)
    ) -> RowStats:
        rows, vocabulary = logits.shape
        labels = labels.contiguous()
        bias = None if bias is None else bias.float().contiguous()
        runner_up = None if runner_up is None else runner_up.contiguous()
        target = torch.empty_like(labels)
        logit, max_logit, sum_exp, dz_dlogit = _empty((4, rows), torch.float32).unbind()
        written = logits if exp_logits is None else exp_logits
        require_extension().read_rows(
            *(logits.data_ptr(), _NAMES[logits.dtype], logits.stride(0)),
            *(rows, vocabulary),
            *(labels.data_ptr(), _address(bias), softcap or 0.0, temperature, _address(runner_up)),
            *(_address(exp_logits), _NAMES[written.dtype], written.stride(0)),
            *(t.data_ptr() for t in (target, logit, max_logit, sum_exp, dz_dlogit)),
            torch.get_num_threads(),
        )
        return RowStats(target, logit, max_logit, sum_exp, dz_dlogit, sum_exp)

    def hidden_grad_epilogue(
        self,
        exp_w: Tensor,  # (r, H)
        weight: Tensor,  # (V, H)
        scores: Scores,
        factor: Tensor,  # (r,)
        out: Tensor,  # (r, H)
    ) -> None:
        if weight.stride(1) != 1 or not out.is_contiguous():
            return super().hidden_grad_epilogue(exp_w, weight, scores, factor, out)
        vectors = (scores.target, scores.dz_dlogit, scores.sum_exp, factor)
        vectors = [t.contiguous() for t in vectors]
        require_extension().finish_direction(
            *exp_w.shape,
            *(exp_w.data_ptr(), weight.data_ptr(), weight.stride(0), _NAMES[weight.dtype]),
            *(t.data_ptr() for t in vectors),
            *(out.data_ptr(), _NAMES[out.dtype], torch.get_num_threads()),
        )
