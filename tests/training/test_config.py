"""Every option of every command; flags, TOML files and errors in them."""

import itertools
import re
from dataclasses import asdict, dataclass, fields

import pytest
import torch

from experiments.study.__main__ import StudyConfig
from realign import cli, config, recipes
from realign.cache import CacheConfig, FillConfig
from realign.cli import parse_sections, with_default
from realign.demo.__main__ import DemoConfig
from realign.evaluate import EvaluateConfig
from realign.export import ExportConfig
from realign.pairs.pipeline import PairsConfig
from realign_kernels import objectives

# The options with their defaults, listed so that adding one is a deliberate change.
OPTIONS = {
    config.ModelConfig: """
        model=None tune=lora recipe=None reference_model=None lora_rank=None lora_alpha=None
        lora_targets=all-linear lora_dropout=0.0 use_rslora=False use_dora=False train_vision=False
        dtype=auto quantize=None attention=auto""",
    config.DataConfig: """
        pairs=None split=None image_folder=None min_pixels=None max_pixels=None
        max_response_tokens=1024 workers=None row_tokens=0""",
    config.LossConfig: """
        objective=rdpo loss_weights=None link=None beta=None visual_weight=1.0 label_smoothing=None
        gamma=None nll_weight=None discopop_tau=None""",
    config.OptimConfig: """
        learning_rate=0.0 projector_learning_rate=0.0 schedule=cosine min_learning_rate=0.0
        optimizer=adamw adam_beta1=0.9 adam_beta2=0.999 adam_epsilon=1e-08 weight_decay=0.0
        warmup=0.03 clip=1.0 batch_size=32 micro_batch_size=16 epochs=1.0 steps=0""",
    config.ScaleConfig: """
        fsdp=False nproc_per_node=0 replicas=1 activation_checkpointing=None cpu_offload=False
        compile=False liger=False""",
    config.EvalConfig: """
        eval_pairs=None eval_split=None eval_image_folder=None eval_share=0.0 eval_every=0
        best_metric=loss early_stopping=0 load_best=None""",
    config.RunConfig: """
        output=runs/rdpo reference_cache=None cache_vision=False seed=0 save_every=50 keep=2
        resume=False merge=False dry_run=False log_every=1 tensorboard=False wandb=None
        quiet=False""",
    CacheConfig: "reference_cache=None",
    FillConfig: """
        pairs=None split=None image_folder=None model=None objective=rdpo dtype=auto quantize=None
        attention=tree min_pixels=None max_pixels=None max_response_tokens=1024 workers=None
        row_tokens=0 batch_rows=32 fsdp=False nproc_per_node=0 quiet=False""",
    PairsConfig: """
        output=runs/pairs.parquet data=None split=None format=auto image_folder=None model=None
        embed_model=None dtype=fp32 min_pixels=None max_pixels=None scenes=1024 answer=None
        keep_target=0.8 k=10 reach=None
        index=auto ceiling=0.999 floor=-1.0 hash_distance=8 masker=rules mask= segments=1
        share=None refill=infill engine=None candidates=1 temperature=0.0 tau=1.0
        similarity=lexical margin=False
        judge=None concurrency=8 requests_per_minute=None price_in=None price_out=None
        negative=retrieved work=None shard=512 max_bad=0.05 batch_size=64 workers=None
        ray=None seed=0 quiet=False""",
    EvaluateConfig: """
        model=None output=None answers=None scenes=3000 batch_size=250 biased=False seed=0
        quiet=False""",
    DemoConfig: "output=demo seeds=1 steps=100 scenes=1024 evaluation_scenes=3000 nproc_per_node=2",
    ExportConfig: """
        model=None output=None dtype=None metrics=None check=None split=None image_folder=None
        check_records=8 push=None private=False""",
    StudyConfig: "output=runs/study docs=docs testbed=both seeds=5 jobs=2 report=False",
}
TRAIN = (
    config.ModelConfig,
    config.DataConfig,
    config.LossConfig,
    config.OptimConfig,
    config.ScaleConfig,
    config.EvalConfig,
    config.RunConfig,
)
SECTIONS = ("model", "data", "loss", "optim", "scale", "eval", "run")


def test_the_options_are_these():
    for cls, options in OPTIONS.items():
        assert [f"{f.name}={f.default}" for f in fields(cls)] == options.split()
        docs = cli._field_docs(cls)
        assert list(docs) == [f.name for f in fields(cls)]
        assert all(doc.endswith((".", ").")) and len(doc) > 10 for doc in docs.values())


def test_option_names_are_unique_over_the_sections_of_training():
    names = [f.name for cls in TRAIN for f in fields(cls)]
    assert len(names) == len(set(names))
    sections = zip(SECTIONS, TRAIN, strict=True)
    defaults = {section: {f.name: f.default for f in fields(cls)} for section, cls in sections}
    defaults["optim"]["learning_rate"] = 5e-5  # 0 chooses by model
    defaults["model"]["attention"] = "tree"  # auto
    defaults["model"] |= {"lora_rank": 32, "lora_alpha": 64.0}  # None
    defaults["loss"]["beta"] = 0.1  # None
    defaults["model"]["dtype"] = "bf16" if torch.cuda.is_available() else "fp32"  # auto
    assert config.TrainConfig().to_dict() == defaults
    assert config.parse(["--compile"]).model.attention == "tree"


@pytest.mark.parametrize(
    ("arguments", "rate"),
    [([], 5e-5), (["--model", "llava"], 1e-5), (["--model", "llava", "--learning-rate", "2"], 2.0)],
)
def test_the_learning_rate_suits_the_model(arguments, rate):
    assert config.parse(arguments).optim.learning_rate == rate


def test_the_recipe_sets_the_values_of_the_paper():
    """Xing et al., arXiv 2502.13146: rank 128, alpha 256, 1e-5 and 2e-5, 4 x 8 records, one epoch,
    AdamW with a cosine."""
    found = config.parse(["--recipe", "paper"])
    model, optim, loss = found.model, found.optim, found.loss
    assert (model.tune, model.lora_rank, model.lora_alpha) == ("lora", 128, 256)
    assert (model.lora_targets, optim.optimizer, optim.schedule) == (
        "all-linear",
        "adamw",
        "cosine",
    )
    assert (optim.learning_rate, optim.warmup, optim.weight_decay) == (1e-5, 0.03, 0)
    assert (optim.projector_learning_rate, loss.visual_weight) == (2e-5, 1)
    assert (optim.batch_size, optim.epochs, loss.objective, loss.beta) == (32, 1, "rdpo", 0.1)
    assert found.to_dict()["model"]["recipe"] == "paper"


@pytest.mark.parametrize(
    ("arguments", "rank", "alpha", "rate"),
    [
        (["--lora-rank", "8"], 8, 16, 5e-5),
        (["--recipe", "paper", "--lora-rank", "16"], 16, 32, 1e-5),
        (["--recipe", "paper", "--lora-alpha", "9", "--learning-rate", "2"], 128, 9, 2),
        (["--recipe", "paper", "--tune", "full"], None, None, 1e-5),
    ],
)
def test_given_options_override_the_recipe(arguments, rank, alpha, rate, tmp_path):
    found = config.parse(arguments)
    assert (found.model.lora_rank, found.model.lora_alpha) == (rank, alpha)
    assert found.optim.learning_rate == rate
    file = tmp_path / "run.toml"
    file.write_text('[model]\nrecipe = "paper"\n[optim]\nlearning_rate = 3.0\n')
    from_file = config.parse(["--config", str(file), *arguments])
    assert from_file.optim.learning_rate == (2 if rate == 2 else 3)


def test_the_other_recipe_sets_what_did_best_in_the_study():
    """docs/study.md: weight 2, LoRA of rank 16, and 2e-4 for rDPO on photographs."""
    found = config.parse(["--recipe", "recommended"])
    assert (found.loss.objective, found.loss.visual_weight) == ("rdpo", 2)
    assert (found.model.lora_rank, found.model.lora_alpha) == (16, 32)
    assert found.optim.learning_rate == 2e-4
    given = ["--recipe", "recommended", "--visual-weight", "1", "--lora-rank", "32"]
    found = config.parse(given)  # defaults that are given override it, too
    assert (found.loss.visual_weight, found.model.lora_rank) == (1, 32)
    assert found.model.lora_alpha == 64
    assert config.parse(["--recipe", "recommended", "--objective", "dpo"]).loss.visual_weight == 1


def test_the_plan_lists_a_recipe_with_its_sources_and_what_overrides_it():
    given = ["--recipe", "paper", "--learning-rate", "3e-5", "--tune", "full", "--model", "x"]
    rows = recipes.rows("paper", config.parse(given).to_dict())
    assert rows["  --learning-rate"] == "1e-05; overridden: 3e-05 (paper, training details)"
    assert rows["  --lora-rank"].startswith("128; overridden: none (paper")
    for recipe in recipes.RECIPES.values():
        assert all(value.source and len(value.source) > 10 for value in recipe.values)
        options = {(v.section, v.name) for v in recipe.values}
        assert len(options) == len(recipe.values)
        for section, name in options:
            assert name in asdict(getattr(config.TrainConfig(), section))


@pytest.mark.parametrize(("cuda", "found"), [(True, "bf16"), (False, "fp32")])
def test_the_dtype_suits_the_device(cuda, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert config.parse([]).model.dtype == FillConfig(pairs="x").dtype == found
    assert config.parse(["--dtype", "fp32"]).model.dtype == "fp32"
    assert not config.parse([]).sharded  # LoRA layers cast their fp32 adapters
    assert config.parse(["--tune", "full"]).sharded == cuda  # FSDP2 casts trained weights


@pytest.mark.parametrize(
    "parse",
    [
        config.parse,
        lambda arguments: parse_sections(
            {"pairs": PairsConfig}, prog="pairs", description="", arguments=arguments
        ),
    ],
    ids=["train", "pairs"],
)
def test_help_shows_every_flag_with_its_default(parse, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    shown = TRAIN if "--objective" in text else (PairsConfig,)
    for cls in shown:
        for f in fields(cls):
            assert f"--{f.name.replace('_', '-')}" in text
            assert with_default("", f.default) in text


def test_flags_beat_the_file_and_the_file_beats_the_defaults(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        '[model]\ntune = "full"\n[loss]\nbeta = 0.2\nvisual_weight = 2\n'
        "[optim]\nbatch_size = 8\nlearning_rate = 3e-5\n[scale]\nfsdp = true\n[run]\nseed = 5\n"
    )
    found = config.parse(["--config", str(file), "--beta", "0.3", "--no-fsdp", "--seed", "6"])
    assert (found.loss.beta, found.scale.fsdp, found.run.seed) == (0.3, False, 6)
    assert (found.model.tune, found.optim.batch_size, found.optim.learning_rate) == (
        "full",
        8,
        3e-5,
    )
    assert found.loss.visual_weight == 2.0 and type(found.loss.visual_weight) is float
    assert found.loss.objective == "rdpo"
    assert config.parse([]) == config.TrainConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[los]\nbeta = 0.1\n",
            r"unknown section \[los\]; use model, data, loss, optim, scale, eval, run",
        ),
        ("beta = 0.1\n", r"key 'beta' is outside a section. Put it under \[loss\]\."),
        ("betta = 0.1\n", "key 'betta' is outside a section. The sections are model, data, loss,"),
        (
            "[loss]\nbetta = 0.1\n",
            r"unknown key 'betta' in \[loss\]; it has objective, loss_weights",
        ),
        ('[loss]\nbeta = "0.1"\n', "loss.beta is '0.1'; it must be of type float"),
        ("[optim]\nbatch_size = 8.0\n", "optim.batch_size is 8.0; it must be of type int"),
        ("[optim]\nbatch_size = true\n", "optim.batch_size is True; it must be of type int"),
        ('[data]\npairs = ["a.parquet"]\n', "data.pairs is .*; it must be of type str"),
        ("[model]\nlora_alpha = 1" + "0" * 400, "lora_alpha"),
        ("model = 3\n", "model is 3, not a section. Write .model."),
        ('{"optim": {"steps": 3}}', "is not valid TOML: .* It looks like JSON"),
        ("[scale]\nfsdp = 1\n", "scale.fsdp is 1; it must be of type bool"),
        ("[model]\nmodel = 3\n", "model.model is 3; it must be of type str"),
        ("[loss\nbeta = 1\n", "run.toml is not valid TOML"),
        ("[loss]\nbeta = 0\n", "^--beta is 0"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path, text, message):
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        config.parse(["--config", str(file)])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="^--config: there is no file .*no-such.toml. Check"
    ):
        config.parse(["--config", str(tmp_path / "no-such.toml")])
    with pytest.raises(
        ValueError, match="^--config: .* cannot be read .Is a directory.. Name a TOML"
    ):
        config.parse(["--config", str(tmp_path)])


@pytest.mark.parametrize(
    "arguments", [["--no-such-flag"], ["--beta", "much"], ["--batch-size", "1.5"], ["stray"]]
)
def test_a_mistake_on_the_command_line_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        config.parse(arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eval-every", "5"], "^--eval-every would have no effect: no pairs are held out"),
        (["--early-stopping", "5"], "^--early-stopping would have no effect: no pairs are held"),
        (["--best-metric", "x"], "^--best-metric would have no effect: no pairs are held out"),
        (["--no-load-best"], "^--load-best would have no effect.* or add --eval-pairs or --eval-"),
        (["--eval-split", "a"], "^--eval-split would have no effect: there are no other pairs"),
        (["--eval-share", "0.1", "--eval-image-folder", "a"], "^--eval-image-folder would have no"),
        (["--eval-pairs", "a", "--eval-share", "0.1"], "^--eval-pairs and --eval-share both give"),
        (["--eval-share", "1"], "^--eval-share is 1; it is a share of the pairs, below 1"),
        (["--eval-share", "nan"], "^--eval-share is nan; it must be finite"),
        (["--eval-share", "0.1", "--eval-every", "-1"], "^--eval-every is -1"),
        (["--objective", "ppo"], "objective is 'ppo'; it must be one of dpo, rdpo, mdpo"),
        (["--clip", "-1"], "^--clip is -1.0; it must be finite and not negative"),
        (["--steps", "-3"], "steps is -3; it must be finite and not negative"),
        (["--warmup", "5"], "warmup is 5.0; it is a share"),
        (["--learning-rate", "inf"], "^--learning-rate is inf"),
        (["--train-vision"], "^--train-vision would have no effect.*--tune full"),
        (["--objective", "dpo", "--visual-weight", "5"], "--visual-weight would have no effect"),
        (["--nproc-per-node", "3"], "--nproc-per-node would have no effect.*--fsdp"),
        (["--replicas", "2"], "--replicas would have no effect.*--fsdp"),
        (["--liger", "--compile"], "--liger and --compile both fuse"),
        (
            ["--attention", "flash", "--dtype", "fp32"],
            "'flash', which computes in half.* Add --dtype bf16",
        ),
        (
            ["--attention", "math"],
            "attention is 'math'; it must be one of auto, tree, flash, sdpa, eager, flex",
        ),
        (["--quiet", "--log-every", "5"], "--log-every would have no effect with --quiet"),
        (
            ["--tune", "full", "--cache-vision"],
            "--cache-vision keeps.* Leave it out, or use --tune",
        ),
        (["--tune", "full", "--lora-rank", "128"], "--lora-rank or --lora-alpha would have no eff"),
        (["--recipe", "released"], "recipe is 'released'; it must be one of paper, recommended"),
        (["--tune", "full", "--use-dora"], "--use-dora would have no effect: there is no LoRA"),
        (["--tune", "full", "--lora-targets", "q"], "--lora-targets would have no effect"),
        (["--lora-dropout", "1"], "--lora-dropout is 1.0; it must be from 0 to below 1"),
        (["--lora-targets", "(q"], "--lora-targets is '.q', neither names nor a regular"),
        (["--lora-targets", " , "], "--lora-targets is empty"),
        (["--schedule", "cos"], "schedule is 'cos'; it must be one of cosine, linear, constant"),
        (["--schedule", "constant", "--min-learning-rate", "1e-9"], "--min-learning-rate would"),
        (["--min-learning-rate", "1"], "--min-learning-rate is 1, above --learning-rate, 5e-05"),
        (["--optimizer", "adam"], "optimizer is 'adam'; it must be one of adamw, sgd, adafactor"),
        (["--adam-beta1", "1"], "--adam-beta1 is 1.0; it must be from 0 to below 1"),
        (["--adam-epsilon", "0"], "--adam-epsilon is 0.0; it must be finite and above 0"),
        (["--optimizer", "lion", "--adam-beta2", "0.9"], "--adam-beta2 would.*: lion is no AdamW"),
        (["--optimizer", "lion", "--fsdp"], "--optimizer lion keeps a state that FSDP2 cannot"),
        (
            ["--optimizer", "adafactor", "--tune", "full", "--dtype", "bf16"],
            "and --tune full in bf16 uses FSDP2. Use --optimizer adamw",
        ),
        (
            ["--recipe", "paper", "--cache-vision"],
            "--cache-vision keeps image features as the projector returns.*-learning-rate 0",
        ),
        (["--tune", "full", "--merge"], "--merge would have no effect.* or use --tune lora"),
        (["--beta", "0"], "beta is 0.0; it must be finite and above 0"),
        (["--beta", "nan"], "beta is nan"),
        (["--tune", "qlora"], "tune is 'qlora'; it must be one of lora, full"),
        (["--dtype", "fp16"], "dtype is 'fp16'; it must be one of auto, fp32, bf16"),
        (["--learning-rate", "-1"], "--learning-rate is -1.0"),
    ],
)
def test_a_bad_training_value_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        config.parse(arguments)


def test_values_that_must_be_above_0():
    names = "replicas log_every batch_size keep micro_batch_size epochs lora_rank beta lora_alpha"
    for name in (*names.split(), "max_response_tokens"):
        flag = f"--{name.replace('_', '-')}"
        with pytest.raises(ValueError, match=rf"^{flag} is 0(\.0)?; it must be finite and above 0"):
            config.parse(["--fsdp", flag, "0"])


@pytest.mark.parametrize("name", objectives.PRESETS)
def test_every_preset_can_be_named(name):
    assert config.parse(["--objective", name]).loss.objective == name
    docs = cli._field_docs(config.LossConfig)
    assert re.search(rf"\b{name}\b", docs["objective"])
    for setting in ("visual_weight", "label_smoothing", "gamma", "nll_weight", "discopop_tau"):
        has = setting in objectives.settings(name)
        assert bool(re.search(rf"\b{name}\b", docs[setting])) == has
        given = ["--objective", name, f"--{setting.replace('_', '-')}", "0.25"]
        if has:
            loss = config.parse(given).loss
            assert getattr(loss, setting) == 0.25
            assert loss.build() == objectives.get(name, **{setting: 0.25})
        else:
            with pytest.raises(ValueError, match=f"no effect: {name} has no such setting. Leave"):
                config.parse(given)


def test_sums_and_links():
    words = ["--objective", "sigmoid+bco_pair+sft", "--loss-weights", "0.8,0.2,1"]
    found = config.parse(words).loss
    assert found.build() == objectives.get("sigmoid+bco_pair+sft", (0.8, 0.2, 1))
    assert (found.beta, found.gamma) == (0.1, None)
    found = config.parse(["--link", "simpo", "--gamma", "0.5", "--visual-weight", "2"]).loss
    assert found.build() == objectives.with_visual(objectives.simpo(gamma=0.5), 2)
    assert found.beta == 2.0
    found = config.parse(["--link", "sigmoid+sft", "--loss-weights", "1,0.5", "--beta", "0.2"]).loss
    assert found.build() == objectives.with_visual(
        objectives.get("sigmoid+sft", (1, 0.5), beta=0.2)
    )


def test_a_sum_on_the_command_line_is_that_of_the_library():
    """Or both refuse it: parts with different defaults of a setting."""
    names, made = [n for n in objectives.PRESETS if n not in ("lpoi", "mispdpo")], 0
    for pair in itertools.permutations(names, 2):
        try:
            expected = objectives.get("+".join(pair))
        except ValueError:
            with pytest.raises(ValueError, match="different defaults of"):
                config.LossConfig(objective="+".join(pair))
        else:
            assert config.LossConfig(objective="+".join(pair)).build() == expected
            made += 1
    assert made > 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--objective mdpo --link simpo", "--link would have no effect: mdpo has its own"),
        ("--link simop", "--link is 'simop'; it must be one of dpo, rdpo"),
        ("--link rdpo", "--link is 'rdpo'; it must be an objective that compares the chosen"),
        ("--link sft", "--link is 'sft'; it must be an objective that compares the chosen"),
        ("--objective dpo+rdop", "--objective is 'dpo.rdop'; it must be one of"),
        ("--objective dpo --loss-weights 1", "--loss-weights would have no effect: dpo is no sum"),
        ("--objective dpo+sft --loss-weights 1,x", "--loss-weights is '1,x'. Give numbers with"),
        ("--objective dpo+sft --loss-weights 1", "--loss-weights is '1'; it must have 2 numbers"),
        (
            "--objective dpo+simpo",
            "different defaults of beta: 0.1 of dpo, 2.0 of simpo. Give beta",
        ),
        ("--objective cdpo+exo_pair", "of label_smoothing: 0.1 of cdpo, 0.001 of exo_pair. Give"),
        ("--objective dpo+sigmoid", "has an objective twice"),
        ("--objective dpo+sft --loss-weights 0,0", "weights of a sum are all 0"),
        ("--objective exo_pair --label-smoothing 0", "label-smoothing of term 'text' must be in"),
    ],
)
def test_a_bad_sum_or_link_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        config.parse(arguments.split())


def test_percent_signs_and_optional_types_reach_argparse(capsys):
    @dataclass
    class Odd:
        share: float | None = None
        """About 50 % of it."""

    with pytest.raises(SystemExit):
        parse_sections({"odd": Odd}, prog="odd", description="", arguments=["--help"])
    assert "About 50 % of it." in capsys.readouterr().out
    parsed = parse_sections({"odd": Odd}, prog="", description="", arguments=["--share", "0.5"])
    assert parsed["odd"] == Odd(share=0.5)


def test_empty_values_are_refused_and_lists_of_a_file_are_taken(tmp_path):
    for flag in ("--reference-model", "--eval-pairs", "--pairs", "--model", "--image-folder"):
        with pytest.raises(ValueError, match=f"{flag} is empty. Give a value, or leave it out"):
            config.parse([flag, ""])
    file = tmp_path / "run.toml"
    file.write_text('[loss]\nobjective = "dpo+sft"\nloss_weights = [0.8, 1]\n')
    expected = objectives.get("dpo+sft", (0.8, 1))
    assert config.parse(["--config", str(file)]).loss.build() == expected
