"""Encoding of records: token ids equal the rendered conversation, and errors name the record."""

import copy
import hashlib
import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_processors import make_processor
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from realign.data import images as image_files
from realign.data.records import Record, RecordError, StoredImage, read_pairs
from realign.digits.scenes import CAPTION_PROMPT
from realign.modeling.encode import chat_prompt, encode_records
from realign.modeling.images import ImageStore
from realign.modeling.layouts import Layout
from realign_kernels import Objective, objectives

IMAGE_TOKENS = 16
LIMITS = {"max_response_tokens": 64, "max_tokens": 512}
LLAVA_TEMPLATE = (  # as in LLaVA-1.5: white space after a response instead of an end token
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{{ 'ASSISTANT:' if add_generation_prompt else '' }}"
)


def _encode(records, processor, objective=None, **limits):
    objective = objective or objectives.rdpo()
    options = LIMITS | {"layout": layout(processor), "progress": False} | limits
    return encode_records(records, processor, objective, **options)


def layout(processor) -> Layout:
    """The layout of a LLaVA with this processor."""
    return Layout(processor.tokenizer.convert_tokens_to_ids(processor.image_token))


def pixels(store, key):
    """The preprocessed image, (C, H, W)."""
    (image,) = store.bundle(key)["pixel_values"]
    return image


@pytest.fixture(scope="module")
def record(scenes) -> Record:
    images = [StoredImage.from_pil(scene.image) for scene in scenes[:2]]
    prompt = ({"role": "user", "content": CAPTION_PROMPT},)
    return Record("r", prompt, "top one .", "top two .", (images[0],), (images[1],))


@pytest.fixture(scope="module")
def letters(processor) -> LlavaProcessor:
    """A processor like LLaVA-1.5's: its template, and a space before every text."""
    special = ["<unk>", "<s>", "</s>", "<image>"]
    characters = [chr(code) for code in range(33, 127)] + ["\n", "▁"]
    scores = [(token, 0.0) for token in special] + [(token, -1.0) for token in characters]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    return LlavaProcessor(
        image_processor=processor.image_processor,
        tokenizer=fast,
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=LLAVA_TEMPLATE,
        num_additional_image_tokens=1,
    )


def _messages(*contents):
    return [{"role": "user", "content": content} for content in contents]


@pytest.mark.parametrize(
    ("messages", "images", "text"),
    [
        (_messages("a"), 1, "<s> user : <image> a assistant :"),
        (_messages("a"), 2, "<s> user : <image> <image> a assistant :"),
        (_messages("a"), 0, "<s> user : a assistant :"),
        (_messages("a", "b"), 1, "<s> user : <image> a user : b assistant :"),
        (
            [{"role": "assistant", "content": "b"}, *_messages("a")],
            1,
            "<s> assistant : b </s> user : <image> a assistant :",
        ),
        (
            _messages([{"type": "text", "text": "a"}, {"type": "image"}]),
            1,
            "<s> user : a <image> assistant :",
        ),
        # The messages place their images, so none is added.
        (_messages("a", [{"type": "image"}]), 1, "<s> user : a user : <image> assistant :"),
        (_messages([{"type": "text", "text": "a"}]), 1, "<s> user : <image> a assistant :"),
    ],
)
def test_a_prompt_places_its_images(processor, messages, images, text):
    before = copy.deepcopy(messages)
    rendered, typed = chat_prompt(processor, messages, images)
    assert rendered == text
    assert all(isinstance(message["content"], list) for message in typed)
    assert processor.apply_chat_template(typed, add_generation_prompt=True) == text
    assert messages == before


def test_root_and_leaf_are_the_rendered_conversation(processor, pairs_file):
    records = read_pairs(pairs_file)
    examples, store = _encode(records, processor)
    assert [e.name for e in examples] == [r.name for r in records]
    assert len(store) <= 24  # distinct images
    for record, example in zip(records, examples, strict=True):
        leaves = [
            (record.chosen, record.images),
            (record.rejected, record.images),
            (record.chosen, record.retrieved_images),
        ]
        assert len(example.leaves) == 3
        for leaf, (response, images) in zip(example.leaves, leaves, strict=True):
            text = f"<s> user : <image> {CAPTION_PROMPT} assistant : {response} </s>"
            image = images[0].open(record.name)
            whole = processor(images=[image], text=[text], return_tensors="pt")
            root = example.roots[leaf.root]
            assert [*root.ids, *leaf.ids] == whole["input_ids"][0].tolist()
            assert leaf.ids[-1] == processor.tokenizer.eos_token_id
            assert torch.equal(pixels(store, root.images[0]), whole["pixel_values"][0])


def test_objectives_decide_the_roots(processor, record):
    expected = {"dpo": (1, [0, 0]), "rdpo": (2, [0, 0, 1]), "mdpo": (2, [0, 0, 1])}
    for name, (roots, places) in expected.items():
        ((example,), _) = _encode([record], processor, objectives.get(name))
        assert len(example.roots) == roots
        assert [leaf.root for leaf in example.leaves] == places
    assert example.roots[0].images != example.roots[1].images
    assert np.array_equal(example.roots[0].ids, example.roots[1].ids)
    assert np.array_equal(example.leaves[0].ids, example.leaves[2].ids)


def test_llava_templates_get_their_end_token(letters, record):
    ((example,), _) = _encode([record], letters)
    root, leaf = example.roots[0], example.leaves[0]
    text = f"USER: <image>\n{CAPTION_PROMPT} ASSISTANT: top one .</s>"
    image = record.images[0].open("r")
    whole = letters(images=[image], text=[text])["input_ids"][0]
    assert [*root.ids, *leaf.ids] == list(whole)
    assert letters.tokenizer.convert_ids_to_tokens(leaf.ids) == [*"▁top▁one▁.", "</s>"]


@pytest.mark.parametrize("start", ["", "<s>"])
def test_a_tokenizer_that_ends_every_text_ends_no_prompt(letters, record, start):
    """The start token occurs once even if the template writes it, as Gemma's does."""
    processor = copy.deepcopy(letters)
    processor.chat_template = start + LLAVA_TEMPLATE
    processor.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $0 </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    ((example,), _) = _encode([record], processor)
    ((plain,), _) = _encode([record], letters)
    for root, leaf, other in zip(example.roots, example.leaves, plain.leaves, strict=False):
        assert [*root.ids].count(1) == 1 == len(root.ids) - len(plain.roots[0].ids)
        assert 2 not in root.ids and np.array_equal(leaf.ids, other.ids)
    processor.chat_template = "<s><s>" + LLAVA_TEMPLATE
    with pytest.raises(RecordError, match="'r': its prompt begins with '<s>' twice. Remove one"):
        _encode([record], processor)


def test_a_template_that_ends_turns_itself_gets_no_other_end(letters, record):
    processor = copy.deepcopy(letters)
    processor.chat_template = LLAVA_TEMPLATE.replace(" + ' '", " + '</turn>'")
    ((example,), _) = _encode([record], processor)
    spelled = processor.tokenizer.convert_ids_to_tokens(example.leaves[0].ids)
    assert "".join(spelled) == "▁top▁one▁.</turn>"


def test_errors_of_processor_and_template_name_the_record(scenes, monkeypatch):
    """The other records are encoded as usual."""
    monkeypatch.setattr(image_files, "MAX_RATIO", 1000)  # above the processor's own limit
    processor = make_processor("qwen2_vl")
    layout = Layout(processor.tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    stored = [StoredImage.from_pil(Image.new("RGB", size)) for size in ((56, 56), (1200, 4))]
    prompt = tuple(_messages("red"))
    records = [Record(f"r{i}", prompt, "one", "two", (stored[i % 2],)) for i in range(3)]
    records += [
        replace(records[0], name="r3", images=(stored[0], stored[1])),
        replace(records[0], name="r4", chosen="one <|im_end|> two"),
        replace(records[0], name="r5", prompt=tuple(_messages("a", "<image> <image>"))),
        replace(records[0], name="r6", rejected="two \ud800"),
    ]
    errors = {}
    examples, store = _encode(
        records,
        processor,
        objectives.dpo(),
        layout=layout,
        on_bad=lambda record, error: errors.update({record.name: str(error)}),
    )
    assert [example.name for example in examples] == ["r0", "r2"] and len(store) == 1
    aspect = r"of 1200 x 4 pixels \(ValueError: absolute aspect ratio must be smaller than 200"
    for name, message in {
        "r1": aspect,
        "r3": aspect.replace("of 1200", "of 56 x 56, 1200"),
        "r4": "its chosen response holds '<.im_end.>', which the model reads as a special token",
        "r6": r"the tokenizer cannot encode .* \(TypeError",
        "r5": "its messages place 2 image.s., by image tags such as '<image>', and 1 are given",
    }.items():
        assert re.match(f"record {name!r}: .*{message}.*[.] [A-Z].*[.]$", errors.pop(name))
    assert not errors
    processor.chat_template = "{{ raise_exception('no ' * 999) }}"
    with pytest.raises(
        RecordError, match=r"'r0': the chat template cannot render its messages .{,260}[)]. Change"
    ):
        _encode(records, processor, objectives.dpo(), layout=layout)


def test_several_images_under_a_prompt(processor, record):
    prompt = _messages([{"type": "image"}, {"type": "text", "text": "name"}, {"type": "image"}])
    pair = record.images + record.retrieved_images
    two = Record("r", tuple(prompt), "yes", "no", pair, tuple(reversed(pair)))
    ((example,), store) = _encode([two], processor)
    first, second = example.roots
    assert first.images == tuple(reversed(second.images)) and len(store) == 2
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    runs = [(k, len(list(g))) for k, g in itertools.groupby(first.ids.tolist()) if k == image]
    assert runs == [(image, IMAGE_TOKENS)] * 2


@pytest.mark.parametrize(
    ("changes", "limits", "message"),
    [
        (
            {},
            {"max_response_tokens": 3},
            "chosen response has 4 tokens; the limit is 3. Raise --max",
        ),
        (
            {"rejected": "one one one one one"},
            {"max_response_tokens": 5},
            "rejected response has 6 tokens; the limit is 5",
        ),
        (
            {"prompt": tuple(_messages("<image> name <img>"))},
            {},
            "messages place 2 image.s., by image tags such as '<image>', and 1 are given. Give as",
        ),
        (
            {"prompt": tuple(_messages([{"type": "image"}, {"type": "text", "text": "[IMG]"}]))},
            {},
            "prompt holds the image tag '.IMG.' beside image parts. Place images by",
        ),
        ({"prompt": tuple(_messages("name </s>"))}, {}, "prompt holds '</s>', which the model"),
        (
            {"chosen": "one <image> ."},
            {},
            "chosen response contains the image tag '<image>'",
        ),
        ({"rejected": "<image>"}, {}, "rejected response contains the image tag"),
        (
            {"retrieved_images": ()},
            {},
            "needs 'retrieved_image' but the record has none. Add .*--objective dpo",
        ),
        (
            {},
            {"max_tokens": 28},
            "prompt and chosen response have 29 tokens, and the model takes 28. Shorten",
        ),
        (
            {"images": (StoredImage(path="no/such.png"),)},
            {},
            "its image no/such.png does not exist",
        ),
        ({"retrieved_images": (StoredImage(b"x"),)}, {}, "1 embedded bytes cannot be read"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(processor, record, changes, limits, message):
    bad = replace(record, name="scene-3", **changes)
    with pytest.raises(RecordError, match=message) as error:
        _encode([record, bad] if changes else [bad], processor, **limits)
    assert str(error.value).startswith("record 'scene-3': ")


def test_limits_are_inclusive(processor, record):
    _encode([record], processor, max_response_tokens=4, max_tokens=29)
    without = replace(record, retrieved_images=())
    _encode([without], processor, objectives.dpo())


def test_an_unknown_response_is_named(processor, record):
    leaves = (objectives.CHOSEN, objectives.Leaf("edited", "image"))
    term = objectives.PairSigmoid(name="text", positive=0, negative=1)
    objective = Objective("odd", leaves, (term,), 0.1)
    with pytest.raises(RecordError, match="'odd' needs a 'edited' response. Records hold chosen"):
        _encode([record], processor, objective)


class _Counting:
    """A processor that counts the images it preprocesses."""

    def __init__(self, processor) -> None:
        self.made = 0
        self._processor = processor
        self.image_processor, self.image_token = processor.image_processor, processor.image_token

    def __call__(self, images, **options):
        self.made += sum(len(group) for group in images)
        return self._processor(images=images, **options)


def _stored(tmp_path, processor, *images, **options):
    """The store of records with one image each, and the keys of their images."""
    prompt = ({"role": "user", "content": "a"},)
    records = [Record(f"scene-{i}", prompt, "b", "c", (one,)) for i, one in enumerate(images)]
    examples, _ = _encode(records, processor, objectives.dpo())
    store = ImageStore(processor, layout(processor), examples, **options)
    return store, [example.roots[0].images[0] for example in examples]


def test_the_store_knows_images_by_their_bytes(tmp_path, processor, scenes):
    first = scenes[0].image
    stored = StoredImage.from_pil(first)
    (tmp_path / "copy.bin").write_bytes(stored.data)
    first.save(tmp_path / "copy.bmp")  # the same pixels, other bytes
    copies = [StoredImage(path=str(tmp_path / name)) for name in ("copy.bin", "copy.bmp")]
    store, (key, same, other) = _stored(tmp_path, processor, stored, *copies)
    assert key == same != other and len(store) == 2 and list(store.keys()) == [key, other]
    assert key == hashlib.blake2b(stored.data, digest_size=16).hexdigest()
    assert torch.equal(pixels(store, key), pixels(store, other))


@pytest.mark.parametrize("workers", [0, 3])
def test_the_store_keeps_the_first_within_its_bytes(tmp_path, processor, scenes, workers):
    """A scan finds the kept images again; a cache of the latest would find none."""
    size = 3 * 16 * 16 * 4  # one preprocessed scene
    images = [StoredImage.from_pil(scenes[i].image) for i in range(3)]
    options = {"cache_bytes": 2 * size, "workers": workers}
    store, keys = _stored(tmp_path, processor, *images, **options)
    made = []
    make = store._make
    store._make = lambda key: made.append(key) or make(key)
    for _ in range(2):
        for key in keys:
            assert pixels(store, key).shape == (3, 16, 16)
    assert made == [*keys, keys[2]]
    batch = store.batch(keys).calls[0]["pixel_values"]
    for image, row in zip(images, batch, strict=True):
        wanted = processor.image_processor(images=[image.open("")], return_tensors="pt")
        assert torch.equal(row, wanted["pixel_values"][0])


def test_a_bad_record_that_is_listed_twice_is_reported_twice(record, processor):
    """Its neighbours keep their own examples."""
    bad = replace(record, name="bad", images=(StoredImage(b"x"),))
    good, last = replace(record, name="good"), replace(record, name="last", chosen="two one .")
    found = []
    examples, _ = _encode(
        [bad, good, bad, good, last],
        processor,
        on_bad=lambda one, error: found.append((one.name, error.record)),
    )
    assert found == [("bad", "bad")] * 2
    assert [example.name for example in examples] == ["good", "good", "last"]


def test_images_that_vanish_or_change_after_the_check_are_named(tmp_path, processor, scenes):
    path = tmp_path / "a.png"
    scenes[0].image.save(path)
    store, (key,) = _stored(tmp_path, processor, StoredImage(path=str(path)))
    path.unlink()
    with pytest.raises(RecordError, match="'scene-0': its image .*a.png does not exist"):
        pixels(store, key)
    scenes[2].image.save(path)
    with pytest.raises(RecordError, match="'scene-0': its image .*a.png has changed since"):
        pixels(store, key)
