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
            note = "".join(f"   {note}" for note in _notes(bench["extra_info"]))
            terminalreporter.write_line(
                f"  {ratio:6.2f}x  {1e3 * bench['median']:9.1f} ms  {bench['name']}{note}"
            )

    tables = {
        name: bench["extra_info"]["table"]
        for name, benches in config.stash.get(_GROUPS, {}).items()
        for bench in benches
        if "table" in bench["extra_info"]
    }
    if tables:
        terminalreporter.write_line("\n" + "\n\n".join(_tables(tables)))


def _tables(tables):
    """Markdown: ours over theirs in time and in memory, a column for each setting."""
    wanted = {
        "time of a step, ours / theirs [least, most of the rounds]; theirs in seconds": lambda x: (
            "{:.2f} [{:.2f}, {:.2f}]; {:.1f} s".format(*x["time"], x["seconds"])
        ),
        "peak memory over imports, ours / theirs; theirs": lambda x: (
            f"{x['memory'][0]:.2f}; {1e-9 * x['bytes'][0]:.2f} GB"
        ),
        "peak memory over model and optimizer as built, ours / theirs; theirs": lambda x: (
            f"{x['memory'][1]:.2f}; {1e-9 * x['bytes'][1]:.2f} GB"
        ),
    }
    for title, cell in wanted.items():
        lines = [[title, *tables], ["---"] * (1 + len(tables))]
        for name in next(iter(tables.values())):
            lines.append([name, *(cell(table[name]) for table in tables.values())])
        yield "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _notes(info):
    """What a benchmark put into its extra_info, where it is one of these."""
    if "error" in info:
        yield f"error against fp64 {info['error']:.1e}"
    if "paired" in info:
        median, least, most = info["paired"]
        yield f"{median:.2f}x [{least:.2f}, {most:.2f}] in pairs of rounds"
    if "rate" in info:
        yield f"{1e-6 * info['rate']:7.3g} M {info['unit']}/s"
    if "filled" in info:
        yield f"{100 * info['filled']:.2f} % filled"
