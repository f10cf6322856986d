"""Hugging Face and sentence-transformers directories: what they hold, and weights to and from Flax.

Numpy, JSON and safetensors only; no torch.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from piccolo_jax.errors import UserError
from piccolo_jax.models.bert import BertConfig
from piccolo_jax.models.embedder import BACKBONES, Embedder

_TO_SAFETENSORS = (
    "load it with transformers or sentence-transformers and save_pretrained() it, which writes"
    " safetensors"
)
_ST_POOLINGS = {"mean": "mean", "cls": "cls", "lasttoken": "last"}  # theirs -> ours
_LEGACY_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_DTYPES = ("F32", "F16", "BF16", "F64")
# Of the encoder's tensors in a checkpoint of a model with a head.
_PREFIXES = ("", "bert.", "roberta.")


@dataclasses.dataclass
class Pretrained:
    """What a model directory says about itself."""

    path: Path
    backbone: BertConfig
    pooling: str | None = None  # None: the directory doesn't say
    embed_dim: int = 0  # width of its scaling layer; 0: none
    prompts: dict[str, str] = dataclasses.field(default_factory=dict)
    max_seq_length: int | None = None


def resolve(init: str) -> Path:
    """The directory of `init`, a local directory or a Hugging Face hub id (downloaded or cached).

    Raises UserError if it is neither.
    """
    if Path(init).is_dir():
        return Path(init)
    import huggingface_hub  # slow to import, and only needed here

    try:
        path = huggingface_hub.snapshot_download(
            init,
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"],
            ignore_patterns=["onnx/*", "openvino/*"],
        )
    except (OSError, ValueError, huggingface_hub.errors.HTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{init!r} is not a directory here, and could not be had from the Hugging Face hub"
            f" ({reason}): give a directory with config.json and model.safetensors, or the id of a"
            " model on the hub (with a network, or downloaded before)"
        ) from error
    return Path(path)


def read_spec(directory: Path) -> Pretrained:
    """Backbone, pooling, scaling layer and prompts of a model directory.

    Reads transformers directories and sentence-transformers ones, of 2024 and of 6.x. Raises
    UserError naming the file and the field that is broken or not supported.
    """
    directory = Path(directory)
    modules = module_folders(directory)
    config_path = directory / "config.json"
    values = _read_json(config_path)
    model_type = values.get("model_type")
    if model_type not in BACKBONES:
        raise UserError(
            f"{config_path}: model_type = {model_type!r}: must be one of {', '.join(BACKBONES)}"
        )
    spec = Pretrained(
        directory, BACKBONES[model_type].config.from_hf(values, source=str(config_path))
    )
    if "Pooling" in modules:
        spec.pooling = _read_pooling(modules["Pooling"] / "config.json")
    if "Dense" in modules:
        spec.embed_dim = _read_dense(modules["Dense"] / "config.json", spec.backbone.hidden_size)
    prompts_path = directory / "config_sentence_transformers.json"
    if prompts_path.exists():
        spec.prompts = {
            k: v or "" for k, v in (_read_json(prompts_path).get("prompts") or {}).items()
        }
    length_path = directory / "sentence_bert_config.json"
    if length_path.exists():
        spec.max_seq_length = _read_json(length_path).get("max_seq_length")
    return spec


@dataclasses.dataclass(frozen=True)
class StoredParam:
    """A parameter in its file: `shape`, and `param[index]`, float32, which reads that part alone.

    `index` has a slice per dimension. A parameter of `layers` has a tensor per layer; a `kernel` is
    [in, out] here and [out, in] in the file.
    """

    shape: tuple[int, ...]
    tensors: tuple[Any, ...]  # slices of safetensors, one for each layer; or one
    stacked: bool
    transposed: bool

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        if not self.stacked:
            return self._read(self.tensors[0], index)
        shape = (len(range(*i.indices(n))) for i, n in zip(index, self.shape, strict=True))
        value = np.empty(tuple(shape), np.float32)
        for i, tensor in enumerate(self.tensors[index[0]]):
            value[i] = self._read(tensor, index[1:])
        return value

    def _read(self, tensor: Any, index: tuple[slice, ...]) -> np.ndarray:
        value = tensor[index[::-1] if self.transposed else index]
        value = value.T if self.transposed else value
        return np.ascontiguousarray(value, dtype=np.float32)


def open_params(directory: Path, config: BertConfig, embed_dim: int = 0) -> dict[str, Any]:
    """Parameters of Embedder(config, embed_dim=embed_dim) as nested dicts of StoredParam.

    `scaling` is absent if the directory has no Dense module; a Dense module is not read if
    `embed_dim` is 0. Raises UserError naming the tensor, the file and the shapes if one is missing
    or of another shape, and if the weights are not safetensors.
    """
    directory = Path(directory)
    modules = module_folders(directory)
    tensors = _Tensors(directory)
    prefix = next((p for p in _PREFIXES if f"{p}embeddings.word_embeddings.weight" in tensors), "")
    params: dict[str, Any] = {"backbone": {}}
    for path, shape in _backbone_shapes(config).items():
        name = prefix + BACKBONES[config.model_type].hf_names[path]
        _put(params["backbone"], path, tensors.open(name, path, shape))
    if embed_dim and "Dense" in modules:
        dense_config = modules["Dense"] / "config.json"
        width = _read_dense(dense_config, config.hidden_size)
        if width != embed_dim:
            raise UserError(
                f"config.model.embed_dim = {embed_dim}, but {dense_config} has out_features ="
                f" {width}: set config.model.embed_dim={width}, or 0 for no scaling layer"
            )
        tensors = _Tensors(modules["Dense"])
        kernel = tensors.open("linear.weight", "scaling/kernel", (config.hidden_size, width))
        bias: StoredParam | np.ndarray = np.zeros(width, np.float32)
        if _read_json(dense_config).get("bias", True):
            bias = tensors.open("linear.bias", "scaling/bias", (width,))
        params["scaling"] = {"kernel": kernel, "bias": bias}
    return params


def load_params(directory: Path, config: BertConfig, embed_dim: int = 0) -> dict[str, Any]:
    """What open_params gives, read whole: nested dicts of numpy float32. Raises what that does."""
    stored = open_params(directory, config, embed_dim)
    return jax.tree.map(lambda param: param[(slice(None),) * len(param.shape)], stored)


def to_hf(
    params: dict[str, Any], config: BertConfig
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Inverse of load_params: tensors of model.safetensors and, empty without one, of the Dense.

    Names are Hugging Face's without a prefix; values are float32 and contiguous.
    """
    names = BACKBONES[config.model_type].hf_names
    backbone = {}
    for path, leaf in _leaves(params["backbone"]):
        value = np.asarray(leaf, np.float32)
        if path.startswith("layers/"):
            for i, layer in enumerate(value):
                backbone[names[path].format(i)] = _transposed(layer, path)
        else:
            backbone[names[path]] = _transposed(value, path)
    dense = {}
    if "scaling" in params:
        scaling = {path: np.asarray(leaf, np.float32) for path, leaf in params["scaling"].items()}
        dense["linear.weight"] = _transposed(scaling["kernel"], "scaling/kernel")
        dense["linear.bias"] = np.ascontiguousarray(scaling["bias"])
    return backbone, dense


class _Tensors:
    """Tensors of model.safetensors, or of the files that its index names, by name."""

    def __init__(self, directory: Path) -> None:
        self.index = directory / "model.safetensors.index.json"
        single = directory / "model.safetensors"
        self.where: dict[str, Path] = {}
        self.files: dict[Path, Any] = {}
        self.source = single
        if single.exists():
            self.where = dict.fromkeys(self._open(single).keys(), single)
        elif self.index.exists():
            self.source = self.index
            weights = _read_json(self.index).get("weight_map")
            if not isinstance(weights, dict):
                raise UserError(f"{self.index}: weight_map: must be an object of file names")
            self.where = {name: directory / file for name, file in weights.items()}
        else:
            others = sorted(p.name for p in directory.glob("*.bin"))
            if others:
                raise UserError(
                    f"{directory / others[0]}: only safetensors weights are read: {_TO_SAFETENSORS}"
                )
            raise UserError(f"{single}: no such file: the weights of the model are missing")

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def open(self, name: str, path: str, shape: tuple[int, ...]) -> StoredParam:
        """The parameter at `path`, of `shape`; with a `{}` in it, `name` is that of each layer."""
        transposed, stacked = path.endswith("kernel"), path.startswith("layers/")
        expected = shape[1:] if stacked else shape
        expected = expected[::-1] if transposed else expected
        names = [name.format(i) for i in range(shape[0])] if stacked else [name]
        opened = tuple(self._open_tensor(name, expected) for name in names)
        return StoredParam(shape, opened, stacked, transposed)

    def _open_tensor(self, name: str, expected: tuple[int, ...]) -> Any:
        if name not in self.where:
            raise UserError(f"{self.source}: no tensor {name!r} of shape {list(expected)}")
        file = self.where[name]
        try:
            tensor = self._open(file).get_slice(name)
        except SafetensorError as error:
            raise UserError(f"{file}: tensor {name!r}: {error}") from error
        if tuple(tensor.get_shape()) != expected:
            raise UserError(
                f"{file}: tensor {name!r} has shape {tensor.get_shape()}, but by config.json it"
                f" must be {list(expected)}: weights and config.json are of different models"
            )
        if tensor.get_dtype() not in _DTYPES:
            raise UserError(
                f"{file}: tensor {name!r} is {tensor.get_dtype()}: must be one of"
                f" {', '.join(_DTYPES)}"
            )
        return tensor

    def _open(self, file: Path) -> Any:
        if file not in self.files:
            try:
                self.files[file] = safe_open(file, framework="np")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{file}: not a readable safetensors file: {error}") from error
        return self.files[file]


def module_folders(directory: Path) -> dict[str, Path]:
    """Folder of each sentence-transformers module, by the last part of its type."""
    path = directory / "modules.json"
    if not path.exists():
        folders = {"Pooling": directory / "1_Pooling", "Dense": directory / "2_Dense"}
        return {kind: folder for kind, folder in folders.items() if folder.is_dir()}
    modules: dict[str, Path] = {}
    try:
        listed = json.loads(path.read_text("utf-8"))
        if not isinstance(listed, list):
            raise TypeError(f"a {type(listed).__name__}")
        for module in listed:
            kind = module["type"].rsplit(".", 1)[-1]
            if kind in modules:
                raise UserError(f"{path}: two modules of type {kind}: not supported")
            modules[kind] = directory / module["path"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a list of modules with type and path ({error!r})") from error
    order = ("Transformer", "Pooling", "Dense", "Normalize")
    for kind in modules:
        if kind not in order:
            raise UserError(f"{path}: module {kind}: not supported, only {', '.join(order)}")
    if list(modules) != [kind for kind in order if kind in modules]:
        raise UserError(f"{path}: modules in the order {', '.join(modules)}: not supported")
    if modules.get("Transformer", directory) != directory:
        raise UserError(
            f"{path}: the Transformer module is in {modules['Transformer']}: not supported; move"
            f" its files to {directory} and set its path to ''"
        )
    return modules


def _read_pooling(path: Path) -> str:
    values = _read_json(path)
    modes = values.get("pooling_mode")
    if modes is None:
        modes = [mode for field, mode in _LEGACY_POOLINGS.items() if values.get(field)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in _ST_POOLINGS:
        raise UserError(
            f"{path}: pooling mode {' + '.join(map(str, modes))}: must be one of"
            f" {', '.join(_ST_POOLINGS)}"
        )
    if not values.get("include_prompt", True):
        raise UserError(f"{path}: include_prompt = False: not supported, must be True")
    return _ST_POOLINGS[modes[0]]


def _read_dense(path: Path, hidden_size: int) -> int:
    """Width of the scaling layer."""
    values = _read_json(path)
    activation = values.get("activation_function", "torch.nn.modules.activation.Tanh")
    if activation is not None and activation.rsplit(".", 1)[-1] != "Identity":
        raise UserError(
            f"{path}: activation_function = {activation!r} (Tanh if absent): must be"
            " 'torch.nn.modules.linear.Identity'"
        )
    for field, allowed in (("in_features", hidden_size), ("use_residual", False)):
        if values.get(field, allowed) != allowed:
            raise UserError(f"{path}: {field} = {values[field]!r}: must be {allowed!r}")
    width = values.get("out_features")
    if not isinstance(width, int) or width < 1:
        raise UserError(f"{path}: out_features = {width!r}: must be an integer greater than 0")
    return width


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: not a Hugging Face model directory") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be a JSON object")
    return values


def _backbone_shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    tokens = jnp.zeros((1, 1), jnp.int32)
    abstract = jax.eval_shape(
        lambda: Embedder(config).init(
            jax.random.key(0), tokens, tokens, tokens, jnp.zeros(1, jnp.int32), num_segments=1
        )
    )
    return {path: leaf.shape for path, leaf in _leaves(abstract["params"]["backbone"])}


def _leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree.leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, leaf = path.split("/")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[leaf] = value


def _transposed(value: np.ndarray, path: str) -> np.ndarray:
    return np.ascontiguousarray(value.T if path.endswith("kernel") else value)
