"""Batched forward passes over sequences of unequal length, with a block of tokens per sequence.

In transformers' caches, all rows of a batch have the same length. A row with fewer tokens would
have padding in its middle, which windows and positions count. In this cache, column c of a row
holds the keys and values of the c-th token of that row's sequence. Padding comes after a row's
tokens, where they do not attend to it, and the next block overwrites it. So the mask is "column <=
own position" in every model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from transformers import Cache, PreTrainedModel

from realign.modeling.images import bundle_of, columns_of
from realign.modeling.layouts import SLIDING, Layout
from realign.modeling.model import takes_masks


class RowReader:
    """A batch of sequences and their cache.

    Args:
        vlm: a model whose layers have full or windowed attention with a mask (sdpa, eager, tree).
        layout: layout of the model.
    """

    def __init__(self, vlm: PreTrainedModel, layout: Layout) -> None:
        self.vlm: Any = vlm
        self.layout = layout
        self._decoder = vlm.model.get_decoder()
        self._softcap = getattr(vlm.config.get_text_config(), "final_logit_softcapping", None)
        self._eager = self._decoder.config._attn_implementation == "eager"

    def first(
        self,
        inputs: dict[str, torch.Tensor],
        images: Sequence[int],
        blocks: Sequence[Sequence[int]],
        room: int,
    ) -> torch.Tensor:
        """Read the prompts, and a block of response tokens after each.

        Args:
            inputs: output of the processor for the prompts, padded on the right.
            images: number of images in each prompt.
            blocks: response tokens of each row, possibly none.
            room: maximum number of tokens after a prompt.

        Returns:
            (B, V) logits of the next token of each row.
        """
        device, layout = self.vlm.device, self.layout
        unpadded = inputs["attention_mask"].bool().cpu()
        prompts = [
            ids[mask].numpy() for ids, mask in zip(inputs["input_ids"].cpu(), unpadded, strict=True)
        ]
        sizes = [len(prompt) for prompt in prompts]
        read, bundle = columns_of(inputs, layout), bundle_of(inputs, layout)
        pieces = {n: bundle[n].cpu().split(list(images)) for n in layout.grids if n in bundle}
        grids = [{name: parts[i] for name, parts in pieces.items()} for i in range(len(prompts))]
        lengths = [size + len(block) for size, block in zip(sizes, blocks, strict=True)]
        width = max(lengths)
        ids = np.zeros((len(prompts), width), np.int64)
        block = np.full(ids.shape, -1, np.int64)
        columns: dict[str, np.ndarray] = {}
        self._fill: dict[str, int] = {}  # values of token columns after a prompt
        # The position of a token after its prompt is its column plus this offset, on all axes.
        offsets: list[int] = []
        positions = []
        for row, (prompt, response) in enumerate(zip(prompts, blocks, strict=True)):
            ids[row, : lengths[row]] = [*prompt, *response]
            own = {n: column[row].cpu()[unpadded[row]].long().numpy() for n, column in read.items()}
            own = layout.columns(prompt, own)
            for name, column in own.items():
                self._fill[name] = layout.of_response(prompt, name, column)
                padded = np.append(column, np.full(width - sizes[row], self._fill[name]))
                columns.setdefault(name, np.zeros_like(ids))[row] = padded
            block[row, : sizes[row]] = layout.blocks(own) if layout.both_ways else -1
            prompt_axes = layout.positions(prompt, grids[row], own)
            offsets.append(int(prompt_axes.max()) + 1 - sizes[row])
            later = offsets[-1] + np.arange(sizes[row], width)
            positions.append(
                np.concatenate([prompt_axes, np.tile(later, (len(prompt_axes), 1))], 1)
            )
        axes = np.stack(positions, 1)  # (axes, B, width)
        self._cache = RowCache(max(sizes) + room)
        self._offsets = torch.tensor(offsets, device=device)
        self._lengths = torch.tensor(lengths, device=device)
        self._axes = len(axes)
        places = self._cache.place(torch.zeros_like(self._lengths), width, width)
        kwargs = {
            "input_ids": torch.from_numpy(ids).to(device),
            "position_ids": torch.from_numpy(axes if len(axes) > 1 else axes[0]).to(device),
            **{name: torch.from_numpy(column).to(device) for name, column in columns.items()},
            **bundle,
        }
        masks = {}
        if not layout.causal:
            masks = self._masks(places, torch.from_numpy(block).to(device))
        return self._scores(kwargs, masks, self._lengths - 1)

    def more(self, blocks: Sequence[Sequence[int]]) -> torch.Tensor:
        """Read more tokens of each row, possibly none.

        Returns:
            (B, V) logits of the next token. They are undefined for rows without new tokens.
        """
        device = self.vlm.device
        sizes = torch.tensor([len(block) for block in blocks], device=device)
        width = max(map(len, blocks))
        ids = torch.tensor([[*block, *[0] * (width - len(block))] for block in blocks])
        starts, self._lengths = self._lengths, self._lengths + sizes
        columns = self._cache.place(starts, width, int(self._lengths.max()))
        positions = columns + self._offsets[:, None]
        if self._axes > 1:
            positions = positions.expand(self._axes, -1, -1)
        kwargs = {"input_ids": ids.to(device), "position_ids": positions}
        kwargs |= {name: torch.full_like(kwargs["input_ids"], v) for name, v in self._fill.items()}
        return self._scores(kwargs, self._masks(columns), (sizes - 1).clamp(min=0))

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        indices = torch.tensor(rows, device=self.vlm.device)
        self._cache.keep_rows(indices)
        self._offsets, self._lengths = self._offsets[indices], self._lengths[indices]

    def _scores(
        self,
        kwargs: dict,
        masks: dict[str, torch.Tensor],
        last: torch.Tensor,  # (B,) index of each row's last token in the forward pass
    ) -> torch.Tensor:
        if masks:
            kwargs["attention_mask"] = masks[self.layout.kinds[0]]
        with takes_masks(self._decoder, masks) if len(masks) > 1 else nullcontext():
            states = self.vlm.model(
                **kwargs, past_key_values=self._cache, use_cache=True
            ).last_hidden_state
        states = states[torch.arange(len(last), device=last.device), last]
        scores = self.vlm.get_output_embeddings()(states).float()
        if self._softcap is not None:
            scores = torch.tanh(scores / self._softcap) * self._softcap
        return scores

    def _masks(
        self,
        queries: torch.Tensor,  # (B, W) columns
        block: torch.Tensor | None = None,  # (B, W) `Layout.blocks`, in the first forward pass
    ) -> dict[str, torch.Tensor]:
        """Kind of layer -> (B, 1, W, K) mask in the format of the attention implementation."""
        keys = torch.arange(self._cache.length, device=queries.device)
        distance = queries[:, :, None] - keys
        masks = {}
        for kind in self.layout.kinds:
            window = self.layout.window if kind == SLIDING else None
            mask, local = distance >= 0, distance < (1 << 30 if window is None else window)
            if block is not None and kind in self.layout.both_ways_kinds:
                same_block = (block[:, :, None] == block[:, None]) & (block[:, :, None] >= 0)
                if self.layout.beyond_window:
                    mask, local = mask & local | same_block, local | same_block
                else:
                    mask = mask | same_block
            mask = (mask & local)[:, None]
            if self._eager:
                hidden = torch.finfo(self.vlm.dtype).min
                mask = torch.zeros_like(mask, dtype=self.vlm.dtype).masked_fill(~mask, hidden)
            masks[kind] = mask
        return masks


class RowCache(Cache):
    """Cache of keys and values for the layers of a language model.

    Args:
        capacity: maximum number of tokens in a row.

    Attributes:
        length: number of columns that attention reads. `place` sets it before a forward pass.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(layers=[])
        self.capacity = capacity
        self.length = 0
        self._states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._columns: torch.Tensor | None = None

    def place(
        self,
        starts: torch.Tensor,  # (B,) tokens of each row so far
        width: int,
        length: int,
    ) -> torch.Tensor:
        """Set the columns that the next forward pass writes, starting at starts[b] in row b.

        Args:
            starts: number of tokens in each row so far.
            width: number of tokens per row in the forward pass, including padding.
            length: number of columns in use after the pass, in the longest row.

        Returns:
            (B, width) int64, the position of every token in its sequence.
        """
        positions = starts[:, None] + torch.arange(width, device=starts.device)
        # Padding beyond the capacity is written to the spare column.
        self._columns = positions.clamp(max=self.capacity)
        self.length = length
        return positions

    def update(
        self,
        key_states: torch.Tensor,  # (B, groups, W, D)
        value_states: torch.Tensor,  # (B, groups, W, D)
        layer_idx: int,
        *args,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the keys and values of a pass, and return all of `length` columns, (B, ..., D)."""
        if layer_idx not in self._states:
            self._states[layer_idx] = self._allocate(key_states), self._allocate(value_states)
        rows = torch.arange(len(key_states), device=key_states.device)[:, None]
        states = self._states[layer_idx]
        for state, new in zip(states, (key_states, value_states), strict=True):
            state[rows, :, self._columns] = new.transpose(1, 2)
        return states[0][:, :, : self.length], states[1][:, :, : self.length]

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Keep only these rows, in this order."""
        self._states = {
            layer: (keys[rows], values[rows]) for layer, (keys, values) in self._states.items()
        }

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Always 0. The first pass starts at 0, and later ones get explicit positions and masks."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Sizes for the first forward pass, which has no explicit mask."""
        return query_length, 0

    def _allocate(self, states: torch.Tensor) -> torch.Tensor:
        rows, groups, _, head_dim = states.shape
        return states.new_zeros(rows, groups, self.capacity + 1, head_dim)
