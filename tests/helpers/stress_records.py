"""Stress test: generated records go through every reader, and no result may be silently wrong.

Each record has at most one fault (`stress_cases`). It is read by `realign.pairs import` or
`read_any`, like in `realign.train --dry-run`, and like in `RDPOTrainer`. A rejection must be a
one-line error that names the record. Valid neighbours in the file must be kept.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from stress_rows import JSON, OTHERS, Case, Truth
from tiny_tokenizers import byte_level
from transformers import LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from realign.config import LossConfig
from realign.data.messages import TAGS
from realign.data.records import Record, read_pairs
from realign.hf.records import records_of
from realign.modeling.encode import encode_records, make_objective
from realign.modeling.layouts import Layout
from realign.pairs.io.importers import import_pairs, read_any

OUTCOMES = (
    "accepted right",
    "refused",
    "good refused",
    "accepted wrong",
    "traceback",
    "record not named",
    "neighbour lost",
    "no end",
)
FAULTS = OUTCOMES[2:]
WHOLE = ("binary text", "UTF-16")  # fault in the encoding of a file
_TYPES = {
    "large strings": pa.large_string(),
    "views": pa.string_view(),
    "binary text": pa.binary(),
    "dictionaries": pa.dictionary(pa.int32(), pa.string()),
}
LONGEST = 1000  # maximum characters of an error message
Reading = tuple[Record | None, str, bool]
"""The record or None, the error about it, and whether its neighbours are there."""
_TEMPLATE = (
    "<s>{% for m in messages %}{{ m['role'].upper() }}: "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}"
    "{{ '</s>' if m['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


class Unrepresentable(Exception):
    """The format cannot represent the row."""


class NoEnd(Exception):
    """A reader did not return."""


def make_processor() -> LlavaProcessor:
    """LLaVA's processor with a byte tokenizer, which decodes ids to any text without loss."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=byte_level(["what is top left one ? yes , no ."], size=280, regex=True),
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=_TEMPLATE,
        num_additional_image_tokens=1,
    )


class Stress:
    """Reads cases and checks the results.

    Args:
        root: an empty folder.
    """

    def __init__(self, root: Path) -> None:
        datasets.disable_progress_bars()
        self.root, self.folder = root, root / "data"
        (self.folder / "photos").mkdir(parents=True)
        os.mkfifo(self.folder / "pipe")  # that nobody writes to
        self.processor = make_processor()
        self.tokenizer = self.processor.tokenizer
        self.image_id = self.tokenizer.convert_tokens_to_ids("<image>")
        self.layout = Layout(image_token_id=self.image_id)
        self.readers: dict[str, Callable[[Case], Reading]] = {
            "pairs": self.by_pairs,
            "sources": self.by_sources,
            "train": self.by_train,
            "hf": self.by_hf,
        }

    def judge(self, case: Case, reader: str) -> tuple[str, str]:
        """The outcome of a case in a reader, and its error message or difference."""
        verdict = case.verdicts[reader]
        try:
            with _time_limit(300), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                record, message, neighbours = self.readers[reader](case)
        except NoEnd:
            return "no end", ""
        except Unrepresentable:
            return "", ""
        except (ValueError, OSError) as error:
            record, message, neighbours = None, str(error), True
            if not self._names(case, message, reader):
                return "record not named", f"{type(error).__name__}: {message[:300]}"
        except Exception as error:
            return "traceback", repr(error)[:300]
        if not neighbours:
            return "neighbour lost", message
        if record is None:
            return "good refused" if verdict == "good" else "refused", message[:300]
        if verdict == "bad":
            return "accepted wrong", "it is bad"
        differs = self._differs(record, case.truth, reader)
        return ("accepted wrong", differs[:300]) if differs else ("accepted right", "")

    def _names(self, case: Case, message: str, reader: str) -> bool:
        """Whether a message is short, and names the record, its row or the faulty file."""
        own = [f"{case.name!r}", "row 1", f"{case.id!r}", "data.jsonl:1", "data.json:1"]
        own.append(".arrow:1")
        others = [f"{row['id']!r}" for row in case.neighbours]
        if case.format in OTHERS and reader != "pairs":
            own += [*others, "row 0"]  # the reader rejects this format
        if case.encoding:
            own += others  # the file is faulty
        named = any(name in message for name in own)
        file = "data." in message and not any(name in message for name in others)
        return len(message) < LONGEST and (named or file)

    def by_pairs(self, case: Case) -> Reading:
        """`python -m realign.pairs import`."""
        output = self.root / "out" / "pairs.parquet"
        output.unlink(missing_ok=True)
        listed = output.with_suffix(".work") / "rejected_records.parquet"
        listed.unlink(missing_ok=True)
        data, single = self._write(case)
        try:
            import_pairs(str(data), str(self.folder), str(output))
            found = read_pairs(output, self.folder)
        except ValueError:
            if not listed.exists():
                raise
            found = []
        bad = [f"record {r['record']!r}: {r['reason']} {r['detail']}" for r in
               pq.read_table(listed).to_pylist()]  # fmt: skip
        return self._among(case, found, bad, single)

    def by_sources(self, case: Case) -> Reading:
        """`python -m realign.pairs --data`."""
        data, single = self._write(case)
        entries = list(read_any(str(data)))
        found = [entry for entry in entries if isinstance(entry, Record)]
        bad = [f"record {e.record!r}: {e.reason} {e.detail}" for e in entries
               if not isinstance(e, Record)]  # fmt: skip
        return self._among(case, found, bad, single)

    def by_train(self, case: Case) -> Reading:
        """`python -m realign.train --dry-run`, without a model."""
        data, single = self._write(case)
        return self._encoded(case, read_pairs(data), single)

    def by_hf(self, case: Case) -> Reading:
        """`RDPOTrainer`, with rows or with a data set."""
        rows: Any = [case.neighbours[0], case.row, case.neighbours[1]]
        if case.number % 2:
            rows = _with_all_keys([self._as_given(row, False) for row in rows])
            with contextlib.suppress(Exception):
                rows = datasets.Dataset.from_list(rows)
        else:
            rows = [self._as_given(row, True) for row in rows]
        return self._encoded(case, records_of(rows), single=False)

    def _encoded(self, case: Case, records: list[Record], single: bool) -> Reading:
        objective = make_objective(LossConfig(), records)
        examples, _ = encode_records(
            records,
            self.processor,
            objective,
            layout=self.layout,
            max_response_tokens=4096,
            max_tokens=8192,
            progress=False,
        )
        place = 0 if single else 1
        if len(records) != (1 if single else 3):
            return None, "", False
        self._example = examples[place]
        return records[place], "", True

    def _as_given(self, value: Any, opened: bool) -> Any:
        """A value for a trainer, with absolute paths or with images opened by Pillow."""
        if isinstance(value, dict):
            return {name: self._as_given(item, opened) for name, item in value.items()}
        if isinstance(value, list):
            return [self._as_given(item, opened) for item in value]
        if isinstance(value, str) and value.endswith(".png") and "/" not in value:
            file = self.folder / value
            with contextlib.suppress(Exception):
                if opened:
                    return Image.open(io.BytesIO(file.read_bytes()))
            return str(file)
        if isinstance(value, str) and value in ("photos", "pipe"):
            return str(self.folder / value)
        return value

    def _among(self, case: Case, found: list[Record], bad: list[str], single: bool) -> Reading:
        """Finds the record among those of a file, by the words of its prompt or by its name."""
        others = [n["id"] for n in case.neighbours]
        kept = [record for record in found if record.name in others]
        rest = [record for record in found if record.name not in others]
        if case.id in others:  # only one of both has this name
            kept, rest = found[:1] + found[2:], found[1:2]
        there = single or len(kept) == len(others) or case.encoding in WHOLE
        if rest:
            return (rest[0], "", there and len(rest) == 1)
        line = next((line for line in bad if self._names(case, line, "pairs")), None)
        if line is None and there:
            raise ValueError(f"nothing names it: {bad}")
        return None, line or "", there

    def _write(self, case: Case) -> tuple[Path, bool]:
        """Writes the file of a case. Returns its path, and whether it holds only this case."""
        rows = [case.neighbours[0], case.row, case.neighbours[1]]
        if case.format in (*JSON, "folder"):
            lines = case.format == "folder"
            data = self.folder / f"data.json{'l' * lines}"
            try:
                texts = [json.dumps(row) for row in rows]
            except TypeError:
                raise Unrepresentable from None
            data.write_bytes(_encoded(texts, case.encoding, lines))
            return data, case.encoding in ("UTF-16", "Latin-1", "cut", "deep") and not lines
        if case.encoding == "JSON":
            data = self.folder / "data.parquet"
            data.write_text('[{"id": "data."}]')
            return data, True
        rows = _with_all_keys(rows)
        for some in (rows, rows[1:2]):
            try:
                return self._table(case, some), len(some) == 1
            except Exception:  # Arrow raises errors of many types
                continue
        raise Unrepresentable

    def _table(self, case: Case, rows: list[dict[str, Any]]) -> Path:
        table = pa.Table.from_pylist(rows)
        if len(rows) > 1 and _given(table.slice(0, 1).to_pylist()[0]) != _given(rows[0]):
            raise Unrepresentable  # Arrow converted a neighbour's text to bytes
        if case.format == "datasets":
            data = self.folder / "data.saved"
            datasets.Dataset.from_list(rows).save_to_disk(data)
            return data
        name = "prompt" if "prompt" in rows[0] else "id"
        if case.encoding in _TYPES and pa.types.is_string(table[name].type):
            column = table[name].cast(_TYPES[case.encoding])
            table = table.set_column(table.column_names.index(name), name, column)
        if case.encoding == "two columns":
            table = table.append_column(name, table[name])
        data = self.folder / "data.parquet"
        pq.write_table(table, data)
        if case.encoding in ("cut", "no bytes"):
            whole = data.read_bytes()
            data.write_bytes(whole[: len(whole) // 2 * (case.encoding == "cut")])
        return data

    # Checks of the results.

    def _differs(self, record: Record, truth: Truth, reader: str) -> str:
        """Description of the first difference from the truth, or ""."""
        messages = [(m["role"], _words(_text(m["content"]))) for m in record.prompt]
        true = [(role, _words(text)) for role, text in truth.prompt]
        if reader in ("pairs", "sources") and messages != true:
            return f"prompt {messages!r} is not {true!r}"
        for name in ("chosen", "rejected"):
            if getattr(record, name).strip() != getattr(truth, name).strip():
                return f"{name} {getattr(record, name)[:99]!r} is not {getattr(truth, name)[:99]!r}"
        for group, wanted in (("images", truth.images), ("retrieved_images", truth.retrieved)):
            stored = getattr(record, group)
            if len(stored) != len(wanted):
                return f"{len(stored)} {group}, not {len(wanted)}"
            for image, expected in zip(stored, wanted, strict=True):
                if reader == "sources":
                    continue  # later stages decode it
                shown = np.asarray(image.open(record.name)).astype(int)
                if expected.pixels is None or shown.shape != expected.pixels.shape:
                    return f"{group} has the shape {shown.shape}"
                if (far := abs(shown - expected.pixels).max()) > expected.tolerance:
                    return f"{group} is off by {far}"
        return self._ids_differ(truth) if reader in ("train", "hf") else ""

    def _ids_differ(self, truth: Truth) -> str:
        roots, leaves = self._example.roots, self._example.leaves
        opening = "".join(f"{role.upper()}: {text}\n" for role, text in truth.prompt)
        for root in roots:
            ids = [i for i in root.ids.tolist() if i != self.image_id]
            text = self.tokenizer.decode(ids).replace("<s>", "").replace("</s>", "\n")
            if _words(text) != _words(f"{opening}ASSISTANT: "):
                return f"prompt {text[:300]!r}"
            if TAGS.search(text):
                return f"an image tag is text: {text[:300]!r}"
        for leaf, wanted in zip(leaves, (truth.chosen, truth.rejected, truth.chosen), strict=True):
            text = self.tokenizer.decode(leaf.ids)
            if text.removesuffix("</s>").strip() != wanted.strip() or text.count("</s>") != 1:
                return f"response {text[:200]!r} is not {wanted[:200]!r}"
        return ""


def _encoded(texts: list[str], encoding: str, lines: bool) -> bytes:
    """JSON rows as the bytes of a file, with the fault of its encoding."""
    if encoding == "deep":
        texts[1] = '{"id": ' + "[" * 100_000 + "]" * 100_000 + "}"
    if encoding == "cut":
        texts = [*texts[:1], texts[1][: len(texts[1]) // 2], *(texts[2:] if lines else [])]
    if encoding == "a number for a line":
        texts[1] = "7"
    end = "\r\n" if encoding == "carriage returns" else "\n"
    text = end.join(texts) if lines else f"[{', '.join(texts)}" + "]" * (encoding != "cut")
    if encoding == "Latin-1":
        return text.replace("\\u00e9", "\u00e9").encode("latin-1")
    kinds = {"UTF-16": "utf-16", "byte order mark": "utf-8-sig"}
    return text.encode(kinds.get(encoding, "utf-8"))


def _with_all_keys(rows: list[Any]) -> list[Any]:
    """Rows with the keys of all rows. Arrow and `datasets` use the columns of the first row."""
    if not all(isinstance(row, dict) for row in rows):
        return rows
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def _given(value: Any) -> Any:
    """A value without the nulls that Arrow adds for missing keys."""
    if isinstance(value, dict):
        return {name: _given(v) for name, v in value.items() if v is not None}
    return [_given(item) for item in value] if isinstance(value, list) else value


def _text(content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part["type"] == "text")


def _words(text: str) -> str:
    return " ".join(text.split())


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(*_) -> None:
        raise NoEnd

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
