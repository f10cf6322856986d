import json

import numpy as np
import pytest
import small
from small import run_command

from piccolo_jax import build, embed, export
from piccolo_jax.evaluation import encoder
from piccolo_jax.quantize import Quantizer

TEXTS = ["今天天气很好", "", "好", "A short English sentence." * 9, "今天天气很好", "a\u2028b\x85c"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = small.config(embed_dim=30)
    parts = build.build(config)
    output = tmp_path_factory.mktemp("run") / "export"
    export.write(output, small.params(parts), parts, config)
    return output


@pytest.fixture
def files(tmp_path):
    """Input and output."""
    path = tmp_path / "texts.jsonl"
    lines = [json.dumps({"id": i, "text": t}, ensure_ascii=False) for i, t in enumerate(TEXTS)]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path, tmp_path / "out.npy"


def run(model, files, *flags):
    return run_command(
        embed.main, f"--model={model}", f"--input={files[0]}", f"--output={files[1]}", *flags
    )


def error(capsys):
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    return message


def test_row_n_is_the_normalised_embedding_of_line_n(model, files, capsys):
    assert run(model, files) == 0
    rows = np.load(files[1])
    assert (rows.dtype, rows.shape) == (np.float32, (len(TEXTS), 30))
    made, params = encoder.load(model)
    np.testing.assert_allclose(rows, encoder.cut(made.encode(params, TEXTS), 30), atol=1e-6)
    alone = encoder.cut(made.encode(params, TEXTS[3:4]), 30)
    np.testing.assert_allclose(rows[3:4], alone, atol=1e-5)
    assert f"6 texts x 30 in {files[1]}" in capsys.readouterr().out
    assert sorted(p.name for p in files[1].parent.iterdir()) == ["out.npy", "texts.jsonl"]


def test_dim_cuts_and_then_normalises(model, files):
    assert run(model, files) == 0
    whole = np.load(files[1])
    assert run(model, files, "--dim=8", "--overwrite") == 0
    rows = np.load(files[1])
    expected = whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(rows, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


def test_an_empty_text_has_an_embedding_too(model, files):
    assert run(model, files) == 0
    np.testing.assert_allclose(np.linalg.norm(np.load(files[1]), axis=1), 1, atol=1e-6)


def test_the_prompt_is_put_before_every_text(model, files, tmp_path):
    assert run(model, files, "--prompt=查询：") == 0
    made, params = encoder.load(model)
    texts = [f"查询：{text}" for text in TEXTS]
    np.testing.assert_allclose(
        np.load(files[1]), encoder.cut(made.encode(params, texts), 30), atol=1e-6
    )


def test_a_prompt_of_the_model_is_named(model, files, capsys):
    assert run(model, files, "--prompt-name=query") == 0
    by_name = np.load(files[1])
    assert run(model, files, "--prompt=查询：", "--overwrite") == 0
    np.testing.assert_allclose(np.load(files[1]), by_name, atol=1e-6)
    capsys.readouterr()
    assert run(model, files, "--prompt-name=web", "--overwrite") == 2
    assert "prompt_name = 'web': must be one of 'query', 'document'" in error(capsys)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Input and output, and the float32 embeddings of 60 texts at 18 dimensions."""
    folder = tmp_path_factory.mktemp("many")
    texts = [f"第{i}个句子" * (1 + i % 3) for i in range(60)]
    (folder / "t.txt").write_text("\n".join(texts), encoding="utf-8")
    return folder / "t.txt", folder / "out.npy"


@pytest.mark.parametrize(("precision", "dtype", "width"), [("int8", "i1", 18), ("binary", "u1", 3)])
def test_codes_are_written_with_their_calibration(
    model, many, precision, dtype, width, capsys, tmp_path
):
    assert run(model, many, "--dim=18", "--overwrite") == 0
    exact = np.load(many[1])
    files = (many[0], tmp_path / "codes.npy")
    assert run(model, files, "--dim=18", f"--precision={precision}") == 0
    out = capsys.readouterr().out
    assert f"{60 * width:,} bytes instead of 4,320; of the 10 nearest of 54 texts, " in out
    assert "% are found (6 other texts as queries)" in out
    calibration = tmp_path / "codes.calibration.safetensors"
    assert sorted(tmp_path.iterdir()) == sorted([files[1], calibration])
    codes, quantizer = np.load(files[1]), Quantizer.load(calibration)
    assert (codes.dtype, codes.shape) == (np.dtype(dtype), (60, width))
    np.testing.assert_array_equal(codes, Quantizer.fit(exact, precision).quantize(exact))
    np.testing.assert_array_equal(codes, quantizer.quantize(exact))

    # Another file by the same calibration.
    (tmp_path / "one.txt").write_text("第3个句子第3个句子", encoding="utf-8")
    files = (tmp_path / "one.txt", tmp_path / "one.npy")
    flags = ("--dim=18", f"--precision={precision}", f"--calibration={calibration}")
    assert run(model, files, *flags) == 0
    assert not (tmp_path / "one.calibration.safetensors").exists()
    assert np.load(files[1]).shape == (1, width)


def test_calibrations_that_do_not_fit_are_errors(model, many, capsys, tmp_path):
    files = (many[0], tmp_path / "codes.npy")
    calibration = tmp_path / "c.safetensors"
    Quantizer.fit(np.eye(30, dtype=np.float32), "int8").save(calibration)
    flag = f"--calibration={calibration}"
    for flags, message in (
        ([flag], "--calibration: is for --precision=int8 or binary"),
        ([flag, "--precision=binary"], "is of int8, but --precision=binary"),
        ([flag, "--precision=int8", "--dim=8"], "is of 30 dimensions, not of 8"),
        ([f"{flag}x", "--precision=int8"], "c.safetensorsx: not a readable calibration"),
    ):
        assert run(model, files, *flags) == 2
        assert message in error(capsys)
    (tmp_path / "codes.calibration.safetensors").write_text("mine")
    assert run(model, files, "--precision=int8") == 2
    assert "codes.calibration.safetensors exists; --overwrite" in error(capsys)
    assert (tmp_path / "codes.calibration.safetensors").read_text() == "mine"
    assert not files[1].exists()


def test_one_text_cannot_be_calibrated_on(model, capsys, tmp_path):
    (tmp_path / "one.txt").write_text("一", encoding="utf-8")
    assert run(model, (tmp_path / "one.txt", tmp_path / "o.npy"), "--precision=int8") == 2
    assert "one text is too few to calibrate on: give --calibration" in error(capsys)


def test_another_field_and_plain_text_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"title": "a"}\r\n{"title": ""}')
    assert embed.read_texts(path, "title") == ["a", ""]
    path = tmp_path / "a.txt"
    path.write_bytes("一\r\n\r\nb\u2028c\n".encode())
    assert embed.read_texts(path, "text") == ["一", "", "b\u2028c"]


@pytest.mark.parametrize(
    "line",
    ["", "{", '{"txt": "a"}', '{"text": 1}', '{"text": null}', '"a"', '{"text": "\\ud800"}',
     "[" * 100_000],
)  # fmt: skip
def test_a_line_that_cannot_be_encoded_is_named(model, files, capsys, line):
    lines = files[0].read_text("utf-8").split("\n")
    files[0].write_text("\n".join([lines[0], line, *lines[1:]]), encoding="utf-8")
    assert run(model, files) == 2
    message = error(capsys)
    assert f"{files[0]}:2: " in message
    assert "--field" in message
    assert not files[1].exists()


@pytest.mark.parametrize("dim", [-1, 0, 31])
def test_a_prefix_that_does_not_exist_is_an_error(model, files, capsys, dim):
    assert run(model, files, f"--dim={dim}") == 2
    assert f"--dim={dim}: must be from 1 to 30" in error(capsys)


def test_an_output_that_exists_is_kept(model, files, capsys):
    files[1].write_text("mine")
    assert run(model, files) == 2
    assert "out.npy exists; --overwrite" in error(capsys)
    assert files[1].read_text() == "mine"


def test_what_is_read_is_not_replaced(model, files, tmp_path, capsys):
    (tmp_path / "link.npy").symlink_to(files[0])
    before = files[0].read_bytes()
    for output in (files[0], tmp_path / "link.npy"):
        assert run(model, (files[0], output), "--overwrite") == 2
        assert f"{output}: is read, and can't be written too" in error(capsys)
    assert files[0].read_bytes() == before


def test_a_disk_without_room_leaves_what_was_there(model, files, monkeypatch, capsys):
    def save(*_):
        raise OSError(28, "No space left on device")

    files[1].write_text("mine")
    monkeypatch.setattr(embed.np, "save", save)
    assert run(model, files, "--overwrite") == 2
    assert "out.npy: can't be written (No space left on device)" in capsys.readouterr().err
    assert files[1].read_text() == "mine"
    assert sorted(p.name for p in files[1].parent.iterdir()) == ["out.npy", "texts.jsonl"]


def test_places_that_cannot_be_used_are_named(model, files, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    for arguments, place in (
        ((tmp_path / "none", files), "none' is not a directory here"),
        ((tmp_path / "folder", files), "folder/config.json: no such file"),
        ((model, (tmp_path / "none.jsonl", files[1])), "none.jsonl: can't be read"),
        ((model, (tmp_path / "folder", files[1])), "folder: can't be read"),
        ((model, (tmp_path / "empty.jsonl", files[1])), "empty.jsonl: is empty"),
        ((model, (tmp_path / "latin.jsonl", files[1])), "latin.jsonl: can't be read"),
        ((model, (files[0], tmp_path / "no" / "out.npy")), "the folder does not exist"),
        ((model, (files[0], files[0] / "out.npy")), "the folder does not exist"),
        ((model, (files[0], tmp_path / "folder"), "--overwrite"), "folder: is a folder"),
    ):
        assert run(*arguments) == 2
        assert place in error(capsys)
    assert not list((tmp_path / "folder").iterdir())
