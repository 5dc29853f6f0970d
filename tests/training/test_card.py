"""The model card in an exported folder, and loading of that folder by its code."""

import importlib.metadata

import numpy as np
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from runs import run
from transformers import AutoModelForImageTextToText

from realign.config import TrainConfig
from realign.data.records import read_pairs
from realign.digits import ASSETS
from realign.digits.scenes import digits_in, make_scenes
from realign.evaluate import caption
from realign.modeling.loading import load_model
from realign.training.model_card import model_card, settings_of


def test_exported_folders_have_cards_and_load_in_plain_transformers(pairs_file, tmp_path):
    scenes = make_scenes(8, biased=True, split="train", seed=5)
    captions, weights = {}, {}
    for kind, *flags in (("adapter",), ("merged", "--merge"), ("full", "--tune", "full")):
        run(pairs_file, tmp_path / kind, *flags, steps=2)
        folder = tmp_path / kind / "model"
        card = ModelCard.load(folder / "README.md")
        data = card.data.to_dict()
        assert data["pipeline_tag"] == "image-text-to-text" and "rdpo" in data["tags"]
        assert data["library_name"] == ("peft" if kind == "adapter" else "transformers")
        assert "base_model" not in data  # a local folder is not a name on the Hub
        text = card.text
        assert str(tmp_path) not in text and str(ASSETS) not in text
        assert "| objective | rdpo |" in text and "| beta | 0.1 |" in text
        assert f"| torch | {torch.__version__} |" in text
        assert f"{len(read_pairs(pairs_file))} preference records with" in text
        serve = "vllm serve assets --enable-lora --max-lora-rank 32 --lora-modules aligned=THIS_FO"
        assert (serve in text) == (kind == "adapter")
        assert ("vllm serve THIS_FOLDER\n" in text) == (kind != "adapter")
        code = text.split("```python\n")[1].split("```")[0]
        code = code.replace("THIS_FOLDER", str(folder)).replace(f'"{ASSETS.name}"', f'"{ASSETS}"')
        found: dict = {}
        exec(code, found)
        assert isinstance(found["model"], PeftModel) == (kind == "adapter")
        model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        assert type(model).__name__ == "LlavaForConditionalGeneration"
        captions[kind] = caption(model, found["processor"], scenes)
        weights[kind] = dict(model.named_parameters())
    assert captions["merged"] == captions["adapter"]
    right = [digits_in(c) == list(s.digits) for c, s in zip(captions["full"], scenes, strict=True)]
    assert np.mean(right) >= 0.75  # biased scenes of training digits, which the base reads
    base = dict(load_model(ASSETS).named_parameters())
    moved = {n for n, value in weights["full"].items() if not torch.equal(value.float(), base[n])}
    assert any("language_model" in name for name in moved) and "lm_head.weight" in moved
    assert not any("vision_tower" in name for name in moved)


def test_a_card_of_a_model_on_the_hub():
    card = ModelCard(
        model_card(
            "rdpo",
            settings_of(TrainConfig()),
            base="llava-hf/llava-1.5-7b-hf",
            adapter=True,
            commands="",
            records=11_000,
            images=22_000,
            digests={"records": "abc"},
            last={"step": 343, "loss": 0.51234, "rewards/margins": 1.5},
        )
    )
    assert card.data.base_model == "llava-hf/llava-1.5-7b-hf"
    assert "# llava-hf/llava-1.5-7b-hf, aligned by rdpo" in card.text
    assert "11,000 preference records with 22,000 distinct images" in card.text
    assert "| loss | 0.5123 |" in card.text and "The last step (343)" in card.text
    assert "Digest of the records: `abc`" in card.text


def test_a_card_from_a_checkout_that_is_not_installed(monkeypatch):
    version = importlib.metadata.version

    def missing(name):
        if name == "realign":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    about = {"adapter": True, "commands": "", "records": 1, "images": 1, "digests": {}, "last": {}}
    text = model_card("rdpo", settings_of(TrainConfig()), base="llava", **about)
    assert "| realign | not installed |" in text and f"| torch | {torch.__version__} |" in text
