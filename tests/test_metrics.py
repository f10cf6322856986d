import json

import pytest

from piccolo_jax import metrics


def steps(path):
    return [row["step"] for row in metrics.read(path)]


def test_each_line_is_one_object(tmp_path):
    log = metrics.JsonLines(tmp_path / "m.jsonl", -1)
    log.write({"step": 1, "dataset": "中文\u2028名"})
    log.write({"step": 2, "loss": 0.5})
    lines = (tmp_path / "m.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == metrics.read(tmp_path / "m.jsonl")
    assert metrics.read(tmp_path / "m.jsonl")[0] == {"step": 1, "dataset": "中文\u2028名"}


def test_opening_drops_the_steps_that_a_resumed_run_makes_anew(tmp_path):
    path = tmp_path / "m.jsonl"
    log = metrics.JsonLines(path, -1)
    for step in range(1, 6):
        log.write({"step": step})
    again = metrics.JsonLines(path, 3)
    assert [row["step"] for row in again.kept] == [1, 2, 3]
    again.write({"step": 4})
    assert steps(path) == [1, 2, 3, 4]
    assert metrics.JsonLines(path, -1).kept == []
    assert path.read_text() == ""


@pytest.mark.parametrize("half", [b'{"step": 3, "lo', b'{"step": 3, "dataset": "\xe4\xb8', b"{"])
def test_a_line_that_a_killed_process_left_half_written_is_dropped(tmp_path, half):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + half)
    metrics.JsonLines(path, 5).write({"step": 3})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_a_whole_last_line_without_its_end_is_kept(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    metrics.JsonLines(path, 5).write({"step": 3})
    assert steps(path) == [1, 2, 3]


def test_lines_without_a_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"foo": 1}\n[1]\n{"step": "2"}\n{"step": 3}\n')
    assert metrics.JsonLines(path, 9).kept == [{"step": 3}]


def test_a_file_that_is_not_there_has_no_lines(tmp_path):
    assert metrics.read(tmp_path / "none.jsonl") == []
    assert metrics.JsonLines(tmp_path / "none.jsonl", 0).kept == []
    assert not list(tmp_path.iterdir())


def test_a_table_aligns_names_to_the_left_and_figures_to_the_right():
    assert metrics.table(("name", "n"), [("a", 1), ("long", 100)]) == (
        "name    n\na       1\nlong  100"
    )
