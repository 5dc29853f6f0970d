"""`pack_forest`: cases computed by hand, an independent packer, and C++ against Python."""

import numpy as np
import pytest

from realign_kernels._extension import extension
from realign_kernels.refcache import packing as packer
from realign_kernels.refcache.packing import ForestPacking, pack_forest

FIELDS = ("tree_root", "tree_row", "tree_start", "leaf_tree", "leaf_start", "row_lengths")
needs_extension = pytest.mark.skipif(extension() is None, reason="the C++ extension is not built")


@pytest.fixture(params=[pytest.param("compiled", marks=needs_extension), "python"])
def implementation(request, monkeypatch):
    """Runs a test with each implementation."""
    if request.param == "python":
        monkeypatch.setattr(packer, "extension", lambda: None)


def lists(packing: ForestPacking) -> dict[str, list[int]]:
    return {name: getattr(packing, name).tolist() for name in FIELDS}


def scan_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing that checks every bin for every item."""
    bins: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rooms = [capacity - sum(lengths[i] for i in held) for held in bins]
        fitting = [(room, b) for b, room in enumerate(rooms) if room >= lengths[item]]
        if fitting:
            bins[min(fitting)[1]].append(item)
        else:
            bins.append([item])
    return bins


def slow_pack(roots, leaves, parents, budget) -> dict[str, list[int]]:
    """The documented result, by a simple algorithm."""
    trees = []  # (root, leaves)
    for root, length in enumerate(roots):
        own = [leaf for leaf, parent in enumerate(parents) if parent == root]
        if length + sum(leaves[leaf] for leaf in own) <= budget:
            trees.append((root, own))
        else:
            split = scan_best_fit([leaves[leaf] for leaf in own], budget - length)
            trees += [(root, sorted(own[i] for i in part)) for part in split]
    lengths = [roots[root] + sum(leaves[leaf] for leaf in own) for root, own in trees]
    result = {name: [] for name in FIELDS}
    result["leaf_tree"] = [None] * len(leaves)
    result["leaf_start"] = [None] * len(leaves)
    for row, held in enumerate(scan_best_fit(lengths, budget)):
        column = 0
        for root, own in (trees[i] for i in held):
            tree = len(result["tree_root"])
            result["tree_root"].append(root)
            result["tree_row"].append(row)
            result["tree_start"].append(column)
            column += roots[root]
            for leaf in own:
                result["leaf_tree"][leaf], result["leaf_start"][leaf] = tree, column
                column += leaves[leaf]
        result["row_lengths"].append(column)
    return result


def random_forest(rng: np.random.Generator, num_roots: int, budget: int, extra_leaves: int):
    roots = rng.integers(1, budget // 2 + 1, num_roots)
    # Every root has a leaf. Some roots have more leaves than fit into a row.
    parents = rng.permutation(
        np.concatenate([np.arange(num_roots), rng.integers(0, num_roots, extra_leaves)])
    )
    leaves = 1 + (rng.random(len(parents)) * (budget - roots[parents])).astype(np.int64)
    return roots, np.minimum(leaves, budget - roots[parents]), parents, budget


def test_longest_first_into_the_tightest_row(implementation):
    # Trees have 5, 7, 6, 3, 4 tokens, and the budget is 10. 7 opens row 0 (room 3), 6 opens row 1
    # (room 4), 5 opens row 2 (room 5). 4 goes to row 1 (room 4 < 5), and 3 to row 0 (room 3 < 5).
    packing = pack_forest([4, 6, 5, 2, 3], [1] * 5, range(5), 10)
    assert lists(packing) == {
        "tree_root": [1, 3, 2, 4, 0],
        "tree_row": [0, 0, 1, 1, 2],
        "tree_start": [0, 7, 0, 6, 0],
        "leaf_tree": [4, 0, 2, 1, 3],
        "leaf_start": [4, 6, 5, 9, 9],
        "row_lengths": [10, 10, 5],
    }


def test_tree_over_budget_repeats_its_root(implementation):
    # 4 + (3 + 2 + 5 + 1) = 15 > 10. Besides the root a row has 6 tokens: for 5 and 1, or 3 and 2.
    packing = pack_forest([4], [3, 2, 5, 1], [0] * 4, 10)
    assert lists(packing) == {
        "tree_root": [0, 0],
        "tree_row": [0, 1],
        "tree_start": [0, 0],
        "leaf_tree": [1, 1, 0, 0],
        "leaf_start": [4, 7, 4, 9],
        "row_lengths": [10, 9],
    }


def test_empty_forest(implementation):
    packing = pack_forest([], [], [], 8)
    assert (packing.num_rows, packing.num_trees, packing.tokens) == (0, 0, 0)
    assert all(getattr(packing, name).dtype == np.int64 for name in FIELDS)


def test_lengths_near_the_end_of_int64(implementation):
    # The tree and the total exceed int64, but no row does.
    big = 2**62
    packing = pack_forest([big - 1], [big, big, big], [0, 0, 0], 2**63 - 1)
    assert packing.row_lengths.tolist() == [2 * big - 1] * 3
    assert packing.tokens == 3 * (2 * big - 1)


def test_random_forests_match_the_slow_packer(implementation):
    for seed in range(30):
        rng = np.random.default_rng(seed)
        budget = int(rng.integers(4, 60))
        forest = random_forest(rng, int(rng.integers(1, 25)), budget, int(rng.integers(0, 40)))
        roots, leaves, parents, _ = forest
        expected = slow_pack(roots.tolist(), leaves.tolist(), parents.tolist(), budget)
        assert lists(pack_forest(*forest)) == expected, seed


@needs_extension
@pytest.mark.parametrize("budget", [50, 700, 5000])
def test_both_implementations_return_the_same_bytes(budget, monkeypatch):
    forest = random_forest(np.random.default_rng(budget), 2000, budget, 6000)
    compiled = pack_forest(*forest)
    monkeypatch.setattr(packer, "extension", lambda: None)
    python = pack_forest(*forest)
    for name in FIELDS:
        ours, theirs = getattr(compiled, name), getattr(python, name)
        assert ours.dtype == theirs.dtype == np.int64, name
        assert ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes(), name


def test_efficiency_on_llava_like_lengths():
    # Two responses under 576 image tokens and a prompt give trees of about 880 tokens, never split.
    # A row of 4096 holds four or five trees, and no packer exceeds 97 % (linear-programming bound).
    # Longer rows waste less.
    rng = np.random.default_rng(0)
    roots, leaves = rng.integers(600, 701, 20_000), rng.integers(30, 201, 40_000)
    parents = np.repeat(np.arange(20_000), 2)
    for budget, least in ((4096, 0.92), (8192, 0.96), (16384, 0.98)):
        packing = pack_forest(roots, leaves, parents, budget)
        assert packing.tokens > least * packing.num_rows * budget


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        lambda values: np.array(values, dtype=np.int32),
        lambda values: np.array(values, dtype=np.uint64),
        lambda values: np.array(values, dtype=">i8"),
        lambda values: np.repeat(np.array(values), 2)[::2],  # not contiguous
    ],
    ids=["list", "tuple", "int32", "uint64", "big-endian", "strided"],
)
def test_any_integers_are_accepted(implementation, convert):
    arguments = [5, 4], [2, 3, 1], [0, 1, 0]
    expected = pack_forest(*arguments, 16)
    assert lists(pack_forest(*map(convert, arguments), np.int32(16))) == lists(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ([650, 600], [30, 4000], [0, 1], 4096),
            r"root 1 \(600 tokens\) with leaf 1 \(4000 tokens\) "
            r"needs 4600 tokens.*Raise budget to 4600",
        ),
        (([2**62], [2**62], [0], 10), f"Raise budget to {2**63}"),
        (([5, 5], [1], [0], 16), "root 1 has no leaf"),
        (([5, 0], [1, 1], [0, 1], 16), r"root_lengths\[1\] is 0"),
        (([5], [1, -3], [0, 0], 16), r"leaf_lengths\[1\] is -3"),
        (([5], [1, 1], [0, 1], 16), r"leaf_roots\[1\] is 1, but there are 1 roots"),
        (([5], [1, 1], [0, -1], 16), r"leaf_roots\[1\] is -1"),
        (([], [1], [0], 16), "there are 0 roots"),
        (([5], [1, 1], [0], 16), "same size, got 2 and 1"),
        (([5.0], [1], [0], 16), "root_lengths must hold 64-bit integers, got float64"),
        (([True], [1], [0], 16), "got bool"),
        (([5], [[1]], [0], 16), r"leaf_lengths must have one dimension, got shape \(1, 1\)"),
        (([5], [[1], [1, 2]], [0], 16), "leaf_lengths must be a flat sequence"),
        (([5], [2**63], [0], 16), f"leaf_lengths holds {2**63}, which exceeds int64"),
        (([5], [2**64], [0], 16), "leaf_lengths must hold 64-bit integers"),
        (([5], [1], [0], 0), r"budget must be in \[1, 2\*\*63\), got 0"),
        (([5], [1], [0], 16.0), "budget must be an integer, got 16.0"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        pack_forest(*arguments)


@needs_extension
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([5.0], [1], [0], 16), "root_lengths must be a contiguous 1-D int64"),
        (([5], [[1]], [0], 16), "leaf_lengths must be a contiguous 1-D int64"),
        (([5], [1, 1], [0], 16), "must have the same size"),
        (([5], [1], [1], 16), "leaf_roots must be in"),
        (([5], [1], [-1], 16), "leaf_roots must be in"),
        (([0], [1], [0], 16), "root_lengths must be in"),
        (([16], [1], [0], 16), "root_lengths must be in"),
        (([5], [0], [0], 16), "leaf_lengths must be in"),
        (([5], [12], [0], 16), "leaf_lengths must be in"),
    ],
)
def test_the_extension_guards_its_memory(arguments, message):
    *arrays, budget = arguments
    with pytest.raises(ValueError, match=message):
        extension().pack_forest(*map(np.array, arrays), budget)
