"""Engines that answer chats about images: transformers, vLLM offline, an OpenAI-compatible URL."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from realign.pairs.engines.chat import Chat, Engine, Reply

__all__ = ["Chat", "Engine", "Reply", "is_endpoint", "make_engine"]


def is_endpoint(spec: str | None) -> bool:
    """Whether an engine's name is the URL of an endpoint, which computes elsewhere."""
    return spec is not None and spec.partition(":")[0] in ("http", "https")


def make_engine(
    spec: str,
    *,
    folder: str | Path | None = None,
    batch_size: int = 8,
    dtype: str | None = None,
    vllm_options: Mapping[str, Any] | None = None,
    concurrency: int = 8,
    requests_per_minute: float | None = None,
    tries: int = 5,
    timeout: float = 120.0,
    price_in: float | None = None,
    price_out: float | None = None,
) -> Engine:
    """Make an engine; loads no model and sends nothing.

    Args:
        spec: "transformers:MODEL", "vllm:MODEL", or the URL of an OpenAI-compatible endpoint with
            the model behind a `#`: "https://host/v1#MODEL".
        folder: where an endpoint's answers are kept and files are exchanged with vLLM, so that
            nothing is asked twice. Without one an endpoint's are not kept, and vLLM has a
            temporary folder.
        batch_size: of transformers, for greedy answers; sampled ones are written one by one.
        dtype: of transformers, "fp32" or "bf16"; bf16 on a GPU and fp32 elsewhere when absent.
        vllm_options: further arguments of `vllm.LLM`, such as `tensor_parallel_size`.
        concurrency: requests that an endpoint has at once.
        requests_per_minute: most requests an endpoint gets, repeated ones included.
        tries: how often a request to an endpoint is sent at most.
        timeout: seconds an endpoint has for an answer.
        price_in: of a million input tokens, for the estimate.
        price_out: of a million output tokens.

    Raises:
        ValueError: for another spec, a value out of range, or a key that would go over plain HTTP.
    """
    kind, _, model = spec.partition(":")
    if is_endpoint(spec):
        from realign.pairs.engines.endpoint import EndpointEngine

        return EndpointEngine(
            spec,
            folder=folder,
            concurrency=concurrency,
            requests_per_minute=requests_per_minute,
            tries=tries,
            timeout=timeout,
            price_in=price_in,
            price_out=price_out,
        )
    if model:
        from realign.modeling.merging import check_folder

        check_folder(model)
    if kind == "transformers" and model:
        from realign.pairs.engines.transformers_engine import TransformersEngine

        return TransformersEngine(model, batch_size=batch_size, dtype=dtype)
    if kind == "vllm" and model:
        from realign.pairs.engines.vllm_engine import VllmEngine

        return VllmEngine(model, folder=folder, options=vllm_options)
    raise ValueError(
        "the engine is of no kind that is known; give transformers:MODEL, vllm:MODEL, or the URL "
        "of an OpenAI-compatible endpoint with its model, such as http://127.0.0.1:8000/v1#MODEL."
    )
