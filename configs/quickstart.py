"""All three task types on a CPU in minutes: a small BERT from random weights, real Chinese data.

    python -m piccolo_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

Or from any Hugging Face directory of the BERT family: add
`--config.model.init=DIR --config.model.tokenizer= --config.optim.learning_rate=2e-5`.
"""

from pathlib import Path

from piccolo_jax.config import Config, DatasetConfig, EvalDatasetConfig

_DATA = Path(__file__).resolve().parent / "quickstart_data"
_TASKS = ("retrieval", "similarity", "classification")


def get_config() -> Config:
    config = Config(total_steps=300, batch_size=64)
    config.model.tokenizer = str(_DATA / "tokenizer")
    config.model.vocab_size = 2585
    config.model.hidden_size = 128
    config.model.num_layers = 2
    config.model.num_heads = 4
    config.model.intermediate_size = 512
    config.model.max_positions = 128
    config.model.embed_dim = 256
    config.model.dropout = 0.0
    config.model.freeze = ()  # random position embeddings must learn
    config.loss.dims = (32, 64, 128, 256)
    config.loss.retrieval.temperature = 0.05
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 20
    config.data.datasets = tuple(
        DatasetConfig(path=str(_DATA / f"{task}.train.jsonl")) for task in _TASKS
    )
    config.data.max_length = 128
    config.eval.datasets = tuple(
        EvalDatasetConfig(path=str(_DATA / f"{task}.test.jsonl")) for task in _TASKS
    )
    config.checkpoint.every = 100
    config.log.every = 10
    return config
