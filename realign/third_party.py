"""Filters for messages of other libraries that need no action by the user of a command."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from realign.terminal import printable

# PEFT imports bitsandbytes, which then misses kernels on the Hub on CPUs with AVX512-BF16.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def printable_messages() -> None:
    """Print log records and warnings of other libraries with `printable`, in this process.

    They quote values from files, such as a model's configuration.
    """
    make_record, format_warning = logging.getLogRecordFactory(), warnings.formatwarning
    if getattr(make_record, "is_printable", False):
        return

    def record_of(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        if isinstance(record.msg, str):
            try:
                record.msg, record.args = printable(record.getMessage()), None
            except (TypeError, ValueError):  # a faulty call, which `logging` reports
                record.msg = printable(record.msg)
        return record

    record_of.is_printable = True  # pyright: ignore[reportFunctionMemberAccess]
    logging.setLogRecordFactory(record_of)
    warnings.formatwarning = lambda *args, **kwargs: printable(format_warning(*args, **kwargs))
    # Pillow warns of each damaged tag of an image, up to thousands of times.
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")


def silence_third_party() -> None:
    """Silence messages of other libraries in this process, except for errors."""
    from transformers.utils import logging as transformers_logging

    printable_messages()
    transformers_logging.disable_progress_bar()  # a bar per loaded model, for milliseconds
    # torch reads every attribute of a module when it collects state, including deprecated ones.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # Checkpoints of a process without a group are intended.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    # The decoder of images has a lower limit of its own, with an error.
    warnings.filterwarnings("ignore", message=r"Image size \(\d+ pixels\) exceeds limit")
    # The launcher would print a table for a failed rank. `launch` prints one line instead.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
