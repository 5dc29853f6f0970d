"""Held-out evaluation of runs: figures, ranks, resuming, the best checkpoint, early stopping."""

import json
import shutil
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked_ranks import run_command, run_ranks
from peft import PeftModel
from runs import arguments, encoded, run, weights, without_timing
from safetensors.torch import load_file
from tiny_truth import separate_logps

from realign import distributed
from realign.config import parse
from realign.data.records import read_pairs, write_pairs
from realign.digits import ASSETS
from realign.files import JsonlLog, read_jsonl
from realign.modeling.chat import ChatTemplate, TextInputs
from realign.modeling.loading import load_model, load_processor
from realign.modeling.model import ForestModel
from realign.train import main, train
from realign.training import evaluation
from realign.training.checkpoint import CheckpointError

FAST = ("--learning-rate", 1e-3, "--lora-rank", 4)
KEYS = ("loss", "loss/text", "loss/visual", "rewards/margins", "rewards/accuracies")
KEYS += ("rewards/visual_margins", "rewards/visual_accuracies", "logps/rejected")


@pytest.fixture(scope="module")
def files(pairs_file, tmp_path_factory):
    """Seven held-out records, and the other pairs."""
    folder, records = tmp_path_factory.mktemp("files"), read_pairs(pairs_file)
    held, trained = folder / "held.parquet", folder / "trained.parquet"
    write_pairs(held, records[:7])
    write_pairs(trained, records[7:])
    return trained, held


def split_log(output):
    """The entries of evaluations without their prefix, and those of steps."""
    entries = read_jsonl(output / "metrics.jsonl")
    found = [e for e in entries if "eval/loss" in e]
    named = [{n.removeprefix("eval/"): v for n, v in e.items()} for e in found]
    return named, [e for e in entries if "eval/loss" not in e]


def scripted(monkeypatch, values):
    """Let the held-out loss take these values, by step from 0."""
    measured, steps = evaluation.measure, []

    def measure(run, feed):
        steps.append(run.done)
        return measured(run, feed) | {"loss": values[run.done]}

    monkeypatch.setattr(evaluation, "measure", measure)
    return steps


def plain_logps(vlm, records):
    """(3, B) log-probs of chosen, rejected, and chosen under the retrieved image.

    Each is a plain forward of transformers on the output of the processor.
    """
    processor, rows = load_processor(ASSETS), []
    examples, _ = encoded(records)
    for record, example in zip(records, examples, strict=True):
        text = ChatTemplate(processor).prompt(record.prompt, len(record.images)).text
        chosen, rejected, _ = (leaf.ids for leaf in example.leaves)
        row = []
        for images, responses in (
            (record.images, [chosen, rejected]),
            (record.retrieved_images, [chosen]),
        ):
            opened = [image.open("") for image in images]
            texts = TextInputs(processor)([text])
            inputs = processor(images=opened, return_tensors="pt", **texts)
            with torch.no_grad():
                row += [one.sum() for one in separate_logps(vlm, dict(inputs), responses)]
        rows.append(torch.stack(row))
    return torch.stack(rows, 1)


def test_the_figures_are_those_of_plain_forwards(files, tmp_path, capsys):
    trained, held = files
    more = ("--eval-pairs", held, "--eval-every", 3, "--micro-batch-size", 3, *FAST)
    config = parse([a for a in arguments(trained, tmp_path, *more, steps=4) if a != "--quiet"])
    train(config)
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("eval ")]
    found, steps = split_log(tmp_path)
    assert [e["step"] for e in found] == [0, 3, 4] and [e["step"] for e in steps] == [1, 2, 3, 4]
    assert found[0]["loss"] == pytest.approx(1.386294, abs=1e-6)  # 2 ln 2
    base = load_model(ASSETS).eval()
    reference = plain_logps(base, read_pairs(held))
    tuned = PeftModel.from_pretrained(base, tmp_path / "model").eval()
    chosen, rejected, visual = 0.1 * (plain_logps(tuned, read_pairs(held)) - reference)
    margins = {"": chosen - rejected, "visual_": chosen - visual}
    text, image = (torch.log1p((-m).exp()) for m in margins.values())
    truth = {"loss": (text + image).mean(), "loss/text": text.mean(), "loss/visual": image.mean()}
    for side, margin in margins.items():
        truth[f"rewards/{side}margins"] = margin.mean()
        truth[f"rewards/{side}accuracies"] = (margin > 0).double().mean()
    truth["rewards/rejected"] = rejected.mean()
    for name, value in truth.items():
        assert found[-1][name] == pytest.approx(float(value), abs=2e-6), name
    assert abs(found[-1]["loss"] - found[0]["loss"]) > 0.02
    line = f"eval 4/4  loss  {found[-1]['loss']:.3f}  margin  {found[-1]['rewards/margins']:+.3f}"
    assert len(shown) == 3 and shown[-1].startswith(line) and "best" not in shown[0]
    assert found[-1]["epoch"] == pytest.approx(4 * 8 / len(read_pairs(trained)))
    assert (
        f"{len(read_pairs(trained))} preference records"
        in (tmp_path / "model" / "README.md").read_text()
    )


def test_training_is_the_same_with_an_evaluation(files, tmp_path):
    """With dropout: an evaluation draws no random number, and leaves the model in training."""
    model = tmp_path / "model"
    shutil.copytree(ASSETS, model)
    settings = json.loads((model / "config.json").read_text())
    settings["text_config"]["attention_dropout"] = 0.2
    (model / "config.json").write_text(json.dumps(settings))
    trained, held = files
    given = ("--model", model, "--reference-cache", tmp_path / "cache", *FAST)
    packed, measured = [], evaluation.measure

    def measure(*all_given):
        def pack(tensor):
            packed.append(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return measured(*all_given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "measure", measure)
        run(trained, tmp_path / "with", *given, "--eval-pairs", held, "--eval-every", 1, steps=3)
    plain = run(trained, tmp_path / "without", *given, steps=3)
    found, steps = split_log(tmp_path / "with")
    assert without_timing(steps) == without_timing(plain)
    ours, theirs = weights(tmp_path / "with"), weights(tmp_path / "without")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert found[0]["loss"] == pytest.approx(1.386294, abs=1e-6)  # no dropout
    assert packed == []  # nothing is kept for a backward


BEST_IS_1 = [0.9, 0.1, 0.5]


def runs_of_a_rank(common, folder):
    """Two runs as one rank: of a share, and of five records with a given best step.

    Of five records in forwards of two, rank 1 has none for its second forward.
    """
    distributed.stop = lambda: None  # one process group for both
    for name, (pairs, *more) in common.items():
        words = arguments(pairs, Path(folder) / name, *more, "--micro-batch-size", 2, steps=2)
        with pytest.MonkeyPatch.context() as patch:
            if name == "five":
                scripted(patch, BEST_IS_1)
            run_command("realign.train", [*words, "--fsdp"])


def test_two_ranks_have_the_figures_and_the_best_of_one(files, pairs_file, tmp_path, capsys):
    trained, held = files
    five, every = tmp_path / "five.parquet", ("--eval-every", 1, *FAST)
    write_pairs(five, read_pairs(held)[:5])
    settings = {
        "share": (pairs_file, "--eval-share", 0.3, *every),
        "five": (trained, "--eval-pairs", five, *every, "--load-best"),
    }
    shown = run_ranks(runs_of_a_rank, 2, str(tmp_path / "log"), settings, str(tmp_path))
    for name, (pairs, *more) in settings.items():
        with pytest.MonkeyPatch.context() as patch:
            if name == "five":
                scripted(patch, BEST_IS_1)
            run(pairs, tmp_path / "truth" / name, *more, "--micro-batch-size", 3, steps=2)
        found, truth = split_log(tmp_path / name)[0], split_log(tmp_path / "truth" / name)[0]
        assert [e["step"] for e in found] == [e["step"] for e in truth] == [0, 1, 2]
        for ours, theirs in zip(found, truth, strict=True):
            for key in KEYS:
                assert ours[key] == pytest.approx(theirs[key], abs=1e-5, rel=1e-5), key
    assert "loaded the weights of step 1" in shown
    best, truth = weights(tmp_path / "five"), weights(tmp_path / "truth" / "five")
    last = adapter_of(tmp_path / "truth" / "five" / "checkpoints" / "step-000002")
    far = max(float((best[name] - value).abs().max()) for name, value in truth.items())
    moved = max(float((best[f"base_model.model.{n}"] - v).abs().max()) for n, v in last.items())
    assert far < 1e-4 < moved
    line = next(one for one in capsys.readouterr().out.splitlines() if one.startswith("held out"))
    assert shown.count(line) == 1
    count, total = int(line.split()[2]), len(read_pairs(pairs_file))
    assert f"of {total} records, {count / total:.1%}; no image of" in line
    card = (tmp_path / "share" / "model" / "README.md").read_text()
    assert f"{total - count} preference records" in card
    assert f"{count} further records were not trained on" in card


# --- resuming ---


@pytest.fixture(scope="module")
def watched(files):
    """Settings of a run whose evaluations and checkpoints are at different steps.

    The best step is 2, which is saved after its evaluation.
    """
    trained, held = files
    more = ("--eval-pairs", held, "--eval-every", 2, "--save-every", 3, "--keep", 1)
    return trained, (*more, "--load-best", *FAST)


BEST_IS_2 = [0.9, 0, 0.5, 0, 0.6, 0, 0.55]


@pytest.fixture(scope="module")
def whole(watched, tmp_path_factory):
    """The folder of an uninterrupted run."""
    output = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        scripted(patch, BEST_IS_2)
        run(watched[0], output, *watched[1])
    return output


class Killed(BaseException):
    """The end of a process at once: nothing catches it."""


def kill_at_entry(patch, step, evaluated):
    write = JsonlLog.write

    def write_and_die(log, entry):
        write(log, entry)
        if entry["step"] == step and ("eval/loss" in entry) == evaluated:
            raise Killed

    patch.setattr(JsonlLog, "write", write_and_die)


def kill_in_pass(patch, step):
    forward = ForestModel.forward
    steps = []
    note = evaluation.measure
    patch.setattr(evaluation, "measure", lambda r, f: steps.append(r.done) or note(r, f))

    def die(self, *given):
        if not self.training and steps and steps[-1] == step:
            raise Killed
        return forward(self, *given)

    patch.setattr(ForestModel, "forward", die)


def stop_at_step(patch, step):
    write = JsonlLog.write

    def write_and_signal(log, entry):
        write(log, entry)
        if entry["step"] == step:
            signal.raise_signal(signal.SIGTERM)

    patch.setattr(JsonlLog, "write", write_and_signal)


def test_a_run_that_is_killed_anywhere_resumes_with_the_same_bits(watched, whole, tmp_path):
    """At the baseline, in a pass, after the line of an evaluation, and by SIGTERM before one."""
    for kill, *where in (
        (kill_at_entry, 0, True),
        (kill_in_pass, 2),
        (kill_at_entry, 2, True),
        (kill_at_entry, 3, False),  # the checkpoint of step 2 has its evaluation
        (stop_at_step, 3),  # ends step 4, whose evaluation is left to the next run
        (kill_in_pass, 4),
        (kill_at_entry, 4, True),
        (kill_at_entry, 5, False),
        (kill_in_pass, 6),
        (kill_at_entry, 6, True),
        (lambda *_: None,),
    ):
        with pytest.MonkeyPatch.context() as patch:
            scripted(patch, BEST_IS_2)
            kill(patch, *where)
            survives = kill not in (kill_at_entry, kill_in_pass)
            with nullcontext() if survives else pytest.raises(Killed):
                run(watched[0], tmp_path, *watched[1], "--resume")
        found, steps = split_log(tmp_path)
        if kill is stop_at_step:
            assert [e["step"] for e in steps] == [1, 2, 3, 4]
            assert [e["step"] for e in found] == [0, 2]
    logs = [without_timing(read_jsonl(one / "metrics.jsonl")) for one in (tmp_path, whole)]
    assert logs[0] == logs[1]
    assert [e["step"] for e in logs[0] if "eval/loss" in e] == [0, 2, 4, 6]
    ours, theirs = weights(tmp_path), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert kept(tmp_path) == kept(whole) == [2, 6]
    assert_exported(tmp_path, 2)
    last = Path("checkpoints", "step-000006", "state.json")
    assert (tmp_path / last).read_text() == (whole / last).read_text()


def test_a_baseline_of_other_settings_is_measured_again(files, tmp_path):
    """A run without a checkpoint may be started again with other settings."""
    given = ("--eval-pairs", files[1], *FAST)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at_entry(patch, 0, True)
        run(files[0], tmp_path, *given, steps=1)
    assert split_log(tmp_path)[0][0]["loss"] == pytest.approx(1.386294, abs=1e-6)  # 2 ln 2
    run(files[0], tmp_path, *given, "--objective", "dpo", "--resume", steps=1)
    found, _ = split_log(tmp_path)
    assert [e["step"] for e in found] == [0, 1]
    assert found[0]["loss"] == pytest.approx(0.693147, abs=1e-6)


def test_other_held_out_pairs_are_another_run(watched, whole, files, tmp_path):
    fewer = tmp_path / "fewer.parquet"
    write_pairs(fewer, read_pairs(files[1])[:-1])
    settings = list(watched[1])
    settings[1] = fewer
    with pytest.raises(ValueError, match=r"Changed: the held out pairs\."):
        run(watched[0], whole, *settings, "--resume")
    with pytest.raises(ValueError, match=r"Changed: eval_every .*, the held out pairs\."):
        run(watched[0], whole, *FAST, "--save-every", 3, "--resume")
    copy = tmp_path / "copy.parquet"
    shutil.copy(files[1], copy)
    settings[1] = copy  # other paths of equal records are no change
    before = (whole / "metrics.jsonl").read_bytes()
    run(watched[0], whole, *settings, "--resume")
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_a_run_of_an_earlier_version_resumes(files, tmp_path):
    """Its checkpoints have no state, and its settings no section for evaluations."""
    given = ("--save-every", 2, *FAST)
    run(files[0], tmp_path / "truth", *given, steps=4)
    shutil.copytree(tmp_path / "truth", tmp_path / "old")
    shutil.rmtree(tmp_path / "old" / "checkpoints" / "step-000004")
    folder = tmp_path / "old" / "checkpoints" / "step-000002"
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["state.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "state.json").unlink()
    identity = json.loads((tmp_path / "old" / "run.json").read_text())
    del identity["config"]["eval"], identity["held_out_pairs"]
    (tmp_path / "old" / "run.json").write_text(json.dumps(identity))
    run(files[0], tmp_path / "old", *given, "--resume", steps=4)
    ours, theirs = weights(tmp_path / "old"), weights(tmp_path / "truth")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# --- the best checkpoint, and early stopping ---


def adapter_of(checkpoint):
    """The trained weights in a checkpoint, by the names of PEFT."""
    (shard,) = checkpoint.glob("*.safetensors")
    return {
        name.removeprefix("model.vlm.").replace(".default.", "."): value
        for name, value in load_file(shard).items()
        if name.startswith("model.")
    }


def assert_exported(output, step):
    """The exported adapter has the weights of the checkpoint of a step."""
    exported = weights(output)
    expected = adapter_of(output / "checkpoints" / f"step-{step:06}")
    assert len(expected) == len(exported) > 0
    for name, value in expected.items():
        assert torch.equal(exported[f"base_model.model.{name}"], value), name


def kept(output):
    return sorted(int(path.name[-6:]) for path in (output / "checkpoints").iterdir())


STOP = ("--eval-every", 1, "--save-every", 2, "--keep", 1)


def test_an_early_stop_restores_the_best(files, tmp_path, monkeypatch, capsys):
    values = [0.9, 1.0, 0.5, 0.7, 0.6, 0.6, 0.1]
    scripted(monkeypatch, values)
    given = ("--eval-pairs", files[1], *STOP, *FAST, "--early-stopping", 3)
    entries = run(files[0], tmp_path, *given)
    assert [e["step"] for e in entries if "eval/loss" in e] == [0, 1, 2, 3, 4, 5]
    assert [e.get("eval/since_best") for e in entries if "eval/loss" in e] == [None, 0, 0, 1, 2, 3]
    assert entries[-1]["step"] == 5 and kept(tmp_path) == [2, 5]
    assert_exported(tmp_path, 2)
    last = adapter_of(tmp_path / "checkpoints" / "step-000005")
    assert not all(torch.equal(weights(tmp_path)[f"base_model.model.{n}"], last[n]) for n in last)
    shown = capsys.readouterr().out
    assert (
        "stopped early after step 5 of 6, since 3 evaluation(s) in a row were no better; the best "
        "eval/loss is 0.5, at step 2, and 0.9 before the first step" in shown
    )
    assert "loaded the weights of step 2, which has the best evaluation" in shown
    card = (tmp_path / "model" / "README.md").read_text()
    assert "7 further records were not trained on" in card and "## The last step (2)" in card
    assert "The weights are those of step 2, which has the best `eval/loss`." in card
    assert "| loss | 0.5 |" in card
    # Resumed, it is at its end already.
    shutil.rmtree(tmp_path / "model")
    assert run(files[0], tmp_path, *given, "--resume") == entries
    assert_exported(tmp_path, 2)
    run(files[0], tmp_path, *given, "--resume", "--no-load-best")
    assert_exported(tmp_path, 5)
    # With more patience it continues.
    more = (*given[:-1], 4, "--resume")
    entries = run(files[0], tmp_path, *more)
    assert entries[-1]["step"] == 6 and entries[-1]["eval/since_best"] == 0
    assert_exported(tmp_path, 6)


def test_the_best_is_kept_and_the_last_is_exported(files, tmp_path, monkeypatch, capsys):
    """Without an early stop, and with NaN among the values, which is never the best."""
    steps = scripted(monkeypatch, [0.1, 0.9, 0.8, 0.85, float("nan"), 0.8, 0.95])
    given = ("--eval-pairs", files[1], *STOP, *FAST)
    run(files[0], tmp_path, *given)
    assert steps == [0, 1, 2, 3, 4, 5, 6] and kept(tmp_path) == [2, 6]
    assert_exported(tmp_path, 6)
    assert "the best eval/loss is 0.8, at step 2" in capsys.readouterr().out
    # The same folder exports its best, until that is damaged.
    run(files[0], tmp_path, *given, "--resume", "--load-best")
    assert_exported(tmp_path, 2)
    (shard,) = (tmp_path / "checkpoints" / "step-000002").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    message = "step-000002 cannot be loaded: the content of .* has changed.* --resume --no-load-be"
    with pytest.raises(CheckpointError, match=message):
        run(files[0], tmp_path, *given, "--resume", "--load-best")
    run(files[0], tmp_path, *given, "--resume", "--no-load-best")


def test_a_higher_margin_is_better(files, tmp_path, monkeypatch):
    measured = evaluation.measure
    values = [0.0, 0.5, 0.9, 0.7]
    monkeypatch.setattr(
        evaluation,
        "measure",
        lambda r, f: measured(r, f) | {"rewards/accuracies": values[r.done], "loss": -r.done},
    )
    given = ("--eval-pairs", files[1], *STOP, *FAST, "--best-metric", "rewards/accuracies")
    run(files[0], tmp_path, *given, "--load-best", steps=3)
    assert kept(tmp_path) == [2, 3]
    assert_exported(tmp_path, 2)


@pytest.mark.parametrize("metric", ["loss", "rewards/accuracies"])
def test_a_held_out_loss_that_is_not_finite(files, tmp_path, monkeypatch, capsys, metric):
    """It is reported, and never the best: an accuracy counts NaN as wrong and stays finite."""
    forward, name = ForestModel.forward, read_pairs(files[1])[5].name

    def broken(self, batch, *given):
        output = forward(self, batch, *given)
        bad = not self.training and name in batch.names
        return output._replace(loss=output.loss * torch.nan) if bad else output

    monkeypatch.setattr(ForestModel, "forward", broken)
    more = ("--eval-pairs", files[1], "--micro-batch-size", 1, "--load-best", *FAST)
    more += ("--best-metric", metric)
    run(files[0], tmp_path, *more, steps=2)
    shown = capsys.readouterr().out
    assert f"held-out records is nan. It comes from a forward with record(s) {name}. C" in shown
    assert f"eval/{metric} was never finite" in shown
    assert "no evaluation was finite; the last weights are exported" in shown
    assert_exported(tmp_path, 2)


def test_the_plan_of_evaluations(files, pairs_file, tmp_path, capsys):
    more = ("--eval-pairs", files[1], "--eval-every", 4, "--early-stopping", 1, "--dry-run")
    words = arguments(files[0], tmp_path / "run", *more, "--micro-batch-size", 2, steps=9)
    assert main(words) == 0
    plan = " ".join(capsys.readouterr().out.split())
    assert (
        "evaluation 7 held-out records, " in plan
        and "; 4 evaluations of 4 forward(s), every 4 steps, by loss, stops after 1 without a new "
        "best; the best weights are exported"
        in plan
    )
    assert f"records {len(read_pairs(files[0]))}, " in plan
    assert " for evaluations, and up to " in plan and "4 checkpoints of" in plan
    assert not (tmp_path / "run").exists()


# --- guards ---


def changed(file, folder, edit):
    """A copy of a pairs file with edited records."""
    copy = folder / "changed.parquet"
    write_pairs(copy, [edit(i, record) for i, record in enumerate(read_pairs(file))])
    return copy


def refused(files, tmp_path, capsys, *more, run=False):
    """The one line of an error of a plan, and of a run."""
    extra = () if run else ("--dry-run",)
    assert main(arguments(files[0], tmp_path / "run", *more, *extra)) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    return line


def test_unusable_held_out_pairs_are_an_error_before_any_work(files, tmp_path, capsys):
    def without(i, record):
        return replace(record, retrieved_images=() if i == 3 else record.retrieved_images)

    bad = changed(files[1], tmp_path, without)
    name = read_pairs(files[1])[3].name
    line = refused(files, tmp_path, capsys, "--eval-pairs", bad, run=True)
    assert f"--eval-pairs {bad}: record '{name}': the objective 'rdpo' needs" in line
    write_pairs(bad, [])
    assert "holds no records" in refused(files, tmp_path, capsys, "--eval-pairs", bad)
    none = tmp_path / "none.parquet"
    assert "none.parquet" in refused(files, tmp_path, capsys, "--eval-pairs", none)
    texts = changed(files[1], tmp_path, lambda i, r: replace(r, images=(), retrieved_images=()))
    line = refused(files, tmp_path, capsys, "--eval-pairs", texts)
    assert f"--eval-pairs {texts}: record" in line and "neither has any other of 7 records" in line
    for more, message in (
        (("--best-metric", "rewards/chosen"), "--best-metric is 'rewards/chosen'; it must be one "
         "of loss, loss/text, loss/visual, rewards/accuracies, rewards/margins, rewards/visual_a"),
        (("--best-metric", "accuracy"), "--best-metric is 'accuracy'; it must be one of loss, lo"),
        (("--early-stopping", 3, "--eval-every", 2), "--early-stopping 3 would have no effect: th"
         "e run has 3 evaluation(s), and 5 are needed. Leave it out, or lower --eval-every,"),
    ):  # fmt: skip
        assert message in refused(
            files, tmp_path, capsys, "--eval-pairs", files[1], *more, run=len(more) > 2
        )


def test_other_leaves_than_those_of_training_are_an_error(files, tmp_path, capsys):
    def several(count):
        return lambda i, record: replace(record, retrieved_images=record.retrieved_images * count)

    (tmp_path / "a").mkdir()
    trained = changed(files[0], tmp_path / "a", several(2))
    held = changed(files[1], tmp_path, several(3))
    line = refused((trained,), tmp_path, capsys, "--eval-pairs", held, "--objective", "lpoi")
    assert "has 4 leaves for the training records and 5 for --eval-pairs. Give all records" in line


def test_shared_images_are_reported(files, pairs_file, tmp_path, capsys):
    """Two of the held-out records get images of the training records, one of them retrieved."""
    trained = read_pairs(files[0])

    def sharing(i, record):
        if i == 1:
            return replace(record, images=trained[0].images)
        return replace(record, retrieved_images=trained[1].images) if i == 4 else record

    own = {image.data for r in trained for image in (*r.images, *r.retrieved_images)}
    held = changed(files[1], tmp_path, sharing)
    over = [
        [image.data for image in (*r.images, *r.retrieved_images) if image.data in own]
        for r in read_pairs(held)
    ]
    count, images = sum(map(bool, over)), len({data for one in over for data in one})
    assert count >= 2
    run(files[0], tmp_path / "run", "--eval-pairs", held, steps=1)
    line = f"warning: {count} of 7 held-out records share images (or a prompt without one) with "
    shown = capsys.readouterr().out
    assert line in shown and f"training records: {images} in common" in shown
    others, clean = {data for one in over for data in one}, tmp_path / "clean.parquet"
    write_pairs(
        clean,
        [r for r in trained if not others & {i.data for i in (*r.images, *r.retrieved_images)}],
    )
    assert main(arguments(clean, tmp_path / "clean", "--eval-pairs", held, "--dry-run")) == 0
    assert "warning" not in capsys.readouterr().out


def test_held_out_pairs_have_their_own_image_folder(files, tmp_path):
    """Of a name that the folder of the training images lacks."""
    (tmp_path / "photos").mkdir()
    rows = []
    for i, record in enumerate(read_pairs(files[1])[:2]):
        names = []
        for kind, (image,) in (("a", record.images), ("b", record.retrieved_images)):
            names.append(f"{kind}{i}.png")
            (tmp_path / "photos" / names[-1]).write_bytes(image.data)
        rows.append({
            "prompt": list(record.prompt), "chosen": record.chosen, "rejected": record.rejected,
            "images": names[:1], "retrieved_images": names[1:],
        })  # fmt: skip
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ("--eval-pairs", held, "--eval-image-folder", tmp_path / "photos")
    run(files[0], tmp_path / "files", *more, steps=1)
    embedded = tmp_path / "embedded.parquet"
    write_pairs(embedded, read_pairs(files[1])[:2])
    run(files[0], tmp_path / "embedded", "--eval-pairs", embedded, steps=1)
    found, truth = (split_log(tmp_path / n)[0] for n in ("files", "embedded"))
    assert without_timing(found) == without_timing(truth)
