"""Stages of the pipeline, and the runner that makes their shards."""
