"""What report.json holds, for any reader of JSON."""

import json
import math

import pytest
from small import run_command

from piccolo_jax import evaluate
from piccolo_jax.errors import UserError
from piccolo_jax.evaluation import report


def entry_of(scores):
    task = {"type": "STS", "metric": "spearman", "revision": "1", "splits": ["test"],
            "subsets": ["default"], "scores": {8: scores}}  # fmt: skip
    return {"model": "constant", "revision": "1", "experiment": {}, "dims": [8], "max_length": 512,
            "folders": {"8": "m/1"}, "tasks": {"constant": task}}  # fmt: skip


def refuse(word):
    raise AssertionError(f"{word} is not JSON")


def test_a_score_that_is_no_number_is_null_in_the_file_and_nan_when_read(tmp_path):
    scores = {"main_score": math.nan, "cosine_spearman": math.nan, "pearson": 0.5}
    report.write(tmp_path, entry_of(scores))

    text = (tmp_path / report.FILE).read_text("utf-8")
    [written] = json.loads(text, parse_constant=refuse)["models"]
    assert written["tasks"]["constant"]["scores"]["8"] == scores | {
        "main_score": None, "cosine_spearman": None
    }  # fmt: skip
    assert written["summary"]["means"][""]["8"] is None
    [found] = report.read(tmp_path / report.FILE)
    read = found["tasks"]["constant"]["scores"][8]
    assert math.isnan(read["main_score"])
    assert read["pearson"] == 0.5
    assert "nan" in report.text(found)


def test_a_comparison_has_null_for_it_too(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        report.write(tmp_path / name, entry_of({"main_score": math.nan}) | {"model": name})
    folders = (tmp_path / "one", tmp_path / "other")
    assert run_command(evaluate.main, "--compare", *folders, f"--output={tmp_path}") == 0
    text = (tmp_path / "comparison.json").read_text("utf-8")
    [part] = json.loads(text, parse_constant=refuse)["comparisons"]
    assert {tuple(row["scores"]) for row in part["rows"]} == {(None, None)}


@pytest.mark.parametrize("field", ["folders", "dims", "type", "revision", "scores"])
def test_a_report_without_a_field_is_an_error_that_names_it(tmp_path, field):
    entry = entry_of({"main_score": 0.5})
    report.write(tmp_path, entry)
    assert report.read(tmp_path / report.FILE)[0]["tasks"] == entry["tasks"]
    content = json.loads((tmp_path / report.FILE).read_text("utf-8"))
    [written] = content["models"]
    del (written["tasks"]["constant"] if field in entry["tasks"]["constant"] else written)[field]
    (tmp_path / report.FILE).write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"not a report of this program .*'{field}'"):
        report.read(tmp_path / report.FILE)
