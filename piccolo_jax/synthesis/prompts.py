"""The prompts of both phases: templates that a user may edit, filled in by (seed, number).

A folder of templates has one folder per language with the files of `FILES`. `$name` stands for what
is filled in (`string.Template`; a dollar sign is `$$`).
"""

import dataclasses
import hashlib
import itertools
import json
import math
import random
from pathlib import Path
from string import Template

from piccolo_jax.errors import UserError

PACKAGED = Path(__file__).with_name("prompts")
FILES = {
    "topics.txt": "asks for a list of topics: $count, $examples",
    "example.txt": "asks for a training example: $topic and the attributes",
    "repair.txt": "asks again after an answer that can't be used: $error",
    "topic_examples.txt": "topics, one a line, two of which are shown as examples",
    "attributes.json": "the values that each attribute is drawn from",
}
_TOPIC_EXAMPLES = 2  # shown in a request for topics


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The templates of one language."""

    language: str
    topics: Template
    example: Template
    repair: Template
    topic_examples: tuple[str, ...]
    attributes: dict[str, tuple[str, ...]]

    def ask_topics(self, seed: int, number: int, count: int) -> str:
        """The prompt of the number-th request for `count` topics."""
        rng = random.Random(f"topics/{seed}/{number}")
        shown = rng.sample(self.topic_examples, _TOPIC_EXAMPLES)
        examples = "\n".join(f"- {topic}" for topic in shown)
        return self.topics.substitute(count=count, examples=examples)

    def ask_example(self, topic: str, attributes: dict[str, str]) -> str:
        """The prompt for a training example."""
        return self.example.substitute(attributes, topic=topic)

    def ask_again(self, error: str) -> str:
        """What is said to an answer that can't be used."""
        return self.repair.substitute(error=error)

    def draw_attributes(self, seed: int, topic: int, generation: int, of: int) -> dict[str, str]:
        """Attributes of the generation-th of so many examples of the topic-th topic.

        Every combination is as likely as any other; a topic has none twice before it has had all.
        """
        combinations = math.prod(map(len, self.attributes.values()))
        turn, place = divmod(generation, combinations)
        rng = random.Random(f"attributes/{seed}/{topic}/{turn}")
        index = rng.sample(range(combinations), min(of, combinations))[place]
        drawn = {}
        for name, values in self.attributes.items():
            index, value = divmod(index, len(values))
            drawn[name] = values[value]
        return drawn


def load(folder: Path, languages: tuple[str, ...]) -> dict[str, Prompts]:
    """The templates of each language. Raises UserError naming the file that can't be used."""
    found = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    for language in languages:
        if language not in found:
            have = ", ".join(found) or "none"
            raise UserError(f"{folder}: no folder {language!r} of templates; there is: {have}")
    return {language: _load(folder / language, language) for language in languages}


def fingerprint(folder: Path, languages: tuple[str, ...]) -> str:
    """Names the content of all templates that are used."""
    digest = hashlib.sha256()
    for language, name in itertools.product(languages, FILES):
        digest.update(f"{language}/{name}\0".encode() + (folder / language / name).read_bytes())
    return digest.hexdigest()[:16]


def copy_packaged(folder: Path) -> list[Path]:
    """Copies the templates of this package to a new folder; returns the files."""
    if folder.exists():
        raise UserError(f"{folder} exists; name a folder that doesn't")
    written = []
    for source in sorted(PACKAGED.glob("*/*")):
        target = folder / source.relative_to(PACKAGED)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
        written.append(target)
    return written


def read_topics(path: Path) -> tuple[str, ...]:
    """Topics of a file, one a line, each once. Raises UserError if there are none."""
    topics = tuple(dict.fromkeys(line.strip() for line in _read(path).splitlines() if line.strip()))
    if not topics:
        raise UserError(f"{path}: holds no topics; write one a line")
    return topics


def _load(folder: Path, language: str) -> Prompts:
    attributes = _attributes(folder / "attributes.json")
    topic_examples = read_topics(folder / "topic_examples.txt")
    if len(topic_examples) < _TOPIC_EXAMPLES:
        raise UserError(f"{folder / 'topic_examples.txt'}: needs {_TOPIC_EXAMPLES} lines or more")
    return Prompts(
        language,
        _template(folder / "topics.txt", {"count", "examples"}),
        _template(folder / "example.txt", {"topic", *attributes}),
        _template(folder / "repair.txt", {"error"}),
        topic_examples,
        attributes,
    )


def _template(path: Path, names: set[str]) -> Template:
    template = Template(_read(path).strip())
    if not template.is_valid():
        raise UserError(f"{path}: a $ that no name follows; write $$ for a dollar sign")
    used = set(template.get_identifiers())
    if unknown := sorted(used - names):
        known = ", ".join(f"${name}" for name in sorted(names))
        raise UserError(f"{path}: ${unknown[0]} stands for nothing; known here are {known}")
    if missing := sorted(names - used):
        raise UserError(f"{path}: must contain ${missing[0]}")
    return template


def _attributes(path: Path) -> dict[str, tuple[str, ...]]:
    try:
        values = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: broken JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be a JSON object: attribute -> list of texts")
    for name, choices in values.items():
        if not name.isidentifier() or not name.isascii() or name == "topic":
            raise UserError(f"{path}: {name!r} can't be the name of an attribute")
        if not (isinstance(choices, list) and choices and all(_is_text(c) for c in choices)):
            raise UserError(f"{path}: {name}: must be a list of texts")
    return {name: tuple(choices) for name, choices in values.items()}


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and _encodes(value)


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read ({error})") from None
