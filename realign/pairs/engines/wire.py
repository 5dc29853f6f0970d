"""The OpenAI chat format on the wire: address, key, bodies, and one exchange with what came of it.

The key comes from the environment alone and goes into one header. It is taken out of every text
that a server sends back, since servers like to quote it.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import io
import ipaddress
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any

from PIL import Image

from realign.pairs.engines.chat import NO_TEXT, Chat, Reply, typed_messages

KEYS = ("REALIGN_API_KEY", "OPENAI_API_KEY")  # environment variables, the first that is set
LONGEST_SIDE = 2048  # pixels of an image that is sent; servers make larger ones smaller
_LOSSLESS = 256 * 256  # pixels; larger images go as JPEG, a tenth of the bytes
_MOST_BYTES = 16 * 2**20  # of an answer
_REMEDIES = {
    401: "it refuses the key; set $REALIGN_API_KEY or $OPENAI_API_KEY to a valid one",
    404: "it has no such path or model; look at the URL and at the model behind the #",
}


@dataclass(frozen=True)
class Address:
    """Where an endpoint is, and the model asked there."""

    url: str  # without trailing slash
    model: str
    loopback: bool

    @classmethod
    def parse(cls, spec: str) -> Address:
        """Take "URL#MODEL" apart.

        Raises:
            ValueError: for a URL without host or model, or one with a user, a password or a query,
                where keys hide.
        """
        url, _, model = spec.partition("#")
        if "@" in url or "?" in url:  # the message does not show it
            raise ValueError(
                "the URL of the endpoint holds a user, a password or a query. Give it without; the "
                f"key is read from ${' or $'.join(KEYS)}."
            )
        try:
            parts = urllib.parse.urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise ValueError(f"the endpoint's URL cannot be read ({error}).") from None
        readable = url.isprintable() and " " not in url
        if parts.scheme not in ("http", "https") or not (host and model and readable):
            raise ValueError(
                "the endpoint is no http or https URL with the model behind a #, "
                "such as https://host/v1#MODEL."
            )
        return cls(url.rstrip("/"), model, _is_loopback(host))

    def headers(self) -> dict[str, str]:
        """Headers of a request, with the key where there is one.

        Raises:
            ValueError: when a key would go over plain HTTP to another machine, or is no key.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := api_key():
            if self.url.lower().startswith("http:") and not self.loopback:
                raise ValueError(
                    f"the key of the environment would go to {self.url} unencrypted. Use an https "
                    f"URL or a tunnel to 127.0.0.1, or unset ${' and $'.join(KEYS)} for a server "
                    "that needs none."
                )
            headers["Authorization"] = f"Bearer {key}"
        return headers


@dataclass(frozen=True)
class Answer:
    """What came of one exchange: a body, or a problem and whether to try again."""

    status: int  # 0 where there was no answer
    body: bytes = b""
    problem: str = ""
    again: bool = False
    retry_after: float | None = None  # seconds the server asks to wait
    wants_renamed: bool = False  # it takes max_completion_tokens in place of max_tokens


class Transport:
    """Sends bodies to one address. No redirect is followed: a key stays with its host."""

    def __init__(self, address: Address, timeout: float) -> None:
        """An endless answer ends after `timeout` seconds, too."""
        self._address, self._timeout = address, timeout

    def send(self, body: bytes) -> Answer:
        """One exchange.

        Raises:
            ValueError: for a status that every request would get: 401, 404 or a redirect.
        """
        url = f"{self._address.url}/chat/completions"
        request = urllib.request.Request(
            url, data=body, headers=self._address.headers(), method="POST"
        )
        # A proxy must not see what is meant for this machine.
        handlers = [urllib.request.ProxyHandler({})] if self._address.loopback else []
        opener = urllib.request.build_opener(_NoRedirect, *handlers)
        end = time.monotonic() + self._timeout
        try:
            with opener.open(request, timeout=self._timeout) as response:
                return Answer(response.status, self._read(response, end))
        except urllib.error.HTTPError as error:
            with error:
                return self._refusal(error, end)
        except _TooLong as error:
            return Answer(0, problem=str(error))
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            late = isinstance(reason, TimeoutError)
            what = f"no answer within {self._timeout:g} s" if late else f"{reason!r}"
            return Answer(0, problem=scrub(what), again=True)

    def _read(self, response: Any, end: float) -> bytes:
        """The body, whole; each read has the connection's own time-out besides."""
        data = bytearray()
        while part := response.read1(2**16):
            data += part
            if time.monotonic() > end:
                raise TimeoutError
            if len(data) > _MOST_BYTES:
                raise _TooLong(f"the answer is longer than {_MOST_BYTES} bytes")
        length = response.headers.get("Content-Length", "")
        if length.isdigit() and len(data) < int(length):
            raise http.client.IncompleteRead(b"", int(length) - len(data))
        return bytes(data)

    def _refusal(self, error: urllib.error.HTTPError, end: float) -> Answer:
        try:
            body = self._read(error, end)
        except (OSError, http.client.HTTPException, _TooLong):
            body = b""
        said = scrub(" ".join(body.decode(errors="replace").split()))
        problem = f"HTTP status {error.code}" + (f": {said[:300]}" if said else "")
        where = self._address.url
        if error.code in _REMEDIES:
            raise ValueError(f"{where} answers {problem}; {_REMEDIES[error.code]}.")
        if 300 <= error.code < 400:
            target = scrub(str(error.headers.get("Location", "?")))
            raise ValueError(
                f"{where} redirects to {target}, which is not followed; give that URL."
            )
        again = error.code in (408, 409, 425, 429) or error.code >= 500
        wait = _retry_after(error.headers.get("Retry-After")) if again else None
        renamed = error.code == 400 and "max_completion_tokens" in said
        return Answer(error.code, b"", problem, again, wait, renamed)


def api_key() -> str | None:
    """The key of the environment, or None.

    Raises:
        ValueError: when it cannot be a key. The message does not show it.
    """
    for name in KEYS:
        if key := os.environ.get(name, "").strip():
            if not (key.isascii() and key.isprintable()):
                raise ValueError(f"${name} holds characters that no key has. Set it again.")
            return key
    return None


def scrub(text: str) -> str:
    """A text without the key."""
    for name in KEYS:
        if key := os.environ.get(name, "").strip():
            text = text.replace(key, "[key]").replace(json.dumps(key)[1:-1], "[key]")
    return text


def payload(chat: Chat, model: str, renamed: bool = False) -> bytes:
    """The body of a request, JSON in ASCII; images are data: URLs.

    Args:
        chat: the request.
        model: asked.
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
        text_alone = len(parts) == 1 and parts[0]["type"] == "text"
        # Servers of text-only models want a plain string.
        messages.append(
            {"role": message["role"], "content": parts[0]["text"] if text_alone else parts}
        )
    body: dict[str, Any] = {"model": model, "messages": messages}
    body["max_completion_tokens" if renamed else "max_tokens"] = chat.max_tokens
    body["temperature"] = chat.temperature
    if chat.temperature > 0:
        body["seed"] = chat.seed
    return json.dumps(body).encode()


def data_url(image: Image.Image) -> str:
    """An image as a data: URL: PNG when small, else JPEG, no side over 2048 pixels."""
    image = image.convert("RGB")
    if max(image.size) > LONGEST_SIDE:
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    small = image.width * image.height <= _LOSSLESS
    kind, options = ("png", {}) if small else ("jpeg", {"quality": 95})
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def parse_answer(answer: Answer) -> Reply:
    """The reply in an answer; one that is no chat completion gives a reply with an error."""
    if answer.problem:
        return Reply("", answer.problem)
    try:
        choice = json.loads(answer.body)["choices"][0]
        message = choice["message"]
        content = message["content"]
        if isinstance(content, list):
            content = "".join(p["text"] for p in content if p.get("type", "text") == "text")
        if not content and message.get("refusal"):
            return Reply("", scrub(f"the model refuses: {message['refusal']}"))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        start = scrub(answer.body.decode(errors="replace"))[:100]  # in this order: no half a key
        return Reply("", f"the answer is no chat completion: {start!r}")
    if not isinstance(content, str) or not content.strip():
        return Reply("", NO_TEXT)
    try:
        content.encode()
    except UnicodeEncodeError:  # half of a pair of surrogates, which no file can hold
        return Reply("", "the answer holds half a character")
    return Reply(scrub(content.strip()), cut=choice.get("finish_reason") == "length")


class _TooLong(Exception):
    """An answer is longer than any should be."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Leaves redirects as errors."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, of a number or a date."""
    if not value:
        return None
    try:
        return max(0.0, float(value)) if value.strip()[:1].isdigit() else _until(value)
    except (ValueError, OverflowError):
        return None


def _until(date: str) -> float:
    return max(0.0, email.utils.parsedate_to_datetime(date).timestamp() - time.time())
