"""Flags and TOML files from dataclasses: a field is a flag, the string under it is its help."""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
import textwrap
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import wraps
from pathlib import Path
from reprlib import repr
from typing import Any


def one_line_errors(main: Callable[..., int]) -> Callable[..., int]:
    """Decorate a command: what is wrong with its input or files is one line, with exit code 1."""

    @wraps(main)
    def command(arguments: Sequence[str] | None = None) -> int:
        try:
            return main(arguments)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1

    return command


def parse_sections(
    sections: Mapping[str, type],
    *,
    prog: str,
    description: str,
    arguments: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Fill one dataclass per section from `--config file.toml` and flags; flags win.

    Args:
        sections: section name -> dataclass; field names are unique over all of them.
        prog: the command, for the help text.
        description: description of the command, for the help text.
        arguments: the command line; `sys.argv` when absent.

    Returns:
        section name -> instance.

    Raises:
        SystemExit: for an unknown flag, with status 2.
        ValueError: for an unknown section or key in the file, or a value of another type.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--config", type=Path, help="TOML file with the sections shown here")
    for section, cls in sections.items():
        _add_flags(parser.add_argument_group(f"[{section}]"), section, cls)
    flags = vars(parser.parse_args(arguments))
    values: dict[str, dict[str, Any]] = {name: {} for name in sections}
    if (file := flags.pop("config")) is not None:
        _read_toml(file, sections, values)
    for key, value in flags.items():
        section, name = key.split(".")
        values[section][name] = value
    return {name: cls(**values[name]) for name, cls in sections.items()}


def _add_flags(group: Any, section: str, cls: type) -> None:
    docs = _field_docs(cls)
    for f in fields(cls):
        kind = _type_of(cls, f.name)
        options: dict[str, Any] = {"type": kind, "metavar": kind.__name__.upper()}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        group.add_argument(
            "--" + f.name.replace("_", "-"),
            dest=f"{section}.{f.name}",
            default=argparse.SUPPRESS,
            help=(
                docs[f.name] + ("" if f.default in (None, "") else f" (default: {f.default})")
            ).replace("%", "%%"),
            **options,
        )


def _read_toml(file: Path, sections: Mapping[str, type], values: dict[str, dict[str, Any]]) -> None:
    try:
        text = file.read_bytes().decode("utf-8-sig")
        content = tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from None
    except tomllib.TOMLDecodeError as error:
        json = " It looks like JSON; write [section] and key = value." * (text.lstrip()[:1] == "{")
        raise ValueError(f"{file} is not valid TOML: {error}.{json}") from error
    for section, table in content.items():
        if section not in sections:
            raise ValueError(f"{file}: unknown section [{section}]; use {', '.join(sections)}.")
        if not isinstance(table, dict):
            raise ValueError(
                f"{file}: {section} is {repr(table)}, not a section; write [{section}]."
            )
        cls = sections[section]
        names = [f.name for f in fields(cls)]
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
            if type(value) is not kind:
                raise ValueError(
                    f"{file}: {section}.{name} is {repr(value)}; it must be of type "
                    f"{kind.__name__}."
                )
            values[section][name] = value


def _type_of(cls: type, name: str) -> type:
    hint = typing.get_type_hints(cls)[name]
    if isinstance(hint, types.UnionType):  # "str | None"
        return next(part for part in hint.__args__ if part is not type(None))
    return hint


def _field_docs(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    docs: dict[str, str] = {}
    for node, text in zip(tree.body, tree.body[1:], strict=False):
        match node, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=doc)):
                docs[name] = str(doc)
    return docs
