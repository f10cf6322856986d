"""What sentence-transformers makes of an export, part by part, against its reference.

Each part gets what the reference says of the part before, so that only the one that differs is
named. Runs in sentence-transformers 5.1 and 6.2, and needs no JAX.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from piccolo_jax.errors import UserError
from piccolo_jax.exporting.reference import Reference
from piccolo_jax.verifying.findings import Finding, compare, padded

_PARTS = {"Transformer": "backbone", "Pooling": "pooling", "Dense": "scaling layer"}
_FAILURES = (RuntimeError, ValueError, KeyError, IndexError, TypeError)  # of a model that is broken


def load(directory: Path, as_float32: bool = True) -> Any:
    """The model on CPU; without `as_float32` in the type that its weights and version lead to.

    Raises UserError if it can't be loaded, or if there is no sentence-transformers.
    """
    try:
        import torch
        import transformers
        from sentence_transformers import SentenceTransformer

        transformers.logging.disable_progress_bar()
    except ImportError as error:
        raise UserError(
            f"verify needs sentence-transformers ({error}): pip install -r requirements-dev.txt"
        ) from error
    options: dict[str, Any] = {"add_pooling_layer": False}  # else it reports the pooler as missing
    if as_float32:
        new = tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56)
        options["dtype" if new else "torch_dtype"] = torch.float32
    try:
        return SentenceTransformer(
            str(directory),
            device="cpu",
            trust_remote_code=False,
            local_files_only=True,
            model_kwargs=options,
        )
    except Exception as error:  # of many kinds, tokenizers' and safetensors' own among them
        raise UserError(
            f"{directory}: sentence-transformers can't load it ({_line(error)})"
        ) from error


def parts(model: Any, reference: Reference) -> Iterator[Finding]:
    """A finding for each part of a loaded model."""
    modules = {type(module).__name__: module for module in model}
    expected = ["Transformer", "Pooling"] + ["Dense"] * reference.about["scaling"]
    missing = [kind for kind in expected if kind not in modules]
    for kind in missing:
        yield Finding(_PARTS[kind], f"module {kind}: is missing", False)
    listed = [type(module).__name__ for module in model]
    if not missing and listed != expected:
        yield Finding("modules", f"{', '.join(listed)}, not {', '.join(expected)}", False)
    yield from _tokenizer(model, reference)
    yield _prompts(model, reference)
    similarity = str(model.similarity_fn_name)
    yield Finding("similarity", f"{similarity}, exported cosine", similarity == "cosine")
    checks: dict[str, Callable[[Any, Reference], Finding]] = {
        "Transformer": _backbone,
        "Pooling": _pooling,
        "Dense": _scaling,
    }
    for kind in expected:
        if kind in modules:
            try:
                yield checks[kind](modules[kind], reference)
            except _FAILURES as error:
                yield Finding(_PARTS[kind], f"fails: {_line(error)}", False)


def embeddings(model: Any, reference: Reference) -> np.ndarray:
    """float32 [texts, D] of the reference's texts, with their prompts. Raises as encode()."""
    prompts = reference.about["prompts"] | {"": ""}
    names = [name for name, _ in reference.texts]  # those of a prompt are together
    return np.concatenate([
        encode(model, [text for name, text in reference.texts if name == prompt], prompts[prompt])
        for prompt in dict.fromkeys(names)
    ])  # fmt: skip


def encode(model: Any, texts: Sequence[str], prompt: str = "") -> np.ndarray:
    """float32 [texts, D] of texts behind a prompt. Raises UserError if the model fails."""
    try:
        vectors = model.encode(list(texts), convert_to_numpy=True, prompt=prompt)
    except _FAILURES as error:
        raise UserError(f"sentence-transformers fails with this model: {_line(error)}") from error
    return np.asarray(vectors, np.float32)


def _tokenizer(model: Any, reference: Reference) -> Iterator[Finding]:
    length, trained = model.max_seq_length, reference.about["max_length"]
    yield Finding("maximum length", f"{length!r} tokens, exported {trained}", length == trained)
    texts = reference.prompted
    model.max_seq_length = trained  # so that only what else differs shows
    tokenize = model.preprocess if hasattr(model, "preprocess") else model.tokenize
    features = tokenize(texts)
    model.max_seq_length = length
    ids, mask = (features[name].numpy() for name in ("input_ids", "attention_mask"))
    pairs = zip(ids, mask, reference.ids, strict=True)
    other = [i for i, (row, keep, ours) in enumerate(pairs) if list(row[keep == 1]) != list(ours)]
    what = f"token ids of {len(texts)} texts"
    if other:
        what += f": differ in {len(other)}, the first {texts[other[0]][:20]!r}"
    yield Finding("tokenizer", what, not other)
    first = (mask[:, 0] == 1).all()
    yield Finding("tokenizer", f"padding on the {'right' if first else 'left'}", bool(first))


def _prompts(model: Any, reference: Reference) -> Finding:
    here = {name: prompt for name, prompt in model.prompts.items() if prompt}
    ours = reference.about["prompts"]
    changed = [
        f"{name!r} is {here.get(name, '')!r}, exported {ours.get(name, '')!r}"
        for name in sorted(here | ours)
        if here.get(name, "") != ours.get(name, "")
    ]
    if model.default_prompt_name:
        changed.append(f"{model.default_prompt_name!r} is used by default")
    return Finding("prompts", ", ".join(changed) or f"{len(ours)} prompts", not changed)


def _backbone(module: Any, reference: Reference) -> Finding:
    import torch

    known = reference.with_hidden
    ids, mask = padded([reference.ids[i].astype(np.int64) for i in known])
    features = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    with torch.no_grad():
        states = module(features)["token_embeddings"].float().numpy()
    ours = np.concatenate([reference.hidden[i] for i in known])
    return compare("backbone", "hidden states", ours, states[mask == 1])


def _pooling(module: Any, reference: Reference) -> Finding:
    import torch

    if not module.include_prompt:
        return Finding("pooling", "include_prompt = False, exported True", False)
    known = reference.with_hidden
    states, mask = padded([reference.hidden[i] for i in known])
    features = {
        "token_embeddings": torch.from_numpy(states),
        "attention_mask": torch.from_numpy(mask),
    }
    with torch.no_grad():
        pooled = module(features)["sentence_embedding"].float().numpy()
    what = f"{reference.about['pooling']} of hidden states"
    return compare("pooling", what, reference.pooled[known], pooled)


def _scaling(module: Any, reference: Reference) -> Finding:
    import torch

    with torch.no_grad():
        features = {"sentence_embedding": torch.from_numpy(reference.pooled)}
        vectors = module(features)["sentence_embedding"].float().numpy()
    return compare("scaling layer", "its vectors", reference.embeddings, vectors)


def _line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
