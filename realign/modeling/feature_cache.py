"""Cache of the features of a frozen vision tower on disk, for `--cache-vision`.

A frozen tower gives an image the same features in every epoch and every run, so they are computed
once. A safetensors file holds the tensors of some hundred images, with a checksum for each tensor
in its metadata. Files are written atomically under unique names, so any number of processes may
write to a folder. The system's page cache keeps the files in memory.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from realign import distributed
from realign.files import write_whole
from realign.modeling.images import Features, Images, ImageStore
from realign.modeling.model import ForestModel
from realign.modeling.prefetch import ahead, pinned
from realign.progress import Progress
from realign_kernels import refcache

_FILE_BYTES = 256 << 20


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
    """

    def __init__(self, directory: str | Path, fingerprint: Mapping[str, str]) -> None:
        self.folder = Path(directory) / refcache.fingerprint_digest(fingerprint)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / "about.json", json.dumps(dict(fingerprint), indent=2) + "\n")
        self._files: dict[Path, Any] = {}  # safe_open, which has no types
        self._places: dict[str, tuple[Path, dict[str, int]]] = {}  # image -> file, {name: crc}
        self._checked: set[str] = set()
        self.refresh()

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def refresh(self) -> None:
        """Open files that other processes have added."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path in self._files:
                continue
            try:
                file = safe_open(path, framework="pt")
                index = json.loads(file.metadata()["images"])
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                again = "The features of its images are computed again."
                print(f"{path} is damaged ({error}). {again}", file=sys.stderr)
                continue
            self._files[path] = file
            for image, checksums in index.items():
                self._places.setdefault(image, (path, checksums))

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
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        partial = path.with_suffix(".partial")
        try:
            save_file(tensors, partial, metadata={"images": json.dumps(index)})
            partial.chmod(0o644)  # other users may read it
            partial.replace(path)
        except (SafetensorError, OSError) as error:
            partial.unlink(missing_ok=True)
            raise OSError(
                f"image features could not be written to {self.folder} ({error}). Free some space, "
                "or train without --cache-vision. Files written before are kept."
            ) from error
        self.refresh()

    def __getitem__(self, image: str) -> Features:
        """The features of an image.

        Raises:
            ValueError: when the file is damaged.
        """
        path, checksums = self._places[image]
        features = {name: self._files[path].get_tensor(f"{image}/{name}") for name in checksums}
        if image not in self._checked:
            for name, tensor in features.items():
                if _checksum(tensor) != checksums[name]:
                    path.rename(path.with_suffix(".damaged"))
                    raise ValueError(
                        f"{path} is damaged: features of image {image} have changed on the disk. "
                        "The file was renamed. Start the run again, with --resume if it has "
                        "checkpoints. The features are then computed again."
                    )
            self._checked.add(image)
        return features


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
