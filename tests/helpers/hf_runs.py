"""Short runs of RDPOTrainer on the digits, in one or several processes."""

import json
import os
import runpy
import sys
from pathlib import Path

import accelerate
import datasets
import pytest
import torch
from peft import LoraConfig
from torch.distributed.tensor import DTensor

from realign.digits import ASSETS
from realign.hf import RDPOConfig, RDPOTrainer

STEPS, BATCH, SEED = 6, 8, 3
LORA = {"r": 8, "lora_alpha": 16, "target_modules": r".*language_model.*\.(q_proj|v_proj|up_proj)"}


def config(folder, **settings) -> RDPOConfig:
    """Settings of a short run with all its files in one folder."""
    options = {
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "learning_rate": 5e-5,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": SEED,
        "reference_cache": str(folder / "cache"),
        "output_dir": str(folder / "out"),
    }
    return RDPOConfig(**(options | settings))


def history(trainer, name="loss") -> list[float]:
    """A logged value of all steps."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def shard_on_cpu() -> None:
    """Let accelerate shard on CPU processes, though it supports only accelerators."""
    state = accelerate.state.AcceleratorState
    begin = state.__init__

    def begin_sharded(self, *args, fsdp_plugin=None, **kwargs):
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = "FSDP", fsdp_plugin
            accelerate.state.PartialState._shared_state["distributed_type"] = "FSDP"

    state.__init__ = begin_sharded


class InOrder(RDPOTrainer):
    """Fix the order of records, which is drawn differently in two processes."""

    def _get_train_sampler(self, *_):
        return list(range(len(self.train_dataset)))


def launched(
    folder: str, data: str, batch: int, fsdp: bool = False, evaluated: bool = False
) -> RDPOTrainer:
    """Train LoRA on a data set, with `batch` records per step in each process.

    The five evaluation records cannot be divided evenly among processes and batches. `evaluated`
    adds an evaluation before the training, in it with FSDP.
    """
    rows = datasets.load_dataset("parquet", data_files=data, split="train", cache_dir=folder)
    settings = {"per_device_train_batch_size": batch, "max_steps": 3, "learning_rate": 1e-4}
    settings |= {"per_device_eval_batch_size": 2}
    if fsdp:
        shard_on_cpu()
        layers = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        wrap = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"} | layers
        settings |= {"fsdp": True, "fsdp_config": wrap, "eval_on_start": evaluated}
    settings = config(Path(folder), **settings)
    trainer = InOrder(
        str(ASSETS), settings, rows, eval_dataset=rows.select(range(5)),
        peft_config=LoraConfig(**LORA),
    )  # fmt: skip
    if evaluated and fsdp:
        with pytest.raises(ValueError, match="Set eval_on_start=True in RDPOConfig"):
            trainer.evaluate()
    elif evaluated:
        trainer.evaluate()
    trainer.train()
    assert (evaluated and fsdp) == any("eval_loss" in e for e in trainer.state.log_history)
    assert fsdp == any(isinstance(p, DTensor) for p in trainer.model.parameters())
    return trainer


def launched_rank(folder: str, data: str, way: str) -> None:
    """`launched` as one of two ranks. It ends as docs/trainers.md recommends."""
    fsdp, evaluated = "fsdp" in way, "evaluated" in way
    trainer = launched(folder, data, batch=4, fsdp=fsdp, evaluated=evaluated)
    trainer.save_model()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        found = json.dumps({"curve": history(trainer), "metrics": metrics})
        Path(folder, "found.json").write_text(found)
    trainer.accelerator.end_training()
    os._exit(0)


def resumed_rank(folder: str, data: str) -> None:
    """One of two ranks that shard, train with a checkpoint after step 1, and resume from it.

    Another setting of the adapter, and sharded checkpoints, are errors.
    """
    shard_on_cpu()
    rows = datasets.load_dataset("parquet", data_files=data, split="train", cache_dir=folder)
    layers = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    wrap = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"} | layers
    settings = {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-4}
    settings |= {"save_strategy": "steps", "save_steps": 1, "fsdp": True, "fsdp_config": wrap}
    curves, weights = [], []
    for resume in (None, str(Path(folder, "out", "checkpoint-1"))):
        trainer = InOrder(
            str(ASSETS), config(Path(folder), **settings), rows, peft_config=LoraConfig(**LORA)
        )
        trainer.train(resume_from_checkpoint=resume)
        curves.append([history(trainer), history(trainer, "grad_norm")])
        weights.append([p.full_tensor() for p in trainer.model.parameters() if p.requires_grad])
    assert len(curves[0][0]) == 3 and curves[0] == curves[1]
    assert weights[0] and all(map(torch.equal, *weights))
    other = LoraConfig(**LORA | {"lora_alpha": 32})
    trainer = InOrder(str(ASSETS), config(Path(folder), **settings), rows, peft_config=other)
    with pytest.raises(ValueError, match="lora_alpha is 32, was 16"):
        trainer.train(resume_from_checkpoint=resume)
    settings["fsdp_config"] = wrap | {"state_dict_type": "SHARDED_STATE_DICT"}
    with pytest.raises(ValueError, match="type is SHARDED_STATE_DICT, so the trained model would"):
        RDPOTrainer(str(ASSETS), config(Path(folder), **settings), rows, peft_config=other)
    trainer.accelerator.end_training()
    os._exit(0)


def run_script(file: str, *words: str) -> None:
    """Run `python file words` as one of the ranks."""
    sys.argv, sys.path[:0] = [file, *words], [str(Path(file).parent)]
    runpy.run_path(file, run_name="__main__")
