"""The configuration: typed dataclasses whose defaults are the Piccolo2 recipe (arXiv 2405.06932).

Files in `configs/` build a `Config` in `get_config()`; any field can then be set from the command
line, e.g. `--config.optim.learning_rate=2e-5`. `slots=True` turns a misspelt field into an error.
"""

import dataclasses
import itertools
import json
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, dataclass_transform

import numpy as np
import pydantic

from piccolo_jax.errors import UserError

TASK_NAMES = ("retrieval", "similarity", "classification")


@dataclass_transform()
def config_dataclass(cls: type) -> type:
    """A plain dataclass that refuses unknown fields; pydantic checks its types in validate()."""
    rules = pydantic.ConfigDict(
        extra="forbid", allow_inf_nan=False, strict=True, revalidate_instances="always"
    )
    return dataclasses.dataclass(slots=True)(pydantic.with_config(rules)(cls))


@config_dataclass
class DatasetConfig:
    """One training dataset, or a meta list (lines `DIRECTORY REPEATS`) of several.

    `weight` is the dataset's share of the steps, relative to the others; `data.mixing_temperature`
    makes it depend on rows too. Of a meta list, max_rows and batch_size hold for each dataset.
    Prompts are put before the texts: `query_prompt` before queries, classified texts and both texts
    of a pair, `passage_prompt` before positives, negatives and label texts.
    """

    path: str = ""
    task: str = ""  # retrieval, similarity, classification; empty: taken from the data
    weight: float = 1.0
    repeats: float = 1.0  # as if it were listed so many times
    max_rows: int = 0  # use so many rows, drawn by the seed; 0: all
    batch_size: int = 0  # rows of its batches; 0: config.batch_size, or all if there are fewer
    label_names: str = ""  # JSON or TSV file: label -> text, of `text, label` rows
    label_language: str = ""  # which of its names, where it has several of a label
    query_prompt: str = ""
    passage_prompt: str = ""
    license: str = ""  # of the data, for the model card; empty: not said there


@config_dataclass
class EvalDatasetConfig:
    """One evaluation set: a file like a training file, or a directory in BEIR layout.

    A BEIR directory holds `corpus.jsonl`, `queries.SPLIT.jsonl` and `qrels.SPLIT.tsv`.
    """

    path: str = ""
    task: str = ""
    split: str = "test"  # of a BEIR directory
    max_rows: int = 0  # use the first rows (or queries) only; 0: all
    label_names: str = ""  # as in DatasetConfig
    label_language: str = ""
    query_prompt: str = ""
    passage_prompt: str = ""


@config_dataclass
class ModelConfig:
    """The encoder: backbone, pooling, scaling layer. Sizes are those of `init` if it is given."""

    init: str = ""  # Hugging Face directory or hub id; empty: random weights of the sizes below
    tokenizer: str = ""  # directory or hub id; empty: that of `init`
    vocab_size: int = 21128
    hidden_size: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    intermediate_size: int = 4096
    max_positions: int = 512
    pooling: str = ""  # mean, cls, last; empty: that of `init`, else mean
    embed_dim: int = 1792  # width of the scaling layer; 0: none
    dropout: float | None = None  # None: the checkpoint's (0.1 for random weights)
    dtype: str = "auto"  # of matrix products: float32, bfloat16; auto: float32 on CPU only
    # Recomputed in the backward pass: none, dots (all but products and attention), full.
    remat: str = "dots"
    # scanned: one program for all layers, which compiles faster; unrolled: one for each, which runs
    # faster on TPUs; auto: scanned on CPU only.
    layers: str = "auto"
    freeze: tuple[str, ...] = ("position_embeddings",)  # regexes on parameter paths


@config_dataclass
class RetrievalLossConfig:
    """InfoNCE for retrieval and reranking."""

    temperature: float = 0.01
    weight: float = 1.0
    candidates: str = "all"  # all: every positive and negative; own_positive: own and negatives
    duplicates: str = "once"  # a document that occurs twice counts: once, or count (as REF)
    terms: tuple[str, ...] = ("qd",)  # of the denominator: query (q), document (d) pairs; qd first
    false_negative_margin: float | None = None  # leave out what is nearer than the positive by this
    hardness: float = 0.0  # weigh negatives by exp(hardness * cosine)
    spread_out: float = 0.0  # weight of the mean squared cosine between queries, and positives


@config_dataclass
class SimilarityLossConfig:
    """CoSENT for similarity and pair classification."""

    temperature: float = 0.05
    weight: float = 0.04
    normalize: bool = False  # divide by the number of pairs, which grows with the batch
    angle_weight: float = 0.0  # weight of the AnglE term


@config_dataclass
class ClassificationLossConfig:
    """Contrast against label texts for classification and clustering."""

    temperature: float = 0.05
    weight: float = 0.2
    max_negatives: int = 10  # other labels drawn per row and step


@config_dataclass
class LossConfig:
    """One loss per task type, each the mean over the prefixes `dims`."""

    dims: tuple[int, ...] = (256, 512, 768, 1024, 1280, 1536, 1792)  # Matryoshka prefixes
    block_size: int = 4096  # texts that a query is compared with at a time; 0: all
    circle_margin: float | None = None  # circle loss with this margin in place of all softmaxes
    retrieval: RetrievalLossConfig = dataclasses.field(default_factory=RetrievalLossConfig)
    similarity: SimilarityLossConfig = dataclasses.field(default_factory=SimilarityLossConfig)
    classification: ClassificationLossConfig = dataclasses.field(
        default_factory=ClassificationLossConfig
    )


@config_dataclass
class OptimConfig:
    """AdamW and its schedule."""

    learning_rate: float = 1e-5
    schedule: str = "cosine"  # cosine, linear: decay to 0 over the run; constant
    warmup_steps: int = 0
    weight_decay: float = 0.0  # not on biases and LayerNorm
    clip_norm: float = 1.0  # global norm of the gradient; 0: no clipping
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    # Of the average of the weights over the steps, which is evaluated beside them and exported; 0:
    # none is kept. See averaging.py.
    ema_decay: float = 0.0


@config_dataclass
class DecontaminateConfig:
    """Evaluation sets whose texts no training row may hold (see data/decontaminate.py)."""

    paths: tuple[str, ...] = ()  # files, directories, patterns; empty: nothing is dropped
    passages: str = "listed"  # of evaluation that count: none, listed in rows, corpus (all)
    ngram_threshold: float | None = None  # drop also what shares this part of the n-grams
    ngram_size: int = 8  # characters of Chinese, words of others


@config_dataclass
class DataConfig:
    """Training data, text lengths and negatives."""

    datasets: tuple[DatasetConfig, ...] = ()
    # Shares of the steps are weight x rows^(1 / mixing_temperature); None: weight alone.
    mixing_temperature: float | None = None
    min_batch_size: int = 2  # a dataset with fewer rows is unusable
    skip_unusable: bool = False  # leave out datasets that can teach nothing; False: an error
    decontaminate: DecontaminateConfig = dataclasses.field(default_factory=DecontaminateConfig)
    query_max_length: int = 64  # tokens of a query, with the special ones
    max_length: int = 512  # tokens of every other text
    positives: int = 1  # drawn per row and step, if it lists several
    negatives: int = 1  # hard negatives per row and step
    # Steps after which the negatives of retrieval datasets are mined anew among their own passages,
    # with the weights of the moment; 0: never. The fields below say which, as those of `mine` do.
    remine_every: int = 0
    remine_ranks: tuple[int, int] = (50, 100)  # from 1, both inclusive
    remine_count: int = 15
    remine_max_positive_ratio: float | None = None  # of the positive's cosine; None: no filter
    # Steps after which a row's negatives give way to the next `negatives` of its list if they have
    # become easy (Conan, arXiv 2408.15710, which does so every 100 steps); 0: never.
    replace_every: int = 0
    prepared_dir: str = ""  # empty: WORKDIR/prepared


@config_dataclass
class TrainConfig:
    """How a step is computed."""

    # Chunks of packed rows encoded one after the other (gradient caching): same step, less memory.
    # So many of the largest batch; smaller ones take as many as keep their chunks no larger.
    micro_batches: int = 1


@config_dataclass
class CheckpointConfig:
    """When to save and how many to keep."""

    every: int = 500  # steps; 0: only at the end
    keep: int = 2
    # The weights with the largest value of this stay in WORKDIR/best: DATASET/METRIC@DIM of an
    # evaluation set, mean@DIM of all; of the averaged weights average/DATASET/METRIC@DIM.
    best_metric: str = ""


@config_dataclass
class LogConfig:
    """How often metrics are written."""

    every: int = 10


@config_dataclass
class MeshConfig:
    """Devices per axis; -1 (one axis at most): all that remain."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@config_dataclass
class EvalConfig:
    """When and on what to evaluate while training."""

    every: int = 0  # steps; 0: before and after training only
    datasets: tuple[EvalDatasetConfig, ...] = ()
    dims: tuple[int, ...] = ()  # empty: loss.dims


@config_dataclass
class Config:
    """Everything a run depends on."""

    seed: int = 0
    total_steps: int = 2500
    batch_size: int = 8192  # global rows a step
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)


# Fields that may differ between the runs of one workdir: they don't change what is learnt.
_FREE_FIELDS = re.compile(
    r"checkpoint\..*|log\..*|eval\..*|mesh\..*|train\..*|data\.prepared_dir|model\.remat"
    r"|model\.layers|loss\.block_size|data\.datasets\[\d+\]\.license"
)


def validate(config: Config) -> None:
    """Raises UserError naming the first field whose value can't work, and what is allowed.

    Lists are taken for tuples, in place; nothing else is changed.
    """
    nodes = (config.data, config.eval, config.loss, config.model)
    inner = (getattr(config.loss, "retrieval", None), getattr(config.data, "decontaminate", None))
    for node in filter(dataclasses.is_dataclass, (*nodes, *inner)):
        for item in dataclasses.fields(node):
            if isinstance(getattr(node, item.name), list):
                setattr(node, item.name, tuple(getattr(node, item.name)))

    def require(ok: bool, field: str, allowed: str) -> None:
        if not ok:
            value = get(config, field)
            raise UserError(f"config.{field} = {value!r}: must be {allowed}")

    try:
        pydantic.TypeAdapter(Config).validate_python(config)
    except pydantic.ValidationError as error:
        raise UserError(_first_problem(error)) from None

    for field, value in _leaves(config):
        for text in value if isinstance(value, tuple) else (value,):
            readable = not isinstance(text, str) or is_utf8(text)
            require(readable, field, "text that is UTF-8 (rename the file if it is a path)")

    def positive(*fields: str) -> None:
        for field in fields:
            require(get(config, field) > 0, field, "greater than 0")

    def small(*fields: str) -> None:
        for field in fields:
            require(get(config, field) < 2**31, field, "less than 2**31")

    def float32(*fields: str) -> None:
        for field in fields:
            low, high = 1e-37, 3e38
            require(low <= get(config, field) <= high, field, f"greater than 0 ({low} to {high})")

    def not_negative(*fields: str) -> None:
        for field in fields:
            require(get(config, field) >= 0, field, "0 or greater")

    def one_of(field: str, *allowed: str) -> None:
        require(get(config, field) in allowed, field, f"one of {', '.join(map(repr, allowed))}")

    positive("total_steps", "batch_size", "log.every", "checkpoint.keep")
    not_negative("seed", "checkpoint.every", "eval.every")
    require(config.seed < 2**32, "seed", "less than 2**32")
    small("total_steps", "batch_size", "model.embed_dim")

    model = config.model
    require(bool(model.init or model.tokenizer), "model.tokenizer",
            "a directory or hub id with a tokenizer when model.init is empty")  # fmt: skip
    if not model.init:
        of_model = [f"model.{f}" for f in (
            "vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size",
            "max_positions")]  # fmt: skip
        positive(*of_model)
        small(*of_model)
        require(model.hidden_size % model.num_heads == 0, "model.num_heads",
                f"a divisor of model.hidden_size = {model.hidden_size}")  # fmt: skip
    one_of("model.pooling", "", "mean", "cls", "last")
    one_of("model.dtype", "auto", "float32", "bfloat16")
    one_of("model.remat", "none", "dots", "full")
    one_of("model.layers", "auto", "scanned", "unrolled")
    not_negative("model.embed_dim")
    require(model.dropout is None or 0 <= model.dropout < 1, "model.dropout", "None or in [0, 1)")
    for pattern in model.freeze:
        require(pattern != "", "model.freeze", "without '', which fits every path; () for none")
        try:
            re.compile(pattern)
        except re.error as error:
            require(False, "model.freeze", f"regular expressions ({error})")

    dims = config.loss.dims
    require(len(dims) > 0, "loss.dims", "at least one prefix length, e.g. (256,)")
    for field in ("loss.dims", "eval.dims"):
        values = get(config, field)
        require(all(d > 0 for d in values), field, "greater than 0")
        require(all(a < b for a, b in itertools.pairwise(values)), field,
                "strictly increasing")  # fmt: skip
    width = model.embed_dim or (model.hidden_size if not model.init else None)
    if width is not None:
        validate_width(config, width)
    for task in TASK_NAMES:
        float32(f"loss.{task}.temperature", f"loss.{task}.weight")
    one_of("loss.retrieval.candidates", "all", "own_positive")
    one_of("loss.retrieval.duplicates", "once", "count")
    positive("loss.classification.max_negatives")
    small("loss.classification.max_negatives")
    terms = config.loss.retrieval.terms
    require(terms[:1] == ("qd",) and len(set(terms)) == len(terms)
            and set(terms) <= {"qd", "qq", "dq", "dd"},
            "loss.retrieval.terms", "'qd', then any of 'qq', 'dq', 'dd'")  # fmt: skip
    not_negative("loss.block_size", "loss.retrieval.hardness", "loss.retrieval.spread_out",
                 "loss.similarity.angle_weight")  # fmt: skip
    require(not config.loss.similarity.angle_weight or not any(d % 2 for d in dims), "loss.dims",
            "even where loss.similarity.angle_weight is set")  # fmt: skip
    for field in ("loss.retrieval.false_negative_margin", "loss.circle_margin"):
        value = get(config, field)
        require(value is None or 0 <= value < 2, field, "None or in [0, 2)")

    float32("optim.learning_rate", "optim.eps")
    one_of("optim.schedule", "cosine", "linear", "constant")
    not_negative("optim.warmup_steps", "optim.weight_decay", "optim.clip_norm")
    require(config.optim.warmup_steps < config.total_steps, "optim.warmup_steps",
            f"less than total_steps = {config.total_steps}")  # fmt: skip
    for beta in ("optim.b1", "optim.b2", "optim.ema_decay"):
        require(0 <= float(np.float32(get(config, beta))) < 1, beta, "in [0, 1), as a 32-bit float")

    def check_labels(where: str, dataset: DatasetConfig | EvalDatasetConfig) -> None:
        require(not dataset.label_names or dataset.task in ("", "classification"),
                f"{where}.task", "'classification' where label_names is set")  # fmt: skip
        require(bool(dataset.label_names) or not dataset.label_language,
                f"{where}.label_names", "a file where label_language is set")  # fmt: skip

    data = config.data
    require(len(data.datasets) > 0, "data.datasets", "at least one DatasetConfig(path=...)")
    for i, dataset in enumerate(data.datasets):
        where = f"data.datasets[{i}]"
        require(bool(dataset.path), f"{where}.path", "a file or directory")
        one_of(f"{where}.task", "", *TASK_NAMES)
        positive(f"{where}.weight", f"{where}.repeats")
        require(1e-9 <= dataset.weight * dataset.repeats <= 1e9, f"{where}.weight",
                f"at least {1e-9:g} and at most {1e9:g} / repeats")  # fmt: skip
        not_negative(f"{where}.max_rows", f"{where}.batch_size")
        check_labels(where, dataset)
    for i, evaluated in enumerate(config.eval.datasets):
        require(bool(evaluated.path), f"eval.datasets[{i}].path", "a file or directory")
        one_of(f"eval.datasets[{i}].task", "", *TASK_NAMES)
        not_negative(f"eval.datasets[{i}].max_rows")
        check_labels(f"eval.datasets[{i}]", evaluated)
    require(data.mixing_temperature is None or data.mixing_temperature >= 1,
            "data.mixing_temperature", "None, or 1 (proportional to rows) or more")  # fmt: skip
    positive("data.min_batch_size", "data.decontaminate.ngram_size")
    require("" not in data.decontaminate.paths, "data.decontaminate.paths", "paths, none empty")
    one_of("data.decontaminate.passages", "none", "listed", "corpus")
    threshold = data.decontaminate.ngram_threshold
    require(threshold is None or 0 < threshold <= 1, "data.decontaminate.ngram_threshold",
            "None or in (0, 1]")  # fmt: skip
    for limit in ("data.query_max_length", "data.max_length"):
        require(get(config, limit) >= 3, limit, "3 tokens or more (two are special)")
        if not model.init:
            require(get(config, limit) <= model.max_positions, limit,
                    f"at most model.max_positions = {model.max_positions}")  # fmt: skip
    small("data.negatives", "data.positives")
    not_negative("data.negatives", "data.remine_every", "data.replace_every")
    positive("data.positives", "train.micro_batches", "data.remine_count")
    first, last = data.remine_ranks
    require(1 <= first <= last, "data.remine_ranks", "(FIRST, LAST), 1 or more, rising")
    require(data.remine_count <= last - first + 1, "data.remine_count",
            f"at most {last - first + 1}, the ranks in data.remine_ranks")  # fmt: skip
    ratio = data.remine_max_positive_ratio
    require(ratio is None or 0 < ratio <= 2, "data.remine_max_positive_ratio", "None or in (0, 2]")
    require(not data.replace_every or data.negatives > 0, "data.negatives",
            "greater than 0 where data.replace_every is set")  # fmt: skip

    sizes = dataclasses.asdict(config.mesh)
    for axis, size in sizes.items():
        require(size == -1 or size > 0, f"mesh.{axis}", "-1 (all that remain) or greater than 0")
    require(list(sizes.values()).count(-1) <= 1, "mesh", "-1 on one axis at most")


def is_utf8(text: str) -> bool:
    """Whether a text, such as a path of undecodable bytes, is free of lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def validate_width(config: Config, width: int) -> None:
    """Raises UserError if a listed prefix is longer than the embedding's width."""
    for field in ("loss.dims", "eval.dims"):
        values = get(config, field)
        if values and values[-1] > width:
            raise UserError(
                f"config.{field} = {values}: prefix {values[-1]} is longer than the embedding,"
                f" {width} wide (model.embed_dim, or the hidden size if that is 0)"
            )


def shared_prompts(config: Config) -> dict[str, str]:
    """The prompts, `query` and `passage`, that all datasets share; what differs can't be named."""
    prompts = {
        "query": {dataset.query_prompt for dataset in config.data.datasets},
        "passage": {dataset.passage_prompt for dataset in config.data.datasets},
    }
    return {name: texts.pop() for name, texts in prompts.items() if len(texts) == 1 and any(texts)}


def to_json(config: Config) -> str:
    """The whole config, as written to WORKDIR/config.json."""
    return json.dumps(dataclasses.asdict(config), ensure_ascii=False, indent=2) + "\n"


def from_json(text: str, source: str) -> Config:
    """Inverse of to_json. Raises UserError, naming `source`, for what this version can't read."""
    try:
        return pydantic.TypeAdapter(Config).validate_json(text)
    except pydantic.ValidationError as error:
        raise UserError(
            f"{source}: {_first_problem(error)}; not a config that this version wrote"
        ) from None


def _first_problem(error: pydantic.ValidationError) -> str:
    problem = error.errors()[0]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"])
    return f"config{field} = {reprlib.repr(problem['input'])}: {problem['msg']}"


def diff(old: Config, new: Config) -> list[str]:
    """Lines `field: old -> new` for every difference that changes what a run learns."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    changed = [
        field
        for field in before.keys() | after.keys()
        if before.get(field) != after.get(field) and not _FREE_FIELDS.fullmatch(field)
    ]
    if old.optim.schedule == new.optim.schedule == "constant" and "total_steps" in changed:
        changed.remove("total_steps")  # a longer run of the same steps
    return [f"{f}: {before.get(f)!r} -> {after.get(f)!r}" for f in sorted(changed)]


def refusal(path: Path, changes: list[str], of: str = "config") -> str:
    """What to tell the user who goes on with the run at `path` with another config, or data."""
    return (
        f"{path} is of a run with another {of}:\n  "
        + "\n  ".join(changes)
        + f"\nChange the {of} back to go on with that run, or give another --workdir"
    )


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(node):
        for field in dataclasses.fields(node):
            prefix = f"{path}.{field.name}" if path else field.name
            yield from _leaves(getattr(node, field.name), prefix)
    elif isinstance(node, (tuple, list)) and any(map(dataclasses.is_dataclass, node)):
        for i, item in enumerate(node):
            yield from _leaves(item, f"{path}[{i}]")
    else:
        yield path, tuple(node) if isinstance(node, list) else node


def get(config: Config, field: str) -> Any:
    """The value of a field such as `data.datasets[0].path`; UserError if there is no such field."""
    node: Any = config
    place = "config"
    for name, index in re.findall(r"([^.\[\]]+)(?:\[(\d+)\])?", field):
        names = [f.name for f in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
        if name not in names:
            known = f"{place} has the fields {', '.join(names)}" if names else f"{place} has none"
            raise UserError(f"config.{field}: unknown config field {name!r}: {known}")
        node, place = getattr(node, name), f"{place}.{name}"
        if index:
            if not isinstance(node, tuple | list) or int(index) >= len(node):
                raise UserError(f"config.{field}: {place} = {reprlib.repr(node)} has no [{index}]")
            node, place = node[int(index)], f"{place}[{index}]"
    return node
