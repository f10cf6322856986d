"""Whether the files of an export are those that were written: weights, fields, vocabulary, ONNX.

What no text shows, such as a weight of a token that none of them has.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from piccolo_jax.errors import UserError
from piccolo_jax.exporting import reference as references
from piccolo_jax.exporting.reference import Reference
from piccolo_jax.models import modules
from piccolo_jax.verifying.findings import Finding

_PARTS = {"2_Dense": "scaling layer"}
# What another version may write otherwise without any difference.
_NOT_COMPARED = ("dtype", "architectures")


def compare(directory: Path, reference: Reference) -> Iterator[Finding]:
    """A finding for each file whose content the reference knows."""
    known = reference.about["files"]
    here = references.tensor_digests(directory)
    for file in sorted(known["tensors"] | here):
        part = _PARTS.get(file.split("/")[0], "backbone")
        yield _compare_names(part, file, known["tensors"].get(file), here.get(file))
    config = {k: value for k, value in known["config"].items() if k not in _NOT_COMPARED}
    yield _compare_fields("backbone", directory, "config.json", config)
    yield _compare_dtype(directory, reference.about["dtype"])
    yield _compare_pooling(directory, reference.about["pooling"])
    limit = known.get("model_max_length", reference.about["max_length"])
    if limit is not None:
        limits = {"model_max_length": limit}
        yield _compare_fields("maximum length", directory, "tokenizer_config.json", limits)
    if reference.about["scaling"]:
        width, embed_dim = reference.pooled.shape[1], reference.embeddings.shape[1]
        sizes = {"in_features": width, "out_features": embed_dim, "bias": True}
        yield _compare_fields("scaling layer", directory, "2_Dense/config.json", sizes)
    dims = {"matryoshka_dims": reference.dims}
    yield _compare_fields("prefixes", directory, "config_sentence_transformers.json", dims)
    for file, digest in references.vocabulary_digests(directory).items():
        same = known["vocabulary"].get(file) == digest
        yield Finding("tokenizer", f"{file}: vocabulary{'' if same else ' changed'}", same)
    yield _compare_token_ids(directory / "tokenizer.json", reference)
    onnx = references.file_digests(directory)
    if known["onnx"] or onnx:
        yield _compare_names("ONNX", references.ONNX_FOLDER, known["onnx"], onnx)


def _compare_dtype(directory: Path, known: str) -> Finding:
    """By either name that versions have for it."""
    path = directory / "config.json"
    here = _read_json(path) if path.exists() else {}
    changed = [
        f"{name} = {here[name]!r}, exported {known!r}"
        for name in ("torch_dtype", "dtype")
        if here.get(name, known) != known
    ]
    return Finding("backbone", f"{path.name}: {', '.join(changed) or known}", not changed)


def _compare_pooling(directory: Path, known: str) -> Finding:
    """By name or by flags; a model without the module has the mean, one that names none fails."""
    path = directory / "1_Pooling" / "config.json"
    file = path.relative_to(directory)
    if not path.exists():
        same = known == "mean" and not (directory / "modules.json").exists()
        return Finding("pooling", f"{file}: is missing", same)
    named = list(map(str, modules.named_poolings(_read_json(path))))
    same = [modules.POOLINGS.get(name) for name in named] == [known]
    what = "as exported" if same else f"{' + '.join(named) or 'no pooling'}, exported {known}"
    return Finding("pooling", f"{file}: {what}", same)


def _compare_token_ids(path: Path, reference: Reference) -> Finding:
    """By the file alone: transformers lets tokenizer_config.json overrule parts of it."""
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.enable_truncation(reference.about["max_length"])
        encodings = tokenizer.encode_batch(reference.prompted)
    except Exception as error:  # it raises bare ones
        raise UserError(f"{path}: not a tokenizer that can be read ({error})") from error
    pairs = zip(encodings, reference.ids, strict=True)
    different = sum(list(here.ids) != list(ours) for here, ours in pairs)
    what = f"differ in {different} of {len(encodings)} texts" if different else "as exported"
    return Finding("tokenizer", f"{path.name}: token ids {what}", not different)


def _compare_fields(part: str, directory: Path, file: str, known: dict[str, Any]) -> Finding:
    if not (directory / file).exists():
        return Finding(part, f"{file}: is missing", False)
    here = _read_json(directory / file)
    changed = [
        f"{name} = {here.get(name)!r}, exported {value!r}"
        for name, value in known.items()
        if here.get(name) != value
    ]
    return Finding(part, f"{file}: {', '.join(changed) or 'as exported'}", not changed)


def _compare_names(
    part: str, file: str, known: dict[str, str] | None, here: dict[str, str] | None
) -> Finding:
    if known is None or here is None:
        return Finding(part, f"{file}: {'is not of this export' if here else 'is missing'}", False)
    changed = [name for name in sorted(known | here) if known.get(name) != here.get(name)]
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    what = f"{changed[0]}{more} changed" if changed else "as exported"
    return Finding(part, f"{file}: {what}", not changed)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (*modules.UNREADABLE, TypeError) as error:
        raise UserError(f"{path}: not readable as a JSON object ({error})") from error
