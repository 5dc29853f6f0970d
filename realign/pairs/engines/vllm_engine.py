"""The vLLM engine: answers by `vllm.LLM.chat`, in an environment of its own, by way of files.

vLLM pins its own torch, so it seldom shares an environment with a trainer. The engine starts
`vllm_worker.py` with that environment's Python and keeps it running, since loading takes minutes.
Requests and images go through a folder, and answers come back in it; a run that goes on asks for
none a second time.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from realign.data.errors import Malformed
from realign.pairs.engines import vllm_worker
from realign.pairs.engines.chat import (
    Chat,
    Engine,
    Reply,
    image_digest,
    request_digest,
    typed_messages,
    write_whole,
)
from realign.pairs.engines.wire import KEYS

PYTHON = "REALIGN_VLLM_PYTHON"  # environment variable: the Python that has vLLM
_POLL = 0.05  # seconds between looks at the folder
_ENDING = 20.0  # seconds a worker has to end by itself


class VllmEngine(Engine):
    """vLLM offline, of this environment or of the one that $REALIGN_VLLM_PYTHON names."""

    def __init__(
        self,
        model: str,
        *,
        folder: str | Path | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Name a model; the worker starts with the first request that has no answer yet.

        Args:
            model: folder or hub name.
            folder: for requests, images, answers and the worker's log; a temporary one when absent.
            options: further arguments of `vllm.LLM`, such as `tensor_parallel_size`.

        Raises:
            ValueError: for options that are not JSON, or would run code that comes with a model.
        """
        self._options = dict(options or {})
        try:
            self._told = json.dumps(self._options, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the options of vLLM are no JSON values ({error}).") from error
        if self._options.get("trust_remote_code"):
            raise ValueError("trust_remote_code: code of models is never run here; leave it out.")
        self.name = f"vllm:{model}"
        self._model = model
        self._folder = None if folder is None else Path(folder).absolute()
        self._answers: dict[str, Reply] = {}
        self._opened = False
        self._worker: _Worker | None = None

    def open(self) -> None:
        """Find vLLM, and read the answers that are there already.

        Raises:
            ValueError: when no environment with vLLM is known.
        """
        if self._opened:
            return
        python_of_vllm()
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="realign-vllm-"))
            weakref.finalize(self, shutil.rmtree, str(self._folder), True)
        for file in sorted(self._folder.glob("answers-*.jsonl")):
            self._answers |= read_answers(file)
        self._opened = True

    def close(self) -> None:
        """End the worker, which frees the GPU."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def chat(self, requests: Sequence[Chat]) -> list[Reply]:
        """Answer requests; see `Engine.chat`.

        Raises:
            ValueError: when the worker cannot load the model or dies; shows the end of its log.
        """
        self.open()
        keys: list[str | Malformed] = []
        asked: dict[str, Chat] = {}
        for request in requests:
            try:
                key = request_digest(request, "vllm", self._model, self._told)
            except Malformed as error:
                keys.append(error)
                continue
            keys.append(key)
            if key not in self._answers:
                asked[key] = request
        if asked:
            self._answers |= self._ask(asked)
        return [
            Reply("", str(key)) if isinstance(key, Malformed) else self._answers[key]
            for key in keys
        ]

    def _ask(self, asked: dict[str, Chat]) -> dict[str, Reply]:
        folder = self._folder
        assert folder is not None
        batch = uuid.uuid4().hex
        pictures = folder / f"images-{batch}"
        lines = [json.dumps(_line(key, chat, pictures)) for key, chat in asked.items()]
        file = folder / f"requests-{batch}.jsonl"
        write_whole(file, ("\n".join(lines) + "\n").encode())
        most = max(len(chat.images) for chat in asked.values())
        if self._worker is not None and self._worker.images < most:
            self.close()  # vLLM is told at its start how many images a prompt may have
        if self._worker is None:
            self._worker = _Worker(self._model, self._options, most, folder)
        try:
            found = self._worker.answer(file)
        except BaseException:
            self.close()
            raise
        finally:
            file.unlink(missing_ok=True)
            shutil.rmtree(pictures, ignore_errors=True)
        if missing := asked.keys() - found.keys():
            raise ValueError(
                f"vLLM left {len(missing)} of {len(asked)} requests without an answer; its log is "
                f"{self._worker.log}."
            )
        return found


class _Worker:
    """A running `vllm_worker.py`."""

    def __init__(self, model: str, options: dict[str, Any], images: int, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.images, self._model = images, model
        name = uuid.uuid4().hex  # workers of several processes may share the folder
        self._answers = folder / f"answers-{name}.jsonl"
        self.log = folder / f"worker-{name}.log"
        told = {"model": model, "options": options, "images": images, "answers": str(self._answers)}
        environment = {k: v for k, v in os.environ.items() if k not in KEYS}  # none of its business
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [python_of_vllm(), vllm_worker.__file__, json.dumps(told)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        self._end = weakref.finalize(self, _end, self._process)

    def answer(self, file: Path) -> dict[str, Reply]:
        """Have the requests of a file answered.

        Raises:
            ValueError: when the worker ends instead.
        """
        done = file.with_suffix(".done")
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended, which is told below
            self._process.stdin.write(f"{file}\n".encode())
            self._process.stdin.flush()
        while not done.exists():
            if (status := self._process.poll()) is not None and not done.exists():
                tail = self.log.read_text(errors="replace").strip().splitlines()[-12:]
                raise ValueError(
                    f"the vLLM worker of {self._model} ended with status {status}. Answers so far "
                    f"are kept. The end of {self.log}:\n" + "\n".join(tail)
                )
            time.sleep(_POLL)
        done.unlink()
        return read_answers(self._answers)

    def close(self) -> None:
        """End it."""
        self._end()


def python_of_vllm() -> str:
    """The Python that vLLM is installed in: $REALIGN_VLLM_PYTHON, else this one if it has it.

    Raises:
        ValueError: when neither is there.
    """
    if named := os.environ.get(PYTHON):
        if shutil.which(named) is None:
            raise ValueError(f"${PYTHON} is {named!r}, which is no program that can be run.")
        return named
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "vLLM is not installed. Install it in an environment of its own (python -m venv VENV; "
            f"VENV/bin/pip install vllm) and set ${PYTHON} to VENV/bin/python."
        )
    return sys.executable


def read_answers(file: Path) -> dict[str, Reply]:
    """The answers of a worker's file by digest; lines cut off by a kill are passed over."""
    found = {}
    try:
        lines = file.read_bytes().splitlines()
    except FileNotFoundError:
        return {}
    for line in lines:
        try:
            said = json.loads(line)
            found[str(said["key"])] = Reply(
                str(said["text"]), str(said["error"]), bool(said["cut"])
            )
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _line(key: str, chat: Chat, pictures: Path) -> dict[str, Any]:
    """A request as the worker reads it; writes its images."""
    images = iter(chat.images)
    messages = [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "file": _save(next(images), pictures)}
                if part["type"] == "image"
                else part
                for part in message["content"]
            ],
        }
        for message in typed_messages(chat)
    ]
    settings = {"max_tokens": chat.max_tokens, "temperature": chat.temperature, "seed": chat.seed}
    return {"key": key, "messages": messages} | settings


def _save(image, pictures: Path) -> str:
    file = pictures / f"{image_digest(image)}.png"
    if not file.exists():
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="PNG")
        write_whole(file, buffer.getvalue())
    return str(file)


def _end(process: subprocess.Popen) -> None:
    """Let a worker end, and make it where it does not. It sees its input closed."""
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    for stop in (None, process.terminate, process.kill):
        if stop is not None:
            stop()
        try:
            process.wait(_ENDING)
            return
        except subprocess.TimeoutExpired:
            continue
