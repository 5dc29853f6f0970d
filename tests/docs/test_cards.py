"""The table of docs/card.md: sizes of public models, and rows against the estimate.

python -m benchmarks.cards writes the table again.
"""

import pytest

from benchmarks import cards
from realign.training import dry_run


@pytest.fixture(scope="module")
def rows():
    text = cards.PAGE.read_text()
    return [line for line in text.split("<!-- cards -->")[1].splitlines() if line.count("|") == 8]


@pytest.mark.parametrize("name", cards.MODELS)
def test_the_sizes_give_the_published_number_of_parameters(name):
    """Of the safetensors files on the Hub."""
    count = sum(p.numel() for p in cards.built(name).parameters())
    assert count == cards.MODELS[name]["parameters"]


def test_the_table_has_every_model_and_method(rows):
    found = [line.split(" | ")[:2] for line in rows[2:]]
    assert [(name.split(",")[0].removeprefix("| "), method) for name, method in found] == [
        (name, method) for name in cards.MODELS for method in cards.METHODS
    ]
    assert cards.USABLE == dry_run._USABLE


@pytest.mark.parametrize("method", ["QLoRA"])
def test_a_row_is_the_estimate(rows, method):
    assert cards.row("SmolVLM2-2.2B", method) in rows
