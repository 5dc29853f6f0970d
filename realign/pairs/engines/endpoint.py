"""Endpoint engine: sends chats to an OpenAI-compatible server with the `openai` client.

The engine repeats a request after status 408, 409, 429 or 5xx, a time-out or a lost connection. It
waits for increasing random times, or for the time in `Retry-After`. Answers are saved on disk, so a
resumed run pays for each answer once.

A server may answer anything, at any speed. `deadline.py` limits the time of an exchange and the
size of an answer. Texts of the server appear in messages only on one line, printable and shortened.

The key is read from the environment and sent in one header. It is removed from all text that a
server returns, because some servers quote it. The client would also send headers from other
variables (OPENAI_ORG_ID, OPENAI_CUSTOM_HEADERS), so the engine sets all headers itself. A redirect
is an error, because the key and the images may go only to the given host.
"""

from __future__ import annotations

import base64
import io
import ipaddress
import json
import math
import os
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import openai
from PIL import Image

from realign.data.errors import Malformed, shorten
from realign.files import read_json, write_whole
from realign.pairs.engines.chat import (
    NO_TEXT,
    Chat,
    Engine,
    EngineOptions,
    Reply,
    request_digest,
    typed_messages,
)
from realign.pairs.engines.deadline import Deadline, Unreadable, read_bounded

KEYS = ("REALIGN_API_KEY", "OPENAI_API_KEY")
"""Environment variables for the key. The first one that is set is used."""
IMAGE_TOKENS = 1000
"""Tokens of an image in the estimate. Providers with published prices count 765 to 1105."""
LONGEST_SIDE = 2048
"""Maximum side of an image that is sent, in pixels. Servers reduce larger images."""
GIVE_UP = 8
"""Number of consecutive requests without an answer after which the run stops."""

_LOSSLESS = 256 * 256
"""Pixels up to which an image is sent as PNG. As JPEG, larger images have a tenth of the bytes."""
_LONGEST_WAIT = 120
"""Maximum `Retry-After` in seconds. After a longer one, the request is not repeated."""
_FIRST_WAIT, _LAST_WAIT = 0.5, 8.0
"""First and longest wait between two tries without `Retry-After`, in seconds."""
_HEADERS = ("host", "connection", "content-length")
"""Headers that the HTTP library sets."""
_REMEDIES = {
    401: "it rejects the key; set $REALIGN_API_KEY or $OPENAI_API_KEY to a valid key",
    404: "it has no such path or model; check the URL and the model after the #",
}
_LOCK = threading.Lock()
"""Lock for the request rate of all engines. Engines hold no lock, so they can be pickled."""


class EndpointEngine(Engine):
    """An OpenAI-compatible endpoint. No attribute holds the key, so `repr` and pickle omit it."""

    def __init__(self, spec: str, options: EngineOptions | None = None) -> None:
        """Check the URL and the key. Nothing is sent.

        Args:
            spec: "URL#MODEL". Requests are sent to URL/chat/completions.
            options: options of the engine. Those for transformers have no effect.

        Raises:
            ValueError: for a malformed URL, or a key in the environment that would be sent over
                plain HTTP to another machine.
        """
        self.name = spec
        self._url, self._model, self._loopback = _parse(spec)
        self._options = options or EngineOptions()
        self._check_key()
        self._next_start = 0.0  # earliest start of the next request, in monotonic time
        self._renamed = False  # whether the server requires max_completion_tokens
        self._failures = 0  # consecutive requests without an answer

    def chat(self, requests: Sequence[Chat]) -> list[Reply]:
        """Answer requests concurrently. Equal requests are sent once. See `Engine.chat`.

        Raises:
            ValueError: when the server rejects the key, has no such model, or redirects.
            ConnectionError: after several consecutive requests without an answer.
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
                    futures[key] = pool.submit(self._answer, client, request, key, stop)
                replies.append(futures[key])
            done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()  # an error ends the run before slower requests do
            return [reply if isinstance(reply, Reply) else reply.result() for reply in replies]
        finally:
            stop.set()  # after an error, no thread sends another request
            pool.shutdown(wait=False, cancel_futures=True)
            client.close()

    def estimate(self, requests: Sequence[Chat], total: int | None = None) -> str:
        """Estimated number, tokens and cost of unanswered requests. See `Engine.estimate`.

        The estimate counts four characters as a token, 1,000 tokens for an image, and the maximum
        length for an answer.
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
            return f"{line}; pass --price-in and --price-out (per million tokens) for the cost"
        cost = (tokens_in * price_in + tokens_out * price_out) / 1e6
        return (
            f"{line}; cost at most about {cost:.2f} (at {price_in:g} in and {price_out:g} out per "
            "million tokens)"
        )

    def _client(self, stop: threading.Event) -> openai.OpenAI:
        deadline = Deadline()

        def prepare(request: httpx2.Request) -> None:
            self._wait_for_turn(stop)
            for name in set(request.headers) - set(_HEADERS):
                del request.headers[name]
            request.headers["Content-Type"] = request.headers["Accept"] = "application/json"
            request.headers["Accept-Encoding"] = "identity"  # the size limit is for plain text
            if key := self._check_key():
                request.headers["Authorization"] = f"Bearer {key}"
            deadline.at = time.monotonic() + self._options.timeout

        client = openai.DefaultHttpxClient(
            follow_redirects=False,
            trust_env=not self._loopback,  # no proxy for requests to this machine
            event_hooks={"request": [prepare], "response": [read_bounded]},
        )
        deadline.limit(client)
        return openai.OpenAI(
            base_url=self._url,
            api_key="set by each request",
            timeout=self._options.timeout,
            max_retries=0,  # its waits would outlast Ctrl-C, and servers could order more tries
            http_client=client,
        )

    def _wait_for_turn(self, stop: threading.Event) -> None:
        """Limits the rate of requests over all threads, including repeated requests."""
        per_minute = self._options.requests_per_minute
        with _LOCK:
            start = max(self._next_start, time.monotonic())
            self._next_start = start + (60.0 / per_minute if per_minute else 0.0)
        if stop.wait(start - time.monotonic()):
            raise ConnectionError("stopped")

    def _answer(
        self, client: openai.OpenAI, request: Chat, key: str, stop: threading.Event
    ) -> Reply:
        if (saved := self._kept(key)) is not None:
            return saved
        reply = self._ask(client, request, stop)
        if (file := self._file(key)) is not None and not reply.error:
            content = {"text": reply.text, "cut": reply.cut, "model": self._model}
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(content))
        return reply

    def _ask(self, client: openai.OpenAI, request: Chat, stop: threading.Event) -> Reply:
        renamed, problem = self._renamed, ""
        body = payload(request, self._model, renamed)
        for earlier in range(self._options.tries):
            pause = min(_FIRST_WAIT * 2**earlier, _LAST_WAIT) * random.uniform(0.75, 1)
            try:
                answer = client.post("/chat/completions", cast_to=httpx2.Response, content=body)
                self._failures = 0
                return parse_answer(answer.content)
            except openai.APIStatusError as error:
                response = error.response
                status = response.status_code
                if status == 400 and b"max_completion_tokens" in response.content:
                    self._renamed = True  # newer models accept only max_completion_tokens
                    if not renamed:
                        return self._ask(client, request, stop)
                problem = f"HTTP status {status}"
                if text := _shown(response.content.decode(errors="replace")):
                    problem += f": {text}"
                if status not in (408, 409, 429) and status < 500:
                    return self._refused(response, problem)
                if (asked := _asked_wait(response)) > _LONGEST_WAIT:
                    problem = (
                        f"the server asks to wait {asked:g} s, more than the limit of "
                        f"{_LONGEST_WAIT} s; {problem}"
                    )
                    return self._unanswered(problem, repeated=False)
                pause = asked if asked > 0 else pause
            except openai.APITimeoutError:
                problem = f"no answer within {self._options.timeout:g} s"
            except openai.APIConnectionError as error:
                problem = _shown(repr(error.__cause__))
            except Unreadable as error:
                return Reply("", _shown(str(error)))
            if earlier + 1 < self._options.tries and stop.wait(pause):
                raise ConnectionError("stopped")
        return self._unanswered(problem)

    def _refused(self, response: httpx2.Response, problem: str) -> Reply:
        status = response.status_code
        if status in _REMEDIES:
            raise ValueError(f"{self._url} answers {problem}; {_REMEDIES[status]}.")
        if 300 <= status < 400:
            target = _shown(response.headers.get("redirect", "?"))
            raise ValueError(
                f"{self._url} redirects to {target}, and redirects are not followed. Pass that URL."
            )
        self._failures = 0
        return Reply("", problem)

    def _unanswered(self, problem: str, repeated: bool = True) -> Reply:
        self._failures += 1
        if self._failures >= GIVE_UP:
            raise ConnectionError(
                f"{self._url} has not answered {GIVE_UP} consecutive requests (the last: "
                f"{problem}). Earlier answers are kept. Run again when the server is available."
            )
        if not repeated:
            return Reply("", problem)
        tries = self._options.tries
        return Reply("", f"no answer in up to {tries} tries (the last: {problem})")

    def _check_key(self) -> str | None:
        """The key from the environment, or None.

        Raises:
            ValueError: when the key would be sent over plain HTTP to another machine, or has
                invalid characters. The message does not show the key.
        """
        key = next((key for name in KEYS if (key := os.environ.get(name, "").strip())), None)
        if key and not (key.isascii() and key.isprintable()):
            raise ValueError(
                f"${' or $'.join(KEYS)} contains characters that are not allowed in a key. Set it "
                "again."
            )
        if key and self._url.lower().startswith("http:") and not self._loopback:
            raise ValueError(
                f"the key in the environment would be sent to {self._url} unencrypted. Use an "
                "https URL or a tunnel to 127.0.0.1. For a server that needs no key, unset "
                f"${' and $'.join(KEYS)}."
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
            content = read_json(file)
        except (OSError, ValueError):  # absent or damaged
            return None
        reply = _checked(content.get("text"), content.get("cut") is True)
        return None if reply.error else reply


def scrub(text: str) -> str:
    """The text with the key replaced by [key]."""
    for name in KEYS:
        if key := os.environ.get(name, "").strip():
            for form in (key, json.dumps(key)[1:-1], quote(key), quote(key, safe="")):
                text = text.replace(form, "[key]")
    return text


def _shown(text: str) -> str:
    """A server's text for a message: without the key, on one line, printable and shortened."""
    return shorten(scrub(text))  # scrub first, or half a key may remain


def payload(chat: Chat, model: str, renamed: bool = False) -> bytes:
    """The body of a request, as JSON in ASCII with images as data: URLs.

    Args:
        chat: the request.
        model: name of the model.
        renamed: whether to send `max_completion_tokens` in place of `max_tokens`.

    Raises:
        Malformed: for a malformed chat.
    """
    images = iter(chat.load())
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
    """An image as a data: URL: a small PNG, or a JPEG with sides of at most 2048 pixels."""
    image = image.convert("RGB")
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    small = image.width * image.height <= _LOSSLESS
    kind, options = ("png", {}) if small else ("jpeg", {"quality": 95})
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


_CUT = ("length", "content_filter", "abort")
"""Reasons for the end of an answer that is not whole."""


def parse_answer(body: bytes) -> Reply:
    """The reply in the body of an answer, or an error if it is not a chat completion."""
    try:
        choice = json.loads(body)["choices"][0]
        message = choice["message"]
        content = message["content"]
        if isinstance(content, list):
            content = "".join(p["text"] for p in content if p.get("type", "text") == "text")
        if not content and message.get("refusal"):
            return Reply("", _shown(f"the model refuses: {message['refusal']}"))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        start = _shown(body.decode(errors="replace"))
        return Reply("", f"the answer is not a chat completion: {start!r}")
    return _checked(content, choice.get("finish_reason") in _CUT)


def _checked(content: Any, cut: bool) -> Reply:
    """A reply with a text of a server, or an error if it is no text."""
    if not isinstance(content, str) or not content.strip():
        return Reply("", NO_TEXT)
    try:
        content.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which UTF-8 cannot encode
        return Reply("", "the answer contains half of a surrogate pair")
    return Reply(scrub(content.strip()), cut=cut)


def _asked_wait(response: httpx2.Response) -> float:
    """Seconds in `Retry-After`, possibly infinite; 0 without that header or for nonsense."""
    for name, divisor in (("retry-after-ms", 1000), ("retry-after", 1)):
        with suppress(ValueError):
            seconds = float(response.headers.get(name, "")) / divisor
            return 0.0 if math.isnan(seconds) else max(seconds, 0.0)
    with suppress(ValueError, TypeError, OverflowError, IndexError, OSError):
        date = parsedate_to_datetime(response.headers.get("retry-after", ""))
        return max(date.timestamp() - time.time(), 0.0)
    return 0.0


def _characters(request: Chat) -> int:
    parts = (part for message in typed_messages(request) for part in message["content"])
    return sum(len(part.get("text", "")) for part in parts)


def _parse(spec: str) -> tuple[str, str, bool]:
    """URL without a trailing slash, model, and whether the host is this machine.

    Raises:
        ValueError: for a URL without host or model, or with a port out of range. A URL with a user,
            a password or a query is also an error. The message does not show the URL, which may
            contain a key.
    """
    text, _, model = spec.partition("#")
    if "@" in text or "?" in text:
        raise ValueError(
            "the URL of the endpoint contains a user, a password or a query. Remove it. The key is "
            f"read from ${' or $'.join(KEYS)}."
        )
    try:
        url = httpx2.URL(text)
    except httpx2.InvalidURL as error:
        raise ValueError(f"the endpoint's URL cannot be parsed ({error}).") from None
    if not (url.host and model) or " " in text:
        raise ValueError(
            "the endpoint is not an http or https URL with the model after a #, "
            "such as https://host/v1#MODEL."
        )
    if url.port is not None and not 1 <= url.port <= 65535:  # a socket would use it modulo 65536
        raise ValueError(
            f"the port of the endpoint's URL is {url.port}; it must be from 1 to 65535."
        )
    with suppress(ValueError):
        return text.rstrip("/"), model, ipaddress.ip_address(url.host).is_loopback
    return text.rstrip("/"), model, url.host == "localhost"
