"""Ranks: starting them, sharding a model over them, and summing over them.

A run without `--fsdp` is one process. With it every GPU gets a worker (two workers on a CPU),
started here through torch's launcher unless torchrun started us. In bf16 one process is a mesh of
one: FSDP2 is what keeps trained parameters in fp32 and computes in bf16, the same way for any
number of ranks, so that reference log-probs are the same, too.
"""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from realign.model import ForestModel

_parted = False  # see ranks_part


def under_launcher() -> bool:
    """Whether torchrun (or `launch`) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(module: str, arguments: Sequence[str], workers: int) -> int:
    """Run `python -m module arguments` as `workers` ranks of this machine; returns an exit code."""
    workers = workers or _default_workers()
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=workers,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        run_id=uuid.uuid4().hex,
    )
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"rank {rank} ended with exit code {failure.exitcode}.", file=sys.stderr)
        return 1
    return 0


def planned_ranks(fsdp: bool, workers: int) -> int:
    """Ranks that will train: those of the launcher, or those that `launch` would start."""
    if under_launcher():
        return int(os.environ["WORLD_SIZE"])
    return (workers or _default_workers()) if fsdp else 1


def _default_workers() -> int:
    """One per GPU, two on a CPU."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 2


def start(*, alone: bool = False, fsdp: bool = True) -> torch.device:
    """Join the process group when there is one; returns this rank's device.

    With `alone` a process that no launcher started becomes the only rank of a group of its own.

    Raises:
        ValueError: without `fsdp`, when there are other ranks.
    """
    ranks = int(os.environ.get("WORLD_SIZE", 1)) if under_launcher() else 1
    if ranks > 1 and not fsdp:
        raise ValueError(
            f"this is one of {ranks} ranks, but without --fsdp nothing is shared between them. "
            "Add --fsdp, or start one process."
        )
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    if not dist.is_initialized():
        if under_launcher():
            dist.init_process_group(backend)
        elif alone:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return torch.device(device)


def stop() -> None:
    """Leave the process group."""
    global _parted
    _parted = False
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process among all; 0 when it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def report(error: Exception) -> bool:
    """Print in one line the error that ends this process; False for a fault of the program.

    Before `ranks_part` all ranks read the same records and settings and fail alike: rank 0 speaks
    for all. After it any rank may fail alone, and speaks for itself.
    """
    if isinstance(error, RuntimeError):
        if not _lost_a_rank(error):
            return False
        print("error: another rank has ended; its message tells why", file=sys.stderr)
    elif rank() == 0 or _parted:
        which = f" (rank {rank()})" if world_size() > 1 and _parted else ""
        print(f"error{which}: {error}", file=sys.stderr)
    return True


def ranks_part() -> None:
    """From here on ranks do different work."""
    global _parted
    _parted = True


def _lost_a_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank has ended."""
    text = str(error)
    return world_size() > 1 and any(word in text for word in ("gloo", "Gloo", "NCCL", "by peer"))


def barrier() -> None:
    """Wait for the other ranks."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def shard(model: ForestModel, device: torch.device, dtype: torch.dtype) -> None:
    """Shard in place with FSDP2: every layer of both towers, then the rest, with the head.

    Parameters are gathered and computed in `dtype`, gradients are reduced in fp32.
    """
    mesh = init_device_mesh(device.type, (world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if dtype != torch.float32 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def sync_gradients(model: ForestModel, wanted: bool) -> None:
    """Reduce gradients in the next backward, or leave them to a later micro-batch."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)
