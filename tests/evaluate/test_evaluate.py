"""Rates, intervals, table and command of the digits evaluation, against values worked by hand."""

import json
import re

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from realign.digits.processor import build_processor
from realign.digits.scenes import CAPTION_PROMPT, caption_of, make_scenes
from realign.evaluate import digits as module
from realign.evaluate.__main__ import main
from realign.evaluate.digits import (
    EVALUATION_SEED,
    EvaluateConfig,
    Rate,
    _rate,
    caption,
    evaluate,
    f1,
    generate,
    table,
)


def test_f1_by_hand():
    # For each scene, the yes-question, then the no-question, each as [right, answered yes].
    hit, miss = [True, True], [False, False]
    quiet, false_yes = [True, False], [False, True]
    other = [False, False]  # neither yes nor no
    assert f1(np.array([[hit, quiet]])) == 1.0
    assert f1(np.array([[miss, quiet]])) == 0.0
    assert f1(np.array([[hit, false_yes]])) == pytest.approx(2 / 3)  # precision 1/2, recall 1
    # 2 hits, 1 missed, 1 false yes: precision 2/3, recall 2/3.
    assert f1(np.array([[hit, quiet], [hit, false_yes], [miss, other]])) == pytest.approx(2 / 3)
    # 1 hit, 2 missed, 0 false: precision 1, recall 1/3.
    assert f1(np.array([[hit, quiet], [other, quiet], [miss, quiet]])) == pytest.approx(0.5)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_interval_of_independent_scenes_is_the_binomial_one(share):
    values = np.zeros((500, 1), dtype=bool)
    values[: round(500 * share)] = True
    rate = _rate(values, np.mean)
    half = 1.96 * np.sqrt(share * (1 - share) / 500)
    assert rate.value == share
    assert rate.low == pytest.approx(share - half, abs=0.15 * half)
    assert rate.high == pytest.approx(share + half, abs=0.15 * half)


def test_interval_counts_scenes_not_digits():
    rng = np.random.default_rng(1)
    scenes = rng.random((500, 1)) < 0.3
    once, four = _rate(scenes, np.mean), _rate(np.repeat(scenes, 4, axis=1), np.mean)
    assert once == four  # four digits with equal errors are one observation
    apart = _rate(rng.random((500, 4)) < 0.3, np.mean)
    assert (apart.high - apart.low) == pytest.approx((four.high - four.low) / 2, rel=0.15)


def test_table_is_aligned():
    rate = Rate(0.1234, 0.1, 0.15)
    rates = {"hallucination_rate": rate, "accuracy": Rate(1, 1, 1), "f1": rate, "yes_rate": rate}
    assert str(rate) == "12.3 % [10.0, 15.0]"
    assert table({"base": rates, "a longer name": rates}).splitlines() == [
        "              | hallucination [95 % CI] | yes/no accuracy [95 % CI] "
        "| F1 [95 % CI]        | yes-rate [95 % CI] ",
        "--------------|-------------------------|---------------------------"
        "|---------------------|--------------------",
        "base          | 12.3 % [10.0, 15.0]     | 100.0 % [100.0, 100.0]    "
        "| 12.3 % [10.0, 15.0] | 12.3 % [10.0, 15.0]",
        "a longer name | 12.3 % [10.0, 15.0]     | 100.0 % [100.0, 100.0]    "
        "| 12.3 % [10.0, 15.0] | 12.3 % [10.0, 15.0]",
    ]


def test_rates_of_known_outputs(monkeypatch):
    asked = []

    def generated(model, processor, scenes, prompts, *args, **options):
        asked.append(prompts)
        if prompts[0] != CAPTION_PROMPT:
            return ["yes"] * len(scenes)
        wrong = [((s.digits[0] + 1) % 10, *s.digits[1:]) for s in scenes[:5]]
        texts = [caption_of(d) for d in wrong] + [s.caption for s in scenes[5:]]
        return [*texts[:-1], "a blur ."]  # the last scene names nothing

    monkeypatch.setattr(module, "generate", generated)
    rates = evaluate(EvaluateConfig(scenes=20, quiet=True))
    assert {name: rate.value for name, rate in rates.items()} == {
        "hallucination_rate": (5 + 4) / 80,
        "accuracy": 0.5,
        "f1": pytest.approx(2 / 3),
        "yes_rate": 1.0,
    }
    scenes = make_scenes(20, biased=False, split="test", seed=EVALUATION_SEED)
    for questions, present in zip(asked[1:], (True, False), strict=True):
        for text, scene in zip(questions, scenes, strict=True):
            stated = re.fullmatch(r"is (.+) \?", text)[1]  # "top left seven"
            assert (stated in scene.caption) == present


def test_an_answer_that_is_neither_counts_as_wrong(monkeypatch):
    monkeypatch.setattr(module, "generate", lambda m, p, scenes, *a, **o: ["maybe"] * len(scenes))
    rates = evaluate(EvaluateConfig(scenes=4, quiet=True))
    assert [rates[n].value for n in ("accuracy", "f1", "yes_rate")] == [0, 0, 0]
    assert rates["hallucination_rate"].value == 1


def test_generation_does_not_depend_on_the_batch(vlm, processor, scenes):
    prompts = [CAPTION_PROMPT, "is top left two ?", "name"] * 3  # of different lengths

    def responses(batch_size):
        return generate(
            vlm,
            processor,
            scenes[:9],
            prompts,
            batch_size,
            max_new_tokens=12,
            desc="",
            progress=False,
        )

    assert responses(4) == responses(1)
    assert caption(vlm, processor, scenes[:3], 2) == caption(vlm, processor, scenes[:3], 3)


def test_a_prompt_starts_and_ends_as_in_training(vlm, processor, scenes):
    """A tokenizer that adds start and end tokens changes nothing: the template has the start."""
    adding = build_processor()
    ends = [(token, adding.tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    adding.tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=ends
    )
    assert caption(vlm, adding, scenes[:3]) == caption(vlm, processor, scenes[:3])


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    file = tmp_path / "new" / "rates.json"
    assert main(["--scenes", "20", "--quiet", "--output", str(file)]) == 0
    out = capsys.readouterr().out
    rates = {name: Rate(**values) for name, values in json.loads(file.read_text()).items()}
    assert list(rates) == ["hallucination_rate", "accuracy", "f1", "yes_rate"]
    assert all(0 <= r.low <= r.value <= r.high <= 1 for r in rates.values())
    assert rates["hallucination_rate"].value * 80 == round(rates["hallucination_rate"].value * 80)
    assert out == f"{table({'digits base': rates})}\nwrote {file}\n"
    assert rates == evaluate(EvaluateConfig(scenes=20, quiet=True, batch_size=7))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scenes", "0"], "scenes is 0"),
        (["--batch-size", "-1"], "--batch-size is -1"),
        (["--model", "no/such/model-folder"], "no/such/model-folder"),
    ],
)
def test_the_command_reports_mistakes_in_one_error(arguments, message, capsys):
    assert main([*arguments, "--quiet"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and "Traceback" not in err
