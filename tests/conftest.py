"""What several test files share: the digits model, its processor, and a small pairs file."""

import fcntl
import gc
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

# Read by OpenMP when torch loads it. Beside other busy processes, threads that spin while they wait
# make these small models 17 times slower (160 s against 9 s on two cores under load 4).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# A process of tests for each core (pytest-xdist), so one thread for each.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Reference log-probs of tests, and of the commands they run, stay out of the user's cache.
os.environ["REALIGN_CACHE"] = tempfile.mkdtemp(prefix="realign-cache-")

import pytest
import torch
from pair_runs import FakeEngine, config_in
from PIL import Image
from runs import run

from realign.digits import ASSETS
from realign.digits.scenes import Scene, make_scenes
from realign.modeling.loading import load_model, load_processor
from realign.modeling.model import ForestModel
from realign.pairs.pipeline import PairsConfig, build_pairs

SEE_GPUS = ("kernels", "test_cuda_build.py", "test_staging.py", "test_varlen.py")
CUDA = torch.cuda.is_available()
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.hookimpl(tryfirst=True, wrapper=True)
def pytest_runtest_setup(item):
    """Hide GPUs from all tests but the kernels': runs are compared bitwise, as on a CPU.

    Fixtures of a module are set up inside, and processes that a test starts inherit the variable.
    """
    if CUDA:
        sees = item.path.name in SEE_GPUS or item.path.parent.name in SEE_GPUS
        torch.cuda.is_available = lambda: sees
        os.environ["CUDA_VISIBLE_DEVICES"] = (VISIBLE or "") if sees else ""
        if sees and VISIBLE is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
    return (yield)


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """Keep full collections off what earlier modules and imports left: each takes up to 0.9 s.

    Every stage of the pairs and every `Trainer` ends in one.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    """Remove what tests left in the cache."""
    shutil.rmtree(os.environ["REALIGN_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """`made_once(name, make)`: a folder that `make(folder)` fills in one of the test processes."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of the folders of all processes

    def once(name, make):
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (done := root / f"{name}.done").exists():
                make(root / name)
                done.touch()
        return root / name

    return once


@pytest.fixture(scope="session")
def processor():
    """The shipped processor."""
    return load_processor(ASSETS)


@pytest.fixture(scope="session")
def vlm():
    """The shipped model in fp32. Shared by all tests: never change it."""
    return load_model(ASSETS).eval()


@pytest.fixture(scope="session")
def forest_model(vlm) -> ForestModel:
    """The shipped model as training holds it. Shared by all tests: never change it."""
    return ForestModel(vlm).eval()


@pytest.fixture(scope="session")
def scenes() -> list[Scene]:
    """Biased scenes of another seed than the pairs are made of."""
    return make_scenes(120, biased=True, seed=7)


@pytest.fixture(scope="session")
def pairs_config(tmp_path_factory) -> PairsConfig:
    """How `pairs_file` was built."""
    folder = tmp_path_factory.mktemp("pairs")
    return PairsConfig(output=str(folder / "pairs.parquet"), scenes=24, k=6, quiet=True)


@pytest.fixture(scope="session")
def pairs_file(pairs_config) -> Path:
    """About 24 digit pairs."""
    return build_pairs(pairs_config).path


@pytest.fixture(scope="session")
def other(pairs_file, made_once) -> dict[str, Path]:
    """Folders of a trained adapter ("adapter"), and of the same model merged ("merged")."""

    def make(folder):
        for name, more in (("adapter", ()), ("merged", ("--merge",))):
            run(pairs_file, folder / name, "--learning-rate", 1e-3, *more, steps=3)

    folder = made_once("other", make)
    return {name: folder / name / "model" for name in ("adapter", "merged")}


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory) -> SimpleNamespace:
    """A run of the pairs pipeline in five shards: config, work folder, report, bytes."""
    config = config_in(tmp_path_factory.mktemp("whole"))
    report = build_pairs(config)
    return SimpleNamespace(
        config=config, work=config.work_folder, report=report, bytes=report.path.read_bytes()
    )


@pytest.fixture
def engine(monkeypatch):
    """Make every engine answer with the given function of its requests."""

    def use(answer):
        fake = FakeEngine(answer)
        monkeypatch.setattr("realign.pairs.engines.make_engine", lambda *_, **__: fake)
        return fake

    return use


@pytest.fixture(autouse=True)
def no_ranks_to_fork(request):
    """A child that a test forks must not inherit a process group: its threads stay behind."""
    forks = "kill_9" in request.node.name or request.node.path.parent.name == "refcache"
    if forks and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def image_folder(tmp_path):
    """A folder with a.jpg, b.jpg, c.jpg, each of its own grey."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, name in enumerate("abc"):
        Image.new("RGB", (16, 16), (80 * i,) * 3).save(folder / f"{name}.jpg")
    return folder
