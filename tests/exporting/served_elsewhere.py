"""What another version of sentence-transformers makes of exports: run there, without JAX.

    PYTHONPATH=. PYTHON tests/exporting/served_elsewhere.py DIR...

Prints `VERSION DIR ok` for each, or what differs, and exits with 1 then. Writes DIR.npy with the
vectors of the reference's texts.
"""

import sys
from pathlib import Path

import numpy as np
import sentence_transformers

from piccolo_jax.exporting.reference import Reference
from piccolo_jax.verifying import files, served
from piccolo_jax.verifying.findings import largest_difference

different = 0
for directory in map(Path, sys.argv[1:]):
    reference = Reference.read(directory)
    assert reference is not None, directory
    model = served.load(directory)
    findings = [*files.compare(directory, reference), *served.parts(model, reference)]
    wrong = [f"{f.part}: {f.what}" for f in findings if not f.same]
    vectors = served.embeddings(model, reference)
    np.save(directory.with_suffix(".npy"), vectors)
    for dim in [*reference.dims, vectors.shape[1]]:
        difference = largest_difference(reference.embeddings, vectors, dim)
        if difference > 1e-6:
            wrong.append(f"1 - cosine of {difference} at {dim}")
    print(sentence_transformers.__version__, directory, ", ".join(wrong) or "ok")
    different += bool(wrong)
sys.exit(min(different, 1))
