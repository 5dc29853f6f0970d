"""Settings of the pairs pipeline: validation and derived settings."""

from dataclasses import replace
from pathlib import Path

import pytest

from realign.digits import ASSETS
from realign.pairs.pipeline import PairsConfig

LOCAL = "transformers:m"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask": "numbers, verbs"}, "mask contains verbs; the kinds are numbers, attributes"),
        ({"model": "some/model"}, "--model is given without --data"),
        ({"scenes": 0}, "scenes is 0"),
        ({"k": 0}, "k is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"segments": -1}, "segments is -1"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"tau": float("nan")}, "tau is nan"),
        ({"tau": 95.0}, "tau is 95.0; it must be from -1 to 1"),
        ({"ceiling": 5.0}, "ceiling is 5.0; it must be from -1 to 1"),
        ({"seed": -1}, "seed is -1"),
        ({"output": "."}, "output . is a folder"),
        ({"output": "pairs.work"}, "output pairs.work is also the work folder"),
        ({"data": "."}, "--output runs/pairs.parquet is in the folder of the data"),
        ({"data": "setup.py", "output": "setup.py"}, "--output setup.py is the data that is read"),
        ({"data": "tests", "work": "tests/w"}, "--work tests/w is in the folder of the data"),
        ({"shard": 0}, "shard is 0"),
        ({"candidates": 0}, "candidates is 0"),
        ({"hash_distance": 64}, "hash_distance is 64; it must be from -1 to 63"),
        ({"max_bad": 1.5}, "max_bad is 1.5; it must be from 0 to 1"),
        ({"share": 0.0}, "share is 0.0; it must be above 0"),
        ({"floor": 0.5, "ceiling": 0.5}, "floor is 0.5 and --ceiling is 0.5, which leaves no"),
        ({"refill": "guess"}, "refill is 'guess'; it must be one of infill, prompt"),
        ({"negative": "mirror"}, "negative is 'mirror'; it must be one of retrieved, random"),
        ({"index": "lsh"}, "index is 'lsh'; it must be one of auto, exact, ivf, hnsw"),
        ({"dtype": "fp16"}, "dtype is 'fp16'; it must be one of fp32, bf16"),
        (
            {"judge": "gpt"},
            "--judge: the kind of engine is unknown; give transformers:MODEL",
        ),
        ({"masker": "llm"}, "--masker: the kind of engine is unknown; give"),
        ({"data": "x", "answer": "http://host/v1"}, "--answer: the endpoint"),
        ({"ray": "here"}, "ray is 'here'; it must be local, local:N, auto"),
        ({"ray": "local:0"}, "ray is 'local:0'"),
        # settings without an effect
        ({"format": "coco"}, "--format would have no effect.* Pass --data"),
        ({"image_folder": "x"}, "--image-folder would have no effect"),
        ({"answer": LOCAL}, "--answer would have no effect"),
        ({"price_in": 0.5}, "price_in is 0.5 and would have no effect: no engine is an endpoint"),
        (
            {"concurrency": 2, "judge": LOCAL},
            "concurrency is 2 and would have no effect",
        ),
        ({"concurrency": 0, "judge": "http://localhost:1/v1#m"}, "--judge: concurrency is 0"),
        (
            {"engine": LOCAL},
            "engine would have no effect with infill; add --refill prompt",
        ),
        ({"share": 0.5, "segments": 0}, "--share and --segments both set"),
        (
            {"masker": LOCAL, "mask": "numbers"},
            "would have no effect with an engine as --masker",
        ),
        (
            {"masker": LOCAL, "share": 0.5},
            "would have no effect with an engine as --masker",
        ),
        ({"candidates": 2}, "candidates is 2 and would have no effect.* --judge"),
        ({"candidates": 3, "k": 2, "margin": True}, "candidates is 3, but --k is 2; it must"),
        ({"reach": 9}, "reach is 9, but --k is 10; it must be at least --k"),
        ({"keep_target": float("nan")}, "keep_target is nan; it must be from 0 to 1"),
        (
            {
                "data": "x",
                "model": "m",
                "embed_model": "c",
                "refill": "prompt",
                "engine": LOCAL,
            },
            "model is 'm' and would have no effect",
        ),
    ],
)
def test_an_invalid_setting_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        PairsConfig(**settings)


def test_default_categories():
    assert PairsConfig().categories == ("numbers",)
    every = ("numbers", "attributes", "relations", "objects")
    assert PairsConfig(data="x.parquet").categories == every
    assert PairsConfig(mask="objects, numbers,").categories == ("objects", "numbers")


def test_derived_settings():
    assert PairsConfig(output="a/b.parquet").work_folder == Path("a/b.work")
    assert PairsConfig(work="w").work_folder == Path("w")
    assert PairsConfig().refill_engine is None
    assert PairsConfig(refill="prompt").refill_engine == f"transformers:{ASSETS}"
    prompted = PairsConfig(data="x", model="m", refill="prompt")
    assert prompted.refill_engine == LOCAL
    assert replace(prompted, engine="transformers:n").refill_engine == "transformers:n"
    assert PairsConfig(ray="local:2").ray == "local:2"
    assert PairsConfig(ray="head.example:6379").ray == "head.example:6379"
