"""Start and end of ranks: the launcher reports a failed rank, and no rank outlives it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from realign import distributed


def test_the_launcher_reports_how_a_rank_ended(tmp_path, monkeypatch, capsys):
    (tmp_path / "ends.py").write_text(
        "import os, sys, signal, time\n"
        "rank = int(os.environ['RANK'])\n"
        "if sys.argv[1] == 'kill' and rank: os.kill(os.getpid(), signal.SIGKILL)\n"
        "if sys.argv[1] == 'exit' and rank: sys.exit(3)\n"
        "if sys.argv[1] == 'term':\n"
        "    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "    open(f'{sys.argv[2]}/{rank}.ready', 'w').close()\n"
        "    while not os.path.exists(f'{sys.argv[2]}/1.ready'): time.sleep(0.01)\n"
        "    if rank == 0: os.kill(os.getppid(), signal.SIGTERM)\n"
        "    time.sleep(60), sys.exit(5)\n"
        "time.sleep(60 * (sys.argv[1] != 'fine'))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    before = signal.getsignal(signal.SIGTERM)
    assert distributed.launch("ends", ["fine"], 2) == 0
    assert distributed.launch("ends", ["term", str(tmp_path)], 2) == 0  # forwarded to both
    assert distributed.launch("ends", ["exit"], 2) == 1
    assert "rank 1 ended with exit code 3." in capsys.readouterr().err
    assert distributed.launch("ends", ["kill"], 2) == 1
    assert "rank 1 was killed by SIGKILL (by hand, or because" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    # Ranks 1 and 4 missed rank 0; ranks 2 and 3 were stopped.
    ends = [(1, 1, 100), (0, -9, 100), (4, -6, 100), (2, -15, 100), (3, -9, 131)]
    found = {rank: SimpleNamespace(exitcode=c, timestamp=t) for rank, c, t in ends}
    assert distributed._first_failure(found).startswith("rank 0 was killed by SIGKILL")
    found.pop(0)
    assert distributed._first_failure(found) == "rank 1 ended with exit code 1."


def test_a_rank_ends_without_finalizing_its_interpreter():
    script = (  # a rank and then an ordinary process, which share one import
        "import atexit, os, threading, time; from realign import distributed\n"
        "if rank := os.fork(): print(os.waitpid(rank, 0)[1] // 256, flush=True)\n"
        "else: os.environ.update(RANK='1', WORLD_SIZE='2')\n"
        "class Kept: __del__ = lambda self: print('finalized')\n"
        "kept = Kept()\n"
        "atexit.register(print, 'at exit'), print('done')\n"
        "threading.Thread(target=lambda: (time.sleep(0.3), print('thread'))).start()\n"
        "distributed.exit_rank(3)"
    )
    ended = subprocess.run([sys.executable, "-c", script], stdout=-1, text=True, check=False)
    each = ["done", "thread", "at exit"]
    assert ended.stdout.splitlines() == [*each, "3", *each, "finalized"]
    assert ended.returncode == 3


def test_ranks_end_with_their_launcher(tmp_path):
    (tmp_path / "waits.py").write_text(
        "import os, sys, time\n"
        "from realign import distributed\n"
        "distributed._end_with(int(os.environ['REALIGN_LAUNCHER']))\n"
        "open(f'{sys.argv[1]}/{os.getpid()}.rank', 'w').close()\n"
        "time.sleep(60)\n"
    )
    launch = f"from realign import distributed; distributed.launch('waits', [{str(tmp_path)!r}], 1)"
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-c", launch], env=os.environ | {"PYTHONPATH": path}
    )
    while not (ranks := [int(path.stem) for path in tmp_path.glob("*.rank")]):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    end = time.monotonic() + 5
    while Path(f"/proc/{ranks[0]}").exists():
        assert time.monotonic() < end, "the rank is still alive"
        time.sleep(0.05)
