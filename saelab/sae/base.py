"""What every sparse autoencoder is: a dictionary, and a way to choose and weigh its latents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab import kernels
from saelab.errors import UserError, near_matches
from saelab.kernels import SelectedPreActs
from saelab.sparse import SparseCode

VARIANTS: dict[str, type[SAE]] = {}


class SAE(nn.Module, ABC):
    """A dictionary ``W_dec [d_sae, d_in]`` (row = direction), an offset ``b_dec [d_in]``, and an encoder.

    The keyword arguments of a variant's constructor are its configuration; they are kept in ``config``, saved as
    JSON and given back to :func:`build`. Declaring a subclass with ``variant="name"`` registers it.
    """

    variant: ClassVar[str]
    needs_grads: ClassVar[bool] = False  # must be trained on a cache that holds gradients of the LM loss
    # Parameters and buffers measured in units of the activations: they scale when the data are rescaled.
    scaled: ClassVar[tuple[str, ...]] = ("b_dec",)

    def __init_subclass__(cls, variant: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if variant is not None:
            cls.variant = variant
            VARIANTS[variant] = cls

    def __init__(self, d_in: int, d_sae: int, **config: Any) -> None:
        super().__init__()
        if d_in < 1 or d_sae < 1:
            raise UserError(f"d_in={d_in} and d_sae={d_sae} must both be at least 1")
        self.d_in, self.d_sae = d_in, d_sae
        self.config: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae, **config}
        self.W_dec = nn.Parameter(_unit_rows(torch.randn(d_sae, d_in)))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    @property
    def signed(self) -> bool:
        """Whether codes carry negative values."""
        return bool(self.config.get("signed", False))

    @abstractmethod
    def encode(self, x: Float[Tensor, "n d_in"], grads: Float[Tensor, "n d_in"] | None = None) -> SparseCode:
        """The code of ``x``. In eval mode a token's code never depends on the other tokens.

        ``grads`` is the gradient of the language model's loss at ``x``; only variants with ``needs_grads`` use it.
        """

    def decode(self, code: SparseCode) -> Float[Tensor, "n d_in"]:
        """The reconstruction ``dense(code) @ W_dec + b_dec``."""
        return kernels.decode(code.values, code.indices, code.row_ptr, self.W_dec, self.b_dec)

    def forward(self, x: Float[Tensor, "n d_in"], grads: Tensor | None = None) -> Float[Tensor, "n d_in"]:
        return self.decode(self.encode(x, grads))

    def reconstruction_loss(self, x: Float[Tensor, "n d_in"], code: SparseCode) -> tuple[Tensor, Tensor]:
        """The objective's first term, summed over tokens and dimensions, and the reconstruction without gradient.

        It is the squared error; nested dictionaries replace it.
        """
        recon = self.decode(code)
        return (x - recon).square().sum(), recon.detach()

    def extra_losses(self, x: Tensor, code: SparseCode) -> dict[str, Tensor]:
        """Terms of the variant's own objective (a sparsity penalty, say), each a mean per token, weighted.

        Like the reconstruction term they are divided by the data's mean squared deviation by the trainer.
        """
        return {}

    @torch.no_grad()
    def after_step(self, step: int, n_steps: int) -> None:
        """Called by the trainer after each optimizer step: schedules and phases of the variant, if it has any."""

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Estimate what inference needs (thresholds) on held-out activations, once training has ended."""

    @torch.no_grad()
    def initialise(self, x: Float[Tensor, "n d_in"], b_dec: Float[Tensor, " d_in"]) -> None:
        """Set data-dependent parameters from a sample ``x`` and its centre ``b_dec``, before the first step."""
        self.b_dec.copy_(b_dec)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Give every dictionary row unit norm; called before each optimizer step."""
        self.W_dec.copy_(_unit_rows(self.W_dec))

    @torch.no_grad()
    def project_decoder_grad(self) -> None:
        """Remove from the decoder's gradient the part along each (unit-norm) row: Adam would turn it into drift."""
        if self.W_dec.grad is not None:
            along = (self.W_dec.grad * self.W_dec).sum(dim=1, keepdim=True)
            self.W_dec.grad.addcmul_(along, self.W_dec, value=-1.0)

    @torch.no_grad()
    def rescale_(self, factor: float) -> None:
        """Rewrite the parameters for data multiplied by ``factor``: ``code(factor * x) = factor * code(x)``.

        Exact in floating point when ``factor`` is a power of two, which is the only kind the trainer uses.
        """
        for name in self.scaled:
            getattr(self, name).mul_(factor)

    @property
    def device(self) -> torch.device:
        return self.W_dec.device


class LinearSAE(SAE):
    """An SAE whose pre-activations are ``(x - b_dec) @ W_enc + b_enc`` and whose variant is a selection rule."""

    scaled: ClassVar[tuple[str, ...]] = ("b_dec", "b_enc")

    def __init__(self, d_in: int, d_sae: int, **config: Any) -> None:
        super().__init__(d_in, d_sae, **config)
        # Shape [d_in, d_sae] in every formula; in memory each latent's vector is contiguous, because sparse
        # gradients scatter into latents. Tied to the decoder at the start.
        self.W_enc = nn.Parameter(self.W_dec.detach().clone().T)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))

    @abstractmethod
    def select(self, x: Tensor, grads: Tensor | None) -> SelectedPreActs:
        """Which latents represent each token, with their pre-activations; called without gradients."""

    @final
    def encode(self, x: Float[Tensor, "n d_in"], grads: Float[Tensor, "n d_in"] | None = None) -> SparseCode:
        with torch.no_grad():
            selected = self.select(x, grads)
        values = kernels.pre_acts_at(x, self.W_enc, self.b_enc, self.b_dec, selected)
        return SparseCode(values, selected.indices, selected.row_ptr, self.d_sae)


def check_k(k: int, d_sae: int) -> int:
    """``k`` if a token can spend it on ``d_sae`` latents."""
    if not 1 <= k <= d_sae:
        raise UserError(f"k={k} is outside 1..d_sae={d_sae}; lower k or widen the SAE")
    return k


def build(variant: str, d_in: int, d_sae: int, **config: Any) -> SAE:
    """Construct a variant by its registry name."""
    if variant not in VARIANTS:
        raise UserError(f"unknown variant {variant!r}: {near_matches(variant, VARIANTS)}")
    try:
        return VARIANTS[variant](d_in=d_in, d_sae=d_sae, **config)
    except TypeError as error:
        raise UserError(f"variant {variant!r}: {error}") from error


def _unit_rows(W: Tensor) -> Tensor:
    return W / W.norm(dim=1, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny)
