"""Models of strangers: files that run code, lead outside, hang, or describe too much.

The truth is a marker file that code of the model would write, the time of a call, or peak memory.
"""

import ast
import json
import os
import resource
import shutil
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from tiny_vlms import make
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from realign.digits import ASSETS
from realign.modeling import limits, model_files
from realign.modeling.loading import from_pretrained, load_model, load_processor, load_trained
from realign.modeling.sentence_models import load_sentence_model
from realign.pairs.engines.chat import Chat
from realign.pairs.engines.transformers_engine import TransformersEngine
from realign.pairs.retrieval.embed import Embedder
from realign.training.export import export_whole

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True)
def in_time():
    """End a test that hangs."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(120)
    yield
    signal.alarm(0)


@pytest.fixture
def model(tmp_path):
    """A copy of the digits model."""
    return Path(shutil.copytree(ASSETS, tmp_path / "model"))


def change(folder: Path, name: str, **fields) -> None:
    """Set fields of a JSON file, which may be missing."""
    file = folder / name
    given = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(given | fields))


def load_all(folder) -> None:
    """Load a model and its processor in every way of the project."""
    load_processor(folder)
    load_model(folder)


QWEN = {"shortest_edge": 3136, "longest_edge": 12845056}
"""Numbers of pixels. Other classes read them as sides."""


class Evil:
    """A pickle that writes a marker file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def shards(folder: Path, name) -> None:
    """Replace the weights by an index that names one file for all of them."""
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    names = load_model(ASSETS).state_dict()
    text = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, name)})
    (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
    "name",
    ["weights.bin", "../outside.safetensors", "/x.safetensors", "a/b.safetensors", 3, None, ["a"]],
)
def test_an_index_names_only_safetensors_files_in_its_folder(model, name, monkeypatch):
    shards(model, name)
    torch.save(load_model(ASSETS).state_dict(), model / "weights.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle is read"))
    for load in (load_model, load_trained):
        with pytest.raises(ValueError, match="names the weights .* Weights are read only from"):
            load(model)


def test_an_index_of_good_names_is_read(model):
    shards(model, "part-1.safetensors")
    (model.parent / "outside.safetensors").rename(model / "part-1.safetensors")
    truth = load_model(ASSETS).state_dict()
    assert all(torch.equal(v, truth[n]) for n, v in load_model(model).state_dict().items())


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("config.json", {"transformers_weights": "weights.bin"}),
        ("config.json", {"extra_files": ["../x.safetensors"]}),
        ("config.json", {"fusion_config": {"patch_embeddings": True}}),
        ("config.json", {"attn_implementation": "evil/kernel"}),
        ("config.json", {"_attn_implementation": {"vision_config": "evil/kernel@v1:run"}}),
        ("config.json", {"some_config": {"attn_implementation": "evil/kernel"}}),
        ("config.json", {"some_configs": [{"experts_implementation": "evil/kernel"}]}),
        ("config.json", {"quantization_config": {"quant_method": "torchao", "quant_type": {}}}),
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}),
        ("config.json", {"quantization_config": "x"}),
        ("config.json", {"quantization_config": {"quant_method": "fp8", "skip": ["(a|a)*"]}}),
        ("config.json", {"tokenizer_class": "AutoModel"}),
        ("config.json", {"num_hidden_layers": 10**9}),
        ("config.json", {"vision_config": {"depth": 10**9}}),
        ("config.json", {"num_labels": 10**9}),
        ("config.json", {"vision_config": {"architecture": "hf-hub:evil/model"}}),
        ("config.json", {"vision_config": {"model_args": {"checkpoint_path": "x.bin"}}}),
        ("generation_config.json", {"custom_generate": "evil/code"}),
        ("tokenizer_config.json", {"tokenizer_class": "LlavaForConditionalGeneration"}),
        ("tokenizer_config.json", {"vocab_file": "/etc/passwd"}),
        ("tokenizer_config.json", {"vocab": "secret.txt"}),
        ("tokenizer_config.json", {"merges": "../secret"}),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["../tokenizer.5.0.0.json"]}),
        ("tokenizer_config.json", {"sp_model_kwargs": {"model_file": "/etc/passwd"}}),
        ("tokenizer_config.json", {"gguf_file": "x.gguf"}),
        ("tokenizer_config.json", {"init_inputs": ["/etc/passwd"]}),
        ("special_tokens_map.json", {"vocab_file": "x"}),
        ("processor_config.json", {"processor_class": "LlavaForConditionalGeneration"}),
        ("processor_config.json", {"image_processor": {"image_processor_type": "AutoModel"}}),
        ("processor_config.json", {"audio_tokenizer": {"audio_tokenizer_class": "AutoModel"}}),
        ("preprocessor_config.json", {"class_info_file": "x.json"}),
        ("preprocessor_config.json", {"size": {"height": 10**5, "width": 10**5}}),
        ("preprocessor_config.json", {"crop_size": 10**5}),
        ("preprocessor_config.json", {"size": {"shortest_edge": 10**5}}),
        ("preprocessor_config.json", {"size": {"shortest_edge": 1025}}),
        ("preprocessor_config.json", {"size": {"shortest_edge": 1025, "longest_edge": 10**6}}),
        ("preprocessor_config.json", {"size": {"longest_edge": 8193}}),
        ("preprocessor_config.json", {"size": 1025}),
        ("preprocessor_config.json", {"size": {"shortest_edge": 1e9}}),
        (
            "preprocessor_config.json",
            {"size": QWEN, "video_processor_type": "Qwen3VLVideoProcessor"},
        ),
        ("preprocessor_config.json", {"min_pixels": 10**9}),
        ("processor_config.json", {"image_processor": {"max_patches": 10**9}}),
        ("processor_config.json", {"image_seq_length": 10**9}),
    ],
)
def test_a_field_that_opens_or_builds_something_else_is_refused(model, file, fields):
    change(model, file, **fields)
    load = load_processor if "processor" in file else load_model
    with pytest.raises(ValueError, match=f"{model / file} sets ") as caught:
        load(model)
    assert "\n" not in str(caught.value)


def test_common_fields_of_real_models_are_accepted(model):
    change(
        model, "tokenizer_config.json", name_or_path="/author/llava", tokenizer_file=None,
        special_tokens_map_file="/author/special_tokens_map.json", vocab_file=None,
        merges_file="/author/merges.txt",
    )  # fmt: skip
    change(
        model, "config.json", _name_or_path="/author/x", attn_implementation="sdpa",
        vocab_size_per_layer_input=262144,
    )  # fmt: skip
    change(model, "special_tokens_map.json", additional_special_tokens=[])
    size = {"shortest_edge": 65536, "longest_edge": 16777216}
    change(
        model, "video_preprocessor_config.json", size=size, max_pixels=10**8,
        total_pixels=19267584, video_processor_type="Qwen3VLVideoProcessor", max_length=10**30,
    )  # fmt: skip
    load_all(model)


@pytest.mark.parametrize(
    "fields",
    [
        {"size": {"shortest_edge": 336}},
        {"size": {"shortest_edge": 800, "longest_edge": 1333}},
        {"size": {"longest_edge": 5 * 364}, "max_image_size": {"longest_edge": 364}},
        {"size": [2560, 1920]},
        {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "size": QWEN,
        },
        {"size": {"height": 4096, "width": 4096}},
    ],
)
def test_sizes_of_real_processors_are_accepted(model, fields):
    change(model, "preprocessor_config.json", **fields)
    model_files.check_model(model)


def test_code_and_pickles_of_a_model_never_run(model, tmp_path):
    """By auto_map, by a processor that is a model class, and by pickled weights."""
    marker = tmp_path / "marker"
    (model / "code.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    torch.save(Evil(marker), model / "pytorch_model.bin", pickle_protocol=2)
    kinds = {f"Auto{kind}": "code.Own" for kind in ("Config", "Processor", "Tokenizer")}
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        change(model, name, auto_map=kinds | {"AutoModelForImageTextToText": "code.Own"})
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(f"open({str(marker)!r}, 'w')\n")
    load_all(model)  # the classes of transformers
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no model could be loaded"):
        load_model(model)
    change(model, "config.json", model_type="own")
    with pytest.raises(ValueError, match="needs its own code"):
        load_model(model)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "adapter_config.json"]
)
def test_a_pipe_in_a_folder_does_not_hang(model, name):
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    for load in (load_model, load_processor, load_trained):
        with pytest.raises((ValueError, OSError), match="not a regular file"):
            load(model)


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "chat_template.jinja"])
def test_a_link_out_of_the_folder_is_refused(model, tmp_path, name):
    (model / name).rename(tmp_path / "secret")
    (model / name).symlink_to(tmp_path / "secret")
    for load in (load_model, load_processor):
        with pytest.raises(
            ValueError, match=f"{name} leads to .*secret, outside .* hard link .* cp -rL"
        ):
            load(model)
    (model / name).unlink()
    os.link(tmp_path / "secret", model / name)
    load_all(model)
    (tmp_path / "linked").symlink_to(model)  # a link to the folder itself
    load_all(tmp_path / "linked")


def test_links_that_loading_does_not_read_are_accepted(model, tmp_path):
    (tmp_path / "runs").mkdir()
    (model / "runs").symlink_to(tmp_path / "runs")
    for name in ("README.md", "notes.txt"):
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to(tmp_path / "missing")
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(model / "s"))
    server.close()
    load_all(model)
    export_whole(str(model), tmp_path / "exported")
    (tmp_path / "secret").write_text("secret")
    (model / "README.md").unlink()
    (model / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="README.md leads to"):
        export_whole(str(model), tmp_path / "other")


def test_a_folder_of_templates_may_not_be_a_link(model, tmp_path):
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "a.jinja").write_text("x")
    (model / "additional_chat_templates").symlink_to(tmp_path / "templates")
    with pytest.raises(ValueError, match="outside of the model's folder"):
        load_processor(model)


def test_a_distributed_checkpoint_is_no_model(model):
    """transformers reads it by other code, with any configuration and use_safetensors."""
    shutil.copy(model / "model.safetensors", model / "shard-00001-model-00001-of-00001.safetensors")
    with pytest.raises(ValueError, match="belongs to a distributed checkpoint"):
        load_model(model)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The digits model in a cache of the Hub, whose snapshots are links to blobs."""
    place = tmp_path / "hub" / "models--team--digits"
    snapshot = place / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (place / "blobs").mkdir()
    for file in Path(ASSETS).iterdir():
        shutil.copy(file, place / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model_files._remote_file.cache_clear()
    return snapshot


def test_a_hub_name_and_its_snapshot_are_read_at_the_checked_commit(hub, monkeypatch):
    load_all("team/digits")
    load_all(hub)
    asked, real = [], AutoModelForImageTextToText.from_pretrained

    def ask(path, **options):
        asked.append(
            (options["revision"], options["use_safetensors"], options["trust_remote_code"])
        )
        return real(path, **options)

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", ask)
    load_model("team/digits")
    assert asked == [(COMMIT, True, False)]


def test_files_of_a_hub_name_are_checked(hub):
    file = hub / "config.json"
    text = json.dumps(json.loads(file.read_text()) | {"transformers_weights": "x.bin"})
    file.unlink()
    file.write_text(text)
    with pytest.raises(ValueError, match="sets 'transformers_weights'"):
        load_model("team/digits")


def test_files_of_an_adapter_on_the_hub_are_checked(hub):
    (hub / "config.json").rename(hub / "adapter_config.json")
    (hub / "tokenizer_config.json").unlink()
    (hub / "tokenizer_config.json").write_text('{"vocab_file": "../secret"}')
    with pytest.raises(ValueError, match="sets 'vocab_file'"):
        from_pretrained(AutoProcessor, "team/digits")


def test_a_pipe_in_the_cache_of_the_hub_does_not_hang(hub):
    """Other users of the machine may share the cache."""
    (hub / "tokenizer.json").unlink()
    os.mkfifo(hub / "tokenizer.json")
    with pytest.raises(ValueError, match="not a regular file"):
        load_processor("team/digits")


FILES = {"config.json": load_model, "generation_config.json": load_model} | dict.fromkeys(
    ("processor_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.json",
     "special_tokens_map.json"), load_processor)  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_a_malformed_file_is_one_error(model, file):
    numbers = '{"a": ' + "9" * 5000 + "}"
    for text in ("[]", "[" * 200_000, '{"a":' * 100_000, "\xff", "", numbers):
        (model / file).write_bytes(text.encode("latin-1"))
        with pytest.raises((ValueError, OSError)) as caught:
            FILES[file](model)
        assert not isinstance(caught.value, UnicodeError | RecursionError)


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("config.json", {"model_type": 3}),
        ("config.json", {"model_type": ["llava"]}),
        ("config.json", {"text_config": []}),
        ("config.json", {"text_config": {"model_type": {}}}),
        ("config.json", {"vision_config": 3}),
        ("config.json", {"dtype": "no"}),
        ("config.json", {"architectures": 3}),
        ("config.json", {"auto_map": 3}),
        ("processor_config.json", {"image_processor": 3}),
        ("processor_config.json", {"processor_class": 3}),
        ("tokenizer_config.json", {"tokenizer_class": 3}),
        ("tokenizer_config.json", {"added_tokens_decoder": 3}),
        ("tokenizer_config.json", {"extra_special_tokens": 3}),
    ],
)
def test_a_value_of_a_wrong_type_is_one_error_at_most(model, file, fields):
    change(model, file, **fields)
    with suppress(ValueError, OSError):
        load_all(model)


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 1 << 20, "intermediate_size": 1 << 20},
        {"vocab_size": 1 << 40},
        {"num_hidden_layers": 1000, "intermediate_size": 1 << 14},
        {"head_dim": 1 << 30},
        {"hidden_size": -5},
        {"num_attention_heads": 0},
    ],
)
def test_a_small_file_cannot_describe_a_large_model(model, sizes):
    config = json.loads((model / "config.json").read_text())
    change(model, "config.json", text_config=config["text_config"] | sizes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="describes over|no model that transformers|Copy them"):
        load_model(model)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # in KiB


def test_the_limit_of_a_model_counts_numbers_and_tensors(monkeypatch):
    with limits.limited(lambda: 100, meta=True), torch.device("meta"):
        nn.Linear(8000, 8000)
        with pytest.raises(ValueError, match="describes over .* numbers"):
            nn.Linear(8000, 8000)
    with limits.limited(lambda: 1 << 30, meta=True), torch.device("meta"):
        nn.Linear(8000, 8000), nn.Linear(8000, 8000)
    monkeypatch.setattr(limits, "_MOST_TENSORS", 3)
    with limits.limited(lambda: 100), pytest.raises(ValueError, match="in 4 tensors"):
        nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))


def test_quantized_weights_allow_four_numbers_per_byte(model, monkeypatch):
    """Weights in 4 bits, and each of their layers is built twice."""
    monkeypatch.setattr(limits, "_FREE", 0)
    numbers = load_model(model).num_parameters()
    assert model_files.most_numbers(model) == (model / "model.safetensors").stat().st_size
    state = {name: v.to(torch.uint8) for name, v in load_model(model).state_dict().items()}
    halves = {name: v.flatten()[: (v.numel() + 1) // 2].clone() for name, v in state.items()}
    save_file(halves, model / "model.safetensors")
    assert model_files.most_numbers(model) < numbers
    change(model, "config.json", quantization_config={"quant_method": "bitsandbytes"})
    assert model_files.most_numbers(model) >= 2 * numbers


def test_other_loaders_check_files_too(model):
    change(model, "config.json", transformers_weights="weights.bin")
    for load in (
        lambda: from_pretrained(AutoConfig, model),
        TransformersEngine(str(model)).open,
        Embedder(str(model), None).open,
        Embedder(None, str(model)).open,
    ):
        with pytest.raises(ValueError, match="sets 'transformers_weights'"):
            load()


def test_beams_of_a_models_own_settings_are_ignored(model):
    asked = Chat([{"role": "user", "content": "what is top"}], max_tokens=2)
    truth = TransformersEngine(str(model), dtype="fp32").chat([asked])
    change(model, "generation_config.json", num_beams=10**5, num_return_sequences=10**5)
    assert TransformersEngine(str(model), dtype="fp32").chat([asked]) == truth


def test_every_model_is_opened_in_one_place():
    """`from_pretrained` elsewhere would lack the checks."""
    places = set()
    for file in (ROOT / "realign").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("from_pretrained", "from_config"):
                places.add(str(file.relative_to(ROOT / "realign")))
    assert places == {"modeling/loading.py", "modeling/merging.py"}


@pytest.fixture
def sentences(tmp_path, monkeypatch):
    """A folder of a sentence-transformers model, and the calls of a fake package."""
    folder, calls = tmp_path / "sentences", []
    shutil.copytree(ASSETS, folder)
    modules = [
        {"name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    package = ModuleType("sentence_transformers")
    package.SentenceTransformer = lambda name, **options: calls.append(options)
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    return folder, modules, calls


def test_a_sentence_model_is_loaded_from_safetensors_without_code(sentences):
    folder, _, calls = sentences
    load_sentence_model(str(folder), "cpu")
    options = {"device": "cpu", "trust_remote_code": False}
    assert calls == [options | {"model_kwargs": {"use_safetensors": True}}]


@pytest.mark.parametrize(
    "module",
    [
        {"type": "evil.Module"},
        {"type": "sentence_transformers.models.Router"},
        {"type": "sentence_transformers.models.WordEmbeddings"},
        {"type": "sentence_transformers.util.misc.import_from_string"},
        {"type": 3},
        {"path": "../other"},
        {"path": "/etc"},
        {"path": None},
    ],
)
def test_a_sentence_model_names_no_other_code_or_place(sentences, module):
    folder, modules, calls = sentences
    (folder / "modules.json").write_text(json.dumps([modules[0], modules[1] | module]))
    with pytest.raises(ValueError, match="names a module"):
        load_sentence_model(str(folder))
    assert not calls


def test_files_of_a_sentence_models_modules_are_checked(sentences, tmp_path):
    folder, _, calls = sentences
    for name, text, message in (
        ("sentence_bert_config.json", '{"model_args": {"gguf_file": "x"}}', "sets 'gguf_file' in"),
        ("1_Pooling/pytorch_model.bin", "x", "is a pickle"),
        ("1_Pooling/config.json", '{"transformers_weights": "x.bin"}', "sets 'transformers_weigh"),
        ("modules.json", "{}", "not an array"),
        ("modules.json", "[" * 200_000, "nests its JSON too deeply"),
    ):
        changed = tmp_path / "changed"
        shutil.copytree(folder, changed)
        (changed / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            load_sentence_model(str(changed))
        shutil.rmtree(changed)
    assert not calls


def test_a_tiny_model_of_a_family_passes_the_checks(tmp_path):
    vlm, processor = make("qwen3_vl")
    vlm.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    load_all(tmp_path)
