"""A sample of the stress (`stress_records`): every kind of fault, through every reader."""

import numpy as np
import pytest
from stress_cases import draw
from stress_records import FAULTS, Stress

COUNT = 60


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """COUNT records: of each kind of fault in each format the first, then others."""
    stress = Stress(tmp_path_factory.mktemp("stress"))
    rng, found, spare = np.random.default_rng(1), {}, []
    for number in range(600):
        case = draw(rng, number, stress.folder)
        if case.kind == "huge":
            continue  # a second each
        key = case.kind, case.format
        spare += [case] if key in found else []
        found.setdefault(key, case)
    picked = sorted([*found.values(), *spare], key=lambda case: (case.number * 7919) % 600)
    return stress, picked[:COUNT]


def test_nothing_is_silently_wrong(cases):
    stress, picked = cases
    assert len(picked) == COUNT and len({case.kind for case in picked}) >= 12
    found = [
        (case.format, case.fault, reader, *stress.judge(case, reader))
        for case in picked
        for reader in case.verdicts
    ]
    assert [line for line in found if line[3] in FAULTS] == []
    outcomes = [line[3] for line in found]
    assert outcomes.count("refused") > 30 and outcomes.count("accepted right") > 30
