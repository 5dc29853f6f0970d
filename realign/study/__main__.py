"""Repeat the study: `python -m realign.study`. Stopped and started again it goes on."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from realign.cli import parse_sections
from realign.metrics import write_whole
from realign.noise import hush_libraries


@dataclass
class StudyConfig:
    output: str = "runs/study"
    """Folder of bases, pairs and results; what it holds is not run again."""
    docs: str = "docs"
    """Folder to write study.md and study/ to."""
    seeds: int = 5
    """Seeds, each with a base, pairs and training of its own."""
    jobs: int = 2
    """Processes at once, one thread each."""
    report: bool = False
    """Run nothing: write the page again from the runs in --docs."""

    def __post_init__(self) -> None:
        for name in ("seeds", "jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")


def study(config: StudyConfig) -> None:
    """Run what is missing and write the page.

    Raises:
        ValueError: when the folder holds a study of another testbed, or there is nothing to report.
    """
    from realign.study import report, runs
    from realign.study.testbed import Testbed

    bed, kept = Testbed(), Path(config.docs) / "study" / "runs.jsonl"
    if config.report:
        if not kept.exists():
            raise ValueError(f"there is no {kept} to report; leave --report out.")
        results = [json.loads(line) for line in kept.read_text().splitlines()]
    else:
        results = runs.run_all(Path(config.output), bed, config.seeds, config.jobs)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, "".join(json.dumps(result) + "\n" for result in results))
    report.draw(kept.with_name("arms.png"), results)
    write_whole(Path(config.docs) / "study.md", report.page(results, asdict(bed)))
    print(report.finding(results))


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, report; returns an exit code."""
    began = time.perf_counter()
    hush_libraries()
    try:
        config = parse_sections(
            {"study": StudyConfig},
            prog="python -m realign.study",
            description="DPO, rDPO and their relatives on digits with a strong language prior.",
            arguments=arguments,
        )["study"]
        study(config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    print(f"{time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
