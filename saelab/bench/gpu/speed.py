"""Times on one device: the kernels, whole training steps, and what other libraries do with the same batch."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from saelab import kernels
from saelab.data.cache import ActivationCache, Batch
from saelab.kernels.precision import use_precision
from saelab.sae import build
from saelab.training import TrainConfig, start, train_steps

Shape = tuple[int, int, int, int]  # tokens, d_in, d_sae, k


def wait(device: torch.device) -> None:
    """Until the device has done what was started."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(work: Callable[[], object], device: torch.device, at_most: float = 1.0) -> float:
    """Median time of one call, in milliseconds, after two that do not count; about ``at_most`` seconds in all."""
    for _ in range(2):
        work()
    wait(device)
    times, end = [], time.perf_counter() + at_most
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 50):
        begun = time.perf_counter()
        work()
        wait(device)
        times.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(times)


def per_step(step: Callable[[], object], device: torch.device, steps: int) -> float:
    """Milliseconds per step of a row of steps, between which nothing waits for the device."""
    for _ in range(4):
        step()
    wait(device)
    begun = time.perf_counter()
    for _ in range(steps):
        step()
    wait(device)
    return 1e3 * (time.perf_counter() - begun) / steps


def kernel_times(shape: Shape, device: torch.device) -> dict[str, float]:
    """The ops of a step on their own, and the products that bound them."""
    n, d_in, d_sae, k = shape
    x = torch.randn(n, d_in, device=device)
    W_dec = F.normalize(torch.randn(d_sae, d_in, device=device), dim=1)
    encoder = W_dec.clone().T, torch.zeros(d_sae, device=device), torch.zeros(d_in, device=device)
    found: dict[str, float] = {}

    def add(name: str, work: Callable[[], object]) -> None:
        found[name] = milliseconds(work, device)

    out = torch.empty(min(n, 2048), d_sae, device=device)  # of a part: z as a whole may not fit beside the weights
    add(f"product fp32 [{len(out)} tokens]", lambda: torch.mm(x[: len(out)], encoder[0], out=out))
    x16, W16, out16 = x.bfloat16()[: len(out)], encoder[0].bfloat16(), out.bfloat16()
    add(f"product bf16 [{len(out)} tokens]", lambda: torch.mm(x16, W16, out=out16))
    add(f"torch.topk of a product [{len(out)} tokens]", lambda: out.topk(k, dim=1, sorted=False))
    del out, out16, x16, W16
    for precision in ("fp32", "bf16"):
        with use_precision(precision):
            add(f"select_topk {precision}", lambda: kernels.select_topk(x, *encoder, k=k))
            add(f"select_batch {precision}", lambda: kernels.select_batch(x, *encoder, budget=n * k))
    code = kernels.select_topk(x, *encoder, k=k)
    add("decode", lambda: kernels.decode(code.values, code.indices, code.row_ptr, W_dec, encoder[2]))
    leaves = [t.clone().requires_grad_() for t in (*encoder, W_dec)]

    def forward_and_backward() -> None:
        W_enc, b_enc, b_dec, W = leaves
        values = kernels.pre_acts_at(x, W_enc, b_enc, b_dec, code)
        kernels.sse(x, values, code.indices, code.row_ptr, W, b_dec)[0].sum().backward()
        for leaf in leaves:
            leaf.grad = None

    add("loss and all gradients of a code", forward_and_backward)
    return found


class Trainer:
    """saelab's own training step on one batch, without a reader."""

    def __init__(self, shape: Shape, device: torch.device, precision: Any, variant: str = "topk") -> None:
        n, d_in, d_sae, k = shape
        self.folder = tempfile.TemporaryDirectory()
        cache = ActivationCache.from_tensors(
            Path(self.folder.name) / "cache", torch.randn(n, d_in), dtype="float16", held_out=0.0
        )
        torch.manual_seed(0)
        with torch.device(device):
            sae = build(variant, d_in, d_sae, **({"k": k} if "topk" in variant else {}))
        config = TrainConfig(epochs=1_000_000, batch_size=n, lr=1e-4, precision=precision)
        config = config.resolved(sae, cache)
        state = start(sae, cache, config)
        tokens = torch.zeros(n, dtype=torch.int64)
        batch = Batch(torch.randn(n, d_in, device=device), None, tokens, tokens)
        self.steps: Iterator[Any] = train_steps(sae, cache, config, state, stream=itertools.repeat(batch))

    def step(self) -> None:
        next(self.steps)

    def close(self) -> None:
        self.steps.close()  # pyright: ignore[reportAttributeAccessIssue]
        self.folder.cleanup()


class Dense:
    """What a user would write in twenty lines: bf16 autocast, dense codes, all gradients by autograd, fused Adam."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        n, d_in, d_sae, self.k = shape
        directions = F.normalize(torch.randn(d_sae, d_in, device=device), dim=1)
        self.W_dec, self.W_enc = directions.clone().requires_grad_(), directions.T.contiguous().requires_grad_()
        self.b_enc = torch.zeros(d_sae, device=device, requires_grad=True)
        self.b_dec = torch.zeros(d_in, device=device, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.W_dec, self.W_enc, self.b_enc, self.b_dec], lr=1e-4, fused=True)
        self.x = torch.randn(n, d_in, device=device)

    def loss(self) -> Tensor:
        with torch.autocast(self.x.device.type, dtype=torch.bfloat16):
            z = (self.x - self.b_dec) @ self.W_enc + self.b_enc
            top = z.topk(self.k, dim=1, sorted=False)
            acts = torch.zeros_like(z).scatter(1, top.indices, top.values.relu())
            return (acts @ self.W_dec + self.b_dec - self.x).square().sum() / len(self.x)

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def close(self) -> None:
        pass


class _Scattered(torch.autograd.Function):
    """The top values of a dense layer; in the backward pass each (token, winner) makes a vector for its row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, indices = F.relu(F.linear(x, W, b)).topk(k, dim=1, sorted=False)
        ctx.save_for_backward(x, indices)
        ctx.rows = len(W)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[None, Tensor, Tensor, None]:  # pyright: ignore
        x, indices = ctx.saved_tensors
        flat, rows = indices.reshape(-1), (grad[:, :, None] * x[:, None, :]).reshape(-1, x.shape[1])
        d_W = x.new_zeros(ctx.rows, x.shape[1]).index_add_(0, flat, rows)
        return None, d_W, grad.new_zeros(ctx.rows).index_add_(0, flat, grad.reshape(-1)), None


class RowScatter(Dense):
    """The structure of sparsify: a dense product, embedding-bag decoding, gradients scattered row by row; in bf16."""

    def loss(self) -> Tensor:
        x, W, b = (self.x - self.b_dec).bfloat16(), self.W_enc.T.bfloat16(), self.b_enc.bfloat16()
        values, indices = _Scattered.apply(x, W, b, self.k)  # pyright: ignore
        bag = F.embedding_bag(indices, self.W_dec.bfloat16(), mode="sum", per_sample_weights=values)
        return (bag.float() + self.b_dec - self.x).square().sum() / len(self.x)


class _Ops(TorchDispatchMode):
    """Counts operations that compute; on a device without a profiler of launches."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not getattr(func, "is_view", False):
            self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


def counts(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Kernels that a step launches, where it makes the host wait, and the milliseconds that the device is busy.

    Without CUDA: the operations that compute.
    """
    if device.type != "cuda":
        with _Ops() as ops:
            step()
        return {"operations": sum(ops.names.values())}
    from torch.profiler import ProfilerActivity, profile

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
    wait(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        for _ in range(3):
            step()
        wait(device)
    events = [e for e in profiled.events() or [] if str(e.device_type).endswith("CUDA")]
    busy: Counter[str] = Counter()
    for event in events:
        busy[event.name[:60]] += event.time_range.elapsed_us() / 3e3
    return {
        "launches": len(events) / 3,
        "host waits": sum(places.values()),
        "host waits at": dict(places),
        "busy milliseconds": sum(busy.values()),
        "longest kernels": dict(busy.most_common(12)),
    }
