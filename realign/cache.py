"""Commands of the reference cache: compute log-probs before training, and maintain their tables.

The commands of `python -m realign.cache` are `fill`, `stats`, `verify` and `compact` (`COMMANDS`).
`python -m realign.train` fills the cache before its first step. A separate `fill` can use other
machines, or prepare for several runs. The ranks of torchrun or --nproc-per-node share its work.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realign import distributed
from realign.cli import CommandParser, parse_sections
from realign.config import METAVARS, check_pixels, check_quantize, resolve_dtype
from realign.digits import ASSETS
from realign.files import check_folder
from realign.loss_config import LOSS_SETTINGS, LossConfig
from realign.modeling import reference_logps
from realign.modeling.attention import IMPLEMENTATIONS, choose
from realign.modeling.loading import DTYPES
from realign.terminal import show
from realign.third_party import silence_third_party
from realign.training import fsdp
from realign.training.setup import load_inputs, shared_fingerprint
from realign_kernels import ReferenceCache, missing_reason, objectives, refcache

COMMANDS = {
    "fill": "Compute the reference log-probs that training on these pairs needs",
    "stats": "List the tables and their counts",
    "verify": "Read every record again, and fail if one is unreadable",
    "compact": "Merge log files, and drop duplicates and unreadable records",
}
"""Command -> summary."""
_HELP: dict[str, dict[str, Any]] = {
    "fill": {
        "usage": "%(prog)s --pairs PATH [--config FILE] [options]",
        "example": "python -m realign.cache fill --model llava-hf/llava-1.5-7b-hf \\\n"
        "    --pairs pairs.parquet",
    }
}


@dataclass
class CacheConfig:
    reference_cache: str | None = None
    """Folder of the tables. Without it, $REALIGN_CACHE/reference or ~/.cache/realign/reference."""

    @property
    def directory(self) -> Path:
        """Folder of the tables: the setting, or the default folder."""
        return Path(self.reference_cache or reference_logps.default_directory())

    def tables(self) -> dict[Path, dict[str, str]]:
        """Fingerprint of each table in the folder, by the table's folder.

        Raises:
            ValueError: if the folder does not exist.
        """
        if self.reference_cache and not self.directory.is_dir():
            raise ValueError(f"there is no folder {self.directory}. Check --reference-cache.")
        tables = refcache.tables(self.directory)
        if not tables:
            show(f"no tables in {self.directory}")
        return tables


@dataclass
class FillConfig:
    pairs: str | None = None
    """Parquet file, or folder of such files, of preference pairs. Required."""
    split: str | None = None
    """Split of --pairs, for a name on the Hub or a folder of several splits."""
    image_folder: str | None = None
    """Folder that contains the images and that image paths in --pairs are relative to. An image
    outside of it is an error. Without it, the folder of --pairs."""
    model: str | None = None
    """Folder or Hub name of the reference model. Without it, the shipped digits model is used."""
    objective: str = "rdpo"
    """Objective that will be trained. It determines which responses are needed under which
    images."""
    dtype: str = "auto"
    """Precision of the computation, the same as in training. 'auto' is 'bf16' on CUDA and 'fp32' on
    a CPU."""
    quantize: str | None = None
    """Quantization of the language model, '4bit' or '8bit', the same as in training."""
    attention: str = "tree"
    """Attention of the language model, the same as in training, where 'auto' is 'tree'."""
    min_pixels: int | None = None
    """Enlarge smaller images to this number of pixels, the same as in training."""
    max_pixels: int | None = None
    """Reduce larger images to this number of pixels, the same as in training."""
    max_response_tokens: int = 1024
    """Longest response, in tokens. A longer response is an error and is never truncated."""
    workers: int | None = None
    """Threads of each rank that decode and preprocess images. 0 uses the thread that builds
    batches. Without it, the rank's cores but one, from 1 to 8."""
    row_tokens: int = 0
    """Maximum number of tokens in a row of the forest. 0 selects the length of the longest tree."""
    batch_rows: int = 32
    """Rows in one forward pass."""
    fsdp: bool = False
    """Shard the model over the ranks, for a model that does not fit on one GPU."""
    nproc_per_node: int = 0
    """Workers to start on this machine. 0 uses this process only, or the ranks of torchrun."""
    quiet: bool = False
    """Print no progress."""

    def __post_init__(self) -> None:
        if self.pairs is None:
            raise ValueError("pairs is missing. Pass the training file.")
        self.dtype = resolve_dtype(self.dtype)
        check_pixels(self.min_pixels, self.max_pixels)
        check_quantize(self.quantize, sharded=self.fsdp)
        if self.attention not in IMPLEMENTATIONS:
            names = ", ".join(IMPLEMENTATIONS)
            raise ValueError(f"attention is {self.attention!r}; it must be one of {names}.")
        least_of = {"max_response_tokens": 1, "batch_rows": 1, "row_tokens": 0, "nproc_per_node": 0}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {least} or more.")
        if not self.loss.build().needs_reference:
            raise ValueError(f"--objective {self.objective} needs no reference log-probs.")

    @property
    def loss(self) -> LossConfig:
        """The loss of the objective. Its settings do not change the log-probs."""
        if "+" not in self.objective:
            return LossConfig(objective=self.objective)
        known = objectives.settings(self.objective)
        settings = {name: known[name] for name in LOSS_SETTINGS if name in known}
        return LossConfig(objective=self.objective, **settings)


def fill(tables: CacheConfig, config: FillConfig) -> None:
    """Compute the reference log-probs that training on these pairs will need."""
    check_folder("--reference-cache", tables.directory)
    assert config.pairs is not None  # checked in __post_init__
    dtype = DTYPES[config.dtype]
    device = distributed.start(single=config.fsdp)
    attends, reason = choose(config.attention, device, dtype)
    progress = not config.quiet and distributed.rank() == 0
    inputs = load_inputs(
        config.model or str(ASSETS),
        config.pairs,
        config.loss,
        image_folder=config.image_folder,
        split=config.split,
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
        dtype=dtype,
        weights_dtype=dtype,
        attention=attends,
        train_vision=False,
        meta=config.fsdp and distributed.rank() > 0,  # weights come from rank 0
        quantize=config.quantize,
        max_response_tokens=config.max_response_tokens,
        progress=progress,
        workers=distributed.workers_of_rank(config.workers),
    )
    model = inputs.model.eval()
    if config.fsdp:
        fingerprint = shared_fingerprint(inputs, device)
        fsdp.shard(model, device, dtype)
    else:  # each rank digests its own weights, and `fill` compares the fingerprints
        fingerprint = reference_logps.fingerprint(
            model.vlm, inputs.processor, dtype, device, quantize=config.quantize
        )
        model.to(device)
    distributed.mark_ranks_diverged()
    if reason:
        distributed.log_rank0(reason)
    for line in model.check_forest(inputs.examples[0], inputs.store, device):
        distributed.log_rank0(line)
    with ReferenceCache.open(tables.directory, fingerprint) as cache:
        reference_logps.fill(
            cache,
            model,
            inputs.examples,
            inputs.store,
            row_tokens=config.row_tokens or inputs.examples.longest_tree,
            batch_rows=config.batch_rows,
            device=device,
            progress=progress,
        )


def stats(tables: CacheConfig) -> int:
    """Print all tables with their counts. Returns the number of unreadable records."""
    unreadable = 0
    for folder, parts in tables.tables().items():
        show(folder)
        parts_text = ", ".join(f"{name} {_short(value)}" for name, value in parts.items())
        show(f"  {parts_text or 'no description (the next run that adds records writes it)'}")
        try:
            counts = refcache.inspect(folder)
        except (ValueError, OSError) as error:
            show(f"  the table cannot be read: {error}")
            unreadable += 1
            continue
        show(
            f"  {counts['records']:,} log-probs in {_files(counts['logs'])}, "
            f"{counts['bytes']:,} bytes, {counts['duplicates']:,} duplicates"
        )
        if counts["conflicts"]:
            show(
                f"  {counts['conflicts']:,} duplicates differ, by at most "
                f"{counts['largest_difference']:.2g} (the log with the lowest name is used)"
            )
        if counts["bad"] or counts["torn_bytes"]:
            show(
                f"  {counts['bad']:,} unreadable records and {counts['torn_bytes']:,} bytes of "
                "incomplete records are skipped"
            )
        unreadable += counts["bad"]
    return unreadable


def compact(tables: CacheConfig) -> int:
    """Rewrite all tables without duplicates and unreadable records.

    Returns the number of tables that cannot be read.
    """
    unreadable = 0
    for folder in tables.tables():
        try:
            counts = refcache.compact(folder)
        except (ValueError, OSError) as error:
            show(f"{folder}: the table cannot be read: {error}")
            unreadable += 1
            continue
        what = f"{counts['logs_merged']} log(s) merged"
        if missing_reason():  # without the extension, hence without logs
            what = _files(int(counts["bytes_before"] > 0))
        show(
            f"{folder}: {what}, {counts['bytes_before']:,} -> "
            f"{counts['bytes_after']:,} bytes, {counts['bad_dropped']:,} unreadable records dropped"
        )
        if counts["logs_in_use"]:
            show(f"  {counts['logs_in_use']} log(s) are in use and were skipped")
        if counts["logs_skipped"]:
            show(
                f"  {counts['logs_skipped']} log(s) of other users, or files that are no logs, stay"
            )
    return unreadable


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of fill, stats, verify, compact. Returns an exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command, flags = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        show(_parser().format_help(), end="")
        return 0
    if command not in COMMANDS:
        show(
            f"error: unknown command {command!r}. The commands are {', '.join(COMMANDS)}.",
            error=True,
        )
        return 1
    silence_third_party()
    sections = {"cache": CacheConfig} | ({"fill": FillConfig} if command == "fill" else {})
    try:
        settings = parse_sections(
            sections,
            prog=f"python -m realign.cache {command}",
            description=COMMANDS[command] + ".",
            arguments=flags,
            **_HELP.get(command, {"example": f"python -m realign.cache {command}"}),
            headings={"reference_cache": "Cache"},
            metavars=METAVARS | {"attention": tuple(IMPLEMENTATIONS)},
        )
        if command == "fill":
            workers = settings["fill"].nproc_per_node
            if workers and not distributed.under_launcher():
                return distributed.launch("realign.cache", arguments, workers)
            fill(settings["cache"], settings["fill"])
        elif command == "compact":
            if unreadable := compact(settings["cache"]):
                raise ValueError(f"{unreadable} table(s) cannot be read. The others are done.")
        elif stats(settings["cache"]) and command == "verify":
            show(
                "error: there are unreadable records. The next run computes these log-probs again. "
                "`python -m realign.cache compact` removes the records.",
                error=True,
            )
            return 1
    except (ValueError, OSError, RuntimeError) as error:
        if not distributed.report(error):
            raise
        return 1
    finally:
        distributed.stop()
    return 0


def _parser() -> CommandParser:
    """Parser of the command's own --help. Each subcommand parses its own flags."""
    return CommandParser(
        prog="python -m realign.cache",
        usage="%(prog)s COMMAND [options]",
        description="Compute reference log-probs before training, and maintain their tables. "
        "`COMMAND --help` lists the options of a command.",
        commands=COMMANDS,
        example="python -m realign.cache stats",
    )


def _files(count: int) -> str:
    """Number and kind of a table's files."""
    if missing_reason() is None:
        return f"{count} log(s)"
    return f"{count or 'no'} database"


def _short(value: str) -> str:
    """The first 8 digits of a digest, or any other value in full."""
    is_digest = len(value) == 32 and not set(value) - set("0123456789abcdef")
    return value[:8] if is_digest else value


if __name__ == "__main__":
    distributed.exit_rank(main())
