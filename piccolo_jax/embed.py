"""Encodes the texts of a file with an exported model.

    python -m piccolo_jax.embed --model=OUT --input=FILE.jsonl --output=FILE.npy [--dim=256]
        [--prompt-name=query] [--precision=int8|binary [--calibration=FILE]]

Writes [lines, dim]: cut to the prefix, then normalised; row n is line n of the input. float32; int8
as codes; binary as bits, uint8 [lines, ceil(dim / 8)]. Codes are calibrated on the embeddings
themselves, and the calibration is written beside them as FILE.calibration.safetensors; or they are
made by the calibration that is given.
"""

import argparse
import json
import os
import uuid
from pathlib import Path

import numpy as np

from piccolo_jax import cli
from piccolo_jax.encoder import Encoder
from piccolo_jax.errors import UserError
from piccolo_jax.quantize import PRECISIONS, Quantizer, recall

_QUERIES, _DOCUMENTS, _NEAREST = 200, 20_000, 10  # with which recall is measured


def main(argv: list[str]) -> None:
    """The command."""
    args = _parser().parse_args(argv[1:])
    _check_output(args)
    quantizer = Quantizer.load(args.calibration) if args.calibration else None
    if quantizer and quantizer.precision != args.precision:
        raise UserError(
            f"--calibration={args.calibration}: is of {quantizer.precision}, but"
            f" --precision={args.precision}"
        )
    texts = read_texts(args.input, args.field)
    if args.precision != "float32" and not quantizer and len(texts) < 2:
        raise UserError(f"{args.input}: one text is too few to calibrate on: give --calibration")
    model = Encoder.load(args.model)
    dim = model.default_dim if args.dim is None else args.dim
    if not 1 <= dim <= model.width:
        raise UserError(f"--dim={args.dim}: must be from 1 to {model.width}, the model's width")
    if quantizer and quantizer.dim != dim:
        raise UserError(
            f"--calibration={args.calibration}: is of {quantizer.dim} dimensions, not of {dim}"
        )
    embeddings = model.encode(
        texts, dim=dim, prompt=args.prompt, prompt_name=args.prompt_name, progress=True
    )
    rows = embeddings
    if args.precision != "float32":
        if quantizer is None:
            quantizer = Quantizer.fit(embeddings, args.precision)
            quantizer.save(calibration_path(args.output))
        rows = quantizer.quantize(embeddings)
    _write(args.output, rows)
    print(f"{len(texts)} texts x {dim} in {args.output}")
    if quantizer:
        loss = _recall(embeddings, quantizer)
        print(f"{rows.nbytes:,} bytes instead of {embeddings.nbytes:,}{loss}")


def _recall(embeddings: np.ndarray, quantizer: Quantizer) -> str:
    """What the codes lose: some of the texts are queries, others the documents."""
    is_query = np.arange(len(embeddings)) % max(len(embeddings) // _QUERIES, 10) == 0
    queries, documents = embeddings[is_query], embeddings[~is_query][:_DOCUMENTS]
    if len(documents) <= _NEAREST:
        return ""
    share = recall(queries, documents, quantizer, _NEAREST)
    return (
        f"; of the {_NEAREST} nearest of {len(documents)} texts, {share:.1%} are found"
        f" ({len(queries)} other texts as queries)"
    )


def calibration_path(output: Path) -> Path:
    """Where the calibration of an output goes."""
    return output.with_name(f"{output.name.removesuffix('.npy')}.calibration.safetensors")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="piccolo_jax.embed", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--model", required=True, help="a sentence-transformers folder, or hub id")
    add("--input", type=Path, required=True, help="JSON lines (or plain .txt)")
    add("--output", type=Path, required=True, help="a .npy file to write")
    add("--dim", type=int, help="prefix to cut to; default: all, or the model's")
    add("--field", default="text", help="of each JSON object; default: text")
    add("--prompt", help="put before every text; default: the model's default prompt, if any")
    add("--prompt-name", help="the same, by its name in the model's folder, e.g. query")
    add("--precision", choices=("float32", *PRECISIONS), default="float32")
    add("--calibration", type=Path, help="of another output, e.g. that of the corpus for queries")
    add("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    return parser


def _check_output(args: argparse.Namespace) -> None:
    output = args.output
    if output.is_dir():
        raise UserError(f"--output={output}: is a folder; name a file to write")
    if args.calibration and args.precision == "float32":
        raise UserError("--calibration: is for --precision=int8 or binary")
    written = [output]
    if args.precision != "float32" and not args.calibration:
        written.append(calibration_path(output))
    for path in written:
        if path.exists() and not args.overwrite:
            raise UserError(f"{path} exists; --overwrite replaces it")
        for source in (args.input, args.calibration):
            if source and path.exists() and source.exists() and path.samefile(source):
                raise UserError(f"{path}: is read, and can't be written too; name another --output")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output={output}: the folder does not exist")


def _write(output: Path, rows: np.ndarray) -> None:
    partial = output.with_name(f"{output.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        with partial.open("wb") as file:
            np.save(file, rows)
        os.replace(partial, output)
    except OSError as error:
        raise UserError(
            f"{output}: can't be written ({error.strerror or error}); make room, or give another"
            " folder"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def read_texts(path: Path, field: str) -> list[str]:
    """The texts of a file: `field` of each line's object, or each line of a .txt file.

    Raises UserError naming the file and line of one that can't be encoded.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read ({error})") from None
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise UserError(f"{path}: is empty")
    if path.suffix == ".txt":
        return lines
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            text = json.loads(line)[field]
            if not isinstance(text, str):
                raise TypeError(f"{field!r} is not a text")
            text.encode()
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{path}:{number}: must be a JSON object with a text in {field!r}"
                f" ({type(error).__name__}: {error}); --field names another"
            ) from None
        texts.append(text)
    return texts


if __name__ == "__main__":
    cli.run(main)
