"""The start-up check: forests compared with plain forwards on the processor's own output.

Two records are made, one with two images of different sizes and one with the second of them. If
the data set has records without an image, a record without one is added. Their truth is a plain
forward of the model over everything that its processor returns for prompt and response, with eager
attention. What the language model receives there is compared part by part with what it receives in
a forest: token columns, image features, positions and masks. So a message names the part that
differs. Finally the log-probs are compared, with the attention of the run.

Bounds come from the model's own rounding: the truth is computed again with inputs that differ by
one unit in the last place.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image

from realign import distributed
from realign.data.errors import RecordError, short_error
from realign.data.images import StoredImage
from realign.data.records import Record
from realign.distributed import broadcast_from_rank0
from realign.modeling import layouts
from realign.modeling.chat import ChatTemplate, TextInputs
from realign.modeling.decoder_inputs import (
    NOISES,
    Differs,
    Model,
    Noise,
    Truth,
    compare_heads,
    compare_parts,
    logps_of_head,
    mean_size,
    of_leaf,
    recorded,
)
from realign.modeling.encode import encode_records
from realign.modeling.examples import Example
from realign.modeling.forest import build_batch
from realign.modeling.images import ImageStore, bundle_of, columns_of, given, moved
from realign.modeling.layouts import TESTED, Layout
from realign_kernels import objectives

_SIZES = ((224, 224), (160, 320))  # width, height
_QUESTIONS = {
    0: "Are apples red?",
    1: "What is in the image?",
    2: "First <image> and then <image> is left or right?",
}
_ANSWERS = ("one red dot", "two small blue dots")
_COARSE = 0.02
_LEAST = {torch.float32: 1e-3, torch.bfloat16: _COARSE}
"""Accepted mean difference per token, also if the rounding is smaller."""
_LEAST_OF_HEAD, _HEAD_NOISES = 1e-3, 4
"""Accepted mean difference per token between heads on the same hidden states: at least, and as a
multiple of the rounding of logits. Measured: at most 0.8 times."""
_LEAST_OF_RECORD = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""Accepted mean difference per token between a shared copy of a prompt and separate ones."""


def run(model: Model, example: Example, store: ImageStore, device: torch.device) -> Iterator[str]:
    """Compare forests with plain forwards. See `ForestModel.check_forest`."""
    kind = model.vlm.config.model_type
    _check_trained(model)
    training = model.vlm.training
    model.vlm.eval()
    try:
        with torch.no_grad(), _uncompiled():
            gap, lines = _gap(model, store, device)
            yield from lines
            yield from _first_record(model, example, store, device)
    except (AttributeError, IndexError, KeyError, TypeError, RuntimeError) as error:
        if _of_machine(error):
            raise
        raise _refusal(model, f"its start-up check failed: {short_error(error)}") from error
    finally:
        model.vlm.train(training)
    if kind not in TESTED:
        yield (
            f"models of type {kind!r} are untested: log-probs of a forest differ from plain "
            f"forwards by {gap:.1g} per token"
        )
    if not model.layout.shares_prefix:
        yield f"each response gets its own copy of the prompt: {model.layout.separate}"


def _refusal(model: Model, what: str) -> ValueError:
    config = model.vlm.config
    return ValueError(
        f"models of type {config.model_type!r} with a language model of type "
        f"{config.get_text_config().model_type!r} are not trained: {what}. Use a model of "
        "docs/families.md, or the processor of this model in the same version."
    )


def _check_trained(model: Model) -> None:
    """Check that no parameter of a frozen tower is trained."""
    names = {p: name for name, p in model.vlm.named_parameters()}
    for parameter in model.frozen_parameters():
        if parameter.requires_grad:
            raise ValueError(
                f"{names[parameter]} is trained, and belongs to a part that is frozen. Pass "
                "--train-vision to train the vision tower."
            )


def _gap(model: Model, store: ImageStore, device: torch.device) -> tuple[float, list[str]]:
    """Mean difference per token between forests and the truth, and lines about deviations.

    Raises:
        ValueError: when they differ by more than rounding.
    """
    layout, lines = model.layout, []
    records, examples, own = _examples(store)
    _check_names(model, own, records)
    with _attends(model, "eager"):
        truths, noise = _truths(model, own, records, examples, device)
    while True:
        shared = layout.shares_prefix
        longest = max(example.longest_tree for example in examples)
        batch = build_batch(examples, own, row_tokens=longest, shared=shared).to(device)
        try:
            # All forwards come before a comparison, which may fail on one rank only.
            with _attends(model, "eager"), _joint_errors(layout), recorded(model) as forest:
                model.logps(batch)
            logps = model.logps(batch).double()
            heads = [logps_of_head(model, truth) for truth in truths]
            compare_parts(model, batch, forest, truths, noise)
            compare_heads(heads, truths, max(_LEAST_OF_HEAD, _HEAD_NOISES * noise.head))
            gap = mean_size([logps[of_leaf(batch, t.leaf)] - t.logps for t in truths])
            if not gap <= max(_LEAST.get(model.dtype, _COARSE), NOISES * noise.logps):
                raise Differs(
                    f"log-probs with {model.attention} attention differ from plain forwards by "
                    f"{gap:.2g} per token, and rounding is {noise.logps:.1g}",
                    shared_only=True,
                )
            failed = None
        except Differs as error:
            failed = error
        # Rounding may differ between ranks, so rank 0 decides.
        failed = broadcast_from_rank0(lambda outcome=failed: outcome)
        if failed is None:
            return gap, lines
        if failed.of_images and not layout.one_by_one:
            layout.one_by_one = True
            lines.append(f"images pass the vision tower one by one: {failed}")
        elif failed.shared_only and shared:
            layout.separate = str(failed)
        else:
            raise _refusal(model, str(failed))


def _first_record(
    model: Model, example: Example, store: ImageStore, device: torch.device
) -> Iterator[str]:
    """Compare a forest of the data set with separate copies of its prompt."""
    layout = model.layout
    if not layout.shares_prefix:
        return
    shared = build_batch([example], store, row_tokens=example.longest_tree)
    separate = build_batch([example], store, row_tokens=0, shared=False)
    change = model.logps(shared.to(device)) - model.logps(separate.to(device))
    local_gap = float(change.abs().mean())
    gap = broadcast_from_rank0(lambda: local_gap)
    if not gap <= _LEAST_OF_RECORD.get(model.dtype, 0.05):
        layout.separate = (
            f"with a shared copy, log-probs of record {example.name!r} differ by {gap:.2g} per "
            "token"
        )
    yield from ()


def _examples(store: ImageStore) -> tuple[list[Record], Sequence[Example], ImageStore]:
    """Records of two images and of the second one, or of one each if the template takes no more.

    Another one has no image, if records of the data set have none.
    """
    images = [_image(size, seed) for seed, size in enumerate(_SIZES)]
    none = [[]] if store.text_only else []
    try:
        return _encoded(store, [images, images[1:], *none])
    except RecordError:
        pass
    try:
        return _encoded(store, [images[:1], images[1:], *none])
    except RecordError as error:
        problem = str(error).partition(": ")[2]
        raise ValueError(
            "the start-up check asks a question about an image, without a system message: "
            f"{problem}"
        ) from error


def _encoded(
    store: ImageStore, images: Sequence[Sequence[StoredImage]]
) -> tuple[list[Record], Sequence[Example], ImageStore]:
    records = [
        Record(
            f"check {index}",
            ({"role": "user", "content": _QUESTIONS[len(shown)]},),
            *_ANSWERS,
            tuple(shown),
        )
        for index, shown in enumerate(images)
    ]
    examples, own = encode_records(
        records,
        store.processor,
        objectives.dpo(),
        layout=store.layout,
        max_response_tokens=1 << 20,
        max_tokens=1 << 20,
        progress=False,
    )
    return records, examples, own


def _image(size: tuple[int, int], seed: int) -> StoredImage:
    """An image of large colored squares."""
    squares = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return StoredImage.from_pil(Image.fromarray(squares).resize(size, Image.Resampling.NEAREST))


def _check_names(model: Model, store: ImageStore, records: Sequence[Record]) -> None:
    """Check that every output of the processor that the model takes is passed on."""
    layout = store.layout
    accepted = layouts.parameters(model.vlm.model, "forward")
    accepted |= layouts.parameters(model.vlm.model, "get_image_features")
    for record in records:
        text = ChatTemplate(store.processor).prompt(record.prompt, len(record.images)).text
        outputs = _processed(store.processor, record, text)
        bundle, columns = bundle_of(outputs, layout), columns_of(outputs, layout)
        passed = layout.tower_inputs | {*layout.grids}
        for name in accepted & (outputs.keys() - {"input_ids", "attention_mask", "labels"}):
            if name not in (layout.accepts if name in columns else passed):
                raise _refusal(model, f"its processor returns {name!r}, which is not passed on")
        for name in layout.tower_inputs & outputs.keys():
            if name not in bundle:
                form = type(outputs[name]).__name__
                raise _refusal(model, f"its processor returns {name!r} as a {form}, not a tensor")


def _processed(processor: Any, record: Record, text: str) -> dict[str, Any]:
    images = [image.open(record.name) for image in record.images]
    inputs = TextInputs(processor)([text])
    return dict(processor(**given(images), return_tensors="pt", **inputs))


def _truths(
    model: Model,
    store: ImageStore,
    records: Sequence[Record],
    examples: Sequence[Example],
    device: torch.device,
) -> tuple[list[Truth], Noise]:
    """The truth for a response to each prompt, the second one first, and the rounding."""
    count = len(examples[0].leaves)
    truths = []
    for index, (record, example) in enumerate(zip(records, examples, strict=True)):
        place = (index + 1) % count
        inputs = _plain_inputs(model, store, record, example, place)
        prompt = len(example.roots[0].ids)
        with recorded(model) as seen, _of_processor(model.vlm.config.model_type):
            logps, _ = _plain(model, inputs, prompt, device)
        if not logps.isfinite().all():
            raise ValueError(
                "log-probs of a plain forward are NaN or infinite. Check the model's weights, and "
                "whether they fit the dtype."
            )
        truths.append(Truth(index * count + place, prompt, inputs, seen, logps))
    first = truths[0]
    with _rounding(model), recorded(model) as seen:
        logps, head = _plain(model, first.inputs, first.prompt, device)
    inputs = {
        name: mean_size([value - seen.inputs[name]]) / max(mean_size([value]), 1e-30)
        for name, value in first.seen.inputs.items()
        if value.is_floating_point()
    }
    return truths, Noise(mean_size([logps - first.logps]), head, inputs)


def _plain_inputs(
    model: Model, store: ImageStore, record: Record, example: Example, place: int
) -> dict[str, torch.Tensor]:
    """Everything that the processor returns for a prompt with a response, (1, T) tokens.

    If it tokenizes them differently as one text, the tokens of the response are appended. Their
    columns continue with the last value, which is that of text.
    """
    processor, layout = store.processor, store.layout
    template = ChatTemplate(processor, layout.ends)
    prompt = template.prompt(record.prompt, len(record.images))
    root, leaf = example.roots[0], example.leaves[place]
    ids = torch.from_numpy(np.concatenate([root.ids, leaf.ids]))[None]
    scored = template.scored(prompt, _ANSWERS[place])
    outputs = _processed(processor, record, prompt.text + scored)
    if layout.both_ways == "prompt" or not torch.equal(outputs["input_ids"], ids):
        outputs = _processed(processor, record, prompt.text)
        if not np.array_equal(outputs["input_ids"][0], root.ids):
            raise Differs("token ids of a prompt differ from those of the processor")
        for name, column in columns_of(outputs, layout).items():
            last = torch.ones_like(column) if layout.both_ways == "prompt" else column
            outputs[name] = torch.cat([column, last[:, -1:].expand(-1, len(leaf.ids))], 1)
        outputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    names = layouts.parameters(model.vlm, "forward") - {"labels"}
    names |= layouts.parameters(model.vlm.model, "forward")
    return {n: v for n, v in outputs.items() if n in names and isinstance(v, torch.Tensor)}


def _plain(
    model: Model, inputs: dict[str, torch.Tensor], prompt: int, device: torch.device
) -> tuple[torch.Tensor, float]:
    """Log-probs of the response in a plain forward, (R,) fp64, and the effect of rounded logits."""
    ids = inputs["input_ids"][0, prompt:].to(device)
    logits = model.plain_logits(moved(inputs, device, model.dtype))[0, prompt - 1 : -1]
    half = torch.finfo(model.dtype).eps / 2
    others = _rounded(logits, half, torch.Generator(device).manual_seed(0))
    logps, rounded = (
        some.double().log_softmax(-1).gather(1, ids[:, None])[:, 0] for some in (logits, others)
    )
    return logps, mean_size([rounded - logps])


def _rounded(values: torch.Tensor, size: float, generator: torch.Generator) -> torch.Tensor:
    """Values that are larger or smaller by a share of `size`, at random."""
    up = torch.empty_like(values).bernoulli_(0.5, generator=generator)
    return values * (1 + size * (2 * up - 1))


def _uncompiled() -> AbstractContextManager:
    """Run compiled layers uncompiled. Without `torch.compile` its import would take seconds."""
    compiles = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if compiles else nullcontext()


def _of_machine(error: Exception) -> bool:
    """Whether an error is not about the model: memory, a GPU, or another rank that has ended."""
    lost = isinstance(error, RuntimeError) and distributed.lost_a_rank(error)
    machine = torch.OutOfMemoryError | torch.AcceleratorError | MemoryError
    return lost or isinstance(error, machine)


@contextmanager
def _of_processor(kind: str) -> Iterator[None]:
    """Name the processor in errors of a plain forward."""
    try:
        yield
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if _of_machine(error):
            raise
        raise ValueError(
            f"a plain forward of the model of type {kind!r} fails on what its processor returns "
            f"({short_error(error)}). The processor does not belong to this model, or not in this "
            "version. Check its patch_size, vision_feature_select_strategy, "
            "num_additional_image_tokens and image size."
        ) from error


@contextmanager
def _joint_errors(layout: Layout) -> Iterator[None]:
    """Turn errors of a tower that gets several images in one call into `Differs`."""
    try:
        yield
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if layout.one_by_one or _of_machine(error):
            raise
        raise Differs(
            f"with several images, the vision tower fails ({short_error(error)})", of_images=True
        ) from error


@contextmanager
def _attends(model: Model, implementation: str) -> Iterator[None]:
    """Set the attention implementation of the language model."""
    config = model.vlm.model.get_decoder().config
    before = model.attention, config._attn_implementation
    model.attention = config._attn_implementation = implementation
    try:
        yield
    finally:
        model.attention, config._attn_implementation = before


@contextmanager
def _rounding(model: Model) -> Iterator[None]:
    """Change the outputs of all layers, and what the language model receives, by rounding."""
    half = torch.finfo(model.dtype).eps / 2
    random: dict[torch.device, torch.Generator] = {}

    def changed(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(changed(one) for one in value[:1]) + value[1:]
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        generator = random.setdefault(value.device, torch.Generator(value.device).manual_seed(0))
        return _rounded(value, half, generator)

    with ExitStack() as stack:
        for layer in model.layers:
            handle = layer.register_forward_hook(lambda _, args, output: changed(output))
            stack.callback(handle.remove)
        yield
