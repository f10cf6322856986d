import hashlib
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from piccolo_jax.data import texts
from piccolo_jax.data.store import TextColumn
from piccolo_jax.data.texts import DigestTable, TextTable
from piccolo_jax.data.tokenizer import Tokenizer

TOKENIZER = Path(__file__).resolve().parents[2] / "configs" / "quickstart_data" / "tokenizer"
PASSAGE, QUERY = TextColumn("p", prompt="passage"), TextColumn("q", prompt="query", is_query=True)


def digests(numbers):
    return [hashlib.blake2b(str(n).encode(), digest_size=16).digest() for n in numbers]


def with_equal_homes(numbers):
    """Digests that all want the same slot, and of which many differ in one half only."""
    return [(n // 2 << 40).to_bytes(8, "little") + bytes(7) + bytes([n % 2]) for n in numbers]


@pytest.mark.parametrize("make", [digests, with_equal_homes])
def test_digests_are_numbered_in_order_of_arrival_as_a_dict_would(make):
    rng = np.random.default_rng(0)
    table, known = DigestTable(), {}
    for size in (0, 1, 7, 3000, 500, 5000, 900):
        numbers = rng.integers(0, 4000 if make is digests else 300, size).tolist()
        batch = make(numbers)
        before = len(known)
        expected = [known.setdefault(d, len(known)) for d in batch]
        found, new = table.add(batch)
        assert found.tolist() == expected
        assert [expected[i] for i in new] == list(range(before, len(known)))
        assert len(table) == len(known)


def test_a_growing_table_keeps_its_numbers():
    table = DigestTable()
    everything = digests(range(20_000))  # grows from 2**12 to 2**15
    for start in range(0, len(everything), 777):
        table.add(everything[start : start + 777])
    found, new = table.add(everything[::-1])
    assert found.tolist() == list(range(len(everything)))[::-1]
    assert not len(new)


def test_a_table_takes_no_more_than_64_bytes_a_digest():
    table = DigestTable()
    tracemalloc.start()
    try:
        for start in range(0, 2**13 + 1, 2**11):
            table.add(digests(range(start, start + 2**11)))
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held / len(table) < 64


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TOKENIZER)


def test_a_text_is_tokenised_once_and_written_once_even_under_two_names(tokenizer):
    written = []
    table = TextTable(tokenizer, {"query": "", "passage": ""}, 4, 8, written.append)
    ids, cut = table.add(["天气", "天", "天气", "天 气"], PASSAGE)
    assert ids.tolist() == [0, 1, 0, 0]
    assert cut.tolist() == [False] * 4
    assert len(written) == 2
    assert table.tokenised == 3
    ids, cut = table.add(["天", "天气天气天气天气", "天气天气天气天"], PASSAGE)
    assert ids.tolist() == [1, 2, 2]  # the same once cut
    assert cut.tolist() == [False, True, True]
    ids, cut = table.add(["天天气天气天气", "天气天气天气天气"], QUERY)
    assert ids.tolist() == [3, 0]  # the same text with another limit is another
    assert cut.tolist() == [True, True]
    assert table.lengths.tolist() == [4, 3, 8, 4]
    assert [len(w) // 4 for w in written] == [4, 3, 8, 4]
    assert table.truncated == 4


def test_no_texts_have_no_ids(tokenizer):
    table = TextTable(tokenizer, {"query": "", "passage": ""}, 4, 8)
    ids, cut = table.add([], PASSAGE)
    assert (len(ids), len(cut), len(table.lengths)) == (0, 0, 0)
    assert ids.dtype == np.int32


def test_digests_are_of_16_bytes():
    assert len(texts._digest(b"x")) == 16
