"""The plan command on small slices: real compilations, for chips that aren't there."""

import dataclasses
import importlib.util
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
import small
import tiny

from piccolo_jax import plan
from piccolo_jax.config import Config, DatasetConfig
from piccolo_jax.data.loader import Batches
from piccolo_jax.planning import steps, topology
from piccolo_jax.planning.assumed import LABELS, assumed_datasets
from piccolo_jax.planning.steps import StepPlan, _measure, plan_steps, stderr_of_compiler
from piccolo_jax.sharding import AXES
from piccolo_jax.tasks import TASKS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: nothing compiles for TPUs",
)
ONE_DATASET = """
import runpy

def get_config():
    config = runpy.run_path({path!r})["get_config"]()
    config.data.datasets = config.data.datasets[1:2]
    return config
"""
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
WARNING = "Involuntary full rematerialization"


def planned(capfd, *arguments):
    """Exit code and JSON of a plan, and what it said on standard error."""
    capfd.readouterr()
    code = small.run_command(plan.main, "--json", *arguments)
    out, err = capfd.readouterr()
    return code, json.loads(out), err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = small.write_training_files(tmp_path_factory.mktemp("plan"))
    (folder / "one.py").write_text(ONE_DATASET.format(path=str(folder / "tiny.py")), "utf-8")
    return folder


def test_a_config_with_data_is_planned_at_the_shapes_of_its_batches(folder, capfd):
    code, result, err = planned(
        capfd, f"--config={folder / 'tiny.py'}", "--topology=v5e:2x2", f"--workdir={folder}",
        "--config.total_steps=30",
    )  # fmt: skip
    assert code == 0
    assert (result["chips"], result["executed"], result["fits"]) == (4, False, True)
    assert result["notes"] == []
    assert WARNING not in err
    assert [step["task"] for step in result["steps"]] == list(small.TASKS)
    assert [step["steps"] for step in result["steps"]] == [10, 10, 10]
    for step in result["steps"]:
        assert 0 < step["tokens"] < step["rows"] * step["length"]
        assert step["fill"] == pytest.approx(step["tokens"] / (step["rows"] * step["length"]))
        parts = step["hbm_arguments"] + step["hbm_temporary"] + step["hbm_output"]
        assert 0 < parts <= step["hbm_used"] < result["hbm_per_chip"]
        assert step["cycles"] > 0
        assert step["utilisation"] == pytest.approx(
            step["model_operations"] / step["seconds"] / 4 / result["peak_per_chip"]
        )
        assert 0 < step["utilisation"] < 1
        # Data-parallel: at least the gradients of all parameters cross the ring.
        reduced = [c for c in step["collectives"] if c["kind"] == "all-reduce"]
        assert sum(c["bytes"] for c in reduced) >= 2 * (2600 * 32)
        assert step["unknown_loops"] == step["compile_warnings"] == 0
    assert result["hours"] == pytest.approx(
        sum(step["seconds"] * 10 for step in result["steps"]) / 3600
    )


def test_model_operations_are_those_of_the_real_tokens(capfd):
    """With assumed texts of one length all is known beforehand."""
    rows, hidden, inner, layers, width = 8, 32, 64, 2, 48
    query, text = 16, 32
    code, result, _ = planned(
        capfd, f"--config={_write_config(rows, query, text)}", "--topology=v5e:2x2"
    )
    assert code == 0
    by_task = {step["task"]: step for step in result["steps"]}
    assert set(by_task) == set(small.TASKS)
    assert [step["steps"] for step in result["steps"]] == [3, 3, 3]
    assert all("assumed" in step["dataset"] for step in result["steps"])

    def operations(lengths, product=0):
        lengths = np.array(lengths, float)
        dense = layers * (4 * hidden**2 + 2 * hidden * inner)
        attention = 12 * layers * hidden * (lengths**2).sum()
        return 6 * (dense * lengths.sum() + hidden * width * len(lengths) + product) + attention

    lengths = {
        "retrieval": [query] * rows + [text] * 2 * rows,
        "similarity": [text] * 2 * rows,
        "classification": [text] * 2 * rows,  # as many labels as rows, since these are few
    }
    for task, step in by_task.items():
        product = rows * 2 * rows * width if task == "retrieval" else 0
        assert step["tokens"] == sum(lengths[task])
        assert step["texts"] == len(lengths[task])
        assert step["model_operations"] == pytest.approx(operations(lengths[task], product))


CONFIG = """
from piccolo_jax.config import Config, DatasetConfig

def get_config():
    config = Config(total_steps=9, batch_size={rows})
    config.model.init = "nobody/has-this-model"
    config.model.vocab_size, config.model.hidden_size, config.model.num_layers = 2600, 32, 2
    config.model.num_heads, config.model.intermediate_size = 2, 64
    config.model.max_positions, config.model.embed_dim = 32, 48
    config.loss.dims = (16, 48)
    config.data.query_max_length, config.data.max_length = {query}, {text}
    config.data.datasets = (DatasetConfig(path="nowhere/list.txt"),)
    return config
"""


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def _write_config(rows, query, text):
    with open("assumed.py", "w", encoding="utf-8") as file:
        file.write(CONFIG.format(rows=rows, query=query, text=text))
    return "assumed.py"


def test_what_is_not_here_is_assumed_and_said(capfd):
    path = _write_config(8, 16, 32)
    code, result, _ = planned(
        capfd, f"--config={path}", "--topology=v6e:2x2", "--query_tokens=6", "--text_tokens=20"
    )
    assert code == 0
    assert [step["batch_size"] for step in result["steps"]] == [8, 8, 8]
    model, data = result["notes"]
    assert model.startswith("model: sizes of the config, since 'nobody/has-this-model'")
    assert "steps by weight x repeats, equally many of each task where a dataset of" in data
    assert "queries of 6 and other texts of 20 tokens" in data
    retrieval = result["steps"][0]
    assert 8 * (6 + 2 * 20) * 0.7 < retrieval["tokens"] < 8 * (6 + 2 * 20) * 1.3


def test_the_memory_of_an_average_of_the_weights_is_counted(folder, capfd):
    flags = (f"--config={folder / 'one.py'}", "--topology=v5e:2x2", f"--workdir={folder}")
    flags += ("--config.mesh.data=1", "--config.mesh.fsdp=4")
    plans = [
        planned(capfd, *flags, f"--config.optim.ema_decay={decay}")[1]["steps"][0]
        for decay in (0, 0.9)
    ]
    one, other = (plan["hbm_arguments"] for plan in plans)
    # Of parameters and two moments it is a third; both have the batch too.
    assert 0.3 * one < other - one <= one / 3
    # It takes the place of the one before.
    assert plans[1]["hbm_output"] - plans[0]["hbm_output"] < 0.01 * (other - one)


def test_the_table_says_that_nothing_ran_and_what_costs(folder, capfd):
    code = small.run_command(
        plan.main, f"--config={folder / 'one.py'}", "--topology=v4:2x2x1", f"--workdir={folder}"
    )
    out = capfd.readouterr().out
    assert code == 0
    assert "v4:2x2x1: 4 chips, data 4 x fsdp 1 x tensor 1; 32.00 GiB" in out
    assert "Nothing was executed" in out
    for word in ("similarity", "all-reduce over 4 chips", "MFU", "padding"):
        assert word in out
    assert "12 steps: 0.00 hours" in out


@pytest.mark.parametrize(
    "fields",
    [
        ("mesh.data=1", "mesh.fsdp=4", "model.remat=full"),
        ("mesh.fsdp=2", "mesh.tensor=2", "train.micro_batches=2"),
    ],
)
def test_other_meshes_compile_without_moving_activations_whole(folder, capfd, fields):
    code, result, err = planned(
        capfd, f"--config={folder / 'tiny.py'}", "--topology=v5e:2x2", f"--workdir={folder}",
        *(f"--config.{field}" for field in fields),
    )  # fmt: skip
    assert code == 0
    assert [step["compile_warnings"] for step in result["steps"]] == [0, 0, 0]
    assert WARNING not in err


@pytest.mark.parametrize(("task", "fsdp"), [("retrieval", 1), ("classification", 2)])
def test_the_published_recipe_compiles_without_moving_activations_whole(capfd, task, fsdp):
    # All but the number of layers and rows, which change no layout and take the compiler's time.
    fields = (
        "model.num_layers=2", "batch_size=64", "train.micro_batches=2", f"mesh.fsdp={fsdp}",
        f"data.datasets[0].task={task}",
    )  # fmt: skip
    code, result, err = planned(
        capfd, f"--config={CONFIGS / 'base.py'}", "--topology=v5e:2x2",
        *(f"--config.{field}" for field in fields),
    )  # fmt: skip
    assert code == 0
    (step,) = result["steps"]
    assert step["compile_warnings"] == 0
    assert WARNING not in err
    kernels = {item["name"] for item in step["unestimated"]}
    assert {"attention_forward", "attention_backward"} <= kernels


def test_what_does_not_fit_says_by_how_much_and_what_would(capfd):
    # Each chip holds 1.3 million tokens, whose activations take 4 KB and more in each of 4 layers.
    path = _write_config(2**16, 16, 32)
    code, result, _ = planned(
        capfd, f"--config={path}", "--topology=v5e:2x2", "--config.model.hidden_size=128",
        "--config.model.intermediate_size=512", "--config.model.num_layers=4",
        "--config.data.datasets[0].task=retrieval", "--config.model.remat=none",
    )  # fmt: skip
    assert code == 2
    assert not result["fits"]
    assert result["hours"] is None
    (step,) = result["steps"]
    assert step["hbm_used"] > result["hbm_per_chip"]
    wanted, remedy = result["notes"][-2:]
    assert wanted.startswith("does not fit: retrieval needs ")
    assert remedy.startswith("what fits (compiled): --config.train.micro_batches=")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v5e:3x3"], "--topology=v5e:3x3: there is no such slice; those of v5e are"),
        ([], "--topology is missing"),
        (["--topology=v5e:2x2", "--config.mesh.tensor=3"],
         "config.mesh.tensor = 3: the sizes must multiply to the number of devices, 4, so each is"
         " one of 1, 2, 4 (-1"),
        (["--topology=v5e:2x2", "--config.train.micro_batches=99"],
         "config.train.micro_batches = 99: a batch of dataset"),
        (["--topology=v5e:2x2", "--config.batch_size=999"],
         "config.batch_size = 999: dataset retrieval.jsonl has only 20 usable rows"),
        (["--topology=v5e:2x2", "--query_tokens=-1"], "query_tokens"),
    ],
)  # fmt: skip
def test_bad_input_is_one_message(folder, capsys, arguments, message):
    code = small.run_command(
        plan.main, f"--config={folder / 'tiny.py'}", f"--workdir={folder}", *arguments
    )
    assert code == 2
    assert message in small.one_error(capsys)


def test_what_the_compiler_lets_pass_must_still_fit_the_chip():
    chip, devices = topology.devices("v5e:1x1")
    config, model = tiny.config(), tiny.embedder(layers=1, kernels=True, unrolled=True)
    small_chip = dataclasses.replace(chip, hbm=10_000)
    (step,) = plan_steps(config, model, small_chip, devices, [tiny.dataset("classification")])
    assert step.seconds > 0
    assert step.hbm_used > small_chip.hbm
    assert not step.fits


def test_products_of_the_loss_are_those_of_its_longest_prefix_with_kept_documents():
    config, model, datasets = tiny.config(), tiny.embedder(), [tiny.dataset("retrieval")]
    batch = Batches(config, datasets, TASKS, 32, 2, range(2)).at(0)
    masked = np.zeros_like(batch.replicated["negative_keep"])
    without = dataclasses.replace(batch, replicated=batch.replicated | {"negative_keep": masked})
    plans = [StepPlan("", "retrieval") for _ in range(3)]
    _measure(plans[0], batch, model, 30)
    _measure(plans[1], batch, model, 8)
    _measure(plans[2], without, model, 30)
    kept = batch.replicated["negative_keep"].sum()
    assert 0 < kept < masked.size
    many, narrow, few = (plan.model_operations for plan in plans)
    assert many - few == 6 * 13 * kept * 30
    assert many - narrow == 6 * 13 * (13 + kept) * 22


def test_changes_that_need_less_memory_have_no_more_chunks_than_rows():
    mesh = jax.sharding.AbstractMesh((2, 2, 2), AXES)
    config = Config(batch_size=64)
    config.train.micro_batches = 2
    split = {"mesh.data": 1, "mesh.fsdp": 4}
    assert list(plan._changes(config, mesh, 5, True)) == [
        {"train.micro_batches": 5},
        split | {"train.micro_batches": 5},
        split | {"train.micro_batches": 1, "batch_size": 16},
    ]

    def chunks(rows, smaller_batch):
        changes = plan._changes(config, mesh, rows, smaller_batch)
        return [change["train.micro_batches"] for change in changes]

    assert chunks(99, True) == [8, 32, 8, 32, 8]
    assert chunks(99, False) == [8, 32, 8, 32]
    config.train.micro_batches = 5
    assert chunks(5, True) == [5, 1]


@pytest.fixture
def compiled(monkeypatch):
    """Tasks compiled, in turn, by a model: a byte per token of a chunk, and retrieval's loss."""
    tasks = []

    def compile_step(batch, programs, state, mesh, chip):
        tasks.append(batch.task)
        step, shape = StepPlan(batch.dataset, batch.task, seconds=1.0), batch.shape
        step.hbm_used = shape.rows // shape.chunks * shape.length
        step.hbm_used += 1280 if batch.task == "retrieval" else 0
        step.fits = step.hbm_used <= chip.hbm
        return step

    monkeypatch.setattr(steps, "_compile", compile_step)
    return tasks


def advised(hbm, *datasets):
    """What is advised for chips with so many bytes."""
    config, model = tiny.config(), tiny.embedder()
    config.batch_size, config.data.datasets, config.data.negatives = 256, datasets, 0
    config.data.query_max_length, config.data.max_length = 3, 32
    chip, devices = topology.devices("v5e:2x2")
    chip = dataclasses.replace(chip, hbm=hbm)
    assumed = assumed_datasets(config, 3, 32)
    plans = plan_steps(config, model, chip, devices, assumed)
    return plan._advice(plans, config, model, chip, devices, assumed)


PAIRS, QUERIES = (DatasetConfig(path="x", task=task) for task in ("similarity", "retrieval"))


def test_what_would_fit_fits_every_dataset_in_the_chunks_that_the_run_gives_it(compiled):
    # 128 rows of 32 tokens a chip are too many for the pairs. A quarter fits; but a batch of the
    # others is then in 3 chunks, with which and their loss they don't.
    notes = advised(1984, PAIRS, QUERIES)
    assert notes[0].startswith("does not fit: similarity needs")
    assert notes[1:] == [
        "what fits (compiled): --config.train.micro_batches=16: at most 0.00 GiB, 1.000 s a step"
        " on average"
    ]
    assert compiled == ["similarity", "retrieval"] * 3


@pytest.mark.parametrize("own", [0, 256])
def test_a_change_is_given_up_at_the_first_dataset_that_does_not_fit(compiled, own):
    queries = dataclasses.replace(QUERIES, batch_size=own)
    notes = advised(1200, dataclasses.replace(PAIRS, batch_size=16), queries)
    assert compiled[:2] == ["similarity", "retrieval"]
    assert set(compiled[2:]) == {"retrieval"}
    assert len(notes) == 2 + len(compiled[2:])
    assert all("retrieval needs" in note for note in notes[:-1])
    # config.batch_size makes no batch smaller whose dataset has a batch_size of its own.
    assert any("--config.batch_size=64" in note for note in notes) == (not own)


def test_loops_of_unknown_length_are_said():
    steps = [StepPlan("", "retrieval", fits=True, unknown_loops=n) for n in (0, 2)]
    (note,) = plan._advice(steps, Config(), None, None, [], [])
    assert note.startswith("retrieval: the program doesn't show how often 2 of its loops run")


def test_native_output_is_kept_from_the_terminal_and_comes_back(capfd):
    with stderr_of_compiler() as said:
        os.write(2, b"from C++\n")
        assert said() == "from C++\n"
    os.write(2, b"later\n")
    assert said() == "from C++\n"
    assert capfd.readouterr().err == "later\n"


@pytest.mark.parametrize("task", small.TASKS)
def test_assumed_data_give_whole_batches_of_the_lengths_asked_for(task):
    config = Config(batch_size=512)
    config.data.datasets = (DatasetConfig(path="x", task=task),)
    config.data.negatives = 3
    (dataset,) = assumed_datasets(config, 40, 200)
    batch = Batches(config, [dataset], TASKS, 64, 4, range(4)).at(0)
    texts = {"retrieval": 512 * 5, "similarity": 1024, "classification": 512 + LABELS}[task]
    lengths = dataset.store.lengths
    assert len(lengths) == texts
    assert batch.num_tokens == lengths.sum()
    assert {name: len(array) for name, array in batch.replicated.items()} == dict.fromkeys(
        batch.replicated, 512
    )
    others = lengths[512:] if task == "retrieval" else lengths
    # 1,000 draws or more between half and three halves: their mean has a deviation of 0.9 %.
    assert others.mean() == pytest.approx(200, rel=0.06)
    assert others.min() >= 100
    assert others.max() <= 300
    if task == "retrieval":
        assert lengths[:512].max() <= 60


def assumed_batches(batch_size, *datasets, steps=100):
    """Rows of a batch and number of steps of each assumed dataset, and the shapes of all."""
    config = Config(batch_size=batch_size)
    config.data.datasets = datasets
    batches = Batches(config, assumed_datasets(config, 40, 200), TASKS, 64, 4, range(4), quiet=True)
    rows = [dataset.batch_size for dataset in batches.mixture]
    return rows, batches.schedule.uses(steps), [plan.shape for plan in batches.plans]


def test_assumed_data_have_the_batches_and_the_shares_of_the_config():
    pairs = DatasetConfig(path="x", task="similarity", weight=2.0, repeats=3.0)
    rows, steps, shapes = assumed_batches(
        128, pairs, dataclasses.replace(pairs, weight=1.0, repeats=1.0),
        dataclasses.replace(pairs, repeats=1.0, batch_size=32),
        dataclasses.replace(pairs, repeats=0.5, max_rows=48),
    )  # fmt: skip
    assert rows == [128, 128, 32, 48]
    assert steps == pytest.approx([60, 10, 20, 10], abs=1)
    assert shapes[0] == shapes[1]  # so that they share a program
    assert shapes[2].texts < shapes[3].texts < shapes[0].texts


def test_an_assumed_dataset_without_a_task_shares_its_weight_among_all():
    retrieval = DatasetConfig(path="x", task="retrieval", weight=3.0)
    rows, steps, _ = assumed_batches(64, retrieval, DatasetConfig(path="y", batch_size=16))
    assert rows == [64, 16, 16, 16]
    assert steps == pytest.approx([75, 8.3, 8.3, 8.3], abs=1.5)


@pytest.mark.parametrize("task", small.TASKS)
def test_batches_of_one_row_can_be_assumed(task):
    rows, _, _ = assumed_batches(1, DatasetConfig(path="x", task=task))
    assert rows == [1]
