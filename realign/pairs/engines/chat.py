"""The interface of engines: `Engine`, its options, a chat with its images, a reply."""

from __future__ import annotations

import hashlib
import json
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
    seed: int = 0  # of sampling; ignored at temperature 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 1.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or more.")


@dataclass(frozen=True)
class Reply:
    """One answer, or an `error`, which makes the record invalid."""

    text: str
    error: str = ""
    cut: bool = False  # the answer was as long as allowed, so its end may be missing


@dataclass(frozen=True)
class EngineOptions:
    """Options of all engines; each engine reads its own."""

    folder: str | Path | None = None
    """Folder of an endpoint's saved answers, one file each, so that no request is sent twice."""
    batch_size: int = 8
    """Of transformers: greedy answers written at once; sampled ones are written one by one."""
    dtype: str | None = None
    """Of transformers: "fp32" or "bf16"; bf16 on a GPU and fp32 elsewhere when absent."""
    concurrency: int = 8
    """Requests that an endpoint has at once."""
    requests_per_minute: float | None = None
    """Most requests started at an endpoint in a minute, repeated ones included."""
    tries: int = 5
    """How often a request to an endpoint is sent at most."""
    timeout: float = 120.0
    """Seconds that an endpoint has for an answer."""
    price_in: float | None = None
    """Price of a million input tokens, for the estimate."""
    price_out: float | None = None
    """The same of output tokens."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "concurrency", "tries"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        for name in ("timeout", "requests_per_minute"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0.")
        for name in ("price_in", "price_out"):
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise ValueError(f"{name} is {value}; it must be 0 or more.")


class Engine:
    """A model that answers chats.

    Attributes:
        name: of the model, for the records' provenance.

    The constructor is cheap: `open` or the first `chat` loads the model.
    """

    name: str

    def open(self) -> None:
        """Load the model; a second call does nothing.

        Raises:
            ValueError: when there is no such model, with the remedy.
        """

    def chat(self, requests: Sequence[Chat]) -> list[Reply]:
        """Answer requests.

        Args:
            requests: any number of chats.

        Returns:
            One reply per request, in their order. A request that cannot be answered has an error.

        Raises:
            ValueError: when no request can be answered: a wrong key, a model
                that does not load.
            ConnectionError: when an endpoint does not answer. Its earlier answers are kept, so that
                a later run resumes; no record becomes invalid.
        """
        raise NotImplementedError

    def estimate(self, requests: Sequence[Chat], total: int | None = None) -> str | None:
        """Cost of requests, to be printed before they are sent; None for a local model.

        Args:
            requests: all of the run, or a sample.
            total: of the run, where `requests` are a sample.
        """
        return None

    def close(self) -> None:
        """Free the model; `open` may follow."""


def typed_messages(chat: Chat) -> list[dict[str, Any]]:
    """The messages of a chat with content as typed parts, each image in its place.

    Raises:
        Malformed: as `realign.data.messages.place_images`.
    """
    return place_images(chat.messages, len(chat.images))


def request_digest(chat: Chat, *engine: str) -> str:
    """Digest of all inputs that decide an answer, in 32 hexadecimal digits.

    The seed is part of it only for sampling: greedy requests with different seeds are equal.

    Args:
        chat: the request.
        engine: identity of the engine, such as its model.

    Raises:
        Malformed: as `typed_messages`.
    """
    sampled = chat.temperature > 0
    facts = {
        "engine": engine,
        "messages": typed_messages(chat),
        "max_tokens": chat.max_tokens,
        "temperature": float(chat.temperature),
        "seed": chat.seed if sampled else None,
        "images": [image_digest(image) for image in chat.images],
    }
    # ASCII, so that a text with a lone surrogate also has a digest.
    text = json.dumps(facts, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def image_digest(image: Image.Image) -> str:
    """Digest of an image's RGB pixels, independent of its encoding.

    Raises:
        Malformed: when the image is not decoded yet and cannot be.
    """
    try:
        pixels = image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise Malformed(f"an image of it cannot be decoded ({error}).") from error
    header = f"{pixels.width}x{pixels.height} ".encode()
    return hashlib.blake2b(header + pixels.tobytes(), digest_size=16).hexdigest()
