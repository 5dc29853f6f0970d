"""A local chat endpoint with scripted answers, which records the requests."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

from realign.pairs.engines import Chat, make_engine

KEY = "sk-test/Zq8-secret"


class Endpoint:
    """Serves `script`, a list of answers. The last one is repeated.

    An answer is (status, headers, body). A text is sent unchanged, a dict as JSON, and an iterator
    in pieces. A number is a silence in seconds. A function computes the body from the request.
    `requests` holds (path, headers, body), and `times` the times of arrival.
    """

    def __init__(self, *script):
        self.script, self.requests, self.times = list(script), [], []
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with outer._lock:
                    outer.requests.append((self.path, dict(self.headers), json.loads(body)))
                    outer.times.append(time.monotonic())
                    many = len(outer.script) > 1
                    status, headers, body = outer.script.pop(0) if many else outer.script[0]
                if callable(body):
                    body = body(outer.requests[-1])
                if isinstance(body, float):
                    outer.closing.wait(body)
                    body = {}
                if isinstance(body, Iterator):
                    headers, parts = {"Content-Length": "1000000"} | headers, body
                else:
                    text = json.dumps(body) if isinstance(body, dict) else body
                    parts = [text.encode()]
                    headers = {"Content-Length": str(len(parts[0]))} | headers
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    for part in parts:
                        self.wfile.write(part)
                except OSError:
                    pass  # the client has disconnected

            def log_message(self, *_):
                pass

        self.closing = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


def completion(text, finish="stop"):
    """The body of a good answer."""
    return {
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]
    }


def good(text="a dog", finish="stop"):
    """A good answer."""
    return 200, {}, completion(text, finish)


def chat_of(text, *images, **settings):
    """A chat with one user message."""
    return Chat([{"role": "user", "content": text}], list(images), **settings)


def random_image(size=(4, 3), seed=0):
    """A random image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def engine_at(server, model="some/model:x", **options):
    """An engine that sends requests to a server."""
    return make_engine(f"{server.url}#{model}", **{"timeout": 5.0} | options)
