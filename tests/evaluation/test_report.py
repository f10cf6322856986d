"""What report.json holds, for any reader of JSON."""

import json
import math

from piccolo_jax.evaluation import report


def test_a_score_that_is_no_number_is_null_in_the_file_and_nan_when_read(tmp_path):
    scores = {"main_score": math.nan, "cosine_spearman": math.nan, "pearson": 0.5}
    task = {"type": "STS", "metric": "spearman", "subsets": ["default"], "scores": {8: scores}}
    entry = {"model": "constant", "revision": "1", "experiment": {}, "dims": [8],
             "max_length": 512, "tasks": {"constant": task}}  # fmt: skip
    report.write(tmp_path, entry)

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

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
