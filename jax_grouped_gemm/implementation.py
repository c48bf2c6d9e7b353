"""Which implementation computes: Hopper kernels, or code that runs anywhere."""

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array

IMPLEMENTATIONS = ("mosaic_gpu", "xla", "interpret")
_HOPPER = "9.0"  # compute capability
_ALTERNATIVES = (
  "implementation='xla' runs anywhere, 'interpret' interprets the kernels on a "
  "CPU"
)


def default_device() -> jax.Device:
  """Returns the device that computes unless operands say otherwise."""
  device = jax.config.jax_default_device
  if device is None:
    return jax.devices()[0]
  return jax.devices(device)[0] if isinstance(device, str) else device


def _capability(device: jax.Device) -> str | None:
  return getattr(device, "compute_capability", None)


def check(implementation: str | None):
  """Raises ValueError unless it is None or the name of an implementation."""
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f"implementation must be None or one of {IMPLEMENTATIONS}, got "
      f"{implementation!r}"
    )


def choose(implementation: str | None, unsupported: str | None) -> str:
  """Returns the implementation to run, for a problem the kernels support.

  Or for one they do not, for the reason `unsupported`: then None means "xla",
  and what asks for the kernels raises NotImplementedError.
  """
  check(implementation)
  if implementation == "xla":
    return "xla"
  device = default_device()
  if implementation is None:
    supported = unsupported is None and _capability(device) == _HOPPER
    return "mosaic_gpu" if supported else "xla"
  if unsupported is not None:
    raise NotImplementedError(
      f"implementation={implementation!r} {unsupported}; 'xla' has no such "
      "limit"
    )
  is_gpu = device.platform == "gpu"
  if implementation == "mosaic_gpu" and is_gpu:
    if _capability(device) != _HOPPER:
      raise NotImplementedError(
        "implementation='mosaic_gpu' needs a GPU of compute capability "
        f"{_HOPPER} (Hopper), got {device.device_kind} of "
        f"{_capability(device)}; {_ALTERNATIVES}"
      )
  return implementation


# An identity that lowers for CUDA only. So a kernel can be traced, lowered and
# exported on a machine without a GPU, and says what it needs when run there.
_cuda_only_p = Primitive("cuda_only")
_cuda_only_p.def_abstract_eval(lambda x: x)
_cuda_only_p.def_impl(jax.jit(_cuda_only_p.bind))
batching.defvectorized(_cuda_only_p)


def _refuse(ctx, x):
  raise NotImplementedError(
    "implementation='mosaic_gpu' needs a Hopper GPU, and this is compiled for "
    f"{'/'.join(ctx.module_context.platforms)}; {_ALTERNATIVES}"
  )


mlir.register_lowering(_cuda_only_p, _refuse)
mlir.register_lowering(_cuda_only_p, lambda ctx, x: [x], platform="cuda")


def cuda_only(x: Array) -> Array:
  """Returns x; NotImplementedError when compiled for anything but CUDA."""
  return _cuda_only_p.bind(x)
