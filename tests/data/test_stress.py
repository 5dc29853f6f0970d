"""Sample of the stress test (`stress_records`): every fault of `stress_cases`, in every reader."""

import numpy as np
import pytest
from stress_cases import draw
from stress_records import FAULTS, Stress


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """One case for each fault that occurs in 1,000 draws."""
    stress = Stress(tmp_path_factory.mktemp("stress"))
    rng, found = np.random.default_rng(1), {}
    for number in range(1000):
        case = draw(rng, number, stress.folder)
        found.setdefault((case.kind, case.fault.split(": ")[-1].split(",")[0]), case)
    return stress, list(found.values())


def test_nothing_is_silently_wrong(cases):
    stress, picked = cases
    assert len(picked) > 130 and len({case.kind for case in picked}) >= 15
    found = [
        (case.format, case.fault, reader, *stress.judge(case, reader))
        for case in picked
        for reader in case.verdicts
    ]
    assert [line for line in found if line[3] in FAULTS] == []
    outcomes = [line[3] for line in found]
    assert outcomes.count("refused") > 150 and outcomes.count("accepted right") > 60
