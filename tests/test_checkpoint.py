import copy
import dataclasses
import gc
import os
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from piccolo_jax import build, sharding
from piccolo_jax.checkpoint import About, Best, Checkpoints
from piccolo_jax.config import Config, DatasetConfig, MeshConfig
from piccolo_jax.errors import UserError
from piccolo_jax.types import TrainState

DATA = ["a.jsonl-0123", "b.jsonl-4567"]
MODEL = {"pooling": "cls", "hidden_act": "gelu"}
OPTIMIZER = optax.adamw(1e-3)


def config(**fields):
    c = Config(**fields)
    c.data.datasets = (DatasetConfig(path="a.jsonl"), DatasetConfig(path="b.jsonl"))
    return c


def state(step, shape=(60, 70)):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    kernel = jax.random.normal(jax.random.key(step), shape)
    params = jax.device_put({"layer": {"kernel": kernel, "bias": jnp.zeros(shape[1])}}, whole)
    made = build.make_state(params, OPTIMIZER, mesh)
    return made.replace(step=jax.device_put(np.int32(step), whole))


def abstract(values):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), values
    )


def save(workdir, *steps, keep=2, about=None):
    with Checkpoints(workdir, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), About(about or config(), DATA, MODEL))
    return checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    save(workdir, 4, 8)
    return workdir


@pytest.fixture(autouse=True)
def _own_hook(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    yield
    gc.collect()  # what a failed read left, while it is silenced


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def test_the_latest_state_comes_back_bit_by_bit(saved):
    checkpoints = Checkpoints(saved)
    assert checkpoints.latest == 8
    restored = checkpoints.restore(abstract(state(8)))
    assert isinstance(restored, TrainState)
    assert jax.tree.structure(restored) == jax.tree.structure(state(8))
    jax.tree.map(np.testing.assert_array_equal, restored, state(8))
    assert restored.params["layer"]["kernel"].sharding == state(8).step.sharding


def test_the_parameters_can_be_read_alone(saved):
    params = Checkpoints(saved).restore_params(abstract(state(8).params))
    jax.tree.map(np.testing.assert_array_equal, params, state(8).params)


def test_config_and_data_are_in_the_checkpoint(saved):
    assert Checkpoints(saved).about() == About(config(), DATA, MODEL)


def test_only_the_newest_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep=3)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [2, 3, 4]


def test_reading_keeps_them_all(copied):
    Checkpoints(copied).about()
    assert sorted(p.name for p in (copied / "checkpoints").iterdir()) == ["4", "8"]


def test_a_step_is_saved_once(copied):
    before = {p: p.stat().st_mtime_ns for p in copied.rglob("*")}
    save(copied, 8)
    assert {p: p.stat().st_mtime_ns for p in copied.rglob("*")} == before


def test_the_same_config_and_data_pass(saved):
    same = config()
    same.log.every = 1
    Checkpoints(saved).check(About(same, DATA, MODEL))


def test_another_config_or_other_data_are_refused_with_the_difference(saved):
    other = copy.deepcopy(config(seed=1))
    other.optim.learning_rate = 2e-5
    with pytest.raises(UserError) as raised:
        Checkpoints(saved).check(About(other, DATA, MODEL))
    message = str(raised.value)
    assert message.startswith(f"{saved / 'checkpoints'} is of a run with another config:\n")
    assert "  optim.learning_rate: 1e-05 -> 2e-05\n  seed: 0 -> 1\n" in message
    assert "another --workdir" in message
    with pytest.raises(UserError, match=r"content of dataset: b\.jsonl-4567 -> b\.jsonl-89ab\n"):
        Checkpoints(saved).check(About(config(), [DATA[0], "b.jsonl-89ab"], MODEL))
    with pytest.raises(UserError, match="content of dataset: None -> c"):
        Checkpoints(saved).check(About(config(), [*DATA, "c"], MODEL))


def test_a_run_that_is_to_be_shorter_than_it_is_already_is_refused(tmp_path):
    about = config(total_steps=12)
    about.optim.schedule = "constant"
    save(tmp_path, 12, about=about)
    Checkpoints(tmp_path).check(About(about, DATA, MODEL))
    about.total_steps = 11
    with pytest.raises(UserError, match=r"config\.total_steps = 11: .* step 12 already"):
        Checkpoints(tmp_path).check(About(about, DATA, MODEL))


def offered(workdir, scores, metric="a/spearman@8"):
    """What is kept of weights with these scores, (step, score) each."""
    with Best(workdir, metric) as best:
        for step, score in scores:
            best.offer(step, score, state(step), About(config(), DATA, MODEL))
    return Best(workdir)


def test_the_best_weights_are_kept_whatever_comes_later(tmp_path):
    best = offered(tmp_path, [(0, 0.1), (2, 0.7), (4, 0.3), (6, 0.7), (8, float("nan"))])
    assert [p.name for p in (tmp_path / "best").iterdir()] == ["2"]
    assert (best.latest, best.score, best.about()) == (2, 0.7, About(config(), DATA, MODEL))
    params = best.restore_params(abstract(state(2).params))
    jax.tree.map(np.testing.assert_array_equal, params, state(2).params)


def test_the_best_is_still_known_when_a_run_goes_on(tmp_path):
    offered(tmp_path, [(2, 0.5), (4, 0.6)])
    assert offered(tmp_path, [(6, 0.6)]).latest == 4
    # Gone back to a checkpoint before step 4, on other machines: it scores otherwise.
    assert offered(tmp_path, [(2, 0.5), (3, 0.61)]).latest == 3
    assert [p.name for p in (tmp_path / "best").iterdir()] == ["3"]
    assert offered(tmp_path, [(3, 0.7)]).score == 0.61  # what is there of a step stays


def test_another_metric_begins_anew(tmp_path):
    offered(tmp_path, [(2, 0.9)])
    best = offered(tmp_path, [(4, 0.2), (6, 0.1)], metric="b/ndcg_at_10@8")
    assert (best.latest, best.score) == (4, 0.2)
    assert [p.name for p in (tmp_path / "best").iterdir()] == ["4"]


def test_of_the_best_only_the_weights_are_kept(tmp_path):
    average = jax.tree.map(lambda x: x + 1, state(2).params)
    with Best(tmp_path, "m") as best:
        best.offer(2, 0.5, state(2).replace(average=average), About(config(), DATA, MODEL))
    restored = Best(tmp_path).restore_average(abstract(average))
    jax.tree.map(np.testing.assert_array_equal, restored, average)
    with pytest.raises(UserError, match="best/2: this checkpoint can't be read"):
        Best(tmp_path).restore(abstract(state(2)))


def test_where_no_best_was_kept_reading_it_is_an_error(saved):
    with pytest.raises(UserError, match="/best: holds no complete checkpoint"):
        Best(saved).about()


def test_reading_where_there_is_no_checkpoint_is_an_error_and_makes_no_folder(tmp_path):
    with pytest.raises(UserError, match="run/checkpoints: holds no complete checkpoint"):
        Checkpoints(tmp_path / "run").about()
    assert not list(tmp_path.iterdir())


def test_an_unfinished_checkpoint_is_not_read(copied):
    latest = copied / "checkpoints" / "8"
    latest.rename(latest.with_name("8.orbax-checkpoint-tmp-123"))
    assert Checkpoints(copied).latest == 4
    assert Checkpoints(copied).restore(abstract(state(4))).step == 4


def largest(directory):
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: os.truncate(largest(state / "ocdbt.process_0"), 100),
        lambda state: largest(state / "ocdbt.process_0").unlink(),
        lambda state: os.truncate(state / "_METADATA", 20),
        lambda state: (state / "manifest.ocdbt").unlink(),
        shutil.rmtree,
    ],
    ids=["data cut", "data missing", "metadata cut", "manifest missing", "all missing"],
)
def test_a_damaged_checkpoint_is_an_error_that_names_it_and_the_remedy(copied, capfd, damage):
    damage(copied / "checkpoints" / "8" / "state")
    with pytest.raises(UserError) as raised:
        Checkpoints(copied).restore(abstract(state(8)))
    message = str(raised.value)
    assert message.startswith(f"{copied / 'checkpoints' / '8'}: this checkpoint can't be read (")
    assert "delete it: the run then goes on from the one before" in message
    assert "\n" not in message
    shutil.rmtree(copied / "checkpoints" / "8")
    assert Checkpoints(copied).restore(abstract(state(4))).step == 4
    assert "Traceback" not in capfd.readouterr().err


READ = """
import sys
sys.path.insert(0, sys.argv[1])
import pathlib, test_checkpoint as t
from piccolo_jax import cli
workdir = pathlib.Path(sys.argv[2])
cli.run(lambda _: t.Checkpoints(workdir).restore(t.abstract(t.state(8))))
"""


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_checkpoint_is_one_line_on_standard_error(copied, run_python, damage):
    state = copied / "checkpoints" / "8" / "state"
    if damage == "cut":
        os.truncate(largest(state / "ocdbt.process_0"), 100)
    else:
        (state / "manifest.ocdbt").unlink()
    done = run_python("-c", READ, Path(__file__).parent, copied, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def flip_bits(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def test_a_flipped_byte_of_the_arrays_is_an_error(copied):
    flip_bits(largest(copied / "checkpoints" / "8" / "state" / "ocdbt.process_0"))
    for restore in (
        lambda read: read.restore(abstract(state(8))),
        lambda read: read.restore_params(abstract(state(8)).params),
    ):
        with pytest.raises(
            UserError, match=r"checkpoints/8: this checkpoint can't be read \(state"
        ):
            restore(Checkpoints(copied))


def test_another_model_in_the_place_of_init_is_refused_with_the_difference(tmp_path):
    about = About(config(), DATA, MODEL)
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(3, state(3), about)
    Checkpoints(tmp_path).check(about)
    now = dataclasses.replace(about, model=MODEL | {"pooling": "mean"})
    with pytest.raises(
        UserError, match=r"another model in config\.model\.init(.|\n)*pooling: 'cls' -> "
    ):
        Checkpoints(tmp_path).check(now)


@pytest.mark.parametrize("notes", ["[]", '{"config": {}, "data": []}'])
def test_notes_of_another_form_are_an_error(copied, notes):
    (copied / "checkpoints" / "8" / "about" / "metadata").write_text(notes)
    with pytest.raises(
        UserError, match=r"this checkpoint can't be read .*lacks config, data or model"
    ):
        Checkpoints(copied).about()


def test_damaged_notes_are_an_error_too(copied):
    os.truncate(copied / "checkpoints" / "8" / "about" / "metadata", 30)
    with pytest.raises(UserError, match="checkpoints/8: this checkpoint can't be read"):
        Checkpoints(copied).check(About(config(), DATA, MODEL))


def test_parameters_of_other_shapes_are_not_read(saved):
    with pytest.raises(UserError, match="this checkpoint can't be read"):
        Checkpoints(saved).restore(abstract(state(8, shape=(60, 71))))
    with pytest.raises(UserError, match="this checkpoint can't be read"):
        Checkpoints(saved).restore_params(abstract(state(8, shape=(59, 70)).params))
