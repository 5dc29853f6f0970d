"""rDPO in a PyTorch loop."""

import torch
from sequences import batch_of, hidden_states, load, options, places, reference_logps

from realign_kernels import rdpo_loss


def main() -> None:
    given = options(__doc__)
    model, processor, records = load(given)
    batches = places(len(records), given.steps, given.batch_size)

    # The reference is the model before its first step, so its log-probs are constants.
    encoded = [batch_of(processor, [records[i] for i in batch]) for batch in batches]
    references = [reference_logps(model, *one) for one in encoded]

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=given.learning_rate, weight_decay=0.0)
    for step, ((inputs, labels), reference) in enumerate(zip(encoded, references, strict=True), 1):
        hidden = hidden_states(model, inputs, labels.shape[1])
        out = rdpo_loss(hidden, model.lm_head.weight, labels, reference, beta=0.1)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        chosen, rejected, visual = out.rewards.mean(1).tolist()
        print(
            f"step {step}: loss {out.loss.item():.6f}, margin {chosen - rejected:+.4f}, visual "
            f"margin {chosen - visual:+.4f}"
        )
    model.save_pretrained(f"{given.output}/model")
    processor.save_pretrained(f"{given.output}/model")


if __name__ == "__main__":
    main()
