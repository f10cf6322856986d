"""Hugging Face and sentence-transformers directories: what they hold, and weights to and from Flax.

Numpy, JSON and safetensors only; no torch.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from piccolo_jax.errors import UserError
from piccolo_jax.models import modules as modules_lib
from piccolo_jax.models.bert import BertConfig
from piccolo_jax.models.embedder import BACKBONES, Embedder
from piccolo_jax.models.modules import read_json

_TO_SAFETENSORS = (
    "load it with transformers or sentence-transformers and save_pretrained() it, which writes"
    " safetensors"
)
_DTYPES = ("F32", "F16", "BF16", "F64")
# Of the encoder's tensors in a checkpoint of a model with a head.
_PREFIXES = ("", "bert.", "roberta.")
# Of LayerNorm in the first checkpoints of BERT.
_OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


@dataclasses.dataclass
class Pretrained:
    """What a model directory says about itself."""

    path: Path
    backbone: BertConfig
    pooling: str | None = None  # None: the directory doesn't say
    embed_dim: int = 0  # width of its scaling layer; 0: none
    normalize: bool = False  # whether its last module normalises
    prompts: dict[str, str] = dataclasses.field(default_factory=dict)
    default_prompt: str | None = None  # name of the prompt of texts that are given none
    truncate_dim: int | None = None  # prefix that embeddings are cut to unless told otherwise
    max_seq_length: int | None = None
    lower_case: bool = False  # whether texts are put in lower case before they are tokenised
    tokenizer: Path = Path()  # folder of the tokenizer


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


def read_spec(directory: Path, pooling: str = "", unlisted_dense: bool = False) -> Pretrained:
    """Backbone, pooling, scaling layer, prompts and limits of a model directory.

    Reads transformers directories and sentence-transformers ones, of 2024 and of 6.x.

    Args:
      pooling: taken in place of what the directory says, which may then be a kind unknown here.
      unlisted_dense: take a scaling layer in 2_Dense/ that modules.json doesn't list, which
        sentence-transformers doesn't apply, but training starts from.

    Raises UserError naming the file and the field that is broken or not supported.
    """
    directory = Path(directory)
    modules = modules_lib.read_modules(directory)
    folder = modules.get("Transformer", directory)
    config_path = folder / "config.json"
    values = read_json(config_path)
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in BACKBONES:
        raise UserError(
            f"{config_path}: model_type = {model_type!r}: must be one of {', '.join(BACKBONES)}"
        )
    backbone = BACKBONES[model_type].config.from_hf(values, source=str(config_path))
    spec = Pretrained(directory, backbone, pooling or None, tokenizer=folder)
    if "Pooling" in modules and not pooling:
        spec.pooling = modules_lib.read_pooling(modules["Pooling"], backbone.hidden_size)
    dense = _dense_folder(directory, modules) if unlisted_dense else modules.get("Dense")
    if dense:
        spec.embed_dim, _ = modules_lib.read_dense(dense, backbone.hidden_size)
    if "Normalize" in modules:
        modules_lib.check_normalize(modules["Normalize"])
        spec.normalize = True
    about_path = directory / "config_sentence_transformers.json"
    about = read_json(about_path) if about_path.exists() else {}
    spec.prompts, spec.default_prompt = _read_prompts(about_path, about)
    spec.truncate_dim = _read_truncate_dim(about_path, about)
    spec.max_seq_length, spec.lower_case = modules_lib.read_transformer(folder)
    return spec


def _dense_folder(directory: Path, modules: dict[str, Path]) -> Path | None:
    """Of the scaling layer that modules.json lists, else 2_Dense/ if it is there."""
    beside = directory / "2_Dense"
    return modules.get("Dense") or (beside if beside.is_dir() else None)


def _read_prompts(path: Path, values: dict[str, Any]) -> tuple[dict[str, str], str | None]:
    """Prompts by name, and the name of that which texts get by default."""
    kind = values.get("model_type") or "SentenceTransformer"
    if kind != "SentenceTransformer":
        raise UserError(f"{path}: model_type = {kind!r}: must be 'SentenceTransformer'")
    prompts = values.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(
        prompt is None or isinstance(prompt, str) for prompt in prompts.values()
    ):
        raise UserError(f"{path}: prompts = {prompts!r}: must be an object of texts")
    check_prompts(str(path), prompts)
    default = values.get("default_prompt_name")
    if default is not None and not (isinstance(default, str) and default in prompts):
        raise UserError(
            f"{path}: default_prompt_name = {default!r}: must be null or one of prompts"
            f" ({', '.join(prompts) or 'there are none'})"
        )
    return {name: prompt or "" for name, prompt in prompts.items()}, default


def check_prompts(source: str, prompts: Mapping[str, str | None]) -> None:
    """Raises UserError, which begins with `source`, for a prompt that can't be encoded."""
    for name, prompt in prompts.items():
        try:
            f"{name}{prompt}".encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{source}: prompt {name!r} holds half a character (a lone surrogate); mend it"
            ) from None


def _read_truncate_dim(path: Path, values: dict[str, Any]) -> int | None:
    """The prefix that sentence-transformers 6 cuts to by default."""
    dim = values.get("truncate_dim")
    if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int) or dim < 1):
        raise UserError(f"{path}: truncate_dim = {dim!r}: must be null or an integer above 0")
    return dim


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

    `scaling` is absent if the directory has no Dense module, listed or in 2_Dense/; it is not read
    if `embed_dim` is 0. Raises UserError naming the tensor, the file and the shapes if one is
    missing or of another shape, and if the weights are not safetensors.
    """
    directory = Path(directory)
    modules = modules_lib.read_modules(directory)
    tensors = _Tensors(modules.get("Transformer", directory))
    prefix = next((p for p in _PREFIXES if f"{p}embeddings.word_embeddings.weight" in tensors), "")
    params: dict[str, Any] = {"backbone": {}}
    for path, shape in _backbone_shapes(config).items():
        name = prefix + BACKBONES[config.model_type].hf_names[path]
        _put(params["backbone"], path, tensors.open(name, path, shape))
    dense = _dense_folder(directory, modules)
    if embed_dim and dense:
        width, has_bias = modules_lib.read_dense(dense, config.hidden_size)
        if width != embed_dim:
            raise UserError(
                f"config.model.embed_dim = {embed_dim}, but {dense / 'config.json'} has"
                f" out_features = {width}: set config.model.embed_dim={width}, or 0 for no scaling"
                " layer"
            )
        tensors = _Tensors(dense)
        kernel = tensors.open("linear.weight", "scaling/kernel", (config.hidden_size, width))
        bias: StoredParam | np.ndarray = np.zeros(width, np.float32)
        if has_bias:
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
            weights = read_json(self.index).get("weight_map")
            if not isinstance(weights, dict) or not all(
                isinstance(file, str) for file in weights.values()
            ):
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
            for new, old in _OLD_NAMES.items():
                if name.endswith(new) and name.replace(new, old) in self.where:
                    return self._open_tensor(name.replace(new, old), expected)
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
