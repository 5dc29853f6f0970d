"""Command lines: flags, TOML sections and --help texts from dataclasses.

Each field of a dataclass is a flag, and the string under the field is its help text.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import shutil
import textwrap
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cache, wraps
from pathlib import Path
from reprlib import repr
from typing import Any

from realign.terminal import show
from realign.third_party import printable_messages

_WIDEST = 100  # columns, since longer lines are hard to read
_EMPTY: Mapping[str, Any] = {}


def one_line_errors(main: Callable[..., int]) -> Callable[..., int]:
    """Decorate a command: print a ValueError or OSError as one line and return exit code 1."""

    @wraps(main)
    def command(arguments: Sequence[str] | None = None) -> int:
        printable_messages()
        try:
            return main(arguments)
        except (ValueError, OSError) as error:
            show(f"error: {error}", error=True)
            return 1

    return command


class CommandParser(argparse.ArgumentParser):
    """Argument parser with a short usage line and an example at the end of --help.

    Args:
        example: a complete command line, or several lines joined by backslashes.
        commands: subcommand -> summary, for the help text.
        **options: further arguments of `argparse.ArgumentParser`.
    """

    def __init__(
        self,
        *,
        example: str = "",
        commands: Mapping[str, str] = _EMPTY,
        **options: Any,
    ) -> None:
        if example:
            options["epilog"] = "Example:\n" + textwrap.indent(example, "  ")
        super().__init__(formatter_class=HelpFormatter, add_help=False, **options)
        self._positionals.title, self._optionals.title = "Arguments", "Options"
        self.add_argument("-h", "--help", action="help", help="Show this help and exit.")
        if commands:
            width = 2 + max(map(len, commands))
            lines = [f"{name:{width}}{summary}" for name, summary in commands.items()]
            self.add_argument_group("Commands", "\n".join(lines))


class HelpFormatter(argparse.HelpFormatter):
    """Help in the width of the terminal, 100 columns at most.

    It shortens the usage line, adds missing defaults, and keeps aligned lines as they are.
    """

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, _WIDEST) - 2
        super().__init__(prog, max_help_position=28, width=width)

    def _format_usage(self, usage, actions, groups, prefix) -> str:
        if usage is None:
            words = [self._prog]
            for action in actions:
                if action.required or action.dest == "config":
                    text = self._format_action_invocation(action)
                    text += f" [{text} ...]" * (action.nargs == "+")
                    words.append(text if action.required else f"[{text}]")
            options = [a for a in actions if a.option_strings and not a.required]
            usage = " ".join(words) + " [options]" * (len(options) > 1)  # one of them is --help
        prefix = "usage: " if prefix is None else prefix
        indent = " " * len(prefix)
        lines = textwrap.wrap(
            prefix + usage % {"prog": self._prog},
            self._width,
            subsequent_indent=indent,
            break_on_hyphens=False,
        )
        return "\n".join(lines) + "\n\n"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = action.option_strings
        if isinstance(action, argparse.BooleanOptionalAction):
            return " / ".join(names)
        value = "" if action.nargs == 0 else str(action.metavar or placeholder(action.choices))
        value = value or action.dest.upper()
        return f"{', '.join(names)} {value if action.nargs != 0 else ''}".strip()

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default is argparse.SUPPRESS or default is False or "Default:" in text:
            return text
        return with_default(text, default)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return _wrapped(" ".join(text.split()), width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        for line in text.splitlines():
            aligned = "  " in line  # an example, or a command with its summary
            lines += [line] if aligned else _wrapped(line, width - len(indent)) or [""]
        return "\n".join(indent + line for line in lines)


def placeholder(values: str | Iterable[str] | None) -> str:
    """Placeholder of a value in a help text: a name, or the valid values in braces."""
    if values is None or isinstance(values, str):
        return values or ""
    return "{" + ",".join(values) + "}"


def with_default(text: str, default: Any) -> str:
    """A help text followed by the default, if there is one."""
    if default in (None, ""):
        return text
    if isinstance(default, bool):
        if "by default" in text.lower():
            return text
        return f"{text} {'On' if default else 'Off'} by default."
    if isinstance(default, str) and " " in default:
        return f"{text} Default: '{default}'"
    number = isinstance(default, float) and default.is_integer()
    return f"{text} Default: {int(default) if number else default}."


def parse_sections(
    sections: Mapping[str, type],
    *,
    prog: str,
    description: str,
    arguments: Sequence[str] | None = None,
    headings: Mapping[str, str] = _EMPTY,
    metavars: Mapping[str, str | Sequence[str]] = _EMPTY,
    presets: Callable[[dict[str, dict[str, Any]]], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Fill one dataclass per section from `--config file.toml` and flags, which override the file.

    Args:
        sections: section name -> dataclass. Field names are unique over all sections.
        prog: the command, for the help text.
        description: description of the command, for the help text.
        arguments: the command line. The default is `sys.argv`.
        headings: field name -> heading in the help text, of that field and the next ones.
        metavars: field name -> placeholder of its value, or a tuple of the valid values.
        presets: adds values to those that are given by the file or by flags, by section and field.
        **options: further arguments of `CommandParser`, such as `example`.

    Returns:
        section name -> instance.

    Raises:
        SystemExit: for an unknown flag, with status 2.
        ValueError: for an unknown section or key in the file, or a value of the wrong type.
    """
    parser = CommandParser(prog=prog, description=description, **options)
    names = ", ".join(f"[{section}]" for section in sections)
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help=f"TOML file of settings, in the section{'s' * (len(sections) > 1)} {names}. "
        "Flags override it.",
    )
    for section, cls in sections.items():
        place = f" ([{section}] in the TOML file)" * (len(sections) > 1)
        _add_flags(parser, section, cls, headings, metavars, place)
    flags = vars(parser.parse_args(arguments))
    values: dict[str, dict[str, Any]] = {name: {} for name in sections}
    if (file := flags.pop("config")) is not None:
        _read_toml(file, sections, values)
    for key, value in flags.items():
        section, name = key.split(".")
        values[section][name] = value
    for section, cls in sections.items():
        for field in fields(cls):  # an empty text is often a variable of the shell that is not set
            if values[section].get(field.name) == "" != field.default:
                flag = "--" + field.name.replace("_", "-")
                raise ValueError(f"{flag} is empty. Give a value, or leave it out.")
    if presets is not None:
        presets(values)
    return {name: _built(cls, values[name]) for name, cls in sections.items()}


def _built(cls: type, values: dict[str, Any]) -> Any:
    """An instance of `cls`. An error that begins with the name of a field names the flag instead.

    Raises:
        ValueError: for an invalid value.
    """
    try:
        return cls(**values)
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        if name not in _names(cls):
            raise
        raise ValueError(f"--{name.replace('_', '-')} {rest}") from error


def _add_flags(
    parser: CommandParser,
    section: str,
    cls: type,
    headings: Mapping[str, str],
    metavars: Mapping[str, str | Sequence[str]],
    place: str,
) -> None:
    docs = _field_docs(cls)
    groups: dict[str, Any] = {}
    heading = section.capitalize()
    for f in fields(cls):
        heading = headings.get(f.name, heading)
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading + place)
        kind = _type_of(cls, f.name)
        options: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        if kind is not bool:
            metavar = metavars.get(f.name, "N" if kind is int else f.name.upper())
            options = {"type": kind, "metavar": placeholder(metavar)}
        groups[heading].add_argument(
            "--" + f.name.replace("_", "-"),
            dest=f"{section}.{f.name}",
            default=argparse.SUPPRESS,
            help=with_default(docs[f.name], f.default).replace("%", "%%"),
            **options,
        )


def _read_toml(file: Path, sections: Mapping[str, type], values: dict[str, dict[str, Any]]) -> None:
    try:
        text = file.read_bytes().decode("utf-8-sig")
        content = tomllib.loads(text)
    except FileNotFoundError:
        raise FileNotFoundError(f"--config: there is no file {file}. Check the path.") from None
    except OSError as error:
        raise ValueError(
            f"--config: {file} cannot be read ({error.strerror}). Name a TOML file."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from None
    except tomllib.TOMLDecodeError as error:
        json = " It looks like JSON. Write [section] and key = value." * (text.lstrip()[:1] == "{")
        raise ValueError(f"{file} is not valid TOML: {error}.{json}") from error
    for section, table in content.items():
        if section not in sections and not isinstance(table, dict):
            homes = [name for name, cls in sections.items() if section in _names(cls)]
            remedy = (
                f"Put it under [{homes[0]}]" if homes else f"The sections are {', '.join(sections)}"
            )
            raise ValueError(f"{file}: key {section!r} is outside a section. {remedy}.")
        if section not in sections:
            raise ValueError(f"{file}: unknown section [{section}]; use {', '.join(sections)}.")
        if not isinstance(table, dict):
            raise ValueError(
                f"{file}: {section} is {repr(table)}, not a section. Write [{section}]."
            )
        cls = sections[section]
        names = _names(cls)
        for name, value in table.items():
            if name not in names:
                raise ValueError(
                    f"{file}: unknown key {name!r} in [{section}]; it has {', '.join(names)}."
                )
            kind = _type_of(cls, name)
            if type(value) is int and abs(value) >= 2**63:
                raise ValueError(f"{file}: {section}.{name} has more than 64 bits.")
            if kind is float and type(value) is int:
                value = float(value)
            if kind is str and isinstance(value, list) and _are_numbers(value):
                value = ",".join(map(str, value))
            if type(value) is not kind:
                raise ValueError(
                    f"{file}: {section}.{name} is {repr(value)}; it must be of type "
                    f"{kind.__name__}."
                )
            values[section][name] = value


def _are_numbers(values: list[Any]) -> bool:
    """Whether a list has numbers only. A flag takes them with commas."""
    return all(type(value) in (int, float) for value in values)


def _names(cls: type) -> list[str]:
    return [f.name for f in fields(cls)]


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of a text, broken at spaces only, so flags and names stay whole."""
    text = re.sub(r"(Default:) (\S+)$", "\\1\0\\2", text)  # on one line
    lines = textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)
    return [line.replace("\0", " ") for line in lines]


@cache
def _type_of(cls: type, name: str) -> type:
    hint = typing.get_type_hints(cls)[name]
    if isinstance(hint, types.UnionType):  # "str | None"
        return next(part for part in hint.__args__ if part is not type(None))
    return hint


@cache
def _field_docs(cls: type) -> Mapping[str, str]:
    """The string under each field of a dataclass."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    docs: dict[str, str] = {}
    for node, text in zip(tree.body, tree.body[1:], strict=False):
        match node, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=doc)):
                docs[name] = str(doc)
    return docs
