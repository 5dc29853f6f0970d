"""Forced tokens between the gaps of a response, with several tokenizers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import byte_level, sentence_pieces, word_pieces
from tiny_vlms import make

from realign.digits.scenes import CAPTION_PROMPT
from realign.pairs.infill.forced import ResponseFramer
from realign.pairs.infill.refill import infill
from realign.pairs.masking.mask import CATEGORIES, Masked, mask_response, masked_from

PROMPT = [{"role": "user", "content": CAPTION_PROMPT}]


class Framed:
    """The part of a processor that `ResponseFramer` uses: a tokenizer and a chat template."""

    image_token = "<image>"

    def __init__(self, tokenizer, lead=" ", end="</s>", opening="ASSISTANT:"):
        self.tokenizer, self.lead, self.end, self.opening = tokenizer, lead, end, opening

    def apply_chat_template(self, messages, add_generation_prompt=False, tokenize=False):
        text = ""
        for message in messages:
            content = "".join(part.get("text", "<image>") for part in message["content"])
            own = message["role"] == "assistant"
            text += self.opening + self.lead + content + self.end if own else f"USER: {content} "
        return text + (self.opening if add_generation_prompt else "")


def texts_of(pieces, tokenizer):
    return [tokenizer.decode(p, clean_up_tokenization_spaces=False) for p in pieces]


def bare(text):
    """A text without white space, which decoders add and remove."""
    return "".join(text.split())


@st.composite
def masked_texts(draw):
    """Texts in many scripts with random hidden spans, including adjacent ones and both ends."""
    parts = [
        "red",
        "white-",
        "dog",
        "'s",
        "café",
        "日本",
        "🐶🐶",
        "ﬁ",
        "3.5",
        ",",
        "...",
        "(a",
        "नमस्ते",
        " ",
        " ",
        " ",
        "\n",
    ]
    text = "".join(draw(st.lists(st.sampled_from(parts), min_size=2, max_size=14))).strip()
    text = text or "red dog"
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), min_size=2, max_size=6, unique=True)))
    spans = [(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False) if text[a:b].strip()]
    if draw(st.booleans()) and spans:  # begins where the previous span ends
        rest = text[spans[-1][1] :]
        if rest.strip():
            spans.append((spans[-1][1], len(text) - draw(st.integers(0, len(rest) - 1))))
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    parts = [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    return Masked(tuple(parts[0::2]), tuple(parts[1::2]))


@settings(max_examples=80, deadline=None)
@given(masked_texts(), st.sampled_from([270, 300, 400]), st.sampled_from(["", " "]))
def test_forced_tokens_spell_what_is_visible(masked, size, lead):
    """The tokenizer has tokens that cross words and spans, or hold bytes of a character."""
    text = masked.fill(masked.hidden)
    tokenizer = byte_level([text * 3, text[::2], f"ASSISTANT:{lead}{text}"], size)
    framer = ResponseFramer(Framed(tokenizer, lead))
    forced = framer.force("USER: <image> name it ASSISTANT:", masked)
    assert len(forced.pieces) == len(masked.pieces) == len(forced.stops) + 1
    for tokens, piece in zip(texts_of(forced.pieces, tokenizer), masked.pieces, strict=True):
        assert tokens.strip() == piece.strip()
        assert "\ufffd" not in tokens
    if not masked.hidden:
        assert tokenizer.decode(forced.pieces[0]) == lead + text
    assert all(n > 0 for n in forced.hidden[:1])


@settings(max_examples=30, deadline=None)
@given(masked_texts(), st.sampled_from([sentence_pieces, word_pieces]))
def test_forced_tokens_of_other_tokenizers(masked, kind):
    text = masked.fill(masked.hidden)
    tokenizer = kind([text, "USER: ASSISTANT: name it", *text])
    forced = ResponseFramer(Framed(tokenizer)).force("USER: <image> name it ASSISTANT:", masked)
    for tokens, piece in zip(texts_of(forced.pieces, tokenizer), masked.pieces, strict=True):
        assert bare(tokens.replace("##", "")) == bare(piece)


def test_a_token_across_an_edge_is_replaced_by_its_visible_part():
    text = "a red-white dog's (old) hat"
    tokenizer = byte_level([text] * 4, 330)
    ids = tokenizer(f"ASSISTANT: {text}", add_special_tokens=False)["input_ids"]
    spelled = texts_of([[token] for token in ids], tokenizer)
    assert max(map(len, spelled)) > 8  # tokens are whole phrases here
    for hidden in ("white", "dog", "old", "red", "hat"):
        masked = masked_from(text, [hidden])
        forced = ResponseFramer(Framed(tokenizer)).force("ASSISTANT:", masked)
        assert [p.strip() for p in texts_of(forced.pieces, tokenizer)] == [
            p.strip() for p in masked.pieces
        ]
        # The token that fills the gap holds the space before it.
        assert texts_of(forced.pieces, tokenizer)[0] == f" {masked.pieces[0].rstrip()}"


@pytest.mark.parametrize("kind", ["words", "bytes"])
@pytest.mark.parametrize("segments", [1, 2, 0])
def test_forced_pieces_are_the_tokens_around_the_gaps(kind, segments, processor):
    """If no token crosses an edge of a span, the forced tokens are those of training."""
    text = "top left seven , top right two , bottom left zero ."
    if kind == "words":
        framer, before = ResponseFramer(processor), " user : <image> name the digits . assistant :"
    else:
        text = "two dogs near a big tree, behind the big house."
        tokenizer = byte_level([text, "ASSISTANT: two"], 290, regex=True)
        framer, before = ResponseFramer(Framed(tokenizer)), "ASSISTANT:"
    tokenizer = framer.tokenizer
    whole = tokenizer(before + framer.lead + text, add_special_tokens=False)["input_ids"]
    whole = whole[len(tokenizer(before, add_special_tokens=False)["input_ids"]) :]
    rng = np.random.default_rng(1)
    for _ in range(10):
        masked = mask_response(text, CATEGORIES, segments, rng)
        forced = framer.force(before, masked)
        # The remaining tokens between two pieces spell the hidden words.
        rest = whole
        for piece, hidden, count in zip(
            forced.pieces, (*masked.hidden, ""), (*forced.hidden, 0), strict=True
        ):
            assert rest[: len(piece)] == piece
            assert tokenizer.decode(rest[len(piece) :][:count]).strip() == hidden
            rest = rest[len(piece) + count :]
        assert rest == []
        ends = {tokenizer.eos_token_id}
        for stops, piece in zip(forced.stops, forced.pieces[1:], strict=True):
            assert stops == (set(piece[:1]) or ends)


def test_end_tokens_of_template_and_model_end_a_response():
    """Gemma ends turns with a token that is not its tokenizer's end token."""
    vlm, processor = make("gemma3")
    ids = processor.tokenizer.convert_tokens_to_ids
    assert ResponseFramer(processor).ends == {ids("<eos>"), ids("<end_of_turn>")}
    vlm.generation_config.eos_token_id = [ids("<eos>"), ids("red")]
    assert ResponseFramer(processor, vlm).ends == {ids("<eos>"), ids("<end_of_turn>"), ids("red")}
    masked = Masked(("one ", " two ", ""), ("red", "dot"))
    first, last = ResponseFramer(processor).force("", masked).stops
    assert first == {ids("two")} and last == {ids("<eos>"), ids("<end_of_turn>")}
    blank = Masked(("one ", "\n"), ("red",))  # white space after the last gap is optional
    assert ResponseFramer(processor).force("", blank).stops[0] >= last


def test_an_image_token_in_a_response_is_refused(processor, scenes):
    masked = Masked(("<image> ", ""), ("two",))
    with pytest.raises(ValueError, match="contains the image tag '<image>'. Remove it"):
        infill(None, processor, [PROMPT], [[scenes[0].image]], [masked])
