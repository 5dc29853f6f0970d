"""The import graph of a package, from its sources, without importing it."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path


def modules(root: Path, package: str) -> dict[str, Path]:
    """Dotted name -> file of every module of a package; a package's name is its `__init__`."""
    found = {}
    for file in sorted((root / package).rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(root: Path, package: str) -> dict[str, set[str]]:
    """Module -> modules of the same package that it imports, wherever the import is."""
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
