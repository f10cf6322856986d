"""Evaluates a model by mteb's protocol, on its benchmarks or on local files, at every dimension.

    python -m piccolo_jax.evaluate --model=DIR --benchmark="MTEB(cmn, v1)" [--tasks=TNews,Ocnli]
    python -m piccolo_jax.evaluate --model=DIR --data=FOLDER [--split=dev] [--limit=200]
    python -m piccolo_jax.evaluate --model=WORKDIR [--checkpoint=best] [--weights=last] ...
    python -m piccolo_jax.evaluate --compare OUTPUT [OUTPUT ...]

Each text is encoded once, at full width; every dimension is a cut of that. Run again, it evaluates
only what is missing in --output: results in mteb's schema, report.json and report.png.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from piccolo_jax import cli, distributed, runs
from piccolo_jax.config import MeshConfig
from piccolo_jax.errors import UserError
from piccolo_jax.evaluation import compare, files, models, report, together
from piccolo_jax.evaluation.models import Model
from piccolo_jax.evaluation.vectors import Encode, Vectors
from piccolo_jax.metrics import say
from piccolo_jax.models.pretrained import check_prompts

_MTEB = "mteb==2.26.24"
_NORMALIZE = {"auto": None, "yes": True, "no": False}


def main(argv: list[str]) -> None:
    """The command."""
    args = _parser().parse_args(argv[1:])
    _check(args)
    if args.compare:
        _compare(args)
        return
    distributed.start()
    mesh = MeshConfig(fsdp=args.fsdp, tensor=args.tensor)
    model = models.load(args.model, mesh, args.name, args.checkpoint, args.weights)
    dims = _dims(args.dims) or model.dims
    if max(dims) > model.width:
        raise UserError(f"--dims: {max(dims)} is more than the model's width, {model.width}")
    together.lead(model.encode, lambda encode: _evaluate(args, model, dims, encode))
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()  # not at exit, where torch takes its time on process 0 alone


def _evaluate(
    args: argparse.Namespace, model: Model, dims: tuple[int, ...], encode: Encode
) -> None:
    """On process 0: tasks, results, report."""
    start = time.monotonic()
    tasks = _tasks(args)
    from piccolo_jax.evaluation import run

    prompts = _prompts(args.prompts, tasks) if args.prompts else None
    settings = run.Settings(dims, prompts, _NORMALIZE[args.normalize], args.limit, args.overwrite)
    output = args.output or Path("evaluation")
    _check_output(output, args.model, args.data)
    say(f"{model.name} ({model.revision}): {len(tasks)} tasks at {', '.join(map(str, dims))}")
    folder = output / "vectors" / model.name.replace("/", "__") / model.revision
    with Vectors(folder, model.width, encode, jax.device_count(), progress=True) as vectors:
        entry = run.evaluate(model, vectors, tasks, settings, output)
    report.write(output, entry)
    report.figure(output / "report.png", [entry], args.published)
    print(report.text(entry))
    if args.limit:
        print(f"\nA quick look: at most {args.limit} queries or rows of each dataset.")
    seconds = time.monotonic() - start
    print(
        f"\n{vectors.encoded} texts encoded in this run, in {vectors.seconds:.1f} of its"
        f" {seconds:.1f} s"
    )
    print(f"results in {output / 'results'}, summary in {output / report.FILE} and report.png")


def _tasks(args: argparse.Namespace) -> list[Any]:
    """The tasks asked for. Raises UserError if mteb is missing, or for unknown names and files."""
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    listing = files.find(args.data) if args.data else None
    found = files.choose(listing, args.data, names, args.split) if listing else []
    try:
        import mteb  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"evaluate needs mteb ({error}): pip install {_MTEB} (or -r requirements-dev.txt)"
        ) from error
    from piccolo_jax.evaluation import local_tasks, selection

    if listing is None:
        return selection.select(args.benchmark, names)
    for path, why in listing.left_out:
        say(f"left out: {path}: {why}")
    return [local_tasks.make(each, split, args.limit) for each, split in found]


def _compare(args: argparse.Namespace) -> None:
    if args.output and args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output={args.output}: is a file; give a folder")
    loaded = compare.load(args.compare)
    names, notes = compare.shared_tasks(loaded)
    tables, parts = [], []
    for title, dims in compare.dims_of(loaded, _dims(args.dims)):
        rows = compare.compare(loaded, names, dims, args.resamples, args.seed)
        tables.append(compare.text(loaded, title, rows))
        parts.append({"dims": dims, "rows": [dataclasses.asdict(row) for row in rows]})
    for number, model in enumerate(loaded, 1):
        print(f"{number}: {report.label(model.entry)}")
    for note in notes:
        print(f"left out: {note}")
    print("\n" + "\n\n".join(tables))
    print(f"\n95% of {args.resamples} resamples, seed {args.seed}, the same ones for all models")
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        about = {"models": [report.label(model.entry) for model in loaded], "left_out": notes,
                 "resamples": args.resamples, "seed": args.seed, "comparisons": parts}  # fmt: skip
        about = report.without_nan(about)
        content = json.dumps(about, ensure_ascii=False, indent=1, allow_nan=False)
        (args.output / "comparison.json").write_text(content, encoding="utf-8")
        report.figure(args.output / "comparison.png", compare.shared(loaded, names), args.published)
        print(f"comparison.json and comparison.png in {args.output}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="piccolo_jax.evaluate", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--model", default="", help="an export, a workdir or a sentence-transformers folder")
    runs.add_flags(parser)
    add("--benchmark", default="", help='of mteb, e.g. "MTEB(cmn, v1)"; cmteb-2024: its 35 tasks')
    add("--tasks", default="", help="names, with commas: of mteb, or of --data or --benchmark")
    add("--data", type=Path, help="folder of local files instead of mteb's data sets")
    add("--split", default="", help="of local files; default: test, else dev")
    add("--limit", type=int, default=0, help="queries or rows of each local set, for a quick look")
    add("--dims", default="", help="e.g. 1792,768,256; default: those the model was trained for")
    add("--prompts", type=Path,
        help="JSON {KEY: prompt}, KEY a task, a type, `query`, `document` or TYPE-query; default:"
        " the model's")  # fmt: skip
    add("--normalize", choices=tuple(_NORMALIZE), default="auto",
        help="vectors to length 1 after the cut; auto: if the model has a Normalize module",
    )  # fmt: skip
    add("--output", type=Path, help="default: ./evaluation; of --compare: none, only a table")
    add("--name", default="", help="ORG/NAME in the results; default: the end of the model's path")
    add("--overwrite", action="store_true", help="evaluate again what is there")
    add("--published", action="store_true", help="draws the figures published for Piccolo2")
    add("--fsdp", type=int, default=1, help="devices that the model's parameters are split over")
    add("--tensor", type=int, default=1, help="devices that its products are split over")
    add("--compare", type=Path, nargs="+", metavar="OUTPUT", help="folders of evaluations")
    add("--resamples", type=int, default=1000, help="of the bootstrap; default: 1000")
    add("--seed", type=int, default=0, help="of the bootstrap; default: 0")
    return parser


def _check(args: argparse.Namespace) -> None:
    if bool(args.compare) == bool(args.model):
        raise UserError("give --model=DIR to evaluate, or --compare OUTPUT ... to compare")
    if args.resamples < 20:
        raise UserError(f"--resamples={args.resamples}: must be 20 or more")
    if args.seed < 0:
        raise UserError(f"--seed={args.seed}: must be 0 or greater")
    _dims(args.dims)
    if args.compare:
        return
    if args.data is not None and args.benchmark:
        raise UserError("--data and --benchmark exclude each other: local files, or mteb's data")
    if args.data is None and not args.benchmark and not args.tasks:
        raise UserError('say on what: --benchmark="MTEB(cmn, v1)", --tasks=NAME or --data=FOLDER')
    if args.limit < 0:
        raise UserError(f"--limit={args.limit}: must be 0 (all) or greater")
    for flag in ("limit", "split"):
        if getattr(args, flag) and args.data is None:
            raise UserError(f"--{flag} is of local files; it needs --data=FOLDER")


def _check_output(output: Path, model: str, data: Path | None) -> None:
    """Raises UserError for a place where writing changes the model or the data, or is no folder."""
    above = (output.resolve(), *output.resolve().parents)
    place = Path(model)
    if place.is_dir() and place.resolve() in above and not (place / "checkpoints").is_dir():
        raise UserError(f"--output={output}: is within the model's folder; give another")
    if data is not None and data.resolve() in above:
        raise UserError(f"--output={output}: is within --data={data}; give another")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output}: is a file; give a folder")
    output.mkdir(parents=True, exist_ok=True)


def _dims(text: str) -> tuple[int, ...]:
    """Falling. Empty if none are named."""
    try:
        dims = {int(part) for part in text.split(",")} if text else set()
    except ValueError:
        dims = {0}
    if dims and min(dims) < 1:
        raise UserError(f"--dims={text}: must be numbers above 0, e.g. 1792,768,256")
    return tuple(sorted(dims, reverse=True))


def _prompts(path: Path, tasks: Sequence[Any]) -> dict[str, str]:
    """Raises UserError for a file that isn't {KEY: prompt}, and for a key that says nothing."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
            raise ValueError("not an object of texts")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f'--prompts={path}: must be JSON like {{"query": "query: "}} ({error})'
        ) from None
    check_prompts(f"--prompts={path}", values)
    values = {"document" if k == "passage" else k.replace("-passage", "-document"): v
              for k, v in values.items()}  # fmt: skip
    kinds = {task.metadata.type for task in tasks} | set(files.TYPES)
    known = kinds | {task.metadata.name for task in tasks}
    known |= {f"{name}-{text}" for name in known for text in ("query", "document")}
    for key in values:
        if key not in known | {"query", "document"}:
            raise UserError(
                f"--prompts={path}: {key!r} is none of query, document, {', '.join(sorted(kinds))},"
                " a task evaluated here, or one of those two with -query or -document"
            )
    return values


if __name__ == "__main__":
    cli.run(main)
