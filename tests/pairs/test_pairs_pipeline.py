"""Pairs pipeline: shards, interruptions, invalid records and single stages."""

import errno
import re
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from killed_runs import before_a_file, exit_code
from pair_runs import (
    FLAGS,
    ORDER,
    SHARDS,
    config_in,
    copy_run,
    rejected_in,
    shard_times,
    stage_folder,
)

from realign.data.records import StoredImage, read_pairs, write_pairs
from realign.pairs import pipeline
from realign.pairs.__main__ import main
from realign.pairs.io import shards
from realign.pairs.pipeline import PairsConfig, build_pairs, digit_sources, run_stages
from realign.pairs.stages.base import IMAGES, Stage, rng_of
from realign.pairs.stages.read import Read
from realign.pairs.stages.runner import RunError, sole_run
from realign.pairs.stages.shard import InvalidLimit, make_shard

# Random numbers, digests, shards.


def test_random_numbers_depend_on_record_and_purpose():
    def drawn(*key):
        return rng_of(*key).integers(2**62, size=4).tolist()

    keys = [(0, "a", "mask"), (1, "a", "mask"), (0, "b", "mask"), (0, "a", "refill 0")]
    found = [drawn(*key) for key in keys]
    assert found == [drawn(*key) for key in keys]
    assert len({tuple(numbers) for numbers in found}) == 4
    assert drawn(0, "a\0b", "c") != drawn(0, "a", "b\0c")


def test_a_table_has_deterministic_bytes_and_small_row_groups(tmp_path):
    rows = [{"id": str(i), "data": bytes([i]) * 300_000} for i in range(12)]
    schema = pa.schema({"id": pa.string(), "data": pa.binary()})
    table = pa.Table.from_pylist(rows, schema=schema)
    for name in "ab":
        shards.write_table(tmp_path / name, table)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert pq.ParquetFile(tmp_path / "a").num_row_groups == 4  # rows of 300 kB, row groups of 1 MiB
    assert pq.read_table(tmp_path / "a").equals(table)
    shards.write_table(tmp_path / "none", table.slice(0, 0))
    assert len(pq.read_table(tmp_path / "none")) == 0


def test_a_lookup_finds_rows_at_random(tmp_path):
    schema = pa.schema({"id": pa.string(), "images": IMAGES})
    written = shards.Shards(tmp_path, schema)
    for number in range(3):
        names = [f"{number}-{i}" for i in range(6)]
        rows = [{"id": n, "images": [{"bytes": n.encode() * 99_999, "path": None}]} for n in names]
        written.write(number, rows, [])
    lookup = shards.RowLookup(tmp_path, max_groups=2)
    wanted = [(2, "2-5"), (0, "0-0"), (1, "1-3"), (2, "2-0"), (0, "0-5")]
    for _ in range(2):
        found = lookup.rows(wanted)
        for shard, name in wanted:
            assert found[shard, name]["images"][0]["bytes"] == name.encode() * 99_999
    assert lookup._group.cache_info().currsize == 2


def test_arrays_written_in_parts_are_mapped_whole(tmp_path):
    parts = [np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((1, 3), np.float32)]
    shards.save_array(tmp_path / "x.npy", (3, 3), np.float32, iter(parts))
    assert np.array_equal(np.load(tmp_path / "x.npy", mmap_mode="r"), np.concatenate(parts))


# Resume.


def test_a_second_run_makes_nothing_and_reports_it(whole_run, capsys):
    before = {stage: shard_times(stage_folder(whole_run.work, stage)) for stage in ORDER}
    assert all(len(times) == SHARDS for times in before.values())
    build_pairs(replace(whole_run.config, quiet=False))
    out = capsys.readouterr().out
    assert all(f"{stage}: all {SHARDS} shards already done" in out for stage in ORDER)
    assert {stage: shard_times(stage_folder(whole_run.work, stage)) for stage in ORDER} == before
    assert Path(whole_run.config.output).read_bytes() == whole_run.bytes


@pytest.mark.parametrize(
    ("settings", "again"),
    [
        ({"tau": 0.5}, {"refill", "filter"}),
        ({"segments": 2}, {"mask", "refill", "filter"}),
        ({"k": 3}, {"retrieve", "refill", "filter"}),
        ({"negative": "blank"}, set()),
        ({"batch_size": 7}, set()),
        ({"seed": 1}, set(ORDER)),
    ],
    ids=["tau", "segments", "k", "negative", "batch_size", "seed"],
)
def test_a_changed_setting_runs_what_depends_on_it_and_back_again_nothing(
    whole_run, settings, again
):
    changed = replace(whole_run.config, **settings)
    runner = [stage(changed) for stage in pipeline._ORDER if stage.name in ORDER]
    digests: dict[str, str] = {}
    for stage in runner:
        digests[stage.name] = stage.digest(digests)
    known = {
        path.name.split("-")[0]: path.name.split("-")[1] for path in whole_run.work.glob("*-*")
    }
    assert {name for name in ORDER if digests[name] != known[name]} == again


@pytest.mark.parametrize(
    ("stage", "file", "kept"),
    [
        ("read", "00002.parquet", 2),
        ("read", "read.json", 5),
        ("retrieve", "hashes.npy", 0),
        ("refill", "00002.parquet", 2),
        ("out", "pairs.parquet", None),
    ],
)
def test_a_run_killed_in_a_stage_resumes_to_the_same_bytes(whole_run, tmp_path, stage, file, kept):
    folder = tmp_path / "out"
    before = ORDER[: ORDER.index(stage)] if stage in ORDER else ORDER
    config = copy_run(whole_run, folder, before)
    assert exit_code(before_a_file, stage, file, "--output", config.output, *FLAGS) == (
        -signal.SIGKILL
    )
    assert not Path(config.output).exists()
    times = {}
    if stage in ORDER:
        times = shard_times(stage_folder(config.work_folder, stage))
        assert len(times) == kept
    build_pairs(config)
    assert Path(config.output).read_bytes() == whole_run.bytes
    if stage in ORDER:
        after = shard_times(stage_folder(config.work_folder, stage))
        assert times.items() <= after.items() and len(after) == SHARDS
        assert not list(stage_folder(config.work_folder, stage).glob(".*.partial"))


def test_a_full_disk_loses_nothing(whole_run, tmp_path, monkeypatch, capsys):
    write = shards.write_bytes

    def full(path, *parts):
        if "refill" in str(path) and path.name == "00002.parquet":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, *parts)

    monkeypatch.setattr(shards, "write_bytes", full)
    config = copy_run(whole_run, tmp_path, ORDER[:4])
    flags = ["--output", config.output, *FLAGS]
    assert main(flags) == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "the disk of" in shown
    assert "The 22 finished shards are kept" in shown  # 5 shards of each of 4 stages, and 2 more
    monkeypatch.setattr(shards, "write_bytes", write)
    kept = shard_times(stage_folder(config.work_folder, "refill"))
    assert len(kept) == 2
    assert main(flags) == 0
    assert kept.items() <= shard_times(stage_folder(config.work_folder, "refill")).items()
    assert Path(config.output).read_bytes() == whole_run.bytes


def test_a_full_disk_at_the_end_keeps_the_old_output(whole_run, tmp_path, monkeypatch):
    config = copy_run(whole_run, tmp_path)
    Path(config.output).write_bytes(b"old")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(RunError, match="the disk of .* is full.*Free some space"):
        build_pairs(config)
    assert Path(config.output).read_bytes() == b"old"
    assert not list(tmp_path.glob(".*.partial"))


def test_two_runs_in_one_folder_are_refused(whole_run, capsys):
    flags = ["--output", whole_run.config.output, "--quiet"]
    with sole_run(whole_run.work):
        assert main(flags) == 1
    assert "another run uses" in capsys.readouterr().err
    with sole_run(whole_run.work):  # the lock was released
        pass


@pytest.mark.parametrize(
    ("stage", "made"), [("mask", {"read", "mask"}), ("retrieve", {"read", "embed", "retrieve"})]
)
def test_a_single_stage_runs_what_it_needs(tmp_path, stage, made, capsys):
    flags = ["--output", str(tmp_path / "pairs.parquet"), "--scenes", "12", "--k", "4"]
    assert main([stage, *flags, "--shard", "8", "--quiet"]) == 0
    folders = {path.name.split("-")[0]: path for path in (tmp_path / "pairs.work").glob("*-*")}
    assert set(folders) == made
    assert capsys.readouterr().out == f"the shards of {stage} are in {folders[stage]}\n"
    assert len(shard_times(folders[stage])) == 2
    assert not (tmp_path / "pairs.parquet").exists()


def test_an_unknown_command_and_a_stage_without_engine_are_named(tmp_path, capsys):
    assert main(["bake"]) == 1
    assert main(["answer", "--output", str(tmp_path / "p.parquet")]) == 1
    err = capsys.readouterr().err
    assert (
        "unknown command 'bake'. Name a stage to run up to (answer, embed, mask, retrieve, refill, "
        "filter, negative)" in err
    )
    assert "the stage answer needs an engine. Add --answer" in err


def test_progress_is_shown_unless_quiet(tmp_path, capsys):
    config = replace(config_in(tmp_path, scenes=12), quiet=False)
    run_stages(config, "mask")
    shown = capsys.readouterr()
    assert re.search(r"mask: +2/2 shards, 12 records in [\d.]+ s \([\d.,]+/s\)", shown.out)
    assert shown.err == ""  # a bar on a terminal, and lines of a slow stage elsewhere
    (stage_folder(config.work_folder, "mask") / "00001.parquet").unlink()
    run_stages(config, "mask")
    assert "mask: 1 of 2 shards already done\n" in capsys.readouterr().out
    run_stages(replace(config, quiet=True), "mask")
    assert capsys.readouterr() == ("", "")


# Invalid records.


def _written(folder, records, name="data.parquet") -> str:
    write_pairs(folder / name, records)
    return str(folder / name)


@pytest.fixture
def sources():
    """Forty digit scenes as user records."""
    return digit_sources(PairsConfig(scenes=40))


def test_invalid_records_are_listed_and_the_others_used(tmp_path, sources, capsys):
    torn = StoredImage(sources[3].images[0].data[:60])
    placed = ({"role": "user", "content": "name <image> as <image>"},)
    odd = replace(sources[7], name="odd", chosen="It is .")  # dropped, not invalid
    invalid = [
        replace(sources[3], name="torn", images=(torn,)),
        replace(sources[4], name="gone", images=(StoredImage(path="nowhere.png"),)),
        replace(sources[5], name="token", prompt=placed),
        replace(sources[6], name="noimage", images=()),
    ]
    made = {}
    for name, records in (
        ("mixed", [*invalid[:2], *sources[:20], *invalid[2:], odd, *sources[20:]]),
        ("good", [*sources, odd]),
    ):
        (folder := tmp_path / name).mkdir()
        flags = ["--data", _written(tmp_path, records, f"{name}.parquet"), "--mask", "numbers"]
        flags += ["--k", "4", "--shard", "8", "--max-bad", "0.2", "--quiet"]
        assert main([*flags, "--output", str(folder / "pairs.parquet")]) == 0
        made[name] = {
            r.name: (r.rejected, r.provenance["neighbour"])
            for r in read_pairs(folder / "pairs.parquet")
        }
        report = capsys.readouterr().out
        assert "nothing to mask" in report
        if name == "mixed":
            found = rejected_in(folder)
            expected = {"torn": "corrupt", "gone": "missing", "token": "image token"}
            assert {n: r for n, _, r in found} == expected
            assert Counter(stage for _, stage, _ in found) == {"read": 2, "embed": 1}
            counts = "invalid 3 (1 corrupt, 1 image token, 1 missing)"
            assert f"; {counts}" in report and "1 no image" in report
    assert not (tmp_path / "good" / "pairs.work" / "rejected_records.parquet").exists()
    assert made["mixed"] == made["good"]


def test_more_bad_records_than_allowed_stop_the_run_until_they_are_repaired(
    tmp_path, sources, capsys
):
    """A shard with too many missing image files is not kept, and is made again later."""
    for i, record in enumerate(sources):
        (tmp_path / f"{i}.png").write_bytes(record.images[0].data)
    paths = [replace(r, images=(StoredImage(path=f"{i}.png"),)) for i, r in enumerate(sources)]
    data = _written(tmp_path, paths)
    held = {i: (tmp_path / f"{i}.png").read_bytes() for i in (1, 17, 18, 19)}
    flags = ["--data", data, "--mask", "numbers", "--k", "4", "--shard", "8", "--quiet"]
    flags += ["--output", str(tmp_path / "pairs.parquet")]
    assert main(["read", *flags]) == 1  # not a separate stage
    assert main(["mask", *flags]) == 0  # reads the records while the images still exist
    for i in held:
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    capsys.readouterr()
    assert main(flags) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert (
        "4 of 40 records cannot be used, more than --max-bad 0.05 allows (embed: 4 corrupt). "
        in err
    )
    assert "For example, record 'scene-00001'" in err
    assert {name for name, *_ in rejected_in(tmp_path)} == {f"scene-{i:05d}" for i in held}
    assert len(shard_times(stage_folder(tmp_path / "pairs.work", "embed"))) == 2  # not the third
    for i in (17, 18, 19):
        (tmp_path / f"{i}.png").write_bytes(held[i])
    assert main(flags) == 0
    assert [name for name, *_ in rejected_in(tmp_path)] == ["scene-00001"]
    assert len(read_pairs(tmp_path / "pairs.parquet")) > 30


def test_a_record_that_two_stages_refuse_counts_once(tmp_path, sources):
    """Two records have no response and, in the second run, no valid image. Two are allowed."""
    for i, record in enumerate(sources):
        (tmp_path / f"{i}.png").write_bytes(record.images[0].data)
    images = [(StoredImage(path=f"{i}.png"),) for i in range(40)]
    paths = [replace(r, images=i) for r, i in zip(sources, images, strict=True)]
    paths[38:] = [replace(record, chosen="") for record in paths[38:]]
    data = _written(tmp_path, paths)
    output = str(tmp_path / "pairs.parquet")
    config = PairsConfig(output=output, data=data, mask="numbers", shard=8, quiet=True)
    run_stages(config, "mask")
    assert [row[1:] for row in rejected_in(tmp_path)] == [("mask", "no response")] * 2
    for i in (38, 39):
        (tmp_path / f"{i}.png").write_bytes(b"")
    report = build_pairs(replace(config, segments=2))  # all later stages are made again
    assert report.bad == {"corrupt": 2}
    assert [row[1:] for row in rejected_in(tmp_path)] == [("embed", "corrupt")] * 2


def test_a_data_set_that_changes_is_read_again(tmp_path, sources):
    data, output = _written(tmp_path, sources[:16]), str(tmp_path / "out" / "pairs.parquet")
    config = PairsConfig(output=output, data=data, mask="numbers", quiet=True)
    first = run_stages(config, "mask").folders
    assert run_stages(config, "mask").folders == first
    _written(tmp_path, sources[:20])
    changed = run_stages(config, "mask")
    assert changed.records == 20 and changed.folders["read"] != first["read"]


@pytest.mark.parametrize("error", [OSError, ValueError])
def test_an_error_without_text_is_not_a_success(tmp_path, error):
    class Fails(Stage):
        name, needs, schema = "fails", ("read",), Read.schema

        def run(self, inputs, number):
            raise error

    stage = Fails(PairsConfig())
    stage.folder, stage.folders = tmp_path / "fails", {"read": tmp_path / "read"}
    row = {"id": "a", "prompt": "[]", "chosen": "A", "images": []}
    shards.Shards(tmp_path / "read", Read.schema).write(0, [row], [])
    assert make_shard(stage, 0, InvalidLimit(0, set())).error == error.__name__
