"""Experiments on the digits: the study, and the base model's pretraining. Not in the wheel."""
