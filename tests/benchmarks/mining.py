"""Exact search against faiss.IndexFlatIP on real passages: speed, peak memory, same neighbours.

    python tests/benchmarks/mining.py --data=FOLDER [--passages=100000] [--queries=10000]
        [--dims=384,1792] [--ks=100,1000] [--rounds=3] [--model=DIR --cache=DIR]

FOLDER holds JSON lines, at any depth; their texts, each once, are passages and then queries.
Without --model a text's vector is the sum of random ones, of 384 dimensions, for its pairs of
characters; with it, the model's embedding, cached. It is widened to each of --dims by an orthogonal
map, which keeps all cosines. In each round both search in turn, the order alternating,
each in a process of its own, so that its peak memory is its own; the best time of each counts.
Both are timed from vectors in a file to neighbours, which here includes normalising them and there
filling the index; faiss's search alone is printed too.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

_LEAST, _LONGEST = 8, 200  # characters of a text
_BUCKETS, _WIDTH = 2**16, 384


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--dims", default="384,1792")
    parser.add_argument("--ks", default="100,1000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--cache", type=Path)
    args = parser.parse_args()
    texts = read_texts(args.data, args.passages + args.queries)
    vectors = embed(texts, args) if args.model else project(texts)
    for dim in map(int, args.dims.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            rows = widen(vectors, dim)
            np.save(f"{folder}/corpus.npy", rows[: args.passages])
            np.save(f"{folder}/queries.npy", rows[args.passages :])
            del rows
            for k in map(int, args.ks.split(",")):
                compare(folder, dim, k, args)


def read_texts(data, count):
    """`count` distinct texts of the files under `data`, in an order that a seed draws."""
    found = {}
    for path in sorted(data.rglob("*.jsonl")):
        for line in path.open(encoding="utf-8"):
            for value in json.loads(line).values():
                for text in value if isinstance(value, list) else [value]:
                    if isinstance(text, str) and len(text) >= _LEAST:
                        found[text[:_LONGEST]] = None
    if len(found) < count:
        sys.exit(f"{data}: has {len(found)} distinct texts, {count} are needed")
    order = np.random.default_rng(0).permutation(len(found))[:count]
    texts = list(found)
    return [texts[i] for i in order]


def project(texts):
    table = np.random.default_rng(1).normal(size=(_BUCKETS, _WIDTH)).astype(np.float32)
    rows = np.empty((len(texts), _WIDTH), np.float32)
    for i, text in enumerate(tqdm.tqdm(texts, desc="vectors", leave=False, mininterval=10)):
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        pairs = (codes[:-1] * np.uint32(0x9E3779B1) + codes[1:]) * np.uint32(0x85EBCA6B) >> 16
        rows[i] = table[pairs].sum(axis=0)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def embed(texts, args):
    from piccolo_jax.evaluation import encoder as encoder_lib
    from piccolo_jax.evaluation.models import fingerprint
    from piccolo_jax.mining import corpus, embeddings

    encoder, params = encoder_lib.load(args.model)
    known = fingerprint(args.model)
    cache = args.cache or Path("embeddings")
    passages = corpus.of_texts(texts, str(args.data))
    rows = embeddings.embed(cache, "benchmark", passages, encoder, params, known, "")
    return encoder_lib.cut(np.asarray(rows), rows.shape[1])


def widen(vectors, dim):
    width = vectors.shape[1]
    if dim < width:
        sys.exit(f"--dims: {dim} is less than the model's width, {width}")
    square = np.random.default_rng(1).normal(size=(dim, width))
    return vectors @ np.linalg.qr(square)[0].T.astype(np.float32) if dim > width else vectors


def compare(folder, dim, k, args):
    order = [("faiss", "ours"), ("ours", "faiss")]
    best, peaks = {}, {}
    for turn in range(args.rounds):
        for name in order[turn % 2]:
            done = subprocess.run(
                [sys.executable, __file__, "--worker", name, folder, str(k)],
                capture_output=True, text=True, check=False, env={**os.environ},
            )  # fmt: skip
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            report = json.loads(done.stdout.splitlines()[-1])
            best[name] = min(best.get(name, report), report, key=lambda r: r["seconds"])
            peaks[name] = max(peaks.get(name, 0), report["peak"])
    same, worst = agreement(folder)
    flops = 2 * args.passages * args.queries * dim
    print(f"{args.passages:,} passages x {args.queries:,} queries, {dim} dimensions, k = {k}")
    for name in ("faiss", "ours"):
        seconds = best[name]["seconds"]
        print(
            f"  {name:5}  {seconds:8.2f} s  ({best[name]['cpu']:.2f} CPU s,"
            f" {flops / seconds / 1e9:.0f} GFLOP/s)  peak {peaks[name] / 2**30:.2f} GiB"
        )
    ours = best["ours"]["seconds"]
    whole, alone = best["faiss"]["seconds"] / ours, best["faiss"]["searching"] / ours
    print(
        f"  faiss / ours {whole:.2f} (its search alone {alone:.2f}); the same neighbour at"
        f" {same:.5%} of places, elsewhere scores within {worst:.1e}",
        flush=True,
    )


def agreement(folder):
    """Share of equal neighbours, and how far apart scores are where neighbours aren't equal."""
    scores, indices = ([np.load(f"{folder}/{name}.{part}.npy") for name in ("faiss", "ours")]
                       for part in ("scores", "indices"))  # fmt: skip
    differ = indices[0] != indices[1]
    apart = np.abs(scores[0] - scores[1])
    return 1 - differ.mean(), float(apart[differ].max(initial=0))


def worker(name, folder, k):
    corpus = np.load(f"{folder}/corpus.npy", mmap_mode="r")
    queries = np.load(f"{folder}/queries.npy")
    searching = []
    if name == "faiss":
        import faiss

        def run(queries):
            index = faiss.IndexFlatIP(corpus.shape[1])
            index.add(corpus)
            started = time.perf_counter()
            found = index.search(queries, k)
            searching.append(time.perf_counter() - started)
            return found
    else:
        from piccolo_jax import sharding
        from piccolo_jax.config import MeshConfig
        from piccolo_jax.mining.search import search

        mesh = sharding.make_mesh(MeshConfig())

        def run(queries):
            found = search(queries, corpus, k, mesh)
            return found.scores, found.indices

    run(queries[:300])  # compiles, starts threads and reads the files
    cpu, started = time.process_time(), time.perf_counter()
    scores, indices = run(queries)
    report = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}
    report["searching"] = searching[-1] if searching else report["seconds"]
    np.save(f"{folder}/{name}.scores.npy", scores)
    np.save(f"{folder}/{name}.indices.npy", indices)
    report["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(report))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
