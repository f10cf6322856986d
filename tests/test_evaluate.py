"""The command on a small random model and a folder with a set of each of the six types."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import warnings

import jax
import mteb
import numpy as np
import pytest
import small
from evaluation import six_types
from evaluation.six_types import NAMES, write_rows
from mteb.results import TaskResult
from small import ROOT, one_error, run_command

from piccolo_jax import build, evaluate, export
from piccolo_jax.evaluation import capture, examples, files, local_tasks, report, selection
from piccolo_jax.evaluation.benchmarks import ALSO_2024, CMTEB_2025

pytestmark = pytest.mark.usefixtures("quick_compiling")

WIDTH, CUT = 30, 8
PROMPTS = {"query": "查询：", "document": "文："}
MAIN_SCORES = {
    "Retrieval": "ndcg_at_10", "Reranking": "map_at_1000", "PairClassification": "max_accuracy",
    "Clustering": "v_measure", "Classification": "accuracy", "STS": "cosine_spearman",
}  # fmt: skip


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A workdir with a checkpoint and its export, whose prompts are PROMPTS."""
    workdir = tmp_path_factory.mktemp("runs") / "small"
    workdir.mkdir()
    config = small.config(embed_dim=WIDTH)
    config.data.datasets[0].passage_prompt = PROMPTS["document"]
    parts = build.build(config)
    params = small.params(parts)
    # mteb's logistic regression stops after 100 steps, long before it converges on vectors of
    # length 10: then their rounding turns single predictions. Cosines stay as they are.
    params["scaling"] = jax.tree.map(lambda x: x / 10, params["scaling"])
    small.save_run(workdir, config, parts, params)
    export.write(workdir / "export", params, parts, config)
    return workdir


@pytest.fixture(scope="module")
def model(run_folder):
    """The export, with the name that sentence-transformers has for a document's prompt."""
    path = run_folder / "export" / "config_sentence_transformers.json"
    about = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(about | {"prompts": PROMPTS}, ensure_ascii=False), encoding="utf-8")
    return run_folder / "export"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return six_types.write(tmp_path_factory.mktemp("data"))


def run(model, output, *flags):
    return run_command(evaluate.main, f"--model={model}", f"--output={output}", *flags)


@pytest.fixture(scope="module")
def evaluated(model, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluated")
    assert run(model, output, f"--data={data}", f"--dims={WIDTH},{CUT}") == 0
    return output


@pytest.fixture
def copied(evaluated, tmp_path):
    shutil.copytree(evaluated, tmp_path / "copied")
    return tmp_path / "copied"


def results_of(output, dim):
    """mteb's results by task, as mteb reads them."""
    part = "" if dim == WIDTH else f"experiments/embed_dim_{dim}/"
    found = {}
    for path in output.glob(f"results/*/*/{part}*.json"):
        if path.name != "model_meta.json":
            result = TaskResult.from_disk(path)
            found[result.task_name] = result
    return found


def main_scores(output, dim):
    return {name: result.get_score() for name, result in results_of(output, dim).items()}


def counted(capsys):
    """Of the texts that the last run encoded."""
    return int(re.search(r"(\d+) texts encoded in this run", capsys.readouterr().out)[1])


def tasks_of(data, names=()):
    return [local_tasks.make(*pair) for pair in files.choose(files.find(data), data, names)]


def figures_of_theirs(model, tasks, dim):
    """Results by task of mteb with sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(model), device="cpu", truncate_dim=dim)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = mteb.evaluate(theirs, tasks, cache=None, show_progress_bar=False)
    return {result.task_name: result for result in found.task_results}


@pytest.mark.parametrize("dim", [WIDTH, CUT])
def test_figures_are_those_of_mteb_with_sentence_transformers(model, data, evaluated, dim):
    expected = figures_of_theirs(model, tasks_of(data), dim)
    ours = results_of(evaluated, dim)
    assert sorted(ours) == sorted(expected) == sorted(f"{name}.test" for name in NAMES.values())
    for name, result in expected.items():
        [a], [b] = ours[name].scores["test"], result.scores["test"]
        assert set(a) == set(b)
        for score, value in b.items():
            if isinstance(value, float) and "nauc" not in score:
                assert a[score] == pytest.approx(value, abs=1e-3, nan_ok=True), (name, score)


def test_results_are_in_mteb_s_schema_with_its_metrics(evaluated):
    for dim in (WIDTH, CUT):
        results = results_of(evaluated, dim)
        for kind, name in NAMES.items():
            [scores] = results[f"{name}.test"].scores["test"]
            assert scores["main_score"] == scores[MAIN_SCORES[kind]]
            assert 0.01 < abs(scores["main_score"]) < 1
    [meta] = evaluated.glob("results/*/*/model_meta.json")
    about = json.loads(meta.read_text())
    assert about["name"] == "small/export"
    assert about["revision"] == meta.parent.name
    assert main_scores(evaluated, WIDTH) != main_scores(evaluated, CUT)


def test_each_text_is_encoded_once_for_all_dimensions_and_tasks(
    model, data, evaluated, tmp_path, capsys
):
    texts = set()
    for found, split in files.choose(files.find(data), data):
        rows = files.read(found, split)
        texts |= {*rows.texts, *rows.others}
        # mteb encodes the training rows that its ten classifiers see.
        texts |= {PROMPTS["query"] + text for text in rows.queries.values()}
        texts |= {
            PROMPTS["document"] + f"{title} {text}".strip()
            for title, text in rows.documents.values()
        }
    train = set(rows_of_training(data))
    [digests] = evaluated.glob("vectors/*/*/texts.sha256")
    encoded = digests.stat().st_size // 16
    assert len(texts) < encoded <= len(texts | train)
    copy = tmp_path / "copy"
    shutil.copytree(evaluated, copy)
    capsys.readouterr()
    assert run(model, copy, f"--data={data}", "--dims=30,24,8") == 0
    assert counted(capsys) == 0
    assert len(results_of(copy, 24)) == len(NAMES)
    assert main_scores(copy, CUT) == main_scores(evaluated, CUT)


def rows_of_training(data):
    [(found, split)] = files.choose(files.find(data), data, tasks=["subjects"])
    return files.read(found, split).train_texts


def stamps(output):
    return {path: path.stat().st_mtime_ns for path in output.glob("results/**/*.test.json")}


def test_a_second_run_evaluates_nothing_and_reports_the_same(model, data, copied, capsys):
    before = stamps(copied)
    assert run(model, copied, f"--data={data}", f"--dims={WIDTH},{CUT}") == 0
    first = capsys.readouterr().out.split("texts encoded")[0]
    assert stamps(copied) == before
    assert len(before) == 2 * len(NAMES)
    assert run(model, copied, f"--data={data}", f"--dims={WIDTH},{CUT}") == 0
    assert capsys.readouterr().out.split("texts encoded")[0] == first


def test_only_what_is_missing_or_half_written_is_made_again(model, data, copied, evaluated):
    paths = sorted(stamps(copied))
    half, missing = paths[3], paths[7]
    half.write_text(half.read_text()[:200])
    missing.unlink()
    before = stamps(copied)
    assert run(model, copied, f"--data={data}", f"--dims={WIDTH},{CUT}") == 0
    after = stamps(copied)
    assert {path for path in after if after[path] != before.get(path)} == {half, missing}
    for dim in (WIDTH, CUT):
        assert main_scores(copied, dim) == pytest.approx(main_scores(evaluated, dim), abs=1e-5)


def test_a_killed_run_goes_on_where_it_was(model, data, evaluated, tmp_path, monkeypatch, capsys):
    real, calls = mteb.evaluate, []

    def dying(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    flags = (f"--data={data}", f"--dims={WIDTH},{CUT}", "--tasks=titles,grades,areas")
    monkeypatch.setattr(mteb, "evaluate", dying)
    assert run(model, tmp_path / "out", *flags) == 130
    assert len(stamps(tmp_path / "out")) == 3
    assert run(model, tmp_path / "out", *flags) == 0
    assert len(calls) == 4 + 3
    assert 0 < counted(capsys) < 100
    found, expected = main_scores(tmp_path / "out", CUT), main_scores(evaluated, CUT)
    assert len(found) == 3
    assert found == pytest.approx({name: expected[name] for name in found}, abs=1e-4)


def test_other_data_and_overwrite_are_evaluated_again(model, data, copied, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(data, other)
    path = other / "sts" / "grades.test.jsonl"
    path.write_text("".join(path.read_text("utf-8").splitlines(keepends=True)[:20]), "utf-8")
    before = stamps(copied)
    flags = (f"--data={other}", f"--dims={CUT}")
    assert run(model, copied, *flags, "--tasks=grades,areas") == 0
    after = stamps(copied)
    assert [path.name for path in after if after[path] != before[path]] == ["grades.test.json"]
    assert run(model, copied, *flags, "--tasks=areas", "--overwrite") == 0
    last = stamps(copied)
    assert [path.name for path in last if last[path] != after[path]] == ["areas.test.json"]


def test_the_report_has_datasets_categories_and_both_conventions(model, data, copied, capsys):
    assert run(model, copied, f"--data={data}", f"--dims={WIDTH},{CUT}", "--published") == 0
    out = capsys.readouterr().out
    scores = {dim: main_scores(copied, dim) for dim in (WIDTH, CUT)}
    for kind, name in NAMES.items():
        values = [f"{100 * scores[dim][f'{name}.test']:.2f}" for dim in (WIDTH, CUT)]
        [line] = [line for line in out.splitlines() if f" {name}.test " in line]
        assert line.split()[2:] == [MAIN_SCORES[kind], *values]
    pair = results_of(copied, WIDTH)["same_paper.test"].scores["test"][0]
    assert f"Pair (average precision)       1  {100 * pair['cosine_ap']:.2f}" in re.sub(
        r" {3,}1 ", "       1 ", out
    )
    main = np.mean(list(scores[WIDTH].values()))
    by_precision = main + (pair["cosine_ap"] - pair["max_accuracy"]) / 6
    assert re.search(rf"mean of these 6, pairs by max accuracy +6 +{100 * main:.2f}", out)
    assert re.search(
        rf"mean of these 6, pairs by average precision +6 +{100 * by_precision:.2f}", out
    )
    assert "31 tasks, pairs by max accuracy: no mean, none of its tasks is here" in out
    assert "35 tasks, pairs by average precision: no mean, none of its tasks is here" in out
    assert (copied / "report.png").read_bytes().startswith(b"\x89PNG")
    [entry] = json.loads((copied / "report.json").read_text("utf-8"))["models"]
    assert entry["dims"] == [WIDTH, CUT]
    assert entry["prompts"] == PROMPTS
    assert entry["summary"]["means"]["max accuracy"][str(WIDTH)] == pytest.approx(main)


def test_a_workdir_gives_what_its_export_gives(run_folder, data, evaluated, tmp_path):
    # Its document prompt is the export's `passage`.
    flags = (f"--data={data}", "--tasks=titles,grades,subjects", f"--dims={CUT}")
    assert run(run_folder, tmp_path / "out", *flags) == 0
    [folder] = (tmp_path / "out" / "results").iterdir()
    assert folder.name.endswith("__small")
    [revision] = folder.iterdir()
    assert revision.name.startswith("step-2-")
    expected = main_scores(evaluated, CUT)
    for name, score in main_scores(tmp_path / "out", CUT).items():
        assert score == pytest.approx(expected[name], abs=1e-3)


def test_the_default_dimensions_are_those_of_training(model, data, tmp_path):
    assert run(model, tmp_path, f"--data={data}", "--tasks=grades") == 0
    assert [len(results_of(tmp_path, dim)) for dim in (WIDTH, *small.DIMS)] == [1, 1, 1, 1]


def test_normalising_changes_what_depends_on_lengths(model, data, evaluated, tmp_path):
    flags = (f"--data={data}", "--tasks=grades,subjects", f"--dims={CUT}")
    assert run(model, tmp_path, *flags, "--normalize=yes") == 0
    [path] = tmp_path.glob("results/*/*/experiments/*/subjects.test.json")
    assert path.parent.name == "embed_dim_8__normalize_True"
    ours = {
        n: TaskResult.from_disk(path.with_name(f"{n}.test.json")) for n in ("subjects", "grades")
    }
    expected = main_scores(evaluated, CUT)
    assert ours["grades"].get_score() == pytest.approx(expected["grades.test"], abs=1e-5)
    assert ours["subjects"].get_score() != pytest.approx(expected["subjects.test"], abs=1e-4)
    # A Normalize module comes before the cut, and so in sentence-transformers.
    normal = tmp_path / "normal"
    shutil.copytree(model, normal)
    modules = json.loads((normal / "modules.json").read_text())
    kind = "sentence_transformers.models.Normalize"
    modules.append({"idx": 3, "name": "3", "path": "3_Normalize", "type": kind})
    (normal / "modules.json").write_text(json.dumps(modules))
    assert run(normal, tmp_path / "out", *flags) == 0
    theirs = figures_of_theirs(normal, tasks_of(data, ["subjects"]), CUT)
    expected = theirs["subjects.test"].get_score()
    assert main_scores(tmp_path / "out", CUT)["subjects.test"] == pytest.approx(expected, abs=1e-3)
    assert expected != pytest.approx(ours["subjects"].get_score(), abs=2e-3)


def test_a_quick_look_is_kept_apart_from_results(model, data, copied, capsys):
    before = stamps(copied)
    flags = (f"--data={data}", f"--dims={CUT}", "--limit=9", "--tasks=titles,grades")
    assert run(model, copied, *flags) == 0
    assert "A quick look: at most 9" in capsys.readouterr().out
    after = stamps(copied)
    new = set(after) - set(before)
    assert {path.parent.name for path in new} == {"embed_dim_8__limit_9"}
    assert {path: after[path] for path in before} == before


def test_local_files_need_no_network(model, data, copied, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    flags = (f"--data={data}", f"--dims={CUT}", "--tasks=grades,titles", "--overwrite")
    assert run(model, copied, *flags) == 0


def test_prompts_of_a_file_are_those_of_task_type_and_text(model, data, evaluated, tmp_path):
    path = tmp_path / "prompts.json"
    same = {"query": PROMPTS["query"], "passage": PROMPTS["document"]}
    flags = (f"--data={data}", f"--dims={CUT}", "--tasks=titles,grades", f"--prompts={path}")
    path.write_text(json.dumps(same))
    assert run(model, tmp_path / "out", *flags) == 0
    assert main_scores(tmp_path / "out", CUT) == {
        name: score
        for name, score in main_scores(evaluated, CUT).items()
        if name in ("titles.test", "grades.test")
    }
    path.write_text(json.dumps(same | {"STS": "经济管理：", "titles.test-query": "医学工程："}))
    assert run(model, tmp_path / "out", *flags) == 0
    [folder] = (tmp_path / "out").glob("results/*/*/experiments/*prompts*")
    found = {n: TaskResult.from_disk(folder / f"{n}.test.json") for n in ("titles", "grades")}
    expected = main_scores(evaluated, CUT)
    for name, result in found.items():
        assert result.get_score() != pytest.approx(expected[f"{name}.test"], abs=1e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [("[]", "must be JSON like"), ('{"query": 1}', "must be JSON like"), ("{", "must be JSON like"),
     ('{"sts": "a"}', "'sts' is none of query, document"),
     ('{"STS": "\\ud800"}', "prompt 'STS' holds half a character"), (None, "must be JSON like")],
)  # fmt: skip
def test_a_prompts_file_that_cannot_be_used_is_an_error(
    model, data, tmp_path, capsys, content, message
):
    path = tmp_path / "prompts.json"
    if content:
        path.write_text(content)
    assert run(model, tmp_path / "out", f"--data={data}", f"--prompts={path}") == 2
    assert message in one_error(capsys)


@pytest.mark.parametrize("kind", NAMES)
def test_examples_give_the_main_score(evaluated, kind):
    for folder in (f"examples/*/*/{NAMES[kind]}.test", f"examples/*/*/*/*/{NAMES[kind]}.test"):
        [path] = evaluated.glob(f"{folder}/test.default.npz")
        dim = CUT if "experiments" in str(path) else WIDTH
        score = examples.metric(examples.load(path))
        assert score == pytest.approx(main_scores(evaluated, dim)[f"{NAMES[kind]}.test"], abs=1e-5)


def test_examples_of_another_main_score_are_not_kept(data, tmp_path):
    [task] = [t for t in tasks_of(data) if t.metadata.type == "PairClassification"]
    task.metadata.main_score = "max_f1"
    task.load_data()
    encoder = mteb.get_model("mteb/baseline-random-encoder")
    with capture.captured(task, tmp_path):
        task.evaluate(encoder, "test", encode_kwargs={}, prediction_folder=tmp_path)
    assert not list(tmp_path.iterdir())
    assert "_evaluate_subset" not in vars(task)


def test_missing_mteb_is_an_error_that_says_what_to_install(
    model, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "mteb", None)
    assert run(model, tmp_path, f"--data={data}") == 2
    message = one_error(capsys)
    assert "evaluate needs mteb" in message
    assert "pip install mteb==2.26.24" in message
    assert "mteb==2.26.24\n" in (ROOT / "requirements-dev.txt").read_text()


def test_tasks_of_a_benchmark_are_mteb_s_own(model, tmp_path, monkeypatch, capsys):
    """Their data lie where `datasets` looks before it asks the hub: in a folder of that name."""
    pairs = six_types.rows("similarity.test", 30)
    labelled = six_types.rows("classification.test", 40)
    stsb, tnews = (mteb.get_task(n).metadata.dataset["path"] for n in ("STSB", "TNews"))
    write_rows(
        tmp_path / stsb / "test.jsonl",
        *(
            {"sentence1": r["text"], "sentence2": r["text_pair"], "score": r["label"]}
            for r in pairs
        ),
    )
    for split in ("train", "validation"):
        write_rows(
            tmp_path / tnews / f"{split}.jsonl",
            *({"text": row["text"], "label": len(row["text_pos"]) - 2} for row in labelled),
        )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    flags = ("--benchmark=MTEB(cmn, v1)", "--tasks=STSB,TNews", f"--dims={CUT}")
    assert run(model, "out", *flags) == 0
    out = capsys.readouterr().out
    assert sorted(results_of(tmp_path / "out", CUT)) == ["STSB", "TNews"]
    assert re.search(
        r"31 tasks, pairs by max accuracy: no mean, 29 are missing: T2Retrieval, ", out
    )
    assert "no mean, 33 are missing: " in out
    assert "STS22(zh)" in out
    assert len(list((tmp_path / "out").glob("examples/*/*/*/*/*/*.npz"))) == 2
    assert run(model, "out", *flags) == 0
    assert counted(capsys) == 0


def test_data_that_cannot_be_had_is_an_error_that_names_it(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ("--benchmark=MTEB(cmn, v1)", "--tasks=Ocnli")
    assert run(model, "out", *flags) == 2
    message = one_error(capsys)
    for part in ("Ocnli: its dataset C-MTEB/OCNLI (revision ", "give this machine a network"):
        assert part in message


def test_the_31_and_the_35_tasks_are_mteb_s():
    tasks = selection.select("MTEB(cmn, v1)", ())
    assert {task.metadata.name: task.metadata.type for task in tasks} == CMTEB_2025
    also = selection.select("cmteb-2024", ())[31:]
    assert {t.metadata.name: (t.metadata.type, *t.hf_subsets) for t in also} == ALSO_2024
    assert {tuple(task.eval_splits) for task in also} == {("test",)}
    [task] = selection.select("", ("STS22(zh)",))
    assert task.hf_subsets == ["zh"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--benchmark=MTEB(cmn)"], "has no such benchmark (did you mean MTEB(cmn, v1)"),
        (["--tasks=TNew"], "has no such task (did you mean TNews"),
        (["--tasks=STS22(xx)"], "STS22 has no such subset, only "),
        (["--benchmark=MTEB(cmn, v1)", "--tasks=STS12"], "--tasks=STS12: not in MTEB(cmn, v1)"),
        (["--benchmark=cmteb-2024", "--limit=3"], "--limit is of local files"),
        (["--tasks=TNews", "--split=dev"], "--split is of local files"),
        ([], "say on what: --benchmark="),
        (["--data=none", "--benchmark=x"], "exclude each other"),
        (["--data=none"], "--data=none: there is no such folder"),
        (["--data=none", "--limit=-1"], "--limit=-1: must be 0"),
        (["--data=none", "--dims=0"], "--dims=0: must be numbers above 0"),
        (["--data=none", "--dims=8,x"], "--dims=8,x: must be numbers above 0"),
        (["--data=none", "--dims=31"], "31 is more than the model's width, 30"),
        (["--data=none", "--name=x"], "--name=x: must be ORG/NAME"),
        (["--data=none", "--checkpoint=best"], "is not the workdir of a run"),
        (["--compare", "x"], "give --model=DIR to evaluate, or --compare"),
    ],
)
def test_flags_that_make_no_sense_are_one_error(model, tmp_path, capsys, flags, message):
    assert run(model, tmp_path / "out", *flags) == 2
    assert message in one_error(capsys)


def test_models_that_are_none_are_an_error(model, data, tmp_path, capsys):
    assert run_command(evaluate.main, f"--model={tmp_path}", f"--data={data}") == 2
    assert "config.json: no such file" in one_error(capsys)
    assert run(model, model / "out", f"--data={data}") == 2
    assert "is within the model's folder" in one_error(capsys)
    assert not (model / "out").exists()
    assert run(model, data / "out", f"--data={data}") == 2
    assert "is within --data=" in one_error(capsys)
    (tmp_path / "file").write_text("")
    assert run(model, tmp_path / "file", f"--data={data}") == 2
    assert "is a file; give a folder" in one_error(capsys)
    assert run_command(evaluate.main) == 2
    assert "give --model=DIR" in one_error(capsys)


def test_two_processes_and_two_devices_each_give_the_same(model, data, evaluated, tmp_path):
    flags = (f"--data={data}", f"--dims={CUT}", "--tasks=titles,grades,same_paper")
    command = ("launch/local_processes.py", "--processes=2", "--devices=2",
               "--module=piccolo_jax.evaluate", "--")  # fmt: skip
    done = subprocess.run(
        [sys.executable, *command, f"--model={model}", f"--output={tmp_path / 'out'}", *flags],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("texts encoded in this run") == 1
    expected = main_scores(evaluated, CUT)
    found = main_scores(tmp_path / "out", CUT)
    assert len(found) == 3
    assert found == pytest.approx({name: expected[name] for name in found}, abs=1e-3)


@pytest.fixture(scope="module")
def compared(model, data, evaluated, tmp_path_factory):
    """Another model's results: the same weights, with vectors of length 1 and other prompts."""
    output = tmp_path_factory.mktemp("other")
    prompts = output / "prompts.json"
    prompts.write_text(json.dumps({"query": "文学：", "STS": "工程："}))
    flags = (f"--data={data}", f"--dims={WIDTH},{CUT}", f"--prompts={prompts}", "--name=org/other")
    assert run(model, output, *flags) == 0
    return output


def compare(capsys, *arguments):
    capsys.readouterr()
    assert run_command(evaluate.main, "--compare", *arguments) == 0
    return capsys.readouterr().out


def rows_of(out, dim):
    """Cells of each row of the table of a dimension, by the row's name."""
    block = out.split(f"at {dim} dimensions")[1].split("at ")[0]
    lines = [re.split(r"  +", line) for line in block.splitlines()[3:] if line[:1].isalpha()]
    return {cells[0]: cells[1:] for cells in lines}


def test_models_are_compared_with_paired_intervals(evaluated, compared, capsys):
    out = compare(capsys, evaluated, compared)
    assert out.splitlines()[0].startswith("1: small/export (")
    assert out.splitlines()[1].startswith("2: org/other (")
    for dim in (WIDTH, CUT):
        first, second = main_scores(evaluated, dim), compared_scores(compared, dim)
        rows = rows_of(out, dim)
        low, high = 0, 0
        for name, score in first.items():
            [cells] = [cells for label, cells in rows.items() if label.endswith(f" {name}")]
            assert cells[:2] == [f"{100 * x:.2f}" for x in (score, second[name])]
            assert float(cells[2]) == pytest.approx(100 * (second[name] - score), abs=0.011)
            low, high = map(float, re.findall(r"[-+][\d.]+", cells[3]))
            assert low <= float(cells[2]) + 3
            assert high >= float(cells[2]) - 3
            assert cells[4] == (
                "queries" if name in ("titles.test", "shortlist.test") else "examples"
            )
    assert {"Ret, mean", "STS, mean", "mean of 6"} <= set(rows_of(out, CUT))
    assert [cells[-1] for label, cells in rows_of(out, CUT).items() if label == "mean of 6"] == [
        "datasets"
    ]
    assert len(re.findall(r"^mean of 6 .* examples$", out, re.M)) == 2


def compared_scores(output, dim):
    [entry] = json.loads((output / "report.json").read_text("utf-8"))["models"]
    return {n: task["scores"][str(dim)]["main_score"] for n, task in entry["tasks"].items()}


def test_comparing_repeats_itself_and_depends_on_the_seed(evaluated, compared, capsys):
    few = ("--resamples=100", "--dims=8")
    first = compare(capsys, evaluated, compared, *few)
    assert compare(capsys, evaluated, compared, *few) == first
    assert compare(capsys, evaluated, compared, *few, "--seed=1") != first
    assert "at 30 dimensions" not in first


def test_a_model_is_no_better_than_itself(evaluated, tmp_path, capsys):
    shutil.copytree(evaluated, tmp_path / "same")
    path = tmp_path / "same" / "report.json"
    path.write_text(path.read_text("utf-8").replace("small/export", "org/same"), encoding="utf-8")
    for cells in rows_of(compare(capsys, evaluated, tmp_path / "same"), CUT).values():
        assert cells[2:4] == ["+0.00", "[+0.00, +0.00]"]


def test_without_scores_of_examples_datasets_are_drawn(evaluated, compared, tmp_path, capsys):
    shutil.copytree(compared, tmp_path / "other")
    for path in (tmp_path / "other").glob("examples/**/grades.test/*.npz"):
        path.unlink()
    rows = rows_of(compare(capsys, evaluated, tmp_path / "other", "--dims=30"), WIDTH)
    assert rows["STS grades.test"][3:] == ["-", "-"]
    assert rows["STS, mean"][3:] == ["-", "-"]  # of a single dataset
    assert rows["mean of 6"][-1] == "datasets"
    assert rows["Ret titles.test"][-1] == "queries"


def test_a_comparison_can_be_written(evaluated, compared, tmp_path, capsys):
    flags = (f"--output={tmp_path / 'out'}", "--resamples=50", "--published")
    out = compare(capsys, evaluated, compared, *flags)
    content = json.loads((tmp_path / "out" / "comparison.json").read_text("utf-8"))
    assert [part["dims"] for part in content["comparisons"]] == [[WIDTH] * 2, [CUT] * 2]
    [row] = [r for r in content["comparisons"][1]["rows"] if r["name"] == "STS grades.test"]
    assert rows_of(out, CUT)["STS grades.test"][:2] == [f"{100 * x:.2f}" for x in row["scores"]]
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "comparison.json" not in compare(capsys, evaluated, compared, "--resamples=50")


def test_a_name_in_chinese_is_drawn_without_a_word(evaluated, tmp_path):
    entries = [entry | {"model": "机构/模型"} for entry in report.read(evaluated / report.FILE)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report.figure(tmp_path / "report.png", entries, published=True)
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]


def test_tasks_of_other_data_are_left_out_of_a_comparison(evaluated, compared, tmp_path, capsys):
    shutil.copytree(compared, tmp_path / "other")
    path = tmp_path / "other" / "report.json"
    content = json.loads(path.read_text("utf-8"))
    tasks = content["models"][0]["tasks"]
    tasks["grades.test"]["revision"] = "another"
    del tasks["areas.test"]
    path.write_text(json.dumps(content), encoding="utf-8")
    out = compare(capsys, evaluated, tmp_path / "other", "--resamples=50")
    assert "left out: grades.test: evaluated on different data" in out
    assert "left out: areas.test: not evaluated with all models" in out
    assert "mean of 4" in out
    content["models"][0]["tasks"] = {"x": tasks["grades.test"]}
    path.write_text(json.dumps(content), encoding="utf-8")
    assert run_command(evaluate.main, "--compare", evaluated, tmp_path / "other") == 2
    assert "the models have no task in common" in one_error(capsys)


def test_what_cannot_be_compared_is_an_error(evaluated, compared, tmp_path, capsys):
    for arguments, message in (
        ([evaluated], "holds the results of 1 model; evaluate another"),
        ([evaluated, tmp_path], "report.json: no such file; give the --output folder"),
        ([evaluated, compared, "--dims=5"], "5 was not evaluated with all models; all have"),
        ([evaluated, compared, "--resamples=3"], "--resamples=3: must be 20 or more"),
        ([evaluated, compared, "--seed=-1"], "--seed=-1: must be 0 or greater"),
        ([evaluated, compared, f"--output={__file__}"], "is a file; give a folder"),
    ):
        assert run_command(evaluate.main, "--compare", *arguments) == 2
        assert message in one_error(capsys)
    path, content = tmp_path / "report.json", json.loads((evaluated / "report.json").read_text())
    [entry] = content["models"]
    tasks = {name: task | {"scores": {}} for name, task in entry["tasks"].items()}
    for broken in ({"schema": 0}, content | {"models": [{**entry, "folders": {}}]},
                   content | {"models": [{**entry, "tasks": tasks}]}):  # fmt: skip
        path.write_text(json.dumps(broken))
        assert run_command(evaluate.main, "--compare", evaluated, tmp_path) == 2
        assert "not a report of this program" in one_error(capsys)
