"""The modules of a sentence-transformers directory, in the layout of 2024 and in that of 6.x.

Transformer, Pooling, Dense and Normalize are understood, in that order. What would give other
vectors than sentence-transformers is refused with the file and the field.
"""

import json
from pathlib import Path
from typing import Any

from piccolo_jax.errors import UserError

UNREADABLE = (OSError, ValueError, RecursionError)  # what reading JSON from a file raises
ORDER = ("Transformer", "Pooling", "Dense", "Normalize")
_THEIRS = "sentence_transformers."  # what the type of a module of theirs begins with
_ELSE = "encode with sentence-transformers instead"
POOLINGS = {"mean": "mean", "cls": "cls", "lasttoken": "last"}  # theirs -> ours
_LEGACY_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Names of the Transformer's file, as the family had it when it was written.
_TRANSFORMER_FILES = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_xlm-roberta_config.json",
)
# Its fields that change vectors, and what they may be; what is absent or null is as it should be.
_TRANSFORMER_FIELDS: dict[str, Any] = {
    "transformer_task": "feature-extraction",
    "module_output_name": "token_embeddings",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "processing_kwargs": {},
    "query_expansion": None,
    "query_length": None,
    "document_length": None,
    "model_args": {},
    "tokenizer_args": {},
    "config_args": {},
}
_LEAST_LENGTH = 3  # two special tokens, and one of the text


def read_modules(directory: Path) -> dict[str, Path]:
    """Folder of each module by its kind, one of ORDER.

    Without modules.json, the folders that such modules usually have. Raises UserError naming the
    module that is unknown, missing, there twice or out of order.
    """
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
            name, folder = module["type"], directory / module["path"]
            kind = name.rsplit(".", 1)[-1]
            if not name.startswith(_THEIRS) or kind not in ORDER:
                raise UserError(
                    f"{path}: module {name}: not supported, only {', '.join(ORDER)} of"
                    f" sentence-transformers: {_ELSE}, or train and save the model without it"
                )
            if kind in modules:
                raise UserError(f"{path}: two modules of type {kind}: not supported: {_ELSE}")
            modules[kind] = folder
    except (*UNREADABLE, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a list of modules with type and path ({error!r})") from error
    for kind in ("Transformer", "Pooling"):
        if kind not in modules:
            raise UserError(f"{path}: no module {kind}: a text-embedding model has one")
    if list(modules) != [kind for kind in ORDER if kind in modules]:
        raise UserError(
            f"{path}: modules in the order {', '.join(modules)}: must be in the order"
            f" {', '.join(ORDER)}: {_ELSE}"
        )
    return modules


def read_transformer(folder: Path) -> tuple[int | None, bool]:
    """The most tokens of a text, special ones included, and whether texts are put in lower case.

    None tokens: as many as the model has positions. Since 6.0 sentence-transformers writes the
    limit with the tokenizer, which also says where a directory of transformers alone cuts.
    """
    name = next((n for n in _TRANSFORMER_FILES if (folder / n).exists()), None)
    values, path = {}, folder / (name or _TRANSFORMER_FILES[0])
    if name:
        values = read_json(path)
    for field, allowed in _TRANSFORMER_FIELDS.items():
        value = values.get(field)
        if value is not None and value != allowed:
            raise UserError(f"{path}: {field} = {value!r}: must be {allowed!r}: {_ELSE}")
    lower = values.get("do_lower_case") or False
    if not isinstance(lower, bool):
        raise UserError(f"{path}: do_lower_case = {lower!r}: must be true or false")
    limit, field = values.get("max_seq_length"), "max_seq_length"
    if limit is None and (folder / "tokenizer_config.json").exists():
        path, field = folder / "tokenizer_config.json", "model_max_length"
        limit = read_json(path).get(field)
    if limit is not None:
        if not isinstance(limit, int | float) or not limit >= _LEAST_LENGTH:
            raise UserError(f"{path}: {field} = {limit!r}: must be {_LEAST_LENGTH} or more tokens")
        limit = int(min(limit, 2**31))  # tokenizers say 1e30 for none
    return limit, lower


def named_poolings(values: dict[str, Any]) -> list[Any]:
    """Their names of the poolings that a Pooling module's file says, by name or by flags."""
    modes = values.get("pooling_mode")
    if modes is None:
        return [mode for field, mode in _LEGACY_POOLINGS.items() if values.get(field)]
    return modes if isinstance(modes, list) else [modes]


def read_pooling(folder: Path, hidden_size: int) -> str:
    """mean, cls or last."""
    path = folder / "config.json"
    values = read_json(path)
    modes = named_poolings(values)
    if values.get("pooling_mode") is None:
        modes = modes or ["mean"]
    if len(modes) != 1 or str(modes[0]) not in POOLINGS:
        raise UserError(
            f"{path}: pooling mode {' + '.join(map(str, modes))}: must be one of"
            f" {', '.join(POOLINGS)}: {_ELSE}; config.model.pooling takes another for training"
        )
    if not values.get("include_prompt", True):
        raise UserError(
            f"{path}: include_prompt = False: not supported, must be True (prompts are pooled with"
            f" the text): {_ELSE}"
        )
    for field in ("embedding_dimension", "word_embedding_dimension"):
        if values.get(field, hidden_size) != hidden_size:
            raise UserError(
                f"{path}: {field} = {values[field]!r}: must be {hidden_size}, the hidden_size of"
                " config.json"
            )
    return POOLINGS[modes[0]]


def read_dense(folder: Path, hidden_size: int) -> tuple[int, bool]:
    """Width of the scaling layer, and whether it has a bias."""
    path = folder / "config.json"
    values = read_json(path)
    activation = values.get("activation_function", "torch.nn.modules.activation.Tanh")
    # What is not torch's, sentence-transformers replaces by Tanh.
    if activation is not None and not (
        str(activation).startswith("torch.") and str(activation).endswith(".Identity")
    ):
        raise UserError(
            f"{path}: activation_function = {activation!r} (Tanh if absent): must be"
            f" 'torch.nn.modules.linear.Identity': {_ELSE}"
        )
    for field, allowed in (("in_features", hidden_size), ("use_residual", False)):
        if values.get(field, allowed) != allowed:
            raise UserError(f"{path}: {field} = {values[field]!r}: must be {allowed!r}: {_ELSE}")
    _check_names(path, values)
    width = values.get("out_features")
    if not isinstance(width, int) or width < 1:
        raise UserError(f"{path}: out_features = {width!r}: must be an integer greater than 0")
    return width, bool(values.get("bias", True))


def check_normalize(folder: Path) -> None:
    """Raises UserError if the module normalises something else than the text's embedding."""
    path = folder / "config.json"
    if path.exists():
        _check_names(path, read_json(path))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file. Raises UserError if there is none."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: not a Hugging Face model directory") from None
    except UNREADABLE as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be a JSON object")
    return values


def _check_names(path: Path, values: dict[str, Any]) -> None:
    for field in ("module_input_name", "module_output_name"):
        if values.get(field) not in (None, "sentence_embedding"):
            raise UserError(
                f"{path}: {field} = {values[field]!r}: must be 'sentence_embedding': {_ELSE}"
            )
