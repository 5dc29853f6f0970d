"""Checks of settings. Each raises a ValueError that names the setting."""

from __future__ import annotations

import math


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Check that a setting has one of these values.

    Raises:
        ValueError: when it has another.
    """
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}.")


def positive(name: str, value: float) -> None:
    """Check that a number is finite and above 0.

    Raises:
        ValueError: when it is not.
    """
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} is {value}; it must be finite and above 0.")


def not_negative(name: str, value: float) -> None:
    """Check that a number is finite and not below 0.

    Raises:
        ValueError: when it is not.
    """
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} is {value}; it must be finite and not negative.")


def no_effect(name: str, why: str, remedy: str) -> None:
    """Refuse a setting without effect.

    Raises:
        ValueError: always, with the reason and the remedy.
    """
    raise ValueError(f"{name} would have no effect: {why}. Leave it out, or {remedy}.")
