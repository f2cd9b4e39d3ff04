"""A training run and an index from a cache on disk, as a user starts them: how fast, whether it learns and repeats."""

from __future__ import annotations

import importlib.util
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from saelab.bench.gpu.speed import wait
from saelab.data.cache import ActivationCache
from saelab.kernels import default_precision
from saelab.sae import SAE, build
from saelab.training import TrainConfig, train_steps


def planted_cache(folder: Path, n: int, d_in: int, atoms: int, device: torch.device, **text: Any) -> ActivationCache:
    """Sparse combinations of planted directions with noise, in float16; ``text`` are its tokens and their context."""
    generator = torch.Generator(device=device).manual_seed(0)
    directions = F.normalize(torch.randn(atoms, d_in, generator=generator, device=device), dim=1)
    acts = torch.empty(n, d_in, dtype=torch.float16)
    for part in torch.arange(n).split(50_000):
        size = torch.rand(len(part), 16, generator=generator, device=device) + 0.5
        which = (torch.rand(len(part), 16, generator=generator, device=device) ** 2 * atoms).long()
        noise = 0.05 * torch.randn(len(part), d_in, generator=generator, device=device)
        acts[part] = ((size[..., None] * directions[which]).sum(1) + noise).half().cpu()
    return ActivationCache.from_tensors(folder, acts, dtype="float16", held_out=0.02, **text)


def reading(cache: ActivationCache, batch_size: int, device: torch.device, seconds: float) -> float:
    """Tokens a second of the reader alone, on its way to the device."""
    rows, batches = 0, cache.batches(batch_size, drop_last=True, device=device)
    next(batches)
    begun = time.perf_counter()
    for batch in batches:
        rows += len(batch.acts)
        if time.perf_counter() - begun > seconds:
            break
    wait(device)
    batches.close()
    return rows / (time.perf_counter() - begun)


def run(
    cache: ActivationCache, sae: SAE, config: TrainConfig, steps: int, enough: Callable[[], bool]
) -> dict[str, Any]:
    """The first steps of a run; its speed is that after the fifth."""
    device, first, last, begun = sae.device, None, None, 0.0
    trained = train_steps(sae, cache, config)
    for last in itertools.islice(trained, steps):
        first = first or last
        if last.step == 5:
            wait(device)
            begun = time.perf_counter()
        if enough():
            break
    wait(device)
    seconds = time.perf_counter() - begun
    trained.close()
    assert first is not None
    assert last is not None
    return {
        "steps": last.step,
        "tokens/s": (last.step - 5) * config.batch_size / seconds if last.step > 5 else None,
        "first fvu": first.fvu,
        "last fvu": last.fvu,
        "l0": last.l0,
        "dead": last.dead,
    }


def measure(device: torch.device, tiny: bool, enough: Callable[[], bool]) -> dict[str, Any]:
    """Every variant's run, and two equal runs compared bit for bit."""
    n, d_in, d_sae, k, batch = (900, 24, 96, 4, 64) if tiny else (1_000_000, 768, 24_576, 32, 4096)
    found: dict[str, Any] = {"size": [n, d_in, d_sae, k, batch]}
    plan: list[tuple[str, Any, int, dict[str, Any]]] = [
        ("topk", "auto", 600, {"k": k}),
        ("topk", "fp32", 100, {"k": k}),
        ("batch_topk", "auto", 100, {"k": k}),
        ("jump_relu", "auto", 60, {}),
    ]
    with tempfile.TemporaryDirectory() as name:
        cache = planted_cache(Path(name) / "cache", n, d_in, d_sae // 2, device)
        found["reader alone, tokens/s"] = reading(cache, batch, device, 0.1 if tiny else 6)

        def trained(variant: str, precision: Any, steps: int, options: dict[str, Any]) -> tuple[SAE, dict[str, Any]]:
            torch.manual_seed(0)
            sae = build(variant, d_in, d_sae, **options).to(device)
            config = TrainConfig(epochs=4, batch_size=batch, precision=precision)
            return sae, run(cache, sae, config, 8 if tiny else steps, enough)

        for variant, precision, steps, options in plan:
            if not enough():
                found[f"{variant} {precision}"] = trained(variant, precision, steps, options)[1]
        if not enough():
            # Two equal numbers of steps: a run that is cut short by the clock compares with nothing.
            a, b = (trained("topk", "auto", 30, {"k": k})[0].state_dict() for _ in range(2))
            found["two equal runs agree"] = {name: bool(torch.equal(a[name], b[name])) for name in a}
    return found


def index(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Seconds of an index and of encoding alone, which is timed before and after it."""
    missing = [name for name in ("pyarrow", "scipy") if importlib.util.find_spec(name) is None]
    if missing:
        return {"not measured": f"needs {' and '.join(missing)}"}
    from saelab.features.indexing.builder import batch_rows, build_index
    from saelab.features.indexing.config import IndexConfig

    n, d_in, d_sae, k = (512, 24, 96, 4) if tiny else (262_144, 768, 16_384, 32)
    torch.manual_seed(0)
    sae = build("topk", d_in, d_sae, k=k).to(device).eval()
    with tempfile.TemporaryDirectory() as name, torch.no_grad(), sae.evaluating(), default_precision("auto"):
        tokens, texts = (torch.rand(n) ** 6 * 1000).long(), [f" t{i}" for i in range(1000)]
        cache = planted_cache(Path(name) / "cache", n, d_in, d_sae // 2, device, tokens=tokens, context_length=128)
        rows = batch_rows(sae, IndexConfig())

        def encode() -> float:
            begun = time.perf_counter()
            for batch in cache.head(n, rows):
                sae.encode(batch.acts.to(device))
            wait(device)
            return time.perf_counter() - begun

        encode()
        alone = [encode()]
        begun = time.perf_counter()
        meta = build_index(sae, cache, Path(name) / "run", token_strings=texts).meta
        seconds = time.perf_counter() - begun
        alone.append(encode())
    encoding = sum(alone) / len(alone)
    return {
        "tokens": n,
        "latents": d_sae,
        "encode_seconds": encoding,
        "index_seconds": seconds,
        "of which encoding": meta["encode_seconds"],
        "index/encode": seconds / encoding,
    }
