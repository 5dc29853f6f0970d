"""`python -m realign.evaluate compare` with several models, and its tests, tables and plot."""

import itertools
import json
import re

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from realign.evaluate import __main__ as evaluate
from realign.evaluate import benchmarks, paired, tables
from realign.evaluate.compare import distinct_names


def _enumerated(sums):
    """Share of all flips of signs whose total is at least as far from 0."""
    flips = itertools.product((-1, 1), repeat=len(sums))
    totals = [abs(round(sum(s * x for s, x in zip(flip, sums, strict=True)), 9)) for flip in flips]
    return np.mean([total >= abs(round(sum(sums), 9)) for total in totals])


# The statistics.


@pytest.mark.parametrize("seed", range(4))
def test_the_sign_flip_test_is_the_enumeration_of_all_flips(seed):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 9, 30)
    right = rng.integers(-1, 2, 30)
    for change in (right, right * rng.choice([0.3, 0.6, 1], 30)):  # grades of VQA
        sums = [change[images == image].sum() for image in np.unique(images)]
        assert paired.sign_flip(change, images) == pytest.approx(_enumerated(sums), rel=1e-9)


def test_random_flips_of_many_graded_scores_estimate_the_p_value():
    rng = np.random.default_rng(0)
    change = rng.choice([-0.9, -0.6, -0.3, 0.3, 0.6, 0.9], 300)
    t = stats.ttest_1samp(change, 0).pvalue  # nearly equal for so many questions
    assert 0.05 < t < 0.5
    assert paired.sign_flip(change) == pytest.approx(t, abs=0.02)
    assert paired.sign_flip(change) == paired.sign_flip(change)  # a fixed seed


def test_mcnemar_is_the_sign_flip_test_of_independent_questions():
    rng = np.random.default_rng(1)
    first, second = rng.random(400) < 0.7, rng.random(400) < 0.75
    found = paired.compare(first, second)
    assert found.flip_p == pytest.approx(
        stats.binomtest(found.gained, found.gained + found.lost).pvalue
    )
    assert found.p == pytest.approx(found.flip_p)


def test_mcnemar_rejects_equal_models_too_often_if_questions_share_images():
    """Equal models that misread whole images: the test over images holds its level of 5 %."""
    rng = np.random.default_rng(0)
    images = np.repeat(np.arange(100), 6)
    rejected = np.zeros(2)
    for _ in range(400):
        first, second = (
            np.where(rng.random(100) < 0.3, rng.random(100) < 0.85, np.nan).repeat(6)
            for _ in range(2)
        )
        single = rng.random((2, 600)) < 0.85
        change = np.where(np.isnan(second), single[1], second)
        change = change - np.where(np.isnan(first), single[0], first)
        gained, lost = (change > 0).sum(), (change < 0).sum()
        mcnemar = stats.binomtest(gained, gained + lost).pvalue
        rejected += [mcnemar < 0.05, paired.sign_flip(change, images) < 0.05]
    assert rejected[0] > 0.12 * 400
    assert 0.02 * 400 < rejected[1] < 0.08 * 400


def test_graded_scores_have_no_mcnemar_test():
    rng = np.random.default_rng(3)
    first, second = rng.choice([0, 0.3, 0.6, 0.9, 1], (2, 200))
    found = paired.compare(first, second)
    assert np.isnan(found.p) and "sign-flip p" in str(found)
    assert (found.gained, found.lost) == ((second > first).sum(), (second < first).sum())
    assert found.difference == pytest.approx(second.mean() - first.mean())
    theirs = stats.bootstrap((second,), np.mean, n_resamples=10_000, method="percentile", rng=4)
    assert found.interval == pytest.approx(theirs.confidence_interval, abs=0.005)
    with pytest.raises(ValueError, match="a score is 1.5; scores must be from 0 to 1"):
        paired.compare([0, 1], [0, 1.5])
    with pytest.raises(ValueError, match="a score is nan"):
        paired.compare([0, 1], [0, np.nan])


def test_one_changed_image_is_no_evidence():
    """Both flips of its sign are equally far from 0, for graded scores too."""
    for change in ([0.3, 0, 0], [0, 0.6, 0.3]):
        assert paired.sign_flip(np.array(change), np.array([0, 1, 1])) == 1


def test_a_single_image_gives_no_interval():
    found = paired.compare([0, 1, 0], [1, 1, 1], clusters=np.zeros(3))
    assert np.isnan([*found.interval, found.low, found.high]).all()
    assert found.flip_p == 1


def test_holms_correction_of_worked_examples():
    # Wikipedia's example of Holm's method: at 5 %, only 0.01 and 0.005 are rejected.
    assert paired.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert paired.holm([0.6, np.nan, 0.7])[::2] == pytest.approx([1, 1])


# The command.


def _write(file, right, *, images=None, question="Is there a dog?", asked=None, **fields):
    """Answers to questions whose answer is yes."""
    lines = [{"asked": {"model": file.parent.name, "suffix": "!"} | (asked or {})}]
    lines += [
        {"id": str(i), "question": question, "image": f"{image}.png", "label": "yes"}
        | {"answer": "yes" if correct else "no"}
        | fields
        for i, (correct, image) in enumerate(
            zip(right, range(len(right)) if images is None else images, strict=True)
        )
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Function that runs the command in the folder of the answers, and returns code and output."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        code = evaluate.main(["compare", *words])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def _models(folder, files=("random", "popular"), models=("base", "dpo", "rdpo_1")):
    rng = np.random.default_rng(0)
    right = {}
    for file in files:
        for number, model in enumerate(models):
            right[file, model] = rng.random(120) < 0.6 + 0.12 * number
            _write(folder / model / f"{file}.jsonl", right[file, model], images=np.arange(120) // 3)
    return right


def test_every_model_is_compared_with_the_first(run, tmp_path):
    right = _models(tmp_path)
    code, out = run("base", "dpo", "rdpo_1")
    assert code == 0
    rows = [re.split(r" {2,}", line) for line in out.splitlines()[2:-3]]
    assert len(rows) == 2 * 3 * 3
    sums, flips = np.arange(120) // 3, {}
    for row in rows:
        file, rule, model, number, score, *change = row
        own, base = right[file, model].astype(float), right[file, "base"].astype(float)
        assert number == "120" and score.startswith(f"{100 * own.mean():.2f} [")
        assert bool(change) == (model != "base")
        if change:
            assert change[0].startswith(f"{100 * (own - base).mean():+.2f} [")
            gained, lost = (own > base).sum(), (own < base).sum()
            assert change[1:3] == [str(gained), str(lost)]
            mcnemar = stats.binomtest(int(gained), int(gained + lost)).pvalue
            assert change[3] in (f"{mcnemar:.4f}", "<0.0001")
            flips[file, rule, model] = paired.sign_flip(own - base, sums)
            assert change[4] in (f"{flips[file, rule, model]:.4f}", "<0.0001")
    adjusted = dict(zip(flips, paired.holm(list(flips.values())), strict=True))
    shown = {tuple(row[:3]): row[-1] for row in rows if row[2] != "base"}
    assert shown == {key: f"{p:.4f}" if p >= 1e-4 else "<0.0001" for key, p in adjusted.items()}
    assert "Holm's correction over 12 comparisons" in out


def test_a_chosen_rule_counts_fewer_comparisons(run, tmp_path):
    _models(tmp_path)
    for model in ("base", "dpo", "rdpo_1"):
        file = tmp_path / model / "textvqa.jsonl"
        _write(file, [1, 0, 1], answers=["yes"] * 10)
        file.write_text(file.read_text().replace('{"asked"', '{"benchmark": "textvqa", "asked"', 1))
    out = run("base", "dpo", "rdpo_1", "--rule", "exact")[1]
    rows = {tuple(line.split()[:2]) for line in out.splitlines()[2:-4]}
    # TextVQA has no rule `exact`, and keeps its own.
    files = {("random", "exact"), ("popular", "exact"), ("textvqa", "evalai"), ("textvqa", "vqa")}
    assert rows == files and "Holm's correction over 8 comparisons" in out


def test_answers_are_matched_by_id_not_by_line(run, tmp_path):
    _write(tmp_path / "a" / "f.jsonl", [1, 1, 1, 0])
    head, *lines = (tmp_path / "a" / "f.jsonl").read_text().splitlines()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "f.jsonl").write_text("\n".join([head, *lines[::-1]]) + "\n")
    assert re.search(r"f +pope +b .*\+0.00 .* 0 +0 +1.0000", run("a", "b")[1])
    (tmp_path / "b" / "f.jsonl").write_text("\n".join([head, *lines, lines[0]]) + "\n")
    assert "f.jsonl answers '0' twice. Remove one" in run("a", "b")[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"asked": {"suffix": "?"}}, "f with a different suffix: '!' and '?'. Run both with"),
        ({"asked": {"max_pixels": 9}}, "with a different max_pixels: None and 9"),
        ({"label": "no"}, "different questions in f: 4 differ, such as '0'"),
        ({"question": "Is it a cat?"}, "different questions in f: 4 differ, such as '0'"),
        ({"right": [1]}, "different questions in f: 3 are in only one, such as '1'"),
    ],
)
def test_other_questions_and_settings_are_errors(run, tmp_path, change, message):
    _write(tmp_path / "a" / "f.jsonl", [1, 0, 0, 1])
    _write(tmp_path / "b" / "f.jsonl", [1, 0, 0, 1])
    _write(tmp_path / "c" / "f.jsonl", **{"right": [1, 0, 0, 1]} | change)
    code, out = run("a", "b", "c")
    assert code == 1 and out.startswith("error: a and c ") and message in out


def test_a_cut_file_is_named(run, tmp_path):
    _models(tmp_path)
    file = tmp_path / "dpo" / "random.jsonl"
    file.write_text(file.read_text()[:-9])
    code, out = run("base", "dpo")
    assert code == 1 and "random.jsonl ends in a cut line. Run its command again" in out


def test_files_that_only_some_models_have_are_errors(run, tmp_path):
    _models(tmp_path)
    _write(tmp_path / "rdpo_1" / "more.jsonl", [1])
    code, out = run("base", "dpo", "rdpo_1")
    assert code == 1 and "base and rdpo_1 answer different files: only one of them has more" in out


def test_a_benchmark_with_graded_scores(run, tmp_path, monkeypatch):
    """Scores between 0 and 1 keep their values, and have no p-value of McNemar."""
    graded = benchmarks.Benchmark("Graded", {"vqa": lambda line: line["grade"]})
    monkeypatch.setitem(benchmarks.BENCHMARKS, "graded", graded)
    grades = {"a": [0.3, 0.6, 0, 1], "b": [0.9, 0.3, 0.6, 1]}
    for model, own in grades.items():
        head = {"asked": {}, "benchmark": "graded"}
        lines = [
            {"id": str(i), "question": "q", "image": f"{i}.png", "answer": "a", "grade": grade}
            for i, grade in enumerate(own)
        ]
        (tmp_path / f"{model}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in [head, *lines])
        )
    code, out = run("a.jsonl", "b.jsonl")
    row = re.split(r" {2,}", out.splitlines()[3])
    assert code == 0 and row[:3] == ["graded", "vqa", "b"]
    assert row[4].startswith("70.00 [") and row[5].startswith("+22.50 [")
    p = _enumerated([0.6, -0.3, 0.6])
    assert row[6:] == ["2", "1", "-", f"{p:.4f}", f"{p:.4f}"]
    assert "does not apply to scores between 0 and 1" in out


def test_captions_are_compared_by_their_hallucinations(run, tmp_path):
    for model, invented in (("a", [["dog"], [], ["cat"]]), ("b", [[], [], ["cat"]])):
        lines = [
            {"id": str(i), "question": "q", "image": f"{i}.png", "answer": "A cat."}
            for i in range(3)
        ]
        (tmp_path / model).mkdir()
        (tmp_path / model / "chair.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in [{"asked": {}}, *lines])
        )
        objects = [
            line | {"hallucinated": found} for line, found in zip(lines, invented, strict=True)
        ]
        content = {"lists": {"synonyms": "1a"}, "captions": objects}
        (tmp_path / model / "chair-objects.json").write_text(json.dumps(content))
    row = re.split(r" {2,}", run("a", "b")[1].splitlines()[3])
    assert row[:4] == ["chair", "no hallucination", "b", "3"]
    assert row[4].startswith("66.67 [") and row[5].startswith("+33.33 [")
    assert row[6:] == ["1", "0", "1.0000", "1.0000", "1.0000"]
    for change, problem in (
        ({"lists": {"synonyms": "2b"}}, "with a different synonyms: '1a' and '2b'"),
        ({"captions": content["captions"][:1]}, "does not fit"),
        ({"captions": [c | {"answer": "x"} for c in content["captions"]]}, "a caption differs"),
    ):
        (tmp_path / "b" / "chair-objects.json").write_text(json.dumps(content | change))
        code, out = run("a", "b")
        assert code == 1 and problem in out


def test_names_of_models_are_distinct(tmp_path):
    for name in ("x/run/answers", "y/run/answers", "y/other"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "other.jsonl").write_text("")
    names = ("x/run/answers", "y/run/answers", "y/other", "y/../other.jsonl")
    found = distinct_names([tmp_path / name for name in names])
    assert found == ["x/run/answers", "y/run/answers", "y/other", f"{tmp_path.name}/other.jsonl"]
    with pytest.raises(ValueError, match="other is given twice. Name the answers of each model"):
        distinct_names([tmp_path / "y/other", tmp_path / "x/../y/other"])


# Files.


def test_formats_are_chosen_by_flag_or_suffix(run, tmp_path):
    _models(tmp_path)
    plain = run("base", "dpo")[1]
    assert run("base", "dpo", "--format", "text")[1] == plain
    for suffix, start in (
        (".md", "| file | rule |"),
        (".tex", "% Scores in percent"),
        (".txt", "file "),
    ):
        code, out = run("base", "dpo", "--output", f"table{suffix}")
        assert code == 0 and out == f"{plain}wrote table{suffix}\n"
        assert (tmp_path / f"table{suffix}").read_text().startswith(start)
    latex = (tmp_path / "table.tex").read_text()
    assert run("base", "dpo", "--format", "latex")[1] == latex
    run("base", "dpo", "--format", "latex", "--output", "table.txt")
    assert (tmp_path / "table.txt").read_text() == latex


def test_latex_is_escaped():
    rows = [("a_b%", "x&y", "-0.50 [-1.00, +2.00]"), ("a_b%", "{\\$#~^}", ""), ("[c]", "--", "1")]
    shown = tables.latex(tables.Table("", ("file", "name", "d"), rows), repeated=1)
    assert shown.splitlines()[1:] == [
        r"\begin{tabular}{llr}",
        r"\toprule",
        r"file & name & d \\",
        r"\midrule",
        r"a\_b\% & x\&y & $-$0.50 [$-$1.00, +2.00] \\",
        r" & \{\textbackslash{}\$\#\textasciitilde{}\textasciicircum{}\} &  \\",
        r"\midrule",
        r"{}[c] & -{}- & 1 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_names_do_not_break_a_markdown_table():
    shown = tables.markdown(tables.Table("", ("n", "m"), [("a|b\nc_d", "_e_ [x](y)")]))
    assert shown.splitlines()[2] == r"| a\|b c_d | \_e\_ [x\](y) |"


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_plot_is_written(run, tmp_path, suffix):
    _models(tmp_path, models=("base", "_a $x$", "b"))
    code, out = run("base", "_a $x$", "b", "--plot", f"plot.{suffix}")
    assert code == 0 and f"wrote plot.{suffix}" in out
    content = (tmp_path / f"plot.{suffix}").read_bytes()
    if suffix == "png":
        with Image.open(tmp_path / "plot.png") as image:
            image.load()
            assert image.width == 1050  # 3.5 inches
            assert image.convert("L").getextrema()[0] < 50
            edge = np.asarray(image.convert("L"))
        assert min(side.min() for side in (edge[0], edge[-1], edge[:, 0], edge[:, -1])) == 255
    elif suffix == "svg":
        text = content.decode()
        assert all(name in text for name in ("_a $x$", ">random<", ">popular<", ">exact<"))
    assert run("base", "_a $x$", "b", "--plot", f"again.{suffix}")[0] == 0
    assert (tmp_path / f"again.{suffix}").read_bytes() == content


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "t.csv"], "--output t.csv ends in .csv. Name a file in .txt, .md or .tex"),
        (["--output", "base"], "--output base is a folder"),
        (["--output", "base/random.jsonl", "--format", "text"], "is an input"),
        (["--plot", "p.jpg"], "--plot is 'p.jpg'. Name a file that ends in .png, .svg, .pdf"),
        (["--plot", "base/random.jsonl/p.png"], "--plot"),
        (["--plot", "p.png", "--output", "p.png", "--format", "text"], "are both p.png"),
        (
            ["--rule", "pope,gpt"],
            "--rule is 'gpt'; the rules of these files are exact, pope, word.",
        ),
        (["--seed", "-1"], "--seed is -1; it must be 0 or more"),
    ],
)
def test_files_that_cannot_be_written_are_named(run, tmp_path, words, message):
    _models(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    code, out = run("base", "dpo", *words)
    assert code == 1 and message in out
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_only_earlier_tables_beside_the_answers_are_overwritten(run, tmp_path):
    _models(tmp_path)
    (tmp_path / "base" / "metrics.json").write_text("kept")
    table = ["base", "dpo", "--format", "text", "--output"]
    code, out = run(*table, "base/metrics.json")
    assert code == 1 and "is an input, or is in the folder of one. Name another file." in out
    assert (tmp_path / "base" / "metrics.json").read_text() == "kept"
    for _ in range(2):
        assert run(*table, "base/table.txt")[0] == 0


def test_the_plot_needs_matplotlib_before_the_work(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, out = run("missing", "missing", "--plot", "p.png")
    assert code == 1 and "Install it: pip install 'realign[demo]'." in out
