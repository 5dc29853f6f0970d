"""Adapter folders: finding the base, loading by PEFT, and merging into the base.

PEFT loads adapters, since transformers' own loading omits parts of DoRA and of tied ends. The ends
are the input and output embeddings. If an adapter changes tied ends differently, merging gives each
its own weight. PEFT would add both changes to the weight that they share.
"""

from __future__ import annotations

import os
import re
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedModel

from realign.data.errors import short_error
from realign.modeling.adapter_config import plain_names, read_adapter_config
from realign.modeling.limits import TooLarge, limited
from realign.modeling.lora_targets import unwarned
from realign.modeling.model_files import check_model, find_file

_CONFIGS = ("config.json", "adapter_config.json")
_PROBED = 16  # tokens of the text that checks a merged model
# In nats. Measured: 3e-5 by fp32 rounding, 0.5 to 34 where a shared end is changed twice.
_MERGED_TOLERANCE = 1e-2


def adapter_base(path: str | Path) -> str | None:
    """The base model of an adapter, given its folder or Hub name; None for a whole model.

    Raises:
        ValueError: for a folder without a model, an adapter of an unsupported kind, and a base that
            is missing or is an adapter.
        OSError: for an adapter_config.json that cannot be read.
    """
    check_folder(path)
    if (file := find_file(path, _CONFIGS[1])) is None:
        return None
    where, config = f"{path}/{_CONFIGS[1]}", read_adapter_config(Path(file))
    check_kind(config, str(path))
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(
            f"{where} names no base: base_model_name_or_path is {base!r}. Set it to the folder or "
            "Hub name of the model that the adapter was trained on."
        )
    local = Path(base).is_dir()
    if config.revision and not local:
        raise ValueError(
            f"{where} names revision {config.revision!r} of its base {base}, and revisions are not "
            "supported. Download it, and set base_model_name_or_path to its folder."
        )
    if _is_missing_folder(base):
        raise ValueError(
            f"{where} names the base {base!r}, and there is no such folder in {Path.cwd()}. "
            "Set base_model_name_or_path to its absolute path or Hub name."
        )
    if find_file(base, _CONFIGS[1]) is not None:
        raise ValueError(
            f"{where} names the base {base!r}, which is an adapter itself. Merge the base (python "
            "-m realign.export), and set base_model_name_or_path to the merged folder."
        )
    return base


def check_folder(path: str | Path) -> None:
    """Reject a missing folder and one without a model, such as a run's folder.

    Raises:
        ValueError: for such a folder. The message names the models in folders below it.
    """
    if _is_missing_folder(str(path)):
        raise ValueError(
            f"there is no folder {path}. Pass a folder that holds a model, or the name of a model "
            "on the Hub."
        )
    folder = Path(path)
    if not folder.is_dir() or any((folder / name).exists() for name in _CONFIGS):
        return
    for depth in ("*", "*/*"):
        models = {file.parent for name in _CONFIGS for file in folder.glob(f"{depth}/{name}")}
        if models:
            raise ValueError(
                f"{folder} holds no model itself. Pass one of the models in it: "
                f"{', '.join(sorted(map(str, models)))}."
            )
    raise ValueError(
        f"{folder} holds no model: there is no {' or '.join(_CONFIGS)} in it. Pass a folder that "
        "save_pretrained wrote, or the name of a model on the Hub."
    )


def _is_missing_folder(name: str) -> bool:
    """Whether a name can only be a path, and nothing is there. A name on the Hub is OWNER/NAME."""
    return (name[:1] in tuple("./~") or name.count("/") > 1) and not Path(name).exists()


def put_on(model: PreTrainedModel, path: str | Path) -> PeftModel:
    """Load the adapter at `path` on its base, frozen, as `PeftModel.from_pretrained` does.

    Raises:
        ValueError: for an adapter in another format, or with weights that do not fit the base.
    """
    check_model(path)
    file, weights = find_file(path, _CONFIGS[1]), find_file(path, "adapter_model.safetensors")
    assert file is not None
    if weights is None:
        raise ValueError(
            f"{path} has no adapter_model.safetensors, and other formats are not read. Save the "
            "adapter again with a current version of PEFT."
        )
    _check_rows(model, path)
    config = read_adapter_config(Path(file))
    try:
        plain_names(config, model)
    except ValueError as error:
        raise ValueError(f"{file} is not read: {error}.") from error
    size = partial(_adapter_size, model, weights)
    try:
        with _ignored_warnings(), limited(size):
            folder = str(Path(weights).parent)  # that of a snapshot for a Hub name
            adapted = PeftModel.from_pretrained(model, folder, config=config)
            keys = adapted.load_adapter(folder, str(adapted.active_adapter))
        _check_keys(adapted, keys.missing_keys, keys.unexpected_keys)
    except SafetensorError as error:
        raise ValueError(f"the adapter {path} is damaged ({error}). Copy it again.") from error
    except TooLarge as error:
        raise ValueError(f"the adapter {path} is not loaded: {error}.") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a wrong value in its configuration raises errors of many types
        reason = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise ValueError(
            f"the adapter {path} does not fit its base {model.name_or_path}: {reason}. Pass it "
            "with the base that it was trained on, or save it again with a current version of PEFT."
        ) from error
    return adapted


def _adapter_size(model: nn.Module, weights: str) -> int:
    """Numbers that an adapter may register, see `limited`.

    Of all kinds that PEFT saves, BOFT registers most for its file, 1.5 numbers per byte. Uni-LoRA
    has indices of the size of a LoRA, which are not in its file.
    """
    return 4 * os.path.getsize(weights) + sum(p.numel() for p in model.parameters()) // 16


def _check_rows(model: PreTrainedModel, path: str | Path) -> None:
    """Reject an adapter of a base that was resized after loading: PEFT does not save the rows."""
    if (file := find_file(path, "tokenizer.json")) is None:
        return
    try:
        tokens = Tokenizer.from_file(file).get_vocab_size()
    except Exception as error:  # tokenizers raises this type
        raise ValueError(
            f"{file} is no tokenizer ({short_error(error)}). Copy it again."
        ) from error
    rows = model.get_input_embeddings().get_parameter("weight").shape[0]
    if tokens > rows:
        raise ValueError(
            f"the tokenizer of the adapter {path} has {tokens} tokens, and its base "
            f"{model.name_or_path} has {rows} embeddings. Save the resized base, and set "
            "base_model_name_or_path to its folder."
        )


def _check_keys(adapted: PeftModel, missing: list[str], unknown: list[str]) -> None:
    """Reject unknown and missing weights. PEFT only warns of missing ones.

    A shared tensor has several names, and a file may hold it under any one of them.
    """
    state = adapted.state_dict(keep_vars=True)
    loaded = {value.data_ptr() for name, value in state.items() if name not in missing}
    absent = [name for name in missing if state[name].data_ptr() not in loaded]
    if lost := [*absent, *unknown]:
        raise ValueError(
            f"{len(absent)} of its weights are missing and {len(unknown)} are unknown, such as "
            f"{lost[0]}"
        )


def check_kind(config: PeftConfig, name: str) -> None:
    """Reject a kind that acts in the forward of `PeftModel`, which is never called here.

    Raises:
        ValueError: for such a kind. The message names the adapter and its kind.
    """
    kind = PeftType(config.peft_type)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
    # AdaLoRA's forward only adds a penalty to the loss; its log-probs come from its modules.
    acts = getattr(tuner, "forward", None) is not BaseTuner.forward and kind != PeftType.ADALORA
    activated = getattr(config, "alora_invocation_tokens", None)
    if acts or activated:
        value = kind.value + " with alora_invocation_tokens" * bool(activated)
        raise ValueError(
            f"{name} is an adapter of PEFT's kind {value}, which acts outside of the model's own "
            "modules. It can be neither trained, evaluated nor merged here. Use a kind that "
            "changes modules, such as LoRA."
        )


def merge(adapted: PeftModel) -> PreTrainedModel:
    """Merge an fp32 adapter into its fp32 base, and compare log-probs before and after.

    Tied ends stay tied if the adapter leaves them equal. If not, each gets its own weight, and the
    configuration records it, so that `from_pretrained` reads both.

    Raises:
        ValueError: for a kind that cannot be merged, or that changes log-probs when merged.
    """
    model = adapted.get_base_model()
    assert isinstance(model, PreTrainedModel)
    kind = PeftType(adapted.active_peft_config.peft_type).value
    before = _probe(model)
    tied = _split_ends(model)
    try:
        with _ignored_warnings():
            merged = adapted.merge_and_unload()
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"an adapter of PEFT's kind {kind} cannot be merged into this base ({error}). Keep it "
            "as an adapter: realign.evaluate accepts it."
        ) from error
    if tied:
        _tie_again(merged)
    worst = (_probe(merged) - before).abs().amax(-1).median().item()
    if not worst < _MERGED_TOLERANCE:
        raise ValueError(
            f"merging an adapter of PEFT's kind {kind} changed log-probs by {worst:.2g} nats, so "
            "the merged model is wrong. Keep the adapter unmerged."
        )
    return merged.requires_grad_(True)  # PEFT froze them


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast the weights in place, as `from_pretrained` with a dtype does.

    Buffers outside the state dict, such as rotary frequencies, keep fp32. `Module.to` would round
    them. So do weights that the model's class keeps in fp32, such as biases of a router.
    """
    saved = model.state_dict(keep_vars=True).keys()
    plan = {re.compile(k.replace("*", ".*")): v for k, v in model._get_dtype_plan(dtype).items()}
    named = chain(model.named_parameters(), model.named_buffers())
    for name, tensor in named:
        if name in saved and tensor.is_floating_point():
            kept = next((kept for pattern, kept in plan.items() if pattern.search(name)), dtype)
            tensor.data = tensor.data.to(kept)
    return model


def _split_ends(model: nn.Module) -> bool:
    """Give every module its own copy of a weight shared with an embedding.

    Call it after adapters are loaded, since PEFT ties adapters by the weights' identity, and before
    they are merged. Returns whether a weight was shared.
    """
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners[parameter].append((module, name))
    shared = [
        places[1:]
        for places in owners.values()
        if len(places) > 1 and any(isinstance(module, nn.Embedding) for module, _ in places)
    ]
    for module, name in chain.from_iterable(shared):
        copy = module.get_parameter(name).detach().clone()
        setattr(module, name, nn.Parameter(copy, requires_grad=False))
    return bool(shared)


def _tie_again(model: PreTrainedModel) -> None:
    """Tie ends that are equal up to fp32 rounding, and record the result in the configuration."""
    head = model.get_output_embeddings()
    assert head is not None
    embedding = model.get_input_embeddings().get_parameter("weight")
    rounding = 1e-6 * embedding.abs().max().item()
    tied = torch.allclose(embedding, head.get_parameter("weight"), rtol=1e-6, atol=rounding)
    model.config.tie_word_embeddings = tied  # PEFT cleared it for two weights
    if tied:
        head.weight = embedding
    else:  # families read the setting from different configurations
        for name in model.config.sub_configs:
            part = getattr(model.config, name)
            if getattr(part, "tie_word_embeddings", False):
                part.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


@torch.no_grad()
def _probe(model: PreTrainedModel) -> torch.Tensor:
    """Log-probs of a short text without images, (T, V)."""
    special_ids = {value for value in model.config.to_dict().values() if isinstance(value, int)}
    size = model.config.get_text_config().vocab_size
    ids = [i for i in range(1, size, max(1, size // _PROBED)) if i not in special_ids][:_PROBED]
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)


@contextmanager
def _ignored_warnings() -> Iterator[None]:
    """Ignore PEFT's warnings of tied ends, which `merge` handles, and of patterns."""
    with warnings.catch_warnings(), unwarned():
        warnings.filterwarnings("ignore", "Model (with|has) `tie_word_embeddings")
        warnings.filterwarnings("ignore", "Input and output embeddings are no")
        yield
