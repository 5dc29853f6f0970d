"""Digests of model folders in the pairs pipeline."""

import shutil
from dataclasses import replace

import pytest
from peft import LoraConfig, get_peft_model

from realign.data.records import write_pairs
from realign.digits import ASSETS
from realign.modeling.loading import load_model
from realign.pairs.io.rows import files_digest, model_digest
from realign.pairs.pipeline import PairsConfig, digit_sources, run_stages
from realign.pairs.stages.embed import Embed

FILES = ("config.json", "model.safetensors", "chat_template.jinja", "additional/tool.jinja")


@pytest.fixture
def model(tmp_path):
    """A folder with the file names of a model, for an engine that does not read them."""
    for name in FILES:
        file = tmp_path / "model" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("once")
    return tmp_path / "model"


@pytest.mark.parametrize("file", FILES)
def test_each_file_of_a_model_changes_its_digest(model, file):
    before = files_digest(str(model))
    assert files_digest(str(model)) == before
    (model / file).write_text("another")
    assert files_digest(str(model)) != before


def test_a_changed_sentence_model_embeds_again(tmp_path, model):
    config = PairsConfig(output=str(tmp_path / "pairs.parquet"), embed_model=f"st:{model}")
    before = Embed(config).settings()
    assert Embed(config).settings() == before
    (model / "config.json").write_text("another")
    assert Embed(config).settings() != before


def test_the_base_of_an_adapter_changes_its_digest(tmp_path):
    base = shutil.copytree(ASSETS, tmp_path / "base")
    model = get_peft_model(load_model(base), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    adapter = str(tmp_path / "adapter")
    before = model_digest(adapter)
    assert model_digest(adapter) == before != files_digest(adapter)
    (base / "runs").mkdir()  # files of runs in the base's folder are no part of the model
    (base / "runs" / "pairs.parquet").write_text("x")
    assert model_digest(adapter) == before
    (base / "generation_config.json").write_text("{ }")
    assert model_digest(adapter) != before


def test_a_model_whose_chat_template_changes_answers_again(tmp_path, model, engine):
    fake = engine(lambda _: "top left one , top right two .")
    sources = digit_sources(PairsConfig(scenes=4))
    write_pairs(tmp_path / "data.parquet", [replace(s, chosen="") for s in sources])
    config = PairsConfig(
        output=str(tmp_path / "pairs.parquet"),
        data=str(tmp_path / "data.parquet"),
        answer=f"transformers:{model}",
        mask="numbers",
        quiet=True,
    )
    first = run_stages(config, "mask").folders
    assert run_stages(config, "mask").folders == first and len(fake.asked) == 4
    (model / "chat_template.jinja").write_text("another")
    again = run_stages(config, "mask").folders
    assert len(fake.asked) == 8
    assert again["read"] == first["read"]
    assert again["answer"] != first["answer"] and again["mask"] != first["mask"]
