"""Time limit of a whole HTTP exchange, and the limits on an answer.

The HTTP library limits each read and each write. A server that sends one byte a second, or headers
without end, never exceeds such a limit. So every operation on a socket gets the time that is left
until the deadline of its exchange. Only the look-up of a host's name has no limit here.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from typing import Any

import httpcore2
import httpx2

MOST_BYTES = 4 * 2**20
"""Maximum size of an answer. JSON of this size takes up to 0.5 s and 150 MB."""

_PART = 16 * 2**10
"""Bytes between two looks at the clock while a request is sent."""
_KEPT = ("retry-after-ms", "retry-after", "location")
_LONGEST_HEADER = 1000


class Unreadable(Exception):
    """An answer that is compressed or too large."""


class Deadline(threading.local):
    """The end of the exchange of the current thread, in monotonic time."""

    at = 0.0

    def left(self, expired: type[Exception]) -> float:
        """The seconds that are left.

        Raises:
            expired: after the deadline.
        """
        if (seconds := self.at - time.monotonic()) <= 0:
            raise expired("the exchange takes too long")
        return seconds

    def limit(self, client: httpx2.Client) -> None:
        """Apply the deadline to all connections of a client.

        Raises:
            ValueError: for a version of httpx2 without the attributes that this method sets.
        """
        for transport in (client._transport, *client._mounts.values()):
            if transport is None:  # a host without a proxy
                continue
            pool = getattr(transport, "_pool", None)
            if not isinstance(getattr(pool, "_network_backend", None), httpcore2.SyncBackend):
                raise ValueError(
                    f"httpx2 {httpx2.__version__} does not let the engine limit the time of an "
                    "exchange. Install httpx2 2.16."
                )
            pool._network_backend = _Backend(self)  # pyright: ignore[reportOptionalMemberAccess]


class _Backend(httpcore2.SyncBackend):
    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline

    def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, *args: Any, **kwargs: Any
    ) -> httpcore2.NetworkStream:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpcore2.ConnectError(str(error)) from error
        failure: Exception = httpcore2.ConnectError("the host has no address")
        for number, (*_, address) in enumerate(found):
            # The library would give each address the full time. An equal share lets the next
            # address answer when this one is dead.
            share = self._deadline.left(httpcore2.ConnectTimeout) / (len(found) - number)
            try:
                stream = super().connect_tcp(str(address[0]), port, share, *args, **kwargs)
                return _Stream(stream, self._deadline)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure


class _Stream(httpcore2.NetworkStream):
    def __init__(self, stream: httpcore2.NetworkStream, deadline: Deadline) -> None:
        self._stream, self._deadline = stream, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._deadline.left(httpcore2.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        view = memoryview(buffer)
        for start in range(0, len(view), _PART):
            left = self._deadline.left(httpcore2.WriteTimeout)
            self._stream.write(view[start : start + _PART], left)  # pyright: ignore[reportArgumentType]

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore2.NetworkStream:
        left = self._deadline.left(httpcore2.ConnectTimeout)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, left), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def read_bounded(response: httpx2.Response) -> None:
    """Read a body within the limit of size, and remove most headers.

    The client would decode a text with the codec of `Content-Type`, such as zlib or punycode.

    Raises:
        Unreadable: for an answer that is compressed or too large.
    """
    assert isinstance(response.stream, httpx2.SyncByteStream)
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    kept = {name: response.headers.get(name, "")[:_LONGEST_HEADER] for name in _KEPT}
    # Under its own name, the client would parse the address of a redirect.
    kept["redirect"] = kept.pop("location")
    response.headers = httpx2.Headers(
        [(n.encode(), text.encode("utf-8", "replace")) for n, text in kept.items() if text]
    )
    data = bytearray()
    if encoding in ("", "identity"):
        for part in response.stream:
            data += part
            if len(data) > MOST_BYTES:
                raise Unreadable(f"the answer is longer than {MOST_BYTES} bytes")
    elif response.is_success:
        raise Unreadable(f"the answer has the unsupported Content-Encoding {encoding[:80]!r}")
    response.stream.close()
    response.stream = httpx2.ByteStream(bytes(data))
