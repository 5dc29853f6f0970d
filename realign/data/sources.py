"""Interim."""

import os
from pathlib import Path


def identity(source, image_folder=None, *, split=None, format="auto") -> str:
    path = Path(source)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    stats = [
        (os.path.realpath(f), os.stat(f).st_size, os.stat(f).st_mtime_ns)
        for f in files
        if f.exists()
    ]
    return repr((stats, image_folder, split, format))
