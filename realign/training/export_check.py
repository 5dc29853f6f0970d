"""Check of an exported model: its log-probs and greedy answers against base and adapter.

The folder is read back as transformers loads it, and its weights are compared with a merge in
memory. Each model makes plain forwards of the processor's own output, in fp32, one record after the
other. One model in fp32 and the weights of one in its stored dtype are in memory at a time.
"""

from __future__ import annotations

import gc
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForImageTextToText, PreTrainedModel

from realign.data.errors import Malformed, RecordError, short_error
from realign.data.records import Record, stream_pairs
from realign.modeling.chat import ChatTemplate, TextInputs
from realign.modeling.images import given
from realign.modeling.loading import from_pretrained, load_processor
from realign.modeling.merging import adapter_base, cast, merge, put_on
from realign.modeling.reference_logps import weights_digest
from realign.training.export import read_card, stored_dtype

_ANSWER_TOKENS = 16
_NO_EFFECT = 1e-5
"""Largest difference per token, in nats, that counts as none. Measured with the digits: 0 for LoRA
and DoRA without an update, 7e-4 after one step of training with a learning rate of 5e-5."""
_WEIGHTS = 0.02
"""Accepted error of a weight, as a share of the adapter's change of it. An adapter merged twice has
1. Merging the digits in bf16 instead of fp32 gave 0.002."""
_MERGE = 1e-6
"""Accepted error of a merged weight beyond that, as a share of the weight. Merging in fp32 on
another machine differs by the rounding of fp32, 1e-7."""
_ROUNDING = 1e-3
"""Accepted mean difference per token, in nats, beyond the rounding of the stored dtype. Merging in
fp32 gave at most 2e-5 in 40 kinds of adapters. Errors in weights have their own bound."""
_TIMES = 2
"""The written model may differ from the adapter by this multiple of its dtype's own rounding."""
_SHARES = (0.5, 1.5)
"""Accepted shares of the adapter's change. A base has 0. An adapter merged twice has 2, or up to 4
where the chosen tokens have probabilities near 1."""
_DIGEST = re.compile(r"Digest of the base weights: `([0-9a-f]{32})`")
_COMPUTED = re.compile(r"\| compute dtype \| (\w+) \|")
_TRANSFORMERS = re.compile(r"\| transformers \| (\S+) \|")
_QUANTIZED = "| base while training | quantized"


class Worst(NamedTuple):
    """The weight of a written model that differs most from the merge in memory.

    Attributes:
        name: its name.
        error: norm of its difference beyond rounding, divided by that of the adapter's change.
            Infinite if the adapter does not change it, or if it is missing.
        wrong: whether the difference exceeds its bound.
    """

    name: str
    error: float
    wrong: bool


class Scores(NamedTuple):
    """What one model computes for the records.

    Attributes:
        logps: (T,) fp64 log-probs of the tokens of all chosen responses.
        answers: token ids of the greedy answer to each record.
    """

    logps: torch.Tensor
    answers: list[list[int]]


@dataclass(frozen=True)
class Case:
    """A record in the form of the model's inputs.

    Attributes:
        name: name of the record.
        asked: output of the processor for the prompt.
        whole: output of the processor for the prompt and the chosen response.
        start: number of tokens before the response.
    """

    name: str
    asked: dict[str, Any]
    whole: dict[str, Any]
    start: int


def first_records(
    source: str, image_folder: str | None, count: int, *, split: str | None = None
) -> list[Record]:
    """The first records with images.

    Args:
        source: see `stream_pairs`.
        image_folder: see `stream_pairs`.
        count: maximum number of records.
        split: see `stream_pairs`.

    Raises:
        ValueError: for unusable records, an unreadable image, or no record with an image.
    """
    stream = stream_pairs(source, image_folder, split=split)
    records = list(islice((record for record in stream if record.images), count))
    if not records:
        raise ValueError(
            f"--check: {source} holds no record with an image. Give the pairs that the model was "
            "trained on."
        )
    for record in records:
        for image in record.images:
            image.open(record.name)
    return records


def check_export(model: str, folder: Path, records: Sequence[Record]) -> list[str]:
    """Compare a written model with the model or adapter that it was made from.

    Args:
        model: folder or Hub name of an adapter, or of a whole model.
        folder: the written model.
        records: records with images. Their chosen responses are scored, and their prompts answered.

    Returns:
        Lines with the measured differences and their bounds, and with what was not checked.

    Raises:
        ValueError: if the adapter changes nothing, was trained on another base, or if the written
            model differs from it. The message holds the measured numbers.
    """
    if adapter_base(folder) is not None:
        raise ValueError(f"--check: {folder} is an adapter. Name the folder of a merged model.")
    cases = _cases(model, folder, records)
    base, card, dtype = adapter_base(model), read_card(model), stored_dtype(str(folder))
    load = partial(from_pretrained, AutoModelForImageTextToText, dtype=torch.float32)
    vlm = load(base or model, adapter=model if base else None)
    lines, before = [_check_digest(vlm, model, card, adapter=base is not None)], None
    worst = None
    if base is not None:
        before = _scores(vlm, cases)
        plain = _compact(vlm, stored_dtype(base))
        adapted = put_on(vlm, model)
        exact = _scores(vlm, cases)
        lines.append(_check_effect(model, before, exact))
        vlm = merge(adapted)
        changes = {name: _norm(w - plain.get(name, w)) for name, w in vlm.state_dict().items()}
        del plain
        worst = worst_weight(
            vlm, from_pretrained(AutoModelForImageTextToText, folder, dtype=dtype), changes
        )
    else:
        exact = _scores(vlm, cases)
    rounded = _scores(cast(cast(vlm, dtype), torch.float32), cases)
    # A merge rounds differently on other machines, and a copy does not.
    digest = None if base is not None else weights_digest(vlm)
    del vlm
    gc.collect()
    vlm = load(folder)
    scores = (before, exact, rounded, _scores(vlm, cases))
    lines.append(_check_written(model, folder, dtype, *scores, worst))
    if digest is not None and weights_digest(vlm) != digest:
        raise ValueError(
            f"{folder} has other weights than {model}, although {lines[-1]}. Export it again."
        )
    tokens = len(exact.logps)
    return [f"checked {len(cases)} records, {tokens} tokens of chosen responses", *lines]


def _check_effect(model: str, before: Scores, exact: Scores) -> str:
    """Check that an adapter changes its base. Returns the measured change."""
    gap = (exact.logps - before.logps).abs()
    if not gap.max() > _NO_EFFECT:
        raise ValueError(
            f"the adapter {model} changes nothing: log-probs differ from those of its base by at "
            f"most {gap.max():.1e} nats per token, and {_NO_EFFECT:.0e} is rounding. Its weights "
            "are zero, or it was saved before it was trained. Export the adapter of a trained step."
        )
    return (
        f"the adapter changes log-probs by {gap.mean():.2g} nats per token on average, at most "
        f"{gap.max():.2g}, and {_different(before, exact)} of {len(exact.answers)} greedy answers"
    )


def _check_written(
    model: str,
    folder: Path,
    dtype: torch.dtype,
    before: Scores | None,
    exact: Scores,
    rounded: Scores,
    written: Scores,
    worst: Worst | None = None,
) -> str:
    """Check that the written model is the original one. Returns the measured differences.

    Args:
        model: the original.
        folder: the written model.
        dtype: dtype of its weights.
        before: scores of an adapter's base; None for a whole model.
        exact: scores of the original.
        rounded: scores of the original, merged in memory and rounded to `dtype`.
        written: scores of the written model.
        worst: the weight of the written model that differs most; None for a whole model.
    """
    name = str(dtype).removeprefix("torch.")
    gap, rounding = ((scores.logps - exact.logps).abs() for scores in (written, rounded))
    bound = _TIMES * rounding.mean() + _ROUNDING
    text = (
        f"{folder} differs from {model} by {gap.mean():.2g} nats per token on average, at most "
        f"{gap.max():.2g}; the bound on the average is {bound:.2g}, from rounding to {name}"
    )
    close, share = bool(gap.mean() <= bound), 1.0
    wrong = worst is not None and worst.wrong
    if worst is not None and worst.error < math.inf:
        text += (
            f". The largest error of a weight is {worst.error:.1%} of the adapter's change of it"
        )
        text += f" ({worst.name})" * wrong
    elif worst is not None:
        text += f". The weight {worst.name} is missing, or differs and is not the adapter's"
    if before is not None:
        share = _share(before, exact, written)
        text += f". It has {share:.0%} of the adapter's change"
    if wrong or not close or not _SHARES[0] < share < _SHARES[1]:
        reason = "Export the model again."
        if before is not None:
            if abs(share) < 0.1:
                reason = "The adapter is not in it. " + reason
            elif wrong:
                reason = "It may be merged twice, or another adapter was merged. " + reason
            if not wrong and not _SHARES[0] < _share(before, exact, rounded) < _SHARES[1]:
                reason = f"Rounding to {name} loses the adapter's change. Export with --dtype fp32."
        raise ValueError(f"{text}. {reason}")
    return f"{text}; {_different(exact, written)} of {len(written.answers)} greedy answers differ"


def _share(before: Scores, exact: Scores, other: Scores) -> float:
    """The part of the adapter's change of log-probs that another model has, by least squares."""
    change = exact.logps - before.logps
    return float((other.logps - before.logps) @ change / (change @ change))


def _different(one: Scores, other: Scores) -> int:
    return sum(a != b for a, b in zip(one.answers, other.answers, strict=True))


@torch.no_grad()
def worst_weight(
    merged: PreTrainedModel, written: PreTrainedModel, changes: Mapping[str, float]
) -> Worst:
    """Compare the weights of a written model with those of the merge that it should hold.

    A weight's error is its distance from the merge beyond that of the correctly rounded weight.
    So a merge that rounds a few numbers near a tie to the other side has almost none.

    Args:
        merged: the merge in fp32.
        written: the written model, in the dtype of its weights.
        changes: name -> norm of the adapter's change of the weight. Others are equal to the base.
    """
    found, worst = written.state_dict(), Worst("", 0.0, False)
    for name, right in merged.state_dict().items():
        change, error, bound = changes[name], math.inf, 0.0
        weight = found.pop(name, None)
        if weight is not None and weight.shape == right.shape:
            rounded = right.to(weight.dtype).to(right.dtype)
            gap = (weight.to(right.dtype) - right).abs() - (rounded - right).abs()
            error, bound = _norm(gap.clamp_(min=0)), _WEIGHTS * change
            bound += _MERGE * _norm(right) * (change > 0)
        share = error / change if change else math.inf if error else 0.0
        if (error <= bound, -share) <= (not worst.wrong, -worst.error):
            worst = Worst(name, share, not error <= bound)
    return Worst(min(found), math.inf, True) if found else worst


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.float()))


def _compact(vlm: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A copy of the weights, in `dtype` where this changes no number."""
    copies = {}
    for name, weight in vlm.state_dict().items():
        small = weight.to(dtype) if weight.is_floating_point() else weight
        copies[name] = (small if torch.equal(small.to(weight.dtype), weight) else weight).clone()
    return copies


def _check_digest(vlm: PreTrainedModel, model: str, card: str, *, adapter: bool) -> str:
    """Compare weights with the digest of the base in a card. Returns the result.

    Args:
        vlm: the base of an adapter, or a whole model, in fp32.
        model: its name in messages.
        card: the card of the adapter or of the whole model.
        adapter: whether `vlm` is a base and must have the digest. A whole model must not.

    Raises:
        ValueError: for a base with another digest, and for a whole model with that of its base.
    """
    about = "whether the base is the one of training" if adapter else "whether training changed it"
    if (named := _DIGEST.search(card)) is None:
        return f"not checked: {about}, since {model} has no card with a digest of base weights"
    if _QUANTIZED in card:
        return f"not checked: {about}, since the card has the digest of quantized weights"
    # The digest of a run is that of the weights in its compute dtype.
    digests = [weights_digest(vlm, dtype) for dtype in (torch.bfloat16, torch.float32)]
    same, version = named[1] in digests, _TRANSFORMERS.search(card)
    if adapter and same:
        return f"the base has the digest in the card, {named[1]}"
    if not adapter and same:
        raise ValueError(
            f"{model} has the weights of its base, by the digest {named[1]} in its card. Training "
            "changed nothing, or the base was exported. Export the model of a trained step."
        )
    if version is None or version[1] != transformers.__version__:
        return (
            f"not checked: {about}, since the digest in the card is one of transformers "
            f"{version[1] if version else 'of an unknown version'}"
        )
    if not adapter:
        computed, stored = _COMPUTED.search(card), _stored(vlm)
        if stored != torch.float32 and (stored, computed and computed[1]) != (
            torch.bfloat16,
            "bf16",
        ):
            return (
                f"not checked: {about}, since its weights are rounded to "
                f"{str(stored).removeprefix('torch.')}, and the digest in the card may be one of "
                "weights that are not"
            )
        return (
            f"at least one weight differs from the base's, by the digest {named[1]} in the card of "
            f"{model}"
        )
    raise ValueError(
        f"the adapter {model} was trained on another base: its card has the digest {named[1]}, and "
        f"{vlm.name_or_path} has {digests[0]} in bf16 and {digests[1]} in fp32. Set "
        "base_model_name_or_path in adapter_config.json to the base of training. A base that the "
        "adapter was merged into is another model."
    )


def _stored(vlm: PreTrainedModel) -> torch.dtype:
    """The dtype that holds all weights of an fp32 model: bf16, fp16 or fp32."""
    weights = [w for w in vlm.state_dict().values() if w.is_floating_point()]
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(weight.to(dtype).to(weight.dtype), weight) for weight in weights):
            return dtype
    return torch.float32


def _cases(model: str, folder: Path, records: Sequence[Record]) -> list[Case]:
    """The records as inputs, by the processor in the written folder.

    Raises:
        ValueError: if the processor of the original gives other inputs.
        RecordError: for a record that the chat template or the processor does not take.
    """
    cases, truth = (_encoder(load_processor(path)) for path in (folder, model))
    encoded = []
    for record in records:
        case, other = cases(record), truth(record)
        for name in case.whole.keys() | other.whole.keys():
            if not torch.equal(*(torch.as_tensor(c.whole.get(name, -1)) for c in (case, other))):
                raise ValueError(
                    f"the processors of {folder} and {model} give different {name} for record "
                    f"{record.name!r}. Copy the processor's files from {model}."
                )
        encoded.append(case)
    return encoded


def _encoder(processor: Any) -> Callable[[Record], Case]:
    """A function that encodes records for a processor."""
    template, inputs = ChatTemplate(processor), TextInputs(processor)

    def encode(record: Record) -> Case:
        try:
            prompt = template.prompt(record.prompt, len(record.images))
            scored = template.scored(prompt, record.chosen)
        except Malformed as error:
            raise error.of(record.name) from error
        images = [image.open(record.name) for image in record.images]

        def of(text: str) -> dict[str, Any]:
            try:
                return dict(processor(**given(images), return_tensors="pt", **inputs([text])))
            except Exception as error:  # the types of errors differ between processors
                problem = f"the processor rejects it ({short_error(error)})."
                raise RecordError(record.name, problem, "Leave it out.") from error

        asked, whole = of(prompt.text), of(prompt.text + scored)
        ids, longer = asked["input_ids"][0].tolist(), whole["input_ids"][0].tolist()
        pairs = enumerate(zip(ids, longer, strict=False))
        start = next((i for i, (a, b) in pairs if a != b), len(ids))
        return Case(record.name, asked, whole, start)

    return encode


@torch.no_grad()
def _scores(vlm: PreTrainedModel, cases: Sequence[Case]) -> Scores:
    """Log-probs of the responses and greedy answers of a model, on the GPU if it fits there.

    Raises:
        ValueError: for log-probs that are NaN or infinite.
    """
    device = _device(vlm)
    vlm.eval()
    torch.nn.Module.to(vlm, device)
    logps, answers = [], []
    for case in cases:
        asked, whole = (
            {k: v.to(device) for k, v in part.items()} for part in (case.asked, case.whole)
        )
        logits = vlm(**whole, use_cache=False).logits[0, case.start - 1 : -1].double()
        labels = whole["input_ids"][0, case.start :, None]
        logps.append(logits.log_softmax(-1).gather(-1, labels)[:, 0].cpu())
        if not logps[-1].isfinite().all():
            raise ValueError(
                f"record {case.name!r}: the log-probs of {vlm.name_or_path} are not finite. Check "
                "its weights."
            )
        generate: Any = vlm.generate  # annotated as a tensor
        ids = generate(**asked, do_sample=False, max_new_tokens=_ANSWER_TOKENS)
        answers.append(ids[0, asked["input_ids"].shape[1] :].tolist())
    torch.nn.Module.to(vlm, "cpu")
    return Scores(torch.cat(logps), answers)


def _device(vlm: PreTrainedModel) -> str:
    """The GPU, if 1.5 times the weights of a model are free on it."""
    if not torch.cuda.is_available():
        return "cpu"
    needed = 1.5 * sum(p.nbytes for p in vlm.parameters())
    return "cuda" if torch.cuda.mem_get_info()[0] > needed else "cpu"
