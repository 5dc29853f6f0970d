"""docs/adding-an-objective.md and objectives.md: the code runs, and the tables are complete."""

import math
import re
from pathlib import Path

import pytest
from test_terms import LINKS

from realign_kernels import objectives
from realign_kernels.objectives import Term

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "adding-an-objective.md").read_text()
BLOCKS = dict(re.findall(r"```python (\w+)\n(.*?)```", PAGE, re.DOTALL))
OBJECTIVES = (DOCS / "objectives.md").read_text()


def table(heading: str) -> list[list[str]]:
    """Rows of the table under a heading, as lists of cells."""
    section = OBJECTIVES.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in row] for row in rows[2:]]


def test_the_code_of_the_page_runs(monkeypatch):
    monkeypatch.setattr(objectives, "PRESETS", dict(objectives.PRESETS))
    assert PAGE.count("```python") == len(BLOCKS) == 5
    names: dict = {"__name__": "adding_an_objective"}
    for block in ("imports", "objective", "step", "check", "register"):
        exec(compile(BLOCKS[block], f"block {block}", "exec"), names)
    assert objectives.get("simper").name == "simper"
    with pytest.raises(ValueError, match="sign of term 'x' must be finite"):
        names["InversePerplexity"](name="x", leaf=0, sign=float("nan"))


def test_an_objective_is_under_20_lines():
    lines = [line for line in BLOCKS["objective"].splitlines() if line.strip()]
    assert 5 < len(lines) < 20


def test_the_table_of_links_is_complete():
    public = [getattr(objectives, name) for name in objectives.__all__]
    links = [c.__name__ for c in public if isinstance(c, type) and issubclass(c, Term)]
    assert sorted(row[0] for row in table("Links")) == sorted(set(links) - {"Term"})
    assert {type(term).__name__ for term in LINKS.values()} == set(links) - {"Term"}


def test_the_formulas_are_those_of_the_docstrings():
    rows = table("Formulas")
    assert [row[0] for row in rows] == list(objectives.PRESETS)
    for name, formula in rows:
        written = "".join(objectives.PRESETS[name].__doc__.split())
        assert "".join(formula.split()) in written, name


def test_the_code_of_the_objectives_page_runs(capsys):
    (block,) = re.findall(r"```python presets\n(.*?)```", OBJECTIVES, re.DOTALL)
    exec(compile(block, "objectives.md", "exec"), {})
    leaves, terms, settings = capsys.readouterr().out.splitlines()
    assert "chosen under retrieved_image" in leaves
    rewards = [0.1 * (logp + 22) for logp in (-20, -24, -23)]
    wanted = [rewards[0] - rewards[1], rewards[0] - rewards[2], rewards[0] - 0.5]
    found = eval(terms)
    assert list(found) == ["text", "visual", "anchor"]
    assert list(found.values()) == pytest.approx([math.log1p(math.exp(-m)) for m in wanted])
    assert eval(settings) == objectives.settings("symmpo")


def test_the_table_of_presets_is_right():
    rows = table("Presets")
    assert [row[0] for row in rows] == list(objectives.PRESETS)
    basic = {"chosen", "rejected", "image", "retrieved_image"}
    for name, paper, count, reads in rows:
        cited = re.findall(r"arXiv (\d{4}\.\d{5})", objectives.PRESETS[name].__doc__)
        assert paper == (cited[0] if cited else "none")
        several = "negatives" in objectives.settings(name)
        for negatives in (1, 3) if several else (1,):
            objective = objectives.get(name, **({"negatives": negatives} if several else {}))
            formula = str(negatives) if several else "0"
            assert len(objective.leaves) == sum(map(int, count.replace("K", formula).split("+")))
        read = {part for leaf in objective.leaves for part in (leaf.response, leaf.image)}
        more = {part for part in read - basic if not part.startswith("retrieved_image_")}
        assert more == set(re.findall(r"`?(retrieved_chosen|blank_image)`?", reads))
        assert several == ("K retrieved images" in reads)
