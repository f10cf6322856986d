"""Trains an embedding model.

    python -m piccolo_jax.train --config=configs/NAME.py --workdir=DIR [--config.FIELD=VALUE ...]

Started again with the same command, it goes on from its last checkpoint. WORKDIR gets config.json,
tokenizer/, metrics.jsonl, eval.jsonl, prepared/, checkpoints/, best/ (where
config.checkpoint.best_metric says what is best) and, at the end, export/.
"""

import contextlib
import os
import shlex
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils

from piccolo_jax import (
    averaging,
    build,
    cli,
    distributed,
    export,
    locks,
    metrics,
    optim,
    runs,
    sharding,
)
from piccolo_jax import config as config_lib
from piccolo_jax.checkpoint import DIRECTORY as CHECKPOINTS
from piccolo_jax.checkpoint import About, Best, Checkpoints
from piccolo_jax.config import Config
from piccolo_jax.data import mixing
from piccolo_jax.data.loader import Batches, HostBatch
from piccolo_jax.data.prepare import prepare_datasets
from piccolo_jax.errors import UserError
from piccolo_jax.evaluation.encoder import Encoder
from piccolo_jax.evaluation.local import open_datasets
from piccolo_jax.evaluation.while_training import Evaluations, before_and_after, check_best_metric
from piccolo_jax.exporting.record import read_record
from piccolo_jax.metrics import say
from piccolo_jax.mining.while_training import ChangingNegatives
from piccolo_jax.tasks import TASKS
from piccolo_jax.train_step import CompiledSteps

_STEPS_IN_FLIGHT = 2


def main(argv: list[str]) -> int:
    """The command; returns the exit code."""
    config, workdir = cli.parse_config(argv, __doc__ or "")
    distributed.start()
    with contextlib.ExitStack() as held:
        return _train(config, workdir, held)


def _train(config: Config, workdir: Path, held: contextlib.ExitStack) -> int:
    """Returns the exit code; `held` gets the lock of the workdir."""
    # Model and mesh.
    distributed.check_same(config=config_lib.to_json(config))
    is_first = jax.process_index() == 0
    with distributed.agreed("starting"):
        parts = build.build(config)
        mesh = sharding.make_mesh(config.mesh)
        shardings = build.param_shardings(parts.model, mesh)
        evals = open_datasets(config.eval.datasets)
        check_best_metric(config, evals)
        _check_workdir(workdir, config)
        if not any((workdir / CHECKPOINTS).glob("[0-9]*")):
            build.check_weights(parts)
    if not distributed.sees_first(workdir):
        raise UserError(f"--workdir={workdir}: must be a folder that all processes share")

    # Data.
    prepared_dir = Path(config.data.prepared_dir or workdir / "prepared")
    datasets = distributed.first_then_rest(
        prepared_dir,
        "preparing the data",
        lambda: prepare_datasets(config, parts.tokenizer, TASKS, prepared_dir, quiet=not is_first),
    )
    batches = Batches(
        config, datasets, TASKS, parts.model.backbone.hidden_size,
        sharding.batch_shards_of(mesh), sharding.local_shards(mesh), quiet=not is_first,
    )  # fmt: skip
    fingerprints = [f"{s.name}-{s.manifest['fingerprint']}" for s in batches.stores]
    epochs = mixing.epochs_table(batches.mixture, batches.schedule, config.total_steps)
    about = About(config, fingerprints, build.describe(parts))
    _say_datasets(batches, epochs, config.total_steps)

    # State: new, or that of the last checkpoint.
    with distributed.agreed("opening the workdir"):
        if is_first:
            held.enter_context(_lock(workdir))
    abstract_params = build.abstract_params(parts.model, shardings)
    optimizer = optim.make_optimizer(config, abstract_params)
    checkpoints = Checkpoints(workdir, config.checkpoint.keep)
    distributed.check_same(prepared_data=fingerprints, latest_checkpoint=checkpoints.latest)
    if checkpoints.latest is None:
        _say_model(parts, abstract_params, mesh)
        params = build.make_params(parts, config.seed, shardings)
        average = averaging.averaged(config, params)
        state = build.make_state(params, optimizer, mesh, average)
    else:
        checkpoints.check(about)
        average = averaging.averaged(config, abstract_params)
        abstract_state = build.abstract_state(abstract_params, optimizer, mesh, average)
        state = checkpoints.restore(abstract_state)
        say(f"resuming after step {checkpoints.latest} of {checkpoints.directory}")
    with distributed.agreed("writing the config"):
        if is_first:
            if checkpoints.latest is None or not (workdir / runs.TOKENIZER).is_dir():
                runs.keep_tokenizer(workdir, parts)
            _write_config(workdir, config)
    first_step = int(state.step)
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    # Evaluation, before the first step; what the log has of that step is not done again.
    logged = -1 if checkpoints.latest is None else first_step
    log = metrics.JsonLines(workdir / "metrics.jsonl", logged)
    encoder = Encoder(parts.model, parts.tokenizer, mesh, config.data.max_length)
    evaluations = Evaluations(config, evals, encoder, workdir / "eval.jsonl", logged)
    negatives = ChangingNegatives(config, batches.stores, encoder)
    if checkpoints.latest is not None and negatives.save():
        negatives.restore(checkpoints.restore_negatives())

    best_metric = config.checkpoint.best_metric
    best = Best(workdir, best_metric) if best_metric else None

    def evaluate(step: int) -> None:
        scores = evaluations.run(step, state)
        if best and best.offer(step, scores[best_metric], state, about):
            say(f"step {step}: the best so far, {best_metric} = {best.score:.4f}")

    if evaluations.due(first_step):
        evaluate(first_step)

    # Compile every planned shape.
    steps = CompiledSteps(parts.model, TASKS, config, optimizer, mesh, state_shardings)

    def program(batch: HostBatch, arrays: Any) -> Any:
        compiled, seconds = steps.get(batch.task, batch.shape, state, arrays)
        if seconds:
            rows = sharding.batch_shards_of(mesh) * batch.shape.rows
            say(
                f"compiled {batch.task}, {rows} rows of {batch.shape.length} tokens, in"
                f" {seconds:.1f} s"
            )
        return compiled

    for step in _first_uses(batches, first_step, config.total_steps):
        batch = batches.at(step)
        program(batch, sharding.global_batch(mesh, batch.sharded, batch.replicated))

    # Loop. A checkpoint at t is saved before batch t is used.
    learning_rate = optim.learning_rate(config.optim, config.total_steps)
    in_flight: list[tuple[HostBatch, Any]] = []
    recent = _Rate(log.kept)
    bar = tqdm.tqdm(
        total=config.total_steps, initial=first_step, unit=" steps", desc="training",
        disable=not is_first,
    )  # fmt: skip

    def finish_oldest(at_stop: bool = False) -> None:
        batch, values = in_flight.pop(0)
        values = {name: float(value) for name, value in jax.device_get(values).items()}
        step = batch.step + 1
        if not np.isfinite([values["loss"], values["grad_norm"]]).all():
            raise UserError(
                f"step {step}, dataset {batch.dataset}: the loss is {values['loss']} and the norm"
                f" of its gradient {values['grad_norm']}; the checkpoints before it are kept. Lower"
                " optim.learning_rate, raise a temperature, or use model.dtype=float32"
            )
        recent.add(batch.rows, batch.num_tokens)
        bar.set_postfix_str(f"{batch.task} loss {values['loss']:.4f}", refresh=False)
        bar.update()
        if step % config.log.every == 0 or step in (first_step + 1, config.total_steps) or at_stop:
            log.write(
                {
                    "step": step,
                    "task": batch.task,
                    "dataset": batch.dataset,
                    **values,
                    "learning_rate": float(learning_rate(batch.step)),
                    **recent.take(),
                    "fill": round(batch.fill, 4),
                    "epoch": round(batch.epoch, 4),
                    **({"mixture": epochs} if step == 1 else {}),
                    **({"hardware": metrics.hardware()} if step == first_step + 1 else {}),
                }
            )

    def all_batches() -> Iterator[HostBatch]:
        """Batches are read ahead as far as the negatives that they draw from stay the same."""
        step = first_step
        while step < config.total_steps:
            while in_flight:
                finish_oldest()
            negatives.update(step, state.params)
            stop = negatives.next_change(step, config.total_steps)
            yield from batches.start(step, stop)
            step = stop

    saving = best or contextlib.nullcontext()
    with _stop_signal() as stop_asked, contextlib.closing(bar), checkpoints, saving:
        for batch in all_batches():
            arrays = sharding.global_batch(mesh, batch.sharded, batch.replicated)
            state, values = program(batch, arrays)(state, arrays)
            in_flight.append((batch, values))
            if len(in_flight) >= _STEPS_IN_FLIGHT:
                finish_oldest()
            done = batch.step + 1
            stopping = stop_asked(done)
            last = done == config.total_steps
            at_checkpoint = config.checkpoint.every and done % config.checkpoint.every == 0
            if last or stopping or at_checkpoint or evaluations.due(done):
                while in_flight:  # what a resumed run counts on from must be logged
                    finish_oldest(len(in_flight) == 1 and bool(stopping or at_checkpoint))
            if last or stopping or at_checkpoint:
                if best:
                    best.wait()  # or a run that goes on from here might not know it
                checkpoints.save(done, state, about, negatives.save())
            if stopping and not last:
                checkpoints.wait()
                say(f"stopped after step {done}; the same command goes on from there")
                return 128 + stopping
            if evaluations.due(done) and not last:
                evaluate(done)

    # Results.
    if first_step < config.total_steps:
        evaluate(config.total_steps)
    if best:
        best.wait()
    output = workdir / "export"
    params = multihost_utils.process_allgather(
        averaging.weights_of(state.average, state.params), tiled=True
    )
    with distributed.agreed("writing the export"):
        if is_first:
            for left in workdir.glob("export.partial-*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            weights = averaging.default_weights(config)
            record = read_record(workdir, config, config.total_steps, weights)
            export.write(output, params, parts, config, overwrite=True, record=record)
    _say_results(workdir, config, checkpoints, best, output)
    return 0


def _check_workdir(workdir: Path, config: Config) -> None:
    """Raises UserError if the folder can't be used, or holds what is no run's or another config's.

    A run writes its config before anything else that would be overwritten here.
    """
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        learnt = [*(workdir / CHECKPOINTS).glob("[0-9]*"), *workdir.glob("export")]
        if not path.exists():
            names = ("metrics.jsonl", "eval.jsonl", "export")
            if foreign := [name for name in names if (workdir / name).exists()]:
                raise UserError(
                    f"--workdir={workdir}: has {foreign[0]} but no config.json of a run, which"
                    " would overwrite it"
                )
            return
        before = config_lib.from_json(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UserError(f"--workdir={workdir}: can't be used ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a run's config ({error}); give another --workdir") from error
    except UserError as error:
        raise UserError(f"{error}; give another --workdir") from error
    if learnt and (changes := config_lib.diff(before, config)):
        raise UserError(config_lib.refusal(path, changes))


def _lock(workdir: Path) -> contextlib.AbstractContextManager:
    """Keeps other runs out of the folder. Raises UserError if one is in it."""
    try:
        lock = locks.take(workdir / "lock")
    except OSError as error:
        raise UserError(f"--workdir={workdir}: can't be used ({error.strerror})") from error
    if lock is None:
        raise UserError(
            f"--workdir={workdir}: another process trains there; wait for it to end, or give"
            " another --workdir"
        )
    return lock


def _write_config(workdir: Path, config: Config) -> None:
    partial = workdir / "config.json.partial"
    partial.write_text(config_lib.to_json(config), encoding="utf-8")
    os.replace(partial, workdir / "config.json")


def _first_uses(batches: Batches, first_step: int, stop_step: int) -> list[int]:
    """The first step from `first_step` on of each dataset, as far as the run has one."""
    firsts: dict[int, int] = {}
    for step in range(first_step, min(stop_step, first_step + 10_000)):
        firsts.setdefault(batches.schedule.at(step)[0], step)
        if len(firsts) == len(batches.stores):
            break
    return list(firsts.values())


class _Rate:
    """Rows and tokens per second since the last call of take(), and totals of the whole run.

    `kept`: the lines of metrics.jsonl of what the run did before it was stopped.
    """

    def __init__(self, kept: list[dict[str, Any]]) -> None:
        last = kept[-1] if kept else {}
        self._total_tokens = int(last.get("total_tokens", 0))
        self._start = time.monotonic() - float(last.get("total_seconds", 0.0))
        self._reset()

    def _reset(self) -> None:
        self._rows, self._tokens, self._since = 0, 0, time.monotonic()

    def add(self, rows: int, tokens: int) -> None:
        self._rows, self._tokens = self._rows + rows, self._tokens + tokens
        self._total_tokens += tokens

    def take(self) -> dict[str, float]:
        seconds = max(time.monotonic() - self._since, 1e-9)
        rates = {
            "rows_per_second": round(self._rows / seconds, 2),
            "tokens_per_second": round(self._tokens / seconds, 1),
            "total_tokens": self._total_tokens,
            "total_seconds": round(time.monotonic() - self._start, 2),
        }
        self._reset()
        return rates


@contextlib.contextmanager
def _stop_signal() -> Iterator[Any]:
    """Yields stop_asked(step) -> signal number or 0, the same on all processes.

    SIGINT and SIGTERM then end the run after the current step, with a checkpoint; a second one
    ends it at once.
    """
    received = 0

    def receive(number: int, _: Any) -> None:
        nonlocal received
        received = number
        signal.signal(number, before[signal.Signals(number)])
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    def stop_asked(step: int) -> int:
        if several:
            agreed = multihost_utils.reached_preemption_sync_point(step)
            return int(signal.SIGTERM) if agreed else 0
        return received

    # Several processes must agree on a step: JAX catches SIGTERM, of any of them, and sees to that.
    several = jax.process_count() > 1
    numbers = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, receive)
    try:
        yield stop_asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say_datasets(batches: Batches, epochs: list[dict[str, Any]], total_steps: int) -> None:
    rows = []
    for store, plan, mix in zip(batches.stores, batches.plans, epochs, strict=True):
        m = store.manifest
        rows.append([
            store.name, store.task, m["rows"], m["rejected"], m["texts"], m["mean_tokens"],
            m["truncated_texts"], f"{plan.shape.rows} x {plan.shape.length}", f"{plan.fill:.0%}",
            mix["used"], mix["batch_size"], f"{mix['share']:.2%}", mix["steps"],
            f"{mix['epochs']:.2f}",
        ])  # fmt: skip
        if m.get("dropped", {}).get("rows"):
            say(
                f"{store.name}: {m['dropped']['rows']} rows dropped that occur in evaluation sets;"
                " all in dropped.jsonl beside the dataset's manifest.json"
            )
        if m["rejected"]:
            first = m["rejected_rows"][0]
            say(
                f"{store.name}: {m['rejected']} rows rejected, the first at {first['place']}:"
                f" {first['reason']}; all in the dataset's manifest.json"
            )
    header = (
        "dataset", "task", "rows", "rejected", "texts", "tokens", "cut", "packed", "filled",
        "used", "batch", "share", "steps", "epochs",
    )  # fmt: skip
    say(metrics.table(header, rows))
    for note in (*batches.notes, *mixing.remarks(epochs, total_steps)):
        say(note)


def _say_model(parts: build.Parts, abstract_params: Any, mesh: Any) -> None:
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract_params))
    model = parts.model
    source = f"weights of {parts.init}" if parts.init else "random weights"
    if not model.embed_dim:
        scaling = "no scaling layer"
    elif parts.scaling_init:
        scaling = f"its scaling layer to {model.embed_dim}"
    else:
        scaling = f"a new scaling layer to {model.embed_dim}, drawn by the seed (orthogonal)"
    say(
        f"{count / 1e6:.1f}M parameters: {source}, {scaling}, {model.pooling} pooling;"
        f" products in {np.dtype(model.dtype).name}; mesh {dict(mesh.shape)}"
    )


def _say_results(
    workdir: Path, config: Config, checkpoints: Checkpoints, best: Best | None, output: Path
) -> None:
    if table := before_and_after(workdir / "eval.jsonl", config):
        say(f"\n{table}")
    export_path, run_path = shlex.quote(str(output)), shlex.quote(str(workdir))
    say(
        f"\ncheckpoint: {checkpoints.directory / str(checkpoints.latest)}"
        + (
            f"\nbest:       {best.directory / str(best.latest)}  ({best.metric} = {best.score:.4f};"
            f" python -m piccolo_jax.export --workdir={run_path} --checkpoint=best --output=DIR)"
            if best
            else ""
        )
        + f"\nexport:     {output}  (a sentence-transformers directory)"
        f"\nnext:       python -m piccolo_jax.verify {export_path} --workdir={run_path}"
        f"\n            python -m piccolo_jax.embed --model={export_path} --input=FILE.jsonl"
        " --output=FILE.npy"
    )


if __name__ == "__main__":
    cli.run(main)
