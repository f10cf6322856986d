"""The model card of an export: README.md, from what its run noted.

What was not measured or given is absent.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub

from piccolo_jax import __version__
from piccolo_jax.config import Config
from piccolo_jax.exporting.layout import Exported, Options
from piccolo_jax.exporting.record import Record, Score

_TAGS = ["sentence-transformers", "feature-extraction", "matryoshka", "piccolo_jax"]
_LOSSES = {
    "retrieval": "InfoNCE over the positives and hard negatives of the global batch",
    "similarity": "CoSENT",
    "classification": "InfoNCE over the text's own label and its other labels",
}


def make(
    record: Record, exported: Exported, name: str, options: Options, loss: dict[int, float]
) -> str:
    """The card as Markdown. `loss`: by prefix, what options.dtype costs (1 - cosine)."""
    sections = [
        _title(record, exported, name),
        _use(exported, options),
        _dimensions(record, exported, loss, options),
    ]
    if record.step != 0:
        sections += [_data(record), _recipe(record), _figures(record)]
    body = "\n\n".join("\n".join(lines) for lines in map(list, sections) if lines)
    return f"---\n{_front_matter(record, name)}---\n{body}\n"


def _front_matter(record: Record, name: str) -> str:
    """YAML, with mteb's scores at full width as the hub wants them."""
    results = [
        huggingface_hub.EvalResult(
            task_type=score.kind,
            dataset_type=score.dataset,
            dataset_name=f"MTEB {score.task}",
            dataset_config=score.subset,
            dataset_split=score.split,
            dataset_revision=score.revision or None,
            metric_type=score.metric,
            metric_value=round(score.value, 5),
        )
        for score in record.scores
        if score.dim is None and score.kind  # the hub knows mteb's tasks alone
    ]
    init = record.config.model.init
    from_hub = bool(init) and not Path(init).is_dir()
    data = huggingface_hub.ModelCardData(
        license=record.license or None,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=[*_TAGS, *(["mteb"] if results else [])],
        base_model=init if from_hub else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return data.to_yaml() + "\n"


def _title(record: Record, exported: Exported, name: str) -> Iterator[str]:
    init, model = record.config.model.init, exported.model
    backbone = model.backbone
    start = f"from {Path(init).name}" if init else "from random weights"
    start = f"{start}, as it was before training" if record.step == 0 else f"trained {start}"
    scaling = f"a scaling layer to {model.embed_dim}" if model.embed_dim else "no scaling layer"
    yield f"# {name}"
    yield ""
    yield (
        f"A text-embedding model, {start} with piccolo_jax {__version__} (the Piccolo2"
        f" recipe, arXiv 2405.06932): {backbone.model_type} of {backbone.num_layers} layers and"
        f" {backbone.hidden_size} hidden units, {model.pooling} pooling, {scaling}, texts of at"
        f" most {exported.max_length} tokens."
    )


def _use(exported: Exported, options: Options) -> Iterator[str]:
    dim = exported.dims[0]
    prompt = 'prompt_name="query", ' if exported.prompts.get("query") else ""
    yield "## Use"
    yield ""
    prefixes = ", ".join(map(str, exported.dims))
    yield f"Any of these prefixes is an embedding: {prefixes}. Cut first, then normalise."
    prompts = [f"{kind} `{prompt}`" for kind, prompt in exported.prompts.items()]
    if prompts:
        yield f"Prompts go before the texts: {', '.join(prompts)}."
    yield from (
        "",
        "```python",
        "import torch",
        "from sentence_transformers import SentenceTransformer",
        "",
        'model = SentenceTransformer("path/to/this/directory")',
        f"vectors = model.encode(TEXTS, {prompt}convert_to_tensor=True)",
        f"vectors = torch.nn.functional.normalize(vectors[:, :{dim}], dim=1)",
        "```",
        "",
        "The same in JAX:",
        "",
        "```python",
        "import piccolo_jax",
        "",
        'model = piccolo_jax.Encoder.load("path/to/this/directory")',
        f"vectors = model.encode(TEXTS, {prompt}dim={dim})",
        "```",
    )
    if options.onnx_dim is not None:
        cut = options.onnx_dim or exported.width
        yield ""
        yield (
            f"`onnx/model.onnx` is the whole model, cut to {cut} and normalised: of `input_ids` and"
            " `attention_mask` it makes `sentence_embedding`."
        )


def _dimensions(
    record: Record, exported: Exported, loss: dict[int, float], options: Options
) -> Iterator[str]:
    now = {row["dataset"]: row for row in record.evaluations if row["step"] == record.step}
    first = [row for row in record.evaluations if row["step"] == 0 and record.step != 0]
    start = {row["dataset"]: row for row in first}
    tables: list[tuple[str, list[str], list[list[Any]]]] = []
    if now:
        dims = sorted({int(key) for row in now.values() for key in row if key.isdigit()})
        rows = [
            [f"{name} {row['metric']}", *(_before_after(start.get(name, {}), row, d) for d in dims)]
            for name, row in now.items()
        ]
        steps = f"after step {record.step}" if record.step else "before training"
        steps += " (before training -> after)" * bool(start)
        text = f"On the evaluation files of the run, {steps}:"
        tables.append((text, ["dataset", *map(str, dims)], rows))
    if record.scores:
        dims = sorted({score.dim or exported.width for score in record.scores})
        names = dict.fromkeys((s.task, s.subset, s.split, s.metric) for s in record.scores)
        rows = [
            [_name_of_score(*key), *(_mteb(record.scores, key, d, exported.width) for d in dims)]
            for key in names
        ]
        tables.append(("By mteb:", ["task", *map(str, dims)], rows))
    if loss:
        text = (
            f"The weights are {options.dtype}. Against float32 that costs, with products in"
            " float32 (largest 1 - cosine on the texts of `verify`):"
        )
        rows = [[str(dim), f"{difference:.1e}"] for dim, difference in loss.items()]
        tables.append((text, ["dimension", "1 - cosine"], rows))
    if tables:
        yield "## Dimensions"
    for text, header, rows in tables:
        yield from ("", text, "", *_table(header, rows))


def _data(record: Record) -> Iterator[str]:
    mixture: list[dict[str, Any]] = next(iter(record.noted("mixture")), [])
    known = {row["dataset"]: row for row in mixture}
    names = list(known) or [Path(d.path).name for d in record.config.data.datasets]
    columns = {
        "dataset": lambda name: name,
        "task": lambda name: known.get(name, {}).get("task", ""),
        "rows": lambda name: known.get(name, {}).get("used", ""),
        "steps": lambda name: known.get(name, {}).get("steps", ""),
        "epochs": lambda name: known.get(name, {}).get("epochs", ""),
        "licence": lambda name: _licence(record, name),
    }
    rows = [[value(name) for value in columns.values()] for name in names]
    used = [i for i in range(len(columns)) if any(row[i] != "" for row in rows)]
    yield from ("## Training data", "")
    header = list(columns)
    yield from _table([header[i] for i in used], [[row[i] for i in used] for row in rows])


def _licence(record: Record, dataset: str) -> str:
    """Of a dataset of the mixture; `[2]` behind its name tells it from others of that name."""
    known = record.licenses
    return known.get(dataset) or known.get(re.sub(r"\[\d+\]$", "", dataset), "")


def _recipe(record: Record) -> Iterator[str]:
    config = record.config
    total = str(config.total_steps)
    done = total if record.step is None else f"{record.step} of {total}"
    yield from ("## Recipe", "")
    yield (
        f"{done} steps of {config.batch_size} rows, each on one dataset, with"
        f" the loss of its task; AdamW, learning rate {config.optim.learning_rate:g},"
        f" {config.optim.schedule} schedule, seed {config.seed}."
    )
    if record.weights == "average":
        yield (
            "The weights are their exponential moving average over the steps, decay"
            f" {config.optim.ema_decay:g}."
        )
    tasks = {row["task"] for row in record.steps if "task" in row}
    tasks |= {d.task for d in config.data.datasets if d.task}
    rows = []
    for task in (task for task in _LOSSES if task in tasks):
        loss = getattr(config.loss, task)
        logged = [row for row in record.steps if row.get("task") == task]
        rows.append([task, _loss_name(config, task), loss.temperature, loss.weight, *_ends(logged)])
    if rows:
        header = ["task", "loss", "temperature", "weight", "first logged", "last logged"]
        width = len(header) if any(row[-1] != "" for row in rows) else 4
        yield from ("", *_table(header[:width], [row[:width] for row in rows]))


def _figures(record: Record) -> Iterator[str]:
    """Hardware, time and tokens: of the starts of the run, up to the exported step."""
    rows = [
        [f"{about['devices']} x {about['device']}, {about['processes']} process(es)", first]
        for about, first in _starts(record)
    ]
    seconds, tokens = record.noted("total_seconds"), record.noted("total_tokens")
    if not (rows or seconds or tokens):
        return
    yield "## Training figures"
    if rows:
        yield from ("", *_table(["hardware", "from step"], rows))
    if seconds and tokens:
        yield ""
        yield (
            f"{tokens[-1]:,} tokens (without padding) in {_duration(seconds[-1])} of training, with"
            " its evaluations and checkpoints and without compiling."
        )


def _starts(record: Record) -> list[tuple[dict[str, Any], int]]:
    """(hardware, first step) of each start on other hardware than the one before."""
    starts: list[tuple[dict[str, Any], int]] = []
    for row in record.steps:
        about = row.get("hardware")
        if about and (not starts or starts[-1][0] != about):
            starts.append((about, row["step"]))
    return starts


def _ends(logged: Sequence[dict[str, Any]]) -> list[str]:
    """The first and the last logged loss."""
    return [f"{row['loss']:.4g}" for row in (logged[0], logged[-1])] if logged else ["", ""]


def _loss_name(config: Config, task: str) -> str:
    if config.loss.circle_margin is not None:
        return f"circle loss, margin {config.loss.circle_margin:g}"
    return _LOSSES[task]


def _before_after(before: dict[str, Any], after: dict[str, Any], dim: int) -> str:
    key = str(dim)
    if key not in after:
        return ""
    return f"{before[key]:.4f} -> {after[key]:.4f}" if key in before else f"{after[key]:.4f}"


def _name_of_score(task: str, subset: str, split: str, metric: str) -> str:
    return f"{task}{f' ({subset})' if subset != 'default' else ''}, {split}, {metric}"


def _mteb(scores: Sequence[Score], key: tuple[str, ...], dim: int, width: int) -> str:
    found = [
        s.value
        for s in scores
        if (s.task, s.subset, s.split, s.metric) == key and (s.dim or width) == dim
    ]
    return f"{found[0]:.4f}" if found else ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield f"| {' | '.join(map(str, header))} |"
    yield f"|{' --- |' * len(header)}"
    for row in rows:
        cells = (str(cell).replace("|", r"\|").replace("\n", " ") for cell in row)
        yield f"| {' | '.join(cells)} |"
