"""The demo at a small size: its files, and a second call that resumes."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
from PIL import Image

from realign import train
from realign.demo import __main__ as demo

SMALL = ["--steps", "3", "--scenes", "40", "--evaluation-scenes", "20", "--nproc-per-node", "1"]


def test_demo_writes_its_table_and_image_once(tmp_path, capfd, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):  # as a rank of torchrun: no further process
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")

    def run(command, check):  # dpo in this process, which has the libraries
        assert command[:3] == [sys.executable, "-m", "realign.train"] and not check
        if "rdpo" in command:
            return subprocess.run(command, check=check)
        return SimpleNamespace(returncode=train.main(command[3:]))

    monkeypatch.setattr(demo, "subprocess", SimpleNamespace(run=run))
    folder = tmp_path / "demo"
    assert demo.main(["--output", str(folder), *SMALL]) == 0
    shown = capfd.readouterr().out
    lines = [line.split("|")[0].strip() for line in shown.splitlines() if "%" in line]
    assert lines[-3:] == ["base", "dpo", "rdpo"]
    results = json.loads((folder / "results.json").read_text())
    assert list(results) == ["base", "dpo", "rdpo"]
    for rates in results.values():
        rate = rates["hallucination_rate"]
        assert 0 <= rate["low"] <= rate["value"] <= rate["high"] <= 1
        assert rate["value"] * 80 == np.round(rate["value"] * 80)  # 20 scenes of four digits
    with Image.open(folder / "report.png") as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(1 << 20)) > 100
    curves = [(folder / "seed0" / name / "metrics.jsonl") for name in ("dpo", "rdpo")]
    before = [curve.read_bytes() for curve in curves]
    for name in ("dpo", "rdpo"):
        about = json.loads((folder / "seed0" / name / "run.json").read_text())
        assert about["config"]["loss"]["objective"] == name
    assert demo.main(["--output", str(folder), *SMALL]) == 0
    assert "evaluating" not in capfd.readouterr().out
    assert [curve.read_bytes() for curve in curves] == before
    assert demo.main(["--output", str(folder), *SMALL, "--seeds", "2"]) == 1
    assert "holds a demo with different settings" in capfd.readouterr().err
