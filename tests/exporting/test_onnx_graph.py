import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest
import small
from small import run_command

from piccolo_jax import build, export
from piccolo_jax.errors import UserError
from piccolo_jax.exporting import onnx_graph, states
from piccolo_jax.models.bert import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("quick_compiling")
RNG = np.random.default_rng(0)
IDS = [RNG.integers(5, 2600, n).astype(np.int32) for n in (3, 31, 1, 12, 30, 2)]


def exported(pooling="mean", embed_dim=30, **backbone):
    config = small.config(pooling=pooling, embed_dim=embed_dim)
    parts = build.build(config)
    model = export.exported_of(small.params(parts), parts, config)
    changed = dataclasses.replace(model.model.backbone, **backbone)
    return dataclasses.replace(model, model=model.model.clone(backbone=changed))


def session(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feeds(ids, left=False, length=0):
    length = length or max(map(len, ids))
    tokens, mask = np.full((len(ids), length), 7, np.int64), np.zeros((len(ids), length), np.int64)
    for i, text in enumerate(ids):
        place = slice(length - len(text), None) if left else slice(len(text))
        tokens[i, place], mask[i, place] = text, 1
    return {"input_ids": tokens, "attention_mask": mask}


def expected(model, dim):
    vectors = states.encode(model.model, model.params, IDS)[2][:, :dim].astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("fields", "dims"),
    [
        ({"pooling": "mean"}, (8, 20, 24, 30)),
        ({"pooling": "cls", "embed_dim": 0}, (8, 24)),
        ({"pooling": "last", "embed_dim": 24}, (20,)),
        ({"hidden_act": "gelu_new", "layer_norm_eps": 1e-2}, (30,)),
        ({"hidden_act": "relu", "pooling": "last"}, (30,)),
    ],
)
def test_the_graph_gives_the_vectors_of_jax_cut_and_normalised(tmp_path, fields, dims):
    model = exported(**fields)
    for dim in dims:
        onnx_graph.write(tmp_path, model, dim)
        run, ours = session(tmp_path / "onnx" / "model.onnx"), expected(model, dim)
        assert run.get_outputs()[0].shape == ["batch", dim]
        for inputs in (feeds(IDS), feeds(IDS, left=True), feeds(IDS, length=40)):
            np.testing.assert_allclose(run.run(None, inputs)[0], ours, atol=3e-6)
        for i, ids in enumerate(IDS):  # alone, without padding
            (vector,) = run.run(["sentence_embedding"], feeds([ids]))[0]
            np.testing.assert_allclose(vector, ours[i], atol=3e-6)
        # Texts are far from each other, so that sameness means something.
        assert (ours @ ours.T - 2 * np.eye(len(ours))).max() < 0.99


def test_roberta_s_positions_begin_behind_the_padding_s(tmp_path):
    model = exported(model_type="xlm-roberta", pad_token_id=1, max_positions=62)
    onnx_graph.write(tmp_path, model, 30)
    run = session(tmp_path / "onnx" / "model.onnx")
    np.testing.assert_allclose(run.run(None, feeds(IDS))[0], expected(model, 30), atol=3e-6)
    assert [i.name for i in run.get_overridable_initializers()] == []


def test_every_activation_is_tried_here():
    assert set(ACTIVATIONS) == {"gelu", "gelu_new", "gelu_pytorch_tanh", "relu"}


def test_token_types_may_be_given_and_count(tmp_path):
    model = exported()
    onnx_graph.write(tmp_path, model, 30)
    run, inputs = session(tmp_path / "onnx" / "model.onnx"), feeds(IDS)
    zeros = {"token_type_ids": np.zeros_like(inputs["input_ids"])}
    without = run.run(None, inputs)[0]
    np.testing.assert_array_equal(run.run(None, inputs | zeros)[0], without)
    ones = {"token_type_ids": np.ones_like(inputs["input_ids"])}
    assert np.abs(run.run(None, inputs | ones)[0] - without).max() > 0.01
    assert [i.name for i in run.get_inputs()] == ["input_ids", "attention_mask"]


def test_the_file_says_what_it_is_and_passes_onnx_s_own_checks(tmp_path):
    onnx_graph.write(tmp_path, exported(pooling="cls"), 20)
    model = onnx.load(tmp_path / "onnx" / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    about = {p.key: p.value for p in model.metadata_props}
    assert about == {"pooling": "cls", "dim": "20", "normalized": "true", "max_length": "32"}


def test_weights_that_are_too_large_for_one_file_get_their_own(tmp_path, monkeypatch):
    model = exported()
    monkeypatch.setattr(onnx_graph, "_LARGEST_FILE", 10_000)
    onnx_graph.write(tmp_path, model, 30)
    assert {p.name for p in (tmp_path / "onnx").iterdir()} == {"model.onnx", "model.onnx_data"}
    run = session(tmp_path / "onnx" / "model.onnx")
    np.testing.assert_allclose(run.run(None, feeds(IDS))[0], expected(model, 30), atol=3e-6)


def test_a_prefix_that_does_not_exist_is_an_error(tmp_path, capsys):
    config = small.config(embed_dim=30)
    parts = build.build(config)
    small.save_run(tmp_path / "run", config, parts, small.params(parts))
    flags = [f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'out'}"]
    for dim in (0, -1, 31):
        assert run_command(export.main, *flags, "--onnx", f"--onnx-dim={dim}") == 2
        assert f"--onnx-dim={dim}: must be" in capsys.readouterr().err
    assert run_command(export.main, *flags, "--onnx-dim=8") == 2
    assert "give --onnx too" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_the_package_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(UserError, match=r"--onnx needs the package onnx .*requirements-dev.txt"):
        onnx_graph.require()
