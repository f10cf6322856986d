from piccolo_jax.evaluation.models import fingerprint


def test_a_models_fingerprint_is_of_its_files_but_not_its_description(tmp_path):
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "model.safetensors").write_text("a")
    (tmp_path / "1_Pooling" / "config.json").write_text("b")
    before = fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("words")
    assert fingerprint(tmp_path) == before
    (tmp_path / "1_Pooling" / "config.json").write_text("c")
    assert fingerprint(tmp_path) != before
