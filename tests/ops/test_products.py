"""Which library computes the products of a program for CPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piccolo_jax.ops import products


@pytest.fixture(params=[True, False], ids=["AVX-512", "no AVX-512"])
def has_avx512(request, monkeypatch):
    monkeypatch.setattr(products, "_has_avx512", lambda: request.param)
    return request.param


def test_many_tokens_in_float32_are_computed_by_eigen_where_there_is_avx512(has_avx512):
    assert bool(products.compiler_options(jnp.float32, for_cpu=True, tokens=512)) == has_avx512
    assert not products.compiler_options(jnp.float32, for_cpu=True, tokens=511)
    assert not products.compiler_options(jnp.bfloat16, for_cpu=True, tokens=512)
    assert not products.compiler_options(jnp.float32, for_cpu=False, tokens=512)


@pytest.mark.parametrize(
    ("names", "has"),
    [(["X86_V3", "X86_V4"], True), (["FMA3", "AVX512F"], True), (["X86_V3"], False), ([], False)],
)
def test_avx512_is_known_by_the_names_of_each_numpy(names, has, monkeypatch):
    monkeypatch.setattr(np, "show_config", lambda mode: {"SIMD Extensions": {"found": names}})
    assert products._has_avx512.__wrapped__() == has


def test_by_eigen_products_leave_ynnpack_and_sums_stay(monkeypatch):
    monkeypatch.setattr(products, "_has_avx512", lambda: True)
    options = products.compiler_options(jnp.float32, for_cpu=True, tokens=4096)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 256, 256)), jnp.float32)

    def run(f, **kwargs):
        program = jax.jit(f, **kwargs).lower(x).compile()
        return program(x), "__ynn_fusion" in program.as_text()

    product, by_ynnpack = run(lambda x: x @ x)
    assert by_ynnpack
    same, by_ynnpack = run(lambda x: x @ x, compiler_options=options)
    assert not by_ynnpack
    # Sums of 256 products of about 1 in another order: sqrt(256) x 6e-8 of the largest, about 16.
    np.testing.assert_allclose(same, product, atol=2e-5)
    _, by_ynnpack = run(lambda x: x.max(-1), compiler_options=options)
    assert by_ynnpack
