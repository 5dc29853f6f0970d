"""Settings of the pairs pipeline. Every field is a flag of `python -m realign.pairs`."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realign.config import check_pixels
from realign.digits import ASSETS
from realign.files import check_apart
from realign.modeling.loading import DTYPES
from realign.modeling.prefetch import default_workers
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
_RANGES = (  # names, minimum, maximum, message
    (
        ("scenes", "k", "reach", "candidates", "shard", "batch_size"),
        1,
        _LARGEST,
        "it must be at least 1.",
    ),
    (("hash_distance",), -1, 63, "it must be from -1 to 63 bits."),
    (("segments", "temperature"), 0, _LARGEST, "it must be finite, and 0 or more."),
    (("max_bad", "keep_target"), 0, 1, "it must be from 0 to 1."),
    (("share",), 0, 1, "it must be above 0 and at most 1."),
    (("ceiling", "tau"), -1, 1, "it must be from -1 to 1."),
    (("seed", "workers"), 0, _LARGEST, "it must be 0 or more."),
)


class DefaultInt(int):
    """An integer setting that nobody has set. It stays recognisable through `replace`."""


class DefaultFloat(float):
    """A fractional setting that nobody has set, like `DefaultInt`."""


@dataclass
class PairsConfig:
    output: str = "runs/pairs.parquet"
    """Parquet file to write. Invalid records are listed in rejected_records.parquet in --work."""
    data: str | None = None
    """File or folder of records with images, prompts and responses, or the name of a data set on
    the Hub, as OWNER/NAME. Without it, scenes of the shipped digits are drawn."""
    split: str | None = None
    """Split of --data, if it has several. "a+b" reads two."""
    format: str = "auto"
    """Format of --data, such as parquet, llava, coco or folder (docs/data.md). auto detects it.
    llava:all and coco:all use every answer or caption, not only the first."""
    image_folder: str | None = None
    """Folder that contains the images and that image paths in --data are relative to. Without it,
    the folder of --data."""
    model: str | None = None
    """Vision-language model that refills masked responses. Without --embed-model it also embeds the
    images. The default is the shipped digits model."""
    embed_model: str | None = None
    """CLIP, SigLIP or sentence-transformers model that embeds the images. Without it, the vision
    tower of --model embeds them."""
    dtype: str = "fp32"
    """Precision of these models: fp32 or bf16. If training uses the same dtype, it finds the
    log-probs of --margin in its reference cache."""
    min_pixels: int | None = None
    """Enlarge smaller images to this number of pixels, for models whose processors count pixels, as
    Qwen's do. It applies to --model and to engines in this process, but not to embeddings."""
    max_pixels: int | None = None
    """Reduce larger images to this number of pixels, for the same models."""
    scenes: int = 1024
    """Number of digit scenes to draw if there is no --data."""
    answer: str | None = None
    """Engine that writes responses for records without one: transformers:MODEL, or the URL of an
    OpenAI-compatible endpoint, http://HOST:PORT/v1#MODEL. Without it, records need a response."""
    keep_target: float = 0.8
    """Share of the records that should give a pair. If a sample of the data keeps less,
    --reach, --ceiling, --candidates and --segments are chosen on that sample. Settings that are
    given stay as they are. 0 chooses nothing."""
    k: int = DefaultInt(10)
    """Number of nearest neighbours to try for each image."""
    reach: int | None = None
    """Number of nearest images among which the --k neighbours are selected. Images whose own
    response lacks a hidden word come first. Without it, --k."""
    index: str = "auto"
    """Index for the search of neighbours: exact, ivf or hnsw. auto is exact up to 200,000 images,
    then ivf."""
    ceiling: float = DefaultFloat(0.999)
    """Images with at least this cosine similarity are duplicates, not neighbours."""
    floor: float = -1.0
    """Images with a cosine similarity below this are not neighbours. -1 sets no limit."""
    hash_distance: int = HASH_DISTANCE
    """Images whose 64-bit perceptual hashes differ in at most this many bits are duplicates. -1
    disables the comparison of hashes."""
    masker: str = "rules"
    """Chooses the words to hide: rules, or an engine as in --answer. The rules are for English."""
    mask: str = ""
    """Kinds of word to hide, separated by commas: numbers, attributes, relations, objects. Empty
    means all of them, or numbers for the digit scenes."""
    segments: int = DefaultInt(1)
    """Number of segments to hide in a response, drawn at random. 0 hides all segments of those
    kinds."""
    share: float | None = None
    """Share of the segments of those kinds to hide, in place of --segments. Without it, --segments
    applies."""
    refill: str = "infill"
    """Completion of masked responses. infill generates only the hidden words and forces the others.
    prompt asks --engine to complete the text."""
    engine: str | None = None
    """Engine for --refill prompt, as in --answer. Without it, --model completes the responses in
    this process."""
    candidates: int = DefaultInt(1)
    """Number of completions of a record that the filters --similarity, --margin and --judge may
    try."""
    temperature: float = 0.0
    """Sampling temperature of the refill. 0 is greedy."""
    tau: float = 1.0
    """Completions with at least this similarity to the chosen response are dropped. 1 drops only
    those with the same words."""
    similarity: str = "lexical"
    """Similarity that --tau limits. lexical is the share of matching words. The name of a
    sentence-transformers model selects the cosine of its embeddings. The paper uses
    all-mpnet-base-v2 with tau 0.95."""
    margin: bool = False
    """Keep only records whose chosen response has a higher log-prob on its own image than on the
    visual negative."""
    judge: str | None = None
    """Engine, as in --answer, that judges the pairs. It drops records whose rejected response is
    true of the image, or whose chosen response is true of the visual negative. Without it, no pair
    is judged."""
    concurrency: int = 8
    """Number of concurrent requests to an endpoint."""
    requests_per_minute: float | None = None
    """Maximum number of requests per minute that each process sends to an endpoint. Without it,
    there is no limit."""
    price_in: float | None = None
    """Price of a million input tokens at an endpoint. With both prices, the cost is estimated
    before the first request."""
    price_out: float | None = None
    """Price of a million output tokens at an endpoint."""
    negative: str = "retrieved"
    """Visual negative: retrieved, the image that the rejected response was completed on. For
    comparisons: random, crop, noise or blank."""
    work: str | None = None
    """Folder of the shards from which a stopped run resumes. Without it, OUTPUT with the suffix
    .work."""
    shard: int = 512
    """Number of records in a shard. An interruption loses at most one shard."""
    max_bad: float = 0.05
    """Maximum share of invalid records. With more, the run stops."""
    batch_size: int = 64
    """Number of images embedded, or records refilled, in one batch."""
    workers: int | None = None
    """Number of threads that decode and preprocess images ahead of the model. 0 means none. Without
    it, the cores of this process, at most 8."""
    ray: str | None = None
    """Run on Ray Data: the address of a cluster, local for all cores of this machine, or local:N
    for N cores. All paths must be the same on every machine. Without it, this process makes all
    shards."""
    seed: int = 0
    """Seed of the scenes, the masks, the sampling and the visual negatives."""
    quiet: bool = False
    """Print only the result, without progress."""

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
                f"output {self.output} is also the work folder; use the suffix .parquet."
            )
        if self.data is not None:
            for flag, path in (("--output", output), ("--work", work)):
                check_apart(flag, path, self.data)
        if unknown := [name for name in self.categories if name not in CATEGORIES]:
            raise ValueError(
                f"mask contains {', '.join(unknown)}; the kinds are {', '.join(CATEGORIES)}."
            )
        choices = {"refill": REFILLS, "negative": negatives.KINDS, "index": INDICES}
        for name, valid in (choices | {"dtype": tuple(DTYPES)}).items():
            if getattr(self, name) not in valid:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(valid)}."
                )
        if self.ray is not None and not _RAY.fullmatch(self.ray):
            raise ValueError(
                f"ray is {self.ray!r}; it must be local, local:N, auto or an address HOST:PORT."
            )
        for name, spec in self._engines().items():
            try:
                engines.make_engine(spec, **self.engine_options)
            except ValueError as error:  # the message omits `spec`, which may contain a key
                raise ValueError(f"--{name}: {error}") from error

    def _check_numbers(self) -> None:
        for names, low, high, message in _RANGES:
            for name in names:
                value = getattr(self, name)
                if value is not None and not low <= value <= high:
                    raise ValueError(f"{name} is {value}; {message}")
        check_pixels(self.min_pixels, self.max_pixels)
        if self.share == 0:
            raise ValueError("share is 0.0; it must be above 0 and at most 1.")
        if not self.floor < self.ceiling:
            raise ValueError(
                f"floor is {self.floor} and --ceiling is {self.ceiling}, which leaves no "
                "neighbour. The floor must be below the ceiling."
            )

    def _check_effects(self) -> None:
        """Rejects settings that would have no effect."""
        if self.model is not None and self.data is None:
            raise ValueError("--model is given without --data. Pass --data with your records.")
        if self.data is not None and self.scenes != 1024:
            raise ValueError("--scenes would have no effect with --data: no scenes are drawn.")
        for name in ("split", "format", "image_folder", "answer"):
            if self.data is None and getattr(self, name) != type(self).__dict__[name]:
                raise ValueError(
                    f"--{name.replace('_', '-')} would have no effect: the digit scenes have "
                    "images and responses. Pass --data."
                )
        if self.engine is not None and self.refill != "prompt":
            raise ValueError("engine would have no effect with infill; add --refill prompt.")
        if self.share is not None and self.segments != 1:
            raise ValueError("--share and --segments both set how much to hide. Give one of them.")
        by_engine = self.masker not in MASKERS
        if by_engine and (self.mask or self.segments != 1 or self.share is not None):
            raise ValueError(
                "--mask, --segments and --share are settings of the rules and would have no effect "
                "with an engine as --masker. Remove them."
            )
        if self.candidates > 1 and not self.chooses_candidates:
            raise ValueError(
                f"candidates is {self.candidates} and would have no effect: no filter chooses "
                "among completions. Add --similarity, --margin or --judge."
            )
        if self.candidates > self.k:
            raise ValueError(
                f"candidates is {self.candidates}, but --k is {self.k}; it must be at most --k."
            )
        if self.reach is not None and self.reach < self.k:
            raise ValueError(
                f"reach is {self.reach}, but --k is {self.k}; it must be at least --k."
            )
        model_is_used = self.embed_model is None or self.refill == "infill" or self.margin
        if self.model is not None and not model_is_used and self.engine is not None:
            raise ValueError(
                f"model is {self.model!r} and would have no effect: --embed-model embeds, and "
                "--engine refills. Remove it."
            )
        if not any(map(is_endpoint, self._engines().values())):
            for name in _OF_ENDPOINTS:
                if (value := getattr(self, name)) not in (None, type(self).__dict__[name]):
                    raise ValueError(
                        f"{name} is {value} and would have no effect: no engine is an endpoint. "
                        "Remove it, or give a URL for --answer, --masker, --engine or --judge."
                    )

    def _engines(self) -> dict[str, str]:
        """Flag -> spec of the engine, for the flags that name one."""
        specs = {name: getattr(self, name) for name in ("answer", "masker", "engine", "judge")}
        return {n: s for n, s in specs.items() if s is not None and s not in MASKERS}

    @property
    def categories(self) -> tuple[str, ...]:
        """The kinds of word to hide."""
        if not self.mask:
            return ("numbers",) if self.data is None else CATEGORIES
        return tuple(name.strip() for name in self.mask.split(",") if name.strip())

    @property
    def chooses_candidates(self) -> bool:
        """Whether a filter chooses among several completions of a record."""
        return self.judge is not None or self.margin or self.similarity != "lexical"

    @property
    def movable(self) -> set[str]:
        """Settings of the neighbours and the masks that nobody has set and that have an effect."""
        names = {"k", "ceiling"}
        names |= {"candidates"} if self.chooses_candidates else set()
        by_rules = self.masker in MASKERS and self.share is None
        names |= {"segments"} if by_rules else set()
        unset = {n for n in names if isinstance(getattr(self, n), DefaultInt | DefaultFloat)}
        return unset - {"k"} | ({"reach"} if "k" in unset and self.reach is None else set())

    @property
    def base(self) -> str:
        """Folder or Hub name of the vision-language model."""
        return self.model or str(ASSETS)

    @property
    def refill_engine(self) -> str | None:
        """The engine that refills, or None with infill."""
        return (self.engine or f"transformers:{self.base}") if self.refill == "prompt" else None

    @property
    def response_stage(self) -> str:
        """Name of the stage whose rows hold the chosen responses."""
        return "read" if self.answer is None else "answer"

    @property
    def work_folder(self) -> Path:
        """Folder of the shards."""
        return Path(self.work) if self.work else Path(self.output).with_suffix(".work")

    @property
    def worker_threads(self) -> int:
        """Number of threads that decode and preprocess images."""
        return default_workers() if self.workers is None else self.workers

    @property
    def pixels(self) -> dict[str, int | None]:
        """The limits on the size of images, as arguments of `load_processor`."""
        return {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}

    @property
    def computed(self) -> str:
        """Dtype and sizes that answers of models in this process depend on, for digests."""
        if self.min_pixels is None and self.max_pixels is None:
            return self.dtype
        return f"{self.dtype}, {self.min_pixels} to {self.max_pixels} pixels"

    @property
    def engine_options(self) -> dict[str, Any]:
        """Keyword arguments of `make_engine`."""
        return {
            "folder": self.work_folder / "engines",
            "batch_size": self.batch_size,
            "dtype": self.dtype,
            "workers": self.worker_threads,
            **self.pixels,
            **{name: getattr(self, name) for name in _OF_ENDPOINTS},
        }
