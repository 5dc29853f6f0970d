"""Export of a trained model as one folder with its card: `python -m realign.export --help`.

python -m realign.export --model runs/rdpo/model --output merged
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
from realign.training.export import export_whole


@dataclass
class ExportConfig:
    model: str | None = None
    """Folder or Hub name of an adapter or a whole model. Required."""
    output: str | None = None
    """Folder to write: merged safetensors, the processor and the model card. Required."""
    dtype: str | None = None
    """Dtype of the written weights. Without it, the dtype of the base."""
    metrics: str | None = None
    """JSON file of figures for the model card. `realign.evaluate --output` writes it: the file of
    the digits, or that of a benchmark, such as pope.json."""

    def __post_init__(self) -> None:
        for name, needed in (("model", "a model"), ("output", "the folder to write")):
            if getattr(self, name) is None:
                raise ValueError(f"--{name} is missing. Give {needed}.")
        if Path(str(self.output)).resolve() == Path.cwd():
            raise ValueError(
                f"--output is {self.output!r}, the current folder, which the export would replace. "
                "Name another folder, such as ./merged."
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}.")


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
            return "\n\n".join(map(markdown, tables_of(scores["scores"])))
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
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
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
        "adapter is merged into its base.",
        example="python -m realign.export --model runs/llava/model --output llava-merged",
        metavars={"output": "FOLDER", "metrics": "FILE", "dtype": tuple(DTYPES)},
        arguments=arguments,
    )["export"]
    folder = export_whole(
        config.model,
        Path(config.output),
        dtype=DTYPES[config.dtype] if config.dtype else None,
        evaluation=evaluation_of(Path(config.metrics)) if config.metrics is not None else None,
    )
    show(f"wrote {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
