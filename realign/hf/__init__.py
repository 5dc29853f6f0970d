"""rDPO on transformers' Trainer: `RDPOTrainer` and `RDPOConfig`."""

from realign.hf.config import RDPOConfig
from realign.hf.trainer import RDPOTrainer

__all__ = ["RDPOConfig", "RDPOTrainer"]
