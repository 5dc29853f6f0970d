"""English word lists of the rule-based masker, for captions and answers about images.

`segments.py` uses them. Words are lower case; a phrase has spaces between its words.
"""

from __future__ import annotations


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


NUMBERS = _set(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety "
    "hundred hundreds thousand thousands million dozen dozens several many few single half"
)
NUMBER_PHRASES = (
    "a couple of",
    "a pair of",
    "couple of",
    "pair of",
    "a dozen",
    "a few",
    "a lot of",
    "a number of",
    "a single",
    "dozens of",
    "hundreds of",
    "lots of",
    "pairs of",
)

ATTRIBUTES = _set(
    # colours
    "red orange yellow green blue purple violet pink brown black white gray grey gold golden "
    "silver tan beige maroon teal turquoise navy blond blonde dark light bright pale colorful "
    "colourful colorless colored coloured multicolored "
    # sizes, shapes
    "big bigger biggest small smaller smallest large larger largest little tiny huge giant massive "
    "tall taller tallest short shorter long longer longest wide narrow thick thin high low deep "
    "shallow round square rectangular circular oval flat curved straight steep slim fat "
    # materials, patterns
    "wooden wood metal metallic glass plastic brick stone concrete leather ceramic cardboard paper "
    "paved tiled sandy grassy rocky snowy striped checkered plaid dotted spotted furry fluffy "
    "hairy shiny "
    # states, ages, looks
    "first second third last old older young younger new adult elderly modern antique vintage "
    "clean dirty dusty messy tidy empty full open closed broken wet dry hot cold warm cool fresh "
    "ripe raw busy quiet crowded cloudy sunny rainy foggy clear bare barefoot shirtless bald "
    "bearded male female happy sad angry calm beautiful pretty cute ornate fancy plain similar "
    "different same sharp soft asleep awake alone electric electronic professional casual formal "
    "wild domestic lush"
)
ATTRIBUTES_OR_NOUNS = _set(
    "light orange gold silver square glass metal wood brick stone plastic leather paper adult"
)
"""Attributes that are nouns if no noun follows: "an orange on a plate"."""

PREPOSITIONS = _set(
    "above across against along alongside amid among around atop behind below beneath beside "
    "besides between beyond facing in inside into near nearby off on onto opposite outside over "
    "past through throughout toward towards under underneath upon within"
)
POSITIONS = _set(
    "left right top bottom front back rear upper lower middle center centre central leftmost "
    "rightmost background foreground"
)
"""Positions in the image or on an object; part of a noun phrase before a noun: "the top shelf"."""

_SIDES = _set("left right left-hand right-hand other far near opposite front back")
_PARTS = _set(
    "top bottom left right front back side end edge corner center centre middle rear base foot"
)
RELATION_PHRASES = (
    *(f"{how} the {side} side{of}" for how in ("on", "to", "at") for side in _SIDES
      for of in (" of", "")),
    *(f"{how} the {part} of" for how in ("on", "to", "at", "in", "near", "along")
      for part in _PARTS),
    *(f"{how} the {part}" for how in ("on", "to", "at", "in") for part in (
        "left", "right", "top", "bottom", "front", "back", "middle", "center", "centre", "side",
        "rear", "far left", "far right", "background", "foreground", "distance")),
    *(f"{how} the {a} {b}{c}" for how in ("in", "on", "at", "to")
      for a in ("top", "bottom", "upper", "lower", "far", "near")
      for b in ("left", "right", "center", "middle") for c in (" corner of", " corner", "")),
    "across from", "adjacent to", "ahead of", "apart from", "attached to", "away from", "back to",
    "close to", "closer to", "connected to", "covered by", "covered in", "covered with",
    "face to face", "far from", "full of", "in back of", "in between", "in front", "in front of",
    "in line with", "inside of", "leaning against", "leaning on", "left of", "next to", "off of",
    "on either side of", "on both sides of", "on each side of", "on board", "on top", "on top of",
    "out of", "outside of", "right of", "side by side", "surrounded by", "to the side of",
    "together with", "upside down", "up against",
)  # fmt: skip

DETERMINERS = _set(
    "a an the this that these those his her hers its their my your our another each every either "
    "neither"
)

IMAGE_PHRASES = tuple(
    f"{how} {the} {image}"
    for how in ("in", "of", "within", "throughout")
    for the in ("the", "this", "an", "each", "that")
    for image in ("image", "picture", "photo", "photograph", "scene", "frame", "shot", "view")
)
"""Phrases about the image itself; they are not masked."""

OTHER_WORDS = _set(
    # pronouns
    "i you he she it we they me him us them himself herself itself themselves one's oneself "
    "someone somebody something anyone anything everyone everything nobody nothing none others "
    "other both all some any most more less much enough such own "
    # auxiliaries
    "am is are was were be been being has have had having do does did done can could will would "
    "shall should may might must isn't aren't wasn't weren't don't doesn't didn't can't cannot "
    "couldn't won't there's it's that's he's she's they're "
    # conjunctions, prepositions without a place, adverbs
    "and or but nor so yet if then than because since while when where who whom whose which what "
    "why how although though as at by for from of to with without about after before during until "
    "like unlike via per except up down out away not no yes just only also too very quite rather "
    "really almost nearly perhaps maybe possibly likely still again ever never always often "
    "sometimes now here there together apart however therefore thus moreover instead well even "
    "least next able due along ago overall "
    # of images and of speech
    "image images picture pictures photo photos photograph photographs scene scenes view kind "
    "kinds type types sort way case fact part presence addition"
)

_VERBS = _set(
    "add adjust aim allow appear approach arrange ask attach balance bend blow board brush bring "
    "build buy call capture carry cast catch chase chat check climb come compete consist contain "
    "convey cook create cross cut dance describe depict dig dine display dive do drink drive eat "
    "emphasize engage enjoy enter examine explore extend face fall feature feed feel fill find "
    "float fly focus follow gather gaze get give go graze greet grow guide hang happen help hit "
    "hold include indicate involve jump keep kick kneel know laugh lay lead lean leap learn let "
    "lie lift listen load look make meet move notice observe occupy offer overlook participate "
    "pass perform perch pet pick place play point pose pour prepare present protect provide pull "
    "push put race rain reach read relax remain rest ride roll row run sail say see seem sell "
    "serve set shine show sip sit skate skateboard ski sleep slice slide smile smoke sniff speak "
    "spread stack stand stare start stay stick stop stretch suggest surf surround swim swing take "
    "talk tell throw tie touch travel try turn use visit wait walk want wash watch wave wear work "
    "write"
)
_IRREGULAR = _set(
    "ate eaten began blew blown bought brought built came caught drank drawn drew driven drove fed "
    "fell fallen felt flew flown found gave given gone went got grew grown held hung kept knelt "
    "laid lain lit lying made met paid ran rode ridden said sat saw seen sold shown slept slid "
    "spoke stood stuck swam swum swung taken told took threw thrown tied tying wore worn wrote "
    "written dying"
)
_THINGS_ING = _set(
    "awning bedding building ceiling clothing crossing covering curing drawing dumpling duckling "
    "earring evening fencing flooring frosting icing king landing lightning lighting lodging "
    "morning offspring opening painting paneling pudding railing ring roofing seating serving "
    "setting sibling siding sling spring sting string stuffing thing things topping wedding wing "
    "writing"
)
_PLACES_ING = _set("living dining swimming cutting parking washing skating baking shopping sewing")
_THINGS_ED = _set("bed beds red shed sled seed weed breed speed steed feed reed moped")
NO_VERBS = _PLACES_ING | _THINGS_ED | _THINGS_ING | {word + "s" for word in _THINGS_ING}
"""Nouns in -ing or -ed, and words in -ing before a noun: "dining table"."""
NO_ADVERBS = _set(
    "family fly belly jelly butterfly lily assembly ally dragonfly italy july friendly"
)


def _forms(verb: str) -> list[str]:
    """A verb's regular forms."""
    if verb.endswith("e"):
        return [verb, verb + "s", verb + "d", verb[:-1] + "ing"]
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return [verb, verb[:-1] + "ies", verb[:-1] + "ied", verb + "ing"]
    third = verb + ("es" if verb.endswith(("s", "sh", "ch", "x", "o")) else "s")
    twice = verb + verb[-1]
    return [verb, third, verb + "ed", verb + "ing", twice + "ed", twice + "ing"]


VERBS = _IRREGULAR.union(*map(_forms, _VERBS))
