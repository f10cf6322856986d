"""Evaluation sets in plain files: which of the six task types a folder holds, and their rows.

    NAME.SPLIT.jsonl         rows; the columns, the folder's name or manifest.json say of which type
    NAME/corpus.jsonl        retrieval, with queries.SPLIT.jsonl and qrels.SPLIT.tsv beside it, or
                             queries.jsonl and qrels/SPLIT.tsv

Knows nothing of mteb: what it returns becomes a task in `local_tasks`.
"""

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from piccolo_jax.data import containers
from piccolo_jax.errors import UserError
from piccolo_jax.evaluation import ranked
from piccolo_jax.evaluation import rows as rows_lib
from piccolo_jax.evaluation.rows import Data
from piccolo_jax.models.modules import UNREADABLE

TYPES = (
    "Retrieval",
    "Reranking",
    "PairClassification",
    "Clustering",
    "Classification",
    "STS",
)
SPLITS = ("test", "dev", "validation", "val")  # the first that is there is used
_FOLDERS = {
    "retrieval": "Retrieval", "reranking": "Reranking", "pair": "PairClassification",
    "pairclassification": "PairClassification", "pair_classification": "PairClassification",
    "clustering": "Clustering", "classification": "Classification", "sts": "STS",
}  # fmt: skip
# Columns, and the types they can be of.
_COLUMNS: tuple[tuple[set[str], tuple[str, ...]], ...] = (
    ({"query", "positive", "negative"}, ("Reranking",)),
    ({"text", "text_pair", "label"}, ("STS", "PairClassification")),
    ({"sentence1", "sentence2", "score"}, ("STS",)),
    ({"sentence1", "sentence2", "label"}, ("PairClassification", "STS")),
    ({"text", "label"}, ("Classification", "Clustering")),
    ({"sentences", "labels"}, ("Clustering",)),
)
_LAYOUTS = (
    "Reranking {query, positive, negative}, STS and PairClassification {text, text_pair, label},"
    " Classification and Clustering {text, label}, or a retrieval folder with corpus.jsonl"
)
_READERS: dict[str, Callable[[Path, int], Data]] = {
    "STS": rows_lib.read_pairs,
    "PairClassification": rows_lib.read_binary_pairs,
    "Clustering": rows_lib.read_clustering,
    "Reranking": ranked.read_reranking,
}
_SUFFIX = re.compile(r"^(?P<name>.+)\.(?P<split>[\w-]+)$")
_TRAINING = "train"


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """An evaluation set of one type: its place and the files of its splits."""

    name: str
    type: str
    place: Path  # the folder of a retrieval set, else the folder of its files
    splits: Mapping[str, tuple[Path, ...]]  # evaluation splits alone
    train: Path | None = None


@dataclasses.dataclass(frozen=True)
class Listing:
    """What a folder holds. `left_out` are files of no use here, with the reason."""

    sets: tuple[Found, ...]
    left_out: tuple[tuple[Path, str], ...]


def find(directory: Path) -> Listing:
    """The evaluation sets below a folder, by name.

    Raises UserError if there is no such folder, for a file that says what it is and isn't, and
    for two sets of the same name and type.
    """
    if not directory.is_dir():
        raise UserError(f"--data={directory}: there is no such folder")
    manifest = _manifest(directory)
    retrieval = sorted({path.parent for path in directory.rglob("corpus.jsonl")})
    sets = [_retrieval_set(folder) for folder in retrieval]
    left_out: list[tuple[Path, str]] = []
    groups: dict[tuple[Path, str], dict[str, Path]] = {}
    for path in sorted(directory.rglob("*")):
        inside = any(folder in path.parents for folder in retrieval)
        suffix = containers.suffix_of(path)
        if inside or not path.is_file() or not suffix or path == directory / "manifest.json":
            continue
        match = _SUFFIX.match(path.name.removesuffix(suffix))
        if match is None:
            left_out.append((path, "its name doesn't end in .SPLIT, e.g. NAME.test.jsonl"))
            continue
        files = groups.setdefault((path.parent, match["name"]), {})
        if match["split"] in files:
            raise UserError(f"{path}: {files[match['split']]} is the same set and split; keep one")
        files[match["split"]] = path
    for (folder, name), files in groups.items():
        train = files.pop(_TRAINING, None)
        if not files:
            left_out.append((folder / name, "has a train split only"))
            continue
        first = files[_choose(files, "") or sorted(files)[0]]
        kind = _type_of(first, manifest, directory, has_train=train is not None)
        if not kind:
            columns = ", ".join(rows_lib.first_row(first))
            left_out.append((first, f"columns {columns} are of none of the six types"))
            continue
        splits = {split: (path,) for split, path in files.items()}
        sets.append(Found(name, kind, folder, splits, train))
    return Listing(_named_apart(sets), tuple(left_out))


def choose(
    listing: Listing, directory: Path, tasks: Iterable[str] = (), split: str = ""
) -> list[tuple[Found, str]]:
    """Sets and the split of each: those of the names in `tasks` (default: all) that have `split`.

    The order is that of the types, then names. Raises UserError if a name or nothing is left.
    """
    chosen = {found: _choose(found.splits, split) for found in listing.sets}
    names = list(tasks)
    for name in names:
        same = [found for found in listing.sets if name in _names(found, chosen[found])]
        if not same:
            has = ", ".join(sorted(found.name for found in listing.sets)) or "none"
            why = [
                f"; {p} was left out: {r}" for p, r in listing.left_out if p.name.startswith(name)
            ]
            raise UserError(f"--tasks={name}: not in {directory}, which has {has}{''.join(why)}")
        if not any(chosen[found] for found in same):
            has = ", ".join(name for found in same for name in found.splits)
            raise UserError(f"--split={split}: {name} has no such split, only {has}")
    pairs = [(found, used) for found, used in chosen.items() if used]
    if names:
        pairs = [(f, used) for f, used in pairs if any(n in _names(f, used) for n in names)]
    if not pairs:
        known = sorted({s for found in listing.sets for s in found.splits})
        what = f"of split {split!r} (splits here: {', '.join(known)})" if split and known else ""
        reasons = "".join(f"\n  {path}: {why}" for path, why in listing.left_out[:10])
        raise UserError(
            f"--data={directory}: holds no evaluation set {what}\nexpected NAME.SPLIT.jsonl with"
            f" {_LAYOUTS}{reasons}"
        )
    return sorted(pairs, key=lambda pair: (TYPES.index(pair[0].type), pair[0].name))


def read(found: Found, split: str, limit: int = 0) -> Data:
    """The rows of a set's split; with a limit, a small part of them for a quick look.

    Raises UserError naming the file, the line and the fix for what can't be used.
    """
    files = found.splits[split]
    if found.type == "Retrieval":
        if len(files) == 1:
            return ranked.read_passages(files[0], limit)
        return ranked.read_retrieval(found.place / "corpus.jsonl", files[0], files[1], limit)
    if found.type == "Classification":
        if found.train is None:
            raise UserError(
                f"{files[0]}: classification trains a classifier on {found.name}.train"
                f"{containers.suffix_of(files[0])}, which is not beside it; add it, or put the file"
                " into a folder `clustering`"
            )
        return rows_lib.read_classification(found.train, files[0], limit)
    return _READERS[found.type](files[0], limit)


def fingerprint(found: Found, split: str, limit: int) -> str:
    """Of the content of all files that are read, and of how."""
    files = [*found.splits[split]]
    if found.type == "Retrieval" and len(files) > 1:
        files.append(found.place / "corpus.jsonl")
    if found.type == "Classification" and found.train:
        files.append(found.train)
    digests = [containers.digest_of(path) for path in files]
    described = json.dumps([rows_lib.VERSION, found.type, split, limit, digests])
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _retrieval_set(folder: Path) -> Found:
    splits = {}
    judged = {path.name.split(".")[1]: path for path in folder.glob("qrels.*.tsv")}
    judged |= {path.stem: path for path in folder.glob("qrels/*.tsv")}
    for queries in sorted(folder.glob("queries.*.jsonl")):
        split = queries.name.split(".")[1]
        if split not in judged:
            missing = folder / f"qrels.{split}.tsv"
            raise UserError(f"{missing}: no such file; {queries.name} needs it beside it")
    for split, qrels in sorted(judged.items()):
        queries = folder / f"queries.{split}.jsonl"
        queries = queries if queries.is_file() else folder / "queries.jsonl"
        if split != _TRAINING and queries.is_file():
            splits[split] = (queries, qrels)
    if not splits:
        raise UserError(
            f"{folder / 'corpus.jsonl'}: needs queries.SPLIT.jsonl and qrels.SPLIT.tsv beside it,"
            " e.g. queries.test.jsonl and qrels.test.tsv (or queries.jsonl and qrels/test.tsv)"
        )
    return Found(folder.name, "Retrieval", folder, splits)


def _manifest(directory: Path) -> dict[str, str]:
    """Type of each file, by its path below the folder, as manifest.json has them; if there is."""
    path = directory / "manifest.json"
    if not path.is_file():
        return {}
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {row["file"]: row["task"] for row in listed if row.get("task") in TYPES}
    except (*UNREADABLE, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: must be an object with a list `files` of {{file, task}} ({error!r}); mend or"
            " delete it: types are then taken from folders and columns"
        ) from None


def _type_of(path: Path, manifest: Mapping[str, str], directory: Path, has_train: bool) -> str:
    """A set's type: by manifest, else by folder, else by columns; empty: of none.

    Raises UserError if the columns are not those of the type that manifest or folder says.
    """
    row = rows_lib.first_row(path)
    columns = set(row)
    fitting = next((types for names, types in _COLUMNS if names <= columns), ())
    if {"text", "text_pos"} <= columns:  # a training file's, whose type says more
        of_labels = row.get("type") == "cls_contrast" or "label" in columns
        fitting = ("Classification", "Clustering") if of_labels else ("Retrieval",)
    said, where = manifest.get(str(path.relative_to(directory))), "manifest.json says"
    if not said:
        said = _FOLDERS.get(path.resolve().parent.name.lower())
        where = "the folder's name says"
    if said:
        if said not in fitting:
            raise UserError(
                f"{path}:1: {where} {said}, but its columns are {', '.join(sorted(columns))};"
                f" expected {_LAYOUTS}"
            )
        return said
    if fitting == ("STS", "PairClassification"):
        return "PairClassification" if rows_lib.is_binary(path) else "STS"
    if fitting == ("Classification", "Clustering"):
        return "Classification" if has_train else "Clustering"
    return fitting[0] if fitting else ""


def _choose(splits: Iterable[str], split: str) -> str:
    """The split to use; empty: there is none."""
    names = list(splits)
    wanted = (split,) if split else SPLITS
    return next((name for name in wanted if name in names), "")


def _named_apart(sets: list[Found]) -> tuple[Found, ...]:
    names = Counter(found.name for found in sets)
    named = [
        dataclasses.replace(found, name=f"{found.name}-{found.type}")
        if names[found.name] > 1
        else found
        for found in sets
    ]
    places: dict[str, Path] = {}
    for found in named:
        if found.name in places:
            raise UserError(
                f"{found.place}: {found.name} is the name of a set in {places[found.name]} too;"
                " rename one"
            )
        places[found.name] = found.place
    return tuple(named)


def _names(found: Found, split: str) -> tuple[str, ...]:
    return found.name, f"{found.name}.{split}"
