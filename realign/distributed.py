"""Ranks: launch, process group, collectives and errors.

A run without `--fsdp` is one process. With it, each GPU gets a worker, and a CPU gets two. They are
started here by torch's launcher unless torchrun started this process.

FSDP2 keeps trained parameters in fp32 and computes in bf16. With `--tune full` in bf16, a single
process is therefore a mesh of one rank. LoRA layers cast their adapters themselves, with bitwise
equal results (tests/training/test_one_rank.py).
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, TCPStore
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from realign.terminal import show

T = TypeVar("T")

_diverged = False  # see mark_ranks_diverged
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
# Exit codes of ranks that the system killed. A rank that loses another one may abort as well.
_KILLED = {-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGILL, -signal.SIGFPE}
# Limit for ranks that wait for a slow rank, for example while rank 0 writes a large model. The
# death of a rank ends the job immediately.
_TIMEOUT = timedelta(minutes=30)


_ALLOCATOR = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
"""New and old name of the variable that configures CUDA's caching allocator."""

_LAUNCHER = "REALIGN_LAUNCHER"  # process id of `launch`, in the environment of its ranks
_PR_SET_PDEATHSIG = 1  # of prctl(2)


class CommonError(ValueError):
    """An error that every rank raises and only rank 0 reports."""


def under_launcher() -> bool:
    """Whether torchrun (or `launch`) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank_environment(port: int, workers: int) -> dict[str, str]:
    """Environment variables shared by all ranks on this machine. Their launcher holds the store.

    Args:
        port: port of the store.
        workers: number of ranks.
    """
    return {
        "WORLD_SIZE": str(workers),
        "LOCAL_WORLD_SIZE": str(workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # so that rank 0 opens none
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def launch(module: str, arguments: Sequence[str], workers: int) -> int:
    """Run `python -m module arguments` as `workers` ranks of this machine. Returns an exit code.

    Signals are forwarded to the ranks. The exit code is 0 if all ranks end with 0. When a rank ends
    with another code, the other ranks are stopped, and killed after 30 seconds.
    """
    workers = workers or _default_workers()
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = rank_environment(store.port, workers) | {_LAUNCHER: str(os.getpid())}
    ranks = range(workers)
    old_handlers = {number: signal.getsignal(number) for number in _FORWARDED}
    processes = start_processes(
        "ranks",
        sys.executable,
        args={rank: ("-m", module, *arguments) for rank in ranks},
        envs={rank: shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in ranks},
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )

    def forward(number: int, _frame) -> None:
        for process in processes.pids().values():
            with suppress(ProcessLookupError):
                os.kill(process, number)

    for number in _FORWARDED:
        signal.signal(number, forward)
    try:
        result = processes.wait(period=0.1)
        assert result is not None  # there is no time limit
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
    if result.failures:
        show(_first_failure(result.failures), error=True)
    return 1 if result.failures else 0


def _first_failure(failures: dict[int, ProcessFailure]) -> str:
    """Describe the rank that failed first, in one sentence.

    A killed rank and a rank that fails because of it end at nearly the same time. Ranks that the
    launcher stops end later, or by SIGKILL after 30 seconds.
    """
    first = min(failure.timestamp for failure in failures.values())
    rank, failure = min(
        failures.items(),
        key=lambda item: (item[1].timestamp > first + 5, item[1].exitcode not in _KILLED),
    )
    ending = f"ended with exit code {failure.exitcode}"
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        ending = f"was killed by {name}"
        ending += " (by hand, or because memory ran out)" if name == "SIGKILL" else ""
    return f"rank {rank} {ending}."


def planned_ranks(fsdp: bool, workers: int) -> int:
    """Number of ranks that will train: of the launcher, or of `launch`."""
    if under_launcher():
        return int(os.environ["WORLD_SIZE"])
    return (workers or _default_workers()) if fsdp else 1


def _default_workers() -> int:
    """One worker per GPU, or two on a CPU."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 2


def start(*, single: bool = False, fsdp: bool = True) -> torch.device:
    """Join the process group of the launcher, if there is one. Returns this rank's device.

    With `single`, a process without a launcher becomes the only rank of its own group.

    Raises:
        ValueError: if there are other ranks, but no `fsdp`.
    """
    if launcher := os.environ.get(_LAUNCHER):
        _end_with(int(launcher))
    ranks = int(os.environ.get("WORLD_SIZE", 1)) if under_launcher() else 1
    if ranks > 1 and not fsdp:
        raise ValueError(
            f"this is one of {ranks} ranks, but without --fsdp nothing is shared between them. "
            "Add --fsdp, or start one process."
        )
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else "cpu"
    if cuda:
        extend_segments()
        torch.cuda.set_device(device)
    disable_cudnn_attention()
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"  # offloaded gradients are on the CPU
    if not dist.is_initialized():
        if under_launcher():
            dist.init_process_group(backend, timeout=_TIMEOUT)
        elif single:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    return torch.device(device)


def extend_segments() -> None:
    """Let CUDA's caching allocator extend its segments, unless the user has configured it.

    The lengths differ from batch to batch. With segments of a fixed size, a batch that is longer
    than all earlier ones fits no free block. Each of its tensors then costs a cudaMalloc. On an
    H200, two of five steps were 1.5x and 1.9x slower than the others. torch reads the variable at
    the first allocation.
    """
    if not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"


def disable_cudnn_attention() -> None:
    """Disable cuDNN for `scaled_dot_product_attention` in this process.

    torch 2.11 prefers cuDNN on compute capability 9.0. cuDNN builds a plan for each shape, in
    0.70 s on an H200. Trees, prompts and batches have many different lengths.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def _end_with(launcher: int) -> None:
    """Request SIGTERM from the system when the launcher dies, so that no rank outlives it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != launcher:
            raise CommonError("the process that started this rank has ended")


def stop() -> None:
    """Leave the process group."""
    global _diverged
    _diverged = False
    if dist.is_initialized():
        dist.destroy_process_group()


def exit_rank(code: int) -> NoReturn:
    """End this process with an exit code. A rank does not finalize its interpreter.

    FSDP2 holds its process group until the end. In torch 2.13, a gloo thread that frees a gathered
    tensor during finalization aborts the process, although all work is done. Non-daemon threads are
    joined, and exit handlers run.
    """
    if not under_launcher():
        sys.exit(code)
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue] - as Python at its end
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def rank() -> int:
    """Rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def log_rank0(line: str) -> None:
    """Print a line on rank 0."""
    if rank() == 0 and not _silent.get():
        show(line)


@contextmanager
def silent() -> Iterator[None]:
    """A context in which `log_rank0` prints nothing, for work whose lines are printed elsewhere."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


_silent = ContextVar("silent", default=False)


def report(error: Exception) -> bool:
    """Print the error that ends this process, in one line. Returns False for a program fault.

    Before `mark_ranks_diverged`, all ranks read the same records and settings and raise the same
    error, so only rank 0 reports it. Afterwards, a rank may fail separately, and reports its own
    error.
    """
    if isinstance(error, RuntimeError):
        if not lost_a_rank(error):
            return False
        show("error: another rank has ended. See its own message, if there is one.", error=True)
    elif isinstance(error, CommonError):
        if rank() == 0:
            show(f"error: {error}", error=True)
        with suppress(RuntimeError):
            barrier()  # the launcher stops all ranks when the first one ends
    elif rank() == 0 or _diverged:
        place = f" (rank {rank()})" if world_size() > 1 and _diverged else ""
        show(f"error{place}: {error}", error=True)
    return True


def local_share() -> tuple[int, int]:
    """Number of this rank on its machine, and number of ranks there: (0, 1) for one process."""
    if not dist.is_initialized():
        return 0, 1
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def workers_of_rank(workers: int | None) -> int:
    """Worker threads of a rank for images: by default the rank's cores but one, from 1 to 8."""
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, max(1, (cores or 1) // local_share()[1] - 1))


def mark_ranks_diverged() -> None:
    """Record that ranks do different work from now on, so a single rank may fail."""
    global _diverged
    _diverged = True


def lost_a_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank has ended."""
    text = str(error)
    return world_size() > 1 and any(name in text for name in ("gloo", "Gloo", "NCCL", "by peer"))


def barrier() -> None:
    """Wait for the other ranks."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def most_of_ranks(value: int, device: torch.device) -> int:
    """The largest value of all ranks."""
    if not dist.is_initialized():
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def broadcast_from_rank0(decide: Callable[[], T]) -> T:
    """Call `decide` on rank 0 and return its result on all ranks.

    Raises:
        CommonError: on all ranks, if `decide` raises a ValueError or OSError.
    """
    outcome: list = [None]
    if rank() == 0:
        try:
            outcome = [decide()]
        except CommonError as error:
            outcome = [error]
        except (ValueError, OSError) as error:
            outcome = [CommonError(str(error))]
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], CommonError):
        raise outcome[0]
    return outcome[0]


def gather(items: Sequence[T]) -> list[T]:
    """The items of all ranks, in the order of ranks, on every rank."""
    if not dist.is_initialized():
        return list(items)
    parts: list[list[T]] = [[]] * world_size()
    dist.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]
