import copy
import json
import runpy
from pathlib import Path

import pytest

from piccolo_jax import config as config_lib
from piccolo_jax.config import Config, DatasetConfig, EvalDatasetConfig
from piccolo_jax.errors import UserError


def usable(**fields):
    config = Config(**fields)
    config.model.tokenizer = "some/tokenizer"
    config.data.datasets = (DatasetConfig(path="a.jsonl"), DatasetConfig(path="b.jsonl"))
    return config


def put(config, field, value):
    *parents, name = field.split(".")
    node = config
    for parent in parents:
        node = getattr(node, parent)
    setattr(node, name, value)
    return config


def test_the_defaults_are_the_published_recipe():
    c = Config()
    assert (c.total_steps, c.batch_size, c.model.embed_dim) == (2500, 8192, 1792)
    assert (c.model.hidden_size, c.model.num_layers, c.model.num_heads) == (1024, 24, 16)
    assert c.loss.dims == (256, 512, 768, 1024, 1280, 1536, 1792)
    temperatures = [getattr(c.loss, task).temperature for task in config_lib.TASK_NAMES]
    weights = [getattr(c.loss, task).weight for task in config_lib.TASK_NAMES]
    assert (temperatures, weights) == ([0.01, 0.05, 0.05], [1.0, 0.04, 0.2])
    assert (c.loss.retrieval.candidates, c.loss.classification.max_negatives) == ("all", 10)
    o = c.optim
    assert (o.learning_rate, o.schedule, o.warmup_steps, o.weight_decay) == (1e-5, "cosine", 0, 0)
    assert (o.clip_norm, o.b1, o.b2, o.eps) == (1.0, 0.9, 0.999, 1e-8)
    assert (c.data.query_max_length, c.data.max_length, c.data.negatives) == (64, 512, 1)
    assert c.model.freeze == ("position_embeddings",)


def test_what_is_not_the_recipe_is_off():
    c = Config()
    r, s = c.loss.retrieval, c.loss.similarity
    assert (r.duplicates, r.terms, r.false_negative_margin) == ("once", ("qd",), None)
    assert (r.hardness, r.spread_out, s.normalize, s.angle_weight) == (0, 0, False, 0)
    assert (c.loss.circle_margin, c.data.positives, c.train.micro_batches) == (None, 1, 1)
    assert (c.data.mixing_temperature, c.data.decontaminate.paths) == (None, ())


def test_angles_need_even_prefixes():
    config = usable()
    config.loss.dims, config.loss.similarity.angle_weight = (7, 256), 0.5
    with pytest.raises(UserError, match=r"config\.loss\.dims = .*even where .*angle_weight"):
        config_lib.validate(config)


@pytest.mark.parametrize("name", ["base", "quickstart"])
def test_the_configs_that_ship_are_valid(name):
    path = Path(__file__).resolve().parents[1] / "configs" / f"{name}.py"
    config_lib.validate(runpy.run_path(str(path))["get_config"]())


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("total_steps", 0, "greater than 0"),
        ("total_steps", 2**31, "less than 2**31"),
        ("batch_size", -1, "greater than 0"),
        ("batch_size", 2.5, "integer"),
        ("seed", -1, "0 or greater"),
        ("seed", 2**32, "less than 2**32"),
        ("seed", True, "integer"),
        ("model", None, "ModelConfig"),
        ("data", {}, "DataConfig"),
        ("model.tokenizer", "", "when model.init is empty"),
        ("model.num_layers", 0, "greater than 0"),
        ("model.num_heads", 3, "divisor of model.hidden_size = 1024"),
        ("model.pooling", "max", "'mean', 'cls', 'last'"),
        ("model.embed_dim", -1, "0 or greater"),
        ("model.dropout", 1.0, "None or in [0, 1)"),
        ("model.dropout", float("nan"), "finite"),
        ("model.dtype", "float16", "'bfloat16'"),
        ("model.remat", "all", "'full'"),
        ("model.layers", "looped", "'unrolled'"),
        ("model.freeze", ("(",), "regular expressions"),
        ("model.freeze", "position", "tuple"),
        ("model.freeze", ("",), "() for none"),
        ("model.vocab_size", 2**31, "less than 2**31"),
        ("model.embed_dim", 10**25, "less than 2**31"),
        ("model.init", "\udcd6", "UTF-8"),
        ("data.decontaminate.paths", ("a", "\udcd6"), "UTF-8"),
        ("data.decontaminate.paths", ("",), "none empty"),
        ("data.datasets", (DatasetConfig(path="a", query_prompt="\ud800"),), "UTF-8"),
        ("data.datasets", (DatasetConfig(path="a", weight=1e-300, repeats=1e-300),), "1e-09"),
        ("data.negatives", 10**25, "less than 2**31"),
        ("data.positives", 2**31, "less than 2**31"),
        ("loss.classification.max_negatives", 2**31, "less than 2**31"),
        ("loss.similarity.weight", 1e39, "3e+38"),
        ("optim.eps", 1e-300, "1e-37"),
        ("optim.b2", 0.9999999999999, "32-bit"),
        ("loss.block_size", -1, "0 or greater"),
        ("loss.circle_margin", -0.1, "None or in [0, 2)"),
        ("loss.retrieval.false_negative_margin", 2.0, "None or in [0, 2)"),
        ("loss.retrieval.terms", (), "'qd', then any of"),
        ("loss.retrieval.terms", ("qd", "xy"), "'qd', then any of"),
        ("loss.retrieval.terms", ("qd", "qq", "qq"), "'qd', then any of"),
        ("loss.retrieval.hardness", -1.0, "0 or greater"),
        ("loss.retrieval.spread_out", -1.0, "0 or greater"),
        ("loss.similarity.angle_weight", -1.0, "0 or greater"),
        ("train.micro_batches", 0, "greater than 0"),
        ("data.positives", 0, "greater than 0"),
        ("loss.dims", (), "at least one prefix"),
        ("loss.dims", (256, 256), "strictly increasing"),
        ("loss.dims", (512, 256), "strictly increasing"),
        ("loss.dims", (0, 256), "greater than 0"),
        ("loss.dims", (256, 1793), "1792 wide"),
        ("loss.dims", 256, "tuple"),
        ("eval.dims", (256, 1793), "1792 wide"),
        ("eval.dims", (2, 1), "strictly increasing"),
        ("loss.retrieval.temperature", 0.0, "greater than 0"),
        ("loss.similarity.weight", -1.0, "greater than 0"),
        ("loss.retrieval.candidates", "some", "'own_positive'"),
        ("loss.retrieval.duplicates", "twice", "'count'"),
        ("loss.classification.max_negatives", 0, "greater than 0"),
        ("optim.learning_rate", float("nan"), "finite"),
        ("optim.learning_rate", float("inf"), "finite"),
        ("optim.learning_rate", "1e-5", "number"),
        ("optim.schedule", "step", "'constant'"),
        ("optim.warmup_steps", 2500, "less than total_steps = 2500"),
        ("optim.b1", 1.0, "in [0, 1)"),
        ("optim.ema_decay", 1.0, "in [0, 1)"),
        ("optim.ema_decay", -0.1, "in [0, 1)"),
        ("optim.clip_norm", -1.0, "0 or greater"),
        ("data.datasets", (), "at least one DatasetConfig"),
        ("data.datasets", (DatasetConfig(),), "a file or directory"),
        ("data.datasets", ("a.jsonl",), "DatasetConfig"),
        ("data.datasets", (DatasetConfig(path="a", task="qa"),), "'similarity'"),
        ("data.datasets", (DatasetConfig(path="a", weight=0.0),), "greater than 0"),
        ("data.datasets", (DatasetConfig(path="a", repeats=0.0),), "greater than 0"),
        (
            "data.datasets",
            (DatasetConfig(path="a", weight=1e200, repeats=1e200),),
            "at most 1e+09 / repeats",
        ),
        ("data.datasets", (DatasetConfig(path="a", max_rows=-1),), "0 or greater"),
        ("data.datasets", (DatasetConfig(path="a", batch_size=-1),), "0 or greater"),
        (
            "data.datasets",
            (DatasetConfig(path="a", task="retrieval", label_names="n"),),
            "'classification' where label_names is set",
        ),
        (
            "data.datasets",
            (DatasetConfig(path="a", label_language="zh"),),
            "a file where label_language is set",
        ),
        ("data.mixing_temperature", 0.5, "None, or 1 (proportional to rows) or more"),
        ("data.min_batch_size", 0, "greater than 0"),
        ("data.decontaminate.passages", "all", "'corpus'"),
        ("data.decontaminate.paths", "dev.jsonl", "tuple"),
        ("data.decontaminate.ngram_threshold", 0.0, "None or in (0, 1]"),
        ("data.decontaminate.ngram_size", 0, "greater than 0"),
        ("data.query_max_length", 2, "3 tokens or more"),
        ("data.max_length", 513, "at most model.max_positions = 512"),
        ("data.negatives", -1, "0 or greater"),
        ("data.remine_every", -1, "0 or greater"),
        ("data.remine_ranks", (0, 5), "(FIRST, LAST), 1 or more, rising"),
        ("data.remine_ranks", (9, 5), "(FIRST, LAST), 1 or more, rising"),
        ("data.remine_ranks", (9,), "remine_ranks"),
        ("data.remine_count", 52, "at most 51, the ranks in data.remine_ranks"),
        ("data.remine_count", 0, "greater than 0"),
        ("data.remine_max_positive_ratio", 0.0, "None or in (0, 2]"),
        ("data.replace_every", -1, "0 or greater"),
        ("eval.datasets", (EvalDatasetConfig(),), "a file or directory"),
        ("eval.datasets", (EvalDatasetConfig(path="a", max_rows=-1),), "0 or greater"),
        ("eval.every", -1, "0 or greater"),
        ("log.every", 0, "greater than 0"),
        ("checkpoint.keep", 0, "greater than 0"),
        ("mesh.fsdp", 0, "-1 (all that remain) or greater than 0"),
        ("mesh.fsdp", -1, "-1 on one axis at most"),
    ],
)
def test_a_value_that_cannot_work_is_named_with_what_is_allowed(field, value, allowed):
    with pytest.raises(UserError) as raised:
        config_lib.validate(put(usable(), field, value))
    message = str(raised.value)
    assert message.startswith(f"config.{field.split('.')[0]}")
    assert f"config.{field}" in message or field == "mesh.fsdp"
    assert allowed in message
    assert "\n" not in message
    assert len(message) < 300


def test_replacing_negatives_needs_negatives():
    config = usable()
    config.data.replace_every, config.data.negatives = 100, 0
    with pytest.raises(UserError, match=r"data\.negatives = 0: must be greater than 0"):
        config_lib.validate(config)


def test_the_width_without_a_scaling_layer_is_the_hidden_size():
    config = usable()
    config.model.embed_dim, config.loss.dims = 0, (256, 1024)
    config_lib.validate(config)
    config.loss.dims = (256, 1025)
    with pytest.raises(UserError, match=r"config\.loss\.dims.*1025 is longer.* 1024 wide"):
        config_lib.validate(config)


def test_sizes_are_not_checked_where_the_checkpoint_brings_its_own():
    config = usable()
    config.model.init, config.model.num_heads, config.data.max_length = "some/model", 3, 2048
    config_lib.validate(config)


def test_lists_are_taken_for_tuples():
    config = usable()
    config.loss.dims, config.data.datasets = [256, 512], list(config.data.datasets)
    config_lib.validate(config)
    assert config.loss.dims == (256, 512)
    assert isinstance(config.data.datasets, tuple)


def test_a_misspelt_field_is_an_error_in_code():
    with pytest.raises(AttributeError, match="learning_rat"):
        Config().optim.learning_rat = 1.0


def test_json_gives_the_same_config_back():
    config = usable(seed=3)
    config.model.dropout, config.model.freeze = 0.25, ("a", "b|c")
    config.data.datasets[0].query_prompt = "查询：\n"
    config.eval.datasets = (EvalDatasetConfig(path="dev", max_rows=5),)
    again = config_lib.from_json(config_lib.to_json(config), "here")
    assert again == config
    config_lib.validate(again)


@pytest.mark.parametrize("text", ['{"seed": 0', '{"sead": 0}', '{"seed": "x"}', "[]", ""])
def test_json_that_is_not_a_config_is_an_error_that_names_the_file(text):
    with pytest.raises(UserError, match=r"^run/config\.json: config") as raised:
        config_lib.from_json(text, "run/config.json")
    assert len(str(raised.value)) < 300


def test_json_of_a_version_with_fewer_fields_gets_their_defaults():
    values = json.loads(config_lib.to_json(usable()))
    del values["model"]["remat"]
    assert config_lib.from_json(json.dumps(values), "here") == usable()


def test_diff_lists_every_field_that_changes_what_is_learnt():
    old, new = usable(), usable(seed=1)
    new.optim.learning_rate = 2e-5
    new.data.datasets = (DatasetConfig(path="a.jsonl"), DatasetConfig(path="c.jsonl"))
    assert config_lib.diff(old, new) == [
        "data.datasets[1].path: 'b.jsonl' -> 'c.jsonl'",
        "optim.learning_rate: 1e-05 -> 2e-05",
        "seed: 0 -> 1",
    ]


def test_diff_sees_datasets_that_come_and_go():
    more = usable()
    more.data.datasets += (DatasetConfig(path="c.jsonl", weight=2.0),)
    assert "data.datasets[2].path: None -> 'c.jsonl'" in config_lib.diff(usable(), more)
    assert "data.datasets[2].path: 'c.jsonl' -> None" in config_lib.diff(more, usable())
    none = usable()
    none.data.datasets = ()
    assert "data.datasets[0].path: None -> 'a.jsonl'" in config_lib.diff(none, usable())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("log.every", 1),
        ("checkpoint.every", 7),
        ("checkpoint.keep", 9),
        ("eval.every", 3),
        ("eval.dims", (256,)),
        ("eval.datasets", (EvalDatasetConfig(path="dev"),)),
        ("mesh.fsdp", 2),
        ("model.remat", "full"),
        ("model.layers", "unrolled"),
        ("data.prepared_dir", "elsewhere"),
    ],
)
def test_fields_that_do_not_change_what_is_learnt_may_change(field, value):
    assert config_lib.diff(usable(), put(usable(), field, value)) == []


def test_a_list_and_a_tuple_of_the_same_values_are_no_difference():
    config = usable()
    config.loss.dims = list(config.loss.dims)
    assert config_lib.diff(usable(), config) == []


@pytest.mark.parametrize(
    ("schedule", "refused"), [("constant", False), ("cosine", True), ("linear", True)]
)
def test_only_a_constant_schedule_lets_the_run_become_longer(schedule, refused):
    old = put(usable(), "optim.schedule", schedule)
    new = put(copy.deepcopy(old), "total_steps", 5000)
    assert config_lib.diff(old, new) == (["total_steps: 2500 -> 5000"] if refused else [])
