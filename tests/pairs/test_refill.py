"""Infill: forced tokens, gaps and batches, against a slow reference implementation."""

import re

import numpy as np
import pytest
import torch
from tiny_tokenizers import SPECIAL
from transformers.models.llama.modeling_llama import LlamaModel

from experiments.digits_pretrain import build_model
from realign.digits.scenes import CAPTION_PROMPT, caption_of, digits_in, make_scenes
from realign.pairs.infill.refill import Completion, infill, infill_plain
from realign.pairs.masking.mask import CATEGORIES, Masked, mask_response

PROMPT = [{"role": "user", "content": CAPTION_PROMPT}]


@pytest.fixture(scope="module")
def babbler(processor):
    """An untrained model, which fills gaps with many tokens. The trained one writes one digit."""
    torch.manual_seed(0)
    model = build_model(processor).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6)  # larger, so that the output depends on the input
    return model


@torch.inference_mode()
def slow_infill(vlm, processor, image, masked, max_gap_tokens) -> Completion:
    """Reference implementation without a cache or batches, only for word-level digits."""
    tokenizer = processor.tokenizer
    prompt = f"<s> user : <image> {CAPTION_PROMPT} assistant :"
    inputs = processor(images=[image], text=[prompt], return_tensors="pt")
    ids, pixels = inputs["input_ids"][0].tolist(), inputs["pixel_values"]
    special = set(tokenizer.convert_tokens_to_ids(SPECIAL))
    forced = [tokenizer.convert_tokens_to_ids(piece.split()) for piece in masked.pieces]
    forced[-1].append(tokenizer.eos_token_id)
    text, closed = masked.pieces[0], True
    ids += forced[0]
    for following, hidden, piece in zip(forced[1:], masked.hidden, masked.pieces[1:], strict=True):
        gap: list[int] = []
        while True:
            scores = vlm(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0, -1]
            if gap and scores.argmax().item() == following[0]:
                break
            if len(gap) == max(max_gap_tokens, 2 * len(hidden.split())):
                closed = False
                break
            allowed = [i for i in range(len(scores)) if i not in special]
            best = max(allowed, key=lambda i: scores[i].item())
            gap.append(best)
            ids.append(best)
        ids += following
        text += " ".join(tokenizer.convert_ids_to_tokens(gap)) + piece
    return Completion(text, closed)


def _infill(vlm, processor, images, masked, how=infill, **options) -> list[Completion]:
    prompts = [PROMPT] * len(masked)
    return how(vlm, processor, prompts, [[p] for p in images], masked, **options)


CAPTION = "top left seven , top right two , bottom left zero , bottom right nine ."
GAPS = [
    Masked(("top left ", " , top right two , bottom left zero ."), ("seven",)),
    Masked(("top left ", " , top right ", " , bottom left zero ."), ("seven", "two")),
    Masked(("", " left seven , top right two ."), ("top",)),
    Masked(("top left seven , top right ", ""), ("two .",)),
    Masked(("", " , top right ", ""), ("top left seven", "two .")),
    Masked(("", ""), ("top left seven",)),
    Masked(("top left seven , top right two , bottom left zero , bottom right ", ""), ("nine .",)),
]


@pytest.mark.parametrize("name", ["vlm", "babbler"])
def test_infill_equals_the_reference(request, processor, scenes, name):
    model, most = request.getfixturevalue(name), 4
    rng = np.random.default_rng(0)
    masked = GAPS + [mask_response(s.caption, CATEGORIES, 2, rng) for s in scenes[:8]]
    images = [scene.image for scene in scenes[: len(masked)]]
    expected = [
        slow_infill(model, processor, image, hidden, most)
        for image, hidden in zip(images, masked, strict=True)
    ]
    for how in (infill_plain, infill):
        found = _infill(model, processor, images, masked, how=how, max_gap_tokens=most)
        assert found == expected
    for i in range(0, len(masked), 4):
        part = slice(i, i + 1 + i % 3)
        one = _infill(model, processor, images[part], masked[part], max_gap_tokens=most)
        assert one == expected[part]
    lengths = set()
    for (text, _), hidden in zip(expected, masked, strict=True):
        gaps = re.fullmatch("(.+)".join(map(re.escape, hidden.pieces)), text).groups()
        lengths |= {len(gap.split()) for gap in gaps}
    assert most in lengths and len(lengths) > 1
    assert False in {completion.closed for completion in expected}
    assert name == "babbler" or True in {completion.closed for completion in expected}


def test_a_gap_ends_at_the_forced_token_but_is_never_empty(processor, scenes):
    """Uses a model that always writes "seven", then one that always ends the response."""

    class Constant(torch.nn.Module):
        device, dtype = torch.device("cpu"), torch.float32
        config = type("Config", (), {"model_type": "constant"})

        def __init__(self, *words):
            super().__init__()
            self.order = processor.tokenizer.convert_tokens_to_ids(words)

        def forward(self, input_ids, **_):
            logits = torch.zeros(*input_ids.shape, len(processor.tokenizer))
            for rank, token in enumerate(self.order):
                logits[..., token] = 2.0 - rank
            return type("Output", (), {"logits": logits})

    def written(model, *pieces, hid="one"):
        masked = Masked(pieces, (hid,) * (len(pieces) - 1))
        return _infill(model, processor, [scenes[0].image], [masked], how=infill_plain)[0]

    seven, end = Constant("seven"), Constant("</s>", "two")
    assert written(seven, "top ", " seven .") == ("top seven seven .", True)
    assert written(seven, "", " right") == (" ".join(["seven"] * 8) + " right", False)
    # A segment of many tokens may be replaced by twice as many.
    longer = " ".join(["seven"] * 14) + " right"
    assert written(seven, "", " right", hid="one " * 6 + "one") == (longer, False)
    # The model ends the response, which is allowed only after one word.
    assert written(end, "top ", "") == ("top two", True)
    not_due = " ".join(["two"] * 8) + " right"
    assert written(end, "", " right") == (not_due, False)


def test_prompts_of_different_lengths_do_not_disturb_each_other(babbler, processor, scenes):
    texts = ("is top left two ?", CAPTION_PROMPT, "name")
    prompts = [[{"role": "user", "content": text}] for text in texts]
    given = prompts, [[scene.image] for scene in scenes[:3]], GAPS[:3]
    batch = infill(babbler, processor, *given)
    for i in range(3):
        one = (part[i : i + 1] for part in given)
        assert infill(babbler, processor, *one) == [batch[i]]


def test_pairs_of_digits_differ_only_in_the_gaps(vlm, processor):
    """The words around the gaps are unchanged and at their places."""
    scenes, rng = make_scenes(240, biased=True, seed=11), np.random.default_rng(0)
    masked = []
    for i in range(240):
        caption = caption_of(tuple(int(d) for d in rng.integers(10, size=4)))
        kinds = ("numbers",) if i % 4 else CATEGORIES
        masked.append(mask_response(caption, kinds, (1, 2, 0)[i % 3], rng))
    completions = _infill(vlm, processor, [scene.image for scene in scenes], masked)
    different = 0
    for (text, _), mask in zip(completions, masked, strict=True):
        assert re.fullmatch("[a-z,. ]+".join(map(re.escape, mask.pieces)), text)
        assert text.split()[: len(mask.pieces[0].split())] == mask.pieces[0].split()
        different += text != mask.fill(mask.hidden)
    assert different > 160
    # With all four masked, the model writes the digits of the image, not of the caption.
    every = [i for i in range(240) if i % 3 == 2 and i % 4]
    read = [
        sum(a == b for a, b in zip(digits_in(completions[i].text), scenes[i].digits, strict=True))
        for i in every
    ]
    assert np.mean(read) / 4 > 0.6
    assert all(completions[i].closed for i in every)


def test_sampling_follows_the_seed_of_each_record(babbler, processor, scenes):
    images, masked = [scenes[0].image] * 6, [GAPS[1]] * 6

    def sampled(seeds, **options):
        options = {"temperature": 2.0} | options
        return _infill(babbler, processor, images, masked, seeds=seeds, **options)

    first = sampled(range(6))
    assert first == sampled(range(6)) != sampled(range(6, 12))
    assert first == sampled(range(6), how=infill_plain)
    # The place in the batch and the other rows do not matter.
    assert first[::-1] == sampled(range(5, -1, -1))
    assert len(set(first)) > 3 and len(set(sampled([3] * 6))) == 1
    greedy = _infill(babbler, processor, images, masked)
    assert len(set(greedy)) == 1
    assert sampled(range(6), temperature=1e-4) == greedy
    for text, _ in first:
        assert not re.search("<|>", text)  # never a special token


def test_sampled_words_have_the_model_s_frequencies(babbler, processor, scenes):
    """Chi-square test of 900 first words against the softmax of a plain forward pass."""
    image, masked = scenes[0].image, Masked(("top left ", " ."), ("seven",))
    prompt = f"<s> user : <image> {CAPTION_PROMPT} assistant : top left"
    inputs = processor(images=[image], text=[prompt], return_tensors="pt")
    with torch.no_grad():
        scores = babbler(**inputs).logits[0, -1].double() / 3
    scores[processor.tokenizer.convert_tokens_to_ids(SPECIAL)] = -torch.inf
    truth = scores.softmax(-1).numpy()
    count = 900
    found = np.zeros(len(truth))
    options = {"seeds": range(count), "temperature": 3.0, "max_gap_tokens": 1}
    for text, _ in _infill(babbler, processor, [image] * count, [masked] * count, **options):
        word = text.removeprefix("top left ").removesuffix(" .").split()[0]
        found[processor.tokenizer.convert_tokens_to_ids(word)] += 1
    often = truth * count >= 5
    assert found[truth == 0].sum() == 0 and often.sum() > 5
    square = ((found - truth * count)[often] ** 2 / (truth * count)[often]).sum()
    assert square < often.sum() + 5 * (2 * often.sum()) ** 0.5


def test_bad_arguments_are_refused(vlm, processor, scenes):
    for options, message in (
        ({"max_gap_tokens": 0}, "max_gap_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": 1.0}, "seeds is None; sampling"),
    ):
        with pytest.raises(ValueError, match=message):
            _infill(vlm, processor, [scenes[0].image], GAPS[:1], **options)


def test_no_records_and_no_gaps(vlm, processor, scenes):
    assert _infill(vlm, processor, [], []) == []
    whole = Masked((CAPTION,), ())
    assert _infill(vlm, processor, [scenes[0].image], [whole]) == [Completion(CAPTION, True)]


def test_a_batch_takes_a_tenth_of_the_forwards(vlm, processor, scenes, monkeypatch):
    """Counts forward passes and tokens of the language model, for 30 records with two gaps."""
    rng = np.random.default_rng(0)
    masked = [mask_response(s.caption, ("numbers",), 2, rng) for s in scenes[:30]]
    images = [s.image for s in scenes[1:31]]
    read: list[int] = []
    forward = LlamaModel.forward

    def counted(self, *args, inputs_embeds, **kwargs):
        read.append(inputs_embeds.shape[0] * inputs_embeds.shape[1])
        return forward(self, *args, inputs_embeds=inputs_embeds, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", counted)
    plain = _infill(vlm, processor, images, masked, how=infill_plain)
    slow, slow_tokens = len(read), sum(read)
    read.clear()
    assert _infill(vlm, processor, images, masked) == plain
    assert len(read) * 10 < slow and sum(read) * 3 < slow_tokens
    # Prompt and image have 26 tokens, and the caption 16. Each is read once, with little padding.
    assert sum(read) < 30 * 60
