"""Commands, examples, columns and reasons in docs/pairs.md agree with the code."""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_pairs_import_bad import BAD

from realign.cli import parse_sections
from realign.config import TrainConfig
from realign.data.formats import FORMATS
from realign.data.records import Record
from realign.pairs.__main__ import main
from realign.pairs.config import PairsConfig
from realign.pairs.io.importers import read_any
from realign.pairs.pipeline import STAGES
from realign.pairs.stats import pair_rows

TEXT = (Path(__file__).parents[2] / "docs" / "pairs.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
]
OURS = [command[3:] for command in COMMANDS if command[:3] == ["python", "-m", "realign.pairs"]]
EXAMPLES = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)]


def test_every_command_is_known():
    others = {command[0] for command in COMMANDS if "realign.pairs" not in command}
    assert others == {"wget", "unzip", "python", "vllm"} and len(OURS) == 9


@pytest.mark.parametrize("words", [words for words in OURS if not words or words[0][0] == "-"])
def test_the_settings_of_each_command_are_valid(words):
    parsed = parse_sections({"pairs": PairsConfig}, prog="", description="", arguments=words)
    assert parsed["pairs"].output.endswith("pairs.parquet")


@pytest.mark.parametrize("words", [words for words in OURS if words and words[0][0] != "-"])
def test_other_commands_run(words, tmp_path, monkeypatch, capsys, pairs_file):
    monkeypatch.chdir(tmp_path)
    if words[0] == "import":
        (tmp_path / "dataset").mkdir()
        for name in "ab":
            Image.new("RGB", (8, 8)).save(tmp_path / "dataset" / f"{name}.jpg")
        (tmp_path / "pref_data.json").write_text(json.dumps(EXAMPLES[2]))
    else:
        (tmp_path / "pairs.parquet").write_bytes(pairs_file.read_bytes())
    assert main(words) == 0
    output = {"import": "wrote pairs.parquet", "gallery": "wrote gallery.html", "stats": "24 pairs"}
    assert output[words[0]] in capsys.readouterr().out


def test_every_flag_exists():
    known = {f"--{f.name.replace('_', '-')}" for f in fields(PairsConfig)}
    known |= {f"--{f.name.replace('_', '-')}" for f in fields(TrainConfig)}
    known |= {"--help", "--config", "--most", "--side", "--fsdp", "--dry-run", "--pairs"}
    known |= {"--port", "--data-parallel-size"}  # flags of vLLM
    known |= {"--noise", "--train"}  # flags of experiments.kept
    assert set(re.findall(r"--[a-z][a-z-]+", TEXT)) <= known


def test_the_table_lists_the_stages():
    rows = re.findall(r"^\| (\w+) \|", TEXT[: TEXT.index("## Formats")], re.MULTILINE)
    assert tuple(rows[1:]) == STAGES


def test_the_examples_are_read(tmp_path):
    (tmp_path / "cats").mkdir()
    for name in ("cats/001.jpg", "000000033471.jpg", "a.jpg", "b.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    found = []
    for number, example in enumerate(EXAMPLES):
        text = json.dumps(example)
        name = tmp_path / f"{number}.{'json' if isinstance(example, list) else 'jsonl'}"
        name.write_text(text)
        found += list(read_any(str(name)))
    assert all(isinstance(record, Record) for record in found)
    assert [record.chosen for record in found] == [
        "Two cats.",
        "The bus is white and red.",
        "A cat.",
    ]
    data = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for name in FORMATS:
        assert f"**{name}**" in TEXT or f"`{name}`" in data


def test_the_columns_of_the_output_are_listed(pairs_file):
    listed = TEXT[TEXT.index("**Output** is") : TEXT.index("`datasets` loads the file")]
    names = [n for n in pq.read_schema(pairs_file).names if n != "id"]
    assert set(re.findall(r"`(\w+)`", listed)) == set(names)
    assert {name for *_, row in pair_rows(pairs_file) for name in row} == {"id", *names}


def test_every_reason_is_explained():
    table = TEXT[TEXT.index("| reason |") : TEXT.index("Images are decoded as in training")]
    reasons = {reason for _, reason in BAD.values()} | {"corrupt", "too large", "no response"}
    assert reasons <= set(re.findall(r"`([^`]+)`", table))
