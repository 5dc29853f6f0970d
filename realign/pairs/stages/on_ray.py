"""Stages on Ray Data: workers make the shards like the plain runner, and write them.

Only the numbers of shards and their results pass through Ray. If a worker crashes, only its shard
in progress is lost. Ray starts another worker and repeats the task.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from realign.pairs.engines import is_endpoint
from realign.pairs.stages.base import ChatStage, Stage
from realign.pairs.stages.shard import InvalidLimit, ShardResult, failed, make_shard, read_inputs
from realign.third_party import silence_third_party

_STORE = 512 * 2**20  # bytes; a local object store holds only shard numbers and results
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}


def make_shards(
    stage: Stage, numbers: list[int], limit: InvalidLimit, address: str
) -> Iterator[ShardResult]:
    """Make shards on Ray's workers, in any order.

    Args:
        stage: the stage, with its folders set.
        numbers: numbers of the shards.
        limit: limit on the invalid records of each shard.
        address: "local", "local:N" for N workers, or an address for `ray.init`.

    Raises:
        ValueError: when Ray is not installed or cannot be reached.
    """
    ray = _start(address)
    stage = copy.copy(stage)
    stage.tick = Stage.tick  # a worker has no progress bar
    if isinstance(stage, ChatStage):
        _report_cost(stage, numbers[0])
        stage.report = None
    cluster = ray.cluster_resources()
    gpus = int(cluster.get("GPU", 0)) if stage.uses_gpu else 0
    size = min(len(numbers), gpus or int(cluster["CPU"]))
    arguments = (stage, limit, torch.get_num_threads())
    options: dict[str, Any] = {"batch_size": 1, "num_cpus": 1}
    if stage.uses_gpu:  # an actor keeps its model
        compute = ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1)
        options |= {"fn_constructor_args": arguments, "num_gpus": 1 if gpus else 0}
        worker: Any = _Worker
    else:  # tasks reuse Ray's idle processes
        compute = ray.data.TaskPoolStrategy(size)
        options |= {"fn_args": arguments}
        worker = _make
    # With one block per shard, every shard is a task. If a worker dies, Ray Data repeats its task,
    # without a limit.
    rows = ray.data.from_items([{"number": n} for n in numbers], override_num_blocks=len(numbers))
    for row in rows.map_batches(worker, compute=compute, **options).iter_rows():
        yield ShardResult(**row)


def _report_cost(stage: ChatStage, number: int) -> None:
    """Reports the estimated cost of an endpoint's requests, from the requests of one shard."""
    if not is_endpoint(stage.engine_spec) or stage.uses_gpu:  # the driver loads no model
        return
    inputs = read_inputs(stage, number)
    stage.open()
    try:
        stage.report_cost(next(stage.script(inputs, number), []), inputs)
    finally:
        stage.close()


class _Worker:
    """An actor that makes shards."""

    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments

    def __call__(self, batch: dict[str, Any]) -> dict[str, list]:
        return _make(batch, *self._arguments)


_open_stages: list[Stage] = []  # at most one, the open stage of this process


def _opened(stage: Stage) -> Stage:
    """Opens the stage in this process if necessary, and closes any other stage."""
    if not _open_stages or _open_stages[0].folder != stage.folder:
        silence_third_party()
        while _open_stages:
            _open_stages.pop().close()
        stage.open()
        _open_stages.append(stage)
    return _open_stages[0]


def _make(
    batch: dict[str, Any], stage: Stage, limit: InvalidLimit, threads: int
) -> dict[str, list]:
    """Makes the shard of a batch, which holds one number."""
    (number,) = batch["number"].tolist()
    torch.set_num_threads(threads)  # for the same order of summation as a plain run
    try:
        stage = _opened(stage)
    except ValueError as error:
        result = failed(number, error)
    else:
        result = make_shard(stage, number, limit)
    return {name: [value] for name, value in asdict(result).items()}


def _start(address: str) -> Any:
    """Connects to Ray, or returns the existing connection of this process."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError("--ray needs Ray. Run pip install 'realign[ray]'.") from error
    if ray.is_initialized():
        return ray
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "OMP_WAIT_POLICY": "passive"}
    options: dict[str, Any] = {
        "logging_level": logging.ERROR,
        "log_to_driver": False,
        "runtime_env": {"env_vars": threads},
    }
    if address.startswith("local"):
        _, _, workers = address.partition(":")
        options |= {"address": "local", "include_dashboard": False, "object_store_memory": _STORE}
        options |= {"num_cpus": int(workers)} if workers else {}
    else:
        options["address"] = address
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError) as error:
        raise ValueError(f"Ray cannot be reached at {address!r} ({error}).") from error
    ray.data.DataContext.get_current().enable_progress_bars = False  # the runner shows its own
    return ray
