"""Packaging: extras, typing markers, tested pins, and an install without the extension.

Nothing here installs anything; .ci/run builds the environment and a wheel for real.
"""

import subprocess
import sys
import warnings
from glob import glob
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from realign import doctor
from realign_kernels import _extension
from realign_kernels.refcache.packing import pack_forest

ROOT = Path(__file__).resolve().parents[2]
UNSAFE = {
    "jinja2": ("3.1.5", "CVE-2025-27516: a chat template leaves the sandbox by |attr"),
    "peft": ("0.19.1", "imports the module that adapter_config.json names as megatron_core"),
    "pillow": ("12.3.0", "CVE-2026-112403: a JPEG overflows the decoder's buffer"),
    "pyarrow": ("14.0.0", "CVE-2023-47248: Parquet files run code by a pickle"),
    "ray": ("2.51.2", "CVE-2025-62593: a web page runs code through the dashboard"),
    "scikit-learn": ("1.4.2", "CVE-2024-5206: tokens of the data stay in the model"),
    "sentence-transformers": ("5.1.2", "imports modules that modules.json of a folder names"),
    "setuptools": ("78.1.0", "CVE-2025-47273: a package's URL writes outside of the folder"),
    "torch": ("2.9.1", "CVE-2026-24747: weights_only does not stop a pickle"),
    "tqdm": ("4.66.2", "CVE-2024-34062: arguments of its command run code"),
    "transformers": ("4.47.1", "CVE-2024-11394: a model's file runs code by a pickle"),
}
"""Package -> (an unsafe release, the newest known in most cases; the reason)."""
# CI does not install these, so they are not pinned.
UNTESTED_EXTRAS = {"gpu", "tensorboard", "wandb", "sentences"}


@pytest.fixture(scope="module")
def project():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    listed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in listed}


@pytest.fixture
def fresh_extension():
    """Clear the cached extension before and after the test."""
    _extension._probe.cache_clear()
    _extension.extension.cache_clear()
    yield
    _extension._probe.cache_clear()
    _extension.extension.cache_clear()


def test_the_doctor_checks_extras_of_the_project(project):
    assert set(doctor.EXTRAS) - {""} <= set(project["project"]["optional-dependencies"])


def test_files_beside_the_modules_are_packaged(project):
    patterns = project["tool"]["setuptools"]["package-data"]["realign"]
    folder = ROOT / "realign"
    packaged = {name for p in patterns for name in glob(p, root_dir=folder, recursive=True)}
    files = (file for file in folder.rglob("*") if file.suffix not in (".py", ".pyc"))
    others = {str(file.relative_to(folder)) for file in files if file.is_file()}
    assert "pairs/page.html" in others and others <= packaged


def test_the_build_needs_no_torch(project):
    names = {Requirement(line).name for line in project["build-system"]["requires"]}
    assert names == {"setuptools", "pybind11", "cmake", "ninja"}


def test_every_direct_dependency_is_pinned_within_its_range(project, pins):
    extras = project["project"]["optional-dependencies"]
    lines = list(project["project"]["dependencies"])
    for extra in extras.keys() - UNTESTED_EXTRAS:
        lines += extras[extra]
    for requirement in map(Requirement, lines):
        pin = pins[canonicalize_name(requirement.name)]
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert requirement.specifier.contains(exact.version), f"{pin} against {requirement}"


def test_no_requirement_admits_an_unsafe_release(project, pins):
    """pip keeps an installed release that the bounds admit, and constraints are optional."""
    groups = [project["project"]["dependencies"], project["build-system"]["requires"]]
    groups += project["project"]["optional-dependencies"].values()
    needs = [Requirement(line) for group in groups for line in group]
    assert UNSAFE.keys() <= {need.name for need in needs}
    for need in needs:
        release, reason = UNSAFE.get(need.name, ("0", ""))
        named = need.name in UNSAFE
        assert not (named and need.specifier.contains(release)), (
            f"{need} admits {release}: {reason}"
        )
    for name, (release, _) in UNSAFE.items():
        assert not pins[name].specifier.contains(release), pins[name]


def test_every_constraint_is_an_exact_pin(pins):
    for pin in pins.values():
        assert [part.operator for part in pin.specifier] == ["=="], str(pin)


def test_triton_is_pinned_but_never_required(project, pins):
    """torch's CUDA build requires it. Without a GPU only the tests of kernels use it."""
    assert "triton" in pins
    extras = dict(project["project"]["optional-dependencies"])
    (development,) = [r for r in map(Requirement, extras.pop("dev")) if r.name == "triton"]
    assert str(development.marker) == 'platform_system == "Linux"'
    groups = [project["project"]["dependencies"], *extras.values()]
    assert "triton" not in {Requirement(line).name for group in groups for line in group}


def test_a_missing_extension_warns_once_and_says_what_to_do(monkeypatch, fresh_extension):
    monkeypatch.setitem(sys.modules, "realign_kernels._C", None)  # makes its import fail
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = pack_forest([5], [2, 3], [0, 0], 16)
        second = pack_forest([5], [2, 3], [0, 0], 16)
    assert first.leaf_start.tolist() == second.leaf_start.tolist() == [5, 7]
    (warning,) = caught
    text = str(warning.message)
    assert warning.category is RuntimeWarning and "\n" not in text
    assert warning.filename == __file__  # the line of the caller
    assert "without its C++ extension" in text and "pip install" in text
    assert "_C" in _extension.missing_reason()


def test_a_present_extension_is_silent(fresh_extension):
    if _extension.missing_reason() is not None:
        pytest.skip(f"no extension: {_extension.missing_reason()}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _extension.extension().__name__ == "realign_kernels._C"


def test_make_without_a_target_explains_the_targets():
    out = subprocess.run(["make", "-C", ROOT], capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "bench", "docs", "lint", "build", "clean"):
        assert f"make {target} " in out
