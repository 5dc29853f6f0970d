"""Hand-off of a trained model to lmms-eval and VLMEvalKit: folder, command and configuration."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from transformers import AutoConfig

from realign.files import write_whole
from realign.modeling.loading import from_pretrained
from realign.training.export import export_whole

_LMMS = {  # transformers' model type -> the wrapper of lmms-eval for it
    "llava": "llava_hf",
    "llava_next": "llava_hf",
    "llava_onevision": "llava_hf",
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "gemma3": "gemma3",
}
_VLMEVAL = {  # transformers' model type -> the class of VLMEvalKit for it
    "llava_next": "LLaVA_Next",
    "qwen2_vl": "Qwen2VLChat",
    "qwen2_5_vl": "Qwen2VLChat",
    "qwen3_vl": "Qwen3VLChat",
    "gemma3": "Gemma3",
}
_TASKS = ("pope", "hallusion_bench_image", "mme")
_DATA = ("POPE", "HallusionBench", "MME")  # of VLMEvalKit's class ImageYORNDataset


def hand_off(model: str, output: str | Path) -> str:
    """Write a merged model folder and the settings to evaluate it with other tools.

    Args:
        model: folder or Hub name. An adapter is merged into its base.
        output: folder to write, with the complete model, its processor and vlmevalkit.json.

    Returns:
        The commands to run, one per line.

    Raises:
        ValueError: if `output` is not empty, or there is no model at `model`.
    """
    output = export_whole(model, Path(output))
    config = from_pretrained(AutoConfig, output)
    kind, dtype = config.model_type, config.dtype
    place = str(output.resolve())
    lines = [f"wrote {output} ({kind}, {str(dtype).removeprefix('torch.')})"]
    if (wrapper := _LMMS.get(kind)) is None:
        lines.append(f"lmms-eval: no wrapper for {kind} is known. See its list of models.")
    else:
        command = ["python", "-m", "lmms_eval", "--model", wrapper, "--model_args"]
        command += [f"pretrained={place}", "--tasks", ",".join(_TASKS), "--batch_size", "1"]
        lines.append(f"lmms-eval: {shlex.join([*command, '--output_path', 'lmms-eval'])}")
    if (name := _VLMEVAL.get(kind)) is None:
        lines.append(f"VLMEvalKit: no class for {kind} is known. See its list of models.")
    else:
        entries = {
            "model": {output.name: {"class": name, "model_path": place}},
            "data": {data: {"class": "ImageYORNDataset", "dataset": data} for data in _DATA},
        }
        write_whole(output / "vlmevalkit.json", json.dumps(entries, indent=2) + "\n")
        lines.append(f"VLMEvalKit: python run.py --config {shlex.quote(place)}/vlmevalkit.json")
    lines.append("Both need separate environments. Neither was run with this folder.")
    return "\n".join(lines)
