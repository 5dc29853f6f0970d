"""Names, records, true log-probs and losses of a tiny model of every family."""

import copy
import functools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tiny_more import CASES
from tiny_truth import encode, separate_logps
from tiny_vlms import FAMILIES as ATTENDING
from tiny_vlms import make, random_record
from transformers import AutoConfig

from realign.data.records import Record
from realign.modeling.encode import chat_prompt, encode_records
from realign.modeling.forest import build_batch
from realign.modeling.loading import add_lora
from realign.modeling.model import ForestModel
from realign_kernels import objectives

MODELS = {
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL MoE",
    "qwen3_5": "Qwen3.5",
    "qwen3_5_moe": "Qwen3.5 MoE",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen2_vl": "Qwen2-VL",
    "internvl": "InternVL 2.5, 3",
    "internvl-qwen3": "InternVL 3.5",
    "internvl-qwen3_moe": "InternVL 3.5 MoE",
    "internvl-gpt_oss": "InternVL 3.5 with GPT-OSS",
    "glm46v": "GLM-4.6V, dense",
    "glm4v_moe": "GLM-4.5V",
    "glm4v": "GLM-4.1V",
    "glm_ocr": "GLM-OCR",
    "gemma3": "Gemma 3",
    "gemma4-vision": "Gemma 4 31B",
    "gemma4-moe": "Gemma 4 26B-A4B",
    "gemma4": "Gemma 4 E2B, E4B",
    "gemma4_unified": "Gemma 4 12B",
    "minicpmv4_6": "MiniCPM-V 4.6",
    "minicpmv4_6-slices": "MiniCPM-V 4.6, images in slices",
    "minicpmv4_7": "MiniCPM-V 4.7",
    "minicpmv4_7-slices": "MiniCPM-V 4.7, images in slices",
    "mistral3": "Mistral Small 3",
    "kimi_k25": "Kimi K2.5",
    "smolvlm": "SmolVLM, SmolVLM2",
    "idefics3": "Idefics3",
    "lfm2_vl": "LFM2-VL",
    "llava": "LLaVA-1.5",
    "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision",
    "llava_next_video": "LLaVA-NeXT-Video, images",
    "vipllava": "ViP-LLaVA",
    "video_llava": "Video-LLaVA, images",
    "llava-pixtral": "Pixtral 12B",
    "molmo2": "Molmo 2",
    "ovis2": "Ovis2",
    "ernie4_5_vl_moe": "ERNIE 4.5 VL",
    "paddleocr_vl": "PaddleOCR-VL",
    "video_llama_3": "VideoLLaMA 3, images",
    "paligemma": "PaliGemma 2",
    "deepseek_vl": "DeepSeek-VL 1.3B",
    "deepseek_vl_hybrid": "DeepSeek-VL 7B",
    "janus": "Janus-Pro",
    "perception_lm": "Perception LM",
    "perception_lm-tiles": "Perception LM, one image in tiles",
    "aria": "Aria",
    "idefics2": "Idefics2",
}
"""The cases in the table of docs/families.md with names of models, the most used first."""

REFUSED = {
    "llama4": "Llama 4",
    "mllama": "Llama 3.2 Vision",
    "cohere2_vision": "Command A Vision",
    "aya_vision": "Aya Vision",
    "blip-2": "BLIP-2",
    "instructblip": "InstructBLIP",
    "kosmos-2": "Kosmos-2",
    "git": "GIT",
}
"""Types that are refused, with names of models."""

FAMILIES = (*ATTENDING, "qwen3_5")
"""The families with every property. Of the others, those that differ by family are tested."""

# fp32 rounding: a leaf's log-prob is a sum of up to 10 tokens of magnitude up to 10. Measured: 5e-6
# of it, and 6e-6 of the largest entry of any gradient.
LOGP_TOLERANCE = 5e-5
GRADIENT_TOLERANCE = 5e-5
CPU = torch.device("cpu")
DOCS = Path(__file__).parents[2] / "docs" / "families.md"
OBJECTIVE = objectives.rdpo(beta=0.3, visual_weight=0.7)
ROW_TOKENS = (1, 150, 4096)  # at most one tree per row, several trees, all trees in one row


@functools.cache
def made(family):
    """(processor, records): one, two and three images; the second's negatives are the first's."""
    processor = make(family)[1]
    rng = np.random.default_rng(sum(family.encode()))
    most = CASES[family].images if family in CASES else 3
    counts = [n for n in (1, 1, 2, 3) if n <= most]
    records = [random_record(family, processor, rng, images=n) for n in counts]
    first, second = records[:2]
    turns = first.prompt
    records[1] = Record(second.name, turns, second.chosen, "red", second.images, first.images)
    return processor, records


@functools.cache
def prompts(family):
    """Records with a system prompt and an image amid a text, and with several turns."""
    _, records = made(family)
    image = {"type": "image"}
    texts = ["left of the", "dot", "is a red bar", "and of", "one two ?", "three"]
    left, dot, bar, more, ask, last = ({"type": "text", "text": text} for text in texts)
    one = records[0].images
    two = records[-1].images[: 2 if len(records) > 2 else 1]
    turns = {
        "system": ({"role": "system", "content": "the small blue bar"},
                   {"role": "user", "content": [left, image, dot, bar]}),
        "turns": ({"role": "user", "content": [image, ask]},
                  {"role": "assistant", "content": "four of the dot"},
                  {"role": "user", "content": [more, *[image] * (len(two) - 1), last]}),
    }  # fmt: skip
    return [
        Record(name, turns[name], "blue dot of the small bar", "green", images)
        for name, images in (("system", one), ("turns", two))
    ]


_ENCODED = {}


def encoded(family, model, objective=OBJECTIVE, records=None):
    """Examples and images of records, by default those of `made`, which are encoded once.

    The copies of a store share what the processor returned.
    """
    own = records is None and objective == OBJECTIVE
    if not own or family not in _ENCODED:
        found = encode_records(
            records or made(family)[1],
            made(family)[0],
            objective,
            layout=model.layout,
            max_response_tokens=64,
            max_tokens=512,
            progress=False,
        )
        if not own:
            return found
        _ENCODED[family] = found
    examples, store = _ENCODED[family]
    store = copy.copy(store)
    store.layout = model.layout
    return examples, store


@functools.cache
def true_logps(family):
    """`truth` of the family's records, without gradients, (L, B)."""
    vlm, _ = make(family)
    with torch.no_grad():
        return truth(vlm, family, encoded(family, ForestModel(make(family)[0]))[0])


def truth(vlm, family, examples, objective=OBJECTIVE, records=None):
    """(L, B): each leaf as one plain sequence, encoded as by `apply_chat_template`.

    Norms, adapters and experts compute as in transformers and PEFT.
    """
    processor, own = made(family)
    instances = [vars(module) for module in vlm.modules() if "forward" in vars(module)]
    replaced = [names.pop("forward") for names in instances]
    table = []
    for record, example in zip(records or own, examples, strict=True):
        row, encoded_by_image = [], {}
        for leaf, named in zip(example.leaves, objective.leaves, strict=True):
            if named.image not in encoded_by_image:
                stored = record.images if named.image == "image" else record.retrieved_images
                text = chat_prompt(processor, record.prompt, len(stored))[0]
                images = [one.open("") for one in stored]
                encoded_by_image[named.image] = encode(processor, images, text)
            row.append(separate_logps(vlm, encoded_by_image[named.image], [leaf.ids])[0].sum())
        table.append(torch.stack(row))
    for names, forward in zip(instances, replaced, strict=True):
        names["forward"] = forward
    return torch.stack(table, 1)


def truth_of_prompts(vlm, family, examples):
    """(2, B): log-probs of responses to `prompts`, by only `apply_chat_template`.

    The ids of a response are compared with those that the template writes.
    """
    processor, table = made(family)[0], []
    for record, example in zip(prompts(family), examples, strict=True):
        images = iter([one.open("") for one in record.images])
        messages = [
            {"role": message["role"], "content": [
                part | ({"image": next(images)} if part["type"] == "image" else {})
                for part in _parts(message["content"])
            ]} for message in record.prompt
        ]  # fmt: skip
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        answers = [record.chosen, record.rejected]
        row = []
        for leaf, answer in zip(example.leaves, answers, strict=True):
            turn = {"role": "assistant", "content": _parts(answer)}
            whole = processor.apply_chat_template([*messages, turn], **options)["input_ids"][0]
            response = torch.as_tensor(leaf.ids)
            start = len(example.roots[leaf.root].ids)
            written = whole[start : start + len(response)]
            if family != "paligemma":  # whose processor appends a line break to any text
                assert torch.equal(response[: len(written)], written)
                assert len(response) - len(written) <= 1  # an end token, if the template has none
            prompt = processor.apply_chat_template(messages, add_generation_prompt=True, **options)
            row.append(separate_logps(vlm, dict(prompt), [leaf.ids])[0].sum())
        table.append(torch.stack(row))
    return torch.stack(table, 1)


def _parts(content):
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def small_config(kind):
    """The default configuration of a type, with two layers in each part."""
    config = AutoConfig.for_model(kind)
    for part in (config, config.get_text_config(), getattr(config, "vision_config", None)):
        if hasattr(part, "num_hidden_layers") and not getattr(part, "layer_types", None):
            part.num_hidden_layers = 2
    return config


def true_loss(logps, targets):
    chosen, rejected, visual = 0.3 * (logps - targets.double())
    return -(F.logsigmoid(chosen - rejected) + 0.7 * F.logsigmoid(chosen - visual)).sum()


def forest_loss(model, examples, store, row_tokens=150):
    targets = -10 + torch.arange(3.0 * len(examples)).view(3, -1)
    out = model(build_batch(examples, store, row_tokens=row_tokens), OBJECTIVE, targets)
    out.loss.backward()
    return out.loss, targets


def gradients(vlm):
    return {name: p.grad for name, p in vlm.named_parameters() if p.requires_grad}


def assert_same_gradients(found, true):
    """Entries agree relative to the whole gradient. Returns the number of changed tensors."""
    scale = max(g.abs().max() for g in true.values() if g is not None)
    assert found.keys() == true.keys()
    for name, expected in true.items():
        got = found[name]
        zero = torch.zeros(())
        worst = (zero if got is None else got) - (zero if expected is None else expected)
        assert worst.abs().max() / scale < GRADIENT_TOLERANCE, (name, worst.abs().max() / scale)
    return sum(g is not None and bool(g.any()) for g in true.values())


def outputs_of(module):
    """A list that collects the tensors that the parts of `module` return."""
    seen = []
    for part in module.modules():
        part.register_forward_hook(
            lambda _, args, out: seen.append(out) if isinstance(out, torch.Tensor) else None
        )
    return seen


def with_lora(family, attention="sdpa"):
    """A model whose adapters are not zero, with examples and images."""
    vlm, _ = make(family, attention=attention)
    decoder = vlm.model.get_decoder()
    linear = [
        n for n, m in decoder.named_modules()
        if isinstance(m, torch.nn.Linear) and "router" not in n and not n.endswith(".gate")
    ]  # fmt: skip
    model = ForestModel(vlm)
    torch.manual_seed(0)
    add_lora(vlm, 2, 4)
    with torch.no_grad():
        for name, p in vlm.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    adapted = [n for n, p in vlm.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in adapted)
    missed = [n for n in linear if sum(f".{n}.lora_" in name for name in adapted) != 2]
    assert len(linear) >= 8 and not missed, missed
    return vlm, model, *encoded(family, model)


def lines(model, examples, store):
    return list(model.check_forest(examples[0], store, CPU))
