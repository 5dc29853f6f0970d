"""Printing: `show` prints all lines of the commands, with control characters made visible."""

import re
import sys

# C0 without tab and line feed, DEL, C1, marks of text direction, line separators, lone surrogates.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: object) -> str:
    """Text with control characters as escapes, such as \\x1b. Tabs and line feeds stay.

    Control sequences can change a terminal's title, its colours and earlier lines. Servers, files
    and tables of other people may contain them.
    """
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], str(text))


def show(text: object, *, error: bool = False, end: str = "\n") -> None:
    """Print text to stdout, or to stderr if `error` is set, with `printable`. Flushes the stream.

    Use it in place of `print`. Messages contain names and texts from files, servers and tables.
    """
    print(printable(text), end=end, file=sys.stderr if error else sys.stdout, flush=True)
