"""One matrix of cases, every backend, against the specification and the error budget."""

import contextlib
import importlib
import os
import subprocess
import sys
from typing import NamedTuple

import kernel_cases as kc
import pytest
import torch

import realign_kernels as rk
from realign_kernels import _extension, objectives, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BACKENDS = {
    "torch": (kc.DEVICES, kc.DTYPES),
    "cpp": (("cpu",), (torch.float32, torch.bfloat16)),
    "triton": ((kc.DEVICE,), kc.TRITON_DTYPES),
}
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap, temperature, bias": {"bias": True, "temperature": 1.7, "softcap": 8.0},
}


class Setting(NamedTuple):
    backend: str
    device: str
    dtype: torch.dtype

    def __str__(self):
        return f"{self.backend}-{self.device}-{str(self.dtype)[6:]}"

    def make_case(self, *shape, **settings):
        return kc.make_case(*shape, self.dtype, device=self.device, **settings)


MATRIX = [
    Setting(name, device, dtype)
    for name, (devices, dtypes) in BACKENDS.items()
    for device in devices
    for dtype in dtypes
]


@pytest.fixture(params=MATRIX, ids=str)
def setting(request, monkeypatch):
    """A device and a dtype, under their backend."""
    name = request.param.backend
    if name == "cpp" and _extension.missing_reason():
        pytest.skip("the C++ extension is not built")
    with contextlib.ExitStack() as stack:
        if name == "triton":
            pytest.importorskip("triton")
            cases = importlib.import_module("triton_cases")  # imports the kernels as it must
            stack.enter_context(cases.interpreted())
            if request.param.device == "cpu":
                monkeypatch.setenv("TRITON_INTERPRET", "1")
        stack.enter_context(rk.use_backend(name))
        yield request.param


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_values_and_gradients(setting, frozen, head):
    called = {name: value for name, value in head.items() if name != "bias"}
    for seed, shape in enumerate([(5, 33, 97), (12, 16, 131)]):
        case = setting.make_case(*shape, bias="bias" in head, seed=seed)
        result = kc.ours(case, frozen=frozen, chunk_rows=5, **called)
        eager, exact = kc.eager(case, setting.dtype, **called), kc.truth(case, **called)
        kc.within_budget(result, eager, exact, setting.dtype)


def test_without_gradient(setting):
    case = setting.make_case(12, 33, 131, bias=True)
    with torch.no_grad():
        logps = rk.linear_logprobs(*case[:2], case.labels, bias=case.bias, softcap=9.0)
    exact = kc.truth(case, softcap=9.0).logps
    plain = kc.eager(case, setting.dtype, softcap=9.0).logps
    assert kc.error(logps, exact) <= 2 * kc.error(plain, exact) + kc.FLOOR[setting.dtype]


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_rival_rows_score_the_strongest_other_token(setting, frozen):
    """Against plain PyTorch; one-hot hidden states make the logits, and so the choice, exact."""
    g = torch.Generator().manual_seed(0)
    width, vocabulary = 9, 61
    weight = torch.randn(vocabulary, width, generator=g, dtype=torch.float64)
    weight = weight.to(setting.device, setting.dtype)
    hidden = torch.eye(width, dtype=setting.dtype, device=setting.device)
    labels = weight.argmax(0)  # the label is the strongest in every other row
    labels[1::2] = (labels[1::2] + 7) % vocabulary
    labels[3] = -100
    rival = torch.arange(width, device=setting.device) % 3 != 2
    upstream = torch.randn(width, generator=g).to(setting.device)

    h64 = hidden.to(torch.float64, copy=True).requires_grad_()
    w64 = weight.to(torch.float64, copy=True).requires_grad_(not frozen)
    logps = torch.log_softmax(h64 @ w64.T, 1)
    top = logps.topk(2, 1).indices
    strongest = torch.where(top[:, 0] == labels, top[:, 1], top[:, 0])
    target = torch.where(rival, strongest, labels).clamp(min=0)
    expected = logps.gather(1, target[:, None]).squeeze(1) * (labels != -100)
    (expected * upstream).sum().backward()

    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
    found = rk.linear_logprobs(h, w, labels, rival=rival, chunk_rows=4)
    (found * upstream.to(found.dtype)).sum().backward()
    floor = 4 * kc.FLOOR[setting.dtype]
    assert kc.error(found, expected) <= floor
    assert kc.error(h.grad, h64.grad) <= floor
    if not frozen:
        assert kc.error(w.grad, w64.grad) <= floor


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("chunk_rows", [3, 16, None])
@pytest.mark.parametrize("name", ["rdpo", "released"])
def test_the_loss_with_examples_shorter_and_longer_than_a_chunk(setting, name, chunk_rows, frozen):
    """Packed in any order, token weights, mean: against the specification in fp64."""
    g = torch.Generator().manual_seed(1)
    objective = objectives.get(name)
    examples, width, vocabulary = 4, 24, 97
    lengths = torch.tensor([[1, 7, 2, 3], [1, 9, 1, 4], [1, 7, 2, 3]])
    ids = torch.arange(12).repeat_interleave(lengths.flatten())
    ids = ids[torch.randperm(len(ids), generator=g)]
    hidden = torch.randn(len(ids), width, generator=g, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=g) / 3
    hidden, weight = (t.to(setting.device, setting.dtype) for t in (hidden, weight))
    labels = torch.randint(vocabulary, (len(ids),), generator=g)
    factors = torch.rand(len(ids), generator=g)
    ref = torch.randn(3, examples, generator=g) - 4.0 * lengths
    ids, labels, factors, ref = (t.to(setting.device) for t in (ids, labels, factors, ref))

    h64 = hidden.to(torch.float64, copy=True).requires_grad_()
    w64 = weight.to(torch.float64, copy=True).requires_grad_(not frozen)
    logits = h64 @ w64.T
    rival = ids.new_tensor([leaf.rival for leaf in objective.leaves]).bool()[ids // examples]
    target = torch.where(rival, reference.runner_up(logits, labels), labels)
    tokens = torch.log_softmax(logits, 1).gather(1, target[:, None]).squeeze(1) * factors
    sums = tokens.new_zeros(12).index_add(0, ids, tokens).view(3, examples)
    loss = objective(sums, ref.double()).loss
    loss.backward()

    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
    settings = {"sequence_ids": ids, "token_weights": factors, "chunk_rows": chunk_rows}
    wide = ref.double() if setting.dtype == torch.float64 else ref
    out = rk.linear_preference_loss(h, w, labels, wide, objective, **settings)
    out.loss.backward()
    floor = 8 * kc.FLOOR[setting.dtype]
    assert kc.error(out.loss, loss) <= floor
    assert kc.error(out.logps, sums) <= floor
    assert kc.error(h.grad, h64.grad) <= 2 * floor
    if not frozen:
        assert kc.error(w.grad, w64.grad) <= 2 * floor


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["dpo", "rdpo", "mdpo", "released", "symmpo", "ipo"])
def test_objectives_and_gradient_through_the_log_probs(setting, name, reduction):
    """Whether the backend fuses the objective or not; a second loss hangs on out.logps."""
    g = torch.Generator().manual_seed(2)
    objective = objectives.get(name)
    leaves, examples, length = len(objective.leaves), 3, 4
    hidden = torch.randn(leaves, examples, length, 16, generator=g)
    weight = torch.randn(61, 16, generator=g) / 3
    hidden, weight = (t.to(setting.device, setting.dtype) for t in (hidden, weight))
    labels = torch.randint(61, hidden.shape[:3], generator=g)
    labels[:, 1, 2:] = -100
    wide = torch.float64 if setting.dtype == torch.float64 else torch.float32
    ref = torch.randn(leaves, examples, generator=g).to(setting.device, wide)
    labels = labels.to(setting.device)

    def both(run, source):
        h = source.clone().requires_grad_()
        out = run(h)
        (3 * out.loss.sum() + (out.logps**2).mean()).backward()
        return out, h.grad

    def plain(h):
        logits = h @ weight.double().T
        flags = labels.new_tensor([leaf.rival for leaf in objective.leaves]).bool()[:, None, None]
        flat = reference.runner_up(logits.flatten(0, 2), labels.flatten().clamp(min=0))
        target = torch.where(flags, flat.view(labels.shape), labels.clamp(min=0))
        tokens = torch.log_softmax(logits, -1).gather(-1, target[..., None]).squeeze(-1)
        counts = (labels != -100).sum(-1)
        return objective((tokens * (labels != -100)).sum(-1), ref.double(), reduction, counts)

    expected, exact = both(plain, hidden.double())
    found, grad = both(
        lambda h: rk.linear_preference_loss(h, weight, labels, ref, objective, reduction=reduction),
        hidden,
    )
    floor = 8 * kc.FLOOR[setting.dtype]
    for field in ("loss", "logps", "rewards", "term_losses"):
        assert kc.error(getattr(found, field), getattr(expected, field)) <= floor, field
    assert torch.equal(found.token_counts, expected.token_counts)
    assert kc.error(grad, exact) <= floor


def lesser_levels():
    """What REALIGN_CPU may ask for, but for what the matrix above ran on."""
    if _extension.missing_reason() or "REALIGN_CPU" in os.environ:
        return []
    features, levels = _extension.extension().cpu_features(), ["scalar", "avx2", "avx512"]
    if features["level"] == "neon":
        return ["scalar"]
    return levels[: levels.index(features["level"]) + features["amx"]]


@pytest.mark.parametrize("level", lesser_levels())
def test_the_matrix_on_lesser_cpus(level):
    command = [sys.executable, "-m", "pytest", "-q", "-k", "cpp", __file__]
    done = subprocess.run(
        command, env={**os.environ, "REALIGN_CPU": level}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout
