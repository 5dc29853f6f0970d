"""CHAIR (arXiv 1809.02156): objects in captions that are not in the image.

- CHAIR-s is the share of captions with at least one such object.
- CHAIR-i is the share of such mentions among all mentions of objects, including repeated ones.

An object is a COCO category, named directly or by a synonym. An image shows the objects of its COCO
instances *or* reference captions. Published figures use the synonyms of the metric's authors. Pass
that file as `synonyms` to compare with them. The list in this package is different, so its figures
only compare two models with each other. The authors' rules apply to both lists:

- Two words are one name if the list has them, or if a rule joins them: a baby bird is a bird.
- Train tracks are not a train, and home plate is not an object.
- If a text has both words "toilet" and "seat", "seat" does not count.

The authors split words and find singulars with two language packages. This module has short rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from realign.evaluate.files import read_captions, read_instances, read_synonyms

OWN_SYNONYMS = Path(__file__).with_name("coco_objects.txt")
OWN = "Re-Align's own list of synonyms, not that of published figures"

_ANIMALS = (
    "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe",
    "animal", "cub",
)  # fmt: skip
_VEHICLES = ("jet", "train")
_NOTHING = ("train track", "home plate")
_WORD = re.compile(r"[^\W_]+(?:[-/][^\W_]+|'(?!s\b)[^\W_]+)*|\S")
"""A word or a mark. man-made and o'clock are one word. "a baby, cats" has no "baby cats"."""
_IRREGULAR = {
    "people": "people", "men": "man", "women": "woman", "children": "child", "geese": "goose",
    "sheep": "sheep", "knives": "knife", "calves": "calf", "skis": "skis", "scissors": "scissors",
    "mice": "mouse", "oxen": "ox", "buses": "bus", "gas": "gas", "glasses": "glass", "bus": "bus",
}  # fmt: skip
_ES = ("ches", "shes", "sses", "xes", "zes")


@dataclass(frozen=True)
class Chair:
    """Figures of captions, shares in [0, 1].

    Attributes:
        captions: number of captions.
        mentions: number of mentions of objects in all captions.
        chair_s: share of captions with an object that the image does not show.
        chair_i: share of mentions of such objects; 0 without mentions.
        recall: share of the shown objects that captions mention.
    """

    captions: int
    mentions: int
    chair_s: float
    chair_i: float
    recall: float


class Vocabulary:
    """Objects by their names and synonyms.

    Args:
        synonyms: a file with a line for each object: its name and synonyms, separated by commas. A
            name of more than two words is found only by its words, as in the authors' code.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: for a file of another kind, or a synonym of two objects.
    """

    def __init__(self, synonyms: str | Path = OWN_SYNONYMS) -> None:
        self._object: dict[str, str] = {}
        for names in read_synonyms(synonyms):
            for name in names:
                key = " ".join(map(singular, name.split()))
                if self._object.setdefault(key, names[0]) != names[0]:
                    raise ValueError(
                        f"{name!r} is a synonym of {self._object[key]!r} and {names[0]!r} in "
                        f"{synonyms}."
                    )
        self.content = sorted(self._object.items())
        self._read = {name: name for name in (*self._object, *_NOTHING) if name.count(" ") == 1}
        for animal in _ANIMALS:  # a baby bird is not a person
            self._read |= {f"baby {animal}": animal, f"adult {animal}": animal}
        self._read |= {f"passenger {vehicle}": vehicle for vehicle in _VEHICLES}
        self._read["toilet seat"] = "toilet"  # not a chair

    def objects(self, text: str) -> list[str]:
        """The objects that a text mentions, in order."""
        words = [singular(word) for word in _WORD.findall(text.lower())]
        names: list[str] = []
        at = 0
        while at < len(words):
            pair = self._read.get(" ".join(words[at : at + 2]))
            names.append(words[at] if pair is None else pair)
            at += 1 if pair is None else 2
        if "toilet" in names:
            names = [name for name in names if name != "seat"]
        return [self._object[name] for name in names if name in self._object]

    def __contains__(self, name: str) -> bool:
        return name in self._object.values()


def singular(word: str) -> str:
    """The singular of an English noun. The rules cover the names of COCO's objects."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(_ES):
        return word[:-2]
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def shown_objects(
    instances: str | Path,
    captions: str | Path,
    vocabulary: Vocabulary,
    images: Iterable[int],
) -> dict[int, set[str]]:
    """Objects that images show, according to COCO's annotations.

    Args:
        instances: JSON file of instances, such as instances_val2014.json.
        captions: JSON file of captions of the same images.
        vocabulary: the objects and their names.
        images: ids of the images.

    Returns:
        Image id -> names of objects.

    Raises:
        FileNotFoundError: if one of the files does not exist.
        ValueError: for a file of another kind, a category that is not in the vocabulary, or an
            image without annotations.
    """
    shown: dict[int, set[str]] = {image: set() for image in images}
    content = read_instances(instances)
    annotated = {image["id"] for image in content["images"]}
    if absent := sorted(set(shown) - annotated):
        raise ValueError(f"{instances} has no image {absent[0]}, but there is a caption of it.")
    names = {}
    for category in content["categories"]:
        objects = vocabulary.objects(category["name"])
        if len(objects) != 1:
            raise ValueError(f"the list of synonyms has no object {category['name']!r}.")
        names[category["id"]] = objects[0]
    for annotation in content["annotations"]:
        if annotation["image_id"] in shown:
            shown[annotation["image_id"]].add(names[annotation["category_id"]])
    for annotation in read_captions(captions):
        if annotation["image_id"] in shown:
            shown[annotation["image_id"]].update(vocabulary.objects(annotation["caption"]))
    return shown


def hallucinated(mentioned: Sequence[str], shown: set[str]) -> list[str]:
    """Mentioned objects that the image does not show."""
    return [name for name in mentioned if name not in shown]


def score(
    captions: Mapping[int, str], shown: Mapping[int, set[str]], vocabulary: Vocabulary
) -> Chair:
    """Score captions.

    Args:
        captions: image id -> text.
        shown: result of `shown_objects` for these images.
        vocabulary: the objects and their names.

    Raises:
        ValueError: without captions.
    """
    if not captions:
        raise ValueError("there are no captions.")
    mentions = wrong_mentions = bad_captions = recalled = present = 0
    for image, text in captions.items():
        mentioned = vocabulary.objects(text)
        absent = hallucinated(mentioned, shown[image])
        mentions += len(mentioned)
        wrong_mentions += len(absent)
        bad_captions += bool(absent)
        recalled += len(set(mentioned) & shown[image])
        present += len(shown[image])
    return Chair(
        captions=len(captions),
        mentions=mentions,
        chair_s=bad_captions / len(captions),
        chair_i=wrong_mentions / mentions if mentions else 0.0,
        recall=recalled / present if present else 0.0,
    )
