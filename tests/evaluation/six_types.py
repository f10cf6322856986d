"""A small folder with an evaluation set of each of mteb's six types, from the quickstart's CSL."""

import json

from small import TOKENIZER

DATA = TOKENIZER.parent
NAMES = {
    "Retrieval": "titles", "Reranking": "shortlist", "PairClassification": "same_paper",
    "Clustering": "areas", "Classification": "subjects", "STS": "grades",
}  # fmt: skip


def rows(name, count):
    lines = (DATA / f"{name}.jsonl").read_text("utf-8").splitlines()[:count]
    return [json.loads(line) for line in lines]


def write_rows(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in lines]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def write(folder, count=24):
    """NAMES of sets below FOLDER, split `test`."""
    papers = [(row["text"], row["text_pos"][:60]) for row in rows("retrieval.test", count)]
    titles = folder / "retrieval" / "titles"
    write_rows(
        titles / "corpus.jsonl",
        *({"id": f"d{i}", "title": "论文" if i % 2 else "", "text": text}
          for i, (_, text) in enumerate(papers)),
    )  # fmt: skip
    write_rows(
        titles / "queries.test.jsonl",
        *({"id": f"q{i}", "text": title} for i, (title, _) in enumerate(papers)),
    )
    judged = [f"q{i}\td{i}\t2" for i in range(count)] + [f"q{i}\td{i + 1}\t1" for i in range(9)]
    (titles / "qrels.test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(judged))
    write_rows(
        folder / "reranking" / "shortlist.test.jsonl",
        *({"query": title, "positive": [text],
           "negative": [papers[(i + k) % count][1] for k in (1, 2, 3)]}
          for i, (title, text) in enumerate(papers)),
    )  # fmt: skip
    pairs = [{"text": title, "text_pair": text, "label": 1} for title, text in papers] + [
        {"text": title, "text_pair": papers[(i + 5) % count][1], "label": 0}
        for i, (title, _) in enumerate(papers)
    ]
    write_rows(folder / "pair" / "same_paper.test.jsonl", *pairs)
    graded = [{**pair, "label": 3 * pair["label"] + i % 3} for i, pair in enumerate(pairs)]
    write_rows(folder / "sts" / "grades.test.jsonl", *graded)
    subjects = ("工学", "医学", "文学")
    for split, size in (("train", 300), ("test", 120)):
        labelled = [
            {"text": row["text"], "label": subjects.index(row["text_pos"])}
            for row in rows(f"classification.{split}", size)
            if row["text_pos"] in subjects
        ]
        write_rows(folder / "classification" / f"subjects.{split}.jsonl", *labelled)
    write_rows(folder / "clustering" / "areas.test.jsonl", *labelled)
    return folder
