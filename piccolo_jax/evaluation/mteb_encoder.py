"""A model as mteb sees it: one dimension of vectors that are encoded once for all of them.

Importing this imports mteb, which takes seconds: only `evaluate` does.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
from mteb.models.model_meta import ScoringFunction

from piccolo_jax.evaluation.encoder import cut
from piccolo_jax.evaluation.models import Model
from piccolo_jax.evaluation.vectors import Vectors

_SIMILARITIES = {"cosine": ScoringFunction.COSINE, "dot": ScoringFunction.DOT_PRODUCT}


class MtebEncoder(AbsEncoder):
    """mteb's interface of an encoder. Texts are cut to `dim` after their vectors are had.

    normalize: after cutting; None: as sentence-transformers does, whose Normalize module, if the
      model has one, comes before its cut.
    `experiment` holds what makes its results others than the model's plain ones; mteb's cache keeps
    those apart.
    """

    def __init__(
        self,
        model: Model,
        vectors: Vectors,
        dim: int,
        prompts: Mapping[str, str],
        normalize: bool | None,
        experiment: Mapping[str, Any],
    ):
        self._model, self._vectors, self.dim = model, vectors, dim
        self._prompts, self._normalize = dict(prompts), normalize
        self.mteb_model_meta = meta(model, dim, experiment)

    def encode(  # type: ignore[override]
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **_: Any,
    ) -> np.ndarray:
        """float32 [texts, dim] of a DataLoader's texts, as mteb asks for them."""
        prompt = self.prompt_of(task_metadata, prompt_type)
        texts = [prompt + text for batch in inputs for text in batch["text"]]
        rows = self._vectors.of(texts, task_metadata.name)
        if self._normalize:
            return cut(rows, self.dim)
        if self._normalize is None and self._model.normalize:
            rows = cut(rows, self._model.width)
        return rows[:, : self.dim]

    def prompt_of(self, task_metadata: Any, prompt_type: Any) -> str:
        """The most special prompt that there is: of task, then type of task, then type of text."""
        name = get_prompt_name(self._prompts, task_metadata, prompt_type)
        if name is None:
            return self._model.default_prompt if prompt_type is None else ""
        return self._prompts[name]


def meta(model: Model, dim: int, experiment: Mapping[str, Any]) -> ModelMeta:
    """mteb's description of a model at a dimension."""
    cut_to = {} if dim == model.width else {"embed_dim": dim}
    return ModelMeta.create_empty(
        overwrites={
            "name": model.name,
            "revision": model.revision,
            "embed_dim": dim,
            "max_tokens": model.max_length,
            "similarity_fn_name": _SIMILARITIES[model.similarity],
            "framework": ["Sentence Transformers"],
            "experiment_kwargs": {**cut_to, **experiment} or None,
        }
    )
