"""The page on security: each promise names tests that exist."""

import ast
import re

import pages

PAGE = pages.ROOT / "docs" / "security.md"


def test_each_promise_names_its_tests():
    text = PAGE.read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if "tests/" in line and "|" in line]
    assert len(rows) > 10
    for threat, promise, tests in rows:
        assert threat.strip() and promise.strip()
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
        assert named, f"{promise} has no test"
        for file, name in named:
            tree = ast.parse((pages.ROOT / file).read_text())
            functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert name in functions, f"{file} has no test {name}"
