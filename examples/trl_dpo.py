"""rDPO in TRL's DPOTrainer: a collator that adds the third sequence, and a new loss method."""

import torch
import torch.nn.functional as F
from datasets import Dataset
from sequences import load, options
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from realign_kernels import linear_logprobs, rdpo_loss

_OURS = ("completion_mask", "visual")


class Collator(DataCollatorForVisionPreference):
    """TRL's batch of chosen and rejected; `visual` holds the same with the retrieved images."""

    def torch_call(self, examples):
        other = [row | {"images": row["retrieved_images"]} for row in examples]
        return super().torch_call([dict(row) for row in examples]) | {
            "visual": super().torch_call(other)
        }


class RDPOTrainer(DPOTrainer):
    """DPOTrainer with the rDPO loss. The reference is TRL's copy of the initial model."""

    def _compute_loss(self, model, inputs, return_outputs):
        hidden, labels = self._sequences(model, inputs)
        with torch.no_grad():
            constant, _ = self._sequences(self.ref_model, inputs)
            head = self.ref_model.lm_head.weight
            reference = linear_logprobs(constant, head, labels).sum(-1)
        out = rdpo_loss(hidden, model.lm_head.weight, labels, reference, beta=self.beta)
        chosen, rejected, visual = out.rewards.detach()
        shown = {"margins": chosen - rejected, "visual_margins": chosen - visual}
        for name, values in shown.items():
            self._metrics["train"][f"rewards/{name}"].append(values.mean().item())
        return (out.loss, {}) if return_outputs else out.loss

    @staticmethod
    def _sequences(model, inputs):
        """Hidden states (3, B, T, H) and labels (3, B, T) of chosen, rejected and visual."""
        states, labels = [], []
        for batch in (inputs, inputs["visual"]):
            given = {name: value for name, value in batch.items() if name not in _OURS}
            states.append(model.model(**given, use_cache=False).last_hidden_state)
            ids = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
            labels.append(F.pad(ids[:, 1:], (0, 1), value=-100))
        count = len(labels[0]) // 2
        states[1], labels[1] = states[1][:count], labels[1][:count]  # only the chosen half
        return (torch.cat(part).unflatten(0, (3, count)) for part in (states, labels))


def main() -> None:
    given = options(__doc__)
    model, processor, records = load(given)
    rows = [
        {
            "prompt": [*record.prompt],
            "chosen": [{"role": "assistant", "content": record.chosen}],
            "rejected": [{"role": "assistant", "content": record.rejected}],
            "images": [record.images[0].open(record.name)],
            "retrieved_images": [record.retrieved_images[0].open(record.name)],
        }
        for record in records
    ]
    trainer = RDPOTrainer(
        model=model,
        processing_class=processor,
        train_dataset=Dataset.from_list(rows),
        data_collator=Collator(processor),
        args=DPOConfig(
            output_dir=given.output,
            per_device_train_batch_size=given.batch_size,
            max_steps=given.steps,
            learning_rate=given.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            max_length=None,
            beta=0.1,
            bf16=torch.cuda.is_available(),
            remove_unused_columns=False,
            logging_steps=1,
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
        ),
    )
    trainer.train()
    trainer.save_model(f"{given.output}/model")


if __name__ == "__main__":
    main()
