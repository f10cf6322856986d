import numpy as np
import pytest
import small

from piccolo_jax import build, export
from piccolo_jax.errors import UserError
from piccolo_jax.synthesis import consistency
from piccolo_jax.synthesis.filters import Row

pytestmark = pytest.mark.usefixtures("quick_compiling")


def unit(rng, *shape):
    x = rng.normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_ranks_are_those_of_a_full_sort_whatever_the_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    queries, documents = unit(rng, 41, 8), unit(rng, 103, 8)
    positives = rng.integers(0, 103, 41).astype(np.int32)
    scores = queries.astype(np.float64) @ documents.T.astype(np.float64)
    expected = [
        1 + list(np.argsort(-row, kind="stable")).index(own)
        for row, own in zip(scores, positives, strict=True)
    ]
    assert len(set(expected)) > 20
    for at_once in ((1024, 16384), (7, 10), (41, 103)):
        monkeypatch.setattr(consistency, "_QUERIES_AT_ONCE", at_once[0])
        monkeypatch.setattr(consistency, "_DOCUMENTS_AT_ONCE", at_once[1])
        assert consistency.ranks(queries, documents, positives).tolist() == expected


def test_a_document_is_not_nearer_than_itself():
    rng = np.random.default_rng(1)
    documents = unit(rng, 200, 384)
    found = consistency.ranks(documents, documents, np.arange(200, dtype=np.int32))
    assert found.tolist() == [1] * 200


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = small.config()
    parts = build.build(config)
    output = tmp_path_factory.mktemp("run") / "export"
    export.write(output, small.params(parts), parts, config)
    return output


def test_a_query_that_is_its_positive_finds_it_and_one_that_is_another_does_not(model):
    papers = [
        "深度学习的模型",
        "水稻的高产栽培",
        "桥梁结构的设计",
        "古代诗歌的研究",
        "肝炎的临床治疗",
    ]
    rows = [Row(i, "zh", "t", text, text, "无关" + text) for i, text in enumerate(papers)]
    rows.append(Row(9, "zh", "t", papers[0], papers[1] + "问题", "无"))
    found = consistency.positive_ranks(model, rows, "", "")
    assert found.tolist()[:5] == [1] * 5
    assert found[5] > 1


def test_prompts_are_the_models_own_unless_given(model, monkeypatch):
    seen = []
    encode = consistency.encoder.Encoder.encode

    def spy(self, params, texts, prompt="", progress=""):
        seen.append((len(texts), prompt))
        return encode(self, params, texts, prompt, progress)

    monkeypatch.setattr(consistency.encoder.Encoder, "encode", spy)
    rows = [Row(0, "zh", "t", "问", "答", "否"), Row(1, "zh", "t", "问题", "答案", "答")]
    consistency.positive_ranks(model, rows, None, None)
    consistency.positive_ranks(model, rows, "q: ", "p: ")
    assert seen == [(2, "查询："), (3, ""), (2, "q: "), (3, "p: ")]


def test_a_model_that_gives_no_numbers_is_an_error(model, monkeypatch):
    broken = lambda self, params, texts, *_: np.full((len(texts), 24), np.nan, np.float32)  # noqa: E731
    monkeypatch.setattr(consistency.encoder.Encoder, "encode", broken)
    with pytest.raises(UserError, match="no numbers"):
        consistency.positive_ranks(model, [Row(0, "zh", "t", "问", "答", "否")], "", "")
