"""Infill: forced tokens, gaps, batches, against a slow way to the same completions."""

import re

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

from realign.digits.pretrain import build_model
from realign.digits.scenes import CAPTION_PROMPT, caption_of, digits_in
from realign.pairs.mask import CATEGORIES, Masked, mask_response
from realign.pairs.refill import Completion, forced_pieces, infill

PROMPT = [{"role": "user", "content": CAPTION_PROMPT}]
SENTENCE = "Two small red dogs sit near a big tree, behind the house."


def _bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Tokens of some letters each with the space before, as in byte-level BPE."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "b"), ("Ġb", "i"), ("d", "o"), ("Ġ", "t"), ("Ġt", "r"), ("e", "e")]
    tokens = ["</s>", *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.mark.parametrize("kind", ["words", "bytes"])
@pytest.mark.parametrize("segments", [1, 2, 0])
def test_forced_pieces_are_the_tokens_around_the_gaps(kind, segments, processor):
    tokenizer = processor.tokenizer if kind == "words" else _bytes_tokenizer()
    text = (
        "two dogs near a big tree, behind the big house."
        if kind == "bytes"
        else ("top left seven , top right two , bottom left zero .")
    )
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    rng = np.random.default_rng(1)
    for _ in range(10):
        masked = mask_response(text, CATEGORIES, segments, rng)
        pieces = forced_pieces(tokenizer, masked)
        assert len(pieces) == len(masked.pieces)
        assert pieces[-1][-1] == tokenizer.eos_token_id
        # What is left of the tokenization between two pieces spells the hidden words.
        rest, gaps = whole + [tokenizer.eos_token_id], []
        for piece, hidden in zip(pieces, (*masked.hidden, ""), strict=True):
            assert rest[: len(piece)] == piece
            rest = rest[len(piece) :]
            starts = [tokenizer.decode(rest[:n]).strip() for n in range(len(rest) + 1)]
            assert hidden in starts
            spelled = starts.index(hidden)
            gaps.append(rest[:spelled])
            rest = rest[spelled:]
        assert rest == []
        joined = [t for p, g in zip(pieces, gaps, strict=True) for t in (*p, *g)]
        assert joined == [*whole, tokenizer.eos_token_id]


@pytest.fixture(scope="module")
def babbler(processor):
    """An untrained model: it fills gaps with many tokens, where the trained one writes a digit."""
    torch.manual_seed(0)
    model = build_model(processor).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6)  # so that what was read decides what is written
    return model


@torch.inference_mode()
def slow_infill(vlm, processor, picture, masked, max_gap_tokens) -> Completion:
    """The specification: no cache, no batch; every token is chosen after reading everything."""
    tokenizer = processor.tokenizer
    prompt = f"<s> user : <image> {CAPTION_PROMPT} assistant :"
    inputs = processor(images=[picture], text=[prompt], return_tensors="pt")
    ids, pixels = inputs["input_ids"][0].tolist(), inputs["pixel_values"]
    names = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    special = set(tokenizer.convert_tokens_to_ids(names))
    forced = [tokenizer.convert_tokens_to_ids(piece.split()) for piece in masked.pieces]
    forced[-1].append(tokenizer.eos_token_id)
    text, closed = masked.pieces[0], True
    ids += forced[0]
    for following, piece in zip(forced[1:], masked.pieces[1:], strict=True):
        gap: list[int] = []
        while True:
            scores = vlm(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0, -1]
            if gap and scores.argmax().item() == following[0]:
                break
            if len(gap) == max_gap_tokens:
                closed = False
                break
            allowed = [i for i in range(len(scores)) if i not in special]
            best = max(allowed, key=lambda i: scores[i].item())
            gap.append(best)
            ids.append(best)
        ids += following
        text += " ".join(tokenizer.convert_ids_to_tokens(gap)) + piece
    return Completion(text, closed)


def _infill(vlm, processor, pictures, masked, **options) -> list[Completion]:
    prompts = [PROMPT] * len(masked)
    return infill(vlm, processor, prompts, [[p] for p in pictures], masked, **options)


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
def test_infill_equals_the_slow_way(request, processor, scenes, name):
    model, most = request.getfixturevalue(name), 4
    rng = np.random.default_rng(0)
    masked = GAPS + [mask_response(s.caption, CATEGORIES, 2, rng) for s in scenes[:14]]
    pictures = [scene.image for scene in scenes[: len(masked)]]
    expected = [
        slow_infill(model, processor, picture, hidden, most)
        for picture, hidden in zip(pictures, masked, strict=True)
    ]
    assert _infill(model, processor, pictures, masked, max_gap_tokens=most) == expected
    for picture, hidden, text in zip(pictures, masked, expected, strict=True):
        alone = _infill(model, processor, [picture], [hidden], max_gap_tokens=most)
        assert alone == [text]
    lengths = set()
    for (text, _), hidden in zip(expected, masked, strict=True):
        gaps = re.fullmatch("(.+)".join(map(re.escape, hidden.pieces)), text).groups()
        lengths |= {len(gap.split()) for gap in gaps}
    assert most in lengths and len(lengths) > 1
    assert False in {completion.closed for completion in expected}
    assert name == "babbler" or True in {completion.closed for completion in expected}


def test_a_gap_ends_at_the_forced_token_but_is_never_empty(processor, scenes):
    """With a model that always writes "seven", then with one that always wants to end."""

    class Stubborn(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self, *words):
            super().__init__()
            self.order = processor.tokenizer.convert_tokens_to_ids(words)

        def forward(self, input_ids, **_):
            logits = torch.zeros(*input_ids.shape, len(processor.tokenizer))
            for rank, token in enumerate(self.order):
                logits[..., token] = 2.0 - rank
            return CausalLMOutputWithPast(logits=logits)

    def written(model, *pieces):
        hidden = ("one",) * (len(pieces) - 1)
        return _infill(model, processor, [scenes[0].image], [Masked(pieces, hidden)])[0]

    seven, end = Stubborn("seven"), Stubborn("</s>", "two")
    assert written(seven, "top ", " seven .") == ("top seven seven .", True)
    assert written(seven, "", " right") == (" ".join(["seven"] * 8) + " right", False)
    assert written(end, "top ", "") == (
        "top two",
        True,
    )  # the end is wanted, and comes after one word
    not_due = " ".join(["two"] * 8) + " right"
    assert written(end, "", " right") == (not_due, False)


def test_prompts_of_different_lengths_do_not_disturb_each_other(babbler, processor, scenes):
    prompts = [
        [{"role": "user", "content": c}] for c in ("is top left two ?", CAPTION_PROMPT, "name")
    ]
    pictures = [[scene.image] for scene in scenes[:3]]
    batch = infill(babbler, processor, prompts, pictures, GAPS[:3])
    for i in range(3):
        one = slice(i, i + 1)
        assert infill(babbler, processor, prompts[one], pictures[one], GAPS[one]) == [batch[i]]


def test_completions_of_digits_differ_in_the_gaps_alone(vlm, processor, scenes):
    rng = np.random.default_rng(0)
    pictures, masked = [], []
    for i in range(240):
        caption = caption_of(tuple(int(d) for d in rng.integers(10, size=4)))
        pictures.append(scenes[i % len(scenes)].image)
        masked.append(mask_response(caption, ("numbers",), (1, 2, 0)[i % 3], rng))
    completions = []
    for start in range(0, 240, 80):
        part = slice(start, start + 80)
        completions += [c.text for c in _infill(vlm, processor, pictures[part], masked[part])]
    for text, mask in zip(completions, masked, strict=True):
        pattern = "([a-z ]+)".join(map(re.escape, mask.pieces))
        assert re.fullmatch(pattern, text)
    # All four masked: the model reads the picture and writes its digits, not those of the caption.
    read = [
        sum(a == b for a, b in zip(digits_in(completions[i]), scenes[i % 120].digits, strict=True))
        for i in range(2, 240, 3)
    ]
    assert np.mean(read) / 4 > 0.6


def test_sampling_follows_the_generator(babbler, processor, scenes):
    pictures, masked = [scenes[0].image] * 6, [GAPS[1]] * 6

    def sampled(seed):
        generator = torch.Generator().manual_seed(seed)
        return _infill(babbler, processor, pictures, masked, temperature=2.0, generator=generator)

    first = sampled(0)
    assert first == sampled(0) != sampled(1)
    assert len(set(first)) > 1
    greedy = _infill(babbler, processor, pictures, masked)
    assert len(set(greedy)) == 1
    generator = torch.Generator().manual_seed(0)
    cold = _infill(babbler, processor, pictures, masked, temperature=1e-4, generator=generator)
    assert cold == greedy
    for text, _ in first:
        assert not re.search("<|>", text)  # never a special token
