"""Every invalid argument is a ValueError with the argument, its value, and a remedy."""

import pytest
import torch

import realign_kernels as rk
from realign_kernels import objectives

NAN = float("nan")


def head(**changes):
    args = {
        "hidden": torch.randn(6, 8),
        "weight": torch.randn(11, 8),
        "labels": torch.arange(6),
    }
    return rk.linear_logprobs(**{**args, **changes})


def rdpo(**changes):
    args = {
        "hidden": torch.randn(3, 2, 4, 8),
        "weight": torch.randn(11, 8),
        "labels": torch.randint(11, (3, 2, 4)),
        "reference_logps": torch.zeros(3, 2),
    }
    return rk.rdpo_loss(**{**args, **changes})


def packed(**changes):
    args = {
        "hidden": torch.randn(24, 8),
        "labels": torch.randint(11, (24,)),
        "sequence_ids": torch.arange(6).repeat_interleave(4),
    }
    return rdpo(**{**args, **changes})


def preference(**changes):
    args = {
        "leaf_logps": torch.zeros(2, 3),
        "reference_logps": torch.zeros(2, 3),
        "terms": objectives.dpo(),
    }
    return rk.preference_loss(**{**args, **changes})


def at(index, value, start):
    changed = start.clone()
    changed[index] = value
    return changed


def terms(**changes):
    args = {
        "hidden": torch.randn(2, 2, 4, 8),
        "weight": torch.randn(11, 8),
        "labels": torch.randint(11, (2, 2, 4)),
        "reference_logps": torch.zeros(2, 2),
        "terms": objectives.dpo(),
    }
    return rk.linear_preference_loss(**{**args, **changes})


ids = torch.arange(6).repeat_interleave(4)
MISTAKES = {
    "objective by name": (terms, {"terms": "rdpo"}, r"Pass an Objective, objectives.get\('rdpo'\)"),
    "objective uncalled": (terms, {"terms": objectives.rdpo}, r"objectives.get\('rdpo'\)"),
    "one term": (terms, {"terms": objectives.dpo().terms[0]}, "is the single term 'text'. Pass a"),
    "chunk_rows float": (rdpo, {"chunk_rows": 2.5}, "chunk_rows must be an integer, got 2.5"),
    "chunk_rows bool": (rdpo, {"chunk_rows": True}, "chunk_rows must be an integer, got True"),
    "ignore_index": (rdpo, {"ignore_index": None}, "ignore_index must be an integer, got None"),
    "softcap string": (rdpo, {"softcap": "30"}, "softcap must be a number, got '30'"),
    "module": (rdpo, {"weight": torch.nn.Linear(8, 11)}, "weight must be a dense .* got Linear"),
    "sparse": (rdpo, {"weight": torch.eye(11, 8).to_sparse()}, "weight must be .* got torch.spar"),
    "complex": (head, {"hidden": torch.zeros(6, 8).cfloat()}, "hidden must be float32"),
    "weight on meta": (head, {"weight": torch.zeros(11, 8, device="meta")}, "weight is on meta"),
    "hidden on meta": (head, {"hidden": torch.zeros(6, 8, device="meta")}, "weight is on cpu. Mov"),
    "bias on meta": (head, {"bias": torch.zeros(11, device="meta")}, "bias is on meta"),
    "no tokens": (head, {"weight": torch.zeros(0, 8)}, r"6 labels are outside \[0, 0\)"),
    "scalar": (head, {"hidden": torch.tensor(1.0)}, r"hidden \(\) must be \(..., H"),
    "weight transposed": (head, {"weight": torch.randn(8, 11)}, r"hidden \(6, 8\) .* \(8, 11\)"),
    "bias": (head, {"bias": torch.randn(8)}, r"bias \(8,\) must be \(11,\)"),
    "weight dtype": (head, {"weight": torch.randn(11, 8).bfloat16()}, r"weight is torch.bfloat16"),
    "bias dtype": (head, {"bias": torch.randn(11).double()}, r"bias is torch.float64 .* Cast"),
    "hidden dtype": (head, {"hidden": torch.ones(6, 8).long()}, r"hidden must be float32.*int64"),
    "labels shape": (head, {"labels": torch.arange(5)}, r"labels \(5,\) .* \(6, 8\), so shape \(6"),
    "labels column": (head, {"labels": torch.arange(6)[:, None]}, r"labels \(6, 1\) must have one"),
    "labels float": (head, {"labels": torch.zeros(6)}, r"labels must be integers, .*float32"),
    "labels bool": (head, {"labels": torch.zeros(6).bool()}, r"labels must be integers, .*bool"),
    "label V": (
        head,
        {"labels": torch.tensor([1, -100, 11, 3, 12, 0])},
        r"2 labels are outside \[0, 11\)\. The first is 11, in flat row 2\. "
        r"Labels must be token ids, or ignore_index \(-100\)\.",
    ),
    "device": (head, {"labels": torch.arange(6, device="meta")}, r"labels is on meta. .* to cpu"),
    "temperature": (head, {"temperature": 0.0}, r"temperature must be finite and > 0, got 0.0"),
    "softcap": (head, {"softcap": -1.0}, r"softcap must be finite and > 0, got -1.0"),
    "chunk_rows": (head, {"chunk_rows": 0}, r"chunk_rows must be at least 1, got 0"),
    "two sequences": (
        rdpo,
        {"hidden": torch.randn(2, 2, 4, 8), "labels": torch.randint(11, (2, 2, 4))},
        r"hidden \(2, 2, 4, 8\) must be .* \(3, 2\), .* 'rdpo' has 3 leaves \(chosen under",
    ),
    "one example for two": (rdpo, {"reference_logps": torch.zeros(3, 1)}, r"\(L, B\) = \(3, 1\)"),
    "rows without ids": (rdpo, {"hidden": torch.randn(24, 8)}, r"Packed rows .* need sequence_ids"),
    "labels of two": (rdpo, {"labels": torch.zeros(2, 2, 4).long()}, r"labels \(2, 2, 4\) must"),
    "reference shape": (rdpo, {"reference_logps": torch.zeros(3)}, r"reference_logps \(3,\) must"),
    "reference dtype": (
        rdpo,
        {"reference_logps": torch.zeros(3, 2).bfloat16()},
        r"reference_logps must be float32 or float64, got torch.bfloat16",
    ),
    "reference grad": (
        rdpo,
        {"reference_logps": torch.zeros(3, 2, requires_grad=True)},
        r"reference_logps requires grad.*detach",
    ),
    "reference nan": (
        rdpo,
        {"reference_logps": at((2, 1), NAN, torch.zeros(3, 2))},
        r"reference_logps holds NaN or inf for 1 sequences, first \(leaf 2, example 1\)",
    ),
    "beta": (rdpo, {"beta": 0.0}, r"beta must be finite and > 0, got 0.0"),
    "visual_weight": (rdpo, {"visual_weight": -0.5}, r"term 'visual' must be .* got -0.5"),
    "reduction": (rdpo, {"reduction": "avg"}, r"reduction must be one of .* got 'avg'"),
    "no token": (
        rdpo,
        {"labels": at((1, 0), -100, torch.zeros(3, 2, 4).long())},
        r"sequence \(leaf 1, example 0\) has no token to score",
    ),
    "no examples": (
        rdpo,
        {
            "hidden": torch.randn(3, 0, 4, 8),
            "labels": torch.zeros(3, 0, 4).long(),
            "reference_logps": torch.zeros(3, 0),
        },
        r'mean is undefined. Use reduction="sum"',
    ),
    "ids with padded": (rdpo, {"sequence_ids": ids}, r"and sequence_ids \(24,\)"),
    "ids shape": (packed, {"sequence_ids": ids[:23]}, r"and sequence_ids \(23,\)"),
    "ids float": (packed, {"sequence_ids": ids.float()}, r"sequence_ids must be integers"),
    "id 6": (packed, {"sequence_ids": at(5, 6, ids)}, r"sequence_ids\[5\] is 6, outside \[0, 6\)"),
    "id -1": (packed, {"sequence_ids": at(0, -1, ids)}, r"sequence_ids\[0\] is -1, outside"),
    "ids device": (packed, {"sequence_ids": ids.to("meta")}, r"sequence_ids is on meta"),
    "leaf shape": (preference, {"leaf_logps": torch.zeros(2, 1)}, r"leaf_logps \(2, 1\) and"),
    "leaf dtype": (preference, {"leaf_logps": torch.zeros(2, 3).half()}, r"leaf_logps must be flo"),
    "leaf nan": (
        preference,
        {"leaf_logps": at((1, 2), NAN, torch.zeros(2, 3))},
        r"leaf_logps holds NaN or inf for 1 sequences, first \(leaf 1, example 2\)",
    ),
    "count 0": (
        preference,
        {"terms": objectives.simpo(), "token_counts": at((1, 2), 0, torch.ones(2, 3).long())},
        "token_counts must be at least 1",
    ),
    "three for two": (preference, {"reference_logps": torch.zeros(3, 3)}, r"must be \(2, B\)"),
}


@pytest.mark.parametrize(("call", "changes", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(call, changes, message):
    call()
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_overflow_of_only_the_label_is_an_error():
    hidden = torch.full((2, 8), 100.0, dtype=torch.float16)
    weight = torch.zeros(11, 8, dtype=torch.float16)
    weight[3] = 100.0
    with pytest.raises(rk.NonFiniteError, match=r"logits overflow torch.float16") as caught:
        head(hidden=hidden, weight=weight, labels=torch.tensor([3, 0]))
    assert caught.value.rows == [0, 1]


def test_non_finite_rows_of_a_batch_are_flat_rows():
    hidden = torch.randn(3, 2, 4, 8)
    hidden[2, 1, 0] = NAN
    labels = torch.randint(11, (3, 2, 4))
    with pytest.raises(rk.NonFiniteError) as caught:
        rdpo(hidden=hidden, labels=labels)
    assert caught.value.rows == [(2 * 2 + 1) * 4]
