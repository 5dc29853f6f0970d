"""rdpo_loss and linear_preference_loss: from hidden states to the loss."""

import pytest
import torch
import torch.nn.functional as F

import realign_kernels as rk
from realign_kernels import objectives

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EXAMPLES, LENGTH, WIDTH, VOCABULARY = 4, 6, 16, 97


def batch(leaves=3, dtype=torch.float64, seed=0):
    """hidden (L, B, T, H), weight, labels (L, B, T) with ragged responses, reference (L, B).

    Example 0 has responses of one token.
    """
    g = torch.Generator().manual_seed(seed)
    shape = (leaves, EXAMPLES, LENGTH)
    hidden = torch.randn(*shape, WIDTH, generator=g, dtype=torch.float64).to(dtype)
    weight = (torch.randn(VOCABULARY, WIDTH, generator=g, dtype=torch.float64) / 4).to(dtype)
    labels = torch.randint(VOCABULARY, shape, generator=g)
    lengths = torch.randint(1, LENGTH + 1, shape[:2], generator=g)
    lengths[:, 0] = 1
    labels[torch.arange(LENGTH) >= lengths[..., None]] = -100
    reference = torch.randn(leaves, EXAMPLES, generator=g, dtype=torch.float64) - 5 * lengths
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return hidden, weight, labels, reference.to(wide)


def plain_rdpo(hidden, weight, labels, reference, beta, visual_weight):
    """The paper's loss, written with all logits."""
    logps = F.log_softmax(hidden @ weight.T, -1)
    tokens = logps.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    s_w, s_l, s_v = (tokens * (labels != -100)).sum(-1) - reference
    text = -torch.log(torch.sigmoid(beta * (s_w - s_l)))
    visual = -torch.log(torch.sigmoid(beta * (s_w - s_v)))
    return (text + visual_weight * visual).mean()


@pytest.mark.parametrize("visual_weight", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_rdpo_is_the_papers_loss(frozen, beta, visual_weight):
    hidden, weight, labels, reference = batch()
    results = []
    for loss in (plain_rdpo, lambda *a: rk.rdpo_loss(*a[:4], beta=a[4], visual_weight=a[5]).loss):
        h = hidden.clone().requires_grad_()
        w = weight.clone().requires_grad_(not frozen)
        value = loss(h, w, labels, reference, beta, visual_weight)
        value.backward()
        results.append((value.detach(), h.grad, w.grad))
    for expected, value in zip(*results, strict=True):
        if expected is not None:
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-13)


def test_output_is_what_trl_logs():
    hidden, weight, labels, reference = batch(dtype=torch.float32)
    out = rk.rdpo_loss(hidden.requires_grad_(), weight, labels, reference, beta=0.3)
    assert out._fields == ("loss", "logps", "rewards", "token_counts")
    assert out.loss.shape == () and out.loss.dtype == torch.float32
    torch.testing.assert_close(out.rewards, 0.3 * (out.logps - reference).detach())
    assert torch.equal(out.token_counts, (labels != -100).sum(-1))
    assert out.token_counts.dtype == torch.int64
    assert out.logps.requires_grad and not out.rewards.requires_grad
    tokens = rk.linear_logprobs(hidden, weight, labels)
    torch.testing.assert_close(out.logps, tokens.sum(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_padded_equals_packed_in_any_order(frozen, dtype):
    hidden, weight, labels, reference = batch(dtype=dtype)
    ids = torch.arange(3 * EXAMPLES).view(3, EXAMPLES, 1).expand(labels.shape)
    order = torch.randperm(labels.numel(), generator=torch.Generator().manual_seed(3))
    kept = order[(labels.flatten()[order] != -100) | (order % 2 == 0)]
    packed_ids = torch.where(labels == -100, -1, ids).flatten()[kept]

    padded_h = hidden.clone().requires_grad_()
    packed_h = hidden.flatten(0, 2)[kept].clone().requires_grad_()
    heads = [weight.clone().requires_grad_(not frozen) for _ in range(2)]
    padded = rk.rdpo_loss(padded_h, heads[0], labels, reference)
    packed = rk.rdpo_loss(
        packed_h, heads[1], labels.flatten()[kept], reference, sequence_ids=packed_ids
    )
    for a, b in zip(padded, packed, strict=True):
        torch.testing.assert_close(a, b)
    padded.loss.backward()
    packed.loss.backward()
    torch.testing.assert_close(padded_h.grad.flatten(0, 2)[kept], packed_h.grad)
    if not frozen:
        torch.testing.assert_close(heads[0].grad, heads[1].grad)


@pytest.mark.parametrize("name", objectives.PRESETS)
def test_every_preset_from_hidden_states(name):
    objective = objectives.get(name)
    hidden, weight, labels, reference = batch(leaves=len(objective.leaves))
    out = rk.linear_preference_loss(hidden, weight, labels, reference, objective)
    rival = torch.tensor([leaf.rival for leaf in objective.leaves])[:, None, None]
    rival = rival.expand(labels.shape)
    sums = rk.linear_logprobs(hidden, weight, labels, rival=rival).sum(-1)
    counts = (labels != -100).sum(-1)
    expected = rk.preference_loss(sums, reference, objective, token_counts=counts)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.term_losses, expected.term_losses)
    assert out.term_losses.shape == (len(objective.terms), EXAMPLES)


def test_micro_batches_add_up():
    hidden, weight, labels, reference = batch()
    whole = rk.rdpo_loss(hidden, weight, labels, reference, reduction="sum").loss
    parts = [
        rk.rdpo_loss(hidden[:, i], weight, labels[:, i], reference[:, i], reduction="sum").loss
        for i in (slice(0, 1), slice(1, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts), whole)
    each = rk.rdpo_loss(hidden, weight, labels, reference, reduction="none").loss
    torch.testing.assert_close(each.sum(), whole)


def test_head_settings_reach_the_head():
    hidden, weight, labels, reference = batch()
    head = {
        "bias": torch.randn(VOCABULARY, dtype=torch.float64),
        "softcap": 5.0,
        "temperature": 0.7,
        "chunk_rows": 5,
    }
    labels = torch.where(labels == -100, 7, labels)
    sums = rk.linear_logprobs(hidden, weight, labels, ignore_index=7, **head).sum(-1)
    out = rk.rdpo_loss(hidden, weight, labels, reference, ignore_index=7, **head)
    torch.testing.assert_close(out.logps, sums)


def test_module_is_the_function():
    hidden, weight, labels, reference = batch()
    bias = torch.randn(VOCABULARY, dtype=torch.float64)
    settings = {
        "beta": 0.2,
        "visual_weight": 0.5,
        "softcap": 6.0,
        "temperature": 0.9,
        "chunk_rows": 7,
        "reduction": "sum",
    }
    module = rk.RDPOLoss(**settings)
    expected = rk.rdpo_loss(hidden, weight, labels, reference, bias=bias, **settings)
    for a, b in zip(module(hidden, weight, labels, reference, bias=bias), expected, strict=True):
        assert torch.equal(a, b)
    assert "beta=0.2" in repr(module)
    with pytest.raises(ValueError, match="beta must be"):
        rk.RDPOLoss(beta=-1)
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none"):
        rk.RDPOLoss(reduction="avg")


@pytest.mark.parametrize("trainable", [True, False])
def test_distributed_weight_is_gathered(trainable, tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    hidden, weight, labels, reference = batch()
    expected = weight.clone().requires_grad_(trainable)
    plain = rk.rdpo_loss(hidden.requires_grad_(), expected, labels, reference)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = DTensor.from_local(weight.clone(), mesh, [Shard(0)]).requires_grad_(trainable)
        out = rk.rdpo_loss(hidden, sharded, labels, reference)
        assert torch.equal(out.loss, plain.loss)
        out.loss.backward()
        if trainable:
            plain.loss.backward()
            assert torch.equal(sharded.grad.full_tensor(), expected.grad)
    finally:
        dist.destroy_process_group()


def test_compiled_with_symbolic_shapes_and_settings():
    """dynamic=True makes numbers symbolic, which math.isfinite does not take."""
    loss = rk.RDPOLoss(beta=0.3, temperature=0.7, softcap=9.0)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for examples in (2, 5):
        hidden = torch.randn(3, examples, 4, 8, requires_grad=True)
        labels = torch.randint(31, (3, examples, 4))
        inputs = hidden, torch.randn(31, 8), labels, torch.zeros(3, examples)
        found, plain = compiled(*inputs).loss, loss(*inputs).loss
        torch.testing.assert_close(found, plain)
        grads = (torch.autograd.grad(one, hidden)[0] for one in (found, plain))
        torch.testing.assert_close(*grads)
