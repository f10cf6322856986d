"""What a real fine-tune does, over seeds: this project's train command, and the reference's step.

    python tests/benchmarks/finetune.py --model=DIR --data=FOLDER --workdir=DIR [--seeds=0,1,2]
        [--contenders=piccolo,reference] [--steps=128] [--batch=32]

DIR is multilingual-e5-small or another encoder, FOLDER holds the datasets of common.py and the
test files below. Eight datasets take turns; constant 2e-5, a new scaling layer to 1,792 dimensions,
seven prefixes, lengths 64 and 192. Both contenders train on the same rows of the same steps.
Spearman of the first pairs of each test file, before and after. What has been run is kept in
WORKDIR: the command started again runs the rest.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from common import DATASETS, DIMS, LEARNING_RATE, LENGTH, QUERY_LENGTH, Rows, Settings

ROOT = Path(__file__).resolve().parents[2]

TESTS = {  # name: (file, its first pairs)
    "AFQMC": ("research/sts/afqmc.dev.jsonl", 1400),
    "STS-B zh": ("research/sts/stsb_zh.test.jsonl", 1361),
    "PAWS-X zh": ("open/sts/pawsx_zh.test.jsonl", 1400),
}
SHOWN = (DIMS[-1], DIMS[0])

CONFIG = """
from piccolo_jax.config import Config, DatasetConfig, EvalDatasetConfig

def get_config():
    config = Config(seed={seed}, total_steps={steps}, batch_size={batch})
    config.model.init, config.model.embed_dim = {model!r}, {width}
    config.loss.dims = {dims}
    config.optim.learning_rate, config.optim.schedule = {learning_rate}, "constant"
    config.data.query_max_length, config.data.max_length = {query_length}, {length}
    config.data.prepared_dir = {prepared!r}
    config.data.datasets = tuple(DatasetConfig(path=p, task=t) for p, t in {datasets!r})
    config.eval.datasets = tuple(EvalDatasetConfig(path=p) for p in {tests!r})
    config.eval.dims = {shown}
    config.checkpoint.every = 0
    return config
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--contenders", default="piccolo,reference")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    for name in ("model", "data", "workdir"):
        setattr(args, name, getattr(args, name).absolute())
    args.workdir.mkdir(parents=True, exist_ok=True)
    args.tests = [first_pairs(args, *test) for test in TESTS.values()]
    seeds = [int(seed) for seed in args.seeds.split(",")]
    contenders = args.contenders.split(",")
    scores = {contender: [] for contender in contenders}
    for seed in seeds:
        for contender in contenders:
            kept = args.workdir / f"{contender}-{seed}.json"
            if not kept.exists():
                kept.write_text(json.dumps(CONTENDERS[contender](seed, args)))
            found = json.loads(kept.read_text())
            print(f"{contender}, seed {seed}: {json.dumps(found)}", flush=True)
            scores[contender].append(found)
    show(scores)


def first_pairs(args, file, count):
    """A copy of the first pairs of a test file in WORKDIR."""
    lines = (args.data / file).read_text("utf-8").splitlines(keepends=True)[:count]
    copy = args.workdir / Path(file).name
    copy.write_text("".join(lines), encoding="utf-8")
    return str(copy)


def piccolo(seed, args):
    """Scores before and after a run of the train command: {"before": [[at each of SHOWN] ...]}."""
    workdir = args.workdir / f"piccolo-{seed}"
    config = args.workdir / f"piccolo-{seed}.py"
    config.write_text(CONFIG.format(
        seed=seed, steps=args.steps, batch=args.batch, model=str(args.model), dims=DIMS,
        width=DIMS[-1], learning_rate=LEARNING_RATE, query_length=QUERY_LENGTH, length=LENGTH,
        prepared=str(args.workdir / "prepared"), tests=args.tests, shown=tuple(sorted(SHOWN)),
        datasets=[(str(args.data / file), task) for task, file in DATASETS.values()],
    ), encoding="utf-8")  # fmt: skip
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "piccolo_jax.train", f"--config={config}", f"--workdir={workdir}"],
        cwd=ROOT, check=True,
    )  # fmt: skip
    seconds = time.monotonic() - started
    lines = [json.loads(line) for line in (workdir / "eval.jsonl").read_text().splitlines()]
    before, after = (
        [
            next(
                [line[str(dim)] for dim in SHOWN]
                for line in lines
                if line["step"] == step and line["dataset"] == Path(test).stem
            )
            for test in args.tests
        ]
        for step in (0, args.steps)
    )
    return {"before": before, "after": after, "seconds": seconds}


def reference(seed, args):
    """The same of the reference's step, in float32."""
    import contender_torch
    import torch
    import tqdm

    from piccolo_jax.data.schedule import Schedule
    from piccolo_jax.evaluation.encoder import cut
    from piccolo_jax.evaluation.local import spearman

    torch.manual_seed(seed)
    names = tuple(DATASETS)
    settings = Settings(
        str(args.model), str(args.data), args.batch, torch.get_num_threads(), names, seed
    )
    contender = contender_torch.Reference(settings)

    def evaluate():
        scores = []
        for test in args.tests:
            rows = [json.loads(line) for line in Path(test).read_text("utf-8").splitlines()]
            first, second = (
                contender.encode([row[column] for row in rows]) for column in ("text", "text_pair")
            )
            grades = np.array([float(row["label"]) for row in rows])
            scores.append([spearman(cut(first, d), cut(second, d), grades) for d in SHOWN])
        return scores

    started = time.monotonic()
    before = evaluate()
    sizes = tuple(len(rows) for rows in Rows(settings).rows.values())
    schedule = Schedule(seed, (args.batch,) * len(names), sizes, (1.0,) * len(names))
    for step in tqdm.trange(args.steps, desc="reference"):
        dataset, use = schedule.at(step)
        contender.step(names[dataset], use)
    after = evaluate()
    return {"before": before, "after": after, "seconds": time.monotonic() - started}


CONTENDERS = {"piccolo": piccolo, "reference": reference}


def show(scores):
    """A table: mean over the seeds (standard deviation of one seed), at both of SHOWN."""
    print(f"\n| | {' | '.join(f'{name}, {dim}' for name in TESTS for dim in SHOWN)} | minutes |")
    print(f"| --- |{' --- |' * (len(TESTS) * len(SHOWN) + 1)}")
    for contender, runs in scores.items():
        for when in ("before", "after"):
            columns = zip(*(itertools.chain(*run[when]) for run in runs), strict=True)
            cells = [f"{statistics.mean(c):.4f} ({spread(c):.4f})" for c in columns]
            minutes = f"{statistics.mean(run['seconds'] for run in runs) / 60:.1f}"
            print(f"| {contender}, {when} | {' | '.join(cells)} | {minutes} |")


def spread(values):
    return statistics.stdev(values) if len(values) > 1 else float("nan")


if __name__ == "__main__":
    main()
