"""Command of the study: `python -m experiments.study`. A second call resumes."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tables import put
from realign.cli import one_line_errors, parse_sections
from realign.files import check_file, check_folder
from realign.third_party import silence_third_party

MOST = 100  # seeds; the next number is the tuning seed


@dataclass
class StudyConfig:
    output: str = "runs/study"
    """Folder of bases, pairs and results, a folder for each testbed; finished runs are kept."""
    docs: str = "docs"
    """Folder of study.md, whose generated blocks are replaced, and of study/."""
    testbed: str = "both"
    """What to run: digits, photographs or both."""
    seeds: int = 5
    """Seeds, each with a base, pairs and training of its own."""
    jobs: int = 2
    """Processes at once, one thread each."""
    report: bool = False
    """Run nothing: write the page again from all runs in --docs."""

    def __post_init__(self) -> None:
        for name in ("seeds", "jobs"):
            if not 1 <= getattr(self, name) <= MOST:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 to {MOST}.")
        if self.testbed not in ("digits", "photographs", "both"):
            raise ValueError(
                f"testbed is {self.testbed!r}; it must be 'digits', 'photographs' or 'both'."
            )


def study(config: StudyConfig) -> None:
    """Run the missing jobs and write the page.

    Raises:
        ValueError: when the folder holds a study of another testbed, there is nothing to report, or
            matplotlib or scikit-image is missing.
    """
    _check_installed("matplotlib")
    check_folder("--docs", Path(config.docs) / "study")
    check_file("--docs", Path(config.docs) / "study.md")
    if not config.report:
        check_folder("--output", config.output)
    from experiments.study import page, plots, runs
    from experiments.study.arms import ARMS_OF
    from experiments.study.testbed import TESTBEDS

    archive = Path(config.docs) / "study"
    testbeds = TESTBEDS if config.testbed == "both" else {config.testbed: TESTBEDS[config.testbed]}
    if "photographs" in testbeds and not config.report:
        _check_installed("skimage")
    for name, bed in {} if config.report else testbeds.items():
        folder = Path(config.output) / name
        results = runs.run_all(folder, bed, ARMS_OF[name], config.seeds, config.jobs)
        runs.save_archive(archive / f"{name}.jsonl", bed, results)
    results_of, beds = runs.read_archive(archive)
    for name, results in results_of.items():
        plots.draw(archive / f"{name}.png", results)
        plots.draw_curves(archive / f"{name}-curves.png", results)
    put(Path(config.docs) / "study.md", page.blocks(results_of, beds))
    findings = page.findings(results_of, beds)
    print("\n".join(sentence for sentences in findings.values() for sentence in sentences))


def _check_installed(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"the study needs {module}: pip install 'realign[study]'.")


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, report; returns an exit code."""
    began = time.perf_counter()
    silence_third_party()
    try:
        config = parse_sections(
            {"study": StudyConfig},
            prog="python -m experiments.study",
            description="DPO, rDPO and their relatives where the language prior is strong.",
            arguments=arguments,
        )["study"]
        study(config)
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        return 130
    print(f"{time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
