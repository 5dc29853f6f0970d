"""The head over several processes: split by vocabulary, sharded as in FSDP2, inside FSDP2 and DDP.

All tests share one set of 4 processes. All processes run a check, which compares with the results
of a single process.
"""

import contextlib

import pytest
import torch
import torch.distributed as dist
from kernel_cases import FLOOR, Case, eager, error, make_case, rdpo, truth, within_budget
from ranks import processes
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import realign_kernels as rk

RANKS = 4
SHARDS = {2: (15, 8), 4: (8, 3, 7, 5)}
MEMBERS = {2: (1, 3), 4: (0, 1, 2, 3)}
"""Ranks of each group. In the group of 2, group ranks differ from process ranks."""
VOCABULARY, WIDTH, ROWS = 23, 10, 14
SETTINGS = {"softcap": 6.0, "temperature": 0.7}
DTYPES = (torch.float64, torch.bfloat16)
FROZEN = pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory):
    """everywhere(check, *arguments) runs check in all processes. 2 and 4 name the groups."""
    store = str(tmp_path_factory.mktemp("ranks") / "store")
    with processes(RANKS, MEMBERS, store) as run:
        yield run


def shard(group, tensor):
    """This rank's rows."""
    return tensor.split(SHARDS[group.size()])[group.rank()].clone()


def head_case(dtype, seed=0):
    """Inputs with labels in every shard, but not in every chunk of 3 rows."""
    case = make_case(ROWS, WIDTH, VOCABULARY, dtype, bias=True, seed=seed)
    case.labels[:8] = torch.tensor([0, 7, 14, 8, 9, 10, 22, 15])
    return case


@contextlib.contextmanager
def counted():
    """Counts the collectives in the bodies of the operators, which torch's modes do not see."""
    calls, real = dict.fromkeys(("all_reduce", "all_gather"), 0), {}

    def counting(name):
        def call(*args, **kwargs):
            calls[name] += 1
            return real[name](*args, **kwargs)

        return call

    for name in calls:
        real[name] = getattr(dist, name)
        setattr(dist, name, counting(name))
    yield calls
    for name, function in real.items():
        setattr(dist, name, function)


def agree(group, *tensors):
    """Checks that values are bitwise equal on all ranks of the group."""
    for tensor in tensors:
        others = [torch.empty_like(tensor) for _ in range(group.size())]
        dist.all_gather(others, tensor.contiguous(), group)
        assert all(torch.equal(other, tensor) for other in others)


def logprobs_equal(group, dtype, frozen):
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        return
    case = head_case(dtype)
    hidden = case.hidden.clone().requires_grad_()
    weight, bias = (shard(group, t).requires_grad_(not frozen) for t in (case.weight, case.bias))
    settings = {**SETTINGS, "chunk_rows": 3, "group": group, "bias": bias}
    with counted() as forward:
        logps = rk.linear_logprobs(hidden, weight, case.labels, **settings)
    with counted() as backward:
        (logps * case.upstream.to(logps.dtype)).sum().backward()
    agree(group, logps.detach(), hidden.grad)
    exact, plain = truth(case, **SETTINGS), eager(case, dtype, **SETTINGS)
    pieces = [
        (r.logps, r.hidden, shard(group, r.weight), shard(group, r.bias)) for r in (exact, plain)
    ]
    result = type(exact)(logps.detach(), hidden.grad, weight.grad, bias.grad)
    within_budget(result, type(exact)(*pieces[1]), type(exact)(*pieces[0]), dtype)
    assert (weight.grad is None) == frozen
    # The row plan gathers the shard sizes. A chunk reduces its maxima, its sums, and hidden's
    # gradient.
    chunks = -(-int((case.labels != -100).sum()) // 3)
    assert forward == {"all_gather": 1, "all_reduce": (3 if frozen else 2) * chunks}
    assert backward == {"all_gather": 0, "all_reduce": 0 if frozen else 3 * chunks}
    with torch.no_grad():
        again = rk.linear_logprobs(hidden, weight, case.labels, **settings)
    assert error(again, logps) <= FLOOR[torch.float32]


@FROZEN
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [2, 4])
def test_vocabulary_parallel_logprobs(everywhere, size, dtype, frozen):
    everywhere(logprobs_equal, size, dtype, frozen)


def batch(dtype, examples=2, length=3, seed=3):
    """hidden (3, B, T, H), weight, bias, labels (3, B, T), reference (3, B)."""
    case = make_case(3 * examples * length, WIDTH, VOCABULARY, dtype, bias=True, seed=seed)
    labels = case.labels.view(3, examples, length)
    labels[..., 0] = torch.arange(3 * examples).view(3, examples) * 7 % VOCABULARY
    g = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    reference = torch.randn(3, examples, generator=g, dtype=torch.float64).to(wide) - 9
    return case.hidden.view(3, examples, length, WIDTH), case.weight, case.bias, labels, reference


def by_hand(dtype, hidden, weight, bias, labels, reference):
    """rDPO with all logits in `dtype`: loss, logps, rewards, and the gradients of the head."""
    case = Case(hidden.flatten(0, 2), weight, bias, labels.flatten(), None)
    ids = torch.arange(reference.numel()).repeat_interleave(labels.shape[-1])
    loss, sums, of_hidden, *of_head = rdpo(case, dtype, ids, reference, **SETTINGS)
    return [loss, sums, 0.1 * (sums - reference), of_hidden.view(hidden.shape), *of_head]


def rdpo_equal(group, dtype, frozen, distributed):
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        return
    inputs = batch(dtype)
    hidden, weight, bias, labels, reference = inputs
    hidden = hidden.clone().requires_grad_()
    if distributed:
        mesh = init_device_mesh("cpu", (group.size(),))
        group = mesh.get_group()
        head = [distribute_tensor(t, mesh, [Shard(0)]) for t in (weight, bias)]
    else:
        head = [shard(group, t) for t in (weight, bias)]
    weight, bias = (t.requires_grad_(not frozen) for t in head)
    settings = {**SETTINGS, "bias": bias, "group": group, "chunk_rows": 9}
    out = rk.rdpo_loss(hidden, weight, labels, reference, **settings)
    out.loss.backward(retain_graph=True)
    leaves = [hidden] if frozen else [hidden, weight, bias]
    for leaf, again in zip(leaves, torch.autograd.grad(out.loss, leaves), strict=True):
        pair = [t.to_local() if isinstance(t, DTensor) else t for t in (again, leaf.grad)]
        assert error(*pair) <= 2 * FLOOR[dtype]  # with a head that trains, recomputed
    agree(group, out.loss.detach(), out.logps.detach(), hidden.grad)
    exact = by_hand(torch.float64, *inputs)
    plain = by_hand(dtype, *inputs)
    result = [out.loss, out.logps, out.rewards, hidden.grad, weight.grad, bias.grad]
    assert (weight.grad is None) == frozen
    for place, (value, near, target) in enumerate(zip(result, plain, exact, strict=True)):
        if value is None:
            continue
        if distributed and place > 3:
            assert value.placements == (Shard(0),)
            value = value.full_tensor()
        elif place > 3:
            near, target = shard(group, near), shard(group, target)
        budget = 2 * error(near, target) + FLOOR[dtype]
        assert error(value.detach(), target) <= budget, (place, error(value.detach(), target))


@FROZEN
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "distributed"), [(2, False), (4, True)])
def test_vocabulary_parallel_rdpo(everywhere, size, dtype, frozen, distributed):
    everywhere(rdpo_equal, size, dtype, frozen, distributed)


def non_finite(group, place, frozen):
    """Poisons one rank's shard at token 9, which is not a label of row 0."""
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        return
    for value in (float("nan"), float("inf")):
        hidden, weight, bias, labels, reference = batch(torch.float32)
        {"weight": weight, "bias": bias}[place][9] = value
        weight, bias = shard(group, weight), shard(group, bias)
        weight.requires_grad_(not frozen)
        owner = not weight.isfinite().all() or not bias.isfinite().all()
        source = f"{place} holds" if owner else "other shards may hold NaN"
        settings = {"bias": bias, "group": group, "chunk_rows": 3}
        with pytest.raises(rk.NonFiniteError, match=source):
            rk.rdpo_loss(hidden.requires_grad_(), weight, labels, reference, **settings)
    labels = labels.clone()
    labels[1, 0, 1] = VOCABULARY
    with pytest.raises(
        ValueError, match=r"1 label is outside \[0, 23\)\. The first is 23, .* row 7"
    ):
        rk.rdpo_loss(hidden, weight, labels, reference, **settings)
    dist.barrier(group)  # no rank waits in a collective


@FROZEN
@pytest.mark.parametrize("place", ["weight", "bias"])
def test_an_error_of_one_shard_is_raised_on_all_ranks(everywhere, place, frozen):
    everywhere(non_finite, 4, place, frozen)


def mistakes(group):
    hidden, weight, _, labels, reference = batch(torch.float32)
    inputs = (labels, reference)
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        with pytest.raises(ValueError, match="not a process group that includes this rank"):
            rk.rdpo_loss(hidden, weight, *inputs, group=group)
    else:
        rows = weight[: 0 if group.rank() else VOCABULARY]
        with pytest.raises(ValueError, match=r"weight has \[23, 0\] rows on the ranks of group"):
            rk.rdpo_loss(hidden, rows, *inputs, group=group)
    mesh = init_device_mesh("cpu", (RANKS,))
    for placement in (Replicate(), Shard(1)):
        placed = distribute_tensor(weight, mesh, [placement])
        with pytest.raises(ValueError, match=r"a head split by vocabulary must be Shard\(0\)"):
            rk.rdpo_loss(hidden, placed, *inputs, group=mesh.get_group())
    pairs = init_device_mesh("cpu", (2, 2))
    with pytest.raises(ValueError, match="weight is a DTensor on .* not on the ranks of group"):
        rk.rdpo_loss(
            hidden,
            distribute_tensor(weight, pairs, [Shard(0), Replicate()]),
            *inputs,
            group=mesh.get_group(),
        )
    with pytest.raises(ValueError, match="hidden is a DTensor"):
        rk.rdpo_loss(distribute_tensor(hidden, mesh, [Replicate()]), weight, *inputs)


def test_mistakes_are_named(everywhere):
    everywhere(mistakes, 2)


def gathered(shape, dtype, trainable):
    """A weight with the placements of FSDP2 (one axis) or HSDP (two)."""
    placements = [Shard(0)] if len(shape) == 1 else [Replicate(), Shard(0)]
    mesh = init_device_mesh("cpu", shape)
    hidden, weight, bias, labels, reference = batch(dtype, examples=RANKS)
    mine = slice(dist.get_rank(), dist.get_rank() + 1)
    head = [
        distribute_tensor(t, mesh, placements).requires_grad_(trainable) for t in (weight, bias)
    ]
    own = hidden[:, mine].clone().requires_grad_()
    with CommDebugMode() as comm:
        out = rk.rdpo_loss(
            own,
            head[0],
            labels[:, mine],
            reference[:, mine],
            bias=head[1],
            chunk_rows=9,
            **SETTINGS,
        )
    gathers = torch.ops.c10d_functional.all_gather_into_tensor
    assert comm.get_comm_counts() == {gathers: 2}  # weight and bias
    with CommDebugMode() as comm:
        out.loss.backward()
    assert gathers not in comm.get_comm_counts()
    exact = by_hand(torch.float64, hidden, weight, bias, labels, reference)
    plain = by_hand(dtype, hidden, weight, bias, labels, reference)
    values = [(own.grad / RANKS, plain[3][:, mine], exact[3][:, mine])]
    for tensor, near, target in zip(head, plain[4:], exact[4:], strict=True):
        assert (tensor.grad is None) == (not trainable)
        if trainable:
            assert isinstance(tensor.grad, DTensor) and tensor.grad.placements == tuple(placements)
            values.append((tensor.grad.full_tensor(), near, target))
    for value, near, target in values:
        assert error(value, target) <= 2 * error(near, target) + FLOOR[dtype]


@FROZEN
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4,), (2, 2)], ids=["fsdp", "hsdp"])
def test_sharded_weight_is_gathered_once(everywhere, shape, dtype, frozen):
    everywhere(gathered, shape, dtype, not frozen)


class Policy(nn.Module):
    """A model whose forward computes the loss with its head."""

    def __init__(self, lora):
        super().__init__()
        g = torch.Generator().manual_seed(7)
        self.table = nn.Embedding(VOCABULARY, WIDTH, dtype=torch.float64)
        self.layer = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, dtype=torch.float64)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=g, dtype=torch.float64) / 2
        self.lm_head.requires_grad_(not lora)

    def forward(self, tokens, labels, reference):
        hidden = torch.tanh(self.layer(self.table(tokens)))
        weight, bias = rk.head_parameters(self.lm_head)
        return rk.rdpo_loss(hidden, weight, labels, reference, bias=bias, chunk_rows=6)


def wrapped(kind, frozen_head):
    g = torch.Generator().manual_seed(11)
    examples = 2 * RANKS
    tokens, labels = torch.randint(VOCABULARY, (2, 3, examples, 4), generator=g)
    labels[..., 1:][torch.rand(3, examples, 3, generator=g) < 0.4] = -100
    reference = torch.randn(3, examples, generator=g, dtype=torch.float64) - 8
    single = Policy(frozen_head)
    expected = single(tokens, labels, reference)
    expected.loss.backward()

    model = Policy(frozen_head)
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (RANKS,))
        fully_shard(model.layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    out = model(tokens[:, mine], labels[:, mine], reference[:, mine])
    out.loss.backward()
    torch.testing.assert_close(out.logps.detach(), expected.logps.detach()[:, mine])
    loss = out.loss.detach().clone()
    dist.all_reduce(loss)
    torch.testing.assert_close(loss / RANKS, expected.loss.detach())
    named = dict(single.named_parameters())
    for name, parameter in model.named_parameters():
        target, grad = named[name.removeprefix("module.")].grad, parameter.grad
        assert (grad is None) == (target is None), name
        if grad is not None:
            grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
            torch.testing.assert_close(grad, target, msg=name)
            agree(dist.group.WORLD, grad)


@FROZEN
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_model_with_its_own_head(everywhere, kind, frozen):
    everywhere(wrapped, kind, frozen)
