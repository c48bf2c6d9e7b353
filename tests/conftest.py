"""Settings that must be there before jax starts, and shared fixtures."""

import os
import shutil

# The interpreter's threads block one another in a pool of one thread per core.
os.environ["NPROC"] = "32"
# Most of the time goes to compiling what then runs once, on little data. XLA
# on a GPU would leave out roundings to bfloat16 that the kernels do.
flag = "--xla_gpu_autotune_level=0 --xla_allow_excess_precision=false"
if not shutil.which("nvidia-smi"):
  # Without a driver, the CUDA plugin complains.
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  flag = "--xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{flag} {os.environ.get('XLA_FLAGS', '')}"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)  # for jax.shard_map
# What is called next would start while kernels are interpreted, and block them.
jax.config.update("jax_cpu_enable_async_dispatch", False)

hypothesis.settings.register_profile(
  "jax",
  deadline=None,  # The first example of a shape compiles.
  derandomize=True,
  max_examples=25,
)
hypothesis.settings.load_profile("jax")


@pytest.fixture(scope="module", autouse=True)
def _compiled_for_one_module():
  """A process may map 65530 pieces of memory, and each program is a few."""
  yield
  jax.clear_caches()


@pytest.fixture
def rounded_once(monkeypatch):
  """Unfused products are rounded as fused ones, after a bias is added.

  Else one in four of them would be a step of bfloat16 off, and what is then
  quantised a step of FP8 now and then: 2^-6 of the result.
  """
  from jax_grouped_gemm import moe, ragged_dot
  from jax_grouped_gemm.moe.fused import Product

  def unfused(self, lhs, rhs, bias, sizes, quantized_lhs, quantized_rhs):
    out = ragged_dot(
      lhs,
      rhs,
      sizes,
      preferred_element_type=jax.numpy.float32,
      recipe=self.recipe,
      quantized_lhs=quantized_lhs,
      quantized_rhs=quantized_rhs,
      implementation=self.implementation,
    )
    return moe.add_bias(out, bias, sizes).astype(lhs.dtype)

  monkeypatch.setattr(Product, "unfused", unfused)


@pytest.fixture(params=["xla", "interpret"])
def implementation(request):
  """Each implementation that runs on a CPU."""
  return request.param
