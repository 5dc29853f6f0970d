"""Backend choice, and its explanation."""

import threading

import kernel_cases as kc
import pytest
import torch

import realign_kernels as rk
from realign_kernels import objectives
from realign_kernels.backends import dispatch
from realign_kernels.backends.reference import ReferenceBackend


def test_default_and_its_reason():
    line = rk.explain(dtype=torch.bfloat16)
    begin = "realign_kernels: backend cpp for bfloat16 on cpu (the fastest on this CPU: "
    assert line.startswith(begin)
    assert "rows, GEMM" in line and "\n" not in line


@pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])
def test_without_a_fused_loss_the_line_names_torch_operations(backend):
    with rk.use_backend(backend):
        line = rk.explain(objective=objectives.simpo())
    assert f"backend {backend} " in line and "\n" not in line
    assert line.endswith("; loss simpo: torch operations (this backend has no fused kernel)")


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


def test_a_backend_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(dispatch, "missing_reason", lambda: "No module named _C")
    message = (
        r"backend 'cpp' is not available \(No module named _C\). Choose one of reference, torch"
    )
    with pytest.raises(ValueError, match=f"use_backend: {message}"), rk.use_backend("cpp"):
        pass
    monkeypatch.setenv("REALIGN_BACKEND", "cpp")
    dispatch._decided.cache_clear()
    with pytest.raises(ValueError, match=f"REALIGN_BACKEND: {message}"):
        rk.explain()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_a_dtype_that_a_backend_does_not_take(dtype):
    assert "backend torch" in rk.explain(dtype=dtype)
    args = (torch.randn(2, 3, dtype=dtype), torch.randn(4, 3, dtype=dtype), torch.tensor([0, 1]))
    with (
        rk.use_backend("cpp"),
        pytest.raises(ValueError, match=f"'cpp' does not support {str(dtype)[6:]} on cpu"),
    ):
        rk.linear_logprobs(*args)


def test_an_unknown_backend(monkeypatch):
    message = "unknown backend 'cuda'. Choose one of reference, torch, cpp, triton"
    with pytest.raises(ValueError, match=message), rk.use_backend("cuda"):
        pass
    monkeypatch.setenv("REALIGN_BACKEND", "cuda")
    with pytest.raises(ValueError, match=message):
        rk.linear_logprobs(torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1]))


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_reference_computes_forward_and_backward(frozen, monkeypatch):
    calls = []
    for name in ("forward", "backward"):
        original = getattr(ReferenceBackend, name)

        def record(*args, _name=name, _original=original, **kwargs):
            calls.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(ReferenceBackend, name, record)
    case = kc.make_case(7, 5, 11, torch.float32)
    hidden = case.hidden.clone().requires_grad_()
    weight = case.weight.clone().requires_grad_(not frozen)
    with rk.use_backend("reference"):
        loss = rk.linear_logprobs(hidden, weight, case.labels).sum()
    loss.backward()
    assert calls == (["forward"] if frozen else ["forward", "backward"])
    calls.clear()
    inputs = case.labels[:6].clamp(min=0).view(3, 2, 1), torch.zeros(3, 2)
    with rk.use_backend("reference"):
        loss = rk.rdpo_loss(hidden[:6].view(3, 2, 1, 5), weight, *inputs).loss
    loss.backward(retain_graph=True)  # with gradients made in the forward
    assert calls == (["forward"] if frozen else ["forward", "backward"])
    loss.backward()
    assert calls == (["forward"] if frozen else ["forward", "backward", "backward"])
