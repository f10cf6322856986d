import importlib.util

import pytest


@pytest.fixture(scope="session", autouse=True)
def tpu_compiler():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: nothing compiles for TPUs")
