"""End-to-end demo on the shipped digits: `python -m realign.demo`.

It makes pairs by retrieval and trains DPO and rDPO from the same base on these pairs, for the same
number of steps. It evaluates the base and both models, prints a table, and writes `results.json`
and `report.png`. A second call resumes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from realign.cli import one_line_errors, parse_sections
from realign.data.records import Record, read_pairs
from realign.demo.report import NOISY, Panel, draw
from realign.digits import ASSETS
from realign.digits.scenes import NOISE, digits_in, make_scenes
from realign.evaluate import (
    EVALUATION_SEED,
    EvaluateConfig,
    Rate,
    caption,
    evaluate,
    table,
)
from realign.files import check_folder, read_jsonl
from realign.modeling.loading import load_processor, load_trained
from realign.pairs.pipeline import PairsConfig, build_pairs
from realign.terminal import show
from realign.third_party import silence_third_party

OBJECTIVES = ("dpo", "rdpo")
EVALUATED = 1  # evaluation seed. The settings were selected on the scenes of seed 0.
CAPTIONED = 60  # test scenes among which the report looks for different captions


@dataclass
class DemoConfig:
    output: str = "demo"
    """Folder for pairs, models, figures and the report."""
    seeds: int = 1
    """Number of seeds. Pairs and training are repeated for each."""
    steps: int = 100
    """Training steps of each objective."""
    scenes: int = 1024
    """Digit scenes to make pairs of."""
    evaluation_scenes: int = 3000
    """Test scenes of the evaluation."""
    nproc_per_node: int = 2
    """FSDP ranks that train on this machine."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "output" and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")


def demo(config: DemoConfig) -> dict[str, dict[str, Rate]]:
    """Run all stages. Returns the rates of the base and of every trained model."""
    folder = Path(config.output)
    check_folder("--output", folder)
    _claim(folder, config)
    results = {"base": _evaluated(folder / "base.json", None, config, "base")}
    for seed in range(config.seeds):
        suffix = f" seed {seed}" if config.seeds > 1 else ""
        pairs = folder / f"seed{seed}" / "pairs.parquet"
        if not pairs.exists():
            _announce(f"preference pairs{suffix}")
            report = build_pairs(PairsConfig(output=str(pairs), scenes=config.scenes, seed=seed))
            show(report)
        for objective in OBJECTIVES:
            run = folder / f"seed{seed}" / objective
            _announce(f"training {objective}{suffix} on {config.nproc_per_node} FSDP ranks")
            _train(run, pairs, objective, seed, config)
            name = f"{objective}{suffix}"
            results[name] = _evaluated(run / "evaluation.json", str(run / "model"), config, name)
    (folder / "results.json").write_text(
        json.dumps({n: {k: vars(r) for k, r in v.items()} for n, v in results.items()}, indent=2)
        + "\n"
    )
    _report(folder, results, config)
    return results


def _claim(folder: Path, config: DemoConfig) -> None:
    """Record the settings in the folder, so that a demo of the same settings resumes.

    Raises:
        ValueError: if the folder holds a different demo, or matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the report needs matplotlib. Install it: pip install 'realign[demo]'.")
    base = hashlib.blake2b((ASSETS / "model.safetensors").read_bytes(), digest_size=16)
    settings = vars(config) | {"output": None, "base": base.hexdigest()}
    file = folder / "demo.json"
    if file.exists() and json.loads(file.read_text()) != settings:
        raise ValueError(
            f"{folder} holds a demo with different settings or a different base. Remove it, or "
            "name another --output."
        )
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=2) + "\n")


def _train(run: Path, pairs: Path, objective: str, seed: int, config: DemoConfig) -> None:
    command = [sys.executable, "-m", "realign.train", "--fsdp", "--resume"]
    options = {
        "--nproc-per-node": config.nproc_per_node,
        "--pairs": pairs,
        "--objective": objective,
        "--lora-rank": 128,
        "--lora-alpha": 256,
        "--steps": config.steps,
        "--seed": seed,
        "--output": run,
    }
    command += [str(part) for option in options.items() for part in option]
    if subprocess.run(command, check=False).returncode != 0:
        raise ValueError(f"training {objective} failed, with the message above. Fix it and rerun.")


def _evaluated(file: Path, model: str | None, config: DemoConfig, name: str) -> dict[str, Rate]:
    """Rates of a model, read from `file` if it exists."""
    if file.exists():
        return {key: Rate(**value) for key, value in json.loads(file.read_text()).items()}
    _announce(f"evaluating {name}")
    scenes = config.evaluation_scenes
    rates = evaluate(EvaluateConfig(model=model, scenes=scenes, seed=EVALUATED))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({key: vars(rate) for key, rate in rates.items()}, indent=2) + "\n")
    show(f"wrote {file}")
    return rates


def _report(folder: Path, results: dict[str, dict[str, Rate]], config: DemoConfig) -> None:
    """Draw report.png from the runs of the first seed."""
    first = folder / "seed0"
    logs = {name: read_jsonl(first / name / "metrics.jsonl") for name in OBJECTIVES}
    pair = _pair(next(iter(read_pairs(first / "pairs.parquet"))), config.scenes)
    models = {"base": ASSETS, "DPO": first / "dpo" / "model", "rDPO": first / "rdpo" / "model"}
    draw(folder / "report.png", results, logs, pair, _scenes(models))
    show(f"wrote {folder / 'results.json'} and {folder / 'report.png'}")


def _pair(record: Record, count: int) -> Panel:
    """A training pair with its images, without noise and as the model sees them."""
    noisy, clean = (make_scenes(count, biased=True, seed=0, noise=n) for n in (NOISE, 0.0))
    clean_of = {seen.image.tobytes(): scene.image for seen, scene in zip(noisy, clean, strict=True)}
    image, retrieved = (
        group[0].open(record.name) for group in (record.images, record.retrieved_images)
    )
    cells = {
        "image": clean_of[image.tobytes()],
        NOISY: image,
        "chosen response": record.chosen,
        "retrieved image": clean_of[retrieved.tobytes()],
        f"{NOISY} ": retrieved,  # a title of its own
        "rejected response": record.rejected,
    }
    return Panel(record.chosen, cells)


def _scenes(models: dict[str, Path]) -> list[Panel]:
    """The first three test scenes on which the models differ, with the captions of each model."""
    seed = EVALUATION_SEED + EVALUATED
    scenes, clean = (
        make_scenes(CAPTIONED, biased=False, split="test", seed=seed, noise=n) for n in (NOISE, 0.0)
    )
    processor = load_processor(ASSETS)
    captions = {
        name: caption(load_trained(path), processor, scenes) for name, path in models.items()
    }
    panels = []
    for i, scene in enumerate(scenes):
        named = {name: texts[i] for name, texts in captions.items()}
        if len({tuple(digits_in(text)) for text in named.values()}) > 1:
            seen = {"scene": clean[i].image, NOISY: scene.image, "truth": scene.caption}
            panels.append(Panel(scene.caption, seen | named))
    return panels[:3]


def _announce(stage: str) -> None:
    show(f"\n== {stage}")


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, print the table. Returns an exit code."""
    began = time.perf_counter()
    silence_third_party()
    config = parse_sections(
        {"demo": DemoConfig},
        prog="python -m realign.demo",
        description="Make pairs of the digits, train DPO and rDPO on them, and compare the "
        "hallucination of the base and both models. The default settings take about five minutes "
        "on two CPU cores.",
        example="python -m realign.demo --output demo",
        metavars={"output": "FOLDER"},
        arguments=arguments,
    )["demo"]
    results = demo(config)
    show(f"\n{table(results)}\n\n{time.perf_counter() - began:.0f} s in total")
    return 0


if __name__ == "__main__":
    sys.exit(main())
