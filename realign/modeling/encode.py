"""Encoding of records: token ids and forest of every record, checked before training.

Texts, counts, headers of images and lengths of all records are checked before the first step.
Pixels are decoded later, by workers. The encoded records of a file are kept beside its table, so
the next run reads them in milliseconds. The ranks of a machine encode in shares.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import tokenizers
import transformers

from realign import distributed
from realign.config import LossConfig
from realign.data.errors import Malformed, RecordError, short_error
from realign.data.ranks import raise_anywhere
from realign.data.record_table import ImageFacts, RecordTable, Row, table_of
from realign.data.records import Record
from realign.files import open_regular, replacing
from realign.modeling.chat import (
    BatchTokenizer,
    ChatTemplate,
    Prompt,
    chat_prompt,
    text_inputs,
    tokens_behind,
)
from realign.modeling.examples import (
    BLANK,
    COLUMNS,
    SCHEMA,
    Chunk,
    Example,
    Examples,
    Leaf,
    Root,
    UsedImage,
    encoded_row,
)
from realign.modeling.images import ImageStore, blank_key, image_key
from realign.modeling.layouts import Layout
from realign.modeling.prompt_ids import Key, PromptIds, check_prompt_ids
from realign.progress import Progress
from realign_kernels import Objective, objectives

_VERSION = 2
"""Version of the encoding; changed when the same record would be encoded differently."""
_KNOWN_CODE = ("transformers.", "realign.")
"""Modules whose code has a version in the digest of the settings."""
_CHUNK = 1024
"""Records of a file. A killed run loses at most one file for each rank."""


def make_objective(loss: LossConfig, table: RecordTable) -> Objective:
    """The objective of a loss; its setting `negatives` is counted in the records.

    Raises:
        RecordError: when the objective takes several visual negatives, and a record has fewer than
            two or a different number than the first record.
    """
    several = "negatives" in objectives.settings(loss.text_objective)
    return loss.build(_visual_negatives(loss.objective, table) if several else None)


def _visual_negatives(name: str, table: RecordTable) -> int:
    """Number of visual negatives per record."""
    rows = np.flatnonzero(table.counts("images")).tolist()
    if not len(rows):
        return 2  # encoding names the records without an image
    counts = table.counts("retrieved_images")[rows] // table.counts("images")[rows]
    for place in np.flatnonzero((counts < 2) | (counts != counts[0]))[:1]:
        if counts[place] < 2:
            raise RecordError(
                table.name(rows[place]),
                f"it has {counts[place]} visual negative(s); the objective {name!r} compares "
                "several.",
                "List two or more in `retrieved_images`, nearest first (python -m realign.pairs "
                "writes one), or train with --objective mdpo.",
            )
        raise RecordError(
            table.name(rows[place]),
            f"it has {counts[place]} visual negatives and {table.name(rows[0])!r} has {counts[0]}; "
            f"the objective {name!r} needs the same number in all records.",
            "Give every record the same number of `retrieved_images`.",
        )
    return int(counts[0])


def encode_records(
    records: Iterable[Record],
    processor,
    objective: Objective,
    *,
    layout: Layout,
    max_response_tokens: int,
    max_tokens: int,
    progress: bool = True,
    on_bad: Callable[[Record, RecordError], None] | None = None,
) -> tuple[Examples, ImageStore]:
    """Encode records of a program, and decode all their images.

    Args:
        records: preference records.
        processor: the model's processor; it must have a chat template.
        objective: defines the (response, image) leaves of an example.
        layout: layout of the model.
        max_response_tokens: see `encode_table`.
        max_tokens: see `encode_table`.
        progress: whether to show a progress bar.
        on_bad: called with each unusable record and its error. The record is then skipped.

    Returns:
        One example per record, and the store of their distinct images.

    Raises:
        RecordError: without `on_bad`, for the first unusable record.
    """
    bad: dict[int, RecordError] = {}
    records = list(records)
    at = iter(enumerate(records))  # records are excluded in order, and one may be listed twice

    def exclude(record: Record, error: RecordError) -> None:
        bad[next(place for place, one in at if one is record)] = error

    table = table_of(records, exclude)
    kept = [place for place in range(len(records)) if place not in bad]
    encoder = _Encoder(processor, layout, objective, max_response_tokens, max_tokens)
    encoded = encoder.encode(table[:])
    bad |= {kept[i]: one for i, one in enumerate(encoded) if isinstance(one, RecordError)}
    examples = _in_memory(table, encoded, objective, layout)
    store = ImageStore(processor, layout, examples)
    rows = [row for row, one in enumerate(encoded) if not isinstance(one, RecordError)]
    with Progress("checking records", "records", len(rows), quiet=not progress) as bar:
        for row in rows:
            one = encoded[row]
            assert not isinstance(one, RecordError)
            example = one[0]
            try:
                for key in dict.fromkeys(key for root in example.roots for key in root.images):
                    store.bundle(key)
            except RecordError as error:
                # A record is named in its own error, also if it shares the image.
                problem = str(error).partition(": ")[2]
                bad[kept[row]] = RecordError(records[kept[row]].name, problem, "")
                encoded[row] = error
            bar.update()
    for place in sorted(bad):
        if on_bad is None:
            raise bad[place]
        on_bad(records[place], bad[place])
    if len(bad) > len(records) - len(rows):
        examples = _in_memory(table, encoded, objective, layout)
        store = ImageStore(processor, layout, examples).with_images_of(store)
    return examples, store


def encode_table(
    table: RecordTable,
    processor,
    objective: Objective,
    *,
    layout: Layout,
    max_response_tokens: int,
    max_tokens: int,
    progress: bool = True,
    log: Callable[[str], None] = distributed.log_rank0,
) -> Examples:
    """Tokenize the records of a table into forests of `objective`'s leaves.

    Records without an image are skipped if the objective or the processor needs one. With a process
    group, every rank calls it. The ranks of a machine share the work.

    Args:
        table: preference records.
        processor: the model's processor; it must have a chat template.
        objective: defines the (response, image) leaves of an example.
        layout: layout of the model.
        max_response_tokens: maximum number of tokens in a response. A longer one is an error, and
            is never cut.
        max_tokens: maximum number of tokens in prompt and response together. More is an error,
            since cutting a prompt could cut image tokens.
        progress: whether to show a progress bar.
        log: receives a line with the number of records without an image.

    Returns:
        One example per record. Their images are not decoded.

    Raises:
        RecordError: on all ranks, for an unusable record. The message counts the others. Also if
            all records are skipped.
        OSError: when the encoded records cannot be written.
    """
    settings = _settings(processor, objective, layout, max_response_tokens, max_tokens)
    folder = table.beside(settings) if settings else None
    encoder = _Encoder(processor, layout, objective, max_response_tokens, max_tokens)
    share, ranks = (0, 1) if folder is None else distributed.local_share()
    kept = _trained(table, objective, processor, log)
    parts = [kept[start : start + _CHUNK] for start in range(0, len(kept), _CHUNK)]
    numbers = range(len(parts))
    batches: dict[int, pa.RecordBatch] = {}
    errors: list[Exception] = []
    try:
        if folder is not None:
            _made(folder)
        absent = [n for n in numbers[share::ranks] if folder is None or not _chunk(folder, n)]
        total = sum(len(parts[n]) for n in absent)
        with Progress("checking records", "records", total, quiet=not (progress and total)) as bar:
            for number in absent:
                first, part = int(parts[number][0]), parts[number]
                span = table[first : int(part[-1]) + 1]
                rows = [span[row - first] for row in part]
                encoded = encoder.encode(rows)
                bad = [one for one in encoded if isinstance(one, RecordError)]
                errors += bad
                if not bad:
                    batches[number] = _batch(encoded, layout)
                    if folder is not None:
                        _write_chunk(folder, number, batches.pop(number))
                bar.update(len(rows))
    except (ValueError, OSError) as error:
        errors.append(error)
    raise_anywhere(errors)
    if folder is not None:
        batches = {number: _chunk(folder, number) for number in numbers}
        if not all(batches.values()):
            raise OSError(f"{folder} was changed by another process. Start the run again.")
    chunks = [Chunk(batches[n], table, parts[n]) for n in numbers]
    return Examples(chunks, objective, layout.image_token_id)


def _trained(
    table: RecordTable, objective: Objective, processor, log: Callable[[str], None]
) -> np.ndarray:
    """Indices of the records that an objective is trained on, (records,) int64.

    Raises:
        RecordError: when none has an image, and one is needed.
    """
    images = table.counts("images")
    without, kept = int((images == 0).sum()), np.arange(len(table))
    if not without:
        return kept
    count = f"{without:,} of {len(table):,} records"
    if not (reason := _needs_images(objective, processor)):
        log(f"{count} have no image, and are trained as text")
        return kept
    if without == len(table):
        raise RecordError(
            table.name(0),
            f"it has no image, and neither has any other of {len(table):,} records. {reason}",
            "Add images to `images`.",
        )
    log(f"skipped {count}, which have no image. {reason}")
    return np.flatnonzero(images)


def _needs_images(objective: Objective, processor) -> str:
    """The reason why each record needs an image; empty if none does."""
    if any(leaf.image != "image" for leaf in objective.leaves):
        return (
            f"The objective {objective.name!r} compares images. Objectives without a visual term, "
            "such as dpo, take these records too."
        )
    try:
        processor(return_tensors="pt", **text_inputs(processor, ["a"]))
    except Exception as error:  # processors raise errors of various types
        return (
            f"{type(processor).__name__} takes no prompt without an image ({short_error(error)})."
        )
    return ""


def check_prompt(processor, record: Record, images: int) -> str:
    """Render a record's prompt for `images` images.

    Raises:
        RecordError: when the prompt cannot be rendered, or does not place every image.
    """
    try:
        return chat_prompt(processor, record.prompt, images)[0]
    except Malformed as error:
        raise error.of(record.name) from error


class _Texts(NamedTuple):
    """Texts of a record, before they are tokenized."""

    prompt: Prompt
    scored: dict[str, str]  # response -> scored text
    roots: list[tuple[Key, list[tuple[int, int, ImageFacts]]]]


Encoded = tuple[Example, list[UsedImage]]


class _Encoder:
    def __init__(
        self,
        processor,
        layout: Layout,
        objective: Objective,
        max_response_tokens: int,
        max_tokens: int,
    ) -> None:
        self.processor, self.layout, self.objective = processor, layout, objective
        self.tokenizer = BatchTokenizer(processor.tokenizer)
        self.template = ChatTemplate(processor, layout.ends)
        self.prompts = PromptIds(processor, layout, distributed.log_rank0)
        self.image_ids = {layout.image_token_id}
        self.image_ids.add(self.tokenizer.convert_tokens_to_ids(processor.image_token))
        self.max_response_tokens = max_response_tokens
        self.max_tokens = max_tokens
        self.images = list(dict.fromkeys(leaf.image for leaf in objective.leaves))

    def encode(self, rows: Sequence[Row]) -> list[Encoded | RecordError]:
        """Encode records together, since tokenizers are faster on many texts."""
        texts = [_of_record(row.name, self._texts, row) for row in rows]
        self.prompts.tokenize()
        joint: list[str] = []
        for one in texts:
            if isinstance(one, _Texts):
                text = one.prompt.text
                joint += [text, *(text + scored for scored in one.scored.values())]
        self.tokenizer.prepare(joint)
        encoded = [
            one if isinstance(one, RecordError) else _of_record(row.name, self._example, row, one)
            for row, one in zip(rows, texts, strict=True)
        ]
        self.prompts.clear()
        return encoded

    def _texts(self, record: Row) -> _Texts:
        name = self.objective.name
        prompt = None
        scored: dict[str, str] = {}
        roots: dict[str, tuple[Key, list[tuple[int, int, ImageFacts]]]] = {}
        for leaf in self.objective.leaves:
            text = self._text(record, leaf.response, name)
            if prompt is None:
                prompt = self.template.prompt(record.prompt, len(record.images))
            if leaf.image not in roots:
                images = self._images(record, leaf.image, name)
                key = self.prompts.write(record.name, prompt.text, [facts for *_, facts in images])
                roots[leaf.image] = key, images
            if leaf.response not in scored:
                scored[leaf.response] = self.template.scored(
                    prompt, text, f"{leaf.response} response"
                )
        assert prompt is not None
        return _Texts(prompt, scored, [roots[image] for image in self.images])

    def _example(self, record: Row, texts: _Texts) -> Encoded:
        used: dict[bytes, UsedImage] = {}
        roots = [self._root(record, key, images, used) for key, images in texts.roots]
        ids_of = {name: self._response(texts, name) for name in texts.scored}
        leaves: list[Leaf] = []
        for leaf in self.objective.leaves:
            root, ids = self.images.index(leaf.image), ids_of[leaf.response]
            if len(roots[root].ids) + len(ids) > self.max_tokens:
                raise Malformed(
                    f"prompt and {leaf.response} response have {len(roots[root].ids) + len(ids)} "
                    f"tokens, and the model takes {self.max_tokens}.",
                    "Shorten the text. It is not cut, since that could cut image tokens.",
                )
            leaves.append(Leaf(root, ids, leaf.rival))
        return Example(record.name, tuple(roots), tuple(leaves)), list(used.values())

    def _root(
        self,
        record: Row,
        key: Key,
        images: Sequence[tuple[int, int, ImageFacts]],
        used: dict[bytes, UsedImage],
    ) -> Root:
        ids, columns = self.prompts.tokens(record.name, key)
        several = self.prompts.several(len(images))
        keys, expected = [], 0
        for column, place, facts in images:
            size = self.prompts.size(record.name, facts, several)
            digest = (blank_key if COLUMNS[column] == BLANK else image_key)(facts, several)
            used.setdefault(
                digest, UsedImage(digest, column, place, several, size.tokens, size.grids)
            )
            keys.append(digest.hex())
            expected += size.tokens
        tokens = int((ids == self.layout.image_token_id).sum())
        check_prompt_ids(self.tokenizer, ids, self.processor.image_token, tokens, expected)
        return Root(tuple(keys), ids, columns)

    def _response(self, texts: _Texts, name: str) -> np.ndarray:
        """Token ids of a response with the end of its turn."""
        scored = texts.scored[name]
        encoding, first, _ = tokens_behind(self.tokenizer, texts.prompt.text, scored)
        ids = encoding["input_ids"][first:]
        if self.image_ids & set(ids):
            raise Malformed(
                f"its {name} response contains an image token.",
                "Remove it from the text.",
            )
        if len(ids) > self.max_response_tokens:
            raise Malformed(
                f"its {name} response has {len(ids)} tokens; the limit is "
                f"{self.max_response_tokens}.",
                "Raise --max-response-tokens or shorten the response. Responses are never cut.",
            )
        return np.array(ids)

    def _text(self, record: Row, response: str, objective: str) -> str:
        texts = {
            "chosen": record.chosen,
            "rejected": record.rejected,
            "retrieved_chosen": record.retrieved_chosen,
        }
        if response not in texts:
            raise Malformed(
                f"the objective {objective!r} needs a {response!r} response.",
                f"Records hold {', '.join(texts)}. Choose an objective over these responses.",
            )
        if not texts[response]:
            raise Malformed(
                f"the objective {objective!r} needs {response!r} but the record has none.",
                f"Add a column `{response}`, the response preferred for the retrieved image, or "
                "train with --objective mdpo. If the rejected response describes that image "
                "correctly, use it.",
            )
        return texts[response]

    def _images(self, record: Row, image: str, objective: str) -> list[tuple[int, int, ImageFacts]]:
        """Column, place and facts for each image of the prompt, for a leaf's image name."""
        count, retrieved = len(record.images), len(record.retrieved_images)
        if image == "image":
            return [(0, place, facts) for place, facts in enumerate(record.images)]
        if not count:
            raise Malformed(
                f"it has no image, and the objective {objective!r} compares images.",
                "Add one to `images`, or train with --objective dpo.",
            )
        if image == BLANK:  # the same size gives it the same number of image tokens
            return [(2, place, facts) for place, facts in enumerate(record.images)]
        if not (numbered := re.fullmatch(r"retrieved_image(?:_([2-9]|[1-9]\d+))?", image)):
            raise Malformed(
                f"the objective {objective!r} needs an image {image!r}.",
                "Records hold image, retrieved_image, retrieved_image_2, ..., and blank_image is "
                "generated. Choose an objective over these images.",
            )
        if retrieved % count:
            raise Malformed(
                f"it has {retrieved} retrieved images for {count} images.",
                "For each visual negative give as many images as the prompt has.",
            )
        place = int(numbered[1] or 1)
        if retrieved < place * count:
            available = "none" if retrieved == 0 else f"{retrieved // count} retrieved image(s)"
            raise Malformed(
                f"the objective {objective!r} needs {image!r} but the record has {available}.",
                "Add `retrieved_images` (python -m realign.pairs writes them) or train with "
                "--objective dpo.",
            )
        first = (place - 1) * count
        return [(1, i, record.retrieved_images[i]) for i in range(first, first + count)]


def _of_record(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function, or its error with the name of the record."""
    try:
        return function(*arguments)
    except Malformed as error:
        return error.of(name)
    except RecordError as error:
        return error


def _batch(encoded: Sequence[Any], layout: Layout) -> pa.RecordBatch:
    rows = [
        encoded_row(one[0], one[1], layout.image_token_id)
        for one in encoded
        if not isinstance(one, RecordError)
    ]
    return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


def _in_memory(
    table: RecordTable, encoded: Sequence[Any], objective: Objective, layout: Layout
) -> Examples:
    """The usable examples of a whole table."""
    rows = [row for row, one in enumerate(encoded) if not isinstance(one, RecordError)]
    chunk = Chunk(_batch(encoded, layout), table, rows)
    return Examples([chunk], objective, layout.image_token_id)


def _made(folder: Path) -> None:
    with _write_errors(folder):
        folder.mkdir(exist_ok=True)


def _write_chunk(folder: Path, number: int, batch: pa.RecordBatch) -> None:
    with (
        _write_errors(folder),
        replacing(folder / f"{number:06}.arrow") as file,
        pa.ipc.new_stream(file, SCHEMA) as writer,
    ):
        writer.write_batch(batch)


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"the encoded records cannot be written to {folder} ({error}). Free some space, or set "
            "$REALIGN_CACHE to another folder."
        ) from error


def _chunk(folder: Path, number: int) -> Any:
    """The encoded records in a file, or None if there is none that this user wrote."""
    path = folder / f"{number:06}.arrow"
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_uid != os.getuid():
                return None
        with pa.ipc.open_stream(pa.memory_map(str(path))) as stream:
            return stream.read_next_batch() if stream.schema == SCHEMA else None
    except (FileNotFoundError, StopIteration, pa.ArrowException):
        return None


def _settings(
    processor, objective: Objective, layout: Layout, max_response_tokens: int, max_tokens: int
) -> str | None:
    """Digest of everything besides the records that their encoding depends on.

    None for a tokenizer in Python or a class of the user, which cannot be digested.
    """
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    modules = [type(one).__module__ for one in (processor, tokenizer, processor.image_processor)]
    if backend is None or not all(name.startswith(_KNOWN_CODE) for name in modules):
        return None
    templates = [getattr(owner, "chat_template", None) for owner in (processor, tokenizer)]
    plain = (str, int, float, bool, list, tuple, dict, type(None))
    own = {name: value for name, value in vars(processor).items() if isinstance(value, plain)}
    parts = [
        _VERSION,
        transformers.__version__,
        tokenizers.__version__,
        type(processor).__qualname__,
        type(tokenizer).__qualname__,
        backend.to_str(),
        tokenizer.special_tokens_map,
        templates,
        date.today().isoformat() if "strftime_now" in str(templates) else "",
        own,
        processor.image_processor.to_dict(),
        [tuple(leaf) for leaf in objective.leaves],
        layout.image_token_id,
        layout.grids,
        sorted(layout.tower_inputs),
        layout.ends,
        max_response_tokens,
        max_tokens,
    ]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
