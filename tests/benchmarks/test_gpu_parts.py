"""GPU check: rehearsals of the parts attention, step and train, and the 7B model of the step."""

import math
import sys
import time
from pathlib import Path

import pytest
import torch
from forked_ranks import Forked
from transformers import LlavaForConditionalGeneration

from benchmarks.gpu import attention, step, train
from benchmarks.gpu.record import RESULTS, Record, failed, latest, read
from benchmarks.models import LLAVA_7B, llava_config, random_on

ROOT = Path(__file__).parents[2]


def rehearse(part, folder):
    """Runs a part at toy sizes in this process; returns the line of each case by name."""
    part.run(Record(folder, "part", rehearse=True, seconds=300, call=1))
    return {case: line for (_, case), line in latest(read(folder / RESULTS)).items()}


def assert_finite(line):
    """Asserts that the case has figures, and that all are finite."""
    assert not failed(line), line["error"]
    numbers = [v for k, v in line.items() if isinstance(v, int | float) and k != "call"]
    assert numbers and all(map(math.isfinite, numbers)), line


def test_each_attention_implementation_agrees_with_fp32(tmp_path):
    lines = rehearse(attention, tmp_path)
    assert list(lines) == list(attention.CASES)
    for case, line in lines.items():
        assert_finite(line)
        # Probabilities and outputs are rounded to bf16, which keeps 8 bits.
        assert line["output_error"] < 2**-8, case
        assert line.get("gradient_error", 0) < 2**-7, case


def test_attention_of_the_7b_has_24_calls_of_different_lengths():
    (trees,) = attention.batch_of(attention.LLAVA).trees
    assert sum(len(tree) - 1 for tree in trees) == 24
    sizes = [size for root, first, *more in trees for size in (root + first, *more)]
    assert len(set(sizes)) > 20


def test_contestants_of_a_step_agree(tmp_path):
    lines = rehearse(step, tmp_path)
    cases = [case for group in step.GROUPS.values() for case in group]
    assert set(lines) == {*cases, "ours against TRL DPO", "ours against released"}
    for line in lines.values():
        assert_finite(line)
    for peer in step.EQUALS:
        against = lines[f"ours against {peer}"]
        assert against["loss_difference"] < 1e-4 and against["grad_norm_difference"] < 1e-4
    positions = [lines[case]["positions"] for case in ("ours", "TRL DPO", "released")]
    assert positions == sorted(
        positions
    )  # unpadded rows, then policy and reference passes over two and three sequences
    assert len(lines["ours"]["each"]) == step.TIMED


def test_training_on_a_device_and_a_killed_run(tmp_path, monkeypatch):
    def forked(command, *, env, **_):  # a fork needs no imports
        return Forked(*command[3:], environment=env)

    monkeypatch.setattr(train.subprocess, "Popen", forked)
    lines = rehearse(train, tmp_path)
    for line in lines.values():
        assert_finite(line)
    assert lines["fp32 against CPU"]["largest"] < 1e-5  # both run on a CPU
    assert 0 < lines["bf16 against fp32"]["loss"] < 0.05
    killed = lines["killed and resumed"]
    assert killed["same_bits"] and killed["largest"] == 0
    assert 2 <= killed["resumed_from_step"] <= killed["killed_after_step"]


def test_a_hanging_run_fails_with_a_traceback(tmp_path, monkeypatch):
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'import time; time.sleep(60)'\n")
    fake.chmod(0o755)
    monkeypatch.setattr(train.sys, "executable", str(fake))
    end = time.monotonic() + 1
    run = train.Run(tmp_path, "hangs", 4, "", {}, lambda: end - time.monotonic())
    with pytest.raises(
        RuntimeError, match=r"(?s)checkpoint after 1 s, exit code None: .*Aborted.*line 1"
    ):
        run.kill()
    with pytest.raises(RuntimeError, match=r"0 of 4 steps after . s, exit code -6"):
        run.curve()


def test_a_difference_of_curves_is_relative_to_the_largest_value():
    truth = [dict.fromkeys(train.CURVE, 2.0), dict.fromkeys(train.CURVE, -8.0)]
    curve = [truth[0] | {"loss": 2.5}, truth[1] | {"grad_norm": -8.1}]
    found = train.difference(curve, truth)
    assert found["loss"] == found["largest"] == 0.5 / 8
    assert found["grad_norm"] == pytest.approx(0.1 / 8) and found["logps/chosen"] == 0
    assert train.same([truth[0] | {"seconds": 1.0}], [truth[0] | {"seconds": 2.0}])
    assert not train.same(curve, truth)


def test_out_of_memory_halves_the_examples_of_a_forward(monkeypatch):
    tried, freed = [], []
    monkeypatch.setattr(step, "give_back", lambda: freed.append(tried[-1]))

    def call(micro):
        tried.append(micro)
        if micro > 1:
            raise torch.OutOfMemoryError("no room")

    step.largest_that_fits(call)
    assert tried == [4, 2, 1] and freed == [4, 2]

    def never(micro):
        raise torch.OutOfMemoryError(f"no room for {micro}")

    with pytest.raises(torch.OutOfMemoryError, match="for 1"):
        step.largest_that_fits(never)


@pytest.mark.parametrize(
    ("vocabulary", "parameters"), [(32064, 7_063_427_072), (32000, 7_062_902_784)]
)
def test_the_7b_has_the_parameter_count_of_the_real_model(vocabulary, parameters):
    config = llava_config(**LLAVA_7B | {"vocabulary": vocabulary})
    model = random_on("meta", config, torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_model_created_on_a_device_has_the_usual_buffers():
    config = llava_config(**step.TOY)
    usual = dict(LlavaForConditionalGeneration(config).named_buffers())
    made = [random_on("cpu", config, torch.bfloat16, kind) for kind in ("tree", "sdpa")]
    found = dict(made[0].named_buffers())
    assert found.keys() == usual.keys() and len(usual) == 3
    for name, buffer in usual.items():
        assert found[name].dtype == buffer.dtype and torch.equal(found[name], buffer), name
    weights = [dict(model.named_parameters()) for model in made]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert all(weight.isfinite().all() for weight in weights[0].values())
    assert made[0].model.get_decoder().config._attn_implementation == "tree"
