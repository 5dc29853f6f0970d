"""Encoding of records: token ids and forest of every record, checked before training.

All records are tokenized and all images decoded once, before the first step. A bad record is
therefore reported early, and all lengths are known for packing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from PIL import Image

from realign.config import LossConfig
from realign.data.errors import Malformed, RecordError
from realign.data.images import StoredImage
from realign.data.records import Record
from realign.modeling.chat import ChatTemplate, Prompt, chat_prompt, text_inputs, tokens_behind
from realign.modeling.forest import Example, Leaf, Root
from realign.modeling.images import ImageStore, bundle_of, processed
from realign.modeling.layouts import Layout
from realign.progress import track
from realign_kernels import Objective, objectives


def make_objective(loss: LossConfig, records: Sequence[Record]) -> Objective:
    """The objective of a loss; its setting `negatives` is counted in the records.

    Raises:
        RecordError: when the objective takes several visual negatives, and a record has fewer than
            two or a different number than the first record.
    """
    accepted = objectives.settings(loss.objective)
    settings = {"beta": loss.beta}
    if "visual_weight" in accepted:
        settings["visual_weight"] = loss.visual_weight
    if "negatives" in accepted:
        settings["negatives"] = _visual_negatives(loss.objective, records)
    return objectives.get(loss.objective, **settings)


def _visual_negatives(name: str, records: Sequence[Record]) -> int:
    """Number of visual negatives per record."""
    first = len(records[0].retrieved_images) // len(records[0].images)
    for record in records:
        count = len(record.retrieved_images) // len(record.images)
        if count < 2:
            raise RecordError(
                record.name,
                f"it has {count} visual negative(s); the objective {name!r} compares several.",
                "List two or more in `retrieved_images`, nearest first (python -m realign.pairs "
                "writes one), or train with --objective mdpo.",
            )
        if count != first:
            raise RecordError(
                record.name,
                f"it has {count} visual negatives and {records[0].name!r} has {first}; the "
                f"objective {name!r} needs the same number in all records.",
                "Give every record the same number of `retrieved_images`.",
            )
    return first


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
) -> tuple[list[Example], ImageStore]:
    """Tokenize records into forests of `objective`'s leaves.

    Args:
        records: preference records.
        processor: the model's processor; it must have a chat template.
        objective: defines the (response, image) leaves of an example.
        layout: layout of the model.
        max_response_tokens: maximum number of tokens in a response. A longer one is an error, and
            is never cut.
        max_tokens: maximum number of tokens in prompt and response together. More is an error,
            since cutting a prompt could cut image tokens.
        progress: whether to show a progress bar.
        on_bad: called with each unusable record and its error. The record is then skipped.

    Returns:
        One example per record, and the store of their distinct images.

    Raises:
        RecordError: without `on_bad`, for the first unusable record.
    """
    encoder = _Encoder(processor, layout, max_response_tokens, max_tokens)
    examples = []
    for record in track(records, "checking records", "records", quiet=not progress):
        try:
            examples.append(encoder.encode(record, objective))
        except RecordError as error:
            if on_bad is None:
                raise
            on_bad(record, error)
    return examples, encoder.store


def check_prompt(processor, record: Record, images: int) -> str:
    """Render a record's prompt for `images` images.

    Raises:
        RecordError: when the prompt cannot be rendered, or does not place every image.
    """
    try:
        return chat_prompt(processor, record.prompt, images)[0]
    except Malformed as error:
        raise error.of(record.name) from error


class _Encoder:
    def __init__(
        self, processor, layout: Layout, max_response_tokens: int, max_tokens: int
    ) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.template = ChatTemplate(processor)
        self._rendered: tuple[Record, Prompt] | None = None  # of the current record
        self.image_ids = {layout.image_token_id}
        self.image_ids.add(self.tokenizer.convert_tokens_to_ids(processor.image_token))
        self.layout = layout
        self.max_response_tokens = max_response_tokens
        self.max_tokens = max_tokens
        self.store = ImageStore(processor, layout)

    def encode(self, record: Record, objective: Objective) -> Example:
        try:
            return self._example(record, objective)
        except Malformed as error:
            raise error.of(record.name) from error

    def _example(self, record: Record, objective: Objective) -> Example:
        roots: list[Root] = []
        leaves: list[Leaf] = []
        places: dict[str, int] = {}  # name of a root's image -> index into roots
        for leaf in objective.leaves:
            text = self._text(record, leaf.response, objective.name)
            if leaf.image not in places:
                places[leaf.image] = len(roots)
                roots.append(self._root(record, leaf.image, objective.name))
            ids = self._response(record, leaf.response, text)
            root = places[leaf.image]
            if len(roots[root].ids) + len(ids) > self.max_tokens:
                raise Malformed(
                    f"prompt and {leaf.response} response have {len(roots[root].ids) + len(ids)} "
                    f"tokens, and the model takes {self.max_tokens}.",
                    "Shorten the text. It is not cut, since that could cut image tokens.",
                )
            leaves.append(Leaf(root, ids, leaf.rival))
        return Example(record.name, tuple(roots), tuple(leaves))

    def _text(self, record: Record, response: str, objective: str) -> str:
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

    def _images(self, record: Record, image: str, objective: str) -> tuple[StoredImage, ...]:
        """The images for a leaf's image name, one for each place in the record's prompt."""
        count, retrieved = len(record.images), len(record.retrieved_images)
        if image == "image":
            return record.images
        if image == "blank_image":
            # The same size, so that the processor gives it the same number of image tokens.
            sizes = (stored.open(record.name).size for stored in record.images)
            return tuple(StoredImage.from_pil(Image.new("RGB", size)) for size in sizes)
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
        return record.retrieved_images[(place - 1) * count : place * count]

    def _prompt(self, record: Record) -> Prompt:
        if self._rendered is None or self._rendered[0] is not record:
            self._rendered = record, self.template.prompt(record.prompt, len(record.images))
        return self._rendered[1]

    def _root(self, record: Record, image: str, objective: str) -> Root:
        stored = self._images(record, image, objective)
        images = [s.open(record.name) for s in stored]
        inputs = text_inputs(self.processor, [self._prompt(record).text])
        outputs = processed(self.processor, record.name, images, **inputs)
        ids = outputs["input_ids"][0].numpy()
        start = np.flatnonzero(ids == self.tokenizer.bos_token_id)[:1]
        if start.size and (ids[start[0] + 1 :][:1] == ids[start]).any():
            raise Malformed(
                f"its prompt begins with {self.tokenizer.bos_token!r} twice.",
                "Remove one from the chat template.",
            )
        tokens = int((ids == self.layout.image_token_id).sum())
        if len(stored) == 1:
            keys = (self.store.keep(record.name, stored[0], bundle_of(outputs), tokens),)
        else:
            keys = tuple(self.store.add(record.name, s, several=True) for s in stored)
        expected = sum(self.store.tokens(key) for key in keys)
        if tokens != expected:
            raise Malformed(
                f"its prompt has {tokens} image tokens, and its images have {expected}.",
                f"Remove {self.processor.image_token!r} from the text.",
            )
        return Root(keys, ids)

    def _response(self, record: Record, name: str, text: str) -> np.ndarray:
        """Token ids of a response with the end of its turn."""
        prompt = self._prompt(record)
        scored = self.template.scored(prompt, text, f"{name} response")
        encoding, first, _ = tokens_behind(self.tokenizer, prompt.text, scored)
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
