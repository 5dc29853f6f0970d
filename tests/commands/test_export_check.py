"""`realign.export --check`: planted faults in adapters, bases and merged folders, and no others."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from adapter_kinds import load_base, save_base, save_trained
from family_cases import made
from peft import PeftModel
from runs import run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from realign import export
from realign.data.records import read_pairs, write_pairs
from realign.digits import ASSETS
from realign.modeling.loading import DTYPES, load_model
from realign.modeling.merging import cast
from realign.modeling.reference_logps import weights_digest
from realign.training.export import export_whole
from realign.training.export_check import Scores, _check_written, check_export, worst_weight

FEW = ("--check-records", "3")


@pytest.fixture(scope="module")
def adapter(other, tmp_path_factory):
    """A trained adapter, whose effect is enlarged to be far above rounding."""
    return scaled(other["adapter"], tmp_path_factory.mktemp("strong") / "model", 100)


@pytest.fixture(scope="module")
def merged(adapter, tmp_path_factory):
    """{dtype: the merged folder in it}."""
    folder = tmp_path_factory.mktemp("merged")
    return {n: export_whole(str(adapter), folder / n, dtype=d) for n, d in DTYPES.items()}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{dtype: the base in it}."""
    folder = tmp_path_factory.mktemp("bases")
    return {n: export_whole(str(ASSETS), folder / n, dtype=d) for n, d in DTYPES.items()}


@pytest.fixture
def check(pairs_file, capsys):
    """`check(model, folder)`: exit code and output of the check of an existing folder."""

    def of(model, folder, *more):
        words = ["--model", str(model), "--output", str(folder), "--check", str(pairs_file)]
        code = export.main([*words, *FEW, *map(str, more)])
        return code, "".join(capsys.readouterr())

    return of


def copied(folder, to, **changes):
    """A copy of an adapter, with changed fields of its configuration."""
    shutil.copytree(folder, to)
    file = to / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return to


def rewritten(folder, change, name="adapter_model.safetensors"):
    """Replace the weights of a folder by `change(name, weight)`."""
    weights = load_file(folder / name)
    new = {n: change(n, w).contiguous() for n, w in weights.items()}
    save_file(new, folder / name, metadata={"format": "pt"})
    return folder


def scaled(folder, to, factor):
    """A copy of an adapter with another strength."""
    return rewritten(copied(folder, to), lambda n, w: w * (factor if "lora_B" in n else 1))


def truth_of(model, processor, records):
    """Log-probs of the chosen responses, by the processor and a plain forward."""
    found = []
    for record in records:
        content = [{"type": "image"}, {"type": "text", "text": record.prompt[0]["content"]}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}])
        prompt += " assistant :"
        text = f"{prompt} {record.chosen} </s>"
        images = [image.open("r") for image in record.images]
        options = {"images": [images], "return_tensors": "pt", "add_special_tokens": False}
        size = processor(text=[prompt], **options)["input_ids"].shape[1]
        batch = processor(text=[text], **options)
        with torch.no_grad():
            logps = model(**batch).logits[0, :-1].log_softmax(-1)
        found.append(logps.gather(-1, batch["input_ids"][0, 1:, None])[size - 1 :, 0])
    return torch.cat(found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_export_passes_with_true_numbers(
    adapter, merged, pairs_file, tmp_path, dtype, check
):
    code, text = check(adapter, tmp_path / "merged", "--dtype", dtype)
    assert code == 0, text
    records, processor = read_pairs(pairs_file)[:3], AutoProcessor.from_pretrained(adapter)
    base = AutoModelForImageTextToText.from_pretrained(ASSETS, dtype=torch.float32).eval()
    before = truth_of(base, processor, records)
    after = truth_of(PeftModel.from_pretrained(base, adapter).eval(), processor, records)
    read = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    gap = (truth_of(read.eval(), processor, records) - after).abs()
    assert f"checked 3 records, {len(after)} tokens" in text
    change = (after - before).abs()
    assert change.mean() > 0.01
    for values, line in ((change, "adapter changes"), (gap, "differs from")):
        numbers = r" by (\S+) nats per token on average, at most ([^;, ]+)"
        mean, most = re.search(f"{line}.*{numbers}", text).groups()
        assert float(mean) == pytest.approx(values.mean().item(), rel=0.06, abs=1e-6)
        assert float(most) == pytest.approx(values.max().item(), rel=0.06, abs=3e-6)
    assert "It has 100% of the adapter's change" in text
    assert "the base has the digest in the card" in text and "not checked" not in text
    same = load_file(merged[dtype] / "model.safetensors")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in same.items())


def test_a_folder_that_exists_is_checked_and_not_written(adapter, merged, check):
    file = merged["bf16"] / "model.safetensors"
    before = file.stat().st_mtime_ns
    code, text = check(adapter, merged["bf16"])
    assert code == 0 and "wrote" not in text and file.stat().st_mtime_ns == before
    code, text = check(adapter, merged["bf16"], "--dtype", "fp32")
    assert code == 1 and "--dtype would have no effect, since" in text


# An adapter that is never applied


def test_an_adapter_without_effect_fails(adapter, tmp_path, check):
    scaled(adapter, tmp_path / "zero", 0)
    code, text = check(tmp_path / "zero", tmp_path / "merged")
    assert code == 1 and "changes nothing: log-probs differ" in text and "0.0e+00 nats" in text


def test_an_adapter_with_other_names_fails(adapter, tmp_path, check):
    folder = copied(adapter, tmp_path / "names")
    weights = load_file(folder / "adapter_model.safetensors")
    other = {name.replace("language_model", "text_model"): w for name, w in weights.items()}
    save_file(other, folder / "adapter_model.safetensors")
    code, text = check(folder, tmp_path / "merged")
    assert code == 1 and "does not fit its base" in text and "are missing" in text


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_base_in_place_of_the_merged_model_fails(adapter, bases, dtype, check):
    code, text = check(adapter, bases[dtype])
    assert code == 1 and "has 0% of the adapter's change. The adapter is not in it" in text


def test_a_folder_that_lost_a_layer_of_the_adapter_fails(adapter, merged, bases, tmp_path, check):
    folder = shutil.copytree(merged["fp32"], tmp_path / "part")
    plain = load_file(bases["fp32"] / "model.safetensors")
    rewritten(folder, lambda n, w: plain[n] if "layers.0." in n else w, "model.safetensors")
    code, text = check(adapter, folder)
    assert code == 1 and "the bound on the average is 0.001" in text


# One merged twice


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_that_was_merged_twice_fails(adapter, merged, tmp_path, dtype, check):
    twice = shutil.copytree(merged[dtype], tmp_path / "twice")
    once = AutoModelForImageTextToText.from_pretrained(twice)
    PeftModel.from_pretrained(once, adapter).merge_and_unload().save_pretrained(twice)
    code, text = check(adapter, twice)
    assert code == 1 and "the bound on the average" in text


@pytest.mark.parametrize("factor", [0.5, 0.3])
def test_a_weak_adapter_that_was_merged_twice_is_named_so(other, tmp_path, factor, check):
    """Its differences of log-probs are below the bound, so only the weights show the fault."""
    weak = scaled(other["adapter"], tmp_path / "weak", factor)
    folder = export_whole(str(weak), tmp_path / "merged", dtype=torch.float32)
    code, text = check(weak, folder)
    assert code == 0 and "largest error of a weight is 0.0% of" in text
    once = AutoModelForImageTextToText.from_pretrained(folder)
    PeftModel.from_pretrained(once, weak).merge_and_unload().save_pretrained(folder)
    code, text = check(weak, folder)
    assert code == 1 and "of the adapter's change. It may be merged twice, or another" in text
    # Once more the change. W + 2 BA differs from W + BA by BA.
    assert "The largest error of a weight is 100.0% of the adapter's change of it (model." in text


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [0.6, 1, 1.4])
def test_another_weak_adapter_fails(other, tmp_path, factor, dtype, check):
    weak = scaled(other["adapter"], tmp_path / "weak", 1)
    second = scaled(weak, tmp_path / "second", factor)
    rewritten(second, lambda name, w: w.flip(0) if "lora_B" in name else w)
    folder = export_whole(str(second), tmp_path / "merged", dtype=DTYPES[dtype])
    code, text = check(weak, folder)
    error = re.search(
        r"error of a weight is (\d+)\.\d% of the adapter's change of it \(model", text
    )
    assert code == 1 and int(error[1]) > 30, text


def test_a_weight_outside_of_the_adapter_is_the_base_s(adapter, merged, tmp_path, check):
    """One number of one weight differs by one unit in its last place."""
    folder, name = shutil.copytree(merged["bf16"], tmp_path / "one"), "embed_tokens"

    def change(n, w):
        if name in n:
            w.view(torch.int16)[3, 3] += 1
        return w

    rewritten(folder, change, "model.safetensors")
    code, text = check(adapter, folder)
    assert code == 1 and f"{name}.weight is missing, or differs and is not the adapter's" in text


def test_errors_of_weights_leave_out_rounding():
    """Planted: a merge of 1 + 0.003 in bf16, where neighbours of 1 are 1 - 2^-8 and 1 + 2^-7."""
    models = [torch.nn.Linear(2, 1, bias=False) for _ in range(2)]
    models[0].weight.data = torch.tensor([[1.003, 1.0]])
    for values, error in (((1, 1), 0), ((1 + 2**-7, 1), 2**-7 - 2 * 0.003), ((1, 2), 1)):
        models[1].weight.data = torch.tensor([values], dtype=torch.bfloat16)
        worst = worst_weight(*models, {"weight": 0.003})
        assert worst.error == pytest.approx(error / 0.003, rel=1e-3, abs=1e-9)
        assert worst.wrong == (error > 0)
    models[1].weight.data = torch.full((1, 2), torch.nan)
    assert worst_weight(*models, {"weight": 0.003}).wrong


def test_a_change_that_rounding_loses_fails():
    """Planted in the log-probs: bf16 keeps a third of the change."""
    change = torch.tensor([1e-4, -2e-4, 3e-4]).double()
    before, exact, third = (Scores(logps, [[1]]) for logps in (0 * change, change, change / 3))
    numbers = ("adapter", Path("merged"), torch.bfloat16, before, exact)
    with pytest.raises(ValueError, match="has 33% of .* loses the adapter's change. Export with"):
        _check_written(*numbers, third, third)
    with pytest.raises(ValueError, match="has 33% of the adapter's change. Export the model again"):
        _check_written(*numbers, exact, third)


def test_an_adapter_on_the_model_that_it_was_merged_into_fails(adapter, merged, tmp_path, check):
    """Every comparison of log-probs agrees here, so only the digest shows the fault."""
    second = copied(adapter, tmp_path / "on", base_model_name_or_path=str(merged["bf16"]))
    code, text = check(second, tmp_path / "twice")
    assert code == 1 and "was trained on another base: its card has the digest" in text


# An adapter of another base


def test_an_adapter_of_another_base_fails(adapter, tmp_path, check):
    base = shutil.copytree(ASSETS, tmp_path / "base")
    rewritten(base, lambda name, w: w if "norm" in name else w * 1.01, "model.safetensors")
    folder = copied(adapter, tmp_path / "adapter", base_model_name_or_path=str(base))
    code, text = check(folder, tmp_path / "merged")
    assert code == 1 and f"and {base} has" in text and "in bf16" in text
    card = (folder / "README.md").read_text()
    for old, new, reason in (
        ("Digest of the base weights", "Digest", "has no card with a digest of base weights"),
        ("| transformers | 5", "| transformers | 4", "one of transformers 4"),
        (
            "| seed |",
            "| base while training | quantized to 4bit |\n| seed |",
            "of quantized weights",
        ),
    ):
        (folder / "README.md").write_text(card.replace(old, new))
        code, text = check(folder, tmp_path / reason, "--check-records", 1)
        assert code == 0 and "not checked: whether the base is the one of training" in text
        assert reason in text


# Whole models


def test_a_whole_model_differs_from_its_base(pairs_file, tmp_path, check):
    run(pairs_file, tmp_path / "full", "--tune", "full", steps=2)
    trained = tmp_path / "full" / "model"
    code, text = check(trained, tmp_path / "copy", "--dtype", "fp32")
    assert code == 0 and "at least one weight differs from the base's, by the digest" in text
    base = shutil.copytree(ASSETS, tmp_path / "base")
    code, text = check(base, tmp_path / "other")
    assert code == 0 and "not checked: whether training changed it" in text
    shutil.copy(trained / "README.md", base)
    code, text = check(base, tmp_path / "third")
    assert code == 1 and "has the weights of its base, by the digest" in text
    code, text = check(trained, base)
    assert code == 1 and f"{base} has other weights than {trained}, although" in text


@pytest.mark.parametrize(
    ("computed", "message"),
    [("fp32", "not checked: whether training changed it, since its weights are rounded to bfloat1"),
     ("bf16", "has the weights of its base, by the digest")],
)  # fmt: skip
def test_a_rounded_base_is_not_called_trained(tmp_path, computed, message, check):
    """The base has weights in fp32 and the exported one in bf16, without training."""
    base = load_model(ASSETS)
    for weight in base.parameters():
        weight.data *= 1.001
    digest = weights_digest(base, DTYPES[computed])
    model = shutil.copytree(ASSETS, tmp_path / "model")
    cast(base, torch.bfloat16).save_pretrained(model)
    (model / "README.md").write_text(
        f"Digest of the base weights: `{digest}`.\n| compute dtype | {computed} |\n"
        f"| transformers | {transformers.__version__} |\n"
    )
    assert message in check(model, tmp_path / "copy")[1]


# Other kinds and families: no fault passes, and no right export fails

KINDS = [
    ("LoRA, DoRA", "smolvlm", "bf16"),
    ("LoRA, rank-stabilized", "qwen2_5_vl", "fp32"),
    ("LoRA, rank and alpha patterns", "gemma3", "bf16"),
    ("LoRA, all-linear", "llava", "bf16"),  # also in the vision tower
    ("LoRA, both ends", "smolvlm", "fp32"),  # tied embeddings
    ("LoRA, modules_to_save norm", "gemma3", "fp32"),
    ("IA3", "llava", "bf16"),
]


@pytest.mark.parametrize(("kind", "family", "dtype"), KINDS)
def test_kinds_of_adapters(tmp_path, kind, family, dtype):
    base = save_base(family, tmp_path / "base")
    records = [record for record in made(family)[1] if record.images][:2]
    save_trained(base, kind, tmp_path / "adapter")
    model = str(tmp_path / "adapter")
    folder = export_whole(model, tmp_path / "merged", dtype=DTYPES[dtype])
    line = check_export(model, folder, records)[-1]
    assert re.search(r"has (9[5-9]|10[0-5])% of the adapter's change; . of 2", line)
    twice = PeftModel.from_pretrained(load_base(folder), model).merge_and_unload()
    twice.save_pretrained(folder)
    for wrong in (folder, base):
        with pytest.raises(ValueError, match="the bound on the average is"):
            check_export(model, wrong, records)


# Inputs


def test_unusable_inputs_are_reported_before_the_merge(
    adapter, merged, pairs_file, tmp_path, capsys
):
    def refused(*words):
        assert export.main(["--model", str(adapter), *map(str, words)]) == 1
        assert not (tmp_path / "new").exists()
        return capsys.readouterr().err

    new = ("--output", tmp_path / "new")
    assert "nothing at" in refused(*new, "--check", tmp_path / "none.parquet")
    texts = [record for record in read_pairs(pairs_file)[:2]]
    write_pairs(
        tmp_path / "texts.parquet",
        [
            type(r)(r.name, ({"role": "user", "content": "Hi?"},), r.chosen, r.rejected, ())
            for r in texts
        ],
    )
    assert "holds no record with an image" in refused(*new, "--check", tmp_path / "texts.parquet")
    assert "it must be at least 1" in refused(*new, "--check", pairs_file, "--check-records", 0)
    for flag, value in (("--image-folder", tmp_path), ("--check-records", 3)):
        assert f"{flag} would have no effect without --check" in refused(*new, flag, value)
    for same in (adapter, adapter / ".." / adapter.name):
        assert "would be compared with itself" in refused("--output", same, "--check", pairs_file)
    shutil.copytree(adapter, tmp_path / "copy")
    here = ("--output", tmp_path / "copy", "--check", pairs_file)
    assert "is an adapter. Name the folder of a merged model" in refused(*here)


def test_broken_folders_fail(adapter, merged, tmp_path, check):
    folder = shutil.copytree(merged["fp32"], tmp_path / "nan")
    rewritten(folder, lambda name, w: w * torch.nan, "model.safetensors")
    code, text = check(adapter, folder)
    assert code == 1 and "are not finite" in text
    folder = shutil.copytree(merged["fp32"], tmp_path / "processor")
    for file in folder.glob("*processor_config.json"):
        file.write_text(re.sub(r'("image_mean": \[\s*)[\d.]+', r"\g<1>0.25", file.read_text()))
    code, text = check(adapter, folder)
    assert code == 1 and "give different pixel_values for record" in text
