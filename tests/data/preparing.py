"""Rows, and what the tests of preparing do with them."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "configs" / "quickstart_data" / "tokenizer"

RETRIEVAL = [
    {"query": "北京的天气", "pos": ["天气好", "有雨"], "neg": ["中国地图"]},
    {"query": "中国的首都", "pos": ["北京"], "neg": []},
    {"query": "有雨", "pos": ["天气好"]},
]
PAIRS = [{"sentence1": "天气好", "sentence2": "有雨", "score": s} for s in (0.5, -1, 3)]
LABELLED = [
    {"text": "球赛", "text_pos": "体育", "text_neg": ["财经"], "type": "cls_contrast"},
    {"text": "股市", "text_pos": "财经", "text_neg": [], "type": "cls_contrast"},
]


def write(path, rows):
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def folders(tmp_path):
    """Names of everything below tmp_path / "prepared"."""
    root = tmp_path / "prepared"
    return sorted(p.name for p in root.iterdir()) if root.exists() else []
