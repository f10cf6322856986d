import pytest
from preparing import TOKENIZER, write

from piccolo_jax.config import Config, DatasetConfig
from piccolo_jax.data.prepare import prepare_datasets
from piccolo_jax.data.tokenizer import Tokenizer
from piccolo_jax.tasks import TASKS


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TOKENIZER)


@pytest.fixture
def prepared(tmp_path, tokenizer):
    """prepared(rows, **fields of DatasetConfig) -> Store, in tmp_path / "prepared"."""

    def run(rows, name="rows.jsonl", config=None, **fields):
        path = write(tmp_path / name, rows)
        config = config or Config()
        config.data.datasets = (DatasetConfig(path, **fields),)
        (dataset,) = prepare_datasets(config, tokenizer, TASKS, tmp_path / "prepared")
        return dataset.store

    return run
