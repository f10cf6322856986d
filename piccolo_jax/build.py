"""From a config to the model, its tokenizer, and parameters in their places on the mesh."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from piccolo_jax import config as config_lib
from piccolo_jax import sharding
from piccolo_jax.config import Config
from piccolo_jax.data.tokenizer import Tokenizer
from piccolo_jax.errors import UserError
from piccolo_jax.models import pretrained
from piccolo_jax.models.bert import BertConfig
from piccolo_jax.models.embedder import Embedder, embedder_rules
from piccolo_jax.types import Params, TrainState

_RANDOM_DROPOUT = 0.1  # of a BERT from random weights, as published


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a config names: the model, its tokenizer, and where its weights come from."""

    model: Embedder
    tokenizer: Tokenizer
    init: Path | None  # directory of the weights; None: random
    scaling_init: bool  # whether `init` holds the scaling layer


def build(config: Config, platform: str | None = None) -> Parts:
    """What `config` names, to run on `platform` (default: that of this process's devices).

    Raises UserError where model, tokenizer, lengths and prefixes don't fit each other.
    """
    model, data = config.model, config.data
    init = pretrained.resolve(model.init) if model.init else None
    spec = (
        pretrained.read_spec(init, model.pooling, unlisted_dense=bool(model.embed_dim))
        if init
        else spec_of_sizes(config)
    )
    embedder = make_model(config, spec, platform or jax.default_backend())
    backbone = embedder.backbone
    for name in ("query_max_length", "max_length"):
        if getattr(data, name) > backbone.max_positions:
            raise UserError(
                f"config.data.{name} = {getattr(data, name)}: must be at most"
                f" {backbone.max_positions}, the positions of {model.init}"
            )
    tokenizer = (
        Tokenizer(model.tokenizer)
        if model.tokenizer
        else Tokenizer(spec.tokenizer, lower_case=spec.lower_case)
    )
    if tokenizer.vocab_size > backbone.vocab_size:
        raise UserError(
            f"config.model.tokenizer = {model.tokenizer!r}: has {tokenizer.vocab_size} token ids,"
            f" but the model has {backbone.vocab_size} (model.vocab_size, or that of model.init)"
        )
    if not init:
        backbone = dataclasses.replace(backbone, pad_token_id=tokenizer.hf.pad_token_id or 0)
        embedder = embedder.clone(backbone=backbone)
    return Parts(embedder, tokenizer, init, bool(model.embed_dim and spec.embed_dim))


def describe(parts: Parts) -> dict[str, Any]:
    """What the config leaves to `model.init`, and decides what a run learns: plain values."""
    backbone = dataclasses.asdict(parts.model.backbone)
    return backbone | {
        "pooling": parts.model.pooling,
        "tokenizer": parts.tokenizer.fingerprint,
        "lower_case": parts.tokenizer.lower_case,
    }


def rebuild(config: Config, described: dict[str, Any], tokenizer: Path) -> Parts:
    """The parts that describe() said this of, with the tokenizer of a folder; without weights.

    Raises KeyError for what it doesn't say.
    """
    fields = [f.name for f in dataclasses.fields(BertConfig)]
    backbone = BertConfig(**{name: described[name] for name in fields})
    spec = pretrained.Pretrained(Path(), backbone, described["pooling"])
    model = make_model(config, spec, jax.default_backend())
    return Parts(model, Tokenizer(tokenizer, described["lower_case"]), None, False)


def spec_of_sizes(config: Config) -> pretrained.Pretrained:
    """What a directory with a model of the config's sizes would say: for random weights."""
    sizes: dict[str, Any] = {
        f.name: getattr(config.model, f.name)
        for f in dataclasses.fields(BertConfig)
        if hasattr(config.model, f.name)
    }
    sizes |= {"hidden_dropout": _RANDOM_DROPOUT, "attention_dropout": _RANDOM_DROPOUT}
    return pretrained.Pretrained(Path(), BertConfig(**sizes))


def make_model(config: Config, spec: pretrained.Pretrained, platform: str) -> Embedder:
    """The model of `spec` as `config` wants it on `platform` ("cpu", "tpu", ...).

    Raises UserError if a prefix is longer than the embedding.
    """
    model, backbone = config.model, spec.backbone
    if model.dropout is not None:
        backbone = dataclasses.replace(
            backbone, hidden_dropout=model.dropout, attention_dropout=model.dropout
        )
    config_lib.validate_width(config, model.embed_dim or backbone.hidden_size)
    embedder = Embedder(
        backbone,
        pooling=model.pooling or spec.pooling or "mean",
        embed_dim=model.embed_dim,
        remat=model.remat,
    )
    return for_platform(embedder, platform, model.dtype, model.layers)


def for_platform(
    model: Embedder, platform: str, dtype: str = "auto", layers: str = "auto"
) -> Embedder:
    """`model` computed as suits `platform`; `dtype` and `layers` are as in config.ModelConfig."""
    on_cpu = platform == "cpu"
    types = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
    return model.clone(
        dtype=types.get(dtype, jnp.float32 if on_cpu else jnp.bfloat16),
        for_cpu=on_cpu,
        kernels=platform == "tpu",
        unrolled=not on_cpu if layers == "auto" else layers == "unrolled",
    )


def param_shardings(model: Embedder, mesh: Mesh) -> Any:
    """A sharding per parameter. Raises UserError if fsdp leaves too much of them whole."""
    rules, shapes = embedder_rules(model.backbone.model_type), _shapes(model)
    sharding.check_split(mesh, shapes, rules)
    return sharding.param_shardings(mesh, shapes, rules)


def abstract_params(model: Embedder, shardings: Any) -> Any:
    """Shape, type and sharding of every parameter."""
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        _shapes(model),
        shardings,
    )


def check_weights(parts: Parts) -> None:
    """Raises UserError for weights that make_params() could not read; reads none of them."""
    if parts.init:
        pretrained.open_params(parts.init, parts.model.backbone, parts.model.embed_dim)


def make_params(parts: Parts, seed: int, shardings: Any) -> Params:
    """Parameters in their shardings: read from the model directory, the rest drawn by the seed."""
    loaded: dict[str, Any] = {}
    if parts.init:
        embed_dim = parts.model.embed_dim
        loaded = pretrained.open_params(parts.init, parts.model.backbone, embed_dim)
    missing = {name: s for name, s in shardings.items() if name not in loaded}
    params = {
        name: jax.tree.map(sharding.place, tree, shardings[name]) for name, tree in loaded.items()
    }
    if missing:
        draw = jax.jit(
            lambda key: {name: _init(parts.model, key)[name] for name in missing},
            out_shardings=missing,
        )
        params |= draw(jax.random.key(seed))
    return params


def make_state(
    params: Params, optimizer: optax.GradientTransformation, mesh: Mesh, average: Params = None
) -> TrainState:
    """The state at step 0; the optimizer's moments and the average lie where their parameters do.

    `average`: what averaging.averaged() says of the parameters; of it a copy is kept.
    """
    shardings = state_shardings(params, optimizer, mesh, average)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    # A copy, since a step gives away the memory of both.
    average = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings.average)(
        average
    )
    step = jax.device_put(np.int32(0), shardings.step)
    return TrainState(step=step, params=params, opt_state=opt_state, average=average)


def abstract_state(
    params: Params, optimizer: optax.GradientTransformation, mesh: Mesh, average: Params = None
) -> TrainState:
    """Shape, type and sharding of the whole state, given those of the parameters.

    `average` as in make_state().
    """
    shardings = state_shardings(params, optimizer, mesh, average)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(step, params, jax.eval_shape(optimizer.init, params), average)
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), state, shardings
    )


def state_shardings(
    params: Params, optimizer: optax.GradientTransformation, mesh: Mesh, average: Params = None
) -> TrainState:
    """Shardings of the whole state; `params` may be abstract but must carry theirs."""
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda p: p.sharding, params)
    opt_state = jax.eval_shape(optimizer.init, params)
    by_params = optax.tree_utils.tree_map_params(
        optimizer,
        lambda leaf, s: leaf if isinstance(leaf, optax.MaskedNode) else s,
        opt_state,
        shardings,
        transform_non_params=lambda _: whole,
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
    return TrainState(
        step=whole,
        params=shardings,
        opt_state=by_params,
        average=jax.tree.map(lambda p: p.sharding, average),
    )


def _shapes(model: Embedder) -> Any:
    return jax.eval_shape(lambda key: _init(model, key), jax.random.key(0))


def _init(model: Embedder, key: jax.Array) -> Params:
    row = jnp.zeros((1, 8), jnp.int32)
    return model.clone(unrolled=False).init(
        key, row, row, row, jnp.zeros(1, jnp.int32), num_segments=1
    )["params"]
