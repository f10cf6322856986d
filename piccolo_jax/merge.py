"""Merges exported models of one architecture into one, weight by weight.

    python -m piccolo_jax.merge --output=OUT A B [C ...] [--weights=0.7,0.3]
        [--method=linear|slerp] [--eval=FILE ...] [--overwrite]

A, B, ... are sentence-transformers directories with the same architecture, tokenizer, pooling,
prompts, maximum length and trained prefixes. `linear` takes the mean with the weights, which are
made to sum to 1 (default: equal); `slerp` goes along the arc between the tensors, one model after
the other. OUT is such a directory, in float32. With --eval, files as in config.eval.datasets, a
table compares the inputs and the merge at every prefix; it is in OUT's model card too.
"""

import argparse
import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from piccolo_jax import __version__, cli, export, metrics
from piccolo_jax.config import EvalDatasetConfig
from piccolo_jax.data.tokenizer import Tokenizer
from piccolo_jax.errors import UserError
from piccolo_jax.evaluation import encoder
from piccolo_jax.evaluation.local import METRICS, EvalDataset, open_datasets
from piccolo_jax.exporting.layout import Exported, Options
from piccolo_jax.metrics import say
from piccolo_jax.models import modules, pretrained
from piccolo_jax.models.embedder import Embedder

_PARALLEL = 0.9995  # cosine from which an arc is a line, as in mergekit (arXiv 2403.13257)
_COPIED = ("*.json", "*.txt", "*.model")  # of the first model
_NOT_COPIED = ("model.safetensors.index.json", "onnx", "openvino")
Tensors = dict[str, np.ndarray]  # by "backbone/NAME" or "scaling/NAME", as in safetensors files


def main(argv: list[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="piccolo_jax.merge", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("models", type=Path, nargs="+", help="sentence-transformers directories")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--weights", default="", help="one for each model; default: equal")
    parser.add_argument("--method", choices=("linear", "slerp"), default="linear")
    parser.add_argument("--eval", action="append", default=[], metavar="FILE", help="repeatable")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    args = parser.parse_args(argv[1:])
    models: list[Path] = args.models
    if len(models) < 2:
        raise UserError("merge takes two models or more")
    weights = parse_weights(args.weights, len(models))
    export.check_output(args.output, args.overwrite)
    specs = [pretrained.read_spec(model) for model in models]
    check_same(models, specs)
    prompts = specs[0].prompts
    evals = open_datasets([
        EvalDatasetConfig(
            path=path, query_prompt=prompts.get("query", ""),
            passage_prompt=prompts.get("passage", ""),
        )
        for path in args.eval
    ])  # fmt: skip
    names = [model.resolve().name for model in models]  # no paths of this machine in a model card
    if len(set(names)) < len(names):
        names = [f"{number}: {name}" for number, name in enumerate(names, 1)]
    merged, linear = merge(specs, weights, args.method)
    with export.replacing(args.output, args.overwrite) as partial:
        _write_model(partial, models[0], merged)
        table = _evaluate([*models, partial], [*names, "merged"], evals)
        card = _model_card(names, weights, args.method, table, _dims(models[0], _width(specs[0])))
        (partial / "README.md").write_text(card, encoding="utf-8")
        if unknown := list(_unknown_to_a_reference(partial)):
            say(f"verify can't know all of {args.output}, which has {', '.join(unknown)}")
        else:
            exported = _exported(partial)
            export.add_reference(partial, exported, exported, Options())
    if args.method == "slerp":
        say(f"{linear} of {len(merged)} tensors are nearly parallel or 0: merged linearly")
    if table:
        print(f"{table}\n")
    print(f"{len(models)} models are merged in {args.output}")


def parse_weights(text: str, count: int) -> list[float]:
    """The weights of --weights, made to sum to 1; equal ones for an empty text.

    Raises UserError unless there are `count`, not negative, not all 0 and of a finite sum.
    """
    if not text:
        return [1 / count] * count
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--weights={text}: must be numbers, e.g. 0.7,0.3") from None
    if len(weights) != count:
        raise UserError(f"--weights={text}: has {len(weights)} numbers for {count} models")
    if not all(w >= 0 for w in weights) or not 0 < sum(weights) < math.inf:
        raise UserError(f"--weights={text}: must be 0 or greater, not all 0, of a finite sum")
    return [w / sum(weights) for w in weights]


def check_same(models: Sequence[Path], specs: Sequence[pretrained.Pretrained]) -> None:
    """Raises UserError with every field in which a model differs from the first."""
    first = dict(_fields(models[0], specs[0]))
    for model, spec in zip(models[1:], specs[1:], strict=True):
        other = dict(_fields(model, spec))
        lines = [
            f"{field}: {first.get(field)!r} in {models[0]}, {other.get(field)!r} in {model}"
            for field in first.keys() | other.keys()
            if first.get(field) != other.get(field)
        ]
        if lines:
            raise UserError("models that differ can't be merged:\n  " + "\n  ".join(sorted(lines)))


def _fields(model: Path, spec: pretrained.Pretrained) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(spec.backbone):
        if "dropout" not in field.name:  # of training
            yield f"config.json {field.name}", getattr(spec.backbone, field.name)
    yield "pooling", spec.pooling or "mean"
    yield "width of the Dense module", spec.embed_dim
    yield "Normalize module", spec.normalize
    yield "prompts", spec.prompts
    yield "default_prompt_name", spec.default_prompt
    yield "do_lower_case", spec.lower_case
    yield "max_seq_length", spec.max_seq_length
    yield "matryoshka_dims", _dims(model, _width(spec))
    yield "truncate_dim", spec.truncate_dim
    yield "similarity_fn_name", _similarity(model)
    tokenizer = json.loads(Tokenizer(spec.tokenizer).hf.backend_tokenizer.to_str())
    for part in ("normalizer", "pre_tokenizer", "model", "post_processor", "added_tokens"):
        yield f"tokenizer's {part}", _Content(tokenizer.get(part))


class _Content:
    """A value to be compared, too long to be shown."""

    def __init__(self, value: Any):
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Content) and self._value == other._value

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        kind = self._value.get("type", "") if isinstance(self._value, dict) else ""
        size = len(json.dumps(self._value, ensure_ascii=False))
        return f"{kind} of {size} characters".strip()


def merge(
    specs: Sequence[pretrained.Pretrained], weights: Sequence[float], method: str
) -> tuple[Tensors, int]:
    """The merged tensors, float32, and how many of them were merged linearly.

    Models come one after the other, each with the part that its weight has in those so far, which
    for `linear` is the weighted mean; `slerp` of more than two depends on their order a little.
    Raises UserError naming a tensor that is not finite.
    """
    total, merged, linear = 0.0, {}, set()
    for spec, weight in zip(specs, weights, strict=True):
        total += weight
        if not weight:
            continue
        for name, value in _tensors(spec).items():
            if not np.isfinite(value).all():
                raise UserError(f"{spec.path}: tensor {name} has values that are not finite")
            if name not in merged:
                merged[name] = value.astype(np.float64)
            elif (
                method == "slerp"
                and (arc := slerp(merged[name], value, weight / total)) is not None
            ):
                merged[name] = arc
            else:
                merged[name] += (weight / total) * (value - merged[name])
                linear.add(name)
    return {name: value.astype(np.float32) for name, value in merged.items()}, len(linear)


def slerp(start: np.ndarray, end: np.ndarray, part: float) -> np.ndarray | None:
    """The tensor at `part` of the arc from `start` to `end`, each taken as one vector, in float64.

    sin((1 - part) a) / sin(a) start + sin(part a) / sin(a) end, with the angle a between them
    (Shoemake, "Animating rotation with quaternion curves", 1985). None where there is no such arc
    worth the name, as in mergekit: one is 0, or they are nearly parallel or opposite.
    """
    x, y = start.astype(np.float64).ravel(), end.astype(np.float64).ravel()
    lengths = np.linalg.norm(x) * np.linalg.norm(y)
    if not lengths:
        return None
    cosine = float(x @ y / lengths)
    if abs(cosine) > _PARALLEL:
        return None
    angle = math.acos(cosine)
    arc = (math.sin((1 - part) * angle) * x + math.sin(part * angle) * y) / math.sin(angle)
    return np.asarray(arc.reshape(start.shape))


def _tensors(spec: pretrained.Pretrained) -> Tensors:
    params = pretrained.load_params(spec.path, spec.backbone, spec.embed_dim)
    backbone, scaling = pretrained.to_hf(params, spec.backbone)
    parts = {"backbone": backbone, "scaling": scaling}
    return {f"{part}/{name}": v for part, tensors in parts.items() for name, v in tensors.items()}


def _write_model(output: Path, first: Path, merged: Tensors) -> None:
    """The first model's files with the merged weights, without what was made from its own."""
    for pattern in _COPIED:
        for path in first.rglob(pattern):
            place = path.relative_to(first)
            if not set(place.parts) & set(_NOT_COPIED) and not place.name.startswith("."):
                (output / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, output / place)
    parts = modules.read_modules(output)
    backbone, dense = parts.get("Transformer", output), parts.get("Dense")
    config_path = backbone / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config |= {field: "float32" for field in ("torch_dtype", "dtype") if field in config}
    text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    config_path.write_text(text, encoding="utf-8")
    if dense and not modules.read_dense(dense, config["hidden_size"])[1]:
        del merged["scaling/linear.bias"]  # 0, and none in its file
    folders = {"backbone": backbone, "scaling": dense}
    for part, folder in folders.items():
        tensors = {
            name.removeprefix(f"{part}/"): value
            for name, value in merged.items()
            if name.startswith(f"{part}/")
        }
        if tensors and folder:
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _unknown_to_a_reference(directory: Path) -> Iterator[str]:
    """What no export has, so that `verify` would take it for a difference."""
    spec = pretrained.read_spec(directory)
    if spec.normalize:
        yield "a Normalize module"
    if spec.default_prompt:
        yield "a default prompt"
    if spec.lower_case:
        yield "do_lower_case"
    if spec.truncate_dim:
        yield "truncate_dim"
    if spec.tokenizer != directory:
        yield "its Transformer in a folder"
    listed = modules.read_modules(directory).get("Pooling")
    if listed and listed != directory / "1_Pooling":
        yield "its Pooling in another folder"
    if (similarity := _similarity(directory)) != "cosine":
        yield f"similarity {similarity}"


def _similarity(directory: Path) -> str:
    """What sentence-transformers compares vectors by."""
    path = directory / "config_sentence_transformers.json"
    about = modules.read_json(path) if path.exists() else {}
    return about.get("similarity_fn_name") or "cosine"


def _exported(directory: Path) -> Exported:
    """The merged model as `verify` is to know it."""
    spec = pretrained.read_spec(directory)
    most = spec.backbone.max_positions
    return Exported(
        Embedder(spec.backbone, pooling=spec.pooling or "mean", embed_dim=spec.embed_dim),
        Tokenizer(spec.tokenizer, lower_case=spec.lower_case),
        pretrained.load_params(directory, spec.backbone, spec.embed_dim),
        min(spec.max_seq_length or most, most),
        spec.prompts,
        tuple(_dims(directory, _width(spec))),
    )


def _evaluate(models: Sequence[Path], names: Sequence[str], evals: Sequence[EvalDataset]) -> str:
    """A table of every model's scores on every set at every prefix; empty without sets."""
    rows: list[list[str]] = []
    dims: list[int] = []
    for model, name in zip(models, names, strict=True) if evals else ():
        embedder, params = encoder.load(model)
        dims = _dims(models[0], embedder.width)
        encode = functools.partial(embedder.encode, params, progress=f"evaluating {name}")
        for dataset in evals:
            scores = dataset.evaluate(encode, dims)
            label = f"{dataset.name} {METRICS[dataset.task]}"
            rows.append([label, name, *(f"{scores[dim]:.4f}" for dim in dims)])
    rows.sort(key=lambda row: row[0])  # stable: models stay in order
    return metrics.table(["dataset", "model", *map(str, dims)], rows) if rows else ""


def _width(spec: pretrained.Pretrained) -> int:
    return spec.embed_dim or spec.backbone.hidden_size


def _dims(model: Path, width: int) -> list[int]:
    """The trained prefixes that an export names; else the width."""
    try:
        path = model / "config_sentence_transformers.json"
        dims = json.loads(path.read_text(encoding="utf-8"))["matryoshka_dims"]
        return [int(dim) for dim in dims if 1 <= int(dim) <= width] or [width]
    except (OSError, ValueError, KeyError, TypeError):
        return [width]


def _model_card(
    names: Sequence[str], weights: Sequence[float], method: str, table: str, dims: list[int]
) -> str:
    merged = "\n".join(
        f"- {name}: {weight:.4g}" for name, weight in zip(names, weights, strict=True)
    )
    how = {
        "linear": "the weighted mean of their tensors",
        "slerp": "spherical interpolation of their tensors, one after the other (linear where they"
        " are nearly parallel)",
    }[method]
    scores = f"\nScores by prefix:\n\n```\n{table}\n```\n" if table else ""
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction, merge, piccolo_jax]
---
A text-embedding model, merged with piccolo_jax {__version__} from these, with their weights:

{merged}

by {how} ({method}). Its tokenizer, pooling and prompts are theirs. Trained prefixes:
{", ".join(map(str, dims))}. Cut first, then normalise.
{scores}"""


if __name__ == "__main__":
    cli.run(main)
