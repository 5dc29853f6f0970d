"""The plan of a run: its counts, and its memory against real training processes."""

import json

import numpy as np
import pytest
import tiny_vlms
import torch
from forked_ranks import CONTEXT
from runs import arguments, encoded
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from realign.config import parse
from realign.data.records import read_pairs, write_pairs
from realign.digits import ASSETS
from realign.digits.processor import build_processor
from realign.modeling.forest import build_batch
from realign.modeling.images import ImageStore
from realign.modeling.loading import add_lora, load_model
from realign.modeling.model import ForestModel
from realign.train import main
from realign.training import dry_run, fsdp, memory, throughput
from realign.training.dry_run import Plan


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A LLaVA of 32M parameters with 576 image tokens and V = 32000, and its processor."""
    folder = tmp_path_factory.mktemp("llava")
    processor = build_processor()
    images = processor.image_processor
    images.size, images.crop_size = {"shortest_edge": 336}, {"height": 336, "width": 336}
    processor.patch_size = 14
    processor.save_pretrained(folder)
    vision = CLIPVisionConfig(
        hidden_size=192, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        image_size=336, patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=32000, hidden_size=256, intermediate_size=704, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=token, vision_feature_layer=-1,
        vision_feature_select_strategy="default", tie_word_embeddings=False,
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


def measure(words, file):
    """Run a command in a forked process, and write its peak memory in bytes to `file`."""
    import transformers.models.llava.modeling_llava  # noqa: F401 - counts as imports

    before = throughput.process_memory("VmRSS")
    assert main(words) == 0
    file.write_text(str(throughput.process_memory("VmHWM") - before))


@pytest.mark.parametrize(
    "settings",
    [
        ["--batch-size", 2, "--lora-rank", 64, "--dtype", "bf16"],
        ["--batch-size", 4, "--micro-batch-size", 2, "--tune", "full"],
    ],
    ids=["LLaVA LoRA bf16", "LLaVA full, accumulated"],
)
def test_memory_is_within_a_quarter_of_a_training_process(settings, pairs_file, llava, tmp_path):
    pairs = tmp_path / "few.parquet"  # the reference pass covers all records
    write_pairs(pairs, read_pairs(pairs_file)[:4])
    given = ["--pairs", pairs, "--output", tmp_path, "--steps", 2, *settings, "--model", llava]
    given = [str(word) for word in given]
    process = CONTEXT.Process(target=measure, args=([*given, "--quiet"], tmp_path / "measured"))
    process.start()
    process.join()
    assert process.exitcode == 0
    measured = int((tmp_path / "measured").read_text())
    given[3] = str(tmp_path / "planned")
    parts = Plan(parse(given), pairs).memory_parts()
    assert sum(parts.values()) == pytest.approx(measured, rel=0.25)


@pytest.fixture(scope="module")
def examples(pairs_file):
    """The first four records' forests, and their images."""
    return encoded(read_pairs(pairs_file)[:4])


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_fake_tensors_take_the_memory_of_real_ones(examples, tune):
    batch = build_batch(*examples, row_tokens=99)
    cpu, found = torch.device("cpu"), {}
    for kind in ("real", "fake"):
        vlm = load_model(ASSETS) if kind == "real" else load_model(ASSETS, meta=True)
        model = ForestModel(vlm)
        if tune == "lora":
            add_lora(vlm, 8, 16)
        how = {"forwards": 2, "ranks": 1, "sharded": False}
        if kind == "real":
            found[kind] = memory.measure(model, batch, cpu, **how)
        else:
            with memory.fake_tensors(cpu):
                memory.give_fake_storage(model, cpu, torch.float32)
                found[kind] = memory.measure(model, batch, cpu, **how)
    real, fake = found["real"], found["fake"]
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert real.gradients == fake.gradients == 4 * learning
    assert fake.training == pytest.approx(real.training, rel=0.02)
    assert fake.reference == pytest.approx(real.reference, rel=0.02)
    assert fake.reference < fake.training / 2  # nothing is saved for a backward


def test_gradients_of_a_sharded_model_are_shards(examples):
    batch = build_batch(*examples, row_tokens=99)
    cpu, sizes = torch.device("cpu"), []
    for ranks in (1, 4):
        model = ForestModel(load_model(ASSETS, torch.bfloat16, meta=True), dtype=torch.bfloat16)
        with memory.fake_tensors(cpu):
            memory.give_fake_storage(model, cpu, torch.bfloat16)
            step = memory.measure(model, batch, cpu, forwards=1, ranks=ranks, sharded=True)
        sizes.append(step.gradients)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sizes[0] == 4 * learning  # fp32, though the model is in bf16
    assert sizes[1] == pytest.approx(learning, rel=1e-3)


def shown(capsys, *given):
    assert main([str(word) for word in given]) == 0
    rows = capsys.readouterr().out.splitlines()
    return {row.split("  ")[0]: " ".join(row.split()) for row in rows if not row.startswith(" ")}


def test_the_plan_has_the_counts_of_training(pairs_file, tmp_path, capsys, vlm):
    output, cache = tmp_path / "run", tmp_path / "cache"
    count = len(read_pairs(pairs_file))
    given = ["--pairs", pairs_file, "--output", output, "--reference-cache", cache]
    given += ["--epochs", 2, "--batch-size", 8, "--micro-batch-size", 4, "--lora-rank", 4]
    plan = shown(capsys, *given, "--dry-run")
    assert list(tmp_path.iterdir()) == []  # nothing is written
    whole = sum(p.numel() for p in vlm.parameters())
    # Rank 4 on q, k, v, o (128 -> 128) and gate, up, down (128 <-> 256) of four layers.
    learning = 4 * 4 * (4 * (128 + 128) + 3 * (128 + 256))
    assert f"llava, {whole:,} parameters, fp32, tree" in plan["model"]
    assert f": {learning:,} parameters, {learning / (whole + learning):.1%}" in plan["trains"]
    assert plan["records"].startswith(f"records {count}, ")
    steps = round(2 * count / 8)
    assert plan["steps"].startswith(f"steps {steps:,} of 8 examples, {steps * 8 / count:.2f} ep")
    assert plan["steps"].endswith("1 rank(s), 2 forward(s) of each in a step")
    assert " 0 of them known" in plan["references"]
    assert plan["memory, cpu"].endswith("GiB for a rank, estimated")
    assert main([str(word) for word in [*given, "--steps", 1, "--quiet"]]) == 0
    capsys.readouterr()
    distinct = int(plan["references"].split()[1])
    assert shown(capsys, *given, "--dry-run", "--resume", "--steps", 1)["references"].startswith(
        f"references {distinct} distinct leaves, {distinct} of them known in {cache}"
    )
    # Two ranks would start, and each takes one forward of four examples.
    more = ["--fsdp", "--nproc-per-node", 2, "--dry-run", "--output", tmp_path / "other"]
    assert "2 rank(s), 1 forward(s)" in shown(capsys, *given, *more)["steps"]


def test_a_plan_of_more_images_than_are_kept(pairs_file, tmp_path, capsys, monkeypatch):
    """Each image is then made again, which failed under fake tensors."""
    given = ["--pairs", str(pairs_file), "--output", str(tmp_path / "out"), "--dry-run"]
    given += ["--workers", "0"]  # fake tensors are those of a thread
    assert main(given) == 0
    whole = capsys.readouterr().out.splitlines()
    monkeypatch.setattr(ImageStore, "CACHE_BYTES", 0)
    assert main(given) == 0
    kept = [line for line in whole if not line.lstrip().startswith(("images", "memory", "time"))]
    assert set(kept) - {*capsys.readouterr().out.splitlines()} <= {
        line for line in kept if "imported libraries" in line or "free" in line
    }


@pytest.mark.parametrize(("room", "on"), [(1 << 20, True), (1 << 40, False)])
def test_checkpointing_is_on_if_the_run_does_not_fit_without(
    room, on, pairs_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(dry_run, "gpu_memory", lambda: room)
    kept, wrap = [], fsdp.wrap_layers
    monkeypatch.setattr(
        fsdp, "wrap_layers", lambda *a, **how: (kept.append(how["checkpointed"]), wrap(*a, **how))
    )
    given = arguments(pairs_file, tmp_path / "run", steps=1)
    plan = shown(capsys, *given, "--dry-run")
    state = "on" if on else "off"
    assert f"checkpointing {state}: without it 0." in plan["checkpointing"]
    assert "as estimated" in plan["checkpointing"]
    assert ("will NOT fit" in plan["memory, cpu"]) == on
    assert kept == [False, on]  # the estimate, then the plan
    assert main(given) == 0
    assert f"activation checkpointing is {state}: without it " in capsys.readouterr().out
    identity = json.loads((tmp_path / "run" / "run.json").read_text())
    assert identity["config"]["scale"]["activation_checkpointing"] is on
    assert kept == [False, on, False, on]
    # A flag is obeyed without an estimate.
    config = parse(
        [*given, "--no-activation-checkpointing" if on else "--activation-checkpointing"]
    )
    found, reason = dry_run.with_checkpointing(config, pairs_file)
    assert found.scale.activation_checkpointing is not on and reason == ""


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])
def test_models_that_read_values_have_a_plan(family, tmp_path, capsys):
    """Qwen3-VL finds the places of images in its layers. Qwen3.5 cannot be estimated."""
    vlm, processor = tiny_vlms.make(family)
    for part in (vlm, processor):
        part.save_pretrained(tmp_path / "model")
    rng, pairs = np.random.default_rng(0), tmp_path / "pairs.parquet"
    write_pairs(pairs, [tiny_vlms.random_record(family, processor, rng) for _ in range(2)])
    given = arguments(pairs, tmp_path / "run", "--model", tmp_path / "model", "--batch-size", 2)
    plan = shown(capsys, *given, "--dry-run")
    if family == "qwen3_vl":
        assert plan["memory, cpu"].endswith("GiB for a rank, estimated")
    else:
        assert plan["memory"].endswith("not estimated: qwen3_5 reads values that fake tensors lack")


def test_a_failed_estimate_leaves_checkpointing_off(pairs_file, tmp_path, monkeypatch):
    def fails(plan):
        raise NotImplementedError("no fake kernel")

    monkeypatch.setattr(dry_run, "gpu_memory", lambda: 1)
    monkeypatch.setattr(Plan, "memory_parts", fails)
    config = parse(arguments(pairs_file, tmp_path))
    found, reason = dry_run.with_checkpointing(config, pairs_file)
    assert found.scale.activation_checkpointing is False
    assert reason.startswith("off: the memory cannot be estimated (") and "no fake kernel" in reason


def test_no_gpu_needs_no_estimate(pairs_file, tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run, "Plan", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = parse(arguments(pairs_file, tmp_path))
    found, reason = dry_run.with_checkpointing(config, pairs_file)
    assert found.scale.activation_checkpointing is False and reason == ""


def test_a_merged_model_takes_the_disk_space_of_its_base(pairs_file, llava, tmp_path, capsys):
    """Computed in bf16, stored in fp32."""
    given = ["--pairs", pairs_file, "--output", tmp_path / "run", "--model", llava, "--merge"]
    disk = shown(capsys, *given, "--dtype", "bf16", "--dry-run")["disk"]
    size = (llava / "model.safetensors").stat().st_size
    assert f"final model {size / 2**30:.2f} GiB" in disk


def test_peak_memory_is_that_of_this_process():
    block = torch.ones(200 * 2**20, dtype=torch.uint8)
    held = throughput.process_memory("VmRSS")
    del block
    assert held >= 200 * 2**20
    # Linux counts pages per thread, so two readings differ slightly.
    assert throughput.peak_memory(torch.device("cpu")) >= held - 2**22


def test_a_plan_of_a_tower_that_never_learns_whole(pairs_file, tmp_path, capsys):
    words = ["--pairs", pairs_file, "--output", tmp_path / "run", "--tune", "full"]
    assert main([str(word) for word in [*words, "--train-vision", "--dry-run"]]) == 0
    assert "all weights: 1,1" in capsys.readouterr().out
