"""Writes a trained model as a sentence-transformers directory.

    python -m piccolo_jax.export --workdir=DIR --output=OUT [--layout=6] [--dtype=bfloat16]
        [--checkpoint=latest|best] [--weights=average|last] [--onnx [--onnx-dim=256]]
        [--results=DIR] [--name=NAME] [--license=ID] [--overwrite]

The layout of 2024 (default) loads in sentence-transformers 2.2 to 6.x, that of 6 from 6.0 on. OUT
gets weights, tokenizer, a model card written from the run, and what `verify` compares it with.
"""

import argparse
import contextlib
import dataclasses
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from piccolo_jax import __version__, averaging, build, cli, metrics, runs
from piccolo_jax import config as config_lib
from piccolo_jax.checkpoint import BEST
from piccolo_jax.checkpoint import DIRECTORY as CHECKPOINTS
from piccolo_jax.config import Config
from piccolo_jax.errors import UserError
from piccolo_jax.exporting import card, layout, onnx_graph, reference, states
from piccolo_jax.exporting.layout import Exported, Options
from piccolo_jax.exporting.record import Record, read_record
from piccolo_jax.types import Params
from piccolo_jax.verifying.findings import largest_difference


def main(argv: list[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="piccolo_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, required=True, help="of the training run")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layout", choices=layout.LAYOUTS, default="2024", help="default: 2024")
    parser.add_argument("--dtype", choices=layout.DTYPES, default="float32", help="of the weights")
    parser.add_argument("--onnx", action="store_true", help="write onnx/model.onnx too")
    parser.add_argument("--onnx-dim", type=int, help="prefix that it is cut to; default: all")
    parser.add_argument("--results", type=Path, help="mteb results of this model, for its card")
    parser.add_argument("--name", default="", help="of the model; default: that of OUTPUT")
    parser.add_argument("--license", default="", help="of the model, as on the hub: apache-2.0")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    runs.add_flags(parser)
    args = parser.parse_args(argv[1:])
    _check_apart(args.output, args.workdir)
    check_output(args.output, args.overwrite)
    if args.onnx_dim is not None and not args.onnx:
        raise UserError(f"--onnx-dim={args.onnx_dim}: give --onnx too")
    if args.onnx:
        onnx_graph.require()
    options = Options(args.layout, args.dtype, (args.onnx_dim or 0) if args.onnx else None)
    if args.onnx_dim is not None and args.onnx_dim < 1:
        raise UserError(f"--onnx-dim={args.onnx_dim}: must be 1 or more")
    step, config, parts, params = runs.read(args.workdir, args.checkpoint, args.weights)
    weights = args.weights or averaging.default_weights(config)
    record = read_record(args.workdir, config, step, weights, args.results)
    record = dataclasses.replace(record, name=args.name, license=args.license)
    loss = write(
        args.output, jax.device_get(params), parts, config, args.overwrite, options, record
    )
    if loss:
        print(f"{args.dtype} loses, by its weights, in float32 products:")
        rows = [(dim, f"{difference:.1e}") for dim, difference in loss.items()]
        print(metrics.table(("prefix", "largest 1 - cosine"), rows))
    print(f"step {step} of {args.workdir} is in {args.output}")


def _check_apart(output: Path, workdir: Path) -> None:
    """Raises UserError if replacing `output` would take the run's checkpoints away."""
    for name in (CHECKPOINTS, BEST):
        kept, given = (workdir / name).resolve(), output.resolve()
        if given in (kept, *kept.parents) or kept in given.parents:
            raise UserError(
                f"--output={output}: holds the run of --workdir={workdir}; give a folder of its own"
            )


def check_output(output: Path, overwrite: bool) -> None:
    """Raises UserError if there is something at `output` that may not be replaced."""
    if not overwrite and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not empty; --overwrite replaces it")


def exported_of(params: Params, parts: build.Parts, config: Config) -> Exported:
    """What a run exports. `params` are numpy arrays, whole."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    return Exported(
        parts.model, parts.tokenizer, params, config.data.max_length, _prompts(config),
        config.loss.dims,
    )  # fmt: skip


def write(
    output: Path,
    params: Params,
    parts: build.Parts,
    config: Config,
    overwrite: bool = False,
    options: Options | None = None,
    record: Record | None = None,
) -> dict[int, float]:
    """Writes a run's export. `record`: what the run noted; None: only what the config says.

    Returns and raises what write_directory() does.
    """
    known = record or Record(config)
    exported = exported_of(params, parts, config)
    chosen = options or Options()

    def make_card(loss: dict[int, float]) -> str:
        return card.make(known, exported, known.name or output.absolute().name, chosen, loss)

    return write_directory(output, exported, make_card, overwrite, chosen)


def write_directory(
    output: Path,
    trained: Exported,
    make_card: Callable[[dict[int, float]], str],
    overwrite: bool = False,
    options: Options | None = None,
) -> dict[int, float]:
    """Writes the directory beside its place and then moves it there, so it is whole or absent.

    `make_card` gives README.md, from what is returned: for each trained prefix the largest
    1 - cosine that rounding to options.dtype costs; empty for float32.

    Raises UserError if something is at `output` that may not be replaced, if there is no room, or
    for a parameter that options.dtype can't hold.
    """
    options = options or Options()
    exported = layout.rounded(trained, options.dtype)
    dim = _onnx_dim(options, exported.width)
    with replacing(output, overwrite) as partial:
        layout.write(partial, exported, options)
        if dim:
            onnx_graph.write(partial, exported, dim)
        known = add_reference(partial, exported, trained, options, dim)
        loss = {}
        if options.dtype != "float32":
            loss = {d: largest_difference(known.trained, known.embeddings, d) for d in known.dims}
        (partial / "README.md").write_text(make_card(loss), encoding="utf-8")
    return loss


def add_reference(
    directory: Path, exported: Exported, trained: Exported, options: Options, onnx_dim: int = 0
) -> reference.Reference:
    """Writes what `verify` compares a directory with into it, which is otherwise whole.

    `exported` has the weights as written, `trained` before they were rounded.
    """
    about = {
        "piccolo_jax": __version__,
        "layout": options.layout,
        "dtype": options.dtype,
        "onnx_dim": onnx_dim,
        "files": reference.files_of(directory, exported.model.backbone.to_hf()),
    }
    known = states.make_reference(exported, trained, about)
    known.save(directory)
    return known


@contextlib.contextmanager
def replacing(output: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a new directory beside `output`, moved to its place if all goes well, else removed.

    Raises UserError for what check_output() says, and if it can't be written.
    """
    check_output(output, overwrite)
    output = output.absolute()
    partial = output.with_name(f"{output.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        yield partial
        _replace(partial, output)
    except Exception as error:
        # safetensors and tokenizers have errors of their own for full disks.
        if not isinstance(error, OSError) and "(os error " not in str(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{output}: can't be written ({reason}); make room, or give another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _onnx_dim(options: Options, width: int) -> int:
    """Of the ONNX file; 0: there is to be none."""
    if options.onnx_dim is None:
        return 0
    if options.onnx_dim > width:
        raise UserError(
            f"--onnx-dim={options.onnx_dim}: must be from 1 to {width}, the model's width"
        )
    return options.onnx_dim or width


def _replace(partial: Path, output: Path) -> None:
    """Moves a directory to a place where something may be; that is gone only when all is done."""
    if not output.exists():
        os.rename(partial, output)
        return
    old = partial.with_name(partial.name + "-old")
    os.rename(output, old)
    try:
        os.rename(partial, output)
    except OSError:
        os.rename(old, output)
        raise
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old)
    else:
        old.unlink()


def _prompts(config: Config) -> dict[str, str]:
    prompts = config_lib.shared_prompts(config)
    if "passage" in prompts:
        # sentence-transformers' encode_document looks for this one first, and has an empty one.
        prompts["document"] = prompts["passage"]
    return prompts


if __name__ == "__main__":
    cli.run(main)
