"""Plain `text, label` rows: labels become label texts, by a file of label names if they are ids.

A row's own label texts are its documents; which other labels it is contrasted with is drawn in
training from all labels of the dataset, so that thousands of them cost nothing in the files.
"""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from piccolo_jax.errors import UserError

_EXPECTED = (
    'write JSON, {"0": "sports", ...} or ["sports", ...] or, by language, {"0": {"en": "sports",'
    ' "zh": "体育"}, ...}, or TSV, a line `LABEL<TAB>NAME` each, or with the header'
    " `label<TAB>en<TAB>zh`"
)
_HEADERS = ("label", "id")  # first field of a TSV's header line


class LabelNames(Mapping[str, str]):
    """Label (an id or a word, as a string) -> its text. Reads JSON or TSV.

    A file may name each label once, or by language; then `language` says which to use.

    Raises UserError naming file and line or label.
    """

    def __init__(self, path: str, language: str = ""):
        self.path, self.language = path, language
        try:
            content = Path(path).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: no readable file of label names ({error})") from None
        is_json = path.lower().endswith(".json") or content.lstrip()[:1] in ("{", "[")
        named = self._from_json(content) if is_json else self._from_tsv(content)
        self._names = {label: self._name(label, name) for label, name in named.items()}
        if not self._names:
            raise UserError(f"{path}: names no label; {_EXPECTED}")

    def __getitem__(self, label: str) -> str:
        return self._names[label]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _from_json(self, content: str) -> dict[str, Any]:
        def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            table = dict(pairs)
            if len(table) < len(pairs):
                twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
                raise UserError(f"{self.path}: {twice!r} is there twice; name each label once")
            return table

        try:
            named = json.loads(content, object_pairs_hook=distinct)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path}: broken JSON ({error}); {_EXPECTED}") from None
        if isinstance(named, list):
            named = {str(i): name for i, name in enumerate(named)}
        if not isinstance(named, dict):
            raise UserError(f"{self.path}: not an object or list; {_EXPECTED}")
        return named

    def _from_tsv(self, content: str) -> dict[str, Any]:
        named: dict[str, Any] = {}
        languages: list[str] = []
        lines = csv.reader(content.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
        for number, fields in enumerate(lines, 1):
            fields = [field.strip() for field in fields]
            place = f"{self.path}:{number}"
            if not any(fields):
                continue
            if number == 1 and fields[0].lower() in _HEADERS and len(fields) > 1:
                languages = fields[1:]
                continue
            if len(fields) != 1 + (len(languages) or 1):
                raise UserError(f"{place}: {len(fields)} columns; {_EXPECTED}")
            if fields[0] in named:
                raise UserError(f"{place}: label {fields[0]!r} is there twice; name it once")
            one = len(languages) < 2
            named[fields[0]] = fields[1] if one else dict(zip(languages, fields[1:], strict=True))
        return named

    def _name(self, label: str, name: Any) -> str:
        if isinstance(name, dict):
            if self.language not in name:
                what = f"has no {self.language!r}" if self.language else "is named by language"
                raise UserError(
                    f"{self.path}: label {label!r} {what}; set label_language to one of"
                    f" {', '.join(map(str, name))}"
                )
            name = name[self.language]
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{self.path}: the name of label {label!r} is {name!r}; {_EXPECTED}")
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{self.path}: the name of label {label!r} holds a lone surrogate, which is no"
                " character; correct it"
            ) from None
        return name


def own_labels(value: Any, field: str, names: LabelNames | None) -> tuple[str, ...]:
    """The distinct label texts of a row: of a label or a list of labels, each an int or a string.

    Raises ValueError saying why a value is no label.
    """
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError(f"{field} is an empty list")
    return tuple(dict.fromkeys(_text(item, field, names) for item in values))


def is_named(value: Any) -> bool:
    """Whether labels of this kind are texts themselves and need no names: no numbers."""
    values = value if isinstance(value, list) else [value]
    return not any(isinstance(item, int | float) for item in values)


def _text(value: Any, field: str, names: LabelNames | None) -> str:
    if value is None:
        raise ValueError(f"{field} is missing")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # what tables make of integers where some are missing
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{field} is {type(value).__name__}, not an integer or text")
    if isinstance(value, str) and not value.strip():
        raise ValueError(f"{field} is empty")
    if names is not None:
        label = str(value).strip()
        if label not in names:
            raise ValueError(f"{field} {label[:80]!r} is not in {names.path}")
        return names[label]
    if not isinstance(value, str):
        raise ValueError(f"{field} is a number; name the labels in a file: label_names=FILE")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{field} holds a lone surrogate, which is no character") from None
    return value
