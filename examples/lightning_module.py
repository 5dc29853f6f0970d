"""rDPO in Lightning."""

import lightning
import torch
from sequences import batch_of, hidden_states, load, options, places, reference_logps
from torch.utils.data import DataLoader

from realign_kernels import rdpo_loss


class RDPO(lightning.LightningModule):
    """A vision-language model with the rDPO loss. A batch: inputs, labels, reference log-probs."""

    def __init__(self, model: torch.nn.Module, learning_rate: float) -> None:
        super().__init__()
        self.model, self.learning_rate = model, learning_rate

    def training_step(self, batch, step: int) -> torch.Tensor:
        inputs, labels, reference = batch
        hidden = hidden_states(self.model, inputs, labels.shape[1])
        out = rdpo_loss(hidden, self.model.lm_head.weight, labels, reference, beta=0.1)
        self.print(f"step {step + 1}: loss {out.loss.item():.6f}")
        return out.loss

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=0.0)


def main() -> None:
    given = options(__doc__)
    model, processor, records = load(given)
    encoded = [
        batch_of(processor, [records[i] for i in batch])
        for batch in places(len(records), given.steps, given.batch_size)
    ]
    batches = [(*one, reference_logps(model, *one)) for one in encoded]
    trainer = lightning.Trainer(
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(RDPO(model.train(), given.learning_rate), DataLoader(batches, batch_size=None))
    model.save_pretrained(f"{given.output}/model")
    processor.save_pretrained(f"{given.output}/model")


if __name__ == "__main__":
    main()
