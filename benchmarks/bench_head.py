"""The head with a frozen weight, forward and backward: ours, eager torch, and the two GEMMs alone.

N = 768 response tokens (4 examples x 3 sequences x 64), H = 1024, V = 32000. The padded contestants
also get the 128 image and prompt rows of each sequence, as a trainer that projects every position
does.
"""

import pytest
import torch
import torch.nn.functional as F

from realign_kernels import rdpo_loss

EXAMPLES, RESPONSE, PREFIX, WIDTH, VOCABULARY = 4, 64, 128, 1024, 32000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_case(dtype):
    """Hidden states (3, B, T, H), head, labels with an ignored prefix, references."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, EXAMPLES, PREFIX + RESPONSE)
    hidden = torch.randn(*shape, WIDTH, generator=generator).to(dtype)
    weight = (torch.randn(VOCABULARY, WIDTH, generator=generator) * 2 / WIDTH**0.5).to(dtype)
    labels = torch.randint(VOCABULARY, shape, generator=generator)
    labels[..., :PREFIX] = -100
    reference = torch.randn(3, EXAMPLES, generator=generator) - 12.4 * RESPONSE
    return hidden, weight, labels, reference


def eager_loss(hidden, weight, labels, reference):
    """Full logits of the rows given, as trainers without a fused head compute them."""
    logits = (hidden @ weight.T).float()
    logps = F.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    s = (logps * (labels != -100)).sum(-1) - reference
    w, lost, visual = 0.1 * s
    return -(F.logsigmoid(w - lost) + F.logsigmoid(w - visual)).mean()


def step(loss_of, hidden):
    """One forward and backward; returns the gradient of hidden."""
    hidden = hidden.detach().requires_grad_()
    loss_of(hidden).backward()
    return hidden.grad


@pytest.fixture(scope="module", params=DTYPES)
def case(request):
    hidden, weight, labels, reference = make_case(DTYPES[request.param])
    response = (hidden[:, :, PREFIX:].contiguous(), labels[:, :, PREFIX:].contiguous())
    return request.param, hidden, weight, labels, reference, response


@pytest.fixture(scope="module")
def truth(case):
    """Gradient of the response rows in fp64."""
    _, _, weight, _, reference, (hidden, labels) = case
    return step(lambda h: _eager64(h, weight.double(), labels, reference.double()), hidden.double())


def _eager64(hidden, weight, labels, reference):
    logits = hidden @ weight.T
    logps = F.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0]
    w, lost, visual = 0.1 * (logps.sum(-1) - reference)
    return -(F.logsigmoid(w - lost) + F.logsigmoid(w - visual)).mean()


def run(benchmark, group, call, truth=None):
    benchmark.group = group
    grad = benchmark.pedantic(call, rounds=5, warmup_rounds=1, iterations=1)
    if truth is not None:
        found = grad[:, :, -RESPONSE:].double()
        benchmark.extra_info["error"] = float((found - truth).norm() / truth.norm())


def test_ours(benchmark, case, truth):
    name, _, weight, _, reference, (hidden, labels) = case
    call = lambda: step(lambda h: rdpo_loss(h, weight, labels, reference).loss, hidden)  # noqa: E731
    run(benchmark, f"head {name}", call, truth)


def test_two_gemms_alone(benchmark, case):
    name, _, weight, _, _, (hidden, _) = case
    rows = hidden.flatten(0, 2)
    logits = rows.new_empty(256, VOCABULARY)
    out = torch.empty_like(rows)

    def call():
        for start in range(0, len(rows), 256):
            torch.mm(rows[start : start + 256], weight.T, out=logits)
            torch.mm(logits, weight, out=out[start : start + 256])

    run(benchmark, f"head {name}", call)


def test_eager_on_response_rows(benchmark, case, truth):
    name, _, weight, _, reference, (hidden, labels) = case
    call = lambda: step(lambda h: eager_loss(h, weight, labels, reference), hidden)  # noqa: E731
    run(benchmark, f"head {name}", call, truth)


def test_eager_on_all_rows(benchmark, case, truth):
    name, hidden, weight, labels, reference, _ = case
    call = lambda: step(lambda h: eager_loss(h, weight, labels, reference), hidden)  # noqa: E731
    run(benchmark, f"head {name}", call, truth)
