"""SAEs with a linear encoder, and what they reconstruct: their input, or a target at another place (transcoders)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saelab import kernels
from saelab.devices import widest_float
from saelab.errors import UserError
from saelab.kernels import SelectedPreActs
from saelab.sae.base import SAE, Scores, unit_rows
from saelab.sae.inference import TWO_SIDED, InferenceForm
from saelab.sparse import SparseCode


class LinearSAE(SAE):
    """An SAE whose pre-activations are ``(x - b_dec) @ W_enc + b_enc`` and whose variant is a selection rule.

    With ``apply_b_dec_to_input=False`` in the configuration they are ``x @ W_enc + b_enc``.

    With ``d_out`` it is a transcoder: it reconstructs a target ``[n, d_out]``, the activations at another place, with
    ``W_dec [d_sae, d_out]`` and ``b_dec [d_out]``, and its pre-activations are ``x @ W_enc + b_enc``. Codes are then in
    units of the target, because rows of ``W_dec`` have unit norm. With ``skip`` the reconstruction is ``dense(code) @
    W_dec + b_dec + x @ W_skip^T`` (Paulo et al., 2025, arXiv 2501.18823).
    """

    centre: Tensor  # [d_in], of transcoders only
    scaled: ClassVar[tuple[str, ...]] = ("b_dec", "b_enc")
    only_if_set: ClassVar[tuple[str, ...]] = ("d_out", "skip")

    def __init__(self, d_in: int, d_sae: int, d_out: int | None = None, skip: bool = False, **config: Any) -> None:
        """
        Args:
            d_out: Width of the target, for an SAE that reconstructs another place than the one it reads.
            skip: Add an affine skip connection from the input to the target, which then needs no latents for what is
                linear in the input.
        """
        super().__init__(d_in, d_sae, **config)
        # Shape [d_in, d_sae] in every formula; in memory each latent's vector is contiguous, because sparse
        # gradients scatter into latents. Tied to the decoder at the start.
        self.W_enc = nn.Parameter(self.W_dec.detach().clone().T)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        if d_out is not None:
            self._aim(d_out, skip)
        elif skip:
            raise UserError("skip is a connection to a target, and this SAE reconstructs its input; leave it out")

    def _aim(self, d_out: int, skip: bool) -> None:
        """Become a transcoder."""
        if d_out < 1:
            raise UserError(f"d_out={d_out} must be at least 1")
        self.transcodes, self.d_out = True, d_out
        self.register_buffer("centre", torch.zeros(self.d_in))
        if d_out != self.d_in:
            self.W_dec = nn.Parameter(unit_rows(torch.randn(self.d_sae, d_out)))
            self.b_dec = nn.Parameter(torch.zeros(d_out))
        if skip:
            self.W_skip = nn.Parameter(torch.zeros(d_out, self.d_in))

    @torch.no_grad()
    def initialise_map(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"]) -> None:
        """Set what a transcoder knows of its data before the first step, after ``initialise``.

        The input is centred on the mean of ``x`` until :meth:`uncentre`. Each row of the decoder is
        its latent's encoder direction, carried over by the nearest partial isometry to the cross-covariance of input
        and target (orthogonal Procrustes): what a latent writes goes along with what it reads, and the rows differ as
        much as the encoder's. For ``target = x`` that is the tied start of an SAE.
        """
        self.centre.copy_(x.mean(dim=0))
        U, _, Vh = torch.linalg.svd((x - self.centre).T @ (target - target.mean(dim=0)), full_matrices=False)
        rows = self.W_enc.T @ U @ Vh
        lost = rows.norm(dim=1, keepdim=True) < 1e-3  # to a narrower target: a direction with no counterpart
        self.W_dec.copy_(unit_rows(torch.where(lost, self.W_dec, rows)))

    @torch.no_grad()
    def centre_on(self, mean: Float[Tensor, " d_in"]) -> None:
        """Subtract ``mean`` from a transcoder's input, and let the biases give it back: what is computed stays.

        Training is better conditioned so: far from the origin most of a step in ``W_enc`` acts like one in ``b_enc``.
        """
        shift = (mean - self.centre).to(widest_float(self.device))
        self.shift_biases_(shift @ self.W_enc.to(shift))
        if self.W_skip is not None:
            self.b_dec.add_((self.W_skip.to(shift) @ shift).to(self.b_dec))
        self.centre.copy_(mean)

    def shift_biases_(self, shift: Float[Tensor, " d_sae"]) -> None:
        """Let the biases make up for products ``x @ W_enc`` that are smaller by ``shift``."""
        self.b_enc.add_(shift.to(self.b_enc))

    def uncentre(self) -> None:
        """Move what is subtracted from the input into the biases."""
        self.centre_on(torch.zeros_like(self.centre))

    def skipped(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_out"] | None:
        """What the skip connection carries, ``x @ W_skip^T`` (of the centred input in training); None without one."""
        return None if self.W_skip is None else (x - self.centre) @ self.W_skip.T

    @torch.no_grad()
    def rescale_(self, factor: float, of_input: float | None = None) -> None:
        super().rescale_(factor)
        if self.transcodes:
            of_input = factor if of_input is None else of_input
            self.centre.mul_(of_input)
            for matrix in (self.W_enc, self.W_skip):
                if matrix is not None:
                    matrix.mul_(factor / of_input)

    @property
    def budget_over(self) -> Literal["token", "batch", "latent"] | None:
        """The unit that has a fixed number of selections: a token, the batch or a latent; None without a budget.

        Only with such a budget can the dictionary be split over processes.
        """
        return None

    @property
    def budget(self) -> int | float:
        """Latents per token that a variant with ``budget_over`` currently selects: its option ``k``."""
        return self.config["k"]

    def join(self, part: int, gather: Callable[[Tensor], Tensor]) -> None:
        """Become part number ``part`` of a dictionary that is split over processes; for variants with ``budget_over``.

        ``gather`` stacks a tensor over all parts, ``[parts, ...]``; every process calls it at the same places.
        """

    @property
    def b_in(self) -> Tensor | None:
        """The vector that is subtracted from the input: ``b_dec``, or None.

        A transcoder's ``b_dec`` lies elsewhere: its input is centred in training, and by zeros afterwards.
        """
        if self.transcodes:
            return self.centre
        return self.b_dec if self.config.get("apply_b_dec_to_input", True) else None

    @abstractmethod
    def select(self, x: Tensor, grads: Tensor | None) -> SelectedPreActs:
        """Which latents represent each token, with their pre-activations; called without gradients."""

    def activate(self, pre_acts: Float[Tensor, " nnz"], indices: Int[Tensor, " nnz"]) -> Float[Tensor, " nnz"]:
        """The code's values from the selected pre-activations; differentiable. The identity unless overridden."""
        return pre_acts

    @final
    def encode(self, x: Float[Tensor, "n d_in"], grads: Float[Tensor, "n d_out"] | None = None) -> SparseCode:
        with torch.no_grad():
            selected = self.select(x, grads)
        by = kernels.ByLatent(*selected[1:], self.d_sae)
        pre_acts = kernels.pre_acts_at(x, self.W_enc, self.b_enc, self.b_in, selected, by)
        return SparseCode(self.activate(pre_acts, selected.indices), *selected[1:], self.d_sae, by, pre_acts)

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
    def contest(self, x: Float[Tensor, "1 d_in"], grads: Float[Tensor, "1 d_out"] | None = None) -> Scores:
        """The pre-activations, or their magnitudes where signs are kept, and the threshold at inference if any."""
        u, cut = self.pre_acts(x, slice(0, self.d_sae))[0], self.inference_threshold()
        name = "magnitude of the pre-activation" if self.signed else "pre-activation"
        return Scores(u, u.abs() if self.signed else u, None if cut is None else cut.to(u), name)

    @torch.no_grad()
    def inference_form(self) -> InferenceForm | None:
        """The form of a variant that names its SAELens architecture in ``saelens`` or has a threshold."""
        threshold = self.inference_threshold()
        if self.saelens is None and threshold is None:
            return None
        if self.transcodes and not self.centre.is_meta and bool(self.centre.any()):
            return None  # in training
        tensors: dict[str, Tensor] = {name: getattr(self, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        config: dict[str, Any] = {"apply_b_dec_to_input": not self.transcodes and self.b_in is not None}
        if threshold is not None:
            # A threshold per latent has fewer numbers than d_sae where processes have divided the parameters.
            threshold = threshold.to(self.W_dec.dtype)
            tensors["threshold"] = threshold if threshold.ndim else threshold.expand(self.d_sae)
        elif self.saelens in {"topk", "abstopk"}:
            config |= {"k": int(self.config["k"]), "rescale_acts_by_decoder_norm": False}
        return InferenceForm(self.saelens or TWO_SIDED, *self._with_target(tensors, config))

    def _with_target(self, tensors: dict[str, Tensor], config: dict[str, Any]) -> tuple[Any, Any, int | None]:
        """The tensors and keys of a form, and of a transcoder the width of its target."""
        if not self.transcodes:
            return tensors, config, None
        skip = {} if self.W_skip is None else {"W_skip": self.W_skip}
        return {**tensors, **skip}, {**config, "d_out": self.d_out}, self.d_out

    def why_no_form(self) -> str:
        if self.selects_by_gradient:
            return super().why_no_form()
        return "selects latents by a rule of its own (its class declares neither `saelens` nor `inference_threshold()`)"

    @torch.no_grad()
    def take_norms(self) -> Float[Tensor, " d_sae"]:
        """Give the dictionary unit rows and return the norms they had, for the encoder to take over.

        Zero rows, and rows of unit norm up to rounding, are left alone and count as 1.
        """
        norms = self.W_dec.norm(dim=1)
        norms = torch.where((norms == 0) | ((norms - 1).abs() < 1e-6), 1.0, norms)
        self.W_dec.div_(norms[:, None])
        return norms
