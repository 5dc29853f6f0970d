"""Import: reasons for invalid records and files."""

import json
import re
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from import_cases import COCO, LLAVA, REALIGN, assistant, read_all, text, user, write_json
from PIL import Image

from realign.data.errors import Malformed
from realign.data.formats import FORMATS, entries_of
from realign.pairs.io.importers import read_any
from realign.pairs.io.rows import InvalidRecord
from realign.pairs.io.texts import placed, problem_of

MANY = "".join(f"<p class='x{i}'></p>" for i in range(9)) + "A cat."
BAD = {
    "empty": ({"answer": ""}, "empty text"),
    "empty list": ({"answer": []}, "malformed"),
    "blank": ({"answer": " \n\t"}, "empty text"),
    "marks": ({"answer": "?!"}, "empty text"),
    "empty question": ({"question": "<image>\n"}, "empty text"),
    "markup": ({"answer": MANY}, "mostly markup"),
    "null": ({"answer": "A\0cat"}, "control characters"),
    "escape": ({"answer": "A \x1b[31mcat"}, "control characters"),
    "surrogate": ({"answer": "A cat \ud83d"}, "not Unicode"),
    "token": ({"answer": "A <image> of a cat"}, "image token"),
    "too many places": ({"question": "Is <image> a cat like <image>?"}, "image token"),
    "image of an answer": (
        {"question": [user("What?"), assistant("See <image>."), user("Why?")]},
        "image token",
    ),
    "answer type": ({"answer": 3}, "malformed"),
    "answer messages": ({"answer": [user("A cat.")]}, "malformed"),
    "no question": ({"question": None}, "malformed"),
    "no image": ({"image": None}, "no image"),
    "image type": ({"image": 3}, "malformed"),
    "image name": ({"image": ""}, "no image"),
    "missing": ({"image": "z.jpg"}, "missing"),
    "folder": ({"image": "."}, "missing"),
    "null byte": ({"image": "a\0.jpg"}, "missing"),
    "up": ({"image": "../secret.jpg"}, "outside the folder"),
    "absolute": ({"image": "/etc/hostname"}, "outside the folder"),
    "link": ({"image": "link.jpg"}, "outside the folder"),
    "duplicate": ({}, "duplicate"),
}


def test_every_bad_record_has_its_reason(tmp_path, image_folder):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.jpg")
    (image_folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    good = {"image": "a.jpg", "question": "What?", "answer": "A cat."}
    lines = [good | {"id": "good"}]
    lines += [good | {"id": name} | changes for name, (changes, _) in BAD.items()]
    html = "A cat <b>on</b> a mat & <script>alert('x')</script>"
    lines.append(good | {"answer": html, "id": "html"})
    (image_folder / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    records, bad = read_all(str(image_folder))
    assert set(records) == {"good", "html"}
    assert bad == {name: reason for name, (_, reason) in BAD.items()}
    details = {
        b.record: b.detail for b in read_any(str(image_folder)) if isinstance(b, InvalidRecord)
    }
    assert details["duplicate"] == "it is the same as good"
    assert "'../secret.jpg'" in details["up"] and "'z.jpg'" in details["missing"]
    for detail in details.values():
        detail.encode()


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        ({"conversations": []}, "conversations is .*, neither text nor messages"),
        ({"id": "r", "conversations": LLAVA["conversations"][1:]}, "do not alternate"),
        ({"id": "r", "conversations": [{"from": "system", "value": "x"}]}, "not a dialogue"),
        (LLAVA | {"rejected": "A dog."}, "it has rejected, which LLaVA's format does not have"),
        (LLAVA | {"system": "Be brief."}, "it has system, which LLaVA's format does not have"),
        (REALIGN | {"retrieved_image": None}, "retrieved_image is missing"),
        (REALIGN | {"rejected": None}, "rejected is missing"),
        (REALIGN | {"chosen": "A cat."}, "it has no prompt"),
    ],
)
def test_the_problem_of_a_malformed_item_is_named(tmp_path, image_folder, item, problem):
    first = [LLAVA] if "conversations" in item else []  # it determines the format of the file
    *_, found = read_any(write_json(tmp_path, [*first, item]), images=str(image_folder))
    assert isinstance(found, InvalidRecord) and found.reason == "malformed"
    assert re.search(problem, found.detail)


def test_long_texts_are_checked_in_time():
    for long in ("x" + " " * 100_000 + "x", "<" * 100_000, "<a" * 100_000, "<image>" * 3000 + "x"):
        began = time.process_time()
        placed([user(long)], 3000 if "<image>" in long else 0)
        problem_of(long)
        assert time.process_time() - began < 2


def test_tags_are_places_of_images():
    asked = [user("<image>\n<image> What is it?"), assistant("A cat."), user("Why?")]
    # At the beginning is the default place of images in a plain-text prompt.
    assert placed(asked, 2) == [user("What is it?"), *asked[1:]]
    parts = [text("Is"), {"type": "image"}, text("here?")]
    assert placed([user("Is <image> here?")], 1) == [user(parts)]
    assert placed([user(parts)], 1) == [user(parts)]
    later = placed([*asked[1:], user("<image>")], 1)
    assert later[-1] == user([{"type": "image"}]) and later[0] == assistant([text("A cat.")])
    assert placed([user(" as it is\n")], 3) == [user(" as it is\n")]


ROLES = ("system", "user", "assistant")
KEYS = ["role", "content", "from", "value", "type", "text", "id", "image", "caption", "file_name"]
COLUMNS = "conversations image images chosen rejected prompt question answer id retrieved_image "
COLUMNS += "messages rejected_images rejected_response instruction input history query output_1 "
COLUMNS += (
    "output_2 preference completions y_win y_lose context queries AI_pseudo_response img_path "
)
COLUMNS += "original_generate_response image_bytes text system reject"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(ROLES),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(item=st.dictionaries(st.sampled_from(COLUMNS.split()), JSON))
def test_any_json_is_a_record_or_malformed(item):
    for name in FORMATS.keys() - {"coco", "coco:all"} | {"auto"}:
        try:
            entries = entries_of(item, name)
        except Malformed as error:
            assert str(error)
            continue
        for entry in entries:
            assert entry.prompt and all(m["role"] in ROLES for m in entry.prompt)
            assert isinstance(entry.chosen, str | None) and isinstance(entry.rejected, str | None)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_read(tmp_path, image_folder, encoding):
    data = tmp_path / "data.json"
    data.write_bytes(json.dumps([REALIGN]).encode(encoding))
    assert len(read_all(str(data), images=str(image_folder))[0]) == 1
    lines = tmp_path / "data.jsonl"
    lines.write_bytes(f"{json.dumps(REALIGN)}\r\n".encode("utf-8-sig"))
    assert len(read_all(str(lines), images=str(image_folder))[0]) == 1


def test_invalid_files_are_named(tmp_path, image_folder):
    def refused(data, problem, **options):
        with pytest.raises(ValueError, match=problem):
            list(read_any(str(data), **options))

    with pytest.raises(FileNotFoundError, match="nothing at .*none.json"):
        read_any(str(tmp_path / "none.json"))
    refused(
        image_folder, "format is 'csv'; use one of auto, llava, llava:all, realign", format="csv"
    )
    refused(image_folder, "holds 0 JSON-lines files and no Parquet file")
    (tmp_path / "broken.json").write_text('[{"id": 1,')
    refused(tmp_path / "broken.json", "broken.json is not a JSON file .*JSON lines need the suffix")
    refused(write_json(tmp_path, {"a": 1}), "which have `images`")
    for content in (3, "a", None):
        refused(write_json(tmp_path, content), "not a list of records")
    (tmp_path / "saved").mkdir()
    write_json(tmp_path / "saved", {}, "state.json")
    refused(tmp_path / "saved", "saved is not a data set that `datasets` saved")
    refused(write_json(tmp_path, [{"a": 1}, 3]), "no record of a known format.* keys .'a'.")
    refused(write_json(tmp_path, COCO | {"annotations": 5}), "`annotations` is 5, not a list")
    boxes = COCO | {"annotations": [{"bbox": []}]}
    refused(write_json(tmp_path, boxes), "not a caption of an image. COCO's captions are in")
    data = write_json(tmp_path, [LLAVA])
    refused(data, "--image-folder nowhere is not a folder", images="nowhere")
    for name in ("coco", "coco:all"):
        refused(data, f"format is '{name}', but .* looks like 'llava'", format=name)
    pq.write_table(pa.Table.from_pylist([{"text": "x"}]), tmp_path / "other.parquet")
    refused(tmp_path / "other.parquet", "other.parquet lacks the column.s. images")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 no more")
    refused(tmp_path / "cut.parquet", "cut.parquet is not a readable Parquet file")


def test_invalid_image_bytes_are_an_invalid_record(tmp_path):
    for data, reason in ((b"", "corrupt"), ("aGk=", "malformed")):
        row = {"prompt": "What?", "chosen": "A", "rejected": "B", "images": [{"bytes": data}]}
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "pairs.parquet")
        (bad,) = read_any(str(tmp_path / "pairs.parquet"))
        assert isinstance(bad, InvalidRecord) and bad.reason == reason


def test_a_repeated_key_is_malformed(tmp_path, image_folder):
    """Python's parser would keep the last value. Other records and unused keys are not affected."""
    begin = '{"image": "a.jpg", "question": '
    lines = [begin + '"What?", "chosen": "a b", "rejected": "c", "chosen": "d"}']
    lines += [begin + '[{"role": "user", "content": "Why?", "content": "How?"}]}']
    lines += [begin + '"Who?", "chosen": "a b", "rejected": "c", "more": {"a": 1, "a": 2}}']
    for name, content in (("l.jsonl", "\n".join(lines)), ("l.json", f"[{', '.join(lines)}]")):
        (image_folder / name).write_text(content)
        first, second, third = read_any(str(image_folder / name))
        assert first.detail == "it has the key 'chosen' twice. Keep one of them."
        assert "it has the key 'content' twice" in second.detail
        assert third.chosen == "a b"


def test_a_line_nested_too_deep_is_malformed(tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_text("[" * 200_000 + "\n" + json.dumps(LLAVA) + "\n")
    first, _ = read_any(str(file))
    assert isinstance(first, InvalidRecord) and first.reason == "malformed"
