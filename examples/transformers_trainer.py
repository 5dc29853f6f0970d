"""rDPO on transformers' Trainer: `realign.hf.RDPOTrainer` with forests and cached references."""

from sequences import load, options

from realign.hf import RDPOConfig, RDPOTrainer


def main() -> None:
    given = options(__doc__)
    _, processor, records = load(given)
    trainer = RDPOTrainer(
        given.model,
        RDPOConfig(
            output_dir=given.output,
            per_device_train_batch_size=given.batch_size,
            max_steps=given.steps,
            learning_rate=given.learning_rate,
            lr_scheduler_type="constant",
            logging_steps=1,
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=records,
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model(f"{given.output}/model")


if __name__ == "__main__":
    main()
