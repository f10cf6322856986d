"""The parts of launch/ablation.py that need no training."""

import copy
import json
import sys

import numpy as np
import pytest
import scipy.stats
import small

sys.path.append(str(small.ROOT / "launch"))
import ablation
import ablation_data
import ablation_report
import ablation_scores

from piccolo_jax import config as config_lib
from piccolo_jax.data import formats


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


@pytest.fixture
def data(tmp_path):
    """A folder with the training files, of a few rows each."""
    rows = {
        "retrieval": [{"text": "q", "text_pos": "p", "text_neg": ["n"]}] * 3,
        "similarity": [
            {"text": "a", "text_pair": "b", "label": 5.0},
            {"text": "a", "text_pair": "c", "label": 1.0},
            {"text": "a", "text_pair": "d", "label": 3.0},
            {"text": "e", "text_pair": "f", "label": 4.0},
        ],
        "classification": [
            {"text": "t", "text_pos": "L1", "label": 0, "text_neg": ["L2"]},
            {"text": "u", "text_pos": "L2", "label": 1, "text_neg": ["L3"]},
        ],
    }
    files = []
    for file, task, _ in ablation_data.TRAINING.values():
        write(tmp_path / file, rows[task])
        files.append({"file": file, "label_names": ["L1", "L2", "L3"]})
    (tmp_path / "manifest.json").write_text(json.dumps({"files": files}))
    return tmp_path


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_pairs_with_a_high_score_are_positives_and_those_with_a_low_one_their_negatives(data):
    files = ablation_data.convert(data, data / "out")["stsb"]
    assert read(files.retrieval) == [
        {"text": "a", "text_pos": "b", "text_neg": ["c"]},
        {"text": "e", "text_pos": "f", "text_neg": []},
    ]
    assert len(read(files.own)) == 4


def test_a_label_text_has_all_other_labels_as_negatives_in_both_forms(data):
    files = ablation_data.convert(data, data / "out")["tnews"]
    expected = [("t", "L1", ["L2", "L3"]), ("u", "L2", ["L1", "L3"])]
    for path in (files.own, files.retrieval):
        rows = [(r["text"], r["text_pos"], r["text_neg"]) for r in read(path)]
        assert rows == expected


def settings(data, *flags):
    arguments = [f"--model={data}", f"--data={data}", f"--output={data / 'out'}", *flags]
    return ablation._arguments(["ablation", *map(str, arguments)])


def test_arms_differ_in_losses_alone(data):
    args = settings(data)
    files = ablation_data.convert(data, data / "prepared")
    configs = {n: ablation.run_config(n, 1, args, files) for n in (*ablation.ARMS, "alone-256")}
    tasks = {name: [d.task for d in c.data.datasets] for name, c in configs.items()}
    r, s, c = "retrieval", "similarity", "classification"
    assert tasks["infonce"] == tasks["counted"] == [r] * 6
    assert tasks["cosent"] == tasks["heavy"] == [r, r, s, s, r, r]
    assert tasks["labels"] == tasks["alone-256"] == [r, r, s, s, c, c]
    for config in configs.values():
        config_lib.validate(config)
        for dataset in config.data.datasets:  # the loss that a file gets is that of its task
            source = formats.open_source(dataset.path, dataset.task)
            assert source.task == dataset.task
            assert not any(isinstance(row, formats.Rejected) for row in source)
    for name, config in configs.items():
        other = copy.deepcopy(config)
        other.data.datasets = configs["labels"].data.datasets
        changes = config_lib.diff(configs["labels"], other)
        assert [change.split(":")[0] for change in changes] == {
            "counted": ["loss.retrieval.duplicates"],
            "heavy": ["loss.similarity.weight"],
            "alone-256": ["loss.dims", "model.embed_dim"],
        }.get(name, [])


def test_runs_of_other_settings_are_not_mixed(data):
    ablation._keep_settings(settings(data))
    ablation._keep_settings(settings(data, "--seeds=5", "--arms=labels"))
    with pytest.raises(ablation.UserError, match=r"--steps: 64 -> 65"):
        ablation._keep_settings(settings(data, "--steps=65"))


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--arms=infonce,all", "'all' is none of infonce, cosent"),
        ("--dims=1792,256", "must rise and end with 1792"),
        ("--lengths=32", "two numbers"),
        ("--seeds=0", "1 or more"),
        ("--data=/nowhere", "no such folder"),
    ],
)
def test_flags_that_cannot_be_are_errors(data, flag, message):
    with pytest.raises(ablation.UserError, match=message):
        settings(data, flag)


def test_the_measures_are_those_of_the_field():
    assert ablation_scores._average_precision(np.array([0.9, 0.1, 0.5, 0.3]), 2) == 0.75
    assert ablation_scores._average_precision(np.array([0.5, 0.5]), 1) == 0.5  # a tie
    vectors = {"q": [1, 0], "a": [0.6, 0.8], "b": [1, 0], "c": [0, 1]}

    def encode(texts, prompt=""):
        return np.array([vectors[text] for text in texts], np.float32)

    test = {"queries": ["q"], "passages": ["a", "b", "c"], "relevant": [[True, False, True]]}
    scores = ablation_scores._retrieval(test, encode, [2])
    ideal = 1 + 1 / np.log2(3)
    np.testing.assert_allclose(scores["2"], [(1 / np.log2(3) + 0.5) / ideal])
    gold, values = np.array([0, 0, 1, 1]), np.array([5, 5, 3, 3])
    assert ablation_scores.metric("Clu", gold, values) == pytest.approx(100)
    assert ablation_scores.metric("STS", np.array([1, 2, 3]), np.array([3, 2, 1])) == -100
    assert ablation_scores.metric("Pair", np.array([0, 1]), np.array([0.1, 0.2])) == 100
    assert ablation_scores.metric("Ret", gold, np.array([0.5, 0.5, 1, 1])) == 75


def scores(quality, seed, dims):
    """Made-up scores whose measures are better with `quality`; the same examples for all."""
    rng = np.random.default_rng(0)
    noise = np.random.default_rng(seed + 1)
    made = {}
    for name, (category, _) in ablation_scores.TESTS.items():
        gold = rng.integers(0, 2, 60)
        made[f"{name}|gold"] = gold
        for dim in dims:
            right = noise.random(60) < quality
            values = np.where(right, gold, 1 - gold)
            made[f"{name}|{dim}"] = values if category == "Clu" else (
                right * 1.0 if category in ("Cls", "Rer", "Ret") else values + noise.random(60) / 9
            )  # fmt: skip
    return made


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    monkeypatch.setattr(ablation_report, "RESAMPLES", 40)


def test_the_report_has_means_and_intervals_over_seeds_and_examples(tmp_path):
    (tmp_path / "scores").mkdir()
    (tmp_path / "settings.json").write_text("{}")
    quality = {"infonce": 0.6, "labels": 0.9, "alone-256": 0.9}
    for name, value in quality.items():
        for seed in range(3):
            dims = [256] if name == "alone-256" else [256, 1792]
            np.savez(tmp_path / "scores" / f"{name}-{seed}.npz", **scores(value, seed, dims))
    np.savez(tmp_path / "scores" / "start.npz", **scores(0.5, 9, [384]))
    ablation_report.write(tmp_path, ["infonce", "labels"], [256], [256, 1792], 3)
    results = json.loads((tmp_path / "results.json").read_text())
    ret = results["per_test"]["labels"]["1792"]["cmrc2018"]
    model = results["models"]["labels"]["1792"]
    assert model["mean"]["Ret"] == pytest.approx(np.mean(ret), abs=2e-3)
    interval = scipy.stats.t.interval(0.95, 2, np.mean(ret), scipy.stats.sem(ret))
    assert model["half"]["Ret"] == pytest.approx((interval[1] - interval[0]) / 2, abs=2e-3)
    assert model["mean"]["mean"] == pytest.approx(
        np.mean([model["mean"][c] for c in ablation_scores.CATEGORIES]), abs=2e-3
    )
    gain, none = results["differences"]
    assert (gain["of"], gain["minus"], gain["dim"]) == ("labels", "infonce", 1792)
    others = results["per_test"]["infonce"]["1792"]["cmrc2018"]
    assert gain["mean"]["Ret"] == pytest.approx(np.mean(ret) - np.mean(others), abs=2e-3)
    assert 0 < gain["examples_low"]["mean"] < gain["mean"]["mean"] < gain["examples_high"]["mean"]
    assert (none["of"], none["minus"], none["dim"]) == ("labels", "alone-256", 256)
    assert none["examples_low"]["mean"] < 0 < none["examples_high"]["mean"]
    text = (tmp_path / "table.md").read_text("utf-8")
    assert f"| labels | 1792 | {model['mean']['Cls']:.2f} ± {model['half']['Cls']:.2f} |" in text
    assert "| labels − alone-256 | 256 | seeds |" in text
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_one_seed_has_no_interval_over_seeds(tmp_path):
    (tmp_path / "scores").mkdir()
    (tmp_path / "settings.json").write_text("{}")
    for name in ("infonce-0", "labels-0", "start"):
        np.savez(tmp_path / "scores" / f"{name}.npz", **scores(0.7, 0, [1792]))
    ablation_report.write(tmp_path, ["infonce", "labels"], [], [1792], 1)
    assert "±" not in (tmp_path / "table.md").read_text("utf-8").split("\n", 1)[1]
    assert json.loads((tmp_path / "results.json").read_text())["models"]["labels"]["1792"][
        "half"
    ] is None  # fmt: skip


def test_arms_are_compared_in_order_and_those_beside_it_with_what_they_change(tmp_path):
    (tmp_path / "scores").mkdir()
    (tmp_path / "settings.json").write_text("{}")
    for name in (*(f"{arm}-0" for arm in ablation.ARMS), "start"):
        np.savez(tmp_path / "scores" / f"{name}.npz", **scores(0.7, 0, [1792]))
    ablation_report.write(tmp_path, ablation.ARMS, [], [1792], 1)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(d["of"], d["minus"]) for d in results["differences"]] == [
        ("cosent", "infonce"), ("labels", "cosent"), ("labels", "infonce"),
        ("counted", "infonce"), ("heavy", "cosent"),
    ]  # fmt: skip
