"""FSDP2 on a mesh of one rank: frozen weights stay unsharded, and results do not change."""

import gc
import os

import pytest
import torch
from runs import assert_same_run, loaded, run
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel

from realign import distributed
from realign.digits import ASSETS
from realign.modeling.forest import build_batch
from realign.modeling.loading import add_lora, load_model
from realign.modeling.model import ForestModel
from realign.pairs.engines.transformers_engine import TransformersEngine
from realign.training import fsdp
from realign.training.step import heap_frozen
from realign.training.throughput import image_flop

CPU, BF16 = torch.device("cpu"), torch.bfloat16
BITS = ("--dtype", "bf16", "--micro-batch-size", 4)


@pytest.mark.parametrize("way", [("--fsdp",), ("--tune", "full")], ids=["lora", "full"])
def test_fsdp2_on_one_rank_changes_no_bit(way, pairs_file, tmp_path, monkeypatch):
    """Neither unsharded weights nor LoRA layers that cast fp32 adapters change a bit."""
    run(pairs_file, tmp_path / "whole", *BITS, *way, steps=2)
    if way == ("--fsdp",):
        run(pairs_file, tmp_path / "plain", *BITS, steps=2)
        assert_same_run(tmp_path / "plain", tmp_path / "whole", steps=2)
    monkeypatch.setattr(fsdp, "unsharded_parameters", lambda *_: set())
    run(pairs_file, tmp_path / "sharded", *BITS, *way, steps=2)
    assert_same_run(tmp_path / "sharded", tmp_path / "whole", steps=2)


def sharded(dtype, tune):
    """The digits model on a mesh of one rank, and the addresses of its frozen weights before."""
    distributed.start(single=True)
    vlm = load_model(ASSETS, dtype if tune == "lora" else torch.float32)
    model = ForestModel(vlm, dtype=dtype)
    if tune == "lora":
        add_lora(vlm, 4, 8.0)
    places = {n: p.data_ptr() for n, p in model.named_parameters() if not p.requires_grad}
    fsdp.shard(model, CPU, dtype)
    return model, places


def test_frozen_weights_are_not_copied(pairs_file):
    """Frozen weights keep their addresses in forward and backward. FSDP2 manages the trained."""
    model, places = sharded(BF16, "lora")
    inputs = loaded(pairs_file, BF16, BF16)
    seen: dict[str, set[int]] = {}

    def note(name, *_):
        for own, parameter in model.get_submodule(name).named_parameters(recurse=False):
            seen.setdefault(f"{name}.{own}", set()).add(parameter.data_ptr())

    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: note(name))
        module.register_full_backward_pre_hook(lambda *_, name=name: note(name))
    batch = build_batch(inputs.examples[:2], inputs.store, row_tokens=400)
    model.logps(batch).sum().backward()
    frozen = {name: found for name, found in seen.items() if name in places}
    assert len(frozen) > 60 and all(found == {places[n]} for n, found in frozen.items())
    managed = {n for n, p in model.named_parameters() if isinstance(p, DTensor)}
    assert managed == {n for n, p in model.named_parameters() if p.requires_grad}
    units = [name for name, m in model.named_modules() if isinstance(m, FSDPModule)]
    assert len(units) == 5 and units[0] == ""  # the root and four layers of the language model


@pytest.mark.parametrize(
    ("ranks", "offload", "dtype"), [(2, False, BF16), (1, True, BF16), (1, False, torch.float32)]
)
def test_fsdp2_manages_parameters_to_cast_gather_or_offload(ranks, offload, dtype):
    model = ForestModel(load_model(ASSETS, BF16, meta=True), dtype=dtype)
    assert fsdp.unsharded_parameters(model, dtype, ranks, offload) == set()
    whole = fsdp.unsharded_parameters(model, BF16, 1, False)
    assert whole == {p for p in model.parameters() if not p.requires_grad}  # the tower


def _load_text_model(folder):
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16)
    GPT2LMHeadModel(config).save_pretrained(folder)
    with pytest.raises(ValueError, match="tokenizer"):  # after the kind of model is known
        TransformersEngine(folder).open()


USES = {
    "ranks": lambda folder: distributed.start(single=True),
    "refilling, margins, evaluation": lambda folder: load_model(ASSETS),
    "a text model for pairs": _load_text_model,
}


@pytest.mark.parametrize("use", USES)
def test_attention_is_kept_off_cudnn(use, tmp_path):
    """Each prompt has another length, and a plan for a length took 0.7 s on a GPU."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    USES[use](tmp_path)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("given", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_ranks_extend_the_allocators_segments_unless_it_is_configured(given, monkeypatch):
    names = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
    for name in names:
        monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv(given, "roundup_power2_divisions:4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    distributed.start()
    found = {name: os.environ[name] for name in names if name in os.environ}
    default = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert found == ({given: "roundup_power2_divisions:4"} if given else default)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)


def test_the_collector_skips_objects_from_before_the_steps():
    older = [0]

    def visited():
        return any(
            one is older for one in gc.get_objects()
        )  # objects that a full collection visits

    gc.unfreeze()  # undoes the freeze of tests/conftest.py
    assert visited()
    with heap_frozen():
        assert not visited()
    assert visited()
    gc.collect()
    gc.freeze()
    with heap_frozen():
        assert not visited()
    assert not visited()  # a caller's own freeze stays


def test_the_towers_flop_are_counted_on_a_sharded_model(pairs_file):
    inputs = loaded(pairs_file, BF16)
    truth = image_flop(ForestModel(load_model(ASSETS)), inputs.store.first(), CPU)
    model, _ = sharded(BF16, "full")  # the whole tower is cast as it is gathered
    assert image_flop(model, inputs.store.first(), CPU) == truth > 1000
