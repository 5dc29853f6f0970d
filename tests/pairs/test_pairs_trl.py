"""One step of TRL's DPOTrainer with the output of the pipeline, on the shipped digits model."""

import math

import datasets
import pytest
from transformers import AutoProcessor

from realign.data.records import read_pairs
from realign.digits import ASSETS

COLUMNS = ["prompt", "chosen", "rejected", "images"]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # warnings of transformers about TRL
def test_trl_takes_a_step(pairs_file, tmp_path):
    from trl import DPOConfig, DPOTrainer

    rows = datasets.load_dataset(
        "parquet", data_files=str(pairs_file), split="train", cache_dir=str(tmp_path / "cache")
    )
    rows = rows.select_columns(COLUMNS).select(range(4))
    for row, record in zip(rows, read_pairs(pairs_file), strict=False):
        assert row["prompt"] == list(record.prompt)
        assert row["chosen"] == [{"role": "assistant", "content": record.chosen}]
        assert row["rejected"] == [{"role": "assistant", "content": record.rejected}]
        assert [image.size for image in row["images"]] == [record.images[0].open("r").size]
    trainer = DPOTrainer(
        model=str(ASSETS),
        processing_class=AutoProcessor.from_pretrained(ASSETS),
        train_dataset=rows,
        args=DPOConfig(
            output_dir=str(tmp_path / "run"),
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
    first = trainer.state.log_history[0]
    # Before the first update, policy and reference are equal, so every margin is 0.
    assert abs(first["loss"] - math.log(2)) < 1e-3
    assert abs(first["rewards/margins"]) < 1e-3
    assert first["step"] == 1 and 0 < first["grad_norm"] < math.inf
    assert first["logps/chosen"] < 0 and first["logps/rejected"] < 0
    assert first["logps/chosen"] != first["logps/rejected"]
