"""Checked reading, atomic writing and printing: `realign.files` and `realign.terminal`."""

import ast
import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from realign.cli import one_line_errors
from realign.data.errors import RecordError, shorten
from realign.files import open_regular, read_json, read_limited, replacing, write_whole
from realign.terminal import printable, show

ROOT = Path(__file__).resolve().parents[2]
CONTROLS = [chr(code) for code in (*range(32), *range(0x7F, 0xA0), 0x202E, 0x2066, 0xDC80)]


def test_only_regular_files_are_opened_and_nothing_blocks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the full path may be too long for a socket
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        for name in ("pipe", "link", "socket", "/dev/zero", "/dev/tty", "."):
            with pytest.raises(OSError, match="not a regular file"):
                open_regular(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")


def test_a_pipe_that_replaces_the_checked_file_is_refused(tmp_path, monkeypatch):
    """The kind of file is checked again after the opening."""
    file, found = tmp_path / "file", os.stat
    file.write_text("{}")
    regular = found(file)
    file.unlink()
    os.mkfifo(file)
    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", lambda path: regular)
        try:
            open_regular(file).close()
            refused = ""
        except OSError as error:
            refused = str(error)
    assert "not a regular file" in refused


def test_small_files_have_a_limit(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    assert read_limited(file, 5) == b"12345"
    with pytest.raises(ValueError, match="file is larger than 4 bytes"):
        read_limited(file, 4)
    os.truncate(file, 1 << 40)  # takes no space on the disk
    with pytest.raises(ValueError, match="is larger than 16,777,216 bytes"):
        read_json(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 200_000, "nests its JSON too deeply"),
        (b'{"a":' * 200_000, "nests its JSON too deeply"),
        (b"{", "is not JSON"),
        (b"", "is not JSON"),
        (b"\xff{}", "is not JSON .*invalid start byte"),
        (b"1" * 10_000, "is not JSON"),
        (b"[]", "holds a JSON list, not an object"),
        (b"5", "holds a JSON int, not an object"),
        (b"null", "holds a JSON NoneType, not an object"),
    ],
)
def test_another_content_is_one_clear_error(content, message, tmp_path):
    file = tmp_path / "file.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"file.json {message}"):
        read_json(file)


def test_writing_follows_no_link_and_keeps_to_the_umask(tmp_path):
    victim, file = tmp_path / "victim", tmp_path / "file.json"
    victim.write_text("mine")
    file.symlink_to(victim)
    before = os.umask(0o027)
    try:
        write_whole(file, json.dumps({"a": 1}))
    finally:
        os.umask(before)
    assert victim.read_text() == "mine" and read_json(file) == {"a": 1}
    assert not file.is_symlink() and stat.S_IMODE(file.stat().st_mode) == 0o640


def test_partial_files_have_new_names_and_go_after_an_error(tmp_path):
    file, names = tmp_path / "file", set()
    for _ in range(3):
        with pytest.raises(ValueError, match="stop"), replacing(file) as partial:
            names.add(Path(partial.name).name)
            raise ValueError("stop")
    assert len(names) == 3 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("control", CONTROLS, ids=lambda c: f"{ord(c):x}")
def test_control_characters_are_shown_as_escapes(control):
    text = printable(f"a{control}b")
    if control in "\t\n":
        assert text == f"a{control}b"
    else:
        assert text.isprintable() and text == f"a{ascii(control)[1:-1]}b"
        assert control not in shorten(f"a{control}b")
        assert control not in str(RecordError(f"a{control}b", "it is wrong.", "Fix it."))


def test_errors_of_commands_are_printable(capsys):
    @one_line_errors
    def main(_):
        raise ValueError("no \x1b]0;title\x07 model")

    assert main([]) == 1
    assert capsys.readouterr().err == "error: no \\x1b]0;title\\x07 model\n"
    show("\x1b[2K", error=False)
    assert capsys.readouterr().out == "\\x1b[2K\n"


LOGS = r"""
import logging, warnings
from realign.cli import one_line_errors

@one_line_errors
def main(arguments=None):
    logging.getLogger("transformers").warning("type %r, \x1b[2K", "\x1b]0;t")
    warnings.warn("a \x1b[2J tag")
    return 0

main([])
"""


def test_log_records_and_warnings_of_other_libraries_are_printable():
    done = subprocess.run([sys.executable, "-c", LOGS], capture_output=True, text=True, check=True)
    assert "\\x1b[2K" in done.stderr and "a \\x1b[2J tag" in done.stderr
    assert "\x1b" not in done.stderr


def test_a_long_text_is_cut_in_the_middle_and_marked():
    assert shorten("a b\n c") == "a b c"
    for text in ("x" * 161, "x" * 10**6, "a" + " " * 10**6 + "b"):
        assert "..." in shorten(text) and len(shorten(text)) <= 163


def test_everything_is_printed_by_show():
    """`print` would send control characters of other people's texts to the terminal."""
    for file in (ROOT / "realign").rglob("*.py"):
        if file.name != "terminal.py":
            calls = (n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call))
            names = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
            assert "print" not in names, f"{file} uses print; use realign.terminal.show"
