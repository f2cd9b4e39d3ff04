"""Tensor parallelism: one model over the processes that torchrun started, each holding a part of most weights.

transformers divides the weights, by a plan that comes with the model's class, and adds up what the processes compute.
All processes run the same program: between sublayers each of them has the whole residual stream.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from saelab.errors import UserError
from saelab.lm.structure import attention, blocks, mlp, underlying

_WHOLE_OUTPUT = ("rowwise", "gather", "embedding", "replicated", "allreduce", "sequence")


def plan_arguments(model: nn.Module, what: str, device: torch.device) -> dict[str, Any]:
    """What ``from_pretrained`` is given to divide a model like ``model``, which may be empty, over all processes.

    UserError outside torchrun, for a model without a plan, and for a number of processes that does not divide it.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size < 2:
        raise UserError(
            "tensor parallelism divides the model over the processes of torchrun, and this is one process; start it "
            "with torchrun --nproc-per-node 2 -m saelab ..., or leave it out"
        )
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    if here is not None and here.type != device.type:
        raise UserError(f"tensor parallelism runs on {here.type} on this machine, not on {device}; leave --device out")
    try:
        from transformers.distributed.configuration_utils import DistributedConfig
    except ImportError as error:
        raise UserError("tensor parallelism needs transformers 5.20 or later: pip install -U transformers") from error
    if not getattr(model, "_tp_plan", None):
        raise UserError(
            f"{what} ({type(model).__name__}) has no tensor-parallel plan in transformers; spread it with a device map"
        )
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        number = getattr(config, name, None)
        if isinstance(number, int) and number % size:
            raise UserError(f"{size} processes do not divide the {name}={number} of {what}; start another number")
    return {"distributed_config": DistributedConfig(tp_plan="auto")}


def is_divided(model: nn.Module) -> bool:
    """Whether a model is divided over processes."""
    return (getattr(underlying(model), "_tp_size", None) or 1) > 1


def check_whole(model: nn.Module, hook_name: str, path: str, side: str) -> None:
    """Refuse a side of a module that each process of a divided model has a part of only."""
    root = underlying(model)
    if not is_divided(model):
        return
    prefix, layers = blocks(root)
    number, _, below = path.removeprefix(f"{prefix}.").partition(".")
    if not path.startswith(f"{prefix}.") or not below:
        return  # the residual stream, and what lies outside the blocks
    block = layers[int(number)]
    sublayers = [name for name in (attention(block), mlp(block)) if name]
    if not any(f"{below}.".startswith(f"{name}.") for name in sublayers) or below in sublayers:
        return
    style = _style(root, path)
    if side == "out" and style is not None and any(part in style for part in _WHOLE_OUTPUT):
        return
    if side == "in" and style is not None and style.startswith("colwise"):
        return
    raise UserError(
        f"{hook_name} is divided over the processes of tensor parallelism; use a residual stream, hook_attn_out or "
        "hook_mlp_out, or spread the model with a device map"
    )


def _style(root: Any, path: str) -> str | None:
    """How the plan divides a module: the rule whose name, with * for numbers, is its path."""
    wanted = ".".join("*" if part.isdigit() else part for part in path.split("."))
    return (root._tp_plan or {}).get(wanted)
