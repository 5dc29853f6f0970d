"""--min-pixels and --max-pixels: sizes against transformers, and their way through a run."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_vlms
import torch
from PIL import Image
from runs import arguments
from transformers import AutoProcessor

from realign import cache
from realign.config import parse
from realign.data.records import write_pairs
from realign.digits import ASSETS
from realign.evaluate.answering import Question, prepare
from realign.modeling.loading import load_model, load_processor, set_pixels
from realign.modeling.reference_logps import description
from realign.pairs.config import PairsConfig
from realign.pairs.engines import make_engine
from realign.pairs.filters.margin import VisualMargin
from realign.pairs.infill.refill import load_vlm
from realign.pairs.io.rows import engine_identity
from realign.train import main, train

LIMITS = {"min_pixels": 14 * 14 * 4, "max_pixels": 14 * 14 * 9}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    vlm, processor = tiny_vlms.make("qwen2_5_vl")
    vlm.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("limits", [LIMITS, {"max_pixels": 14 * 14 * 6}])
def test_images_have_the_size_that_transformers_gives_them(qwen, limits):
    found = load_processor(qwen, **limits)
    true, plain = AutoProcessor.from_pretrained(qwen, **limits), load_processor(qwen)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 140, 3), np.uint8))
    few, same, many = (
        processor.image_processor(image, return_tensors="pt") for processor in (found, true, plain)
    )
    assert torch.equal(few["pixel_values"], same["pixel_values"])
    assert torch.equal(few["image_grid_thw"], same["image_grid_thw"])
    assert 0 < len(few["pixel_values"]) < len(many["pixel_values"])


def test_a_run_uses_records_and_exports_the_limits(qwen, tmp_path, capsys):
    rng, processor = np.random.default_rng(0), load_processor(qwen)
    records = [tiny_vlms.random_record("qwen2_5_vl", processor, rng) for _ in range(4)]
    pairs, run = tmp_path / "pairs.parquet", tmp_path / "run"
    write_pairs(pairs, records)
    words = [word for name, n in LIMITS.items() for word in (f"--{name.replace('_', '-')}", str(n))]
    common = ["--model", str(qwen), "--reference-cache", str(tmp_path / "cache")]
    fill = ["fill", "--pairs", str(pairs), "--dtype", "fp32", "--quiet", *common]
    assert cache.main([*fill, *words]) == 0
    given = arguments(pairs, run, *common, "--batch-size", 4, "--save-every", 1, steps=1)
    capsys.readouterr()
    assert main([*given, *words]) == 0
    known, _, total = capsys.readouterr().out.split(" leaves known")[0].split()[-3:]
    assert known == total
    size = load_processor(run / "model").image_processor.size
    assert (size.shortest_edge, size.longest_edge) == tuple(LIMITS.values())
    with pytest.raises(ValueError, match=r"max_pixels \(1764 -> None\)"):
        train(parse([*given, "--resume"]))


def test_limits_are_part_of_the_fingerprint(qwen):
    vlm, seen = load_model(qwen, meta=True), set()
    for limits in ({}, LIMITS, LIMITS | {"max_pixels": 14 * 14 * 12}):
        processor = load_processor(qwen, **limits)
        seen.add(description(vlm, processor, torch.float32, torch.device("cpu"))["processor"])
    assert len(seen) == 3


def test_limits_without_effect_are_refused(qwen):
    with pytest.raises(ValueError, match="no effect: CLIPImageProcessor.* does not resize"):
        load_processor(ASSETS, max_pixels=100)
    with pytest.raises(ValueError, match="enlarged to .* pixels and reduced to 100. Set both"):
        set_pixels(load_processor(qwen), None, 100)
    for words, message in [
        (["--max-pixels", "0"], "^--max-pixels is 0; it must be from 1 to 2,147,483,648"),
        (["--min-pixels", "20000000"], "--min-pixels is 20000000; it must be .* 16,777,216"),
        (["--min-pixels", "9", "--max-pixels", "8"], "--min-pixels is 9, above --max-pixels, 8"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse(words)


def test_engines_and_pairs_use_the_limits(qwen, tmp_path):
    engine = make_engine(f"transformers:{qwen}", dtype="fp32", workers=0, **LIMITS)
    engine.open()
    size = engine._processor.image_processor.size
    assert (size.shortest_edge, size.longest_edge) == tuple(LIMITS.values())
    size = load_vlm(str(qwen), "fp32", **LIMITS)[1].image_processor.size
    assert (size.shortest_edge, size.longest_edge) == tuple(LIMITS.values())
    plain = PairsConfig(output=str(tmp_path / "pairs.parquet"))
    limited = replace(plain, **LIMITS)
    assert limited.engine_options.items() >= LIMITS.items() and limited.pixels == LIMITS
    spec = f"transformers:{qwen}"
    marks = [engine_identity(spec, config.computed) for config in (plain, limited)]
    assert marks[0] == engine_identity(spec, "fp32") != marks[1]
    settings = [VisualMargin(config).settings() for config in (plain, limited)]
    assert settings[0] != settings[1]  # else margins of other sizes are kept
    with pytest.raises(ValueError, match="--max-pixels is 0"):
        replace(plain, max_pixels=0)


def test_answers_of_other_sizes_are_not_mixed(qwen, tmp_path):
    questions, images = [Question("1", "Is it?", None)], tmp_path / "images"
    images.mkdir()
    known = {"model": str(qwen), "max_tokens": 4}
    output = tmp_path / "answers.jsonl"
    asked = prepare(questions, images, output, **known, settings=LIMITS).asked
    assert asked.items() >= LIMITS.items()
    output.write_text(json.dumps({"asked": asked}) + "\n")
    with pytest.raises(ValueError, match="for a different min_pixels, max_pixels"):
        prepare(questions, images, output, **known)
