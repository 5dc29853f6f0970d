"""Every kind of PEFT adapter under RDPOTrainer, and every way of loading one."""

import adapter_kinds
import hf_matrix
import numpy as np
import peft
import pytest
from adapter_kinds import FAMILIES, KINDS, SPECIAL
from hf_matrix import FRESH, GIVEN, REFUSED, WAYS, refusal
from hf_runs import history
from peft import PeftType
from tiny_vlms import make, random_record

from realign.hf import adapter_checks


@pytest.fixture(scope="module")
def benches(tmp_path_factory):
    made = {}
    for family in FAMILIES:
        base = adapter_kinds.save_base(family, tmp_path_factory.mktemp(family))
        model, processor = make(family)
        model.config._name_or_path = model.name_or_path = str(base)
        rng = np.random.default_rng(0)
        records = [random_record(family, processor, rng) for _ in range(2)]
        made[family] = hf_matrix.Bench(base, model, processor, records)
    return made


def assigned() -> dict[str, tuple[str, str]]:
    """A model family and a way of loading for every supported kind, in turn."""
    found = {}
    for i, kind in enumerate(kind for kind in KINDS if kind not in REFUSED):
        family, way = FAMILIES[i % len(FAMILIES)], WAYS[i % len(WAYS)]
        found[kind] = family, GIVEN if refusal(kind, way, family) else way
    return found


@pytest.mark.parametrize("kind", assigned())
def test_first_losses_equal_the_reference_and_trained_weights_are_saved(benches, tmp_path, kind):
    family, way = assigned()[kind]
    cell = hf_matrix.trained_cell(benches[family], kind, way, tmp_path)
    # Dropout is active in steps, but not in the reference.
    rounding = 0.1 if "dropout" in kind and way not in (FRESH, GIVEN) else 1e-6
    assert abs(cell.loss) < rounding, (family, way)
    assert cell.reward < rounding
    assert cell.moved > 1e-4
    assert cell.reloaded < 1e-5  # a plain forward of the same weights


def test_unsupported_ways_of_loading_are_rejected(benches, tmp_path):
    asked = [(kind, way, "smolvlm") for kind in KINDS for way in WAYS if kind not in REFUSED]
    cells = {(refusal(*cell), cell[1]): cell for cell in asked if refusal(*cell)}
    assert len(cells) == 10  # each reason with each way of loading
    for i, (kind, way, family) in enumerate(cells.values()):
        with pytest.raises(ValueError, match=refusal(kind, way, family)):
            hf_matrix.trainer_of(benches[family], kind, way, tmp_path / str(i))


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_resumes_in_every_way_of_loading(benches, tmp_path, way):
    bench, kind = benches["smolvlm"], "LoRA, modules_to_save norm"
    settings = {"save_strategy": "steps", "save_steps": 1}
    first = hf_matrix.trainer_of(bench, kind, way, tmp_path, **settings, max_steps=2)
    with adapter_kinds.quiet():
        first.train()
        second = hf_matrix.trainer_of(bench, kind, way, tmp_path, max_steps=2)
        second.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert history(second) == pytest.approx(history(first), rel=1e-5)


def test_every_peft_kind_is_tested_or_rejected(benches, tmp_path):
    trained = {KINDS[kind].peft_type.value for kind in assigned()}
    assert trained == adapter_checks.SUPPORTED
    refused = {kind: KINDS.get(kind) or SPECIAL[kind] for kind in [*REFUSED, *SPECIAL]}
    for kind, config in refused.items():
        bench = benches["llava"]
        about = REFUSED.get(kind, "which acts outside of the model's own modules")
        with pytest.raises(ValueError, match=about):
            hf_matrix.trainer_of(bench, kind, FRESH, tmp_path)
        assert config.peft_type.value not in adapter_checks.SUPPORTED or kind in [
            *REFUSED,
            "LoRA, activated",
        ]
    for kind in [kind for kind in PeftType if kind.value not in adapter_checks.SUPPORTED]:
        config = peft.LoraConfig()
        config.peft_type = kind  # like a new kind in a later PEFT
        with pytest.raises(ValueError, match=f"kind {kind.value}[:,]"):
            adapter_checks.check_config(config)
