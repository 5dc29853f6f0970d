"""Files of strangers: no file outside the folder is read, nothing hangs, and memory is bounded."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from stress_images import encode

from realign.data import images, sources
from realign.data.entries import entry_of, json_object
from realign.data.errors import Malformed
from realign.data.images import StoredImage
from realign.data.records import RecordError, read_pairs, write_pairs
from realign.data.tables import weight
from realign.evaluate.answering import Question, prepare, read_answers
from realign.evaluate.files import read_captions, read_instances, read_rows, read_synonyms
from realign.files import open_lock
from realign.hf.records import records_of
from realign.pairs.gallery import write_gallery
from realign.pairs.io import importers
from realign.pairs.io.importers import read_any
from realign.pairs.io.rows import InvalidRecord
from realign.pairs.io.shards import footer, parquet_file, read_array, read_table
from realign.pairs.stages.runner import sole_run

TEXTS = {"prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog."}


def _file(folder, *paths, name="pairs.parquet"):
    rows = [TEXTS | {"id": p, "images": [{"bytes": None, "path": p}]} for p in paths]
    pq.write_table(pa.Table.from_pylist(rows), folder / name)
    return folder / name


@pytest.fixture
def places(tmp_path):
    """A private image, and a downloaded folder with links to it."""
    (tmp_path / "private").mkdir()
    (tmp_path / "download").mkdir()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "private" / "passport.png")
    Image.new("RGB", (40, 40), "blue").save(tmp_path / "download" / "good.png")
    (tmp_path / "download" / "link.png").symlink_to("../private/passport.png")
    (tmp_path / "download" / "linked").symlink_to(tmp_path / "private")
    return tmp_path


OUTSIDE = ("../private/passport.png", "link.png", "linked/passport.png", "ABSOLUTE")


@pytest.mark.parametrize("path", OUTSIDE)
def test_an_image_outside_the_folder_is_refused(places, path):
    path = path.replace("ABSOLUTE", str(places / "private" / "passport.png"))
    file = _file(places / "download", "good.png", path)
    with pytest.raises(RecordError, match="outside the folder: .*--image-folder"):
        read_pairs(file)
    page = places / "gallery.html"
    write_gallery(file, page)
    data = page.read_text()
    assert data.count("data:image/png;base64") == 1 and data.count('"outside the folder"') == 1
    (found,) = [e for e in read_any(str(file)) if isinstance(e, InvalidRecord)]
    assert found.reason == "outside the folder"


def test_a_snapshot_in_the_cache_of_the_hub_has_the_blobs_of_its_repository(places):
    repository = places / "datasets--someone--pairs"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    shutil.copy(places / "private" / "passport.png", repository / "blobs" / "4567")
    (snapshot / "good.png").symlink_to("../../blobs/4567")
    (record,) = read_pairs(_file(snapshot, "good.png"))
    assert record.images[0].open("").size == (40, 40)
    (snapshot / "bad.png").symlink_to(places / "private" / "passport.png")
    with pytest.raises(RecordError, match="outside the folder"):
        read_pairs(_file(snapshot, "bad.png"))


def test_relative_paths_start_at_the_named_folder_or_at_the_own_one(places):
    """Images in linked folders, as in the usual layout of LLaVA's data."""
    (places / "download" / "coco").symlink_to(places / "private")
    file = _file(places / "download", "coco/passport.png")
    with pytest.raises(RecordError, match="leads to .*private/passport.png, which is not in"):
        read_pairs(file)
    for path in ("coco/passport.png", "../private/passport.png", "private/passport.png"):
        (record,) = read_pairs(_file(places / "download", path), places)
        assert record.images[0].open("").getpixel((0, 0)) == (255, 0, 0)


def test_the_user_may_name_another_folder(places):
    file = _file(places / "download", str(places / "private" / "passport.png"))
    (record,) = read_pairs(file, places)
    assert record.images[0].open("").getpixel((0, 0)) == (255, 0, 0)
    write_gallery(file, places / "gallery.html", image_folder=places / "private")
    assert "data:image" in (places / "gallery.html").read_text()
    with pytest.raises(ValueError, match="--image-folder .*none is not a folder"):
        read_pairs(file, places / "none")
    rows = [TEXTS | {"images": [str(places / "private" / "passport.png")]}]
    assert records_of(rows)[0].images[0].open("").size == (40, 40)  # rows of the user's program


def test_no_program_runs_for_a_postscript_image(tmp_path, monkeypatch):
    marker, program = tmp_path / "ran", tmp_path / "gs"  # Pillow starts Ghostscript for EPS
    program.write_text(f"#!/bin/sh\ntouch '{marker}'\necho 10.0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n"
    (tmp_path / "a.png").write_bytes(data)
    for stored in (StoredImage(data), StoredImage(path=str(tmp_path / "a.png"))):
        with pytest.raises(RecordError, match="none of the formats"):
            stored.open("r")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["pipe.png", "/dev/zero"])
def test_a_pipe_or_device_is_no_image(tmp_path, name):
    path = str(tmp_path / name)
    if name == "pipe.png":
        os.mkfifo(path)
    with pytest.raises(RecordError, match="is not a file"):
        StoredImage(path=path).open("r")


def test_a_file_replaced_by_a_pipe_while_it_is_opened(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe")
    status = os.stat

    def swapped(path, *rest, **options):
        result = status(path, *rest, **options)
        os.replace(tmp_path / "pipe", tmp_path / "a.png")
        return result

    monkeypatch.setattr(os, "stat", swapped)
    with pytest.raises(RecordError, match="is not a file"):
        StoredImage(path=str(tmp_path / "a.png")).open("r")


def test_a_large_encoded_image_is_refused(tmp_path, monkeypatch):
    data = encode(Image.new("RGB", (4, 4)))
    (tmp_path / "a.png").write_bytes(data)
    monkeypatch.setattr(images, "MAX_BYTES", len(data) - 1)
    for stored in (StoredImage(data), StoredImage(path=str(tmp_path / "a.png"))):
        with pytest.raises(RecordError, match="bytes are more than"):
            stored.open("r")


@pytest.mark.parametrize("size", [(10_001, 50), (1, 201)])
def test_an_image_that_a_processor_would_enlarge_to_gigabytes_is_refused(size):
    with pytest.raises(RecordError, match="is a ratio of more than 200"):
        StoredImage.from_pil(Image.new("L", (8, 8))).open("x")  # a usual image is read
        StoredImage(encode(Image.new("L", size))).open("x")


def test_a_plain_pnm_of_comments_is_refused_soon():
    """Pillow skips them in quadratic time: 17 s for 1 MB."""
    assert StoredImage(b"P2\n2 1\n255\n0 255\n").open("x").size == (2, 1)
    start = time.perf_counter()
    for magic in (b"P1", b"P2", b"P3"):
        with pytest.raises(RecordError, match="a plain PNM has at most 100,000 bytes"):
            StoredImage(magic + b"\n8 8\n255\n0 \n" + b"#\n" * 500_000).open("x")
    assert time.perf_counter() - start < 2


def test_a_tiff_with_giant_tiles_is_refused():
    sides = 8000, 8000  # 64 million pixels for an image of 16 x 16
    entries = [(256, 16), (257, 16), (258, 8), (259, 1), (262, 1), (277, 1)]
    entries += [(322, sides[0]), (323, sides[1]), (324, 8), (325, 8)]
    packed = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    header = b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4)
    with pytest.raises(RecordError, match="its tiles have 8000 x 8000 pixels"):
        StoredImage(header).open("x")


def test_a_jpeg_of_many_scans_is_refused():
    buffer = io.BytesIO()
    Image.new("L", (7000, 7000), 100).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    StoredImage(data).open("usual")
    scan = data[data.rfind(b"\xff\xda") : -2][:20]
    with pytest.raises(RecordError, match="JPEG of 20,006 scans"):
        StoredImage(data[:-2] + scan * 20_000 + b"\xff\xd9").open("r")


def _table(count, images):
    columns = {name: [text] * count for name, text in TEXTS.items()}
    return pa.table(columns | {"images": images})


def _repeated(rows, data, each=1):
    """A column whose images all refer to one value of a dictionary."""
    indices = pa.array(np.zeros(rows * each, np.int32))
    values = pa.DictionaryArray.from_arrays(indices, pa.array([data], pa.binary()))
    paths = pa.nulls(rows * each, pa.string())
    parts = pa.StructArray.from_arrays([values, paths], ["bytes", "path"])
    return pa.ListArray.from_arrays(pa.array(np.arange(rows + 1) * each, pa.int32()), parts)


def _of_zeros(rows, size):
    """A column of images that are only zeros, made without Python objects."""
    offsets = pa.py_buffer(np.arange(rows + 1, dtype=np.int32) * size)
    zeros = pa.py_buffer(bytes(rows * size))
    values = pa.Array.from_buffers(pa.binary(), rows, [None, offsets, zeros])
    parts = pa.StructArray.from_arrays([values, pa.nulls(rows, pa.string())], ["bytes", "path"])
    return pa.ListArray.from_arrays(pa.array(np.arange(rows + 1), pa.int32()), parts)


def _bombs(folder):
    zeros = _of_zeros(10, 40 << 20)
    plain = {"use_dictionary": False, "compression": "zstd", "write_statistics": False}
    pq.write_table(_table(10, zeros), folder / "zeros.parquet", **plain)
    # Without Arrow's schema, a reader gets plain values, not a dictionary.
    large = {"compression": "zstd", "dictionary_pagesize_limit": 1 << 30, "store_schema": False}
    pq.write_table(_table(99, _repeated(99, bytes(20 << 20))), folder / "rows.parquet", **large)
    pq.write_table(_table(1, _repeated(1, bytes(1 << 20), 2000)), folder / "row.parquet", **large)
    nulls = pa.nulls(60_000_000, pa.struct([("path", pa.string())]))
    many = pa.ListArray.from_arrays(pa.array([0, len(nulls)], pa.int32()), nulls)
    pq.write_table(_table(1, many), folder / "nulls.parquet")
    delta = {"column_encoding": {"images.list.element.bytes": "DELTA_BYTE_ARRAY"}}
    pq.write_table(_table(32, _of_zeros(32, 20 << 20)), folder / "delta.parquet", **plain, **delta)
    _understate(folder / "zeros.parquet", folder / "forged.parquet")


def _understate(file, output):
    """Write a copy whose footer gives every column of images a size of 1,000 bytes."""
    content, metadata = file.read_bytes(), pq.read_metadata(file)
    start = len(content) - 8 - struct.unpack("<I", content[-8:-4])[0]
    chunk = metadata.row_group(0).column(3)
    assert chunk.path_in_schema == "images.list.element.bytes"
    size, true = _zigzag(chunk.total_uncompressed_size), content[start:]
    forged = _zigzag(1000, len(size))
    assert true.count(size) == metadata.num_row_groups
    output.write_bytes(content[:start] + true.replace(size, forged))
    assert pq.read_metadata(output).row_group(0).column(3).total_uncompressed_size == 1000


def _zigzag(value, length=0):
    """A positive number in Thrift's compact protocol, in at least `length` bytes."""
    length = max(length, -(-(2 * value).bit_length() // 7))
    groups = [2 * value >> 7 * i & 127 | 128 for i in range(length)]
    return bytes([*groups[:-1], groups[-1] & 127])


_READ = """
import sys
from realign.data.records import read_pairs
for file in sys.argv[1:]:
    try:
        read_pairs(file)
        print("read", file)
    except ValueError as error:
        assert "times its size" in str(error), error
(peak,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) // 1024)
"""


def test_memory_is_bounded_for_files_that_decode_to_gigabytes(tmp_path):
    _bombs(tmp_path)
    files = sorted(map(str, tmp_path.glob("*.parquet")))
    assert len(files) == 6 and sum(map(os.path.getsize, files)) < 1 << 20
    result = subprocess.run(
        [sys.executable, "-c", _READ, *files], capture_output=True, text=True, timeout=60
    )
    assert result.stdout.strip().isdigit(), result.stdout + result.stderr
    assert int(result.stdout) < 700  # MB, half of it is for Python and Arrow


def test_fixed_sizes_count_as_well(tmp_path):
    """A dictionary of one value of 20 MB, and 100 rows of zeros of that width."""
    value = pa.py_buffer(bytes(20 << 20))
    one = pa.FixedSizeBinaryArray.from_buffers(pa.binary(20 << 20), 1, [None, value])
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int8()), one)
    assert weight(repeated) > 1 << 30 and weight(one) > 20 << 20
    schema = pa.schema([("images", pa.list_(pa.struct([("bytes", pa.binary(20 << 20))])))])
    for name in TEXTS:
        schema = schema.append(pa.field(name, pa.string()))
    options = {"compression": "zstd", "dictionary_pagesize_limit": 1 << 30}
    with pq.ParquetWriter(tmp_path / "fixed.parquet", schema, **options) as writer:
        structs = pa.StructArray.from_arrays([one], ["bytes"])
        images = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), structs)
        row = pa.table({"images": images} | {n: [t] for n, t in TEXTS.items()}, schema=schema)
        for _ in range(20):
            writer.write_table(row)
    with pytest.raises(ValueError, match="decodes to more than 16 times its size"):
        read_pairs(tmp_path / "fixed.parquet")


def test_usual_repetitions_are_read(tmp_path):
    image = encode(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), "u1")))
    pq.write_table(_table(2000, _repeated(2000, image)), tmp_path / "same.parquet")
    records = read_pairs(tmp_path / "same.parquet")
    assert len(records) == 2000 and {r.images[0].data for r in records} == {image}


def test_the_weight_of_values_is_at_least_their_bytes():
    texts = pa.array(["a" * 1000, None, "b"])
    assert weight(texts) > 1000 and weight(texts.cast(pa.string_view())) == weight(texts)
    assert weight(pa.array(["a" * 1000] * 9).dictionary_encode()) > 9000
    assert weight(_repeated(7, bytes(100), each=3)) > 2100
    assert weight(_repeated(7, bytes(100), each=3).slice(2, 1)) < 1000
    with pytest.raises(pa.ArrowInvalid, match="not supported"):
        weight(pa.RunEndEncodedArray.from_arrays([1 << 30], pa.array(["a" * 1000]), None))


def _save_arrow(file, table, compression=None):
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with (
        pa.OSFile(str(file), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema, options=options) as stream,
    ):
        stream.write_table(table)


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_compressed_arrow_files_are_refused(tmp_path, compression):
    table = _table(40, pa.array([["a.png"]] * 40))
    _save_arrow(tmp_path / "d.arrow", table, compression)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    if compression is None:
        assert len(list(read_any(str(tmp_path / "d.arrow")))) == 40
        return
    with pytest.raises(ValueError, match="has compressed buffers"):
        list(read_any(str(tmp_path / "d.arrow")))


def test_offsets_out_of_an_arrow_file_are_an_error(tmp_path):
    table = _table(1, pa.array([["a.png"]])).set_column(0, "prompt", [["a" * 7777]])
    _save_arrow(tmp_path / "d.arrow", table)
    content = (tmp_path / "d.arrow").read_bytes()
    offsets = struct.pack("<2i", 0, 7777)
    place = content.rindex(offsets)  # in the body of the batch, behind its metadata
    changed = content[:place] + struct.pack("<2i", 0, 1 << 30) + content[place + 8 :]
    (tmp_path / "d.arrow").write_bytes(changed)
    with pytest.raises(ValueError, match="not a readable Arrow file"):
        list(read_any(str(tmp_path / "d.arrow")))


def test_long_texts_are_refused():
    row = TEXTS | {"images": [b"x"]}
    for changes in ({"prompt": "a " * 600_000}, {"chosen": "a" * 1_048_577}):
        with pytest.raises(Malformed) as error:
            entry_of(row | changes)
        assert error.value.reason == "too long" and len(str(error.value)) < 300
    assert entry_of(row | {"chosen": "a" * 1_048_576}).chosen


def test_a_long_line_of_json_is_invalid_and_the_next_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MOST_JSON", 100)
    lines = ["[1]", '"' + "x" * 350 + '"', "[2]", "[" * 99, '"' + "y" * 98]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    first, long, second, *_ = sources.json_lines(tmp_path / "a.jsonl")
    assert (first, second) == ([1], [2]) and long.reason == "too long"


def test_the_time_for_repeated_keys_is_linear():
    def seconds(count):
        pairs = [(str(i), 0) for i in range(count)] + [("k", 1), ("k", 2)]
        began = time.perf_counter()
        assert "'k' twice" in json_object(pairs).problem
        return time.perf_counter() - began

    seconds(1000)
    assert seconds(40_000) < 20 * 16 * max(seconds(2500), 1e-4)


def test_ids_with_one_hash_are_refused(tmp_path):
    """Python hashes all multiples of 2^61 - 1 to 0, so a dict of them takes quadratic time."""
    ids = [{"id": i * (2**61 - 1), "name": "dog"} for i in range(1, 3)]
    file = tmp_path / "instances.json"
    file.write_text(json.dumps({"images": [], "annotations": [], "categories": ids}))
    with pytest.raises(ValueError, match="in `categories`, which lacks id"):
        read_instances(file)


def test_an_import_of_invalid_records_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(importers, "_MOST_INVALID", 50)
    good = {"image": "x.png", "question": "q", "chosen": "a", "rejected": "b"}
    (tmp_path / "a.jsonl").write_text(json.dumps(good) + "\n" + "0\n" * 100)
    with pytest.raises(ValueError, match="has more than 50 invalid records. One is 'a.jsonl:"):
        importers.import_pairs(str(tmp_path / "a.jsonl"), None, str(tmp_path / "o.parquet"))


def test_a_large_json_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("[" + "1," * 100 + "1]")
    monkeypatch.setattr(sources, "_MOST_JSON", 100)
    with pytest.raises(ValueError, match="larger than 100 bytes"):
        read_any(str(tmp_path / "a.json"))


SAVED = {
    "a list": ("state.json", []),
    "no names": ("state.json", {"_data_files": [{"filename": 3}]}),
    "names of a wrong type": ("state.json", {"_data_files": 7}),
    "another folder": ("state.json", {"_data_files": [{"filename": "../private/d.arrow"}]}),
    "an absolute path": ("state.json", {"_data_files": [{"filename": "/etc/passwd"}]}),
    "a link": ("state.json", {"_data_files": [{"filename": "link.arrow"}]}),
    "a pipe": ("state.json", {"_data_files": [{"filename": "pipe.arrow"}]}),
    "a split elsewhere": ("dataset_dict.json", {"splits": ["../private"]}),
    "splits of a wrong type": ("dataset_dict.json", {"splits": {"a": [1]}}),
    "itself as a split": ("dataset_dict.json", {"splits": ["."]}),
}


@pytest.mark.parametrize("case", SAVED)
def test_a_folder_of_datasets_names_only_its_own_files(places, case):
    name, content = SAVED[case]
    folder = places / "download"
    _save_arrow(places / "private" / "d.arrow", _table(1, pa.array([["good.png"]])))
    state = json.dumps({"_data_files": [{"filename": "d.arrow"}]})
    (places / "private" / "state.json").write_text(state)
    (folder / "link.arrow").symlink_to("../private/d.arrow")
    os.mkfifo(folder / "pipe.arrow")
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="datasets|Arrow|Parquet"):
        list(read_any(str(folder)))


def test_json_that_is_too_deep_is_one_error(tmp_path):
    deep, long = "[" * 200_000, '{"a": 1' + "0" * 5000 + "}"
    for text in (deep, long):
        (tmp_path / "state.json").write_text(text)
        (tmp_path / "questions.json").write_text(text)
        calls = (
            lambda: read_any(str(tmp_path)),
            lambda: read_rows(tmp_path / "questions.json", {}, "Give another."),
            lambda: read_captions(tmp_path / "questions.json"),
            lambda: read_answers(tmp_path / "questions.json"),
        )
        for call in calls:
            with pytest.raises(ValueError, match="JSON|answers|datasets") as error:
                call()
            assert len(str(error.value)) < 500


def test_pipes_block_no_reader(tmp_path):
    for name in ("a.jsonl", "a.parquet", "a.arrow", "a.json", "a.npy"):
        os.mkfifo(tmp_path / name)
    calls = [
        lambda: read_pairs(tmp_path / "a.parquet"),
        lambda: list(read_any(str(tmp_path / "a.arrow"))),
        lambda: list(read_any(str(tmp_path / "a.jsonl"))),
        lambda: read_any(str(tmp_path / "a.json")),
        lambda: read_rows(tmp_path / "a.json", {}, ""),
        lambda: read_captions(tmp_path / "a.json"),
        lambda: read_synonyms(tmp_path / "a.json"),
        lambda: read_answers(tmp_path / "a.jsonl"),
        lambda: read_table(tmp_path / "a.parquet"),
        lambda: footer(tmp_path / "a.parquet"),
        lambda: parquet_file(tmp_path / "a.parquet"),
        lambda: read_array(tmp_path / "a.npy"),
        lambda: open_lock(tmp_path / "a.npy"),
    ]
    for call in calls:
        with pytest.raises((OSError, ValueError), match="regular file"):
            call()


def test_arrays_hold_no_objects(tmp_path):
    marker = tmp_path / "ran"

    class Planted:
        def __reduce__(self):
            return Path.touch, (marker,)

    np.save(tmp_path / "a.npy", np.array([Planted()], object), allow_pickle=True)
    with pytest.raises(ValueError, match="damaged"):
        read_array(tmp_path / "a.npy")
    assert not marker.exists()
    (tmp_path / "b.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        read_array(tmp_path / "b.npy", "r")


def test_planted_links_lead_nowhere(tmp_path):
    victim, shared = tmp_path / "victim", tmp_path / "shared"
    victim.write_text("kept")
    shared.mkdir()
    for name in (".pairs.parquet.partial", ".lock"):
        (shared / name).symlink_to(victim)
    (shared / "made").symlink_to(tmp_path / "elsewhere")
    write_pairs(shared / "pairs.parquet", [])
    with pytest.raises(OSError, match="symbolic link"), sole_run(shared):
        pass
    with pytest.raises(OSError, match="symbolic link"):
        open_lock(shared / "made")
    assert victim.read_text() == "kept" and not (tmp_path / "elsewhere").exists()
    assert pq.read_metadata(shared / "pairs.parquet").num_rows == 0


def test_a_lock_keeps_the_content_of_its_file(tmp_path):
    (tmp_path / ".lock").write_text("kept")
    with (
        sole_run(tmp_path),
        pytest.raises(ValueError, match="another run uses"),
        sole_run(tmp_path),
    ):
        pass
    assert (tmp_path / ".lock").read_text() == "kept"


@pytest.mark.parametrize("asked", [None, "m", ["m"], {"model": ["m"]}])
def test_answers_of_another_shape_are_refused(tmp_path, asked):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"asked": asked}) + '\n{"id": "1", "answer": ""}\n'
    )
    with pytest.raises(ValueError, match="answers"):
        prepare([Question("1", "q", None)], tmp_path, tmp_path / "a.jsonl", model="m", max_tokens=1)
