"""`python -m realign.doctor`: a full installation, a bare one, one with a broken extension."""

import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from realign import doctor
from realign_kernels import _extension
from realign_kernels.backends import dispatch

ROOT = Path(__file__).parents[2]


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


def test_a_checkout_that_is_not_installed(capsys, monkeypatch):
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda n: None if n == "realign" else version(n))
    assert re.search(r"-- +realign +not installed, runs from a checkout", _printed(capsys, 0))


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
    assert "BAD peft" in out and "missing: pip install 'peft>=0.21'" in out
    assert "cannot be imported: libarrow.so.2600: cannot open shared object file\n" in out
    assert "kernels" not in out
    assert out.endswith("broken: peft, pyarrow\n")


def test_the_oldest_versions_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def oldest(lines):
        found = {canonicalize_name(r.name): str(r.specifier) for r in map(Requirement, lines)}
        return {name: limits.removeprefix(">=") for name, limits in found.items()}

    assert oldest(project["dependencies"]) == doctor.NEEDED
    groups = ("gpu", "cpu", "demo", "tensorboard", "wandb", "ray", "sentences", "study")
    optional = oldest(line for g in groups for line in project["optional-dependencies"][g])
    assert {name: limit for name, limit in optional.items() if limit} == doctor.OPTIONAL
    assert optional.keys() <= {name for extra in doctor.EXTRAS for name in extra.names}


@pytest.mark.parametrize("version", ["2.1.0", "2.9.1+cu128", "2.10", "2.10.0+cpu", "3", "11.0"])
@pytest.mark.parametrize("least", ["2", "2.10", "3.0"])
def test_versions_are_ordered_by_their_numbers(version, least):
    older = doctor._release(version) < doctor._release(least)
    assert older == (Version(version) < Version(least))
    assert not doctor._release(version) < doctor._release("")


def _install(folder, name, version, text=None):
    """Metadata of a distribution, and its module where there is a text of it."""
    (folder / f"{name}-{version}.dist-info").mkdir()
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(about)
    if text is not None:
        (folder / f"{name}.py").write_text(text)


def test_a_package_that_is_too_old(capsys, monkeypatch, tmp_path):
    _install(tmp_path, "torch", "2.1.0")
    monkeypatch.syspath_prepend(tmp_path)
    out = _printed(capsys, 1)
    told = "2.1.0, too old: needs >= 2.11: pip install 'torch>=2.11'"
    assert re.search(rf"^  BAD torch +{re.escape(told)}$", out, re.MULTILINE)
    assert "kernels" not in out and out.endswith("broken: torch\n")


def test_optional_packages_that_are_too_old_or_broken(capsys, monkeypatch, tmp_path):
    _install(tmp_path, "ray", "2.9.3")
    _install(tmp_path, "wandb", "0.1", "raise ImportError('_w.so: undefined symbol: w')")
    _install(tmp_path, "liger_kernel", "0.8", "raise ImportError('no GPU')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    out = _printed(capsys, 1)
    assert "BAD ray" in out and "2.9.3, too old: needs >= 2.60: pip install 'ray>=2.60'" in out
    assert "BAD wandb" in out and "0.1, but it cannot be imported: _w.so: undefined symbol" in out
    assert "--  liger-kernel" in out  # of no use here
    assert "ok  datasets" in out and out.endswith("broken: ray, wandb\n")


@pytest.mark.skipif(
    _extension.missing_reason() is not None, reason=f"no extension: {_extension.missing_reason()}"
)
@pytest.mark.parametrize("kept", [2_000, None], ids=["2,000 bytes", "half"])
def test_a_cut_extension_is_told(tmp_path, kept):
    """Loading it ends Python with a signal; the doctor goes on without it."""
    (tmp_path / "realign").symlink_to(ROOT / "realign")
    (tmp_path / "realign_kernels").symlink_to(ROOT / "realign_kernels")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def crash():
        code = "from realign import doctor; print(doctor._crash())"
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        ).stdout

    assert crash() == "None\n"
    (tmp_path / "realign_kernels").unlink()
    shutil.copytree(ROOT / "realign_kernels", tmp_path / "realign_kernels")
    (file,) = (tmp_path / "realign_kernels").glob("_C*.so")
    os.truncate(file, kept or file.stat().st_size // 2)
    assert f"loading {file} ends Python (SIG" in crash()
    if kept:
        return
    done = subprocess.run(
        [sys.executable, "-m", "realign.doctor"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert re.search(rf"^  BAD C\+\+ extension +loading {re.escape(str(file))}", done.stdout, re.M)
    assert "pip install -v --force-reinstall" in done.stdout
    assert "torch for float32 on cpu (no cpp: loading it ends Python)" in done.stdout
    assert "ok  rdpo_loss, cpu" in done.stdout
    assert done.stdout.endswith("broken: C++ extension\n")


def test_what_was_found_before_a_crash_is_printed(capsys, monkeypatch):
    def end(device):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "_try", end)
    with pytest.raises(KeyboardInterrupt):
        doctor.main([])
    out = capsys.readouterr().out
    assert "ok  torch" in out and out.splitlines()[-1].startswith("  ok  backend, cpu")


def test_a_wrong_result_is_told(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_try", lambda device: 0.5)
    assert "BAD rdpo_loss, cpu" in _printed(capsys, 1)


def test_it_takes_no_arguments(capsys):
    assert doctor.main(["--fast"]) == 2
    assert doctor.main(["--help"]) == 0
    assert "What is installed" in capsys.readouterr().out
