"""The shape of the project: who imports whom, how long a file may be, what every name explains."""

import ast
from pathlib import Path

import pytest

import realign_kernels

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*ROOT.glob("realign/**/*.py"), *ROOT.glob("realign_kernels/**/*.py")])
LONGEST = 400  # lines
TEXT = {".py", ".toml", ".md", ".txt", ".cpp", ".h", ".hpp", ".cu", ".cuh", ".cmake", ".json", ""}


def _name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def _imports(file: Path) -> list[tuple[str, str | None]]:
    """(module, name) of every import of a file, wherever it stands; name None for a module."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_name(file)}: imports are absolute"
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


def test_there_are_files_to_look_at():
    assert {"realign/train.py", "realign/pairs/masking/mask.py", "realign_kernels/ops.py"} <= set(
        map(_name, FILES)
    )


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_imports_go_one_way(file):
    for module, name in _imports(file):
        top = module.split(".")[0]
        if file.is_relative_to(ROOT / "realign_kernels"):
            assert top not in ("realign", "transformers", "peft", "datasets")
        elif top == "realign_kernels":
            assert module == "realign_kernels", f"{module}: use the names realign_kernels exports"
            assert name in realign_kernels.__all__, f"{name} is not public"


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_files_stay_small(file):
    assert len(file.read_text().splitlines()) <= LONGEST


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_public_names_are_explained(file):
    tree = ast.parse(file.read_text())
    if tree.body:
        assert ast.get_docstring(tree), "the file does not say what it is"
    bare = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
        and not _fields_are_explained(node)
    ]
    assert not bare


def _fields_are_explained(node: ast.AST) -> bool:
    """Whether every field of a settings class has its string, which stands for a docstring."""
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    after = [b for a, b in zip(node.body, node.body[1:], strict=False) if a in fields]
    strings = [n for n in after if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    return bool(fields) and len(strings) == len(fields)


def test_no_file_names_a_machines_folders():
    folders = tuple(f"/{name}/" for name in ("work", "tmp", "root", "home"))
    parts = ("realign", "realign_kernels", "csrc", "tests", "benchmarks", "docs", "examples", ".ci")
    files = [f for part in parts for f in ROOT.glob(f"{part}/**/*")] + list(ROOT.glob("*"))
    seen = 0
    for file in files:
        ours = "__pycache__" not in file.parts and file.name != ".git"  # a worktree's is a file
        if ours and file.is_file() and file.suffix in TEXT:
            text = file.read_text(errors="replace")
            assert not [f for f in folders if f in text], f"{_name(file)} holds a machine path"
            seen += 1
    assert seen > 40
