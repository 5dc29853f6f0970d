"""docs/quick-start.md: its commands run unchanged on thirty synthetic photographs."""

import json
import re
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import AutoProcessor

from realign import train
from realign.data.records import read_pairs
from realign.digits import ASSETS
from realign.digits.scenes import CAPTION_PROMPT, make_scenes
from realign.files import read_jsonl
from realign.modeling.loading import load_trained
from realign.pairs import __main__ as pairs

MAINS = {"realign.pairs": pairs.main, "realign.train": train.main}
PAGE = (Path(__file__).parents[2] / "docs" / "quick-start.md").read_text()


def _photographs(folder: Path) -> None:
    """Write thirty noisy JPEGs of digits, 320 x 240, and their questions."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i, scene in enumerate(make_scenes(30, biased=True, split="train", seed=4)):
        large = np.asarray(scene.image.resize((320, 240), Image.Resampling.BICUBIC), np.float32)
        noisy = np.clip(large + rng.normal(0, 4, large.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{i:03d}.jpg", quality=90)
        line = {"image": f"{i:03d}.jpg", "question": CAPTION_PROMPT, "answer": scene.caption}
        lines.append(json.dumps(line))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")


def test_thirty_photographs(tmp_path, monkeypatch, capfd):
    shown = json.loads(re.search(r"```json\n(.*)\n```", PAGE)[1])
    assert shown.keys() == {"image", "question", "answer"}
    _photographs(tmp_path / "my-images")
    commands = [
        line.split()
        for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
        for line in block.splitlines()
    ]
    assert len(commands) == 5
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REALIGN_CACHE", str(tmp_path / "cache"))
    for words in commands:
        assert words[:2] == ["python", "-m"]
        words = [str(ASSETS) if word == "MODEL" else word for word in words[2:]]
        assert MAINS[words[0]](words[1:]) == 0, (words, capfd.readouterr())
    pairs = read_pairs(tmp_path / "pairs.parquet")
    assert len(pairs) >= 15
    assert all(pair.chosen != pair.rejected for pair in pairs)
    assert "<!doctype html>" in (tmp_path / "gallery.html").read_text()[:50].lower()
    log = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert len(log) >= 12
    for name in ("rewards/margins", "rewards/visual_margins"):  # "begin at 0 and should rise"
        assert abs(log[0][name]) < 0.01
        assert np.mean([entry[name] for entry in log[-4:]]) > 0.02, name
    model = load_trained(tmp_path / "run" / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "run" / "model")
    assert any("lora_" in name for name, _ in model.named_parameters()) and processor.image_token
