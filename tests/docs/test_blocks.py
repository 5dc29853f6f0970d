"""Every fenced block and command of README.md, CONTRIBUTING.md, docs/ and examples/README.md.

Python blocks run, here or in the test that `RUN_BY` names. A comment `<!-- not run: REASON -->`
before a block exempts it; its imports and keyword arguments are checked then. Commands are parsed
by the parsers of their programs.
"""

import argparse
import ast
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pages
import pytest
from adapter_kinds import perturb
from PIL import Image

from realign import config, export
from realign.cli import parse_sections
from realign.data.images import StoredImage
from realign.data.records import Record, write_pairs
from realign.digits import ASSETS
from realign.evaluate import __main__ as evaluate
from realign.evaluate.digits import EvaluateConfig
from realign.modeling.loading import add_lora, load_model, load_processor
from realign.pairs.config import PairsConfig

ROOT = pages.ROOT
BLOCKS = [block for page in pages.PAGES for block in pages.blocks(page)]
CONSOLE = [block for block in BLOCKS if block.language in ("console", "bash", "sh", "shell")]
PYTHON = [block for block in BLOCKS if block.language == "python"]
LANGUAGES = {"console", "bash", "sh", "shell", "python", "json", "toml", "text", "bibtex", ""}
RUN_BY = {
    "README.md": "docs/test_readme.py",
    "docs/adding-an-objective.md": "kernels/test_adding_an_objective.py",
    "docs/data.md": "docs/test_data_page.py",
    "docs/objectives.md": "kernels/test_adding_an_objective.py",
    "docs/reference-cache.md": "commands/test_cache_command.py",
}
"""Pages whose Python blocks another test runs."""
FOREIGN = {"vllm", "lmms-eval", "wget", "unzip", "curl", "git", "cd", "source"}
"""Programs of others, whose arguments are not checked."""
TOOLS = {"pip", "pre-commit"}  # in .venv/bin


def test_every_block_has_a_known_language():
    assert len(BLOCKS) > 25
    assert [str(block) for block in BLOCKS if block.language not in LANGUAGES] == []


# Python


def test_other_tests_run_the_blocks_of_their_pages():
    for page, test in RUN_BY.items():
        source = (ROOT / "tests" / test).read_text()
        assert Path(page).name in source and "exec(compile(" in source, (page, test)


def _dialogues(folder):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    dialogues = [{"id": i, "image": f"{i % 2}.jpg", "conversations": turns} for i in range(4)]
    (folder / "llava_instruct_150k.json").write_text(json.dumps(dialogues))


def _trained_run(folder):
    """A run with an adapter, the base under its name on the hub, a photograph and a record."""
    (folder / "llava-hf").mkdir()
    (folder / "llava-hf" / "llava-1.5-7b-hf").symlink_to(ASSETS)
    adapter = add_lora(load_model(ASSETS), 4, 8.0)
    perturb(adapter)
    adapter.save_pretrained(folder / "run" / "model")
    load_processor(ASSETS).save_pretrained(folder / "run" / "model")
    photo = Image.new("RGB", (64, 64), "white")
    photo.save(folder / "photo.jpg")
    prompt = ({"role": "user", "content": "name the digits ."},)
    image = StoredImage.from_pil(photo)
    record = Record("white", prompt, "top left five .", "top left six .", (image,))
    write_pairs(folder / "pairs.parquet", [record])


PREPARE = {"docs/pairs.md": _dialogues, "docs/serve.md": _trained_run}
"""Makes the files that the blocks of a page read."""
RUN_HERE = sorted({pages.name_of(b.page) for b in PYTHON if b.reason is None} - RUN_BY.keys())


@pytest.mark.parametrize("page", RUN_HERE)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    PREPARE.get(page, lambda folder: None)(tmp_path)
    names = {"__name__": "page"}
    for block in PYTHON:
        if pages.name_of(block.page) == page and block.reason is None:
            exec(compile("\n" * block.line + block.code, page, "exec"), names)


def test_blocks_that_do_not_run_fit_the_functions_they_call():
    checked = 0
    for block in PYTHON:
        if block.reason is not None:
            assert len(block.reason) > 5, f"{block}: no reason"
            checked += _check_calls(block)
    assert checked >= 4


def _check_calls(block) -> int:
    """Compile a block, import its names and bind the arguments of its calls; counts the calls."""
    tree, names, count = ast.parse(block.code), {}, 0
    compile(tree, str(block), "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = importlib.import_module(alias.name)
                top = alias.name.partition(".")[0]
                names[alias.asname or top] = module if alias.asname else sys.modules[top]
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            names |= {a.asname or a.name: getattr(module, a.name) for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (function := _resolve(node.func, names)) is not None:
            try:
                signature = inspect.signature(function)
            except (TypeError, ValueError):
                continue
            whole = all(k.arg for k in node.keywords) and not any(
                isinstance(a, ast.Starred) for a in node.args
            )
            bind = signature.bind if whole else signature.bind_partial
            given = {k.arg: None for k in node.keywords if k.arg}
            try:
                bind(*[None for a in node.args if not isinstance(a, ast.Starred)], **given)
            except TypeError as error:
                pytest.fail(f"{block}: {ast.unparse(node.func)}: {error}")
            count += 1
    return count


def _resolve(node, names):
    """The object that an expression such as `a.b` names, or None for a local name."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and (inside := _resolve(node.value, names)) is not None:
        return getattr(inside, node.attr)
    return None


# JSON and TOML


def test_json_and_toml_blocks_are_valid(tmp_path):
    for block in BLOCKS:
        if block.language == "json":
            json.loads(block.code)
        elif block.language == "toml":
            file = tmp_path / "block.toml"
            file.write_text(block.code)
            _read_settings(file)


def _read_settings(file):
    """Read a TOML file by the command that has its sections."""
    sections = set(tomllib.loads(file.read_text()))
    for name, cls in {"pairs": PairsConfig, "evaluate": EvaluateConfig}.items():
        if sections == {name}:
            return parse_sections(
                {name: cls}, prog="", description="", arguments=["--config", file]
            )
    return config.parse(["--config", str(file)])


def test_a_toml_block_with_an_unknown_key_is_found(tmp_path):
    file = tmp_path / "block.toml"
    file.write_text("[loss]\nbeta = 0.2\n[optim]\nbatch_size = 8\n")
    assert _read_settings(file).loss.beta == 0.2
    file.write_text("[loss]\nbetta = 0.2\n")
    with pytest.raises(ValueError, match="betta"):
        _read_settings(file)


# Commands


def _commands(block):
    """The commands of a block, in words, without environment variables."""
    for line in block.code.replace("\\\n", " ").splitlines():
        for part in line.split("&&"):
            words = shlex.split(part.removeprefix("$ "), comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words:
                yield words


class Parsed(BaseException):
    """Ends a command once its arguments are parsed; no command catches it."""


@pytest.fixture
def parse(monkeypatch, capsys):
    """Parse the arguments of `python -m MODULE` by its own code, without running it."""

    def run(module, words):
        found = importlib.import_module(_main_module(module))
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [module, *words])
            # No abbreviated flags: they would end with the next flag of that beginning.
            patch.setattr(argparse.ArgumentParser, "_get_option_tuples", lambda *_: [])
            inside = []
            owners = {argparse.ArgumentParser: "parse_args", found: "parse_sections"}
            if hasattr(found, "parse"):
                owners[found] = "parse"
            for owner, name in owners.items():
                if hasattr(owner, name):
                    patch.setattr(owner, name, _then_stop(getattr(owner, name), inside))
            takes_words = inspect.signature(found.main).parameters
            try:
                code = found.main(words) if takes_words else found.main()
            except Parsed:
                return None
            except SystemExit as end:
                code = end.code
        helped = code in (0, None) and "--help" in words
        return None if helped else f"exit code {code}: {capsys.readouterr().err}"

    return run


def _main_module(module):
    package = importlib.util.find_spec(module).submodule_search_locations is not None
    return f"{module}.__main__" if package else module


def _then_stop(function, inside):
    """`function`, which raises Parsed at its end; one such function may call another."""

    def stop(*args, **kwargs):
        if inside:
            return function(*args, **kwargs)
        inside.append(function)
        try:
            function(*args, **kwargs)
        finally:
            inside.clear()
        raise Parsed

    return stop


TARGETS = set(re.findall(r"(?m)^([\w-]+):", (ROOT / "Makefile").read_text()))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
NO_ARGUMENTS = {"benchmarks.report"}


def _problem(words, parse):
    """What is wrong with a command, or None."""
    program, *rest = words
    if program in FOREIGN:
        return None
    if program == "make":
        return ", ".join({w for w in rest if "=" not in w} - TARGETS) or None
    if program == "bash":
        program, *rest = rest
    if program.startswith(".venv/bin/"):
        program = program.removeprefix(".venv/bin/")
    if program == "pip" or (program in ("python", "python3") and rest[:2] == ["-m", "pip"]):
        asked = set(re.findall(r"\[([\w,-]+)\]", " ".join(rest)))
        return ", ".join({e for names in asked for e in names.split(",")} - EXTRAS.keys()) or None
    if program in TOOLS:
        return None
    if program in ("python", "python3", "torchrun", "accelerate") and "-m" in rest:
        module, *arguments = rest[rest.index("-m") + 1 :]
        if module == "pytest":
            paths = [word for word in arguments if "/" in word]
            return ", ".join(p for p in paths if not (ROOT / p).exists()) or None
        if module in NO_ARGUMENTS:
            return " ".join(arguments) or None
        return parse(module, arguments)
    if program in ("python", "python3", "torchrun", "accelerate"):
        scripts = [word for word in rest if word.endswith(".py")]
        return None if scripts and (ROOT / scripts[0]).exists() else "no such script"
    return None if "/" in program and (ROOT / program).exists() else "unknown program"


def test_every_command_is_one_that_its_program_takes(parse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    problems, count = [], 0
    for block in CONSOLE:
        for words in _commands(block):
            count += 1
            if problem := _problem(words, parse):
                problems.append(f"{block}: {shlex.join(words)}: {problem}")
    assert not problems
    assert count > 45


@pytest.mark.parametrize(
    "command",
    [
        "make tests",
        "pip install '.[cpus]'",
        "python -m realign.train --learning-rat 1",
        "python -m realign.train --beta -1",
        "python -m realign.pairs --k many",
        "python -m realign.pairs gallery --flag",
        "python -m realign.evaluate pope a.json",
        "python -m realign.cache fill --dtype fp8",
        "python -m benchmarks.report --all",
        "python examples/missing.py",
        "benchmarks/missing.sh",
        "realign train",
    ],
)
def test_a_wrong_command_is_found(command, parse):
    assert _problem(shlex.split(command), parse)


def test_flags_and_targets_of_commands_in_sentences_exist(parse):
    """Inline code may leave out arguments, so each of its flags is looked up by itself."""
    problems, count = [], 0
    for page in set(pages.PAGES) - set(pages.HISTORY):
        for code in pages.inline_code(page):
            if re.match(r"(make|pip install) ", code):
                problem = _problem(shlex.split(code), parse)
            elif found := re.match(r"python -m ((?:realign|benchmarks|experiments)[\w.]*)", code):
                flags, known = re.findall(r"(?<!\S)--[\w-]+", code), _flags(found[1], code)
                problem = ", ".join(flag for flag in flags if flag not in known)
            else:
                continue
            count += 1
            problems += [f"{pages.name_of(page)}: {code}: {problem}"] if problem else []
    assert not problems
    assert count > 20


def _flags(module, code):
    """The source of a command, and of the settings that it reads, as a set of flags."""
    file = Path(importlib.util.find_spec(_main_module(module)).origin)
    files = [file, *file.parent.glob("*.py"), ROOT / "realign" / "config.py"]
    source = "\n".join(f.read_text() for f in files)
    fields = re.findall(r"(?m)^    (\w+): (?:str|int|float|bool)\b", source)
    return {"--help", "--config", *re.findall(r'"(--[\w-]+)"', source)} | {
        f"--{name.replace('_', '-')}" for name in fields
    }


def test_the_commands_of_the_serving_page_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _trained_run(tmp_path)
    mains = {"realign.export": export.main, "realign.evaluate": evaluate.main}
    ran = 0
    for block in CONSOLE:
        if pages.name_of(block.page) == "docs/serve.md":
            for words in _commands(block):
                if words[0] == "python" and "--push" not in words:
                    assert mains[words[2]](words[3:]) == 0, capsys.readouterr().err
                    ran += 1
    assert ran == 2
    assert (tmp_path / "run" / "model" / "chat_template.jinja").exists()  # for --chat-template
    for folder in ("merged", "handoff"):
        assert (tmp_path / folder / "model.safetensors").exists()
