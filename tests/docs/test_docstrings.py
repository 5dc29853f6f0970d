"""Docstrings of public functions name the errors they raise and the shapes they take."""

import ast
import inspect
import re
from pathlib import Path

import realign_kernels

ROOT = Path(__file__).parents[2]
FILES = [
    file for package in ("realign", "realign_kernels") for file in (ROOT / package).rglob("*.py")
]
ARRAYS = re.compile(r"\b(Tensor|ndarray)\b")
SHAPE = re.compile(r"\(([A-Z]|[a-z]+\b|\*|\d|\.\.\.)[^)]*\)|\b(scalar|shape|0-d|one number)\b")


def public(tree, inside=""):
    """(name, node) of public functions and of public methods of public classes."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public(node, f"{node.name}.")
        named = isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        if named and node.name != "main":  # it turns errors into an exit code
            yield inside + node.name, node


def raised(node):
    """Names of the exceptions that a function raises and does not catch itself."""
    tries = [part for part in ast.walk(node) if isinstance(part, ast.Try) and part.handlers]
    caught = {id(n) for part in tries for statement in part.body for n in ast.walk(statement)}
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Raise) and isinstance(part.exc, ast.Call):
            name = ast.unparse(part.exc.func).rpartition(".")[2]
            if name[0].isupper() and id(part) not in caught:
                found.add(name)
    return found - {"NotImplementedError", "SystemExit"}


def test_docstrings_name_the_errors_that_public_functions_raise():
    unnamed = [
        f"{file}: {name} raises {error}"
        for file in FILES
        for name, node in public(ast.parse(file.read_text()))
        for error in raised(node)
        if not re.search(
            rf"Raises:[\s\S]*\b{error}\b|^Refuses |Raises as ", ast.get_docstring(node) or ""
        )
    ]
    assert not unnamed


def exported():
    """The functions that realign_kernels exports."""
    for name in realign_kernels.__all__:
        value = getattr(realign_kernels, name)
        if inspect.isfunction(value):
            yield name, value


def test_arrays_of_the_public_functions_have_shapes():
    """A shape is in the comment beside the parameter, or in the docstring."""
    count = 0
    for name, function in exported():
        doc, source = inspect.getdoc(function) or "", inspect.getsource(function)
        signature = inspect.signature(function)
        for parameter in signature.parameters.values():
            if not ARRAYS.search(str(parameter.annotation)):
                continue
            count += 1
            entry = rf"^ +(?:\w+, )*{parameter.name}(?:, \w+)*: ([\s\S]*?)(?=\n {{0,6}}\w|\Z)"
            comment = rf"^ +{parameter.name}: .*# (.*)"
            texts = [re.search(entry, doc, re.MULTILINE), re.search(comment, source, re.MULTILINE)]
            assert any(t and SHAPE.search(t[1]) for t in texts), f"{name}({parameter.name})"
        if ARRAYS.search(str(signature.return_annotation)):
            comment = re.search(r"^\) -> .*?# (.*)", source, re.MULTILINE)
            texts = (
                doc.partition("Returns:")[2],
                doc.split("\n")[0],
                comment[1] if comment else "",
            )
            assert any(map(SHAPE.search, texts)), name
    assert count > 15
