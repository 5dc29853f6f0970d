"""Vision-language models on forest batches: encoding of records, images, attention, log-probs."""
