"""Forest batches: every leaf has the log-probs, gradients and images of a separate forward."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import encoded
from torch.nn.attention.flex_attention import create_mask

from realign.data.records import Record, StoredImage
from realign.digits import ASSETS
from realign.digits.scenes import make_scenes
from realign.modeling.forest import Example, Leaf, Root, build_batch
from realign.modeling.layouts import Layout
from realign.modeling.loading import load_model
from realign.modeling.model import ForestModel
from realign_kernels import objectives

# fp32 rounding: log-probs are sums of up to 20 tokens of magnitude up to 30.
LOGP_TOLERANCE = 5e-5
GRADIENT_TOLERANCE = 2e-5  # relative to the largest entry of all gradients


def make_examples(processor, count, objective, seed=0):
    """Records with prompts and responses of unequal length, some of one token."""
    scenes = make_scenes(2 * count, biased=False, seed=seed)
    rng = np.random.default_rng(seed)
    records = []
    for i in range(count):
        words = scenes[i].caption.split()
        records.append(
            Record(
                f"r{i}",
                ({"role": "user", "content": " ".join(["name"] * rng.integers(1, 6))},),
                " ".join(words[: rng.integers(1, len(words))]),
                " ".join(words[: rng.integers(1, 4)]),
                (StoredImage.from_pil(scenes[i].image),),
                (StoredImage.from_pil(scenes[count + i].image),),
            )
        )
    return encoded(records, processor, objective)


def separate_logps(vlm, examples, store):
    """(L, B): each leaf as one sequence through the plain model, with full logits."""
    table = []
    for example in examples:
        row = []
        for leaf in example.leaves:
            root = example.roots[leaf.root]
            ids = torch.tensor(np.concatenate([root.ids, leaf.ids]))[None]
            pixels = torch.stack([store.bundle(key)["pixel_values"][0] for key in root.images])
            logits = vlm(input_ids=ids, pixel_values=pixels).logits[0, :-1]
            logps = F.log_softmax(logits.double(), -1).gather(1, ids[0, 1:, None])[:, 0]
            row.append(logps[len(root.ids) - 1 :].sum())
        table.append(torch.stack(row))
    return torch.stack(table, 1)


@pytest.mark.parametrize("name", ["dpo", "rdpo"])
def test_log_probs_equal_separate_forwards(processor, vlm, forest_model, name):
    examples, store = make_examples(processor, 6, objectives.get(name))
    with torch.no_grad():
        truth = separate_logps(vlm, examples, store)
        for row_tokens in (1, 64, 100, 4096):
            batch = build_batch(examples, store, row_tokens=row_tokens)
            found = batch.leaf_sums(forest_model.logps(batch))
            assert (found - truth).abs().max() < LOGP_TOLERANCE, row_tokens
    assert batch.input_ids.shape[0] == 1  # trees in one row do not see each other


def test_gradients_equal_separate_forwards(processor):
    objective = objectives.rdpo(beta=0.3, visual_weight=0.7)
    examples, store = make_examples(processor, 5, objective, seed=1)
    reference = torch.full((3, 5), -20.0) + torch.arange(15).view(3, 5)
    found, truth = load_model(ASSETS), load_model(ASSETS)
    model = ForestModel(found, train_vision=True)
    out = model(build_batch(examples, store, row_tokens=90), objective, reference)
    out.loss.backward()
    logps = separate_logps(truth, examples, store)
    w, lost, other = 0.3 * (logps - reference.double())
    loss = -(F.logsigmoid(w - lost) + 0.7 * F.logsigmoid(w - other)).sum()
    loss.backward()
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    # Some gradients are 0 up to rounding (a key bias shifts all scores equally), so errors are
    # relative to the whole gradient.
    scale = max(p.grad.abs().max() for p in truth.parameters() if p.grad is not None)
    compared = 0
    for (name, a), b in zip(found.named_parameters(), truth.parameters(), strict=True):
        if b.grad is None:
            assert a.grad is None or a.grad.abs().max() == 0, name
            continue
        worst = (a.grad - b.grad).abs().max() / scale
        assert worst < GRADIENT_TOLERANCE, (name, worst)
        compared += 1
    assert compared > 80  # vision tower, projector, language model and head


def test_gradients_are_repeatable_when_many_leaves_share_a_root(processor):
    """On two threads: one row of hidden states predicts the first token of every leaf."""
    examples, store = make_examples(processor, 2, objectives.rdpo())
    model = ForestModel(load_model(ASSETS))
    batch = build_batch(list(examples) * 40, store, row_tokens=4096)
    weight = model.vlm.model.get_decoder().layers[-1].mlp.down_proj.weight
    upstream = torch.randn(len(batch.rows))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = [torch.autograd.grad(model.logps(batch), weight, upstream)[0] for _ in range(5)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(other, found[0]) for other in found)


def test_images_and_roots_are_computed_once(processor):
    examples, store = make_examples(processor, 4, objectives.rdpo())
    # The second example's retrieved image is the first example's image, with the same prompt.
    first, second = examples[:2]
    shared = Root(first.roots[0].images, first.roots[0].ids)
    second = Example("second", (second.roots[0], shared), second.leaves)
    seen = []
    vlm = load_model(ASSETS).eval()
    vlm.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args or (kwargs["pixel_values"],))[0].shape[0]),
        with_kwargs=True,
    )
    batch = build_batch([first, second], store, row_tokens=4096)
    with torch.no_grad():
        found = batch.leaf_sums(ForestModel(vlm).logps(batch))
        assert seen == [3]  # the first example's two images, and the second's own image
        truth = separate_logps(vlm, [first, second], store)
    assert (found - truth).abs().max() < LOGP_TOLERANCE
    roots = {root.key: len(root.ids) for example in (first, second) for root in example.roots}
    leaves = sum(len(leaf.ids) for e in (first, second) for leaf in e.leaves)
    assert int((batch.segment >= 0).sum()) == sum(roots.values()) + leaves
    assert batch.input_ids.shape[1] == sum(roots.values()) + leaves


def test_several_images_in_a_prompt(processor, vlm, forest_model):
    examples, store = make_examples(processor, 2, objectives.dpo())
    both = examples[0].roots[0].images + examples[1].roots[0].images
    image, text = examples[0].roots[0].ids[:-4], examples[0].roots[0].ids[-4:]
    start = int(np.flatnonzero(image == 4)[0])
    root = Root(both, np.concatenate([image, image[start : start + 16], text]))
    example = Example("two images", (root,), tuple(Leaf(0, x.ids) for x in examples[0].leaves))
    with torch.no_grad():
        batch = build_batch([example, examples[1]], store, row_tokens=200)
        found = batch.leaf_sums(forest_model.logps(batch))
        truth = separate_logps(vlm, [example, examples[1]], store)
    assert (found - truth).abs().max() < LOGP_TOLERANCE


@pytest.mark.parametrize("both_ways", [None, "image", "prompt"])
def test_the_mask_by_its_definition(processor, both_ways):
    """Windows, and two-way blocks: Gemma 3's within the window, PaliGemma's beyond it."""
    examples, store = make_examples(processor, 3, objectives.rdpo())
    store.layout = Layout(4, both_ways=both_ways, types="token_type_ids")
    batch = build_batch(examples, store, row_tokens=90)
    window, beyond = 12 if both_ways else None, both_ways == "prompt"
    found = batch.attention_mask(window, beyond)
    assert batch.depth.max() > 24 and len(batch.depth) > 1
    segment, parent, depth = (t.numpy() for t in (batch.segment, batch.parent, batch.depth))
    rows, columns = segment.shape
    same = segment[:, :, None] == segment[:, None]
    visible = np.tri(columns, dtype=bool) & (same | (parent[:, :, None] == segment[:, None]))
    if both_ways:
        block = batch.block.numpy()
        together = same & (block[:, :, None] == block[:, None]) & (block[:, :, None] != -1)
        near = depth[:, :, None] - depth[:, None] < window
        visible = (near & visible) | together if beyond else near & (visible | together)
        roots = (batch.segment == batch.parent) & (batch.segment >= 0)
        assert torch.equal(batch.block >= 0, roots if beyond else batch.input_ids == 4)
    assert np.array_equal(found[:, 0].numpy(), visible)
    flex = create_mask(batch.sees(window, beyond), rows, 1, columns, columns, device="cpu")
    assert torch.equal(flex, found)


def test_rows_of_an_example_are_adjacent_and_predict_its_labels(processor):
    examples, store = make_examples(processor, 4, objectives.rdpo())
    batch = build_batch(examples, store, row_tokens=128)
    owner = (batch.sequence_ids % 4).tolist()
    assert owner == sorted(owner)
    labels = np.concatenate([leaf.ids for example in examples for leaf in example.leaves])
    assert batch.labels.tolist() == labels.tolist()
    # A predicting position is in the leaf itself, or the last token of its root.
    flat = batch.position_ids.flatten()[batch.rows]
    depth = [len(e.roots[leaf.root].ids) for e in examples for leaf in e.leaves]
    sizes = [len(leaf.ids) for e in examples for leaf in e.leaves]
    expected = [d - 1 + j for d, size in zip(depth, sizes, strict=True) for j in range(size)]
    assert flat.tolist() == expected
