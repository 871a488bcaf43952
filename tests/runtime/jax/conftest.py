"""JAX for the tests of this folder: eight CPU devices, 64 bits, quick compilation."""

import os
from collections.abc import Iterator

# Before any test of the run starts JAX's backend: conftests are read when tests are collected.
# XLA compiles several times faster without optimisation, and the programs of tests run once.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()

import jax  # noqa: E402
import pytest  # noqa: E402

from megatree.runtime.jax.form import has_64_bits  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(autouse=True)
def _sixty_four_bits() -> Iterator[None]:
    """Switch 64 bits on for all threads, which simulated ranks are."""
    before = has_64_bits()
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
