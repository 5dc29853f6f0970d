"""Command of the study: `python -m experiments.study`. A second call resumes it."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tables import put
from experiments.study.arms import ARMS_OF, LOSS_RUNS
from realign.cli import one_line_errors, parse_sections
from realign.files import check_file, check_folder
from realign.third_party import silence_third_party

MOST = 100  # seeds, because seed 100 is for tuning


@dataclass
class StudyConfig:
    output: str = "runs/study"
    """Output folder for bases, pairs and results of each testbed. Finished runs are kept."""
    docs: str = "docs"
    """Folder of study.md and study/. The generated blocks of the page are replaced."""
    testbed: str = "both"
    """Run to make: digits, photographs, both of them, or a comparison of losses: demo-losses,
    digits-losses or photographs-losses."""
    seeds: int = 5
    """Number of seeds. Each seed has its own base, pairs and training."""
    jobs: int = 2
    """Number of parallel processes, with one thread each."""
    report: bool = False
    """Train nothing, and write the page again from the runs in --docs."""

    def __post_init__(self) -> None:
        for name in ("seeds", "jobs"):
            if not 1 <= getattr(self, name) <= MOST:
                raise ValueError(f"{name} is {getattr(self, name)}. It must be from 1 to {MOST}.")
        if self.testbed != "both" and self.testbed not in ARMS_OF:
            known = ", ".join(ARMS_OF)
            raise ValueError(f"testbed is {self.testbed!r}. It must be one of {known}, or both.")


def study(config: StudyConfig) -> None:
    """Run the missing jobs and write the blocks of docs/study.md and the README.

    Raises:
        ValueError: if the folder holds a study of another testbed, there is nothing to report, or
            matplotlib or scikit-image is missing.
    """
    _check_installed("matplotlib")
    check_folder("--docs", Path(config.docs) / "study")
    check_file("--docs", Path(config.docs) / "study.md")
    if not config.report:
        check_folder("--output", config.output)
    from experiments.study import page, plots, runs
    from experiments.study.testbed import TESTBEDS

    archive = Path(config.docs) / "study"
    names = ("digits", "photographs") if config.testbed == "both" else (config.testbed,)
    bed_of = {name: name.removesuffix("-losses") for name in names}
    if "photographs" in bed_of.values() and not config.report:
        _check_installed("skimage")
    for name, bed_name in {} if config.report else bed_of.items():
        # Runs on one testbed share its folder, so they train on the same bases and pairs.
        folder, bed = Path(config.output) / bed_name, TESTBEDS[bed_name]
        known = runs.known_rates(archive / f"{bed_name}.jsonl") if name in LOSS_RUNS else {}
        results = runs.run_all(folder, bed, ARMS_OF[name], config.seeds, config.jobs, known)
        runs.save_archive(archive / f"{name}.jsonl", bed, results)
    results_of, beds = runs.read_archive(archive)
    for name, results in results_of.items():
        plots.draw(archive / f"{name}.png", results)
        plots.draw_curves(archive / f"{name}-curves.png", results)
    put(Path(config.docs) / "study.md", page.blocks(results_of, beds))
    readme = Path(config.docs).parent / "README.md"
    if readme.is_file() and "<!-- study: generated -->" in readme.read_text():
        put(readme, {"study": page.summary(results_of, beds)})
    findings = page.findings(results_of, beds)
    print("\n".join(sentence for sentences in findings.values() for sentence in sentences))
    print("\n".join(page.loss_findings(results_of, beds)))


def _check_installed(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"The study needs {module}. Install it with: pip install 'realign[study]'")


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and run the study. Returns the exit code."""
    began = time.perf_counter()
    silence_third_party()
    try:
        config = parse_sections(
            {"study": StudyConfig},
            prog="python -m experiments.study",
            description="Compare DPO, rDPO and related methods under a strong language prior.",
            arguments=arguments,
        )["study"]
        study(config)
    except KeyboardInterrupt:
        print("Stopped. Run the same command to resume.", file=sys.stderr)
        return 130
    print(f"Finished in {time.perf_counter() - began:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
