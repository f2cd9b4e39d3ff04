"""Compile every Triton kernel in every configuration in use, for GPUs that need not be there; print a JSON line each.

Run in a process of its own, without TRITON_INTERPRET: ``python compile_all.py cuda:80 hip:gfx942``. With ``--largest``
only for the largest shape, which takes the most registers and shared memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from saelab.kernels.triton import adam, code, latents, ragged, residual, select, shapes, tally
from saelab.kernels.triton import pursuit as triton_pursuit

INTEGERS = {"indices", "begin", "end", "target", "row_ptr", "groups", "budgets", "start", "counts", "steps"}
INTEGERS |= {"order", "rows", "ptr"}
INDICES = {"select_kernel": {"indices"}, "select_streamed_kernel": {"indices"}, "reach_kernel": {"indices"}}
SCALARS = {"weight0": "fp32", "weight1": "fp32", "bound": "fp32", "residual_stop": "fp32"}
SCALARS |= dict.fromkeys(("beta1", "beta2", "rate", "root", "eps"), "fp32")
TALLIED = {"order": "*i64", "ptr": "*i64", "since": "*i64", "dead": "*i32", "counts": "*i32"}
TALLIED |= {"first": "*fp64", "numbers": "*fp64", "tokens": "i32", "limit": "i64", "unit": "fp32", "most": "fp32"}
TALLIED |= dict.fromkeys(("n", "d_sae", "d_in", "n_terms", "starting"), "i32")
SIZES = {"nnz", "n", "count", "width", "held", "n_groups", "d_sae", "d_in", "n_steps"}
SIZES |= {"numel", "seed_first", "seed_second"}
# (tokens, d_in, d_sae, k): the smallest training shape, a middle one and the largest of the study.
SHAPES = [(4096, 576, 4608, 32), (4096, 768, 24576, 32), (8192, 4096, 131072, 64)]
MODES = {"plain": 0, "gradient": 2}


def signature(kernel, constants: dict[str, int | bool], load: str) -> dict[str, str]:
    """Types by argument name: integer lists are int64, strides and sizes int32, the rest floating point."""
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in SCALARS:
            types[name] = SCALARS[name]
        elif name in SIZES or name.endswith("stride"):
            types[name] = "i32"
        elif kernel in (tally.firing_kernel, tally.report_kernel):
            types[name] = TALLIED.get(name, "*fp32")
        elif kernel is adam.adam_kernel:
            types[name] = "*bf16" if constants["HALF"] and name in ("first", "second") else "*fp32"
        elif name in INTEGERS:
            types[name] = "*i64"
        elif name == "latents" or (kernel is select.group_keys_kernel and name == "out"):  # sorted keys
            types[name] = "*i32"
        else:
            outputs = {"out", "values", "sse", "recon", "error", "along", "per_step", "d_x", "coefficients"}
            outputs |= {"weight", "extra", "dec", "enc", "bias", "scale", "squares"}
            outputs |= {"dec_parts", "enc_parts", "bias_parts"}
            types[name] = "*fp32" if name in outputs else f"*{load}"
    return types


def configurations(loads: list[str], sizes: list[tuple[int, int, int, int]]):
    """``(label, kernel, constants, num_warps, load type)`` of everything that these shapes launch."""
    seen = set()
    for n, d_in, d_sae, k in sizes:
        size = shapes.group_size(d_sae)
        n_groups = -(-d_sae // size)
        found = [
            (
                "whole",
                select.select_kernel,
                {"MODE": 0, "SIZE": 0, **shapes.whole_shape(n, min(n_groups, 4096))},
            ),
            ("largest", select.select_kernel, {"MODE": 3, "SIZE": 16, **shapes.whole_shape(n, 8192)}),
            ("latent", select.select_kernel, {"MODE": 1, "SIZE": 0, **shapes.whole_shape(4096, 4096)}),
            ("gathered", select.select_kernel, {"MODE": 0, "SIZE": size, **shapes.whole_shape(n, k * size)}),
            ("gathered", select.select_kernel, {"MODE": 2, "SIZE": size, **shapes.whole_shape(n, k * size)}),
            ("streamed", select.select_streamed_kernel, {"MODE": 0, **shapes.streamed_block(d_sae)}),
            ("pursuit", triton_pursuit.chain_kernel, shapes.chain_shape(d_in)),
        ]
        for mode in MODES.values():
            maxima = {"MODE": mode, **shapes.maxima_shape(n, n_groups, size)}
            found.append(("maxima", select.group_maxima_kernel, maxima))
        for listed, group in ((True, size), (False, 1)):
            keys = {"MODE": 1, "LISTED": listed, **shapes.list_shape(n * k, group)}
            found.append(("keys", select.group_keys_kernel, keys))
        for fill in (False, True):
            for slack in (False, True):
                reach = {"SIGNED": slack, "SLACK": slack, "FILL": fill, **shapes.whole_shape(n, 1024)}
                found.append(("reach", select.reach_kernel, reach))
        for centred in (False, True):
            found.append(("gather", code.gather_kernel, {"CENTRED": centred, **shapes.gather_shape(d_in)}))
        found.append(("firing", tally.firing_kernel, {"ENTRIES": tally.ENTRIES, "num_warps": 1}))
        found.append(("report", tally.report_kernel, {"BLOCK": tally.BLOCK, "num_warps": 8}))
        for half in (False, True):
            flags = {"ROWS": True, "FACTOR": True, "SKIP": True, "HALF": half}
            found.append(("adam", adam.adam_kernel, {**flags, **shapes.sweep_shape()}))
        found += gradient_configurations(n * k, d_in, d_sae)
        found += [
            ("dot", code.dot_kernel, shapes.gather_shape(d_in)),
            ("fill", code.fill_kernel, shapes.entry_shape()),
            ("pick", code.pick_kernel, shapes.entry_shape()),
            ("error", code.error_kernel, shapes.token_shape(d_in)),
        ]
        for atoms in {min(d_sae, residual.WIDEST), residual.WIDEST}:
            pursuit = {"STOP_ON_REPEAT": False, **shapes.pursuit_shape(atoms, d_in, k)}
            found.append(("pursuit", triton_pursuit.pursue_kernel, pursuit))
        for label, kernel, shape in found:
            for load in loads:
                constants = {name: value for name, value in shape.items() if name != "num_warps"}
                key = (kernel.__name__, load, *sorted(shape.items()))
                if key not in seen:
                    seen.add(key)
                    yield f"{label}-{load}", kernel, constants, shape["num_warps"], load


def gradient_configurations(nnz: int, d_in: int, d_sae: int):
    """One pass for both matrices, with and without the constraint, and passes for one of them."""
    options = {"WEIGHTED": True, "ALONG": True, "EXTRA": False, "CENTRED": True}
    both = {"SEGMENT": ragged.segment_size(nnz, d_sae), "DEC": True, "ENC": True, "MEASURE": False}
    one_row, pieces = shapes.token_shape(d_in), shapes.gather_shape(d_in)
    for name, flags, shape in (
        ("constrained", {**both, "MEASURE": True}, one_row),
        ("decoder-constrained", {**both, "MEASURE": True, "ENC": False}, one_row),
        ("encoder-measured", {**both, "MEASURE": True, "DEC": False}, one_row),
        ("both", {**both}, pieces),
        ("decoder", {**both, "ENC": False}, pieces),
        ("encoder", {**both, "DEC": False}, pieces),
    ):
        options["EXTRA"] = name != "both"
        yield f"gradients-{name}", latents.latents_kernel, {**flags, **options, **shape}
        rest = {key: value for key, value in shape.items() if key != "ENTRIES"}
        yield f"parts-{name}", latents.parts_kernel, {**flags, **rest}


def spills_of(compiled, target: GPUTarget) -> int:
    """Bytes (CUDA) or registers (HIP) that did not fit into the register file."""
    if target.backend == "hip":
        return sum(int(found) for found in re.findall(r"\.vgpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"]))
    ptxas = get_ptxas(target.arch).path
    with TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(compiled.asm["ptx"])
        arch = re.search(r"\.target (\S+?)(,|\s)", compiled.asm["ptx"]).group(1)
        command = [ptxas, "-v", f"--gpu-name={arch}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(found) for found in re.findall(r"(\d+) bytes spill stores", report))


def main(arguments: list[str]) -> None:
    largest = "--largest" in arguments
    for name in [argument for argument in arguments if argument != "--largest"]:
        backend, arch = name.split(":")
        target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, 32 if backend == "cuda" else 64)
        # What is loaded is cast at once, so the type matters little; one target tries both.
        loads = ["fp32", "bf16"] if arch == "90" and not largest else ["fp32"]
        for label, kernel, constants, warps, load in configurations(loads, SHAPES[-1:] if largest else SHAPES):
            source = ASTSource(kernel, signature(kernel, constants, load), constants)
            compiled = triton.compile(source, target=target, options={"num_warps": warps})
            line = {"target": name, "kernel": kernel.__name__, "label": label, **constants, "num_warps": warps}
            line |= {
                "threads": warps * target.warp_size,
                "shared": compiled.metadata.shared,
                "spills": spills_of(compiled, target),
            }
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
