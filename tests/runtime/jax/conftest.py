"""JAX for the tests of this folder: eight CPU devices, 64 bits."""

from collections.abc import Iterator

import jax
import pytest

from megatree.runtime.jax.form import has_64_bits

# Before any test of the run starts JAX's backend: conftests are read when tests are collected.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(autouse=True)
def _sixty_four_bits() -> Iterator[None]:
    """Switch 64 bits on for all threads, which simulated ranks are."""
    before = has_64_bits()
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
