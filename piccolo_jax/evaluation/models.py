"""What can be evaluated: an export, any sentence-transformers directory, or a run's checkpoint.

The one place where evaluation meets the encoder.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from piccolo_jax import averaging, runs, sharding
from piccolo_jax import config as config_lib
from piccolo_jax.checkpoint import BEST, DIRECTORY
from piccolo_jax.config import MeshConfig
from piccolo_jax.errors import UserError
from piccolo_jax.evaluation import encoder as encoder_lib
from piccolo_jax.models import pretrained

_DOCUMENT_PROMPTS = ("document", "passage", "corpus")  # names in use, the first that there is


@dataclasses.dataclass(frozen=True)
class Model:
    """A model and what its directory says of its use.

    name: ORG/NAME, as mteb names models; revision: of its files' content.
    dims: prefixes that it was trained for, falling, the width first.
    prompts: by task, task type or `query` and `document`, as mteb has them.
    default_prompt: of texts that are neither queries nor documents.
    normalize: whether its vectors have length 1 in sentence-transformers.
    similarity: `cosine` or `dot`.
    encode: texts -> float32 [texts, width], not normalised; all processes call it alike.
    """

    name: str
    revision: str
    width: int
    dims: tuple[int, ...]
    prompts: dict[str, str]
    default_prompt: str
    normalize: bool
    similarity: str
    max_length: int
    encode: Callable[[Sequence[str]], np.ndarray]


def load(
    path: str, mesh: MeshConfig, name: str = "", checkpoint: str = "latest",
    weights: str | None = None,
) -> Model:  # fmt: skip
    """The model of a directory, or of a workdir.

    `name` replaces the one made of the path; `checkpoint` and `weights` are those of runs.read(),
    of a workdir alone. Raises UserError for what is missing or not supported.
    """
    place = Path(path)
    if (place / DIRECTORY).is_dir():
        made = _of_workdir(place, mesh, checkpoint, weights)
    else:
        if checkpoint != "latest" or weights:
            raise UserError(
                f"--model={path}: is not the workdir of a run, which --checkpoint and --weights are"
                " of; leave them out"
            )
        made = _of_directory(path, mesh)
    if name and not re.fullmatch(r"[^/\s]+/[^/\s]+", name):
        raise UserError(f"--name={name}: must be ORG/NAME, without spaces")
    return dataclasses.replace(made, name=name) if name else made


def fingerprint(directory: Path) -> str:
    """Of all files of a model directory but its descriptions (*.md)."""
    digest = hashlib.sha256()
    try:
        for path in sorted(directory.rglob("*")):
            if path.is_file() and path.suffix != ".md":
                digest.update(f"{path.relative_to(directory)}\0{path.stat().st_size}\0".encode())
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise UserError(f"{error.filename}: can't be read ({error.strerror})") from None
    return digest.hexdigest()


def _of_directory(path: str, mesh: MeshConfig) -> Model:
    directory = pretrained.resolve(path)
    made, params = encoder_lib.load(directory, mesh)
    about = _read_json(directory / "config_sentence_transformers.json")
    prompts = {name: text or "" for name, text in (about.get("prompts") or {}).items()}
    modules = _read_json(directory / "modules.json") or []
    similarity = about.get("similarity_fn_name") or "cosine"
    if similarity not in ("cosine", "dot"):
        raise UserError(
            f"{directory / 'config_sentence_transformers.json'}: similarity_fn_name ="
            f" {similarity!r}: must be cosine or dot"
        )
    return Model(
        name=_name(directory) if Path(path).is_dir() else path,  # else it is an id on the hub
        revision=fingerprint(directory)[:12],
        width=made.width,
        dims=_dims([*_named_dims(about), about.get("truncate_dim") or made.width], made.width),
        prompts=_prompts(prompts),
        default_prompt=prompts.get(about.get("default_prompt_name") or "", ""),
        normalize=any(str(m.get("type")).endswith(".Normalize") for m in modules),
        similarity=similarity,
        max_length=made.max_length,
        encode=lambda texts: made.encode(params, texts),
    )


def _of_workdir(
    workdir: Path, mesh_config: MeshConfig, checkpoint: str, weights: str | None
) -> Model:
    mesh = sharding.make_mesh(mesh_config)
    step, config, parts, params = runs.read(workdir, checkpoint, weights, mesh)
    files = workdir / (BEST if checkpoint == "best" else DIRECTORY) / str(step)
    usual = weights in (None, averaging.default_weights(config))
    made = encoder_lib.Encoder(parts.model, parts.tokenizer, mesh, config.data.max_length)
    return Model(
        name=_name(workdir),
        revision=f"step-{step}-{fingerprint(files)[:12]}{'' if usual else f'-{weights}'}",
        width=made.width,
        dims=_dims(config.loss.dims, made.width),
        prompts=_prompts(config_lib.shared_prompts(config)),
        default_prompt="",
        normalize=False,
        similarity="cosine",
        max_length=made.max_length,
        encode=lambda texts: made.encode(params, texts),
    )


def _name(path: Path) -> str:
    """The last two parts of a path: runs/quickstart/export is quickstart/export."""
    parts = [re.sub(r"[^\w.-]+", "_", part) for part in path.resolve().parts[-2:]]
    return "/".join(["local", *parts][-2:])


def _named_dims(about: dict[str, Any]) -> list[int]:
    """The trained prefixes that a directory names; none if what it says is no list of numbers."""
    named = about.get("matryoshka_dims")
    return [dim for dim in named if isinstance(dim, int)] if isinstance(named, list) else []


def _dims(named: Sequence[int], width: int) -> tuple[int, ...]:
    return tuple(sorted({width, *(dim for dim in named if 1 <= dim <= width)}, reverse=True))


def _prompts(own: dict[str, str]) -> dict[str, str]:
    """With the prompt of documents under mteb's name for it."""
    documents = next((own[name] for name in _DOCUMENT_PROMPTS if own.get(name)), "")
    others = {name: text for name, text in own.items() if name not in _DOCUMENT_PROMPTS}
    return others | ({"document": documents} if documents else {})


def _read_json(path: Path) -> Any:
    """Empty if there is no file. `pretrained.read_spec` has read it if there is."""
    return json.loads(path.read_text("utf-8")) if path.exists() else {}
