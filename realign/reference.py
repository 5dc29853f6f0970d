"""Reference log-probs: one forward per distinct leaf, before training, kept on disk.

A leaf's key is a digest of its images' pixels, prompt ids and response ids; the file belongs to one
fingerprint of weights, dtype and processor. So a changed record misses, a changed model gets a new
file, and the learning rate, the order of the records or the number of ranks change nothing.
Records are appended batch by batch: a killed pass goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from realign.forest import Example, build_batch
from realign.model import ForestModel
from realign.parallel import barrier, rank, world_size

_RECORD = np.dtype([("key", "V16"), ("logp", "<f8")])
_LAYOUT = b"forest-1"  # changes when the same leaf would get another log-prob


def leaf_key(example: Example, leaf: int) -> bytes:
    """128-bit digest of (images, prompt ids, response ids), and of being a rival leaf."""
    root = example.roots[example.leaves[leaf].root]
    digest = hashlib.blake2b(digest_size=16)
    for part in (*(key.encode() for key in root.images), root.ids, example.leaves[leaf].ids):
        data = part if isinstance(part, bytes) else part.astype("<i8").tobytes()
        digest.update(len(data).to_bytes(8, "little") + data)
    if example.leaves[leaf].rival:  # other tokens are scored; plain leaves keep their keys
        digest.update(b"rival")
    return digest.digest()


def fingerprint(
    model: torch.nn.Module, processor, dtype: torch.dtype, *, sharded: bool = False
) -> str:
    """Digest of everything that decides a log-prob besides the leaf itself.

    In bf16 a plain process computes under autocast and a sharded one with bf16 parameters, which
    differ by up to 0.14 nats in a log-prob; in fp32 they agree.
    """
    mode = f"{dtype} {'sharded' if sharded and dtype != torch.float32 else 'plain'}"
    digest = hashlib.blake2b(_LAYOUT + mode.encode(), digest_size=16)
    digest.update(processor.image_processor.to_json_string().encode())
    digest.update(model.config._attn_implementation.encode())
    for name, tensor in sorted(model.state_dict().items()):
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(name.encode() + raw.numpy().data)
    return digest.hexdigest()


def read(folder: Path) -> dict[bytes, float]:
    """All log-probs of a folder; a record cut short by a crash is left out."""
    found: dict[bytes, float] = {}
    for file in sorted(folder.glob("*.logps")):
        data = file.read_bytes()
        whole = len(data) // _RECORD.itemsize * _RECORD.itemsize
        records = np.frombuffer(data[:whole], dtype=_RECORD)
        keys = (key.tobytes() for key in records["key"])
        found.update(zip(keys, records["logp"].tolist(), strict=True))
    return found


def digest_of(examples: Sequence[Example]) -> str:
    """128-bit digest of a data set: all its leaves, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        for leaf in range(len(example.leaves)):
            digest.update(leaf_key(example, leaf))
    return digest.hexdigest()


def fill(
    folder: Path,
    model: ForestModel,
    examples: Sequence[Example],
    store,
    *,
    batch_size: int,
    row_tokens: int,
    device: torch.device,
    progress: bool = True,
) -> torch.Tensor:
    """Compute what `folder` lacks; every rank calls it, each does its share.

    Args:
        folder: where this fingerprint's log-probs are.
        model: the reference: adapters off, in inference mode.
        examples: the forests of the data set.
        store: gives the pixels of an image key.
        batch_size: examples in one forward.
        row_tokens: most tokens in a row of the forest.
        device: where the model is.
        progress: whether to show a bar (on rank 0).

    Returns:
        Reference log-probs of all leaves, (L, examples) fp64.
    """
    folder.mkdir(parents=True, exist_ok=True)
    barrier()
    known = read(folder)
    barrier()
    missing = [
        example
        for example in examples
        if any(leaf_key(example, leaf) not in known for leaf in range(len(example.leaves)))
    ]
    # Every rank makes the same number of forwards, whatever its share: collectives need it.
    share = -(-len(missing) // world_size())
    first = min(rank() * share, max(len(missing) - share, 0))
    mine = missing[first : first + share]
    bar = tqdm(
        total=len(mine),
        desc="reference log-probs",
        unit="record",
        disable=not progress or rank() != 0,
    )
    with (folder / f"rank-{rank():05d}.logps").open("ab") as file:
        file.truncate(file.tell() // _RECORD.itemsize * _RECORD.itemsize)
        for start in range(0, share, batch_size):
            part = mine[start : start + batch_size]
            batch = build_batch(part, store, row_tokens=row_tokens).to(device)
            with torch.no_grad():
                logps = model(batch).cpu().numpy()
            records = [
                (leaf_key(example, leaf), logps[leaf, i])
                for i, example in enumerate(part)
                for leaf in range(len(example.leaves))
            ]
            file.write(np.array(records, dtype=_RECORD).tobytes())
            file.flush()
            bar.update(len(part))
    bar.close()
    barrier()
    known = read(folder)
    leaves = range(len(examples[0].leaves))
    table = [[known[leaf_key(example, leaf)] for example in examples] for leaf in leaves]
    return torch.tensor(table, dtype=torch.float64)
