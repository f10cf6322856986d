import json
import re
import shutil

import pytest
import small
from huggingface_hub import ModelCard

from piccolo_jax import build, export
from piccolo_jax import config as config_lib
from piccolo_jax.config import DatasetConfig
from piccolo_jax.errors import UserError
from piccolo_jax.exporting import card, record
from piccolo_jax.exporting.layout import Exported, Options
from piccolo_jax.exporting.record import Record

MIXTURE = [
    {"dataset": "a.jsonl", "task": "retrieval", "rows": 120, "used": 100, "batch_size": 2,
     "share": 0.5, "steps": 3, "epochs": 0.06},
    {"dataset": "b.jsonl", "task": "similarity", "rows": 70, "used": 70, "batch_size": 2,
     "share": 0.5, "steps": 2, "epochs": 0.0571},
]  # fmt: skip
HARDWARE = {"device": "TPU v5e", "devices": 8, "processes": 2}
STEPS = [
    {"step": 1, "task": "retrieval", "dataset": "a.jsonl", "loss": 2.5, "total_tokens": 400,
     "total_seconds": 1.5, "mixture": MIXTURE, "hardware": HARDWARE},
    {"step": 2, "task": "similarity", "dataset": "b.jsonl", "loss": 0.75, "total_tokens": 900,
     "total_seconds": 61.25, "hardware": HARDWARE | {"devices": 4}},
    {"step": 3, "task": "retrieval", "dataset": "a.jsonl", "loss": 1.25, "total_tokens": 1300,
     "total_seconds": 3725.0},
    {"step": 4, "task": "retrieval", "dataset": "a.jsonl", "loss": 0.125, "total_tokens": 1700,
     "total_seconds": 9000.0},
]  # fmt: skip
EVALS = [
    {"step": 0, "dataset": "dev", "metric": "spearman", "8": 0.25, "24": 0.5},
    {"step": 2, "dataset": "dev", "metric": "spearman", "8": 0.26, "24": 0.51},
    {"step": 3, "dataset": "dev", "metric": "spearman", "8": 0.375, "24": 0.625},
]


@pytest.fixture(scope="module")
def model() -> Exported:
    config = small.config()
    parts = build.build(config)
    return export.exported_of(small.params(parts), parts, config)


@pytest.fixture
def workdir(tmp_path):
    for name, rows in (("metrics.jsonl", STEPS), ("eval.jsonl", EVALS)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def config():
    c = small.config()
    c.data.datasets = (
        DatasetConfig(path="data/a.jsonl", license="CC BY-SA 4.0", query_prompt="查询："),
        DatasetConfig(path="data/b.jsonl", query_prompt="查询："),
    )
    return c


def headings(text):
    return re.findall(r"^## (.*)", text, re.M)


def test_a_card_says_what_the_run_noted_up_to_the_exported_step(workdir, model):
    known = record.read_record(workdir, config(), 3)
    text = card.make(known, model, "my-model", Options(), {})
    for line in (
        "| dev spearman | 0.2500 -> 0.3750 | 0.5000 -> 0.6250 |",
        "| a.jsonl | retrieval | 100 | 3 | 0.06 | CC BY-SA 4.0 |",
        "| b.jsonl | similarity | 70 | 2 | 0.0571 |  |",
        "| retrieval | InfoNCE over the positives and hard negatives of the global batch | 0.01 |"
        " 1.0 | 2.5 | 1.25 |",
        "| similarity | CoSENT | 0.05 | 0.04 | 0.75 | 0.75 |",
        "| 8 x TPU v5e, 2 process(es) | 1 |",
        "| 4 x TPU v5e, 2 process(es) | 2 |",
    ):
        assert line in text.splitlines()
    assert "1,300 tokens (without padding) in 1 h 2 min of training" in text
    assert "3 of 5 steps of 2 rows" in text
    assert "8, 20, 24" in text
    assert "query `查询：`" in text
    assert headings(text) == ["Use", "Dimensions", "Training data", "Recipe", "Training figures"]


def test_a_card_of_weights_from_before_training_claims_no_training(workdir, model):
    text = card.make(record.read_record(workdir, config(), 0), model, "my-model", Options(), {})
    assert "from random weights, as it was before training with piccolo_jax" in text
    assert "On the evaluation files of the run, before training:" in text
    assert "| dev spearman | 0.2500 | 0.5000 |" in text.splitlines()
    assert headings(text) == ["Use", "Dimensions"]
    assert "steps" not in text


def test_scores_are_those_of_the_weights_that_are_exported(workdir, model):
    with (workdir / "eval.jsonl").open("a") as file:
        for row in EVALS:
            scores = {key: 2 * value for key, value in row.items() if key.isdigit()}
            file.write(json.dumps(row | scores | {"weights": "average"}) + "\n")
    c = config()
    c.optim.ema_decay = 0.5
    last = card.make(record.read_record(workdir, c, 3), model, "m", Options(), {})
    assert "| dev spearman | 0.2500 -> 0.3750 | 0.5000 -> 0.6250 |" in last
    assert "average" not in last
    known = record.read_record(workdir, c, 3, "average")
    average = card.make(known, model, "m", Options(), {})
    assert "| dev spearman | 0.5000 -> 0.7500 | 1.0000 -> 1.2500 |" in average
    assert "exponential moving average over the steps, decay 0.5" in average


def test_licences_can_be_given_later(workdir):
    c = config()
    c.data.datasets[1].license = "CC0"
    (workdir / "config.json").write_text(config_lib.to_json(c))
    known = record.read_record(workdir, config(), 3).licenses
    assert known == {"a.jsonl": "CC BY-SA 4.0", "b.jsonl": "CC0"}
    assert config_lib.diff(config(), c) == []


def test_datasets_of_equal_names_have_that_name_s_licence():
    known = Record(config(), licenses={"a.jsonl": "CC0", "b[1]": "MIT"})
    names = ("a.jsonl", "a.jsonl[12]", "b[1]", "b", "c[0]")
    assert [card._licence(known, name) for name in names] == ["CC0", "CC0", "MIT", "", ""]


def test_a_meta_list_s_licence_is_that_of_its_datasets(workdir):
    for name in ("one", "two"):
        (workdir / name).mkdir()
    (workdir / "list.txt").write_text(f"{workdir / 'one'} 1\n{workdir / 'two'} 2\n")
    c = config()
    c.data.datasets[0].path = str(workdir / "list.txt")
    known = record.read_record(workdir, c, 3).licenses
    assert known == {"one": "CC BY-SA 4.0", "two": "CC BY-SA 4.0"}


def test_what_was_not_measured_is_absent(model):
    c = small.config()
    text = card.make(Record(c), model, "my-model", Options(), {})
    assert headings(text) == ["Use", "Training data", "Recipe"]
    for word in ("licen", "rows |", "tokens (", "mteb", "onnx", "logged", "None", "nan", "epochs",
                 "language", "base_model", "model-index", "1 - cosine"):  # fmt: skip
        assert word not in text
    assert "| a.jsonl |" in text


def test_scores_of_another_step_are_not_those_of_the_model(workdir, model):
    known = record.read_record(workdir, config(), 4)
    assert "Dimensions" not in headings(card.make(known, model, "m", Options(), {}))


def test_half_precision_and_onnx_are_told_where_they_are(model):
    options = Options(dtype="bfloat16", onnx_dim=20)
    text = card.make(Record(small.config()), model, "m", options, {8: 3e-5, 24: 3e-6})
    assert "The weights are bfloat16" in text
    assert "| 8 | 3.0e-05 |" in text
    assert "cut to 20 and normalised" in text


def test_the_front_matter_is_what_the_hub_reads(workdir, model, tmp_path):
    write_results(tmp_path / "results", {"STSB": 0.5, "Own: files": 0.25})
    known = record.read_record(workdir, config(), 3, results=tmp_path / "results")
    known = Record(**{**vars(known), "license": "apache-2.0"})
    text = card.make(known, model, "my: model", Options(), {})
    data = ModelCard(text).data
    assert data.license == "apache-2.0"
    assert data.library_name == "sentence-transformers"
    assert {"matryoshka", "mteb"} <= set(data.tags)
    assert data.model_name == "my: model"
    [result] = data.eval_results  # none of files that mteb doesn't know
    assert (result.task_type, result.dataset_type) == ("STS", "mteb/STSB")
    assert (result.metric_type, result.metric_value) == ("cosine_spearman", 0.5)
    assert result.dataset_revision == "abc"
    assert "| STSB, test, cosine_spearman | 0.4000 | 0.5000 |" in text.splitlines()
    assert "| Own: files, test, main_score | 0.2000 | 0.2500 |" in text.splitlines()


@pytest.mark.parametrize("experiment", ["limit_8", "embed_dim_8__limit_8", "normalize_True"])
def test_results_of_other_experiments_are_not_the_model_s(tmp_path, experiment):
    write_results(tmp_path, {"STSB": 0.5})
    plain = list(record.read_scores(tmp_path))
    assert [score.dim for score in plain] == [None, 8]
    place = tmp_path / "m" / "rev" / "experiments"
    shutil.copytree(place / "embed_dim_8", place / experiment)
    assert list(record.read_scores(tmp_path)) == plain
    with pytest.raises(UserError, match="holds no results of mteb"):
        list(record.read_scores(place / experiment))


def write_results(folder, scores):
    """Result files as mteb's cache has them, at full width and at the prefix 8."""
    for place, factor in (("m/rev", 1), ("m/rev/experiments/embed_dim_8", 0.8)):
        (folder / place).mkdir(parents=True)
        (folder / place / "model_meta.json").write_text("{}")
        for task, score in scores.items():
            subset = {"hf_subset": "default", "main_score": score * factor, "languages": []}
            values = {"task_name": task, "dataset_revision": "abc", "scores": {"test": [subset]}}
            name = task.replace(" ", "_").replace(":", "")
            (folder / place / f"{name}.json").write_text(json.dumps(values))


def test_results_that_are_none_or_of_several_models_are_an_error(tmp_path):
    with pytest.raises(UserError, match="holds no results of mteb"):
        list(record.read_scores(tmp_path))
    write_results(tmp_path / "one", {"STSB": 0.5})
    write_results(tmp_path / "two", {"STSB": 0.5})
    with pytest.raises(UserError, match="results of several models"):
        list(record.read_scores(tmp_path))
    (tmp_path / "one" / "m" / "rev" / "STSB.json").write_text("{")
    with pytest.raises(UserError, match=r"STSB.json: not readable as JSON"):
        list(record.read_scores(tmp_path / "one"))
    (tmp_path / "one" / "m" / "rev" / "STSB.json").write_text('{"task_name": "STSB", "scores": 1}')
    with pytest.raises(UserError, match=r"STSB.json: not a result of mteb"):
        list(record.read_scores(tmp_path / "one"))


def test_a_table_survives_what_names_can_hold(model):
    c = small.config()
    c.data.datasets[0].path = "data/a|b.jsonl"
    text = card.make(Record(c), model, "m", Options(), {})
    assert r"| a\|b.jsonl |" in text.splitlines()


def test_the_hub_s_base_model_is_named_and_a_folder_is_not(model, tmp_path):
    c = small.config()
    c.model.init = "org/base"
    assert ModelCard(card.make(Record(c), model, "m", Options(), {})).data.base_model == "org/base"
    (tmp_path / "base").mkdir()
    c.model.init = str(tmp_path / "base")
    text = card.make(Record(c), model, "m", Options(), {})
    assert ModelCard(text).data.base_model is None
    assert str(tmp_path) not in text
    assert "trained from base with" in text


def test_the_code_in_a_card_runs(tmp_path):
    c = small.config()
    parts = build.build(c)
    export.write(tmp_path / "m", small.params(parts), parts, c)
    text = (tmp_path / "m" / "README.md").read_text("utf-8")
    torch_code, jax_code = re.findall(r"```python\n(.*?)```", text, re.S)
    vectors = []
    for code in (torch_code, jax_code):
        names = {"TEXTS": ["今天天气很好", "A text"]}
        exec(code.replace("path/to/this/directory", str(tmp_path / "m")), names)
        vectors.append([[float(x) for x in row] for row in names["vectors"]])
    assert len(vectors[0][0]) == 8
    for other in vectors[1:]:
        assert other[0] == pytest.approx(vectors[0][0], abs=1e-5)
