"""Which backend computes, and how it says so."""

import threading

import kernel_cases as kc
import pytest
import torch

import realign_kernels as rk
from realign_kernels import dispatch, reference


def test_default_and_its_reason():
    line = rk.explain(dtype=torch.bfloat16)
    assert line.startswith("realign_kernels: backend torch for bfloat16 on cpu (")
    assert "\n" not in line


def test_use_backend_holds_inside_the_block_and_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("REALIGN_BACKEND", "torch")
    assert "backend torch" in rk.explain() and "REALIGN_BACKEND" in rk.explain()
    with rk.use_backend("reference"):
        assert "backend reference" in rk.explain() and "use_backend" in rk.explain()
        with rk.use_backend("torch"):
            assert "backend torch" in rk.explain()
        assert "backend reference" in rk.explain()
    assert "backend torch" in rk.explain()
    monkeypatch.setenv("REALIGN_BACKEND", "reference")
    assert "backend reference" in rk.explain()


def test_use_backend_ends_with_an_exception_and_does_not_leak_into_other_threads():
    with pytest.raises(KeyError), rk.use_backend("reference"):
        raise KeyError
    assert dispatch.current_override() == ""
    seen = []
    with rk.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.current_override()))
        thread.start()
        thread.join()
    assert seen == [""]


@pytest.mark.parametrize("name", [n for n in dispatch.KNOWN if n not in dispatch.MODULES])
def test_a_backend_of_another_build(name, monkeypatch):
    message = f"backend '{name}' is not in this build, available: reference, torch"
    with pytest.raises(ValueError, match=message), rk.use_backend(name):
        pass
    monkeypatch.setenv("REALIGN_BACKEND", name)
    with pytest.raises(ValueError, match=f"REALIGN_BACKEND: {message}"):
        rk.explain()


def test_an_unknown_backend(monkeypatch):
    message = "unknown backend 'cuda', choose one of reference, torch"
    with pytest.raises(ValueError, match=message), rk.use_backend("cuda"):
        pass
    monkeypatch.setenv("REALIGN_BACKEND", "cuda")
    with pytest.raises(ValueError, match=message):
        rk.linear_logprobs(torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1]))


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_reference_computes_forward_and_backward(frozen, monkeypatch):
    calls = []
    for name in ("forward", "backward"):
        original = getattr(reference, name)

        def record(*args, _name=name, _original=original, **kwargs):
            calls.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(reference, name, record)
    case = kc.make_case(7, 5, 11, torch.float32)
    hidden = case.hidden.clone().requires_grad_()
    weight = case.weight.clone().requires_grad_(not frozen)
    with rk.use_backend("reference"):
        loss = rk.linear_logprobs(hidden, weight, case.labels).sum()
    loss.backward()
    assert calls == (["forward"] if frozen else ["forward", "backward"])
