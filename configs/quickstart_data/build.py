"""Makes the data of the quickstart from the titles and abstracts of CSL, the same bytes every time.

python configs/quickstart_data/build.py --source=DIR [--output=DIR]

DIR holds `clustering/csl_category_title.{train,dev,test}.jsonl`,
`clustering/csl_discipline_abstract.dev.jsonl` and `retrieval/csl_title2abstract/`. README.md beside
this file says what each output is. Whatever is drawn is drawn by hash, so that no version of a
random number generator matters.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import pathlib
import string
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tokenizers

ABSTRACT_LENGTH = 120  # characters
SIMILARITY_TRAIN_PAPERS, SIMILARITY_TEST_PAPERS = 667, 200  # three rows each
RETRIEVAL_TEST_QUERIES = 500
CLASSIFICATION_TRAIN_ROWS, CLASSIFICATION_TEST_ROWS = 3000, 600
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MIN_COUNT = 2  # rarer characters stay [UNK], so that [UNK] is trained too
MODEL_MAX_LENGTH = 512

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Paper:
    """A paper of CSL; the abstract is already cut."""

    title: str
    abstract: str
    category: str
    discipline: str = ""  # known for the dev split only


def key(text: str) -> str:
    """Equal for texts that differ in width, case, spaces, punctuation, or after 60 characters."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in folded if unicodedata.category(c)[0] in "LN")[:60]


def draw(items: Iterable[Any], salt: str) -> list[Any]:
    """The items in an order that depends on their text and the salt alone."""
    return sorted(items, key=lambda x: hashlib.sha256(f"{salt}\0{x}".encode()).digest())


def draw_balanced(items: Iterable[Any], group: Callable[[Any], str], n: int, salt: str) -> list:
    """n items, each group giving equally many as long as it has any left."""
    drawn, seen = [], collections.Counter()
    for item in draw(items, salt):
        drawn.append((seen[group(item)], item))
        seen[group(item)] += 1
    drawn.sort(key=lambda pair: pair[0])
    return draw([item for _, item in drawn[:n]], salt + " order")


def read_jsonl(path: pathlib.Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in lines]


def read_titles(source: pathlib.Path, split: str) -> list[tuple[str, str]]:
    rows = read_jsonl(source / f"clustering/csl_category_title.{split}.jsonl")
    return [(row["text"], row["text_pos"]) for row in rows]


def read_papers(source: pathlib.Path, split: str) -> list[Paper]:
    """The papers of a split that has abstracts, each title and abstract once."""
    folder = source / "retrieval/csl_title2abstract"
    abstracts = {row["id"]: row["text"] for row in read_jsonl(folder / "corpus.jsonl")}
    titles = {row["id"]: row["text"] for row in read_jsonl(folder / f"queries.{split}.jsonl")}
    categories = {key(title): category for title, category in read_titles(source, split)}
    disciplines = {}
    if split == "dev":
        rows = read_jsonl(source / "clustering/csl_discipline_abstract.dev.jsonl")
        disciplines = {key(row["text"]): row["text_pos"] for row in rows}
    papers, seen = [], set()
    relevant = (folder / f"qrels.{split}.tsv").read_text(encoding="utf-8").split("\n")[1:]
    for query, document, _ in (line.split("\t") for line in relevant if line):
        title, abstract = (
            titles[query].strip(),
            abstracts[document].strip()[:ABSTRACT_LENGTH].strip(),
        )
        if not seen.isdisjoint((key(title), key(abstract))):
            continue
        seen |= {key(title), key(abstract)}
        papers.append(
            Paper(title, abstract, categories[key(title)], disciplines.get(key(abstract), ""))
        )
    return papers


def retrieval_train(papers: Sequence[Paper]) -> list[Row]:
    """Title -> abstract, with one abstract of the same discipline as the hard negative."""
    rows = []
    for paper in papers:
        others = [p for p in papers if p is not paper]
        near = [p for p in others if p.discipline == paper.discipline != ""]
        near = near or [p for p in others if p.category == paper.category]
        negative = draw(near, f"negative {paper.title}")[0]
        rows.append(
            {
                "text": paper.title,
                "text_pos": paper.abstract,
                "text_neg": [negative.abstract],
                "type": "retri_contrast",
            }
        )
    return draw(rows, "retrieval")


def retrieval_test(papers: Sequence[Paper]) -> list[Row]:
    """Title -> abstract; the corpus is all abstracts of the file."""
    return [
        {"text": p.title, "text_pos": p.abstract, "text_neg": [], "type": "retri_contrast"}
        for p in draw(papers, "retrieval test")[:RETRIEVAL_TEST_QUERIES]
    ]


def similarity(papers: Sequence[Paper], salt: str) -> list[Row]:
    """Title and abstract of 2 the same paper, 1 two papers of a category, 0 two categories.

    Each title and each abstract occurs once per score, so neither alone tells the score.
    """
    groups = collections.defaultdict(list)
    for paper in papers:
        groups[paper.category].append(paper)
    same = {p: q for g in groups.values() for p, q in zip(g, g[1:] + g[:1], strict=True)}
    other = dict(zip(papers, draw(papers, salt + " other"), strict=True))
    for paper in papers:
        if other[paper].category != paper.category:
            continue
        for partner in papers:  # the first to swap with, so that both are right
            if paper.category not in (partner.category, other[partner].category):
                other[paper], other[partner] = other[partner], other[paper]
                break
    rows = []
    for paper in papers:
        if same[paper] is paper or other[paper].category == paper.category:
            raise ValueError(f"no partner for {paper.title} ({paper.category}): too few papers")
        for label, partner in ((2, paper), (1, same[paper]), (0, other[paper])):
            rows.append(
                {
                    "text": paper.title,
                    "text_pair": partner.abstract,
                    "label": label,
                    "type": "cosent",
                }
            )
    return draw(rows, salt)


def classification(titles: Sequence[tuple[str, str]], labels: Sequence[str]) -> list[Row]:
    """Title -> category, with all other categories as negatives."""
    return [
        {
            "text": title,
            "text_pos": label,
            "text_neg": [other for other in labels if other != label],
            "type": "cls_contrast",
        }
        for title, label in titles
    ]


def texts_of(rows: Iterable[Row]) -> set[str]:
    """All texts of the rows but label texts."""
    texts = set()
    for row in rows:
        texts.add(row["text"])
        if row["type"] == "cosent":
            texts.add(row["text_pair"])
        elif row["type"] == "retri_contrast":
            texts |= {row["text_pos"], *row["text_neg"]}
    return texts


def check_disjoint(files: dict[str, list[Row]]) -> None:
    """Raises ValueError if a text of a test file is, by its key, in a training file."""
    tests = {key(t) for name, rows in files.items() if ".test." in name for t in texts_of(rows)}
    for name, rows in files.items():
        if ".train." in name:
            for text in texts_of(rows):
                if key(text) in tests:
                    raise ValueError(f"{name}: also in a test file: {text}")


def make_files(source: pathlib.Path) -> dict[str, list[Row]]:
    """All data files by name."""
    test_papers = read_papers(source, "test")
    test_titles = read_titles(source, "test")
    held_out = {key(t) for t, _ in test_titles}
    held_out |= {key(t) for p in test_papers for t in (p.title, p.abstract)}
    train_papers = [
        p
        for p in read_papers(source, "dev")
        if held_out.isdisjoint((key(p.title), key(p.abstract)))
    ]
    # One label a title: CSL holds a few titles twice.
    train_titles = {
        key(t): (t, c) for t, c in read_titles(source, "train") if key(t) not in held_out
    }
    labels = sorted({category for _, category in train_titles.values()})

    def papers(of: list[Paper], n: int, salt: str) -> list[Paper]:
        return draw_balanced(of, lambda p: p.category, n, salt)

    def titles(of: Iterable[tuple[str, str]], n: int, salt: str) -> list[tuple[str, str]]:
        return draw_balanced(of, lambda t: t[1], n, salt)

    files = {
        "retrieval.train.jsonl": retrieval_train(train_papers),
        "retrieval.test.jsonl": retrieval_test(test_papers),
        "similarity.train.jsonl": similarity(
            papers(train_papers, SIMILARITY_TRAIN_PAPERS, "similarity train"), "similarity train"
        ),
        "similarity.test.jsonl": similarity(
            papers(test_papers, SIMILARITY_TEST_PAPERS, "similarity test"), "similarity test"
        ),
        "classification.train.jsonl": classification(
            titles(train_titles.values(), CLASSIFICATION_TRAIN_ROWS, "classification"), labels
        ),
        "classification.test.jsonl": classification(
            titles({key(t): (t, c) for t, c in test_titles}.values(), CLASSIFICATION_TEST_ROWS,
                   "classification"), labels
        ),
    }  # fmt: skip
    check_disjoint(files)
    return files


def make_tokenizer(texts: Iterable[str]) -> tokenizers.Tokenizer:
    """A WordPiece tokenizer of single characters: c at the start of a word, ##c inside."""
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({t: i for i, t in enumerate(SPECIAL_TOKENS)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    counts = collections.Counter()
    for text in texts:
        normalized = tokenizer.normalizer.normalize_str(text)
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normalized):
            counts[word[0]] += 1
            counts.update("##" + c for c in word[1:])
    # What is met inside words may also start one, and the other way round: ±, μ, letters, digits.
    ascii_words = set(string.digits + string.ascii_lowercase)
    for c in ascii_words | {piece[2:] for piece in counts if piece.startswith("##")}:
        both = counts[c] + counts["##" + c]
        counts[c] = counts["##" + c] = max(both, MIN_COUNT if c in ascii_words else 0)
    pieces = sorted((p for p, n in counts.items() if n >= MIN_COUNT), key=lambda p: (-counts[p], p))
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL_TOKENS, *pieces])}
    tokenizer.model = tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]")
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(t, vocabulary[t]) for t in ("[CLS]", "[SEP]")],
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def write_tokenizer(folder: pathlib.Path, tokenizer: tokenizers.Tokenizer) -> None:
    """tokenizer.json, vocab.txt and the two files transformers wants beside them."""
    names = {f"{t[1:-1].lower()}_token": t for t in SPECIAL_TOKENS}
    config = {
        **names,
        "do_lower_case": True,
        "model_max_length": MODEL_MAX_LENGTH,
        "strip_accents": None,
        "tokenize_chinese_chars": True,
        "tokenizer_class": "BertTokenizer",
    }
    vocabulary = tokenizer.get_vocab()
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("tokenizer.json", tokenizer.to_str(pretty=True) + "\n"),
        ("vocab.txt", "".join(piece + "\n" for piece in sorted(vocabulary, key=vocabulary.get))),
        ("tokenizer_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n"),
        ("special_tokens_map.json", json.dumps(names, indent=2, sort_keys=True) + "\n"),
    ):
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--source", type=pathlib.Path, required=True, help="the folder of open data"
    )
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    options = parser.parse_args()
    try:
        files = make_files(options.source)
    except FileNotFoundError as error:
        parser.error(f"--source={options.source}: {error.filename} is missing")
    options.output.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (options.output / name).write_text(text, encoding="utf-8", newline="\n")
        print(f"{name}: {len(rows)} rows, {len(text.encode()) / 1024:.0f} KiB", file=sys.stderr)
    training = [rows for name, rows in files.items() if ".train." in name]
    label_texts = sorted({row["text_pos"] for row in files["classification.train.jsonl"]})
    texts = {text for rows in training for text in texts_of(rows)} | set(label_texts)
    write_tokenizer(options.output / "tokenizer", make_tokenizer(sorted(texts)))


if __name__ == "__main__":
    main()
