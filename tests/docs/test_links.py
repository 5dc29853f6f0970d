"""Links between pages lead to files and headings, and the navigation of the site is complete."""

import importlib.util
import re

import pages
import pytest

import realign_kernels

HOOKS = pages.ROOT / "docs" / "theme" / "hooks.py"
REFERENCE = pages.ROOT / "docs" / "reference"


def _hooks():
    spec = importlib.util.spec_from_file_location("hooks", HOOKS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = _hooks()


def test_relative_links_lead_to_files_and_headings():
    broken, count = [], 0
    for page in {*pages.PAGES, *pages.HISTORY}:
        for file, anchor in pages.links(page):
            count += 1
            target = page if not file else (page.parent / file).resolve()
            if not target.exists() or not target.is_relative_to(pages.ROOT):
                broken.append(f"{pages.name_of(page)}: {file}")
            elif anchor and anchor not in pages.anchors(target):
                broken.append(f"{pages.name_of(page)}: {file}#{anchor}")
    assert not broken
    assert count > 80


def test_every_page_is_in_the_navigation():
    listed = set(
        re.findall(r"(?m)^ +- [^:\n]+: (\S+\.md)$", (hooks.ROOT / "mkdocs.yml").read_text())
    )
    docs = {p.relative_to(pages.ROOT / "docs").as_posix() for p in pages.PAGES if "docs" in p.parts}
    assert listed == docs | set(hooks.PAGES.values())
    start = (pages.ROOT / "docs" / "index.md").read_text()
    for page in docs - {"index.md"}:
        assert f"({page})" in start, f"docs/index.md does not link {page}"


def test_the_reference_holds_every_public_name():
    text = "\n".join(page.read_text() for page in REFERENCE.glob("*.md"))
    listed = set(re.findall(r"(?m)^::: ([\w.]+)$", text))
    modules = {"objectives", "refcache"}  # the first is listed as a whole, the second by name
    elsewhere = {"Leaf", "Objective"} & set(realign_kernels.objectives.__all__)
    for name in set(realign_kernels.__all__) - modules - elsewhere:
        assert f"realign_kernels.{name}" in listed, name
    for name in realign_kernels.refcache.__all__:
        names = {f"realign_kernels.{name}", f"realign_kernels.refcache.{name}"}
        assert names & listed, name
    assert "realign_kernels.objectives" in listed


@pytest.mark.parametrize(
    ("source", "page", "repo_url", "before", "after"),
    [
        ("docs/a.md", "a.md", None, "[x](../README.md#install)", "[x](index.html#install)"),
        ("docs/a.md", "a.md", None, "[x](b.md#c)", "[x](b.md#c)"),
        ("docs/r/a.md", "r/a.md", None, "[x](../../CHANGELOG.md)", "[x](../changelog.md)"),
        ("README.md", "index.md", None, "![x](docs/b/c.png)", "![x](b/c.png)"),
        ("README.md", "index.md", None, "[`a`](realign/train.py) b", "`a` b"),
        (
            "README.md",
            "index.md",
            "https://h/r",
            "[a](cli.py)",
            "[a](https://h/r/blob/main/cli.py)",
        ),
        (
            "README.md",
            "index.md",
            None,
            "[a](https://b.c/d), [e](#f)",
            "[a](https://b.c/d), [e](#f)",
        ),
        ("README.md", "index.md", None, "```text\n[a](cli.py)\n```", "```text\n[a](cli.py)\n```"),
    ],
)
def test_links_on_the_site(source, page, repo_url, before, after):
    assert hooks.relink(before, source, page, repo_url) == after.replace("index.html", "index.md")


def test_images_for_both_color_schemes():
    text = """<picture>
  <source media="(prefers-color-scheme: dark)" srcset="docs/i/dark.svg">
  <img src="docs/i/a.svg" width="880" alt="A chart">
</picture>"""
    wanted = "![A chart](i/a.svg#only-light) ![A chart](i/dark.svg#only-dark)"
    assert hooks.relink(text, "README.md", "index.md", None) == wanted
    with pytest.raises(ValueError, match="needs src and alt"):
        hooks.relink('<img src="docs/i/a.svg">', "README.md", "index.md", None)


def test_markdown_that_only_github_reads():
    text = "<!-- a: generated -->\nText:\n- one\n- two\n\n```python name\n- x\n```\n"
    wanted = "\nText:\n\n- one\n- two\n\n```python\n- x\n```\n"
    assert hooks.for_python_markdown(text) == wanted


def test_the_help_of_every_command_is_shown():
    text = "".join(hooks.help_sections())
    for module, subcommands in hooks.COMMANDS.items():
        for subcommand in filter(None, subcommands):
            assert f"### {module} {subcommand}\n" in text
        assert f"python -m {module}" in text
    assert "--learning-rate" in text and "McNemar" in text
