"""Small models on disk, and commands run within the test's process."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from piccolo_jax import build, cli, runs, sharding
from piccolo_jax.checkpoint import About, Checkpoints
from piccolo_jax.config import Config, DatasetConfig, MeshConfig

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "configs" / "quickstart_data" / "tokenizer"
DIMS = (8, 20, 24)
# XLA's older code of fusions, where the time is the compiler's: it takes up to a quarter less.
OLDER_FUSIONS = "--xla_cpu_use_fusion_emitters=false"
TASKS = ("retrieval", "similarity", "classification")
TRAINING_CONFIG = """
from piccolo_jax.config import Config, DatasetConfig, EvalDatasetConfig


def get_config():
    config = Config(total_steps=12, batch_size=4)
    config.model.tokenizer = {tokenizer!r}
    config.model.vocab_size, config.model.hidden_size, config.model.num_layers = 2600, 32, 2
    config.model.num_heads, config.model.intermediate_size = 2, 64
    config.model.max_positions, config.model.embed_dim = 32, 48
    config.model.dropout = 0.1  # random numbers matter
    config.loss.dims = (16, 48)
    config.optim.learning_rate, config.optim.schedule = 1e-3, "constant"
    config.data.max_length = config.data.query_max_length = 32
    config.data.datasets = tuple(DatasetConfig(path=path) for path in {train!r})
    config.eval.datasets = (EvalDatasetConfig(path={dev!r}, max_rows=10),)
    config.eval.every, config.checkpoint.every, config.log.every = 6, 4, 1
    return config
"""


def config(pooling="mean", embed_dim=24, tokenizer=TOKENIZER, vocab_size=2600):
    c = Config(total_steps=5, batch_size=2)
    c.model.tokenizer, c.model.pooling, c.model.embed_dim = str(tokenizer), pooling, embed_dim
    c.model.vocab_size, c.model.hidden_size, c.model.num_layers = vocab_size, 24, 2
    c.model.num_heads, c.model.intermediate_size, c.model.max_positions = 2, 48, 64
    c.loss.dims = DIMS
    c.data.datasets = (DatasetConfig(path="data/a.jsonl", query_prompt="查询："),)
    c.data.max_length = 32
    return c


def make_cased(directory):
    """Its tokenizer then tells capitals, which the vocabulary hasn't, from small letters."""
    for name, edit in (
        ("tokenizer.json", lambda values: values["normalizer"].update(lowercase=False)),
        ("tokenizer_config.json", lambda values: values.update(do_lower_case=False)),
    ):
        values = json.loads((directory / name).read_text("utf-8"))
        edit(values)
        (directory / name).write_text(json.dumps(values, ensure_ascii=False), "utf-8")


def one_device():
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def params(parts):
    """Random parameters, large enough for texts to be far from each other."""
    shardings = build.param_shardings(parts.model, one_device())
    made = build.make_params(parts, 0, shardings)
    if "scaling" in made:
        # With these no text of test_evaluate.py is so near to a classifier's border that rounding
        # decides its label; without, one has a margin of 1.5e-7, where vectors differ by 2e-7.
        made["scaling"]["kernel"] *= 3**0.5
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: np.asarray(x) + rng.normal(size=x.shape, scale=0.3).astype(np.float32), made
    )


def save_run(workdir, config, parts, params, step=2):
    """A run whose latest checkpoint, at `step`, holds `params`, and an older one zeros."""
    shardings = build.param_shardings(parts.model, one_device())
    optimizer = optax.sgd(1.0)
    with Checkpoints(workdir, keep=2) as checkpoints:
        for at in (step - 1, step):
            values = jax.tree.map(lambda x, at=at: x * (at == step), params)
            state = build.make_state(jax.device_put(values, shardings), optimizer, one_device())
            checkpoints.save(at, state, About(config, [], build.describe(parts)))
    runs.keep_tokenizer(workdir, parts)


def snapshot(directory):
    """The content of every file."""
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }


def run_command(main, *arguments):
    """The exit code of a command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *map(str, arguments)])
        try:
            cli.run(main)
        except SystemExit as stop:
            return stop.code or 0
    raise AssertionError("cli.run returned")


def one_error(capsys):
    """The one message on standard error, below what was said before."""
    lines = capsys.readouterr().err.split("error: ")
    assert len(lines) == 2, lines
    assert "Traceback" not in lines[1]
    return lines[1]


def write_training_files(directory, tasks=TASKS):
    """Training files of 20 rows of each task, and a config file tiny.py that names them."""
    data = TOKENIZER.parent
    for task in tasks:
        lines = (data / f"{task}.train.jsonl").read_text("utf-8").splitlines(keepends=True)
        (directory / f"{task}.jsonl").write_text("".join(lines[:20]), encoding="utf-8")
    config = TRAINING_CONFIG.format(
        tokenizer=str(TOKENIZER),
        train=[str(directory / f"{task}.jsonl") for task in tasks],
        dev=str(data / "similarity.test.jsonl"),
    )
    (directory / "tiny.py").write_text(config, encoding="utf-8")
    return directory
