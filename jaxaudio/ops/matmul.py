"""Matrix products: behind every projection, with its gradient written out, and summed in float32."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@jax.custom_vjp
def project(x: Float[Array, "B T I"], kernel: Float[Array, "I O"]) -> Float[Array, "B T O"]:
    """x @ kernel.

    Automatic differentiation emits the kernel's gradient as a transposed product, for which XLA on a CPU first copies
    transposed inputs: measured at 8 x 512 rows and widths 256 and 1024, that takes two to three times as long as the
    form below.
    """
    return jnp.einsum("BTI,IO->BTO", x, kernel)


def _forward(x, kernel):
    return project(x, kernel), (x, kernel)


def _backward(residuals, d_out):
    x, kernel = residuals
    d_x = jnp.einsum("BTO,IO->BTI", d_out, kernel)
    rows, d_rows = x.reshape(-1, x.shape[-1]), d_out.reshape(-1, d_out.shape[-1])
    contract_rows = (((0,), (0,)), ((), ()))
    if x.shape[-1] <= d_out.shape[-1]:
        return d_x, lax.dot_general(rows, d_rows, contract_rows)
    # The wider factor goes to the right; the barrier keeps XLA from folding the transpose back into the product.
    return d_x, lax.optimization_barrier(lax.dot_general(d_rows, rows, contract_rows)).T


project.defvjp(_forward, _backward)


def float32_einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A product of 16- or 32-bit factors, summed in float32."""
    if jax.default_backend() == "cpu":  # XLA has no 16-bit batched products with a 32-bit sum there
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
