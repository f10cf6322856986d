"""Encoding real texts, against sentence-transformers: texts a second, in turns.

    python tests/benchmarks/encoding.py --model=DIR --data=FOLDER [--texts=1000] [--rounds=3]
        [--batch-sizes=32,64,128] [--threads=2] [--devices=1,2,4,8] [--kinds=short,passages,long]
        [--bfloat16] [--output=FILE.json]

Each contender is a process of its own that loads the model, encodes each kind of texts once, which
isn't counted, and then computes when it is its turn; the order alternates, and the best round of
each counts. All compute in float32 with as many threads, sorted by length, and normalise, and give
the same vectors, which is checked. sentence-transformers runs with its own batch size of 32 and
with others. `single` is one short text a call. --devices adds this project on so many CPU devices,
which share the same threads: what splitting costs, not what more hardware brings. --bfloat16 adds
both in that type (sentence-transformers' weights, this project's products).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "short": "open/retrieval/cmrc2018/queries.test.jsonl",
    "passages": "open/retrieval/cmrc2018/corpus.jsonl",
    "long": "research/classification/iflytek.test.jsonl",
}
SINGLE = 50  # calls of one text
BFLOAT16 = "in bfloat16"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-sizes", default="32,64,128")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--devices", default="")
    parser.add_argument("--kinds", default="short,passages,long")
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    names = ["piccolo", *(f"sentence-transformers {n}" for n in args.batch_sizes.split(","))]
    names += [f"piccolo on {n}" for n in args.devices.split(",") if n]
    if args.bfloat16:
        names += [f"{name} {BFLOAT16}" for name in names if " on " not in name]
    workers = {name: Worker(name, args) for name in names}
    kinds = [*args.kinds.split(","), "single"]
    best = {}
    for turn in range(args.rounds):
        for kind in kinds:
            for name in names[:: 1 if turn % 2 == 0 else -1]:
                report = workers[name].encode(kind)
                known = best.setdefault(kind, {}).setdefault(name, report)
                best[kind][name] = min(known, report, key=lambda r: r["seconds"])
    for kind in kinds:
        show(kind, best[kind], workers, names)
    if args.output:
        args.output.write_text(json.dumps(best, indent=2) + "\n")


class Worker:
    """A contender's process."""

    def __init__(self, name, args):
        devices = name.split(" on ")[1] if " on " in name else "1"
        env = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "HF_HUB_OFFLINE": "1",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "OMP_NUM_THREADS": str(args.threads),
            "RAYON_NUM_THREADS": str(args.threads),
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, __file__, *sys.argv[1:], f"--worker={name}"]
        # XLA takes as many threads as the process may use cores.
        cores = sorted(os.sched_getaffinity(0))[: args.threads]
        self._process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )  # fmt: skip
        self.ready = self._answer()

    def encode(self, kind):
        self._process.stdin.write(f"{kind}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            sys.exit("a contender stopped")
        return json.loads(line)


def work(args):
    """A contender: says when it is ready, then encodes what it is told to."""
    texts = {kind: read(args.data / FILES[kind], args.texts) for kind in FILES}
    encode, tokens = (ours if args.worker.startswith("piccolo") else theirs)(args)
    kinds = args.kinds.split(",")
    started = time.perf_counter()
    known = {kind: encode(texts[kind]) for kind in kinds}
    ready = {
        "first": time.perf_counter() - started,
        "tokens": {kind: tokens(texts[kind]) for kind in kinds},
        "vectors": {kind: known[kind][:3, :8].tolist() for kind in kinds},
    }
    ready["tokens"]["single"] = tokens(texts["short"][:SINGLE])
    for text in texts["short"][:SINGLE]:
        encode([text])
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        kind = line.strip()
        calls = [[t] for t in texts["short"][:SINGLE]] if kind == "single" else [texts[kind]]
        cpu, started = time.process_time(), time.perf_counter()
        for call in calls:
            encode(call)
        seconds = time.perf_counter() - started
        report = {"seconds": seconds, "cpu": time.process_time() - cpu}
        print(json.dumps(report | {"texts": sum(map(len, calls))}), flush=True)


def ours(args):
    from piccolo_jax import Encoder

    dtype = "bfloat16" if args.worker.endswith(BFLOAT16) else "float32"
    encoder = Encoder.load(args.model, dtype=dtype)
    tokenizer = encoder._encoder.tokenizer
    return encoder.encode, lambda texts: sum(
        map(len, tokenizer.encode(texts, encoder.max_length)[0])
    )


def theirs(args):
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(args.threads)
    dtype = torch.bfloat16 if args.worker.endswith(BFLOAT16) else torch.float32
    model = SentenceTransformer(
        args.model, device="cpu",
        model_kwargs={"dtype": dtype, "add_pooling_layer": False},
    )  # fmt: skip
    size = int(args.worker.removesuffix(BFLOAT16).split()[-1])

    def encode(texts):
        vectors = model.encode(
            texts, batch_size=size, normalize_embeddings=True, convert_to_tensor=True
        )
        return vectors.float().numpy()

    return encode, lambda texts: sum(map(len, model.tokenizer(texts, truncation=True)["input_ids"]))


def read(path, count):
    """`count` texts of a file, drawn by a seed."""
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    texts = [f"{row.get('title') or ''} {row['text']}".strip() for row in rows]
    return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))[:count]]


def show(kind, best, workers, names):
    tokens = workers["piccolo"].ready["tokens"][kind]
    theirs = [n for n in names if n.startswith("sentence") and not n.endswith(BFLOAT16)]
    count = best["piccolo"]["texts"]
    fastest = min(best[name]["seconds"] for name in theirs)
    print(f"\n{kind}: {count} texts of {tokens / count:.0f} tokens")
    print("| | texts/s | tokens/s | CPU s | against the fastest float32 one of theirs |")
    print("| --- | --- | --- | --- | --- |")
    for name in names:
        ready, report = workers[name].ready, best[name]
        if ready["tokens"][kind] != tokens:
            sys.exit(f"{name} has {ready['tokens'][kind]} tokens, piccolo {tokens}")
        if kind in ready["vectors"]:
            sums = (
                np.asarray(ready["vectors"][kind]),
                np.asarray(workers["piccolo"].ready["vectors"][kind]),
            )
            np.testing.assert_allclose(*sums, atol=0.02 if name.endswith(BFLOAT16) else 1e-4)
        seconds = report["seconds"]
        print(
            f"| {name} | {count / seconds:.1f} | {tokens / seconds:.0f} | {report['cpu']:.2f} |"
            f" {fastest / seconds:.2f} |"
        )


if __name__ == "__main__":
    main()
