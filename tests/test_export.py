import json
import os
import resource
import shutil
import signal

import numpy as np
import pytest
import small
from safetensors import safe_open
from small import DIMS, TOKENIZER, config, one_device, run_command, snapshot

from piccolo_jax import build, export
from piccolo_jax.config import DatasetConfig
from piccolo_jax.errors import UserError
from piccolo_jax.evaluation.encoder import Encoder, cut
from piccolo_jax.exporting import layout

TEXTS = [
    "今天天气很好",
    "",
    " ",
    "A short English sentence, and 中文.",
    "量子计算机利用叠加与纠缠并行地处理信息。" * 20,
    "好",
    "价格：￥1,299.00\t😀",
]


def but_card(directory):
    """Every file but the model card, which begins with the folder's name."""
    return {name: text for name, text in snapshot(directory).items() if name != "README.md"}


def embeddings(parts, params, texts, max_length):
    return Encoder(parts.model, parts.tokenizer, one_device(), max_length).encode(params, texts)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(**fields of the model): config, parts, params and the directory of an export."""
    known = {}

    def make(**fields):
        key = tuple(fields.items())
        if key not in known:
            c = config(**fields)
            parts = build.build(c)
            params = small.params(parts)
            output = tmp_path_factory.mktemp("run") / "export"
            export.write(output, params, parts, c)
            known[key] = c, parts, params, output
        return known[key]

    return make


def test_the_layout_is_that_of_2024(made):
    output = made()[3]
    files = snapshot(output)
    assert sorted(files) == [
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "README.md",
        "config.json",
        "config_sentence_transformers.json",
        "model.safetensors",
        "modules.json",
        "piccolo_jax.safetensors",
        "sentence_bert_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    ]
    read = {name: json.loads(files[name]) for name in files if name.endswith(".json")}
    assert read["modules.json"] == [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_Pooling",
            "type": "sentence_transformers.models.Pooling",
        },
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    ]
    assert read["1_Pooling/config.json"] == {
        "word_embedding_dimension": 24,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": False,
        "pooling_mode_lasttoken": False,
        "include_prompt": True,
    }
    assert read["2_Dense/config.json"] == {
        "in_features": 24,
        "out_features": 24,
        "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    assert read["sentence_bert_config.json"] == {"max_seq_length": 32, "do_lower_case": False}
    about = read["config_sentence_transformers.json"]
    assert about["prompts"] == {"query": "查询："}
    assert about["default_prompt_name"] is None
    assert about["similarity_fn_name"] == "cosine"
    assert about["matryoshka_dims"] == list(DIMS)
    assert "sentence_transformers" not in about["__version__"]
    assert read["config.json"]["architectures"] == ["BertModel"]
    assert read["config.json"]["model_type"] == "bert"
    assert read["config.json"]["torch_dtype"] == "float32"
    assert "dtype" not in read["config.json"]
    assert set(read["special_tokens_map.json"].values()) == {
        "[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]",
    }  # fmt: skip


def test_weights_have_hugging_face_names_and_torch_layout(made):
    _, _, params, output = made()
    with safe_open(output / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
        kernel = file.get_tensor("encoder.layer.1.intermediate.dense.weight")
    assert len(names) == 5 + 2 * 16
    assert all(name.startswith(("embeddings.", "encoder.layer.")) for name in names)
    ours = params["backbone"]["layers"]["intermediate"]["kernel"]
    np.testing.assert_array_equal(kernel, np.asarray(ours[1]).T)
    with safe_open(output / "2_Dense" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        np.testing.assert_array_equal(
            file.get_tensor("linear.weight"), np.asarray(params["scaling"]["kernel"]).T
        )
        np.testing.assert_array_equal(
            file.get_tensor("linear.bias"), np.asarray(params["scaling"]["bias"])
        )


def test_the_tokenizer_is_written_as_it_was_read(made):
    _, parts, _, output = made()
    parts.tokenizer.encode(["一"], 16)  # leaves a truncation behind
    again = output.with_name("again")
    export.write(again, *(made()[i] for i in (2, 1, 0)))
    read = json.loads((again / "tokenizer.json").read_text("utf-8"))
    assert (read["truncation"], read["padding"]) == (None, None)
    before = json.loads((TOKENIZER / "tokenizer.json").read_text("utf-8"))
    assert read["model"] == before["model"]
    vocabulary = (again / "vocab.txt").read_text("utf-8").split("\n")[:-1]
    assert vocabulary == (TOKENIZER / "vocab.txt").read_text("utf-8").split("\n")[:-1]
    about = json.loads((again / "tokenizer_config.json").read_text("utf-8"))
    assert about["tokenizer_class"] == "BertTokenizer"  # which every version knows
    assert (about["model_max_length"], about["padding_side"]) == (32, "right")
    assert str(TOKENIZER) not in json.dumps(about)
    assert but_card(again) == but_card(output)


def test_without_a_scaling_layer_there_is_no_dense_module(made):
    output = made(embed_dim=0)[3]
    modules = json.loads((output / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Pooling"]
    assert not (output / "2_Dense").exists()


def assert_same_vectors(config, parts, params, output):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(output), device="cpu")
    ours = embeddings(parts, params, TEXTS, config.data.max_length)
    theirs = model.encode(TEXTS, convert_to_numpy=True)
    assert ours.shape == theirs.shape == (len(TEXTS), config.model.embed_dim or 24)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    for dim in (*DIMS[:-1], ours.shape[1]):
        x, y = cut(ours.astype(np.float64), dim), cut(theirs.astype(np.float64), dim)
        assert (1 - (x * y).sum(1)).max() < 1e-6
        # Texts are far from each other (but "" and " " are one), so that sameness means something.
        others = np.delete(x, 2, 0)
        assert (others @ others.T - 2 * np.eye(len(others))).max() < 0.99
    return model


@pytest.mark.parametrize(("pooling", "embed_dim"), [("mean", 0), ("cls", 30), ("last", 24)])
def test_sentence_transformers_gives_the_same_vectors(made, pooling, embed_dim):
    model = assert_same_vectors(*made(pooling=pooling, embed_dim=embed_dim))
    assert model.max_seq_length == 32
    assert model.prompts["query"] == "查询："


def test_an_xlmr_tokenizer_survives_the_export(shared, made):
    path = str(shared / "models" / "e5-small-zh")
    c, parts, params, output = made(tokenizer=path, vocab_size=43238)
    assert parts.model.backbone.pad_token_id == 1
    assert not (output / "vocab.txt").exists()
    tokens = json.loads((output / "special_tokens_map.json").read_text("utf-8"))
    assert tokens["pad_token"] == "<pad>"
    assert_same_vectors(c, parts, params, output)


def test_prompts_that_datasets_don_t_share_are_not_named(made, tmp_path):
    c, parts, params, _ = made()
    c = config()
    c.data.datasets += (DatasetConfig(path="b.jsonl", passage_prompt="文："),)
    export.write(tmp_path / "out", params, parts, c)
    about = json.loads((tmp_path / "out" / "config_sentence_transformers.json").read_text("utf-8"))
    assert about["prompts"] == {}


@pytest.mark.parametrize("name", ["directory", "file"])
def test_what_is_there_stays_untouched_without_overwrite(made, tmp_path, name):
    c, parts, params, _ = made()
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=f"{name} exists and is not empty; --overwrite"):
        export.write(tmp_path / name, params, parts, c)
    assert snapshot(tmp_path) == before
    export.write(tmp_path / name, params, parts, c, overwrite=True)
    assert (tmp_path / name / "modules.json").exists()
    assert not (tmp_path / name / "mine.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["directory", "file"]


def test_an_empty_directory_and_missing_parents_are_fine(made, tmp_path):
    c, parts, params, _ = made()
    (tmp_path / "empty").mkdir()
    export.write(tmp_path / "empty", params, parts, c)
    export.write(tmp_path / "a" / "b", params, parts, c)
    assert but_card(tmp_path / "empty") == but_card(tmp_path / "a" / "b")


@pytest.mark.parametrize("broken", ["safetensors", "rename"])
def test_a_crash_midway_leaves_what_was_there(made, tmp_path, monkeypatch, broken):
    c, parts, params, _ = made()
    output = tmp_path / "out"
    output.mkdir()
    (output / "old.txt").write_text("old")
    before = snapshot(tmp_path)
    real = os.rename

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    def rename_all_but_the_new(source, target):
        if os.path.isfile(os.path.join(source, "modules.json")):
            fail()
        real(source, target)

    if broken == "safetensors":
        monkeypatch.setattr(layout, "save_file", fail)
    else:
        monkeypatch.setattr(export.os, "rename", rename_all_but_the_new)
    with pytest.raises(
        UserError, match=r"out: can't be written \(No space left on device\); make room"
    ):
        export.write(output, params, parts, c, overwrite=True)
    assert snapshot(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_limit_on_file_sizes_is_an_error_that_leaves_nothing(made, tmp_path, file):
    c, parts, params, written = made()
    limit = (written / file).stat().st_size - 1
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(UserError, match=r"out: can't be written \(.*too large.*make room"):
            export.write(tmp_path / "out", params, parts, c)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list(tmp_path.iterdir())


def test_a_crash_of_another_kind_leaves_nothing_either(made, tmp_path, monkeypatch):
    c, parts, params, _ = made()
    monkeypatch.setattr(layout, "save_file", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export.write(tmp_path / "out", params, parts, c)
    assert not list(tmp_path.iterdir())


def test_a_place_that_can_t_be_written_is_an_error(made, tmp_path):
    c, parts, params, _ = made()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"file/out: can't be written \(Not a directory\)"):
        export.write(tmp_path / "file" / "out", params, parts, c)


@pytest.fixture(scope="module")
def workdir(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("workdir")
    small.save_run(path, *made()[:3])
    return path


def test_the_command_exports_the_latest_checkpoint(made, workdir, tmp_path, capsys):
    output = tmp_path / "out"
    flags = (f"--workdir={workdir}", f"--output={output}")
    assert run_command(export.main, *flags) == 0
    assert but_card(output) == but_card(made()[3])
    assert "step 2 of" in capsys.readouterr().out
    assert run_command(export.main, *flags) == 2
    assert "--overwrite" in capsys.readouterr().err
    (output / "modules.json").unlink()
    assert run_command(export.main, *flags, "--overwrite") == 0
    assert but_card(output) == but_card(made()[3])


@pytest.mark.parametrize("below", ["", "checkpoints", "checkpoints/2", "checkpoints/new", ".."])
def test_an_export_never_takes_the_place_of_its_run(workdir, tmp_path, capsys, below):
    shutil.copytree(workdir, tmp_path / "runs" / "run")
    run = tmp_path / "runs" / "run"
    before = snapshot(run)
    flags = (f"--workdir={run}", f"--output={run / below}", "--overwrite")
    assert run_command(export.main, *flags) == 2
    assert "holds the run of --workdir" in capsys.readouterr().err
    assert snapshot(run) == before


def test_the_command_says_where_there_is_no_checkpoint(workdir, tmp_path, capsys):
    assert run_command(export.main, f"--workdir={tmp_path}", f"--output={tmp_path}/out") == 2
    assert "checkpoints: holds no complete checkpoint" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2" / "state")
    assert run_command(export.main, f"--workdir={tmp_path}/run", "--output=out") == 2
    assert "checkpoints/2: this checkpoint can't be read" in capsys.readouterr().err
