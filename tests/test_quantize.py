import numpy as np
import pytest
from safetensors.numpy import save_file

from piccolo_jax import quantize
from piccolo_jax.errors import UserError
from piccolo_jax.quantize import Quantizer, recall


def embeddings(n=300, dim=20, seed=0):
    """Of length 1, with a mean that isn't 0, as those of trained models."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, dim)) + np.linspace(-2, 2, dim)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def test_int8_codes_are_those_of_sentence_transformers():
    from sentence_transformers.util.quantization import quantize_embeddings

    known, new = embeddings(), embeddings(seed=1)
    known[:, 4] = -0.02  # which never changes, until it does
    quantizer = Quantizer.fit(known, "int8")
    theirs = quantize_embeddings(new, "int8", calibration_embeddings=known)
    codes = quantizer.quantize(new)
    assert (codes.dtype, codes.shape) == (np.int8, new.shape)
    np.testing.assert_array_equal(codes, theirs)
    np.testing.assert_array_equal(quantize_embeddings(new, "int8", ranges=quantizer.ranges), theirs)
    assert {-128, 127} <= set(codes.ravel().tolist())  # new ones lie beyond the ranges, too


def test_bits_that_are_not_centred_are_those_of_sentence_transformers():
    from sentence_transformers.util.quantization import quantize_embeddings

    known, new = embeddings(), embeddings(seed=1)
    codes = Quantizer.fit(known, "binary", centre=False).quantize(new)
    assert (codes.dtype, codes.shape) == (np.uint8, (300, 3))  # 20 bits in 3 bytes
    np.testing.assert_array_equal(codes, quantize_embeddings(new, "ubinary"))
    centred = Quantizer.fit(known, "binary").quantize(new)
    mean = known.mean(0, dtype=np.float64).astype(np.float32)
    np.testing.assert_array_equal(centred, np.packbits(new > mean, axis=1))
    assert (centred != codes).any()


def test_scores_of_bytes_are_nearly_the_products():
    documents, queries = embeddings(), embeddings(40, seed=1)
    quantizer = Quantizer.fit(documents, "int8")
    scores = quantizer.scores(queries, quantizer.quantize(documents))
    step = (quantizer.ranges[1] - quantizer.ranges[0]) / 255
    error = scores - queries @ documents.T
    assert (scores.dtype, scores.shape) == (np.float32, (40, 300))
    assert (np.abs(error) <= (np.abs(queries) @ step / 2)[:, None] + 1e-6).all()
    assert np.abs(error.mean()) < 1e-4  # the middle of a step, not its lower end


def test_scores_of_bits_are_products_of_what_is_above_the_mean():
    documents, queries = embeddings(), embeddings(40, seed=1)
    quantizer = Quantizer.fit(documents, "binary")
    signs = np.where(documents > quantizer.thresholds, 1, -1)
    expected = (queries - quantizer.thresholds) @ signs.T
    scores = quantizer.scores(queries, quantizer.quantize(documents))
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_a_dimension_that_never_changes_counts_as_it_is():
    x = embeddings()
    x[:, 4] = 0.25
    quantizer = Quantizer.fit(x, "int8")
    only = np.eye(20, dtype=np.float32)[4:5]
    np.testing.assert_allclose(quantizer.scores(only, quantizer.quantize(x)), 0.25, atol=1e-6)
    assert (Quantizer.fit(x, "binary").quantize(x)[:, 0] & 0b1000 == 0).all()


def test_ranges_and_thresholds_are_those_of_the_calibration():
    x = np.array([[-1, 5], [0, 5], [1, 5], [4, 5]], np.float32)
    np.testing.assert_array_equal(Quantizer.fit(x, "int8").ranges, [[-1, 5], [4, 5]])
    np.testing.assert_array_equal(Quantizer.fit(x, "binary").thresholds, [1, 5])
    np.testing.assert_array_equal(Quantizer.fit(x, "binary", centre=False).thresholds, [0, 0])


@pytest.mark.parametrize("precision", quantize.PRECISIONS)
def test_a_calibration_survives_its_file(precision, tmp_path):
    x = embeddings()
    made = Quantizer.fit(x, precision)
    made.save(tmp_path / "c.safetensors")
    read = Quantizer.load(tmp_path / "c.safetensors")
    assert (read.precision, read.dim) == (precision, 20)
    np.testing.assert_array_equal(read.quantize(x), made.quantize(x))
    np.testing.assert_array_equal(
        read.scores(x, made.quantize(x)), made.scores(x, made.quantize(x))
    )
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_no_text_has_no_codes():
    for precision, width in (("int8", 20), ("binary", 3)):
        quantizer = Quantizer.fit(embeddings(), precision)
        codes = quantizer.quantize(np.zeros((0, 20), np.float32))
        assert codes.shape == (0, width)
        assert quantizer.scores(embeddings(3), codes).shape == (3, 0)


def test_recall_is_the_share_of_the_nearest_that_are_found():
    documents, queries = embeddings(400, 64), embeddings(50, 64, seed=1)
    found = {}
    for precision in quantize.PRECISIONS:
        quantizer = Quantizer.fit(documents, precision)
        exact = np.argsort(-queries @ documents.T, axis=1)[:, :10]
        scores = quantizer.scores(queries, quantizer.quantize(documents))
        ours = np.argsort(-scores, axis=1)[:, :10]
        share = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, ours, strict=True)])
        found[precision] = recall(queries, documents, quantizer)
        assert abs(found[precision] - share) < 0.005
    assert found["binary"] < 0.9 < found["int8"] < 1


def test_recall_is_whole_where_there_is_nothing_to_leave_out(monkeypatch):
    x = embeddings(8)
    assert recall(x, x, Quantizer.fit(x, "binary")) == 1
    monkeypatch.setattr(quantize, "_QUERIES_AT_ONCE", 3)
    assert recall(x, x, Quantizer.fit(x, "binary"), k=8) == 1
    assert recall(x[:0], x, Quantizer.fit(x, "binary")) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: Quantizer.fit(x, "int4"), "precision = 'int4': must be one of int8, binary"),
        (lambda x: Quantizer.fit(x[:1], "int8"), "calibrating on 1 embeddings: needs at least 2"),
        (lambda x: Quantizer.fit(x[0], "int8"), r"float32 \[20\]: must be floats"),
        (lambda x: Quantizer.fit(x.astype(int), "int8"), r"int64 \[300, 20\]: must be floats"),
        (lambda x: Quantizer.fit(x * np.inf, "binary"), "hold NaN or infinity"),
        (lambda x: Quantizer.fit(x, "int8").quantize(x[:, :8]), "of 8 dimensions: the calibration"),
        (lambda x: Quantizer.fit(x, "binary").quantize(x * np.nan), "hold NaN"),
        (lambda x: Quantizer.fit(x, "int8").scores(x[:, :8], x), "of 8 dimensions"),
        (lambda x: Quantizer.fit(x, "int8").scores(x, x), r"float32 \[300, 20\]: must be int8 \["),
        (lambda x: Quantizer.fit(x, "binary").scores(x, np.zeros((9, 2), np.uint8)),
         r"uint8 \[9, 2\]: must be uint8 \[n, 3\]"),
    ],
)  # fmt: skip
def test_what_cannot_be_quantised_is_an_error(call, message):
    with np.errstate(invalid="ignore"), pytest.raises(UserError, match=message):
        call(embeddings())


def test_files_that_hold_no_calibration_are_errors(tmp_path):
    path = tmp_path / "c.safetensors"
    with pytest.raises(UserError, match=r"c\.safetensors: not a readable calibration"):
        Quantizer.load(path)
    path.write_text("{}")
    with pytest.raises(UserError, match="not a readable calibration"):
        Quantizer.load(path)
    ranges = {"ranges": np.zeros((2, 4), np.float32)}
    for tensors, about in (
        ({}, {"schema": "1"}),
        (ranges, {"schema": "2"}),
        (ranges, None),
        (ranges | {"thresholds": np.zeros(4, np.float32)}, {"schema": "1"}),
        ({"ranges": np.zeros((3, 4), np.float32)}, {"schema": "1"}),
        ({"thresholds": np.zeros((1, 4), np.float32)}, {"schema": "1"}),
        ({"means": np.zeros(4, np.float32)}, {"schema": "1"}),
        ({"thresholds": np.zeros((), np.float32)}, {"schema": "1"}),
    ):
        save_file(tensors, path, about)
        with pytest.raises(UserError, match="holds no calibration"):
            Quantizer.load(path)


def test_a_disk_without_room_leaves_what_was_there(tmp_path, monkeypatch):
    def save(tensors, path, about):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    quantizer = Quantizer.fit(embeddings(), "int8")
    quantizer.save(tmp_path / "c.safetensors")
    monkeypatch.setattr(quantize, "save_file", save)
    with pytest.raises(UserError, match=r"c\.safetensors: can't be written .*No space"):
        quantizer.save(tmp_path / "c.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]
    assert Quantizer.load(tmp_path / "c.safetensors").precision == "int8"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    quantizer = Quantizer.fit(embeddings(), "int8")
    with pytest.raises(UserError, match=r"no/c\.safetensors: can't be written"):
        quantizer.save(tmp_path / "no" / "c.safetensors")
