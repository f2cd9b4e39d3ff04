"""Whether a run fits the memory of its GPU, asked before the first step."""

from __future__ import annotations

import torch

from saelab.errors import UserError
from saelab.kernels import products
from saelab.sae import SAE
from saelab.training.config import TrainConfig
from saelab.training.state import MOMENTS

ENTRY = 40  # bytes of an entry of a code: value, its gradient, indices as selected and as sorted by latent


def step_bytes(
    sae: SAE, batch_size: int, ema: bool = False, data_ranks: int = 1, moments: str = "fp32"
) -> tuple[int, int]:
    """Bytes that training takes besides the weights: those of the parameters, and those of a batch. At least.

    Parameters have gradients in float32 and two ``moments``, matrices a copy in bfloat16, and maybe an average. A batch
    has activations, reconstruction, errors and a gradient, its code, and the part of the pre-activations that is held
    at a time. Where the variant has no budget, half of all latents may be active in the first steps. ``data_ranks``
    divide the batch, the moments and the average.
    """
    parameters, batch_size = sum(p.numel() for p in sae.parameters()), batch_size // data_ranks
    per_latent = sae.config.get("k") or sae.config.get("n_steps") or sae.d_sae / 2
    held = min(4 * batch_size * sae.d_sae, products.DEVICE_CHUNK_BYTES)
    batch = batch_size * (4 * (2 * sae.d_in + 3 * sae.d_out) + ENTRY * min(per_latent, sae.d_sae)) + held
    return int(parameters * (4 + 2 + (moment_bytes(moments) + 4 * ema) / data_ranks)), int(batch)


def moment_bytes(moments: str) -> int:
    """Bytes of both moments of a parameter, kept in ``fp32`` or ``bf16``."""
    return 2 * MOMENTS[moments].itemsize


def free_bytes(device: torch.device) -> int | None:
    """Memory of a device that a tensor may take; None where PyTorch does not tell."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def check_memory(sae: SAE, config: TrainConfig, resumed: bool = False, data_ranks: int = 1) -> None:
    """Refuse a run that cannot fit, and name a batch size or a width that would.

    The SAE is on its device already, undivided, and in a run that is ``resumed`` the moments are, too.
    """
    free = free_bytes(sae.device)
    if free is None:
        return
    if resumed:
        free += moment_bytes(config.moments) * sum(p.numel() for p in sae.parameters())
    fixed, batch = step_bytes(sae, config.batch_size, config.ema is not None, data_ranks, config.moments)
    if fixed + batch <= free:
        return
    size = config.batch_size
    while size > 1 and fixed + step_bytes(sae, size, data_ranks=data_ranks)[1] > free:
        size //= 2
    have = sum(p.numel() * p.element_size() for p in sae.parameters())  # freed with a smaller SAE
    width = int(sae.d_sae * (free + have) / (fixed + have + batch)) // 256 * 256
    fits = fixed + step_bytes(sae, size, data_ranks=data_ranks)[1] <= free
    remedy = f"batch_size={size} would fit" if fits else f"d_sae={width} would fit" if width else "use another device"
    raise UserError(
        f"training {sae.d_sae} latents of width {sae.d_in} with batch_size={config.batch_size} takes at least "
        f"{(fixed + batch) / 1e9:.1f} GB of {sae.device} besides the weights, {free / 1e9:.1f} GB are free; {remedy}"
    )
