"""RDPOTrainer and the examples as they are launched: two processes compute what one computes."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked_ranks import run_ranks
from hf_runs import history, launched, launched_rank
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def alone(pairs_file, tmp_path_factory):
    """Curve, adapter and evaluation of one process."""
    folder = tmp_path_factory.mktemp("alone")
    trainer = launched(str(folder), str(pairs_file), batch=8)
    trainer.save_model()
    adapter = load_file(folder / "out" / "adapter_model.safetensors")
    return history(trainer), adapter, trainer.evaluate()


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_train_what_one_trains(way, alone, pairs_file, tmp_path):
    """As many records in a step, dealt to two processes, give curve and adapter of one process."""
    folder = tmp_path / "two"
    run_ranks(launched_rank, 2, tmp_path / "log", str(folder), str(pairs_file), way == "fsdp")
    curve, adapter, metrics = alone
    found = json.loads((folder / "found.json").read_text())
    assert found["curve"] == pytest.approx(curve, rel=2e-5)
    assert len(curve) == 3
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/visual", "eval_logps/rejected"):
        assert found["metrics"][name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-4), name
    saved = load_file(folder / "out" / "adapter_model.safetensors")
    assert saved.keys() == adapter.keys()
    for name, value in adapter.items():  # Adam's steps are of 1e-4; a gradient near 0 may turn
        torch.testing.assert_close(saved[name], value, rtol=0, atol=3e-5)


def run_example(name, pairs_file, output, monkeypatch, capsys) -> str:
    """An example in this process, which has the libraries; returns its output."""
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


def test_two_processes_of_accelerate_take_the_steps_of_the_plain_loop(
    pairs_file, tmp_path, monkeypatch, capsys
):
    """The launch of docs/trainers.md.

    accelerate's --cpu needs MPI for more than one process, and its --multi_gpu no GPU. Port 0 takes
    a free one: launches that begin together would both find the default port free.
    """
    plain = losses(run_example("plain_loop", pairs_file, tmp_path / "plain", monkeypatch, capsys))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
    command += ["--num_processes", "2", "--multi_gpu", "--mixed_precision", "no"]
    command += ["--main_process_port", "0", "--dynamo_backend", "no"]
    command += [str(EXAMPLES / "accelerate_loop.py"), "--steps", "3", "--batch-size", "4"]
    command += ["--pairs", str(pairs_file), "--output", str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert len(plain) == 3 and losses(done.stdout) == pytest.approx(plain, rel=1e-5)
    assert plain[0] == pytest.approx(2 * 0.693147, rel=1e-5) and plain[2] < plain[0]
    for folder in ("plain", "two"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / folder / "model")


@pytest.mark.parametrize("name", ["lightning_module", "transformers_trainer", "trl_dpo"])
@pytest.mark.filterwarnings("ignore")
def test_an_example_runs_and_saves_a_model(name, pairs_file, tmp_path, monkeypatch, capsys):
    assert "loss" in run_example(name, pairs_file, tmp_path, monkeypatch, capsys)
    AutoModelForImageTextToText.from_pretrained(tmp_path / "model")


def test_every_example_is_run():
    """By the tests above; `sequences` is what they share."""
    text = Path(__file__).read_text()
    files = [path.stem for path in EXAMPLES.glob("*.py") if path.stem != "sequences"]
    assert len(files) == 5 and all(name in text for name in files)
