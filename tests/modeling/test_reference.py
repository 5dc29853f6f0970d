"""Reference log-probs of real models: cache misses, cache hits, and their values."""

import re

import numpy as np
import pytest
import torch
from forked_ranks import run_command, run_ranks
from runs import encoded
from test_forest import LOGP_TOLERANCE, separate_logps

from realign.config import parse
from realign.data import images
from realign.data.records import StoredImage, read_pairs, write_pairs
from realign.digits import ASSETS
from realign.files import read_jsonl
from realign.modeling import reference_logps
from realign.modeling.loading import adapters_off, add_lora, load_model, load_processor
from realign.modeling.model import ForestModel
from realign.train import train
from realign_kernels import ReferenceCache, use_backend

CPU = torch.device("cpu")
REAL_FILL = reference_logps.fill


@pytest.fixture(scope="module")
def data(pairs_file):
    """Examples and images of the pairs."""
    return encoded(pairs_file)


def fill(cache, model, examples, store, **options):
    options = {"row_tokens": 128, "batch_rows": 16, "device": CPU} | options
    return reference_logps.fill(
        cache, model, examples, store, progress=False, log=lambda _: None, **options
    )


# --- cache misses and hits, from the command line ---


class Filled(Exception):
    """Ends a run after its reference pass."""


class Trainer:
    """Runs training up to its first step with its own cache, and counts the cached leaves."""

    def __init__(self, folder, pairs, capsys, monkeypatch):
        self.folder, self.pairs, self.capsys, self.runs = folder, pairs, capsys, 0
        self.monkeypatch = monkeypatch

    def fill_only(self, *arguments, **options):
        REAL_FILL(*arguments, **options)
        raise Filled

    def known(self, *options, pairs=None, ranks=0):
        self.runs += 1
        given = ["--pairs", pairs or self.pairs, "--output", self.folder / f"run {self.runs}"]
        given += ["--reference-cache", self.folder / "cache", "--steps", 1, "--batch-size", 8]
        given += [*options, "--quiet"] + (["--fsdp"] if ranks else [])
        given = [str(word) for word in given]
        if ranks:
            log = str(self.folder / f"run {self.runs}.log")
            shown = run_ranks(run_command, ranks, log, "realign.train", given)
        else:
            self.capsys.readouterr()
            with self.monkeypatch.context() as patch, pytest.raises(Filled):
                patch.setattr(reference_logps, "fill", self.fill_only)
                train(parse(given))
            shown = self.capsys.readouterr().out
        known, total = re.search(r"([\d,]+) of ([\d,]+) leaves known", shown).groups()
        return int(known), int(total), shown


@pytest.fixture
def trainer(tmp_path, pairs_file, capsys, monkeypatch):
    return Trainer(tmp_path, pairs_file, capsys, monkeypatch)


def test_cache_hits(trainer, pairs_file, tmp_path):
    known, total, _ = trainer.known()
    assert known == 0 and total == 3 * len(read_pairs(pairs_file))
    settings = ["--learning-rate", "1e-3", "--batch-size", 4, "--micro-batch-size", 2, "--seed", 5]
    settings += ["--row-tokens", 300, "--beta", 0.5, "--visual-weight", 0.3, "--lora-rank", 4]
    settings += ["--output", tmp_path / "another folder", "--max-response-tokens", 100]
    assert trainer.known(*settings)[0] == total
    known, all_leaves, _ = trainer.known("--tune", "full", "--objective", "dpo")
    assert known == all_leaves < total
    paths = []
    for i, record in enumerate(read_pairs(pairs_file)[::-1]):  # in another order, and
        path = tmp_path / f"renamed {i}.bmp"  # with images as files of other names
        path.write_bytes(record.images[0].data)
        paths.append(type(record)(**vars(record) | {"images": (StoredImage(path=str(path)),)}))
    write_pairs(tmp_path / "renamed.parquet", paths)
    assert trainer.known(pairs=tmp_path / "renamed.parquet")[0] == total
    assert trainer.known(ranks=2)[0] == total
    record.images[0].open("").save(path)  # in another format: other bytes of the same pixels
    known, total, _ = trainer.known(pairs=tmp_path / "renamed.parquet")
    assert known == total - 2


def test_bf16_leaves_hit_for_other_ranks_and_commands(trainer, pairs_file, tmp_path):
    """Two sharding ranks fill the cache. LoRA and full training on one process then hit."""
    words = ["fill", "--pairs", pairs_file, "--quiet", "--reference-cache", tmp_path / "cache"]
    words += ["--dtype", "bf16", "--batch-rows", 4, "--fsdp"]
    log = str(tmp_path / "fill.log")
    shown = run_ranks(run_command, 2, log, "realign.cache", list(map(str, words)))
    assert shown.count("leaves known") == 1
    logs = list((tmp_path / "cache").glob("*/*.log"))
    assert len(logs) == 2 and min(log.stat().st_size for log in logs) > 32 * 10
    known, total, _ = trainer.known("--dtype", "bf16")
    assert known == total
    assert trainer.known("--dtype", "bf16", "--tune", "full")[0] == total
    assert trainer.known()[0] == 0  # fp32


def adapter_on_the_base(folder, alpha=8.0):
    """A LoRA folder that changes the base's output. Several differ only in alpha."""
    vlm = load_model(ASSETS)
    adapter = add_lora(vlm, 4, alpha)
    torch.manual_seed(0)
    for name, parameter in vlm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapter.save_pretrained(folder)
    load_processor(ASSETS).save_pretrained(folder)
    return folder


def test_cache_misses(trainer, pairs_file, tmp_path):
    """From the command line. `test_fingerprint` covers all parts of the fingerprint."""
    _, total, _ = trainer.known()
    for alpha in (8.0, 16.0):
        model = adapter_on_the_base(tmp_path / f"adapter {alpha}", alpha)
        assert trainer.known("--model", model, "--merge")[0] == 0
        assert trainer.known("--model", model, "--tune", "full")[0] == total
    known, _, shown = trainer.known("--dtype", "bf16")
    assert known == 0 and "dtype (float32, here bfloat16)" in shown

    records = read_pairs(pairs_file)
    image = records[0].images[0].open("").copy()
    r, g, b = image.getpixel((5, 5))
    image.putpixel((5, 5), (r ^ 1, g, b))
    prompt = ({"role": "user", "content": "name the digits ?"},)
    assert prompt != records[0].prompt
    shorter = records[2].rejected.rsplit(" ", 1)[0]  # as truncation would leave it
    edits = [  # each with its number of missing leaves
        ({"images": (StoredImage.from_pil(image),)}, 2),
        ({"chosen": records[1].chosen + " seven"}, 2),
        ({"rejected": shorter}, 1),
        ({"prompt": prompt}, 3),
    ]
    for i, (changes, _) in enumerate(edits):
        records[i] = type(records[i])(**vars(records[i]) | changes)
    write_pairs(tmp_path / "edited.parquet", records)
    missing = sum(leaves for _, leaves in edits)
    assert trainer.known(pairs=tmp_path / "edited.parquet")[0] == total - missing


def test_a_changed_chat_template_misses(data, pairs_file):
    examples, _ = data
    other = load_processor(ASSETS)
    text = other.chat_template
    other.chat_template = text.replace("{{", "{{ 'name' }}{{", 1)
    changed, _ = encoded(pairs_file, other)
    assert reference_logps.digest_of(examples) != reference_logps.digest_of(changed)
    for a, b in zip(examples, changed, strict=True):
        assert len(b.roots[0].ids) > len(a.roots[0].ids)


def test_fingerprint(processor, vlm, monkeypatch):
    def of(model=vlm, processor=processor, dtype=torch.float32, device=CPU, kernels="eager"):
        return reference_logps.fingerprint(model, processor, dtype, device, kernels)

    base = of()
    assert base == of(load_model(ASSETS))
    # The digest is of the weights in the forward: loading in bf16 and casting later are equal.
    assert of(load_model(ASSETS, torch.bfloat16), dtype=torch.bfloat16) == of(dtype=torch.bfloat16)
    changed = {"dtype": of(dtype=torch.bfloat16), "kernels": of(kernels="compiled")}
    with monkeypatch.context() as patch:
        patch.setattr(reference_logps, "_logits_are_rounded", lambda dtype, device: False)
        changed["device"] = of(device=torch.device("cuda"))
    with use_backend(
        "torch"
    ):  # rounds bf16 logits on a CPU, which changes a log-prob by up to 0.1 nats
        rounded = of(dtype=torch.bfloat16)
    assert rounded["logits"] == "rounded" and base["logits"] == "exact"
    moved = load_model(ASSETS)
    with torch.no_grad():
        moved.lm_head.weight.view(torch.int32)[0, 0] ^= 1
    changed["weights"] = of(moved)
    other = load_model(ASSETS)
    other.config.text_config.rms_norm_eps *= (
        2  # a setting outside the weights that changes log-probs
    )
    changed["config"] = of(other)
    eager = load_model(ASSETS)
    eager.set_attn_implementation("eager")
    changed["attention"] = of(eager)
    settings = load_processor(ASSETS)
    settings.image_processor.rescale_factor = 1 / 254
    changed["processor"] = of(processor=settings)
    with monkeypatch.context() as patch:
        patch.setattr(images, "_RULES", 2)
        changed["decoder"] = of()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
        changed["matmul"] = of()
    slower = load_model(ASSETS)
    slower.model.language_model.rotary_emb.inv_freq.div_(2)  # in no state dict
    assert of(slower)["weights"] != base["weights"]
    for name, parts in changed.items():
        differing = {key for key in base if parts[key] != base[key]}
        assert name in differing
        allowed = {"dtype", "weights", "logits"} if name == "dtype" else {name}
        assert differing <= allowed, name
    assert set(base) == {*changed, "logits", "transformers", "layout"}


# --- the values ---


def test_values_are_those_of_separate_live_forwards(data, vlm, tmp_path):
    examples, store = data
    with ReferenceCache.open(tmp_path, {"weights": "digits"}) as cache, torch.no_grad():
        found = fill(cache, ForestModel(vlm).eval(), examples, store)
        truth = separate_logps(vlm, examples, store)
    assert found.dtype == torch.float64 and found.shape == (3, len(examples))
    assert (found - truth).abs().max() < LOGP_TOLERANCE


def test_bf16_values_err_no_more_than_separate_bf16_forwards(data, vlm, tmp_path, monkeypatch):
    """Against fp32. The shipped weights are bf16, so both models have the same weights."""
    examples, store = data
    narrow = load_model(ASSETS, torch.bfloat16).eval()
    with ReferenceCache.open(tmp_path, {"weights": "digits"}) as cache, torch.no_grad():
        found = fill(cache, ForestModel(narrow, dtype=torch.bfloat16).eval(), examples, store)
        truth = separate_logps(vlm, examples, store)
        get = store.bundle
        monkeypatch.setattr(
            store, "bundle", lambda key: {"pixel_values": get(key)["pixel_values"].bfloat16()}
        )
        eager = separate_logps(narrow, examples, store)
    ours, theirs = ((a - truth).abs() for a in (found, eager))
    assert ours.mean() <= 1.2 * theirs.mean() and ours.max() <= 1.5 * theirs.max()
    assert 0.005 < ours.max() < 0.5  # 0.1 to 0.2 nats: bf16 has 8 bits, and logits reach 30


def test_adapters_are_off_and_come_back(data, vlm, tmp_path):
    examples, store = data
    adapted = load_model(ASSETS)
    add_lora(adapted, 4, 8.0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    grads = {n: p.requires_grad for n, p in adapted.named_parameters()}
    with ReferenceCache.open(tmp_path, {"weights": "base"}) as cache:
        truth = fill(cache, ForestModel(vlm).eval(), examples, store)
    with ReferenceCache.open(tmp_path, {"weights": "adapted"}) as cache:
        model = ForestModel(adapted).eval()
        assert torch.equal(fill(cache, model, examples, store), truth)
    assert grads == {n: p.requires_grad for n, p in adapted.named_parameters()}
    with torch.no_grad():
        moved = separate_logps(adapted, examples[:1], store)
        with adapters_off(adapted):
            base = separate_logps(adapted, examples[:1], store)
    assert (moved - truth[:, :1]).abs().max() > 1
    assert (base - truth[:, :1]).abs().max() < LOGP_TOLERANCE


def test_training_with_the_cache_equals_training_with_a_live_reference(
    trainer, tmp_path, monkeypatch
):
    """The reference is a second model, with one sequence per leaf, over four steps of Adam."""
    options = ["--pairs", trainer.pairs, "--steps", 4, "--batch-size", 8, "--quiet"]
    options += ["--learning-rate", "3e-4"]

    def curve(output):
        train(parse([str(word) for word in [*options, "--output", output]]))
        return read_jsonl(output / "metrics.jsonl")

    cached = curve(tmp_path / "cached")
    base, live = load_model(ASSETS).eval(), []

    class Live:
        def __init__(self, examples, store):
            self.examples, self.store = examples, store

        def float(self):
            return self

        def __getitem__(self, place):
            part = [self.examples[i] for i in place[1]]
            with torch.no_grad():
                live.append(len(part))
                return separate_logps(base, part, self.store).float()

    monkeypatch.setattr(
        reference_logps,
        "fill",
        lambda cache, model, examples, store, **_: Live(examples, store),
    )
    followed = curve(tmp_path / "live")
    assert sum(live) == 4 * 8
    for name in ("loss", "grad_norm", "rewards/margins", "rewards/visual_margins"):
        ours = np.array([entry[name] for entry in cached])
        theirs = np.array([entry[name] for entry in followed])
        assert np.abs(ours - theirs).max() <= 2e-5 * max(1, np.abs(theirs).max()), name
    assert cached[-1]["loss"] < cached[0]["loss"] - 0.01


def test_a_killed_pass_of_a_real_model_resumes_with_the_same_bits(data, forest_model, tmp_path):
    examples, store = data
    with ReferenceCache.open(tmp_path / "whole", {"weights": "x"}) as cache:
        truth = fill(cache, forest_model, examples, store, batch_rows=4)

    class Killed(BaseException):
        pass

    class Dying(torch.nn.Module):
        def __init__(self, after):
            super().__init__()
            self.left = after

        def logps(self, batch):
            self.left -= 1
            if self.left < 0:
                raise Killed
            return forest_model.logps(batch)

    for after in (1, 4):
        folder = tmp_path / f"after {after}"
        with ReferenceCache.open(folder, {"weights": "x"}) as cache, pytest.raises(Killed):
            fill(cache, Dying(after).eval(), examples, store, batch_rows=4)
        with ReferenceCache.open(folder, {"weights": "x"}) as cache:
            held = len(cache)
            assert held > 0
            assert torch.equal(fill(cache, forest_model, examples, store, batch_rows=4), truth)
