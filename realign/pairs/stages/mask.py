"""Mask stage: hides segments of the responses, chosen by a registered masker or an engine."""

from __future__ import annotations

import pyarrow as pa

from realign.pairs.config import PairsConfig
from realign.pairs.io.rows import NO_REPLY, Row, engine_identity
from realign.pairs.masking import MASKERS
from realign.pairs.masking.mask import Masked, masked_from
from realign.pairs.prompts import mask_chat, parse_segments
from realign.pairs.stages.base import ChatStage, Script, rng_of

_TEXTS = pa.list_(pa.string())


class Mask(ChatStage):
    """Masked responses."""

    name = "mask"
    schema = pa.schema(
        {"id": pa.string(), "pieces": _TEXTS, "hidden": _TEXTS, "masker": pa.string()}
    )

    def __init__(self, config: PairsConfig) -> None:
        super().__init__(config)
        self.needs = (config.response_stage,)
        self.columns = {config.response_stage: ["id", "chosen"]}
        self.engine_spec = None if config.masker in MASKERS else config.masker

    def settings(self) -> Row:
        """The masker and its settings."""
        config = self.config
        if self.engine_spec is not None:
            return {"masker": engine_identity(self.engine_spec, config.computed)}
        names = ("masker", "categories", "segments", "share", "seed")
        return {name: getattr(config, name) for name in names}

    def script(self, inputs: dict[str, list[Row]], number: int) -> Script:
        """Masks the responses. Records without anything to mask are dropped."""
        detail = "add one, or let --answer write it"
        rows, left_out = [], []
        sources = []
        for row in inputs[self.needs[0]]:
            if row["chosen"]:
                sources.append(row)
            else:
                left_out.append(self.invalid(row["id"], "no response", detail))
        masks: list[Masked | None | str]  # a str is the error message of a reply
        if self.engine_spec is None:
            masks = [self._masked(row) for row in sources]
        else:
            replies = yield [mask_chat(row["chosen"]) for row in sources]
            masks = [
                reply.error or masked_from(row["chosen"], parse_segments(reply))
                for row, reply in zip(sources, replies, strict=True)
            ]
        for row, masked in zip(sources, masks, strict=True):
            name = row["id"]
            if isinstance(masked, str):
                left_out.append(self.invalid(name, NO_REPLY, masked))
            elif masked is None:
                left_out.append(self.filtered(name, "nothing to mask"))
            else:
                columns = {"pieces": masked.pieces, "hidden": masked.hidden}
                rows.append({"id": name, "masker": self.config.masker, **columns})
        return rows, left_out

    def _masked(self, row: Row) -> Masked | None:
        config, rng = self.config, rng_of(self.config.seed, row["id"], "mask")
        mask = MASKERS[config.masker]
        return mask(row["chosen"], config.categories, config.segments, rng, share=config.share)
