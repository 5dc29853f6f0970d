"""Settings of the pairs pipeline; a field is a flag of `python -m realign.pairs`."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realign.digits import ASSETS
from realign.modeling.loading import DTYPES
from realign.pairs import engines, negatives
from realign.pairs.engines import is_endpoint
from realign.pairs.masking import MASKERS
from realign.pairs.masking.mask import CATEGORIES
from realign.pairs.retrieval.index import KINDS as INDICES
from realign.pairs.retrieval.phash import HASH_DISTANCE

REFILLS = ("infill", "prompt")
_RAY = re.compile(r"local(:[1-9]\d*)?|auto|(?!local:).+:\d+")
_OF_ENDPOINTS = ("concurrency", "requests_per_minute", "price_in", "price_out")
_LARGEST = sys.float_info.max
_RANGES = (  # names, least and largest value, message
    (("scenes", "k", "candidates", "shard", "batch_size"), 1, _LARGEST, "it must be at least 1."),
    (("hash_distance",), -1, 63, "it is from -1 to 63 bits."),
    (("segments", "temperature"), 0, _LARGEST, "it must be finite, 0 or more."),
    (("max_bad",), 0, 1, "it is a share, from 0 to 1."),
    (("share",), 0, 1, "it is a share, above 0 and up to 1."),
    (("ceiling", "tau"), -1, 1, "it is a similarity, from -1 to 1."),
    (("seed",), 0, _LARGEST, "it must be 0 or more."),
)


@dataclass
class PairsConfig:
    output: str = "runs/pairs.parquet"
    """Parquet file to write; rejected_records.parquet in --work lists invalid records."""
    data: str | None = None
    """File or folder of records with images, prompts and responses; digit scenes when absent."""
    format: str = "auto"
    """Of --data: parquet, realign, llava, coco, folder; auto detects it. llava:all and coco:all
    take every answer or caption, not only the first."""
    image_folder: str | None = None
    """Folder that image paths in --data are relative to; that of --data when absent."""
    model: str | None = None
    """Model that refills (and embeds, unless --embed-model); the digits model when absent."""
    embed_model: str | None = None
    """CLIP, SigLIP or sentence-transformers model for the image embeddings; the model's own tower
    when absent."""
    dtype: str = "fp32"
    """Of these models' computations: fp32 or bf16. Training in the same dtype finds the margins'
    log-probs in its reference cache."""
    scenes: int = 1024
    """Digit scenes to draw when there is no --data."""
    answer: str | None = None
    """Engine that writes responses for the records without one: transformers:MODEL, or the URL of
    an OpenAI-compatible endpoint, http://HOST:PORT/v1#MODEL."""
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
    """Picks the words to hide: rules, or an engine as of --answer."""
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
    """Keep only records whose chosen response is likelier by the model on its own image than on the
    visual negative."""
    judge: str | None = None
    """Engine, as of --answer, that drops records whose rejected response is true of the image, or
    the chosen one of the visual negative."""
    concurrency: int = 8
    """Requests to an endpoint at the same time."""
    requests_per_minute: float | None = None
    """Most requests of each process to an endpoint in a minute."""
    price_in: float | None = None
    """Price of a million input tokens at an endpoint; costs are estimated beforehand."""
    price_out: float | None = None
    """The same of output tokens."""
    negative: str = "retrieved"
    """Visual negative: retrieved, or for comparisons random, crop, noise, blank. The rejected
    response is always completed on the retrieved image."""
    work: str | None = None
    """Folder of the shards, from which a stopped run resumes; OUTPUT with .work when absent."""
    shard: int = 512
    """Records of a shard, the most that an interruption loses."""
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
        output = Path(self.output)
        if output.is_dir():
            raise ValueError(f"output {self.output} is a folder; name the Parquet file to write.")
        work = self.work_folder
        if work == output:
            raise ValueError(
                f"output {self.output} is the work folder's name; use the suffix .parquet."
            )
        if self.data is not None and Path(self.data).is_dir():
            for flag, path in (("output", output), ("work", work)):
                if path.resolve().is_relative_to(Path(self.data).resolve()):
                    raise ValueError(
                        f"--{flag} {path} is in the folder of --data, which a run would change; "
                        "name a path outside of it."
                    )
        if unknown := [name for name in self.categories if name not in CATEGORIES]:
            raise ValueError(
                f"mask names {', '.join(unknown)}; the kinds are {', '.join(CATEGORIES)}."
            )
        choices = {"refill": REFILLS, "negative": negatives.KINDS, "index": INDICES}
        for name, valid in (choices | {"dtype": tuple(DTYPES)}).items():
            if getattr(self, name) not in valid:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(valid)}."
                )
        if self.ray is not None and not _RAY.fullmatch(self.ray):
            raise ValueError(
                f"ray is {self.ray!r}; give local, local:N, auto or a cluster's address HOST:PORT."
            )
        for name, spec in self._engines().items():
            try:
                engines.make_engine(spec, **self.engine_options)
            except ValueError as error:  # without `spec`, which may contain a key
                raise ValueError(f"--{name}: {error}") from error

    def _check_numbers(self) -> None:
        for names, low, high, message in _RANGES:
            for name in names:
                value = getattr(self, name)
                if value is not None and not low <= value <= high:
                    raise ValueError(f"{name} is {value}; {message}")
        if self.share == 0:
            raise ValueError("share is 0.0; it is a share, above 0 and up to 1.")
        if not self.floor < self.ceiling:
            raise ValueError(
                f"floor is {self.floor} and ceiling is {self.ceiling}, which leaves no neighbour; "
                "the floor must be below the ceiling."
            )

    def _check_effects(self) -> None:
        """Check that every setting has an effect."""
        if self.model is not None and self.data is None:
            raise ValueError("--model is given without --data; pass the records to make pairs of.")
        if self.data is not None and self.scenes != 1024:
            raise ValueError("--scenes counts digit scenes and has no effect with --data; drop it.")
        for name in ("format", "image_folder", "answer"):
            if self.data is None and getattr(self, name) != type(self).__dict__[name]:
                raise ValueError(
                    f"--{name.replace('_', '-')} would have no effect: the digit scenes have "
                    "images and responses. Pass --data."
                )
        if self.engine is not None and self.refill != "prompt":
            raise ValueError("engine would have no effect with infill; add --refill prompt.")
        if self.share is not None and self.segments != 1:
            raise ValueError("share and segments both set how much to hide; give one of them.")
        by_engine = self.masker not in MASKERS
        if by_engine and (self.mask or self.segments != 1 or self.share is not None):
            raise ValueError(
                "mask, segments and share are settings of the rules and would have no effect with "
                "an engine as --masker; drop them."
            )
        needs_candidates = self.judge is not None or self.margin or self.similarity != "lexical"
        if self.candidates > 1 and not needs_candidates:
            raise ValueError(
                f"candidates is {self.candidates} and would have no effect: no filter selects "
                "among them. Add --similarity, --margin or --judge."
            )
        if self.candidates > self.k:
            raise ValueError(
                f"candidates is {self.candidates} of {self.k} neighbours; give at most k."
            )
        model_is_used = self.embed_model is None or self.refill == "infill" or self.margin
        if self.model is not None and not model_is_used and self.engine is not None:
            raise ValueError(
                f"model is {self.model!r} and would have no effect: --embed-model embeds, and "
                "--engine refills. Drop it."
            )
        if not any(map(is_endpoint, self._engines().values())):
            for name in _OF_ENDPOINTS:
                if (value := getattr(self, name)) not in (None, type(self).__dict__[name]):
                    raise ValueError(
                        f"{name} is {value} and would have no effect: no engine is an endpoint. "
                        "Drop it, or name a URL for --answer, --masker, --engine or --judge."
                    )

    def _engines(self) -> dict[str, str]:
        """Flag -> engine, of those that are given."""
        specs = {name: getattr(self, name) for name in ("answer", "masker", "engine", "judge")}
        return {n: s for n, s in specs.items() if s is not None and s not in MASKERS}

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
        """The engine that refills; None with infill."""
        return (self.engine or f"transformers:{self.base}") if self.refill == "prompt" else None

    @property
    def response_stage(self) -> str:
        """The stage whose rows hold the chosen responses."""
        return "read" if self.answer is None else "answer"

    @property
    def work_folder(self) -> Path:
        """Folder of the shards."""
        return Path(self.work) if self.work else Path(self.output).with_suffix(".work")

    @property
    def engine_options(self) -> dict[str, Any]:
        """Arguments of `make_engine` besides the name."""
        return {
            "folder": self.work_folder / "engines",
            "batch_size": self.batch_size,
            "dtype": self.dtype,
            **{name: getattr(self, name) for name in _OF_ENDPOINTS},
        }
