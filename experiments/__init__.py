"""Experiments outside the wheel: the study, and pretraining of the digits base model."""
