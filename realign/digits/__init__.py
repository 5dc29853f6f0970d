"""The shipped default: handwritten digits, a tokenizer and a small pretrained LLaVA."""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"  # the base checkpoint, in Hugging Face format
