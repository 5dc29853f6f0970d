"""Endpoint engine: chats answered by an OpenAI-compatible server, through the `openai` client.

The client repeats a request after 408, 409, 429, 5xx, a time-out or a cut connection, with growing
random waits or those of `Retry-After`. Answers are saved on disk, so a resumed run pays for each
answer once.

The key comes from the environment, goes into one header, and is removed from every text that a
server returns, because servers quote it. The client would also send an organization, a project and
headers that other variables name (OPENAI_ORG_ID, OPENAI_CUSTOM_HEADERS), so the engine sets all
headers itself. A redirect is an error: the key and the images stay with the host that was named.
"""

from __future__ import annotations

import base64
import io
import ipaddress
import json
import math
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx2
import openai
from PIL import Image

from realign.data.errors import Malformed
from realign.files import write_whole
from realign.pairs.engines.chat import (
    NO_TEXT,
    Chat,
    Engine,
    EngineOptions,
    Reply,
    request_digest,
    typed_messages,
)

KEYS = ("REALIGN_API_KEY", "OPENAI_API_KEY")  # environment variables, the first that is set
IMAGE_TOKENS = 1000  # of one image, for the estimate: 765 to 1105 where prices are published
LONGEST_SIDE = 2048  # pixels of an image that is sent; servers reduce larger ones
GIVE_UP = 8  # requests in a row without an answer, after which the run stops
_LOSSLESS = 256 * 256  # pixels; larger images go as JPEG, a tenth of the bytes
_LONGEST_WAIT = 120  # seconds of `Retry-After`, after which the client sends no further try
_MOST_BYTES = 16 * 2**20  # of an answer
_HEADERS = ("host", "connection", "content-length")  # of the HTTP library
_REMEDIES = {
    401: "it refuses the key; set $REALIGN_API_KEY or $OPENAI_API_KEY to a valid one",
    404: "it has no such path or model; check the URL and the model behind the #",
}
_LOCK = (
    threading.Lock()
)  # for the request rate of all engines; an engine without locks can be pickled


class EndpointEngine(Engine):
    """An OpenAI-compatible endpoint; no attribute holds the key, so `repr` and pickle do not."""

    def __init__(self, spec: str, options: EngineOptions | None = None) -> None:
        """Check the URL and the key; nothing is sent.

        Args:
            spec: "URL#MODEL"; requests go to URL/chat/completions.
            options: all but those of transformers.

        Raises:
            ValueError: for a malformed URL, or a key in the environment that would go over plain
                HTTP to another machine.
        """
        self.name = spec
        self._url, self._model, self._loopback = _parse(spec)
        self._options = options or EngineOptions()
        self._check_key()
        self._next_start = 0.0  # of a request, in the process's monotonic time
        self._renamed = False  # the server requires max_completion_tokens
        self._failures = 0  # requests in a row without an answer

    def chat(self, requests: Sequence[Chat]) -> list[Reply]:
        """Answer requests, several at once; equal ones are sent once. See `Engine.chat`.

        Raises:
            ValueError: when the server refuses the key, knows no such model, or redirects.
            ConnectionError: after several requests in a row without an answer.
        """
        stop = threading.Event()
        pool = ThreadPoolExecutor(self._options.concurrency, thread_name_prefix="endpoint")
        client = self._client(stop)
        try:
            futures: dict[str, Future[Reply]] = {}
            replies: list[Reply | Future[Reply]] = []
            for request in requests:
                try:
                    key = self._key(request)
                except Malformed as error:
                    replies.append(Reply("", str(error)))
                    continue
                if key not in futures:
                    futures[key] = pool.submit(self._answer, client, request, key)
                replies.append(futures[key])
            return [reply if isinstance(reply, Reply) else reply.result() for reply in replies]
        finally:
            stop.set()  # after an error no thread sends a further request
            pool.shutdown(wait=False, cancel_futures=True)
            client.close()

    def estimate(self, requests: Sequence[Chat], total: int | None = None) -> str:
        """Number and tokens of requests that are not answered yet, and their cost. See `Engine`.

        Rough: a token is four characters, an image 1,000 tokens, an answer as long as allowed.
        """
        unique: dict[str, Chat] = {}
        for request in requests:
            with suppress(Malformed):
                unique[self._key(request)] = request
        unanswered = [request for key, request in unique.items() if self._kept(key) is None]
        scale = total / len(requests) if total is not None and requests else 1
        sent, saved = round(scale * len(unanswered)), round(scale * (len(unique) - len(unanswered)))
        tokens = (_characters(r) // 4 + IMAGE_TOKENS * len(r.images) for r in unanswered)
        tokens_in = round(scale * sum(tokens))
        tokens_out = round(scale * sum(request.max_tokens for request in unanswered))
        about = "" if total in (None, len(requests)) else "about "
        line = (
            f"{self.name}: {about}{sent} requests to send ({saved} answered before), "
            f"about {tokens_in} tokens in and at most {tokens_out} out"
        )
        price_in, price_out = self._options.price_in, self._options.price_out
        if price_in is None or price_out is None:
            return f"{line}; for the cost give --price-in and --price-out (per million tokens)"
        cost = (tokens_in * price_in + tokens_out * price_out) / 1e6
        return (
            f"{line}; cost at most about {cost:.2f} (at {price_in:g} in and {price_out:g} out per "
            "million tokens)"
        )

    def _client(self, stop: threading.Event) -> openai.OpenAI:
        def prepare(request: httpx2.Request) -> None:
            self._wait_for_turn(stop)
            for name in set(request.headers) - set(_HEADERS):
                del request.headers[name]
            request.headers["Content-Type"] = request.headers["Accept"] = "application/json"
            request.headers["Accept-Encoding"] = "identity"  # the limit of bytes is of the text
            if key := self._check_key():
                request.headers["Authorization"] = f"Bearer {key}"
            request.extensions["deadline"] = time.monotonic() + self._options.timeout

        return openai.OpenAI(
            base_url=self._url,
            api_key="set by each request",
            timeout=self._options.timeout,
            max_retries=self._options.tries - 1,
            http_client=openai.DefaultHttpxClient(
                follow_redirects=False,
                trust_env=not self._loopback,  # requests to this machine use no proxy
                event_hooks={"request": [prepare], "response": [_read_bounded]},
            ),
        )

    def _wait_for_turn(self, stop: threading.Event) -> None:
        """Limit the rate of requests, repeated ones included, over all threads."""
        per_minute = self._options.requests_per_minute
        with _LOCK:
            start = max(self._next_start, time.monotonic())
            self._next_start = start + (60.0 / per_minute if per_minute else 0.0)
        if stop.wait(start - time.monotonic()):
            raise ConnectionError("stopped")

    def _answer(self, client: openai.OpenAI, request: Chat, key: str) -> Reply:
        if (saved := self._kept(key)) is not None:
            return saved
        reply = self._ask(client, request)
        if (file := self._file(key)) is not None and not reply.error:
            content = {"text": reply.text, "cut": reply.cut, "model": self._model}
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(content))
        return reply

    def _ask(self, client: openai.OpenAI, request: Chat) -> Reply:
        renamed = self._renamed
        body = payload(request, self._model, renamed)
        try:
            answer = client.post("/chat/completions", cast_to=httpx2.Response, content=body)
        except openai.APIStatusError as error:
            if error.status_code == 400 and "max_completion_tokens" in error.response.text:
                self._renamed = True  # newer models accept only max_completion_tokens
                if not renamed:
                    return self._ask(client, request)
            return self._refused(error.response)
        except openai.APITimeoutError:
            return self._unanswered(f"no answer within {self._options.timeout:g} s")
        except openai.APIConnectionError as error:
            return self._unanswered(scrub(repr(error.__cause__)))
        except _Unreadable as error:
            return Reply("", str(error))
        self._failures = 0
        return parse_answer(answer.content)

    def _refused(self, response: httpx2.Response) -> Reply:
        status, text = response.status_code, scrub(" ".join(response.text.split()))
        problem = f"HTTP status {status}" + (f": {text[:300]}" if text else "")
        if status in _REMEDIES:
            raise ValueError(f"{self._url} answers {problem}; {_REMEDIES[status]}.")
        if 300 <= status < 400:
            target = scrub(response.headers.get("location", "?"))
            raise ValueError(
                f"{self._url} redirects to {target}, which is not followed; give that URL."
            )
        if status in (408, 409, 429) or status >= 500:
            if (wait := _asked_wait(response)) <= _LONGEST_WAIT:
                return self._unanswered(problem)
            problem = (
                f"the server asks to wait {wait:g} s, more than the {_LONGEST_WAIT} s that are "
                f"waited for; {problem}"
            )
            return self._unanswered(problem, repeated=False)
        self._failures = 0
        return Reply("", problem)

    def _unanswered(self, problem: str, repeated: bool = True) -> Reply:
        self._failures += 1
        if self._failures >= GIVE_UP:
            raise ConnectionError(
                f"{self._url} has not answered {GIVE_UP} requests in a row (the last: {problem}). "
                "Earlier answers are kept: run again when it is up."
            )
        if not repeated:
            return Reply("", problem)
        tries = self._options.tries
        return Reply("", f"no answer in up to {tries} tries; the last: {problem}")

    def _check_key(self) -> str | None:
        """The key of the environment.

        Raises:
            ValueError: when it would go over plain HTTP to another machine, or cannot be a key.
                The message does not show it.
        """
        key = next((key for name in KEYS if (key := os.environ.get(name, "").strip())), None)
        if key and not (key.isascii() and key.isprintable()):
            raise ValueError(
                f"${' or $'.join(KEYS)} holds characters that no key has; set it again."
            )
        if key and self._url.lower().startswith("http:") and not self._loopback:
            raise ValueError(
                f"the key of the environment would go to {self._url} unencrypted. Use an https URL "
                f"or a tunnel to 127.0.0.1, or unset ${' and $'.join(KEYS)} for a server that "
                "needs none."
            )
        return key

    def _key(self, request: Chat) -> str:
        return request_digest(request, self._url, self._model)

    def _file(self, key: str) -> Path | None:
        folder = self._options.folder
        return None if folder is None else Path(folder) / key[:2] / f"{key}.json"

    def _kept(self, key: str) -> Reply | None:
        if (file := self._file(key)) is None:
            return None
        try:
            content = json.loads(file.read_bytes())
            return Reply(str(content["text"]), cut=bool(content["cut"]))
        except (OSError, ValueError, KeyError, TypeError):  # absent or damaged
            return None


def scrub(text: str) -> str:
    """A text without the key."""
    for name in KEYS:
        if key := os.environ.get(name, "").strip():
            text = text.replace(key, "[key]").replace(json.dumps(key)[1:-1], "[key]")
    return text


def payload(chat: Chat, model: str, renamed: bool = False) -> bytes:
    """The body of a request: JSON in ASCII, with images as data: URLs.

    Args:
        chat: the request.
        model: that answers.
        renamed: send `max_completion_tokens` in place of `max_tokens`.

    Raises:
        Malformed: for a malformed chat.
    """
    images = iter(chat.images)
    messages = []
    for message in typed_messages(chat):
        parts = [
            {"type": "image_url", "image_url": {"url": data_url(next(images))}}
            if part["type"] == "image"
            else part
            for part in message["content"]
        ]
        only_text = len(parts) == 1 and parts[0]["type"] == "text"
        # Servers of text-only models require a plain string.
        content = parts[0]["text"] if only_text else parts
        messages.append({"role": message["role"], "content": content})
    body: dict[str, Any] = {"model": model, "messages": messages}
    body["max_completion_tokens" if renamed else "max_tokens"] = chat.max_tokens
    body["temperature"] = chat.temperature
    if chat.temperature > 0:
        body["seed"] = chat.seed
    return json.dumps(body).encode()


def data_url(image: Image.Image) -> str:
    """An image as a data: URL: PNG when small, else JPEG, no side over 2048 pixels."""
    image = image.convert("RGB")
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    small = image.width * image.height <= _LOSSLESS
    kind, options = ("png", {}) if small else ("jpeg", {"quality": 95})
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def parse_answer(body: bytes) -> Reply:
    """The reply in the body of an answer; an error where it is not a chat completion."""
    try:
        choice = json.loads(body)["choices"][0]
        message = choice["message"]
        content = message["content"]
        if isinstance(content, list):
            content = "".join(p["text"] for p in content if p.get("type", "text") == "text")
        if not content and message.get("refusal"):
            return Reply("", scrub(f"the model refuses: {message['refusal']}"))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        start = scrub(body.decode(errors="replace"))[:100]  # scrub first: the cut may halve a key
        return Reply("", f"the answer is no chat completion: {start!r}")
    if not isinstance(content, str) or not content.strip():
        return Reply("", NO_TEXT)
    try:
        content.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which UTF-8 cannot encode
        return Reply("", "the answer holds half a character")
    return Reply(scrub(content.strip()), cut=choice.get("finish_reason") == "length")


class _Unreadable(Exception):
    """An answer is compressed or exceeds the limit of bytes."""


def _read_bounded(response: httpx2.Response) -> None:
    """Read a body within limits: the library's time limit is for each read, not for their sum."""
    assert isinstance(response.stream, httpx2.SyncByteStream)
    encoding = response.headers.pop("content-encoding", "identity")  # so that none is decoded
    if encoding.lower() != "identity":
        if response.is_success:
            raise _Unreadable(
                f"the answer has the Content-Encoding {scrub(encoding)!r}; it is not read"
            )
        response.stream.close()
        response.stream = httpx2.ByteStream(b"")  # the status decides
        return
    data = bytearray()
    for part in response.stream:
        data += part
        if time.monotonic() > response.request.extensions["deadline"]:
            raise httpx2.ReadTimeout("the answer takes too long", request=response.request)
        if len(data) > _MOST_BYTES:
            raise _Unreadable(f"the answer is longer than {_MOST_BYTES} bytes")
    response.stream.close()
    response.stream = httpx2.ByteStream(bytes(data))


def _asked_wait(response: httpx2.Response) -> float:
    """Seconds of `Retry-After`, read as the client reads them; 0 where the server names none."""
    for name, divisor in (("retry-after-ms", 1000), ("retry-after", 1)):
        with suppress(ValueError):
            seconds = float(response.headers.get(name, "")) / divisor
            return seconds if math.isfinite(seconds) else 0.0
    with suppress(ValueError):
        return (
            parsedate_to_datetime(response.headers.get("retry-after", "")).timestamp() - time.time()
        )
    return 0.0


def _characters(request: Chat) -> int:
    parts = (part for message in typed_messages(request) for part in message["content"])
    return sum(len(part.get("text", "")) for part in parts)


def _parse(spec: str) -> tuple[str, str, bool]:
    """URL without trailing slash, model, and whether the host is this machine.

    Raises:
        ValueError: for a URL without host or model, a port out of range, or a URL with a user, a
            password or a query, which may contain keys. The message does not show the URL.
    """
    text, _, model = spec.partition("#")
    if "@" in text or "?" in text:
        raise ValueError(
            "the URL of the endpoint holds a user, a password or a query. Give it without; the "
            f"key is read from ${' or $'.join(KEYS)}."
        )
    try:
        url = httpx2.URL(text)
    except httpx2.InvalidURL as error:
        raise ValueError(f"the endpoint's URL cannot be read ({error}).") from None
    if not (url.host and model) or " " in text:
        raise ValueError(
            "the endpoint is no http or https URL with the model behind a #, "
            "such as https://host/v1#MODEL."
        )
    if url.port is not None and not 1 <= url.port <= 65535:  # a socket takes it modulo 65536
        raise ValueError(f"the port of the endpoint's URL is {url.port}; give one of 1 to 65535.")
    with suppress(ValueError):
        return text.rstrip("/"), model, ipaddress.ip_address(url.host).is_loopback
    return text.rstrip("/"), model, url.host == "localhost"
