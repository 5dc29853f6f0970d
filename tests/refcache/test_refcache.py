"""The reference cache with forests but without a model: keys, plan, fill, and caller errors."""

import math
import time

import numpy as np
import pytest
import torch
from forests import Forest, Leaf, Root, Scorer, fill, make_forests, token_logps

from realign_kernels import MissingReferences, ReferenceCache, leaf_keys, refcache
from realign_kernels.refcache.fill import batches_to_compute, plan
from realign_kernels.refcache.keys import collect_leaves

PRINT = {"weights": "a" * 32, "dtype": "fp32"}


def exact(forests):
    return [math.fsum(token_logps(f, leaf)) for f in forests for leaf in range(len(f.leaves))]


# --- keys ---


def one_leaf(images=("a", "b"), prompt=(1, 2, 3), response=(4, 5), rival=False):
    return Forest((Root(images, np.array(prompt)),), (Leaf(0, np.array(response), rival),))


def test_a_key_depends_only_on_images_prompt_and_response():
    same = leaf_keys([one_leaf()])
    others = [
        one_leaf(images=("a", "c")),
        one_leaf(images=("b", "a")),
        one_leaf(images=("ab",)),
        one_leaf(images=("a", "b", "")),
        one_leaf(images=()),
        one_leaf(prompt=(1, 2, 4)),
        one_leaf(prompt=(1, 3, 2)),
        one_leaf(prompt=(1, 2, 3, 4), response=(5,)),
        one_leaf(prompt=(1, 2), response=(3, 4, 5)),
        one_leaf(prompt=(1, 2, 3 + (1 << 32))),
        one_leaf(response=(4,)),
        one_leaf(response=(4, 5, 0)),
        one_leaf(response=(5, 4)),
        one_leaf(rival=True),
    ]
    keys = leaf_keys([one_leaf(), *others])
    assert keys.dtype == "V16" and len(set(keys.tolist())) == len(others) + 1
    # The dtype of ids, the position of a leaf in its forest and other leaves do not matter.
    narrow = Forest(
        (Root(("x",), np.array([9])), Root(["a", "b"], np.array([1, 2, 3], np.int32))),
        (Leaf(0, np.array([7])), Leaf(1, np.array([4, 5], np.uint16))),
    )
    assert leaf_keys([narrow])[1] == same[0]
    assert (
        keys[0].tobytes().hex() == "f7959f5ed97d5c15f492ff821208ad10"
    )  # caches on disk depend on this value


@pytest.mark.parametrize(
    ("forest", "message"),
    [
        (one_leaf(images=(b"raw",)), "images of a root must be digests .*got b'raw'"),
        (one_leaf(prompt=(1.5, 2.0)), "token ids, got float64"),
        (one_leaf(response=((1, 2), (3, 4))), r"of shape \(2, 2\)"),
    ],
)
def test_an_invalid_leaf_is_an_error(forest, message):
    with pytest.raises(ValueError, match=message):
        leaf_keys([forest])


def test_an_empty_data_set(tmp_path):
    with ReferenceCache(tmp_path, PRINT) as cache:
        assert fill(cache, []).filled.leaves == 0
        assert cache.missing([]).shape == cache.lookup([]).logps.shape == (0,)
        assert leaf_keys([]).dtype == "V16"


def test_keys_of_a_large_data_set_are_distinct_and_quick():
    forests = make_forests(5_000)
    began = time.process_time()
    leaves = collect_leaves(forests)
    assert time.process_time() - began < 2  # it takes 0.15 s, 10 us per leaf
    assert len(np.unique(leaves.keys.view("u8").reshape(-1, 2), axis=0)) == 15_000
    assert leaves.lengths.tolist() == [len(x.ids) for f in forests for x in f.leaves]


# --- the plan ---


def test_every_distinct_leaf_is_planned_once_with_its_root():
    forests = make_forests(50)
    doubled = [*forests, *forests[:20]]
    leaves = collect_leaves(doubled)
    batches = plan(leaves, np.ones(len(leaves.keys), bool), 64, 4)
    planned = np.concatenate([batch.leaves for batch in batches])
    assert sorted(planned.tolist()) == list(range(150))
    tokens = sum(batch.tokens for batch in batches)
    roots = sum(len(root.ids) for f in forests for root in f.roots)
    assert tokens == roots + sum(len(leaf.ids) for f in forests for leaf in f.leaves)
    # Longest rows come first. Packing one batch separately gives the same rows.
    sizes = [batch.tokens for batch in batches[:-1]]
    assert sizes == sorted(sizes, reverse=True)
    for batch in batches:
        wanted = np.zeros(len(leaves.keys), bool)
        wanted[batch.leaves] = True
        (single,) = plan(leaves, wanted, 64, 4)
        assert single.leaves.tolist() == batch.leaves.tolist() and single.tokens == batch.tokens


def test_an_interrupted_pass_resumes_its_batches_and_scattered_gaps_are_packed():
    leaves = collect_leaves(make_forests(200))
    everything = plan(leaves, np.ones(600, bool), 64, 4)
    known = np.zeros(600, bool)
    for batch in everything[:13]:
        known[batch.leaves] = True
    known[everything[13].leaves[:3]] = True  # partly written
    rest = batches_to_compute(leaves, known, 64, 4)
    assert [b.leaves.tolist() for b in rest] == [b.leaves.tolist() for b in everything[13:]]
    scattered = np.ones(600, bool)
    scattered[::20] = False
    packed = batches_to_compute(leaves, scattered, 64, 4)
    assert sorted(np.concatenate([b.leaves for b in packed])) == list(range(0, 600, 20))
    assert batches_to_compute(leaves, np.ones(600, bool), 64, 4) == []


# --- fill and lookup ---


def test_each_leaf_is_computed_once(tmp_path):
    forests = make_forests(60)
    with ReferenceCache.open(tmp_path, PRINT) as cache:
        assert cache.missing(forests).all() and len(cache) == 0
        first = fill(cache, forests)
        assert first.filled.leaves == 180 and first.filled.recomputed == 0
        assert sum(len(pairs) for pairs in first.batches) == 180
        assert not cache.missing(forests).any()
        logps, counts = cache.lookup(forests)
    assert logps == pytest.approx(
        exact(forests), rel=2e-5
    )  # tolerance for the scorer's dependence on other leaves
    assert logps.dtype == np.float64 and counts.dtype == np.int32
    assert counts.tolist() == [len(leaf.ids) for f in forests for leaf in f.leaves]
    with ReferenceCache.open(
        tmp_path, PRINT
    ) as cache:  # another run with more records in another order
        shuffled = [forests[i] for i in np.random.default_rng(0).permutation(60)]
        assert fill(cache, shuffled).batches == []
        leaves = collect_leaves(forests)
        assert collect_leaves(leaves) is leaves and not cache.missing(leaves).any()
        assert cache.lookup(leaves).logps.tolist() == logps.tolist()
        more = [*make_forests(3, seed=9), *shuffled]
        again = fill(cache, more)
        assert again.filled.leaves == 9 and sum(map(len, again.batches)) == 9
        assert cache.lookup(forests).logps.tolist() == logps.tolist()


def test_another_fingerprint_is_another_table(tmp_path):
    forests = make_forests(4)
    with ReferenceCache(tmp_path, PRINT) as cache:
        fill(cache, forests)
    for name in PRINT:
        with ReferenceCache(tmp_path, PRINT | {name: "other"}) as cache:
            assert cache.missing(forests).all()
            folder, differences = cache.nearest()
            assert folder.name == refcache.fingerprint_digest(PRINT)
            assert len(differences) == 1 and differences[0].startswith(name)
    with ReferenceCache(tmp_path, PRINT | {"more": "x"}) as cache:
        assert cache.missing(forests).all()
    found = refcache.tables(tmp_path)
    assert [parts for parts in found.values() if parts] == [
        PRINT
    ]  # empty tables have no description
    with ReferenceCache(tmp_path, dict(reversed(PRINT.items()))) as cache:
        assert not cache.missing(forests).any()


def test_missing_leaves_are_named(tmp_path):
    forests = make_forests(5)
    with ReferenceCache(tmp_path, PRINT) as cache:
        fill(cache, forests[:2])
        with pytest.raises(MissingReferences, match=r"9 of 15 leaves .* Call fill\(") as caught:
            cache.lookup(forests)
        assert caught.value.leaves.tolist() == list(range(6, 15))
        assert cache.missing(forests).nonzero()[0].tolist() == list(range(6, 15))


def test_a_reader_sees_what_another_process_writes(tmp_path):
    forests = make_forests(6)
    with ReferenceCache(tmp_path, PRINT) as reader, ReferenceCache(tmp_path, PRINT) as writer:
        assert reader.missing(forests).all()
        fill(writer, forests)
        assert reader.lookup(forests).logps.tolist() == writer.lookup(forests).logps.tolist()
    with ReferenceCache(tmp_path, PRINT, read_only=True) as reader:
        assert not reader.missing(forests).any()
        with pytest.raises(ValueError, match="keep needs a cache .* without read_only=True"):
            reader.insert(forests, np.zeros(18))


def test_values_computed_elsewhere_can_be_kept(tmp_path):
    forests = make_forests(3)
    values = -np.arange(9, dtype=np.float32)
    with ReferenceCache(tmp_path, PRINT) as cache:
        assert cache.insert(forests, values) == 9
        assert cache.insert(forests, values - 1) == 0  # known values do not change
        assert cache.lookup(forests).logps.tolist() == values.tolist()
        with pytest.raises(ValueError, match=r"logps must have shape \(9,\).*got \(8,\)"):
            cache.insert(forests, values[:8])
        with pytest.raises(ValueError, match="nan"):
            cache.insert(make_forests(3, seed=1), np.full(9, np.nan))
        assert len(cache) == 9


@pytest.mark.parametrize("value", [{}, "abc", {"weights": 3}, {1: "x"}, None])
def test_a_fingerprint_has_names(tmp_path, value):
    with pytest.raises(ValueError, match="fingerprint"):
        ReferenceCache(tmp_path, value)


class _Wrong(Scorer):
    def __init__(self, forests, change):
        super().__init__(forests)
        self.change = change

    def __call__(self, pairs):
        return self.change(super().__call__(pairs))


def poison(values):
    values[3] = float("nan")
    return values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v[1:], r"per-token log-probs of shape \(\d+,\)"),
        (lambda v: v[None], r"got \(1, \d+\)"),
        (poison, r"leaf \d of forest \d+ is nan"),
        (lambda v: -v, "a log-prob cannot be positive. Pass log-probs, not losses"),
        (lambda v: v.int(), "a float tensor, got torch.int32"),
        (lambda v: v.numpy(), "a float tensor, got ndarray"),
    ],
)
def test_a_model_with_invalid_output_is_an_error(tmp_path, change, message):
    forests = make_forests(30)
    with ReferenceCache(tmp_path, PRINT) as cache:
        wrong = _Wrong(forests, change)
        with pytest.raises(ValueError, match=message):
            cache.fill(wrong, forests, build=wrong.build, row_tokens=64)
        assert len(cache) == 0
        for name, value in (("row_tokens", 0), ("batch_rows", -1), ("batch_rows", 2.0)):
            with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1"):
                fill(cache, forests, **{name: value})
        with pytest.raises(ValueError, match="Call fill"):
            cache.lookup(forests)
        assert fill(cache, forests).filled.leaves == 90


def test_gradients_are_off_and_bf16_values_are_taken(tmp_path):
    """A module runs under inference_mode, and a function under no_grad.

    A function may call a sharded module.
    """
    forests, modes = make_forests(4), []
    scorer = Scorer(forests)

    def function(pairs):
        modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return scorer(pairs).bfloat16()

    class Module(torch.nn.Module):
        def forward(self, pairs):
            return function(pairs)

    for folder, model, inference in (("a", function, False), ("b", Module().eval(), True)):
        modes.clear()
        with ReferenceCache(tmp_path / folder, PRINT) as cache:
            cache.fill(model, forests, build=scorer.build, row_tokens=64)
            assert cache.lookup(forests).logps == pytest.approx(exact(forests), rel=2e-2)
        assert set(modes) == {(False, inference)}
    with (
        ReferenceCache(tmp_path / "c", PRINT) as cache,
        pytest.raises(ValueError, match="in training mode, with dropout. Call model.eval"),
    ):
        cache.fill(Module(), forests, build=scorer.build, row_tokens=64)


def test_rows_are_as_long_as_the_longest_leaf_needs(tmp_path):
    forests = make_forests(10)
    with ReferenceCache(tmp_path, PRINT) as cache:
        assert fill(cache, forests, row_tokens=1).filled.leaves == 30
