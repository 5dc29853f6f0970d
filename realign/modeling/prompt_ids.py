"""Token ids of prompts with images, without preprocessing the images.

A processor writes image tokens into a prompt by the sizes of its images. Preprocessing takes 14 ms
for an image of LLaVA-1.5 and 36 ms for one of Qwen2-VL (one slow core). So each size is
preprocessed once, as a blank image. The processor's own code then writes the text of every prompt,
with the stored result in place of its image processor. It is stopped before it tokenizes. The texts
of many prompts are tokenized together, with one image token for each run of them.

Most processors replace each image token by a text that depends on the size only. For them, the
text is put into later prompts without a call of the processor, which takes 0.6 ms.

The first prompts are also made by the unchanged processor. If any token differs, all prompts are.

Some processors return further integers for each token, such as its modality. These *token columns*
are learned from prompts that the processor made: a value for each special token, and one for all
others. If a column is not of that kind, the processor makes all prompts.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from realign.data.errors import Malformed
from realign.data.record_table import ImageFacts
from realign.modeling.chat import TextInputs
from realign.modeling.examples import expand
from realign.modeling.images import SizeFacts, columns_of, cuts_tiles, given, preprocess, processed
from realign.modeling.layouts import Layout

_CHECKED = 4
"""Prompts with each number of images that the unchanged processor makes too."""

Size = tuple[int, int]  # width, height
Key = tuple[str, tuple[Size, ...]]  # text of a prompt, and sizes of its images


class Tokens(NamedTuple):
    """The tokens of a prompt.

    Attributes:
        ids: (P,) int64, with image tokens.
        columns: further integers of each token by name, (P,) int64 each.
    """

    ids: np.ndarray
    columns: dict[str, np.ndarray]


class PromptIds:
    """Token ids of rendered prompts, for images that are known by their sizes.

    Args:
        processor: a Hugging Face processor.
        layout: layout of the processor's model.
        log: receives a line if prompts are made one by one.
    """

    def __init__(self, processor, layout: Layout, log: Callable[[str], None]) -> None:
        self._processor, self._layout, self._log = processor, layout, log
        self._tokenizer = processor.tokenizer
        self._inputs = TextInputs(processor)
        self._cuts_tiles = cuts_tiles(processor)
        self._sizes: dict[tuple[Size, bool], SizeFacts] = {}
        self._stored = copy.copy(processor)
        self._stored.image_processor = _StoredResults(processor.image_processor)
        self._writer = copy.copy(self._stored)
        self._writer.tokenizer = _Stopping(self._tokenizer)
        token = self._tokenizer.convert_ids_to_tokens(layout.image_token_id)
        self._run = re.compile(f"(?:{re.escape(token)})+") if token else None
        self._token = token or ""
        # Number of images -> prompts that were compared.
        self._checked: dict[int, int] = {}

        self._replacements: dict[tuple[Size, bool], str | None] = {}
        # Whether all written prompts had these texts in place of image tokens.
        self._replaces = True
        self._seen: set[tuple[Size, ...]] = set()
        self._texts: dict[Key, tuple[str, bool] | None] = {}
        self._ids: dict[Key, Tokens] = {}
        self._columns = _ColumnTable(self._tokenizer, layout)

    def size(self, record: str, image: ImageFacts, several: bool) -> SizeFacts:
        """Facts of all images of a size.

        Raises:
            RecordError: when the processor rejects the size.
        """
        key = (image.width, image.height), several and self._cuts_tiles
        if key not in self._sizes:
            blank = Image.new("RGB", key[0])
            # The result is stored, since the prompts need it as well.
            self._sizes[key] = preprocess(self._stored, self._layout, record, blank, key[1])[1]
        return self._sizes[key]

    def several(self, count: int) -> bool:
        """Whether an image is processed as one of several, in a prompt with `count` images."""
        return count > 1 and self._cuts_tiles

    def write(self, record: str, text: str, images: Sequence[ImageFacts]) -> Key:
        """Write a prompt with its image tokens. Its ids are known after `tokenize`.

        Raises:
            RecordError: when the processor raises any error.
        """
        key = text, tuple((image.width, image.height) for image in images)
        if key not in self._texts:
            self._texts[key] = self._written(key)
            if self._texts[key] is None:
                self._ids[key] = self._by_processor(record, key, self._stored)
            elif self._checked.setdefault(len(images), 0) < _CHECKED:
                self._checked[len(images)] += 1
                self._check(record, key)
        return key

    def tokenize(self) -> None:
        """Tokenize all prompts that were written."""
        written = [
            (key, text) for key, text in self._texts.items() if text and key not in self._ids
        ]
        for special in (True, False):
            group = [(key, text) for key, (text, adds) in written if adds == special]
            if group:
                texts = [self._collapsed(text) for _, text in group]
                try:
                    encoded = self._tokenizer(texts, add_special_tokens=special)["input_ids"]
                except Exception:  # such as a lone surrogate, of one prompt
                    continue
                for (key, text), ids in zip(group, encoded, strict=True):
                    expanded = self._expanded(text, np.array(ids))
                    columns = None if expanded is None else self._columns.of(expanded)
                    if expanded is not None and columns is not None:
                        self._ids[key] = Tokens(expanded, columns)

    def tokens(self, record: str, key: Key) -> Tokens:
        """The tokens of a prompt.

        Raises:
            RecordError: when the processor raises any error.
        """
        if key not in self._ids:
            self._ids[key] = self._by_processor(record, key, self._stored)
        return self._ids[key]

    def clear(self) -> None:
        """Forget the prompts."""
        self._texts.clear()
        self._ids.clear()

    def _written(self, key: Key) -> tuple[str, bool] | None:
        """Text of the processor, and whether special tokens are added. None if it has to run."""
        if self._run is None:
            return None
        text, sizes = key
        replaced = self._replaced(key) if self._replaces else None
        if sizes in self._seen and replaced and self._checked.get(len(sizes)) == _CHECKED:
            return replaced
        written = self._write(text, sizes)
        self._seen.add(sizes)
        self._replaces = self._replaces and written == replaced
        return written

    def _replaced(self, key: Key) -> tuple[str, bool] | None:
        """The prompt with each image token replaced by its text for the image's size."""
        text, sizes = key
        token, several = self._processor.image_token, self.several(len(sizes))
        for size in sizes:
            if (size, several) not in self._replacements:
                count = 1 + several
                single = self._write(token * count, (size,) * count)
                part = single[0][: len(single[0]) // count] if single else None
                same = single is not None and part is not None and part * count == single[0]
                self._replacements[size, several] = part if same else None
        inputs = self._inputs([text])
        pieces = inputs["text"][0].split(token)
        texts = [self._replacements[size, several] for size in sizes]
        if None in texts or len(pieces) != len(sizes) + 1:
            return None
        joined = pieces[0] + "".join(
            f"{t}{piece}" for t, piece in zip(texts, pieces[1:], strict=True)
        )
        return joined, inputs["add_special_tokens"]

    def _write(self, text: str, sizes: tuple[Size, ...]) -> tuple[str, bool] | None:
        """Text that the processor gives to its tokenizer. None if it does not."""
        blanks = [Image.new("RGB", size) for size in sizes]
        inputs = self._inputs([text])
        try:
            self._writer(**given(blanks), return_tensors="pt", **inputs)
        except _Stopped as stopped:
            texts = stopped.texts
            if isinstance(texts, list | tuple) and len(texts) == 1 and isinstance(texts[0], str):
                return texts[0], bool(stopped.options.get("add_special_tokens", True))
        except Exception:  # the unchanged processor will raise it again, with the record's name
            pass
        return None

    def _by_processor(self, record: str, key: Key, processor) -> Tokens:
        text, sizes = key
        blanks = [Image.new("RGB", size) for size in sizes]
        outputs = processed(processor, record, blanks, **self._inputs([text]))
        columns = columns_of(outputs, self._layout)
        tokens = Tokens(
            outputs["input_ids"][0].numpy(),
            {name: column[0].long().numpy() for name, column in columns.items()},
        )
        self._columns.learn(tokens)
        return tokens

    def _check(self, record: str, key: Key) -> None:
        """Compare a prompt with that of the unchanged processor."""
        expected = self._by_processor(record, key, self._processor)
        self.tokenize()
        if not _equal(self._ids.get(key), expected):
            self._run = None
            self._texts = dict.fromkeys(self._texts)
            self._log("prompts are made one by one: the processor changes them as it tokenizes")
            stored = self._by_processor(record, key, self._stored)
            if not _equal(stored, expected):  # it reads pixels
                self._stored = self._processor
            for known in self._texts:
                self._ids[known] = self._by_processor(record, known, self._stored)

    def _collapsed(self, text: str) -> str:
        assert self._run is not None
        return self._run.sub(self._token.replace("\\", r"\\"), text)

    def _expanded(self, text: str, ids: np.ndarray) -> np.ndarray | None:
        """Token ids with the runs of image tokens of a text. None if their numbers differ."""
        assert self._run is not None
        runs = [len(run) // len(self._token) for run in self._run.findall(text)]
        if int((ids == self._layout.image_token_id).sum()) != len(runs):
            return None
        return expand(ids, np.array(runs, np.int64), self._layout.image_token_id)


def _equal(found: Tokens | None, expected: Tokens) -> bool:
    """Whether two prompts have the same tokens."""
    return (
        found is not None
        and np.array_equal(found.ids, expected.ids)
        and found.columns.keys() == expected.columns.keys()
        and all(np.array_equal(found.columns[n], c) for n, c in expected.columns.items())
    )


class _ColumnTable:
    """Token columns as functions of token ids, learned from prompts of the processor."""

    def __init__(self, tokenizer: Any, layout: Layout) -> None:
        special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}
        self._special = np.array(sorted(special | {layout.image_token_id}), np.int64)
        self._names: frozenset[str] | None = None
        # (name, id of a special token, or -1 for all other tokens) -> value
        self._values: dict[tuple[str, int], int] = {}
        self._is_function = True

    def learn(self, tokens: Tokens) -> None:
        """Learn the values of the tokens of a prompt."""
        names = frozenset(tokens.columns)
        self._is_function &= self._names in (None, names)
        self._names = names
        kinds = np.where(np.isin(tokens.ids, self._special), tokens.ids, -1)
        for name, column in tokens.columns.items():
            for kind, value in np.unique(np.stack([kinds, column]), axis=1).T.tolist():
                self._is_function &= self._values.setdefault((name, kind), value) == value

    def of(self, ids: np.ndarray) -> dict[str, np.ndarray] | None:
        """The columns of tokens, (P,) int64 each. None if the processor has to make them."""
        if self._names is None or not self._is_function:
            return None
        if not self._names:
            return {}
        kinds, places = np.unique(
            np.where(np.isin(ids, self._special), ids, -1), return_inverse=True
        )
        try:
            return {
                name: np.array([self._values[name, kind] for kind in kinds.tolist()])[places]
                for name in sorted(self._names)
            }
        except KeyError:
            return None


def check_prompt_ids(
    tokenizer, ids: np.ndarray, image_token: str, tokens: int, expected: int
) -> None:
    """Check the start token and the number of image tokens of a prompt.

    Raises:
        Malformed: for two start tokens, or another number than its images have.
    """
    start = np.flatnonzero(ids == tokenizer.bos_token_id)[:1]
    if start.size and (ids[start[0] + 1 :][:1] == ids[start]).any():
        raise Malformed(
            f"its prompt begins with {tokenizer.bos_token!r} twice.",
            "Remove one from the chat template.",
        )
    if tokens != expected:
        raise Malformed(
            f"its prompt has {tokens} image tokens, and its images have {expected}.",
            f"Remove {image_token!r} from the text.",
        )


class _Stopped(Exception):
    """A tokenizer was called."""

    def __init__(self, texts: Any, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.texts, self.options = texts, options


class _Stopping:
    """A tokenizer whose call raises `_Stopped` with its arguments."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: Any = None, *_: Any, **options: Any) -> Any:
        raise _Stopped(text, options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


class _StoredResults:
    """An image processor that computes the result for each combination of sizes once.

    Floating-point results are zeros that take no memory. Texts depend on their shapes only.
    """

    def __init__(self, image_processor: Any) -> None:
        self._image_processor = image_processor
        self._results: dict[str, Any] = {}

    def __call__(self, images: Any, *rest: Any, **options: Any) -> Any:
        key = repr((_sizes(images), rest, options))
        if key not in self._results:
            result = self._image_processor(images, *rest, **options)
            result.data = {name: _without_memory(value) for name, value in result.data.items()}
            self._results[key] = result
        return copy.copy(self._results[key])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._image_processor, name)


def _sizes(images: Any) -> Any:
    """Sizes of images in nested lists, also if the processor has made arrays of them."""
    if isinstance(images, list | tuple):
        return [_sizes(one) for one in images]
    return images.size if isinstance(images, Image.Image) else tuple(images.shape)


def _without_memory(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.new_zeros(()).expand(value.shape)
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return np.broadcast_to(np.zeros((), value.dtype), value.shape)
    return [_without_memory(one) for one in value] if isinstance(value, list) else value
