"""`python -m realign.doctor`: a full installation, a bare one, one with a broken extension."""

import importlib
import importlib.metadata

import pytest

from realign import doctor
from realign_kernels import _extension, dispatch


@pytest.fixture
def fresh(monkeypatch):
    """Decisions of this process are made anew in a test, and forgotten after it."""

    def forget():
        _extension.extension.cache_clear()
        dispatch._decided.cache_clear()
        dispatch._load.cache_clear()

    forget()
    yield
    monkeypatch.undo()
    forget()


def _printed(capsys, code: int) -> str:
    assert doctor.main([]) == code
    return capsys.readouterr().out


def test_a_full_installation(capsys):
    out = _printed(capsys, 0)
    assert out.endswith("everything that is needed works\n")
    assert "BAD" not in out
    for part in ("machine", "packages", "kernels", "optional", "folders"):
        assert f"\n{part}\n" in f"\n{out}"
    version = importlib.metadata.version("torch")
    assert any(line.split() == ["ok", "torch", version] for line in out.splitlines())
    assert "from the specification in fp64" in out
    assert max(map(len, out.splitlines())) < 160


def test_a_bare_installation(capsys, monkeypatch, fresh):
    """Without extension and extras: it runs on torch, and says what to install for more."""
    needed = {"realign", *doctor.NEEDED}
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: version(name) if name in needed else None)
    absent = (None, "No module named 'realign_kernels._C'")
    monkeypatch.setattr(_extension, "_probe", lambda: absent)
    out = _printed(capsys, 0)
    assert "--  C++ extension" in out and "pip install -v --force-reinstall" in out
    assert "torch for float32 on cpu (no cpp: No module named 'realign_kernels._C')" in out
    assert "--  faiss-cpu" in out and "pip install faiss-cpu" in out
    assert "--  ray" in out and "pip install 'realign[ray]'" in out
    assert out.endswith("everything that is needed works\n")


def test_a_broken_extension(capsys, monkeypatch, fresh):
    why = "_C.so: undefined symbol: _ZN3c10"
    monkeypatch.setattr(_extension, "_probe", lambda: (None, why))
    out = _printed(capsys, 1)
    assert "BAD C++ extension" in out and why in out
    assert out.endswith("broken: C++ extension\n")


def test_a_missing_and_a_broken_package(capsys, monkeypatch):
    version, load = doctor._version, importlib.import_module
    monkeypatch.setattr(doctor, "_version", lambda n: None if n == "peft" else version(n))

    def broken(name):
        if name == "pyarrow":
            raise OSError("libarrow.so.2600: cannot open shared object file\nmore")
        return load(name)

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    out = _printed(capsys, 1)
    assert "BAD peft" in out and "missing: pip install peft" in out
    assert "cannot be imported: libarrow.so.2600: cannot open shared object file\n" in out
    assert "kernels" not in out
    assert out.endswith("broken: peft, pyarrow\n")


def test_a_wrong_result_is_told(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_try", lambda device: 0.5)
    assert "BAD rdpo_loss, cpu" in _printed(capsys, 1)


def test_it_takes_no_arguments(capsys):
    assert doctor.main(["--fast"]) == 2
    assert doctor.main(["--help"]) == 0
    assert "What is installed" in capsys.readouterr().out
