"""The cache of experts as the native pager wants it described."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgeinfer import _native
from edgeinfer.modelfile import ModelFile
from edgeinfer.plan import ExpertPools, expert_stride


def describe_pools(file: ModelFile, pools: ExpertPools) -> tuple:
    """(experts, policy, kinds, layers) for `_native.Pager`; the memory of the pools is allocated here."""
    kinds = []
    for kind, slots in enumerate(pools.slots):
        layer = pools.layers[pools.kinds.index(kind)]
        sizes = [file.tensor(name).nbytes // experts_of(file, layer) for name in layer]
        matrices = [(size, expert_stride(size), _native.Arena(slots * expert_stride(size))) for size in sizes]
        kinds.append((slots, matrices))
    layers = [
        (kind, experts_of(file, names), [(file.tensor(name).part, file.tensor(name).offset) for name in names])
        for kind, names in zip(pools.kinds, pools.layers)
    ]
    return pools.num_experts, pools.policy, kinds, layers


def experts_of(file: ModelFile, names: Sequence[str]) -> int:
    """How many experts a layer of them has."""
    return file.tensor(names[0]).shape[2]


def places_in_pools(pools: ExpertPools) -> dict[str, tuple[int, int]]:
    """Name of a weight -> (layer of experts, matrix in its order of use)."""
    return {
        name: (layer, matrix) for layer, names in enumerate(pools.layers) for matrix, name in enumerate(names)
    }


def gates_of(
    file: ModelFile, pools: ExpertPools, resident: Mapping[str, int]
) -> tuple[list[tuple[int, int, int, int]], int]:
    """(address, bias address or 0, width, experts) of each layer's router, and how many experts to predict.

    Address 0 where a router is not a float32 matrix in memory: its layer is predicted by the paths of routing.
    `resident`: name -> address.
    """
    infos = {tensor.name: tensor for tensor in file.tensors}
    gates = []
    for names in pools.layers:
        router = f"blk.{infos[names[0]].layer}.ffn_gate_inp"
        weights, bias = infos.get(router + ".weight"), infos.get(router + ".bias")
        known = weights is not None and weights.type == "F32" and weights.name in resident
        known = known and weights.shape[1] == experts_of(file, names)  # others are chosen by a rule of their own
        gates.append(
            (
                resident[weights.name] if known else 0,
                resident.get(bias.name, 0) if bias is not None and bias.type == "F32" else 0,
                weights.shape[0] if known else 0,
                experts_of(file, names),
            )
        )
    return gates, pools.num_used
