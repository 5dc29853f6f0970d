"""Endpoint engine: servers that do not end an exchange, by sockets without an HTTP library."""

import contextlib
import itertools
import json
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_endpoint import KEY, Endpoint, chat_of, completion, engine_at, good, random_image

from realign.pairs.engines import Reply, deadline, endpoint, make_engine
from realign.pairs.engines.endpoint import parse_answer

LIMIT = 0.7  # seconds of an exchange
MARGIN = 4.0  # for a slow machine; without the limit, no exchange ends
OK = b"HTTP/1.1 200 OK\r\n"
BODY = json.dumps(completion("a dog")).encode()


class RawServer:
    """Reads the head of each request, sends the `parts`, and waits `pause` seconds after each."""

    def __init__(self, parts, pause=0.05, reads=True):
        self.parts, self.pause, self.reads = parts, pause, reads
        self.connections = 0
        self.closing = threading.Event()
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(8)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"

    def serve(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.connections += 1
                threading.Thread(target=self.answer, args=(connection,), daemon=True).start()

    def answer(self, connection):
        with connection, contextlib.suppress(OSError):
            while self.reads == "slowly" and not self.closing.wait(0.05):
                connection.recv(1024)
            if self.reads:
                connection.recv(2**16)
            for part in self.parts():
                connection.sendall(part)
                if self.pause and self.closing.wait(self.pause):
                    return
            connection.shutdown(socket.SHUT_WR)
            connection.recv(2**16)

    def __enter__(self):
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.listener.close()


def drip(start, byte=b"a"):
    return lambda: itertools.chain([start], itertools.repeat(byte))


ENDLESS = {
    "status line": drip(b"", b"H"),
    "one header": drip(OK + b"x: "),
    "headers": drip(OK, b"x: y\r\n"),
    "body": drip(OK + b"Content-Length: 1000000\r\n\r\n"),
    "body without a length": drip(OK + b"\r\n"),
    "early hints": drip(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
    "continue": drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "chunks": drip(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
    "chunk extension": drip(OK + b"Transfer-Encoding: chunked\r\n\r\n1;"),
    "trailers": drip(OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"x: y\r\n"),
    "body of an error": drip(b"HTTP/1.1 500 No\r\nContent-Length: 99999\r\n\r\n"),
    "body of a refusal": drip(b"HTTP/1.1 403 No\r\nContent-Length: 99999\r\n\r\n"),
    "body of a redirect": drip(b"HTTP/1.1 302 No\r\nLocation: /\r\nContent-Length: 99\r\n\r\n"),
}
FAST = {
    "early hints": drip(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 500),
    "chunks": drip(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n" * 1000),
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("REALIGN_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(endpoint, "_FIRST_WAIT", 0.01)


def timed(url, chat=None, **options):
    """(reply or error, seconds) of one request."""
    engine = make_engine(f"{url}#m", **{"timeout": LIMIT, "tries": 1} | options)
    start = time.monotonic()
    (reply,) = engine.chat([chat or chat_of("a")])
    return reply, time.monotonic() - start


def test_no_endless_answer_outlasts_the_time_limit():
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(32) as pool:
        calls = {}
        for name, parts in ENDLESS.items():
            server = stack.enter_context(RawServer(parts))
            calls[name] = pool.submit(timed, server.url)
        handshake = stack.enter_context(RawServer(drip(b"\x16\x03\x03\x40\x00"), reads=False))
        url = handshake.url.replace("http:", "https:")
        calls["TLS handshake"] = pool.submit(timed, url)
        deaf = stack.enter_context(RawServer(lambda: itertools.repeat(b""), reads=False))
        image = chat_of("a", random_image((1400, 1400)))
        calls["a request that is not read"] = pool.submit(timed, deaf.url, image, timeout=1.5)
        lazy = stack.enter_context(RawServer(lambda: [], reads="slowly"))
        calls["a request not read fast"] = pool.submit(timed, lazy.url, image, timeout=1.5)
        results = {name: call.result() for name, call in calls.items()}
    for name, (reply, seconds) in results.items():
        limit = 1.5 if "not read" in name else LIMIT
        assert seconds < limit + MARGIN, name
        assert reply.error.endswith(f"no answer within {limit:g} s)"), (name, reply)


@pytest.mark.parametrize("name", FAST)
def test_a_fast_endless_answer_ends_at_a_limit_too(name):
    with RawServer(FAST[name], pause=0) as server:
        reply, seconds = timed(server.url)
    assert seconds < LIMIT + MARGIN and reply.error


@pytest.fixture
def dead():
    """An address that does not answer a connection."""
    with socket.socket() as full, contextlib.ExitStack() as stack:
        full.bind(("127.0.0.2", 0))
        full.listen(0)
        for _ in range(3):  # with a full queue, the kernel ignores further connections
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        yield full.getsockname()


def resolve(monkeypatch, *addresses):
    """Give `localhost` these addresses."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]
    original = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *a, **k: found if host == "localhost" else original(host, *a, **k),
    )


def test_all_addresses_of_a_host_share_the_time_limit(monkeypatch, dead):
    resolve(monkeypatch, *[dead] * 8)
    reply, seconds = timed(f"http://localhost:{dead[1]}/v1")
    assert seconds < LIMIT + MARGIN and "no answer within" in reply.error


def test_a_host_with_a_dead_first_address_answers_from_the_second(monkeypatch, dead):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", dead[1]))  # the same port at another address
        listener.listen(8)
        server = RawServer(lambda: [OK + b"\r\n" + BODY], pause=0)
        server.listener.close()
        server.listener = listener
        resolve(monkeypatch, dead, listener.getsockname())
        with server:
            reply, seconds = timed(f"http://localhost:{dead[1]}/v1", timeout=2)
    assert reply == Reply("a dog") and seconds >= 1


@pytest.mark.parametrize("coding", [b"", b"identity", b" Identity "])
def test_an_answer_without_a_content_coding_is_read(coding):
    head = OK + b"Content-Encoding: " + coding + b"\r\n\r\n"
    with RawServer(lambda: [head + BODY], pause=0) as server:
        assert timed(server.url)[0] == Reply("a dog")


def test_each_try_has_its_own_time_limit():
    with RawServer(ENDLESS["body"]) as server:
        _, seconds = timed(server.url, tries=2, timeout=0.4)
        assert 0.8 <= seconds < 0.8 + MARGIN and server.connections == 2


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"hello\r\n",
        b"HTTP/0.9 200 OK\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 999 \x1b[31m\r\nContent-Length: 0\r\n\r\n",
        OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
        OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 5000 + b"\r\n",
        OK + b"x: " + b"a" * 300_000 + b"\r\n\r\n",
        OK + b"x y\x00: z\r\n\r\n",
        OK + b"Content-Type: text/plain; charset=zlib\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 400 \r\nContent-Type: text/plain; charset=zlib\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 400 \r\nContent-Type: a; charset=\xff\0\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 400 \r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
    ],
)
def test_an_answer_that_is_not_http_is_an_error_of_the_reply(head):
    with RawServer(lambda: [head], pause=0) as server:
        reply, seconds = timed(server.url)
    assert reply.text == "" and reply.error and reply.error.isprintable() and len(reply.error) < 400
    assert seconds < LIMIT + MARGIN


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("9" * 400, "inf"),
        ("1e999", "inf"),
        ("Fri, 31 Dec 9999 23:59:59 GMT", r"2.*e\+11"),
        ("121", "121"),
        ("nan", None),
        ("-5", None),
        ("Mon, 01 Jan 99999999999999999999 00:00:00 GMT", None),
        ("\x1b[31m" * 9, None),
    ],
)
def test_no_value_of_retry_after_delays_a_run_by_more_than_two_minutes(value, seconds):
    with Endpoint((503, {"Retry-After": value, "X-Should-Retry": "true"}, "no")) as server:
        start = time.monotonic()
        (reply,) = engine_at(server, tries=2).chat([chat_of("a")])
    assert time.monotonic() - start < 3
    assert len(server.requests) == (2 if seconds is None else 1)
    assert ("the server asks to wait" in reply.error) == (seconds is not None)


def test_a_server_cannot_order_more_tries():
    with Endpoint((400, {"X-Should-Retry": "true", "Retry-After": "100"}, "no")) as server:
        (reply,) = engine_at(server).chat([chat_of("a")])
    assert reply.error == "HTTP status 400: no" and len(server.requests) == 1


def test_an_error_does_not_wait_for_the_retry_of_another_request():
    with Endpoint((503, {"Retry-After": "100"}, "busy"), (401, {}, "who?")) as server:
        engine = engine_at(server, concurrency=2)
        start = time.monotonic()
        threads = set(threading.enumerate())
        with pytest.raises(ValueError, match="rejects the key"):
            engine.chat([chat_of("a"), chat_of("b")])
    for thread in set(threading.enumerate()) - threads:
        if thread.name.startswith("endpoint"):
            thread.join(5)
            assert not thread.is_alive()
    assert time.monotonic() - start < 5


ESCAPES = "\x1b]0;title\x07\x1b[2J\x9b31m\u202e\r\n" * 200


def test_texts_of_a_server_are_printable_in_messages(monkeypatch):
    monkeypatch.setenv("REALIGN_API_KEY", KEY)
    shown = ESCAPES + KEY
    refusal = {"choices": [{"message": {"content": None, "refusal": shown}}]}
    bodies = (
        (403, {}, shown),
        (500, {}, shown),
        (200, {}, shown),
        (200, {}, json.dumps(refusal)),
        (200, {}, json.dumps({"error": shown})),
        (200, {"Content-Encoding": "\x1b[31m"}, "{}"),
    )
    for answer in bodies:
        with Endpoint(answer) as server:
            (reply,) = engine_at(server, tries=1).chat([chat_of("a")])
        assert reply.error and reply.error.isprintable() and len(reply.error) < 1500
        assert KEY not in reply.error
    for answer in ((404, {}, shown), (302, {"Location": f"/\x1b[31m\x9b{KEY}"}, "")):
        with Endpoint(answer) as server, pytest.raises(ValueError) as error:
            engine_at(server).chat([chat_of("a")])
        assert str(error.value).isprintable() and KEY not in str(error.value)


@pytest.mark.parametrize(
    "unit", ["[],", "{},", '"a",', "1,", '{"a":0},', "[", '{"a":', "1", '"\\ud800",', " "]
)
def test_a_large_answer_is_read_in_a_second(unit):
    size = deadline.MOST_BYTES // len(unit)
    for body in ("[" + unit * size, '{"choices":[' + unit * (size - 9) + "0]}"):
        start = time.process_time()
        reply = parse_answer(body.encode())
        assert time.process_time() - start < 2
        assert reply.error.startswith("the answer ") and len(reply.error) < 1000


def test_planted_answers_are_checked_like_those_of_a_server(tmp_path):
    with Endpoint(good()) as server:
        engine = engine_at(server, folder=tmp_path)
        assert engine.chat([chat_of("a")]) == [Reply("a dog")]
        (file,) = tmp_path.rglob("*.json")
        planted = (
            {"text": 7, "cut": False},
            {"text": "a \ud800", "cut": False},
            {"text": "  ", "cut": False},
            ["text", "cut"],
        )
        for number, content in enumerate(planted, 2):
            file.write_text(json.dumps(content))
            assert engine.chat([chat_of("a")]) == [Reply("a dog")]
            assert len(server.requests) == number
        for write in (
            lambda: file.write_text("[" * 100_000),
            lambda: os.truncate(file, 2**40),
            lambda: (file.unlink(), os.mkfifo(file)),
        ):
            write()
            start = time.monotonic()
            assert engine.chat([chat_of("a")]) == [Reply("a dog")]
            assert time.monotonic() - start < 5
        assert len(server.requests) == 8
        file.write_text(json.dumps({"text": "a cat", "cut": True}))
        assert engine.chat([chat_of("a")]) == [Reply("a cat", cut=True)]
