"""The training files of the ablation: as they are for their own losses, and as retrieval rows."""

import collections
import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from piccolo_jax.errors import UserError

# Training file below --data, its task, and the prompt of its positives.
TRAINING = {
    "cmrc2018": ("open/retrieval/cmrc2018/train_triplets.jsonl", "retrieval", "passage: "),
    "triclue": ("research/retrieval/triclue.train.jsonl", "retrieval", "query: "),
    "stsb": ("research/sts/stsb_multi_zh.train.jsonl", "similarity", "query: "),
    "ocnli": ("research/pair/ocnli.train.jsonl", "similarity", "query: "),
    "tnews": ("research/classification/tnews.train.jsonl", "classification", "query: "),
    "csl": ("open/clustering/csl_category_title.train.jsonl", "classification", "query: "),
}
# Shares of the largest score from which a pair counts as positive, and up to which as negative.
_HIGH, _LOW = 0.8, 0.4


@dataclasses.dataclass
class Files:
    """A dataset's rows for the loss of its task, and the same rows for InfoNCE."""

    task: str
    own: Path
    retrieval: Path
    passage_prompt: str


def convert(data: Path, output: Path) -> dict[str, Files]:
    """Writes both forms of every training file below `output`."""
    output.mkdir(exist_ok=True)
    labels = {
        item["file"]: item["label_names"]
        for item in json.loads((data / "manifest.json").read_text(encoding="utf-8"))["files"]
        if item.get("label_names")
    }
    made = {}
    for name, (file, task, prompt) in TRAINING.items():
        rows = list(read_jsonl(data / file))
        own = retrieval = output / f"{name}.jsonl"
        if task == "classification":
            rows = [_with_all_labels(row, labels[file]) for row in rows]
        _write(own, rows)
        if task == "similarity":
            retrieval = output / f"{name}.positives.jsonl"
            _write(retrieval, positives(rows))
        elif task == "classification":
            retrieval = output / f"{name}.retrieval.jsonl"
            _write(
                retrieval, ({k: row[k] for k in ("text", "text_pos", "text_neg")} for row in rows)
            )
        made[name] = Files(task, own, retrieval, prompt)
    return made


def positives(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Scored pairs for InfoNCE: the second text of a pair with a high score is a positive.

    Its hard negatives are the second texts that have a low score with the same first text.
    """
    largest = max(row["label"] for row in rows)
    low = collections.defaultdict(list)
    for row in rows:
        if row["label"] <= _LOW * largest:
            low[row["text"]].append(row["text_pair"])
    for row in rows:
        if row["label"] >= _HIGH * largest:
            negatives = [text for text in low[row["text"]] if text != row["text_pair"]]
            yield {"text": row["text"], "text_pos": row["text_pair"], "text_neg": negatives}


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file. Raises UserError if it is missing or broken."""
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read ({error})") from None


def _with_all_labels(row: dict[str, Any], names: list[str]) -> dict[str, Any]:
    others = [name for name in names if name != row["text_pos"]]
    return {"text": row["text"], "text_pos": row["text_pos"], "text_neg": others,
            "type": "cls_contrast"}  # fmt: skip


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
