"""Wrappers of lmms-eval 0.7.3 and classes of VLMEvalKit for transformers' model types.

Both kits choose some model classes by the path of the model, which a `Route` states as `path`.
docs/evaluation.md states which routes were run.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple


class Route(NamedTuple):
    """How a kit loads one model type."""

    name: str
    """Wrapper of lmms-eval, or class of VLMEvalKit."""
    settings: dict[str, Any] = {}
    """Arguments for both models."""
    path: str = ""
    """Pattern of the model's path, by which the kit chooses a class."""
    matches: bool = True
    """Whether the path must match the pattern."""

    def wrong_path(self, path: str) -> str | None:
        """Why the kit would load a different class from this path, or None."""
        if not self.path or bool(re.search(self.path, path)) == self.matches:
            return None
        verb = "must" if self.matches else "must not"
        return f"{self.name} chooses the class by the path {path}, which {verb} match {self.path}"


# The default of llava_hf is an empty string, which transformers rejects.
_AUTO = {"device_map": "auto"}
# The tasks allow 16 or 128 tokens, which end within a thought.
_ANSWER = _AUTO | {"enable_thinking": False}
_ACTIVE = r"A\d+B"  # such as Qwen3-VL-30B-A3B

LMMS = {
    "llava": Route("llava_hf", _AUTO),
    "llava_next": Route("llava_hf", _AUTO),
    "llava_onevision": Route("llava_hf", _AUTO),
    "qwen2_vl": Route("qwen2_vl", _AUTO),
    "qwen2_5_vl": Route("qwen2_5_vl", _AUTO),
    "qwen3_vl": Route("qwen3_vl", _AUTO, _ACTIVE, matches=False),
    "qwen3_vl_moe": Route("qwen3_vl", _AUTO, _ACTIVE),
    "qwen3_5": Route("qwen3_5", _ANSWER, _ACTIVE, matches=False),
    "qwen3_5_moe": Route("qwen3_5", _ANSWER, _ACTIVE),
    "gemma3": Route("gemma3", _AUTO),
    "gemma4": Route("gemma4", _AUTO),
    "gemma4_unified": Route("gemma4", _AUTO),
    "internvl": Route("internvl_hf", _AUTO),
    "glm46v": Route("glm4v", _AUTO, "Flash"),  # GLM-4.6V-Flash
    "glm4v_moe": Route("glm4v", _AUTO, "Flash", matches=False),
    "mistral3": Route("mistral3_vl", _AUTO),
    "lfm2_vl": Route("lfm2_5_vl"),
    "idefics2": Route("idefics2", _AUTO),
}
"""Model type -> wrapper of lmms-eval."""
LMMS_OTHER = Route("vllm")
"""Wrapper of lmms-eval for other types, if vLLM supports them."""
LMMS_TASKS = ("pope_full", "mme")
"""Tasks of lmms-eval without a judge. `pope` pools the splits of `pope_full`."""

_QWEN2 = {"min_pixels": 1280 * 28 * 28, "max_pixels": 16384 * 28 * 28}
_QWEN3 = {"use_custom_prompt": False, "use_vllm": True, "presence_penalty": 1.5, "top_k": 20}
_QWEN3_VL = _QWEN3 | {
    "temperature": 0.7,
    "top_p": 0.8,
    "repetition_penalty": 1.0,
    "max_new_tokens": 16384,
}
_QWEN3_5 = _QWEN3 | {"temperature": 1.0, "top_p": 0.95, "max_new_tokens": 32768}
_OMNI = "(?i)omni"

VLMEVAL = {
    "llava_onevision": Route("LLaVA_OneVision_HF"),
    "qwen2_vl": Route("Qwen2VLChat", _QWEN2, _OMNI, matches=False),
    "qwen2_5_vl": Route("Qwen2VLChat", _QWEN2 | {"use_custom_prompt": False}, _OMNI, matches=False),
    "qwen3_vl": Route("Qwen3VLChat", _QWEN3_VL, _OMNI, matches=False),
    "qwen3_vl_moe": Route("Qwen3VLChat", _QWEN3_VL, _OMNI, matches=False),
    "qwen3_5": Route("Qwen3VLChat", _QWEN3_5, _OMNI, matches=False),
    "qwen3_5_moe": Route("Qwen3VLChat", _QWEN3_5, _OMNI, matches=False),
    "gemma3": Route("Gemma3"),
    "gemma4": Route("Gemma4"),
    "paligemma": Route("PaliGemma"),
    "smolvlm": Route("SmolVLM2"),
    "lfm2_vl": Route("LFM2VL"),
    "minicpmv4_6": Route("MiniCPM_V_4_6", {"use_upsize": False}),
    "glm4v": Route("GLMThinking", {}, r"GLM-4\.1V"),
    "glm4v_moe": Route("GLMThinking", {}, r"GLM-4\.5V"),
}
"""Model type -> class of VLMEvalKit, with the settings of its entry in vlmeval/config.py.

LLaVA_Next passes a prompt where processors of transformers 5 take images. InternVLChat, IDEFICS2
and Aria fail with transformers 5.23, too.
"""
VLMEVAL_DATA = {
    "ImageYORNDataset": ("POPE", "MME", "HallusionBench"),
    "ImageMCQDataset": ("MMStar", "MMBench_DEV_EN", "RealWorldQA", "ScienceQA_TEST"),
}
"""Class of VLMEvalKit -> its data sets that need no judge."""
