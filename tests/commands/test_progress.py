"""Progress on a terminal and in a log file."""

import re
from types import SimpleNamespace

import pytest

from realign import progress
from realign.progress import Progress, clock, counted, duration, speed, totals, track


class Terminal:
    """A stderr that claims to be a terminal."""

    def __init__(self):
        self.text = ""
        self.encoding = "utf-8"

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


@pytest.fixture
def passing(monkeypatch):
    """A clock that a test moves forward by `passing.seconds`."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    return now


def test_a_log_gets_lines_at_growing_intervals(passing, capsys):
    with Progress("captions", "scenes", 2000) as bar:
        for second in range(1, 2001):
            passing.seconds = float(second)
            bar.update()
    shown = capsys.readouterr().err
    assert "\r" not in shown and "|" not in shown
    *lines, last = shown.splitlines()
    assert lines[0] == "captions:   0%     10/2,000 scenes        1 scenes/s    33:10 left"
    counts = [int(re.search(r"([\d,]+)/", line)[1].replace(",", "")) for line in lines]
    gaps = [b - a for a, b in zip(counts, counts[1:], strict=False)]
    assert gaps == sorted(gaps) and gaps[0] == 10 and gaps[-1] > 150 and len(lines) < 40
    assert len({line.index(" scenes/s") for line in lines}) == 1
    assert last == "captions: 2,000 scenes in 33 min 20 s (1/s)"


def test_a_quick_loop_prints_its_summary_only(passing, capsys):
    for _ in track(range(30), "checking records", "records"):
        passing.seconds += 0.1
    assert capsys.readouterr().err == "checking records: 30 records in 3.0 s (10/s)\n"


def test_a_resumed_loop_counts_its_own_items(passing, capsys):
    with Progress("pope", "questions", 100, done=60) as bar:
        passing.seconds = 20.0
        bar.update(20, "7 tokens/s")
        passing.seconds = 40.0
        bar.update(20)
    first, last = capsys.readouterr().err.splitlines()
    assert "80% " in first and " 80/100 questions " in first and "7 tokens/s" in first
    assert first.endswith("0:20 left") and last == "pope: 40 questions in 40 s (1/s)"


def test_nothing_is_printed_when_quiet_or_without_items(capsys):
    for options in ({"quiet": True}, {"done": 3}):
        with Progress("read", "records", 3, **options) as bar:
            bar.update(0 if "done" in options else 3)
    assert capsys.readouterr().err == ""


def test_a_failed_loop_has_no_summary(capsys):
    with pytest.raises(ValueError, match="bad"), Progress("read", "records") as bar:
        bar.update(5)
        raise ValueError("bad")
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_that_disappears(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "100")
    with Progress("captions", "scenes", 200) as bar:
        bar._bar.mininterval = 0
        bar.update(100)
    assert re.search(
        r"\rcaptions:  50%\|.*\| 100/200 scenes +[\d,]+ scenes/s +0:00 left", terminal.text
    )
    assert re.search(r"\r *\rcaptions: 100 scenes in 0\.\d s \([\d,]+/s\)\n$", terminal.text)


def test_numbers_and_times_are_short():
    assert [speed(rate) for rate in (0.01234, 1.5, 99.6, 1234.5)] == [
        "0.0123",
        "1.5",
        "99.6",
        "1,234",
    ]
    assert [clock(s) for s in (0, 59.6, 61, 3661)] == ["0:00", "1:00", "1:01", "1:01:01"]
    assert [duration(s) for s in (0.04, 9.96, 59.4, 59.6, 303, 7260)] == [
        "0.0 s", "10 s", "59 s", "1 min 0 s", "5 min 3 s", "2 h 1 min",
    ]  # fmt: skip


def test_one_item_is_singular():
    assert totals(1, "records", 2.0) == "1 record in 2.0 s (0.5/s)"
    assert counted(1, "leaves") == "1 leaf" and counted(2000, "leaves") == "2,000 leaves"
