"""What the ONNX file of an export makes of the reference's token ids."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from piccolo_jax.errors import UserError
from piccolo_jax.exporting.reference import ONNX_FOLDER, Reference
from piccolo_jax.verifying.findings import Finding, compare, cut, padded


def run(path: Path, ids: list[np.ndarray]) -> np.ndarray:
    """Embeddings of a batch of texts, float32 [texts, dim], in onnxruntime on CPU.

    Raises UserError if the file can't be used, or if there is no onnxruntime.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f"{path}: to verify it, onnxruntime is needed ({error}): pip install -r"
            " requirements-dev.txt"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of the input that may be left out
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        tokens, mask = padded([text.astype(np.int64) for text in ids])
        feeds = {"input_ids": tokens, "attention_mask": mask}
        return np.asarray(session.run(["sentence_embedding"], feeds)[0])
    except Exception as error:  # onnxruntime has kinds of its own, all Exceptions
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"{path}: onnxruntime can't run it ({reason})") from error


def check(directory: Path, reference: Reference) -> Iterator[Finding]:
    """Findings of the ONNX file; none if there is none and the export had none."""
    path = directory / ONNX_FOLDER / "model.onnx"
    if not path.exists():
        if reference.about.get("onnx_dim"):
            yield Finding("ONNX", f"{path.name}: is missing", False)
        return
    # In batches of all, without the long ones, and of one text: of different sizes and padding.
    batches = (tuple(range(len(reference.ids))), tuple(reference.with_hidden), (0,))
    for members in dict.fromkeys(batches):
        texts = [reference.ids[i] for i in members]
        try:
            theirs = run(path, texts)
        except UserError as error:
            if "is needed" in str(error):
                raise
            yield Finding("ONNX", str(error), False)
            return
        known = reference.about.get("onnx_dim")
        dim = theirs.shape[-1] if known is None else known or reference.embeddings.shape[1]
        what = f"{len(texts)} texts at {dim}"
        ours = cut(reference.embeddings[list(members)], dim)
        yield compare("ONNX", what, ours.astype(np.float32), theirs)
