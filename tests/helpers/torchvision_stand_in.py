"""Image processors that need torchvision, where it is missing.

Some families have no Pillow image processor, and torchvision's wheel does not import beside a CPU
build of torch. `imported` replaces the few functions that they call by plain torch, in this
process only. An installed torchvision is used.
"""

from __future__ import annotations

import enum
import importlib
import sys
from types import ModuleType

import torch
import torch.nn.functional as F
from PIL.Image import Resampling
from transformers import image_processing_backends as backends
from transformers.utils import is_torchvision_available


class InterpolationMode(enum.Enum):
    """The modes of resizing, named as `torch.nn.functional.interpolate` names them."""

    NEAREST, BILINEAR, BICUBIC, LANCZOS = "nearest", "bilinear", "bicubic", "lanczos"


def resize(image, size, interpolation=InterpolationMode.BILINEAR, antialias=True):
    """Resize (..., C, H, W) to a (height, width)."""
    if isinstance(interpolation, int):  # a filter of Pillow
        interpolation = InterpolationMode[Resampling(interpolation).name]
    batch = image.float().reshape(-1, *image.shape[-3:])
    made = F.interpolate(batch, tuple(size), mode=interpolation.value, antialias=antialias)
    made = made.reshape(*image.shape[:-2], *made.shape[-2:])
    return made if image.is_floating_point() else made.round().clamp(0, 255).to(image.dtype)


def pad(image, padding, fill=0, padding_mode="constant"):
    """Pad the last two axes by (left, top, right, bottom)."""
    left, top, right, bottom = padding
    return F.pad(image, (left, right, top, bottom), mode=padding_mode, value=fill or 0)


def crop(image, top, left, height, width):
    """Cut a rectangle."""
    return image[..., top : top + height, left : left + width]


def normalize(image, mean, std, inplace=False):
    """Subtract the mean and divide by the standard deviation of each channel."""
    mean, std = (torch.as_tensor(value, dtype=image.dtype)[:, None, None] for value in (mean, std))
    return (image - mean) / std


def imported(module: str) -> ModuleType:
    """Import a module of transformers that needs torchvision."""
    if is_torchvision_available():
        return importlib.import_module(module)
    functional = ModuleType("torchvision.transforms.v2.functional")
    for one in (InterpolationMode, resize, pad, crop, normalize):
        setattr(functional, one.__name__, one)
    modes = {Resampling[mode.name]: mode for mode in InterpolationMode}
    backends.tvF, backends.pil_torch_interpolation_mapping = functional, modes
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.v2")
    stand_ins = {name: ModuleType(name) for name in names}
    stand_ins[names[-1]].functional = functional
    sys.modules |= stand_ins
    try:
        return importlib.import_module(module)
    finally:
        for added in stand_ins:
            del sys.modules[added]


def image_processor(family: str, name: str) -> type:
    """The class `name` of a family's image processor."""
    return getattr(imported(f"transformers.models.{family}.image_processing_{family}"), name)
