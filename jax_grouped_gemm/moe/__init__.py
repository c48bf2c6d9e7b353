"""A transformer's feed-forward layer of experts, from router to result."""

from jax_grouped_gemm.moe.activation import activate
from jax_grouped_gemm.moe.bias import add_bias
from jax_grouped_gemm.moe.checkpoint import (
  load_block_scaled,
  load_experts,
  read_safetensors,
)
from jax_grouped_gemm.moe.expert_parallel import ExpertParallel
from jax_grouped_gemm.moe.grouped_mlp import grouped_mlp
from jax_grouped_gemm.moe.layer import MoeOutput, MoeParams, moe_layer
from jax_grouped_gemm.moe.permutation import (
  Permutation,
  combine,
  dispatch,
  sort_by_expert,
)
from jax_grouped_gemm.moe.routing import (
  Routing,
  route_top_k,
  update_expert_bias,
)

__all__ = [
  "ExpertParallel",
  "MoeOutput",
  "MoeParams",
  "Permutation",
  "Routing",
  "activate",
  "add_bias",
  "combine",
  "dispatch",
  "grouped_mlp",
  "load_block_scaled",
  "load_experts",
  "moe_layer",
  "read_safetensors",
  "route_top_k",
  "sort_by_expert",
  "update_expert_bias",
]
