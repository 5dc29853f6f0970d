"""Hand-off of a trained model and its base to lmms-eval and VLMEvalKit: commands, configuration."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

from transformers import AutoConfig

from realign.evaluate import kits
from realign.files import check_folder, write_whole
from realign.modeling.loading import from_pretrained
from realign.modeling.merging import adapter_base
from realign.training.export import export_whole

_SPLIT = r"[,'\"{}\[\]\\]"  # characters that lmms-eval's --model_args reads as syntax
_RENAME = "Rename or link that model, and run this command again."


def hand_off(model: str, output: str | Path, base: str | None = None) -> str:
    """Write a merged model folder, and the settings to evaluate it and its base in other tools.

    Args:
        model: folder or Hub name. An adapter is merged into its base.
        output: folder to write, with the complete model, its processor, vlmevalkit.json and
            commands.txt.
        base: folder or Hub name of the model before training, for a `model` that is no adapter.

    Returns:
        The commands to run, one per line.

    Raises:
        ValueError: if `output` is not empty, there is no model at `model`, or its base is unknown,
            is an adapter or has another type.
    """
    check_folder("--output", output)
    base, kind = _base_of(model, base)
    # Not resolved: the kits choose classes by the name of a link.
    output = Path(os.path.abspath(export_whole(model, Path(output))))
    dtype = from_pretrained(AutoConfig, output).dtype
    models = {"base": base, "aligned": str(output)}
    commands = "\n".join([*_lmms_eval(kind, models), *_vlmevalkit(kind, models, output)])
    write_whole(output / "commands.txt", commands + "\n")
    about = f"{kind}, {str(dtype).removeprefix('torch.')}"
    return (
        f"wrote {output} ({about}), base {base}; commands.txt there has these commands:\n{commands}"
    )


def _base_of(model: str, base: str | None) -> tuple[str, str]:
    """Path or Hub name of a model's base, and the type of both."""
    found = adapter_base(model)
    if found and base:
        raise ValueError(f"--base: {model} is an adapter and names its base {found}. Omit --base.")
    if not (base := found or base):
        raise ValueError(
            f"--base: {model} holds whole weights, which name no base. Pass the folder or Hub name "
            "of the model before training."
        )
    if adapter_base(base):
        raise ValueError(
            f"--base: {base} is an adapter. Merge it (python -m realign.export), and pass the "
            "merged folder."
        )
    if Path(base).resolve() == Path(model).resolve():
        raise ValueError(f"--base: {base} is also --model. Pass the model before training.")
    kind = from_pretrained(AutoConfig, base, adapter=model if found else None).model_type
    own = kind if found else from_pretrained(AutoConfig, model).model_type
    if kind != own:
        raise ValueError(
            f"--base: {base} has type {kind}, and {model} has type {own}. Pass the model before "
            "training."
        )
    return os.path.abspath(base) if Path(base).is_dir() else base, kind


def _lmms_eval(kind: str, models: dict[str, str]) -> list[str]:
    """Commands of lmms-eval, one per model.

    Each model has its own --output_path: the answers of lmms-eval's judges in that folder are
    read for any later model.
    """
    route = kits.LMMS.get(kind, kits.LMMS_OTHER)
    for path in models.values():
        if reason := route.wrong_path(path):
            return [f"lmms-eval: no command. {reason}. {_RENAME}"]
        if re.search(_SPLIT, path):
            return [
                f"lmms-eval: no command. --model_args splits the path {path} at , ' \" \\ and "
                f"brackets. {_RENAME}"
            ]
    vllm = route is kits.LMMS_OTHER
    lines = []
    for name, path in models.items():
        settings = {"model" if vllm else "pretrained": path} | route.settings
        command = ["python", "-m", "lmms_eval", "--model", route.name]
        command += ["--model_args", ",".join(f"{key}={value}" for key, value in settings.items())]
        command += ["--tasks", ",".join(kits.LMMS_TASKS), "--batch_size", "1", "--log_samples"]
        command += ["--output_path", f"{models['aligned']}-scores/lmms-eval/{name}"]
        lines.append(f"lmms-eval, {name}: {shlex.join(command)}")
    needs = f"vLLM with support for {kind}" if vllm else "decord"
    lines.append(f"lmms-eval: install lmms_eval==0.7.3, 'filelock<4.3' and {needs}.")
    lines.append(
        "lmms-eval: hallusion_bench_image is left out. It asks a GPT judge, and a judge that does "
        "not answer counts as a wrong answer. Use `realign.evaluate hallusionbench`."
    )
    return lines


def _vlmevalkit(kind: str, models: dict[str, str], output: Path) -> list[str]:
    """Write vlmevalkit.json with both models. Returns the command that reads it."""
    if (route := kits.VLMEVAL.get(kind)) is None:
        return [
            f"VLMEvalKit: no class loads a {kind} folder. Serve both models, see docs/serve.md."
        ]
    for path in models.values():
        if reason := route.wrong_path(path):
            return [f"VLMEvalKit: no configuration. {reason}. {_RENAME}"]
    before, after = Path(models["base"]).name, output.name
    names = {"base": before if before != after else f"{before}-base", "aligned": after}
    entries = {
        "model": {
            names[key]: {"class": route.name, "model_path": path} | route.settings
            for key, path in models.items()
        },
        "data": {
            name: {"class": data, "dataset": name}
            for data, sets in kits.VLMEVAL_DATA.items()
            for name in sets
        },
    }
    file = output / "vlmevalkit.json"
    write_whole(file, json.dumps(entries, indent=2) + "\n")
    command = ["python", "run.py", "--config", str(file), "--judge", "exact_matching"]
    command += ["--work-dir", f"{output}-scores/vlmevalkit"]
    return [f"VLMEvalKit, both: {shlex.join(command)}"]
