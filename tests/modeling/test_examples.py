"""Examples on disk: equal to those in memory, and made again if anything has changed."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from forked_ranks import CONTEXT
from runs import encoded
from tiny_processors import make_processor
from tiny_vlms import random_record
from transformers import BatchFeature

from realign.data import record_table
from realign.data.record_table import open_table, table_of
from realign.data.records import RecordError, read_pairs
from realign.digits import ASSETS
from realign.modeling import encode
from realign.modeling.chat import text_inputs
from realign.modeling.encode import encode_table
from realign.modeling.examples import collapse, expand
from realign.modeling.images import ImageStore
from realign.modeling.layouts import Layout
from realign.modeling.loading import load_processor
from realign.modeling.prompt_ids import PromptIds, _StoredResults
from realign_kernels import collect_leaves, objectives

LIMITS = {"layout": Layout(4), "max_response_tokens": 100, "max_tokens": 512, "progress": False}


@pytest.fixture
def table(pairs_file, tmp_path, monkeypatch):
    monkeypatch.setenv("REALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(encode, "_CHUNK", 5)
    return open_table(pairs_file)


def _same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.name == b.name
        assert [root.images for root in a.roots] == [root.images for root in b.roots]
        assert [root.ids.tolist() for root in a.roots] == [root.ids.tolist() for root in b.roots]
        assert [(x.root, x.rival, x.ids.tolist()) for x in a.leaves] == [
            (x.root, x.rival, x.ids.tolist()) for x in b.leaves
        ]


@pytest.mark.parametrize("name", ["dpo", "rdpo", "ovip", "released"])
def test_examples_on_disk_are_those_in_memory(table, pairs_file, name):
    processor, objective = load_processor(ASSETS), objectives.get(name)
    examples = encode_table(table, processor, objective, **LIMITS)
    wanted, _ = encoded(pairs_file, processor, objective)
    _same(examples, list(wanted))
    _same(encode_table(table, processor, objective, **LIMITS), list(wanted))
    _same(examples[3:9], list(wanted)[3:9])
    assert examples[-1].name == examples.name(23) == wanted[23].name
    # Columns are equal to lengths and keys of the examples themselves.
    leaves = collect_leaves(list(wanted))
    for field in ("keys", "lengths", "pairs", "roots", "root_lengths", "root_keys"):
        found = getattr(examples.leaves, field)
        assert np.array_equal(found, getattr(leaves, field)), field
    assert examples.longest_tree == max(example.longest_tree for example in wanted)
    tokens = [[(root.ids == 4).sum() for root in example.roots] for example in wanted]
    assert examples.image_tokens.tolist() == tokens
    both = examples + encode_table(table, processor, objective, **LIMITS)
    _same(both, [*wanted, *wanted])
    assert both.longest_tree == examples.longest_tree and len(both.leaves.keys) == 2 * len(
        leaves.keys
    )


def test_encoded_records_are_kept_by_everything_they_depend_on(table, monkeypatch):
    processor, calls = load_processor(ASSETS), []
    inner = encode._Encoder.encode
    monkeypatch.setattr(
        encode._Encoder, "encode", lambda self, rows: calls.append(len(rows)) or inner(self, rows)
    )

    def chunks(objective=None, **changes):
        calls.clear()
        encode_table(table, processor, objective or objectives.rdpo(), **LIMITS | changes)
        return list(calls)

    assert chunks() == [5, 5, 5, 5, 4]
    assert chunks() == []
    assert chunks(objectives.rdpo(beta=0.5)) == []  # the same leaves
    assert len(chunks(objectives.dpo())) == len(chunks(max_tokens=500)) == 5
    assert len(chunks(max_response_tokens=99)) == 5
    template = processor.chat_template
    processor.chat_template = template + " "
    assert len(chunks()) == 5
    processor.chat_template = template
    processor.image_processor.rescale_factor = 1 / 254
    assert len(chunks()) == 5
    processor.image_processor.rescale_factor = 1 / 255
    processor.tokenizer.add_tokens(["zebra"])
    assert len(chunks()) == 5
    assert chunks() == []

    class Mine(type(processor)):
        """Code of a user, which has no version: nothing is kept."""

    processor.__class__ = Mine
    assert len(chunks()) == len(chunks()) == 5


def _encode_until(pairs, count, folder):
    """Encode pairs in files of 5 records, and be killed at the file with number `count`."""
    encode._CHUNK, inner = 5, encode._Encoder.encode
    rows = []

    def once(self, given):
        rows.append(len(given))
        (folder / "encoded").write_text(str(rows))
        if len(rows) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(self, given)

    encode._Encoder.encode = once
    encode_table(open_table(pairs), load_processor(ASSETS), objectives.rdpo(), **LIMITS)


def test_a_killed_encoding_keeps_its_files(table, pairs_file, tmp_path):
    """Only the records of the file that was being written are encoded again."""
    found = []
    for count in (4, 0):
        process = CONTEXT.Process(target=_encode_until, args=(pairs_file, count, tmp_path))
        process.start()
        process.join()
        found.append((process.exitcode, (tmp_path / "encoded").read_text()))
    assert found == [(-signal.SIGKILL, "[5, 5, 5, 5]"), (0, "[5, 4]")]


def test_all_unusable_records_are_counted(pairs_file):
    records = read_pairs(pairs_file)
    records[3] = replace(records[3], chosen="<image>")
    records[9] = replace(records[9], rejected=" ".join(["one"] * 101))
    message = f"'{records[3].name}': its chosen .* 1 more record.*'{records[9].name}'"
    with pytest.raises(RecordError, match=message):
        encode_table(table_of(records), load_processor(ASSETS), objectives.rdpo(), **LIMITS)


def test_collapsed_ids_expand_again():
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = rng.integers(0, 3, rng.integers(0, 30))
        short, runs = collapse(ids, 1)
        assert short.dtype == runs.dtype == np.int32
        assert expand(short, runs, 1).tolist() == ids.tolist()
        assert not ((short[1:] == 1) & (short[:-1] == 1)).any()


FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "idefics3", "smolvlm", "internvl",
            "gemma3", "paligemma", "janus")  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [1, 2])
def test_prompts_are_those_of_the_processor(family, count):
    """Ids of many records without preprocessing are those of the processor with real images."""
    processor = make_processor(family)
    rng = np.random.default_rng(count)
    records = [random_record(family, processor, rng, count) for _ in range(8)]
    token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    layout = Layout(getattr(processor, "image_token_id", None) or token)
    prompts = PromptIds(processor, layout, pytest.fail)
    calls = []
    inner = prompts._by_processor
    prompts._by_processor = lambda *given: calls.append(given[2] is processor) or inner(*given)
    table = table_of(records)
    rendered = [encode.check_prompt(processor, record, count) for record in records]
    keys = [
        prompts.write(row.name, text, row.images) for row, text in zip(table, rendered, strict=True)
    ]
    prompts.tokenize()
    for record, text, key in zip(records, rendered, keys, strict=True):
        images = [stored.open(record.name) for stored in record.images]
        inputs = text_inputs(processor, [text])
        wanted = processor(images=[images], return_tensors="pt", **inputs)
        ids, columns = prompts.tokens(record.name, key)
        assert ids.tolist() == wanted["input_ids"][0].tolist()
        named = [n for n in wanted if n.endswith("token_type_ids")]
        assert columns.keys() == set(named)
        for name in named:
            assert columns[name].tolist() == wanted[name][0].tolist()
    assert len(calls) <= 4 and all(calls)  # only the first prompts were compared


def test_results_of_different_sizes_are_kept_apart():
    """Arrays of 20 x 30 and 30 x 20 pixels have equal numbers of values."""
    shapes = [(20, 30), (30, 20), (20, 30)]
    made = []

    def image_processor(images, **options):
        made.append(images[0].shape)
        return BatchFeature({"sizes": torch.tensor(images[0].shape), "pixels": torch.rand(2, 3)})

    stored = _StoredResults(image_processor)
    results = [stored(images=[np.zeros((*shape, 3))], scale=2) for shape in shapes]
    assert [result["sizes"].tolist()[:2] for result in results] == [list(shape) for shape in shapes]
    assert made == [(20, 30, 3), (30, 20, 3)]
    assert results[0]["pixels"].shape == (2, 3) and not results[0]["pixels"].any()
    stored([np.zeros((20, 30, 3))], scale=3)
    assert len(made) == 3
    results[0].pop("sizes")  # some processors remove entries
    assert "sizes" in stored(images=[np.zeros((20, 30, 3))], scale=2)


def test_a_processor_that_reads_pixels_is_found(monkeypatch):
    """Its blank images give another prompt, so the first training image is refused."""
    processor = make_processor("llava")
    record = random_record("llava", processor, np.random.default_rng(0))
    kind = type(processor)
    inner = kind.__call__

    def call(self, images=None, text=None, **options):
        bright = images[0][0].getpixel((0, 0)) != (0, 0, 0)
        text = [one + self.image_token * bright for one in text]
        images = [[images[0][0]] * (1 + bright)]
        return inner(self, images=images, text=text, **options)

    monkeypatch.setattr(kind, "__call__", call)
    layout = Layout(processor.tokenizer.convert_tokens_to_ids(processor.image_token))
    settings = LIMITS | {"layout": layout, "max_tokens": 4096}
    examples = encode_table(table_of([record]), processor, objectives.dpo(), **settings)
    store = ImageStore(processor, layout, examples)
    with pytest.raises(RecordError, match="image tokens, and a blank image of its size"):
        store.first()


def test_an_index_of_the_table_is_found_in_every_chunk(table):
    """Images of all chunks are read from the right record."""
    examples = encode_table(table, load_processor(ASSETS), objectives.rdpo(), **LIMITS)
    store = ImageStore(load_processor(ASSETS), Layout(4), examples, cache_bytes=0)
    for row, example in zip(table, examples, strict=True):
        for facts, root in zip(
            (row.images[0], row.retrieved_images[0]), example.roots, strict=True
        ):
            image = table.image(facts).open(row.name)
            wanted = load_processor(ASSETS).image_processor(images=[image], return_tensors="pt")
            found = store.bundle(root.images[0])["pixel_values"]
            assert np.array_equal(found.numpy(), wanted["pixel_values"].numpy())
    assert record_table.default_directory() == table.folder.parent
