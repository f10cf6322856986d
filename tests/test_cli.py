import dataclasses
import errno
import os

import pytest

from piccolo_jax import cli
from piccolo_jax import config as config_lib
from piccolo_jax.config import Config, DatasetConfig, EvalDatasetConfig
from piccolo_jax.errors import UserError

CONFIG = """
from piccolo_jax.config import Config, DatasetConfig, EvalDatasetConfig


def get_config():
    config = Config()
    config.model.tokenizer = "some/tokenizer"
    config.data.datasets = (DatasetConfig(path="a.jsonl"), DatasetConfig(path="b.jsonl"))
    config.eval.datasets = (EvalDatasetConfig(path="dev.jsonl"),)
    {line}
    return config
"""


@pytest.fixture
def parse(tmp_path):
    def parse(*flags, line="", workdir="--workdir=run"):
        path = tmp_path / "tiny.py"
        path.write_text(CONFIG.format(line=line))
        return cli.parse_config(["train", f"--config={path}", workdir, *flags], "USAGE")

    return parse


def message_of(parse, *flags, **options):
    with pytest.raises(UserError) as raised:
        parse(*flags, **options)
    return str(raised.value)


def exit_code(main, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["command", *arguments])
    with pytest.raises(SystemExit) as raised:
        cli.run(main)
    return raised.value.code


def test_flags_set_fields_of_every_type(parse):
    config, workdir = parse(
        "--config.seed=7",
        "--config.optim.learning_rate=2e-5",
        "--config.optim.weight_decay=1",
        "--config.model.pooling=cls",
        "--config.model.dropout=0.25",
        "--config.loss.dims=(64,128)",
        "--config.model.freeze=('a','b')",
        "--config.loss.retrieval.duplicates=count",
        "--config.data.datasets[1].path=c.jsonl",
        "--config.data.datasets[1].weight=2.5",
        "--config.eval.datasets[0].max_rows=9",
        "--config.mesh.fsdp=2",
    )
    assert workdir.name == "run"
    assert (config.seed, config.optim.learning_rate, config.optim.weight_decay) == (7, 2e-5, 1.0)
    assert (config.model.pooling, config.model.dropout) == ("cls", 0.25)
    assert (config.loss.dims, config.model.freeze) == ((64, 128), ("a", "b"))
    assert config.loss.retrieval.duplicates == "count"
    assert config.data.datasets[1] == DatasetConfig(path="c.jsonl", weight=2.5)
    assert config.eval.datasets == (EvalDatasetConfig(path="dev.jsonl", max_rows=9),)
    assert config.mesh.fsdp == 2


@pytest.mark.parametrize(
    "field",
    [
        "model.dropout",
        "loss.circle_margin",
        "loss.retrieval.false_negative_margin",
        "data.mixing_temperature",
        "data.decontaminate.ngram_threshold",
        "data.remine_max_positive_ratio",
    ],
)
def test_a_field_that_can_be_none_is_set_to_none_again(parse, field):
    line = f"config.{field} = {2.0 if field.endswith('temperature') else 0.5}"
    assert config_lib.get(parse(line=line)[0], field) is not None
    assert config_lib.get(parse(f"--config.{field}=None", line=line)[0], field) is None


@pytest.mark.parametrize("flag", ["(64,128)", "64,128", "[64, 128]"])
def test_a_tuple_is_set_in_the_ways_people_write_it(parse, flag):
    assert parse(f"--config.loss.dims={flag}")[0].loss.dims == (64, 128)


@pytest.mark.parametrize("flag", ["64", "(64,)"])
def test_a_tuple_of_one_is_a_tuple(parse, flag):
    assert parse(f"--config.loss.dims={flag}")[0].loss.dims == (64,)


def leaves(node, path="config"):
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{path}.{field.name}")
        elif not isinstance(value, tuple):
            yield f"{path}.{field.name}", value


@pytest.mark.parametrize(("field", "value"), list(leaves(Config())))
def test_every_field_can_be_set_from_the_command_line(parse, field, value):
    unset = 2.0 if field.endswith("temperature") else 0.5
    value = unset if value is None else "some/tokenizer" if field.endswith("tokenizer") else value
    config, _ = parse(f"--{field}={value}")
    node = config
    for name in field.split(".")[1:]:
        node = getattr(node, name)
    assert node == value
    assert type(node) is type(value)


@pytest.mark.parametrize(
    ("flag", "parts"),
    [
        (
            "--config.optim.learning_rat=1",
            ("config.optim.learning_rat:", "has the fields learning_rate"),
        ),
        ("--config.optimizer.learning_rate=1", ("unknown config field 'optimizer'", "optim")),
        ("--config.seed.x=1", ("config.seed.x", "config.seed has none")),
        ("--config.data.datasets[2].path=x", ("config.data.datasets[2].path", "has no [2]")),
        ("--config.data.datasets[0].weigth=2", ("unknown config field", "weigth")),
        ("--config.total_steps=ten", ("config.total_steps", "ten")),
        ("--config.total_steps=2.5", ("config.total_steps", "2.5")),
        ("--config.optim.learning_rate=fast", ("config.optim.learning_rate", "fast")),
        ("--config.optim.learning_rate=nan", ("config.optim.learning_rate", "nan", "finite")),
        ("--config.optim.learning_rate=None", ("config.optim.learning_rate", "None", "number")),
        ("--noconfig.loss.similarity.normalise", ("unknown config field 'normalise'",)),
        ("--config.loss.dims=512,256", ("config.loss.dims", "(512, 256)", "increasing")),
        ("--config.loss.dims=256,4096", ("config.loss.dims", "4096", "1792 wide")),
        ("--config.loss.dims=big", ("config.loss.dims", "big")),
        ("--config.model.pooling=max", ("config.model.pooling", "'max'", "'mean', 'cls', 'last'")),
        ("--config.mesh.data=0", ("config.mesh.data", "0", "-1")),
        ("--wrkdir=x", ("wrkdir",)),
        ("extra", ("'extra'", "USAGE")),
    ],
)
def test_a_wrong_flag_is_an_error_that_names_it(parse, flag, parts):
    message = message_of(parse, flag)
    for part in parts:
        assert part in message
    assert len(message) < 400


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("config.optim.learning_rat = 1", ("tiny.py:10", "AttributeError", "learning_rat")),
        ("config = DatasetConfig(pth='x')", ("tiny.py:10", "TypeError", "pth")),
        ("import no_such_module", ("tiny.py:10", "no_such_module")),
        ("raise SystemExit('stop')", ("tiny.py:10", "stop")),
        ("config = 1 +", ("tiny.py", "SyntaxError", "10")),
        ("config = {}", ("tiny.py: get_config() must return a Config, not dict",)),
        ("config.model = None", ("config.model = None", "ModelConfig")),
        ("config.loss.dims = (2, 1)", ("config.loss.dims = (2, 1)", "increasing")),
    ],
)
def test_a_wrong_config_file_is_an_error_that_names_the_line(parse, line, parts):
    message = message_of(parse, line=line)
    for part in parts:
        assert part in message


def test_a_config_file_without_get_config_is_an_error(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text("x = 1\n")
    with pytest.raises(UserError, match="get_config"):
        cli.parse_config(["train", f"--config={path}", "--workdir=run"], "")


def test_a_missing_config_file_or_flag_is_an_error(parse):
    with pytest.raises(UserError, match=r"--config=no/such\.py: there is no such file"):
        cli.parse_config(["train", "--config=no/such.py", "--workdir=run"], "")
    with pytest.raises(UserError, match=r"--config is missing\nUSAGE"):
        cli.parse_config(["train", "--workdir=run"], "USAGE")
    assert message_of(parse, workdir="--workdir=").startswith("--workdir is missing")
    assert "no/such/flags" in message_of(parse, "--flagfile=no/such/flags")
    assert "rename the folder" in message_of(parse, workdir="--workdir=a\udcd6")


def test_a_config_given_as_two_arguments_is_read_too(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG.format(line=""))
    config, _ = cli.parse_config(["train", "--config", str(path), "--workdir", "run"], "")
    assert config.batch_size == 8192
    with pytest.raises(UserError, match=r"no/such\.py"):
        cli.parse_config(["train", "--config", "no/such.py", "--workdir", "run"], "")


def test_help_prints_the_usage(capsys):
    with pytest.raises(SystemExit) as raised:
        cli.parse_config(["train", "--help"], "USAGE")
    assert not raised.value.code
    assert capsys.readouterr().out == "USAGE\n"


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1), (143, 143)])
def test_what_a_command_returns_is_its_exit_code(monkeypatch, returned, code):
    assert exit_code(lambda argv: returned, monkeypatch) == code


def failing(error):
    def main(argv):
        raise error

    return main


def test_a_user_error_is_one_message_and_exit_code_2(monkeypatch, capsys):
    assert exit_code(failing(UserError("a.jsonl:3: broken")), monkeypatch) == 2
    assert capsys.readouterr() == ("", "error: a.jsonl:3: broken\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENOTDIR])
def test_what_the_machine_refuses_is_one_message_and_exit_code_2(monkeypatch, capsys, number):
    error = OSError(number, os.strerror(number), "/data/run/x")
    assert exit_code(failing(error), monkeypatch) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: /data/run/x: {os.strerror(number)}: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("x"), FileNotFoundError(2, "gone", "f"), OSError()])
def test_a_bug_keeps_its_traceback(monkeypatch, error):
    monkeypatch.setattr("sys.argv", ["command"])
    with pytest.raises(type(error)):
        cli.run(failing(error))


def test_an_interrupt_ends_without_a_traceback(monkeypatch, capsys):
    assert exit_code(failing(KeyboardInterrupt()), monkeypatch) == 130
    assert capsys.readouterr().err == "interrupted\n"
