"""The kinds of tables: logs of the C++ extension, and SQLite databases."""

import pytest

from realign_kernels._extension import extension
from realign_kernels.refcache import store

KINDS = ["database"] if extension() is None else ["logs", "database"]


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    """The kind of all tables of a test."""
    if request.param == "database":
        monkeypatch.setattr(store, "extension", lambda: None)
    return request.param
