"""Encodes the texts of a file with an exported model.

    python -m piccolo_jax.embed --model=OUT --input=FILE.jsonl --output=FILE.npy [--dim=256]

Writes float32 [lines, dim]: cut to the prefix, then normalised; row n is line n of the input.
"""

import argparse
import json
import os
import uuid
from pathlib import Path

import numpy as np

from piccolo_jax import cli
from piccolo_jax.errors import UserError
from piccolo_jax.evaluation import encoder


def main(argv: list[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="piccolo_jax.embed", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a sentence-transformers folder")
    parser.add_argument("--input", type=Path, required=True, help="JSON lines (or plain .txt)")
    parser.add_argument("--output", type=Path, required=True, help="a .npy file to write")
    parser.add_argument("--dim", type=int, default=0, help="prefix to cut to; default: all")
    parser.add_argument("--field", default="text", help="of each JSON object; default: text")
    parser.add_argument("--prompt", default="", help="put before every text")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    args = parser.parse_args(argv[1:])
    if args.output.is_dir():
        raise UserError(f"--output={args.output}: is a folder; name a file to write")
    if args.output.exists() and not args.overwrite:
        raise UserError(f"{args.output} exists; --overwrite replaces it")
    if not args.output.absolute().parent.is_dir():
        raise UserError(f"--output={args.output}: the folder does not exist")
    texts = read_texts(args.input, args.field)
    model, params = encoder.load(args.model)
    if not 0 <= args.dim <= model.width:
        raise UserError(f"--dim={args.dim}: must be from 1 to {model.width}, the model's width")
    embeddings = model.encode(params, texts, args.prompt, progress="encoding")
    partial = args.output.with_name(f"{args.output.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        with partial.open("wb") as file:
            np.save(file, encoder.cut(embeddings, args.dim or model.width))
        os.replace(partial, args.output)
    except OSError as error:
        raise UserError(f"{args.output}: can't be written ({error.strerror})") from error
    finally:
        partial.unlink(missing_ok=True)
    print(f"{len(texts)} texts x {args.dim or model.width} in {args.output}")


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
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}:{number}: must be a JSON object with a text in {field!r}"
                f" ({type(error).__name__}: {error}); --field names another"
            ) from None
        texts.append(text)
    return texts


if __name__ == "__main__":
    cli.run(main)
