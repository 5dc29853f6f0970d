"""Second runs of the pairs pipeline: changed parts are made again, as in a fresh run."""

import signal
import time
from dataclasses import replace

import pytest
from killed_runs import before_a_shard, exit_code
from pair_runs import (
    ORDER,
    SHARDS,
    config_in,
    copy_run,
    rejected_in,
    shard_times,
    stage_folder,
    stage_rows,
)

from realign.data.entries import Names
from realign.data.records import StoredImage, read_pairs, write_pairs
from realign.pairs.config import PairsConfig
from realign.pairs.engines import Reply
from realign.pairs.pipeline import build_pairs, digit_sources, run_stages
from realign.pairs.stages.retrieve import Retrieve
from realign.pairs.stats import collect

SCENES = 20


@pytest.fixture
def file_config(tmp_path):
    """Settings of a run on records whose images are files in `images/`."""
    folder = tmp_path / "images"
    folder.mkdir()
    records = []
    for i, record in enumerate(digit_sources(PairsConfig(scenes=SCENES))):
        (folder / f"{i}.png").write_bytes(record.images[0].data)
        records.append(replace(record, images=(StoredImage(path=f"{i}.png"),)))
    write_pairs(tmp_path / "data.parquet", records)
    return PairsConfig(
        output=str(tmp_path / "out" / "pairs.parquet"),
        data=str(tmp_path / "data.parquet"),
        image_folder=str(folder),
        mask="numbers",
        k=4,
        shard=SCENES // SHARDS,
        max_bad=0.2,
        quiet=True,
    )


def _assert_as_fresh(config, folder):
    """Asserts that the output equals that of a run in an empty work folder."""
    output = folder / "fresh" / "pairs.parquet"
    build_pairs(replace(config, output=str(output)))
    assert output.read_bytes() == (folder / "out" / "pairs.parquet").read_bytes()


def _times(config) -> dict[str, dict[str, int]]:
    return {name: shard_times(stage_folder(config.work_folder, name)) for name in ORDER}


def _made_again(before, after) -> dict[str, set[int]]:
    """Stage -> numbers of the shards that were written again."""
    return {
        stage: {int(name[:5]) for name, when in times.items() if before[stage].get(name) != when}
        for stage, times in after.items()
    }


@pytest.mark.parametrize("fault", ["missing", "corrupt"])
def test_repaired_images_are_read_again(file_config, tmp_path, fault):
    """A run that dies while it replaces a shard and its list of invalid records loses no record."""
    spoiled = tmp_path / "images" / "5.png"  # in the second shard
    data = spoiled.read_bytes()
    spoiled.unlink()
    if fault == "corrupt":
        spoiled.write_bytes(b"no image")
    build_pairs(file_config)
    stage = {"missing": "read", "corrupt": "embed"}[fault]
    assert rejected_in(tmp_path / "out") == [("scene-00005", stage, fault)]
    before = _times(file_config)
    spoiled.write_bytes(data)
    if fault == "missing":
        flags = ["--data", file_config.data, "--image-folder", file_config.image_folder, "--k", "4"]
        flags += ["--mask", "numbers", "--shard", "4", "--max-bad", "0.2", "--quiet"]
        assert exit_code(before_a_shard, "--output", file_config.output, *flags) == -signal.SIGKILL
    assert not build_pairs(file_config).bad
    assert not (file_config.work_folder / "rejected_records.parquet").exists()
    again = _made_again(before, _times(file_config))
    assert again["read"] == again["embed"] == again["mask"] == {1}
    assert len(again["retrieve"]) == SHARDS  # one more image can be a neighbour
    _assert_as_fresh(file_config, tmp_path)


def test_changed_images_are_noticed(file_config, tmp_path):
    """Images are touched, then removed and restored, then replaced or linked out of the folder."""
    folder, output = tmp_path / "images", tmp_path / "out" / "pairs.parquet"
    report, *_ = str(build_pairs(file_config)).splitlines()
    named = report.partition("; read it with --image-folder ")[2]
    assert read_pairs(output, named)[0].images[0].path == str(folder.resolve() / "0.png")
    before, kept = _times(file_config), output.read_bytes()
    (folder / "3.png").touch()  # its shard is made again, with the same vectors
    build_pairs(file_config)
    again = _made_again(before, _times(file_config))
    assert again.pop("retrieve") == set()
    assert all(numbers == {0} for numbers in again.values()), again
    assert output.read_bytes() == kept

    folder.rename(tmp_path / "elsewhere")  # as if the disk were not mounted in one run
    folder.mkdir()
    with pytest.raises(ValueError, match="cannot be used, more than --max-bad 0.2 allows"):
        build_pairs(file_config)
    assert output.read_bytes() == kept
    folder.rmdir()
    (tmp_path / "elsewhere").rename(folder)
    assert not build_pairs(file_config).bad
    assert output.read_bytes() == kept

    (folder / "3.png").write_bytes((folder / "10.png").read_bytes())
    (folder / "7.png").rename(tmp_path / "secret.png")
    (folder / "7.png").symlink_to(tmp_path / "secret.png")
    assert build_pairs(file_config).bad == {"outside the folder": 1}
    _assert_as_fresh(file_config, tmp_path)


def test_a_record_without_reply_is_asked_again(whole_run, tmp_path, engine):
    def segments(text):
        return '["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "zero"]'

    settings = {"masker": "transformers:a", "max_bad": 0.1}
    config = copy_run(whole_run, tmp_path / "out", ORDER[:3], **settings)
    first = next(r.chosen for r in digit_sources(config) if r.name == "scene-00009")
    engine(lambda text: Reply("", "down") if first in text else segments(text))
    build_pairs(config)
    assert ("scene-00009", "mask", "no reply") in rejected_in(tmp_path / "out")
    fake = engine(segments)
    build_pairs(config)
    assert len(fake.asked) == 8  # records of its shard
    assert not (config.work_folder / "rejected_records.parquet").exists()
    _assert_as_fresh(config, tmp_path)


def test_arrays_of_a_killed_run_are_not_used_with_other_rows(file_config, tmp_path, monkeypatch):
    """Two images disappear, the run dies after it wrote the vectors, and the images return."""
    build_pairs(file_config)
    held = [(tmp_path / "images" / f"{i}.png") for i in (5, 10)]
    for image in held:
        image.rename(tmp_path / image.name)

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Retrieve, "_save_index", die)
        with pytest.raises(KeyboardInterrupt):
            build_pairs(file_config)
    for image in held:
        (tmp_path / image.name).rename(image)
    config = replace(file_config, negative="random")
    build_pairs(config)
    _assert_as_fresh(config, tmp_path)


def test_damage_within_a_shard_is_named_with_its_remedy(whole_run, tmp_path):
    config = copy_run(whole_run, tmp_path)
    shard = stage_folder(config.work_folder, "embed") / "00001.parquet"
    data = bytearray(shard.read_bytes())
    data[20:120] = bytes(100)
    shard.write_bytes(data)
    (stage_folder(config.work_folder, "retrieve") / "rows.parquet").write_bytes(b"PAR1")
    (stage_folder(config.work_folder, "read") / "read.json").write_text('{"sha')
    with pytest.raises(ValueError, match=r"embed-\w+/00001.parquet is damaged .* Remove it"):
        build_pairs(config)
    shard.unlink()
    build_pairs(config)
    assert (tmp_path / "pairs.parquet").read_bytes() == whole_run.bytes


def test_missing_and_cut_off_shards_are_made_again(whole_run, tmp_path):
    """Shards of every stage, in any order."""
    config = copy_run(whole_run, tmp_path)
    for i, stage in enumerate(ORDER):
        folder = stage_folder(config.work_folder, stage)
        (folder / f"{i % SHARDS:05d}.parquet").unlink()
        shard = folder / f"{(i + 2) % SHARDS:05d}.parquet"
        shard.write_bytes(shard.read_bytes()[:-20])
    build_pairs(config)
    assert (tmp_path / "pairs.parquet").read_bytes() == whole_run.bytes


@pytest.mark.parametrize("kind", ["crop", "noise"])
def test_derived_negatives_are_a_stage(whole_run, tmp_path, kind):
    config = copy_run(whole_run, tmp_path, negative=kind)
    run_stages(config, "negative")
    folder = stage_folder(config.work_folder, "negative")
    made = {row["id"]: row["images"][0]["bytes"] for row in stage_rows(folder)}
    before = shard_times(folder)
    build_pairs(config)
    assert shard_times(folder) == before and len(before) == SHARDS
    pairs = read_pairs(config.output)
    assert {r.name: r.retrieved_images[0].data for r in pairs} == made
    with pytest.raises(ValueError, match="retrieved negatives have no stage"):
        run_stages(config_in(tmp_path / "other"), "negative")


def test_many_repeated_names_are_fast():
    """LLaVA repeats each id several times. 40,000 repetitions must not take minutes."""
    names, began = Names(), time.perf_counter()
    made = [names.unique("a") for _ in range(40_000)]
    assert time.perf_counter() - began < 30
    assert made[:3] == ["a", "a-2", "a-3"] and len(set(made)) == 40_000


def test_left_out_records_are_noted_for_each_output(whole_run, tmp_path):
    """Two outputs share a work folder, and their runs drop different records."""
    easy = copy_run(whole_run, tmp_path, work=str(tmp_path / "pairs.work"))
    strict = replace(easy, output=str(tmp_path / "other" / "pairs.parquet"), k=1)
    reports = {config.output: build_pairs(config) for config in (easy, strict)}
    counts = {output: collect(output, work=easy.work).dropped for output in reports}
    assert counts == {output: report.dropped for output, report in reports.items()}
    assert counts[strict.output].total() > counts[easy.output].total()
    assert {f.name for f in tmp_path.iterdir()} == {"pairs.parquet", "other", "pairs.work"}
