"""Prints ratios: every contestant's median over the first one's, group by group.

Times on a shared machine drift, ratios within one run hold better; so these are what we quote.
"""

import pytest


def pytest_benchmark_group_stats(config, benchmarks, group_by):
    """Groups as pytest-benchmark makes them; kept to print ratios at the end of the run."""
    groups: dict[str, list] = {}
    for bench in benchmarks:
        groups.setdefault(bench["group"], []).append(bench)
    config.stash[_GROUPS] = groups
    return sorted(groups.items())


_GROUPS = pytest.StashKey[dict]()


def pytest_terminal_summary(terminalreporter, config):
    for name, benches in config.stash.get(_GROUPS, {}).items():
        base = benches[0]
        terminalreporter.write_line(f"\n{name}: median time over that of {base['name']}")
        for bench in benches:
            ratio = bench["median"] / base["median"]
            error = bench["extra_info"].get("error")
            note = "" if error is None else f"   error against fp64 {error:.1e}"
            terminalreporter.write_line(
                f"  {ratio:6.2f}x  {1e3 * bench['median']:9.1f} ms  {bench['name']}{note}"
            )
