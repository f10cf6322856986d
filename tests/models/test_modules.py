"""Directories that sentence-transformers itself writes: the same vectors, or refused by name."""

import json
import shutil

import numpy as np
import pytest
import small
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules

from piccolo_jax import Encoder
from piccolo_jax.errors import UserError
from piccolo_jax.models.modules import read_transformer
from piccolo_jax.models.pretrained import read_spec

pytestmark = pytest.mark.usefixtures("quick_compiling")

HIDDEN, LENGTH = 24, 20
TEXTS = [
    "今天天气很好",
    "",
    "A Short ENGLISH Sentence",
    "检索、重排、相似度、分类与聚类" * 3,
    "[CLS] 好",
]
FAMILIES = {
    "bert": (transformers.BertConfig, transformers.BertModel),
    "roberta": (transformers.RobertaConfig, transformers.RobertaModel),
    "xlm-roberta": (transformers.XLMRobertaConfig, transformers.XLMRobertaModel),
}
IDENTITY = torch.nn.Identity()


def transformer(folder, family="bert", cased=False, **options):
    """A Transformer module of random weights, large enough for texts to be far from each other."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(small.TOKENIZER)
    config_class, model_class = FAMILIES[family]
    config = config_class(
        vocab_size=2600, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=40, pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
    )  # fmt: skip
    model_class(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if cased:
        small.make_cased(folder)
    kwargs = {"model_kwargs": {"add_pooling_layer": False}}
    return modules.Transformer(str(folder), **kwargs, **options)


def dense(width, bias=True, activation=IDENTITY, **options):
    torch.manual_seed(1)
    return modules.Dense(HIDDEN, width, bias=bias, activation_function=activation, **options)


def save(path, *parts, **options):
    """A directory in the layout of 6.x, and the model that sentence-transformers reads from it."""
    SentenceTransformer(modules=list(parts), device="cpu", **options).save_pretrained(str(path))
    return path


def as_of_2024(path, target, max_seq_length=LENGTH, do_lower_case=False, prefix=""):
    """The same directory in the layout of 2024; `prefix`: the folder of its Transformer."""
    shutil.copytree(path, target)
    flags = {
        "cls": "pooling_mode_cls_token",
        "mean": "pooling_mode_mean_tokens",
        "max": "pooling_mode_max_tokens",
        "lasttoken": "pooling_mode_lasttoken",
    }
    pooling = target / "1_Pooling" / "config.json"
    mode = json.loads(pooling.read_text())["pooling_mode"]
    values = {flag: name == mode for name, flag in flags.items()}
    pooling.write_text(json.dumps({"word_embedding_dimension": HIDDEN, **values}))
    for name in ("module_input_name", "module_output_name"):
        for file in target.glob("2_Dense/config.json"):
            about = json.loads(file.read_text())
            about.pop(name, None)
            file.write_text(json.dumps(about))
    listed = json.loads((target / "modules.json").read_text())
    for module in listed:
        kind = module["type"].rsplit(".", 1)[-1]
        module["type"] = f"sentence_transformers.models.{kind}"
        if kind == "Normalize":
            shutil.rmtree(target / module["path"])
    limits = {"max_seq_length": max_seq_length, "do_lower_case": do_lower_case}
    (target / "sentence_bert_config.json").write_text(json.dumps(limits))
    if prefix:
        (target / prefix).mkdir()
        for file in [p for p in target.iterdir() if p.is_file()]:
            if file.name not in ("modules.json", "config_sentence_transformers.json"):
                file.rename(target / prefix / file.name)
        listed[0]["path"] = prefix
    (target / "modules.json").write_text(json.dumps(listed))
    return target


def assert_same_vectors(path, texts=TEXTS, **prompt):
    theirs = SentenceTransformer(
        str(path), device="cpu", model_kwargs={"add_pooling_layer": False}, local_files_only=True
    )
    ours = Encoder.load(path)
    for dim in (None, 7):
        for normalize in (True, False):
            expected = theirs.encode(
                texts, truncate_dim=dim, normalize_embeddings=normalize, **prompt
            )
            found = ours.encode(texts, dim=dim, normalize=normalize, **prompt)
            np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected[0] - expected[3]).max() > 1e-2


def normalize():
    return modules.Normalize()


def test_a_dense_layer_that_names_no_bias_has_one(tmp_path):
    backbone = transformer(tmp_path / "hf", "bert", max_seq_length=LENGTH)
    path = save(tmp_path / "named", backbone, modules.Pooling(HIDDEN, "mean"), dense(30))
    config = path / "2_Dense" / "config.json"
    about = json.loads(config.read_text())
    assert about.pop("bias") is True
    config.write_text(json.dumps(about))
    assert_same_vectors(path)


@pytest.mark.parametrize(
    ("family", "pooling", "rest"),
    [
        ("bert", "mean", []),
        ("roberta", "lasttoken", [dense(30, bias=False)]),
        ("xlm-roberta", "cls", [dense(10), normalize()]),
        ("bert", "cls", [normalize()]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_vectors_are_those_of_sentence_transformers(family, pooling, rest, tmp_path):
    backbone = transformer(tmp_path / "hf", family, max_seq_length=LENGTH)
    path = save(tmp_path / "new", backbone, modules.Pooling(HIDDEN, pooling), *rest)
    assert_same_vectors(path)
    old = as_of_2024(path, tmp_path / "old")
    assert_same_vectors(old)
    assert Encoder.load(path).max_length == Encoder.load(old).max_length == LENGTH
    assert (
        read_spec(path).normalize
        == read_spec(old).normalize
        == (len(rest) > 0 and pooling == "cls")
    )


def test_a_plain_transformers_directory_is_pooled_by_the_mean(tmp_path):
    transformer(tmp_path / "hf")
    assert_same_vectors(tmp_path / "hf")


def test_prompts_and_their_default_are_those_of_sentence_transformers(tmp_path):
    prompts = {"query": "查询：", "passage": "A "}
    path = save(
        tmp_path / "m", transformer(tmp_path / "hf"), modules.Pooling(HIDDEN, "mean"),
        prompts=prompts, default_prompt_name="passage",
    )  # fmt: skip
    assert_same_vectors(path)
    for prompt in ({"prompt": "天 "}, {"prompt": ""}, {"prompt_name": "query"}):
        assert_same_vectors(path, **prompt)
    assert_same_vectors(path, prompt_name="document")  # which sentence-transformers adds


def test_lower_case_and_limit_are_those_of_sentence_transformers(tmp_path):
    backbone = transformer(tmp_path / "hf", cased=True, max_seq_length=9)
    path = save(tmp_path / "new", backbone, modules.Pooling(HIDDEN, "mean"))
    texts = ["A Short ENGLISH", "a short english"]
    for lower in (False, True):
        old = as_of_2024(path, tmp_path / f"old{lower}", max_seq_length=9, do_lower_case=lower)
        assert_same_vectors(old)
        ours = Encoder.load(old)
        rows = ours.encode(texts)
        assert (np.abs(rows[0] - rows[1]).max() < 1e-6) == lower
        assert ours.max_length == 9


def test_the_transformer_can_be_in_a_folder_of_its_own(tmp_path):
    path = save(
        tmp_path / "new", transformer(tmp_path / "hf"), modules.Pooling(HIDDEN, "mean"), dense(9)
    )
    old = as_of_2024(path, tmp_path / "old", prefix="0_Transformer")
    assert not (old / "config.json").exists()
    assert_same_vectors(old)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return transformer(tmp_path_factory.mktemp("backbone") / "hf")


def mean(**options):
    return modules.Pooling(HIDDEN, "mean", **options)


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ([modules.Pooling(HIDDEN, "max")], "1_Pooling/config.json: pooling mode max: must be one"),
        ([modules.Pooling(HIDDEN, "weightedmean")], "pooling mode weightedmean"),
        ([modules.Pooling(HIDDEN, ("cls", "mean"))], r"pooling mode cls \+ mean"),
        ([mean(include_prompt=False)], "1_Pooling/config.json: include_prompt = False"),
        ([mean(), dense(9, activation=torch.nn.Tanh())], "2_Dense/config.json: activation_fu"),
        ([mean(), dense(HIDDEN, use_residual=True)], "use_residual = True"),
        ([mean(), dense(9, module_input_name="token_embeddings")],
         "module_input_name = 'token_embeddings': must be 'sentence_embedding'"),
        ([mean(), modules.Normalize("token_embeddings")],
         "2_Normalize/config.json: module_input_name = 'token_embeddings'"),
        ([mean(), modules.LayerNorm(HIDDEN)],
         r"modules\.json: module sentence_transformers\S+LayerNorm: not supported"),
        ([mean(), modules.Dropout(0.1)], r"\.Dropout: not supported, only Transformer, Pooling"),
        ([modules.WeightedLayerPooling(HIDDEN, 2), mean()], "WeightedLayerPooling: not supported"),
        ([mean(), dense(HIDDEN), dense(9)], "two modules of type Dense"),
        ([mean(), normalize(), dense(9)], "order Transformer, Pooling, Normalize, Dense: must be"),
    ],
)  # fmt: skip
def test_what_would_give_other_vectors_is_refused_by_name(backbone, rest, message, tmp_path):
    path = save(tmp_path / "m", backbone, *rest)
    with pytest.raises(UserError, match=message) as error:
        Encoder.load(path)
    assert "encode with sentence-transformers" in str(error.value)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "transformer_task ="),
        ("sentence_bert_config.json", {"processing_kwargs": {"text": {"max_length": 9}}},
         "processing_kwargs = "),
        ("sentence_bert_config.json", {"max_seq_length": 2}, "max_seq_length = 2: must be 3 or"),
        ("sentence_bert_config.json", {"max_seq_length": "9"}, "max_seq_length = '9'"),
        ("sentence_bert_config.json", {"do_lower_case": "yes"}, "do_lower_case = 'yes'"),
        ("tokenizer_config.json", {"model_max_length": True}, "model_max_length = True"),
        ("tokenizer_config.json", {"model_max_length": float("nan")}, "model_max_length = nan"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"},
         "model_type = 'SparseEncoder'"),
        ("config_sentence_transformers.json", {"prompts": {"query": 3}}, "prompts = {'query': 3}"),
        ("config_sentence_transformers.json", {"default_prompt_name": "web"},
         "default_prompt_name = 'web': must be null or one of prompts"),
        ("config_sentence_transformers.json", {"truncate_dim": 0}, "truncate_dim = 0: must be"),
        ("tokenizer_config.json", {"truncation_side": "left"}, "truncation_side = 'left': must be"),
        ("1_Pooling/config.json", {"pooling_mode": [["cls"]]}, "pooling mode ['cls']: must be one"),
        ("1_Pooling/config.json", {"pooling_mode": 3}, "pooling mode 3: must be one of"),
        ("1_Pooling/config.json", {"embedding_dimension": 25}, "embedding_dimension = 25"),
        ("modules.json", [{"type": "custom_st.Transformer", "path": ""}],
         "module custom_st.Transformer: not supported"),
        ("modules.json", [{"type": "sentence_transformers.models.Transformer", "path": ""}],
         "no module Pooling"),
    ],
)  # fmt: skip
def test_what_a_directory_says_wrongly_is_named(backbone, file, values, message, tmp_path):
    path = save(tmp_path / "m", backbone, mean())
    if isinstance(values, dict):
        values = json.loads((path / file).read_text()) | values
    (path / file).write_text(json.dumps(values))
    with pytest.raises(UserError) as error:
        Encoder.load(path)
    assert str(error.value).startswith(f"{path / file}: ")
    assert message in str(error.value)


def test_a_dense_layer_that_names_no_activation_has_tanh_and_is_refused(backbone, tmp_path):
    path = save(tmp_path / "m", backbone, mean(), dense(9))
    file = path / "2_Dense" / "config.json"
    values = json.loads(file.read_text())
    del values["activation_function"]
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"activation_function = '\S+Tanh' \(Tanh if absent\)"):
        Encoder.load(path)


def test_pooling_that_names_no_mode_is_the_mean(backbone, tmp_path):
    path = save(tmp_path / "m", backbone, mean())
    sizes = {"word_embedding_dimension": HIDDEN}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(sizes))
    assert_same_vectors(path)


def test_the_prefix_that_a_directory_cuts_to_is_the_default(backbone, tmp_path):
    path = save(tmp_path / "m", backbone, mean(), truncate_dim=7)
    assert json.loads((path / "config_sentence_transformers.json").read_text())["truncate_dim"] == 7
    assert Encoder.load(path).encode(TEXTS).shape == (len(TEXTS), 7)
    assert Encoder.load(path).encode(TEXTS, dim=HIDDEN).shape == (len(TEXTS), HIDDEN)
    assert_same_vectors(path)


def test_a_limit_of_thousands_of_tokens_is_read(backbone, tmp_path):
    path = save(tmp_path / "m", backbone, mean())
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 8192}))
    assert read_transformer(path) == (8192, False)


def test_a_tokenizer_without_a_limit_leaves_that_of_the_positions(backbone, tmp_path):
    path = save(tmp_path / "m", backbone, mean())
    for limit in (1e30, float("inf"), None):
        file = path / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": limit}))
        assert Encoder.load(path).max_length == 40
