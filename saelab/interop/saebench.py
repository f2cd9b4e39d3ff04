"""SAEBench: wrap an SAE as its ``BaseSAE``, and run its core evaluation on any model that saelab can load.

SAEBench (0.6) loads models by TransformerLens' list of names, which knows no local folders. Its measuring code takes
any hooked model, so :func:`core` hands it one. It must be installed beside saelab: ``pip install sae-bench``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.errors import UserError
from saelab.interop.conversion import SIGNED
from saelab.interop.foreign import Foreign
from saelab.interop.formats.saelens import ARCHITECTURES
from saelab.lm.hook_names import layer_of
from saelab.sae import SAE
from saelab.sae.inference import InferenceForm, doubled


def as_base_sae(sae: SAE, model_name: str, hook_name: str, context_size: int = 128) -> Any:
    """``sae`` as an instance of SAEBench's ``BaseSAE``, whose ``encode`` gives dense codes ``[..., d_sae]``.

    SAEBench takes an activation for positive (it counts ``> 0``), so a signed SAE becomes the equivalent unsigned one
    of twice the width. Pass the result as ``(name, adapter)`` to any of its evaluations, or to :func:`core`.
    """
    base = _sae_bench("custom_saes.base_sae").BaseSAE
    layer = layer_of(hook_name)
    if layer is None:
        raise UserError(
            f"hook {hook_name!r} names no layer, which SAEBench needs; give one such as blocks.9.hook_resid_post"
        )
    form = sae.inference_form()
    if form is None:
        raise UserError(f"a {sae.variant} SAE {sae.why_no_form()}; SAEBench cannot evaluate it")
    if form.d_out is not None:
        raise UserError("SAEBench evaluates SAEs, and this is a transcoder; `saelab evaluate` measures it")
    inner = of_form(doubled(form)) if form.architecture in SIGNED else sae.eval()

    class Adapter(base):
        def __init__(self) -> None:
            device, dtype = inner.device, inner.W_dec.dtype
            super().__init__(inner.d_in, inner.d_sae, model_name, layer, device, dtype, hook_name)
            self.inner = inner
            self.cfg.architecture, self.cfg.context_size = form.architecture, context_size
            with torch.no_grad():
                for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
                    value = getattr(inner, name, inner.W_dec.T if name == "W_enc" else None)
                    if value is not None:
                        getattr(self, name).copy_(value)

        def encode(self, x: Tensor) -> Tensor:
            code = self.inner.encode(x.reshape(-1, x.shape[-1]))
            return code.dense().reshape(*x.shape[:-1], self.inner.d_sae)

        def decode(self, feature_acts: Tensor) -> Tensor:
            return feature_acts @ self.inner.W_dec + self.inner.b_dec

        def forward(self, x: Tensor) -> Tensor:
            return self.decode(self.encode(x))

    return Adapter()


def core(
    adapter: Any,
    model: Any,
    dataset: Path | str,
    *,
    n_reconstruction_batches: int = 10,
    n_sparsity_batches: int = 1,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """SAEBench's core evaluation (its code, its formulas) of an adapter in ``model``; metrics by category.

    ``model`` is what :func:`saelab.load_model` returns. ``dataset`` is a folder of text that ``datasets`` can load
    (``train.jsonl`` with a ``text`` field, say) or a hub id. A batch is ``batch_size`` prompts of the adapter's
    context size.
    """
    main, general = _sae_bench("evals.core.main"), _sae_bench("sae_bench_utils.general_utils")
    config = _sae_bench("evals.core.eval_config").CoreEvalConfig(
        model_name=adapter.cfg.model_name,
        dataset=str(dataset),
        context_size=adapter.cfg.context_size,
        batch_size_prompts=batch_size,
        n_eval_reconstruction_batches=n_reconstruction_batches,
        n_eval_sparsity_variance_batches=n_sparsity_batches,
        **{f"compute_{what}": True for what in COMPUTED},
    )
    general.load_and_format_sae("saelab", adapter, str(adapter.device))  # fills in what the store reads
    store = main.ActivationsStore.from_sae(model, adapter, dataset=str(dataset), context_size=config.context_size)
    special = {getattr(model.tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos")} - {None}
    metrics, features = main.run_evals(adapter, store, model, config, ignore_tokens=special)
    return {**metrics, "misc_metrics": main.calculate_misc_metrics(features)}


COMPUTED = (
    *("kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics"),
    *("featurewise_density_statistics", "featurewise_weight_based_metrics"),
)


def of_form(form: InferenceForm) -> SAE:
    """The SAE that computes an inference form."""
    t = form.tensors
    return Foreign(
        format="saelab",
        architecture=ARCHITECTURES[form.architecture],
        W_dec=t["W_dec"],
        b_dec=t["b_dec"],
        W_enc=t["W_enc"],
        b_enc=t["b_enc"],
        k=form.config.get("k"),
        threshold=t.get("threshold"),
        subtracts_b_dec=form.config["apply_b_dec_to_input"],
    ).to_sae()


def _sae_bench(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"sae_bench.{module}")
    except ImportError as error:
        raise UserError(f"SAEBench cannot be imported here ({error}); pip install sae-bench") from error
