"""Functions of the lmms-eval task in digits.yaml: image and score of a question."""

from pathlib import Path

from PIL import Image


def images(doc):
    """The image of a question, from digits/ in the working folder."""
    return [Image.open(Path("digits") / doc["image"]).convert("RGB")]


def score(doc, results):
    """1 for the right answer, as in lmms-eval's POPE."""
    return {"digits_accuracy": float(results[0].strip().lower() == doc["label"])}
