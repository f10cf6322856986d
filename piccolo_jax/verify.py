"""Checks that an exported model gives the same vectors in sentence-transformers as in JAX.

    python -m piccolo_jax.verify OUT [--workdir=DIR [--checkpoint=latest|best]
        [--weights=average|last]] [--dims=256,512]

JAX takes the model from OUT too, so this shows that both read it alike; with --workdir, from the
checkpoint of the run, so this shows that OUT is what was trained. Prints, at every prefix, the
largest 1 - cosine over fixed texts; exits with 1 if one is above 1e-4 or OUT is of another width.
Needs sentence-transformers and torch (requirements-dev.txt).
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np

from piccolo_jax import cli, export, metrics
from piccolo_jax.config import MeshConfig
from piccolo_jax.errors import UserError
from piccolo_jax.evaluation import encoder
from piccolo_jax.sharding import make_mesh

TOLERANCE = 1e-4
TEXTS = (
    "今天天气很好，我们去公园散步吧。",
    "如何办理信用卡？",
    "A short English sentence.",
    "第一",
    "量子计算机利用叠加与纠缠并行地处理信息，" * 8,
    "价格：￥1,299.00（含税）\t编号 #A-42 😀",
    "检索、重排、相似度、分类与聚类都用同一个向量模型。" * 60,
)


def main(argv: list[str]) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="piccolo_jax.verify", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--workdir", type=Path, help="of the run that OUT was exported from")
    parser.add_argument("--dims", default="", help="prefixes, e.g. 256,512; default: the trained")
    export.add_checkpoint_flags(parser)
    args = parser.parse_args(argv[1:])
    if args.workdir:
        _, config, parts, params = export.read_checkpoint(
            args.workdir, args.checkpoint, args.weights
        )
        mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
        model = encoder.Encoder(parts.model, parts.tokenizer, mesh, config.data.max_length)
    else:
        model, params = encoder.load(args.model)
    dims = _dims(args.dims, model.width) or _trained_dims(args.model, model.width)
    ours = model.encode(params, TEXTS)
    theirs = encode_with_sentence_transformers(args.model)
    if theirs.shape != ours.shape:
        print(f"sentence-transformers gives {theirs.shape[1]} dimensions, JAX {ours.shape[1]}")
        return 1
    differences = [largest_difference(ours, theirs, dim) for dim in dims]
    rows = [(dim, f"{difference:.1e}") for dim, difference in zip(dims, differences, strict=True)]
    print(metrics.table(("prefix", "largest 1 - cosine"), rows))
    if max(differences) > TOLERANCE or not np.isfinite(differences).all():
        print(f"different: more than {TOLERANCE} on {len(TEXTS)} texts")
        return 1
    print(f"same vectors in sentence-transformers and JAX on {len(TEXTS)} texts")
    return 0


def encode_with_sentence_transformers(directory: Path) -> np.ndarray:
    """Embeddings of TEXTS, float32 [texts, D], as sentence-transformers computes them on CPU."""
    try:
        import transformers
        from sentence_transformers import SentenceTransformer

        transformers.logging.disable_progress_bar()
    except ImportError as error:
        raise UserError(
            f"verify needs sentence-transformers ({error}): pip install -r requirements-dev.txt"
        ) from error
    try:
        model = SentenceTransformer(
            str(directory),
            device="cpu",
            trust_remote_code=False,
            local_files_only=True,
            model_kwargs={"add_pooling_layer": False},  # else it reports the pooler as missing
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise UserError(f"{directory}: sentence-transformers can't load it ({error})") from error
    return model.encode(list(TEXTS), convert_to_numpy=True).astype(np.float32)


def largest_difference(x: np.ndarray, y: np.ndarray, dim: int) -> float:
    """The largest 1 - cosine of corresponding rows, cut to `dim`."""
    x, y = encoder.cut(x.astype(np.float64), dim), encoder.cut(y.astype(np.float64), dim)
    return float(np.max(1 - (x * y).sum(axis=1)))


def _dims(text: str, width: int) -> list[int]:
    if not text:
        return []
    try:
        dims = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--dims={text}: must be numbers, e.g. 256,512") from None
    if any(not 1 <= dim <= width for dim in dims):
        raise UserError(f"--dims={text}: each must be from 1 to {width}, the model's width")
    return dims


def _trained_dims(directory: Path, width: int) -> list[int]:
    """The prefixes that the export names, else eighths of the width."""
    try:
        path = directory / "config_sentence_transformers.json"
        dims = json.loads(path.read_text(encoding="utf-8"))["matryoshka_dims"]
        return [int(dim) for dim in dims if 1 <= int(dim) <= width]
    except (OSError, ValueError, KeyError, TypeError):
        return sorted({max(width * eighth // 8, 1) for eighth in range(1, 9)})


if __name__ == "__main__":
    cli.run(main)
