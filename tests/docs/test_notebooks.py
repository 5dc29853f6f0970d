"""Notebooks in examples/, executed: one with reduced sizes, the other with a tiny SmolVLM."""

import ast
import importlib
import json
import math
import os
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import nbformat
import numpy as np
import pytest
import tiny_vlms
from IPython.core.inputtransformer2 import TransformerManager
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from matplotlib import pyplot as plt
from nbclient import NotebookClient
from PIL import Image
from tiny_processors import WORDS

from realign import doctor, export, train
from realign.data.records import read_pairs
from realign.digits.scenes import digits_in, make_scenes
from realign.evaluate import EvaluateConfig, Rate, evaluate, table
from realign.evaluate import __main__ as evaluation
from realign.evaluate.answering import read_answers
from realign.files import read_jsonl
from realign.pairs import __main__ as pairs

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NAMES = ("align_small_model", "smolvlm2_free_gpu")
IMAGES, STEPS, SCENES = 16, 6, 40
SAVE = """
values = {"written": report.written, "dropped": report.dropped.total(), "adapter": str(adapter)}
rates = {name: {key: vars(rate) for key, rate in by.items()} for name, by in results.items()}
Path("values.json").write_text(json.dumps(values | {"rates": rates}))
"""
MAINS = {
    "realign.doctor": doctor.main,
    "realign.evaluate": evaluation.main,
    "realign.export": export.main,
    "realign.pairs": pairs.main,
    "realign.train": train.main,
}


class Kernel(AsyncKernelManager):
    """A kernel of this interpreter; needs no installed kernel specification."""

    kernel_spec = KernelSpec(
        argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        display_name="Python 3",
        language="python",
    )


def read(name):
    return nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(notebook):
    """The printed text of every code cell."""
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def figures(notebook):
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    return [output for output in outputs if "image/png" in output.get("data", {})]


def parameters(notebook):
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    return notebook.cells.index(cell), cell


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The small model's notebook after its execution, and its files."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = read("align_small_model")
    index, _ = parameters(notebook)
    sizes = f"IMAGES, STEPS, SCENES = {IMAGES}, {STEPS}, {SCENES}"
    notebook.cells.insert(index + 1, nbformat.v4.new_code_cell(sizes))
    notebook.cells.append(nbformat.v4.new_code_cell(SAVE))
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "OMP_NUM_THREADS": "1",
    }
    client = NotebookClient(
        notebook,
        timeout=120,
        kernel_manager_class=Kernel,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=environment)
    return SimpleNamespace(
        notebook=notebook,
        folder=folder,
        work=folder / "runs" / "small-model",
        values=json.loads((folder / "values.json").read_text()),
    )


def test_pairs_are_of_the_images_in_the_folder(run):
    made = read_pairs(run.work / "pairs.parquet")
    assert len(made) == run.values["written"] == IMAGES - run.values["dropped"]
    assert len(made) >= IMAGES - 4
    scenes = make_scenes(IMAGES, biased=False, split="train", seed=0)
    true = {scene.caption for scene in scenes}
    for pair in made:
        assert pair.chosen in true
        digits = zip(digits_in(pair.chosen), digits_in(pair.rejected), strict=True)
        assert sum(chosen != rejected for chosen, rejected in digits) == 1


def test_training_starts_at_the_reference(run):
    log = read_jsonl(run.work / "run" / "metrics.jsonl")
    assert [line["step"] for line in log] == list(range(1, STEPS + 1))
    assert log[0]["loss"] == pytest.approx(2 * math.log(2), abs=1e-5)
    assert log[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert log[0]["rewards/visual_margins"] == pytest.approx(0, abs=1e-4)
    assert all(math.isfinite(value) for line in log for value in line.values())
    assert log[-1]["loss"] < log[0]["loss"]


def test_the_table_is_that_of_the_evaluation(run):
    adapter = run.folder / run.values["adapter"]
    for kind, biased in (("independent digits", False), ("digits of the prior", True)):
        direct = evaluate(
            EvaluateConfig(model=str(adapter), scenes=SCENES, biased=biased, seed=2, quiet=True)
        )
        shown = run.values["rates"][f"{kind}, after"]
        assert {key: vars(rate) for key, rate in direct.items()} == shown
    rates = {
        name: {key: Rate(**value) for key, value in by.items()}
        for name, by in run.values["rates"].items()
    }
    assert table(rates) in texts(run.notebook)


def test_the_paired_comparison_agrees_with_the_table(run):
    shown = re.findall(r"^(\w+): ([\d.]+) % -> ([\d.]+) %", texts(run.notebook), re.M)
    kinds = {"independent": "independent digits", "prior": "digits of the prior"}
    assert [kind for kind, *_ in shown] == list(kinds)
    for kind, *correct in shown:
        for name, share in zip(("before", "after"), correct, strict=True):
            rate = run.values["rates"][f"{kinds[kind]}, {name}"]["hallucination_rate"]["value"]
            assert float(share) == pytest.approx(100 * (1 - rate), abs=0.01)


def test_every_figure_and_the_answer_are_shown(run):
    assert len(figures(run.notebook)) == len(figures(read("align_small_model"))) == 5
    assert re.search(r"^answer: top left \w+ ,", texts(run.notebook), re.M)


def test_stored_outputs_are_of_one_whole_run():
    file, notebook = EXAMPLES / "align_small_model.ipynb", read("align_small_model")
    assert file.stat().st_size < 400_000
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(output.output_type in ("stream", "display_data") for output in outputs)
    assert all(output.get("name") != "stderr" for output in outputs)
    assert not re.search(r"(?<![\w./])/[a-z]+/\w", texts(notebook)), "a path of a machine"


def test_the_text_names_the_stored_rates():
    notebook = read("align_small_model")
    (verdict,) = (cell.source for cell in notebook.cells if "stored outputs" in cell.source)
    rates = re.findall(r"(?:fell|rose) from ([\d.]+) % to ([\d.]+) %", verdict)
    shown = re.findall(r"^(?:independent|digits of).*?\| ([\d.]+) %", texts(notebook), re.M)
    assert [rate for pair in rates for rate in pair] == shown


def test_the_notebook_for_a_gpu_says_that_it_was_not_run():
    notebook = read("smolvlm2_free_gpu")
    assert "has not been run on a GPU" in notebook.cells[0].source
    assert all(not cell.outputs and cell.execution_count is None for cell in code(notebook))


@pytest.mark.parametrize("name", NAMES)
def test_cells_compile_and_imports_resolve(name):
    notebook = read(name)
    nbformat.validate(notebook)
    transform = TransformerManager().transform_cell
    for cell in code(notebook):
        tree = ast.parse(transform(cell.source))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), node.module
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)


class Shell:
    """`get_ipython()` for cells that run here: commands are calls of their main functions."""

    def __init__(self, variables):
        self.variables = variables
        self.ran: set[str] = set()

    def system(self, command):
        python, dash_m, module, *words = shlex.split(command.format_map(self.variables))
        assert (python, dash_m) == ("python", "-m")
        assert MAINS[module](words) == 0, (module, words)
        self.ran.add(module)

    def run_line_magic(self, name, line):
        assert name == "pip" and line.startswith("install")


def rows_of_the_hub(name, part, *, split, streaming):
    """Rows with the columns that the notebook reads, in place of data sets on the hub."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(12):
        image = Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8))
        answer = " ".join(rng.choice(WORDS, 6))
        question = {"question_id": str(number), "question": "red ?", "answer": "yes"}
        turn = {"user": "the dot ?", "assistant": answer}
        pope = {"image_source": f"COCO_{number}", "image": image} | question
        rows.append({"images": [image], "texts": [turn]} | pope)
    return SimpleNamespace(take=lambda count: rows[:count])


def test_the_notebook_for_a_gpu_runs_with_a_tiny_model(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "load_dataset", rows_of_the_hub)
    monkeypatch.setattr(plt, "show", plt.close)
    model, processor = tiny_vlms.make("smolvlm")
    model.save_pretrained("tiny")
    processor.save_pretrained("tiny")
    variables: dict = {}
    shell = Shell(variables)
    variables["get_ipython"] = lambda: shell
    transform = TransformerManager().transform_cell
    for cell in code(read("smolvlm2_free_gpu")):
        exec(transform(cell.source), variables)
        if "parameters" in cell.metadata.get("tags", ()):
            assert variables["IMAGES"] == variables["QUESTIONS"] == 300
            settings = cell.source.replace(variables["MODEL"], "tiny").replace("300", "12")
            exec(settings, variables)
    assert shell.ran == MAINS.keys()
    made = read_pairs("pairs.parquet")
    log = read_jsonl(Path("run/metrics.jsonl"))
    assert 6 <= len(made) <= 12 and len(log) == -(-3 * len(made) // 16)
    assert log[0]["loss"] == pytest.approx(2 * math.log(2), abs=1e-4)
    for name in ("before", "after"):
        assert len(read_answers(Path(f"eval/{name}"))) == 12
    assert "McNemar p" in capfd.readouterr().out
    assert Path("smolvlm2-adapter.zip").stat().st_size > 10_000
    assert Path("merged/model.safetensors").exists()
    assert "POPE" in Path("merged/README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_links_of_notebooks_lead_to_files(name):
    for cell in read(name).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\((?!https?:)([^)#]+)", cell.source):
                assert (EXAMPLES / target).exists(), target
