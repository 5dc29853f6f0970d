"""Records in several formats, and functions to read them."""

import json

from realign.data.records import Record
from realign.pairs.io.importers import read_any


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def text(content):
    """A typed part."""
    return {"type": "text", "text": content}


def write_json(folder, content, name="data.json"):
    (folder / name).write_text(json.dumps(content))
    return str(folder / name)


def read_all(data, **options):
    """(records by name, invalid records as {name: reason})."""
    results = list(read_any(str(data), **options))
    records = {r.name: r for r in results if isinstance(r, Record)}
    invalid = {r.record: r.reason for r in results if not isinstance(r, Record)}
    assert len(records.keys() | invalid.keys()) == len(results)
    return records, invalid


REALIGN = {
    "image": "a.jpg",
    "retrieved_image": "b.jpg",
    "chosen": [user("<image>\nWhat is it?"), assistant("A cat.")],
    "rejected": [user("<image>\nWhat is it?"), assistant("A dog.")],
}

LLAVA = {
    "id": "33471",
    "image": "a.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A bus."},
        {"from": "human", "value": "Which colour?"},
        {"from": "gpt", "value": "White and red."},
        {"from": "human", "value": "Where?"},
        {"from": "gpt", "value": "In a street."},
    ],
}

COCO = {
    "images": [{"id": i, "file_name": f"{name}.jpg"} for i, name in [(9, "a"), (3, "b"), (4, "c")]],
    "annotations": [
        {"id": 30, "image_id": 9, "caption": "A later caption"},
        {"id": 12, "image_id": 9, "caption": "A cat on a mat"},
        {"id": 13, "image_id": 3, "caption": "A dog <script>alert(1)</script> in the sun"},
    ],
}
