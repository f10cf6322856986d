"""The train step: a pure function (state, batch) -> (state, metrics), and its programs."""

import time
from collections.abc import Callable

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from piccolo_jax import averaging, optim
from piccolo_jax.config import Config
from piccolo_jax.data.packing import Shape
from piccolo_jax.models.embedder import Embedder, encode
from piccolo_jax.ops.products import compiler_options
from piccolo_jax.tasks import Task
from piccolo_jax.types import Batch, Metrics, Params, TrainState

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_step(
    model: Embedder,
    task: Task,
    config: Config,
    optimizer: optax.GradientTransformation,
    chunks: int = 1,
) -> Step:
    """The step of one task type, encoding in `chunks`. Jit it under the mesh, the state donated.

    Metrics: `loss` with the task's weight, `grad_norm` over trained parameters before clipping,
    and what the loss reports.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        dropout = jax.random.fold_in(jax.random.key(config.seed), state.step)

        def loss_fn(params: Params) -> tuple[jax.Array, Metrics]:
            params = jax.tree.map(
                lambda p, stop: jax.lax.stop_gradient(p) if stop else p,
                params,
                optim.frozen(params, config.model.freeze),
            )
            embeddings = encode(model, params, batch, dropout, chunks)
            return task.loss(embeddings, batch, config.loss)

        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), **metrics}
        done = state.step + 1
        average = averaging.update(state.average, params, done, config.optim.ema_decay)
        return TrainState(done, params, opt_state, average), metrics

    return step


class CompiledSteps:
    """Steps compiled ahead of time, one per task type, shape and rows of the batch; none unsaid."""

    def __init__(
        self,
        model: Embedder,
        tasks: dict[str, Task],
        config: Config,
        optimizer: optax.GradientTransformation,
        mesh: Mesh,
        shardings: TrainState,
    ):
        self._mesh, self._shardings, self._tasks = mesh, shardings, tasks
        self._options = lambda shape: compiler_options(
            model.dtype, model.for_cpu, shape.rows * shape.length // shape.chunks
        )
        self._make_step = lambda task, chunks: make_step(
            model, tasks[task], config, optimizer, chunks
        )
        self._programs: dict[tuple[str, Shape, int], jax.stages.Compiled] = {}

    def get(
        self, task: str, shape: Shape, state: TrainState, batch: Batch
    ) -> tuple[jax.stages.Compiled, float]:
        """The program for a batch, and the seconds that compiling it took (0: it was there)."""
        key = (task, shape, batch[self._tasks[task].text_arrays[0]].shape[0])
        if key in self._programs:
            return self._programs[key], 0.0
        started = time.monotonic()
        whole = NamedSharding(self._mesh, PartitionSpec())
        with jax.set_mesh(self._mesh):
            step = jax.jit(
                self._make_step(task, shape.chunks),
                donate_argnums=0,
                out_shardings=(self._shardings, whole),
                compiler_options=self._options(shape),
            )
            self._programs[key] = step.lower(state, batch).compile()
        return self._programs[key], time.monotonic() - started
