"""Benchmark of the start: seconds and memory before the first step, and the wait for data.

    python -m benchmarks.start_up start --kind embedded --count 4000 --out start.json
    python -m benchmarks.start_up trl --count 4000 --out trl.json
    python -m benchmarks.start_up wait --workers 1 --out wait.json
    python -m benchmarks.start_up_table FOLDER    # tables of all results in a folder

Each run is `python -m realign.train` in a fresh process per rank, with timers around its stages.
The model is tiny, and its image processor has real sizes (`start_up_data.py`). Times count from the
end of the imports. CPU seconds include threads and child processes. `--tree` measures another
source tree than this one.

- `start` runs each setting cold (empty `REALIGN_CACHE`) and warm (the same cache, a new output). Of
  the reference pass it times `--batches` batches, and inserts made-up log-probs for the other
  leaves. The warm run therefore finds every leaf.
- `trl` times TRL's `DPOTrainer` on the same records: the data set, the trainer, the first batch.
- `wait` replaces every step but the first by a sleep, as on a GPU. It reports the share of time in
  which the loop waits for a micro-batch, and the CPU time of a micro-batch.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parents[1]
TICKS = os.sysconf("SC_CLK_TCK")
STEPS, SKIPPED = 60, 2
"""Steps of a `wait` run, and the first of them, which fill the queue and do not count."""
RECORDS = 4
"""Records of a micro-batch of a `wait` run, with two images each."""
MICRO_BATCH = 16
"""Records of TRL's batch: the default micro-batch of `realign.train`."""


def stat(pid: int | str) -> list[str]:
    """Fields of /proc/PID/stat after the name of the program."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def descendants(pid: int) -> list[int]:
    """Ids of the live processes that `pid` started, and that they started."""
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            ids = [int(child) for child in children.read_text().split()]
        except OSError:  # the thread has ended
            continue
        found += [other for child in ids for other in (child, *descendants(child))]
    return found


def cpu_seconds() -> float:
    """CPU seconds of this process and of its live and ended descendants."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for pid in descendants(os.getpid()):
        try:
            total += sum(map(int, stat(pid)[11:13])) / TICKS
        except OSError:  # it has ended
            continue
    return total


def memory() -> dict[str, float]:
    """Memory of this process in MiB, and of its descendants (`children`).

    `VmHWM` is the peak. Pages of mapped files count in it, and in `RssFile`. `Pss` divides shared
    pages among the processes that map them.
    """

    def lines(pid: int, file: str) -> dict[str, float]:
        text = Path(f"/proc/{pid}/{file}").read_text()
        return {name: int(kib) / 1024 for name, kib in re.findall(r"(\w+):\s+(\d+) kB", text)}

    own = lines(os.getpid(), "status") | lines(os.getpid(), "smaps_rollup")
    found = {name: own[name] for name in ("VmHWM", "VmRSS", "RssAnon", "RssFile", "Pss")}
    found["children"] = 0.0
    for pid in descendants(os.getpid()):
        try:
            found["children"] += lines(pid, "smaps_rollup")["Pss"]
        except OSError:  # it has ended
            continue
    return {name: round(size, 1) for name, size in found.items()}


class Marks:
    """Time, CPU seconds and memory at named places, written to a file at each."""

    def __init__(self, file: str) -> None:
        self.file, self.found = Path(file), {}
        started = int(stat("self")[19]) / TICKS
        self.began = time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - started)

    def add(self, name: str, **more: Any) -> None:
        now = {"wall": time.monotonic() - self.began, "cpu": cpu_seconds()}
        self.found[name] = now | memory() | more
        self.file.write_text(json.dumps(self.found))

    def after(self, owner: Any, function: str, name: str, then: Callable[[], None] | None = None):
        """Replace `owner.function`, so that each call adds a mark when it returns."""
        inner = getattr(owner, function)

        @functools.wraps(inner)
        def outer(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            if name not in self.found:
                self.add(name)
                if then is not None:
                    then()
            return result

        setattr(owner, function, outer)


class _Enough(Exception):
    """Ends the timed part of a reference pass."""


def cut_reference_pass(marks: Marks, batches: int) -> None:
    """Let `ReferenceCache.fill` run `batches` batches, and insert -1 for the other leaves."""
    import numpy as np

    from realign_kernels import ReferenceCache, collect_leaves

    fill = ReferenceCache.fill

    def cut(self, model, forests, **options):
        leaves, calls = collect_leaves(forests), []

        def counted(batch):
            calls.append(time.monotonic())
            if len(calls) > batches:
                raise _Enough
            return model(batch)

        known = int((~self.missing(leaves)).sum())
        began, cpu, done = time.monotonic(), cpu_seconds(), None
        with contextlib.suppress(_Enough):
            done = fill(self, counted, leaves, **options)
        computed = int((~self.missing(leaves)).sum()) - known
        seconds = {"seconds": time.monotonic() - began, "cpu_seconds": cpu_seconds() - cpu}
        marks.add("batches", batches=len(calls), leaves=computed, known=known, **seconds)
        self.insert(leaves, -np.ones(len(leaves.keys)))
        return done

    ReferenceCache.fill = cut


def keep_no_images(train: Any) -> None:
    """Empty a store that keeps preprocessed images after set-up, as if the data set were large."""
    set_up = train.set_up

    def emptied(*args, **kwargs):
        run = set_up(*args, **kwargs)
        store = run.inputs.store
        if hasattr(store, "_bundles") and hasattr(store, "_room"):
            store._bundles.clear()
            store._room = 0
        return run

    train.set_up = emptied


def sleep_in_steps(marks: Marks, seconds: float) -> None:
    """Replace all steps but the first by a sleep, and measure the waits for micro-batches."""
    from realign.training import step

    inner, steps, totals, cpu = step.accumulate, [], {}, []

    def accumulate(model, parts, *args, **kwargs):
        began = time.monotonic()
        ready = [*parts]
        waited = time.monotonic() - began
        if totals:
            time.sleep(seconds)
        else:
            totals.update(inner(model, ready, *args, **kwargs))
        steps.append((waited, time.monotonic() - began))
        if len(steps) == SKIPPED:
            cpu.append(cpu_seconds())
        if len(steps) == STEPS:
            waits, whole = zip(*steps[SKIPPED:], strict=True)
            share, count = sum(waits) / sum(whole), len(waits)
            used = (cpu_seconds() - cpu[0]) / count
            figures = {"share": share, "median_ms": 1000 * median(waits), "cpu_ms": 1000 * used}
            marks.add("wait", **figures, steps=count)
        return dict(totals)

    step.accumulate = accumulate


def import_models() -> None:
    """Import the classes that transformers would import later, during the start."""
    import transformers as hf

    for family in ("Llava", "Qwen2VL"):
        getattr(hf, f"{family}ForConditionalGeneration"), getattr(hf, f"{family}Processor")
    import torch._dynamo  # noqa: F401 - the optimizer imports it, in 0.5 s


def run_start(job: dict[str, Any], marks: Marks) -> None:
    """Worker process of `start` and `wait`: one rank of `realign.train`."""
    from benchmarks.start_up_data import without_torchvision
    from realign import distributed, train
    from realign.config import DataConfig, RunConfig, ScaleConfig
    from realign.training import setup

    import_models()
    without_torchvision()
    marks.add("imports")
    names = {field.name for part in (DataConfig, RunConfig, ScaleConfig) for field in fields(part)}
    arguments = list(job["arguments"])
    if job["workers"] is not None and "workers" in names:
        arguments += ["--workers", str(job["workers"])]
    end = functools.partial(distributed.exit_rank, 0)
    if hasattr(setup, "read_pairs"):
        marks.after(setup, "read_pairs", "records", end if job["stop"] == "records" else None)
    marks.after(train, "set_up", "set_up", end if job["stop"] == "set-up" else None)
    marks.after(train, "reference_pass", "reference_pass")
    cut_reference_pass(marks, job["batches"])
    if job["step_seconds"]:
        keep_no_images(train)
        sleep_in_steps(marks, job["step_seconds"])
    else:
        from realign.training import step

        marks.after(step, "train_step", "first_step")
    distributed.exit_rank(train.main(arguments))


def run_trl(job: dict[str, Any], marks: Marks) -> None:
    """Worker process of `trl`."""
    import datasets
    import peft  # noqa: F401
    from transformers import AutoProcessor
    from trl import DPOTrainer  # noqa: F401

    from benchmarks.step_contestants import dpo_trainer

    import_models()
    folder = Path(job["cache"])  # the same path in both runs, by which `datasets` finds its cache
    if not (folder / "pairs.parquet").is_symlink():
        (folder / "pairs.parquet").symlink_to(job["pairs"])
    marks.add("imports")
    marks.after(datasets, "load_dataset", "data_set")
    trainer = dpo_trainer(
        job["model"], AutoProcessor.from_pretrained(job["model"]), folder, "lora", dtype="fp32",
        per_device_train_batch_size=MICRO_BATCH, max_steps=1,
    )  # fmt: skip
    marks.add("trainer")
    next(iter(trainer.get_train_dataloader()))
    marks.add("first_batch")


def run(job: dict[str, Any], ranks: int, cache: Path) -> list[dict[str, Any]]:
    """Run a job in a fresh process per rank. Returns the marks of each rank.

    Raises:
        RuntimeError: when a process fails. Its output is in the message.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        free.close()
        job = {"arguments": [], "cache": str(cache), "tree": str(HERE)} | job
        job["arguments"] = [*job["arguments"], "--output", f"{folder}/run"]
        processes, files = [], [Path(folder) / f"{rank}.json" for rank in range(ranks)]
        logs = [Path(folder) / f"{rank}.log" for rank in range(ranks)]
        for rank, (file, log) in enumerate(zip(files, logs, strict=True)):
            named = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            usual = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
            own = {"REALIGN_CACHE": str(cache), "PYTHONPATH": str(HERE)}
            own |= {"HF_DATASETS_CACHE": str(cache / "hf")}  # a conversion there is also new
            message = json.dumps(job | {"file": str(file)})
            with log.open("w") as output:
                processes.append(subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.start_up", "worker", message],
                    cwd=folder, env=usual | os.environ | own | named, stdout=output,
                    stderr=subprocess.STDOUT,
                ))  # fmt: skip
        codes = [process.wait() for process in processes]
        if any(codes):
            texts = "\n".join(log.read_text()[-3000:] for log in logs)
            raise RuntimeError(f"exit codes {codes}: {texts}")
        return [json.loads(file.read_text()) for file in files]


def job_of(options: argparse.Namespace, data: Path) -> dict[str, Any]:
    """The job of a worker process, with the data and model written."""
    from benchmarks import start_up_data

    count = STEPS * RECORDS if options.what == "wait" else options.count
    pairs = start_up_data.pairs(data, options.kind, count)
    model = start_up_data.model(data / "models", options.family)
    job: dict[str, Any] = {"what": options.what, "tree": options.tree, "model": str(model)}
    if options.what == "trl":
        return job | {"pairs": str(pairs)}
    waits = options.what == "wait"
    size = RECORDS if waits else 2 * MICRO_BATCH
    arguments = ["--model", str(model), "--pairs", str(pairs), "--quiet", "--save-every", "0"]
    arguments += ["--batch-size", str(size), "--steps", str(STEPS if waits else 1)]
    arguments += ["--fsdp"] if options.ranks > 1 else []
    return job | {
        "arguments": arguments,
        "workers": options.workers,
        "batches": options.batches,
        "stop": options.stop,
        "step_seconds": options.step_seconds if waits else 0,
    }


def main() -> None:
    """Run the command, or a job as a worker process."""
    if sys.argv[1:2] == ["worker"]:
        job = json.loads(sys.argv[2])
        sys.path.insert(0, job["tree"])
        {"trl": run_trl}.get(job["what"], run_start)(job, Marks(job["file"]))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=["start", "trl", "wait"])
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--data", type=Path, default=Path("build/start-up"), help="data sets")
    parser.add_argument("--tree", default=str(HERE), help="source tree to measure")
    parser.add_argument("--family", choices=["llava", "qwen2_vl"], default="llava")
    parser.add_argument("--kind", choices=["embedded", "files", "headers"], default="embedded")
    parser.add_argument("--count", type=int, default=4000, help="records")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--caches", default="cold,warm", help="cold, or cold,warm")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--batches", type=int, default=4, help="timed batches of the pass")
    parser.add_argument("--stop", choices=["records", "set-up", "first-step"], default="first-step")
    parser.add_argument("--workers", type=int, help="--workers of realign.train, where it exists")
    parser.add_argument("--step-seconds", type=float, default=0.3)
    options = parser.parse_args()
    job, runs = job_of(options, options.data.resolve()), []
    setting = {name: str(value) for name, value in vars(options).items()}
    for _ in range(options.repeat):
        with tempfile.TemporaryDirectory() as cache:
            for name in options.caches.split(","):
                marks = run(job, options.ranks, Path(cache))
                runs.append({"cache": name, "ranks": marks})
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps({"setting": setting, "runs": runs}, indent=1))
                print(name, json.dumps(marks[0]), flush=True)


if __name__ == "__main__":
    main()
