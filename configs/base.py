"""The published recipe: Piccolo2, BERT-large shape, 1,792 dimensions, seven prefixes.

    python -m piccolo_jax.train --config=configs/base.py --workdir=DIR \
        --config.data.datasets[0].path=META_LIST

META_LIST is a text file with a line `DIRECTORY REPEATS` per dataset. The sizes below are those of
the checkpoint that `model.init` names, from which Piccolo2 was trained too.
"""

from piccolo_jax.config import Config, DatasetConfig


def get_config() -> Config:
    config = Config()  # seed 0, 2,500 steps of 8,192 rows; losses and AdamW as published
    config.model.init = "infgrad/stella-mrl-large-zh-v3.5-1792d"
    config.model.vocab_size = 21128
    config.model.hidden_size = 1024
    config.model.num_layers = 24
    config.model.num_heads = 16
    config.model.intermediate_size = 4096
    config.model.max_positions = 512
    config.model.embed_dim = 1792
    config.model.dtype = "bfloat16"
    config.train.micro_batches = 17  # 16 rows of 512 tokens at a time on a v5e 8x8 slice
    config.loss.dims = (256, 512, 768, 1024, 1280, 1536, 1792)
    config.data.datasets = (DatasetConfig(path="data/train_list.txt"),)
    config.data.query_max_length = 64
    config.data.max_length = 512
    return config
