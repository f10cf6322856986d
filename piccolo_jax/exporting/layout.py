"""The files of a sentence-transformers directory, in the layout of 2024 and in that of version 6.

That of 2024 loads in sentence-transformers 2.2 to 6.x, that of 6 from 6.0 on. Both hold a
Transformer, a Pooling and, with a scaling layer, a Dense module. No Normalize module, since users
cut first and normalise then.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from piccolo_jax import __version__
from piccolo_jax.data.tokenizer import Tokenizer
from piccolo_jax.errors import UserError
from piccolo_jax.models import pretrained
from piccolo_jax.models.embedder import Embedder
from piccolo_jax.types import Params

DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": None,
    "pooling_mode_mean_sqrt_len_tokens": None,
    "pooling_mode_weightedmean_tokens": None,
    "pooling_mode_lasttoken": "last",
}
_POOLING_NAMES = {"cls": "cls", "mean": "mean", "last": "lasttoken"}  # ours -> theirs


@dataclasses.dataclass(frozen=True)
class Exported:
    """What a directory is written from. `params` are numpy arrays, whole."""

    model: Embedder
    tokenizer: Tokenizer
    params: Params
    max_length: int  # tokens of a text, with the special ones
    prompts: dict[str, str]
    dims: tuple[int, ...]  # trained prefixes

    @property
    def width(self) -> int:
        """Of the embedding."""
        return self.model.embed_dim or self.model.backbone.hidden_size


@dataclasses.dataclass(frozen=True)
class Options:
    """How an export is written."""

    layout: str = "2024"
    dtype: str = "float32"  # of the weights
    onnx_dim: int | None = None  # of the ONNX file; 0: the whole width; None: no such file


class Layout(NamedTuple):
    """How a version says what all versions say."""

    modules: dict[str, str]  # kind of module -> its type in modules.json
    pooling: Callable[[str, int], dict[str, Any]]  # of the pooling and its width
    dense: dict[str, Any]  # what else the Dense module says
    transformer: Callable[[int], dict[str, Any]]  # of the maximum length
    dtype_field: str  # of config.json; transformers before 4.56 knows torch_dtype only


def _pooling_of_2024(pooling: str, width: int) -> dict[str, Any]:
    flags = {flag: mode == pooling for flag, mode in _POOLING_FLAGS.items()}
    return {"word_embedding_dimension": width, **flags, "include_prompt": True}


def _pooling_of_6(pooling: str, width: int) -> dict[str, Any]:
    mode = _POOLING_NAMES[pooling]
    return {"embedding_dimension": width, "pooling_mode": mode, "include_prompt": True}


def _transformer_of_2024(max_length: int) -> dict[str, Any]:
    return {"max_seq_length": max_length, "do_lower_case": False}


def _transformer_of_6(max_length: int) -> dict[str, Any]:
    """Without the length: texts are cut at the tokenizer's model_max_length."""
    method = {"method": "forward", "method_output_name": "last_hidden_state"}
    return {
        "transformer_task": "feature-extraction",
        "modality_config": {"text": method},
        "module_output_name": "token_embeddings",
    }


LAYOUTS = {
    "2024": Layout(
        {kind: f"sentence_transformers.models.{kind}"
         for kind in ("Transformer", "Pooling", "Dense")},
        _pooling_of_2024,
        {},
        _transformer_of_2024,
        "torch_dtype",
    ),
    "6": Layout(
        {
            "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
            "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
            "Dense": "sentence_transformers.base.modules.dense.Dense",
        },
        _pooling_of_6,
        {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"},
        _transformer_of_6,
        "dtype",
    ),
}  # fmt: skip


def write(directory: Path, exported: Exported, options: Options) -> None:
    """Writes the files of the model and its tokenizer.

    The parameters must be what options.dtype can hold: see rounded().
    """
    chosen, model, dtype = LAYOUTS[options.layout], exported.model, options.dtype
    width = model.backbone.hidden_size
    _write_tokenizer(directory, exported.tokenizer, exported.max_length)
    backbone, dense = pretrained.to_hf(exported.params, model.backbone)
    _save_tensors(backbone, directory / "model.safetensors", dtype)
    config = model.backbone.to_hf() | {"use_cache": False}
    del config["dtype"]
    write_json(directory / "config.json", config | {chosen.dtype_field: dtype})
    write_json(directory / "1_Pooling" / "config.json", chosen.pooling(model.pooling, width))
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if dense:
        modules.append(("2_Dense", "Dense"))
        about = {
            "in_features": width,
            "out_features": model.embed_dim,
            "bias": True,
            # Without this entry sentence-transformers applies Tanh.
            "activation_function": "torch.nn.modules.linear.Identity",
        }
        write_json(directory / "2_Dense" / "config.json", about | chosen.dense)
        _save_tensors(dense, directory / "2_Dense" / "model.safetensors", dtype)
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": chosen.modules[kind]}
        for i, (path, kind) in enumerate(modules)
    ]
    write_json(directory / "modules.json", listed)
    # Tokenizers lose it when transformers saves and loads them.
    lower = {"do_lower_case": True} if exported.tokenizer.lower_case else {}
    limits = chosen.transformer(exported.max_length) | lower
    write_json(directory / "sentence_bert_config.json", limits)
    write_json(
        directory / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "__version__": {"piccolo_jax": __version__},
            "prompts": exported.prompts,
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
            "matryoshka_dims": list(exported.dims),  # ours; sentence-transformers skips it
        },
    )


def rounded(exported: Exported, dtype: str) -> Exported:
    """The same with the parameters, float32, that a reader of weights of `dtype` gets.

    Raises UserError naming a parameter that has no finite value in `dtype`.
    """
    if dtype == "float32":
        return exported

    def round_one(path: Any, leaf: Any) -> np.ndarray:
        value = np.asarray(leaf, np.float32)
        with np.errstate(over="ignore"):
            nearest = value.astype(DTYPES[dtype]).astype(np.float32)
        if bad := int(np.sum(~np.isfinite(nearest) & np.isfinite(value))):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(
                f"--dtype={dtype}: {bad} values of {name} are beyond its range (the largest is"
                f" {np.abs(value).max():.3g}, the limit {ml_dtypes.finfo(DTYPES[dtype]).max:.3g}):"
                " export as bfloat16 or float32"
            )
        return nearest

    return dataclasses.replace(exported, params=jax.tree.map_with_path(round_one, exported.params))


def write_json(path: Path, value: Any) -> None:
    """Indented, with a line break at the end; makes the folder."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(directory: Path, tokenizer: Tokenizer, max_length: int) -> None:
    hf = tokenizer.hf
    hf.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    for field in ("is_local", "local_files_only", "name_or_path"):  # of where it was read
        values.pop(field, None)
    # On the right: older versions take the first token of a row for that of the text.
    sides = {"padding_side": "right", "truncation_side": "right"}
    write_json(path, values | {"model_max_length": max_length} | sides)
    vocabulary = hf.get_vocab()
    if type(hf.backend_tokenizer.model).__name__ == "WordPiece":
        words = sorted(vocabulary, key=vocabulary.__getitem__)
        (directory / "vocab.txt").write_text("".join(f"{w}\n" for w in words), encoding="utf-8")
    write_json(directory / "special_tokens_map.json", hf.special_tokens_map)


def _save_tensors(tensors: dict[str, np.ndarray], path: Path, dtype: str) -> None:
    path.parent.mkdir(exist_ok=True)
    stored = {name: value.astype(DTYPES[dtype]) for name, value in tensors.items()}
    save_file(stored, path, metadata={"format": "pt"})
