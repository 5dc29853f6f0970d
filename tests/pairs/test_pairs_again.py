"""What a second run of the pairs pipeline makes again, to give what a fresh one gives."""

import shutil
import signal
import time
from dataclasses import replace

import pytest
from killed_runs import before_a_shard, exit_code
from pair_runs import SHARDS, config_in, rejected_in, shard_times, stage_folder

from realign.data.records import StoredImage, read_pairs, write_pairs
from realign.pairs.config import PairsConfig
from realign.pairs.engines import Reply
from realign.pairs.io.importers import read_any
from realign.pairs.io.shards import Shards
from realign.pairs.pipeline import build_pairs, digit_sources, run_stages
from realign.pairs.stats import collect

SCENES = 40
STAGES = ("read", "embed", "retrieve", "mask", "refill", "filter")


@pytest.fixture
def pictures(tmp_path):
    """Records whose pictures are files in `pictures/`, and the settings of a run of them."""
    folder = tmp_path / "pictures"
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


def _fresh(config, folder) -> bytes:
    """The pairs of a run that knows of nothing before it."""
    output = folder / "fresh" / "pairs.parquet"
    build_pairs(replace(config, output=str(output)))
    return output.read_bytes()


def _times(config) -> dict[str, dict[str, int]]:
    return {name: shard_times(stage_folder(config.work_folder, name)) for name in STAGES}


def _made_again(before, after) -> dict[str, set[int]]:
    """The numbers of the shards of each stage that were written again."""
    return {
        stage: {int(name[:5]) for name, when in times.items() if before[stage].get(name) != when}
        for stage, times in after.items()
    }


@pytest.mark.parametrize("fault", ["missing", "corrupt"])
def test_mended_pictures_are_looked_at_again(pictures, tmp_path, fault):
    spoiled = tmp_path / "pictures" / "11.png"  # of the second shard
    data = spoiled.read_bytes()
    spoiled.unlink()
    if fault == "corrupt":
        spoiled.write_bytes(b"no picture")
    build_pairs(pictures)
    stage = {"missing": "read", "corrupt": "embed"}[fault]
    assert rejected_in(tmp_path / "out") == [("scene-00011", stage, fault)]
    before = _times(pictures)
    spoiled.write_bytes(data)
    report = build_pairs(pictures)
    assert not report.bad
    assert not (pictures.work_folder / "rejected_records.parquet").exists()
    again = _made_again(before, _times(pictures))
    assert again["read"] == again["embed"] == again["mask"] == {1}
    assert len(again["retrieve"]) == SHARDS  # an image more among which is searched
    assert (tmp_path / "out" / "pairs.parquet").read_bytes() == _fresh(pictures, tmp_path)


def test_a_replaced_picture_is_noticed(pictures, tmp_path):
    build_pairs(pictures)
    folder = tmp_path / "pictures"
    (folder / "3.png").write_bytes((folder / "20.png").read_bytes())
    build_pairs(pictures)
    assert (tmp_path / "out" / "pairs.parquet").read_bytes() == _fresh(pictures, tmp_path)


def test_a_touched_picture_stops_at_its_vector(pictures, tmp_path):
    """It may be another one, so its shard is made again; search sees the same vectors as before."""
    build_pairs(pictures)
    before, kept = _times(pictures), (tmp_path / "out" / "pairs.parquet").read_bytes()
    (tmp_path / "pictures" / "3.png").touch()
    build_pairs(pictures)
    again = _made_again(before, _times(pictures))
    assert again.pop("retrieve") == set()
    assert all(numbers == {0} for numbers in again.values()), again
    assert (tmp_path / "out" / "pairs.parquet").read_bytes() == kept


def test_pictures_that_go_and_come_back_cost_nothing_that_was_made(pictures, tmp_path):
    """As when the disk of the pictures is not mounted for one run."""
    build_pairs(pictures)
    kept = (tmp_path / "out" / "pairs.parquet").read_bytes()
    (tmp_path / "pictures").rename(tmp_path / "elsewhere")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(ValueError, match="cannot be used, more than --max-bad 0.2 allows"):
        build_pairs(pictures)
    assert (tmp_path / "out" / "pairs.parquet").read_bytes() == kept
    (tmp_path / "pictures").rmdir()
    (tmp_path / "elsewhere").rename(tmp_path / "pictures")
    assert not build_pairs(pictures).bad
    assert (tmp_path / "out" / "pairs.parquet").read_bytes() == kept


def test_a_record_without_reply_is_asked_again(tmp_path, engine):
    config = config_in(tmp_path / "out", masker="transformers:a", max_bad=0.1)

    def segments(text):
        return '["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "zero"]'

    first = next(r.chosen for r in digit_sources(config) if r.name == "scene-00009")
    engine(lambda text: Reply("", "down") if first in text else segments(text))
    build_pairs(config)
    assert ("scene-00009", "mask", "no reply") in rejected_in(tmp_path / "out")
    fake = engine(segments)
    build_pairs(config)
    assert len(fake.asked) == 8  # of its shard; an endpoint's answers are kept besides
    assert not (config.work_folder / "rejected_records.parquet").exists()
    whole = config_in(tmp_path / "fresh", masker="transformers:a", max_bad=0.1)
    build_pairs(whole)
    written = (tmp_path / "out" / "pairs.parquet").read_bytes()
    assert written == (tmp_path / "fresh" / "pairs.parquet").read_bytes()


def test_a_run_killed_while_it_replaces_a_shard_loses_no_record(pictures, tmp_path):
    spoiled = tmp_path / "pictures" / "11.png"
    data = spoiled.read_bytes()
    spoiled.unlink()
    build_pairs(pictures)
    spoiled.write_bytes(data)
    flags = ["--data", pictures.data, "--image-folder", pictures.image_folder, "--k", "4"]
    flags += ["--mask", "numbers", "--shard", "8", "--max-bad", "0.2", "--quiet"]
    assert exit_code(before_a_shard, "--output", pictures.output, *flags) == -signal.SIGKILL
    report = build_pairs(pictures)
    assert not report.bad
    assert (tmp_path / "out" / "pairs.parquet").read_bytes() == _fresh(pictures, tmp_path)


def test_a_picture_that_became_a_link_out_of_the_folder_is_refused(pictures, tmp_path):
    build_pairs(pictures)
    inside = tmp_path / "pictures" / "3.png"
    inside.rename(tmp_path / "secret.png")
    inside.symlink_to(tmp_path / "secret.png")
    report = build_pairs(pictures)
    assert report.bad == {"outside the folder": 1}
    assert (tmp_path / "out" / "pairs.parquet").read_bytes() == _fresh(pictures, tmp_path)


def test_arrays_that_a_killed_run_left_are_not_taken_for_those_of_their_rows(pictures, tmp_path):
    """Two pictures vanish, the run dies with their vectors gone, and they come back."""
    build_pairs(pictures)
    held = [(tmp_path / "pictures" / f"{i}.png") for i in (5, 20)]
    for picture in held:
        picture.rename(tmp_path / picture.name)

    def died(*_, **__):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("realign.pairs.stages.retrieve.Retrieve._save_index", died)
        with pytest.raises(KeyboardInterrupt):
            build_pairs(pictures)
    for picture in held:
        (tmp_path / picture.name).rename(picture)
    config = replace(pictures, negative="random")
    build_pairs(config)
    assert (tmp_path / "out" / "pairs.parquet").read_bytes() == _fresh(config, tmp_path)


def test_damage_within_a_shard_is_named_with_its_remedy(whole_run, tmp_path):
    config = config_in(tmp_path)
    shutil.copytree(whole_run.work, config.work_folder)
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


@pytest.mark.parametrize("stage", ["read", "embed", "retrieve", "refill"])
def test_a_damaged_shard_is_made_again(whole_run, tmp_path, stage):
    config = config_in(tmp_path)
    shutil.copytree(whole_run.work, config.work_folder)
    shard = stage_folder(config.work_folder, stage) / "00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])
    build_pairs(config)
    assert (tmp_path / "pairs.parquet").read_bytes() == whole_run.bytes


@pytest.mark.parametrize("kind", ["crop", "noise"])
def test_derived_negatives_are_a_stage(tmp_path, kind):
    config = config_in(tmp_path, negative=kind)
    run_stages(config, "negative")
    folder = stage_folder(config.work_folder, "negative")
    made = {
        row["id"]: row["images"][0]["bytes"]
        for number in Shards(folder).done()
        for row in Shards(folder).read(number)
    }
    before = shard_times(folder)
    build_pairs(config)
    assert shard_times(folder) == before and len(before) == SHARDS
    pairs = read_pairs(config.output)
    assert {r.name: r.retrieved_images[0].data for r in pairs} == made
    with pytest.raises(ValueError, match="retrieved negatives are not made"):
        run_stages(config_in(tmp_path / "other"), "negative")


def test_stats_tell_the_drops_of_the_run_that_wrote_the_file(tmp_path):
    """Two outputs that share a work folder, of runs that drop differently."""
    work = str(tmp_path / "work")
    easy = config_in(tmp_path, work=work)
    strict = replace(easy, output=str(tmp_path / "other" / "pairs.parquet"), k=1)
    reports = {config.output: build_pairs(config) for config in (easy, strict)}
    counts = {output: collect(output, work=work).dropped for output in reports}
    assert counts == {output: report.dropped for output, report in reports.items()}
    assert counts[strict.output].total() > counts[easy.output].total()
    assert {f.name for f in tmp_path.iterdir()} == {"pairs.parquet", "other", "work"}


def test_names_that_come_often_take_no_longer(tmp_path):
    """LLaVA's ids come several times each; 40,000 times the same took minutes once."""
    (tmp_path / "a.png").write_bytes(b"x")
    lines = (
        f'{{"id": "a", "image": "a.png", "question": "how many?", "answer": "there are {i}"}}'
        for i in range(40_000)
    )
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    began = time.perf_counter()
    names = [record.name for record in read_any(str(tmp_path / "data.jsonl"))]
    assert time.perf_counter() - began < 30
    assert names[:3] == ["a", "a-2", "a-3"] and len(set(names)) == 40_000
