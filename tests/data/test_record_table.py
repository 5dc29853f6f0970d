"""Record tables: records on disk are equal to those that were read, and changes are found."""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from PIL import Image

from realign.data import record_table
from realign.data.images import ImageError, StoredImage
from realign.data.record_table import open_table, table_of
from realign.data.records import Record, RecordError, write_pairs

PROMPT = ({"role": "user", "content": "What is it?"},)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture
def file(tmp_path, cache):
    """Pairs with an embedded image, a file, and the same bytes in two records."""
    made = [Image.new("RGB", (40 + i, 30), (i, 0, 0)) for i in range(3)]
    made[1].save(tmp_path / "one.png")
    one = StoredImage(path=str(tmp_path / "one.png"))
    first, last = StoredImage.from_pil(made[0]), StoredImage.from_pil(made[2], "last.png")
    records = [
        Record("a", PROMPT, "yes", "no", (first,), (one,)),
        Record("b", PROMPT, "yes", "no \u2028", (one, last), (first, first), {}, "maybe"),
    ]
    write_pairs(tmp_path / "pairs.parquet", records)
    return tmp_path / "pairs.parquet"


def _records(table):
    """The records of a table, with the bytes of their images."""
    return [
        (row.name, row.prompt, row.chosen, row.rejected, row.retrieved_chosen)
        + tuple(
            [table.image(facts).data for facts in images]
            for images in (row.images, row.retrieved_images)
        )
        for row in table
    ]


def test_a_table_holds_the_records_of_its_source(file):
    table = open_table(file)
    one = (file.parent / "one.png").read_bytes()
    rows = _records(table)
    assert [row[0] for row in rows] == ["a", "b"] == [table.name(0), table.name(1)]
    assert rows[0][1:5] == (PROMPT, "yes", "no", "") and rows[1][1:5] == (
        PROMPT,
        "yes",
        "no \u2028",
        "maybe",
    )
    first, last = rows[0][5][0], rows[1][5][1]
    assert rows[0][5:] == ([first], [one]) and rows[1][5:] == ([one, last], [first, first])
    facts = table[1].images[1]
    assert (facts.width, facts.height, facts.size, facts.path) == (42, 30, len(last), "last.png")
    assert facts.key == hashlib.blake2b(last, digest_size=16).digest()
    assert table.counts("images").tolist() == [1, 2]
    assert table.counts("retrieved_images").tolist() == [1, 2]
    assert [row.name for row in table[1:2]] == ["b"] and table[-1].name == "b"
    # Equal embedded images are kept once, and image files are not copied.
    (images,) = table.folder.glob("*.images")
    assert images.stat().st_size == len(first) + len(last)


def test_a_source_is_converted_once(file, monkeypatch):
    rows = _records(open_table(file))
    monkeypatch.setattr(record_table, "stream_pairs", None)
    assert _records(open_table(file)) == rows


def test_a_changed_source_is_converted_again_and_its_old_table_removed(file):
    before = open_table(file)
    write_pairs(file, [Record("c", PROMPT, "yes", "no", (StoredImage(path="one.png"),))])
    after = open_table(file)
    assert [row.name for row in after] == ["c"] and after.folder == before.folder
    assert len(list(after.folder.glob("*.arrow"))) == 1
    assert [row.name for row in before] == ["a", "b"]  # as long as a process has it open


def test_equal_records_have_equal_digests(file):
    """Runs that convert at the same time share the folder of encoded records."""
    before = open_table(file)
    kept = before.beside("settings")
    kept.mkdir()
    (before.folder / "old-settings").mkdir()
    os.utime(before.folder / "old-settings", (1, 1))
    (before.folder / ".x.images.1.partial").write_text("of a killed run")
    os.utime(file, (1, 1))
    after = open_table(file)
    assert after.beside("settings") == kept and kept.exists()
    assert not (before.folder / "old-settings").exists()
    assert not list(before.folder.glob(".*"))
    Image.new("RGB", (41, 31)).save(file.parent / "one.png")
    assert open_table(file).digest != before.digest


def test_a_changed_image_file_is_converted_again(file):
    before = open_table(file)
    Image.new("RGB", (50, 20)).save(file.parent / "one.png")
    with pytest.raises(ImageError, match="changed"):
        before.image(before[1].images[0])
    facts = open_table(file)[1].images[0]
    assert (facts.width, facts.height) == (50, 20)
    (file.parent / "one.png").unlink()
    with pytest.raises(
        RecordError, match="'a': its image .*one.png does not exist.* 1 more record"
    ):
        open_table(file)


def test_a_table_belongs_to_the_folder_of_its_images(tmp_path, cache, monkeypatch):
    """The same relative name in two folders, both links to one file."""
    stored = (StoredImage(path="a.png"),)
    (tmp_path / "store").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "store" / "a.png")
    write_pairs(tmp_path / "store" / "pairs.parquet", [Record("a", PROMPT, "b", "c", stored)])
    widths = []
    for name, width in (("one", 11), ("two", 12)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pairs.parquet").symlink_to(tmp_path / "store" / "pairs.parquet")
        Image.new("RGB", (width, 8)).save(tmp_path / name / "a.png")
        monkeypatch.chdir(tmp_path / name)
        widths += [open_table("pairs.parquet")[0].images[0].width]
        widths += [open_table(tmp_path / name / "pairs.parquet")[0].images[0].width]
    assert widths == [11, 11, 12, 12]
    assert len(list(cache.iterdir())) == 2


def test_a_link_that_leads_elsewhere_is_found(file):
    for name, width in (("x.png", 21), ("y.png", 22)):
        Image.new("RGB", (width, 8)).save(file.parent / name)
    link = file.parent / "link.png"
    link.symlink_to("x.png")
    write_pairs(file, [Record("c", PROMPT, "a", "b", (StoredImage(path="link.png"),))])
    before = open_table(file)
    assert before[0].images[0].width == 21 and open_table(file).digest == before.digest
    link.unlink()
    link.symlink_to("y.png")
    assert open_table(file)[0].images[0].width == 22


def test_a_file_replaced_with_its_size_and_time_is_found(file):
    """As by `cp -p` and rsync."""
    image = file.parent / "one.png"
    first = image.read_bytes()
    assert open_table(file)[0].retrieved_images[0].width == 41
    Image.new("RGB", (43, 30), (1, 0, 0)).save(file.parent / "other.png")
    other = (file.parent / "other.png").read_bytes()
    size, times = max(len(first), len(other)), (10**9, 10**9)
    image.write_bytes(first.ljust(size, b"\0"))
    os.utime(image, ns=times)
    assert open_table(file)[0].retrieved_images[0].width == 41
    image.write_bytes(other.ljust(size, b"\0"))
    os.utime(image, ns=times)
    assert open_table(file)[0].retrieved_images[0].width == 43


def test_truncated_images_are_written_again(file):
    table = open_table(file)
    rows = _records(table)
    (images,) = table.folder.glob("*.images")
    whole = images.read_bytes()
    images.write_bytes(whole[:-1])
    assert _records(open_table(file)) == rows
    (images,) = table.folder.glob("*.images")
    assert images.read_bytes() == whole


def test_runs_that_start_together_convert_once(file, tmp_path):
    """The second waits for the first, also if it would end sooner."""
    program = (
        "import sys, time, realign.data.record_table as t\n"
        "inner, made = t._to_row, []\n"
        "t._to_row = lambda *given: (time.sleep(0.5), made.append(1), inner(*given))[2]\n"
        "rows = [row.name for row in t.open_table(sys.argv[1])]\n"
        "print(rows, len(made))\n"
    )
    run = [sys.executable, "-c", program, str(file)]
    both = [subprocess.Popen(run, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    shown = sorted(process.communicate()[0] for process in both)
    assert shown == ["['a', 'b'] 0\n", "['a', 'b'] 2\n"]


def test_names_that_are_not_utf_8_are_kept_readable():
    image = StoredImage.from_pil(Image.new("RGB", (8, 8)))
    assert table_of([Record("n\udcff", PROMPT, "a", "b", (image,))])[0].name == "n?"


def test_bad_headers_are_named_and_counted(tmp_path, cache):
    good = StoredImage.from_pil(Image.new("RGB", (8, 8)))
    Image.new("RGB", (1, 250)).save(tmp_path / "narrow.png")
    bad = [StoredImage(b"GIF89a"), StoredImage(path=str(tmp_path / "narrow.png")), good]
    records = [Record(str(i), PROMPT, "a", "b", (image,)) for i, image in enumerate(bad)]
    with pytest.raises(RecordError, match="'0': its image 6 embedded bytes cannot.*1 more.*: '1'"):
        table_of(records)
    found = {}
    table = table_of(records, lambda record, error: found.update({record.name: str(error)}))
    assert [row.name for row in table] == ["2"] and list(found) == ["0", "1"]
    assert "ratio of more than 200" in found["1"]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["jpeg", "png", "webp", "tiff"])
def test_sizes_from_headers_are_those_of_decoded_images(tmp_path, orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = str(tmp_path / f"image.{format}")
    Image.new("RGB", (30, 20), (9, 8, 7)).save(path, exif=exif)
    stored = StoredImage(path=path)
    assert stored.size() == stored.decode()[0].size == ((20, 30) if orientation > 4 else (30, 20))


def test_a_header_is_read_without_the_pixels(tmp_path):
    """A truncated file has a size, and an error when it is decoded."""
    path = tmp_path / "image.jpg"
    Image.effect_noise((300, 200), 90).convert("RGB").save(path)
    stored = StoredImage(path.read_bytes()[:2000])
    assert stored.size() == (300, 200)
    with pytest.raises(ImageError, match="truncated"):
        stored.decode()


def test_files_of_other_users_are_not_opened(file, monkeypatch):
    table = open_table(file)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert record_table._opened(table.folder, next(table.folder.glob("*.arrow")).stem) is None


def test_a_planted_link_leads_nowhere(file, tmp_path):
    """The name of the folder is predictable. Old files are removed only in a folder of ours."""
    folder = open_table(file).folder
    victim = tmp_path / "victim"
    folder.rename(victim)
    (victim / "thesis.arrow").write_text("mine")
    folder.symlink_to(victim)
    write_pairs(file, [Record("c", PROMPT, "yes", "no", (StoredImage(path="one.png"),))])
    with pytest.raises(ValueError, match="is not a folder of yours. Remove it"):
        open_table(file)
    assert (victim / "thesis.arrow").read_text() == "mine" and len(list(victim.iterdir())) == 5


def test_a_killed_conversion_leaves_no_table(file, tmp_path):
    program = (
        "import os, realign.data.record_table as t\n"
        "t._to_row = lambda *_: os.kill(os.getpid(), 9)\n"
        f"t.open_table({str(file)!r})\n"
    )
    run = subprocess.run([sys.executable, "-c", program], env=os.environ)
    assert run.returncode == -9
    assert [row.name for row in open_table(file)] == ["a", "b"]


def test_memory_of_embedded_images_is_bounded(tmp_path, cache):
    """A table of 64 MB of images takes less than 32 MB of memory, however many are read."""
    program = (
        "import io, os\n"
        "import realign.data.record_table as t\n"
        "from PIL import Image\n"
        "from realign.data.images import StoredImage\n"
        "from realign.data.records import Record\n"
        "def peak():\n"
        "    status = open('/proc/self/status').read()\n"
        "    return int(status.partition('VmHWM:')[2].split()[0]) << 10\n"
        "def records(count):\n"
        "    for i in range(count):\n"
        "        file = io.BytesIO()\n"
        "        Image.frombytes('RGB', (300, 220), os.urandom(198000)).save(file, 'BMP')\n"
        "        stored = (StoredImage(file.getvalue()),)\n"
        "        yield Record(str(i), ({'role': 'user', 'content': 'a'},), 'a', 'b', stored)\n"
        "list(t.table_of(records(1)))\n"
        "t._BATCH = 16\n"
        "before = peak()\n"
        "table = t.table_of(records(330))\n"
        "size = sum(len(table.image(row.images[0]).data) for row in table)\n"
        "print(size, peak() - before)\n"
    )
    run = [sys.executable, "-c", program]
    out = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    size, grown = map(int, out.split())
    assert size > 60 << 20 and grown < 32 << 20


def test_names_and_texts_of_any_unicode_are_kept():
    image = StoredImage.from_pil(Image.new("RGB", (8, 8)))
    record = Record("a", ({"role": "user", "content": "\ud800"},), "\udfff", "b\0", (image,))
    row = table_of([record, replace(record, name="b")])[0]
    assert (row.prompt, row.chosen, row.rejected) == (record.prompt, "\udfff", "b\0")


def test_a_name_on_the_hub_uses_its_last_version_offline(cache, monkeypatch, capsys):
    image = StoredImage.from_pil(Image.new("RGB", (8, 8)))
    records = [Record("a", PROMPT, "b", "c", (image,))]
    monkeypatch.setattr(record_table, "identity", lambda *_, **__: "revision 1")
    monkeypatch.setattr(record_table, "stream_pairs", lambda *_, **__: iter(records))
    assert [row.name for row in open_table("owner/name", split="train")] == ["a"]

    def unreachable(*_, **__):
        raise ValueError("owner/name cannot be read from the Hub")

    monkeypatch.setattr(record_table, "identity", unreachable)
    assert [row.name for row in open_table("owner/name", split="train")] == ["a"]
    assert "the Hub cannot be asked about owner/name" in capsys.readouterr().out
    for name, split in (("owner/other", "train"), ("owner/name", "test")):
        with pytest.raises(ValueError, match="cannot be read from the Hub"):
            open_table(name, split=split)
