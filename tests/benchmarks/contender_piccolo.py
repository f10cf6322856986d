"""This project's train step, as piccolo_jax.train drives it."""

import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from common import (
    DATASETS,
    LEARNING_RATE,
    LENGTH,
    MOST_SLOTS_KEPT,
    QUERY_LENGTH,
    Rows,
    Settings,
    StepReport,
    best_rate,
    encoder_flops,
    peak_size,
)

from piccolo_jax import build, optim, sharding
from piccolo_jax.config import Config, DatasetConfig, validate
from piccolo_jax.data.loader import Batches
from piccolo_jax.data.prepare import prepare_datasets
from piccolo_jax.tasks import TASKS
from piccolo_jax.train_step import CompiledSteps


class Contender:
    """float32; one mesh of one device."""

    dtype = "float32"

    def __init__(self, settings: Settings):
        self._settings = settings
        self._hf_config = json.loads((Path(settings.model) / "config.json").read_text())
        config = self._config(settings)
        self._parts = build.build(config)
        self._mesh = sharding.make_mesh(config.mesh)
        self._folder = tempfile.TemporaryDirectory()
        self.prepare_seconds: dict[str, float] = {}  # per row
        stores = []
        for dataset in settings.datasets:
            started = time.perf_counter()
            only = self._config(settings, dataset)
            stores += prepare_datasets(
                only, self._parts.tokenizer, TASKS, Path(self._folder.name) / dataset
            )
            seconds = time.perf_counter() - started
            self.prepare_seconds[dataset] = seconds / stores[-1].store.num_rows
        assert [len(rows) for rows in Rows(settings).rows.values()] == [
            dataset.store.num_rows for dataset in stores
        ]

        shardings = build.param_shardings(self._parts.model, self._mesh)
        optimizer = optim.make_optimizer(
            config, build.abstract_params(self._parts.model, shardings)
        )
        params = build.make_params(self._parts, config.seed, shardings)
        self._state = build.make_state(params, optimizer, self._mesh)
        state_shardings = jax.tree.map(lambda leaf: leaf.sharding, self._state)

        def pipeline(micro_batches: int) -> tuple[Batches, CompiledSteps]:
            config = self._config(settings)
            config.train.micro_batches = micro_batches
            hidden = self._parts.model.backbone.hidden_size
            batches = Batches(config, stores, TASKS, hidden, 1, (0,))
            steps = CompiledSteps(
                self._parts.model, TASKS, config, optimizer, self._mesh, state_shardings
            )
            return batches, steps

        whole = pipeline(1)
        slots = [plan.shape.rows * plan.shape.length for plan in whole[0].plans]
        chunks = [1 if n <= MOST_SLOTS_KEPT else math.ceil(4 * n / MOST_SLOTS_KEPT) for n in slots]
        pipelines = {1: whole} | {n: pipeline(n) for n in set(chunks) - {1}}
        self._pipelines = dict(
            zip(settings.datasets, map(pipelines.__getitem__, chunks), strict=True)
        )
        self._steps_of = _steps_of(whole[0], settings.datasets)

    def step(self, dataset: str, use: int) -> StepReport:
        batches, steps = self._pipelines[dataset]
        started, cpu_started = time.perf_counter(), time.process_time()
        batch = batches.at(self._steps_of(dataset, use))
        arrays = sharding.global_batch(self._mesh, batch.sharded, batch.replicated)
        cpu_compiling, compiling = time.process_time(), time.perf_counter()
        program, _ = steps.get(batch.task, batch.shape, self._state, arrays)
        cpu_compiled, compiled = time.process_time(), time.perf_counter()
        self._state, metrics = program(self._state, arrays)
        loss = float(jax.device_get(metrics)["loss"])
        jax.block_until_ready(self._state)
        # The file was tokenised once, before; a row's part of that belongs to its step.
        tokenised = self.prepare_seconds[dataset] * self._settings.batch
        shape = (batch.shape.rows, batch.shape.length)
        return StepReport(
            loss,
            time.perf_counter() - started - (compiled - compiling) + tokenised,
            time.process_time() - cpu_started - (cpu_compiled - cpu_compiling) + tokenised,
            compiled - compiling,
            math.prod(shape),
            batch.num_tokens,
            encoder_flops(self._hf_config, [shape]),
        )

    def peak(self) -> float:
        """FLOP per second of a large product, with a float32 result."""
        x = jnp.ones((peak_size(), peak_size()), self.dtype)
        multiply = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
        multiply(x).block_until_ready()
        return best_rate(lambda: multiply(x).block_until_ready())

    def _config(self, settings: Settings, *datasets: str) -> Config:
        config = Config(total_steps=10_000, batch_size=settings.batch)
        config.model.init, config.model.dtype = settings.model, self.dtype
        config.model.embed_dim = 1792
        config.optim.learning_rate, config.optim.schedule = LEARNING_RATE, "constant"
        config.data.query_max_length, config.data.max_length = QUERY_LENGTH, LENGTH
        config.data.datasets = tuple(
            DatasetConfig(path=str(Path(settings.data) / DATASETS[name][1]), task=DATASETS[name][0])
            for name in datasets or settings.datasets
        )
        validate(config)
        return config


class ContenderBfloat16(Contender):
    """Matrix products in bfloat16."""

    dtype = "bfloat16"


def _steps_of(batches: Batches, datasets: tuple[str, ...]) -> Any:
    """(dataset, use) -> number of the step, so that at() serves a chosen batch."""
    found: dict[tuple[int, int], int] = {}

    def step(dataset: str, use: int) -> int:
        key = (datasets.index(dataset), use)
        while key not in found:
            found[batches.schedule.at(len(found))] = len(found)
        return found[key]

    return step
