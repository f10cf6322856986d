import pytest
from chat_server import KEY

from piccolo_jax.synthesis import client


@pytest.fixture
def short_waits(monkeypatch):
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(client, "LONGEST_WAIT", 0.02)


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "made"
