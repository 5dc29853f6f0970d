"""Held-out splits: no image on both sides, also through chains of records."""

import io
import random
import time

import numpy as np
import pytest
from PIL import Image

from realign.data.images import StoredImage
from realign.data.record_table import table_of
from realign.data.records import Record
from realign.data.split import held_out, shared_records


def prompt(text):
    return ({"role": "user", "content": text},)


def png(number):
    """An image, as bytes that differ from those of other numbers."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(file, "PNG")
    return file.getvalue()


def stored(number):
    return StoredImage(png(number))


def records_of(links):
    """Records with these images and retrieved images, under one prompt."""
    return [
        Record(f"r{i}", prompt("What?"), "a", "b", tuple(map(stored, one)), tuple(map(stored, two)))
        for i, (one, two) in enumerate(links)
    ]


def bytes_of(records):
    return {image.data for r in records for image in (*r.images, *r.retrieved_images)}


def test_no_image_is_on_both_sides_through_chains():
    rng = random.Random(0)
    # Chains of up to four records: each retrieved image is the next record's own or second image.
    links, number = [], 0
    while len(links) < 120:
        for _ in range(rng.randint(1, 4)):
            links.append(((number, number + 1000), (number + 1, number + 3000)))
            number += 1
        number += 1
    rng.shuffle(links)
    records = records_of(links)
    table, seen = table_of(records), set()
    for seed in range(20):
        held = held_out(table, range(len(records)), 0.25, seed)
        sides = [[r for r, h in zip(records, held, strict=True) if h == side] for side in (0, 1)]
        assert not bytes_of(sides[0]) & bytes_of(sides[1])
        assert abs(held.mean() - 0.25) <= 2 / len(records)
        assert (held == held_out(table, range(len(records)), 0.25, seed)).all()
        seen.add(held.tobytes())
    assert len(seen) == 20  # the seed decides


def test_equal_bytes_are_one_image_in_a_file_and_in_the_record(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    images = [StoredImage(path=str(tmp_path / "a.png")), stored(1), stored(2), stored(3)]
    records = [Record(f"r{i}", prompt("?"), "a", "b", (one,)) for i, one in enumerate(images)]
    for seed in range(9):
        held = held_out(table_of(records), range(4), 0.5, seed)
        assert held[0] == held[1] and held.sum() == 2


def test_only_chosen_rows_count():
    """Rows that an objective does not train on, such as those without an image, are not split."""
    table = table_of(records_of([((i,), ()) for i in range(9)]))
    held = held_out(table, [1, 4, 8], 0.34, 0)
    assert held.shape == (3,) and held.sum() == 1
    # Row 2 connects rows 0 and 1. Without it they may be on different sides.
    linked = table_of(records_of([((1,), ()), ((2,), ()), ((1,), (2,)), ((3,), ())]))
    sides = {tuple(held_out(linked, [0, 1], 0.5, seed)) for seed in range(9)}
    assert sides == {(True, False), (False, True)}
    whole = [held_out(linked, range(4), 0.25, seed) for seed in range(9)]
    assert all(held.tolist() == [False, False, False, True] for held in whole)


def test_records_without_an_image_are_split_by_prompt():
    asked = [f"Question {i % 5}" for i in range(40)]
    records = [Record(f"r{i}", prompt(text), "a", "b", ()) for i, text in enumerate(asked)]
    records += records_of([((i,), ()) for i in range(20)])  # one prompt, and different images
    table = table_of(records)
    for seed in range(9):
        held = held_out(table, range(60), 0.3, seed)
        texts = {(text, bool(side)) for text, side in zip(asked, held[:40], strict=True)}
        assert len(texts) == 5
        assert held[40:].any() and not held[40:].all()
        assert abs(held.mean() - 0.3) <= 1 / 60


@pytest.mark.parametrize(
    ("links", "share", "message"),
    [
        ([((0,), (i,)) for i in range(9)], 0.2, "0 of 9 .*largest group has 9 records, and"),
        ([((i // 5,), ()) for i in range(10)], 0.1, "0 of 10 .*group has 5 records, .*smallest 5"),
        ([((max(0, i - 97),), ()) for i in range(100)], 0.3, "2 of 100 .*group has 98 records"),
        ([((0,), ())], 0.5, "0 of 1 records"),
        ([((i,), ()) for i in range(3)], 0.05, "1 of 3 .*smallest 1"),
    ],
)
def test_a_split_that_groups_do_not_allow_is_an_error(links, share, message):
    with pytest.raises(ValueError, match=rf"--eval-share is {share}, and {message}"):
        held_out(table_of(records_of(links)), range(len(links)), share, 0)


def test_the_nearest_share_is_taken():
    groups = [((i // 3,), ()) for i in range(30)]  # ten groups of three
    table = table_of(records_of(groups))
    found = [held_out(table, range(30), share, 0).sum() for share in (0.05, 0.1, 0.17, 0.9, 0.999)]
    assert found == [3, 3, 6, 27, 27]


def test_shared_records_are_counted():
    training = table_of(records_of([((1,), (2,)), ((3,), (4,))]))
    links = [((4,), ()), ((5,), (1,)), ((6,), (1,)), ((7,), (8,))]
    assert shared_records(table_of(records_of(links)), range(4), training, range(2)) == (3, 2)
    assert shared_records(table_of(records_of(links)), range(4), training, [0]) == (2, 1)
    texts = table_of([Record("t", prompt("What?"), "a", "b", ())])
    assert shared_records(texts, [0], training, range(2)) == (0, 0)
    assert shared_records(texts, [0], texts, [0]) == (1, 1)


def test_a_large_set_is_split_in_a_second():
    """The work grows with the images, not with the pairs of records."""

    class Table:
        """The digests of 300,000 records in chains of three, without their images."""

        def __len__(self):
            return 300_000

        def counts(self, column):
            return np.ones(len(self), np.int64)

        def image_keys(self, column):
            numbers = np.arange(len(self)) + (column != "images")
            numbers[numbers % 3 == 0] += 1_000_000 * (column != "images")
            return numbers.astype("S16")

        def prompts(self, rows):
            assert not len(rows)
            return []

    began = time.process_time()
    held = held_out(Table(), np.arange(300_000), 0.1, 0)
    assert time.process_time() - began < 8  # 1 s on an idle core
    assert held.sum() == 30_000 and (held.reshape(-1, 3).sum(1) % 3 == 0).all()
