"""Benchmark of a training step of a LLaVA of 60 M parameters: rDPO, TRL's DPO, plain rDPO.

The model has hidden size 512, 8 layers and V = 32000. `-m full` runs LoRA (rank 128) and full
fine-tuning in fp32 and bf16 with 4 examples, which takes about 24 GB. The default is LoRA in bf16
with one example. docs/benchmarks.md lists the contestants, and `step_contestants.py` defines the
timed part. Each contestant is a process that runs until its setting is done.

Losses and gradient norms are compared first. Next, a step that returns freed blocks to the system
gives the peak memory of live tensors, less that of imports. Then steps are timed against ours.
"""

import tempfile

import pytest

from benchmarks import step_contestants
from benchmarks.models import write_setting
from benchmarks.race import race
from benchmarks.step_contestants import Worker

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Largest relative difference of loss and gradient norm between equal contestants."""
OURS = "ours"
CONTESTANTS = {  # process, words of a step, and words of our step with the same result
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
    """Processes of a setting: ours until its end, and one of the others at a time."""

    def __init__(self, folder, tune, dtype, examples):
        write_setting(folder, examples, prompt=64, response=128)
        self.where = (folder, tune, dtype)
        self.case = {"tune": tune, "dtype": dtype, "examples": examples}
        self.running, self.imported, self.peaks = {}, {}, {}
        self.truth = {words: self.process("ours").ask(words) for words in (("dpo",), ())}

    def process(self, name):
        """Starts or returns a process of `step_contestants.py`."""
        if name not in self.running:
            for other in [one for one in self.running if one != "ours"]:
                self.running.pop(other).close()
            self.running[name] = Worker(step_contestants.serve, name, *self.where, silence=None)
            self.imported[name] = self.running[name].read()["imported"]
        return self.running[name]

    def timed(self, name, words=()):
        """Call for `race` that returns the seconds of a step with a malloc that keeps blocks."""
        process = self.process(name)
        return lambda: process.ask(("keep", *words))["seconds"]

    def peak(self, name, contestant, words, like):
        """Peak memory in bytes beyond imports, after a check of the first step's loss and norm."""
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
        reason = "trl is missing. Run pip install -c constraints.txt '.[peers]'"
        pytest.importorskip("trl", reason=reason)
    if "labelled" in words and step_contestants.DEVICE == "cuda":
        pytest.skip("on CUDA, TRL DPO already projects only labelled rows")
    if name == "trl" and not words and step_contestants.DEVICE == "cpu":
        # Labelled rows run first, because the peak of a process only grows.
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
