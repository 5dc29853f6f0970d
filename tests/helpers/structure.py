"""The structure of the code: lines and modules per folder, layers and import circles.

    python tests/helpers/structure.py            # this checkout
    python tests/helpers/structure.py OTHER      # another one

`rooms` are the folders of `realign/` and the modules at its root. A layer is the number of rooms
below on the longest path of imports; imports inside functions count.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PRODUCT = ("realign", "realign_kernels", "csrc", "benchmarks")
OTHERS = ("experiments", "examples", "tests")
CODE = {".py", ".cpp", ".h", ".cu"}


def modules(root: Path, package: str) -> dict[str, Path]:
    """Dotted name -> file of every module of a package; a package's name is its `__init__`."""
    found = {}
    for file in sorted((root / package).rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(root: Path, package: str) -> dict[str, set[str]]:
    """Module -> modules of the same package that it imports, at any place in the file."""
    files = modules(root, package)
    graph: dict[str, set[str]] = {}
    for name, file in files.items():
        found = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {n if n in files else node.module for n in names}
        graph[name] = {n for n in found if n in files and n != name}
    return graph


def room(module: str) -> str:
    """The folder of `realign/` that a module is in, or the module itself at the root."""
    return ".".join(module.split(".")[:2])


def rooms(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The graph of rooms."""
    found: dict[str, set[str]] = {}
    for module, others in graph.items():
        found.setdefault(room(module), set()).update(map(room, others))
    return {name: others - {name} for name, others in found.items()}


def layers(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Nodes by the length of the longest path below them.

    Raises:
        CycleError: the graph has a circle, which the error lists.
    """
    sorter, found = TopologicalSorter(graph), []
    sorter.prepare()
    while sorter.is_active():
        found.append(sorted(sorter.get_ready()))
        sorter.done(*found[-1])
    return found


def lines(root: Path, folder: str) -> Iterator[tuple[str, int]]:
    """(folder of the first two levels, lines) of every source file."""
    for file in (root / folder).rglob("*"):
        if file.suffix in CODE and "__pycache__" not in file.parts:
            inner = file.relative_to(root).parent.parts[:2]
            yield "/".join(inner), len(file.read_text(encoding="utf-8").splitlines())


def report(root: Path) -> str:
    """The structure as text."""
    out = []
    for title, folders in (("product", PRODUCT), ("beside it", OTHERS)):
        counts: Counter[str] = Counter()
        files: Counter[str] = Counter()
        for folder in folders:
            for place, count in lines(root, folder):
                counts[place] += count
                files[place] += 1
        out.append(f"{title}: {sum(counts.values()):,} lines in {sum(files.values())} files")
        out += [f"  {place:32} {counts[place]:7,} {files[place]:4}" for place in sorted(counts)]
    for package in ("realign", "realign_kernels"):
        of_modules = imports(root, package)
        for of, graph in ("modules", of_modules), ("rooms", rooms(of_modules)):
            out.append(f"{package}: {len(graph)} {of}, {sum(map(len, graph.values()))} imports")
            try:
                found = layers(graph)
            except CycleError as error:
                out.append(f"  a circle: {' -> '.join(error.args[1])}")
                continue
            out.append(f"  {len(found)} layers, no circle")
            if of == "rooms":
                short = [" ".join(n.partition(".")[2] or n for n in names) for names in found]
                out += [f"  layer {number}: {names}" for number, names in enumerate(short)]
    return "\n".join(out)


if __name__ == "__main__":
    print(report(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()))
