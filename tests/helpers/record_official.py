"""Run the official scorers on the made answers, and write tests/evaluate/official.json.

    python tests/helpers/record_official.py --vqa VQA --amber AMBER --mme calculation.py \\
        --textvqa m4c_evaluator.py --vlmevalkit VLMEvalKit --lmms-eval lmms-eval

The arguments are checkouts or files of the public repositories of the scorers: GT-Vision-Lab/VQA,
junyangwang0410/AMBER, MME's evaluation tool, LLaVA's llava/eval/m4c_evaluator.py,
open-compass/VLMEvalKit and EvolvingLMMs-Lab/lmms-eval. Their code runs unchanged, with two
exceptions. Python 2's print statements are converted. AMBER's tagger and word vectors are replaced
by those of the made captions.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import re
import runpy
import subprocess
import sys
import tempfile
import types
import warnings
from pathlib import Path

import made_answers as made

OUTPUT = Path(__file__).resolve().parents[1] / "evaluate" / "official.json"


def _module(name: str, file: Path):
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _stub(name: str, **values) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(values)
    sys.modules[name] = module
    return module


def _printed(script: Path, *words: str) -> str:
    out, before = io.StringIO(), sys.argv
    sys.argv = [str(script), *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = before
    return out.getvalue()


def of_vqa(folder: Path) -> list[float]:
    """Scores of VQA's authors."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "vqaEval.py"
        source = folder / "PythonEvaluationTools" / "vqaEvaluation" / "vqaEval.py"
        file.write_bytes(source.read_bytes())
        subprocess.run(
            [sys.executable, "-m", "lib2to3", "-wn", file], check=True, capture_output=True
        )
        scorer = _module("vqaEval", file).VQAEval
    questions, answers = {}, {}
    for number, (answer, people) in enumerate(made.vqa()):
        known = [{"answer": person, "answer_id": i} for i, person in enumerate(people)]
        questions[number] = {"answers": known, "question_type": "x", "answer_type": "y"}
        answers[number] = {"answer": answer}
    truth, results = types.SimpleNamespace(qa=questions), types.SimpleNamespace(qa=answers)
    truth.getQuesIds = lambda: list(questions)
    scores = []
    for number in questions:
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = scorer(truth, results, n=10)
            evaluation.evaluate([number])
        scores.append(round(evaluation.accuracy["overall"] / 100, 10))
    return scores


def of_textvqa(file: Path) -> list[float]:
    """Scores of TextVQA's authors, in LLaVA's copy."""
    scorer = _module("m4c_evaluator", file).TextVQAAccuracyEvaluator()
    with contextlib.redirect_stderr(io.StringIO()):
        return [
            round(scorer.eval_pred_list([{"pred_answer": answer, "gt_answers": people}]), 10)
            for answer, people in made.vqa()
        ]


def of_mme(file: Path) -> dict[str, float]:
    """Scores of MME's subtasks and sums."""
    with tempfile.TemporaryDirectory() as place:
        texts: dict[str, list[str]] = {}
        for number, (answer, label) in enumerate(made.yes_no()):
            category = made.MME_CATEGORIES[number // 2 % len(made.MME_CATEGORIES)]
            texts.setdefault(category, []).append(f"{number // 2}.jpg\tIs it?\t{label}\t{answer}\n")
        for category, lines in texts.items():
            (Path(place) / f"{category}.txt").write_text("".join(lines))
        printed = _printed(file, "--results_dir", place)
    names = re.findall(r"(\w+)\s+score: ([\d.]+)", printed)
    scores = {name: float(value) for name, value in names if name != "total"}
    sums = re.findall(r"total score: ([\d.]+)", printed)
    return scores | {"perception": float(sums[0]), "cognition": float(sums[1])}


def of_amber(folder: Path) -> dict[str, float]:
    """Figures of AMBER's script."""

    class Token(str):
        def similarity(self, other):
            return float(self == other or frozenset((self, other)) in made.SIMILAR)

    _stub("nltk", word_tokenize=str.split, pos_tag=lambda words: [(word, "NN") for word in words])
    _stub("nltk.stem", WordNetLemmatizer=lambda: types.SimpleNamespace(lemmatize=str))
    _stub("spacy", load=lambda name: Token)
    notes = [note for _, note in made.amber_captions()]
    notes += [
        {"type": kind, "truth": label}
        for kind, (_, label) in zip(made.amber_types(), made.yes_no(), strict=True)
    ]
    answers = [caption for caption, _ in made.amber_captions()]
    answers += [answer for answer, _ in made.yes_no()]
    with tempfile.TemporaryDirectory() as place:
        files = {
            "annotation": [note | {"id": i} for i, note in enumerate(notes, 1)],
            "inference_data": [{"id": i, "response": a} for i, a in enumerate(answers, 1)],
            "word_association": made.RELATION,
        }
        words = ["--evaluation_type", "a", "--metrics", str(folder / "data" / "metrics.txt")]
        for name, value in files.items():
            (Path(place) / name).write_text(json.dumps(value))
            words += [f"--{name}", str(Path(place) / name)]
        (Path(place) / "safe").write_text("\n".join(made.SAFE))
        printed = _printed(
            folder / "inference.py", *words, "--safe_words", str(Path(place) / "safe")
        )
    heading, found = "", {}
    for line in printed.splitlines():
        name, _, value = line.partition(":")
        if value.strip():
            found[f"{heading} {name}".strip()] = float(value)
        elif line.strip():
            groups = {"Gen": "captions", "Des": "all", "Exs": "existence"}
            heading = groups.get(name[:3], name.lower())
    return found


def of_vlmevalkit(folder: Path) -> dict[str, object]:
    """Letters, MMBench's circular scores and yes/no verdicts of VLMEvalKit, without a judge."""
    _stub("vlmeval").__path__ = []
    for name in ("vlmeval.smp", "vlmeval.utils"):
        _stub(name).__path__ = []
    _stub(
        "vlmeval.smp.log", get_logger=lambda name: types.SimpleNamespace(info=print, warning=print)
    )
    matching = _module("vlmeval.utils.matching_util", folder / "vlmeval/utils/matching_util.py")
    log = sys.modules["vlmeval.smp.log"].get_logger
    names = ("cn_string", "d2df", "dump", "get_pred_file_format", "istype", "load", "timestr")
    _stub("vlmeval.smp.vlm", build_option_str=None)
    vars(sys.modules["vlmeval.smp"]).update(dict.fromkeys(names), get_logger=log)
    vars(sys.modules["vlmeval.utils"]).update(
        can_infer=matching.can_infer, can_infer_lego=None, track_progress_rich=None
    )
    choice = _module("multiple_choice", folder / "vlmeval/dataset/utils/multiple_choice.py")
    misc = (folder / "vlmeval/smp/misc.py").read_text()
    space: dict[str, object] = {}
    exec(misc[misc.index("def process_punctuation") : misc.index("def h2r")], space)
    vars(sys.modules["vlmeval.smp"]).update(process_punctuation=space["process_punctuation"])
    yorn = _module("yorn", folder / "vlmeval/dataset/utils/yorn.py")
    letters = [matching.can_infer(a, dict(options)) or "-" for a, options, _ in made.letters()]
    import pandas as pd

    rows = made.rotated()
    circular = []
    for start in range(0, len(rows), 4):
        group = pd.DataFrame(
            [
                {"GT": row["label"], "prediction": row["answer"], **row["options"]}
                for row in rows[start : start + 4]
            ]
        )
        found = choice.prefetch_circular_group(group)
        circular.append(0 if found is None else found["hit"])
    verdicts = [yorn.YOrN_Extraction(answer)[0] for answer, _ in made.yes_no()]
    return {
        "letters": "".join(letters),
        "circular": "".join(map(str, circular)),
        "yes_no": "".join(verdicts),
    }


def of_lmms_eval(folder: Path) -> dict[str, object]:
    """MME verdicts, VQA scores and letters of lmms-eval."""
    tasks = folder / "lmms_eval" / "tasks"
    _stub("loguru", logger=types.SimpleNamespace(info=print, warning=print))
    mme = _module("mme_utils", tasks / "mme" / "utils.py")
    metric = _module("vqa_eval_metric", tasks / "_task_utils" / "vqa_eval_metric.py")
    letters = _module("mcq_extract", tasks / "_task_utils" / "mcq_extract.py").extract_mcq_answer
    process = metric.EvalAIAnswerProcessor()
    scores = []
    for answer, people in made.vqa():
        given = process(answer)
        known = [process(person) for person in people]
        same = [min(1, sum(known[j] == given for j in range(10) if j != i) / 3) for i in range(10)]
        scores.append(round(sum(same) / 10, 10))
    return {
        "mme": "".join(mme.parse_pred_ans(answer)[0] for answer, _ in made.yes_no()),
        "vqa": scores,
        "letters": "".join(letters(a, choices=list(o)) or "-" for a, o, _ in made.letters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("vqa", "textvqa", "mme", "amber", "vlmevalkit", "lmms-eval"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    found = {
        name: globals()[f"of_{name}"](getattr(args, name))
        for name in ("vqa", "textvqa", "mme", "amber", "vlmevalkit", "lmms_eval")
    }
    OUTPUT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
