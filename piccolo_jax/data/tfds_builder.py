"""A TFDS dataset builder for training data of any format that `formats` reads.

What it builds is read back by `tfds:NAME/CONFIG:VERSION:SPLIT`, here or by `tfds.data_source`
anywhere: ArrayRecord files with the fields of the examples (data/layouts.py) as features.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from piccolo_jax.data import formats
from piccolo_jax.errors import UserError

_TEXT, _TEXTS = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())
FEATURES: dict[str, dict[str, Any]] = {
    "retrieval": {"query": _TEXT, "positives": _TEXTS, "negatives": _TEXTS},
    "similarity": {"first": _TEXT, "second": _TEXT, "score": np.float32},
    "classification": {"text": _TEXT, "labels": _TEXTS, "other_labels": _TEXTS},
}
_EXAMPLES_PER_SHARD = 100_000


class EmbeddingDataset(tfds.core.ShardBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """One task's examples in named splits, in their order.

    (TFDS's GeneratorBasedBuilder sorts by keys, and beyond 1 GB needs TensorFlow to do so.)

    Args:
      name, version, config: as TFDS has them (snake case; "1.0.0"; empty: no configs).
      splits: sources of one task by name of split.
      data_dir: the folder of TFDS datasets to build in.
      description, release_notes: what `dataset_info.json` says; notes by version.
      reject: called with every row that can't be used.

    `download_and_prepare()` builds it: under another name, renamed when whole.
    """

    def __init__(
        self,
        *,
        name: str,
        version: str,
        splits: Mapping[str, formats.Source],
        data_dir: Path,
        config: str = "",
        description: str = "",
        release_notes: Mapping[str, str] | None = None,
        reject: Callable[[formats.Rejected], object] = lambda row: None,
    ):
        self.name = name
        self.VERSION = tfds.core.Version(version)
        self.RELEASE_NOTES = dict(release_notes or {})
        configs = [tfds.core.BuilderConfig(name=config, version=version)] if config else []
        self.BUILDER_CONFIGS = configs
        (self._task,) = {source.task for source in splits.values()}
        self._splits, self._reject = splits, reject
        self._description = description or f"Texts for task {self._task}."
        super().__init__(
            data_dir=data_dir,
            config=configs[0] if configs else None,
            version=version,
            file_format="array_record",
        )

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(FEATURES[self._task])
        return tfds.core.DatasetInfo(
            builder=self,
            description=self._description,
            features=features,
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Any]]:
        return {name: self._shards(source) for name, source in self._splits.items()}

    def _shards(self, source: formats.Source) -> list[Callable[[], Iterator[tuple[int, Any]]]]:
        """One after the other they read through the source; how many they are must be known."""
        usable = 0
        for item in source:
            if isinstance(item, formats.Rejected):
                self._reject(item)
            else:
                usable += 1
        if not usable:
            raise UserError(f"{source.path}: no usable row for task {source.task!r}")
        examples = (item for item in source if not isinstance(item, formats.Rejected))
        numbered = enumerate(map(dataclasses.asdict, examples))
        shard = functools.partial(itertools.islice, numbered, _EXAMPLES_PER_SHARD)
        return [shard] * -(-usable // _EXAMPLES_PER_SHARD)
