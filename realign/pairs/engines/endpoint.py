"""The endpoint engine: answers by an OpenAI-compatible server on a URL that the user gives.

A request is sent again after 429, 5xx, a time-out or a cut connection, with a growing, random wait
that `Retry-After` overrules. Answers are kept on disk, so a run that goes on pays for none twice.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from realign.data.errors import Malformed
from realign.pairs.engines.chat import (
    Chat,
    Engine,
    Reply,
    request_digest,
    typed_messages,
    write_whole,
)
from realign.pairs.engines.wire import Address, Answer, Transport, parse_answer, payload

IMAGE_TOKENS = 1000  # of one image, for the estimate: 765 to 1105 where prices are published
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before the second try, and before any
LONGEST_PAUSE = 600.0  # seconds of Retry-After that are waited for; past it the run stops
GIVE_UP = 40  # tries in a row, of any requests, without one answer


class EndpointEngine(Engine):
    """An OpenAI-compatible endpoint.

    The key is read from $REALIGN_API_KEY or $OPENAI_API_KEY when a request is sent. No attribute of
    the engine holds it, so neither `repr` nor pickle can show it.
    """

    def __init__(
        self,
        spec: str,
        *,
        folder: str | Path | None = None,
        concurrency: int = 8,
        requests_per_minute: float | None = None,
        tries: int = 5,
        timeout: float = 120.0,
        price_in: float | None = None,
        price_out: float | None = None,
        first_wait: float = FIRST_WAIT,
    ) -> None:
        """Check the settings; nothing is sent.

        Args:
            spec: "URL#MODEL"; requests go to URL/chat/completions.
            folder: where answers are kept, one file each; None keeps none.
            concurrency: requests under way at once.
            requests_per_minute: most requests started in a minute, repeated ones included.
            tries: how often a request is sent at most.
            timeout: seconds for an answer, from the connection to its last byte.
            price_in: of a million input tokens, for `estimate`.
            price_out: of a million output tokens.
            first_wait: seconds before the second try, on average; doubled for each further one.

        Raises:
            ValueError: for a malformed URL, a value out of range, or a key in the environment that
                would go over plain HTTP to another machine.
        """
        least = {"concurrency": (concurrency, 1), "tries": (tries, 1)}
        for name, (value, bound) in least.items():
            if value < bound:
                raise ValueError(f"{name} is {value}; it must be at least {bound}.")
        above = {"timeout": timeout, "requests_per_minute": requests_per_minute}
        for name, value in above.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0.")
        for name, value in {"price_in": price_in, "price_out": price_out}.items():
            if value is not None and not value >= 0:
                raise ValueError(f"{name} is {value}; it must be 0 or more.")
        self._address = Address.parse(spec)
        self._address.headers()  # a key that must not be sent is refused now, not in the run
        self.name = spec
        self._transport = Transport(self._address, timeout)
        self._folder = None if folder is None else Path(folder)
        self._concurrency, self._tries = concurrency, tries
        self._prices = (price_in, price_out)
        self._first_wait = first_wait
        self._pace = _Pace(requests_per_minute)
        self._renamed = False  # the server wants max_completion_tokens
        self._failures = 0  # tries in a row without an answer

    def __getstate__(self) -> dict:
        """For other processes: without the lock, which each has of its own."""
        return self.__dict__ | {"_pace": self._pace.per_minute}

    def __setstate__(self, state: dict) -> None:
        """Restore, with a new lock."""
        self.__dict__.update(state, _pace=_Pace(state["_pace"]))

    def chat(self, requests: Sequence[Chat]) -> list[Reply]:
        """Answer requests, several at once; equal ones are sent once. See `Engine.chat`.

        Raises:
            ValueError: when the server refuses the key, knows no such model, or redirects.
            ConnectionError: after many tries in a row without an answer, or when the server asks
                to wait for more than ten minutes.
        """
        stop = threading.Event()
        pool = ThreadPoolExecutor(self._concurrency, thread_name_prefix="endpoint")
        try:
            asked, replies = {}, []
            for request in requests:
                try:
                    key = request_digest(request, self._address.url, self._address.model)
                except Malformed as error:
                    replies.append(Reply("", str(error)))
                    continue
                if key not in asked:
                    asked[key] = pool.submit(self._answer, request, key, stop)
                replies.append(asked[key])
            return [reply if isinstance(reply, Reply) else reply.result() for reply in replies]
        finally:
            stop.set()  # after an error no thread goes on waiting
            pool.shutdown(wait=False, cancel_futures=True)

    def estimate(self, requests: Sequence[Chat], total: int | None = None) -> str:
        """How many requests and tokens there are to pay for, and the cost at the prices given.

        Rough: a token is taken as four characters, an image as 1,000, an answer as long as allowed.
        See `Engine.estimate`.
        """
        tokens_in = tokens_out = 0
        keys: set[str] = set()
        kept = 0
        for request in requests:
            try:
                key = request_digest(request, self._address.url, self._address.model)
            except Malformed:
                continue
            if key in keys:
                continue
            keys.add(key)
            if self._kept(key) is not None:
                kept += 1
                continue
            tokens_in += _characters(request) // 4 + IMAGE_TOKENS * len(request.images)
            tokens_out += request.max_tokens
        sent = len(keys) - kept
        if total is not None and requests:
            scale = total / len(requests)
            sent, kept = round(sent * scale), round(kept * scale)
            tokens_in, tokens_out = round(tokens_in * scale), round(tokens_out * scale)
        about = "" if total in (None, len(requests)) else "about "
        line = (
            f"{self.name}: {about}{sent} requests to send ({kept} answered before), "
            f"about {tokens_in} tokens in and at most {tokens_out} out"
        )
        price_in, price_out = self._prices
        if price_in is None or price_out is None:
            return f"{line}; for the cost give --price-in and --price-out (per million tokens)"
        cost = (tokens_in * price_in + tokens_out * price_out) / 1e6
        return (
            f"{line}; cost at most about {cost:.2f} (at {price_in:g} in and {price_out:g} out per "
            "million tokens)"
        )

    def _answer(self, request: Chat, key: str, stop: threading.Event) -> Reply:
        if (kept := self._kept(key)) is not None:
            return kept
        try:
            reply = self._ask(request, stop)
        except Exception:
            stop.set()  # the others wait for nothing
            raise
        if self._folder is not None and not reply.error:
            said = {"text": reply.text, "cut": reply.cut, "model": self._address.model}
            write_whole(self._file(key), json.dumps(said).encode())
        return reply

    def _ask(self, request: Chat, stop: threading.Event) -> Reply:
        """Send a request until it is answered, refused for good, or its tries are over."""
        answer = Answer(0)
        tried = 0
        while tried < self._tries and not stop.is_set():
            if tried:
                # Random, so that requests which failed together do not come back together.
                wait = min(self._first_wait * 2 ** (tried - 1), LONGEST_WAIT)
                if answer.retry_after is None:
                    stop.wait(wait * random.uniform(0.5, 1.5))
            if not self._pace.wait(stop):
                break
            renamed = self._renamed
            answer = self._transport.send(payload(request, self._address.model, renamed))
            if answer.wants_renamed and not renamed:
                self._renamed = True  # newer models take max_completion_tokens alone
                continue
            tried += 1
            if not answer.again:
                self._failures = 0
                return parse_answer(answer)
            self._failures += 1
            if answer.retry_after is not None:
                if answer.retry_after > LONGEST_PAUSE:
                    raise ConnectionError(
                        f"{self._address.url} asks to wait {answer.retry_after:.0f} s "
                        f"({answer.problem}). Its answers are kept: run again then."
                    )
                self._pace.pause(answer.retry_after)
            if self._failures >= GIVE_UP:
                raise ConnectionError(
                    f"{self._address.url} has not answered {GIVE_UP} tries in a row (the "
                    f"last: {answer.problem}). Answers before are kept: run again when it is up."
                )
        return Reply("", f"no answer in {tried} tries; the last: {answer.problem or 'stopped'}")

    def _file(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / key[:2] / f"{key}.json"

    def _kept(self, key: str) -> Reply | None:
        if self._folder is None:
            return None
        try:
            said = json.loads(self._file(key).read_bytes())
            return Reply(str(said["text"]), cut=bool(said["cut"]))
        except (OSError, ValueError, KeyError, TypeError):  # none, or a damaged one
            return None


def _characters(request: Chat) -> int:
    parts = (part for message in typed_messages(request) for part in message["content"])
    return sum(len(part.get("text", "")) for part in parts)


class _Pace:
    """Spaces out the starts of requests over all threads of a process."""

    def __init__(self, per_minute: float | None) -> None:
        self.per_minute = per_minute
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._lock, self._next = threading.Lock(), 0.0

    def wait(self, stop: threading.Event) -> bool:
        """Wait for a turn; returns False when `stop` came first."""
        while True:
            with self._lock:
                now = time.monotonic()
                if now >= self._next:
                    self._next = now + self._gap
                    return not stop.is_set()
                left = self._next - now
            if stop.wait(left):
                return False

    def pause(self, seconds: float) -> None:
        """Start nothing for that long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)
