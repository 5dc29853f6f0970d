"""LoRA's layer as one function, compared with fp64 and PEFT's layer, with PEFT's switches."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Linear
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from realign.digits import ASSETS
from realign.modeling import lora
from realign.modeling.loading import adapters_off, add_lora, load_model

ROWS, WIDTH, OUT = 24, 40, 56


class Tiny(nn.Module):
    """One linear layer for PEFT to adapt."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, OUT, bias=bias)

    def forward(self, x):
        return self.proj(x)


def layers(dtype=torch.float32, bias=False, adapters=("default",), **settings):
    """PEFT's layer, our layer and the fp64 truth, with the same weights."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=20, target_modules=["proj"], **settings)
    plain = get_peft_model(Tiny(bias), config, adapters[0])
    for name in adapters[1:]:
        plain.add_adapter(name, config)
    for name, value in plain.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value, std=0.2)
    plain = plain.to(dtype)
    inplace, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    lora.use(inplace)
    assert "forward" in vars(inplace.base_model.model.proj)
    return plain, inplace, exact


def run(model, dtype, shape=(2, ROWS // 2, WIDTH)):
    """The output, and the gradients of the input, A and B."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=g).to(dtype).requires_grad_()
    upstream = torch.randn(*shape[:-1], OUT, generator=g)
    model.zero_grad()
    out = model(x)
    out.backward(upstream.to(out.dtype))
    return [out.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def errors(found, exact):
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", [(ROWS, WIDTH), (2, ROWS // 2, WIDTH)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_have_errors_like_pefts(dtype, shape, bias):
    plain, inplace, exact = layers(dtype, bias)
    wide = run(exact, torch.float64, shape)
    theirs, ours = (errors(run(model, dtype, shape), wide) for model in (plain, inplace))
    assert len(ours) == 4 and all(a <= 2 * b for a, b in zip(ours, theirs, strict=True))


def test_a_pickled_layer_is_that_of_peft():
    _, ours, _ = layers()
    loaded = pickle.loads(pickle.dumps(ours.base_model.model.proj))
    assert loaded.forward.__func__ is Linear.forward


@pytest.mark.parametrize("learns", ["weight", "bias"])
def test_a_base_that_learns_gets_its_gradient(learns):
    """As with LoraConfig(bias="lora_only"), or for a layer that the user unfreezes."""
    plain, ours, _ = layers(bias=True)
    for model in (plain, ours):
        getattr(model.base_model.model.proj.base_layer, learns).requires_grad_()
    found, theirs = (run(model, torch.float32) for model in (ours, plain))
    assert len(found) == 5
    assert all(torch.equal(a, b) for a, b in zip(found, theirs, strict=True))


def test_no_rows():
    """An expert of a mixture may receive no token."""
    _, ours, _ = layers(bias=True)
    out, *grads = run(ours, torch.float32, (2, 0, WIDTH))
    assert out.shape == (2, 0, OUT) and grads[0].shape == (2, 0, WIDTH)
    assert all((grad == 0).all() for grad in grads)


class Passes(TorchDispatchMode):
    """Counts elementwise operations and copies over whole outputs or inputs."""

    count = 0
    kinds = {getattr(torch.ops.aten, name) for name in ("add", "clone", "copy_", "mul")}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        wide = isinstance(out, torch.Tensor) and out.numel() in (ROWS * OUT, ROWS * WIDTH)
        self.count += wide and function.overloadpacket in self.kinds
        return out


def test_no_pass_over_the_outputs_is_left():
    """PEFT scales and adds the product, scales its gradient, and adds the input's gradients."""
    counts = []
    for model in layers()[:2]:
        with Passes() as passes:
            run(model, torch.float32)
        counts.append(passes.count)
    assert counts == [4, 0]


def test_adapters_in_fp32_beside_a_base_in_bf16():
    """Adapters are cast as by FSDP2, and their gradients are fp32."""
    plain, inplace, exact = layers(torch.bfloat16)
    for name, parameter in inplace.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    found, cast = run(inplace, torch.bfloat16), run(plain, torch.bfloat16)
    assert [t.dtype for t in found] == [torch.bfloat16] * 2 + [torch.float32] * 2
    wide = run(exact, torch.float64)
    assert all(a <= 2 * b for a, b in zip(errors(found, wide), errors(cast, wide), strict=True))


@pytest.mark.parametrize(
    "settings",
    [{"autocast": True}, {"use_dora": True}, {"lora_bias": True}],
    ids=str,
)
def test_autocast_and_variants_are_left_to_peft(settings):
    autocast = settings.get("autocast", False)
    plain, inplace, _ = layers(bias=True, **({} if autocast else settings))
    results = []
    for model in (plain, inplace):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(run(model, torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_dropout_drops_the_inputs_that_pefts_layer_drops():
    plain, inplace, _ = layers(bias=True, lora_dropout=0.5)
    results = []
    for model, trains in ((plain, True), (inplace, True), (inplace, False)):
        torch.manual_seed(3)
        results.append(run(model.train(trains), torch.float32))
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(results[1][0], results[2][0])
    plain.eval()
    for ours, theirs in zip(results[2], run(plain, torch.float32), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_compiled():
    _, inplace, _ = layers()
    expected = run(inplace, torch.float32)
    compiled = torch.compile(inplace.base_model.model, fullgraph=True, backend="aot_eager")
    for found, value in zip(run(compiled, torch.float32), expected, strict=True):
        torch.testing.assert_close(found, value)


def test_adapters_that_are_off_merged_or_switched():
    plain, inplace, _ = layers(adapters=("default", "other"))
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(2))
    proj = inplace.base_model.model.proj
    base = proj.base_layer(x)
    with adapters_off(inplace):
        assert torch.equal(inplace(x), base)
    with inplace.disable_adapter():
        assert torch.equal(inplace(x), base)
    for switch in (
        lambda model: model.merge_adapter(),
        lambda model: model.unmerge_adapter(),
        lambda model: model.set_adapter("other"),
        lambda model: model.base_model.set_adapter(["default", "other"]),  # PEFT adds both adapters
    ):
        switch(plain), switch(inplace)
        torch.testing.assert_close(inplace(x), plain(x))
    assert torch.equal(inplace.merge_and_unload()(x), plain.merge_and_unload()(x))


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_on_the_base_are_called(kind):
    plain, inplace, _ = layers()
    seen = []
    getattr(inplace.base_model.model.proj.base_layer, kind)(lambda *_: seen.append(1))
    for found, value in zip(run(inplace, torch.float32), run(plain, torch.float32), strict=True):
        assert torch.equal(found, value)
    assert seen == [1]


def test_every_layer_of_a_model_and_nothing_of_its_file():
    model, peft = load_model(ASSETS), load_model(ASSETS)
    adapted = add_lora(model, 4, 8.0)
    adapted_by_peft = get_peft_model(peft, adapted.peft_config["default"])
    places = [m for m in adapted.modules() if isinstance(m, Linear)]
    assert len(places) > 20 and all("forward" in vars(place) for place in places)
    names = [get_peft_model_state_dict(m).keys() for m in (adapted, adapted_by_peft)]
    assert names[0] == names[1] and list(adapted.state_dict()) == list(adapted_by_peft.state_dict())


class Scaled(nn.Linear):
    """A linear layer of another class, as some language models have."""

    def forward(self, x):
        return super().forward(x) * 0.5


class Gate(nn.Module):
    """A module that is not linear, named like a linear layer elsewhere."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).relu()


def test_linear_layers_are_found_by_their_class():
    """A subclass and a Conv1D get LoRA. Another class of the same name gets it only inside."""
    model = load_model(ASSETS)
    first, second, third = model.model.get_decoder().layers[:3]
    up, down, gate = first.mlp.up_proj, second.mlp.down_proj, third.mlp.gate_proj
    first.mlp.up_proj = Scaled(up.in_features, up.out_features, bias=False)
    second.mlp.down_proj = Conv1D(down.out_features, down.in_features)
    third.mlp.gate_proj = Gate(gate)
    adapted = add_lora(model, 4, 8.0)
    layers = adapted.get_base_model().model.get_decoder().layers
    assert type(layers[0].mlp.up_proj.base_layer) is Scaled
    assert type(layers[1].mlp.down_proj.base_layer) is Conv1D
    assert type(layers[2].mlp.gate_proj) is Gate
    assert layers[2].mlp.gate_proj.inner.base_layer is gate
    # Exactly the LoRA factors learn: 7 linear layers in each block.
    learns = [p for p in adapted.parameters() if p.requires_grad]
    assert len(learns) == 2 * 7 * len(layers)
    ids = torch.randint(1, 20, (1, 9), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learns)
