"""Record formats: registry `FORMATS` of preference and instruction data, detected by keys.

    entries_of({"question": ..., "chosen": ..., "rejected": ..., "image": ...})

An item is a JSON object, a line of JSON, a row of a table, or a row of `RDPOTrainer`. A format is a
function from an item to entries. To add one, write the function, and add it to `FORMATS` with its
distinctive keys. The function raises `Malformed` for an invalid item, and reads no file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import combinations
from typing import Any

from realign.data.columns import COLUMNS, UNREAD, is_empty, may_change, names_media
from realign.data.entries import Entry, check_unread, entry_of, images_of, messages_of, name_of
from realign.data.errors import Malformed, Skipped, short_repr
from realign.data.images import StoredImage
from realign.data.messages import TAGS
from realign.data.values import decoded, text_of, unrendered

CAPTION_PROMPT = "Describe the image in one sentence."
_PREFERENCES = ("chosen", "rejected", "rejected_response")
_PREFERENCES += ("rejected_conversations", "rejected_messages")


def of_llava(item: Mapping[str, Any], every: bool = False) -> list[Entry]:
    """LLaVA's instruction format: an image and a dialogue about it.

    The first answer of the dialogue is the response. With `every`, each answer gives an entry.

    Raises:
        Malformed: for a dialogue without text, roles that do not alternate, or a preference.
    """
    if unsupported := [key for key in (*_PREFERENCES, "system") if item.get(key)]:
        raise Malformed(
            f"it has {', '.join(unsupported)}, which LLaVA's format does not have.",
            "Pass --format parquet.",
        )
    dialogue = messages_of(item.get("conversations"), "conversations")
    opening = dialogue[: dialogue[0]["role"] == "system"]
    turns = dialogue[len(opening) :]
    if not turns or not all(isinstance(m["content"], str) for m in dialogue):
        raise Malformed(
            "its conversations are not a dialogue in text.", "Add a question from the human."
        )
    for turn, message in enumerate(turns):
        if message["role"] != ("user", "assistant")[turn % 2]:
            raise Malformed(
                "its conversations do not alternate between human and gpt.", "Fix their order."
            )
    name, images = name_of(item), images_of(item, "image", "images")
    if not every or len(turns) < 3:
        answer = turns[1]["content"] if len(turns) > 1 else None
        return [Entry(name, opening + turns[:1], answer, None, images, [])]
    return [
        Entry(
            name and f"{name}#{turn // 2 + 1}",
            opening + turns[:turn],
            turns[turn]["content"],
            None,
            images,
            [],
        )
        for turn in range(1, len(turns), 2)
    ]


def of_realign(item: Mapping[str, Any]) -> list[Entry]:
    """Format of Re-Align's authors: chosen and rejected dialogues, an image and a retrieved image.

    Raises:
        Malformed: for an item without a rejected dialogue or a retrieved image.
    """
    entry = entry_of(item)
    if entry.rejected is None:
        raise Malformed("its rejected is missing.", "Add the rejected dialogue.")
    if entry.images and not entry.retrieved:
        raise Malformed("its retrieved_image is missing.", "Add one, or pass --format parquet.")
    return [entry]


def of_folder(item: Mapping[str, Any]) -> list[Entry]:
    """A line of the JSON-lines file in a folder of images.

    It has an image, a question or prompt, and optionally an answer or chosen response.

    Raises:
        Malformed: for a line without a question.
    """
    chosen = item.get("chosen")
    return [_answered(item, item.get("answer") if chosen is None else chosen)]


def of_row(item: Mapping[str, Any]) -> list[Entry]:
    """A preference row. See `entry_of`.

    An empty response counts as absent, because `write_pairs` writes absent responses as "".

    Raises:
        Malformed: like `entry_of`.
    """
    return [entry_of(item)]


def of_swift(item: Mapping[str, Any]) -> list[Entry]:
    """ms-swift: `messages`, and `rejected_response`, `rejected_messages` or `rejected_images`.

    ms-swift scores the rejected response on `rejected_images`. Equal images are those of the
    prompt. Other images without a rejected response are visual negatives of the chosen one.

    Raises:
        Malformed: for other images with a rejected response, because no objective compares them.
    """
    names = ("rejected_images", "rejected_image")
    rest = {key: value for key, value in item.items() if key not in names}
    entry = entry_of(rest)
    negatives = images_of(item, *names)
    if not negatives or negatives == entry.images:
        return [entry]
    if entry.rejected is not None and entry.rejected != entry.chosen:
        raise Malformed(
            "its rejected response has other images (rejected_images) than the chosen one. "
            "ms-swift compares both at once, and no objective here does.",
            "Remove rejected_images, or give them as retrieved_images.",
        )
    return [replace(entry, rejected=None, retrieved=negatives)]


def of_alpaca(item: Mapping[str, Any]) -> list[Entry]:
    """Alpaca: `instruction`, `input`, `history`, and a response or `chosen` and `rejected`.

    ms-swift's `query`, `response` and `rejected_response` are the same format.

    Raises:
        Malformed: for two instructions or two responses, or a history that is not pairs of texts.
    """
    question = _only(item, "instruction", "query")
    if not is_empty(given := item.get("input")):
        if not isinstance(question, str) or not isinstance(given, str):
            raise Malformed("its instruction or input is not text.", "Give text.")
        question = f"{question}\n{given}"
    turns: list[dict[str, Any]] = []
    history = item.get("history")
    for pair in () if is_empty(history) else history if isinstance(history, list) else [history]:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Malformed(
                f"its history has {short_repr(pair)}, not a question and an answer.",
                "Give a list of pairs of texts.",
            )
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    prompt = [*turns, {"role": "user", "content": question}]
    system = item.get("system")
    if not is_empty(system):
        prompt = [{"role": "system", "content": system}, *prompt]
    return [
        _pair(
            item,
            prompt if turns or len(prompt) > 1 else question,
            _only(item, "chosen", "output", "response"),
            _only(item, "rejected", "rejected_response"),
        )
    ]


def of_llava_rlhf(item: Mapping[str, Any]) -> list[Entry]:
    """LLaVA-RLHF: `output_1` and `output_2` answer `conversations`. `preference` is 1 or 2.

    The last answer of `conversations` is replaced by the outputs, as in their loader.

    Raises:
        Malformed: for another preference, or an output without text.
    """
    dialogue = messages_of(item.get("conversations"), "conversations")
    prompt = dialogue[:-1] if dialogue[-1]["role"] == "assistant" else dialogue
    preference = item.get("preference")
    if not isinstance(preference, int) or preference not in (1, 2) or preference is True:
        raise Malformed(
            f"its preference is {short_repr(preference)}, not 1 or 2.", "Give the better output."
        )
    outputs = [text_of(item.get(name), name) for name in ("output_1", "output_2")]
    return [_pair(item, prompt, outputs[preference - 1], outputs[2 - preference])]


def of_mdpo(item: Mapping[str, Any]) -> list[Entry]:
    """mDPO: `img_path`, `chosen`, `rejected`, and a `prompt` that may be rendered for LLaVA.

    Raises:
        Malformed: for a rendered prompt of several turns.
    """
    prompt = item.get("prompt")
    return [_pair(item, unrendered(prompt), item.get("chosen"), item.get("rejected"))]


def of_sentinel(item: Mapping[str, Any]) -> list[Entry]:
    """SENTINEL: `context` begins the answer, and `y_win` and `y_lose` continue it.

    The context is the beginning of both responses. Its log-probs cancel in their difference.

    Raises:
        Malformed: for a context that is not text.
    """
    context = item.get("context")
    if not is_empty(context) and not isinstance(context, str):
        raise Malformed(f"its context is {short_repr(context)}.", "Give text.")

    def answer(name: str) -> Any:
        text = item.get(name)
        if not context or not text or not isinstance(text, str):
            return text
        return f"{context.rstrip()} {text.lstrip()}"

    return [_pair(item, item.get("question"), answer("y_win"), answer("y_lose"))]


def of_opa(item: Mapping[str, Any]) -> list[Entry]:
    """OPA-DPO: a generated response, its correction, and the standard response to `queries`.

    The generated response is rejected twice, against the correction and the standard response.

    Raises:
        Malformed: for an image that is not base64.
        Skipped: for responses that are the same.
    """
    images = images_of(item, "images", "image", "image_id")
    if not is_empty(encoded := item.get("image_bytes")):
        images = [*images, StoredImage(decoded(encoded))]
    name, prompt = name_of(item), unrendered(item.get("queries"))
    rejected = item.get("original_generate_response")
    columns = ("AI_pseudo_response", "standard_response")
    better = [column for column in columns if not is_empty(item.get(column))]
    if not (chosen := [column for column in better if item[column] != rejected]):
        if better:
            raise Skipped("its responses are the same.", reason="tie")
        raise Malformed(f"it has neither {' nor '.join(columns)}.", "Add one.")
    entries = [
        entry_of({"prompt": prompt, "chosen": item[c], "rejected": rejected}) for c in chosen
    ]
    return _numbered([replace(entry, name=name, images=images) for entry in entries])


def of_completions(item: Mapping[str, Any], every: bool = False) -> list[Entry]:
    """VLFeedback and BPO: rated `completions` of a prompt. The best-rated is chosen over the worst.

    A rating is the `score` of a completion, or the mean over the aspects of its `annotations`.
    Completions without a rating are not compared. With `every`, each two ratings that differ make
    an entry, as in both projects.

    Raises:
        Malformed: for completions that are not objects with a response.
        Skipped: for equal ratings, or fewer than two.
    """
    rated = []
    for completion in _listed(item.get("completions")):
        if not isinstance(completion, Mapping) or is_empty(completion.get("response")):
            raise Malformed(
                f"it has the completion {short_repr(completion)} without a response.",
                "Give objects with a response, and a score or annotations.",
            )
        if (rating := _rating(completion)) is not None:
            rated.append((rating, completion["response"]))
    if len(rated) < 2:
        raise Skipped("it has fewer than two rated completions.", reason="no ratings")
    found = combinations(rated, 2) if every else [(max(rated, key=_first), min(rated, key=_first))]
    pairs = [sorted(two, key=_first, reverse=True) for two in found if two[0][0] != two[1][0]]
    pairs = [(better, worse) for (_, better), (_, worse) in pairs if better != worse]
    if not pairs:
        raise Skipped("its completions have the same rating.", reason="tie")
    prompt = item.get("prompt")
    entries = [_pair(item, prompt, better, worse) for better, worse in pairs]
    return _numbered(entries)


def of_coco(item: Mapping[str, Any], every: bool = False) -> list[Entry]:
    """A COCO image with its captions, as joined by `coco_items`.

    The caption with the lowest id is the response. With `every`, each caption gives an entry.

    Raises:
        Malformed: for an image without a file name, or a caption that is not text.
    """
    image, captions = item["image"], item["captions"]
    if not isinstance(image, dict) or not isinstance(image.get("file_name"), str):
        raise Malformed(f"its image {short_repr(image)} has no file_name.", "Add it.")
    if not all(isinstance(c["caption"], str) and isinstance(c.get("id"), int) for c in captions):
        raise Malformed("one of its captions is not text, or has no id.", "Fix the caption.")
    texts = [c["caption"] for c in sorted(captions, key=lambda c: c["id"])]
    row = {"id": image.get("id"), "prompt": CAPTION_PROMPT, "image": image["file_name"]}
    if not every or not texts:
        return [_answered(row, texts[0] if texts else None)]
    entries = [_answered(row, text) for text in texts]
    return [
        replace(entry, name=entry.name and f"{entry.name}#{number}")
        for number, entry in enumerate(entries, 1)
    ]


@dataclass(frozen=True)
class Format:
    """A format of records.

    Attributes:
        read: function from an item to its entries.
        keys: the distinctive keys. All of them are needed, and "a|b" is one of two.
        also: further keys that it reads or that its data set has.
        pairs: whether its records have a rejected response.
        reads: the columns of `UNREAD` that it reads.
        columns: the columns of `COLUMNS` that it reads besides its keys. None for those of
            `entry_of`.
    """

    read: Callable[[Mapping[str, Any]], list[Entry]]
    keys: tuple[str, ...]
    also: str = ""
    pairs: bool = True
    reads: tuple[str, ...] = ()
    columns: tuple[str, ...] | None = None

    @property
    def needs(self) -> list[frozenset[str]]:
        """The keys, each as the set of its alternatives."""
        return [frozenset(key.split("|")) for key in self.keys]


_IMAGE = "image|images"
_OF_PAIR = ("id", "images", "image", "image_path", "img_path")
_OF_PAIR += ("retrieved_images", "retrieved_image", "retrieved_chosen")
"""Columns that `_pair` reads."""
_OF_ALPACA = (*_OF_PAIR, "system", "instruction", "query", "output", "response", "chosen")
_OF_ALPACA += ("rejected", "rejected_response")
_OF_LLAVA = ("id", "images", "image", *_PREFERENCES, "system")  # of_llava refuses the last ones
_NOT_OF_ENTRY = ("instruction", "query", "response", "output")
"""The columns of `COLUMNS` that `entry_of` does not read."""
_ANY_REJECTED = "rejected|rejected_response|rejected_conversations|rejected_messages"
_ANY_PAIR = f"chosen|{_ANY_REJECTED}"
FORMATS: dict[str, Format] = {
    "llava": Format(of_llava, ("conversations",), "width height", pairs=False, columns=_OF_LLAVA),
    "llava:all": Format(
        partial(of_llava, every=True), ("conversations",), pairs=False, columns=_OF_LLAVA
    ),
    "realign": Format(of_realign, ("retrieved_image", _ANY_PAIR)),
    "folder": Format(of_folder, (_IMAGE + "|image_path|img_path",), "answer", pairs=False),
    "completions": Format(of_completions, ("completions", "prompt"), "models", columns=_OF_PAIR),
    "completions:all": Format(
        partial(of_completions, every=True), ("completions", "prompt"), "models", columns=_OF_PAIR
    ),
    "llava-rlhf": Format(
        of_llava_rlhf,
        ("conversations", "output_1", "output_2"),
        "preference hallucination",
        columns=_OF_PAIR,
    ),
    "sentinel": Format(of_sentinel, ("question", "y_win|y_lose"), "context", columns=_OF_PAIR),
    "opa-dpo": Format(
        of_opa,
        ("queries", "original_generate_response"),
        "AI_pseudo_response standard_response AI_json_report image_bytes image_id",
        columns=("id", "images", "image"),
    ),
    "ms-swift": Format(
        of_swift,
        ("messages", "rejected_response|rejected_messages|rejected_images"),
        reads=("rejected_images", "rejected_image"),
    ),
    "alpaca": Format(
        of_alpaca,
        ("instruction|query", "chosen|rejected|rejected_response"),
        "input",
        reads=("history",),
        columns=_OF_ALPACA,
    ),
    "alpaca:answers": Format(
        of_alpaca,
        ("instruction|query", "output|response"),
        "input",
        pairs=False,
        reads=("history",),
        columns=_OF_ALPACA,
    ),
    "mdpo": Format(of_mdpo, ("img_path", "prompt", "chosen", "rejected"), columns=_OF_PAIR),
    "povid": Format(of_row, ("conversations", "rejected_conversations")),
    "llama-factory": Format(of_row, ("conversations|messages", "chosen", "rejected")),
    "rlaif-v": Format(of_row, ("question", "chosen", "rejected"), "ds_name"),
    "rlhf-v": Format(of_row, ("text",), "ds_name"),
    "parquet": Format(
        of_row,
        ("prompt|chosen", _ANY_REJECTED),
        "negative negative_record judge",  # of `write_pairs`
    ),
    "coco": Format(of_coco, (), pairs=False),
    "coco:all": Format(partial(of_coco, every=True), (), pairs=False),
}
"""Name for `--format` -> format."""
_ORDER = ("realign", "completions", "llava-rlhf", "sentinel", "opa-dpo", "ms-swift", "alpaca")
_ORDER += ("alpaca:answers", "mdpo", "povid", "llama-factory", "rlaif-v", "rlhf-v", "parquet")
_ORDER += ("llava", "folder")
"""The first format whose keys an item has is its format."""
KEYS = {
    name: COLUMNS.union(*form.needs, form.also.split(), ["answer"] * (not form.pairs))
    for name, form in FORMATS.items()
}
"""Format -> all keys that are not unknown."""
ALL_KEYS = frozenset().union(*KEYS.values())
_LOST = {
    name: (
        frozenset(_NOT_OF_ENTRY).difference(*form.needs)
        if form.columns is None
        else COLUMNS.difference(UNREAD, form.columns, *form.needs)
    )
    for name, form in FORMATS.items()
}
"""Format -> columns of `COLUMNS` that it does not read, besides those of `check_unread`."""


@lru_cache(4096)
def format_with(keys: frozenset[str]) -> str | None:
    """The format that has these keys, or None. A key counts only if its value is not empty."""
    for name in _ORDER:
        if all(alternatives & keys for alternatives in FORMATS[name].needs):
            return name
    return None


def format_of(item: Any) -> str | None:
    """The format of a JSON object, or None if it is not recognized."""
    if not isinstance(item, Mapping):
        return None
    return format_with(frozenset(key for key, value in item.items() if not is_empty(value)))


def entries_of(
    item: Any, format: str = "auto", default: str = "parquet", *, text_only: bool = False
) -> list[Entry]:
    """The entries of an item.

    Args:
        item: a JSON object or a row.
        format: a key of `FORMATS`, or "auto" to detect it by the keys.
        default: the format of an item that is not recognized.
        text_only: whether an item without an image gives entries.

    Raises:
        Malformed: for an invalid item, or unknown keys that may change its meaning.
        Skipped: for a valid item that gives no entry: with equal ratings, or without an image
            unless `text_only` is set.
    """
    if isinstance(item, Malformed):
        raise item
    if not isinstance(item, Mapping):
        raise Malformed(f"it is {short_repr(item)}, not an object.", "Write one object per record.")
    name = (format_of(item) or default) if format == "auto" else format
    known = KEYS[name]
    unknown = [k for k in item if k not in known and may_change(k) and not is_empty(item[k])]
    if unknown:
        raise Malformed(
            f"its keys {short_repr(unknown)} are unknown, and their names may change its meaning.",
            f"Rename or remove them. {nearest(item)}",
        )
    check_unread(item, FORMATS[name].reads)
    _check_read(item, name)
    entries = FORMATS[name].read(item)
    if entries and all(entry.chosen and entry.chosen == entry.rejected for entry in entries):
        raise Skipped("its responses are the same.", reason="tie")
    if name.partition(":")[0] != "coco" and not all(entry.images for entry in entries):
        _check_no_image_lost(item, entries[0])
        if not text_only:
            raise Skipped(
                "it has no image.", "Add one to `images` or remove the record.", "no image"
            )
    return entries


def _check_read(item: Mapping[str, Any], name: str) -> None:
    """Raises `Malformed` for a column of preference data that the format does not read."""
    if lost := sorted(key for key in _LOST[name] & item.keys() if not is_empty(item[key])):
        raise Malformed(
            f"its {' and '.join(lost)} would be lost, since format {name} does not read them.",
            "Remove or rename them, or write the record with other columns (docs/data.md).",
        )


def nearest(keys: Iterable[str]) -> str:
    """A sentence with the format that shares the most keys, for errors."""
    keys = set(keys)

    def shared(name: str) -> tuple[int, float]:
        needs = FORMATS[name].needs
        count = sum(bool(alternatives & keys) for alternatives in needs)
        return count, count / len(needs)

    best = max((name for name in _ORDER if FORMATS[name].pairs), key=shared)
    listed = ", ".join(key.replace("|", " or ") for key in FORMATS[best].keys)
    return f"The nearest format is {best} with {listed} (docs/data.md)."


def _check_no_image_lost(item: Mapping[str, Any], entry: Entry) -> None:
    """Raises `Malformed` for an image that was not found.

    A row that names its image in an unknown column, or in the prompt, has lost it.
    """
    if entry.retrieved:
        raise Malformed(
            "it has retrieved images and no image.",
            "Add its image to `images` or remove the record.",
            "no image",
        )
    named = [k for k in item if names_media(str(k)) and not (is_empty(item[k]) or item[k] is False)]
    if named:
        raise Malformed(
            f"it has no image in images or image, and its keys {short_repr(named)} are unknown.",
            "Rename the column that holds the image to `image`. Videos are not supported.",
            "no image",
        )
    for message in entry.prompt:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            if part["type"] == "image" or TAGS.search(part["text"]):
                raise Malformed(
                    "its prompt places an image, and it has no image.",
                    "Add one to `images` or remove the record.",
                    "no image",
                )


def _answered(row: Mapping[str, Any], answer: Any) -> Entry:
    """An entry with an answer. Unlike in a table, an empty answer is invalid here."""
    if answer == []:
        raise Malformed("its answer is an empty list.", "Give text, or omit the key.")
    entry = entry_of({**row, "chosen": answer})
    return replace(entry, chosen="") if answer == "" else entry


def _pair(item: Mapping[str, Any], prompt: Any, chosen: Any, rejected: Any) -> Entry:
    """An entry of other columns, with the id and the images of the item."""
    row = {key: item[key] for key in _OF_PAIR if key in item}
    return entry_of({**row, "prompt": prompt, "chosen": chosen, "rejected": rejected})


def _only(item: Mapping[str, Any], *names: str) -> Any:
    """The value of the one key among several that is not empty, or None."""
    filled = [name for name in names if not is_empty(item.get(name))]
    if len(filled) > 1:
        raise Malformed(f"it has {' and '.join(filled)}.", "Keep one of them.")
    return item[filled[0]] if filled else None


def _numbered(entries: list[Entry]) -> list[Entry]:
    if len(entries) == 1:
        return entries
    return [replace(e, name=e.name and f"{e.name}#{i}") for i, e in enumerate(entries, 1)]


def _first(pair: tuple[float, Any]) -> float:
    return pair[0]


def _listed(value: Any) -> list[Any]:
    """A list of objects, which `datasets` may store as a struct of lists."""
    if isinstance(value, Mapping):
        columns = {key: column for key, column in value.items() if column is not None}
        lengths = {len(column) if isinstance(column, list) else -1 for column in columns.values()}
        if len(lengths) != 1 or -1 in lengths:
            raise Malformed(
                f"its completions are {short_repr(value)}, not a list.", "Give a list of objects."
            )
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if not isinstance(value, list | tuple):
        raise Malformed(
            f"its completions are {short_repr(value)}, not a list.", "Give a list of objects."
        )
    return list(value)


def _rating(completion: Mapping[str, Any]) -> float | None:
    """The rating of a completion: its score, or the mean over aspects. None if it has none."""
    annotations = completion.get("annotations")
    if (score := completion.get("score")) is not None:
        values: list[Any] = [score]
    elif isinstance(annotations, Mapping):
        aspects = annotations.values()
        values = [a.get("Rating") if isinstance(a, Mapping) else None for a in aspects]
    else:
        return None
    try:
        ratings = [float(value) for value in values]
    except (TypeError, ValueError):  # such as "N/A"
        return None
    total = sum(ratings) / len(ratings) if ratings else math.nan
    return total if math.isfinite(total) else None
