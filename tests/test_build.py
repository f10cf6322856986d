import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import tiny

from piccolo_jax import build, export, optim, sharding
from piccolo_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compiling")


def paths(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def make_params(config, seed=0):
    parts = build.build(config)
    shardings = build.param_shardings(parts.model, small.one_device())
    return paths(build.make_params(parts, seed, shardings))


def differing(a, b):
    assert a.keys() == b.keys()
    return {name for name in a if np.any(np.asarray(a[name]) != b[name])}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A sentence-transformers directory with cls pooling and a scaling layer, and its weights."""
    config = small.config(pooling="cls")
    parts = build.build(config)
    params = small.params(parts)
    directory = tmp_path_factory.mktemp("model") / "export"
    export.write(directory, params, parts, config)
    return directory, paths(params)


def config_from(directory, embed_dim=24):
    config = small.config(pooling="", embed_dim=embed_dim)
    config.model.init, config.model.tokenizer = str(directory), ""
    config.model.vocab_size = config.model.hidden_size = 7  # those of the directory count
    return config


def test_texts_are_put_in_lower_case_if_the_weights_were_trained_so(exported, tmp_path):
    shutil.copytree(exported[0], tmp_path / "m")
    small.make_cased(tmp_path / "m")
    plain = build.build(config_from(tmp_path / "m")).tokenizer
    limits = '{"max_seq_length": 32, "do_lower_case": true}'
    (tmp_path / "m" / "sentence_bert_config.json").write_text(limits)
    lower = build.build(config_from(tmp_path / "m")).tokenizer
    texts = ["ABC Abc", "abc abc"]
    assert [len(set(map(bytes, t.encode(texts, 9)[0]))) for t in (plain, lower)] == [2, 1]
    assert plain.fingerprint != lower.fingerprint
    assert (plain.lower_case, lower.lower_case) == (False, True)


def test_random_weights_depend_on_the_seed():
    first = make_params(small.config(), seed=1)
    other = differing(first, make_params(small.config(), seed=2))
    assert other == {name for name in first if re.search("kernel|embedding$", name)}
    assert first["scaling/kernel"].shape == (24, 24)
    assert first["backbone/layers/query/kernel"].shape == (2, 24, 24)
    assert all(leaf.dtype == np.float32 for leaf in first.values())


def test_weights_and_the_scaling_layer_are_read_from_the_directory(exported):
    directory, params = exported
    parts = build.build(config_from(directory))
    assert parts.scaling_init
    assert parts.model.pooling == "cls"
    assert not differing(make_params(config_from(directory)), params)


def test_a_scaling_layer_beside_the_backbone_is_read_though_modules_json_has_it_not(
    exported, tmp_path
):
    directory, params = exported
    shutil.copytree(directory, tmp_path / "m")
    listed = json.loads((tmp_path / "m" / "modules.json").read_text())[:2]
    (tmp_path / "m" / "modules.json").write_text(json.dumps(listed))
    assert build.build(config_from(tmp_path / "m")).scaling_init
    assert not differing(make_params(config_from(tmp_path / "m")), params)


def test_a_scaling_layer_that_the_directory_has_not_is_drawn_by_the_seed(exported, tmp_path):
    directory, params = exported
    plain = tmp_path / "plain"
    shutil.copytree(directory, plain)
    (plain / "modules.json").unlink()
    shutil.rmtree(plain / "2_Dense")
    assert not build.build(config_from(plain, 30)).scaling_init
    first = make_params(config_from(plain, 30), seed=1)
    again = make_params(config_from(plain, 30), seed=1)
    other = make_params(config_from(plain, 30), seed=2)
    assert first["scaling/kernel"].shape == (24, 30)
    assert not differing(first, again)
    assert differing(first, other) == {"scaling/kernel"}
    scaling = {"scaling/kernel", "scaling/bias"}
    assert not differing(
        {n: v for n, v in first.items() if n not in scaling},
        {n: v for n, v in params.items() if n not in scaling},
    )


def test_without_a_width_there_is_no_scaling_layer(exported):
    directory, _ = exported
    assert not [n for n in make_params(config_from(directory, 0)) if "scaling" in n]
    assert not [n for n in make_params(small.config(embed_dim=0)) if "scaling" in n]


def test_what_the_config_sets_comes_before_what_the_directory_says(exported):
    config = config_from(exported[0])
    config.model.pooling, config.model.dropout = "last", 0.25
    config.model.dtype, config.model.remat = "bfloat16", "full"
    model = build.build(config).model
    assert (model.pooling, model.dtype, model.remat) == ("last", jnp.bfloat16, "full")
    assert model.backbone.hidden_dropout == model.backbone.attention_dropout == 0.25


def test_defaults_are_mean_pooling_dropout_as_published_and_what_suits_a_cpu():
    model = build.build(small.config(pooling="")).model
    assert (model.pooling, model.dtype, model.remat) == ("mean", jnp.float32, "dots")
    assert model.backbone.hidden_dropout == model.backbone.attention_dropout == 0.1


@pytest.mark.parametrize(
    ("layers", "on_cpu", "on_tpu"),
    [("auto", False, True), ("scanned", False, False), ("unrolled", True, True)],
)
def test_layers_are_scanned_on_cpu_and_unrolled_elsewhere_unless_told(layers, on_cpu, on_tpu):
    config = small.config()
    config.model.layers = layers
    spec = build.spec_of_sizes(config)
    assert build.make_model(config, spec, "cpu").unrolled == on_cpu
    assert build.make_model(config, spec, "tpu").unrolled == on_tpu


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: setattr(c.model, "vocab_size", 50),
            r"model\.tokenizer.*has \d+ token ids.* 50 ",
        ),
        (lambda c: setattr(c.data, "max_length", 65), r"data\.max_length = 65: must be at most 64"),
        (
            lambda c: setattr(c.data, "query_max_length", 65),
            r"data\.query_max_length = 65: must be at most 64",
        ),
        (lambda c: setattr(c.loss, "dims", (8, 25)), r"loss\.dims.*25 is longer.* 24 wide"),
        (lambda c: setattr(c.model, "tokenizer", "no/such"), "no/such: no tokenizer"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_named(change, message):
    config = small.config()
    change(config)
    with pytest.raises(UserError, match=message):
        build.build(config)


def test_lengths_beyond_the_positions_of_a_directory_are_an_error(exported):
    config = config_from(exported[0])
    config.data.max_length = 65
    with pytest.raises(
        UserError, match=r"data\.max_length = 65: must be at most 64, the positions"
    ):
        build.build(config)


def test_the_optimizer_moments_lie_where_their_parameters_do():
    model, config = tiny.embedder(), tiny.config()
    mesh = jax.sharding.AbstractMesh((2, 2, 2), sharding.AXES)
    params = build.abstract_params(model, build.param_shardings(model, mesh))
    optimizer = optim.make_optimizer(config, params)
    state = build.abstract_state(params, optimizer, mesh)
    assert len({s.sharding.spec for s in jax.tree.leaves(params)}) > 4
    by_path = paths(params)
    moments = [
        (path, leaf)
        for path, leaf in paths(state.opt_state).items()
        if re.search("/(mu|nu)/", path)
    ]
    assert len(moments) == 2 * (len(by_path) - 1)  # the position embeddings are frozen
    for path, leaf in moments:
        param = by_path[re.split("/(?:mu|nu)/", path)[1]]
        assert leaf.shape == param.shape
        assert leaf.sharding == param.sharding, path
    rest = {path for path in paths(state.opt_state)} - {path for path, _ in moments}
    for path in rest:
        assert paths(state.opt_state)[path].sharding.is_fully_replicated
    assert state.step.sharding.is_fully_replicated


def test_the_first_state_is_what_the_abstract_state_says():
    model, config, mesh = tiny.embedder(), tiny.config(), small.one_device()
    shardings = build.param_shardings(model, mesh)
    params = jax.device_put(tiny.params(model), shardings)
    optimizer = optim.make_optimizer(config, params)
    state = build.make_state(params, optimizer, mesh)
    abstract = build.abstract_state(build.abstract_params(model, shardings), optimizer, mesh)
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for path, leaf in paths(state).items():
        expected = paths(abstract)[path]
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)
        assert leaf.sharding == expected.sharding, path
    assert state.step == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))


def test_the_fields_of_the_config_that_name_sizes_all_reach_the_model():
    config = small.config()
    backbone = build.build(config).model.backbone
    sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size",
             "max_positions")  # fmt: skip
    values = dataclasses.asdict(backbone)
    assert {n: values[n] for n in sizes} == {n: getattr(config.model, n) for n in sizes}
