"""Made answers to benchmarks, to compare our scorers with the official ones.

`official.json` holds what the official scorers gave for exactly these answers.
"""

import random

COUNT = 500
ARTICLES = ("", "", "a ", "the ")
OPTIONS = (
    {"A": "Red", "B": "Dark blue", "C": "Green", "D": "Blue"},
    {"A": "Yes", "B": "No"},
    {"A": "A cat", "B": "A dog", "C": "A cat and a dog", "D": "None of the above", "E": "7"},
    {"A": "", "B": "", "C": "", "D": ""},
    {"A": "The left one", "B": "The right one", "C": "Both", "D": "Neither"},
)
LETTERS = (
    "{l}", "{l}.", "({l})", "{l}. {t}", "({l}) {t}", "{t}", "{t}.", "{tl}", "Answer: {l}",
    "The answer is {l}.", "The correct answer is **{l}**. It is large and easy to see in it.",
    "the answer is {ll}", "Option {l}", "{l}: {t}", "[{l}]", "**{l}**", "#{l}#",
    "{l}, because it is",
    "I think that it is {l}", "I think that {l} is right, since the thing is there",
    "{l} or {m}", "{t} or {u}", "A man is in front of it, so {l}", "It is {tl}, not {ul}", "Z", "",
    "I cannot see it.", "Cannot determine the answer {l}", "{l}{m}", "'{l}'", "{ll}",
    "The answer is{l}", "There is no option that fits. The answer is {l} or {m}",
    "{t} {t} {t} and a long answer with many words that never ends, which is not a choice at all",
    "I'm sorry, but without the image provided it is {l}", "Answer is ({l})", "{l}/{m}", "{l}-{t}",
    "{l} is what I think", "{l} is my answer", "Z, it is {tl}",
)  # fmt: skip
YES_NO = (
    "Yes", "No", "yes", "no", "Yes.", "No.", "yes, there is", "No, there is not", "YES", "NO",
    "There is no dog", "Nothing", "Now", "The yes", "Not yes", "Yesterday", "y", "n", "None",
    " yes", "Yes and no", "I do not know", "No: it is", "**Yes**", "**No**", "", "noyes", "Eyes",
    "Yes!", "It is, yes", "Unknown", "1,000 yes", "a no-go", "not sure", "yes/no", "No?", "(No)",
    "no;yes",
)  # fmt: skip
VQA = (
    "red", "a red car", "the red car", "Red", "two", "2", "2.", "2.5", "1,000", "1000",
    "dont know",
    "don't know", "unanswerable", "Unanswerable", "yes", "no", "none", "0", "coca-cola",
    "coca cola",
    "12:30", "3/4", "john's", "johns", "it is red.", "stop sign", "stop-sign", "stop  sign",
    "$5.00",
    "$ 5.00", "5%", "A", "an", "what?", "what ?", "u.s.a.", "usa", "ten", "(left)", "left ;right",
    "line\nbreak", "tab\tstop", "cant", "wouldnt've", "somebody'd", "o'clock".replace("'", ""),
    "\"quoted\"", "e-mail",
    "hello!", "hello ! you", "[x]", "x = 1", "a.b", "9.", ".5", "shes",
    "you're".replace("'", ""), "yall'll",
)  # fmt: skip
RELATION = {
    "person": ["people", "man", "woman"],
    "man": [],
    "dog": ["puppy"],
    "tree": ["forest", "bush"],
    "forest": ["tree", "bush"],
    "sky": [],
    "grass": ["ground"],
    "ground": ["floor"],
    "car": ["vehicle"],
    "cloud": [],
    "bird": ["dove", "eagle"],
    "light": [],
    "orange": [],
}
SAFE = ("orange", "light")
SIMILAR = {frozenset(pair) for pair in (("man", "woman"), ("car", "truck"), ("dove", "cloud"))}
WORDS = sorted({"truck", "nice", "runs", "blue", *RELATION, *sum(RELATION.values(), [])})
STATES = ("state", "number", "action")
TYPES = (*(f"discriminative-attribute-{state}" for state in STATES), "discriminative-hallucination")
TYPES = (*TYPES, "relation", "discriminative-relation")
MME_CATEGORIES = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark",
    "artwork", "OCR", "commonsense_reasoning", "numerical_calculation", "text_translation",
    "code_reasoning",
)  # fmt: skip


def letters() -> list[tuple[str, dict[str, str], str]]:
    """(answer, options, label) of multiple-choice questions."""
    draw = random.Random(1)
    made = []
    for number in range(COUNT):
        options = OPTIONS[number % len(OPTIONS)]
        letter, other = draw.sample(list(options), 2)
        text, second = options[letter], options[other]
        words = {"l": letter, "ll": letter.lower(), "m": other, "t": text, "u": second}
        words |= {"tl": text.lower(), "ul": second.lower()}
        answer = LETTERS[draw.randrange(len(LETTERS))].format(**words)
        made.append((answer, options, draw.choice([letter, letter, other])))
    return made


def rotated() -> list[dict]:
    """Rows of MMBench: 125 questions in up to four rotations."""
    made = letters()
    rows = []
    for number in range(COUNT):
        answer, options, label = made[number]
        question = number // 4
        if number % 4 and number % 3:
            answer = label  # or no question would have only right rotations
        rows.append({"index": question + 1 + 1_000_000 * (number % 4), "answer": answer})
        rows[-1] |= {"options": options, "label": label}
    return rows


def yes_no() -> list[tuple[str, str]]:
    """(answer, label) of yes/no questions."""
    draw = random.Random(2)
    made = []
    for _ in range(COUNT):
        label = draw.choice(["yes", "no"])
        plain = draw.random() < 0.6
        answer = label if plain and draw.random() < 0.7 else draw.choice(YES_NO)
        made.append((answer.capitalize() if plain else answer, label))
    return made


def vqa() -> list[tuple[str, list[str]]]:
    """(answer, answers of ten people)."""
    draw = random.Random(3)
    # Spellings that only one of the tables of contractions makes equal.
    made = [("somebody'd", ["somebodyd"] * 9 + ["x"]), ("Shes", ["she's"] * 5 + ["shes"] * 5)]
    for number in range(COUNT - len(made)):
        pool = draw.sample(VQA, draw.choice([1, 2, 3, 5]))
        if number % 2:  # spellings of one answer
            pool += [draw.choice(ARTICLES) + pool[0], pool[0].upper(), pool[0] + "."]
        people = [draw.choice(pool) for _ in range(10)]
        made.append((draw.choice([*pool, *pool, draw.choice(VQA)]), people))
    return made


def amber_captions() -> list[tuple[str, dict]]:
    """(caption, annotation) of AMBER."""
    draw = random.Random(4)
    made = []
    for _ in range(COUNT):
        objects = draw.sample(list(RELATION), draw.randrange(3, 8))
        shown = objects[: draw.randrange(1, len(objects))]
        note = {"type": "generative", "truth": shown, "hallu": objects[len(shown) :]}
        caption = " ".join(draw.choice(WORDS) for _ in range(draw.randrange(0, 12)))
        made.append((caption, note))
    return made


def amber_types() -> list[str]:
    """Type of each yes/no question of AMBER."""
    return [TYPES[number % len(TYPES)] for number in range(COUNT)]
