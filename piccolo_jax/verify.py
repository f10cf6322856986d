"""Checks that an exported directory is what was trained, and says which part of it is not.

    python -m piccolo_jax.verify OUT [--workdir=DIR [--checkpoint=latest|best]
        [--weights=average|last]] [--dims=256,512]

Compares OUT with the reference that `export` wrote into it from the trained parameters, part by
part: tokenizer, prompts, backbone, pooling, scaling layer, prefixes, ONNX file, and the vectors of
sentence-transformers and JAX at every prefix. With --workdir the reference is computed anew from
the run's checkpoint. Without either, as of a directory from elsewhere, sentence-transformers
and JAX are compared with each other. Exits with 1 if anything differs, 2 if OUT can't be used.
Needs sentence-transformers and torch (requirements-dev.txt).
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from piccolo_jax import cli, export, metrics, runs
from piccolo_jax.errors import UserError
from piccolo_jax.evaluation import encoder
from piccolo_jax.exporting import layout, states
from piccolo_jax.exporting.reference import TEXTS, Reference
from piccolo_jax.verifying import files, onnx_run, served
from piccolo_jax.verifying.findings import Finding, largest_difference

TOLERANCE = 1e-4  # 1 - cosine


def main(argv: list[str]) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="piccolo_jax.verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--workdir", type=Path, help="of the run that OUT was exported from")
    parser.add_argument("--dims", default="", help="prefixes, e.g. 256,512; default: the trained")
    runs.add_flags(parser)
    args = parser.parse_args(argv[1:])
    stored = Reference.read(args.model)
    reference = stored
    if args.workdir:
        run = runs.read(args.workdir, args.checkpoint, args.weights)
        reference = _from_checkpoint(run, stored)
    if reference is None:
        return _compare_readers(args.model, args.dims)
    dims = _dims(args.dims, reference.embeddings.shape[1]) or reference.dims
    findings: list[Finding] = []
    columns: dict[str, list[float]] = {}
    try:
        for finding in _findings(args.model, reference, stored, dims, columns):
            findings.append(finding)
    except UserError as error:
        if not _different(findings):
            raise
        print(error, file=sys.stderr)  # likely of what is known to differ
    _print(findings, columns, dims)
    if different := _different(findings):
        print(f"different: {', '.join(different)}")
        return 1
    count = len(reference.texts)
    print(f"same vectors in sentence-transformers and JAX as trained, on {count} texts")
    return 0


def _findings(
    directory: Path,
    reference: Reference,
    stored: Reference | None,
    dims: list[int],
    columns: dict[str, list[float]],
) -> Iterator[Finding]:
    """All of them; `columns` gets differences at `dims` by who computed the vectors."""
    if stored is not None:
        yield from files.compare(directory, stored)
        if stored is not reference:
            yield from _same_reference(stored, reference)
    model = served.load(directory)
    yield from served.parts(model, reference)
    yield from _vectors(
        "sentence-transformers", lambda: served.embeddings(model, reference), reference, dims,
        columns,
    )  # fmt: skip
    yield from onnx_run.check(directory, reference)
    yield from _vectors("JAX", lambda: _encode(directory, reference), reference, dims, columns)
    dtype = reference.about["dtype"]
    if dtype != "float32":
        columns[f"{dtype} weights"] = [
            largest_difference(reference.trained, reference.embeddings, dim) for dim in dims
        ]
        as_it_is = served.embeddings(served.load(directory, as_float32=False), reference)
        if as_it_is.shape == reference.trained.shape:
            columns["as sentence-transformers loads it"] = [
                largest_difference(reference.trained, as_it_is, dim) for dim in dims
            ]
            yield Finding("embeddings", f"in {dtype}: finite", bool(np.isfinite(as_it_is).all()))


def _vectors(
    who: str,
    encode: Callable[[], np.ndarray],
    reference: Reference,
    dims: list[int],
    columns: dict[str, list[float]],
) -> Iterator[Finding]:
    """Whether the vectors that `who` gives of the reference's texts are the reference's."""
    part = "JAX" if who == "JAX" else "embeddings"
    try:
        theirs = encode()
    except UserError as error:
        yield Finding(part, str(error), False)
        return
    width = reference.embeddings.shape[1]
    if theirs.shape[1] != width:
        yield Finding(part, f"{who}: {theirs.shape[1]} dimensions, not {width}", False)
        return
    columns[who] = [largest_difference(reference.embeddings, theirs, dim) for dim in dims]
    largest = max(columns[who])
    yield Finding(part, f"{who}: 1 - cosine up to {largest:.1e}", largest <= TOLERANCE)


def _from_checkpoint(run: runs.Run, stored: Reference | None) -> Reference:
    """The reference that an export of the run would have."""
    about: dict[str, Any] = {"dtype": "float32", "onnx_dim": None} | (
        stored.about if stored else {}
    )
    _, config, parts, params = run
    trained = export.exported_of(params, parts, config)
    rounded = layout.rounded(trained, about["dtype"])
    return states.make_reference(
        rounded, trained, {name: about[name] for name in ("dtype", "onnx_dim")}
    )


def _same_reference(stored: Reference, computed: Reference) -> Iterator[Finding]:
    """Whether the export's own reference is that of the checkpoint."""
    what = "its reference is that of the checkpoint"
    if stored.embeddings.shape != computed.embeddings.shape:
        yield Finding("embeddings", what.replace("is", "is not", 1), False)
        return
    difference = largest_difference(
        stored.embeddings, computed.embeddings, computed.embeddings.shape[1]
    )
    same = difference <= TOLERANCE
    yield Finding("embeddings", what if same else f"{what}: differs by {difference:.1e}", same)


def _encode(directory: Path, reference: Reference) -> np.ndarray:
    """What JAX makes of the directory."""
    model, params = encoder.load(directory)
    return model.encode(params, reference.prompted)


def _compare_readers(directory: Path, dims: str) -> int:
    """Compares sentence-transformers with JAX where there is no reference."""
    model, params = encoder.load(directory)
    listed = _dims(dims, model.width) or _trained_dims(directory, model.width)
    ours = model.encode(params, TEXTS)
    reader = served.load(directory)
    reader.truncate_dim = None  # whole embeddings, whatever the directory says of prefixes
    theirs = served.encode(reader, TEXTS)
    if theirs.shape != ours.shape:
        print(f"sentence-transformers gives {theirs.shape[1]} dimensions, JAX {ours.shape[1]}")
        return 1
    column = [largest_difference(ours, theirs, dim) for dim in listed]
    _print([], {"largest 1 - cosine": column}, listed)
    if max(column) > TOLERANCE:
        print(f"different: more than {TOLERANCE} on {len(TEXTS)} texts")
        return 1
    print(
        f"same vectors in sentence-transformers and JAX on {len(TEXTS)} texts. Whether they are"
        " those that were trained can't be said: there is no reference of an export"
    )
    return 0


def _different(findings: list[Finding]) -> list[str]:
    """The parts that differ; vectors are named only where no part says why they differ."""
    parts = list(dict.fromkeys(f.part for f in findings if not f.same))
    causes = [part for part in parts if part not in ("embeddings", "JAX")]
    return causes or parts


def _print(findings: list[Finding], columns: dict[str, list[float]], dims: list[int]) -> None:
    if findings:
        rows = [(f.part, "same" if f.same else "DIFFERENT", f.what) for f in findings]
        width = [max(len(row[i]) for row in rows) for i in (0, 1)]
        for part, same, what in rows:
            print(f"{part.ljust(width[0])}  {same.ljust(width[1])}  {what}")
        print()
    if columns:
        header = ("prefix", *columns)
        cells = zip(dims, *columns.values(), strict=True)
        rows = [(dim, *(f"{value:.1e}" for value in values)) for dim, *values in cells]
        print(
            "largest 1 - cosine to what was trained:" if findings else "", end="\n" * bool(findings)
        )
        print(metrics.table(header, rows))


def _dims(text: str, width: int) -> list[int]:
    if not text:
        return []
    try:
        dims = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--dims={text}: must be numbers, e.g. 256,512") from None
    if any(not 1 <= dim <= width for dim in dims):
        raise UserError(f"--dims={text}: each must be from 1 to {width}, the model's width")
    return dims


def _trained_dims(directory: Path, width: int) -> list[int]:
    """The prefixes that the export names, else eighths of the width."""
    try:
        path = directory / "config_sentence_transformers.json"
        dims = json.loads(path.read_text(encoding="utf-8"))["matryoshka_dims"]
        return [int(dim) for dim in dims if 1 <= int(dim) <= width]
    except (OSError, ValueError, KeyError, TypeError):
        return sorted({max(width * eighth // 8, 1) for eighth in range(1, 9)})


if __name__ == "__main__":
    cli.run(main)
