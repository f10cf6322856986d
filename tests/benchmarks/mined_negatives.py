"""What mined hard negatives are worth: the same short training with them and with random ones.

    python tests/benchmarks/mined_negatives.py --model=DIR --data=BEIR-FOLDER --workdir=DIR
        [--steps=60] [--batch=16] [--seeds=0,1,2] [--ranks=1:5] [--split=test]

Mines negatives for the training queries of a BEIR folder, draws as many random passages for the
same rows, trains on each from the same weights, and prints nDCG@10 on another split before and
after. Articles stay whole: queries of a split search the passages whose titles are those of its
positives, so that the other paragraphs of an article are there to be confused with, and nothing
that is evaluated on is ever a negative. Rows without a mined negative are left out of both. What is
finished in WORKDIR is not done again.
"""

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
QUERY, PASSAGE = "query: ", "passage: "  # the prompts of E5
CONFIG = """
from piccolo_jax.config import Config, DatasetConfig


def get_config():
    config = Config(total_steps={steps}, batch_size={batch}, seed={seed})
    config.model.init, config.model.embed_dim = {model!r}, 0
    config.loss.dims = ({width},)
    config.optim.learning_rate, config.optim.warmup_steps = {learning_rate}, {steps} // 10
    config.data.max_length, config.data.query_max_length = {max_length}, {query_max_length}
    config.data.prepared_dir = {prepared!r}
    config.data.datasets = (
        DatasetConfig(path={data!r}, query_prompt={query!r}, passage_prompt={passage!r}),
    )
    config.loss.retrieval.temperature = {temperature}
    config.data.negatives = {negatives}
    config.checkpoint.every = 0
    return config
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--temperature", type=float, default=0.01)
    parser.add_argument("--negatives", type=int, default=1, help="per row and step")
    parser.add_argument("--max-length", type=int, default=160, help="tokens, in all that is done")
    parser.add_argument("--query-max-length", type=int, default=48)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--ranks", default="1:5")
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--max-positive-ratio", type=float, default=0.98)
    parser.add_argument("--split", default="test", help="that is evaluated on")
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    train_folder, test_folder = (split_folder(args, split) for split in ("train", args.split))
    mined, random = args.workdir / "mined.jsonl", args.workdir / "random.jsonl"
    if not mined.exists():
        found = args.workdir / "found.jsonl"
        call(
            "piccolo_jax.mine", f"--model={args.model}", f"--queries={train_folder}",
            f"--output={found}", f"--ranks={args.ranks}", f"--count={args.count}",
            f"--max-positive-ratio={args.max_positive_ratio}",
            f"--query-prompt={QUERY}", f"--passage-prompt={PASSAGE}",
            f"--max-length={args.max_length}", f"--query-max-length={args.query_max_length}",
            "--overwrite",
        )  # fmt: skip
        rows = [row for row in read(found) if row["text_neg"]]
        write(random, with_random(rows, read(train_folder / "corpus.jsonl")))
        write(mined, rows)
    scores = {"before": evaluate(args.model, test_folder, args, "before")}
    seeds = [int(seed) for seed in args.seeds.split(",")]
    for seed in seeds:
        for data in (random, mined):
            name = f"{data.stem}-{seed}"
            scores[name] = evaluate(train(name, data, seed, args), test_folder, args, name)
            print(f"{name}: nDCG@10 {scores[name]:.4f} (before {scores['before']:.4f})", flush=True)
    print(f"\n| negatives | {' | '.join(f'seed {s}' for s in seeds)} | mean |")
    print(f"| --- |{' --- |' * (len(seeds) + 1)}")
    for name in ("random", "mined"):
        of_seeds = [scores[f"{name}-{seed}"] for seed in seeds]
        cells = [f"{score:.4f}" for score in (*of_seeds, statistics.mean(of_seeds))]
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"| before training | {' | '.join([''] * len(seeds))} | {scores['before']:.4f} |")


def call(module, *flags):
    subprocess.run([sys.executable, "-m", module, *flags], cwd=ROOT, check=True)


def read(path):
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def split_folder(args, split):
    """A BEIR folder of one split, with the passages of the articles that hold its positives."""
    folder = args.workdir.absolute() / split
    folder.mkdir(exist_ok=True)
    for name in (f"queries.{split}.jsonl", f"qrels.{split}.tsv"):
        shutil.copy(args.data / name, folder / name)
    with (folder / f"qrels.{split}.tsv").open(encoding="utf-8") as file:
        judged = {line.split("\t")[1] for line in file}
    corpus = read(args.data / "corpus.jsonl")
    titles = {row["title"] for row in corpus if row["id"] in judged}
    write(folder / "corpus.jsonl", [row for row in corpus if row["title"] in titles])
    return folder


def write(path, rows):
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def with_random(rows, corpus):
    """`rows` with as many negatives, drawn from all passages that aren't positives."""
    passages = [f"{row['title']} {row['text']}".strip() for row in corpus]
    made = []
    for i, row in enumerate(rows):
        order = np.random.default_rng((0, i)).permutation(len(passages))
        others = (passages[n] for n in order if passages[n] not in row["text_pos"])
        texts = list(itertools.islice(others, len(row["text_neg"])))
        made.append({k: row[k] for k in ("text", "text_pos", "type")} | {"text_neg": texts})
    return made


def train(name, data, seed, args):
    """The export of a training run."""
    workdir = args.workdir.absolute() / name
    if not (workdir / "export").exists():
        from piccolo_jax.models import pretrained

        config = args.workdir / f"{name}.py"
        config.write_text(CONFIG.format(
            steps=args.steps, batch=args.batch, seed=seed, model=str(args.model.absolute()),
            width=pretrained.read_spec(args.model).backbone.hidden_size, data=str(data.absolute()),
            learning_rate=args.learning_rate, prepared=str(args.workdir.absolute() / "prepared"),
            query=QUERY, passage=PASSAGE, max_length=args.max_length,
            query_max_length=args.query_max_length, temperature=args.temperature,
            negatives=args.negatives,
        ), encoding="utf-8")  # fmt: skip
        call("piccolo_jax.train", f"--config={config}", f"--workdir={workdir}")
    return workdir / "export"


def evaluate(model, folder, args, name):
    """nDCG@10 of a model, in a process of its own, kept in WORKDIR."""
    kept = args.workdir / f"{name}.score.json"
    if not kept.exists():
        done = subprocess.run(
            [
                sys.executable, "-c", EVALUATION,
                str(ROOT), str(model), str(folder), args.split, str(args.max_length),
            ],
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        kept.write_text(done.stdout.splitlines()[-1])
    return json.loads(kept.read_text())


EVALUATION = f"""
import functools, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from piccolo_jax.config import EvalDatasetConfig
from piccolo_jax.evaluation import encoder, local
made, params = encoder.load(Path(sys.argv[2]))
made.max_length = int(sys.argv[5])
config = EvalDatasetConfig(path=sys.argv[3], split=sys.argv[4])
config.query_prompt, config.passage_prompt = {QUERY!r}, {PASSAGE!r}
encode = functools.partial(made.encode, params, progress="evaluating")
print(local.EvalDataset(config).evaluate(encode, (made.width,))[made.width])
"""


if __name__ == "__main__":
    main()
