"""Resuming after any end: curve and weights equal those of an uninterrupted run."""

import json
import pickle
import random
import shutil
import signal

import pytest
from forked_ranks import Forked, run_command, run_ranks
from runs import arguments, assert_same_curves, assert_same_run, curve, run, wait_for_step, weights

from realign.data.records import read_pairs, write_pairs
from realign.digits import ASSETS
from realign.files import JsonlLog, read_jsonl
from realign.train import main

EVERY_2 = ("--save-every", 2)


@pytest.fixture(scope="module")
def dropout(tmp_path_factory):
    """The digits model with dropout, so that a step draws random numbers."""
    folder = tmp_path_factory.mktemp("dropout") / "model"
    shutil.copytree(ASSETS, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["text_config"]["attention_dropout"] = 0.1
    (folder / "config.json").write_text(json.dumps(settings))
    return ("--model", folder, *EVERY_2, "--micro-batch-size", 3)


@pytest.fixture(scope="module")
def plain(pairs_file, dropout, tmp_path_factory):
    """The folder of an uninterrupted run in one process, with dropout."""
    output = tmp_path_factory.mktemp("plain")
    run(pairs_file, output, *dropout)
    return output


class Signalled:
    """Sends a signal to this process when the log gets the entry of a step."""

    def __init__(self, monkeypatch, step, number):
        write = JsonlLog.write

        def write_and_signal(log, entry):
            write(log, entry)
            if entry["step"] == step:
                signal.raise_signal(number)

        monkeypatch.setattr(JsonlLog, "write", write_and_signal)


def steps_kept(output):
    return sorted(path.name for path in (output / "checkpoints").iterdir())


def test_a_killed_run_resumes_with_the_same_bits(pairs_file, dropout, plain, tmp_path):
    process = Forked(*arguments(pairs_file, tmp_path, *dropout))
    wait_for_step(process, tmp_path, random.randrange(2, 6))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    for folder in (tmp_path / "checkpoints").glob("step-*"):
        (folder / ".metadata").write_bytes(pickle.dumps(Planted()))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a truncated line
    run(pairs_file, tmp_path, *dropout, "--resume")
    assert_same_run(tmp_path, plain)
    assert steps_kept(tmp_path) == ["step-000004", "step-000006"]
    assert not Planted.loaded


class Planted:
    """A malicious object beside a checkpoint, which must never be unpickled."""

    loaded = []

    def __reduce__(self):
        return self.loaded.append, (1,)


def test_dropout_shows_in_the_curve(pairs_file, plain, tmp_path):
    """So the test above does compare random numbers."""
    without = curve(run(pairs_file, tmp_path, steps=1), "logps/chosen")
    assert abs(curve(read_jsonl(plain / "metrics.jsonl"), "logps/chosen")[0] - without[0]) > 1e-3


def test_sigterm_saves_and_exits_with_0(pairs_file, dropout, plain, tmp_path, monkeypatch, capsys):
    Signalled(monkeypatch, 3, signal.SIGTERM)
    before = signal.getsignal(signal.SIGTERM)
    assert main(arguments(pairs_file, tmp_path, *dropout)) == 0
    out = capsys.readouterr().out
    assert "stopped after step 4 of 6; add --resume to continue" in out
    assert "tok/s" not in out  # --quiet
    assert signal.getsignal(signal.SIGTERM) == before
    assert steps_kept(tmp_path) == ["step-000002", "step-000004"]
    assert not (tmp_path / "model").exists()
    Signalled(monkeypatch, 5, signal.SIGTERM)  # too late: this is the last step
    assert main(arguments(pairs_file, tmp_path, *dropout, "--resume")) == 0
    assert_same_run(tmp_path, plain)


def test_a_second_interrupt_acts_at_once(pairs_file, tmp_path, monkeypatch):
    Signalled(monkeypatch, 2, signal.SIGINT)
    Signalled(monkeypatch, 2, signal.SIGINT)
    # A background job of a shell, as these tests may be, starts with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(arguments(pairs_file, tmp_path, *EVERY_2)) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert curve(read_jsonl(tmp_path / "metrics.jsonl"), "step").tolist() == [1, 2]


def test_a_lost_export_is_made_again(pairs_file, dropout, plain, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(plain, output)
    shutil.rmtree(output / "model")
    run(pairs_file, output, *dropout, "--resume")
    assert_same_run(output, plain)


def stopped_rank(step, words):
    """One rank of a run, with SIGTERM on rank 0 after a step."""
    with pytest.MonkeyPatch.context() as patch:
        Signalled(patch, step, signal.SIGTERM)
        run_command("realign.train", words)


def test_one_rank_then_two_then_one(pairs_file, tmp_path, monkeypatch):
    truth, output = tmp_path / "truth", tmp_path / "run"
    expected = run(pairs_file, truth, *EVERY_2)
    with monkeypatch.context() as patch:
        Signalled(patch, 1, signal.SIGTERM)
        run(pairs_file, output, *EVERY_2)
    words = arguments(pairs_file, output, "--fsdp", *EVERY_2, "--resume")
    shown = run_ranks(stopped_rank, 2, str(tmp_path / "log"), 3, words)
    assert "resumed from step 2 of 6" in shown and "stopped after step 4 of 6; add" in shown
    assert steps_kept(output)[-1] == "step-000004"
    found = run(pairs_file, output, *EVERY_2, "--resume")
    assert curve(found, "step").tolist() == list(range(1, 7))
    assert_same_curves(found, expected)
    ours, theirs = weights(output), weights(truth)
    # In each step Adam may move a weight with a gradient of nearly 0 by the learning rate, 5e-5.
    assert max(float((ours[k] - theirs[k]).abs().max()) for k in theirs) < 3e-4


def test_a_folder_model_of_the_user_is_never_replaced(pairs_file, tmp_path):
    """The run writes OUTPUT/model. A link there may lead to a model of the user."""
    base = shutil.copytree(ASSETS, tmp_path / "base")
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    for name, link in (("copied", False), ("linked", True)):
        output = tmp_path / name
        output.mkdir()
        if link:
            (output / "model").symlink_to(base)
        else:
            shutil.copytree(base, output / "model")
        for more in ((), ("--resume",)):
            with pytest.raises(ValueError, match=r"run replaces the folder .*model, and .* is in"):
                run(pairs_file, output, "--model", output / "model", *more)
        for more in ((), ("--resume",)):  # --resume without a run starts one
            with pytest.raises(ValueError, match="model holds files, and the run would replace"):
                run(pairs_file, output, *more)
        found = {file.name: file.read_bytes() for file in (output / "model").iterdir()}
        assert found == before


def test_an_earlier_run_is_never_overwritten(pairs_file, dropout, plain, tmp_path):
    before = (plain / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"holds a run with a checkpoint at step 6\. Add --r"):
        run(pairs_file, plain, *dropout)
    changed = r"dtype \('fp32' -> 'bf16'\), beta \(0\.1 -> 0\.2\), seed \(0 -> 7\), the base\."
    with pytest.raises(ValueError, match=rf"Changed: {changed}"):
        more = ("--dtype", "bf16", "--beta", 0.2, "--seed", 7)
        run(pairs_file, plain, *dropout, "--resume", *more)
    fewer = tmp_path / "fewer.parquet"
    write_pairs(fewer, read_pairs(pairs_file)[:-1])
    with pytest.raises(ValueError, match=r"Changed: micro_batch_size \(3 -> 2\)"):
        words = ("--lora-dropout", 0.1, *EVERY_2)
        run(pairs_file, tmp_path / "d", *words, "--micro-batch-size", 3)
        run(pairs_file, tmp_path / "d", *words, "--micro-batch-size", 2, "--resume")
    with pytest.raises(ValueError, match=r"Changed: save_every \(2 -> 3\)"):
        words = ("--eval-share", 0.2)  # evaluated at each checkpoint
        run(pairs_file, tmp_path / "e", *words, *EVERY_2)
        run(pairs_file, tmp_path / "e", *words, "--save-every", 3, "--resume")
    with pytest.raises(ValueError, match=r"Changed: the pairs\."):
        run(fewer, plain, *dropout, "--resume")
    assert (plain / "metrics.jsonl").read_bytes() == before
    early = tmp_path / "early"  # stopped before its first checkpoint
    early.mkdir()
    (early / "metrics.jsonl").write_bytes(before)
    with pytest.raises(ValueError, match=r"at step 0\. Add --resume"):
        run(pairs_file, early, *dropout)


def test_parameters_without_gradients_have_no_state(pairs_file, tmp_path):
    """The digits model uses features from before the tower's last norm, which gets no gradient."""
    vision = ("--tune", "full", "--train-vision", "--dtype", "bf16", *EVERY_2)
    run(pairs_file, tmp_path / "whole", *vision, steps=4)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for later in ("checkpoints/step-000004", "model"):
        shutil.rmtree(tmp_path / "cut" / later)
    run(pairs_file, tmp_path / "cut", *vision, "--resume", steps=4)
    assert_same_run(tmp_path / "cut", tmp_path / "whole", steps=4)


def test_a_run_of_an_earlier_version_resumes(pairs_file, tmp_path):
    """Settings that it did not have count as their defaults."""
    given = ("--objective", "cdpo", "--save-every", 1)
    run(pairs_file, tmp_path, *given, steps=1)
    identity = json.loads((tmp_path / "run.json").read_text())
    newer = (("model", "lora_targets"), ("optim", "schedule"), ("loss", "label_smoothing"))
    for section, name in newer:
        del identity["config"][section][name]
    del identity["reference"]
    (tmp_path / "run.json").write_text(json.dumps(identity))
    assert len(run(pairs_file, tmp_path, *given, "--resume", steps=1)) == 1
    with pytest.raises(ValueError, match=r"Changed: schedule \('cosine' -> 'linear'\)\."):
        words = (*given, "--schedule", "linear", "--resume")
        run(pairs_file, tmp_path, *words, steps=1)
