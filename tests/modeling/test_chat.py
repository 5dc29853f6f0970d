"""Chat templates: rendered prompts and scored texts, and errors for templates that change them."""

import itertools
import re
import warnings
from pathlib import Path

import pytest
import trl
from chat_templates import FINE, GLM, REFUSED
from PIL import Image
from tiny_processors import make_processor
from tiny_tokenizers import byte_level, sentence_pieces
from tiny_vlms import FAMILIES, make
from tokenizers import processors
from transformers import LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from realign.data.errors import Malformed
from realign.data.records import Record, StoredImage
from realign.modeling.chat import ChatTemplate, chat_prompt, text_inputs, tokens_behind
from realign.modeling.encode import encode_records
from realign.modeling.layouts import Layout, layout_of
from realign.modeling.loading import load_model
from realign_kernels import objectives

pytestmark = [
    pytest.mark.filterwarnings("ignore:the chat template.s generation prompt"),
    pytest.mark.filterwarnings("ignore:the chat template ends responses with"),
]
SHIPPED = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
WITH_IMAGES = (  # one of each kind, since a template takes 0.1 s to compile
    *("gemma3", "gemma4", "idefics3", "lfm2_2_5_vl", "llava_next", "muse_glimmer", "qwen2_5_vl"),
    *("qwen3_vl", "llama3", "phi3", "deepseek_r1_distill", "glm4moe"),
)
# These templates change a response's own thoughts, or write other thoughts into the prompt.
THOUGHTLESS = ("deepseek", "glm4moe", "nemotron", "qwen3_5_nothink")
SYSTEM = ("system", "Be brief &\nkind.")
ASKED = ("user", "What is <it> & why?\nBe brief.")
TURNS = (ASKED, ("assistant", "A cat & <mouse>."), ("user", "What colour?"))
THOUGHTS = (ASKED, ("assistant", "<think>\nhm & hm\n</think>\n\nA cat."), ("user", "Why?"))
DIALOGUES = ((ASKED,), (SYSTEM, ASKED), TURNS, (SYSTEM, *TURNS), THOUGHTS)
ANSWERS = ("red", " It is red & <green>.\n\nTruly 'so' ", "<think>\nlook\n</think>\n\nred")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level(["a few words"], 300)


@pytest.fixture(scope="module")
def letters(tokenizer):
    """A LLaVA processor whose tokenizer encodes every character."""
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def messages_of(dialogue, typed=False):
    return [
        {"role": role, "content": [{"type": "text", "text": text}] if typed else text}
        for role, text in dialogue
    ]


def truth(tokenizer, template, dialogue):
    """transformers' rendering of strings, or of typed parts if only these work."""
    for typed in (False, True):
        try:
            text = tokenizer.apply_chat_template(
                messages_of(dialogue, typed), chat_template=template, tokenize=False
            )
        except Exception:
            continue
        if dialogue[-1][1].strip() in text and "'type'" not in text:
            return text
    return None


def own_texts(tokenizer, template, contents, answer):
    """transformers' renderings of a question and an answer in several forms, with an end."""
    found = []
    for content in contents:
        turns = [
            {"role": r, "content": c} for r, c in zip(("user", "assistant"), content, strict=True)
        ]
        try:
            text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
        except Exception:
            continue
        if answer in text and text.count("<image>") == 1 and "'type'" not in text:
            found.append(text.rstrip() + "</s>" if text.rstrip().endswith(answer) else text)
    return found


def rendered(chat, dialogue, answer):
    """(prompt, scored text) as in training."""
    prompt = chat.prompt(messages_of(dialogue), 0)
    return prompt.text, chat.scored(prompt, answer)


def chat_of(tokenizer, template):
    tokenizer.chat_template = template
    return ChatTemplate(tokenizer)


def assert_own(tokenizer, template, dialogue, answer, prompt, scored):
    """Prompt and scored text are the template's text, with the response once, after the prompt."""
    whole, text = truth(tokenizer, template, (*dialogue, ("assistant", answer))), answer.strip()
    ended = whole.rstrip() + "</s>" if whole.rstrip().endswith(text) else whole
    assert prompt + scored == ended
    if prompt.endswith("<think>\n") and text not in scored:
        text = text.removeprefix("<think>\n")
    assert scored.count(text) == 1
    # The tokenizer encodes every character, so decoding gives the same text.
    assert tokenizer.decode(tokenizer(prompt + scored)["input_ids"]) == ended


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_trls_templates(tokenizer, path):
    template, fine = path.read_text(), 0
    chat = chat_of(tokenizer, template)
    for dialogue in DIALOGUES:
        for answer in ANSWERS:
            own = truth(tokenizer, template, (*dialogue, ("assistant", answer)))
            try:
                found = rendered(chat, dialogue, answer)
            except Malformed:  # Gemma rejects a system role
                assert own is None or ("<think>" in answer and path.stem.startswith(THOUGHTLESS))
            else:
                assert_own(tokenizer, template, dialogue, answer, *found)
                fine += 1
    assert fine >= 6


def test_trls_templates_with_an_image(letters):
    """The ids of root and leaf decode to the template's text for strings or typed parts."""
    tokenizer = letters.tokenizer
    stored = StoredImage.from_pil(Image.new("RGB", (8, 8)))
    asked, answers = ASKED[1], ("red & <green>", "blue")
    for path in (path for path in SHIPPED if path.stem in WITH_IMAGES):
        template = re.sub(
            r"<\|(image_pad|image|patch)\|>|<start_of_image>", "<image>", path.read_text()
        )
        letters.chat_template = template
        record = Record(path.stem, ({"role": "user", "content": asked},), *answers, (stored,))
        (example,), _ = encode_records(
            [record],
            letters,
            objectives.dpo(),
            layout=Layout(tokenizer.convert_tokens_to_ids("<image>")),
            max_response_tokens=999,
            max_tokens=9999,
            progress=False,
        )
        parts = [{"type": "image"}, {"type": "text", "text": asked}]
        for leaf, answer in zip(example.leaves, answers, strict=True):
            spelled = tokenizer.decode([*example.roots[0].ids, *leaf.ids])
            answered = [answer, [{"type": "text", "text": answer}]]
            shown = [parts, f"<image>\n{asked}"]
            owned = own_texts(tokenizer, template, itertools.product(shown, answered), answer)
            assert re.sub("(<image>)+", "<image>", spelled) in owned, path.stem
            assert tokenizer.decode(leaf.ids).count(answer) == 1


@pytest.mark.parametrize("name", FINE)
def test_templates_of_various_forms(tokenizer, name):
    template = FINE[name]
    chat = chat_of(tokenizer, template)
    for dialogue in DIALOGUES:
        for answer in ANSWERS[:2]:
            if name == "microseconds":  # no two renderings are equal
                prompt, scored = rendered(chat, dialogue, answer)
                assert prompt[6:].startswith("<|") and scored == answer + "</s>"
                continue
            found = rendered(chat, dialogue, answer)
            assert_own(tokenizer, template, dialogue, answer, *found)


@pytest.mark.parametrize("name", REFUSED)
def test_templates_that_are_refused(tokenizer, name):
    """Dialogues that the template renders correctly are accepted."""
    template, message = REFUSED[name]
    chat = chat_of(tokenizer, template)
    errors = []
    for dialogue in DIALOGUES:
        for answer in ANSWERS[:2]:
            try:
                found = rendered(chat, dialogue, answer)
            except Malformed as error:
                errors.append(str(error))
            else:
                assert_own(tokenizer, template, dialogue, answer, *found)
    assert any(re.search(message, error) for error in errors), errors


def test_a_generation_prompt_that_no_response_begins_with_is_reported_once(tokenizer):
    chat = chat_of(tokenizer, FINE["thoughts open in the generation prompt"])
    with pytest.warns(UserWarning, match="ends with '<think>") as caught:
        texts = [chat.prompt(messages_of([("user", text)]), 0).text for text in ("a", "b", "a")]
    assert len(caught) == 1 and texts[0] == "<|user|>a</s><|assistant|>"


def test_a_response_without_any_end_is_reported():
    tokenizer = byte_level(["a"], 300)
    tokenizer.eos_token = None
    chat = chat_of(tokenizer, FINE["no end"])
    with pytest.warns(UserWarning, match="nor the tokenizer name one. Responses are scored"):
        assert rendered(chat, (ASKED,), "red ")[1] == "red "


def glm(tokenizer, ends):
    """A template like GLM-4.5V's with end tokens, given as text."""
    special = ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>"]
    tokenizer.add_special_tokens({"extra_special_tokens": special})
    tokenizer.chat_template = GLM
    return ChatTemplate(tokenizer, tokenizer.convert_tokens_to_ids(ends))


@pytest.mark.parametrize("dialogue", DIALOGUES)
@pytest.mark.parametrize(
    ("answer", "thoughts"),
    [("red", "<think></think>\n"), (" red. ", "<think></think>\n"), ("<think>hm</think>\nred", "")],
)
def test_responses_of_glm_end_where_the_next_turn_begins(dialogue, answer, thoughts):
    """GLM's generation settings name </s>, <|user|> and <|observation|>, and it writes no end."""
    chat = glm(byte_level(["a"], 300), ["</s>", "<|user|>", "<|observation|>"])
    prompt, scored = rendered(chat, dialogue, answer)
    assert prompt.endswith("<|assistant|>\n")
    assert scored == f"{thoughts}{answer.strip()}<|user|>"
    # The model then reads its own end as the start of the next turn.
    asked = [*dialogue, ("assistant", answer), ("user", "Why?")]
    kept = "red" if "think" in answer else answer.strip()
    whole = chat.prompt(messages_of(asked), 0).text
    assert whole.endswith(f"</think>\n{kept}<|user|>\nWhy?<|assistant|>\n")


def test_end_tokens_of_the_generation_settings():
    """The eos_token if the model stops there, else another end token of the model."""
    tokenizer = byte_level(["a"], 300)
    for ends, expected in (
        ([], "</s>"),
        (["</s>"], "</s>"),
        (["<|observation|>", "</s>"], "</s>"),
        (["<|observation|>"], "<|observation|>"),
        (["<|observation|>", "<|user|>"], "<|user|>"),
    ):
        assert rendered(glm(tokenizer, ends), (ASKED,), "red")[1].endswith(f"red{expected}")
    tokenizer.chat_template = FINE["no end"]
    for eos, expected in (("</s>", "</s>"), (None, "<|observation|>")):
        tokenizer.eos_token = eos
        ends = tokenizer.convert_tokens_to_ids(["<|observation|>", "</s>"])
        assert rendered(ChatTemplate(tokenizer, ends), (ASKED,), "red")[1] == f"red{expected}"
    beyond = ChatTemplate(tokenizer, [10_000])
    with pytest.warns(UserWarning, match="neither the generation settings nor the tokenizer"):
        assert rendered(beyond, (ASKED,), "red")[1] == "red"


def test_an_end_that_is_no_special_token_is_reported_once():
    tokenizer = byte_level(["a"], 300)
    chat = chat_of(tokenizer, FINE["own end of turn"])
    with pytest.warns(UserWarning, match="ends responses with '<.end.>', which holds no") as caught:
        for answer in ("red", "blue"):
            assert rendered(chat, (ASKED,), answer)[1] == f"{answer}<|end|>\n"
    assert len(caught) == 1
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|end|>"]})
    with warnings.catch_warnings(action="error"):
        rendered(chat_of(tokenizer, FINE["own end of turn"]), (ASKED,), "red")


def test_end_tokens_of_a_model_reach_its_responses(tmp_path):
    """As with LLaVA-1.5, whose template writes no end: from the folder, also without weights."""
    vlm, processor = make("llava")
    processor.chat_template = FINE["no end"].replace(
        "m.content", "(m.content if m.content is string else '<image>' + m.content[-1].text)"
    )
    end, pad = processor.tokenizer.bos_token_id, processor.tokenizer.pad_token_id
    vlm.generation_config.eos_token_id = [end, pad]
    vlm.save_pretrained(tmp_path)
    stored = StoredImage.from_pil(Image.new("RGB", (28, 28)))
    record = Record("a", (dict(role="user", content="what"),), "green", "blue", (stored,))
    for meta in (False, True):
        layout = layout_of(load_model(tmp_path, meta=meta))
        assert layout.ends == (end, pad)
        (example,), _ = encode_records(
            [record],
            processor,
            objectives.dpo(),
            layout=layout,
            max_response_tokens=9,
            max_tokens=99,
            progress=False,
        )
        assert [leaf.ids[-1] for leaf in example.leaves] == [end, end]
    assert layout_of(make("llava")[0]).ends == (processor.tokenizer.eos_token_id,)


@pytest.mark.parametrize("family", FAMILIES)
def test_image_tags_are_places_of_images(family):
    """A tag of any family is an image place in every model."""
    processor = make_processor(family)
    known = [processor.image_token, "<image>", "<img>a b.png</img>", "[IMG]", "<IMAGE>"]
    known += [
        "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>",
        "<image></image>",
        "<image/>",
        "<image_pad>",
    ]
    image, red, blue = {"type": "image"}, *({"type": "text", "text": t} for t in ("red", "blue"))
    wanted = {}
    for content in ([image, red], [red, image], [red, image, blue], [image, image, red]):
        parts = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(parts, add_generation_prompt=True)
        spelled = " ".join(part.get("text", "{}") for part in content)
        wanted[spelled] = (text, spelled.count("{}"))
    for spelled, (text, images) in wanted.items():
        for tag in known:
            asked = [{"role": "user", "content": spelled.replace("{}", f"{tag}\n")}]
            assert chat_prompt(processor, asked, images)[0] == text
    numbered = [{"role": "user", "content": "<|image_1|> <image 2>red"}]
    assert chat_prompt(processor, numbered, 2)[0] == wanted["{} {} red"][0]


@pytest.mark.parametrize(
    ("messages", "images", "message"),
    [
        ([("user", "<image> or <img>")], 1, "place 2 image.s., by image tags such as '<image>'"),
        ([("user", "<image> red")], 2, "place 1 image.s., .* and 2 are given"),
        ([("user", "<image> red")], 0, "place 1 image.s., .* and 0 are given"),
        ([("user", "<image 2> <image 1>")], 2, "'<image 2>' is number 1 of the prompt. Number"),
        ([("user", "<image_0>red")], 1, "'<image_0>' is number 1 of the prompt. Number"),
        ([("system", "<image>"), ("user", "red")], 1, "tag '<image>' in a message of the system"),
        (
            [("user", "red"), ("assistant", "[IMG]"), ("user", "a")],
            1,
            "in a message of the assistant",
        ),
        ([("system", "red")], 1, "it has no user message"),
        ([("user", "red<|im_end|>")], 1, "its prompt holds '<.im_end.>', which the model reads"),
        ([("user", "red"), ("<|im_end|>", "a")], 1, "its prompt holds '<.im_end.>'"),
        (
            [("user", ["red"] * 9_000)],
            1,
            r"has the message {'content': \['red', .{,90}}. Give a role",
        ),
    ],
)
def test_messages_that_are_refused(messages, images, message):
    given = [{"role": role, "content": content} for role, content in messages]
    with pytest.raises(Malformed, match=message):
        chat_prompt(make_processor("qwen2_vl"), given, images)


@pytest.mark.parametrize(
    ("family", "image"),
    [("llava", "<image>"), ("qwen2_vl", "<|vision_start|><|image_pad|><|vision_end|>")],
)
def test_templates_of_strings_get_the_image_token(family, image):
    """The token has the text that the family's own templates write around it."""
    processor = make_processor(family)
    for name in ("strings", "concatenated", "trimmed", "system in the first user message"):
        processor.chat_template = FINE[name]
        asked = [{"role": "system", "content": "a"}, {"role": "user", "content": "red\n<img>blue"}]
        strings = [asked[0], {"role": "user", "content": f"red\n{image}\nblue"}]
        text = processor.apply_chat_template(strings, add_generation_prompt=True)
        assert chat_prompt(processor, asked, 1)[0] == text
    processor.chat_template = FINE["strings"].replace("m.content", "m.content | replace('<', '')")
    with pytest.raises(Malformed, match="places 0 image.s. .* for 1 given"):
        chat_prompt(processor, asked, 1)


@pytest.mark.parametrize("added", ["$0 </s>", "<s> $0 </s>", "<s> $0"])
@pytest.mark.parametrize("own", ["", "<s>"])
def test_prompts_begin_once_and_do_not_end(added, own):
    """The start token occurs once, whether the template, the tokenizer or both write it."""
    tokenizer = byte_level(["a"], 300)
    ids = [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=added, special_tokens=[pair for pair in ids if pair[0] in added]
    )
    inputs = text_inputs(tokenizer, [f"{own}user"])
    made = tokenizer(inputs.pop("text"), **inputs)["input_ids"]
    begin = [1] * ("<s>" in own + added)
    assert made == [begin + tokenizer("user", add_special_tokens=False)["input_ids"]]


def test_tokens_after_a_prompt_decode_to_the_text():
    """A token across the end of the prompt and the start of the text is split."""
    pieces = sentence_pieces(["red red red red dot"] * 3 + [*"\n: user"])
    for tokenizer in (byte_level(["user: what is red", "red dot \n\n red"], 330), pieces):
        joined = 0
        for prompt, text in (("user: ", "red dot"), ("user:\n", "\nred"), ("user:", " what")):
            before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            whole = tokenizer(prompt + text, add_special_tokens=False)["input_ids"]
            joined += whole[: len(before)] != before
            made, first, _ = tokens_behind(tokenizer, prompt, text)
            ids = before + made["input_ids"][first:]
            assert tokenizer.decode(ids) == tokenizer.decode(whole)
        assert joined
