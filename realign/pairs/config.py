"""Settings of the pairs pipeline; a field is a flag of `python -m realign.pairs`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realign.digits import ASSETS
from realign.modeling.loading import DTYPES
from realign.pairs import negatives
from realign.pairs.engines import is_endpoint
from realign.pairs.masking.mask import CATEGORIES
from realign.pairs.retrieval import index
from realign.pairs.retrieval.phash import HASH_DISTANCE

REFILLS = ("infill", "prompt")
_RAY = re.compile(r"local(:[1-9]\d*)?|auto|(?!local:).+:\d+")


@dataclass
class PairsConfig:
    output: str = "runs/pairs.parquet"
    """Parquet file to write; rejected_records.parquet in --work lists what cannot be used."""
    data: str | None = None
    """File or folder of records with images, prompts and responses; digit scenes when absent."""
    format: str = "auto"
    """Of --data: parquet, realign, llava, coco, folder; auto looks. llava:all and coco:all take
    every answer or caption, not the first alone."""
    image_folder: str | None = None
    """Folder that image paths in --data are relative to; that of --data when absent."""
    model: str | None = None
    """Model that refills (and embeds, unless --embed-model); the digits model when absent."""
    embed_model: str | None = None
    """CLIP, SigLIP or sentence-transformers model for the image embeddings; the model's own tower
    when absent."""
    dtype: str = "fp32"
    """What these models compute in: fp32 or bf16. Training in the same finds the margins' log-probs
    in its reference cache."""
    scenes: int = 1024
    """Digit scenes to draw when there is no --data."""
    answer: str | None = None
    """Engine that writes responses for the records without one: transformers:MODEL, vllm:MODEL or
    the URL of an OpenAI-compatible endpoint, http://HOST:PORT/v1#MODEL."""
    k: int = 10
    """Neighbours tried for each image."""
    index: str = "auto"
    """Search for neighbours: exact, ivf, hnsw; auto is exact up to 200,000 images, then ivf."""
    ceiling: float = 0.999
    """Images at least this similar (cosine) are duplicates, never neighbours."""
    floor: float = -1.0
    """Images less similar than this (cosine) are no neighbours."""
    hash_distance: int = HASH_DISTANCE
    """Images whose perceptual hashes differ in at most this many of 64 bits are duplicates; -1
    compares no hashes."""
    masker: str = "rules"
    """Who picks the words to hide: rules, or an engine as of --answer."""
    mask: str = ""
    """Kinds of word to hide, with commas: numbers, attributes, relations, objects (all of them
    when empty; numbers for the digits)."""
    segments: int = 1
    """Words hidden in a response, drawn at random; 0 hides all of those kinds."""
    share: float | None = None
    """Share of the words of those kinds to hide, in place of --segments."""
    refill: str = "infill"
    """How masked responses are completed: infill forces the other words, prompt asks --engine."""
    engine: str | None = None
    """Engine of --refill prompt, as of --answer; transformers with --model when absent."""
    candidates: int = 1
    """Completions tried by the filters that need a model: --similarity, --margin, --judge."""
    temperature: float = 0.0
    """Sampling temperature of the refill; 0 is greedy."""
    tau: float = 1.0
    """Drop completions whose similarity to the chosen response is at least this."""
    similarity: str = "lexical"
    """Measure of --tau: lexical, the share of matching words, or a sentence-transformers model by
    name, the cosine (the paper: all-mpnet-base-v2 with tau 0.95)."""
    margin: bool = False
    """Keep only records whose chosen response the model finds likelier on its own image than on the
    visual negative."""
    judge: str | None = None
    """Engine, as of --answer, that drops records whose rejected response is true of the image, or
    the chosen one of the visual negative."""
    concurrency: int = 8
    """Requests that an endpoint gets at once."""
    requests_per_minute: float | None = None
    """Most requests that an endpoint gets in a minute, of each process."""
    price_in: float | None = None
    """Price of a million input tokens at an endpoint; costs are estimated beforehand."""
    price_out: float | None = None
    """The same of output tokens."""
    negative: str = "retrieved"
    """Visual negative: retrieved, or for comparisons random, crop, noise, blank. The rejected
    response is always completed on the retrieved image."""
    work: str | None = None
    """Folder of the shards, from which a stopped run goes on; OUTPUT with .work when absent."""
    shard: int = 512
    """Records of a shard: what an interruption loses at most."""
    max_bad: float = 0.05
    """Share of the records that may be unusable before the run stops."""
    batch_size: int = 64
    """Images embedded and records refilled at once."""
    ray: str | None = None
    """Run on Ray Data: a cluster's address, local for all cores of this machine, or local:N for N
    of them. All paths must be the same on every machine."""
    seed: int = 0
    """Seeds the scenes, the masks, the sampling and the visual negatives."""
    quiet: bool = False
    """No progress: only the result."""

    def __post_init__(self) -> None:
        self._check_names()
        self._check_numbers()
        self._check_effects()

    def _check_names(self) -> None:
        if Path(self.output).is_dir():
            raise ValueError(f"output {self.output} is a folder; name the Parquet file to write.")
        if self.work_folder == Path(self.output):
            raise ValueError(f"output {self.output} is the work folder's name; take .parquet.")
        if self.data is not None and Path(self.data).is_dir():
            for flag, path in (("output", Path(self.output)), ("work", self.work_folder)):
                if path.resolve().is_relative_to(Path(self.data).resolve()):
                    raise ValueError(
                        f"--{flag} {path} lies in the folder of --data, which a run would change; "
                        "name a place outside of it."
                    )
        unknown = [name for name in self.categories if name not in CATEGORIES]
        if unknown:
            raise ValueError(
                f"mask names {', '.join(unknown)}; the kinds are {', '.join(CATEGORIES)}."
            )
        choices = {
            "refill": REFILLS,
            "negative": negatives.KINDS,
            "index": index.KINDS,
            "dtype": tuple(DTYPES),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}."
                )
        if self.ray is not None and not _RAY.fullmatch(self.ray):
            raise ValueError(
                f"ray is {self.ray!r}; give local, local:N, auto or a cluster's address HOST:PORT."
            )
        options = {name: getattr(self, name) for name in _OF_ENDPOINTS}
        for name in _ENGINES:
            spec = getattr(self, name)
            if spec is not None and (name, spec) != ("masker", "rules"):
                _check_engine(name, spec, options)

    def _check_numbers(self) -> None:
        for name in ("scenes", "k", "candidates", "shard", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not -1 <= self.hash_distance < 64:
            raise ValueError(f"hash_distance is {self.hash_distance}; it is from -1 to 63 bits.")
        for name in ("segments", "temperature"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be finite, 0 or more.")
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"max_bad is {self.max_bad}; it is a share, from 0 to 1.")
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}; it is a share, above 0 and up to 1.")
        for name in ("ceiling", "tau"):
            if not -1 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it is a similarity, from -1 to 1."
                )
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be 0 or more.")
        if not self.floor < self.ceiling:
            raise ValueError(
                f"floor is {self.floor} and ceiling is {self.ceiling}, which leaves no neighbour; "
                "the floor must be below the ceiling."
            )

    def _check_effects(self) -> None:
        """Refuse settings that would change nothing."""
        if self.model is not None and self.data is None:
            raise ValueError("--model is given without --data; pass the records to make pairs of.")
        if self.data is not None and self.scenes != 1024:
            raise ValueError("--scenes counts digit scenes and has no effect with --data; drop it.")
        given = {
            "format": self.format != "auto",
            "image_folder": self.image_folder is not None,
            "answer": self.answer is not None,
        }
        for name, is_given in given.items():
            if is_given and self.data is None:
                raise ValueError(
                    f"--{name.replace('_', '-')} would have no effect: the digit scenes have "
                    "images and responses. Pass --data."
                )
        if self.engine is not None and self.refill != "prompt":
            raise ValueError("engine would have no effect with infill; add --refill prompt.")
        if self.share is not None and self.segments != 1:
            raise ValueError("share and segments both say how much to hide; give one of them.")
        if self.masker != "rules" and (self.mask or self.segments != 1 or self.share is not None):
            raise ValueError(
                "mask, segments and share are settings of the rules and would have no effect with "
                "an engine as --masker; drop them."
            )
        asks = self.judge is not None or self.margin or self.similarity != "lexical"
        if self.candidates > 1 and not asks:
            raise ValueError(
                f"candidates is {self.candidates} and would have no effect: nothing chooses among "
                "them. Add --similarity, --margin or --judge."
            )
        if self.candidates > self.k:
            raise ValueError(
                f"candidates is {self.candidates} of {self.k} neighbours; give at most k."
            )
        if self.ray and self.margin and (self.judge or "").startswith("vllm:"):
            raise ValueError(
                "margin and a vllm judge cannot share the GPUs of Ray's workers; serve the judge "
                "and name its URL."
            )
        used = self.embed_model is None or self.refill == "infill" or self.margin
        if self.model is not None and not used and self.engine is not None:
            raise ValueError(
                f"model is {self.model!r} and would have no effect: --embed-model embeds, and "
                "--engine refills. Drop it."
            )
        if not any(is_endpoint(getattr(self, name)) for name in _ENGINES):
            for name in _OF_ENDPOINTS:
                if (given := getattr(self, name)) not in (None, type(self).__dict__[name]):
                    raise ValueError(
                        f"{name} is {given} and would have no effect: no engine is an endpoint. "
                        "Drop it, or name a URL for --answer, --masker, --engine or --judge."
                    )

    @property
    def categories(self) -> tuple[str, ...]:
        """The kinds of word to hide."""
        if not self.mask:
            return ("numbers",) if self.data is None else CATEGORIES
        return tuple(name.strip() for name in self.mask.split(",") if name.strip())

    @property
    def base(self) -> str:
        """The folder or name of the vision-language model."""
        return self.model or str(ASSETS)

    @property
    def refill_engine(self) -> str | None:
        """Which engine refills; None where infill does."""
        return (self.engine or f"transformers:{self.base}") if self.refill == "prompt" else None

    @property
    def response_stage(self) -> str:
        """The stage whose rows hold the chosen responses."""
        return "read" if self.answer is None else "answer"

    @property
    def work_folder(self) -> Path:
        """Where the shards lie."""
        return Path(self.work) if self.work else Path(self.output).with_suffix(".work")

    @property
    def engine_options(self) -> dict[str, Any]:
        """What engines are made with besides their name."""
        return {
            "folder": self.work_folder / "engines",
            "batch_size": self.batch_size,
            "dtype": self.dtype,
            **{name: getattr(self, name) for name in _OF_ENDPOINTS},
        }


_ENGINES = ("answer", "masker", "engine", "judge")
_OF_ENDPOINTS = ("concurrency", "requests_per_minute", "price_in", "price_out")


def _check_engine(name: str, spec: str, options: dict[str, Any]) -> None:
    """The message does not repeat `spec`: somebody may have written a key into it."""
    from realign.pairs.engines import make_engine

    try:
        make_engine(spec, **options)
    except ValueError as error:
        raise ValueError(f"--{name}: {error}") from error
