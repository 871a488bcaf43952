"""JAX as a second runtime: the same functions under `jax.jit`, arrays and functions both ways."""
