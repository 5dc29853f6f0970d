"""A training step of a LLaVA of 60M parameters: rDPO on the forest, TRL's DPO, plain rDPO.

Hidden 512, 8 layers, V = 32000; LoRA (rank 128) and full fine-tuning, fp32 and bf16; 4 examples
with `-m full` (about 24 GB), else LoRA and one example. docs/benchmarks.md lists the contestants.
Each is a process that lives through its setting (`step_contestants.py` says what is timed).

Losses and gradient norms are compared first. Then peak memory, of live tensors, over that of
imports: a step of which freed blocks are returned to the system. Then time, in turns with ours.
"""

import tempfile

import pytest

from benchmarks import step_contestants
from benchmarks.models import write_setting
from benchmarks.race import race
from benchmarks.step_contestants import Worker

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Largest relative difference between losses, and between norms, of two ways to the same thing."""
OURS = "ours"
CONTESTANTS = {  # the process, the words of a step, and the words of our step that it is equal to
    OURS: ("ours", (), ()),
    "TRL DPO": ("trl", (), ("dpo",)),
    "TRL DPO, labelled rows": ("trl", ("labelled",), ("dpo",)),
    "released, three sequences": ("released", (), ()),
}
SETTINGS = [
    pytest.param(("lora", "bf16", 1), id="lora-bf16-1"),
    *(
        pytest.param((tune, dtype, 4), id=f"{tune}-{dtype}-4", marks=pytest.mark.slow)
        for tune in ("lora", "full")
        for dtype in TOLERANCE
    ),
]


class Setting:
    """The processes of a setting: ours to its end, of the others one at a time."""

    def __init__(self, folder, tune, dtype, examples):
        write_setting(folder, examples, prompt=64, response=128)
        self.where = (folder, tune, dtype)
        self.case = {"tune": tune, "dtype": dtype, "examples": examples}
        self.running, self.imported, self.peaks = {}, {}, {}
        self.truth = {words: self.process("ours").ask(words) for words in (("dpo",), ())}

    def process(self, name):
        """A process of `step_contestants.py`, which answers the words of a step."""
        if name not in self.running:
            for other in [one for one in self.running if one != "ours"]:
                self.running.pop(other).close()
            self.running[name] = Worker(step_contestants.serve, name, *self.where, silence=None)
            self.imported[name] = self.running[name].read()["imported"]
        return self.running[name]

    def timed(self, name, words=()):
        """A call for `race`: the seconds that the process counts; freed blocks stay with it."""
        process = self.process(name)
        return lambda: process.ask(("keep", *words))["seconds"]

    def peak(self, name, contestant, words, like):
        """Bytes over imports; before, that the first step is the step it should be."""
        if contestant not in self.peaks:
            process = self.process(name)
            first = process.ask(words)
            if first["loss"] is not None and name != "ours":
                for what in ("loss", "norm"):
                    close = pytest.approx(self.truth[like][what], rel=TOLERANCE[self.case["dtype"]])
                    assert first[what] == close, (contestant, what)
            self.peaks[contestant] = process.ask(words)["VmHWM"] - self.imported[name]
        return self.peaks[contestant]

    def close(self):
        while self.running:
            self.running.popitem()[1].close()


@pytest.fixture(scope="module", params=SETTINGS)
def setting(request):
    with tempfile.TemporaryDirectory() as folder:
        made = Setting(folder, *request.param)
        yield made
        made.close()


@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_step(benchmark, setting, contestant):
    name, words, like = CONTESTANTS[contestant]
    if name == "trl":
        reason = "trl is missing; pip install -c constraints.txt '.[peers]'"
        pytest.importorskip("trl", reason=reason)
    if "labelled" in words and step_contestants.DEVICE == "cuda":
        pytest.skip("on CUDA TRL projects labelled rows anyway: see TRL DPO")
    if name == "trl" and not words and step_contestants.DEVICE == "cpu":
        # Labelled rows first: a process's peak only grows.
        setting.peak(name, "TRL DPO, labelled rows", ("labelled",), like)
    setting.peak("ours", OURS, (), ())
    taken = setting.peak(name, contestant, words, like)
    race(
        benchmark,
        "step, {tune}, {dtype}, {examples} example(s)".format(**setting.case),
        case=setting.case,
        contestant=contestant,
        call=setting.timed(name, words),
        ours=setting.timed("ours"),
        bytes=taken,
        budget=10.0,
    )
