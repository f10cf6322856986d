"""A run's folder is all that its weights need."""

import json
import shutil

import jax
import numpy as np
import pytest
import small

from piccolo_jax import build, export, runs
from piccolo_jax.config import MeshConfig
from piccolo_jax.errors import UserError
from piccolo_jax.evaluation import models

TEXTS = ["今天天气很好", "A short English sentence", "a SHORT english Sentence"]


@pytest.fixture
def started_from(tmp_path):
    """started_from(pooling, lower_case): a model's directory, and a run that began there.

    The run's folder, its parts and its parameters.
    """

    def make(pooling="mean", lower_case=False):
        config = small.config(pooling=pooling)
        parts = build.build(config)
        init, workdir = tmp_path / "init", tmp_path / "run"
        export.write(init, small.params(parts), parts, config)
        small.make_cased(init)
        limits = {"max_seq_length": 32, "do_lower_case": lower_case}
        (init / "sentence_bert_config.json").write_text(json.dumps(limits))
        config.model.init, config.model.tokenizer, config.model.pooling = str(init), "", ""
        config.model.dropout = 0.25
        config.model.vocab_size = config.model.hidden_size = 7  # those of the directory count
        parts = build.build(config)
        params = small.params(parts)
        small.save_run(workdir, config, parts, params)
        return init, workdir, parts, params

    return make


@pytest.mark.parametrize("lower_case", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_run_is_read_without_the_model_that_it_began_with(started_from, pooling, lower_case):
    init, workdir, parts, params = started_from(pooling, lower_case)
    shutil.rmtree(init)
    moved = shutil.move(workdir, workdir.with_name("moved"))
    run = runs.read(moved)
    assert run.step == 2
    assert run.parts.model == parts.model
    assert run.parts.model.pooling == pooling
    assert build.describe(run.parts) == build.describe(parts)
    jax.tree.map(np.testing.assert_array_equal, run.params, params)
    for here, there in zip(
        run.parts.tokenizer.encode(TEXTS, 32)[0], parts.tokenizer.encode(TEXTS, 32)[0], strict=True
    ):
        np.testing.assert_array_equal(here, there)
    assert models.load(str(moved), MeshConfig()).encode(TEXTS).shape == (3, 24)


def test_another_model_in_the_place_of_the_first_changes_nothing(started_from, tmp_path):
    init, workdir, parts, _ = started_from("cls")
    (init / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    run = runs.read(workdir)
    assert run.parts.model == parts.model
    export.write(tmp_path / "out", run.params, run.parts, run.config)
    pooling = json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text())
    assert pooling["pooling_mode_cls_token"]


def test_a_run_whose_tokenizer_was_left_behind_is_an_error_that_says_so(started_from):
    workdir = started_from()[1]
    shutil.rmtree(workdir / "tokenizer")
    with pytest.raises(UserError, match="run/tokenizer: no such folder; copy the whole workdir"):
        runs.read(workdir)


def test_the_tokenizer_of_an_earlier_try_is_replaced(started_from):
    _, workdir, parts, _ = started_from()
    (workdir / "tokenizer" / "tokenizer.json").write_text("{}")
    (workdir / "tokenizer.partial").mkdir()  # of a process that was killed
    runs.keep_tokenizer(workdir, parts)
    assert runs.read(workdir).parts.tokenizer.fingerprint == parts.tokenizer.fingerprint
    assert not (workdir / "tokenizer.partial").exists()


def test_a_run_of_another_version_is_an_error_that_says_so(started_from):
    workdir = started_from()[1]
    about = workdir / "checkpoints" / "2" / "about" / "metadata"
    values = json.loads(about.read_text())
    del values["model"]["hidden_act"]
    about.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"checkpoints/2: doesn't say 'hidden_act' of its model"):
        runs.read(workdir)
