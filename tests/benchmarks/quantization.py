"""What codes lose in retrieval: nDCG@10, and the share of float32's 10 nearest that are found.

    python tests/benchmarks/quantization.py --model=DIR --data=FOLDER [--data=FOLDER ...]
        [--split=test] [--queries=400] [--documents=2000] [--dims=64,128,256,384]

FOLDER is a BEIR folder (corpus.jsonl, queries.SPLIT.jsonl, qrels.SPLIT.tsv). Documents are those
that are relevant to the queries drawn, and others. They become codes; a calibration is made on
half of the documents, and queries stay float32.
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from piccolo_jax import Encoder
from piccolo_jax.evaluation.encoder import cut
from piccolo_jax.evaluation.local import ndcg_at_10
from piccolo_jax.quantize import Quantizer

METHODS = {
    "int8": lambda x: Quantizer.fit(x, "int8"),
    "int8, 0.1 % beyond each end": lambda x: within(x, 0.001),
    "int8, 1 % beyond each end": lambda x: within(x, 0.01),
    "binary": lambda x: Quantizer.fit(x, "binary"),
    "binary, queries too": lambda x: Quantizer.fit(x, "binary"),
    "binary, not centred": lambda x: Quantizer.fit(x, "binary", centre=False),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, action="append", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--dims", default="64,128,256,384")
    args = parser.parse_args()
    encoder = Encoder.load(args.model)
    for folder in args.data:
        queries, documents, gains = read(folder, args)
        x = encoder.encode(queries, prompt="query: ", normalize=False, progress=True)
        y = encoder.encode(documents, prompt="passage: ", normalize=False, progress=True)
        print(f"\n{folder.name}: {len(x)} queries, {len(y)} documents; nDCG@10 (recall@10)")
        show(x, y, gains, [int(dim) for dim in args.dims.split(",")])


def show(x, y, gains, dims):
    print(f"| | {' | '.join(map(str, dims))} |\n| --- |{' --- |' * len(dims)}")
    exact = [ndcg_at_10(cut(x, dim), cut(y, dim), gains) for dim in dims]
    print(f"| float32 | {' | '.join(f'{score:.4f}' for score in exact)} |")
    for name, fit in METHODS.items():
        cells = []
        for dim in dims:
            queries, documents = cut(x, dim), cut(y, dim)
            quantizer = fit(documents[::2])
            codes = quantizer.quantize(documents)
            scores = quantizer.scores(queries, codes)
            if name == "binary, queries too":  # by the number of equal bits
                asked, bits = (
                    np.unpackbits(c, axis=1) for c in (quantizer.quantize(queries), codes)
                )
                scores = (2.0 * asked - 1) @ (2.0 * bits - 1).T
            same = [
                len(set(a) & set(b)) / 10
                for a, b in zip(nearest(queries @ documents.T), nearest(scores), strict=True)
            ]
            ndcg = ndcg_at_10(scores, np.eye(len(documents)), gains)
            cells.append(f"{ndcg:.4f} ({np.mean(same):.3f})")
        print(f"| {name} | {' | '.join(cells)} |")


def nearest(scores):
    return np.argsort(-scores, axis=1, kind="stable")[:, :10].tolist()


def within(x, share):
    """int8 whose ranges leave out a share of the values at each end."""
    return Quantizer(ranges=np.quantile(x, (share, 1 - share), axis=0).astype(np.float32))


def read(folder, args):
    """Queries, documents and the gains of each query's documents."""
    rng = random.Random(0)
    corpus = {row["id"]: row for row in lines(folder / "corpus.jsonl")}
    texts = {row["id"]: row["text"] for row in lines(folder / f"queries.{args.split}.jsonl")}
    relevant = {}
    for line in (folder / f"qrels.{args.split}.tsv").read_text("utf-8").splitlines():
        query, document, gain = line.split("\t")
        if query in texts and document in corpus and float(gain) > 0:
            relevant.setdefault(query, {})[document] = float(gain)
    drawn = rng.sample(sorted(relevant), min(args.queries, len(relevant)))
    needed = {document for query in drawn for document in relevant[query]}
    others = sorted(corpus.keys() - needed)
    more = min(max(args.documents - len(needed), 0), len(others))
    ids = sorted(needed) + rng.sample(others, more)
    rng.shuffle(ids)
    place = {document: i for i, document in enumerate(ids)}
    documents = [f"{corpus[i].get('title') or ''} {corpus[i]['text']}".strip() for i in ids]
    gains = [{place[d]: gain for d, gain in relevant[query].items()} for query in drawn]
    return [texts[query] for query in drawn], documents, gains


def lines(path):
    return [json.loads(line) for line in path.open(encoding="utf-8")]


if __name__ == "__main__":
    main()
