"""Jobs of the study: bases, pairs, tuning, arms. Each job writes its file atomically."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
from tqdm import tqdm

from experiments.study.arms import HIGHEST, LEARNING_RATES, LOWEST, Arm, Pairs
from experiments.study.testbed import (
    TUNING_SEED,
    Testbed,
    make_base,
    source_records,
    test_scenes,
)
from realign.files import read_jsonl, write_whole

LAST = 10  # steps in the average of the margins
OWN = ("beta", "gamma", "nll_weight")  # settings with a default of the objective
Job = tuple[Callable[..., None], tuple[Any, ...]]


def run_all(
    folder: Path,
    bed: Testbed,
    arms: Sequence[Arm],
    seeds: int,
    jobs: int,
    known: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Run every job without a result.

    Args:
        folder: folder of bases, pairs, models and results.
        bed: the testbed.
        arms: arms of this testbed.
        seeds: number of seeds. Each has its own base, pairs and order of training.
        jobs: number of parallel processes, with one thread each.
        known: learning rates of arms that are not tuned again.

    Returns:
        The results (`run_arm`), ordered by seed. The tuning seed has results at all rates, the
        other seeds at the best rate of the tuning seed. Other arms in the folder are left out.

    Raises:
        ValueError: if the folder holds a study of another testbed.
    """
    _claim(folder, bed)
    numbers = [TUNING_SEED, *range(seeds)]
    known = known or {}
    tuned = [arm for arm in arms if arm.tuned and arm.name not in known]
    own = {"base", *(arm.name for arm in tuned)}
    kinds = {seed: list(dict.fromkeys(arm.pairs for arm in arms)) for seed in range(seeds)}
    kinds[TUNING_SEED] = list(dict.fromkeys(arm.pairs for arm in tuned))
    with _pool(jobs) as pool:
        _run(pool, "bases", [(prepare, (folder, bed, seed, kinds[seed])) for seed in numbers])
        tuning = [(arm, rate) for arm in tuned for rate in LEARNING_RATES]
        tried_rates = {}
        while tuning:
            _run(pool, "tuning", [(run_arm, (folder, bed, a, TUNING_SEED, r)) for a, r in tuning])
            tried_rates = tuning_of(results(folder))
            tuning = [(arm, rate) for arm in tuned if (rate := next_rate(tried_rates[arm.name]))]
        rates = {name: best_rate(tried) for name, tried in tried_rates.items()} | {**known}
        runs: list[Job] = [(run_base, (folder, bed, seed)) for seed in numbers]
        runs += [
            (run_arm, (folder, bed, arm, seed, rates[arm.tuned_as or arm.name]))
            for arm in arms
            for seed in range(seeds)
        ]
        _run(pool, "arms", runs)
    rate_of_arm = {arm.name: rates[arm.tuned_as or arm.name] for arm in arms} | {"base": None}
    return [
        r
        for r in results(folder)
        if (r["seed"] == TUNING_SEED and r["arm"] in own)
        or (r["seed"] in numbers and r["learning_rate"] == rate_of_arm.get(r["arm"], -1))
    ]


def results(folder: Path) -> list[dict[str, Any]]:
    """Return every result in the folder of a study, ordered by seed and name."""
    files = sorted((folder / "results").glob("*.json"))
    return sorted(
        (json.loads(file.read_text()) for file in files),
        key=lambda r: (r["seed"], r["arm"], r["learning_rate"] or 0),
    )


def save_archive(file: Path, bed: Testbed, results: Iterable[dict[str, Any]]) -> None:
    """Write the testbed and the results as JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"testbed": asdict(bed)}, *results]
    write_whole(file, "".join(json.dumps(line) + "\n" for line in lines))


def read_archive(folder: Path) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Testbed]]:
    """Return the results and the testbed of each archive, by its name.

    Archives are named after runs. `digits-again.jsonl` is a second run of the digits, and
    `digits-losses.jsonl` compares losses on them.

    Raises:
        ValueError: if the folder has no archive.
    """
    results_of, beds = {}, {}
    for file in sorted(folder.glob("*.jsonl"), key=lambda file: file.stem):
        bed, *results_of[file.stem] = [json.loads(line) for line in file.read_text().splitlines()]
        beds[file.stem] = Testbed(**bed["testbed"])
    if not results_of:
        raise ValueError(f"There are no runs in {folder} to report. Run the study: omit --report.")
    return results_of, beds


def tuning_of(results: Iterable[dict[str, Any]]) -> dict[str, dict[float, float]]:
    """Return results of the tuning seed: arm -> learning rate -> share of misnamed images."""
    tried: dict[str, dict[float, float]] = {}
    for result in results:
        if result["seed"] == TUNING_SEED and (rate := result["learning_rate"]):
            misnamed = result["metrics"]["hallucination_rate"]
            tried.setdefault(result["arm"], {})[rate] = misnamed
    return tried


def known_rates(file: Path) -> dict[str, float]:
    """Return the best rates of an archive by the name of the arm, or none without the archive."""
    if not file.exists():
        return {}
    results = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    return {name: best_rate(tried) for name, tried in tuning_of(results).items()}


def best_rate(tried: dict[float, float]) -> float:
    """Return the rate with the fewest misnamed images, or the lower one of equal rates."""
    return min(tried, key=lambda rate: (tried[rate], rate))


def next_rate(tried: dict[float, float]) -> float | None:
    """Return a rate beyond the best end, or None if the best rate is inside or at a limit."""
    best = best_rate(tried)
    if best == min(tried) and best / 2 >= LOWEST:
        return best / 2
    if best == max(tried) and best * 2 <= HIGHEST:
        return best * 2
    return None


def prepare(folder: Path, bed: Testbed, seed: int, kinds: Iterable[Pairs]) -> None:
    """Make the base, the source records and the given kinds of pairs of a seed."""
    from realign.data.records import read_pairs, write_pairs
    from realign.pairs.pipeline import PairsConfig, build_pairs

    home = folder / f"seed{seed}"
    home.mkdir(parents=True, exist_ok=True)
    base, sources = home / "base", home / "sources.parquet"
    if not base.exists():
        make_base(base, bed, seed)
    scenes = source_records(bed, seed)
    # SymMPO's response to the retrieved image is the caption of its scene.
    captions = {record.name: record.chosen for record in scenes}
    if not sources.exists():
        write_pairs(sources, scenes)
    for pairs in kinds:
        file = pairs_file(folder, seed, pairs)
        if file.exists():
            continue
        raw = file.with_suffix(".raw.parquet")
        build_pairs(
            PairsConfig(
                output=str(raw),
                work=str(home / "pairs.work"),
                data=str(sources),
                model=str(base),
                mask="numbers",
                keep_target=0.0,  # an arm keeps its own settings
                seed=seed,
                quiet=True,
                **asdict(pairs),
            )
        )
        records = read_pairs(raw)
        write_pairs(
            file,
            [replace(r, retrieved_chosen=captions[r.provenance["neighbour"]]) for r in records],
        )
        raw.unlink()


def pairs_file(folder: Path, seed: int, pairs: Pairs) -> Path:
    """Return the file of one kind of pairs of a seed."""
    return folder / f"seed{seed}" / f"pairs-{pairs.name}.parquet"


def run_base(folder: Path, bed: Testbed, seed: int) -> None:
    """Evaluate the base of a seed."""
    file = folder / "results" / f"seed{seed}-base.json"
    if not file.exists():
        about = {"arm": "base", "seed": seed, "learning_rate": None, "settings": {}}
        _write_result(file, **about, **_judge(bed, seed, folder / f"seed{seed}" / "base"))


def run_arm(folder: Path, bed: Testbed, arm: Arm, seed: int, learning_rate: float) -> None:
    """Train an arm on the pairs of a seed and evaluate it, unless its result exists.

    The result is an object with `arm`, `seed`, `learning_rate`, `settings` and `metrics`. It also
    holds strings with a group of letters for each scene: `named` and `named_biased`, the digits in
    captions (? if none), and the answers to yes/no questions (y, n or ?).

    Raises:
        ValueError: if an existing result has different settings.
    """
    from realign.config import DataConfig, LossConfig, ModelConfig, OptimConfig, RunConfig
    from realign.config import TrainConfig as Config
    from realign.train import train

    name = f"seed{seed}-{arm.name.replace(' ', '-')}-{learning_rate:g}"
    file, output = folder / "results" / f"{name}.json", folder / "runs" / name
    pairs = pairs_file(folder, seed, arm.pairs)
    loss = LossConfig(
        objective=arm.objective, link=arm.link, beta=arm.beta, visual_weight=arm.visual_weight
    )
    settings = asdict(arm) | {"steps": bed.steps, "batch_size": bed.batch_size}
    settings |= {key: getattr(loss, key) for key in OWN if getattr(loss, key) is not None}
    settings |= {"pairs_used": pq.read_metadata(pairs).num_rows}
    if file.exists():
        if json.loads(file.read_text())["settings"] != settings:
            raise ValueError(
                f"{file} is of an arm with different settings. Remove the file to run it again."
            )
        return
    config = Config(
        model=ModelConfig(
            model=str(folder / f"seed{seed}" / "base"),
            lora_rank=bed.lora_rank,
            lora_alpha=2.0 * bed.lora_rank,
            dtype="fp32",
        ),
        data=DataConfig(pairs=str(pairs)),
        loss=loss,
        optim=OptimConfig(learning_rate=learning_rate, steps=bed.steps, batch_size=bed.batch_size),
        run=RunConfig(
            output=str(output),
            reference_cache=str(folder / "references"),
            seed=seed,
            save_every=0,
            quiet=True,
        ),
    )
    shutil.rmtree(output, ignore_errors=True)  # left by an interrupted run of about half a minute
    train(config)
    last = read_jsonl(output / "metrics.jsonl")[-LAST:]
    wanted = [key for key in last[-1] if key.startswith("rewards/") and "margins" in key]
    margins = {key: float(np.mean([entry[key] for entry in last])) for key in wanted}
    result = _judge(bed, seed, output / "model")
    result["metrics"] |= margins
    about = {"arm": arm.name, "seed": seed, "learning_rate": learning_rate, "settings": settings}
    _write_result(file, **about, **result)
    shutil.rmtree(output)


def _judge(bed: Testbed, seed: int, model_path: Path) -> dict[str, Any]:
    """Evaluate a model on the test scenes. Returns metrics, named digits and answers."""
    from realign.evaluate import answer
    from realign.modeling.loading import load_processor, load_trained

    model, processor = load_trained(model_path), load_processor(model_path)
    answers = answer(model, processor, *test_scenes(bed, seed))
    biased = answer(model, processor, *test_scenes(bed, seed, biased=True))
    rates = {name: rate.value for name, rate in answers.rates().items()}
    rates["hallucination_rate_biased"] = biased.rates()["hallucination_rate"].value
    rates["exact_captions"] = float((answers.named == answers.digits).all(1).mean())
    answered = " ".join("".join(_LETTER.get(a, "?") for a in row) for row in answers.answered)
    named = {"named": _digits(answers.named), "named_biased": _digits(biased.named)}
    return {"metrics": rates} | named | {"said": answered}  # codespell:ignore


def _write_result(file: Path, **result: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(result) + "\n")


def _digits(named: np.ndarray) -> str:
    return " ".join("".join("?" if d < 0 else str(d) for d in row) for row in named)


_LETTER = {"yes": "y", "no": "n"}


def _claim(folder: Path, bed: Testbed) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file, settings = folder / "testbed.json", asdict(bed)
    if file.exists() and json.loads(file.read_text()) != settings:
        raise ValueError(
            f"{folder} holds a study of another testbed. Remove it or choose another --output."
        )
    write_whole(file, json.dumps(settings, indent=2) + "\n")


@contextlib.contextmanager
def _pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Start processes with one thread each and discard their output."""
    context = multiprocessing.get_context("spawn")
    with (
        patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}),
        ProcessPoolExecutor(jobs, mp_context=context, initializer=_silence) as pool,
    ):
        yield pool


def _silence() -> None:
    import torch

    from realign.third_party import silence_third_party

    torch.set_num_threads(1)
    silence_third_party()


def _call(job: Job) -> None:
    """Run a job. Errors become text, because some exceptions cannot be pickled."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            job[0](*job[1])
        except Exception as error:
            raise RuntimeError(f"{job[0].__name__} {job[1][2:]}: {error}") from None


def _run(pool: ProcessPoolExecutor, title: str, jobs: Iterable[Job]) -> None:
    """Run jobs with a progress bar. The first error or Ctrl-C stops them, and results are kept.

    Raises:
        ValueError: if a job fails or its process is killed.
    """
    running = [pool.submit(_call, job) for job in jobs]
    try:
        for done in tqdm(as_completed(running), total=len(running), desc=title, unit="job"):
            done.result()
    except (RuntimeError, BrokenExecutor) as error:
        raise ValueError(f"{title}: {error}. Fix it and run the same command again.") from error
    finally:
        for job in running:
            job.cancel()
