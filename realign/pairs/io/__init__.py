"""Data sets in and out of the pipeline: formats, records, images, texts, shards."""
