"""Prose metrics and word list: `python tests/helpers/prose.py [ROOT] [--list PATH ...]`.

Counts words, sentences, long sentences, semicolons and banned words in Markdown, in docstrings,
comments and messages of Python, and in comments and messages of C++. `--list` prints each finding
with its file and line.
"""

import argparse
import ast
import inspect
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_WORDS = 25  # in a sentence
LEAST_WORDS = 4  # of a string that counts as a message
NOT_PROSE = {"prose.py", "prompts.py"}
"""Files that are not counted: patterns of this script, and prompts that are sent to models."""
AREAS = ("README.md", "docs", "other pages", "realign", "realign_kernels", "csrc", "benchmarks")
AREAS += ("experiments", "examples", "tests")
C_LIKE = {".cpp", ".h", ".cu", ".cuh"}
SHELL = {".sh", ".toml", ".yml", ".yaml", ".cmake"}


def word_list() -> dict[str, str]:
    """Banned words and phrases, each with its replacement, from `words.txt` and `phrases.txt`."""
    found = {}
    for name in ("words.txt", "phrases.txt"):
        for line in (ROOT / "tests" / "docs" / name).read_text().splitlines():
            banned, arrow, instead = line.partition("->")
            if arrow and not line.startswith("#"):
                found[banned] = instead
    return found


@dataclass(frozen=True)
class Text:
    """A paragraph, list item, table cell or message, without code."""

    file: Path
    line: int
    words: str


def prose_of(file: Path) -> Iterator[Text]:
    """Yields the texts of one file."""
    source = file.read_text(errors="replace")
    if file.suffix == ".md":
        yield from _markdown(file, source, 1)
    elif file.suffix == ".py":
        yield from _python(file, source)
    elif file.suffix in C_LIKE:
        yield from _c_like(file, source)
    elif file.suffix == ".ipynb":
        import json

        for number, cell in enumerate(json.loads(source)["cells"], 1):
            text = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                yield from _markdown(file, text, number)
            else:
                yield from _python(file, re.sub(r"^[%!].*", "", text, flags=re.MULTILINE))
    elif file.suffix in SHELL or file.name in ("Makefile", "CMakeLists.txt"):
        yield from _comments(file, re.finditer(r"(?m)^\s*#(?!!) ?(.*)$", source), source)


def _markdown(file: Path, source: str, first: int) -> Iterator[Text]:
    source = re.sub(r"(?ms)^( *)(```|~~~).*?^\1\2", _blank, source)
    source = re.sub(r"(?s)<!--.*?-->|<style.*?</style>|<svg.*?</svg>|\$\$.*?\$\$", _blank, source)
    source = re.sub(r"(?m)^ {4,}(?![-*\d ]).*$", _blank, source) if first == 1 else source
    start, lines = 0, []
    for number, line in enumerate([*source.split("\n"), ""], first):
        item = re.match(r"\s*([-*+]|\d+\.|\[\^?\w+\]:|#+|>|!!!|\?\?\?)\s+", line)
        cells = line.strip().startswith("|")
        if not line.strip() or item or cells:
            if lines:
                yield Text(file, start, _plain(" ".join(lines)))
            lines = []
        if cells:
            for cell in line.strip().strip("|").split("|"):
                if not re.fullmatch(r"[\s:-]*", cell):
                    yield Text(file, number, _plain(cell))
        elif line.strip():
            start = start if lines else number
            lines.append(line[item.end() :] if item else line.strip())
        if line.startswith("#") and lines:
            yield Text(file, number, _plain(lines.pop()))


def _blank(match: re.Match) -> str:
    return "\n" * match[0].count("\n")


def _plain(text: str) -> str:
    text = re.sub(r"`[^`]*`", "CODE", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"<[^>]*>|https?://\S+|[*_]{2}", " ", text)
    return " ".join(text.split())


def _python(file: Path, source: str) -> Iterator[Text]:
    tree = ast.parse(source)
    inner = {id(v) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for v in n.values}
    for node in ast.walk(tree):
        text = None
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            text = node.value
        elif isinstance(node, ast.JoinedStr):
            parts = (v.value if isinstance(v, ast.Constant) else "CODE" for v in node.values)
            text = "".join(map(str, parts))
        if text and len(re.findall(r"[a-zA-Z]{2,}", text)) >= LEAST_WORDS and not _is_code(text):
            yield from _docstring(file, text, node.lineno)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = ((t.start[0], t.string.lstrip("#! ")) for t in tokens if t.type == tokenize.COMMENT)
    yield from _joined(file, found)


def _is_code(text: str) -> bool:
    """Whether a string holds a template or a Python program."""
    if "{%" in text or "{{" in text:
        return True
    try:
        return "\n" in text.strip() and bool(ast.parse(inspect.cleandoc(text)))
    except SyntaxError:
        return False


def _docstring(file: Path, text: str, first: int) -> Iterator[Text]:
    """Paragraphs; each entry of Args, Returns and Raises is one."""
    start, lines = first, []
    for number, line in enumerate([*text.split("\n"), ""], first):
        entry = re.match(r"\s*(\*{0,2}\w+(, \*{0,2}\w+)*:|[-*]|\d+\.|>>>)\s", line + " ")
        if not line.strip() or entry:
            if lines:
                yield Text(file, start, _plain(" ".join(lines)))
            lines = []
        code = re.match(r"\s*(>>>|\.\.\.|python |pip |make |\|)|( {4})+\S+( \S+)* = ", line)
        if line.strip() and not code:
            start = start if lines else number
            lines.append(line.strip())


def _c_like(file: Path, source: str) -> Iterator[Text]:
    pattern = r"(?m)^[^\"\n]*?//+!?<? ?(.*)$"
    yield from _comments(file, re.finditer(pattern, source), source)
    for match in re.finditer(r"(?s)/\*(.*?)\*/", source):
        yield from _docstring(
            file, re.sub(r"(?m)^\s*\* ?", "", match[1]), source[: match.start()].count("\n") + 1
        )
    for match in re.finditer(r'(?:"(?:[^"\\\n]|\\.)*"\s*)+', source):
        text = "".join(re.findall(r'"((?:[^"\\\n]|\\.)*)"', match[0]))
        if len(re.findall(r"[a-zA-Z]{2,}", text)) >= LEAST_WORDS:
            yield Text(file, source[: match.start()].count("\n") + 1, _plain(text))


def _comments(file: Path, matches: Iterator[re.Match], source: str) -> Iterator[Text]:
    yield from _joined(file, ((source[: m.end()].count("\n") + 1, m[1].strip()) for m in matches))


def _joined(file: Path, comments: Iterator[tuple[int, str]]) -> Iterator[Text]:
    """Comments on lines that follow each other are one text."""
    start, last, lines = 0, -1, []
    for number, text in [*comments, (1 << 30, "")]:
        if number != last + 1 or not text:
            if lines:
                yield Text(file, start, _plain(" ".join(lines)))
            start, lines = number, []
        if text and not re.match(r"noqa|type:|pyright:|fmt:|%%|pragma", text):
            start = start if lines else number
            lines.append(text)
        last = number


def sentences(text: str) -> list[str]:
    """Splits a paragraph at full stops, question marks and exclamation marks."""
    guarded = re.sub(r"\b(e\.g|i\.e|vs|cf|etc|al|Fig|Eq|No)\. ", r"\1_ ", text)
    return [s for s in re.split(r"(?<=[.!?])[)\"'”]?\s+(?=\S)", guarded) if s.strip()]


def words(sentence: str) -> list[str]:
    """Words with a letter; figures, signs and settings such as a=b do not count."""
    return [w for w in sentence.split() if re.search(r"[A-Za-z]", w) and "=" not in w]


def banned(text: str, listed: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(word or phrase, replacement) for each banned one in a text."""
    for phrase, instead in listed.items():
        for found in re.finditer(rf"(?<![\w-]){phrase}(?![\w-])", text, re.IGNORECASE):
            yield found[0], instead


def files(root: Path, paths: list[str] | None = None) -> list[Path]:
    """Tracked files of a checkout that hold prose."""
    command = ["git", "-C", str(root), "ls-files", "-co", "--exclude-standard", *(paths or [])]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    kinds = {".md", ".py", ".ipynb", *C_LIKE, *SHELL}
    plain = ("Makefile", "CMakeLists.txt")
    return [
        root / name
        for name in names
        if (Path(name).suffix in kinds or Path(name).name in plain)
        and (root / name).is_file()
        and Path(name).name not in NOT_PROSE
    ]


def area(root: Path, file: Path) -> str:
    """The row of the table that a file counts in."""
    top = file.relative_to(root).parts[0]
    return top if top in AREAS else "other pages"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("root", nargs="?", type=Path, default=ROOT)
    parser.add_argument("--list", nargs="+", metavar="PATH", help="findings in these paths")
    args = parser.parse_args()
    root, listed = args.root.resolve(), word_list()
    rows = {name: Counter() for name in (*AREAS, "all")}
    for file in files(root, args.list):
        for text in prose_of(file):
            parts = sentences(text.words)
            long = [s for s in parts if len(words(s)) > MOST_WORDS]
            bad = list(banned(text.words, listed))
            count = Counter(
                words=len(words(text.words)), sentences=len(parts), long=len(long),
                semicolons=text.words.count(";"), banned=len(bad),
                asides=len(re.findall(r"\b(?:what|who|whose|which of)\b", text.words, re.I)),
            )  # fmt: skip
            rows[area(root, file)] += count
            rows["all"] += count
            if args.list:
                place = f"{file.relative_to(root)}:{text.line}"
                for sentence in long:
                    print(f"{place}: {len(words(sentence))} words: {sentence}")
                for word, instead in bad:
                    print(f"{place}: '{word}' -> '{instead}': {text.words[:120]}")
                if text.words.count(";") > 1:
                    print(f"{place}: {text.words.count(';')} semicolons: {text.words[:120]}")
    print(f"{'':16}   words sentences  over {MOST_WORDS}  ; per 1000  what/who per 1000  banned")
    for name, count in rows.items():
        if total := count["words"]:
            print(
                f"{name:16}{count['words']:8}{count['sentences']:10}{count['long']:9}"
                f"{1000 * count['semicolons'] / total:12.1f}"
                f"{1000 * count['asides'] / total:19.1f}{count['banned']:8}"
            )
    sys.exit(bool(args.list and (rows["all"]["banned"] or rows["all"]["long"])))


if __name__ == "__main__":
    main()
