"""Progress of long loops: a bar on a terminal, and a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, TypeVar

from tqdm import tqdm

from realign.terminal import show

_Item = TypeVar("_Item")
_FIRST, _LONGEST = 10.0, 300.0  # seconds between two lines of a log
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {line}"
_NO_TOTAL = "{desc}: {line}"


class Progress:
    """Progress of a loop, printed to stderr.

    On a terminal it is a tqdm bar, which disappears at the end. Elsewhere, lines without carriage
    returns show count, rate and remaining time. They are 10 s apart at first. The interval grows to
    a tenth of the elapsed time, and to 5 min at most.

    Args:
        title: title of the loop.
        unit: plural name of the items.
        total: number of items; None if it is unknown.
        done: items that an earlier run has processed.
        quiet: whether to print nothing.
        summary: whether to print the count, the time and the rate at the end.
    """

    def __init__(
        self,
        title: str,
        unit: str,
        total: int | None = None,
        *,
        done: int = 0,
        quiet: bool = False,
        summary: bool = True,
    ) -> None:
        self.title, self.unit, self.total, self.done = title, unit, total, done
        self._first, self._note, self._quiet = done, "", quiet
        self._summary = summary and not quiet
        self._began = self._printed = time.monotonic()
        self._bar = _Bar(self) if not quiet and sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(complete=kind is None)

    def update(self, items: int = 1, note: str = "") -> None:
        """Count further items; `note` is shown at the end of the line."""
        self.done += items
        self._note = note
        if self._bar is not None:
            self._bar.update(items)
        elif not self._quiet:
            now = time.monotonic()
            interval = min(max(_FIRST, (now - self._began) / 10), _LONGEST)
            if now - self._printed >= interval and self.done != self.total:
                self._printed = now
                share = f" {self.done / self.total:4.0%}" if self.total else ""
                _print(f"{self.title}:{share}  {self.line()}")

    def close(self, *, complete: bool = True) -> None:
        """Remove the bar; print the summary of a complete loop."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if complete and self._summary and self.done > self._first:
            summary = totals(self.done - self._first, self.unit, self.seconds)
            note = f", {self._note.strip()}" if self._note else ""
            _print(f"{self.title}: {summary}{note}")
        self._summary = False

    @property
    def seconds(self) -> float:
        """Time since the start of the loop."""
        return time.monotonic() - self._began

    def line(self) -> str:
        """Count, rate and remaining time."""
        rate = (self.done - self._first) / max(self.seconds, 1e-9)
        left = "?"
        if self.total is not None and rate > 0:
            left = clock((self.total - self.done) / rate)
        count = f"{self.done:,}"
        if self.total is not None:
            count = f"{count:>{len(f'{self.total:,}')}}/{self.total:,}"
        parts = [f"{count} {self.unit}", f"{speed(rate) if rate else '?':>7} {self.unit}/s"]
        parts += [self._note] if self._note else []
        parts += [f"{left:>7} left"] if self.total is not None else []
        return "  ".join(parts)


def _print(line: str) -> None:
    """Print to stderr, after earlier lines of stdout: one file may hold both."""
    sys.stdout.flush()
    show(line, error=True)


class _Bar(tqdm):
    """A bar that shows the line of a `Progress`."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        super().__init__(
            total=progress.total,
            initial=progress.done,
            desc=progress.title,
            bar_format=_NO_TOTAL if progress.total is None else _BAR,
            dynamic_ncols=True,
            leave=False,
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        """The fields of the bar's format."""
        return {**super().format_dict, "line": self.progress.line()}


def track(items: Iterable[_Item], title: str, unit: str, *, quiet: bool = False) -> Iterator[_Item]:
    """Iterate over items with progress. Without a length, the total is unknown."""
    total = len(items) if isinstance(items, Sized) else None
    with Progress(title, unit, total, quiet=quiet) as progress:
        for item in items:
            yield item
            progress.update()


def totals(count: int, unit: str, seconds: float) -> str:
    """Count, time and rate of a finished loop."""
    rate = speed(count / max(seconds, 1e-9))
    return f"{counted(count, unit)} in {duration(seconds)} ({rate}/s)"


def counted(count: int, unit: str) -> str:
    """A count with its unit, which is given in the plural: 1 record, 2,000 records."""
    if count == 1:
        unit = "leaf" if unit == "leaves" else unit.removesuffix("s")
    return f"{count:,} {unit}"


def speed(rate: float) -> str:
    """A rate with three significant digits, or with none after the point."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def clock(seconds: float) -> str:
    """Time as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def duration(seconds: float) -> str:
    """Time as 3.2 s, 41 s or 5 min 3 s."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
