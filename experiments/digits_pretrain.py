"""Pretraining of the base checkpoint of the digits default.

    python -m experiments.digits_pretrain            # about ten minutes on two cores

Trains a `LlavaForConditionalGeneration` of 1.1 M parameters on captions and yes/no questions.
All scenes are biased, so the model reads digits well and also learns the prior of the captions.
Writes bf16 safetensors to the assets of `realign.digits`, which are shipped with the package.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from realign.digits import ASSETS
from realign.digits.processor import PATCH, build_processor
from realign.digits.scenes import (
    CAPTION_PROMPT,
    SIZE,
    WORDS,
    Scene,
    caption_of,
    make_easy_questions,
    make_questions,
    make_scenes,
)
from realign.modeling.chat import chat_prompt
from realign.pairs.masking.mask import Masked
from realign.pairs.prompts import complete_chat

BATCH = 64
POOL = 8192  # biased scenes, drawn once
TURNS = 2  # questions of each of the three kinds in a dialogue
LEARNING_RATE = 1e-3
SPECIAL = ("bos", "eos", "pad")
COMPLETIONS = 24  # rows in a batch of completions, which have long prompts


def build_model(processor) -> LlavaForConditionalGeneration:
    """A LLaVA of 1.1 M parameters: three CLIP layers, a projector, four Llama layers."""
    tokenizer = processor.tokenizer
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in SPECIAL}
    vision = CLIPVisionConfig(
        **sizes, num_hidden_layers=3, image_size=SIZE, patch_size=PATCH, projection_dim=128
    )
    text = LlamaConfig(
        **sizes,
        **special,
        vocab_size=len(tokenizer),
        num_hidden_layers=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(SIZE // PATCH) ** 2,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.update(**special)
    return model


def encode(
    processor, scenes: list[Scene], dialogues: list[list[tuple[str, str]]]
) -> dict[str, torch.Tensor]:
    """Tokenize dialogues of (question, answer) turns, one scene each. Labels cover only answers."""
    tokenizer = processor.tokenizer
    openings = [turns[0][0] for turns in dialogues]
    prompts = [chat_prompt(processor, [{"role": "user", "content": q}], 1)[0] for q in openings]
    encoded = processor(images=[scene.image for scene in scenes], text=prompts)
    rows = []
    for ids, turns in zip(encoded["input_ids"], dialogues, strict=True):
        labels = [-100] * len(ids)
        for i, (question, answer) in enumerate(turns):
            turn = f"user : {question} assistant :" if i else ""
            question_ids = tokenizer(turn, add_special_tokens=False)["input_ids"]
            answer_ids = tokenizer(f"{answer} </s>", add_special_tokens=False)["input_ids"]
            ids = [*ids, *question_ids, *answer_ids]
            labels = [*labels, *[-100] * len(question_ids), *answer_ids]
        rows.append((torch.tensor(ids), torch.tensor(labels)))
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([ids for ids, _ in rows], True, tokenizer.pad_token_id),
        "labels": pad([labels for _, labels in rows], True, -100),
        "pixel_values": torch.from_numpy(np.stack(encoded["pixel_values"])),
    }


def pretrain(
    steps: int,
    seed: int,
    *,
    completions: bool = False,
    progress: bool = True,
    **scene_options,
) -> tuple[LlavaForConditionalGeneration, object]:
    """Train a base model from scratch.

    Args:
        steps: number of batches of BATCH dialogues.
        seed: seed of the weights, the scenes and their order.
        completions: whether every fourth batch teaches the model to complete a masked caption of an
            image, with the prompt of `--refill prompt`.
        progress: whether to show a progress bar.
        scene_options: noise, follow and glyphs of the scenes, see `make_scenes`.

    Returns:
        The model, in evaluation mode, and its processor.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    processor = build_processor()
    model = build_model(processor).train()
    scenes = make_scenes(POOL, biased=True, seed=seed + 1000, **scene_options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    bar = tqdm(range(steps), desc="pretraining the digits base", disable=not progress)
    for step in bar:
        warmup, fraction = min(1.0, (step + 1) / 50), step / steps
        rate = LEARNING_RATE * warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fraction)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        if completions and step % 4 == 3:
            batch_scenes = [scenes[i] for i in rng.integers(POOL, size=COMPLETIONS)]
            caption_scenes = [scenes[i] for i in rng.integers(POOL, size=COMPLETIONS)]
            dialogues = [
                [_completion(other, shown, rng)]
                for other, shown in zip(caption_scenes, batch_scenes, strict=True)
            ]
        else:
            batch_scenes = [scenes[i] for i in rng.integers(POOL, size=BATCH)]
            dialogues = [_dialogue(scene, i, rng) for i, scene in enumerate(batch_scenes)]
        batch = encode(processor, batch_scenes, dialogues)
        labels = batch.pop("labels")
        logits = model(**batch).logits[:, :-1].float()
        targets = labels[:, 1:]
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        # The mean of each row, so that a short answer has the weight of a caption.
        losses = losses.sum(1) / (targets != -100).sum(1)
        loss = losses.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if len(batch_scenes) == BATCH:
            captions, answers = losses.detach().view(-1, 2).mean(0).tolist()
            bar.set_postfix(captions=f"{captions:.3f}", answers=f"{answers:.3f}", refresh=False)
    return model.eval(), processor


def _dialogue(scene: Scene, place: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Return questions at odd places of a batch and the caption at even places."""
    if not place % 2:
        return [(CAPTION_PROMPT, scene.caption)]
    # Several short turns, because a single answer in a batch row teaches too little.
    questions = [make_questions(scene, rng)[rng.integers(2)] for _ in range(TURNS)]
    for _ in range(TURNS):
        questions += make_easy_questions(scene, rng)
    rng.shuffle(questions)
    return [(question.text, question.answer) for question in questions]


def _completion(other: Scene, shown: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Return a request that hides a digit of `other`, and its answer, with the digit of `shown`."""
    place = int(rng.integers(4))
    digits = [*other.digits[:place], shown.digits[place], *other.digits[place + 1 :]]
    hidden = WORDS[other.digits[place]]
    # The same word may occur earlier in the caption, so the split is by place, not by word.
    places = caption_of(other.digits).split(" , ")
    name, _, after = places[place].rpartition(f" {hidden}")
    start = " , ".join([*places[:place], name + " "])
    end = " , ".join([after, *places[place + 1 :]])
    masked = Masked((start, end), (hidden,))
    request = complete_chat(CAPTION_PROMPT, masked, shown.image).messages[0]["content"]
    return request, caption_of(tuple(digits))


def main() -> None:
    """Parse the arguments, pretrain the base and write its checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--steps", type=int, default=2000, help=f"training steps, each on {BATCH} scenes"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and scenes")
    parser.add_argument("--output", type=Path, default=ASSETS, help="folder to write to")
    options = parser.parse_args()
    model, processor = pretrain(options.steps, options.seed)
    model.to(torch.bfloat16).save_pretrained(options.output)
    processor.save_pretrained(options.output)
    print(f"wrote the base checkpoint to {options.output}")


if __name__ == "__main__":
    main()
