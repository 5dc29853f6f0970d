"""Infill in other families: batches against single records, masks, and byte tokens."""

import re

import numpy as np
import pytest
import tiny_vlms
import torch
from tiny_processors import WORDS, make_processor
from tiny_tokenizers import byte_level
from tiny_vlms import FAMILIES, make, random_images, random_text

from realign.pairs.infill import refill
from realign.pairs.infill.refill import infill, infill_plain, reason_for_single
from realign.pairs.masking.mask import Masked, masked_from


def worded(family, **options):
    """A tiny model that writes only words, so its texts survive tokenization unchanged."""
    vlm, processor = make(family, **options)
    head = vlm.get_output_embeddings()
    with torch.no_grad():  # with larger weights, a tied head repeats the last token
        vlm.get_input_embeddings().weight.mul_(0.05)
    others = torch.full((head.weight.shape[0],), -1e4)
    others[processor.tokenizer.convert_tokens_to_ids(WORDS)] = 0
    head.register_forward_hook(lambda module, args, scores: scores + others)
    return vlm, processor


def guided(vlm, processor, prompt, images, rng, count, closes) -> Masked:
    """A masked response whose first gap the model closes after about `count` words.

    After the gap come the model's next word and some more words. Then comes a second gap, which the
    model closes if `closes` is set.
    """

    def words_after(start):
        # " zzz" is not a word of the model, so the model continues to the limit.
        probe = Masked((start, " zzz"), ("x",))
        text = infill_plain(vlm, processor, [prompt], [images], [probe], max_gap_tokens=5)[0].text
        return text.removeprefix(start).removesuffix(" zzz").split()

    first = random_text(rng, 1, 3) + " "
    written = words_after(first)
    stop = next((i for i in range(count, 5) if written[i] not in written[1:i]), 1)
    middle = f" {written[stop]} " + random_text(rng, 1, 6) + " "
    again = words_after(first + " ".join(written[:stop]) + middle)
    last = f" {again[1]} " if closes else " zzz "
    return Masked((first, middle, last + random_text(rng, 1, 4)), ("red", "dot"))


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_5"])
def test_batches_equal_single_records_in_every_family(family):
    """Covers unequal lengths, M-RoPE, windows, and blocks with bidirectional attention."""
    vlm, processor = worded(family, attention="tree")
    rng = np.random.default_rng(1)
    images = [random_images(rng, n) for n in (1, 2, 1, 1, 3, 1)]
    prompts = [[{"role": "user", "content": random_text(rng, 2, 8)}] for _ in images]
    masked = [
        guided(vlm, processor, prompts[i], images[i], rng, 1 + i % 3, closes=i != 1)
        for i in range(5)
    ]
    masked.append(Masked(("", ""), ("red",)))
    given = (vlm, processor, prompts, images, masked)
    plain = infill_plain(*given, max_gap_tokens=5)
    assert infill(*given, max_gap_tokens=5) == plain
    assert [completion.closed for completion in plain] == [True, False, True, True, True, False]
    gaps = set()
    for (text, _), mask in list(zip(plain, masked, strict=True))[:5]:
        first = text.removeprefix(mask.pieces[0])
        gaps.add(len(first[: first.index(mask.pieces[1])].split()))
    assert len(gaps) > 1
    reason = reason_for_single(vlm, processor)
    assert (reason is None) == (family != "qwen3_5")
    assert reason is None or "linear_attention layers keep a state" in reason


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reader_scores_as_plain_forwards(family):
    """Blocks have unequal lengths, some of them zero. Then one row is removed."""
    vlm, processor = make(family, attention="tree")
    rng = np.random.default_rng(3)
    images = [random_images(rng, n) for n in (1, 2, 1)]
    masked = Masked(("", ""), ("red",))
    rows = refill._begin(
        vlm,
        processor,
        [[{"role": "user", "content": random_text(rng, 2, 20)}] for _ in images],
        images,
        [masked] * 3,
        8,
        0.0,
        None,
    )
    inputs = [refill._encode(vlm, processor, [row]) for row in rows]

    def ids_of(low, high):
        words = random_text(rng, low, high).split()[: rng.integers(low, high + 1)]
        return processor.tokenizer.convert_tokens_to_ids(words)

    def truth(active, responses):
        plain = [refill._longer(vlm, inputs[i], responses[i]) for i in active]
        return torch.stack([vlm(**one, use_cache=False).logits[0, -1] for one in plain])

    reader = refill.RowReader(vlm, refill.layout_of(vlm))
    with torch.no_grad():
        responses = [ids_of(0, 6) for _ in rows]
        whole = refill._encode(vlm, processor, rows)
        found = reader.first(whole, [1, 2, 1], responses, room=32)
        assert (found - truth(range(3), responses)).abs().max() < 1e-3
        for active in ([0, 1, 2], [0, 1, 2], [2, 0]):
            if len(active) == 2:
                reader.keep(active)
            blocks = [ids_of(0, 6) if i else ids_of(1, 3) for i in active]
            found = reader.more(blocks)
            for i, block in zip(active, blocks, strict=True):
                responses[i] = responses[i] + block
            expected = truth(active, responses)
            assert expected.abs().mean() > 0.1
            read = [n for n, block in enumerate(blocks) if block]
            assert (found - expected)[read].abs().max() < 1e-3


@pytest.mark.parametrize("case", ["llava, eager", "gemma3, eager", "llava, no padding token"])
def test_eager_attention_and_single_records(case):
    """Eager attention uses the same masks. Without a padding token, records are single."""
    family, kind = case.split(", ")
    vlm, processor = make(family, attention="eager" if kind == "eager" else "tree")
    if kind != "eager":
        processor.tokenizer.pad_token = None
        assert reason_for_single(vlm, processor) == "its tokenizer has no padding token"
    rng = np.random.default_rng(2)
    images = [random_images(rng, n) for n in (1, 2, 1)]
    prompts = [[{"role": "user", "content": random_text(rng, 2, 8)}] for _ in images]
    masked = [Masked((random_text(rng, 0, 5), " red"), ("dot",)) for _ in images]
    given = (vlm, processor, prompts, images, masked)
    assert infill(*given) == infill_plain(*given)


def test_tokens_of_bytes_in_batches(monkeypatch):
    """A LLaVA with tokens that cross words and characters, on texts in many scripts."""
    texts = ["a red-white dog's (old) café", "日本 🐶🐶 near the नमस्ते", "3.5 dogs, ﬁve cats..."]
    processor = make_processor("llava")
    monkeypatch.setattr(processor, "tokenizer", byte_level(texts * 3, 380))
    monkeypatch.setattr(tiny_vlms, "make_processor", lambda family: processor)
    vlm, _ = make("llava")
    rng = np.random.default_rng(0)
    hidden = [["white"], ["🐶🐶", "नमस्ते"], ["3.5", "ﬁve cats"], ["dog", "café"], ["日本"], ["dogs"]]
    places = (0, 1, 2, 0, 1, 2)
    masked = [masked_from(texts[i], spans) for i, spans in zip(places, hidden, strict=True)]
    images = [random_images(rng, 1) for _ in masked]
    prompts = [[{"role": "user", "content": f"name {i} é"}] for i in range(len(masked))]
    given = (vlm, processor, prompts, images, masked)
    plain = infill_plain(*given)
    assert infill(*given) == plain
    for (text, closed), mask in zip(plain, masked, strict=True):
        pattern = "(.*)".join(map(re.escape, mask.pieces))
        gaps = re.fullmatch(pattern, text, re.DOTALL).groups()
        assert not closed or all(gap.strip() and "\ufffd" not in gap for gap in gaps)
