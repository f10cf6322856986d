"""A model for its users: texts in, vectors out.

from piccolo_jax import Encoder

encoder = Encoder.load("runs/quickstart/export")
vectors = encoder.encode(["..."], dim=256)
"""

import os
from collections.abc import Iterable
from typing import Self

import numpy as np

from piccolo_jax.config import MeshConfig
from piccolo_jax.errors import UserError
from piccolo_jax.evaluation import encoder as functional
from piccolo_jax.evaluation.encoder import cut
from piccolo_jax.models import pretrained
from piccolo_jax.models.pretrained import Pretrained
from piccolo_jax.types import Params

_DTYPES = ("auto", "float32", "bfloat16")
_LEAST_LENGTH = 3


class Encoder:
    """An exported model, or one of any sentence-transformers directory, with its parameters.

    encode(texts, dim=d, normalize=n) gives what sentence-transformers' encode(texts,
    truncate_dim=d, normalize_embeddings=n) gives, prompts and limits included.

    Attributes:
      width: D, of a whole embedding.
      default_dim: the prefix that is kept if none is asked for: the `truncate_dim` of the directory
        if it names one, else the width.
      max_length: tokens, special ones included, at which texts are cut.
      prompts: those of the model by name, with `query` and `document`, empty if it has none.
      default_prompt_name: of the prompt that texts get if none is given; None: none.
    """

    def __init__(self, encoder: functional.Encoder, params: Params, spec: Pretrained):
        self._encoder, self._params, self._spec = encoder, params, spec
        self.width, self.max_length = encoder.width, encoder.max_length
        self.default_dim = min(spec.truncate_dim or self.width, self.width)
        self.prompts = {"query": "", "document": "", **spec.prompts}
        self.default_prompt_name = spec.default_prompt

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        *,
        dtype: str = "auto",
        max_length: int | None = None,
        mesh: MeshConfig | None = None,
    ) -> Self:
        """The model of a directory, or of a Hugging Face hub id, on all devices.

        Args:
          dtype: of matrix products, float32 or bfloat16; auto: float32 on a CPU, else bfloat16.
          max_length: tokens, instead of the model's own limit.
          mesh: how devices share the work; default: each has all parameters and encodes a part of
            the texts.

        Raises UserError for what is missing or not supported.
        """
        if dtype not in _DTYPES:
            raise UserError(f"dtype = {dtype!r}: must be one of {', '.join(_DTYPES)}")
        spec = pretrained.read_spec(pretrained.resolve(os.fspath(directory)))
        encoder, params = functional.from_spec(spec, mesh, dtype)
        if max_length is not None:
            most = spec.backbone.max_positions
            if not (_is_int(max_length) and _LEAST_LENGTH <= max_length <= most):
                raise UserError(
                    f"max_length = {max_length!r}: must be from {_LEAST_LENGTH} to {most}, the"
                    " positions of the model"
                )
            encoder.max_length = int(max_length)
        return cls(encoder, params, spec)

    @property
    def most_programs(self) -> int:
        """The most programs that are ever compiled, each when first needed."""
        return self._encoder.most_programs

    def encode(
        self,
        texts: str | Iterable[str],
        *,
        dim: int | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        normalize: bool = True,
        progress: bool = False,
    ) -> np.ndarray:
        """Embeddings, float32 [texts, dim]; of a single str, [dim].

        Args:
          dim: the prefix that is kept; default: `default_dim`.
          prompt: put before every text as it is.
          prompt_name: the same, by its name in `prompts`. With neither, the model's default prompt.
          normalize: to length 1, after cutting. Otherwise embeddings are as the model's modules
            leave them: if it ends in a Normalize module, prefixes of vectors of length 1.
          progress: shows a bar.

        In a run of several processes all must call this with the same texts; all get the result.
        Raises UserError for what is no text, an unknown prompt, a prefix that doesn't exist, and if
        the embeddings are not finite.
        """
        listed = _listed(texts)
        dim = self._dim(dim)
        embeddings = self._encoder.encode(
            self._params, listed, self._prompt(prompt, prompt_name), "encoding" if progress else ""
        )
        if not np.isfinite(embeddings).all():
            raise UserError(
                f"{self._spec.path}: its embeddings are not finite: the weights are damaged, or too"
                " large for bfloat16 (dtype)"
            )
        if normalize:
            embeddings = cut(embeddings, dim)
        else:
            embeddings = cut(embeddings, self.width) if self._spec.normalize else embeddings
            embeddings = embeddings[:, :dim]
        return embeddings[0] if isinstance(texts, str) else np.ascontiguousarray(embeddings)

    def _prompt(self, prompt: str | None, name: str | None) -> str:
        if prompt is not None and name is not None:
            raise UserError(f"prompt = {prompt!r} and prompt_name = {name!r}: give one of them")
        if prompt is not None:
            return _checked(prompt, "prompt")
        name = self.default_prompt_name if name is None else name
        if name is not None and name not in self.prompts:
            known = ", ".join(map(repr, self.prompts))
            raise UserError(f"prompt_name = {name!r}: must be one of {known}; prompt takes a text")
        return "" if name is None else self.prompts[name]

    def _dim(self, dim: int | None) -> int:
        if dim is None:
            return self.default_dim
        if not (_is_int(dim) and 1 <= dim <= self.width):
            raise UserError(f"dim = {dim!r}: must be from 1 to {self.width}, the model's width")
        return int(dim)


def _is_int(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _listed(texts: str | Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        return [_checked(texts, "texts")]
    try:
        listed = list(texts)
    except TypeError:
        raise UserError(f"texts: is a {type(texts).__name__}: must be a list of texts") from None
    return [_checked(text, f"texts[{i}]") for i, text in enumerate(listed)]


def _checked(text: object, name: str) -> str:
    if not isinstance(text, str):
        raise UserError(f"{name}: is a {type(text).__name__}: must be a text (str)")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name}: has a lone surrogate at {error.start}, which is no character; replace it,"
            " e.g. by text.encode(errors='replace').decode()"
        ) from None
    return str(text)
