"""Loading of models and processors from folders and Hub names, and LoRA adapters.

Weights are read only from safetensors files. Code that comes with a model is never run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from realign.data.errors import short_error
from realign.distributed import disable_cudnn_attention
from realign.modeling import lora, lora_experts, lora_targets, projector, quantized
from realign.modeling.attention import implementations
from realign.modeling.limits import TooLarge, limited
from realign.modeling.merging import adapter_base, cast, merge, put_on
from realign.modeling.model_files import COUNTS_PIXELS, check_model, find_file, most_numbers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Compute dtypes by name in the settings."""

_OF_PROCESSOR = ("processor_config.json", "preprocessor_config.json")


def load_processor(
    path: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None
):
    """Load the processor of a model. An adapter's folder without one uses its base's.

    Args:
        path: folder or Hub name.
        min_pixels: see `set_pixels`.
        max_pixels: see `set_pixels`.

    Raises:
        ValueError: when the model is text-only, its processor has no chat template, or it does not
            take the limits on pixels.
    """
    _vision_config(path)
    if (base := adapter_base(path)) and not any(find_file(path, name) for name in _OF_PROCESSOR):
        path = base  # PEFT saves no processor, some trainers only the tokenizer
    processor = from_pretrained(AutoProcessor, path)
    if not processor.chat_template:
        raise ValueError(
            f"the processor of {path} has no chat template, so prompts cannot be rendered. Save "
            "one with it (processor.chat_template = ...; processor.save_pretrained(...))."
        )
    set_pixels(processor, min_pixels, max_pixels)
    return processor


def set_pixels(processor, min_pixels: int | None, max_pixels: int | None) -> None:
    """Limit the size that the processor resizes images to, before it is saved or digested.

    Args:
        processor: its image processor counts pixels, as Qwen's do.
        min_pixels: smaller images are enlarged to this number of pixels. None keeps the limit.
        max_pixels: larger images are reduced to this number of pixels. None keeps the limit.

    Raises:
        ValueError: for a processor without such limits, and for limits that contradict each other.
    """
    if min_pixels is None and max_pixels is None:
        return
    images = processor.image_processor
    kind, size = type(images).__name__, dict(images.size)
    least, most = (size.get(name) or 0 for name in ("shortest_edge", "longest_edge"))
    if not COUNTS_PIXELS.fullmatch(kind) or not least or not most:
        raise ValueError(
            f"--min-pixels and --max-pixels would have no effect: {kind} does not resize images by "
            "their number of pixels. Leave them out."
        )
    least, most = min_pixels or least, max_pixels or most
    if least > most:
        raise ValueError(
            f"the limits on pixels contradict each other: images would be enlarged to {least:,} "
            f"pixels and reduced to {most:,}. Set both --min-pixels and --max-pixels."
        )
    images.size = type(images.size)(shortest_edge=least, longest_edge=most)


def load_model(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    attention: str = "tree",
    *,
    meta: bool = False,
    quantize: str | None = None,
) -> PreTrainedModel:
    """Load a vision-language model from a folder or Hub name. Adapters are merged into their base.

    Args:
        path: folder or Hub name.
        dtype: dtype of the weights.
        attention: attention of the language model, a key of `attention.IMPLEMENTATIONS`. Where
            the model's class supports no sdpa (softcap, attention sinks), eager replaces sdpa, tree
            and flash.
        meta: build the model without weights, on the meta device. `fsdp.shard` later sends the
            weights of rank 0.
        quantize: '4bit' or '8bit': quantize the language model while it is loaded, on the
            current GPU if there is one. The model on the meta device is never quantized.

    Raises:
        ValueError: for a text-only model, and for an adapter whose base would be quantized.
    """
    disable_cudnn_attention()
    config, auto = _vision_config(path), AutoModelForImageTextToText
    kinds, base = implementations(config, attention), adapter_base(path)
    if meta:
        size = partial(most_numbers, base or path)
        with torch.device("meta"), limited(size, meta=True):
            model = auto.from_config(config, dtype=dtype, attn_implementation=kinds)
        if find_file(base or path, "generation_config.json"):
            model.generation_config = from_pretrained(GenerationConfig, base or path)
        return model
    options: dict[str, Any] = {"attn_implementation": kinds}
    if quantize:
        if base is not None:
            raise ValueError(
                f"{path} is an adapter, and merging it needs the weights that --quantize rounds. "
                f"Merge it (python -m realign.export --model {path}), and pass the merged folder."
            )
        plain = load_model(path, dtype, attention, meta=True)
        options["quantization_config"] = quantized.settings(quantize, dtype, plain)
        vlm = from_pretrained(auto, path, dtype=dtype, **options)
        quantized.use(vlm)
        return vlm
    if base is None:
        return from_pretrained(auto, path, dtype=dtype, **options)
    wide = from_pretrained(auto, base, adapter=path, dtype=torch.float32, **options)
    return cast(merge(put_on(wide, path)), dtype)


def load_trained(
    path: str | Path, dtype: torch.dtype = torch.float32, auto: type = AutoModelForImageTextToText
) -> PreTrainedModel:
    """Load a final model for inference: full weights, or a base with its adapter, unmerged.

    Args:
        path: folder or Hub name.
        dtype: compute dtype. An adapter's weights stay in fp32, as PEFT keeps them.
        auto: the auto class of transformers that loads the model.

    Raises:
        ValueError: when there is no such model, or an adapter does not fit its base.
    """
    if (base := adapter_base(path)) is None:
        return from_pretrained(auto, path, dtype=dtype).eval()
    model = from_pretrained(auto, base, adapter=path, dtype=dtype)
    put_on(model, path)
    return model.eval()


def check_unquantized(path: str | Path, quantize: str | None) -> None:
    """Check that the stored weights of a model can be trained, and quantized if asked.

    Raises:
        ValueError: for weights that are stored quantized. MXFP4 is read, but not quantized again.
    """
    stored = getattr(_vision_config(path), "quantization_config", None) or {}
    method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    if method and (quantize or method != "mxfp4"):
        raise ValueError(
            f"the weights of {path} are stored quantized ({getattr(method, 'value', method)}), "
            "and training needs the original weights to merge the adapter into. Pass the original "
            "model. --quantize 4bit quantizes it while it is loaded."
        )


def _vision_config(path: str | Path):
    """The configuration of a vision-language model, or of an adapter's base."""
    base = adapter_base(path)
    config = from_pretrained(AutoConfig, base or path, adapter=path if base else None)
    if not hasattr(config, "vision_config"):
        raise ValueError(
            f"{path} is a text-only model ({config.model_type}). Pass a vision-language model to "
            "--model."
        )
    return config


def from_pretrained(
    auto_class: type, path: str | Path, *, adapter: str | Path | None = None, **options: Any
) -> Any:
    """`auto_class.from_pretrained` for files of strangers: checked, limited, with one-line errors.

    No code of the model runs, and weights are read only from safetensors files in its folder. Every
    model, processor and configuration is opened here.

    Args:
        auto_class: an auto class of transformers, or a model's own class.
        path: folder or Hub name.
        adapter: the adapter whose base `path` is, if any.
        options: further arguments.

    Raises:
        ValueError: for a file or field that is refused, and for any error of transformers.
    """
    model = _is_model(auto_class)
    if model:
        options["use_safetensors"] = True
    checked = False
    try:
        commit = check_model(path, weights=model)
        checked = True
        if commit is not None:  # the Hub may change between the check and the load
            options["revision"] = commit
        # bitsandbytes' layers register each weight twice more.
        times = 2 if "quantization_config" in options else 1
        size = partial(most_numbers, path, commit)
        with limited(lambda: times * size(), meta=True) if model else nullcontext():
            return auto_class.from_pretrained(path, trust_remote_code=False, **options)
    except ImportError as error:  # such as torchvision, which Qwen's processors need
        needs = " ".join(str(error).split())
        raise ValueError(f"{path} needs a package that is not installed: {needs}") from error
    except SafetensorError as error:
        raise ValueError(
            f"the weights of {path} are damaged ({error}). Copy them again."
        ) from error
    except OSError as error:
        reason = str(error).split("\n")[0]
        if adapter is not None:
            raise ValueError(
                f"no model could be loaded from {path}, the base that {adapter} names ({reason}). "
                "Set base_model_name_or_path in adapter_config.json to the base's absolute path or "
                "Hub name."
            ) from error
        raise ValueError(
            f"no model could be loaded from {path} ({reason}). Pass a folder that holds a Hugging "
            "Face model with its processor, or the name of one on the Hub."
        ) from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except TooLarge as error:
        raise ValueError(f"{path} is not loaded: {error}.") from error
    except Exception as error:  # a wrong value in a file raises errors of many types
        if not checked:
            raise
        if isinstance(error, ValueError) and "trust_remote_code" in str(error):
            raise ValueError(
                f"{path} needs its own code, which is never run here. Use a model whose class is "
                "part of transformers."
            ) from error
        raise ValueError(
            f"the files of {path} are no model that transformers {transformers.__version__} reads "
            f"({short_error(error)}). Copy them again, or use another model."
        ) from error


def _is_model(auto_class: type) -> bool:
    return issubclass(auto_class, PreTrainedModel | _BaseAutoModelClass)


def add_lora(model: PreTrainedModel, rank: int, alpha: float, **options: Any) -> PeftModel:
    """Put LoRA on all linear layers and fused experts of the language model, and freeze the rest.

    Args:
        model: the model, which is changed in place.
        rank: rank of linear layers. `lora_targets.config_for` gives that of experts.
        alpha: the update is scaled by alpha / rank.
        options: other layers, dropout and variants, see `lora_targets.config_for`.

    Raises:
        ValueError: for options that the layers do not support, and if PEFT chooses other layers.
    """
    wanted = lora_targets.chosen(model, options.get("targets", lora_targets.ALL))
    with lora_targets.unwarned():
        adapted = get_peft_model(model, lora_targets.config_for(model, rank, alpha, **options))
    lora_targets.check(model, wanted, options.get("save", ()))
    lora.use(adapted)
    lora_experts.use(adapted)
    projector.use(adapted)
    return adapted


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Disable all adapters in `model`: every LoRA layer returns the output of its base layer.

    PEFT's own `disable_adapter` also toggles `requires_grad`. FSDP2 reads that flag when it sets up
    its groups, and LoRA would not train afterwards.
    """
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    layers = [m for m in model.modules() if isinstance(m, kinds) and not m.disable_adapters]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
