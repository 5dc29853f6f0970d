"""A chat endpoint on this machine that answers as its script says, and the fake `vllm` package."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Endpoint:
    """Serves `script`: a list of answers, the last one for ever.

    An answer is (status, headers, body); a body of text is sent as it is, a dict as JSON, an
    iterator bit by bit, and a number of seconds is a silence; a function makes it of the request. `requests` holds (path, headers, body) and `times` when they
    came.
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
                    pass  # the client is gone

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


FAKE_VLLM = '''
"""Stands for vLLM: writes down how it is called, and answers with what it was asked."""
import base64, hashlib, json, os
from types import SimpleNamespace

CALLS = os.environ["FAKE_VLLM_CALLS"]


def note(**what):
    with open(CALLS, "a") as file:
        file.write(json.dumps(what) + "\\n")


class SamplingParams:
    def __init__(self, max_tokens, temperature, seed):
        self.settings = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}


class LLM:
    def __init__(self, model, **options):
        print("loading", model)
        if model == "missing":
            raise OSError("no such model: missing")
        note(model=model, options=options, key=os.environ.get("REALIGN_API_KEY"))

    def chat(self, messages, sampling_params, use_tqdm=True):
        texts = ["".join(p["text"] for p in m[-1]["content"] if p["type"] == "text")
                 for m in messages]
        note(chats=texts)
        if any("die" in text for text in texts):
            os._exit(9)
        if any("too long" in text for text in texts):
            raise ValueError("the prompt is longer than the model takes")
        return [self.output(*both) for both in zip(texts, messages, sampling_params)]

    def output(self, text, message, params):
        urls = [p["image_url"]["url"] for p in message[-1]["content"] if p["type"] == "image_url"]
        data = [base64.b64decode(url.removeprefix("data:image/png;base64,")) for url in urls]
        said = [text, params.settings, [hashlib.md5(d).hexdigest() for d in data]]
        done = SimpleNamespace(text=json.dumps(said), finish_reason="length")
        return SimpleNamespace(outputs=[done])
'''
