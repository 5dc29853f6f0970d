"""Stages on Ray Data: an actor makes a shard as the plain runner does, and writes it itself.

What goes through Ray are numbers of shards and what became of them, so a worker that dies costs its
shard in progress: Ray starts another and gives it that shard. Where an engine is vLLM, requests and
replies go through Ray's own vLLM pipeline, `ray.data.llm`.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from realign.pairs.engines import is_endpoint
from realign.pairs.stages.base import Bad, ChatStage, Row, Script, Stage
from realign.pairs.stages.runner import Limit, Made, make_shard, read_inputs
from realign.third_party import silence_third_party

_STORE = 512 * 2**20  # bytes of a local instance: shard numbers, and images for vLLM
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}
_VLLM_BATCH = 64  # requests sent to a replica at once


def make_shards(stage: Stage, numbers: list[int], limit: Limit, address: str) -> Iterator[Made]:
    """Make shards on Ray's workers, in any order.

    Args:
        stage: with its folders set.
        numbers: of the shards.
        limit: for each shard alone.
        address: "local", "local:N" with N workers, or what `ray.init` takes.

    Raises:
        ValueError: when Ray is not installed or cannot be reached.
    """
    ray = _start(address)
    stage = copy.copy(stage)
    stage.tick = Stage.tick  # a worker's terminal is elsewhere
    if isinstance(stage, ChatStage):
        _tell_cost(stage, numbers[0])
        stage.say = None
        if (stage.engine_spec or "").startswith("vllm:"):
            yield from _by_vllm(stage, numbers, limit)
            return
    cluster = ray.cluster_resources()
    gpus = int(cluster.get("GPU", 0)) if stage.uses_gpu else 0
    size = min(len(numbers), gpus or int(cluster["CPU"]))
    options: dict[str, Any] = {"batch_size": 1, "num_cpus": 1}
    if stage.uses_gpu:  # an actor keeps its model
        compute = ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1)
        options |= {"fn_constructor_args": (stage, limit, torch.get_num_threads())}
        options |= {"compute": compute, "num_gpus": 1 if gpus else 0}
        worker: Any = _Worker
    else:  # processes that are there already
        options |= {"fn_args": (stage, limit, torch.get_num_threads())}
        options |= {"compute": ray.data.TaskPoolStrategy(size)}
        worker = _make
    # Ray Data replaces a worker that dies and repeats its task, without limit.
    made = _dataset([{"number": number} for number in numbers]).map_batches(worker, **options)
    for row in made.iter_rows():
        yield Made(**row)


def _tell_cost(stage: ChatStage, number: int) -> None:
    """Say what an endpoint's requests will cost, to judge by the first of one shard."""
    if (
        not is_endpoint(stage.engine_spec) or stage.uses_gpu
    ):  # beside a model, which is not loaded here
        return
    inputs = read_inputs(stage, number)
    stage.open()
    try:
        if requests := next(stage.script(inputs, number), []):
            stage.tell_cost(stage.engine, requests, max(map(len, inputs.values())))
    finally:
        stage.close()


class _Worker:
    """An actor."""

    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments

    def __call__(self, batch: dict[str, Any]) -> dict[str, list]:
        return _make(batch, *self._arguments)


_held: list[Stage] = []  # the stage that is open in this process


def _opened(stage: Stage) -> Stage:
    """The stage as it is open in this process; another one is closed."""
    if not _held or _held[0].folder != stage.folder:
        silence_third_party()
        while _held:
            _held.pop().close()
        stage.open()
        _held.append(stage)
    return _held[0]


def _make(batch: dict[str, Any], stage: Stage, limit: Limit, threads: int) -> dict[str, list]:
    """Make the shard of a batch of one number."""
    (number,) = batch["number"].tolist()
    torch.set_num_threads(threads)  # sums in the same order as those of a plain run
    try:
        stage = _opened(stage)
    except ValueError as error:
        made = Made(number, 0, 0, str(error))
    else:
        made = make_shard(stage, number, limit)
    return {name: [value] for name, value in asdict(made).items()}


def _by_vllm(stage: ChatStage, numbers: list[int], limit: Limit) -> Iterator[Made]:
    """Make shards of a stage that asks vLLM.

    The script of every shard runs up to its next requests, all shards' requests are answered in one
    pass over the data, and scripts that end with the replies write their shards. Replies are kept
    here, and a script is run from its start each time: it is deterministic, and workers keep
    nothing.
    """
    stage.asks_elsewhere = True
    processor = vllm_processor(stage.engine_spec.partition(":")[2])
    told: dict[int, list[list[Row]]] = {number: [] for number in numbers}
    while told:
        rows = [{"number": n, "told": json.dumps(replies)} for n, replies in told.items()]
        asked = _dataset(rows).flat_map(_ask, fn_args=(stage,))
        answers: dict[int, dict[int, Row]] = {number: {} for number in told}
        for row in processor(asked).iter_rows():
            reply = {"text": row.get("text") or "", "cut": bool(row.get("cut"))}
            reply["error"] = row.get("__inference_error__") or ""
            answers[int(row["number"])][int(row["place"])] = reply
        for number, by_place in answers.items():
            if by_place:
                told[number].append([by_place[place] for place in range(len(by_place))])
        rows = [{"number": n, "told": json.dumps(replies)} for n, replies in told.items()]
        ended = _dataset(rows).map(_end, fn_args=(stage, limit))
        for row in ended.iter_rows():
            if row["ended"]:
                del told[int(row["number"])]
                yield Made(**json.loads(row["made"]))


def vllm_processor(model: str) -> Any:
    """Ray's vLLM pipeline for requests as `_ask` makes them: a replica of the model on each GPU.

    Raises:
        ValueError: when Ray's part for language models is not installed.
    """
    try:
        import ray
        from ray.data.llm import build_processor, vLLMEngineProcessorConfig
    except ImportError as error:
        raise ValueError(
            f"a vllm engine on Ray needs a package that is missing ({error}): pip install "
            "'ray[llm]' vllm."
        ) from error
    config = vLLMEngineProcessorConfig(
        model_source=model,
        concurrency=max(1, int(ray.cluster_resources().get("GPU", 0))),
        batch_size=_VLLM_BATCH,
        should_continue_on_error=True,  # a request that is refused becomes a bad record
        prepare_multimodal_stage=True,
    )
    return build_processor(config, preprocess=_to_vllm, postprocess=_from_vllm)


def _to_vllm(row: Row) -> Row:
    """A row of `_ask` as the pipeline takes it; other columns are carried along."""
    body = json.loads(row["body"])
    sampling = {name: body[name] for name in ("max_tokens", "temperature", "seed") if name in body}
    return {
        "messages": body["messages"],
        "sampling_params": sampling,
        "most": body["max_tokens"],
        "number": row["number"],
        "place": row["place"],
    }


def _from_vllm(row: Row) -> Row:
    """The pipeline's answer. A failed request comes back without this, with its error."""
    return {
        "number": row["number"],
        "place": row["place"],
        "text": row["generated_text"].strip(),
        "cut": row["num_generated_tokens"] >= row["most"],
    }


def _ask(row: Row, stage: ChatStage) -> list[Row]:
    """Run the script of a shard to its next requests; a row for each."""
    from realign.pairs.engines.wire import payload

    number = int(row["number"])
    requests, _ = replay(_script(_opened(stage), number), json.loads(row["told"]))
    return [
        {"number": number, "place": place, "body": payload(chat, "").decode()}
        for place, chat in enumerate(requests or [])
    ]


def _end(row: Row, stage: ChatStage, limit: Limit) -> Row:
    """Run the script of a shard with all replies; write the shard if that is its end."""
    number = int(row["number"])
    requests, result = replay(_script(_opened(stage), number), json.loads(row["told"]))
    if result is None:
        return {"number": number, "ended": False, "made": ""}
    made = make_shard(_Known(stage, result), number, limit)
    return {"number": number, "ended": True, "made": json.dumps(asdict(made))}


class _Known(Stage):
    """A stage whose result for one shard is known, for `make_shard` to write."""

    def __init__(self, stage: Stage, result: tuple[list[Row], list[Bad]]) -> None:
        self.name, self.needs, self.schema = stage.name, stage.needs, stage.schema
        self.columns = {name: ["id"] for name in stage.needs}  # they are counted, no more
        self.folder, self.folders, self.shared = stage.folder, stage.folders, stage.shared
        self._result = result

    def run(self, inputs: dict[str, list[Row]], number: int) -> tuple[list[Row], list[Bad]]:
        """What is known."""
        return self._result


def replay(
    script: Script, told: Iterable[list[Row]]
) -> tuple[list | None, tuple[list[Row], list[Bad]] | None]:
    """Run a script from its start with the replies so far.

    Args:
        script: of a shard.
        told: replies to each of its requests that were not empty, as dicts.

    Returns:
        (its next requests, None), or (None, its result) where it ended.
    """
    from realign.pairs.engines import Reply

    replies = iter(told)
    try:
        requests = next(script)
        while True:
            if not requests:
                requests = script.send([])
                continue
            known = next(replies, None)
            if known is None:
                return requests, None
            requests = script.send([Reply(**reply) for reply in known])
    except StopIteration as ended:
        return None, ended.value


def _script(stage: ChatStage, number: int) -> Script:
    return stage.script(read_inputs(stage, number), number)


def _start(address: str) -> Any:
    """Ray, connected: started once in a process, and ended with it."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError("--ray needs Ray: pip install 'realign[ray]'.") from error
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
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the runner has its own
    return ray


def _dataset(rows: list[Row]) -> Any:
    """A block for each row, so that each is a task of its own."""
    import ray.data

    return ray.data.from_items(rows, override_num_blocks=len(rows))
