"""Hallucination rate of a digits model: `python -m realign.evaluate --model DIR`.

The rate is the share of misnamed digits in captions. Accuracy, F1 and yes-rate are those of yes/no
questions, as in POPE. Training used none of the test scenes and handwritten digits, and the test
scenes do not follow the prior of the training scenes. Intervals are 95 % percentile bootstraps over
scenes, since the four digits of a scene are not independent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from realign.digits import ASSETS
from realign.digits.scenes import (
    CAPTION_PROMPT,
    Question,
    Scene,
    digits_in,
    make_questions,
    make_scenes,
)
from realign.files import check_file
from realign.modeling.chat import ChatTemplate, text_inputs
from realign.modeling.loading import load_processor, load_trained
from realign.progress import Progress
from realign.terminal import show

EVALUATION_SEED = 20_000  # scenes of no training seed
RESAMPLES = 2000


@dataclass
class EvaluateConfig:
    model: str | None = None
    """Folder of a model or adapter. Without it, the shipped digits model is evaluated."""
    output: str | None = None
    """JSON file for the rates, which are also printed."""
    answers: str | None = None
    """JSON-lines file for all captions and answers, one line per scene."""
    scenes: int = 3000
    """Number of test scenes."""
    batch_size: int = 250
    """Scenes generated together."""
    biased: bool = False
    """Use scenes that follow the prior of the training captions, instead of unbiased scenes."""
    seed: int = 0
    """Seed of the test scenes."""
    quiet: bool = False
    """Print no progress."""

    def __post_init__(self) -> None:
        for name, minimum in (("scenes", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {minimum}.")
        if self.output and self.output == self.answers:
            raise ValueError(f"--output and --answers both name {self.output}. Name two files.")


@dataclass(frozen=True)
class Rate:
    """A share with its 95 % interval, all in [0, 1]."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def evaluate(config: EvaluateConfig) -> dict[str, Rate]:
    """Generate captions of the test scenes and answers to questions about them.

    Returns:
        `hallucination_rate`, the share of digits that captions misname or do not name, and
        `accuracy`, `f1` and `yes_rate` of the answers. An answer other than yes or no is wrong.

    Raises:
        ValueError: for a missing model or an unwritable file, before the model is loaded.
    """
    for flag, file in (("--output", config.output), ("--answers", config.answers)):
        if file:
            check_file(flag, file)
    path = config.model or str(ASSETS)
    processor, model = load_processor(path), load_trained(path)
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    seed = EVALUATION_SEED + config.seed
    scenes = make_scenes(config.scenes, biased=config.biased, split="test", seed=seed)
    answers = answer(
        model, processor, scenes, seed, batch_size=config.batch_size, progress=not config.quiet
    )
    if config.answers:
        save(config.answers, "".join(json.dumps(line) + "\n" for line in answers.lines(scenes)))
    return answers.rates()


@dataclass(frozen=True)
class Answers:
    """Answers of a model about N scenes, and the true digits.

    Attributes:
        captions: N texts.
        named: (N, 4) int, the digits that the captions name, or -1 for a digit that is not named.
        digits: (N, 4) int, the true digits.
        questions: N pairs of questions, one whose answer is yes and one whose answer is no.
        answered: (N, 2) str, the answers to the questions.
    """

    captions: list[str]
    named: np.ndarray
    digits: np.ndarray
    questions: list[list[Question]]
    answered: np.ndarray

    def rates(self) -> dict[str, Rate]:
        """The rates that `evaluate` returns."""
        right, yes = self.answered == np.array(["yes", "no"]), self.answered == "yes"
        return {
            "hallucination_rate": _rate(self.named != self.digits, np.mean),
            "accuracy": _rate(right, np.mean),
            "f1": _rate(np.stack([right, yes], -1), f1),
            "yes_rate": _rate(yes, np.mean),
        }

    def lines(self, scenes: Sequence[Scene]) -> Iterator[dict[str, Any]]:
        """One dictionary of plain types for each scene."""
        for i, scene in enumerate(scenes):
            asked = zip(self.questions[i], self.answered[i].tolist(), strict=True)
            yield {
                "scene": i,
                "truth": scene.caption,
                "caption": self.captions[i],
                "misnamed": int((self.named[i] != self.digits[i]).sum()),
                "questions": [[q.text, q.answer, text] for q, text in asked],
            }


def answer(
    model,
    processor,
    scenes: Sequence[Scene],
    seed: int,
    *,
    batch_size: int = 250,
    progress: bool = False,
) -> Answers:
    """Generate a caption of each scene, and answers to two questions about it.

    Args:
        model: the model, on its device.
        processor: processor of the model.
        scenes: N scenes.
        seed: seed of the questions.
        batch_size: scenes generated together.
        progress: whether to show progress.
    """
    rng = np.random.default_rng(seed)
    questions = [make_questions(scene, rng) for scene in scenes]
    captions = caption(model, processor, scenes, batch_size, desc="captions", progress=progress)
    named = [[-1 if d is None else d for d in digits_in(text)] for text in captions]
    answered = np.empty((len(scenes), 2), dtype=object)
    for kind in range(2):  # first the questions whose answer is yes
        answered[:, kind] = generate(
            model,
            processor,
            scenes,
            [pair[kind].text for pair in questions],
            batch_size,
            max_new_tokens=2,
            desc=f"questions {kind + 1} of 2",
            progress=progress,
        )
    digits = np.array([scene.digits for scene in scenes])
    return Answers(captions, np.array(named), digits, questions, answered)


def caption(
    model,
    processor,
    scenes: Sequence[Scene],
    batch_size: int = 250,
    *,
    desc: str = "captions",
    progress: bool = False,
) -> list[str]:
    """Greedy captions of scenes."""
    prompts = [CAPTION_PROMPT] * len(scenes)
    return generate(
        model,
        processor,
        scenes,
        prompts,
        batch_size,
        max_new_tokens=24,
        desc=desc,
        progress=progress,
    )


@torch.inference_mode()
def generate(
    model,
    processor,
    scenes: Sequence[Scene],
    prompts: Sequence[str],
    batch_size: int,
    *,
    max_new_tokens: int,
    desc: str,
    progress: bool,
) -> list[str]:
    """Greedy responses to one prompt per scene."""
    template = ChatTemplate(processor)
    texts = [template.prompt([{"role": "user", "content": p}], 1).text for p in prompts]
    responses: list[str] = []
    with Progress(desc, "scenes", len(scenes), quiet=not progress) as bar:
        for start in range(0, len(scenes), batch_size):
            part = slice(start, start + batch_size)
            encoded = processor(
                images=[scene.image for scene in scenes[part]],
                **text_inputs(processor, texts[part]),
                return_tensors="pt",
                padding=True,
                padding_side="left",
            ).to(model.device)
            out = model.generate(**encoded, max_new_tokens=max_new_tokens, do_sample=False)
            new_ids = out[:, encoded["input_ids"].shape[1] :]
            new_texts = processor.batch_decode(new_ids, skip_special_tokens=True)
            responses += [text.strip() for text in new_texts]
            bar.update(len(new_texts))
    return responses


def table(results: dict[str, dict[str, Rate]]) -> str:
    """A table with one line for each model."""
    columns = ("hallucination_rate", "accuracy", "f1", "yes_rate")
    heads = ("hallucination", "yes/no accuracy", "F1", "yes-rate")
    lines = [[""] + [f"{head} [95 % CI]" for head in heads]]
    lines += [[name, *(str(rates[c]) for c in columns)] for name, rates in results.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = [" | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([rows[0], "-|-".join("-" * w for w in widths), *rows[1:]])


def _rate(values: np.ndarray, statistic) -> Rate:
    """A statistic of (scenes, ...) values and its bootstrap interval over scenes."""
    rng = np.random.default_rng(0)
    picks = rng.integers(len(values), size=(RESAMPLES, len(values)))
    draws = [statistic(values[pick]) for pick in picks]
    low, high = np.percentile(draws, [2.5, 97.5])
    return Rate(float(statistic(values)), float(low), float(high))


def f1(values: np.ndarray) -> float:
    """F1 of "yes" from (scenes, 2, [right, answered yes])."""
    right, yes = values[..., 0], values[..., 1]
    true_yes = (right & yes).sum()
    false_yes, false_no = (yes & ~right).sum(), values[:, 0].shape[0] - true_yes
    return float(2 * true_yes / (2 * true_yes + false_yes + false_no))


def save(file: str, text: str) -> None:
    """Write a file, with its folder, and print its name."""
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    show(f"wrote {path}")
