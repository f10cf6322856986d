import numpy as np
import pytest

from piccolo_jax.verifying.findings import compare, largest_difference, largest_distance, padded


def test_the_largest_distance_is_relative_and_that_of_the_worst_row():
    ours = np.array([[3.0, 4.0], [300.0, 400.0]], np.float32)
    theirs = ours + np.array([[0.0, 0.05], [0.0, 1.0]], np.float32)
    assert largest_distance(ours, theirs) == pytest.approx(0.01, rel=1e-4)
    assert not compare("pooling", "x", ours, theirs).same
    assert compare("pooling", "x", ours, ours * np.float32(1 + 5e-5)).same


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_infinitely_different(bad):
    ours = np.ones((2, 3), np.float32)
    theirs = ours.copy()
    theirs[1, 2] = bad
    assert largest_distance(ours, theirs) == np.inf
    assert largest_difference(ours, theirs, 3) == np.inf
    assert largest_difference(ours, theirs, 2) == pytest.approx(0, abs=1e-12)
    assert not compare("pooling", "x", ours, theirs).same


def test_other_widths_are_different_and_said():
    finding = compare("scaling layer", "vectors", np.ones((2, 3)), np.ones((2, 4)))
    assert not finding.same
    assert finding.what == "vectors: 4 wide, not 3"


def test_prefixes_are_cut_before_they_are_normalised():
    ours, theirs = np.array([[1.0, 0.0, 7.0]]), np.array([[1.0, 1.0, 7.0]])
    assert largest_difference(ours, theirs, 1) == pytest.approx(0)
    assert largest_difference(ours, theirs, 2) == pytest.approx(1 - np.sqrt(0.5))


def test_rows_are_padded_behind_and_masked():
    values, mask = padded([np.array([1, 2]), np.array([3])])
    assert values.tolist() == [[1, 2], [3, 0]]
    assert mask.tolist() == [[1, 1], [1, 0]]
