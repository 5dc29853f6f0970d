"""Values and gradients against fp64 for generated shapes, masks, strides and settings.

The examples are derived from the code of the tests, so they are the same in every run.
"""

import math

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import FACTOR, FLOOR, LAYOUTS, check, make_case, rdpo

import realign_kernels as rk
from realign_kernels._extension import missing_reason

PROFILE = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
CPP = [] if missing_reason() else [("cpp", torch.float32), ("cpp", torch.bfloat16)]
COMPUTED = [
    *CPP,
    *(("torch", dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)),
    ("reference", torch.float64),
]
SLACK = 10
SOFTCAPS = st.sampled_from([None, None, 0.5, 4.0, 30.0])
TEMPERATURES = st.sampled_from([1.0, 1.0, 0.3, 2.5])
CHUNKS = st.sampled_from([None, 1, 2, 3, 5, 100])
VOCABULARIES = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 255, 257]))
STRIDES = st.sampled_from(["plain", "plain", *LAYOUTS])


@st.composite
def head_calls(draw):
    backend, dtype = draw(st.sampled_from(COMPUTED))
    rows, width = draw(st.integers(0, 11)), draw(st.integers(1, 37))
    shape = (rows, width, draw(VOCABULARIES))
    case = make_case(*shape, dtype, bias=draw(st.booleans()), seed=draw(st.integers(0, 99)))
    kept = torch.tensor(draw(st.lists(st.booleans(), min_size=rows, max_size=rows))).bool()
    case = case._replace(labels=torch.where(kept, case.labels.abs() % shape[2], -100))
    for name in ("hidden", "weight"):
        layout = draw(STRIDES)
        if layout != "plain" and len(getattr(case, name)):
            case = case._replace(**{name: LAYOUTS[layout](getattr(case, name))})
    head = {"softcap": draw(SOFTCAPS), "temperature": draw(TEMPERATURES)}
    wanted = draw(st.sampled_from(["", "h", "w", "hw", "hb", "hwb"]))
    return backend, case, wanted, {**head, "chunk_rows": draw(CHUNKS)}


@given(head_calls())
@settings(PROFILE, max_examples=400)
def test_logprobs(call):
    backend, case, wanted, head = call
    with rk.use_backend(backend):
        check(case, wanted, slack=SLACK, **head)


@st.composite
def loss_calls(draw):
    """Packed rows: sequences of random length in random order, with ignored rows between them."""
    backend, dtype = draw(st.sampled_from(COMPUTED))
    examples, width = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    vocabulary, seed = draw(VOCABULARIES), draw(st.integers(0, 99))
    lengths = draw(st.lists(st.integers(1, 4), min_size=3 * examples, max_size=3 * examples))
    ids = torch.arange(3 * examples).repeat_interleave(torch.tensor(lengths))
    ignored = draw(st.integers(0, 4))
    ids = torch.cat([ids, torch.full((ignored,), draw(st.sampled_from([-1, 0, 10**9])))])
    case = make_case(len(ids), width, vocabulary, dtype, bias=True, ignored=0, seed=seed, spread=1)
    if ignored:
        case.labels[-ignored:] = -100
        case.hidden[-ignored:] = float("nan")
    order = draw(st.sampled_from(["given", "shuffled", "by example"]))
    if order != "given":
        g = torch.Generator().manual_seed(seed)
        key = torch.rand(len(ids), generator=g) if order == "shuffled" else ids % examples
        order = key.argsort(stable=True)
        ids, case = ids[order], case._replace(hidden=case.hidden[order], labels=case.labels[order])
    options = {
        "beta": draw(st.sampled_from([0.01, 0.1, 0.5])),
        "visual_weight": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "softcap": draw(SOFTCAPS),
        "temperature": draw(TEMPERATURES),
        "chunk_rows": draw(CHUNKS),
    }
    weights = case.upstream.abs().float() if draw(st.booleans()) else None
    train = draw(st.sampled_from(["h", "w", "hw", "hwb"]))
    return backend, case, ids, examples, weights, train, options


@given(loss_calls())
@settings(PROFILE, max_examples=250)
def test_loss(call):
    backend, case, ids, examples, weights, train, options = call
    dtype = case.hidden.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    reference = torch.linspace(-9, -3, 3 * examples, dtype=wide).view(3, examples)
    pairs = zip("hwb", case[:3], strict=True)
    leaves = [t.clone().requires_grad_(name in train) for name, t in pairs]
    with rk.use_backend(backend):
        out = rk.rdpo_loss(
            *leaves[:2],
            case.labels,
            reference,
            bias=leaves[2],
            sequence_ids=ids,
            token_weights=weights,
            **options,
        )
        out.loss.sum().backward()
    result = [out.loss.detach(), out.logps.detach(), *(t.grad for t in leaves)]
    # An ignored row of NaN has gradient 0. The eager computation must not contain it.
    clean = case._replace(hidden=case.hidden.nan_to_num(nan=0.0))
    exact, plain = (
        rdpo(clean, d, ids, reference, weights, **options) for d in (torch.float64, dtype)
    )
    for place, (value, near, target) in enumerate(zip(result, plain, exact, strict=True)):
        if value is not None:
            scale = max(1.0, float(target.abs().max()))
            budget = FACTOR * float((near - target).abs().max()) + 2 * FLOOR[dtype] * scale
            worst = float((value - target).abs().max())
            assert worst <= SLACK * budget, (place, worst, budget)
    assert math.isfinite(float(out.rewards.sum()))
    counts = torch.bincount(ids[case.labels != -100], minlength=3 * examples)
    assert torch.equal(out.token_counts.flatten(), counts)
