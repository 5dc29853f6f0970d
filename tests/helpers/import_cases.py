"""Records of several formats, and how they are read."""

import json

from realign.data.records import Record
from realign.pairs.io.importers import read_any
from realign.pairs.io.rows import InvalidRecord as Bad


def user(text):
    return {"role": "user", "content": text}


def text(content):
    """A typed part."""
    return {"type": "text", "text": content}


def assistant(text):
    return {"role": "assistant", "content": text}


def write_json(folder, content, name="data.json"):
    (folder / name).write_text(json.dumps(content))
    return str(folder / name)


def read_all(data, **options):
    """(records by name, bad records as {name: reason})."""
    found = list(read_any(data, **options))
    bad = [entry for entry in found if isinstance(entry, Bad)]
    assert all(entry.stage == "read" for entry in bad)
    records = [entry for entry in found if isinstance(entry, Record)]
    assert len({r.name for r in records} | {b.record for b in bad}) == len(found)
    return {r.name: r for r in records}, {b.record: b.reason for b in bad}


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
