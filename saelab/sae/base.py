"""The base classes of all sparse autoencoders: a dictionary, and an encoder that chooses and weighs its latents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saelab import kernels
from saelab.devices import widest_float
from saelab.errors import UserError, first_line, near_matches
from saelab.sae import options
from saelab.sae.inference import InferenceForm
from saelab.sae.share import Share
from saelab.sparse import SparseCode

VARIANTS: dict[str, type[SAE]] = {}


class Scores(NamedTuple):
    """What selection compares on one token: latents whose score exceeds the cut are selected."""

    pre_acts: Float[Tensor, " d_sae"]
    score: Float[Tensor, " d_sae"]
    cut: Tensor | None  # a number or ``[d_sae]``; None where no threshold decides but a budget, or a rule of its own
    name: str  # what the score is, in words


class PursuitStep(NamedTuple):
    """One step of an encoder that takes one latent after the other."""

    latent: int
    coefficient: float
    residual_norm: float  # after the step
    runner_up: int
    runner_up_product: float


class SAE(nn.Module, ABC):
    """A dictionary ``W_dec [d_sae, d_in]`` (row = direction), an offset ``b_dec [d_in]``, and an encoder.

    The arguments of a variant's constructor are its configuration: they are kept in ``config``, saved as JSON and given
    back to :func:`build`. Declaring a subclass with ``variant="name"`` registers it.
    """

    variant: ClassVar[str]
    saelens: str | None = None  # the SAELens architecture of its inference form, if there is one
    signed: bool = False  # whether codes carry negative values; an option of many variants
    needs_grads: ClassVar[bool] = False  # must be trained on a cache that holds gradients of the LM loss
    transcodes: bool = False  # whether it reconstructs another place than the one it reads: a transcoder
    no_target: ClassVar[str] = "its constructor takes no d_out; let it pass **options on"  # why it cannot transcode
    W_skip: nn.Parameter | None  # [d_out, d_in], of the skip connection of a transcoder
    # Parameters and buffers (dotted names) in units of the activations: they scale when the data are rescaled.
    scaled: ClassVar[tuple[str, ...]] = ("b_dec",)
    tunable: ClassVar[tuple[str, ...]] = ()  # options that act only in training, which fine-tuning may change
    l0_option: ClassVar[str] = "k"  # which option says how many latents are active per token, if one does
    rate_factor: float = 1.0  # of the default learning rate, where a variant needs another one than most
    n_bookkeeping: int = 0  # latents at the end that carry numbers of the token, no features; metrics leave them out
    share: Share = Share()  # this process's part of a training step, set by the trainer while it runs
    only_if_set: ClassVar[tuple[str, ...]] = ()  # options that the configuration omits while they have their default
    on_host: ClassVar[tuple[str, ...]] = ()  # buffers that stay on the CPU: counts that decide, read without a wait

    def __init_subclass__(cls, variant: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        options.record(cls)
        if variant is not None:
            taken = VARIANTS.get(variant)
            # A class that is defined again, in a notebook for example, replaces its earlier definition.
            if taken is not None and _place(taken) != _place(cls):
                raise UserError(f"the variant name {variant!r} is taken by {'.'.join(_place(taken))}; choose another")
            cls.variant = variant
            VARIANTS[variant] = cls

    def __init__(self, d_in: int, d_sae: int, **config: Any) -> None:
        """``config`` is optional: the arguments of a subclass's constructor are recorded automatically."""
        super().__init__()
        if d_in < 1 or d_sae < 1:
            raise UserError(f"d_in={d_in} and d_sae={d_sae} must both be at least 1")
        self.d_in, self.d_sae, self.d_out = d_in, d_sae, d_in
        self.config: dict[str, Any] = vars(self).get("config", {"d_in": d_in, "d_sae": d_sae})
        for name in config:
            if name not in options.signature(type(self)).parameters:
                raise TypeError(f"unexpected option {name!r}")
        if VARIANTS.get(getattr(self, "variant", "")) is type(self):
            options.check_json(self.config, self.variant)
        self.W_dec = nn.Parameter(unit_rows(torch.randn(d_sae, d_in)))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.register_parameter("W_skip", None)

    @abstractmethod
    def encode(self, x: Float[Tensor, "n d_in"], grads: Float[Tensor, "n d_out"] | None = None) -> SparseCode:
        """The code of ``x``. In eval mode the code of a token does not depend on the other tokens.

        ``grads`` is the gradient of the language model's loss at ``x``; only variants with ``needs_grads`` use it.
        """

    def decode(self, code: SparseCode) -> Float[Tensor, "n d_out"]:
        """What the latents write: ``dense(code) @ W_dec + b_dec``, the reconstruction but for a skip connection."""
        return kernels.decode(code.values, code.indices, code.row_ptr, self.W_dec, self.b_dec, code.by)

    def skipped(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_out"] | None:
        """What the skip connection carries, ``x @ W_skip^T``; None without one."""
        return None if self.W_skip is None else x @ self.W_skip.T

    def to_decode(self, x: Float[Tensor, "n d_in"], target: Tensor | None) -> Float[Tensor, "n d_out"]:
        """What the latents shall write: the input, or a target without what the skip connection carries."""
        skipped = self.skipped(x)
        return x if target is None else target if skipped is None else target - skipped

    def reconstruct(self, x: Float[Tensor, "n d_in"], code: SparseCode) -> Float[Tensor, "n d_out"]:
        """The reconstruction from the input and its code: :meth:`decode`, and what a skip connection carries."""
        recon, skipped = self.decode(code), self.skipped(x)
        return recon if skipped is None else recon + skipped

    def forward(self, x: Float[Tensor, "n d_in"], grads: Tensor | None = None) -> Float[Tensor, "n d_out"]:
        return self.reconstruct(x, self.encode(x, grads))

    def reconstruction_loss(self, x: Float[Tensor, "n d_out"], code: SparseCode) -> tuple[Tensor, Tensor]:
        """The objective's first term, summed over tokens and dimensions, and the reconstruction without gradient.

        ``x`` is what shall be decoded: the input, or a target without what the skip connection carries. The term is the
        squared error; nested dictionaries replace it.
        """
        per_token, recon = kernels.sse(x, code.values, code.indices, code.row_ptr, self.W_dec, self.b_dec, code.by)
        return per_token.sum(), recon

    def extra_losses(self, x: Tensor, code: SparseCode, error: Float[Tensor, "n d_out"]) -> dict[str, Tensor]:
        """Terms of the variant's own objective (a sparsity penalty, say), each a mean per token, weighted.

        ``error [n, d_out]`` is what the reconstruction lacks, without gradient. The trainer divides them, like the
        reconstruction term, by the data's mean squared deviation.
        """
        return {}

    def aux_latents(self, dead: Int[Tensor, " m"], weight: float) -> dict[str, tuple[float, Tensor]]:
        """The latents that shall help to explain the residual (AuxK): loss term -> (weight, latents).

        ``dead`` lists the latents that have not fired for long, ``weight`` is the trainer's weight for them. Empty for
        variants without such a loss.
        """
        return {}

    # A GPU would have to be waited for to learn how many latents a rule chooses. A class that overrides aux_latents
    # with a rule of its own can spare that by overriding the three methods below, too.

    def aux_marks(self, dead: Bool[Tensor, " d_sae"], weight: float) -> dict[str, tuple[float, Tensor]]:
        """:meth:`aux_latents` with masks ``[d_sae]`` in place of lists; ``dead`` itself where a term is about these."""
        return {}

    def aux_ahead(self, n: int, steps: int) -> Bool[Tensor, " d_sae"]:
        """Which latents, besides the dead, :meth:`aux_marks` may mark now and after up to ``steps`` batches of n."""
        raise NotImplementedError(f"{type(self).__name__} has aux_marks, and so needs aux_ahead")

    def aux_renews(self, step: int) -> bool:
        """Whether what :meth:`aux_ahead` said before no longer holds in step number ``step``."""
        return False

    def schedule(self, step: int, n_steps: int) -> None:
        """Set what depends only on the step (warm-ups), before each step; a resumed run needs no memory of it."""

    # The methods below keep their state in buffers, so that a resumed run continues exactly where it stopped.

    def observe(self, x: Tensor, code: SparseCode, grads: Tensor | None) -> None:
        """Update running statistics from a training batch and its code; called once per step, without gradients."""

    def after_step(self, step: int, n_steps: int) -> None:
        """Apply phases and constraints of the variant after each optimizer step, without gradients."""

    def lr_scale(self, step: int, n_steps: int) -> float:
        """The factor on the learning rate of a step, for variants that train in phases."""
        return 1.0

    def diagnostics(self) -> dict[str, float | Tensor]:
        """Numbers of the variant for the training log; tensors of one number stay on the device until it is written."""
        return {}

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Estimate what inference needs (thresholds) on a sample of training activations, once training has ended."""

    def remarks(self) -> list[str]:
        """What a user should know about the trained SAE, one sentence each; usually nothing."""
        return []

    @property
    def n_features(self) -> int:
        """Latents that stand for features: all but those of the bookkeeping."""
        return self.d_sae - self.n_bookkeeping

    @property
    def directions(self) -> Float[Tensor, "n_features d_out"]:
        """The rows of ``W_dec`` that stand for features."""
        return self.W_dec[: self.n_features]

    @property
    def reader(self) -> SAE:
        """The SAE that holds the encoder: this one, unless it wraps another."""
        return self

    def as_read(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """Activations as the encoder of ``reader`` reads them."""
        return x

    def features(self, code: SparseCode) -> SparseCode:
        """A code of this SAE without bookkeeping latents: they are in every token's reconstruction."""
        return code.first(self.n_features) if self.n_bookkeeping else code

    @property
    def selects_by_gradient(self) -> bool:
        """Whether codes in eval mode depend on ``grads``, which contain the next token."""
        return False

    @property
    def b_in(self) -> Tensor | None:
        """The vector that is subtracted from the input before it is encoded: ``b_dec``, unless overridden, or None."""
        return self.b_dec

    def inference_threshold(self) -> Tensor | None:
        """The threshold on pre-activations in eval mode, a number or ``[d_sae]``; None where k or the sign decides."""
        return None

    def inference_form(self) -> InferenceForm | None:
        """What the SAE computes in eval mode, in SAELens' terms; None where other tools have no such rule."""
        return None

    def why_no_form(self) -> str:
        """Why :meth:`inference_form` is None, as the predicate of a sentence about the SAE."""
        if self.selects_by_gradient:
            return "uses gradients of the language model's loss at inference"
        return "has no linear encoder on raw activations"

    def contest(self, x: Float[Tensor, "1 d_in"], grads: Float[Tensor, "1 d_out"] | None = None) -> Scores | None:
        """The scores compared by selection on one token in eval mode; None where latents do not compete all at once."""
        return None

    def replay(self, x: Float[Tensor, " d_in"]) -> tuple[list[PursuitStep], float] | None:
        """The steps that make a token's code, and the norm of the first residual; None if it is made at once."""
        return None

    @torch.no_grad()
    def initialise(self, x: Float[Tensor, "n d_in"], b_dec: Float[Tensor, " d_out"]) -> None:
        """Set data-dependent parameters from a sample ``x`` and its centre ``b_dec``, before the first step.

        For a transcoder the centre is that of the target, and :meth:`saelab.sae.LinearSAE.initialise_map` follows.
        """
        self.b_dec.copy_(b_dec)

    @torch.no_grad()
    def before_fine_tuning(self, scale: float) -> None:
        """Prepare trained weights, of any tool, for fine-tuning on data that is multiplied by ``scale``.

        The weights stay in units of raw activations, and reconstructions do not change.
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
    def rescale_(self, factor: float, of_input: float | None = None) -> None:
        """Rewrite the parameters for data multiplied by ``factor``: ``code(factor * x) = factor * code(x)``.

        A transcoder's target is multiplied by ``factor`` and its input by ``of_input``: ``code(of_input * x) = factor *
        code(x)``. Exact in floating point for powers of two, which are the only factors the trainer uses.
        """
        for name in self.scaled:
            attrgetter(name)(self).mul_(factor)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode inside the block; the former mode is restored afterwards, also after an error."""
        training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SAE:
        def moved(x: Tensor) -> Tensor:
            if x.dtype == torch.float64 and not isinstance(x, nn.Parameter):
                # Buffers in float64 could not move to a device without it.
                x = x.to(widest_float(fn(torch.empty(0, device=x.device)).device))
            return fn(x)

        kept = {name: self._buffers[name] for name in self.on_host}
        done = super()._apply(moved, recurse)
        self._buffers.update(kept)
        return done

    @property
    def device(self) -> torch.device:
        """The device of its parameters."""
        return self.W_dec.device


def _place(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def check_k(k: int | float, d_sae: int) -> int | float:
    """``k`` if a token can spend it on ``d_sae`` latents."""
    if not 1 <= k <= d_sae:
        raise UserError(f"k={k} is outside 1..d_sae={d_sae}; lower k or widen the SAE")
    return k


def check_share(name: str, value: float) -> float:
    """``value`` if it is a share of a run's steps."""
    if not 0 <= value <= 1:
        raise UserError(f"{name}={value} is a share of the run, between 0 and 1")
    return value


def progress(share: float, step: int, n_steps: int) -> float:
    """How much of a warm-up over a ``share`` of the steps is done before ``step``: 0 at first, 1 from its end on."""
    return min(1.0, step / (share * n_steps)) if share else 1.0


def current(variant: str, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The current names of a variant and its options, from those in a file of an older release."""
    options = dict(config)
    if variant == "abs_topk" and options.pop("scope", "token") == "batch":
        return "batch_topk", {**options, "signed": True}
    return variant, options


def build(variant: str, d_in: int, d_sae: int, **config: Any) -> SAE:
    """Construct a variant by its registry name. ``l0`` is understood by every variant with such a number."""
    if variant not in VARIANTS:
        raise UserError(f"unknown variant {variant!r}: {near_matches(variant, VARIANTS)}")
    config = options.with_l0(VARIANTS[variant], config)
    known = options.signature(VARIANTS[variant]).parameters
    if config.get("d_out") is not None and "d_out" not in known:
        raise UserError(f"{variant} cannot be trained on a target: {VARIANTS[variant].no_target}")
    for name in sorted(config.keys() - known.keys()):
        raise UserError(f"variant {variant!r} has no option {name!r}: {near_matches(name, known)}")
    try:
        return VARIANTS[variant](d_in=d_in, d_sae=d_sae, **config)
    except TypeError as error:
        raise UserError(f"variant {variant!r}: {first_line(error)}") from error


def unit_rows(W: Tensor) -> Tensor:
    """``W`` with every row divided by its norm; a zero row stays zero."""
    return W / W.norm(dim=1, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny)
