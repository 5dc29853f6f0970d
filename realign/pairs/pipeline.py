"""The pairs pipeline: embed, retrieve, mask, refill on the neighbour, filter, write.

Follows the paper's text: neighbours are tried from the nearest on; the first whose completion
passes the filters gives the rejected response and is the visual negative; a record for which none
of the k does is dropped, and counted by reason.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from realign.digits import ASSETS
from realign.digits.scenes import CAPTION_PROMPT, make_scenes
from realign.encode import check_prompt
from realign.loading import load_model, load_processor
from realign.model import ForestModel
from realign.pairs import filters, index
from realign.pairs.embed import embed_images
from realign.pairs.mask import CATEGORIES, Masked, mask_response
from realign.pairs.refill import infill
from realign.records import Record, StoredImage, read_sources, write_pairs


@dataclass
class PairsConfig:
    output: str = "runs/pairs.parquet"
    """Parquet file to write."""
    data: str | None = None
    """Parquet file or folder with prompt, chosen and images; digit scenes when absent."""
    model: str | None = None
    """Model that refills (and embeds, unless --embed-model); the digits model when absent."""
    embed_model: str | None = None
    """CLIP or SigLIP model for the image embeddings; the model's own tower when absent."""
    scenes: int = 1024
    """Digit scenes to draw when there is no --data."""
    k: int = 10
    """Neighbours tried for each image."""
    ceiling: float = 0.999
    """Images at least this similar (cosine) are duplicates, never neighbours."""
    mask: str = ""
    """Kinds of word to hide, with commas: numbers, attributes, relations, objects (all of them
    when empty; numbers for the digits)."""
    segments: int = 1
    """Words hidden in a response, drawn at random; 0 hides all of those kinds."""
    tau: float = 1.0
    """Drop completions whose lexical similarity to the chosen response is at least this."""
    temperature: float = 0.0
    """Sampling temperature of the refill; 0 is greedy."""
    batch_size: int = 64
    """Records refilled at once."""
    seed: int = 0
    """Seeds the scenes, the masks and the sampling."""
    quiet: bool = False
    """No progress bars."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.categories if name not in CATEGORIES]
        if unknown:
            raise ValueError(
                f"mask names {', '.join(unknown)}; the kinds are {', '.join(CATEGORIES)}."
            )
        if self.model is not None and self.data is None:
            raise ValueError("--model is given without --data; pass the records to make pairs of.")
        if self.data is not None and self.scenes != 1024:
            raise ValueError("--scenes counts digit scenes and has no effect with --data; drop it.")
        for name in ("scenes", "k", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("segments", "temperature"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more.")

    @property
    def categories(self) -> tuple[str, ...]:
        """The kinds of word to hide."""
        if not self.mask:
            return ("numbers",) if self.data is None else CATEGORIES
        return tuple(name.strip() for name in self.mask.split(","))


@dataclass
class _Pending:
    """A record on its way through the neighbours."""

    record: Record
    masked: Masked
    neighbours: np.ndarray  # (k,) indices, -1 where there is none
    similarities: np.ndarray  # (k,)
    last_reason: str = "no neighbour"
    made: Record | None = None


@dataclass
class PairsReport:
    """What a run made."""

    path: Path
    written: int
    dropped: Counter = field(default_factory=Counter)  # reason -> records
    seconds: float = 0.0

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
        return (
            f"wrote {self.path}: {self.written} pairs in {self.seconds:.0f} s; "
            f"dropped {sum(self.dropped.values())}" + (f" ({reasons})" if reasons else "")
        )


def build_pairs(config: PairsConfig) -> PairsReport:
    """Make preference pairs and write them; the same configuration gives the same file.

    Raises:
        ValueError: for an empty data set, bad settings, or when no pair is left to write.
        RecordError: for a record that cannot be read.
    """
    began = time.perf_counter()
    bars = not config.quiet
    base = config.model or str(ASSETS)
    processor = load_processor(base)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = ForestModel(load_model(base)).eval().to(device)
    sources = digit_sources(config) if config.data is None else read_sources(config.data)
    for record in sources:
        check_prompt(processor, record, len(record.images))
    pictures = [[stored.open(r.name) for stored in r.images] for r in sources]
    vectors = embed_images(
        [group[0] for group in pictures],
        name=config.embed_model,
        model=model,
        processor=processor,
        progress=bars,
    )
    found, similarity = index.neighbours(vectors, config.k, ceiling=config.ceiling)
    rng = np.random.default_rng([config.seed, 1])
    dropped: Counter = Counter()
    pending = []
    for i, record in enumerate(sources):
        masked = mask_response(record.chosen, config.categories, config.segments, rng)
        if masked is None:
            dropped["nothing to mask"] += 1
        else:
            pending.append(_Pending(record, masked, found[i], similarity[i]))
    _refill(pending, sources, pictures, model, processor, config, bars)
    made = [entry.made for entry in pending if entry.made is not None]
    dropped.update(entry.last_reason for entry in pending if entry.made is None)
    report = PairsReport(Path(config.output), len(made), dropped)
    if not made:
        raise ValueError(
            f"no pair passed the filters ({dict(dropped)}). Raise --k or --tau, hide more with "
            "--segments 0, or give more images."
        )
    write_pairs(config.output, made)
    report.seconds = time.perf_counter() - began
    return report


def digit_sources(config: PairsConfig) -> list[Record]:
    """Biased digit scenes with their true captions: the embedded default."""
    scenes = make_scenes(config.scenes, biased=True, split="train", seed=config.seed)
    prompt = ({"role": "user", "content": CAPTION_PROMPT},)
    return [
        Record(f"scene-{i:05d}", prompt, s.caption, "", (StoredImage.from_pil(s.image),))
        for i, s in enumerate(scenes)
    ]


def _refill(
    pending: Sequence[_Pending],
    sources: Sequence[Record],
    pictures: Sequence[Sequence[Image.Image]],
    model: ForestModel,
    processor,
    config: PairsConfig,
    bars: bool,
) -> None:
    """Try the neighbours in turn until each record has a rejected response or none is left."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(config.seed)
    bar = tqdm(total=len(pending), desc="refill", unit="pair", disable=not bars)
    for place in range(config.k):
        # A prompt places as many images as its record has, so a neighbour must have as many.
        open_ = [
            e
            for e in pending
            if e.made is None
            and e.neighbours[place] >= 0
            and len(pictures[e.neighbours[place]]) == len(e.record.images)
        ]
        for start in range(0, len(open_), config.batch_size):
            part = open_[start : start + config.batch_size]
            completions = infill(
                model.vlm,
                processor,
                [e.record.prompt for e in part],
                [pictures[e.neighbours[place]] for e in part],
                [e.masked for e in part],
                temperature=config.temperature,
                generator=generator,
            )
            for entry, completion in zip(part, completions, strict=True):
                chosen = entry.record.chosen
                reason = filters.reason_to_drop(chosen, completion.text, config.tau)
                if not completion.closed:
                    reason = "gap not closed"
                if reason is not None:
                    entry.last_reason = reason
                    continue
                entry.made = Record(
                    entry.record.name,
                    entry.record.prompt,
                    chosen,
                    completion.text,
                    entry.record.images,
                    sources[entry.neighbours[place]].images,
                    {
                        "masked": str(entry.masked),
                        "neighbour_rank": place,
                        "similarity": float(entry.similarities[place]),
                        "text_similarity": filters.text_similarity(chosen, completion.text),
                        "embed_model": config.embed_model or config.model or "digits",
                        "refill_model": config.model or "digits",
                        "seed": config.seed,
                    },
                )
                bar.update()
    bar.close()
