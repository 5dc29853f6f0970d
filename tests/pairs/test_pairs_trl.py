"""What the pipeline writes is what TRL's DPOTrainer takes: one step on the shipped digits model."""

import math

import datasets
import pytest
from transformers import AutoProcessor

from realign.data.records import read_pairs
from realign.digits import ASSETS

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about TRL
COLUMNS = ["prompt", "chosen", "rejected", "images"]


@pytest.fixture(scope="module")
def history(pairs_file, tmp_path_factory):
    """(the rows trained on, TRL's log) of one step on four pairs."""
    from trl import DPOConfig, DPOTrainer

    folder = tmp_path_factory.mktemp("trl")
    rows = datasets.load_dataset(
        "parquet", data_files=str(pairs_file), split="train", cache_dir=str(folder / "cache")
    )
    rows = rows.select_columns(COLUMNS).select(range(4))
    trainer = DPOTrainer(
        model=str(ASSETS),
        processing_class=AutoProcessor.from_pretrained(ASSETS),
        train_dataset=rows,
        args=DPOConfig(
            output_dir=str(folder / "run"),
            per_device_train_batch_size=4,
            max_steps=1,
            max_length=None,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
        ),
    )
    trainer.train()
    return rows, trainer.state.log_history


def test_the_rows_are_trls(history, pairs_file):
    rows, _ = history
    assert rows.column_names == COLUMNS
    for row, record in zip(rows, read_pairs(pairs_file), strict=False):
        assert row["prompt"] == list(record.prompt)
        assert row["chosen"] == [{"role": "assistant", "content": record.chosen}]
        assert row["rejected"] == [{"role": "assistant", "content": record.rejected}]
        assert [image.size for image in row["images"]] == [record.images[0].open("r").size]


def test_trl_takes_a_step(history):
    _, log = history
    first = log[0]
    # Before the first update policy and reference agree, so every margin is 0.
    assert abs(first["loss"] - math.log(2)) < 1e-3
    assert abs(first["rewards/margins"]) < 1e-3
    assert first["step"] == 1 and 0 < first["grad_norm"] < math.inf
    assert first["logps/chosen"] < 0 and first["logps/rejected"] < 0
    assert first["logps/chosen"] != first["logps/rejected"]
