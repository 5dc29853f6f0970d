"""Ranks, nodes, replicas, checkpointed and compiled layers give the same curve."""

import json

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch._inductor.config
from forked_ranks import Forked, run_ranks
from runs import arguments, assert_same_curves, curve, run
from safetensors.torch import load_file
from scale_worker import run_all

from realign import distributed
from realign.files import read_jsonl
from realign.train import main
from realign.training import fsdp

FULL = ("--tune", "full", "--learning-rate", "1e-4")


@pytest.fixture(scope="module")
def single(pairs_file, tmp_path_factory):
    """Folders of plain runs in this process, with eight examples in one forward."""
    root = tmp_path_factory.mktemp("single")
    run(pairs_file, root / "lora", steps=2)
    run(pairs_file, root / "full", *FULL, steps=2)
    return root


@pytest.fixture(scope="module")
def runs_on(pairs_file, made_once):
    """`runs_on(name, ranks, runs)`: a folder with a run for each of `runs`, {name: flags}."""

    def runs_on(name, ranks, runs, **options):
        def make(root):
            root.mkdir()
            listed = []
            for each, flags in runs.items():
                words = arguments(pairs_file, root / each, *flags, steps=2)
                listed.append({"output": str(root / each), "arguments": words})
            (root / "runs.json").write_text(json.dumps(listed))
            run_ranks(run_all, ranks, str(root / "log"), str(root / "runs.json"), **options)

        return made_once(name, make)

    return runs_on


@pytest.fixture(scope="module")
def two_nodes(runs_on):
    """Runs on two nodes of one rank each."""
    runs = {
        "lora": ("--fsdp", "--micro-batch-size", 2),
        "once": ("--fsdp", "--micro-batch-size", 4),
        "full": ("--fsdp", "--micro-batch-size", 4, *FULL),
        "bf16": ("--fsdp", "--dtype", "bf16"),
    }
    return runs_on("nodes", 2, runs, nodes=2)


@pytest.fixture(scope="module")
def four_ranks(runs_on):
    """Runs on four ranks of one node, one of them as two replicas of two shards."""
    checkpointed = ("--replicas", 2, "--activation-checkpointing", "--micro-batch-size", 1)
    runs = {
        "lora": ("--fsdp", "--micro-batch-size", 2),
        "full": ("--fsdp", *checkpointed, *FULL),
    }
    return runs_on("four", 4, runs)


# --- ranks, accumulation, nodes, replicas ---


def same_run(folder, truth, weights):
    """The same curve and the same final weights, up to Adam's amplification of rounding."""
    assert_same_curves(read_jsonl(folder / "metrics.jsonl"), read_jsonl(truth / "metrics.jsonl"))
    ours, theirs = load_file(folder / "model" / weights), load_file(truth / "model" / weights)
    assert ours.keys() == theirs.keys()
    # Adam divides by the gradient's size. A rounding error in a gradient of nearly 0 can therefore
    # move a weight by the learning rate (1e-4 or less) per step.
    assert max(float((ours[k] - theirs[k]).abs().max()) for k in ours) < 4e-4


def test_one_rank_with_four_forwards_a_step(pairs_file, single, tmp_path):
    entries = run(pairs_file, tmp_path, "--fsdp", "--micro-batch-size", 2, steps=2)
    assert_same_curves(entries, read_jsonl(single / "lora" / "metrics.jsonl"))


def test_two_ranks_with_two_forwards_a_step_on_two_nodes(two_nodes, single):
    same_run(two_nodes / "lora", single / "lora", "adapter_model.safetensors")
    same_run(two_nodes / "full", single / "full", "model.safetensors")


def test_four_ranks_with_one_forward_a_step(four_ranks, single):
    same_run(four_ranks / "lora", single / "lora", "adapter_model.safetensors")


def test_two_replicas_of_two_shards_with_checkpointed_layers(four_ranks, single):
    same_run(four_ranks / "full", single / "full", "model.safetensors")


def test_bf16_on_two_ranks_follows_fp32(two_nodes, single):
    # bf16 has 8 bits: log-probs near -30 are off by up to 0.2, times beta 0.1.
    found, truth = (
        curve(read_jsonl(f / "metrics.jsonl")) for f in (two_nodes / "bf16", single / "lora")
    )
    assert np.abs(found - truth).max() < 0.03


def test_accumulation_reduces_gradients_once_a_step(two_nodes, four_ranks):
    def calls(folder, name):
        return json.loads((folder / "collectives.json").read_text()).get(name, 0)

    # Four layers are trained. Full fine-tuning adds the embeddings, the projector and the head.
    steps, groups = 2, {"lora": 4, "once": 4, "full": 5}
    for name, number in groups.items():
        assert calls(two_nodes / name, "reduce_scatter_single") == steps * number
    assert calls(four_ranks / "full", "reduce_scatter_single") == steps * groups["full"]
    # Replicas sum their gradients once each. Other sums are of metrics and of the reference pass.
    others = calls(two_nodes / "full", "all_reduce")
    assert calls(four_ranks / "full", "all_reduce") == steps * groups["full"] + others
    # Two more forwards and backwards gather eight units, and again the four trained ones.
    once, twice = (calls(two_nodes / name, "all_gather_single") for name in ("once", "lora"))
    assert twice - once >= 2 * (8 + 4)


def test_ranks_without_weights_get_those_of_rank_0(two_nodes):
    """Parameters and buffers outside the state dict are bitwise equal, and LoRA on all ranks."""
    for dtype, same in json.loads((two_nodes / "weights.json").read_text()).items():
        assert any("inv_freq" in name for name in same), dtype
        assert [
            name for name, value in same.items() if not value and "lora_A.def" not in name
        ] == []


def test_ranks_without_fsdp_are_refused(pairs_file, tmp_path, monkeypatch, capsys):
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))  # as a launcher of two ranks would
    assert main(arguments(pairs_file, tmp_path)) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: this is one of 2 ranks, but without --fsdp nothing is shared")


def test_the_error_of_a_rank_is_one_line(pairs_file, tmp_path):
    more = ["--fsdp", "--nproc-per-node", 2, "--batch-size", 7]
    process = Forked(*arguments(pairs_file, tmp_path, *more))
    shown = process.communicate(timeout=60)[1]
    lines = [line for line in shown.splitlines() if line.strip()]
    assert lines[0].startswith("error: --batch-size 7 does not divide among 2 ranks"), shown
    assert process.returncode == 1 and "Traceback" not in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fsdp", "--replicas", "2"], "--replicas is 2, which does not divide 1 ranks"),
        (["--liger"], "liger needs CUDA, and there is no GPU"),
    ],
)
def test_settings_that_these_ranks_cannot_run(flags, message, pairs_file, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}.items():
            patch.setenv(name, str(value))  # as a launcher of one rank would
        patch.setattr(distributed.dist, "init_process_group", lambda *_, **__: None)
        assert main(arguments(pairs_file, tmp_path, *flags)) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {message}") and shown.count("\n") == 1


def test_checkpointing_gives_the_bits_of_the_plain_curve(pairs_file, single, tmp_path):
    entries = run(pairs_file, tmp_path, "--activation-checkpointing", steps=2)
    truth = read_jsonl(single / "lora" / "metrics.jsonl")
    for name in ("loss", "grad_norm", "logps/visual"):
        assert curve(entries, name).tolist() == curve(truth, name).tolist()


def test_a_compiled_run_gives_the_plain_curve(pairs_file, single, tmp_path, monkeypatch, capsys):
    compiler = torch.compile  # graphs run uncompiled; another test compiles them
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiler(f, backend="eager", **how))
    layers = fsdp.trained_layers
    monkeypatch.setattr(fsdp, "trained_layers", lambda model: layers(model)[:1])
    more = ("--compile", "--activation-checkpointing", "--fsdp", "--micro-batch-size", 4)
    entries = run(pairs_file, tmp_path, *more, steps=2)
    assert_same_curves(entries, read_jsonl(single / "lora" / "metrics.jsonl"))
    assert "attention by tree is sdpa under --compile: there is no GPU" in capsys.readouterr().out
