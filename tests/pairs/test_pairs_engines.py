"""Chats of all engines, and the transformers engine against `realign.evaluate` and plain models."""

import copy
import io
import re

import pytest
import torch
from fake_endpoint import chat_of, random_image
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM

from realign.data.errors import Malformed
from realign.data.records import StoredImage
from realign.digits import ASSETS
from realign.digits.scenes import CAPTION_PROMPT
from realign.evaluate import digits as evaluate
from realign.modeling.loading import load_trained
from realign.pairs.engines import Chat, Reply, make_engine
from realign.pairs.engines.chat import request_digest, typed_messages


def test_images_go_where_messages_place_them_or_in_front():
    image = random_image()
    assert typed_messages(chat_of("hello", image, image))[0]["content"] == [
        {"type": "image"},
        {"type": "image"},
        {"type": "text", "text": "hello"},
    ]
    parts = [{"type": "text", "text": "a"}, {"type": "image", "text": None}]
    placed = Chat([{"role": "user", "content": parts}], [image])
    assert typed_messages(placed)[0]["content"] == [parts[0], {"type": "image"}]
    with pytest.raises(Malformed, match="place 1 image.*2 are given"):
        typed_messages(Chat(placed.messages, [image, image]))
    for messages in ([{"role": "user", "content": None}], [{"role": "system", "content": "a"}]):
        with pytest.raises(Malformed):
            typed_messages(Chat(messages))


def test_a_digest_covers_all_that_decides_an_answer():
    base = chat_of("a", random_image())
    others = [
        chat_of("b", random_image()),
        chat_of("a", random_image(seed=1)),
        chat_of("a", random_image((3, 4))),
        chat_of("a"),
        chat_of("a", random_image(), max_tokens=5),
        chat_of("a", random_image(), temperature=0.5),
        chat_of("a", random_image(), temperature=0.5, seed=1),
        Chat([{"role": "system", "content": "x"}, *base.messages], [random_image()]),
    ]
    digests = [request_digest(chat, "m") for chat in (base, *others)]
    digests.append(request_digest(base, "n"))
    assert len(set(digests)) == len(digests)
    # Greedy answers do not depend on the seed, and digests do not depend on the encoding.
    again = Image.open(io.BytesIO(StoredImage.from_pil(random_image()).data))
    assert request_digest(chat_of("a", again, seed=7), "m") == digests[0]


def test_impossible_settings_and_unknown_engines_are_refused(tmp_path):
    for settings in ({"max_tokens": 0}, {"temperature": -1.0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            chat_of("a", **settings)
    for spec in ("digits", "transformers:", "openai:gpt", ""):
        with pytest.raises(ValueError, match="engine is .*give transformers:MODEL"):
            make_engine(spec)
    with pytest.raises(ValueError, match="batch_size is 0"):
        make_engine("transformers:x", batch_size=0)
    with pytest.raises(ValueError, match="dtype is 'fp8'"):
        make_engine("transformers:x", dtype="fp8")
    with pytest.raises(
        ValueError, match="there is no folder .*none. Pass a folder that holds a model"
    ):
        make_engine(f"transformers:{tmp_path / 'none'}")


@pytest.fixture(scope="module")
def digits():
    engine = make_engine(f"transformers:{ASSETS}", batch_size=5)
    engine.open()
    return engine


def test_transformers_captions_as_evaluate_does(digits, processor, scenes):
    model = load_trained(ASSETS)
    expected = evaluate.caption(model, processor, scenes[:12], batch_size=12)
    replies = digits.chat([chat_of(CAPTION_PROMPT, s.image, max_tokens=24) for s in scenes[:12]])
    assert [r.text for r in replies] == expected
    assert not any(r.error or r.cut for r in replies)
    assert len(set(expected)) > 5
    assert digits.estimate([]) is None


def test_answers_do_not_depend_on_the_batch(digits, scenes):
    def ask(i):
        sampled = i % 2
        return chat_of(
            CAPTION_PROMPT if i % 3 else "what is top left ?",
            *([scenes[i].image] if i != 4 else []),
            max_tokens=24 if i < 6 else 7,
            temperature=3.0 * sampled,
            seed=i,
        )

    together = digits.chat([ask(i) for i in range(8)])
    single = [digits.chat([ask(i)])[0] for i in reversed(range(8))][::-1]
    assert together == single
    sampled = chat_of(CAPTION_PROMPT, scenes[0].image, max_tokens=24, temperature=3.0)
    texts = [digits.chat([Chat(**vars(sampled) | {"seed": i})])[0].text for i in (0, 1, 0)]
    assert texts[0] == texts[2] != texts[1]


def test_an_answer_of_maximum_length_is_marked_as_cut(digits, scenes):
    (reply,) = digits.chat([chat_of(CAPTION_PROMPT, scenes[0].image, max_tokens=3)])
    assert reply.cut and len(reply.text.split()) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a <image> or <image>", "place 2 image.*and 1 are given"),
        ("struck <s>out</s>", "special token"),
        ("one " * 600, "its prompt takes 6.. tokens .*the model's maximum length is 512"),
        ("a \ud800", "rejects it"),
    ],
)
def test_a_text_that_a_model_cannot_take_spares_the_others(digits, scenes, text, words):
    image = scenes[0].image
    asked = [chat_of(t, image, max_tokens=24) for t in (CAPTION_PROMPT, text, CAPTION_PROMPT)]
    first, bad, last = digits.chat(asked)
    assert bad.text == "" and re.search(words, bad.error)
    assert first == last == digits.chat(asked[:1])[0]


def test_a_language_model_answers_only_texts(tmp_path, processor, monkeypatch):
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = None
    # Like many tokenizers, it adds <s> to every text. The template also writes <s>.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=2, **sizes, **ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no chat template"):
        make_engine(f"transformers:{tmp_path}").open()
    (tmp_path / "chat_template.jinja").write_text(processor.chat_template)
    given, generate = [], LlamaForCausalLM.generate

    def noted(model, input_ids, **rest):
        given.extend(input_ids)
        return generate(model, input_ids, **rest)

    monkeypatch.setattr(LlamaForCausalLM, "generate", noted)
    texts = ("what is top", "name the digits . name the digits .")
    asked = [chat_of(text, max_tokens=4) for text in texts]
    *replies, seen = make_engine(f"transformers:{tmp_path}").chat(
        [*asked, chat_of("what", random_image())]
    )
    for text, reply, row in zip(texts, replies, given, strict=True):
        ids = tokenizer(f"user : {text} assistant :", return_tensors="pt")["input_ids"]
        assert row[row != 0].tolist() == ids[0].tolist()
        for _ in range(4):  # greedy decoding without a cache
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1)[None]], dim=1)
        expected = tokenizer.decode(ids[0, -4:], skip_special_tokens=True).strip()
        assert reply == Reply(expected, cut=True) and expected
    assert "text-only model" in seen.error
