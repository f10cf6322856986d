"""Whole train steps of this project and its peers, on the same rows, in turns.

    python tests/benchmarks/train_steps.py --model=DIR --data=DIR [--batch=32] [--rounds=3]
        [--datasets=cmrc,tnews] [--contenders=piccolo,reference] [--output=FILE.json]

MODEL is a Hugging Face directory of the BERT family; DATA the folder with the files that common.py
lists. For each dataset each contender is a process of its own, which waits while another computes.
It does a step that isn't counted (it warms up, and compiles), then `rounds` times two, in an order
that turns, of which the second counts: in a run, too, a step follows a step. docs/benchmarks.md
says what is compared with what.
"""

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import resource
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import tqdm
from common import DATASETS, Settings, StepReport

CONTENDERS = {
    "piccolo": ("contender_piccolo", "Contender"),
    "piccolo bf16": ("contender_piccolo", "ContenderBfloat16"),
    "reference": ("contender_torch", "Reference"),
    "reference bf16": ("contender_torch", "ReferenceBfloat16"),
    "sentence-transformers": ("contender_torch", "SentenceTransformers"),
}
BASE = "reference"
PACKAGES = ("jax", "jaxlib", "torch", "transformers", "sentence-transformers")


class Process:
    """A contender in a process of its own."""

    def __init__(self, name: str, settings: Settings):
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(name, settings, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, method: str, *arguments: Any) -> Any:
        """The result of a method of the contender. Exits if it raises."""
        self._pipe.send((method, arguments))
        try:
            done, value = self._pipe.recv()
        except EOFError:
            self._process.join()
            sys.exit(f"{self.name} died, exit code {self._process.exitcode} (-9: no memory left)")
        if not done:
            sys.exit(f"{self.name}:\n{value}")
        return value

    def stop(self) -> None:
        self._pipe.close()
        self._process.join()


def _serve(name: str, settings: Settings, pipe: Connection) -> None:
    try:
        module, cls = CONTENDERS[name]
        contender = getattr(importlib.import_module(module), cls)(settings)
        while True:
            method, arguments = pipe.recv()
            if method == "peak_memory":
                value: Any = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            elif method == "prepare_seconds":
                value = getattr(contender, method, None)
            else:
                value = getattr(contender, method)(*arguments)
            pipe.send((True, value))
    except EOFError:
        return
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--datasets", default=",".join(DATASETS))
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--output")
    options = parser.parse_args()
    datasets, names = tuple(options.datasets.split(",")), options.contenders.split(",")
    for given, known in ((datasets, DATASETS), (names, CONTENDERS)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"{', '.join(unknown)}: must be among {', '.join(known)}")
    settings = Settings(options.model, options.data, options.batch, options.threads, datasets)
    started = time.time()
    result = run(settings, names, options.rounds)
    result["machine"] = _machine()
    result["options"] = vars(options)
    result["run_seconds"] = round(time.time() - started)
    print(report(result))
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def run(settings: Settings, names: list[str], rounds: int) -> dict[str, Any]:
    """Everything measured, as it goes into the JSON file.

    Each dataset has processes of its own: PyTorch's keep the memory of the longest step they did.
    """
    peaks, memory = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    prepare: dict[str, dict[str, float]] = {name: {} for name in names}
    reports: dict[str, dict[str, list[StepReport]]] = {}
    warm_up: dict[str, dict[str, StepReport]] = {}
    steps_in_all = len(names) * len(settings.datasets) * (2 * rounds + 3)
    with tqdm.tqdm(total=steps_in_all, unit=" steps") as bar:

        def ask(process: Process, what: str, *arguments: Any) -> Any:
            bar.set_postfix_str(" ".join(map(str, (process.name, what, *arguments))))
            value = process.ask(what, *arguments)
            bar.update()
            return value

        for dataset in settings.datasets:
            alone = dataclasses.replace(settings, datasets=(dataset,))
            processes: list[Process] = []
            for name in names:  # one after the other, so that preparation is measured undisturbed
                processes.append(Process(name, alone))
                prepare[name].update(processes[-1].ask("prepare_seconds") or {})
                peaks[name] = max(peaks[name], ask(processes[-1], "peak"))
            warm_up[dataset] = {p.name: ask(p, "step", dataset, 0) for p in processes}
            reports[dataset] = {name: [] for name in names}
            for turn in range(rounds):
                first = turn % len(processes)
                for process in processes[first:] + processes[:first]:
                    # Not counted: after a wait a step takes longer, for some contenders much.
                    ask(process, "step", dataset, 2 * turn + 1)
                    report = ask(process, "step", dataset, 2 * turn + 2)
                    reports[dataset][process.name].append(report)
            for process in processes:
                peaks[process.name] = max(peaks[process.name], ask(process, "peak"))
                memory[process.name] = max(memory[process.name], process.ask("peak_memory"))
                process.stop()
    machine = {
        name: max(peaks[other] for other in names if ("bf16" in other) == ("bf16" in name))
        for name in names
    }
    return {
        "datasets": {
            dataset: {
                name: _summary(steps, warm_up[dataset][name], settings.batch, machine[name])
                for name, steps in by_name.items()
            }
            for dataset, by_name in reports.items()
        },
        "contenders": {
            name: {
                "peak_flops_per_second": peaks[name],
                "peak_memory_bytes": memory[name],
                "tokenising_seconds_per_row": prepare[name],
            }
            for name in names
        },
    }


def _summary(
    steps: list[StepReport], warm_up: StepReport, batch: int, peak: float
) -> dict[str, Any]:
    seconds = sum(step.seconds for step in steps)
    return {
        "rows_per_second": len(steps) * batch / seconds,
        "seconds_per_step": seconds / len(steps),
        "cpu_seconds_per_step": sum(step.cpu_seconds for step in steps) / len(steps),
        "slots_per_step": sum(step.slots for step in steps) / len(steps),
        "fill": sum(step.tokens for step in steps) / sum(step.slots for step in steps),
        "share_of_peak": sum(step.flops for step in steps) / seconds / peak,
        "compile_seconds": warm_up.compile_seconds + sum(step.compile_seconds for step in steps),
        "losses": [warm_up.loss, *(step.loss for step in steps)],
        "steps": [dataclasses.asdict(step) for step in steps],
    }


def report(result: dict[str, Any]) -> str:
    """Tables in Markdown."""
    names = list(result["contenders"])
    datasets = result["datasets"]
    base = BASE if BASE in names else names[0]

    def row(cells: list[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def table(title: str, cell: Any, last: Any) -> str:
        lines = [row([title, *names]), row(["---"] * (len(names) + 1))]
        lines += [row([d, *(cell(d, name) for name in names)]) for d in datasets]
        return "\n".join([*lines, *([row(last)] if last else [])])

    def ratio(dataset: str, name: str, field: str) -> float:
        return datasets[dataset][base][field] / datasets[dataset][name][field]

    def mean_ratio(name: str, field: str) -> float:
        logs = [math.log(ratio(dataset, name, field)) for dataset in datasets]
        return math.exp(sum(logs) / len(logs))

    def rate(dataset: str, name: str) -> str:
        speed = datasets[dataset][name]["rows_per_second"]
        return f"{speed:.1f} ({ratio(dataset, name, 'seconds_per_step'):.2f})"

    def mix(name: str) -> str:
        seconds = sum(by_name[name]["seconds_per_step"] for by_name in datasets.values())
        speed = result["options"]["batch"] * len(datasets) / seconds
        return f"{speed:.1f} ({mean_ratio(name, 'seconds_per_step'):.2f})"

    def share(field: str) -> Any:
        return lambda dataset, name: f"{datasets[dataset][name][field]:.0%}"

    contenders = result["contenders"]
    totals = [
        row(["", *names]),
        row(["---"] * (len(names) + 1)),
        row(["peak memory, GiB",
             *(f"{contenders[n]['peak_memory_bytes'] / 2**30:.2f}" for n in names)]),
        row(["a large product, GFLOP/s",
             *(f"{contenders[n]['peak_flops_per_second'] / 1e9:.0f}" for n in names)]),
        row(["compiling, s",
             *(f"{sum(d[n]['compile_seconds'] for d in datasets.values()):.0f}" for n in names)]),
    ]  # fmt: skip
    return "\n\n".join([
        "",
        table(f"rows a second (times {base})", rate, ["mix (geometric mean)", *map(mix, names)]),
        table(
            f"CPU seconds a step (times {base})",
            lambda d, n: f"{datasets[d][n]['cpu_seconds_per_step']:.2f}"
            f" ({ratio(d, n, 'cpu_seconds_per_step'):.2f})",
            ["geometric mean", *(f"({mean_ratio(n, 'cpu_seconds_per_step'):.2f})" for n in names)],
        ),
        table("slots that hold a token", share("fill"), None),
        table("share of a large product's rate", share("share_of_peak"), None),
        "\n".join(totals),
    ])  # fmt: skip


def _machine() -> dict[str, Any]:
    model = "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_before_minutes_1_5_15": os.getloadavg(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


if __name__ == "__main__":
    main()
