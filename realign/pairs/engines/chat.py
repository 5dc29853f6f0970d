"""What every engine takes and gives: a chat with its images, a reply, and the checks before it."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from realign.data.errors import Malformed
from realign.data.messages import place_images

NO_TEXT = "the answer is empty"


@dataclass(frozen=True)
class Chat:
    """One request: messages, the images they show, and how to write the answer."""

    messages: list[dict]  # role and content; content is text, or parts of type text and image
    images: list[Image.Image] = field(default_factory=list)  # in the order of their places
    max_tokens: int = 256  # of the answer
    temperature: float = 0.0  # 0 is greedy
    seed: int = 0  # of sampling; not read at temperature 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 1.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or more.")


@dataclass(frozen=True)
class Reply:
    """One answer. Where `error` is not empty there is none, and the record is a bad one."""

    text: str
    error: str = ""
    cut: bool = False  # the answer was as long as allowed, so its end may be missing


class Engine:
    """A model that answers chats.

    `name` says which one, for the records' provenance. An engine may be made and dropped without
    cost: models are loaded, and workers started, by `open` or the first `chat`.
    """

    name: str

    def open(self) -> None:
        """Load what answering needs; a second call does nothing.

        Raises:
            ValueError: when the model or its environment is not there, with the remedy.
        """

    def chat(self, requests: Sequence[Chat]) -> list[Reply]:
        """Answer requests.

        Args:
            requests: any number of chats.

        Returns:
            One reply per request, in their order. A request that cannot be answered has an error.

        Raises:
            ValueError: when no request could be answered, whatever it held: a wrong key, a model
                that does not load.
            ConnectionError: when an endpoint is gone. What it answered before is kept, so the run
                can go on later; its requests are no bad records.
        """
        raise NotImplementedError

    def estimate(self, requests: Sequence[Chat], total: int | None = None) -> str | None:
        """What the requests will cost, to be printed before they are sent; None for a local model.

        Args:
            requests: those of the run, or a sample of them.
            total: how many the run will make, where `requests` are a sample.
        """
        return None

    def close(self) -> None:
        """Free what `open` took; `open` may follow."""


def typed_messages(chat: Chat) -> list[dict[str, Any]]:
    """The messages of a chat with content as typed parts, every image in its place.

    Raises:
        Malformed: as `realign.data.messages.place_images`.
    """
    return place_images(chat.messages, len(chat.images))


def request_digest(chat: Chat, *engine: str) -> str:
    """Digest of all that decides an answer: 32 hexadecimal digits.

    The seed counts where it is read, so greedy requests that differ in it are one.

    Args:
        chat: the request.
        engine: what tells the engine from others, such as its model.

    Raises:
        Malformed: as `typed_messages`.
    """
    sampled = chat.temperature > 0
    said = {
        "engine": engine,
        "messages": typed_messages(chat),
        "max_tokens": chat.max_tokens,
        "temperature": float(chat.temperature),
        "seed": chat.seed if sampled else None,
        "images": [image_digest(image) for image in chat.images],
    }
    # ASCII, so that a lone surrogate in a text has a digest, too.
    text = json.dumps(said, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def image_digest(image: Image.Image) -> str:
    """Digest of an image's RGB pixels: no encoder has a say in it.

    Raises:
        Malformed: when the image is not decoded yet and cannot be.
    """
    try:
        pixels = image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise Malformed(f"an image of it cannot be decoded ({error}).") from error
    header = f"{pixels.width}x{pixels.height} ".encode()
    return hashlib.blake2b(header + pixels.tobytes(), digest_size=16).hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, its folder included; several processes may do it at once.

    Raises:
        OSError: when the disk is full or the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
