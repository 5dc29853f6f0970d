"""Layers, import circles, file sizes and docstrings of the two packages."""

import ast
import re
from graphlib import TopologicalSorter
from itertools import chain
from pathlib import Path

from structure import imports, modules, room, rooms

import realign_kernels

ROOT = Path(__file__).resolve().parents[2]
LAYERS = (
    "checks config cli distributed files loss_config progress recipes terminal third_party",
    "data digits",
    "modeling",
    "training pairs",
    "hf evaluate",
    "train cache export doctor demo",
)
"""Rooms of `realign/`: each layer may import the layers before it. The last has entry points."""
KERNEL_LAYERS = (
    "_extension objectives reference",
    "refcache row_plan validation",
    "lm_head",
    "backends nonfinite",
    "autograd",
    "ops",
    "functional",
)
"""Rooms of `realign_kernels/`: backends do not import autograd, nor autograd public functions."""
GROUND, ENTRIES = LAYERS[0].split(), LAYERS[-1].split()
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}
KERNEL_LEVEL = {name: level for level, names in enumerate(KERNEL_LAYERS) for name in names.split()}
MOST_LINES = 600  # of a file
TEXT = {".py", ".toml", ".md", ".txt", ".cpp", ".h", ".cu", ".cmake", ".json", ".yml", ".cff", ""}
FILES = modules(ROOT, "realign") | modules(ROOT, "realign_kernels")


def _imported(file: Path) -> list[tuple[str, str]]:
    """(module, name) of every import of a file, also inside functions; name "" for a module."""
    found: list[tuple[str, str]] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


def test_realign_imports_only_public_names_of_realign_kernels():
    outside = {"experiments", "benchmarks", "examples", "tests", "csrc"}
    outside |= {file.stem for file in (ROOT / "tests" / "helpers").glob("*.py")}
    for name, file in FILES.items():
        for module, imported in _imported(file):
            top = module.split(".")[0]
            assert top not in outside, f"{file} imports {module}, which the wheel lacks"
            if name.split(".")[0] == "realign_kernels":
                assert top not in ("realign", "transformers", "peft", "datasets"), file
            elif top == "realign_kernels":
                assert module == top and imported in realign_kernels.__all__, (file, imported)


def test_rooms_import_lower_layers_only():
    graph = rooms(imports(ROOT, "realign")) | rooms(imports(ROOT, "realign_kernels"))
    ours = {name.partition(".")[2] for name in graph if name.startswith("realign.")}
    assert ours == set(LEVEL)
    for name, others in graph.items():
        package, _, above = name.partition(".")
        level = LEVEL if package == "realign" else KERNEL_LEVEL
        for below in (other.partition(".")[2] for other in others if name != "realign_kernels"):
            both_ground = above in GROUND and below in GROUND
            assert both_ground or level[above] > level[below], f"{name} imports {below}"


def test_nothing_imports_an_entry_point():
    for module, others in imports(ROOT, "realign").items():
        inside = room(module)
        for other in others:
            entry = other.endswith("__main__") or room(other).partition(".")[2] in ENTRIES
            assert not entry or inside == room(other), f"{module} imports {other}"


def test_there_is_no_import_circle():
    for package in ("realign", "realign_kernels", "benchmarks", "experiments"):
        assert (graph := imports(ROOT, package)), package
        TopologicalSorter(graph).prepare()  # raises CycleError, with the circle
        if package.startswith("realign"):
            TopologicalSorter(rooms(graph)).prepare()


def test_files_are_short():
    long = {
        str(file): count
        for file in chain(FILES.values(), (ROOT / "csrc").rglob("*.*"))
        if (count := len(file.read_text().splitlines())) > MOST_LINES
    }
    assert not long


def test_modules_and_public_names_have_docstrings():
    bare = []
    for name, file in FILES.items():
        tree = ast.parse(file.read_text())
        bare += [name] if tree.body and not ast.get_docstring(tree) else []
        bare += [
            f"{name}.{node.name}"
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            and not node.name.startswith("_")
            and not ast.get_docstring(node)
            and not _fields_have_strings(node)
        ]
    assert not bare


def _fields_have_strings(node: ast.FunctionDef | ast.ClassDef) -> bool:
    """Whether every field of a settings class has a string; the class needs no docstring then."""
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    after = [b for a, b in zip(node.body, node.body[1:], strict=False) if a in fields]
    strings = [n for n in after if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    return bool(fields) and len(strings) == len(fields)


def test_no_file_names_a_machines_folders():
    folders = tuple(f"/{name}/" for name in ("work", "tmp", "root", "home"))
    ours = re.compile(
        r"(realign|realign_kernels|experiments|csrc|tests|benchmarks|docs|examples|\.ci|\.github)/"
    )
    files = [f for f in ROOT.glob("**/*") if ours.match(str(f.relative_to(ROOT)))]
    seen = 0
    for file in [*files, *ROOT.glob("*")]:
        mine = "__pycache__" not in file.parts and file.name != ".git"  # it is a file in a worktree
        if mine and file.is_file() and file.suffix in TEXT:
            text = file.read_text(errors="replace")
            assert not [f for f in folders if f in text], f"{file} holds a machine path"
            seen += 1
    assert seen > 40
