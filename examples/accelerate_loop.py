"""rDPO in a loop under accelerate, on GPUs or CPUs.

accelerate launch --multi_gpu --num_processes 2 accelerate_loop.py
"""

import os
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from sequences import batch_of, hidden_states, load, options, places, reference_logps
from torch import nn

from realign_kernels import rdpo_loss


class Loss(nn.Module):
    """Model and loss in one module, since DDP must wrap the whole forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs, labels, reference):
        hidden = hidden_states(self.model, inputs, labels.shape[1])
        return rdpo_loss(hidden, self.model.lm_head.weight, labels, reference, beta=0.1)


def main() -> None:
    given = options(__doc__)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    with accelerator.main_process_first():  # builds the pairs
        model, processor, records = load(given)
    ranks, rank = accelerator.num_processes, accelerator.process_index
    batches = [batch[rank::ranks] for batch in places(len(records), given.steps, given.batch_size)]
    encoded = [batch_of(processor, [records[i] for i in batch]) for batch in batches]
    model.to(accelerator.device)
    encoded = send_to_device(encoded, accelerator.device)
    references = [reference_logps(model, *one) for one in encoded]

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=given.learning_rate, weight_decay=0.0)
    module, optimizer = accelerator.prepare(Loss(model), optimizer)
    for step, ((inputs, labels), reference) in enumerate(zip(encoded, references, strict=True), 1):
        out = module(inputs, labels, reference)
        accelerator.backward(out.loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = accelerator.reduce(out.loss.detach(), "mean").item()
        accelerator.print(f"step {step}: loss {loss:.6f}")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        model.save_pretrained(f"{given.output}/model")
        processor.save_pretrained(f"{given.output}/model")
    accelerator.end_training()
    if accelerator.device.type == "cpu":  # gloo's threads can hang the process at its end
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
