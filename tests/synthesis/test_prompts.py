import collections
import json
import shutil

import pytest

from piccolo_jax.errors import UserError
from piccolo_jax.synthesis import prompts

LANGUAGES = ("zh", "en")


@pytest.fixture(scope="module")
def packaged():
    return prompts.load(prompts.PACKAGED, LANGUAGES)


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(prompts.PACKAGED, tmp_path / "templates")
    return tmp_path / "templates"


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_packaged_templates_name_the_keys_of_the_schema(packaged, language):
    drawn = packaged[language].draw_attributes(0, 0, 0, 10)
    prompt = packaged[language].ask_example("TOPIC", drawn)
    for part in ("TOPIC", "JSON", '"user_query"', '"positive_document"', *drawn.values()):
        assert part in prompt
    assert '"hard_negative_document"' in prompt
    assert "$" not in prompt


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_request_for_topics_shows_two_examples_drawn_by_seed_and_number(packaged, language):
    p = packaged[language]

    def shown(seed, number):
        prompt = p.ask_topics(seed, number, 17)
        assert "17" in prompt
        return frozenset(topic for topic in p.topic_examples if topic in prompt)

    assert {len(shown(0, n)) for n in range(9)} == {2}
    assert shown(3, 4) == shown(3, 4)
    assert len({shown(0, n) for n in range(9)}) > 4
    assert [shown(0, n) for n in range(9)] != [shown(1, n) for n in range(9)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_attributes_are_those_of_the_recipe(packaged, language):
    sizes = {name: len(values) for name, values in packaged[language].attributes.items()}
    assert sizes == {"query_type": 3, "query_length": 3, "clarity": 3, "document_length": 6,
                     "difficulty": 3}  # fmt: skip
    lengths = packaged[language].attributes["document_length"]
    assert lengths == ("50", "100", "200", "300", "400", "500")


def test_attributes_follow_from_seed_topic_and_generation_alone(packaged):
    draw = packaged["zh"].draw_attributes
    assert draw(1, 2, 3, 10) == draw(1, 2, 3, 10)
    assert [draw(1, 2, g, 9) for g in range(9)] != [draw(2, 2, g, 9) for g in range(9)]
    assert [draw(1, 2, g, 9) for g in range(9)] != [draw(1, 3, g, 9) for g in range(9)]


def test_a_topic_repeats_no_combination_of_attributes_before_it_had_all(packaged):
    draws = [tuple(packaged["zh"].draw_attributes(0, 0, g, 972).values()) for g in range(2 * 486)]
    assert len(set(draws[:486])) == 486
    assert set(collections.Counter(draws).values()) == {2}
    assert draws[:486] != draws[486:]
    few = [tuple(packaged["zh"].draw_attributes(0, 0, g, 10).values()) for g in range(10)]
    assert len(set(few)) == 10


def test_values_of_an_attribute_are_equally_likely(packaged):
    draws = [packaged["en"].draw_attributes(0, t, g, 10) for t in range(200) for g in range(10)]
    counts = collections.Counter(d["document_length"] for d in draws)
    assert len(counts) == 6
    assert 250 < min(counts.values()) <= max(counts.values()) < 420


def test_edited_templates_are_used_and_have_another_fingerprint(folder):
    assert prompts.fingerprint(folder, LANGUAGES) == prompts.fingerprint(
        prompts.PACKAGED, LANGUAGES
    )
    (folder / "zh" / "example.txt").write_text("花费 $$5：$topic $tone\n", encoding="utf-8")
    (folder / "zh" / "attributes.json").write_text('{"tone": ["严肃"]}', encoding="utf-8")
    edited = prompts.load(folder, ("zh",))["zh"]
    drawn = edited.draw_attributes(0, 0, 5, 10)
    assert edited.ask_example("主题", drawn) == "花费 $5：主题 严肃"
    assert prompts.fingerprint(folder, ("zh",)) != prompts.fingerprint(prompts.PACKAGED, ("zh",))
    assert prompts.fingerprint(folder, ("en",)) == prompts.fingerprint(prompts.PACKAGED, ("en",))


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("topics.txt", None, ("can't be read",)),
        ("topics.txt", b"\xff\xfe", ("can't be read",)),
        ("topics.txt", "$count", ("must contain $examples",)),
        ("example.txt", "$topic $colour", ("$colour stands for nothing", "$clarity")),
        ("example.txt", "$topic costs 5 $", ("write $$",)),
        ("repair.txt", "again", ("must contain $error",)),
        ("topic_examples.txt", "\n one \n\n", ("needs 2 lines",)),
        ("topic_examples.txt", " \n", ("holds no topics",)),
        ("attributes.json", "{", ("broken JSON",)),
        ("attributes.json", "[" * 100_000, ("broken JSON",)),
        ("attributes.json", "[]", ("must be a JSON object",)),
        ("attributes.json", '{"clarity": []}', ("clarity: must be a list",)),
        ("attributes.json", '{"clarity": ["a", 3]}', ("clarity: must be a list",)),
        ("attributes.json", '{"clarity": ["\\ud800"]}', ("clarity: must be a list",)),
        ("attributes.json", '{"my tone": ["a"]}', ("'my tone'",)),
        ("attributes.json", '{"topic": ["a"]}', ("'topic'",)),
        ("attributes.json", '{"tone": ["a"]}', ("example.txt", "$clarity stands for nothing")),
    ],
)
def test_templates_that_cannot_be_used_are_errors_that_name_the_file(folder, name, content, parts):
    path = folder / "en" / name
    if content is None:
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content)
    with pytest.raises(UserError) as raised:
        prompts.load(folder, LANGUAGES)
    for part in parts if "example.txt" in parts else (str(path), *parts):
        assert part in str(raised.value)


def test_a_language_without_templates_is_an_error_that_lists_those_there(folder):
    with pytest.raises(UserError, match=r"no folder 'fr'.*: en, zh"):
        prompts.load(folder, ("zh", "fr"))
    with pytest.raises(UserError, match=r"no folder 'zh'.*: none"):
        prompts.load(folder / "none", ("zh",))


def test_packaged_templates_are_copied_for_editing_but_over_nothing(tmp_path):
    target = tmp_path / "mine"
    written = prompts.copy_packaged(target)
    assert {p.relative_to(target).as_posix() for p in written} == {
        f"{language}/{name}" for language in LANGUAGES for name in prompts.FILES
    }
    assert json.loads((target / "en" / "attributes.json").read_bytes())["difficulty"]
    with pytest.raises(UserError, match="exists"):
        prompts.copy_packaged(target)


def test_topics_of_a_file_are_its_distinct_lines(tmp_path):
    (tmp_path / "topics.txt").write_text("\ufeffa\n\n b \na\n", encoding="utf-8")
    assert prompts.read_topics(tmp_path / "topics.txt") == ("a", "b")
    with pytest.raises(UserError, match="can't be read"):
        prompts.read_topics(tmp_path / "none.txt")
