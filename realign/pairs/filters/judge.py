"""Judge filter: an engine that drops pairs whose responses are true of the wrong image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from realign.pairs.config import PairsConfig
from realign.pairs.engines import Chat, Reply
from realign.pairs.filters.base import Candidate, PairFilter
from realign.pairs.io.images import ImageError
from realign.pairs.io.rows import NO_REPLY, chat_images, engine_identity, load_in_threads
from realign.pairs.prompts import judge_chat, parse_verdict


class Judge(PairFilter):
    """Keeps pairs in which each response is false of the other image.

    The rejected response must be false of the image, and the chosen one of the visual negative.
    """

    columns = ("judge",)
    needs_record = True

    @classmethod
    def enabled(cls, config: PairsConfig) -> bool:
        """Whether `--judge` names an engine."""
        return config.judge is not None

    def settings(self) -> dict[str, Any]:
        """The engine of the judge."""
        assert self.config.judge is not None
        return {"judge": engine_identity(self.config.judge, self.config.computed)}

    def requests(self, candidates: Sequence[Candidate]) -> list[Chat]:
        """Two requests for each candidate whose images can be read."""
        workers = self.config.worker_threads
        images = load_in_threads(chat_images, [c.pair.images for c in candidates], workers)
        negatives = load_in_threads(
            chat_images, [c.pair.retrieved_images for c in candidates], workers
        )
        requests = []
        for candidate, image, negative in zip(candidates, images, negatives, strict=True):
            pair = candidate.pair
            if isinstance(image, ImageError):
                candidate.invalid = image.reason, image.detail
            elif isinstance(negative, ImageError):
                candidate.invalid = negative.reason, negative.detail
            else:
                requests.append(judge_chat(pair.prompt, pair.rejected, image))
                requests.append(judge_chat(pair.prompt, pair.chosen, negative))
        return requests

    def check(self, candidates: Sequence[Candidate], replies: Sequence[Reply]) -> None:
        """Parses the verdicts and sets the results."""
        judged = [candidate for candidate in candidates if candidate.passes]
        for candidate, *pair in zip(judged, replies[::2], replies[1::2], strict=True):
            if error := pair[0].error or pair[1].error:
                candidate.invalid = NO_REPLY, error
                continue
            rejected, chosen = map(parse_verdict, pair)
            verdicts = {"rejected": rejected, "chosen on the negative": chosen}
            candidate.columns["judge"] = json.dumps(verdicts)
            if rejected is None or chosen is None:
                candidate.reason = "no verdict"
            elif rejected:
                candidate.reason = "rejected is true of the image"
            elif chosen:
                candidate.reason = "chosen is true of the negative"
