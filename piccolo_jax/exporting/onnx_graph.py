"""The whole model as one ONNX graph: encoder, pooling, scaling layer, cut and normalisation.

Made from the parameters, node by node; needs the package onnx (requirements-dev.txt). Opset 17,
float32 throughout.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from piccolo_jax import __version__
from piccolo_jax.errors import UserError
from piccolo_jax.exporting.layout import Exported
from piccolo_jax.exporting.reference import ONNX_FOLDER

OPSET = 17
NAME = f"{ONNX_FOLDER}/model.onnx"
OUTPUT = "sentence_embedding"
# Protobuf ends at 2 GiB: beyond this, weights go to a file of their own.
_LARGEST_FILE = 1_900_000_000
_MASKED = -1e9


def require() -> Any:
    """The package onnx. Raises UserError if it is not installed."""
    try:
        import onnx
        import onnx.checker
        import onnx.helper
        import onnx.numpy_helper
    except ImportError as error:
        raise UserError(
            f"--onnx needs the package onnx ({error}): pip install -r requirements-dev.txt"
        ) from error
    return onnx


def write(directory: Path, exported: Exported, dim: int) -> None:
    """Writes onnx/model.onnx, whose embeddings have `dim` coordinates and length 1.

    Inputs: input_ids and attention_mask, int64 [batch, length], padded on either side. BERT's
    token_type_ids may be given and are 0 otherwise. Output: sentence_embedding, float32
    [batch, dim].
    """
    onnx = require()
    graph = _Graph(onnx)
    _embedding(graph, exported, dim)
    helper, types = onnx.helper, onnx.TensorProto
    batch = ["batch", "length"]
    inputs = [
        helper.make_tensor_value_info(name, types.INT64, batch)
        for name in ("input_ids", "attention_mask")
    ]
    if "token_type_ids" in graph.names:  # an input with a value of its own may be left out
        shape = ["batch or 1", "length or 1"]
        inputs.append(helper.make_tensor_value_info("token_type_ids", types.INT64, shape))
    output = helper.make_tensor_value_info(OUTPUT, types.FLOAT, ["batch", dim])
    model = helper.make_model(
        helper.make_graph(graph.nodes, "piccolo_jax", inputs, [output], graph.weights),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=8,
        producer_name="piccolo_jax",
        producer_version=__version__,
    )
    about = {"pooling": exported.model.pooling, "dim": str(dim), "normalized": "true"}
    helper.set_model_props(model, about | {"max_length": str(exported.max_length)})
    path = directory / NAME
    path.parent.mkdir(exist_ok=True)
    if sum(map(len, (w.raw_data for w in graph.weights))) > _LARGEST_FILE:
        onnx.save_model(
            model,
            path,
            save_as_external_data=True,
            location=f"{path.name}_data",
            size_threshold=1024,
        )
    else:
        onnx.save_model(model, path)
    onnx.checker.check_model(str(path))


class _Graph:
    """Nodes and weights under construction; every value is known by its name."""

    def __init__(self, onnx: Any):
        self._onnx = onnx
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.names: set[str] = set()

    def add(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """A node's output."""
        output = name or f"{kind.lower()}_{len(self.nodes)}"
        node = self._onnx.helper.make_node(kind, list(inputs), [output], name=output, **attributes)
        self.nodes.append(node)
        return output

    def weight(self, name: str, value: Any) -> str:
        """A constant."""
        if name not in self.names:
            self.names.add(name)
            self.weights.append(self._onnx.numpy_helper.from_array(np.asarray(value), name))
        return name

    def number(self, value: float) -> str:
        """A float32 scalar."""
        return self.weight(f"float {value!r}", np.float32(value))

    def shape(self, *sizes: int) -> str:
        """An int64 vector."""
        return self.weight(f"ints {sizes}", np.asarray(sizes, np.int64))

    def dense(self, x: str, name: str, params: Any) -> str:
        """x @ kernel + bias."""
        x = self.add("MatMul", x, self.weight(f"{name}.kernel", _float32(params["kernel"])))
        return self.add("Add", x, self.weight(f"{name}.bias", _float32(params["bias"])))

    def norm(self, x: str, name: str, params: Any, epsilon: float) -> str:
        """LayerNorm over the last axis."""
        weights = [self.weight(f"{name}.{k}", _float32(params[k])) for k in ("scale", "bias")]
        return self.add("LayerNormalization", x, *weights, axis=-1, epsilon=epsilon)


def _embedding(graph: _Graph, exported: Exported, dim: int) -> None:
    model, params = exported.model, exported.params
    to_float = graph._onnx.TensorProto.FLOAT
    mask = graph.add("Cast", "attention_mask", to=to_float)
    # 1 for a text's first token, and so on, wherever the padding is.
    count = graph.add("CumSum", mask, graph.weight("axis 1", np.int64(1)))
    x = _backbone(graph, exported, mask, count)
    if model.pooling == "mean":
        weights = mask
    else:
        place = graph.number(1.0)
        if model.pooling == "last":
            place = graph.add("ReduceSum", mask, graph.shape(1), keepdims=1)
        chosen = graph.add("Cast", graph.add("Equal", count, place), to=to_float)
        weights = graph.add("Mul", chosen, mask)
    weights = graph.add("Unsqueeze", weights, graph.shape(1))
    x = graph.add("Squeeze", graph.add("MatMul", weights, x), graph.shape(1))
    if model.pooling == "mean":
        total = graph.add("ReduceSum", mask, graph.shape(1), keepdims=1)
        x = graph.add("Div", x, graph.add("Max", total, graph.number(1.0)))
    if "scaling" in params:
        x = graph.dense(x, "scaling", params["scaling"])
    x = graph.add("Slice", x, graph.shape(0), graph.shape(dim), graph.shape(1))
    length = graph.add("ReduceL2", x, axes=[1], keepdims=1)
    graph.add("Div", x, graph.add("Max", length, graph.number(1e-12)), name=OUTPUT)


def _backbone(graph: _Graph, exported: Exported, mask: str, count: str) -> str:
    """Hidden states [batch, length, H]; Devlin et al. 2018, as models/bert.py."""
    config, params = exported.model.backbone, exported.params["backbone"]

    def table(name: str, ids: str) -> str:
        weight = graph.weight(name, _float32(params[name]["embedding"]))
        return graph.add("Gather", weight, ids)

    first = graph.add("Max", graph.add("Sub", count, graph.number(1.0)), graph.number(0.0))
    place = graph.add("Add", first, graph.number(float(config.position_offset)))
    place = graph.add("Cast", place, to=graph._onnx.TensorProto.INT64)
    types = "token type 0"
    if config.model_type == "bert":
        types = "token_type_ids"
    x = graph.add("Add", table("word_embeddings", "input_ids"), table("position_embeddings", place))
    types = graph.weight(types, np.zeros((1, 1), np.int64))
    x = graph.add("Add", x, table("token_type_embeddings", types))
    epsilon = config.layer_norm_eps
    x = graph.norm(x, "embeddings_norm", params["embeddings_norm"], epsilon)
    hidden_from = graph.add("Mul", graph.add("Sub", graph.number(1.0), mask), graph.number(_MASKED))
    hidden_from = graph.add("Unsqueeze", hidden_from, graph.shape(1, 2))
    for i in range(config.num_layers):
        layer = {
            name: {kind: leaf[i] for kind, leaf in leaves.items()}
            for name, leaves in params["layers"].items()
        }
        y = _attention(graph, x, hidden_from, layer, i, config.num_heads, config.hidden_size)
        x = graph.add("Add", x, y)
        x = graph.norm(x, f"{i}.attention_norm", layer["attention_norm"], epsilon)
        y = graph.dense(x, f"{i}.intermediate", layer["intermediate"])
        y = graph.dense(_activation(graph, y, config.hidden_act), f"{i}.output", layer["output"])
        x = graph.norm(graph.add("Add", x, y), f"{i}.output_norm", layer["output_norm"], epsilon)
    return x


def _attention(
    graph: _Graph, x: str, hidden_from: str, layer: Any, i: int, heads: int, width: int
) -> str:
    def split(name: str, order: list[int]) -> str:
        y = graph.dense(x, f"{i}.{name}", layer[name])
        y = graph.add("Reshape", y, graph.shape(0, 0, heads, width // heads))
        return graph.add("Transpose", y, perm=order)

    scores = graph.add("MatMul", split("query", [0, 2, 1, 3]), split("key", [0, 2, 3, 1]))
    scores = graph.add("Mul", scores, graph.number(1 / math.sqrt(width // heads)))
    weights = graph.add("Softmax", graph.add("Add", scores, hidden_from), axis=-1)
    y = graph.add("MatMul", weights, split("value", [0, 2, 1, 3]))
    y = graph.add("Transpose", y, perm=[0, 2, 1, 3])
    y = graph.add("Reshape", y, graph.shape(0, 0, width))
    return graph.dense(y, f"{i}.attention_output", layer["attention_output"])


def _activation(graph: _Graph, x: str, kind: str) -> str:
    if kind == "relu":
        return graph.add("Relu", x)
    half = graph.add("Mul", x, graph.number(0.5))
    if kind == "gelu":
        y = graph.add("Erf", graph.add("Mul", x, graph.number(math.sqrt(0.5))))
    else:  # the tanh approximation
        cube = graph.add("Mul", graph.add("Mul", x, x), x)
        y = graph.add("Add", x, graph.add("Mul", cube, graph.number(0.044715)))
        y = graph.add("Tanh", graph.add("Mul", y, graph.number(math.sqrt(2 / math.pi))))
    return graph.add("Mul", half, graph.add("Add", y, graph.number(1.0)))


def _float32(value: Any) -> np.ndarray:
    return np.ascontiguousarray(value, np.float32)
