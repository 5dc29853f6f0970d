"""A vision-language model over a forest batch: records to tokens, images, attention, log-probs."""
