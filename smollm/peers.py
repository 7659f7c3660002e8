"""The environment in which each side of a comparison runs. Imports no torch."""

from collections.abc import Mapping

ALLOCATOR = ("MALLOC_", "PYTORCH_ALLOC_CONF")  # env.sh's settings that the peers' users do not have


def side_environment(
    variables: Mapping[str, str], peer: bool, with_allocator: bool = False
) -> dict[str, str]:
    """The variables of a process that measures: one GPU, no W&B.

    Args:
        peer: whether it measures another library, which then reaches for no network.
        with_allocator: whether the peer has env.sh's allocator settings too.
    """
    # One GPU: Trainer would share its batch between several.
    gpu = variables.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    found = {**variables, "CUDA_VISIBLE_DEVICES": gpu, "WANDB_MODE": "disabled"}
    if not peer:
        return found
    found |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return {k: v for k, v in found.items() if with_allocator or not k.startswith(ALLOCATOR)}
