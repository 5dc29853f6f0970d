"""Report of the demo, report.png: rates, training curves, pairs, captions before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from realign.data.records import Record
from realign.digits.scenes import PLACES, WORDS, digits_in
from realign.evaluate import Rate

_COLOURS = {"base": "#888888", "dpo": "#d1791f", "rdpo": "#1f6fb4"}


@dataclass(frozen=True)
class Captions:
    """Captions of a test scene before and after training."""

    image: Image.Image
    truth: str
    before: str
    after: str


def draw(
    path: Path,
    results: Mapping[str, Mapping[str, Rate]],
    logs: Mapping[str, Sequence[Mapping[str, float]]],
    pairs: Sequence[Record],
    examples: Sequence[Captions],
) -> None:
    """Draw and save the report.

    Args:
        path: PNG file to write.
        results: model name -> metric -> rate.
        logs: objective -> entries of its metrics.jsonl.
        pairs: training pairs to show, three at most.
        examples: test scenes to show, three at most.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(15, 7.5), layout="constrained")
    grid = figure.add_gridspec(3, 1, height_ratios=[1.9, 0.8, 0.8])
    top = grid[0].subgridspec(1, 3)
    _rates(figure.add_subplot(top[0]), results)
    _curves(figure.add_subplot(top[1]), logs, "margins", "reward margin (beta x nats)")
    _curves(figure.add_subplot(top[2]), logs, "accuracies", "share of pairs ranked right")
    _pairs(figure, grid[1].subgridspec(1, 9, width_ratios=[1, 1, 2.2] * 3), pairs)
    _examples(figure, grid[2].subgridspec(1, 6, width_ratios=[1, 3.2] * 3), examples)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _rates(axes, results) -> None:
    names = list(results)
    rates = [results[name]["hallucination_rate"] for name in names]
    values = [100 * r.value for r in rates]
    spread = [
        [100 * (r.value - r.low) for r in rates],
        [100 * (r.high - r.value) for r in rates],
    ]
    colours = [_COLOURS[name.split()[0]] for name in names]
    axes.bar(names, values, yerr=spread, color=colours, capsize=4)
    for i, rate in enumerate(rates):
        axes.text(i, 100 * rate.high + 0.8, f"{100 * rate.value:.1f} %", ha="center")
    axes.set_ylabel("digits misnamed in captions (%)")
    axes.set_title("Hallucination on unseen scenes, 95 % CI")
    axes.set_ylim(0, 1.15 * max(100 * r.high for r in rates) + 1)
    axes.tick_params(axis="x", rotation=20 if len(names) > 3 else 0)


def _curves(axes, logs, metric: str, label: str) -> None:
    for name, entries in logs.items():
        steps = [entry["step"] for entry in entries]
        for side, style in (("", "-"), ("visual_", "--")):
            key = f"rewards/{side}{metric}"
            if key in entries[0]:
                kind = "image" if side else "text"
                values = [entry[key] for entry in entries]
                axes.plot(steps, values, style, color=_COLOURS[name], label=f"{name}, {kind} pair")
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.set_title(f"Training: {metric}")
    axes.legend(frameon=False)


def _pairs(figure, grid, pairs: Sequence[Record]) -> None:
    for i, pair in enumerate(pairs):
        groups = (pair.images, pair.retrieved_images)
        image, retrieved = (group[0].open(pair.name) for group in groups)
        _image(figure.add_subplot(grid[3 * i]), image, "image")
        _image(figure.add_subplot(grid[3 * i + 1]), retrieved, "retrieved")
        text = figure.add_subplot(grid[3 * i + 2])
        _words(text, {"chosen": pair.chosen, "rejected": pair.rejected}, pair.chosen)


def _examples(figure, grid, examples: Sequence[Captions]) -> None:
    for i, example in enumerate(examples):
        _image(figure.add_subplot(grid[2 * i]), example.image, "caption changed")
        text = figure.add_subplot(grid[2 * i + 1])
        captions = {"truth": example.truth, "before": example.before, "after rdpo": example.after}
        _words(text, captions, example.truth)


def _image(axes, image: Image.Image, title: str) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.axis("off")


def _words(axes, captions: Mapping[str, str], truth: str) -> None:
    """Draw the digits that captions name, one line for each place; wrong digits are red."""
    axes.axis("off")
    columns = {"": PLACES} | {
        name: ["?" if digit is None else WORDS[digit] for digit in digits_in(text)]
        for name, text in captions.items()
    }
    right = [None if digit is None else WORDS[digit] for digit in digits_in(truth)]
    for column, (name, words) in enumerate(columns.items()):
        x = 0.02 + (column and 0.22 + 0.72 * column / len(columns))
        place = {"fontsize": 9, "va": "center", "transform": axes.transAxes}
        axes.text(x, 0.74, name, weight="bold", **place)
        for row, (word, true) in enumerate(zip(words, right, strict=True)):
            colour = "#666666" if not column else "black" if word == true else "crimson"
            axes.text(x, 0.62 - 0.11 * row, word, color=colour, **place)
