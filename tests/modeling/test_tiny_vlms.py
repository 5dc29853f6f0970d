"""Tiny models of the VLM families depend on every image and token, on masks and on positions."""

import functools

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_more import CASES
from tiny_truth import encode, separate_logps, with_response
from tiny_vlms import FAMILIES, make, random_images

from realign.modeling.encode import chat_prompt

SIZES = [(28, 28), (28, 56), (56, 49)]
EVERY = (*FAMILIES, "qwen3_5", *CASES)
TURNS = ({"role": "user", "content": "the red dot is left of a small blue bar"},)


@pytest.fixture(scope="module")
def made():
    """Every family's model and processor, shared by all tests, so never change them."""
    return functools.cache(make)


def _prompt(processor, images, turns=TURNS):
    return chat_prompt(processor, turns, images)[0]


def _images(family, seed):
    """Two images of different sizes, or one where the processor takes only one."""
    count = CASES[family].images if family in CASES else 2
    return random_images(np.random.default_rng(seed), 2, SIZES[1:])[:count]


def _response(processor):
    return processor.tokenizer.convert_tokens_to_ids(["red", "green", "blue", "one"])


@torch.no_grad()
def _logps(vlm, processor, inputs, *more):
    return separate_logps(vlm, inputs, [[*_response(processor), *more]])[0]


@pytest.mark.parametrize("family", EVERY)
def test_log_probs_depend_on_every_image_and_early_token(made, family):
    vlm, processor = made(family)
    images = _images(family, 2)
    count = len(images)
    inputs = encode(processor, images, _prompt(processor, count))
    base = _logps(vlm, processor, inputs)
    assert torch.equal(base, _logps(vlm, processor, inputs))
    assert base.std() > 0.1 and (base < -0.5).any()
    for place in range(count):
        changed = list(images)
        pixels = np.array(changed[place])
        pixels[4:18, 4:18] = 255 - pixels[4:18, 4:18]
        changed[place] = Image.fromarray(pixels)
        other = encode(processor, changed, _prompt(processor, count))
        assert (_logps(vlm, processor, other) - base).abs().max() > 1e-2
    if count == 2:  # their order matters
        other = encode(processor, images[::-1], _prompt(processor, count))
        assert (_logps(vlm, processor, other) - base).abs().max() > 1e-2
    words = [{"type": "text", "text": TURNS[0]["content"]}]
    behind = ({"role": "user", "content": words + [{"type": "image"}] * count},)
    moved = encode(processor, images, _prompt(processor, count, behind))
    assert (_logps(vlm, processor, moved) - base).abs().max() > 1e-2
    swapped = dict(inputs, input_ids=inputs["input_ids"].clone())
    words = processor.tokenizer("the red", add_special_tokens=False)["input_ids"]
    first = (swapped["input_ids"][0] == words[0]).nonzero()[0]
    swapped["input_ids"][0, first] = words[1]
    assert (_logps(vlm, processor, swapped) - base).abs().max() > 1e-2
    longer = _logps(vlm, processor, inputs, _response(processor)[0])
    torch.testing.assert_close(longer[:-1], base, atol=1e-5, rtol=0)  # later tokens have no effect


@pytest.mark.parametrize("family", EVERY)
def test_the_truth_is_what_generate_computes(made, family):
    """Token by token with a cache, in the processor's own rendering, and in training mode."""
    vlm, processor = made(family)
    images = _images(family, 6)
    text, messages = chat_prompt(processor, TURNS, len(images))
    inputs = encode(processor, images, text)
    parts = [{"type": "image", "image": image} for image in images]
    parts += messages[0]["content"][len(images) :]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    messages = [{"role": "user", "content": parts}]
    theirs = processor.apply_chat_template(messages, return_tensors="pt", **options)
    assert all(torch.equal(inputs[name], theirs[name]) for name in theirs)
    special = processor.tokenizer.convert_tokens_to_ids("\n")  # the first id of a word
    given = {name: value for name, value in inputs.items() if name != "labels"}
    answer = vlm.generate(
        **given, max_new_tokens=4, do_sample=False, eos_token_id=[1 << 20], pad_token_id=0,
        suppress_tokens=[*range(special)], return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    response = answer.sequences[0, inputs["input_ids"].shape[1] :]
    logits = torch.cat(answer.logits).double().log_softmax(-1)
    generated = logits.gather(1, response[:, None])[:, 0]
    with torch.no_grad():
        for mode in (vlm.train, vlm.eval):
            mode()
            scored = separate_logps(vlm, inputs, [response.tolist()])[0]
            torch.testing.assert_close(scored, generated, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_sliding_windows_and_bidirectional_blocks_have_an_effect(made, family):
    vlm, processor = made(family)
    images = random_images(np.random.default_rng(3), 2)
    inputs = encode(processor, images, _prompt(processor, 2))
    base = _logps(vlm, processor, inputs)
    causal = {name: value for name, value in inputs.items() if name != "token_type_ids"}
    assert (_logps(vlm, processor, causal) - base).abs().max() > 1e-2
    wider, _ = make(family)
    assert torch.equal(_logps(wider, processor, inputs), base)
    wider.config.text_config.sliding_window = 512
    assert (_logps(wider, processor, inputs) - base).abs().max() > 1e-2


def test_paligemma_is_scored_as_its_processor_encodes_a_suffix(made):
    vlm, processor = made("paligemma")
    images = random_images(np.random.default_rng(4), 2)
    text, answer = _prompt(processor, 2), "the large red bar"
    response = processor.tokenizer(answer + "<eos>", add_special_tokens=False)["input_ids"]
    ours = with_response(encode(processor, images, text), response, "paligemma")
    theirs = processor(images=images, text=[text], suffix=[answer], return_tensors="pt")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_m_rope_positions_have_an_effect(made, family):
    vlm, processor = made(family)
    inputs = encode(
        processor, random_images(np.random.default_rng(5), 2, SIZES[1:]), _prompt(processor, 2)
    )
    response = _response(processor)
    longer = with_response(inputs, response, family)
    plain = torch.arange(longer["input_ids"].shape[1])[None]
    with torch.no_grad():
        logits = vlm(**longer, position_ids=plain, use_cache=False).logits[0, -5:-1]
    flat = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
    assert (flat - _logps(vlm, processor, inputs)).abs().max() > 1e-2
