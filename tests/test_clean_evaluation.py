"""The command prepare with --decontaminate."""

import json

import pytest
import small
from small import one_error, run_command

from piccolo_jax import prepare


@pytest.fixture
def files(tmp_path):
    (tmp_path / "files").mkdir()
    return small.write_training_files(tmp_path / "files")


def first_texts(path, *numbers):
    lines = path.read_text("utf-8").splitlines()
    return [json.loads(lines[n - 1])["text"] for n in numbers]


def write_texts(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


@pytest.mark.parametrize("flags", ["--decontaminate={}|--decontaminate={}", "--decontaminate={}|{}",
                                   "--decontaminate|{}|{}"])  # fmt: skip
def test_rows_of_evaluation_sets_are_dropped_and_listed(files, tmp_path, capsys, flags):
    sets = [
        write_texts(tmp_path / "a.jsonl", first_texts(files / "retrieval.jsonl", 3, 5)),
        write_texts(tmp_path / "b.jsonl", first_texts(files / "classification.jsonl", 7)),
    ]
    command = (prepare.main, f"--config={files / 'tiny.py'}", f"--workdir={tmp_path / 'run'}")
    assert run_command(*command, *flags.format(*sets).split("|")) == 0
    said = capsys.readouterr().out
    rows = {
        line.split()[0]: line.split()[1:5] for line in said.splitlines() if ".jsonl" in line[:20]
    }
    prepared = {line.split()[0]: line.split()[2:5] for line in said.splitlines()[1:4]}
    assert prepared == {
        "retrieval.jsonl": ["18", "0", "2"],
        "similarity.jsonl": ["20", "0", "0"],
        "classification.jsonl": ["19", "0", "1"],
    }
    assert rows["retrieval.jsonl"] == [str(sets[0]), "text", "same", "text"]
    assert rows["classification.jsonl"] == [str(sets[1]), "text", "same", "text"]
    lists = sorted((tmp_path / "run" / "prepared").glob("retrieval*/dropped.jsonl"))
    places = [json.loads(line)["place"] for line in lists[0].open(encoding="utf-8")]
    assert places == [f"{files / 'retrieval.jsonl'}:{n}" for n in (3, 5)]
    assert f"--config.data.decontaminate.paths='('\"'\"'{sets[0]}" in said
    # With that flag the same folders are used.
    paths = f"--config.data.decontaminate.paths={tuple(map(str, sets))!r}"
    assert run_command(*command, paths) == 0
    assert len(list((tmp_path / "run" / "prepared").iterdir())) == 3


def test_without_a_path_it_is_an_error(files, tmp_path, capsys):
    command = (prepare.main, f"--config={files / 'tiny.py'}", f"--workdir={tmp_path / 'run'}")
    assert run_command(*command, "--decontaminate=") == 2
    assert "decontaminate.paths = ('',): must be paths" in one_error(capsys)
    assert run_command(*command, "--decontaminate") == 2
    assert "--decontaminate needs" in one_error(capsys)
