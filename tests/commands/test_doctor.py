"""`python -m realign.doctor` on full, bare and broken installations."""

import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from realign import doctor
from realign_kernels import _extension
from realign_kernels.backends import dispatch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fresh(monkeypatch):
    """Clear the cached decisions of this process before and after a test."""

    def forget():
        _extension.extension.cache_clear()
        dispatch._decided.cache_clear()
        dispatch._load.cache_clear()

    forget()
    yield
    monkeypatch.undo()
    forget()


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """installed(name, version, text): metadata of a distribution, and its module if text is given.

    Imports of the others are skipped: ray and tensorboard take seconds.
    """
    load = importlib.import_module
    monkeypatch.syspath_prepend(tmp_path)

    def quick(name):
        return load(name) if (tmp_path / f"{name}.py").exists() or "realign" in name else None

    def install(name, version, text=""):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (folder / "METADATA").write_text(about)
        (folder / "top_level.txt").write_text(name)
        if text:
            (tmp_path / f"{name}.py").write_text(text)

    monkeypatch.setattr(doctor.importlib, "import_module", quick)
    doctor._modules.cache_clear()
    yield install
    doctor._modules.cache_clear()


def printed(capsys, code):
    assert doctor.main([]) == code
    return capsys.readouterr().out


def test_a_full_installation(capsys):
    out = printed(capsys, 0)
    assert out.endswith("all required parts work\n") and "BAD" not in out
    for section in ("machine", "packages", "kernels", "folders"):
        assert f"\n{section}\n" in f"\n{out}"
    lines = [line.split() for line in out.splitlines()]
    for requirement in importlib.metadata.requires("realign"):
        name = re.match(r"[\w-]+", requirement)[0]
        if "extra" not in requirement:
            assert ["ok", name, importlib.metadata.version(name)] in lines
    assert "rdpo_loss, torch" in out and "against the reference in fp64" in out
    assert max(map(len, out.splitlines())) < 160


def test_packages_that_are_missing_too_old_or_broken(capsys, monkeypatch, installed):
    version = importlib.metadata.version

    def without(name):
        if name in ("peft", "faiss-cpu"):
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    installed("torch", "2.9.1+cpu")
    installed("ray", "2.9.3")
    installed("wandb", "0.1", "raise ImportError('_w.so: undefined symbol: w\\nmore')")
    out = printed(capsys, 1)
    assert re.search(r"BAD torch +2.9.1\+cpu is not >=2.11: pip install 'torch>=2.11'\n", out)
    assert re.search(r"BAD peft +missing: pip install 'peft>=0.21'\n", out)
    assert re.search(r"-- +faiss-cpu +missing: pip install 'realign\[cpu\]'\n", out)
    assert re.search(r"BAD ray +2.9.3 is not >=2.60: pip install 'realign\[ray\]'\n", out)
    assert re.search(r"BAD wandb +0.1 cannot be imported: _w.so: undefined symbol: w\n", out)
    assert "kernels" not in out and out.endswith("broken: torch, peft, wandb, ray\n")


def test_a_checkout_without_extension(capsys, monkeypatch, fresh):
    """The kernels run on torch, and the report names the command to build the extension."""

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    monkeypatch.setattr(_extension, "_probe", lambda: (None, "No module named 'x._C'"))
    out = printed(capsys, 0)
    assert re.search(r"-- +realign +not installed", out)
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    assert printed(capsys, 1).endswith("broken: packaging\n")
    assert "--  C++ extension" in out and "pip install -v --force-reinstall" in out
    assert "torch for float32 on cpu (no cpp: No module named 'x._C')" in out
    assert "rdpo_loss, cpp" not in out


def test_a_broken_extension_and_a_wrong_result(capsys, monkeypatch, fresh, installed):
    why = "_C.so: undefined symbol: _ZN3c10"
    monkeypatch.setattr(_extension, "_probe", lambda: (None, why))
    monkeypatch.setattr(doctor, "_error", lambda device, backend: 0.5)
    out = printed(capsys, 1)
    assert "BAD C++ extension" in out and why in out
    assert "BAD rdpo_loss, torch" in out
    assert out.endswith("broken: C++ extension, rdpo_loss, torch\n")


def test_findings_before_a_crash_are_printed(capsys, monkeypatch, installed):
    def end(device, backend):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "_error", end)
    with pytest.raises(KeyboardInterrupt):
        doctor.main([])
    out = capsys.readouterr().out
    assert "ok  torch" in out and out.splitlines()[-1].startswith("  ok  cpu, bfloat16")


@pytest.mark.skipif(
    _extension.missing_reason() is not None, reason=f"no extension: {_extension.missing_reason()}"
)
def test_an_extension_that_ends_python(tmp_path):
    """Loading a truncated file ends Python with a signal. The doctor then runs without the file."""
    (tmp_path / "realign").symlink_to(ROOT / "realign")
    shutil.copytree(ROOT / "realign_kernels", tmp_path / "realign_kernels")
    (file,) = (tmp_path / "realign_kernels").glob("_C*.so")
    os.truncate(file, file.stat().st_size // 2)
    program = "from realign import doctor; doctor.EXTRAS = (); raise SystemExit(doctor.main([]))"
    done = subprocess.run(
        [sys.executable, "-c", program],  # without the packages, which take 15 s to import
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    pattern = rf"^  BAD C\+\+ extension +loading {re.escape(str(file))} ends Python \(SIG"
    assert re.search(pattern, done.stdout, re.M)
    assert "pip install -v --force-reinstall" in done.stdout
    assert "torch for float32 on cpu (no cpp: " in done.stdout
    assert "ok  rdpo_loss, torch" in done.stdout
    assert done.stdout.endswith("broken: C++ extension\n")


def test_it_takes_no_arguments(capsys):
    for arguments, code in ((["--fast"], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as exit:
            doctor.main(arguments)
        assert exit.value.code == code
    assert "Installation check" in capsys.readouterr().out
