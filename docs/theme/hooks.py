"""MkDocs hooks: pages made of files outside docs/, links between them, and help texts.

The Markdown of the repository is written for GitHub. On the site these hooks change it:

- `README.md` appears on the start page, `CHANGELOG.md`, `CONTRIBUTING.md` and `examples/README.md`
  as pages of their own;
- a link to one of these files leads to its page;
- a link to a source file leads to `repo_url`. Without `repo_url` in mkdocs.yml it is plain text;
- `reference/commands.md` shows the `--help` text of every command.
"""

from __future__ import annotations

import io
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import cache
from importlib import import_module
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/README.md": "examples.md",
}
"""Files outside docs/ and the pages that show them."""
SHOWN = PAGES | {"README.md": "index.md", "docs": "index.md", "examples": "examples.md"}
COPIED = (".md", ".png", ".svg")
"""Endings of the files in docs/ that the site has."""
COMMANDS = {
    "realign.pairs": ("", "gallery", "stats", "import"),
    "realign.train": ("",),
    "realign.cache": ("", "fill", "stats", "verify", "compact"),
    "realign.evaluate": ("", "pope", "chair", "hallusionbench", "compare", "gallery", "handoff"),
    "realign.export": ("",),
    "realign.doctor": ("",),
    "realign.demo": ("",),
}
"""Modules with a command line, each with its subcommands."""
COLUMNS = 84  # of a code block beside the table of contents
LINK = re.compile(
    r"(?P<label>!?\[(?:[^\[\]]|\[[^\]]*\])*\])\((?P<target>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)"
)
FENCE = re.compile(r"(?ms)^( *)(```+|~~~+).*?^\1\2 *$")


def on_files(files, config):
    """Add the pages of `PAGES`."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Return the Markdown of a page as the site renders it."""
    path = page.file.src_uri
    sources = {shown: source for source, shown in PAGES.items()}
    source = sources.get(path, f"docs/{path}")
    markdown = relink(markdown, source, path, config.repo_url)
    if path == "index.md":
        markdown = _with_readme(markdown, config.repo_url)
    if path == "reference/commands.md":
        markdown = _between(markdown, "help", "\n".join(help_sections()))
    return for_python_markdown(markdown)


def on_page_content(html: str, page, config, files) -> str:
    """Mark short inline code, which the style sheet does not break at hyphens."""
    return re.sub(r"(?<!<pre>)<code>(?=[^<\s]{1,28}</code>)", '<code class="short">', html)


def relink(text: str, source: str, page: str, repo_url: str | None) -> str:
    """Rewrite the relative links of a text.

    Args:
        text: Markdown.
        source: its file, relative to the root of the repository; links are relative to it.
        page: the page that shows it, relative to docs/.
        repo_url: address of the repository; without it, links to source files become plain text.
    """

    def link(match: re.Match) -> str:
        label, target, anchor = match["label"], match["target"], match["anchor"] or ""
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        copied = path.startswith("docs/") and path.endswith(COPIED)
        shown = path.removeprefix("docs/") if copied else SHOWN.get(path)
        if shown is not None:
            here = posixpath.relpath(shown, posixpath.dirname(page) or ".")
            return f"{label}({here}{anchor})"
        if repo_url:
            return f"{label}({repo_url.rstrip('/')}/blob/main/{path}{anchor})"
        return label.removeprefix("!")[1:-1]

    def part(prose: str) -> str:
        return LINK.sub(link, re.sub(r"(?s)<picture>.*?</picture>|<img .*?>", _image, prose))

    return _outside_fences(text, part)


def for_python_markdown(text: str) -> str:
    """Change Markdown that GitHub and Python-Markdown read differently.

    Python-Markdown needs an empty line before a list, and only a language after a fence. Commands
    here have no prompt, so they are highlighted as shell scripts.
    """
    text = re.sub(r"(?m)^( *```+\w+) .*$", r"\1", text)
    text = re.sub(r"(?m)^( *```+)console$", r"\1bash", text)

    def part(prose: str) -> str:
        prose = re.sub(r"(?ms)^<!--(?:(?!-->).)*-->[ \t]*$", "", prose)
        item = r"(?:[-*+]|\d+\.) "
        return re.sub(rf"(?m)^(?!\s*{item}|\s*$|[|#>]| +)(.*)\n(?={item})", r"\1\n\n", prose)

    return _outside_fences(text, part)


def _image(tag: re.Match) -> str:
    """Markdown for `<img>`, or for `<picture>`: an image for each color scheme of the site."""
    light = re.search(r'<img [^>]*?src="([^"]*)"', tag[0])
    alt = re.search(r'alt="([^"]*)"', tag[0])
    if not light or not alt:
        raise ValueError(f"an image needs src and alt: {tag[0]}")
    if not (dark := re.search(r'dark\)" srcset="([^"]*)"', tag[0])):
        return f"![{alt[1]}]({light[1]})"
    return f"![{alt[1]}]({light[1]}#only-light) ![{alt[1]}]({dark[1]}#only-dark)"


def help_sections() -> Iterator[str]:
    """Yield a Markdown section for each command and subcommand."""
    for module, subcommands in COMMANDS.items():
        for subcommand in subcommands:
            name = f"{module} {subcommand}".strip()
            yield f"{'###' if subcommand else '##'} {name}\n"
            yield f"```text\n{help_text(module, subcommand)}\n```\n"


@cache
def help_text(module: str, subcommand: str) -> str:
    """The text that `python -m MODULE SUBCOMMAND --help` prints."""
    try:
        main = import_module(f"{module}.__main__").main
    except ModuleNotFoundError:
        main = import_module(module).main
    shown = io.StringIO()
    width = {"COLUMNS": str(COLUMNS), "NO_COLOR": "1"}
    with mock.patch.dict(os.environ, width), redirect_stdout(shown):
        try:
            main([*subcommand.split(), "--help"])
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"python -m {module} {subcommand} --help failed") from end
    return shown.getvalue().strip()


def _with_readme(text: str, repo_url: str | None) -> str:
    """Put the README into the start page: its introduction first, its sections last."""
    readme = relink((ROOT / "README.md").read_text(), "README.md", "index.md", repo_url)
    introduction, *sections = re.split(r"(?m)^(?=## )", readme)
    introduction = re.sub(r"(?m)^# .*$", "", introduction, count=1)  # the page has this title
    text = _between(text, "introduction", introduction)
    return _between(text, "sections", "".join(sections))


def _between(text: str, name: str, new: str) -> str:
    """Replace the text between `<!-- NAME -->` and `<!-- /NAME -->`."""
    pattern = rf"(?s)<!-- {name} -->.*?<!-- /{name} -->"
    found, count = re.subn(pattern, lambda _: new, text)
    if count != 1:
        raise ValueError(f"expected one block <!-- {name} --> in the page, found {count}")
    return found


def _outside_fences(text: str, change: Callable[[str], str]) -> str:
    """Apply a function to the parts of a text between its fenced blocks."""
    parts, end = [], 0
    for fence in FENCE.finditer(text):
        parts += [change(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(text[end:])])
