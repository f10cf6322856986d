"""Writes a trained model as a sentence-transformers directory.

    python -m piccolo_jax.export --workdir=DIR --output=OUT [--checkpoint=latest|best]
        [--weights=average|last] [--overwrite]

The layout is that of 2024, which sentence-transformers 2.2 to 6.x load: a Transformer, Pooling and,
with a scaling layer, a Dense module. No Normalize module, since users cut first and normalise then.
"""

import argparse
import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from piccolo_jax import __version__, averaging, build, cli
from piccolo_jax.checkpoint import Best, Checkpoints
from piccolo_jax.config import Config, MeshConfig
from piccolo_jax.errors import UserError
from piccolo_jax.models import pretrained
from piccolo_jax.sharding import make_mesh
from piccolo_jax.types import Params

_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": None,
    "pooling_mode_mean_sqrt_len_tokens": None,
    "pooling_mode_weightedmean_tokens": None,
    "pooling_mode_lasttoken": "last",
}


def main(argv: list[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="piccolo_jax.export", description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="of the training run")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    add_checkpoint_flags(parser)
    args = parser.parse_args(argv[1:])
    check_output(args.output, args.overwrite)
    step, config, parts, params = read_checkpoint(args.workdir, args.checkpoint, args.weights)
    write(args.output, jax.device_get(params), parts, config, args.overwrite)
    print(f"step {step} of {args.workdir} is in {args.output}")


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which weights of a run are meant: the arguments of read_checkpoint()."""
    parser.add_argument(
        "--checkpoint",
        choices=("latest", "best"),
        default="latest",
        help="of WORKDIR; best: by config.checkpoint.best_metric",
    )
    parser.add_argument(
        "--weights",
        choices=(averaging.AVERAGE, averaging.LAST),
        help="of WORKDIR: the average over the steps, or the last; default: average, if kept",
    )


def read_checkpoint(
    workdir: Path, checkpoint: str = "latest", weights: str | None = None
) -> tuple[int, Config, build.Parts, Params]:
    """Step, config, model and parameters (on one device) of a run's "latest" or "best" checkpoint.

    `weights`: "average", "last", or None: the average if the run keeps one. Raises UserError if the
    average is asked for and there is none.
    """
    checkpoints = Best(workdir) if checkpoint == "best" else Checkpoints(workdir)
    config, _ = checkpoints.about()
    parts = build.build(config)
    shardings = build.param_shardings(parts.model, make_mesh(MeshConfig(), jax.local_devices()[:1]))
    abstract = build.abstract_params(parts.model, shardings)
    params = checkpoints.restore_params(abstract)
    average = averaging.averaged(config, abstract)
    if weights == averaging.AVERAGE and average is None:
        raise UserError(
            f"--weights=average: the run in {workdir} keeps no average of its weights"
            " (config.optim.ema_decay = 0); --weights=last takes the last ones"
        )
    if weights != averaging.LAST and average is not None:
        params = averaging.weights_of(checkpoints.restore_average(average), params)
    return checkpoints.latest or 0, config, parts, params


def check_output(output: Path, overwrite: bool) -> None:
    """Raises UserError if there is something at `output` that may not be replaced."""
    if not overwrite and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not empty; --overwrite replaces it")


def write(
    output: Path, params: Params, parts: build.Parts, config: Config, overwrite: bool = False
) -> None:
    """Writes the directory beside its place and then moves it there, so it is whole or absent.

    `params` are numpy arrays, whole.
    """
    with replacing(output, overwrite) as partial:
        _write_files(partial, params, parts, config)


@contextlib.contextmanager
def replacing(output: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a new directory beside `output`, moved to its place if all goes well, else removed.

    Raises UserError for what check_output() says, and if it can't be written.
    """
    check_output(output, overwrite)
    output = output.absolute()
    partial = output.with_name(f"{output.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        yield partial
        _replace(partial, output)
    except OSError as error:
        raise UserError(f"{output}: can't be written ({error.strerror})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(partial: Path, output: Path) -> None:
    """Moves a directory to a place where something may be; that is gone only when all is done."""
    if not output.exists():
        os.rename(partial, output)
        return
    old = partial.with_name(partial.name + "-old")
    os.rename(output, old)
    try:
        os.rename(partial, output)
    except OSError:
        os.rename(old, output)
        raise
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old)
    else:
        old.unlink()


def _write_files(directory: Path, params: Params, parts: build.Parts, config: Config) -> None:
    model, hf = parts.model, parts.tokenizer.hf
    hf.save_pretrained(directory)
    vocabulary = hf.get_vocab()
    if type(hf.backend_tokenizer.model).__name__ == "WordPiece":
        words = sorted(vocabulary, key=vocabulary.__getitem__)
        (directory / "vocab.txt").write_text("".join(f"{w}\n" for w in words), encoding="utf-8")
    _write_json(directory / "special_tokens_map.json", hf.special_tokens_map)

    backbone, dense = pretrained.to_hf(params, model.backbone)
    _save_tensors(backbone, directory / "model.safetensors")
    _write_json(directory / "config.json", model.backbone.to_hf() | {"use_cache": False})
    width = model.backbone.hidden_size
    flags = {flag: pooling == model.pooling for flag, pooling in _POOLING_FLAGS.items()}
    _write_json(
        directory / "1_Pooling" / "config.json",
        {"word_embedding_dimension": width, **flags, "include_prompt": True},
    )
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if dense:
        modules.append(("2_Dense", "Dense"))
        about = {
            "in_features": width,
            "out_features": model.embed_dim,
            "bias": True,
            # Without this entry sentence-transformers applies Tanh.
            "activation_function": "torch.nn.modules.linear.Identity",
        }
        _write_json(directory / "2_Dense" / "config.json", about)
        _save_tensors(dense, directory / "2_Dense" / "model.safetensors")
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    _write_json(directory / "modules.json", listed)
    _write_json(
        directory / "sentence_bert_config.json",
        {"max_seq_length": config.data.max_length, "do_lower_case": False},
    )
    _write_json(
        directory / "config_sentence_transformers.json",
        {
            "__version__": {"piccolo_jax": __version__},
            "prompts": _prompts(config),
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
            "matryoshka_dims": list(config.loss.dims),  # ours; sentence-transformers skips it
        },
    )
    (directory / "README.md").write_text(_model_card(parts, config), encoding="utf-8")


def _prompts(config: Config) -> dict[str, str]:
    """The prompts that all datasets share; those that differ can't be named."""
    queries = {d.query_prompt for d in config.data.datasets}
    passages = {d.passage_prompt for d in config.data.datasets}
    prompts = {}
    if len(queries) == 1 and any(queries):
        prompts["query"] = queries.pop()
    if len(passages) == 1 and any(passages):
        prompts["passage"] = passages.pop()
    return prompts


def _model_card(parts: build.Parts, config: Config) -> str:
    dims = ", ".join(map(str, config.loss.dims))
    names = "\n".join(f"- {Path(d.path).name}" for d in config.data.datasets)
    start = Path(config.model.init).name if config.model.init else "random weights"
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction, matryoshka, piccolo_jax]
---
A text-embedding model trained with piccolo_jax {__version__} (the Piccolo2 recipe, arXiv
2405.06932), started from {start}: {parts.model.pooling} pooling, {config.total_steps} steps of
{config.batch_size} rows, texts of at most {config.data.max_length} tokens. Trained on

{names}

Any of these prefixes is an embedding: {dims}. Cut first, then normalise:

```python
import torch
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/directory")
vectors = model.encode(["..."], convert_to_tensor=True)
vectors = torch.nn.functional.normalize(vectors[:, :{config.loss.dims[0]}], dim=1)
```
"""


def _save_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
