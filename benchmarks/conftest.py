"""Which benchmarks run, where their results go, and the tables that end a run.

Without `-m` the slow ones are left out; `-m full` runs all, `-m slow` the slow ones alone. Results
go to benchmarks/results/ as `default`, `full`, `slow` or `gpu`, of single files with `-m` as
`slow-step` and the like, of any other selection, or where one failed, as `partial`: a JSON of
pytest-benchmark with what was skipped and why.
"""

import json
import os
import platform
from importlib import metadata
from pathlib import Path

import pytest
import torch

from benchmarks import results, targets
from benchmarks.race import REPLAY
from benchmarks.words import quantity

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "lmdb",
            "faiss-cpu", "numpy")  # fmt: skip
_SKIPPED, _GROUPS, _SCOPE = pytest.StashKey[list](), pytest.StashKey[dict](), pytest.StashKey[str]()
_COMMIT, _LOAD = pytest.StashKey[dict](), pytest.StashKey[float]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Slow ones only with `-m`; everything is `full`; durations come from `benchmarks.race`."""
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.benchmark(timer=REPLAY))
        item.add_marker(pytest.mark.full)
    if not config.option.markexpr:
        slow = [item for item in here if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def pytest_collection_finish(session):
    """Names the results: of all suites, of whole suites with `-m full`, or of a selection."""
    option, places = session.config.option, [Path(one) for one in session.config.args]
    scope = {"": "default"}.get(option.markexpr, option.markexpr)
    if option.keyword or any("::" in one for one in session.config.args):
        scope = None
    scope = scope if scope in ("default", "full", "slow") else None
    if scope == "full" and torch.cuda.is_available():
        scope = "gpu"
    if scope and not all(place.is_dir() for place in places):
        suites = sorted(place.stem.removeprefix("bench_") for place in places)
        scope = "-".join([scope, *suites]) if scope != "default" else None
    session.config.stash[_SCOPE] = scope or "partial"
    found = session.config.hook.pytest_benchmark_generate_commit_info(config=session.config)
    session.config.stash[_COMMIT] = found  # of what was read, whatever is committed meanwhile
    session.config.stash[_LOAD] = os.getloadavg()[0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and call.when != "teardown":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        suite = item.path.stem.removeprefix("bench_")
        found = {"suite": suite, "name": item.name, "reason": reason.removeprefix("Skipped: ")}
        item.config.stash.setdefault(_SKIPPED, []).append(found)
    return report


def pytest_benchmark_generate_machine_info(config):
    """What a reader has to know; no names of machines or folders."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cuda = torch.cuda.is_available()
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def pytest_benchmark_group_stats(config, benchmarks, group_by):
    """Groups as pytest-benchmark makes them; kept to print ratios at the end of the run."""
    groups: dict[str, list] = {}
    for bench in benchmarks:
        groups.setdefault(bench["group"], []).append(bench)
    config.stash[_GROUPS] = groups
    return list(groups.items())


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """Writes the results, unless nothing was timed."""
    plugin = getattr(session.config, "_benchmarksession", None)
    benches = [bench for bench in getattr(plugin, "benchmarks", []) if bench]
    if not benches:
        return
    hook, config = session.config.hook, session.config
    machine = hook.pytest_benchmark_generate_machine_info(config=config)
    machine["load"] = config.stash[_LOAD]
    written = hook.pytest_benchmark_generate_json(
        config=config,
        benchmarks=plugin.benchmarks,
        include_data=True,
        machine_info=machine,
        commit_info=config.stash[_COMMIT],
    )
    written["commit_info"].pop("project", None)
    for bench in written["benchmarks"]:  # objects of ours; `extra_info` tells the same
        bench["params"] = None
    written["skipped"] = session.config.stash.get(_SKIPPED, [])
    RESULTS.mkdir(exist_ok=True)
    name = "partial" if session.testsfailed else session.config.stash[_SCOPE]
    path = RESULTS / f"{name}.json"
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(written, indent=1) + "\n")
    partial.replace(path)
    session.config.stash[_PATH] = path


_PATH = pytest.StashKey[Path]()


def pytest_terminal_summary(terminalreporter, config):
    """A line for each contestant: theirs over ours, median of the rounds, and its quartiles."""
    say = terminalreporter.write_line
    for name, benches in config.stash.get(_GROUPS, {}).items():
        say(f"\n{name}")
        for bench in benches:
            info = bench["extra_info"]
            ratio = info.get("ratio")
            beside = "" if ratio is None else "{1:7.2f}x [{0:.2f}, {2:.2f}]".format(*ratio)
            notes = "".join(f"   {note}" for note in _notes(info))
            # The time of a memory benchmark is that of a process's start.
            time = f"{1e3 * bench['median']:10.2f} ms" if info.get("suite") != "memory" else ""
            say(f"  {time:13} {beside:24} {info.get('contestant', bench['name'])}{notes}")
    if _PATH in config.stash:
        _say_targets(say, results.read(config.stash[_PATH]))
        say(f"\nresults: {config.stash[_PATH].relative_to(config.rootpath)}")


def _say_targets(say, run):
    """Those of docs/targets.toml that this run measured."""
    found = [(target, *targets.verdict(target, [run])) for target in targets.read()]
    measured = [one for one in found if one[2] != "not measured"]
    if measured:
        say(f"\ntargets: {sum(one[2] == 'met' for one in measured)} of {len(measured)} met")
    for target, value, verdict in measured:
        say(f"  {verdict:6} {quantity(value):>10}  {target.bound:20}  {target.name}")


def _notes(info):
    """What a benchmark put into its extra_info, where it is one of these."""
    if "error" in info:
        yield "error " + ", ".join(f"{k} {v:.1e}" for k, v in info["error"].items())
    if "bytes" in info:
        yield f"{info['bytes'] / 2**20:,.1f} MiB"
    if "rate" in info:
        yield f"{info['rate']:,.4g} {info['unit']}/s"
    if "filled" in info:
        yield f"{100 * info['filled']:.2f} % filled"
