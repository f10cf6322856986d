"""Rows, files of them, and what is read from these."""

import json

import pyarrow as pa

from piccolo_jax.data.formats import open_source

RETRIEVAL_ROW = {"text": "问题", "text_pos": "答案", "text_neg": ["无关"], "type": "retri_contrast"}
CLASS_ROW = {"text": "球赛", "text_pos": "体育", "text_neg": ["财经"], "type": "cls_contrast"}
PAIR_ROW = {"text": "甲", "text_pair": "乙", "label": 1, "type": "cosent"}


def write_jsonl(path, *rows):
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes("".join(line + "\n" for line in lines).encode())
    return str(path)


def write_arrow(path, rows, batch_rows=2, file_format=False):
    table = pa.Table.from_pylist(rows)
    new = pa.ipc.new_file if file_format else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch_rows)


def save_to_disk(directory, *shards):
    """What `datasets.Dataset.save_to_disk` writes, as far as rows go."""
    directory.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(shards):05d}.arrow" for i in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        write_arrow(directory / name, rows)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (directory / "state.json").write_text(json.dumps(state))
    (directory / "dataset_info.json").write_text("{}")
    return directory


def queries(source):
    return [example.query for example in source]


def retrieval_rows(*texts):
    return [{**RETRIEVAL_ROW, "text": text} for text in texts]


def only(path, task=""):
    (example,) = open_source(path, task)
    return example
