"""Adapters of strangers: fields that import, allocate or compute too much, and expressions."""

import copy
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import peft
import pytest
from adapter_kinds import KINDS, load_base, quiet, save_base, save_trained
from huggingface_hub import constants
from peft import LoraConfig
from torch import nn

from realign.modeling import adapter_config, limits
from realign.modeling.adapter_config import plain_names, read_adapter_config
from realign.modeling.loading import add_lora, load_model, load_processor, load_trained

UNSLOTH = (
    r"(?:.*?(?:vision|image|visual|language|text).*?(?:self_attn|attention|attn|mlp|ffn).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.q_proj)"
)
SWIFT = r"^(model\.text_model(?=\.).*\.(q_proj|v_proj))$"


@pytest.fixture(autouse=True)
def offline_and_in_time(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(120)
    yield
    signal.alarm(0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base("smolvlm", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    """The folder of a LoRA."""
    folder = tmp_path_factory.mktemp("saved")
    save_trained(base, "LoRA", folder)
    return folder


@pytest.fixture
def adapter(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def change(folder: Path, **fields) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return file


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_of_every_kind_is_read_as_by_peft(kind, tmp_path):
    with quiet():
        KINDS[kind].save_pretrained(tmp_path)
        truth = peft.PeftConfig.from_pretrained(str(tmp_path))
    read = read_adapter_config(tmp_path / "adapter_config.json")
    assert type(read) is type(truth) and read.to_dict() == truth.to_dict()


@pytest.mark.parametrize(
    "fields",
    [
        {"megatron_core": "evil"},
        {"megatron_config": {"hidden_size": 3}},
        {"auto_mapping": {"base_model_class": "Own", "parent_library": "evil"}},
        {"auto_mapping": "evil"},
        {"corda_config": {"cache_file": "/x"}},
        {"lora_ga_config": {"cache_file": "/x"}},
        {"loftq_config": {"loftq_iter": 10**6}},
        {"arrow_config": {"top_k": 3}},
        {"layer_replication": [[0, 2], [0, 2]]},
        {"init_lora_weights": "pissa_niter_1000000"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "/x"},
        {"r": "x"},
        {"r": True},
        {"r": -5},
        {"r": 10**9},
        {"r": 1e400},
        {"r": float("nan")},
        {"r": [4]},
        {"rank_pattern": {"q_proj": 10**9}},
        {"rank_pattern": {f"q.*{i}": 2 for i in range(200)}},
        {"rank_pattern": {"(?i)q": 2}},
        {"rank_pattern": {f"a{i}": 2 for i in range(2000)}},
        {"alpha_pattern": {"(": 2}},
        {"block_size_pattern": {"(a|a)*": 2}, "peft_type": "C3A"},
        {"lora_alpha": "x"},
        {"lora_alpha": float("inf")},
        {"use_dora": "yes"},
        {"target_modules": ["(.*)*"]},
        {"target_modules": [3]},
        {"target_modules": {"a": 1}},
        {"target_modules": "a" * 10_000},
        {"target_modules": ["a"] * 20_000},
        {"exclude_modules": ["a*"]},
        {"modules_to_save": ["(.*)*"]},
        {"modules_to_save": "lm_head"},
        {"layers_pattern": "(.*)*"},
        {"layers_pattern": ["(.*)*"]},
        {"layers_to_transform": ["x"]},
        {"target_parameters": ["(.*)*"]},
        {"trainable_token_indices": "x"},
        {"trainable_token_indices": {"(.*)*": [1]}},
        {"bias": "some"},
        {"peft_type": "VBLORA", "num_vectors": 10**9},
        {"peft_type": ["LORA"]},
        {"peft_type": "../LORA"},
        {"base_model_name_or_path": "https://evil.example/model"},
        {"base_model_name_or_path": "a\x1b[31m"},
        {"base_model_name_or_path": ["a"]},
        {"revision": 3},
        {"task_type": "EVIL"},
        {"new_field": 3},
    ],
    ids=lambda fields: "-".join(f"{k}={v!r:.20}" for k, v in fields.items()),
)
def test_a_field_that_imports_allocates_or_computes_is_refused(adapter, fields):
    file = change(adapter, **fields)
    with pytest.raises(ValueError, match=f"{file} is not a configuration that PEFT") as caught:
        load_processor(adapter)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["[]", "{}", "[" * 200_000, '{"r":' * 100_000, "3", "\xff", "", '{"r": 1' + "9" * 5000]
)
def test_a_malformed_configuration_is_one_error(adapter, text):
    (adapter / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="adapter_config.json|digits"):
        load_model(adapter)


def test_a_pipe_is_no_configuration(adapter):
    (adapter / "adapter_config.json").unlink()
    os.mkfifo(adapter / "adapter_config.json")
    with pytest.raises(OSError, match="not a regular file"):
        load_model(adapter)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "tokenizer.json"])
def test_a_link_out_of_an_adapter_is_refused(adapter, tmp_path, name):
    (adapter / name).touch()
    (adapter / name).rename(tmp_path / "secret")
    (adapter / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="outside of the model's folder"):
        load_model(adapter)


@pytest.mark.parametrize("text", ["[]", "[" * 200_000, "{}"])
def test_a_malformed_tokenizer_of_an_adapter_is_one_error(adapter, text):
    (adapter / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="tokenizer.json is no tokenizer"):
        load_trained(adapter)


@pytest.mark.parametrize(
    ("field", "pattern"),
    [
        ("target_modules", r"(.*?.*?)*[!x]"),
        ("exclude_modules", r"(?:\w|\.|[a-z])*[!x]"),
        ("rank_pattern", {r"(.*?.*?)*[!x]": 2}),
    ],
)
def test_an_expression_of_exponential_time_is_refused_soon(adapter, monkeypatch, field, pattern):
    monkeypatch.setattr(adapter_config, "_SECONDS", 0.1)
    change(adapter, **{field: pattern})
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"expression {field}=.* takes over 0.1 s. Write a list"):
        load_trained(adapter)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("pattern", ["(", "(?R)", "(?i)a", "[é]", r"(?P<a>.)\g<a>", "(" * 3000])
def test_an_expression_that_python_does_not_know_is_refused(adapter, pattern):
    change(adapter, target_modules=pattern)
    with pytest.raises(
        ValueError, match="adapter_config.json is not .*target_modules=.* Write a list"
    ):
        load_trained(adapter)


@pytest.mark.parametrize("pattern", [UNSLOTH, SWIFT, r".*\.text_model\..*\.q_proj", "own"])
def test_an_expression_selects_what_it_selects_in_re(base, pattern):
    model = load_base(base)
    names = [name for name, _ in model.named_modules()]
    if pattern == "own":
        adapted = add_lora(load_base(base), 2, 4)
        pattern = adapted.active_peft_config.target_modules
    config = LoraConfig(target_modules=pattern, exclude_modules=r".*\.1\..*")
    plain_names(config, model)
    found = [name for name in names if re.fullmatch(pattern, name)]
    assert found and sorted(config.target_modules) == sorted(found)
    assert config.exclude_modules == [n for n in names if re.fullmatch(r".*\.1\..*", n)]


RANKS = {
    r".*layers\.0\..*q_proj": 2, "q_proj": 3, r"(k|v)_proj": 5, r"^model.*o_proj": 6, "never|x": 7,
    "o.proj": 8, r"(?<=mlp\.)(up|down)_proj": 9,
}  # fmt: skip


@pytest.mark.parametrize("kind", [LoraConfig, peft.LoHaConfig, peft.DeloraConfig])
def test_keys_of_patterns_give_the_ranks_of_peft(base, kind):
    config = kind(r=4, target_modules=r".*text_model.*_proj", rank_pattern=dict(RANKS))
    truth = ranks(peft.get_peft_model(load_base(base), copy.deepcopy(config)))
    plain_names(config, model := load_base(base))
    assert set(truth.values()) > {2, 3, 5, 6} and list(config.rank_pattern)[1] == "q_proj"
    assert ranks(peft.get_peft_model(model, config)) == truth


def test_a_key_with_an_anchor_matches_no_inner_module():
    model = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.ModuleDict({"a": nn.Linear(1, 1)})})
    config = LoraConfig(target_modules=["a"], rank_pattern={"^a|x": 2})
    plain_names(config, model)
    assert config.rank_pattern
    (key,) = config.rank_pattern
    names = [name for name, _ in model.named_modules()]
    assert [name for name in names if re.match(rf"(.*\.)?({key})$", name)] == ["a"]


def ranks(adapted) -> dict[str, int]:
    layers = adapted.named_modules()
    return {name: layer.r["default"] for name, layer in layers if hasattr(layer, "r")}


def test_keys_of_the_pattern_of_osf_match_as_in_peft(base):
    names = [name for name, _ in load_base(base).named_modules()]
    config = peft.OSFConfig(target_modules=["q_proj"], rank_pattern={r"layers\.1\.|q_pr": 2})
    plain_names(config, load_base(base))
    (key,) = config.rank_pattern
    found = [name for name in names if re.search(key, name)]
    assert found and found == [name for name in names if re.search(r"layers\.1\.|q_pr", name)]


def test_booleans_of_adalora_do_not_count_as_entries(tmp_path):
    pattern = {f"layers.{i}.lora_E": [True] * 64 for i in range(224)}
    config = peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9, rank_pattern=pattern)
    config.save_pretrained(tmp_path)
    assert read_adapter_config(tmp_path / "adapter_config.json").rank_pattern == pattern


def test_an_empty_pattern_of_layers_counts_as_unset(adapter):
    read_adapter_config(change(adapter, layers_pattern=""))


@pytest.mark.parametrize(
    ("fields", "step"),
    [
        ({"target_modules": "a" * 5531}, "5,531 characters, and the limit is 4,096. Write a list"),
        ({"layer_replication": [[0, 2]]}, "Use an adapter without it.$"),
        ({"new_field": 3}, "unknown: new_field. Save the adapter again"),
    ],
)
def test_a_refusal_names_the_next_step(adapter, fields, step):
    with pytest.raises(ValueError, match=step):
        load_processor(change(adapter, **fields).parent)


def test_names_inside_each_other_are_not_copied(adapter):
    """PEFT would copy the copies, twice the memory for every level."""
    change(adapter, modules_to_save=["text_model", "layers", "mlp"])
    with pytest.raises(ValueError, match="modules_to_save names .* and .* in it"):
        load_trained(adapter)


def test_an_adapter_registers_no_more_than_its_file_allows(adapter, monkeypatch):
    monkeypatch.setattr(limits, "_FREE", 0)
    load_trained(adapter)
    change(adapter, r=1024)
    with pytest.raises(ValueError, match="is not loaded: .*describes over"):
        load_trained(adapter)
