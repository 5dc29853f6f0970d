"""Filters for messages of other libraries on which the user of a command cannot act."""

from __future__ import annotations

import logging
import warnings


def silence_third_party() -> None:
    """Silence messages of other libraries in this process; errors and our own warnings stay."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # one bar per loaded model, for milliseconds
    # torch reads every attribute of a module when it collects state; some are deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # A checkpoint of a process without a group is intended.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    # The launcher would print a table for a failed rank; `launch` prints one line.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
