"""Export of a trained model as one folder with its card: `python -m realign.export --help`.

python -m realign.export --model runs/rdpo/model --output merged
python -m realign.export --model runs/rdpo/model --output merged --check pairs.parquet
python -m realign.export --model merged --push OWNER/NAME
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from realign.cli import one_line_errors, parse_sections
from realign.evaluate.tables import Table, markdown, tables_of
from realign.files import read_json
from realign.modeling.loading import DTYPES
from realign.terminal import printable, show
from realign.third_party import silence_third_party
from realign.training import push
from realign.training.export import export_whole, missing_card
from realign.training.export_check import check_export, first_records


@dataclass
class ExportConfig:
    model: str | None = None
    """Folder or Hub name of an adapter or a whole model. Required."""
    output: str | None = None
    """Folder to write: merged safetensors, the processor and the model card. Required without
    --push."""
    dtype: str | None = None
    """Dtype of the written weights. Without it, the dtype of the base."""
    metrics: str | None = None
    """JSON file of figures for the model card. `realign.evaluate --output` writes it: the file of
    the digits, or that of a benchmark, such as pope.json."""
    check: str | None = None
    """Pairs to check the written folder with, as in `realign.train --pairs`. An --output that
    exists is checked and not written."""
    split: str | None = None
    """Split of --check, if it has several."""
    image_folder: str | None = None
    """Folder of the images of --check."""
    check_records: int = 8
    """Number of records to check with, the first ones with images."""
    push: str | None = None
    """OWNER/NAME of a repository on the Hub to upload the folder to. Without --output, the folder
    of --model is uploaded as it is. The token is HF_TOKEN, or that of `hf auth login`."""
    private: bool = False
    """Create the repository of --push as a private one."""

    def __post_init__(self) -> None:
        if self.model is None:
            raise ValueError("--model is missing. Give a model.")
        if self.output is None and (self.push is None or self.check is not None):
            raise ValueError("--output is missing. Give the folder to write.")
        if self.output is not None and Path(self.output).resolve() == Path.cwd():
            raise ValueError(
                f"--output is {self.output!r}, the current folder, which the export would replace. "
                "Name another folder, such as ./merged."
            )
        if (
            self.check is not None
            and self.output is not None
            and Path(self.output).resolve() == Path(self.model).resolve()
        ):
            raise ValueError(
                f"--check: --model and --output are the same folder, {self.output}, which would be "
                "compared with itself. Name the model that it was made from in --model."
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}.")
        if self.check_records < 1:
            raise ValueError(f"check_records is {self.check_records}; it must be at least 1.")
        for name, of, used in (
            ("split", "check", self.check is not None),
            ("image_folder", "check", self.check is not None),
            ("check_records", "check", self.check is not None),
            ("private", "push", self.push is not None),
        ):
            if not used and getattr(self, name) != getattr(ExportConfig, name):
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} would have no effect without --{of}. Add --{of}.")
        if not self.writes:
            for name in ("dtype", "metrics"):
                if getattr(self, name) is not None:
                    where = f"{self.output} exists" if self.output else "there is no --output"
                    raise ValueError(
                        f"--{name} would have no effect, since {where} and no folder is written. "
                        "Name a new --output."
                    )

    @property
    def writes(self) -> bool:
        """Whether a folder is written. One that exists is only checked."""
        if self.output is None:
            return False
        folder = Path(self.output)
        return self.check is None or not (folder.is_dir() and any(folder.iterdir()))


def evaluation_of(file: Path) -> str:
    """The figures in a file of `realign.evaluate --output`, as Markdown for a model card.

    Raises:
        ValueError: if the file is missing, or holds other figures.
    """
    try:
        scores = read_json(file)
        if not scores.get("scores", scores):
            raise ValueError("it is empty")
        if "scores" in scores:
            shown = [*map(markdown, tables_of(scores["scores"]))]
            if failed := int(scores["scores"].get("unanswered", 0)):
                shown.append(f"{failed} questions have no answer and are scored as empty answers.")
            return "\n\n".join(shown)
        rows = []
        for name, rate in scores.items():
            value, low, high = (100 * float(rate[key]) for key in ("value", "low", "high"))
            rows.append(
                (printable(name.replace("_", " ")), f"{value:.1f} % [{low:.1f}, {high:.1f}]")
            )
    except FileNotFoundError:
        raise ValueError(
            f"{file} does not exist. Run realign.evaluate with --output to write it."
        ) from None
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{file} holds no figures of `realign.evaluate --output` ({error!r}). Give its JSON "
            "file for digits, or the JSON file of a benchmark, such as pope.json."
        ) from error
    return markdown(Table("", ("on scenes it was not trained on", "share [95 % interval]"), rows))


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns an exit code."""
    silence_third_party()
    config = parse_sections(
        {"export": ExportConfig},
        prog="python -m realign.export",
        usage="%(prog)s --model MODEL --output FOLDER [--config FILE] [options]",
        description="Write a trained model as one folder of safetensors, with its model card. An "
        "adapter is merged into its base. --check compares the folder with the model on records, "
        "and --push uploads it.",
        example="python -m realign.export --model runs/llava/model --output llava-merged",
        metavars={
            "output": "FOLDER",
            "metrics": "FILE",
            "dtype": tuple(DTYPES),
            "check": "PAIRS",
            "image_folder": "FOLDER",
            "push": "OWNER/NAME",
        },
        arguments=arguments,
    )["export"]
    # Everything that can be refused is refused before the merge, which takes minutes.
    target = push.prepare(config.push, private=config.private) if config.push else None
    records = None
    if config.check is not None:
        records = first_records(
            config.check, config.image_folder, config.check_records, split=config.split
        )
    folder = Path(config.output or config.model)
    if target is not None and not config.writes:
        push.check_folder(folder)
    if config.writes:
        export_whole(
            config.model,
            folder,
            dtype=DTYPES[config.dtype] if config.dtype else None,
            evaluation=evaluation_of(Path(config.metrics)) if config.metrics is not None else None,
        )
        show(f"wrote {folder}")
        if line := missing_card(config.model, folder):
            show(line)
    if records is not None:
        for line in check_export(config.model, folder, records):
            show(line)
    if target is not None:
        show(push.upload(target, folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
