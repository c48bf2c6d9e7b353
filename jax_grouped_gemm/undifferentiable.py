"""What has derivatives by the rules of JAX, but not meaningful ones."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def undifferentiable(why: str, tree):
  """Returns the tree; NotImplementedError(why) where it is differentiated."""
  del why
  return tree


@undifferentiable.defjvp
def _refuse_tangents(why: str, primals, tangents):
  raise NotImplementedError(why)


@jax.custom_jvp
def made_beside(x, copies):
  """Returns copies that were made of stop_gradient(x): their derivative is 0.

  Not one that JAX knows to be 0: what is undifferentiable refuses copies of
  what is differentiated.
  """
  del x
  return copies


@made_beside.defjvp
def _zero_tangents(primals, tangents):
  _, copies = primals
  dx, _ = tangents
  # No factor: 0 * NaN would be one.
  zero = jnp.where(False, jnp.sum(dx[:1].ravel()[:1]), 0)
  return copies, jax.tree.map(
    lambda x: jnp.broadcast_to(zero.astype(x.dtype), x.shape), copies
  )


def gemm_operands(name: str, *trees):
  """Returns the operands of a GEMM of quantised ones."""
  return undifferentiable(
    f"{name} has no gradient, nor has what quantised its operands; ragged_dot "
    "has one, and quantises for itself. Where none is wanted: "
    "jax.lax.stop_gradient of the operands",
    trees,
  )
