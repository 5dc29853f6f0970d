"""Ten yes/no questions about digits for lmms-eval: `python make_digits.py FOLDER`.

Writes FOLDER/pope.json, which `realign.evaluate pope` and the task in digits.yaml both read.
"""

import json
import sys
from pathlib import Path

import numpy as np

from realign.digits.scenes import make_questions, make_scenes

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
rng = np.random.default_rng(0)
lines = []
for number, scene in enumerate(make_scenes(5, biased=False, split="test", seed=9)):
    scene.image.save(folder / f"{number}.png")
    for question in make_questions(scene, rng):
        line = {"question_id": len(lines), "image": f"{number}.png"}
        lines.append(line | {"text": question.text, "label": question.answer})
(folder / "pope.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
