"""What an export should do: a file beside it with texts, their token ids, states and embeddings.

`verify` compares every part of the directory with it: what one part gives, fed with what the
reference says of the part before. Written from the trained parameters, not from the files. Numpy
only, so that it can be read where there is no JAX.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save_file

from piccolo_jax.errors import UserError
from piccolo_jax.models.modules import UNREADABLE, read_json

NAME = "piccolo_jax.safetensors"
ONNX_FOLDER = "onnx"
_VERSION = 1
_WITH_PROMPT = 3  # texts that are also there with each prompt
_KEPT_STATES = 32  # of texts of so many tokens the hidden states are kept
# What tokenizers differ in: case, accents, width, spaces, signs, scripts; and a text that is cut.
TEXTS = (
    "今天天气很好，我们去公园散步吧。",
    "如何办理信用卡？",
    "A short English sentence with NASA, Café and naïve in it.",
    "第一",
    "",
    "  空格　和\ttabs\nand lines  ",
    "价格：￥1,299.00（含税） 編號 #A-42 😀 ＡＢＣ１２３ ﬁ ² ½",
    "Grüße aus Köln, привет, こんにちは, 안녕하세요, مرحبا",
    "量子计算机利用叠加与纠缠并行地处理信息，" * 8,
    "检索、重排、相似度、分类与聚类都用同一个向量模型。" * 120,
)


@dataclasses.dataclass
class Reference:
    """Texts and what the model makes of them, float32.

    `embeddings` [texts, D] are those of the exported weights, `trained` those before they were
    rounded, `pooled` [texts, H] what the scaling layer gets. `hidden` are the last hidden states
    [tokens, H] of the texts in `with_hidden`.
    """

    about: dict[str, Any]
    ids: list[np.ndarray]
    hidden: list[np.ndarray]
    pooled: np.ndarray
    embeddings: np.ndarray
    trained: np.ndarray

    @property
    def texts(self) -> list[tuple[str, str]]:
        """(prompt's name or "", text)."""
        return [(name, text) for name, text in self.about["texts"]]

    @property
    def prompted(self) -> list[str]:
        """The texts behind their prompts."""
        prompts = self.about["prompts"] | {"": ""}
        return [prompts[name] + text for name, text in self.texts]

    @property
    def with_hidden(self) -> list[int]:
        """The texts whose hidden states are known."""
        return [i for i, ids in enumerate(self.ids) if len(ids) <= _KEPT_STATES]

    @property
    def dims(self) -> list[int]:
        """The trained prefixes."""
        return list(self.about["dims"])

    def save(self, directory: Path) -> None:
        """Writes the file into the directory of the export."""
        tensors = {
            "lengths": np.asarray([len(ids) for ids in self.ids], np.int32),
            "ids": np.concatenate(self.ids).astype(np.int32),
            "hidden": np.concatenate([self.hidden[i] for i in self.with_hidden]),
            "pooled": self.pooled,
            "embeddings": self.embeddings,
            "trained": self.trained,
        }
        about = json.dumps(self.about | {"version": _VERSION}, ensure_ascii=False)
        save_file(tensors, directory / NAME, metadata={"about": about})

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """That of a directory; None if it has none. Raises UserError if it can't be read."""
        path = directory / NAME
        if not path.exists():
            return None
        try:
            with safe_open(path, "np") as file:
                about = json.loads((file.metadata() or {})["about"])
                if about["version"] != _VERSION:
                    raise UserError(
                        f"{path}: is of version {about['version']}, this reads {_VERSION}:"
                        " verify with the version of piccolo_jax that exported it"
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            ids = np.split(tensors["ids"], np.cumsum(tensors["lengths"])[:-1])
            reference = cls(
                about, ids, [], tensors["pooled"], tensors["embeddings"], tensors["trained"]
            )
            known = reference.with_hidden
            ends = np.cumsum([len(ids[i]) for i in known])
            parts = dict(zip(known, np.split(tensors["hidden"], ends[:-1]), strict=True))
            empty = np.zeros((0, tensors["hidden"].shape[1]), np.float32)
            reference.hidden = [parts.get(i, empty) for i in range(len(ids))]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(
                f"{path}: can't be read ({error}): export again; or delete it, and only"
                " sentence-transformers and JAX are compared with each other"
            ) from error
        return reference


def texts_with(prompts: dict[str, str]) -> list[tuple[str, str]]:
    """(prompt's name or "", text) of what a reference is made of."""
    named = [(name, text) for name in sorted(prompts) for text in TEXTS[:_WITH_PROMPT]]
    return [("", text) for text in TEXTS] + named


def tensor_digests(directory: Path) -> dict[str, dict[str, str]]:
    """sha256 of type, shape and bytes of every tensor of the weights, by file and name."""
    return {
        str(path.relative_to(directory)): dict(_digests(path))
        for path in sorted(directory.rglob("*.safetensors"))
        if path.name != NAME
    }


def file_digests(directory: Path) -> dict[str, str]:
    """sha256 of each file of the ONNX model."""
    found = {}
    for path in sorted((directory / ONNX_FOLDER).glob("*")):
        with path.open("rb") as file:
            found[f"{ONNX_FOLDER}/{path.name}"] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def vocabulary_digests(directory: Path) -> dict[str, str]:
    """sha256 of the vocabularies in tokenizer.json and, if it is there, vocab.txt.

    Of the vocabulary alone: versions of the tokenizers library write other parts each in its way.
    Raises UserError if tokenizer.json can't be read.
    """
    path, plain = directory / "tokenizer.json", directory / "vocab.txt"
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        words = {name: model[name] for name in ("vocab", "merges") if name in model}
    except (*UNREADABLE, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a tokenizer that can be read ({error!r})") from error
    digests = {path.name: hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()}
    if plain.exists():
        digests[plain.name] = hashlib.sha256(plain.read_bytes()).hexdigest()
    return digests


def files_of(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What verifying.files compares; `config` is the backbone's config.json."""
    limits = directory / "tokenizer_config.json"
    return {
        "model_max_length": read_json(limits).get("model_max_length") if limits.exists() else None,
        "tensors": tensor_digests(directory),
        "config": config,
        "vocabulary": vocabulary_digests(directory),
        "onnx": file_digests(directory),
    }


def _digests(path: Path) -> Iterator[tuple[str, str]]:
    try:
        tensors = deserialize(path.read_bytes())  # not as arrays: numpy alone knows no bfloat16
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from error
    for name, tensor in sorted(tensors):
        digest = hashlib.sha256(f"{tensor['dtype']} {tensor['shape']}".encode())
        digest.update(tensor["data"])
        yield name, digest.hexdigest()
