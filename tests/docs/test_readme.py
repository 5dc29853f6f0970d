"""README.md: its Python block and its commands run, and the names on all pages exist."""

import importlib.util
import json
import re
import runpy
import shlex
import sys
from functools import partial
from pathlib import Path

import pytest
from forked_ranks import run_command, run_ranks
from transformers import AutoModelForImageTextToText, AutoProcessor

from realign import cache, distributed, export, train
from realign.demo import __main__ as demo
from realign.digits import ASSETS
from realign.digits.scenes import CAPTION_PROMPT, digits_in, make_scenes
from realign.evaluate import __main__ as evaluate
from realign.evaluate.command import COMMANDS
from realign.pairs import __main__ as pairs
from realign.pairs import pipeline
from realign.pairs.pipeline import PairsConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


TRAINING, CACHE = ((ROOT / "docs" / f"{n}.md").read_text() for n in ("training", "reference-cache"))


def blocks(kind, page=README):
    return re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL)


def commands(page=README):
    lines = "\n".join(blocks("console", page)).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_the_python_block_runs(capsys):
    (block,) = blocks("python")
    exec(compile(block, "README.md", "exec"), {})
    assert "tensor" in capsys.readouterr().out


def test_ci_runs_the_make_and_pip_commands():
    makefile, checks = (ROOT / "Makefile").read_text(), (ROOT / ".ci" / "run").read_text()
    for program, *words in commands():
        if program == "make":
            assert f"\n{words[0]}:" in makefile
        elif program == "pip":
            assert " ".join(words[1:]) in checks.replace("'", "")
        else:
            assert (program, words[0]) == ("python", "-m")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the files that the commands read: images, and a model in place of LLaVA."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "my-images"
    folder.mkdir()
    lines = []
    for i, scene in enumerate(make_scenes(40, biased=True, split="train", seed=4)):
        scene.image.save(folder / f"{i:03d}.png")
        line = {"image": f"{i:03d}.png", "question": CAPTION_PROMPT, "answer": scene.caption}
        lines.append(json.dumps(line))
    (folder / "questions.jsonl").write_text("\n".join(lines))
    Path("llava-hf").mkdir()
    Path("llava-hf/llava-1.5-7b-hf").symlink_to(ASSETS)


def _run(words, monkeypatch, capfd):
    """Output of `python -m WORDS`, in this process, which has loaded the libraries."""
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    shown = capfd.readouterr()
    assert end.value.code == 0, (words, shown)
    return shown.out


def test_the_commands_run_in_order(workplace, monkeypatch, capfd):
    """Two ranks, started by the launcher, find the log-probs that `fill` computed."""
    (fill,) = (words[2:] for words in commands(CACHE) if "fill" in words)
    *before, train_on_ranks = (words[2:] for words in commands() if words[0] == "python")
    for words in (*before, fill):
        _run(words, monkeypatch, capfd)
    assert "runs/llava" in train_on_ranks
    shown = _run(train_on_ranks, monkeypatch, capfd)
    assert re.search(r"(\d+) of \1 leaves known", shown), shown
    ran = {words[0] for words in (*before, fill, train_on_ranks)}
    assert ran == {"realign.pairs", "realign.cache", "realign.train"}


def test_the_commands_of_the_training_page_run(tmp_path, monkeypatch, capfd):
    """On few scenes, with forked ranks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "PairsConfig", partial(PairsConfig, scenes=64))
    monkeypatch.setattr(distributed, "launch", partial(_forked, tmp_path / "log"))
    ran = [words[2:] for words in commands(TRAINING.partition("\n## ")[0])]
    for words in ran:
        assert words[0] != "realign.evaluate" or "1000" in words
        shown = _run(["50" if w == "1000" else w for w in words], monkeypatch, capfd)
        if words == ["realign.train", "--fsdp"]:
            assert "on 2 rank(s)" in shown
            _captions_in_plain_transformers(tmp_path / "runs" / "rdpo")
    assert [words[0] for words in ran] == ["realign.train", "realign.train", "realign.evaluate"]


def _forked(log, module, arguments, workers):
    print(run_ranks(run_command, workers or distributed._default_workers(), log, module, arguments))
    return 0


def _captions_in_plain_transformers(folder):
    """The final model of a run without arguments names the digits of a scene."""
    assert json.loads((folder / "run.json").read_text())["config"]["loss"]["objective"] == "rdpo"
    model = AutoModelForImageTextToText.from_pretrained(folder / "model").eval()
    processor = AutoProcessor.from_pretrained(folder / "model")
    scenes = make_scenes(20, biased=False, split="test", seed=11)
    content = [{"type": "image"}, {"type": "text", "text": CAPTION_PROMPT}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    right = 0
    for scene in scenes:
        batch = processor(images=[scene.image], text=[text], return_tensors="pt")
        ids = model.generate(**batch, max_new_tokens=24, do_sample=False)
        answer = processor.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(a == b for a, b in zip(digits_in(answer), scene.digits, strict=True))
    assert right >= 0.75 * 80  # 88 % over many scenes


def test_every_flag_named_exists(capsys):
    """Each flag on these pages is a flag of some command."""
    for main, words in (
        (train.main, []),
        (pairs.main, []),
        (evaluate.main, []),
        *((evaluate.main, [command]) for command in COMMANDS),
        (demo.main, []),
        (cache.main, ["fill"]),
        (export.main, []),
    ):
        with pytest.raises(SystemExit):
            main([*words, "--help"])
    helps = capsys.readouterr().out
    names = ("trainers", "evaluation", "quick-start", "objectives", "data")
    pages = README + "".join((ROOT / "docs" / f"{name}.md").read_text() for name in names)
    # Flags with underscores belong to other projects, which tables compare with.
    named = set(re.findall(r"(--[a-z][a-z-]*)(?![\w-])", pages))
    pip_options = {"--help"}
    missing = {flag for flag in named if not re.search(rf"{flag}\b", helps)} - pip_options
    assert not missing


def test_names_of_pages_exist():
    """Files, modules and imports on pages; docs/decisions.md also names removed ones."""
    missing = []
    kept = r"`((?:realign|realign_kernels|tests|benchmarks|csrc|experiments|docs)/[\w/.]+\w)`"
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        if page.name == "decisions.md":
            continue
        text = page.read_text()
        missing += [(page.name, f) for f in re.findall(kept, text) if not (ROOT / f).exists()]
        for module in re.findall(r"python -m ((?:realign|benchmarks|experiments)[\w.]*\w)", text):
            if not importlib.util.find_spec(module):
                missing.append((page.name, module))
        for module, names in re.findall(r"^from (realign[\w.]*) import ([\w, ]+)$", text, re.M):
            found = importlib.import_module(module)
            missing += [(page.name, module, n) for n in names.split(", ") if not hasattr(found, n)]
    assert not missing
