"""Correctness of each kernel called directly: row kernel, fused head, E of a chunk, loss kernel."""

import contextlib
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import truth
from benchmarks.gpu.record import Record
from realign_kernels import objectives
from realign_kernels.backends.base import RowStats
from realign_kernels.backends.triton import configs, exp_head
from realign_kernels.backends.triton.forward import head_stats
from realign_kernels.backends.triton.logits import assume_device
from realign_kernels.backends.triton.loss import preference_sums
from realign_kernels.backends.triton.row_kernel import row_stats
from realign_kernels.lm_head import Head

ROWS = ((512, 32000), (5, 131))
RAGGED_ROWS = ((33, 151937), (5, 97))
HEADS = {
    "wide": ((300, 4096, 32000), (20, 24, 150)),
    "narrow": ((300, 512, 4000), (20, 16, 90)),
    "few rows": ((40, 4096, 32000), (3, 24, 150)),
    "ragged": ((300, 4095, 32003), (20, 23, 150)),
}
"""A size for each bin of `configs.GEMMS`, on the device and in a rehearsal."""
STATS = 5e-6
"""Relative error of fp32 statistics of given logits: exp and sums of V terms."""
GEMM_FACTOR = 8.0
"""Times the error of torch's fp32 GEMM that the fused head may err: tensor cores cut, not round."""


def _exact(z: Tensor, labels: Tensor, temperature: float, softcap: float | None) -> RowStats:
    """fp64 statistics of scaled logits z; a label of -1 is in no column."""
    away = labels < 0
    index = labels.clamp(min=0)[:, None]
    logit = z.gather(1, index).squeeze(1)
    others = z.scatter(1, index, torch.where(away, logit, -torch.inf)[:, None])
    max_logit = others.amax(1)
    dz_dlogit = torch.full_like(logit, 1 / temperature)
    if softcap is not None:
        dz_dlogit *= 1 - (logit * temperature / softcap) ** 2
    sum_exp = (others - max_logit[:, None]).exp().sum(1)
    return RowStats(labels, logit, max_logit, sum_exp, dz_dlogit.masked_fill(away, 0), sum_exp)


def _scaled(logits: Tensor, softcap: float | None, temperature: float) -> Tensor:
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return capped / temperature


def _worst(stats: RowStats, exact: RowStats) -> dict[str, float]:
    """Relative error of each statistic; the logit of absent labels must be -inf."""
    away = exact.target < 0
    assert torch.equal(stats.target, exact.target)
    assert (stats.logit[away] == -torch.inf).all(), "an absent label has a logit"
    pairs = zip(RowStats._fields, stats, exact, strict=True)
    left_out = ("target", "divisor")  # the latter is of E as it was rounded
    found = {name: (a[~away], b[~away]) for name, a, b in pairs if name not in left_out}
    return {name: truth.error(a, b) for name, (a, b) in found.items()}


def _shifted_by_max(stats: RowStats, exact: RowStats) -> tuple[RowStats, Tensor]:
    """Statistics as if shifted by max_logit, and the factor of E: kernels differ in it."""
    factor = (stats.max_logit.double() - exact.max_logit).exp()
    shifted = stats._replace(max_logit=exact.max_logit, sum_exp=stats.sum_exp * factor)
    return shifted, factor[:, None]


def row_kernel(record: Record, size, dtype: torch.dtype, into: torch.dtype | None, head: dict):
    """`row_stats` of given logits: statistics, and E in the dtype `into` (None: not needed)."""
    rows, vocabulary = size[record.rehearse]
    g = torch.Generator(record.device).manual_seed(0)
    kind = {"generator": g, "device": record.device}
    logits = (3 * torch.randn(rows, vocabulary, **kind)).to(dtype)
    labels = torch.randint(vocabulary, (rows,), **kind)
    labels[1::4] = -1
    labels[2::4] = logits[2::4].argmax(1)  # confident: E of the label would be the largest
    softcap, temperature = head.get("softcap"), head.get("temperature", 1.0)
    z = _scaled(logits.double(), softcap, temperature)
    exact = _exact(z, labels, temperature, softcap)
    exp_logits = None
    if into is not None:
        exp_logits = logits if into == dtype else torch.full_like(logits, torch.nan, dtype=into)
    stats = row_stats(logits, labels, None, softcap, temperature, None, exp_logits)
    stats, factor = _shifted_by_max(stats, exact)
    found = _worst(stats, exact)
    worst = max(found.values())
    assert worst <= STATS, f"statistics err by {found}, allowed {STATS}"
    if exp_logits is not None:
        slopes = 1 if softcap is None else 1 - (z * temperature / softcap) ** 2
        e = (z - exact.max_logit[:, None]).exp() * slopes / temperature
        inside = (labels >= 0).nonzero().squeeze(1)
        e[inside, labels[inside]] = 0
        found["exp_logits"] = truth.error(exp_logits * factor, e)
        floor = truth.FLOOR[into] + STATS
        assert found["exp_logits"] <= floor, f"E errs by {found['exp_logits']}, allowed {floor}"
    return {"error": worst} | found


def fused_head(record: Record, size, dtype: torch.dtype, head: dict):
    """`head_stats` against fp64; the budget is that of torch's GEMM in fp32."""
    problem = truth.make(size[record.rehearse], dtype, record.device)
    labels = problem.labels.clone()
    labels[labels == truth.IGNORE] = -1
    softcap, temperature = head.get("softcap"), head.get("temperature", 1.0)
    pair = problem.hidden, problem.weight
    stats = head_stats(*pair, labels, None, softcap, temperature)
    wide, narrow = (
        _scaled(a.to(kind) @ b.to(kind).T, softcap, temperature)
        for kind in (torch.float64, torch.float32)
        for a, b in [pair]
    )
    found = _worst(stats, _exact(wide, labels, temperature, softcap))
    # An error of a logit is one of total, relative; so all are held to the largest.
    budget = STATS + GEMM_FACTOR * float((narrow - wide).abs().max())
    worst = max(found.values())
    assert worst <= budget, f"statistics err by {found}, allowed {budget}"
    return {"of_budget": worst / budget} | found


EXPONENTIALS = (300, 4096, 32003), (20, 24, 150)


def exponentials(record: Record, kernel: str, temperature: float) -> dict[str, float]:
    """E and the log-probs of a chunk, without logits, against fp64; one row overflows."""
    dtype = torch.float32 if record.rehearse else torch.bfloat16  # 2^-58 is nothing in fp16
    *shape, vocabulary = EXPONENTIALS[record.rehearse]
    if kernel == "cutlass":  # it stores rows of 16 bytes
        vocabulary += -vocabulary % 8
    problem = truth.make((*shape, vocabulary), dtype, record.device)
    labels, head = problem.labels.clamp(min=0), Head(problem.weight, None, None, temperature)
    problem.hidden[0] *= 100
    wide = problem.hidden.double() @ problem.weight.double().T / temperature
    labels[0] = wide[0].argmin()
    rows, vocabulary = wide.shape
    exp_logits = torch.full_like(wide, torch.nan, dtype=dtype)
    padding = exp_logits[:, : -vocabulary % 8]
    exp_logits = torch.cat([exp_logits, padding], 1)[:, :vocabulary]
    logit, shift, narrow = exp_head.label_logits(problem.hidden, labels, head)
    gemm = exp_head.cutlass_rows if kernel == "cutlass" else exp_head.exp_rows
    # An interpreter has no architecture.
    with assume_device(90, 1) if record.rehearse else contextlib.nullcontext():
        sums = gemm(problem.hidden, head, narrow, shift, exp_logits)
    logps, one_minus_p, sum_exp = exp_head.score_sums(sums, logit, temperature)
    assert not logps[0].isfinite(), "an overflow has a finite log-prob"
    exact = F.log_softmax(wide, 1).gather(1, labels[:, None])
    e = (wide - wide.gather(1, labels[:, None])).exp().scatter(1, labels[:, None], 0) / temperature
    scale = 2.0**58 / e[1:].amax(1, keepdim=True)
    found = {
        "logps": float((logps[1:].double() - exact[1:, 0]).abs().max()),
        "one_minus_p": truth.error(one_minus_p[1:], 1 - exact[1:, 0].exp()),
        "exp_logits": truth.error(exp_logits[1:] * scale, e[1:] * scale / 2.0**58),
    }
    # Logits err by the order of an fp32 GEMM's sums.
    allowed = {"logps": 1e-4, "one_minus_p": 1e-4, "exp_logits": truth.FLOOR[dtype] + 1e-4}
    over = [name for name in found if not found[name] <= allowed[name]]
    assert not over, f"{over} err by {found}, allowed {allowed}"
    return {"error": found["logps"]} | found


def loss_kernel(record: Record, name: str):
    """`preference_sums` against the objective in fp64 by autograd; rows in any order."""
    objective = objectives.get(name)
    leaves, examples = len(objective.leaves), 3 if record.rehearse else 32
    rows = 40 * leaves * examples if not record.rehearse else 60
    g = torch.Generator(record.device).manual_seed(1)
    kind = {"generator": g, "device": record.device}
    ids = torch.randperm(rows, **kind) % (leaves * examples)
    logps = -6 * torch.rand(rows, **kind)
    leaf = logps.double().requires_grad_()
    sums = leaf.new_zeros(leaves * examples).index_add(0, ids, leaf)
    sums = sums.view(leaves, examples)
    table = (sums.detach() + torch.randn(leaves, examples, **kind)).float()
    exact = objective(sums, table.double(), "mean")
    exact.loss.backward()
    output = preference_sums(logps, ids, table, objective)
    pairs = {
        "loss": (output.loss[None], exact.loss[None]),
        "coefficients": (output.coefficients, leaf.grad),
        "sums": (output.sums, exact.logps),
        "rewards": (output.rewards, exact.rewards),
    }
    found = {key: truth.error(value, true.detach()) for key, (value, true) in pairs.items()}
    worst = max(found.values())
    assert worst <= STATS, f"the loss kernel errs by {found}, allowed {STATS}"
    again = preference_sums(logps, ids, table, objective)
    assert all(map(torch.equal, output, again)), "a second call gives other bits"
    return {"error": worst} | found


def cases(record: Record) -> dict[str, Callable[[], dict]]:
    """Direct calls by name. The interpreter multiplies and rounds bf16 wrongly: fp16 there."""
    half, short = (torch.float16, "fp16") if record.rehearse else (torch.bfloat16, "bf16")
    capped = {"softcap": 8.0, "temperature": 1.7}
    rows = {
        f"fp32 to {short}": (ROWS, torch.float32, half, {}),
        "fp32 no derivative": (ROWS, torch.float32, None, {}),
        f"fp32 to {short} ragged capped": (RAGGED_ROWS, torch.float32, half, capped),
        f"{short} in place": (ROWS, half, half, {}),
    }
    heads = {f"{name} {short}": (size, half, {}) for name, size in HEADS.items()} | {
        "wide fp32": (HEADS["wide"], torch.float32, {}),
        f"wide {short} capped": (HEADS["wide"], half, capped),
    }
    architecture = 90 if record.rehearse else torch.cuda.get_device_capability()[0] * 10
    ways = {"triton": ("triton", 1.0), "triton, T = 1.3": ("triton", 1.3)}
    if architecture == 90 and exp_head.built() and not record.rehearse:
        ways["cutlass"] = ("cutlass", 1.0)
    ways = ways if configs.listed(architecture) in configs.EXP_HEADS else {}
    return {
        **{f"E/{name}": partial(exponentials, record, *way) for name, way in ways.items()},
        **{f"row kernel/{name}": partial(row_kernel, record, *case) for name, case in rows.items()},
        **{
            f"fused head/{name}": partial(fused_head, record, *case) for name, case in heads.items()
        },
        **{f"loss kernel/{name}": partial(loss_kernel, record, name) for name in ("rdpo", "mdpo")},
    }
