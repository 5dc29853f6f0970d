"""RDPOTrainer and the examples as they are launched: two processes compute what one computes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_runs import history, launched
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

# Its last line is what docs/trainers.md advises.
LAUNCHED = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from hf_runs import launched
trainer = launched(*sys.argv[3:], batch=4, fsdp=sys.argv[2] == "fsdp")
trainer.save_model()
found = trainer.evaluate()
if trainer.is_world_process_zero():
    print("CURVE", json.dumps([e["loss"] for e in trainer.state.log_history if "loss" in e]))
    print("FOUND", json.dumps(found))
trainer.accelerator.end_training()
sys.stdout.flush()
os._exit(0)
"""


def launch(script, *words) -> subprocess.CompletedProcess:
    """Two processes of a script, as docs/trainers.md says.

    accelerate's --cpu needs MPI for more than one process, and its --multi_gpu no GPU. Port 0 takes
    a free one: launches that begin together would both find the default port free.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
    command += ["--num_processes", "2", "--multi_gpu", "--mixed_precision", "no"]
    command += ["--main_process_port", "0", "--dynamo_backend", "no", script, *words]
    return run(command)


def run(command) -> subprocess.CompletedProcess:
    """A command to its end, within five minutes: ranks may hang."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [str(word) for word in command]
    options = {"capture_output": True, "text": True, "env": environment, "timeout": 300}
    return subprocess.run(words, check=False, **options)


@pytest.fixture(scope="module")
def alone(pairs_file, tmp_path_factory):
    """Curve, adapter and evaluation of one process."""
    folder = tmp_path_factory.mktemp("alone")
    trainer = launched(str(folder), str(pairs_file), batch=8)
    trainer.save_model()
    adapter = load_file(folder / "out" / "adapter_model.safetensors")
    return history(trainer), adapter, trainer.evaluate()


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_accelerate_launches_it_on_two_processes(way, alone, pairs_file, tmp_path):
    """As many records in a step, dealt to two processes, give curve and adapter of one process."""
    script = tmp_path / "script.py"
    script.write_text(LAUNCHED)
    done = launch(script, Path(__file__).parent, way, tmp_path / "two", pairs_file)
    assert done.returncode == 0, done.stderr
    printed = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line[:5].isupper())
    curve, adapter, found = alone
    assert json.loads(printed["CURVE"]) == pytest.approx(curve, rel=2e-5)
    assert len(curve) == 3
    evaluated = json.loads(printed["FOUND"])
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/visual", "eval_logps/rejected"):
        assert evaluated[name] == pytest.approx(found[name], rel=1e-4, abs=1e-4), name
    saved = load_file(tmp_path / "two" / "out" / "adapter_model.safetensors")
    assert saved.keys() == adapter.keys()
    for name, value in adapter.items():  # Adam's steps are of 1e-4; a gradient near 0 may turn
        torch.testing.assert_close(saved[name], value, rtol=0, atol=3e-5)


def losses(done) -> list[float]:
    """What an example prints of its steps."""
    assert done.returncode == 0, done.stderr
    return [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)", done.stdout, re.M)]


def options(pairs_file, output):
    return ["--steps", 3, "--batch-size", 4, "--pairs", pairs_file, "--output", output]


def test_two_processes_of_accelerate_take_the_steps_of_the_plain_loop(pairs_file, tmp_path):
    outputs = tmp_path / "plain", tmp_path / "two"
    command = [sys.executable, EXAMPLES / "plain_loop.py", *options(pairs_file, outputs[0])]
    plain = losses(run(command))
    two = losses(launch(EXAMPLES / "accelerate_loop.py", *options(pairs_file, outputs[1])))
    assert len(plain) == 3 and two == pytest.approx(plain, rel=1e-5)
    assert plain[0] == pytest.approx(2 * 0.693147, rel=1e-5) and plain[2] < plain[0]
    for output in outputs:
        AutoModelForImageTextToText.from_pretrained(output / "model")


@pytest.mark.parametrize("name", ["lightning_module", "transformers_trainer", "trl_dpo"])
def test_an_example_runs_and_saves_a_model(name, pairs_file, tmp_path, monkeypatch):
    monkeypatch.setenv("REALIGN_CACHE", str(tmp_path / "cache"))
    done = run([sys.executable, EXAMPLES / f"{name}.py", *options(pairs_file, tmp_path)])
    assert done.returncode == 0, done.stderr
    assert "loss" in done.stdout
    AutoModelForImageTextToText.from_pretrained(tmp_path / "model")


def test_every_example_is_run():
    """By the tests above; what they share is no example."""
    text = Path(__file__).read_text()
    files = [path.stem for path in EXAMPLES.glob("*.py") if path.stem != "sequences"]
    assert len(files) == 5 and all(name in text for name in files)
