"""Memory of the head against the length of the context: image tokens cost ours nothing.

Each contestant is called as its users call it, with image and prompt rows in front of the response,
in processes of its own (`memory_worker.py` defines a peak). The time shown is that of the process;
it has no meaning.
"""

import time

import pytest

from benchmarks.bench_head import PROMPT, RESPONSE, Shape, make
from benchmarks.contestants import CONTESTANTS, OURS
from benchmarks.memory_worker import MEASURED
from benchmarks.race import REPLAY, describe

CONTEXTS = (576, 1152, 2304, 4608, 8192)
SETTINGS = (("frozen", "bf16"), ("frozen", "fp32"), ("trainable", "bf16"))
CASE = {"H": 256, "V": 8192, "examples": 1, "prompt": PROMPT, "response": RESPONSE}

pytestmark = pytest.mark.skipif(not MEASURED, reason="reads peaks from Linux's /proc")


@pytest.mark.parametrize(
    ("head", "dtype", "tokens", "name"),
    [
        pytest.param(
            *setting, tokens, name, marks=() if setting == SETTINGS[0] else pytest.mark.slow
        )
        for setting in SETTINGS
        for tokens in CONTEXTS
        for name in CONTESTANTS
    ],
)
def test_memory(benchmark, peak_of, head, dtype, tokens, name):
    make(name, dtype)
    began = time.perf_counter()
    taken = peak_of(name, Shape("", CASE["H"], CASE["V"], 1, dtype, head, tokens))
    describe(
        benchmark,
        f"memory, {head}, {dtype}, {tokens} image tokens",
        case=CASE | {"head": head, "dtype": dtype, "image_tokens": tokens},
        contestant=name,
        role="ours" if name == OURS else "peer",
        bytes=taken,
    )
    REPLAY.load([time.perf_counter() - began])
    benchmark.pedantic(lambda: None, rounds=1)
