"""Selection of benchmarks, results file, and tables at the end of a run.

By default the slow benchmarks do not run. `-m full` runs all, and `-m slow` only the slow ones.
Results go to benchmarks/results/ as `default`, `full`, `slow` or `gpu`, and those of single files
with `-m` as, for example, `slow-step`. Other selections and runs with a failure go to `partial`.
The file is pytest-benchmark's JSON with the skipped benchmarks and their reasons.
"""

import json
import os
import platform
from pathlib import Path

import pytest
import torch

from benchmarks import report, results
from benchmarks.race import REPLAY
from benchmarks.results import version_of
from benchmarks.step_contestants import Worker

PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "lmdb",
            "faiss-cpu", "numpy")  # fmt: skip
_STATE = pytest.StashKey[dict]()


@pytest.fixture(scope="module")
def peak_of():
    """peak_of(contestant, shape): peak memory in bytes, or None if it cannot be read."""
    from benchmarks.bench_memory import MEASURED, serve

    workers = {}

    def of(name, shape):
        if not MEASURED:
            return None
        if name not in workers:
            workers[name] = Worker(serve, name)
        return workers[name].ask(shape)

    yield of
    for worker in workers.values():
        worker.close()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Marks all benchmarks `full`, sets their timer, and deselects slow ones without `-m`."""
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.benchmark(timer=REPLAY))
        item.add_marker(pytest.mark.full)
    if not config.option.markexpr:
        slow = [item for item in here if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def pytest_collection_finish(session):
    """Records commit and load before the run, which may take an hour."""
    hook, config = session.config.hook, session.config
    commit = hook.pytest_benchmark_generate_commit_info(config=config)
    commit.pop("project", None)
    config.stash[_STATE] = {"commit": commit, "load": os.getloadavg()[0], "skipped": []}


def scope(config) -> str:
    """Name of the results file; the module docstring lists the names."""
    name, places = config.option.markexpr or "default", [Path(one) for one in config.args]
    if name not in ("default", "full", "slow") or config.option.keyword:
        return "partial"
    if name == "full" and torch.cuda.is_available():
        name = "gpu"
    if all(place.is_dir() for place in places):
        return name
    if name == "default" or any("::" in str(place) for place in places):
        return "partial"
    return "-".join([name, *sorted(place.stem.removeprefix("bench_") for place in places)])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Records skipped benchmarks and their reasons."""
    report = yield
    if report.skipped and call.when != "teardown":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        suite = item.path.stem.removeprefix("bench_")
        found = {"suite": suite, "name": item.name, "reason": reason.removeprefix("Skipped: ")}
        item.config.stash[_STATE]["skipped"].append(found)
    return report


def pytest_benchmark_generate_machine_info(config):
    """Machine and versions, without host names or folders."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in PACKAGES},
    }


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """Writes the results if anything was timed."""
    config = session.config
    plugin = getattr(config, "_benchmarksession", None)
    if not any(getattr(plugin, "benchmarks", ())):
        return
    state, hook = config.stash[_STATE], config.hook
    machine = hook.pytest_benchmark_generate_machine_info(config=config)
    written = hook.pytest_benchmark_generate_json(
        config=config,
        benchmarks=plugin.benchmarks,
        include_data=True,
        machine_info=machine | {"load": state["load"]},
        commit_info=state["commit"],
    )
    for bench in written["benchmarks"]:  # objects without JSON; `extra_info` describes them
        bench["params"] = None
    written["skipped"] = state["skipped"]
    name = "partial" if session.testsfailed else scope(config)
    path = state["path"] = results.FOLDER / f"{name}.json"
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(written, indent=1) + "\n")
    partial.replace(path)


def pytest_terminal_summary(terminalreporter, config):
    """Prints the tables and targets of this run."""
    path = config.stash.get(_STATE, {}).get("path")
    if path is None:
        return
    run = results.read(path)
    found = {suite: results.groups_of([run], suite) for suite in report.SUITES}
    text = [report.tables_of(suite, groups) for suite, groups in found.items() if groups]
    text += [report.targets_block([run], measured=True), f"results: {path.name}", ""]
    terminalreporter.write("\n".join(["", *text]))
