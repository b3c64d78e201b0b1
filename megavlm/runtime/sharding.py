"""How megatron-core names and shards what a checkpoint holds: one setting for filling, saving and loading."""

from typing import Any

from megatron.core import parallel_state


def sharding_metadata() -> dict[str, Any]:
    """The metadata that every ``sharded_state_dict`` call of the project passes. Needs megatron-core's groups.

    One key per layer (``non_homogeneous_layers``): with stacked layers a model of which only some layers train cannot
    be saved. ``fully_reshardable`` is the one optimizer layout that loads under every other layout.
    """
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "non_homogeneous_layers": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
