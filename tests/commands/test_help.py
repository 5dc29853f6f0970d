"""--help of every command: its width, its defaults, and an example that really parses."""

import re
import shlex
from unittest import mock

import pytest

from realign import cache, cli, config, doctor, export, train
from realign.cli import CommandParser, with_default
from realign.demo import __main__ as demo
from realign.evaluate import __main__ as evaluate
from realign.pairs import __main__ as pairs

COMMANDS = {
    "realign.train": train.main,
    "realign.pairs": pairs.main,
    "realign.pairs import": pairs.main,
    "realign.pairs gallery": pairs.main,
    "realign.pairs stats": pairs.main,
    "realign.cache": cache.main,
    "realign.cache fill": cache.main,
    "realign.cache stats": cache.main,
    "realign.cache verify": cache.main,
    "realign.cache compact": cache.main,
    "realign.evaluate": evaluate.main,
    "realign.evaluate pope": evaluate.main,
    "realign.evaluate chair": evaluate.main,
    "realign.evaluate hallusionbench": evaluate.main,
    "realign.evaluate compare": evaluate.main,
    "realign.evaluate gallery": evaluate.main,
    "realign.evaluate handoff": evaluate.main,
    "realign.export": export.main,
    "realign.doctor": doctor.main,
    "realign.demo": demo.main,
}


class Parsed(Exception):
    """The command line was accepted."""


def shown(name, capsys):
    """The help text of a command."""
    try:
        COMMANDS[name]([*name.split()[1:], "--help"])
    except SystemExit as stopped:
        assert stopped.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_the_terminal(name, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = shown(name, capsys)
    limit = {60: 80, 80: 80, 200: 100}[columns]  # examples and names of options stay whole
    assert max(map(len, text.splitlines())) <= limit
    usage = text.split("\n\n")[0]
    assert usage.startswith(f"usage: python -m {name}") and usage.count("\n") < 4


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_values_and_defaults(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = shown(name, capsys)
    assert "(default" not in text and "Default: False" not in text
    assert not re.search(r"--[\w-]+ (STR|INT|FLOAT)\b", text)
    for entry in re.split(r"\n(?=  -)|\n\n", text):  # an option each
        assert entry.count("Default:") + entry.count("by default") <= 1, entry
        if " / --no-" in entry:
            assert re.search(r"\bby\s+default\b", entry, re.IGNORECASE), entry


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_parses(name, capsys, monkeypatch):
    text = shown(name, capsys)
    example = text.split("\nExample:\n")[1].replace("\\\n", "")
    assert example.count("\n") == 1
    words = shlex.split(example)
    assert " ".join(words[:3]).startswith("python -m realign.") and words[2] == name.split()[0]

    real = CommandParser.parse_known_args

    def parse(self, *args, **options):
        """Raise only for a complete command line: a parser with subcommands parses twice."""
        found = real(self, *args, **options)
        if not found[1]:
            raise Parsed
        return found

    with (
        mock.patch.object(CommandParser, "parse_known_args", parse),
        pytest.raises(Parsed),
    ):
        COMMANDS[name](words[3:])


def test_the_settings_of_the_example_are_valid():
    """The values, not only the flags, of the commands with dataclasses."""
    found = config.parse(shlex.split("--model llava-hf/llava-1.5-7b-hf --pairs pairs.parquet"))
    assert found.data.pairs == "pairs.parquet"


@pytest.mark.parametrize(
    ("default", "text"),
    [
        (None, "Words."),
        ("", "Words."),
        (False, "Words. Off by default."),
        (True, "Words. On by default."),
        (0, "Words. Default: 0."),
        (256.0, "Words. Default: 256."),
        (0.03, "Words. Default: 0.03."),
        ("auto", "Words. Default: auto."),
        ("Be brief.", "Words. Default: 'Be brief.'"),
    ],
)
def test_a_default_is_a_sentence(default, text):
    assert with_default("Words.", default) == text


def test_help_shows_the_values_that_are_valid(capsys):
    """The help lists valid values, and an invalid one keeps its one-line error."""
    text = shown("realign.train", capsys)
    assert "{lora,full}" in text and "{auto,fp32,bf16}" in text
    assert train.main(["--tune", "qlora"]) == 1
    assert "tune is 'qlora'; it must be one of lora, full" in capsys.readouterr().err


def test_every_setting_has_a_placeholder(capsys):
    for name in ("metavars", "headings"):
        for field in getattr(config, name.upper()):
            flag = "--" + field.replace("_", "-")
            assert flag in shown("realign.train", capsys)
    assert cli.placeholder(("a", "b")) == "{a,b}" and cli.placeholder("FILE") == "FILE"
