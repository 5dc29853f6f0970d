"""The reference pass: assignment of leaves to forwards, and the loop over forwards.

`ReferenceCache.fill` is the public entry point.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed.fsdp import FSDPModule

from realign_kernels.refcache.keys import Leaves
from realign_kernels.refcache.packing import pack_forest
from realign_kernels.refcache.staging import Staging


class Filled(NamedTuple):
    """Counts of one rank's part of a pass."""

    leaves: int  # New log-probs.
    tokens: int  # Tokens of the computed rows. A prompt counts once for all its leaves.
    batches: int
    recomputed: int  # Cached leaves that share a batch with missing ones.
    seconds: float


class Store(Protocol):
    """The interface of `ReferenceCache` that a pass needs."""

    digest: str  # of the fingerprint

    def prepare(self) -> None: ...

    def find(self, keys: NDArray[np.void]) -> tuple[NDArray[np.float64], NDArray[np.int32]]: ...

    def keep(
        self, keys: NDArray[np.void], logps: NDArray[np.float64], counts: NDArray[np.int32]
    ) -> int: ...


@dataclass(frozen=True, eq=False)
class Batch:
    """The leaves of one forward."""

    leaves: NDArray[np.int64]  # indices into Leaves, row by row
    tokens: int  # in the rows, without padding


def plan(
    leaves: Leaves,
    wanted: NDArray[np.bool_],  # (L,)
    row_tokens: int,
    batch_rows: int,
) -> list[Batch]:
    """Packs distinct wanted leaves into rows, and rows into batches, longest first.

    row_tokens is raised to the longest root with one leaf if needed, as in training. A batch
    consists of whole rows of one packing, so packing only its leaves gives the same rows.
    """
    selected = np.flatnonzero(wanted)
    longest = int((leaves.root_lengths[leaves.roots] + leaves.lengths).max(initial=0))
    row_tokens = max(row_tokens, longest)
    _, first = np.unique(
        leaves.keys[selected].view("<u8").reshape(-1, 2), axis=0, return_index=True
    )
    selected = selected[np.sort(first)]
    if not len(selected):
        return []
    roots, under = np.unique(leaves.roots[selected], return_inverse=True)
    packing = pack_forest(leaves.root_lengths[roots], leaves.lengths[selected], under, row_tokens)
    row_order = np.argsort(-packing.row_lengths, kind="stable")
    rank_of_row = np.empty_like(row_order)
    rank_of_row[row_order] = np.arange(len(row_order))
    row = rank_of_row[packing.tree_row[packing.leaf_tree]]
    order = np.lexsort((packing.leaf_start, row))
    bounds = np.searchsorted(row[order], np.arange(0, packing.num_rows + batch_rows, batch_rows))
    lengths = packing.row_lengths[row_order]
    return [
        Batch(selected[order[start:end]], int(lengths[i * batch_rows :][:batch_rows].sum()))
        for i, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False))
        if end > start
    ]


def batches_to_compute(
    leaves: Leaves,
    known: NDArray[np.bool_],  # (L,)
    row_tokens: int,
    batch_rows: int,
) -> list[Batch]:
    """The batches with missing leaves, from the plan over *all* leaves.

    An interrupted pass thus continues with the batches it would have run. The rows that share a
    forward affect the last bits of a log-prob. They depend neither on the interruption nor on the
    number of ranks. If known leaves are scattered over many batches, the missing leaves are packed
    separately, because the known ones would be recomputed.
    """
    everything = plan(leaves, np.ones(len(known), bool), row_tokens, batch_rows)
    lacking = [batch for batch in everything if not known[batch.leaves].all()]
    # An interrupted pass leaves at most one partly written batch per rank.
    if sum(bool(known[batch.leaves].any()) for batch in lacking) <= max(2, _ranks()[0]):
        return lacking
    return plan(leaves, ~known, row_tokens, batch_rows)


def fill(
    store: Store,
    model: Callable[[Any], torch.Tensor],
    leaves: Leaves,
    build: Callable[[Sequence[tuple[int, int]]], Any],
    row_tokens: int,
    batch_rows: int,
    on_batch: Callable[[int, int], None] | None,
) -> Filled:
    """Compute and store the log-probs missing in `store`. See `ReferenceCache.fill`.

    Raises:
        ValueError: a log-prob is not finite. The message names leaf and forest.
    """
    began = time.perf_counter()
    _check_ranks_agree(store, leaves, row_tokens, batch_rows)
    known = _anywhere(store.find(leaves.keys)[1] > 0)
    batches = batches_to_compute(leaves, known, row_tokens, batch_rows)
    if batches:
        store.prepare()
    own_batches = _rank_slice(batches)
    without_gradients = torch.inference_mode if _is_whole(model) else torch.no_grad

    staging: Staging | None = None
    waiting: deque[Batch] = deque()
    computed = tokens = recomputed = 0

    def land() -> None:
        """Write the oldest batch in flight."""
        assert staging is not None
        batch = waiting.popleft()
        sums, at = staging.pop(), batch.leaves
        if (bad := np.flatnonzero(~np.isfinite(sums))).size:
            forest, leaf = leaves.pairs[at[bad[0]]]
            raise ValueError(
                f"the reference log-prob of leaf {leaf} of forest {forest} is {sums[bad[0]]}. "
                "Check its image and text, and the model's weights."
            )
        new = ~known[at]
        store.keep(leaves.keys[at][new], sums[new], leaves.lengths[at][new])
        if on_batch:
            on_batch(int(new.sum()), batch.tokens)

    for batch, inputs, spare in _built(own_batches, leaves, build):
        with without_gradients():
            logps = model(inputs)
        if spare:  # run only for the collectives of the other ranks
            continue
        lengths = leaves.lengths[batch.leaves]
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        _check_logps(logps, offsets[-1])
        if staging is None:
            staging = Staging(logps.device)
        if staging.full:
            land()
        staging.push(logps.float(), offsets)
        waiting.append(batch)
        if logps.device.type == "cpu":
            land()  # a crash cannot lose this batch
        computed += int((~known[batch.leaves]).sum())
        recomputed += int(known[batch.leaves].sum())
        tokens += batch.tokens
    while waiting:
        land()
    _exchange(store, leaves)
    return Filled(computed, tokens, len(own_batches), recomputed, time.perf_counter() - began)


def _built(
    batches: Sequence[tuple[Batch, bool]],
    leaves: Leaves,
    build: Callable[[Sequence[tuple[int, int]]], Any],
) -> Iterator[tuple[Batch, Any, bool]]:
    """Yields (batch, model input, spare). A thread builds the next input during a forward."""
    with ThreadPoolExecutor(1) as pool:
        ahead: deque[tuple[Batch, Any, bool]] = deque()
        for batch, spare in batches:
            pairs = [(forest, leaf) for forest, leaf in leaves.pairs[batch.leaves].tolist()]
            ahead.append((batch, pool.submit(build, pairs), spare))
            if len(ahead) > 1:
                first, future, is_spare = ahead.popleft()
                yield first, future.result(), is_spare
        for last, future, is_spare in ahead:
            yield last, future.result(), is_spare


def _check_logps(logps: Any, count: int) -> None:
    if not isinstance(logps, torch.Tensor) or not logps.is_floating_point():
        kind = logps.dtype if isinstance(logps, torch.Tensor) else type(logps).__name__
        raise ValueError(f"model must return per-token log-probs as a float tensor, got {kind}")
    if logps.shape != (count,):
        raise ValueError(
            f"model must return per-token log-probs of shape ({count},), one for each response "
            f"token of the batch, got {tuple(logps.shape)}"
        )


def _is_whole(model: Callable[[Any], torch.Tensor]) -> bool:
    """Whether the model is a module without FSDP2.

    Parameters that FSDP2 gathers under inference_mode would stay inference tensors.
    """
    model = getattr(model, "__self__", model)  # of a method
    if not isinstance(model, torch.nn.Module):
        return False  # a function may call a sharded module
    return not any(isinstance(module, FSDPModule) for module in model.modules())


def _check_ranks_agree(store: Store, leaves: Leaves, row_tokens: int, batch_rows: int) -> None:
    """Check that all ranks have the same leaves, because they exchange leaves by index."""
    if not _distributed():
        return
    here = {
        "fingerprint": store.digest,
        "leaves": hashlib.blake2b(leaves.keys.tobytes(), digest_size=16).hexdigest(),
        "settings": f"{row_tokens} {batch_rows}",
    }
    everybody: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everybody, here)
    for rank, other in enumerate(everybody):
        if different := [name for name in here if other[name] != everybody[0][name]]:
            raise ValueError(
                f"rank {rank} and rank 0 differ in: {', '.join(different)}. Give all ranks the "
                "whole data set in the same order. Use the same model, images, settings and "
                "library versions on every machine."
            )


def _rank_slice(batches: list[Batch]) -> list[tuple[Batch, bool]]:
    """This rank's batches as (batch, spare).

    Collectives need the same number of batches on every rank, so the last one may be a spare.
    """
    ranks, rank = _ranks()
    own = [(batch, False) for batch in batches[rank::ranks]]
    if len(own) < -(-len(batches) // ranks):
        own.append((batches[-1], True))
    return own


def _anywhere(known: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Leaves cached on any rank. Ranks on other machines may have separate folders."""
    if not _distributed():
        return known
    return _reduce_max(torch.from_numpy(known.astype(np.uint8))).numpy().astype(bool)


def _exchange(store: Store, leaves: Leaves) -> None:
    """Give every rank the log-probs that are missing in its own folder."""
    if not _distributed():
        return
    dist.barrier()
    logps, counts = store.find(leaves.keys)
    lacking = torch.tensor([int((counts == 0).any())])
    if not int(_reduce_max(lacking)):
        return
    logps = _reduce_max(torch.from_numpy(np.where(counts > 0, logps, -np.inf))).numpy()
    if np.isneginf(logps).any():
        raise ValueError("a computed log-prob is missing. Check whether the folder was removed.")
    # Ranks of one machine share a folder. One of them writes, then the others read.
    for turn in (True, False):
        if turn == (os.environ.get("LOCAL_RANK", "0") == "0"):
            absent = store.find(leaves.keys)[1] == 0
            store.keep(leaves.keys[absent], logps[absent], leaves.lengths[absent])
        dist.barrier()


def _ranks() -> tuple[int, int]:
    """(world size, rank), which is (1, 0) without torch.distributed."""
    return (dist.get_world_size(), dist.get_rank()) if _distributed() else (1, 0)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _reduce_max(values: torch.Tensor) -> torch.Tensor:
    on_cuda = dist.get_backend() == "nccl"
    moved = values.cuda() if on_cuda else values
    dist.all_reduce(moved, dist.ReduceOp.MAX)
    return moved.cpu()
