"""docs/data.md: its code runs unchanged, and its table of columns and its errors are right."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from realign.data import records
from realign.data.records import RecordError, read_pairs
from realign.digits.processor import build_processor
from realign.modeling.encode import encode_records
from realign.modeling.layouts import Layout
from realign_kernels import objectives

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
BLOCKS = dict(re.findall(r"```python ([\w-]+)\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A folder with the images of the page, in which its code was run."""
    monkeypatch.chdir(tmp_path)
    for name in ("kitchen", "cutting-board"):
        Image.new("RGB", (32, 32), "white").save(f"{name}.png")
    for code in BLOCKS.values():
        exec(compile(code, "data.md", "exec"), {})
    return tmp_path


def _encode(record):
    processor = build_processor()
    layout = Layout(processor.tokenizer.convert_tokens_to_ids("<image>"))
    limits = {"max_response_tokens": 64, "max_tokens": 512}
    options = {"layout": layout, "progress": False} | limits
    return encode_records([record], processor, objectives.rdpo(), **options)[0]


def test_the_code_writes_records_that_can_be_trained_on(made):
    assert PAGE.count("```python") == len(BLOCKS) == 2
    (by_hand,), (by_function,) = read_pairs("pairs.parquet"), read_pairs("more", ".")
    assert by_hand.prompt == by_function.prompt
    assert (by_hand.chosen, by_hand.rejected) == (by_function.chosen, by_function.rejected)
    assert by_hand.images[0].open("").size == (32, 32)  # found beside the file
    assert by_function.retrieved_chosen == "An empty board."
    assert by_function.images[0].open("").size == (32, 32)
    (example,) = _encode(by_hand)
    assert example.name == "kitchen-1" and len(example.leaves) == 3


def test_the_table_of_columns_is_complete():
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert rows == [*records._COLUMNS, *records._OPTIONAL]


def test_errors_name_the_record(made):
    (record,) = read_pairs("pairs.parquet")
    for problem, change in {
        "1 retrieved images for 2 image": {"images": record.images * 2},
        "Raise --max-response-tokens": {"rejected": "one " * 80},
        "the model takes 512": {"prompt": ({"role": "user", "content": "name " * 600},)},
    }.items():
        with pytest.raises(RecordError, match=f"'kitchen-1'.*{problem}"):
            _encode(replace(record, **change))
