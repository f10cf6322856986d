import shutil

import numpy as np
import pytest
from preparing import TOKENIZER

from piccolo_jax.data.tokenizer import Tokenizer
from piccolo_jax.errors import UserError


def test_encoding_says_what_was_cut_and_leaves_the_tokenizer_as_it_was(tokenizer):
    before = tokenizer.hf.backend_tokenizer.to_str()
    ids, cut = tokenizer.encode(["天气", "天" * 30, "天" * 6], 8)
    assert [len(i) for i in ids] == [4, 8, 8]
    assert cut == [False, True, False]
    assert all(i.dtype == np.int32 for i in ids)
    assert tokenizer.hf.backend_tokenizer.to_str() == before


def test_encoding_equals_that_of_transformers(tokenizer):
    texts = ["北京的天气，今天 23 度!", "Hello World", "㐀", "[SEP] 天"]
    expected = tokenizer.hf(texts, truncation=True, max_length=7)["input_ids"]
    assert [i.tolist() for i in tokenizer.encode(texts, 7)[0]] == expected


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"version": "1.0", "added_tokens": [], "model": {}}']
)
def test_a_broken_tokenizer_is_an_error(tmp_path, content):
    folder = shutil.copytree(TOKENIZER, tmp_path / "tokenizer")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="no tokenizer can be loaded from here"):
        Tokenizer(folder)


def test_a_missing_tokenizer_is_an_error(tmp_path):
    for path in (tmp_path, tmp_path / "none", ""):
        with pytest.raises(UserError, match=r"loaded from here \(.*[^:]\); .*model\.tokenizer$"):
            Tokenizer(path)


def test_a_model_folder_without_its_tokenizer_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"holds no tokenizer .*name a directory .*tokenizer"):
        Tokenizer(tmp_path)
