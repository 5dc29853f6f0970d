"""Interface of engines: `Engine`, `EngineOptions`, `Chat` and `Reply`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from realign.data.errors import Malformed
from realign.data.messages import place_images

NO_TEXT = "the answer is empty"


@dataclass(frozen=True)
class Chat:
    """One request: messages, their images, and sampling parameters."""

    messages: list[dict]
    """Messages with a role and content. Content is text, or parts of type text and image."""
    images: Sequence[Image.Image | Callable[[], Image.Image]] = field(default_factory=list)
    """Images in the order of their places, or functions that load them (`load`)."""
    max_tokens: int = 256
    """Maximum length of the answer."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    seed: int = 0
    """Seed of sampling, ignored at temperature 0."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 1.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or more.")

    def load(self) -> list[Image.Image]:
        """The images. Those given as functions are loaded, and their errors are raised."""
        return [i if isinstance(i, Image.Image) else i() for i in self.images]


@dataclass(frozen=True)
class Reply:
    """One answer, or an `error` that makes the record invalid."""

    text: str
    error: str = ""
    cut: bool = False  # whether the answer reached the maximum length, so its end may be missing


@dataclass(frozen=True)
class EngineOptions:
    """Options of all engines. Each engine reads its own."""

    folder: str | Path | None = None
    """Folder for an endpoint's answers, one file each, so that no request is sent twice."""
    batch_size: int = 8
    """For transformers: batch size of greedy answers. Sampled answers are written one by one."""
    dtype: str | None = None
    """For transformers: "fp32" or "bf16". None means bf16 on a GPU and fp32 on a CPU."""
    workers: int | None = None
    """For transformers: number of threads that load and preprocess images ahead of the model. 0
    means none, None `realign.modeling.prefetch.default_workers`."""
    min_pixels: int | None = None
    """For transformers: see `loading.set_pixels`. Text models read no images."""
    max_pixels: int | None = None
    """For transformers: see `loading.set_pixels`."""
    concurrency: int = 8
    """Number of concurrent requests to an endpoint."""
    requests_per_minute: float | None = None
    """Maximum number of requests per minute to an endpoint, including repeated ones."""
    tries: int = 5
    """Maximum number of times that a request to an endpoint is sent."""
    timeout: float = 120.0
    """Time limit for an endpoint's answer, in seconds."""
    price_in: float | None = None
    """Price of a million input tokens, for the estimate."""
    price_out: float | None = None
    """Price of a million output tokens, for the estimate."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "concurrency", "tries"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers is {self.workers}; it must be 0 or more.")
        for name in ("timeout", "requests_per_minute"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0.")
        for name in ("price_in", "price_out"):
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise ValueError(f"{name} is {value}; it must be 0 or more.")


class Engine:
    """A model that answers chats.

    The constructor is cheap: `open` or the first `chat` loads the model.

    Attributes:
        name: name of the model, for the provenance of records.
    """

    name: str

    def open(self) -> None:
        """Load the model. A second call has no effect.

        Raises:
            ValueError: when there is no such model.
        """

    def chat(self, requests: Sequence[Chat]) -> list[Reply]:
        """Answer requests.

        Args:
            requests: any number of chats.

        Returns:
            One reply per request, in order. A request that cannot be answered has an error.

        Raises:
            ValueError: when no request can be answered, for example because of a wrong key or a
                model that cannot be loaded.
            ConnectionError: when an endpoint does not answer. Its earlier answers are kept, so a
                later run can resume. No record becomes invalid.
        """
        raise NotImplementedError

    def chats(self, groups: Iterable[Sequence[Chat]]) -> Generator[list[Reply], None, None]:
        """Yields the replies to each group of requests, like `chat`.

        An engine may load and preprocess the images of the next group ahead.
        """
        for group in groups:
            yield self.chat([replace(request, images=request.load()) for request in group])

    def estimate(self, requests: Sequence[Chat], total: int | None = None) -> str | None:
        """Estimated cost of requests, printed before they are sent. None for a local model.

        Args:
            requests: all requests of the run, or a sample.
            total: number of requests in the run, if `requests` is a sample.
        """
        return None

    def close(self) -> None:
        """Free the model. `open` may be called again."""


def typed_messages(chat: Chat) -> list[dict[str, Any]]:
    """The messages of a chat with their content as typed parts, and each image in its place.

    Raises:
        Malformed: like `realign.data.messages.place_images`.
    """
    return place_images(chat.messages, len(chat.images))


def request_digest(chat: Chat, *engine: str) -> str:
    """Digest of all inputs that determine an answer, with 32 hexadecimal digits.

    The seed is included only for sampling. Greedy requests with different seeds are equal.

    Args:
        chat: the request.
        engine: identity of the engine, such as its model.

    Raises:
        Malformed: like `typed_messages`.
    """
    sampled = chat.temperature > 0
    facts = {
        "engine": engine,
        "messages": typed_messages(chat),
        "max_tokens": chat.max_tokens,
        "temperature": float(chat.temperature),
        "seed": chat.seed if sampled else None,
        "images": [image_digest(image) for image in chat.load()],
    }
    # In ASCII, a text with a lone surrogate also has a digest.
    text = json.dumps(facts, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def image_digest(image: Image.Image) -> str:
    """Digest of an image's RGB pixels, independent of its encoding.

    Raises:
        Malformed: when the image cannot be decoded.
    """
    try:
        pixels = image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise Malformed(f"one of its images cannot be decoded ({error}).") from error
    header = f"{pixels.width}x{pixels.height} ".encode()
    return hashlib.blake2b(header + pixels.tobytes(), digest_size=16).hexdigest()
