"""CHAIR (arXiv 1809.02156): objects that captions name and pictures do not show.

- CHAIR-s is the share of captions with at least one such object.
- CHAIR-i is the share of such mentions among all mentions of objects, repeated ones included.

An object is a COCO category, named by itself or a synonym; a picture shows what COCO's instances
*or* its reference captions name. Published figures come of the list of synonyms that the metric's
authors give out, and of a singular by a natural-language package: pass that file as `synonyms` for
figures to set beside others. The list here is our own and gives figures to compare two models by.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

OWN_SYNONYMS = Path(__file__).with_name("coco_objects.txt")

_ANIMALS = (
    "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe",
    "animal", "cub",
)  # fmt: skip
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
        captions: how many.
        mentions: of objects, in all of them.
        chair_s: share of captions that name an object which is not there.
        chair_i: share of mentions that are of such objects; 0 where no object is mentioned.
        recall: share of the objects shown that captions name.
    """

    captions: int
    mentions: int
    chair_s: float
    chair_i: float
    recall: float


class Vocabulary:
    """Objects by the words for them.

    Args:
        synonyms: a file with a line for each object, its name and synonyms with commas between.

    Raises:
        ValueError: when a word stands for two objects.
    """

    def __init__(self, synonyms: str | Path = OWN_SYNONYMS) -> None:
        self._object: dict[tuple[str, ...], str] = {}
        for line in Path(synonyms).read_text(encoding="utf-8").splitlines():
            names = [name.strip().lower() for name in line.split(",") if name.strip()]
            for name in names:
                key = tuple(singular(word) for word in name.split())
                if self._object.setdefault(key, names[0]) != names[0]:
                    raise ValueError(
                        f"{name!r} stands for {self._object[key]!r} and {names[0]!r} in {synonyms}."
                    )
        for animal in _ANIMALS:  # a baby bird is no person
            for before in ("baby", "adult"):
                self._object[before, animal] = self._object.get((animal,), "")
        for vehicle in ("jet", "train"):
            self._object["passenger", vehicle] = self._object.get((vehicle,), "")
        self._object["toilet", "seat"] = self._object.get(("toilet",), "")  # no chair
        self._longest = max(map(len, self._object))

    def objects(self, text: str) -> list[str]:
        """The objects that a text mentions, in order; the longest name counts."""
        words = [singular(word) for word in re.findall(r"[^\W_]+", text.lower())]
        found, at = [], 0
        while at < len(words):
            for length in range(self._longest, 0, -1):
                name = self._object.get(tuple(words[at : at + length]))
                if name is not None and at + length <= len(words):
                    found += [name] if name else []
                    at += length
                    break
            else:
                at += 1
        return found

    def __contains__(self, name: str) -> bool:
        return name in self._object.values()


def singular(word: str) -> str:
    """The singular of an English noun, by rules that cover the names of COCO's objects."""
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
    """What pictures show, by COCO's annotations.

    Args:
        instances: instances JSON, as instances_val2014.json.
        captions: captions JSON of the same pictures.
        vocabulary: the objects.
        images: ids of the pictures wanted.

    Returns:
        Image id -> names of objects.

    Raises:
        ValueError: for a category that the vocabulary lacks, or a picture without annotations.
    """
    shown: dict[int, set[str]] = {image: set() for image in images}
    content = json.loads(Path(instances).read_text(encoding="utf-8"))
    known = {image["id"] for image in content["images"]}
    if absent := sorted(set(shown) - known):
        raise ValueError(f"{instances} has no image {absent[0]}, of which there is a caption.")
    names = {}
    for category in content["categories"]:
        found = vocabulary.objects(category["name"])
        if len(found) != 1:
            raise ValueError(f"the list of synonyms has no object {category['name']!r}.")
        names[category["id"]] = found[0]
    for annotation in content["annotations"]:
        if annotation["image_id"] in shown:
            shown[annotation["image_id"]].add(names[annotation["category_id"]])
    for annotation in json.loads(Path(captions).read_text(encoding="utf-8"))["annotations"]:
        if annotation["image_id"] in shown:
            shown[annotation["image_id"]].update(vocabulary.objects(annotation["caption"]))
    return shown


def hallucinated(mentioned: Sequence[str], shown: set[str]) -> list[str]:
    """Those of the mentioned objects that are not there."""
    return [name for name in mentioned if name not in shown]


def score(
    captions: Mapping[int, str], shown: Mapping[int, set[str]], vocabulary: Vocabulary
) -> Chair:
    """Score captions.

    Args:
        captions: image id -> text.
        shown: `shown_objects` of these images.
        vocabulary: the objects.

    Raises:
        ValueError: where there are no captions.
    """
    if not captions:
        raise ValueError("there are no captions.")
    mentions = wrong = bad = named = there = 0
    for image, text in captions.items():
        mentioned = vocabulary.objects(text)
        false = hallucinated(mentioned, shown[image])
        mentions += len(mentioned)
        wrong += len(false)
        bad += bool(false)
        named += len(set(mentioned) & shown[image])
        there += len(shown[image])
    return Chair(
        captions=len(captions),
        mentions=mentions,
        chair_s=bad / len(captions),
        chair_i=wrong / mentions if mentions else 0.0,
        recall=named / there if there else 0.0,
    )
