"""Cache of the features of a frozen vision tower on disk, for `--cache-vision`.

A frozen tower gives an image the same features in every epoch and every run, so they are computed
once. A safetensors file holds the tensors of some dozen images, with a checksum for each tensor
in its metadata. Files are written atomically under unique names, so any number of processes may
write to a folder. The system's page cache keeps the files in memory.

Files are read and not mapped. A mapped file that another process truncates would kill this one
with SIGBUS.
"""

from __future__ import annotations

import json
import math
import os
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save

from realign import distributed
from realign.data.errors import short_error
from realign.files import open_regular, replacing, write_whole
from realign.modeling.images import Features, Images, ImageStore
from realign.modeling.model import ForestModel
from realign.modeling.prefetch import ahead, pinned
from realign.progress import Progress
from realign.terminal import show
from realign_kernels import refcache

_FILE_BYTES = 128 << 20
_MOST_HEADER = 16 << 20  # bytes; a file of 128 MB has far below 1 MB
_MOST_TENSOR = 1 << 30  # bytes; LLaVA-1.5 has 5 MB per image
_MOST_SIDES = 8
"""Limit on the dimensions of a tensor. The product of millions of sides takes an hour."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


_AGAIN = "Start the run again, with --resume if it has checkpoints. They are then computed again."


class _Stored(NamedTuple):
    """Place of a tensor in a file."""

    dtype: torch.dtype
    shape: list[int]
    start: int  # byte in the file
    size: int  # bytes
    checksum: int


def default_directory() -> Path:
    """Default folder of features: $REALIGN_CACHE/vision, or ~/.cache/realign/vision."""
    root = os.environ.get("REALIGN_CACHE") or Path.home() / ".cache" / "realign"
    return Path(root) / "vision"


class FeatureCache(Mapping[str, Features]):
    """Image features by digest of the image, for one fingerprint.

    Args:
        directory: holds a folder for each fingerprint; created when needed.
        fingerprint: everything besides the image that features depend on
            (`reference_logps.fingerprint`).

    Raises:
        ValueError: when the fingerprint's folder is a symbolic link.
    """

    def __init__(self, directory: str | Path, fingerprint: Mapping[str, str]) -> None:
        self.folder = Path(directory) / refcache.fingerprint_digest(fingerprint)
        if self.folder.is_symlink():
            raise ValueError(
                f"{self.folder} is a symbolic link, which may lead anywhere. Remove it, or set "
                "$REALIGN_CACHE to another folder."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / "about.json", json.dumps(dict(fingerprint), indent=2) + "\n")
        self._read: set[Path] = set()
        self._places: dict[str, tuple[Path, dict[str, _Stored]]] = {}  # image -> file, tensors
        self._checked: set[str] = set()
        self.refresh()

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def refresh(self) -> None:
        """Read the headers of files that other processes have added."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path in self._read:
                continue
            try:
                stored = _read_header(path)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                again = "The features of its images are computed again."
                show(f"{path} is damaged ({short_error(error)}). {again}", error=True)
                continue
            self._read.add(path)
            for image, tensors in stored.items():
                self._places.setdefault(image, (path, tensors))

    def missing(self, images: Sequence[str]) -> list[str]:
        """The distinct images without cached features, sorted."""
        return sorted({image for image in images if image not in self._places})

    def add(self, features: Mapping[str, Features]) -> None:
        """Write features of images as one file.

        Raises:
            OSError: when the file cannot be written, as on a full disk.
        """
        tensors, index = {}, {}
        for image, named in features.items():
            on_cpu = {name: t.detach().cpu().contiguous() for name, t in named.items()}
            tensors |= {f"{image}/{name}": tensor for name, tensor in on_cpu.items()}
            index[image] = {name: _checksum(tensor) for name, tensor in on_cpu.items()}
        try:
            with replacing(self.folder / f"{uuid.uuid4().hex}.safetensors") as file:
                file.write(save(tensors, metadata={"images": json.dumps(index)}))
        except OSError as error:
            raise OSError(
                f"image features could not be written to {self.folder} ({error}). Free some space, "
                "or train without --cache-vision. Files written before are kept."
            ) from error
        self.refresh()

    def __getitem__(self, image: str) -> Features:
        """The features of an image.

        Raises:
            ValueError: when the file is damaged or was removed.
        """
        path, tensors = self._places[image]
        check = image not in self._checked
        try:
            with open_regular(path) as file:
                features = {name: _read_tensor(file, t, check) for name, t in tensors.items()}
        except FileNotFoundError as error:
            raise ValueError(f"{path} was removed. {_AGAIN}") from error
        except ValueError as error:
            path.rename(path.with_suffix(".damaged"))
            raise ValueError(
                f"{path} is damaged: features of image {image} have changed on the disk. The file "
                f"was renamed. {_AGAIN}"
            ) from error
        self._checked.add(image)
        return features


def _read_header(path: Path) -> dict[str, dict[str, _Stored]]:
    """Places of the tensors in a file, by image and name.

    Raises:
        OSError: when the file cannot be read.
        ValueError, KeyError, TypeError, AttributeError: for a damaged header.
    """
    with open_regular(path) as file:
        end = os.fstat(file.fileno()).st_size
        size = int.from_bytes(file.read(8), "little")
        if size > min(end - 8, _MOST_HEADER):
            raise ValueError(f"its header has {size} bytes")
        try:
            header = json.loads(file.read(size))
            images = json.loads(header["__metadata__"]["images"])
        except RecursionError:
            raise ValueError("its header is nested too deeply") from None
    stored: dict[str, dict[str, _Stored]] = {}
    for image, checksums in images.items():
        stored[image] = {}
        for name, checksum in checksums.items():
            tensor = header[f"{image}/{name}"]
            dtype, shape = _DTYPES[tensor["dtype"]], tensor["shape"]
            first, last = tensor["data_offsets"]
            if {type(number) for number in (*shape, first, last, checksum)} != {int}:
                raise ValueError(f"tensor {image}/{name} has no shape")
            if len(shape) > _MOST_SIDES or max(shape, default=0) > _MOST_TENSOR:
                raise ValueError(f"tensor {image}/{name} has another shape")
            if not 0 <= first <= last <= end - 8 - size or min(shape, default=0) < 0:
                raise ValueError(f"tensor {image}/{name} ends behind the file")
            if last - first > _MOST_TENSOR or math.prod(shape) * dtype.itemsize != last - first:
                raise ValueError(f"tensor {image}/{name} has another size")
            stored[image][name] = _Stored(dtype, shape, 8 + size + first, last - first, checksum)
    return stored


def _read_tensor(file: BufferedReader, stored: _Stored, check: bool) -> torch.Tensor:
    """Read a tensor, and compare its checksum if `check` is set.

    Raises:
        ValueError: when the file is too short, or the checksum differs.
    """
    tensor = torch.empty(stored.shape, dtype=stored.dtype)
    file.seek(stored.start)
    read = file.readinto(tensor.flatten().view(torch.uint8).numpy().data) if stored.size else 0
    if read != stored.size or (check and _checksum(tensor) != stored.checksum):
        raise ValueError("the checksum differs")
    return tensor


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data)


def fill(
    cache: FeatureCache,
    model: ForestModel,
    store: ImageStore,
    device: torch.device,
    batch_images: int,
    *,
    progress: bool = True,
    log: Callable[[str], None] = distributed.log_rank0,
) -> None:
    """Compute the features that are missing from `cache`. Every rank calls it for a part of them.

    Args:
        cache: the cache to fill, in a folder that all ranks see.
        model: model with a frozen vision tower, sharded or not.
        store: the images of the data set.
        device: device of the model.
        batch_images: images in one forward.
        progress: whether to show a progress bar.
        log: receives a line with the number of cached images and their folder.

    Raises:
        ValueError: when the ranks do not see the same folder.
    """

    def load(images: Sequence[str]) -> Images:
        return pinned(store.batch(images), device)

    images = list(store.keys())
    # All ranks use rank 0's list: the folder may change meanwhile, as other processes write to it.
    absent = distributed.broadcast_from_rank0(lambda: cache.missing(images))
    log(f"image features: {len(images) - len(absent):,} of {len(images):,} known in {cache.folder}")
    ranks, rank = distributed.world_size(), distributed.rank()
    calls = -(-len(absent) // (ranks * batch_images))
    pending: dict[str, Features] = {}
    size = 0
    bar = Progress("image features", "images", len(absent), quiet=not (progress and absent))
    starts = [(call * ranks + rank) * batch_images for call in range(calls)]
    local = [absent[start : start + batch_images] for start in starts]
    # Collectives need every rank: a rank without images repeats an image of another rank.
    tasks = (partial(load, names or absent[:1]) for names in local)
    with bar, ahead(tasks, device) as loaded:
        for call, (names, inputs) in enumerate(zip(local, loaded, strict=True)):
            with torch.no_grad():
                computed = model.image_features(inputs.to(device, model.dtype))
            for image, features in zip(names, computed, strict=False):
                pending[image] = {name: tensor.cpu() for name, tensor in features.items()}
                size += sum(tensor.nbytes for tensor in features.values())
            if pending and (size > _FILE_BYTES or call == calls - 1):
                cache.add(pending)
                pending, size = {}, 0
            bar.update(min(ranks * batch_images, len(absent) - call * ranks * batch_images))
    distributed.barrier()
    cache.refresh()
    if missing := cache.missing(images):
        raise ValueError(
            f"{len(missing)} images have no features in {cache.folder}, though all ranks have "
            "computed their part. Set $REALIGN_CACHE to a folder that all ranks see."
        )
