"""What has derivatives by the rules of JAX, but not meaningful ones."""

import functools

import jax


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def undifferentiable(why: str, tree):
  """Returns the tree; NotImplementedError(why) where it is differentiated."""
  del why
  return tree


@undifferentiable.defjvp
def _refuse_tangents(why: str, primals, tangents):
  raise NotImplementedError(why)


def gemm_operands(name: str, *trees):
  """Returns the operands of a GEMM of quantised ones."""
  return undifferentiable(
    f"{name} has no gradient, nor has what quantised its operands; ragged_dot "
    "has one, and quantises for itself. Where none is wanted: "
    "jax.lax.stop_gradient of the operands",
    trees,
  )
