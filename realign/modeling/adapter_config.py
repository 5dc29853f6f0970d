"""Checks of `adapter_config.json`, and module names in place of its regular expressions.

PEFT trusts this file. A few bytes can make PEFT allocate gigabytes, run an initialization for days,
or match an expression of exponential time. Fields are checked by the types of PEFT's own
configuration. Expressions are matched here, with a time limit.
"""

from __future__ import annotations

import json
import math
import re
import time
import types
import typing
import warnings
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import peft
import regex
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from realign.data.errors import short_error, short_repr, shorten
from realign.files import read_json
from realign.terminal import printable

_REFUSED = {
    "megatron_config": "it makes PEFT import Megatron",
    "arrow_config": "it names other adapters",
    "corda_config": "it names files of statistics",
    "lora_ga_config": "it names a file of gradients",
    "loftq_config": "it quantizes the base in many steps",
    "layer_replication": "it copies layers of the base",
    "use_bdlora": "no test covers it",
    "kasa_config": "no test covers it",
    "monteclora_config": "no test covers it",
    "velora_config": "no test covers it",
}
"""Fields that must be empty."""
_INITIAL = ("gaussian", "eva", "olora", "pissa", "orthogonal", "mica")
_FEW_STEPS = re.compile(r"pissa_niter_\d\d?")
_EXPRESSIONS = ("target_modules", "exclude_modules", "feedforward_modules")
"""Fields that hold a list of names, or one expression."""
_PATTERNS = ("alpha_pattern", "lambda_pattern", "n_frequency_pattern", "rank_pattern")
"""Fields with names or expressions as keys."""
_NAMES = (
    "block_size_pattern", "layers_pattern", "modules_to_save", "target_parameters",
    "target_svd_config",
)  # fmt: skip
"""Fields that hold names, as a list or as keys."""
_NAME = re.compile(r"\^?[\w.\-]+")
"""A name of modules. PEFT puts many names into expressions, where these only match themselves."""
_LONGEST = 4096  # characters of a text. One of Unsloth's expressions has 500.
_MOST_ENTRIES = 10_000  # of a list. PEFT compares each with every module's name.
_MOST_PATTERNS = 1024  # PEFT compiles each for every module. EVA writes 560 for 80 layers.
_MOST_EXPRESSIONS = 128  # of a pattern. Two patterns fit into the cache of `re`, which has 512.
_MOST_RANKS = 8192  # AdaLoRA writes a list of booleans for each module, one per rank
_TOKENS = ("trainable_token_indices", "token_indices")
_MOST_TOKENS = 1 << 20  # the largest vocabulary has 262,144 tokens
_MOST_NUMBER = 1 << 24  # of whole numbers, such as n_frequency or total_step
_SIZES = (
    "r", "init_r", "target_r", "hybrid_r", "mini_r", "subspace_rank", "effective_rank",
    "rank_pattern", "num_subspaces", "num_B", "u", "gralora_k", "num_vectors", "vector_length",
    "block_size", "block_size_pattern", "boft_block_size", "boft_block_num", "group_size",
    "oft_block_size",
)  # fmt: skip
_STEPS = (
    "boft_n_butterfly_factor", "depth", "num_cayley_neumann_terms", "psoft_svd_lowrank_niter",
)  # fmt: skip
_MOST = {**dict.fromkeys(_SIZES, 8192), **dict.fromkeys(_STEPS, 100)}
"""Limits on ranks and sizes, and on steps. PEFT's defaults go up to 256 and to 10."""
_SYNTAX = re.compile(r"(?!.*\(\?[a-zA-OQ-Z])[ -~]*")
"""An expression is ASCII and has no flags: `re` compiles large ranges slowly with (?i)."""
_SAVE_AGAIN = "Save the adapter again, or install the version of PEFT that saved it"
_LIST = "Write a list of module names, see docs/adapters.md"
_OF_HOLDER = ("auto_mapping", "base_model_name_or_path", "peft_version", "revision", "task_type")
_WHOLE_KEY = r"(.*\.)?({})$"  # `get_pattern_key` in PEFT
_SECONDS = 2.0  # for all expressions of an adapter; Unsloth's take 0.02 s for 1,000 modules


def read_adapter_config(file: Path) -> PeftConfig:
    """Read an adapter's configuration. Unknown fields, which PEFT only warns of, are an error.

    Raises:
        ValueError: for a file that this version of PEFT does not read in full, and for fields that
            import, open, allocate or compute too much.
        OSError: for a file that cannot be read.
    """
    given = read_json(file)
    try:
        config_class, given = _checked(given)
        try:
            with warnings.catch_warnings(action="ignore"):
                return config_class(**given)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{short_error(error)}. {_SAVE_AGAIN}") from error
    except ValueError as error:
        raise ValueError(
            f"{file} is not a configuration that PEFT {peft.__version__} reads here: {error}."
        ) from error


def check_saved(config: PeftConfig) -> None:
    """Check that `read_adapter_config` and `plain_names` will accept a configuration once saved.

    Raises:
        ValueError: for a field or an expression that is refused.
    """
    given = {n: list(v) if isinstance(v, set) else v for n, v in config.to_dict().items()}
    for name in _OF_HOLDER:  # saving sets them
        given.pop(name, None)
    try:
        given = json.loads(json.dumps(given))
    except (TypeError, ValueError) as error:
        raise ValueError(f"PEFT cannot save it as JSON ({short_error(error)})") from error
    _checked(given)


def _checked(given: dict[str, Any]) -> tuple[type[PeftConfig], dict[str, Any]]:
    """The class of a configuration, and its fields after their checks.

    Raises:
        ValueError: for a field that is refused, with the next step.
    """
    given = {name: value for name, value in given.items() if name != "runtime_config"}  # as in PEFT
    kind = given.get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(f"no known peft_type: {short_repr(kind)}. {_SAVE_AGAIN}")
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    hints = typing.get_type_hints(config_class)
    known = {field.name for field in fields(config_class) if field.init}
    if lost := sorted(name for name in given if given[name] and name not in known):
        raise ValueError(f"unknown: {shorten(', '.join(lost))}. {_SAVE_AGAIN}")
    if given.get("layers_pattern") == "":  # unset
        del given["layers_pattern"]
    given = {name: value for name, value in given.items() if name in known}
    for name, value in given.items():
        _check(name, value, hints[name])
    return config_class, given


def _check(name: str, value: Any, hint: Any) -> None:
    """Check one field.

    Raises:
        ValueError: for a value that is refused, with the reason.
    """
    if name == "auto_mapping" and value:  # PEFT writes the class of the base
        library = value.get("parent_library") if isinstance(value, dict) else value
        if not isinstance(library, str) or library.split(".")[0] != "transformers":
            raise ValueError(f"{name} names a module to import, {short_repr(library)}. Remove it")
    if name in _REFUSED and value:
        raise ValueError(f"{name} is set, and {_REFUSED[name]}. Use an adapter without it")
    if name == "megatron_core" and value not in (None, "megatron.core"):
        raise ValueError(f"{name} names a module to import, {short_repr(value)}. Remove it")
    if name == "init_lora_weights" and isinstance(value, str):
        if value not in _INITIAL and not _FEW_STEPS.fullmatch(value):
            known = ", ".join(_INITIAL)
            raise ValueError(
                f"{name} is {short_repr(value)}, which is not read. Set true, or one of {known}"
            )
    elif value is not None and not _fits(value, hint):
        raise ValueError(f"{name} is {short_repr(value)}, of another type. Correct it")
    if name == "base_model_name_or_path" and value and "://" in value:
        raise ValueError(f"{name} is a URL, {short_repr(value)}. Set it to a folder or Hub name")
    for item in _leaves(name, value):
        _check_leaf(name, item)
    listed = name in _EXPRESSIONS and not isinstance(value, str)
    if name in _NAMES or listed or (name in _TOKENS and isinstance(value, dict)):
        for entry in [value] if isinstance(value, str) else value or ():
            if not _NAME.fullmatch(str(entry)):
                raise ValueError(
                    f"{name} holds {short_repr(entry)}, which is no name of modules. {_LIST}"
                )
    if isinstance(value, dict) and name not in _TOKENS and len(value) > _MOST_PATTERNS:
        raise ValueError(f"{name} has over {_MOST_PATTERNS:,} entries. Use an adapter with fewer")
    if name in _EXPRESSIONS and isinstance(value, str):
        _compile(name, value)
    elif name in _PATTERNS and isinstance(value, dict):
        expressions = [key for key in value if not _NAME.fullmatch(key)]
        if len(expressions) > _MOST_EXPRESSIONS:
            raise ValueError(
                f"{name} has over {_MOST_EXPRESSIONS} expressions. Write names of modules as keys"
            )
        for key in expressions:
            _compile(name, _WHOLE_KEY.format(key))


def _check_leaf(name: str, item: Any) -> None:
    """Check a text or a number in a field. See `_check`."""
    if isinstance(item, str):
        if len(item) > _LONGEST:
            step = _LIST if name in _EXPRESSIONS else "Shorten it"
            raise ValueError(
                f"{name} holds {short_repr(item)}, {len(item):,} characters, and the limit is "
                f"{_LONGEST:,}. {step}"
            )
        if printable(item) != item:
            raise ValueError(f"{name} holds {short_repr(item)}. Remove the control characters")
    elif isinstance(item, int | float):
        most = _MOST.get(name, _MOST_NUMBER)
        if name.endswith(("seed", "_key")):
            most = (1 << 64) - 1
        whole = isinstance(item, int)
        if not math.isfinite(item) or (whole and item > most) or (name == "r" and item < 0):
            raise ValueError(
                f"{name} is {short_repr(item)}, and the limit is {most:,}. Use another adapter"
            )


def _leaves(name: str, value: Any) -> list[Any]:
    """The texts and numbers in a field, and the keys of its dicts."""
    most = _MOST_TOKENS if name in _TOKENS else _MOST_ENTRIES
    waiting, found = [value], []
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += [*item, *item.values()]
        elif isinstance(item, list):
            if len(item) > _MOST_RANKS or not all(isinstance(one, bool) for one in item):
                waiting += item
        else:
            found.append(item)
        if len(found) + len(waiting) > most:
            raise ValueError(f"{name} has over {most:,} entries. Use an adapter with fewer")
    return found


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON has a type. Whole numbers and floats pass for each other."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if kind in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if kind is typing.Literal:
        return value in inner
    if kind in (list, tuple) or hint in (list, tuple, set):
        return isinstance(value, list) and all(
            _fits(item, one) for item in value for one in inner[:1] if one is not Ellipsis
        )
    if kind is dict or hint is dict:
        return isinstance(value, dict) and all(
            _fits(key, inner[0]) and _fits(item, inner[1]) for key, item in value.items() if inner
        )
    if hint in (int, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is type(None):
        return value is None
    if is_dataclass(hint):
        return isinstance(value, dict)
    return isinstance(value, str if issubclass(hint, str) else hint)


def plain_names(config: PeftConfig, model: nn.Module) -> None:
    """Replace the expressions in a configuration by the names of the modules that they match.

    Raises:
        ValueError: for an expression that is invalid or takes too long, and for modules_to_save
            inside each other, where PEFT copies copies.
    """
    names = [name for name, _ in model.named_modules()]
    end = time.monotonic() + _SECONDS
    for field in _EXPRESSIONS:
        pattern = getattr(config, field, None)
        if isinstance(pattern, str) and pattern.lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND:
            setattr(config, field, _matches(field, pattern, names, end))
    if getattr(config, "target_parameters", None):
        names += [name for name, _ in model.named_parameters()]
    for field in _PATTERNS:
        if isinstance(pattern := getattr(config, field, None), dict):
            setattr(config, field, _plain_keys(config, field, pattern, names, end))
    ends = tuple(getattr(config, "modules_to_save", None) or ())
    copied = {name for name, _ in model.named_modules() if name.endswith(ends)} if ends else set()
    for name in copied:
        if outer := next((other for other in _above(name) if other in copied), None):
            raise ValueError(
                f"modules_to_save names {outer} and {name} in it. Leave out the inner name"
            )


def _plain_keys(
    config: PeftConfig, field: str, pattern: dict[str, Any], names: list[str], end: float
) -> dict[str, Any]:
    """Replace the keys of a pattern that are expressions by the full names that they match.

    PEFT takes the first key that matches a module. So a name need not be in two keys, and all new
    keys together are as long as the model's names. Other keys hold no operator but ".".
    """
    found, waiting = {}, names
    for key, value in pattern.items():
        if _NAME.fullmatch(key):
            found.setdefault(key, value)
            continue
        whole = _WHOLE_KEY.format(key)
        if config.peft_type == PeftType.OSF:  # it calls re.search
            whole = f".*?(?:{key}).*"
        if matched := set(_matches(field, whole, waiting, end)):
            found["^(?:" + "|".join(map(re.escape, sorted(matched))) + ")$"] = value
            waiting = [name for name in waiting if name not in matched]
    return found


def _above(name: str) -> list[str]:
    """The names of the modules around a module."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _compile(field: str, pattern: str) -> regex.Pattern[str]:
    """Compile an expression of the syntax that `re` and `regex` share.

    Raises:
        ValueError: for an invalid expression, with the next step.
    """
    try:
        if not _SYNTAX.fullmatch(pattern):
            raise ValueError("it has flags or characters outside of ASCII")
        re.compile(pattern)  # refuses what only `regex` knows
        return regex.compile(pattern)
    except (ValueError, re.error, regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{field}={short_repr(pattern)} is not read: {error}. {_LIST}") from error


def _matches(field: str, pattern: str, names: list[str], end: float) -> list[str]:
    """The names that a pattern matches in full. `re` has no time limit, and `regex` has one."""
    compiled, found = _compile(field, pattern), []
    try:
        for name in names:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if compiled.fullmatch(name, timeout=left):
                found.append(name)
    except TimeoutError:
        raise ValueError(
            f"the expression {field}={short_repr(pattern)} takes over {_SECONDS:g} s. {_LIST}"
        ) from None
    return found
