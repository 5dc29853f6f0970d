"""Ranks, nodes, replicas, checkpointed and compiled layers, attention: the same curve each time."""

import json
import socket
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch._inductor.config
from runs import CURVE_TOLERANCE, arguments, assert_same_curves, curve, run
from safetensors.torch import load_file
from torch import nn
from torch.nn.attention import flex_attention as torch_flex
from transformers.integrations import flex_attention as hf_flex
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from realign import attention, liger, parallel, sharding
from realign.config import LossConfig, ScaleConfig, parse
from realign.digits import ASSETS
from realign.encode import encode_records, make_objective
from realign.forest import build_batch
from realign.layouts import Layout
from realign.loading import add_lora, load_model, load_processor
from realign.metrics import read_jsonl
from realign.model import ForestModel
from realign.pairs.pipeline import PairsConfig, build_pairs
from realign.records import read_pairs
from realign.train import main

WORKER = Path(__file__).with_name("scale_worker.py")
FULL = ("--tune", "full", "--learning-rate", "1e-4")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    build_pairs(PairsConfig(output=str(path), scenes=40, quiet=True))
    return path


@pytest.fixture(scope="module")
def alone(pairs, tmp_path_factory):
    """Plain runs in this process, eight examples in one forward: their folders."""
    root = tmp_path_factory.mktemp("alone")
    run(pairs, root / "lora", steps=4)
    run(pairs, root / "full", *FULL, steps=4)
    return root


def start_ranks(command, runs, pairs, root):
    """A launcher over `scale_worker.py` with `runs`, {name: flags}, a folder each under `root`."""
    root.mkdir(exist_ok=True)
    listed = [
        {"output": str(root / name), "arguments": arguments(pairs, root / name, *flags, steps=4)}
        for name, flags in runs.items()
    ]
    file = root / "runs.json"
    file.write_text(json.dumps(listed))
    command = [sys.executable, "-m", "torch.distributed.run", *command, str(WORKER), str(file)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def two_nodes(pairs, alone, tmp_path_factory):
    """Runs on two nodes of one rank each, which meet over TCP."""
    root = tmp_path_factory.mktemp("nodes")
    runs = {
        "lora": ("--fsdp", "--micro-batch-size", 2),
        "once": ("--fsdp", "--micro-batch-size", 4),
        "full": ("--fsdp", "--micro-batch-size", 4, *FULL),
        "bf16": ("--fsdp", "--dtype", "bf16"),
    }
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "scale"]
    nodes = [start_ranks(command, runs, pairs, root) for _ in range(2)]
    shown = [node.communicate(timeout=300)[0] for node in nodes]
    assert all(node.returncode == 0 for node in nodes), "\n".join(shown)
    return root


@pytest.fixture(scope="module")
def four_ranks(pairs, alone, tmp_path_factory):
    """Runs on four ranks of one node; one of them as two replicas of two shards."""
    root = tmp_path_factory.mktemp("four")
    checkpointed = ("--replicas", 2, "--activation-checkpointing", "--micro-batch-size", 1)
    runs = {
        "lora": ("--fsdp", "--micro-batch-size", 2),
        "full": ("--fsdp", *checkpointed, *FULL),
    }
    node = start_ranks(["--standalone", "--nproc-per-node", "4"], runs, pairs, root)
    shown = node.communicate(timeout=300)[0]
    assert node.returncode == 0, shown
    return root


# --- ranks, accumulation, nodes, replicas ---


def same_run(folder, truth, weights):
    """Same curve and, up to Adam's amplification, same final weights."""
    assert_same_curves(read_jsonl(folder / "metrics.jsonl"), read_jsonl(truth / "metrics.jsonl"))
    ours, theirs = load_file(folder / "model" / weights), load_file(truth / "model" / weights)
    assert ours.keys() == theirs.keys()
    # Adam divides by the gradient's size, so a rounding error in a gradient of nearly 0 moves a
    # weight by up to the learning rate (1e-4 or less) per step.
    assert max(float((ours[k] - theirs[k]).abs().max()) for k in ours) < 4e-4


def test_one_rank_with_four_forwards_a_step(pairs, alone, tmp_path):
    entries = run(pairs, tmp_path, "--fsdp", "--micro-batch-size", 2, steps=4)
    assert_same_curves(entries, read_jsonl(alone / "lora" / "metrics.jsonl"))


def test_two_ranks_with_two_forwards_a_step_on_two_nodes(two_nodes, alone):
    same_run(two_nodes / "lora", alone / "lora", "adapter_model.safetensors")
    same_run(two_nodes / "full", alone / "full", "model.safetensors")


def test_four_ranks_with_one_forward_a_step(four_ranks, alone):
    same_run(four_ranks / "lora", alone / "lora", "adapter_model.safetensors")


def test_two_replicas_of_two_shards_with_checkpointed_layers(four_ranks, alone):
    same_run(four_ranks / "full", alone / "full", "model.safetensors")


def test_bf16_on_two_ranks_follows_fp32(two_nodes, alone):
    # bf16 has 8 bits: log-probs near -30 are off by up to 0.2, times beta 0.1.
    found, truth = (
        curve(read_jsonl(f / "metrics.jsonl")) for f in (two_nodes / "bf16", alone / "lora")
    )
    assert np.abs(found - truth).max() < 0.03


def test_accumulation_reduces_gradients_once_a_step(two_nodes, four_ranks):
    def calls(folder, name):
        return json.loads((folder / "collectives.json").read_text()).get(name, 0)

    # Four layers learn; in full fine-tuning the embeddings, the projector and the head, too.
    steps, groups = 4, {"lora": 4, "once": 4, "full": 5}
    for name, number in groups.items():
        assert calls(two_nodes / name, "reduce_scatter_single") == steps * number
    assert calls(four_ranks / "full", "reduce_scatter_single") == steps * groups["full"]
    # Replicas add theirs up once for each; other sums are those of metrics and the pass.
    others = calls(two_nodes / "full", "all_reduce")
    assert calls(four_ranks / "full", "all_reduce") == steps * groups["full"] + others
    # Four more forwards and backwards gather eight units and, again, the four that learn.
    once, twice = (calls(two_nodes / name, "all_gather_single") for name in ("once", "lora"))
    assert twice - once >= 4 * (8 + 4)


def test_ranks_without_weights_get_those_of_rank_0(two_nodes):
    """Parameters, and buffers that no state dict has, bit for bit; LoRA alike on all ranks."""
    for dtype, same in json.loads((two_nodes / "weights.json").read_text()).items():
        assert any("inv_freq" in name for name in same), dtype
        assert [
            name for name, value in same.items() if not value and "lora_A.def" not in name
        ] == []


def test_ranks_without_fsdp_are_refused(pairs, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "realign.train", *arguments(pairs, tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "error: this is one of 2 ranks, but without --fsdp nothing is shared" in done.stderr


def test_the_error_of_a_rank_is_one_line(pairs, tmp_path):
    more = ["--fsdp", "--nproc-per-node", 2, "--batch-size", 7]
    command = [sys.executable, "-m", "realign.train", *arguments(pairs, tmp_path, *more)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert lines[0].startswith("error: batch_size 7 does not divide among 2 ranks"), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fsdp", "--replicas", "2"], "replicas is 2, which does not divide 1 ranks"),
        (["--cpu-offload"], "cpu_offload would have no effect: there is no GPU"),
        (["--liger"], "liger needs CUDA, and there is no GPU"),
        (["--attention", "flex"], "attention is 'flex', whose kernels have a backward on CUDA"),
    ],
)
def test_what_these_ranks_cannot_do_is_refused_in_a_line(flags, message, pairs, tmp_path, capsys):
    assert not torch.cuda.is_available()
    monkey = pytest.MonkeyPatch()
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}.items():
        monkey.setenv(name, str(value))  # as a launcher of one rank would
    monkey.setattr(parallel.dist, "init_process_group", lambda *_, **__: None)
    with monkey.context():
        assert main(arguments(pairs, tmp_path, *flags)) == 1
    monkey.undo()
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {message}") and shown.count("\n") == 1


# --- layers ---


@pytest.fixture(scope="module")
def digits(pairs):
    """(examples, store, objective) of the digit pairs."""
    records = read_pairs(pairs)
    objective = make_objective(LossConfig(), records)
    examples, store = encode_records(
        records, load_processor(ASSETS), objective,
        layout=Layout(4), max_response_tokens=99, max_tokens=512, progress=False,
    )  # fmt: skip
    return examples, store, objective


def forest_model(tune="full", attention="tree", layers=4):
    vlm = load_model(ASSETS, attention=attention)
    vlm.model.language_model.layers = vlm.model.language_model.layers[:layers]
    model = ForestModel(vlm)
    if tune == "lora":
        torch.manual_seed(0)
        add_lora(vlm, 8, 16.0)
    return model.train()


def gradients(model, batch):
    """Log-probs, and the gradient of their sum, by parameter."""
    model.zero_grad()
    logps = model(batch)
    logps.sum().backward()
    return logps.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def saved_bytes(model, batch):
    """Bytes that autograd keeps between forward and backward, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logps = model(batch)
    logps.sum().backward()
    return sum(kept.values())


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_checkpointed_layers_give_the_same_bits_and_keep_less(digits, tune):
    examples, store, _ = digits
    batch = build_batch(examples[:6], store, row_tokens=60)
    plain, wrapped = forest_model(tune), forest_model(tune)
    names = list(wrapped.state_dict())
    layers = sharding.trained_layers(wrapped)
    assert len(layers) == 4  # of the language model; the tower is frozen
    sharding.wrap_layers(layers, compiled=False, checkpointed=True)
    (logps, grads), (truth, expected) = gradients(wrapped, batch), gradients(plain, batch)
    assert torch.equal(logps, truth) and grads.keys() == expected.keys()
    assert all(torch.equal(grads[name], expected[name]) for name in expected)
    assert list(wrapped.state_dict()) == names
    # A layer keeps its input alone, a tenth of what it held; the rest is the head's.
    assert saved_bytes(wrapped, batch) < 0.15 * saved_bytes(plain, batch)


def test_checkpointing_gives_the_plain_curve_bit_for_bit(pairs, alone, tmp_path):
    entries = run(pairs, tmp_path, "--activation-checkpointing", steps=4)
    truth = read_jsonl(alone / "lora" / "metrics.jsonl")
    for name in ("loss", "grad_norm", "logps/visual"):
        assert curve(entries, name).tolist() == curve(truth, name).tolist()


@torch._inductor.config.patch(compile_threads=1)  # no worker processes, which import torch
def test_compiled_layers_change_nothing_beyond_rounding(digits):
    examples, store, _ = digits
    plain, compiled = (forest_model(attention="sdpa", layers=1) for _ in range(2))
    layers = sharding.trained_layers(compiled)
    sharding.wrap_layers(layers, compiled=True, checkpointed=True)
    for part in (examples[:6], examples[6:9]):
        batch = build_batch(part, store, row_tokens=60)
        (logps, grads), (truth, expected) = gradients(compiled, batch), gradients(plain, batch)
        assert (logps - truth).abs().max() < 1e-5
        for name in expected:
            bound = CURVE_TOLERANCE * expected[name].abs().max()
            assert (grads[name] - expected[name]).abs().max() <= bound, name


def test_batches_of_other_shapes_compile_nothing_again(digits, monkeypatch):
    """Two graphs: the first layer's input has no gradient under LoRA, the others' have one."""
    examples, store, _ = digits
    counter = torch._dynamo.testing.CompileCounter()
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiler(f, backend=counter, **how))
    model = forest_model("lora", "sdpa")
    sharding.wrap_layers(sharding.trained_layers(model), compiled=True, checkpointed=True)
    shapes = set()
    for size in range(2, 12):
        batch = build_batch(examples[:size], store, row_tokens=50 + 7 * size)
        shapes.add(tuple(batch.input_ids.shape))
        model(batch).sum().backward()
    assert len(shapes) == 10
    assert counter.frame_count == 2


def test_a_compiled_run_gives_the_plain_curve(pairs, alone, tmp_path, monkeypatch):
    compiler = torch.compile  # with the graphs run as they are: the next test compiles them
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiler(f, backend="eager", **how))
    more = ("--compile", "--activation-checkpointing", "--fsdp", "--micro-batch-size", 4)
    entries = run(pairs, tmp_path, *more, steps=4)
    assert_same_curves(entries, read_jsonl(alone / "lora" / "metrics.jsonl"))


def test_offloaded_parameters_train_alike(digits):
    """On a mesh of one CPU, where offload moves nothing; a GPU was not at hand."""
    examples, store, _ = digits
    batch = build_batch(examples[:4], store, row_tokens=60)
    weights = []
    try:
        device = parallel.start(alone=True)
        for offload in (False, True):
            model = forest_model("lora")
            sharding.shard(model, device, torch.float32, cpu_offload=offload)
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-3)
            for _ in range(2):
                model(batch).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            weights.append([p.full_tensor() for p in trained])
    finally:
        parallel.stop()
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


# --- attention ---


@pytest.mark.parametrize("kind", ["sdpa", "eager", "flex"])
def test_every_attention_gives_what_that_by_tree_gives(digits, kind, monkeypatch):
    if kind == "flex":  # unfused, and with the backward that torch refuses on a CPU
        monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
        monkeypatch.setattr(
            hf_flex,
            "compile_friendly_flex_attention",
            lambda *args, training, **options: torch_flex.flex_attention(*args, **options),
        )
    examples, store, _ = digits
    batch = build_batch(examples[:6], store, row_tokens=200)  # several trees in a row
    logps, grads = gradients(forest_model(attention=kind), batch)
    truth, expected = gradients(forest_model(), batch)
    assert (logps - truth).abs().max() < 1e-5  # sums of up to 30 nats
    for name in expected:
        bound = CURVE_TOLERANCE * expected[name].abs().max()
        assert (grads[name] - expected[name]).abs().max() <= bound, name


def test_the_block_mask_is_the_forests(digits):
    examples, store, _ = digits
    budget = attention.row_budget("flex_attention", examples[:12])
    batch = build_batch(examples[:12], store, row_tokens=budget)
    mask = attention.forest_mask(batch, "flex_attention", torch.float32)
    rows, _, tokens, _ = mask.shape
    assert rows == 1 and tokens > 512  # all trees in one row
    places = torch.arange(tokens)
    found = mask.mask_mod(0, 0, places[:, None], places[None])
    assert torch.equal(found, batch.attention_mask()[0, 0])
    assert mask.sparsity() > 50  # percent of blocks that are skipped


def test_what_is_seen_decides_how_long_a_row_is(digits):
    examples, _, _ = digits
    longest = max(example.longest_tree for example in examples)
    assert attention.row_budget("sdpa", examples) == longest < 100
    assert attention.row_budget("flex_attention", examples) == 8192
    batch = build_batch(examples, digits[1], row_tokens=attention.row_budget("tree", examples))
    assert batch.segment.shape[0] == 1 and (batch.segment >= 0).float().mean() > 0.95


# --- liger, by its definition: the kernels need CUDA ---


@pytest.fixture
def ops(monkeypatch):
    """A `liger_kernel.ops` of plain torch, with the signatures of liger-kernel 0.8.5."""

    def norm(x, weight, epsilon, offset, casting, in_place, row_mode):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * (offset + weight)

    def gate(a, b, gate_multiplier, down_multiplier):
        return nn.functional.silu(a) * b

    module = types.ModuleType("liger_kernel.ops")
    module.LigerRMSNormFunction = types.SimpleNamespace(apply=norm)
    module.LigerSiLUMulFunction = types.SimpleNamespace(apply=gate)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", module)
    return module


def test_liger_takes_the_place_of_what_it_computes_alike(digits, ops):
    examples, store, _ = digits
    batch = build_batch(examples[:4], store, row_tokens=60)
    plain, model = forest_model("lora"), forest_model("lora")
    said = liger.use(sharding.trained_layers(model), CPU)
    assert said == "liger: 4 LlamaMLP, 8 LlamaRMSNorm"
    assert not any("forward" in vars(module) for module in plain.modules())
    (logps, grads), (truth, expected) = gradients(model, batch), gradients(plain, batch)
    assert (logps - truth).abs().max() < 1e-5
    for name in expected:
        bound = CURVE_TOLERANCE * expected[name].abs().max()
        assert (grads[name] - expected[name]).abs().max() <= bound, name


def test_liger_leaves_what_it_computes_otherwise(ops):
    gemma = GemmaRMSNorm(16)
    assert liger.use([gemma], CPU) == "liger: 1 GemmaRMSNorm"  # weight + 1
    mlp = forest_model(layers=1).vlm.model.language_model.layers[0].mlp
    mlp.act_fn = nn.GELU()
    with pytest.raises(ValueError, match="liger would have no effect"):
        liger.use([mlp, nn.LayerNorm(4)], CPU)
    assert "forward" not in vars(mlp)


def test_scale_settings_name_who_computes_a_layer():
    kernels = [ScaleConfig().kernels, ScaleConfig(compile=True).kernels]
    assert [*kernels, parse(["--liger"]).scale.kernels] == ["eager", "compiled", "liger"]
