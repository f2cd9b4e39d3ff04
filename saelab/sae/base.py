"""What every sparse autoencoder is: a dictionary, and a way to choose and weigh its latents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from operator import attrgetter
from typing import Any, ClassVar, Literal, final

import torch
from jaxtyping import Float, Int
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
    saelens: str | None = None  # the SAELens architecture of its inference form, if there is one
    signed: bool = False  # whether codes carry negative values; an option of many variants
    needs_grads: ClassVar[bool] = False  # must be trained on a cache that holds gradients of the LM loss
    # Parameters and buffers (dotted names) in units of the activations: they scale when the data are rescaled.
    scaled: ClassVar[tuple[str, ...]] = ("b_dec",)
    tunable: ClassVar[tuple[str, ...]] = ()  # options that act in training alone: a fine-tuning may change them

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
        self.W_dec = nn.Parameter(unit_rows(torch.randn(d_sae, d_in)))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

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
        per_token, recon = kernels.sse(x, code.values, code.indices, code.row_ptr, self.W_dec, self.b_dec)
        return per_token.sum(), recon

    def extra_losses(self, x: Tensor, code: SparseCode, error: Float[Tensor, "n d_in"]) -> dict[str, Tensor]:
        """Terms of the variant's own objective (a sparsity penalty, say), each a mean per token, weighted.

        ``error`` is ``x - recon`` without gradient. Like the reconstruction term they are divided by the data's mean
        squared deviation by the trainer.
        """
        return {}

    def aux_latents(self, dead: Int[Tensor, " m"], weight: float) -> dict[str, tuple[float, Tensor]]:
        """Which latents should help to explain the residual (AuxK), by name of the term, with its weight.

        ``dead`` are the latents that have not fired for long, ``weight`` is the trainer's for them. Empty for variants
        without such a loss.
        """
        return {}

    # The hooks below keep all they learn in buffers, so that a resumed run goes on exactly where it stopped.

    def observe(self, x: Tensor, code: SparseCode, grads: Tensor | None) -> None:
        """See a training batch and its code, once per step: running statistics of the variant. Without gradients."""

    def after_step(self, step: int, n_steps: int) -> None:
        """Follow an optimizer step: schedules, phases and constraints of the variant. Without gradients."""

    def lr_scale(self, step: int, n_steps: int) -> float:
        """What the trainer multiplies the learning rate of a step by, for variants that train in phases."""
        return 1.0

    def diagnostics(self) -> dict[str, float]:
        """Numbers of the variant that are worth a column in the training log."""
        return {}

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Estimate what inference needs (thresholds) on a sample of training activations, once training has ended."""

    def inference_threshold(self) -> Tensor | None:
        """What a pre-activation must exceed in eval mode, a number or ``[d_sae]``; None where k or a sign decides."""
        return None

    @torch.no_grad()
    def initialise(self, x: Float[Tensor, "n d_in"], b_dec: Float[Tensor, " d_in"]) -> None:
        """Set data-dependent parameters from a sample ``x`` and its centre ``b_dec``, before the first step."""
        self.b_dec.copy_(b_dec)

    @torch.no_grad()
    def before_fine_tuning(self, scale: float) -> None:
        """Make weights that were trained before, maybe elsewhere, ready for data that training multiplies by ``scale``.

        They stay in units of raw activations, and so does every reconstruction.
        """

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Give every dictionary row unit norm; called before each optimizer step."""
        for rows in self._blocks(self.W_dec):
            rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min_(torch.finfo(rows.dtype).tiny))

    @torch.no_grad()
    def project_decoder_grad(self) -> None:
        """Remove from the decoder's gradient the part along each (unit-norm) row: Adam would turn it into drift."""
        if self.W_dec.grad is not None:
            for rows, grad in zip(self._blocks(self.W_dec), self._blocks(self.W_dec.grad)):
                grad.addcmul_((grad * rows).sum(dim=1, keepdim=True), rows, value=-1.0)

    def _blocks(self, matrix: Float[Tensor, "d_sae d_in"]) -> tuple[Tensor, ...]:
        # On a CPU a block stays in cache between the passes over it, which makes them three to seven times faster.
        return matrix.split(max(1, 2**19 // self.d_in) if matrix.device.type == "cpu" else self.d_sae)

    @torch.no_grad()
    def rescale_(self, factor: float) -> None:
        """Rewrite the parameters for data multiplied by ``factor``: ``code(factor * x) = factor * code(x)``.

        Exact in floating point when ``factor`` is a power of two, which is the only kind the trainer uses.
        """
        for name in self.scaled:
            attrgetter(name)(self).mul_(factor)

    @property
    def device(self) -> torch.device:
        """Where its parameters live."""
        return self.W_dec.device


class LinearSAE(SAE):
    """An SAE whose pre-activations are ``(x - b_dec) @ W_enc + b_enc`` and whose variant is a selection rule.

    With ``apply_b_dec_to_input=False`` in the configuration they are ``x @ W_enc + b_enc``.
    """

    scaled: ClassVar[tuple[str, ...]] = ("b_dec", "b_enc")

    def __init__(self, d_in: int, d_sae: int, **config: Any) -> None:
        super().__init__(d_in, d_sae, **config)
        # Shape [d_in, d_sae] in every formula; in memory each latent's vector is contiguous, because sparse
        # gradients scatter into latents. Tied to the decoder at the start.
        self.W_enc = nn.Parameter(self.W_dec.detach().clone().T)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))

    @property
    def budget_over(self) -> Literal["token", "batch", "latent"] | None:
        """What shares a fixed number of selections, by size of the pre-activation or its magnitude; None: neither.

        Only with such a budget can the dictionary be split over processes.
        """
        return None

    @property
    def b_in(self) -> Tensor | None:
        """What is subtracted from the input: ``b_dec``, or nothing."""
        return self.b_dec if self.config.get("apply_b_dec_to_input", True) else None

    @abstractmethod
    def select(self, x: Tensor, grads: Tensor | None) -> SelectedPreActs:
        """Which latents represent each token, with their pre-activations; called without gradients."""

    def activate(self, pre_acts: Float[Tensor, " nnz"], indices: Int[Tensor, " nnz"]) -> Float[Tensor, " nnz"]:
        """The code's values from the selected pre-activations; differentiable. The identity unless overridden."""
        return pre_acts

    @final
    def encode(self, x: Float[Tensor, "n d_in"], grads: Float[Tensor, "n d_in"] | None = None) -> SparseCode:
        with torch.no_grad():
            selected = self.select(x, grads)
        pre_acts = kernels.pre_acts_at(x, self.W_enc, self.b_enc, self.b_in, selected)
        values = self.activate(pre_acts, selected.indices)
        return SparseCode(values, selected.indices, selected.row_ptr, self.d_sae)

    @torch.no_grad()
    def select_above(self, x: Tensor, threshold: Tensor | float) -> SelectedPreActs:
        """The pre-activations strictly above a threshold (a number or ``[d_sae]``); magnitudes when signed."""
        if isinstance(threshold, Tensor):
            threshold = threshold.to(x.dtype)
        return kernels.select_threshold(x, self.W_enc, self.b_enc, self.b_in, threshold, self.signed)

    def pre_acts(self, x: Float[Tensor, "n d_in"], latents: slice) -> Float[Tensor, "n m"]:
        """Dense pre-activations of a run of latents: for statistics, never in the training step."""
        centred = x if self.b_in is None else x - self.b_in
        return torch.addmm(self.b_enc[latents], centred, self.W_enc[:, latents])

    def aux_latents(self, dead: Int[Tensor, " m"], weight: float) -> dict[str, tuple[float, Tensor]]:
        return {"auxk": (weight, dead)}

    @torch.no_grad()
    def take_norms(self) -> Float[Tensor, " d_sae"]:
        """Give the dictionary unit rows and return the norms they had, for the encoder to take over.

        Zero rows, and rows of unit norm up to rounding, are left alone and count as 1.
        """
        norms = self.W_dec.norm(dim=1)
        norms = torch.where((norms == 0) | ((norms - 1).abs() < 1e-6), 1.0, norms)
        self.W_dec.div_(norms[:, None])
        return norms


def check_k(k: int | float, d_sae: int) -> int | float:
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


def unit_rows(W: Tensor) -> Tensor:
    """``W`` with every row divided by its norm; a zero row stays zero."""
    return W / W.norm(dim=1, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny)
