"""BERT, RoBERTa and XLM-RoBERTa encoders (post-LayerNorm) over packed rows.

Devlin et al. 2018, arXiv 1810.04805, without the pooler. One row holds several texts; a token sees
the tokens of its own text only, by `segments`, and positions restart with each text.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, UInt32

from piccolo_jax.errors import UserError
from piccolo_jax.ops.attention import SOFTMAX, attention
from piccolo_jax.ops.dropout import bits_of, dropout
from piccolo_jax.ops.gelu import gelu
from piccolo_jax.ops.products import in_memory, product_on_cpu
from piccolo_jax.sharding import BATCH_AXES, Rules, constrain

ARCHITECTURES = {"bert": "BertModel", "roberta": "RobertaModel", "xlm-roberta": "XLMRobertaModel"}

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}

_KEPT = "kept"  # what remat="dots" doesn't compute again

# Column-parallel into heads and the inner dimension, row-parallel out of them; axis 0 of what is in
# `layers` is the layer.
BERT_RULES: Rules = (
    (r"word_embeddings", P("tensor", "fsdp")),
    (r"position_embeddings", P(None, "fsdp")),
    (r"layers/(query|key|value|intermediate)/kernel", P(None, "fsdp", "tensor")),
    (r"layers/(query|key|value|intermediate)/bias", P(None, "tensor")),
    (r"layers/(attention_output|output)/kernel", P(None, "tensor", "fsdp")),
)

# Path of a parameter in BertEncoder and its Hugging Face name. `kernel`s are [in, out] here and
# [out, in] there; what is in `layers` is stacked here and numbered there.
HF_NAMES: dict[str, str] = {
    "word_embeddings/embedding": "embeddings.word_embeddings.weight",
    "position_embeddings/embedding": "embeddings.position_embeddings.weight",
    "token_type_embeddings/embedding": "embeddings.token_type_embeddings.weight",
    "embeddings_norm/scale": "embeddings.LayerNorm.weight",
    "embeddings_norm/bias": "embeddings.LayerNorm.bias",
    "layers/query/kernel": "encoder.layer.{}.attention.self.query.weight",
    "layers/query/bias": "encoder.layer.{}.attention.self.query.bias",
    "layers/key/kernel": "encoder.layer.{}.attention.self.key.weight",
    "layers/key/bias": "encoder.layer.{}.attention.self.key.bias",
    "layers/value/kernel": "encoder.layer.{}.attention.self.value.weight",
    "layers/value/bias": "encoder.layer.{}.attention.self.value.bias",
    "layers/attention_output/kernel": "encoder.layer.{}.attention.output.dense.weight",
    "layers/attention_output/bias": "encoder.layer.{}.attention.output.dense.bias",
    "layers/attention_norm/scale": "encoder.layer.{}.attention.output.LayerNorm.weight",
    "layers/attention_norm/bias": "encoder.layer.{}.attention.output.LayerNorm.bias",
    "layers/intermediate/kernel": "encoder.layer.{}.intermediate.dense.weight",
    "layers/intermediate/bias": "encoder.layer.{}.intermediate.dense.bias",
    "layers/output/kernel": "encoder.layer.{}.output.dense.weight",
    "layers/output/bias": "encoder.layer.{}.output.dense.bias",
    "layers/output_norm/scale": "encoder.layer.{}.output.LayerNorm.weight",
    "layers/output_norm/bias": "encoder.layer.{}.output.LayerNorm.bias",
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Shape of an encoder; `max_positions` are the positions that a text can use."""

    model_type: str = "bert"
    vocab_size: int = 21128
    hidden_size: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    intermediate_size: int = 4096
    max_positions: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    pad_token_id: int = 0
    initializer_range: float = 0.02

    @property
    def position_offset(self) -> int:
        """Row of the position table of a text's first token."""
        return 0 if self.model_type == "bert" else self.pad_token_id + 1

    @classmethod
    def from_hf(cls, values: dict[str, Any], source: str = "config.json") -> Self:
        """From a Hugging Face config. Raises UserError naming what is missing or not supported."""

        def require(ok: bool, field: str, allowed: str) -> None:
            if not ok:
                raise UserError(f"{source}: {field} = {values.get(field)!r}: must be {allowed}")

        def one_of(names: Any) -> str:
            return f"one of {', '.join(map(repr, names))}"

        model_type = values.get("model_type")
        require(model_type in tuple(ARCHITECTURES), "model_type", one_of(ARCHITECTURES))
        for field, default, allowed in (
            ("position_embedding_type", "absolute", "absolute"),
            ("is_decoder", False, False),
            ("add_cross_attention", False, False),
        ):
            require(values.get(field, default) in (allowed, None), field, repr(allowed))
        # transformers' defaults: without a pad token positions can't be counted in RoBERTa.
        values = {"pad_token_id": 0 if model_type == "bert" else 1} | values
        pad = values["pad_token_id"]
        require(_is_integer(pad, 0) or (pad is None and model_type == "bert"), "pad_token_id",
                "an integer of at least 0")  # fmt: skip
        config = cls(
            model_type=str(model_type),
            **{field: values[name] for field, name in _HF_FIELDS.items()
               if values.get(name) is not None},
        )  # fmt: skip
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size",
                 "max_positions", "type_vocab_size")  # fmt: skip
        for name in map(_HF_FIELDS.__getitem__, sizes):
            value = values.get(name)
            require(_is_integer(value, 1), name, "an integer greater than 0")
        require(config.hidden_act in tuple(ACTIVATIONS), "hidden_act", one_of(ACTIVATIONS))
        for name, most in (
            ("hidden_dropout_prob", 1.0),
            ("attention_probs_dropout_prob", 1.0),
            ("layer_norm_eps", math.inf),
            ("initializer_range", math.inf),
        ):
            value = values.get(name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            require(value is None or (number and 0 <= value < most), name,
                    f"a number of at least 0 and below {most:g}")  # fmt: skip
        require(config.hidden_size % config.num_heads == 0, "num_attention_heads",
                f"a divisor of hidden_size = {config.hidden_size}")  # fmt: skip
        require(config.max_positions > config.position_offset, "max_position_embeddings",
                f"more than {config.position_offset}, the row of the first position")  # fmt: skip
        return dataclasses.replace(
            config, max_positions=config.max_positions - config.position_offset
        )

    def to_hf(self) -> dict[str, Any]:
        """The Hugging Face config.json: inverse of from_hf."""
        values = {name: getattr(self, field) for field, name in _HF_FIELDS.items()}
        return {
            "model_type": self.model_type,
            "architectures": [ARCHITECTURES[self.model_type]],
            **values,
            "max_position_embeddings": self.max_positions + self.position_offset,
            "dtype": "float32",
        }


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


_HF_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "layer_norm_eps": "layer_norm_eps",
    "hidden_act": "hidden_act",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "pad_token_id": "pad_token_id",
    "initializer_range": "initializer_range",
}


class BertEncoder(nn.Module):
    """Token ids to hidden states. Parameters are float32, matrix products in `dtype`.

    `remat` is what the backward pass recomputes: "none", "dots" (all but the products with
    parameters and attention) or "full" (each layer from its input). `for_cpu`: attention of one row
    after the other, whose scores then stay in the caches, and gradients of kernels by other
    products. `kernels`: with those for TPUs. `unrolled`: each layer is compiled by itself instead
    of one for all, which takes longer to compile and spares moving activations and gradients in and
    out of arrays over all layers; its parameters are those of unstack().
    """

    config: BertConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    for_cpu: bool = False
    kernels: bool = False
    unrolled: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "R L"],
        segments: Int[Array, "R L"],
        positions: Int[Array, "R L"],
        text_numbers: Int[Array, "R L"] | None = None,
        key: Array | None = None,
    ) -> Float[Array, "R L H"]:
        """Hidden states of the last layer; those at padding (segment 0) mean nothing.

        Args:
          key: of the random numbers of dropout; None: without.
          text_numbers: of each token's text, by which it gets them (default: by row and segment).
        """
        config = self.config
        if text_numbers is None:
            row = jnp.arange(len(tokens), dtype=segments.dtype)[:, None]
            text_numbers = row * (tokens.shape[1] + 1) + segments
        # Of each token, the same wherever its text is encoded.
        numbers = text_numbers.astype(jnp.uint32) * jnp.uint32(config.max_positions)
        numbers += positions.astype(jnp.uint32)
        keys = None if key is None else jax.random.split(key, config.num_layers + 1)

        def table(rows: int, name: str) -> jax.Array:
            init = nn.initializers.normal(config.initializer_range)
            embed = nn.Embed(rows, config.hidden_size, embedding_init=init, name=name)
            # Gathered whole before the look-up: out of a split table the partitioner would move
            # the activations.
            return constrain(embed.embedding, None, None)

        words = table(config.vocab_size, "word_embeddings")
        places = table(config.max_positions + config.position_offset, "position_embeddings")
        types = table(config.type_vocab_size, "token_type_embeddings")
        x = words[tokens] + places[positions + config.position_offset] + types[0]
        x = _layer_norm(config, self.dtype, "embeddings_norm")(x)
        if keys is not None:
            x = dropout(x, config.hidden_dropout, keys[-1], numbers)
        x = constrain(x.astype(self.dtype), BATCH_AXES, None, None)

        layer = _Layer
        if self.remat != "none":
            policy = {
                "dots": jax.checkpoint_policies.save_only_these_names(_KEPT, SOFTMAX),
                "full": jax.checkpoint_policies.nothing_saveable,
            }[self.remat]
            layer = nn.remat(_Layer, policy=policy, prevent_cse=False)
        arguments = (config, self.dtype, self.for_cpu, self.kernels)
        if self.unrolled:
            for i in range(config.num_layers):
                layer_key = None if keys is None else keys[i]
                x, _ = layer(*arguments, name=f"layer_{i}")(x, segments, numbers, layer_key)
            return x
        layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            length=config.num_layers,
        )
        x, _ = layers(*arguments, name="layers")(
            x, segments, numbers, None if keys is None else keys[:-1]
        )
        return x


def unstack(params: Any, num_layers: int) -> Any:
    """Parameters with `layers` as the `layer_N` of an unrolled BertEncoder."""
    rest = {name: tree for name, tree in params.items() if name != "layers"}
    return rest | {
        f"layer_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        for i in range(num_layers)
    }


class _Layer(nn.Module):
    config: BertConfig
    dtype: Any
    for_cpu: bool
    kernels: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "R L H"],
        segments: Int[Array, "R L"],
        numbers: UInt32[Array, "R L"],
        key: Array | None,
    ) -> tuple[Float[Array, "R L H"], None]:
        config = self.config
        hidden = config.hidden_size
        attention_bits: Array | None = None
        drops: list[Callable[..., Array] | None] = [None, None]
        if key is not None:
            # Of attention, and of what is added after attention and after the inner layer.
            attention_key, *keys = jax.random.split(key, 3)
            attention_bits = bits_of(attention_key, numbers)
            drops = [functools.partial(dropout, rate=config.hidden_dropout, key=k) for k in keys]
        dense = functools.partial(_Dense, config.initializer_range, self.dtype, self.for_cpu)
        keep = _keep_on_cpu if self.for_cpu else _keep

        def product(x: jax.Array, features: int, name: str) -> jax.Array:
            y = constrain(dense(features, name=name)(x), BATCH_AXES, None, "tensor")
            return keep(y)

        def add_and_norm(
            x: jax.Array, y: jax.Array, drop: Callable[..., Array] | None, name: str
        ) -> jax.Array:
            if drop is not None:
                y = drop(y, tokens=numbers)
            # Rounded here, so that the norm reads the sum and doesn't compute it again.
            x = keep((x.astype(jnp.float32) + y).astype(self.dtype))
            x = _layer_norm(config, self.dtype, name)(x).astype(self.dtype)
            return constrain(x, BATCH_AXES, None, None)

        query, key, value = (product(x, hidden, name) for name in ("query", "key", "value"))
        y = attention(
            query, key, value, segments, attention_bits,
            heads=config.num_heads, rate=config.attention_dropout, kernel=self.kernels,
            by_rows=self.for_cpu,
        )  # fmt: skip
        y = keep(constrain(y, BATCH_AXES, None, "tensor"))
        x = add_and_norm(x, dense(hidden, name="attention_output")(y), drops[0], "attention_norm")

        y = _not_fused(product(x, config.intermediate_size, "intermediate"))
        exact = self.dtype == jnp.float32 or config.hidden_act != "gelu"
        activation = ACTIVATIONS[config.hidden_act] if exact else gelu
        # Recomputed backwards even without remat: its parts are kept for every layer otherwise.
        y = jax.checkpoint(activation, prevent_cse=False)(y)
        y = constrain(y, BATCH_AXES, None, "tensor")
        return add_and_norm(x, dense(hidden, name="output")(y), drops[1], "output_norm"), None


class _Dense(nn.Module):
    """x @ kernel in `dtype`, and the bias, whose gradient is a long sum, in float32."""

    initializer_range: float
    dtype: Any
    for_cpu: bool
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "R L I"]) -> Float[Array, "R L O"]:
        init = nn.initializers.normal(self.initializer_range)
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        if self.for_cpu:
            return _dense_on_cpu(x, kernel, bias)
        y = jnp.dot(x, kernel.astype(self.dtype)).astype(jnp.float32) + bias
        return y.astype(self.dtype)


@jax.custom_vjp
def _dense_on_cpu(
    x: Float[Array, "R L I"], kernel: Float[Array, "I O"], bias: Float[Array, " O"]
) -> Float[Array, "R L O"]:
    """As _Dense, with the products that XLA for CPUs computes fast.

    For JAX's gradient of the kernel it moves a large factor: that is a product transposed; this
    one is not.
    """
    return (product_on_cpu(x, kernel.astype(x.dtype)) + bias).astype(x.dtype)


def _dense_gradient(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array, Array]:
    x, kernel = saved
    gradient = in_memory(gradient)
    for_x = product_on_cpu(gradient, kernel.astype(x.dtype).T).astype(x.dtype)
    for_kernel = product_on_cpu(_flat(in_memory(x)).T, _flat(gradient))
    return for_x, for_kernel, gradient.astype(jnp.float32).sum((0, 1))


def _flat(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


_dense_on_cpu.defvjp(
    lambda x, kernel, bias: (_dense_on_cpu(x, kernel, bias), (x, kernel)), _dense_gradient
)


def _keep(x: Array) -> Array:
    return checkpoint_name(x, _KEPT)


def _as_integers(x: Array) -> Array:
    """As _keep(). XLA for CPUs writes a layer of integers into the array of all layers; of an array
    of bfloat16 it writes all layers each time.
    """
    if x.dtype == jnp.float32:
        return _keep(x)
    return jax.lax.bitcast_convert_type(_keep(jax.lax.bitcast_convert_type(x, jnp.uint16)), x.dtype)


_keep_on_cpu = jax.custom_vjp(_as_integers)
_keep_on_cpu.defvjp(lambda x: (_as_integers(x), None), lambda _, gradient: (gradient,))


def _layer_norm(config: BertConfig, dtype: Any, name: str) -> nn.LayerNorm:
    """With float32 statistics; of bfloat16, mean and variance in one pass."""
    return nn.LayerNorm(config.layer_norm_eps, use_fast_variance=dtype != jnp.float32, name=name)


@jax.custom_vjp
def _not_fused(x: Array) -> Array:
    """x, computed apart from what follows.

    XLA for TPUs else puts both products of the inner layer in one operation, a fifth slower than
    the two.
    """
    return jax.lax.optimization_barrier(x)


_not_fused.defvjp(lambda x: (_not_fused(x), None), lambda _, gradient: (gradient,))
