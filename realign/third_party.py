"""Filters for messages of other libraries that need no action by the user of a command."""

from __future__ import annotations

import logging
import warnings


def silence_third_party() -> None:
    """Silence messages of other libraries in this process, except for errors."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # a bar per loaded model, for milliseconds
    # torch reads every attribute of a module when it collects state, including deprecated ones.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # Checkpoints of a process without a group are intended.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    # The decoder of images has a lower limit of its own, with an error.
    warnings.filterwarnings("ignore", message=r"Image size \(\d+ pixels\) exceeds limit")
    # The launcher would print a table for a failed rank. `launch` prints one line instead.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
