"""Trains a layer whose experts are spread over devices, and its tokens too.

Tokens are split over all devices, the experts over one axis of the mesh; every
token travels to its experts and back. The layer learns to do what another one,
of fixed random weights, does.

  python examples/expert_parallel.py                  # 8 simulated CPU devices
  python examples/expert_parallel.py --expert-axis 4  # the experts held twice
  python examples/expert_parallel.py --distributed    # one process per host,
      where jax.distributed knows the cluster (Slurm, Open MPI, Kubernetes)
  python examples/expert_parallel.py --coordinator HOST:PORT \\
      --num-processes N --process-id I                  # the same anywhere
      --local-devices I           # and of a process for each GPU of one host
"""

import argparse
import functools
import os
import shutil

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_grouped_gemm import Recipe
from jax_grouped_gemm.moe import ExpertParallel, MoeParams, moe_layer

D_MODEL, D_FF, EXPERTS, TOP_K = 128, 256, 16, 2
BALANCE_WEIGHT = 0.01  # Of the load-balancing loss.
OPTIMIZER = optax.adam(3e-3)
# The expert axis last: its devices are the ones that are close to each other.
AXES = ("data", "expert")
TOKENS = P(AXES)
PARAMS = MoeParams(router=P(), gate_up=P("expert"), down=P("expert"))


def init(key: jax.Array) -> MoeParams:
  """Returns random parameters of a layer."""
  keys = jax.random.split(key, 3)
  weight = lambda key, *shape: (
    jax.random.normal(key, shape) / jnp.sqrt(shape[-2])
  )
  return MoeParams(
    router=weight(keys[0], D_MODEL, EXPERTS),
    gate_up=weight(keys[1], EXPERTS, D_MODEL, 2 * D_FF),
    down=weight(keys[2], EXPERTS, D_FF, D_MODEL),
  )


def make_layer(mesh: jax.sharding.Mesh, args, recipe: Recipe, payload=None):
  """Returns layer(params, x) on all devices of the mesh."""
  capacity = None
  if args.capacity_factor is not None:
    # Times the rows that a device takes in when all take in as many.
    mean = args.tokens // mesh.size * TOP_K
    capacity = max(1, round(args.capacity_factor * mean))
  parallel = ExpertParallel(
    "expert",
    ("data",),
    capacity=capacity,
    payload=payload,
    chunks=args.chunks,
  )

  def layer(params, x):  # One device's parameters and tokens.
    result = moe_layer(x, params, TOP_K, recipe=recipe, parallel=parallel)
    return result.out, result.load_balancing_loss, result.dropped

  return jax.shard_map(
    layer, mesh=mesh, in_specs=(PARAMS, TOKENS), out_specs=(TOKENS, P(), P())
  )


def make_step(mesh: jax.sharding.Mesh, args):
  """Returns step(state, teacher, key) -> (state, (error, balance, dropped))."""
  layer = make_layer(mesh, args, Recipe(), args.payload)
  teach = make_layer(mesh, args, Recipe.bf16())

  def loss(params, teacher, x):
    out, balance, dropped = layer(params, x)
    error = jnp.mean((out - teach(teacher, x)[0]) ** 2)
    # FP8 scales have a floor, which the gradients of a mean would come near.
    objective = x.size * (error + BALANCE_WEIGHT * balance)
    return objective, (error, balance, dropped)

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, teacher, key):
    params, optimizer_state = state
    x = jax.random.normal(key, (args.tokens, D_MODEL))
    x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, TOKENS))
    grads, shown = jax.grad(loss, has_aux=True)(params, teacher, x)
    updates, optimizer_state = OPTIMIZER.update(grads, optimizer_state)
    return (optax.apply_updates(params, updates), optimizer_state), shown

  return step


def parse(arguments: list[str] | None) -> argparse.Namespace:
  """Returns the flags."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--steps", type=int, default=20)
  parser.add_argument("--tokens", type=int, default=1024, help="of a step")
  parser.add_argument(
    "--expert-axis",
    type=int,
    help="devices that share the experts; default: all of them",
  )
  parser.add_argument(
    "--capacity-factor",
    type=float,
    help="rows that a device takes in, times the mean; default: all",
  )
  parser.add_argument(
    "--payload",
    choices=("fp8", "bf16"),
    default="fp8",
    help="what travels: tokens that are quantised, or as they are",
  )
  parser.add_argument(
    "--chunks",
    type=int,
    default=1,
    help="parts of a device's tokens; one can travel while another is computed",
  )
  parser.add_argument(
    "--simulate", type=int, default=8, help="CPU devices, without a GPU"
  )
  parser.add_argument("--distributed", action="store_true")
  parser.add_argument("--coordinator", metavar="HOST:PORT")
  parser.add_argument("--num-processes", type=int)
  parser.add_argument("--process-id", type=int)
  parser.add_argument("--local-devices", type=int, nargs="+", metavar="I")
  return parser.parse_args(arguments)


def start(args: argparse.Namespace) -> jax.sharding.Mesh:
  """Starts jax, on all hosts if so asked, and returns a mesh of all devices."""
  if os.environ.get("JAX_PLATFORMS") == "cpu" or not shutil.which("nvidia-smi"):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.simulate)
  if args.distributed or args.coordinator:
    jax.distributed.initialize(
      args.coordinator,
      args.num_processes,
      args.process_id,
      local_device_ids=args.local_devices,
    )
  count = jax.device_count()
  expert_axis = args.expert_axis or count
  if args.chunks not in range(1, args.tokens // count + 1):
    raise SystemExit(
      f"expert_parallel.py: --chunks {args.chunks} must be from 1 to the "
      f"{args.tokens // count} tokens of a device"
    )
  if count % expert_axis or EXPERTS % expert_axis or args.tokens % count:
    raise SystemExit(
      f"expert_parallel.py: --expert-axis {expert_axis} must divide {count} "
      f"devices and {EXPERTS} experts, and {count} the {args.tokens} tokens"
    )
  return jax.make_mesh(
    (count // expert_axis, expert_axis), AXES, axis_types=(AxisType.Auto,) * 2
  )


def main(arguments: list[str] | None = None) -> int:
  """Trains, reports, and returns the exit code."""
  args = parse(arguments)
  mesh = start(args)
  shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), PARAMS)
  new = jax.jit(init, out_shardings=shardings)
  teacher, params = new(jax.random.key(0)), new(jax.random.key(1))
  state = params, jax.jit(OPTIMIZER.init)(params)
  step = make_step(mesh, args)
  say = print if jax.process_index() == 0 else lambda *_: None
  say(
    f"{mesh.size} x {jax.devices()[0].device_kind} of {jax.process_count()} "
    f"processes, mesh {dict(mesh.shape)}; {params.gate_up.shape[0]} experts, "
    f"{EXPERTS // mesh.shape['expert']} on each device"
  )
  for i in range(args.steps):
    state, shown = step(state, teacher, jax.random.key(i))
    error, balance, dropped = shown
    if i % 5 == 0 or i == args.steps - 1:
      say(
        f"step {i}: error {error:.4f}, balance {balance:.3f}, dropped "
        f"{dropped} of {args.tokens * TOP_K}"
      )
  return 0


if __name__ == "__main__":
  raise SystemExit(main())
