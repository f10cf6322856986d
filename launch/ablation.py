"""Does the recipe's claim hold here? Its ablation and Matryoshka on a small model and real data.

    python launch/ablation.py --model=../shared/models/e5-small-zh --data=../shared/data
        --output=DIR [--seeds=3] [--steps=64] [--batch_size=32] [--lengths=32,64]
        [--learning_rate=5e-5] [--dims=256,768,1792] [--separate=256,1792]
        [--arms=infonce,cosent,labels] [--rows=300]

Trains, with the same data, steps and seeds,

    infonce   InfoNCE for everything: pairs with a high score and label texts are positives
    cosent    CoSENT for scored pairs, InfoNCE for the rest
    labels    CoSENT for scored pairs, label contrast for labelled texts: the recipe
    alone-D   as `labels`, with a model of width D trained at that dimension alone

and, if --arms names them,

    counted   as `infonce`, where an equal label text of another row counts as a negative, as in the
              reference implementation
    heavy     as `cosent`, with the weight of CoSENT 1 in place of 0.04, which brings its gradients
              to the length of the others

Each is a run of piccolo_jax.train in a process of its own. Training files are trained on, and
evaluated are test files (of OCNLI, AFQMC and QBQTC, which have none with labels, the dev files,
which choose nothing here). DIR gets results.json, table.md and ablation.png. Started again, the
command goes on with the runs that are missing.
Needs scikit-learn (requirements-dev.txt).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ablation_data
import ablation_report
import ablation_scores

from piccolo_jax import cli
from piccolo_jax import config as config_lib
from piccolo_jax.config import Config, DatasetConfig
from piccolo_jax.errors import UserError
from piccolo_jax.metrics import say

ROOT = Path(__file__).resolve().parents[1]
ARMS = ("infonce", "cosent", "labels", "counted", "heavy")
WIDTH = 1792
CONFIG = '''"""python -m piccolo_jax.train --config={path} --workdir={workdir}"""

from pathlib import Path

from piccolo_jax import config


def get_config():
    path = Path(__file__).with_suffix(".json")
    return config.from_json(path.read_text(encoding="utf-8"), str(path))
'''


def main(argv: list[str]) -> None:
    """The command."""
    args = _arguments(argv)
    _keep_settings(args)
    data = ablation_data.convert(args.data, args.output / "data")
    texts = ablation_scores.read_tests(args.data, args.rows)
    names = [
        (name, seed)
        for seed in range(args.seeds)
        for name in (*args.arms, *(f"alone-{dim}" for dim in args.separate))
    ]
    length = args.lengths[1]
    start = ablation_scores.evaluate(
        args.model, texts, [], length, args.output / "scores" / "start.npz"
    )
    say(f"before training: {ablation_report.means(start)}")
    for number, (name, seed) in enumerate(names, 1):
        scores = args.output / "scores" / f"{name}-{seed}.npz"
        if scores.exists():
            continue
        say(f"run {number} of {len(names)}: {name}, seed {seed}")
        workdir = args.output / "runs" / f"{name}-{seed}"
        _train(run_config(name, seed, args, data), workdir, args.output)
        dims = [int(name.removeprefix("alone-"))] if name.startswith("alone-") else args.dims
        found = ablation_scores.evaluate(workdir / "export", texts, dims, length, scores)
        say(f"{name}, seed {seed}: {ablation_report.means(found)}")
        shutil.copy(workdir / "metrics.jsonl", scores.with_suffix(".metrics.jsonl"))
        shutil.rmtree(workdir)  # half a GB
    ablation_report.write(args.output, args.arms, args.separate, args.dims, args.seeds)
    print((args.output / "table.md").read_text(encoding="utf-8"))


def run_config(
    name: str, seed: int, args: argparse.Namespace, data: dict[str, ablation_data.Files]
) -> Config:
    """The config of one run: arms differ in the files' task and loss, and in nothing else."""
    arm = "labels" if name.startswith("alone-") else name
    config = Config(seed=seed, total_steps=args.steps, batch_size=args.batch_size)
    config.model.init = str(args.model)
    if name.startswith("alone-"):
        config.model.embed_dim = int(name.removeprefix("alone-"))
        config.loss.dims = (config.model.embed_dim,)
    else:
        config.model.embed_dim = WIDTH
    config.optim.learning_rate = args.learning_rate
    config.optim.warmup_steps = args.steps // 10
    config.data.query_max_length, config.data.max_length = args.lengths
    config.data.prepared_dir = str(args.output / "prepared")
    if arm == "counted":
        config.loss.retrieval.duplicates = "count"
    if arm == "heavy":
        config.loss.similarity.weight = 1.0
    own_loss = {
        "similarity": arm in ("cosent", "heavy", "labels"),
        "classification": arm == "labels",
    }
    datasets = []
    for files in data.values():
        as_retrieval = not own_loss.get(files.task, False)
        datasets.append(
            DatasetConfig(
                path=str(files.retrieval if as_retrieval else files.own),
                task="retrieval" if as_retrieval else files.task,
                query_prompt="query: ",
                passage_prompt=files.passage_prompt,
            )
        )
    config.data.datasets = tuple(datasets)
    config.checkpoint.every = 0
    return config


def _train(config: Config, workdir: Path, output: Path) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    path = output / "runs" / f"{workdir.name}.py"
    path.with_suffix(".json").write_text(config_lib.to_json(config), encoding="utf-8")
    path.write_text(CONFIG.format(path=path, workdir=workdir), encoding="utf-8")
    command = [sys.executable, "-m", "piccolo_jax.train", f"--config={path}"]
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(output / "compiled"),
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    done = subprocess.run([*command, f"--workdir={workdir}"], env=environment, check=False)
    if done.returncode:
        raise UserError(
            f"{' '.join(command)} ended with code {done.returncode}; its message says why"
        )


def _keep_settings(args: argparse.Namespace) -> None:
    """Writes what the runs depend on; raises UserError if those in DIR depend on something else."""
    free = {"output", "seeds", "arms", "separate"}
    settings = {k: str(v) for k, v in sorted(vars(args).items()) if k not in free}
    path = args.output / "settings.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [k for k in settings if before.get(k) != settings[k]]
        if changed:
            lines = "\n  ".join(f"--{k}: {before.get(k)} -> {settings[k]}" for k in changed)
            raise UserError(
                f"{path} is of runs with other settings:\n  {lines}\ngive another --output"
            )
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        for folder in ("runs", "scores"):
            (args.output / folder).mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"--output={args.output}: can't be used ({error.strerror})") from error
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _arguments(argv: list[str]) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",") if part]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--lengths", type=numbers, default=[32, 64], help="of queries, other texts")
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--dims", type=numbers, default=[256, 768, 1792], help="evaluated")
    parser.add_argument("--separate", type=numbers, default=[256, 1792], help="'' for none")
    parser.add_argument("--arms", type=lambda text: text.split(","), default=list(ARMS[:3]))
    parser.add_argument("--rows", type=int, default=300, help="of each test file")
    args = parser.parse_args(argv[1:])
    for name in ("model", "data"):
        if not getattr(args, name).is_dir():
            raise UserError(f"--{name}={getattr(args, name)}: there is no such folder")
        setattr(args, name, getattr(args, name).resolve())
    args.output = args.output.resolve()
    if unknown := set(args.arms) - set(ARMS):
        raise UserError(f"--arms: {unknown.pop()!r} is none of {', '.join(ARMS)}")
    if len(args.lengths) != 2:
        raise UserError("--lengths: must be two numbers, of queries and of other texts")
    if args.seeds < 1 or args.rows < 20:
        raise UserError("--seeds must be 1 or more, --rows 20 or more")
    if args.dims[-1:] != [WIDTH] or args.dims != sorted(set(args.dims)):
        raise UserError(f"--dims: must rise and end with {WIDTH}, the width")
    return args


if __name__ == "__main__":
    cli.run(main)
