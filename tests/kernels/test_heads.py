"""Heads with PEFT give the same results and gradients as the module's forward."""

import contextlib

import peft
import pytest
import torch
import torch.nn.functional as F
from kernel_cases import error
from torch import nn

import realign_kernels as rk

ROWS, WIDTH, VOCABULARY = 9, 12, 31
LABELS = torch.arange(ROWS) * 3 % VOCABULARY


class Tiny(nn.Module):
    """The parts of a language model that PEFT needs: a trunk, and lm_head."""

    def __init__(self, bias, dtype):
        super().__init__()
        self.trunk = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype)

    def forward(self, x):
        return self.lm_head(self.trunk(x))


def make(bias=False, dtype=torch.float64, adapters=("default",), **config):
    """A Tiny with LoRA on lm_head, with A and B large enough to affect results."""
    torch.manual_seed(0)
    config = {"r": 3, "lora_alpha": 5, "target_modules": ["lm_head"], **config}
    model = peft.get_peft_model(Tiny(bias, dtype), peft.LoraConfig(**config), adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, peft.LoraConfig(**{**config, "r": 2, "lora_alpha": 3}))
    model.base_model.set_adapter(list(adapters))
    for name, tensor in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(tensor.data, std=0.5)
            tensor.data = tensor.data.to(dtype)
    return model


def hidden_states(dtype=torch.float64):
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def gradients(model, logps, hidden):
    """Gradients of a weighted sum of log-probs by hidden and each trained parameter of the head."""
    head = [p for n, p in model.named_parameters() if "lm_head" in n and p.requires_grad]
    upstream = torch.linspace(-1, 2, ROWS, dtype=logps.dtype)
    return torch.autograd.grad((logps * upstream).sum(), [hidden, *head])


def plain(head, hidden):
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return F.log_softmax(head(hidden).to(wide), -1)[torch.arange(ROWS), LABELS]


def through_inputs(head, hidden):
    hidden, weight, bias = rk.head_inputs(head, hidden)
    return rk.linear_logprobs(hidden, weight, LABELS, bias=bias)


def through_parameters(head, hidden):
    weight, bias = rk.head_parameters(head)
    return rk.linear_logprobs(hidden, weight, LABELS, bias=bias)


def same_as_forward(model, through, **tolerance):
    """Compares both ways, and returns the log-probs. The default tolerance is that of fp64."""
    head = model.base_model.lm_head
    hidden = hidden_states(head.weight.dtype).requires_grad_()
    results = []
    for function in (plain, through):
        torch.manual_seed(5)  # for dropout
        logps = function(head, hidden)
        results.append((logps, *gradients(model, logps, hidden)))
    assert len(results[0]) == 2 + sum(p.requires_grad for p in head.parameters())
    for expected, value in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, **tolerance)
    return results[1][0]


WAYS = pytest.mark.parametrize("through", [through_inputs, through_parameters])
CONFIGS = {
    "plain": {},
    "bias": {"bias": True},
    "rslora": {"use_rslora": True},
    "several": {"adapters": ("default", "second", "third")},
    "lora_bias": {"bias": True, "lora_bias": True},
    "only lora_bias": {"lora_bias": True},
    "lora_bias, several": {"bias": True, "lora_bias": True, "adapters": ("default", "second")},
}


@WAYS
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*")
def test_lora_is_what_the_layer_computes(config, through):
    model = make(**config)
    with_adapter = same_as_forward(model, through)
    with torch.no_grad(), model.disable_adapter():
        base = through(model.base_model.lm_head, hidden_states())
    assert (with_adapter - base).abs().max() > 0.1


@WAYS
def test_one_of_two_adapters(through):
    model = make(adapters=("default", "second"))
    both = same_as_forward(model, through)
    model.set_adapter("second")
    one = same_as_forward(model, through)
    assert (both - one).abs().max() > 0.1


@WAYS
@pytest.mark.parametrize("state", ["disabled", "merged", "disabled while merged"])
def test_adapters_that_are_off_or_merged(state, through):
    model = make(bias=True)
    adapted = same_as_forward(model, through).detach()
    base = model.base_model.lm_head.base_layer.weight.detach().clone()
    if "merged" in state:
        model.merge_adapter()
    hidden, head = hidden_states(), model.base_model.lm_head
    with model.disable_adapter() if "disabled" in state else contextlib.nullcontext():
        value = through(head, hidden).detach()
        torch.testing.assert_close(value, plain(head, hidden).detach())
    if state == "merged":
        torch.testing.assert_close(value, adapted)
    else:
        torch.testing.assert_close(head.base_layer.weight.detach(), base)
        assert (value - adapted).abs().max() > 0.1


def test_dropout():
    model = make(lora_dropout=0.5).train()
    dropped = same_as_forward(model, through_inputs)
    with pytest.raises(ValueError, match="'default' of lm_head has dropout 0.5.*Use head_inputs"):
        rk.head_parameters(model.base_model.lm_head)
    model.eval()
    whole = same_as_forward(model, through_inputs)
    same_as_forward(model, through_parameters)
    assert (whole - dropped).abs().max() > 0.01


@WAYS
@pytest.mark.parametrize("kind", ["dora", "mica", "ia3", "adalora", "no module"])
@pytest.mark.filterwarnings("ignore")
def test_other_kinds_are_refused(kind, through):
    target = {"target_modules": ["lm_head"]}
    if kind == "dora":
        model = make(use_dora=True)
    elif kind == "mica":
        model = make(init_lora_weights="mica", dtype=torch.float32)
    elif kind == "no module":
        model = make()
        model.base_model.model.lm_head = nn.Embedding(VOCABULARY, WIDTH)
    else:
        config = (
            peft.IA3Config(**target, feedforward_modules=[])
            if kind == "ia3"
            else peft.AdaLoraConfig(**target, total_step=10)
        )
        model = peft.get_peft_model(Tiny(False, torch.float64), config)
    with pytest.raises(ValueError, match="lm_head is|is not plain LoRA"):
        through(model.base_model.lm_head, hidden_states())


@WAYS
def test_the_quantized_are_refused(through):
    head = nn.Linear(WIDTH, VOCABULARY)
    head.weight = nn.Parameter(torch.zeros(VOCABULARY, WIDTH, dtype=torch.int8), False)
    with pytest.raises(ValueError, match="weight .* of dtype torch.int8. Exclude the head from q"):
        through(head, hidden_states())


@WAYS
def test_modules_to_save(through):
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["trunk"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(Tiny(True, torch.float64), config)
    wrapper = model.base_model.lm_head
    assert type(wrapper).__name__ == "ModulesToSaveWrapper"
    with torch.no_grad():
        wrapper.modules_to_save["default"].weight.mul_(3)
    hidden = hidden_states().requires_grad_()
    expected, value = plain(wrapper, hidden), through(wrapper, hidden)
    torch.testing.assert_close(value, expected)
    for a, b in zip(*(gradients(model, v, hidden) for v in (value, expected)), strict=True):
        torch.testing.assert_close(a, b)
    with model.disable_adapter():
        off = through(wrapper, hidden)
        torch.testing.assert_close(off, plain(wrapper, hidden))
    assert (off - value).abs().max() > 0.1


def half_base():
    """A bf16 base with fp32 adapters, as PEFT makes it from a bf16 model."""
    model = make(dtype=torch.bfloat16)
    for name, tensor in model.named_parameters():
        if "lora_" in name:
            tensor.data = tensor.data.float()
    return model


@WAYS
def test_bf16_base_with_fp32_adapters_is_as_exact_as_the_layer(through):
    model = half_base()
    head = model.base_model.lm_head
    double = make()  # the same numbers, in fp64
    for source, target in zip(model.parameters(), double.parameters(), strict=True):
        target.data = source.data.double()
    hidden = hidden_states(torch.bfloat16)
    results = []
    for function, owner, x in (
        (plain, double, hidden.double()),
        (plain, model, hidden),
        (through, model, hidden),
    ):
        x = x.requires_grad_()
        logps = function(owner.base_model.lm_head, x)
        results.append((logps.detach(), *gradients(owner, logps, x)))
    assert head.lora_A["default"].weight.dtype == results[2][2].dtype == torch.float32
    for truth, layer, ours in zip(*results, strict=True):
        assert error(ours, truth) <= 2 * error(layer, truth) + 4e-3


def test_a_small_adapter_beside_a_bf16_weight_is_not_rounded_away():
    """In bf16 an entry of W near 0.3 has steps of 2e-3. The adapter changes it by 2e-5."""
    torch.manual_seed(0)
    hidden = torch.ones(1, WIDTH, dtype=torch.bfloat16)
    model = half_base()
    head = model.base_model.lm_head
    with torch.no_grad():
        head.base_layer.weight.fill_(0.3)
        head.lora_A["default"].weight.fill_(1e-2)
        head.lora_B["default"].weight.fill_(0)
        head.lora_B["default"].weight[7].fill_(1e-3)
    label = torch.tensor([7])
    move = head.scaling["default"] * 3 * WIDTH * 1e-5
    expected = -torch.tensor((VOCABULARY - 1) * torch.tensor(-move).exp().item() + 1).log()
    inputs, weight, _ = rk.head_inputs(head, hidden)
    value = rk.linear_logprobs(inputs, weight, label)
    uniform = -torch.tensor(float(VOCABULARY)).log()
    assert expected - uniform > 5e-4
    torch.testing.assert_close(value - uniform, expected[None] - uniform, rtol=0.02, atol=0)
    merged = rk.linear_logprobs(hidden, rk.head_parameters(head)[0], label)
    torch.testing.assert_close(
        merged, uniform[None]
    )  # the loss of precision that the docstring describes


@WAYS
def test_autocast(through):
    model = make(dtype=torch.float32)
    head = model.base_model.lm_head
    hidden = hidden_states(torch.float32)
    with torch.no_grad():
        exactly = plain(head, hidden)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer, ours = plain(head, hidden), through(head, hidden)
    assert error(ours, exactly) <= 2 * error(layer, exactly) + 4e-3


def test_the_fused_loss_trains_the_adapter():
    model = make(bias=True)
    head = model.base_model.lm_head
    hidden = hidden_states().view(3, 1, 3, WIDTH).requires_grad_()
    labels, reference = LABELS.view(3, 1, 3), -10 * torch.ones(3, 1, dtype=torch.float64)
    trained = [head.lora_A["default"].weight, head.lora_B["default"].weight]
    inputs, weight, bias = rk.head_inputs(head, hidden)
    loss = rk.rdpo_loss(inputs, weight, labels, reference, bias=bias).loss
    value = torch.autograd.grad(loss, [hidden, *trained])
    sums = plain(head, hidden.view(ROWS, WIDTH)).view(3, 1, 3).sum(-1)
    loss = rk.preference_loss(sums, reference, rk.objectives.rdpo()).loss
    for a, b in zip(value, torch.autograd.grad(loss, [hidden, *trained]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_tied_embeddings_sum_both_uses(backend):
    if backend == "cpp":
        pytest.importorskip("realign_kernels._C")
    torch.manual_seed(0)
    dtype = torch.float64 if backend == "torch" else torch.float32
    table = nn.Parameter(torch.randn(VOCABULARY, WIDTH, dtype=dtype))
    head = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=dtype)
    head.weight = table
    tokens = torch.arange(ROWS) * 5 % VOCABULARY
    grads = []
    for function in (plain, through_parameters, through_inputs):
        hidden = torch.tanh(F.embedding(tokens, table))
        logps = function(head, hidden)
        grads.append(torch.autograd.grad(logps.sum(), table)[0])
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0])
    # The fused loss passes its gradients on without a copy. Accumulation must not change them.
    hidden = torch.tanh(F.embedding(tokens, table)).view(3, 1, 3, WIDTH)
    reference = torch.full((3, 1), -10, dtype=dtype)
    rk.rdpo_loss(hidden, table, LABELS.view(3, 1, 3), reference).loss.backward()
    sums = plain(head, torch.tanh(F.embedding(tokens, table))).view(3, 1, 3).sum(-1)
    expected = rk.preference_loss(sums, reference, rk.objectives.rdpo()).loss
    torch.testing.assert_close(table.grad, torch.autograd.grad(expected, table)[0])
