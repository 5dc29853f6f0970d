"""TRL's DPOTrainer as the benchmarks of a training step run it."""

import datasets
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from benchmarks.step_contestants import BETA, CLIP, LEARNING_RATE, move


def dpo_trainer(model, processor, folder, tune, settings, *, dtype, device, **options):
    """TRL's `DPOTrainer` on the pairs of `folder`, in their order.

    Args:
        model: folder of the model, or the model.
        processor: its processor.
        folder: holds pairs.parquet, and gets what the trainer writes.
        tune: "lora" or "full".
        settings: of LoRA (`lora_settings`).
        dtype: "bf16" for autocast, or "fp32".
        device: "cuda" or "cpu".
        options: of `DPOConfig`, besides those that all contestants share.
    """
    rows = datasets.load_dataset(
        "parquet", data_files=str(folder / "pairs.parquet"), split="train",
        cache_dir=str(folder / "datasets"),
    ).select_columns(["prompt", "chosen", "rejected", "images"])  # fmt: skip
    trainer = DPOTrainer(
        model=model,
        processing_class=processor,
        train_dataset=rows,
        peft_config=LoraConfig(**settings) if tune == "lora" else None,
        args=DPOConfig(
            output_dir=str(folder / "trl"),
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            beta=BETA,
            max_grad_norm=CLIP,
            max_length=None,
            gradient_checkpointing=False,
            bf16=dtype == "bf16",
            use_cpu=device == "cpu",
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            logging_first_step=True,
            logging_steps=1000,
            disable_tqdm=True,
            **options,
        ),
    )
    trained = trainer.model
    tower = (trained.get_base_model() if tune == "lora" else trained).model.vision_tower
    tower.requires_grad_(False)
    move(trained, tune)
    return trainer
