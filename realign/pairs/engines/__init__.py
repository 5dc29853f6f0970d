"""Engines that answer chats about images, with transformers in this process or at an endpoint.

To add an engine, write a subclass of `Engine` in a module of this folder. Add it to `ENGINES` under
the scheme of its specs. Its arguments are the spec and the `EngineOptions`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from realign.modeling.merging import check_folder
from realign.pairs.engines.chat import Chat, Engine, EngineOptions, Reply

__all__ = ["Chat", "Engine", "EngineOptions", "Reply", "is_endpoint", "make_engine"]


def _transformers(spec: str, options: EngineOptions) -> Engine:
    from realign.pairs.engines.transformers_engine import TransformersEngine

    model = spec.partition(":")[2]
    check_folder(model)
    return TransformersEngine(
        model,
        batch_size=options.batch_size,
        dtype=options.dtype,
        workers=options.workers,
        min_pixels=options.min_pixels,
        max_pixels=options.max_pixels,
    )


def _endpoint(spec: str, options: EngineOptions) -> Engine:
    try:
        from realign.pairs.engines.endpoint import EndpointEngine
    except ImportError as error:
        raise ValueError(
            f"an endpoint needs the openai client ({error}). Run pip install 'realign[endpoint]'."
        ) from error
    return EndpointEngine(spec, options)


ENGINES: dict[str, Callable[[str, EngineOptions], Engine]] = {
    "transformers": _transformers,
    "http": _endpoint,
    "https": _endpoint,
}
"""Scheme of a spec -> engine. The library of an engine is imported when the engine is made."""


def is_endpoint(spec: str | None) -> bool:
    """Whether a spec is the URL of an endpoint."""
    return spec is not None and spec.partition(":")[0] in ("http", "https")


def make_engine(spec: str, **options: Any) -> Engine:
    """Make an engine, without loading a model or sending a request.

    Args:
        spec: "transformers:MODEL", or the URL of an OpenAI-compatible endpoint with the model
            after a `#`: "https://host/v1#MODEL".
        options: fields of `EngineOptions`.

    Raises:
        ValueError: for an invalid spec, an option out of range, or a key that would be sent over
            plain HTTP. The message does not show the spec, which may contain a key.
    """
    scheme, _, address = spec.partition(":")
    if scheme == "vllm":
        raise ValueError(
            "vLLM is used as a server. Start it with `vllm serve MODEL --port 8000`, and pass "
            "http://127.0.0.1:8000/v1#MODEL as the engine (docs/pairs.md, Engines)."
        )
    if scheme not in ENGINES or not address:
        raise ValueError(
            "the kind of engine is unknown; give transformers:MODEL, or the URL of an "
            "OpenAI-compatible endpoint with its model, such as http://127.0.0.1:8000/v1#MODEL."
        )
    return ENGINES[scheme](spec, EngineOptions(**options))
