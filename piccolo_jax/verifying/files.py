"""Whether the files of an export are those that were written: weights, sizes, vocabulary, ONNX.

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
    config = _read_json(directory / "config.json")
    changed = [
        f"{name} = {config.get(name)!r}, exported {value!r}"
        for name, value in known["config"].items()
        if name not in _NOT_COMPARED and config.get(name) != value
    ]
    yield Finding("backbone", f"config.json: {', '.join(changed) or 'as exported'}", not changed)
    for file, digest in references.vocabulary_digests(directory).items():
        same = known["vocabulary"].get(file) == digest
        yield Finding("tokenizer", f"{file}: vocabulary{'' if same else ' changed'}", same)
    yield _compare_token_ids(directory / "tokenizer.json", reference)
    onnx = references.file_digests(directory)
    if known["onnx"] or onnx:
        yield _compare_names("ONNX", references.ONNX_FOLDER, known["onnx"], onnx)


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
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not readable as a JSON object ({error})") from error
