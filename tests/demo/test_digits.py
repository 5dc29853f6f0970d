"""The embedded default: scenes, captions, questions, processor and the shipped checkpoint."""

import itertools
import re
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sklearn.datasets import load_digits
from transformers import AutoModelForImageTextToText, AutoProcessor

from experiments.study import photographs
from realign.digits import ASSETS
from realign.digits.processor import build_processor, vocabulary
from realign.digits.scenes import (
    CAPTION_PROMPT,
    CELL,
    PLACES,
    SIZE,
    TEST_DIGITS,
    WORDS,
    caption_of,
    digits_in,
    make_questions,
    make_scenes,
    prior,
)

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def _glyphs_of(scenes) -> set[bytes]:
    """The handwritten digits in noiseless scenes, as bytes of sklearn's 0..16 grey levels."""
    found = set()
    for scene in scenes:
        pixels = np.asarray(scene.image.convert("L")).astype(float)
        levels = np.ceil(pixels * 16 / 255).astype(np.uint8)  # undoes the truncation to bytes
        for y, x in itertools.product((0, CELL), repeat=2):
            found.add(levels[y : y + CELL, x : x + CELL].tobytes())
    return found


def test_train_and_test_share_no_handwritten_digit():
    every = [image.astype(np.uint8).tobytes() for image in load_digits().images]
    train, test = set(every[:-TEST_DIGITS]), set(every[-TEST_DIGITS:])
    assert not train & test
    shown = {
        split: _glyphs_of(make_scenes(400, biased=False, split=split, noise=0.0))
        for split in ("train", "test")
    }
    assert shown["train"] <= train and shown["test"] <= test
    assert len(shown["train"]) > 700 and len(shown["test"]) > 300  # not a few repeated digits


def test_train_and_test_patches_of_a_photograph_share_no_pixel(monkeypatch):
    def numbered(photograph):  # every pixel of the scaled photograph is its own number
        rows, columns = photograph.shape[:2]
        scale = photographs.SHORT_SIDE / min(rows, columns)
        size = round(rows * scale), round(columns * scale)
        return np.repeat(np.arange(size[0] * size[1], dtype=np.float64).reshape(*size, 1), 3, 2)

    monkeypatch.setattr(photographs, "_pixels", numbered)
    pixels = {split: photographs.patches.__wrapped__(split) for split in ("train", "test")}
    for number in range(10):
        train, test = (np.unique(pixels[split][number][..., 0]) for split in ("train", "test"))
        assert not len(np.intersect1d(train, test, assume_unique=True))
        assert len(train) > 2 * len(test) > 0


def test_scenes_of_photographs_show_those_they_name():
    names = [*photographs.PHOTOGRAPHS]
    for split in ("train", "test"):
        of = {
            patch.tobytes(): names[number]
            for number, found in photographs.patches(split).items()
            for patch in (found * 255).astype(np.uint8)
        }
        for scene in make_scenes(
            30, biased=False, split=split, noise=0.0, glyphs=photographs.patches, seed=3
        ):
            pixels = np.asarray(scene.image)
            cells = [(0, 0), (0, CELL), (CELL, 0), (CELL, CELL)]  # the order of PLACES
            shown = [of[pixels[y : y + CELL, x : x + CELL].tobytes()] for y, x in cells]
            assert shown == [names[digit] for digit in scene.digits]


def test_photographs_need_scikit_image(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ValueError, match=r"realign\[study\]"):
        photographs.patches.__wrapped__("train")


def test_scenes_show_the_digits_they_name():
    data = load_digits()
    label = {i.astype(np.uint8).tobytes(): t for i, t in zip(data.images, data.target, strict=True)}
    for scene in make_scenes(50, biased=True, noise=0.0):
        levels = np.ceil(np.asarray(scene.image.convert("L")).astype(float) * 16 / 255)
        cells = [(0, 0), (0, CELL), (CELL, 0), (CELL, CELL)]  # the order of PLACES
        seen = [levels[y : y + CELL, x : x + CELL].astype(np.uint8).tobytes() for y, x in cells]
        assert tuple(label[glyph] for glyph in seen) == scene.digits


def test_a_seed_fixes_the_pixels():
    def drawn(**options):
        return [s.image.tobytes() for s in make_scenes(5, **({"biased": True} | options))]

    first = drawn(seed=3)
    assert first == drawn(seed=3)
    assert len(set(first)) == 5
    for other in (drawn(seed=4), drawn(seed=3, biased=False), drawn(seed=3, split="test")):
        assert not set(first) & set(other)
    scene = make_scenes(1, biased=True)[0]
    assert scene.image.size == (SIZE, SIZE) and scene.image.mode == "RGB"


@pytest.mark.parametrize(("biased", "share"), [(True, 0.97 + 0.03 * 0.1), (False, 0.1)])
def test_how_many_rows_follow_the_prior(biased, share):
    digits = np.array([s.digits for s in make_scenes(2000, biased=biased, seed=1)])
    left, right = digits[:, 0::2].ravel(), digits[:, 1::2].ravel()
    follows = right == (3 * left + 7) % 10
    error = np.sqrt(share * (1 - share) / follows.size)
    assert abs(follows.mean() - share) < 4 * error
    assert np.bincount(left, minlength=10).min() > 0.08 * left.size  # every digit is drawn
    assert [prior(d) for d in range(10)] == [7, 0, 3, 6, 9, 2, 5, 8, 1, 4]


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="split is 'val'.*'train' or 'test'"):
        make_scenes(1, biased=True, split="val")


def test_captions_read_back_for_all_digits():
    for digits in itertools.product(range(10), repeat=4):
        assert digits_in(caption_of(digits)) == list(digits)
    assert caption_of((7, 2, 0, 9)) == (
        "top left seven , top right two , bottom left zero , bottom right nine ."
    )


@pytest.mark.parametrize(
    ("caption", "digits"),
    [
        ("", [None] * 4),
        ("seven two zero nine", [None] * 4),
        ("top left , top right two", [None, 2, None, None]),
        ("top left seventeen , top right two .", [None, 2, None, None]),
        ("Bottom Right NINE. top left one", [1, None, None, 9]),
        ("top left", [None] * 4),
        ("top left one , top left two", [1, None, None, None]),
    ],
)
def test_missing_digits_of_a_caption_are_none(caption, digits):
    assert digits_in(caption) == digits


def test_the_answers_are_true():
    rng = np.random.default_rng(0)
    asked = set()
    for scene in make_scenes(600, biased=False, seed=2):
        questions = make_questions(scene, rng)
        assert [q.answer for q in questions] == ["yes", "no"]
        for question in questions:
            stated = re.fullmatch(r"is (\w+ \w+ \w+) \?", question.text)[1]  # "top left seven"
            assert (stated in scene.caption) == (question.answer == "yes")
            asked.add((question.answer, stated))
    assert len(asked) == 80  # every digit at every place, with either answer


def test_the_processor_survives_saving(tmp_path, scenes):
    made = build_processor()
    made.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    shipped = AutoProcessor.from_pretrained(ASSETS)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": CAPTION_PROMPT}]},
        {"role": "assistant", "content": scenes[0].caption},
    ]
    expected = None
    for processor in (made, loaded, shipped):
        text = processor.apply_chat_template(messages)
        assert text == f"<s> user : <image> {CAPTION_PROMPT} assistant : {scenes[0].caption} </s>"
        out = processor(images=[scenes[0].image], text=[text], return_tensors="pt")
        expected = expected or out
        assert out["input_ids"].tolist() == expected["input_ids"].tolist()
        assert torch.equal(out["pixel_values"], expected["pixel_values"])
    # The image has the model's size, so pixels are only scaled to [-1, 1].
    pixels = torch.tensor(np.asarray(scenes[0].image)).permute(2, 0, 1) / 255 * 2 - 1
    assert torch.allclose(expected["pixel_values"][0], pixels, atol=1e-6)


def test_every_word_has_a_token(processor):
    tokenizer = processor.tokenizer
    texts = [CAPTION_PROMPT, "yes", "no", *(f"is {p} {w} ?" for p in PLACES for w in WORDS)]
    texts += [caption_of((d,) * 4) for d in range(10)]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == text.split()
        assert tokenizer.unk_token_id not in ids
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == vocabulary()
    assert tuple(NAMES) == WORDS and len(PLACES) == 4


def test_the_shipped_checkpoint(scenes):
    files = [file for file in ASSETS.iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 3_000_000
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".pth", ".pkl")]
    with safe_open(ASSETS / "model.safetensors", "pt") as tensors:
        kinds = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    assert kinds == {"BF16"}

    model = AutoModelForImageTextToText.from_pretrained(ASSETS).eval()
    processor = AutoProcessor.from_pretrained(ASSETS)
    assert model.config.model_type == "llava"
    assert model.config.text_config.vocab_size == len(processor.tokenizer)
    assert model.config.image_token_id == processor.tokenizer.convert_tokens_to_ids("<image>")
    prompt = f"<s> user : <image> {CAPTION_PROMPT} assistant :"
    inputs = processor(
        images=[s.image for s in scenes[:20]], text=[prompt] * 20, return_tensors="pt"
    )
    written = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    captions = processor.batch_decode(
        written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    named = [digits_in(caption) for caption in captions]
    assert all(None not in digits for digits in named)  # captions have the right form
    assert (
        np.mean(np.array(named) == [scene.digits for scene in scenes[:20]]) > 0.8
    )  # biased training digits; chance is 0.1
