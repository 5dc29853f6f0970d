"""The start-up check names the part of a forest that differs from a plain forward."""

import dataclasses
import functools
import re

import numpy as np
import pytest
import torch
from tiny_vlms import make, random_record

from realign.modeling import images, model, start_check, tree_attention
from realign.modeling.encode import encode_records
from realign.modeling.forest import ForestBatch
from realign.modeling.layouts import Layout
from realign.modeling.model import ForestModel
from realign_kernels import objectives


def checked(family, change=None, attention="tree", dtype=torch.float32):
    """Lines of the check of a family's model, after a change of it."""
    vlm, processor = make(family, attention=attention)
    forest_model = ForestModel(vlm.to(dtype), dtype=dtype).eval()
    if change is not None:
        change(forest_model)
    record = random_record(family, processor, np.random.default_rng(0))
    examples, store = encode_records(
        [record], processor, objectives.dpo(), layout=forest_model.layout, max_response_tokens=64,
        max_tokens=512, progress=False,
    )  # fmt: skip
    return list(forest_model.check_forest(examples[0], store, torch.device("cpu")))


def without(name):
    """Hide a name from what a layout passes on."""

    def change(forest_model):
        layout = forest_model.layout
        layout.accepts, layout.tower_inputs = (
            names - {name} for names in (layout.accepts, layout.tower_inputs)
        )

    return change


def with_layout(**fields):
    """Set fields of the layout."""

    def change(forest_model):
        for name, value in fields.items():
            setattr(forest_model.layout, name, value)

    return change


def unfreeze_the_tower(forest_model):
    tower = forest_model.vlm.model.get_encoder("image")
    next(tower.parameters()).requires_grad_(True)


def without_softcap(forest_model):
    forest_model.softcap = None


def patched(patch, owner, name, replace):
    """Replace a function by one that is made from it."""
    patch.setattr(owner, name, replace(getattr(owner, name)))


def swap_images(patch):
    patched(patch, model, "in_slots", lambda right: lambda f, slots: right(f, slots[::-1]))


def shift_positions(patch):
    def shifted(right):
        return lambda *given: right(*given) + 1

    patched(patch, Layout, "positions", shifted)


def continue_from_the_last(patch):
    """Responses continue from the number of prompt tokens, as without M-RoPE."""

    def counted(right):
        def positions(self, ids, grids, columns):
            found = right(self, ids, grids, columns)
            found[:, -1] = len(ids) - 1
            return found

        return positions

    patched(patch, Layout, "positions", counted)


def swap_sides(patch):
    def swapped(right):
        def positions(self, ids, grids, columns):
            turned = {n: g[:, [0, 2, 1]] for n, g in grids.items()}
            return right(self, ids, turned, columns)

        return positions

    patched(patch, Layout, "positions", swapped)


def reverse_levels(patch):
    def reversed_levels(right):
        def in_slots(*given):
            found = right(*given)
            found.deepstack_features = found.deepstack_features[::-1]
            return found

        return in_slots

    patched(patch, model, "in_slots", reversed_levels)


def mark_responses(patch):
    patch.setattr(Layout, "of_response", lambda *given: 1)


def see_other_responses(patch):
    def leaking(right):
        def sees(self, *given):
            whole = torch.where(self.segment >= 0, self.parent, -1)
            return right(dataclasses.replace(self, segment=whole), *given)

        return sees

    patched(patch, ForestBatch, "sees", leaking)


def collate_in_reverse(patch):
    def reverse(right):
        return lambda bundles, tokens: right(bundles[::-1], tokens)

    patched(patch, images, "collate", reverse)


def scale_attention(patch):
    right = tree_attention.forest_attention

    def scaled(*given, **options):
        if options.get("trees") is not None:
            options["scaling"] = 0.9 * options["scaling"]
        return right(*given, **options)

    patch.setitem(tree_attention.AttentionInterface._global_mapping, tree_attention.CALLS, scaled)


def drop_the_root_state(patch):
    """A response's first token is predicted by the token before the prompt's last."""

    def earlier(right):
        def build(*given, **options):
            batch = right(*given, **options)
            first = batch.sequence_ids.diff(prepend=torch.tensor([-1])) != 0
            return dataclasses.replace(batch, rows=batch.rows - first.long())

        return build

    patched(patch, start_check, "build_batch", earlier)


IN_CODE = {
    "images in other places": ("qwen2_vl", swap_images, "image features .* those of other image"),
    "positions off by one": ("llava", shift_positions, "positions differ .* token 0 of a prompt"),
    "responses not after the largest position": (
        "qwen2_vl", continue_from_the_last, "positions differ in a forest: token [0-9]+ of a",
    ),
    "width and height": ("qwen2_5_vl", swap_sides, "positions differ in a forest"),
    "order of DeepStack": ("qwen3_vl", reverse_levels, "features .'deepstack_visual_embeds.0'. d"),
    "types of responses": ("ernie4_5_vl_moe", mark_responses, "token column .* token 0 of a resp"),
    "a response sees another": ("llava", see_other_responses, "mask of layer 0 differs|see other"),
    "batch of images": ("llava", collate_in_reverse, "image features .* those of other image"),
    "scale of scores": ("llava", scale_attention, "log-probs with tree attention differ .* by 0."),
    "row of the first label": ("internvl", drop_the_root_state, "are predicted at other positions"),
}  # fmt: skip
OF_MODEL = {
    "token column": (
        "ernie4_5_vl_moe", without("moe_mm_token_type_ids"), "'moe_mm_token_type_ids', which is not"
    ),
    "image mask": ("idefics3", without("pixel_attention_mask"), "'pixel_attention_mask', which is"),
    "causal block": ("gemma4-vision", with_layout(both_ways=None), "mask of layer 0 .* does not"),
    "two-way in full layers": (
        "gemma4-vision", with_layout(both_ways_kinds=("full_attention",)), "mask of layer 0",
    ),
    "separate blocks": ("molmo2", with_layout(both_ways="image"), "mask of layer 0"),
    "window": ("gemma3", with_layout(window=13), "mask of layer 0 .* token .* of a .* sees token"),
    "first position": ("paligemma", with_layout(first_position=0), "positions differ in a forest"),
    "tower": ("llava", unfreeze_the_tower, "is trained, and belongs to a part that is frozen"),
    "softcap": ("gemma4", without_softcap, "log-probs of the head differ by 0.1"),
}  # fmt: skip


def message(family, change=None, dtype=torch.float32):
    """The lines of the check, or its error."""
    try:
        return " ".join(checked(family, change, dtype=dtype))
    except ValueError as error:
        return str(error)


@functools.cache
def said_without_fault(family):
    return message(family)


@pytest.mark.parametrize("fault", IN_CODE)
def test_a_fault_in_the_code_is_named(fault, monkeypatch):
    family, plant, expected = IN_CODE[fault]
    assert "differ" not in said_without_fault(family)
    plant(monkeypatch)
    found = message(family)
    assert re.search(expected, found), found


@pytest.mark.parametrize("fault", OF_MODEL)
def test_a_fault_in_a_layout_is_named(fault):
    family, change, expected = OF_MODEL[fault]
    assert "differ" not in said_without_fault(family)
    found = message(family, change)
    assert re.search(expected, found), found


# The rounding of log-probs in bf16 is larger than the effect of these faults.
@pytest.mark.parametrize("fault", ["row of the first label", "softcap"])
def test_a_fault_is_named_in_bf16(fault, monkeypatch):
    family, plant, expected = (IN_CODE | OF_MODEL)[fault]
    assert "differ" not in message(family, dtype=torch.bfloat16)
    change = plant if fault in OF_MODEL else plant(monkeypatch)
    assert re.search(expected, message(family, change, torch.bfloat16))


def test_an_error_in_a_tested_type_names_its_language_model(monkeypatch):
    def fails(*given):
        raise AttributeError("no attribute 'past_key_values'")

    monkeypatch.setattr(start_check, "compare_parts", fails)
    found = message("internvl")
    assert re.search("type 'internvl' with a language model of type 'qwen2' are .*past_key", found)
