"""Which tile a cluster computes next: the first that no other one has claimed.

With every n-th tile for each of n clusters, those of a ragged problem drift
apart: some tiles have fewer rows. Then what neighbouring tiles share is loaded
from memory once for each of them, because it is in L2 no longer. In turn, tiles
start in their order, and no cluster is left behind at the end.

A counter in GMEM hands out the tiles. The cluster's first CTA draws a number
while the tile before is loaded, and leaves it in the cluster's mailbox in GMEM,
from where its CTAs read it.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, memref, scf

# A message is a number of 24 bits and, above it, 1 + the round, so that none is
# taken for the next one: all are 0 at first.
_NUMBER_BITS = 24
_ROUNDS = 127
# More than the tiles that a CTA can be ahead of the other one of its cluster:
# they release each other's slots.
_MAILBOXES = 8
_DRAWING_THREAD = 96  # of the loading warpgroup: neither loads nor stores.


def is_used(refs) -> bool:
  """Whether tiles are claimed; the interpreter cannot."""
  return refs.claims_gmem is not None and not refs.interpret


def counter(num_clusters: int) -> jax.Array:
  """Returns what a launch begins with as refs.claims_gmem."""
  return jnp.zeros((1 + num_clusters * _MAILBOXES,), jnp.int32)


def scratch_types():
  """The scratch that the functions below expect in refs."""
  return dict(claims_smem=plgpu.SMEM((5,), jnp.int32))  # Arguments, results.


def draw(refs, i):
  """Draws a number for the cluster's i-th tile, i >= 1, without waiting."""
  _pass_arguments(refs, i)
  drawing = lax.axis_index("cta") == 0
  refs.claims_smem[2] = drawing.astype(jnp.int32)

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
  def draw_number(_, claims_gmem, claims_smem):
    thread = arith.index_cast(_i32(), gpu.thread_id(gpu.Dimension.x))
    thread = arith.remui(thread, utils.c(utils.WARPGROUP_SIZE, _i32()))
    is_thread = _equal(thread, _DRAWING_THREAD)
    drawing = _equal(_argument(claims_smem, 2), 1)
    with ir.InsertionPoint(scf.IfOp(arith.andi(is_thread, drawing)).then_block):
      counter = utils.memref_ptr(claims_gmem)
      number = llvm.inline_asm(
        _i32(),
        [counter],
        "atom.relaxed.gpu.global.add.u32 $0, [$1], 1;",
        "=r,l,~{memory}",
        has_side_effects=True,
      )
      message = arith.ori(_mark(_argument(claims_smem, 0)), number)
      llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [_mailbox(claims_gmem, claims_smem), message],
        "st.relaxed.gpu.global.u32 [$0], $1;",
        "l,r,~{memory}",
        has_side_effects=True,
      )
      scf.yield_([])

  draw_number(refs.claims_gmem, refs.claims_smem)


def tile(refs, i):
  """Waits for the number drawn for the i-th tile; returns the tile's index."""
  _pass_arguments(refs, i)

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
  def receive(_, claims_gmem, claims_smem):
    i = _argument(claims_smem, 0)
    mailbox, mark = _mailbox(claims_gmem, claims_smem), _mark(i)
    most = utils.c(2**_NUMBER_BITS - 1, _i32())
    loop = scf.WhileOp([_i32()], [utils.c(0, _i32())])
    with ir.InsertionPoint(loop.before.blocks.append(_i32())):
      message = llvm.inline_asm(
        _i32(),
        [mailbox],
        "ld.relaxed.gpu.global.u32 $0, [$1];",
        "=r,l,~{memory}",
        has_side_effects=True,
      )
      marked = arith.andi(message, arith.xori(most, utils.c(-1, _i32())))
      is_other = arith.cmpi(arith.CmpIPredicate.ne, marked, mark)
      scf.condition(is_other, [message])
    with ir.InsertionPoint(loop.after.blocks.append(_i32())):
      scf.yield_([loop.after.blocks[0].arguments[0]])
    number = arith.andi(loop.results[0], most)
    # Two results in turn: nobody is two barriers behind.
    parity = arith.remui(i, utils.c(2, _i32()))
    result = arith.addi(parity, utils.c(3, _i32()))
    memref.store(
      number, claims_smem, [arith.index_cast(ir.IndexType.get(), result)]
    )
    utils.warpgroup_barrier()

  receive(refs.claims_gmem, refs.claims_smem)
  return lax.axis_size("sm") + refs.claims_smem[3 + lax.rem(i, 2)]


def _pass_arguments(refs, i):
  # Inlined code takes no scalars.
  refs.claims_smem[0] = i
  refs.claims_smem[1] = lax.axis_index("sm")


def _argument(claims_smem, i: int) -> ir.Value:
  return memref.load(claims_smem, [utils.c(i, ir.IndexType.get())])


def _mailbox(claims_gmem, claims_smem) -> ir.Value:
  """Returns the address of the mailbox for the tile of the arguments."""
  i, cluster = (_argument(claims_smem, j) for j in range(2))
  size = utils.c(_MAILBOXES, _i32())
  box = arith.addi(arith.muli(cluster, size), arith.remui(i, size))
  box = arith.addi(box, utils.c(1, _i32()))  # After the counter.
  base = utils.memref_ptr(claims_gmem)
  return utils.getelementptr(base, [box], _i32())


def _mark(i) -> ir.Value:
  turn = arith.remui(i, utils.c(_ROUNDS, _i32()))
  turn = arith.addi(turn, utils.c(1, _i32()))
  return arith.shli(turn, utils.c(_NUMBER_BITS, _i32()))


def _equal(x, value: int) -> ir.Value:
  return arith.cmpi(arith.CmpIPredicate.eq, x, utils.c(value, _i32()))


def _i32():
  return ir.IntegerType.get_signless(32)
