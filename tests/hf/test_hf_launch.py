"""RDPOTrainer and the examples on forked ranks: two processes give the results of one."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch.distributed.run
from accelerate.commands import launch
from forked_ranks import run_ranks
from hf_runs import history, launched, launched_rank, resumed_rank, run_script
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def single(pairs_file, tmp_path_factory):
    """Curve, adapter and evaluation of one process."""
    folder = tmp_path_factory.mktemp("single")
    trainer = launched(str(folder), str(pairs_file), batch=8)
    trainer.save_model()
    adapter = load_file(folder / "out" / "adapter_model.safetensors")
    return history(trainer), adapter, trainer.evaluate()


@pytest.mark.parametrize("way", ["ddp", "ddp, evaluated before", "fsdp", "fsdp, evaluated before"])
def test_two_processes_give_the_results_of_one(way, single, pairs_file, tmp_path):
    """Two processes with the same records per step give the curve and adapter of one process."""
    folder = tmp_path / "two"
    run_ranks(launched_rank, 2, tmp_path / "log", str(folder), str(pairs_file), way)
    curve, adapter, metrics = single
    found = json.loads((folder / "found.json").read_text())
    assert found["curve"] == pytest.approx(curve, rel=2e-5)
    assert len(curve) == 3
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/visual", "eval_logps/rejected"):
        assert found["metrics"][name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-4), name
    assert found["metrics"]["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=2e-6)
    saved = load_file(folder / "out" / "adapter_model.safetensors")
    assert saved.keys() == adapter.keys()
    for name, value in adapter.items():  # Adam steps by 1e-4; a gradient near 0 may change its sign
        torch.testing.assert_close(saved[name], value, rtol=0, atol=3e-5)


def test_two_sharded_processes_resume_with_the_same_bits(pairs_file, tmp_path):
    run_ranks(resumed_rank, 2, tmp_path / "log", str(tmp_path / "two"), str(pairs_file))


def run_example(name, pairs_file, output, monkeypatch, capsys) -> str:
    """Run an example in this process, which has imported the libraries. Returns its output."""
    words = ["--steps", 3, "--batch-size", 4, "--pairs", pairs_file, "--output", output]
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("REALIGN_CACHE", str(output / "cache"))
    capsys.readouterr()
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def losses(printed: str) -> list[float]:
    """The losses that an example prints."""
    return [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)", printed, re.M)]


def test_two_accelerate_processes_give_the_curve_of_the_plain_loop(
    pairs_file, tmp_path, monkeypatch, capsys
):
    """The launch of docs/trainers.md.

    accelerate's --cpu needs MPI for more than one process, and its --multi_gpu no GPU.
    """
    plain = losses(run_example("plain_loop", pairs_file, tmp_path / "plain", monkeypatch, capsys))
    printed = []

    def run(args):  # replaces torchrun: processes that have imported the libraries
        words = [args.training_script, *args.training_script_args]
        printed.append(run_ranks(run_script, int(args.nproc_per_node), tmp_path / "log", *words))

    monkeypatch.setattr(torch.distributed.run, "run", run)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = ["--num_machines", "1", "--num_processes", "2", "--multi_gpu"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [str(EXAMPLES / "accelerate_loop.py"), "--steps", "3", "--batch-size", "4"]
    command += ["--pairs", str(pairs_file), "--output", str(tmp_path / "two")]
    launch.launch_command(launch.launch_command_parser().parse_args(command))
    assert len(plain) == 3 and losses(printed[0]) == pytest.approx(plain, rel=1e-5)
    assert plain[0] == pytest.approx(2 * 0.693147, rel=1e-5) and plain[2] < plain[0]
    for folder in ("plain", "two"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / folder / "model")


@pytest.mark.parametrize("name", ["lightning_module", "transformers_trainer", "trl_dpo"])
@pytest.mark.filterwarnings("ignore")
def test_an_example_runs_and_saves_a_model(name, pairs_file, tmp_path, monkeypatch, capsys):
    assert "loss" in run_example(name, pairs_file, tmp_path, monkeypatch, capsys)
    AutoModelForImageTextToText.from_pretrained(tmp_path / "model")


def test_every_example_is_run():
    """The tests above name all examples. `sequences` is the shared module."""
    text = Path(__file__).read_text()
    files = [path.stem for path in EXAMPLES.glob("*.py") if path.stem != "sequences"]
    assert len(files) == 5 and all(name in text for name in files)
