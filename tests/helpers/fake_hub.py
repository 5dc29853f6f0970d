"""A local server with the calls of the Hub that `datasets` and `huggingface_hub` make.

It has the data sets that it is given, and the gated `o/gated`. Every other name is unknown, which
the Hub answers with 401.
"""

from __future__ import annotations

import hashlib
import io
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

COMMIT = "a" * 40


def table(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


class FakeHub:
    """Serves data sets, each with its files, on `self.endpoint` until the block ends."""

    def __init__(self, sets: dict[str, dict[str, bytes]]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("content-length") or 0))
                code, data, headers = respond(sets, self.path, self.headers.get("range"))
                self.send_response(code)
                for name, value in ({"content-length": str(len(data))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_POST = do_HEAD = answer

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeHub:
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()


def respond(
    sets: dict[str, dict[str, bytes]], path: str, range: str | None
) -> tuple[int, bytes, dict[str, str]]:
    path = path.partition("?")[0]
    if "/o/gated" in path:
        return 403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"}
    api, _, asked = path.lstrip("/").partition("datasets/")
    name, rest = "/".join(asked.split("/")[:2]), "/".join(asked.split("/")[2:])
    if (files := sets.get(name)) is None:
        return 401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "not found"}
    if api and rest.startswith("tree/"):
        folder = rest.removeprefix("tree/").partition("/")[2]
        return _json([_entry(files, child) for child in _children(files, folder)])
    if api:
        siblings = [{"rfilename": file} for file in files]
        flags = {"private": False, "gated": False, "disabled": False, "tags": []}
        return _json({"id": name, "sha": COMMIT, "siblings": siblings} | flags)
    if (data := files.get(rest.removeprefix("resolve/").partition("/")[2])) is None:
        return 404, b"", {"X-Error-Code": "EntryNotFound"}
    headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
    if range is None:
        return 200, data, headers
    start, end = range.removeprefix("bytes=").split("-")
    last = min(int(end or len(data)), len(data) - 1)
    headers["content-range"] = f"bytes {start}-{last}/{len(data)}"
    return 206, data[int(start) : last + 1], headers


def _children(files: dict[str, bytes], folder: str) -> list[str]:
    begin = f"{folder}/" if folder else ""
    inside = [name.removeprefix(begin) for name in files if name.startswith(begin)]
    return sorted({begin + name.partition("/")[0] for name in inside})


def _entry(files: dict[str, bytes], name: str) -> dict[str, Any]:
    kind = "file" if name in files else "directory"
    return {"type": kind, "oid": "0", "size": len(files.get(name, b"")), "path": name}


def _json(value: Any) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps(value).encode(), {"content-type": "application/json"}
