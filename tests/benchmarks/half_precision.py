"""What half precision loses on a real model and real texts.

    python tests/benchmarks/half_precision.py --model=DIR --pairs=FILE.jsonl --beir=DIR
        --workdir=DIR [--split=test] [--rows=500] [--queries=100] [--passages=1000]

Exports the model in each type, then encodes the first rows of scored pairs and a part of a
retrieval set with sentence-transformers: weights in that type with products in float32, and as it
loads them. Prints, against float32, the largest 1 - cosine over the texts, Spearman's correlation
and nDCG@10. Passages are the positives of the queries and the first others.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import numpy as np

from piccolo_jax import build, export, metrics, sharding
from piccolo_jax.config import Config, DatasetConfig, EvalDatasetConfig, MeshConfig
from piccolo_jax.evaluation.local import EvalDataset
from piccolo_jax.exporting.layout import DTYPES, Options
from piccolo_jax.models import pretrained
from piccolo_jax.verifying import served
from piccolo_jax.verifying.findings import largest_difference

QUERY, PASSAGE = "query: ", "passage: "  # the prompts of E5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("--model", "--pairs", "--beir", "--workdir"):
        parser.add_argument(flag, type=Path, required=True)
    parser.add_argument("--split", default="test")
    for flag, default in (("--rows", 500), ("--queries", 100), ("--passages", 1000)):
        parser.add_argument(flag, type=int, default=default)
    args = parser.parse_args()
    small = part_of(args.beir, args.workdir / "beir", args.split, args.queries, args.passages)
    evals = [
        EvalDataset(EvalDatasetConfig(str(args.pairs), max_rows=args.rows, query_prompt=QUERY)),
        EvalDataset(EvalDatasetConfig(
            str(small), split=args.split, query_prompt=QUERY, passage_prompt=PASSAGE
        )),
    ]  # fmt: skip
    reference: list[np.ndarray] = []
    rows = []
    for dtype in DTYPES:
        directory = args.workdir / dtype
        write(args.model, directory, dtype)
        for loaded in (True, False) if dtype != "float32" else (True,):
            model = served.load(directory, as_float32=loaded)
            vectors: list[np.ndarray] = []

            def encode(texts, prompt, model=model, vectors=vectors):
                vectors.append(served.encode(model, texts, prompt))
                return vectors[-1]

            width = pretrained.read_spec(directory).backbone.hidden_size
            scores = [dataset.evaluate(encode, [width])[width] for dataset in evals]
            reference = reference or vectors
            worst = max(
                largest_difference(x, y, width) for x, y in zip(reference, vectors, strict=True)
            )
            weights = sum(p.stat().st_size for p in directory.rglob("model.safetensors"))
            products = "float32" if loaded else dtype
            rows.append(
                [dtype, products, f"{weights / 1e6:.0f} MB", f"{worst:.1e}"]
                + [f"{score:.4f}" for score in scores]
            )
            print(rows[-1], file=sys.stderr, flush=True)
    names = [f"{dataset.name} {dataset.task}" for dataset in evals]
    print(metrics.table(("weights", "products", "size", "largest 1 - cosine", *names), rows))


def write(model: Path, directory: Path, dtype: str) -> None:
    """An export of the model as it is."""
    config = Config()
    config.model.init, config.model.embed_dim = str(model), 0
    spec = pretrained.read_spec(model)
    config.data.datasets = (DatasetConfig("none", query_prompt=QUERY, passage_prompt=PASSAGE),)
    config.data.max_length = min(spec.backbone.max_positions, 512)
    config.loss.dims = (spec.backbone.hidden_size,)
    parts = build.build(config)
    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
    params = build.make_params(parts, 0, build.param_shardings(parts.model, mesh))
    params, options = jax.device_get(params), Options(dtype=dtype)
    export.write(directory, params, parts, config, overwrite=True, options=options)


def part_of(beir: Path, folder: Path, split: str, queries: int, passages: int) -> Path:
    """A retrieval set of the first queries, their positives, and the first other passages."""
    folder.mkdir(parents=True, exist_ok=True)

    def lines(name):
        return (beir / name).read_text(encoding="utf-8").splitlines()

    chosen = lines(f"queries.{split}.jsonl")[:queries]
    ids = {json.loads(line)["id"] for line in chosen}
    header, *qrels = lines(f"qrels.{split}.tsv")
    if not header.split("\t")[-1].isdigit():
        qrels = [line for line in qrels if line.split("\t")[0] in ids]
    else:
        header, qrels = "", [line for line in [header, *qrels] if line.split("\t")[0] in ids]
    columns = [line.split("\t") for line in qrels]
    wanted = {part[-2] for part in columns}
    corpus = lines("corpus.jsonl")
    positives = [line for line in corpus if json.loads(line)["id"] in wanted]
    others = [line for line in corpus if json.loads(line)["id"] not in wanted]
    kept = positives + others[: max(passages - len(positives), 0)]
    for name, content in (
        (f"queries.{split}.jsonl", chosen),
        (f"qrels.{split}.tsv", [header] * bool(header) + qrels),
        ("corpus.jsonl", kept),
    ):
        (folder / name).write_text("\n".join(content) + "\n", encoding="utf-8")
    return folder


if __name__ == "__main__":
    main()
