"""Metrics of a step and their trackers: work, FLOP, the step line, TensorBoard, W&B."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from runs import encoded
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

from realign.config import parse
from realign.data.records import read_pairs
from realign.digits import ASSETS
from realign.files import read_jsonl
from realign.modeling.forest import build_batch
from realign.modeling.loading import add_lora, load_model
from realign.modeling.model import ForestModel
from realign.train import main
from realign.training import trackers
from realign.training.metrics import evaluation_line, legend, step_line
from realign.training.throughput import TIMING, WORK, cost_of, image_flop, peak_flops, work_of


@pytest.fixture(scope="module")
def forest(pairs_file):
    """Examples, and a batch of several trees per row with padding."""
    examples, store = encoded(read_pairs(pairs_file)[:5])
    return examples, build_batch(examples, store, row_tokens=150), store


def test_work_counts_the_batch(forest):
    examples, batch, _ = forest
    real = batch.segment >= 0
    mask = batch.attention_mask()[:, 0] & real[:, :, None] & real[:, None, :]
    work = dict(zip(WORK, work_of(batch, examples).tolist(), strict=True))
    assert work == {
        "work/tokens": int(real.sum()),
        "work/separate": sum(
            len(example.roots[leaf.root].ids) + len(leaf.ids)
            for example in examples
            for leaf in example.leaves
        ),
        "work/responses": len(batch.rows),
        "work/pairs": int(mask.sum()),
        "work/images": sum(batch.images.tokens),
    }
    assert real.sum() < real.numel()


@pytest.mark.parametrize("learns", ["lora", "full", "vision"])
def test_flop_agree_with_torch(forest, learns):
    """torch also counts padding and masked pairs. With these in the work, both agree."""
    examples, batch, store = forest
    vlm = load_model(ASSETS)
    model = ForestModel(vlm, train_vision=learns == "vision")
    if learns == "lora":
        add_lora(vlm, 16, 32)
    per_image_token = image_flop(model, store.first(), torch.device("cpu"))
    # A root with its first leaf is one square, and further leaves are rectangles.
    pairs = sum(
        (root + first) ** 2 + sum(leaf * (root + leaf) for leaf in more)
        for row in batch.trees
        for root, first, *more in row
    )
    work = dict(zip(WORK, work_of(batch, examples).tolist(), strict=True))
    work |= {"work/tokens": batch.input_ids.numel(), "work/pairs": pairs}
    # torch counts only the out-of-place addmm.
    inplace = {torch.ops.aten.addmm_: lambda *shapes, **_: addmm_flop(*shapes[:3])}
    counter = FlopCounterMode(display=False, custom_mapping=inplace)
    with sdpa_kernel(SDPBackend.MATH), counter:
        vlm.get_output_embeddings()(model._hidden(batch)).sum().backward()
    # Under LoRA the first of four layers' inputs need no gradient: 2.5 % here.
    assert cost_of(model, per_image_token).of(work) == pytest.approx(
        counter.get_total_flops(), rel=0.03
    )
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        base = ForestModel(load_model(ASSETS))
        base.vlm.get_output_embeddings()(base._hidden(batch))
    assert cost_of(model, per_image_token, backward=False).of(work) == pytest.approx(
        counter.get_total_flops(), rel=0.01
    )


def test_peaks_are_known_by_the_name_of_the_device():
    bf16 = {
        "NVIDIA A100-SXM4-80GB": 312, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756,
        "NVIDIA H100 NVL": 835, "NVIDIA H200": 989, "NVIDIA L4": 121, "NVIDIA L40S": 362,
    }  # fmt: skip
    for name, peak in bf16.items():
        assert peak_flops(name, torch.bfloat16) == peak * 1e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5e12
    torch.set_float32_matmul_precision("high")
    try:
        assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float32) == 156e12
    finally:
        torch.set_float32_matmul_precision("highest")
    for unknown in ("cpu", "NVIDIA L400", "NVIDIA GeForce GTX 1080"):
        assert peak_flops(unknown, torch.bfloat16) is None


def entry(step, loss=1.25, **more):
    found = {
        "step": step, "loss": loss, "rewards/margins": 0.5, "rewards/visual_margins": -0.25,
        "rewards/accuracies": 1.0, "rewards/visual_accuracies": 0.5, "grad_norm": 12.5,
        "learning_rate": 5e-5, "tokens_per_second": 1234.5, "peak_memory_gib": 2.25,
    }  # fmt: skip
    return found | more


def test_the_legend_of_the_steps():
    assert legend(entry(1)) == (
        "margin, acc: reward margin and accuracy of the text side, then of the visual side.\n"
        "grad: gradient norm. lr: learning rate. tok/s: tokens per second. GiB: peak memory."
    )
    text = {name: v for name, v in entry(1, mfu=0.4).items() if "visual" not in name}
    first, second = legend(text).split("\n")
    assert first == "margin, acc: reward margin and accuracy."
    assert "mfu: share of the peak FLOP/s." in second and len(second) <= 130


def test_the_line_of_a_step():
    assert step_line(entry(7), 120) == (
        "step   7/120  loss  1.250  margin  +0.500  -0.250  acc 1.00 0.50  grad 1.2e+01  "
        "lr 5.0e-05    1,234 tok/s   2.2 GiB"
    )
    text = {name: v for name, v in entry(7).items() if "visual" not in name}
    assert "margin  +0.500  acc 1.00  grad" in step_line(text, 120)
    large = entry(99999, 12.5, tokens_per_second=123456.0, peak_memory_gib=75.0, mfu=0.4)
    large |= {"rewards/margins": -12.345, "rewards/visual_margins": 12.345}
    assert len(step_line(large, 99999)) <= 130 and "mfu 40%" in step_line(large, 99999)
    assert len({len(step_line(entry(step), 1000)) for step in (1, 10, 1000)}) == 1


def test_the_line_of_an_evaluation():
    """Its columns are those of a step, and its mark shows the distance from the best."""
    found = {f"eval/{n}": v for n, v in entry(7).items() if n != "step"} | {"step": 7}
    start = "eval   7/120  loss  1.250  margin  +0.500  -0.250  acc 1.00 0.50"
    assert evaluation_line(found, 120) == start
    assert evaluation_line(found | {"eval/since_best": 0}, 120) == f"{start}  best so far"
    late = evaluation_line(found | {"eval/since_best": 2}, 120)
    assert late == f"{start}  2 evaluation(s) since the best"
    text = {name: v for name, v in found.items() if "visual" not in name}
    assert evaluation_line(text, 120).endswith("margin  +0.500  acc 1.00")


def arguments(pairs, output, *more):
    given = ["--pairs", pairs, "--output", output, "--steps", 4, "--batch-size", 4]
    return [str(word) for word in [*given, "--save-every", 2, *more]]


def events(folder):
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def test_a_run_in_lines_json_and_tensorboard(pairs_file, tmp_path, capsys, monkeypatch):
    given = arguments(pairs_file, tmp_path, "--tensorboard", "--log-every", 2)

    class Killed(BaseException):
        pass

    def die(log, found, write=trackers.TensorBoardLog.write):
        write(log, found)
        if found["step"] == 3:
            raise Killed

    monkeypatch.setattr(trackers.TensorBoardLog, "write", die)
    with pytest.raises(Killed):
        main(given)
    monkeypatch.undo()
    assert main([*given, "--resume"]) == 0
    out = capsys.readouterr()
    lines = [line for line in out.out.splitlines() if "loss" in line]
    assert [line.split("/")[0] for line in lines] == ["step 2", "step 4"]
    assert "\r" not in out.out + out.err  # no terminal, no bar

    entries = read_jsonl(tmp_path / "metrics.jsonl")
    assert [e["step"] for e in entries] == [1, 2, 3, 4]
    for found in entries:
        assert found["loss"] == pytest.approx(found["loss/text"] + found["loss/visual"])
        assert found["tokens"] == round(found["tokens_per_second"] * found["seconds"])
        assert 0.1 < found["tokens_saved"] < 0.3  # (3 x 42 tokens) -> (25 + 17 + 17 + 42)
        assert found["tokens_per_second"] > found["response_tokens_per_second"] > 0
        assert 0.3 < found["peak_memory_gib"] < 20
        assert "mfu" not in found  # the peak of a CPU is unknown
        assert set(TIMING) - {"mfu", "eval/seconds"} <= set(found)
        assert not [name for name in found if name.startswith("work/")]
    board = events(tmp_path / "tensorboard")
    for name in ("loss", "rewards/visual_margins", "tokens_saved"):
        scalars = board.Scalars(name)
        assert [e.step for e in scalars] == [1, 2, 3, 4]
        truth = [e[name] for e in entries]
        assert np.allclose([e.value for e in scalars], truth, rtol=1e-6)


class FakeWandb(types.ModuleType):
    """Records the calls that the real package would get."""

    Error = type("Error", (Exception,), {})

    def __init__(self):
        super().__init__("wandb")
        self.runs = []

    def init(self, **settings):
        run = types.SimpleNamespace(id=settings["id"] or "abc123", settings=settings, logged=[])
        run.log = lambda values, step: run.logged.append((step, values))
        run.finish = lambda exit_code: run.logged.append(exit_code)
        self.runs.append(run)
        return run


def test_wandb_continues_its_run(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = parse(["--wandb", "align", "--output", str(tmp_path), "--quiet"])
    for done in (0, 2):
        with trackers.Trackers(config, "rdpo", total=4, done=done) as log:
            log.write({"step": done, "eval/loss": 0.5})  # W&B drops it for the last step
            log.write(entry(done + 1))
    first, second = wandb.runs
    assert first.settings["project"] == "align" and first.settings["id"] is None
    assert (second.settings["id"], second.settings["resume"]) == ("abc123", "allow")
    assert first.settings["config"] == json.loads(json.dumps(config.to_dict()))
    assert first.logged[0] == (0, {"eval/loss": 0.5}) and second.logged[0] == (
        3,
        {"eval/loss": 0.5},
    )
    step, values = second.logged[1]
    assert step == 3 and values["loss"] == 1.25 and "step" not in values
    assert second.logged[2:] == [0]
    with monkeypatch.context() as patch:
        patch.setattr(trackers, "rank", lambda: 1)
        trackers.Trackers(config, "rdpo", total=4, done=0).write(entry(1))
    assert len(wandb.runs) == 2  # other ranks report nothing

    def refuse(**_):
        raise wandb.Error("no API key")

    wandb.init = refuse
    with pytest.raises(ValueError, match="--wandb align: no API key. Log in with `wandb login`"):
        trackers.Trackers(config, "rdpo", total=4, done=0)


@pytest.mark.parametrize("flags", [["--tensorboard"], ["--wandb", "align"]])
def test_a_missing_package_is_named_before_any_work(flags, tmp_path, monkeypatch, capsys):
    package = flags[0].removeprefix("--")
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    assert main([*flags, "--output", str(tmp_path / "run")]) == 1
    assert f"pip install 'realign[{package}]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
