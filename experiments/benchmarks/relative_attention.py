"""Memory and time of the four forms of relative attention, forward and backward, beside Table 1 of the paper.

Paper: Huang et al. 2018, Music Transformer, https://arxiv.org/abs/1809.04281, Table 1
Run:   python -m experiments.benchmarks.relative_attention [--lengths 650,2048,3500,8192] [--repeats 5]

Batch 1, 8 heads of 64, float32, a table of as many distances as positions, no dropout, one device. Memory is what the
compiled executable itself says it allocates besides its arguments and results, divided by the heads; it is compiled
from shapes alone, so forms that do not fit the machine are measured too. A form is timed only where its temporaries
fit `--fit_gb`. The paper counts its relative terms alone (the tensor R or the table, and S_rel); our figures count all
that is alive at once, forward and backward. MB are 10^6 bytes.
"""

import argparse
import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.timing import Timing, interleaved, table
from jaxaudio.cli import raise_malloc_thresholds
from jaxaudio.ops.relative_attention import relative_attention

FORMS = ("gather", "skew", "blockwise", "local")
NUM_HEADS, HEAD_DIM = 8, 64
# Table 1, MB a layer and head: form -> length -> (R or the table of embeddings, S_rel).
PAPER = {
    "gather": {650: (108, 1.7), 2048: (1100, 16), 3500: (3100, 49)},
    "skew": {650: (0.17, 1.7), 2048: (0.52, 16), 3500: (0.90, 49)},
}


class Executable(NamedTuple):
    """A compiled form; without a `run` and with NaN bytes where compiling ran out of memory."""

    run: Callable | None
    temporary_bytes: float
    compile_s: float


class Results(NamedTuple):
    """What `main` measured.

    executables: by (form, length).
    growth: blockwise temporaries at length 8192 over those at 4096.
    gather_to_blockwise: gather's temporaries over blockwise's at length 2048.
    timings: by (form, length), of the forms that fit.
    """

    executables: dict[tuple[str, int], Executable]
    growth: float
    gather_to_blockwise: float
    timings: dict[tuple[str, int], Timing]


def forward_backward(form: str, block_size: int) -> Callable:
    """The function (query, key, value, embeddings, gradient of the output) -> (output, gradients)."""
    attend = functools.partial(relative_attention, form=form, block_size=block_size)

    def run(query, key, value, embeddings, d_out):
        out, pull_back = jax.vjp(attend, query, key, value, embeddings)
        return out, pull_back(d_out)

    return run


def shapes(length: int) -> list[jax.ShapeDtypeStruct]:
    """Of the arguments of `forward_backward`, one distance a position."""
    row, embeddings = (1, length, NUM_HEADS, HEAD_DIM), (NUM_HEADS, length, HEAD_DIM)
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (row, row, row, embeddings, row)]


def compile_form(form: str, length: int, block_size: int) -> Executable:
    """Compiles from shapes, without any array."""
    start = time.perf_counter()
    try:
        run = jax.jit(forward_backward(form, block_size)).lower(*shapes(length)).compile()
    except jax.errors.JaxRuntimeError as error:  # a GPU compiler may allocate real arrays to choose its kernels
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Executable(None, math.nan, time.perf_counter() - start)
    return Executable(run, run.memory_analysis().temp_size_in_bytes, time.perf_counter() - start)


def time_forms(forms: Mapping[str, Callable], length: int, repeats: int) -> dict[tuple[str, int], Timing]:
    """Interleaved timings of the executables of one length, by (form, length)."""
    rng = np.random.default_rng(0)
    arrays = [jax.device_put(rng.standard_normal(x.shape, np.float32)) for x in shapes(length)]

    def call(run):
        jax.block_until_ready(run(*arrays))

    calls = {form: functools.partial(call, run) for form, run in forms.items()}
    return {(form, length): timing for form, timing in interleaved(calls, repeats).items()}


def memory_table(executables: Mapping[tuple[str, int], Executable], lengths: Sequence[int]) -> str:
    """MB a head of each form and length, ours and the paper's."""
    rows = []
    for form in FORMS:
        ours = (executables[form, length].temporary_bytes for length in lengths)
        rows.append([form, *(f"{x / NUM_HEADS / 1e6:.2f}" for x in ours)])
        if form in PAPER:
            paper = (PAPER[form].get(length) for length in lengths)
            rows.append([f"  Table 1, {form}", *("-" if x is None else f"{x[0]:g} + {x[1]:g}" for x in paper)])
    return table(["MB per layer and head", *(f"L={length}" for length in lengths)], rows)


def time_table(
    executables: Mapping[tuple[str, int], Executable],
    timings: Mapping[tuple[str, int], Timing],
    lengths: Sequence[int],
) -> str:
    """Times of each form and length, and their ratio to skew's."""
    rows = []
    for length, form in itertools.product(lengths, FORMS):
        cells = ["does not fit", "", ""]
        if (timing := timings.get((form, length))) is not None:
            skew = timings.get(("skew", length))
            ratio = "-" if skew is None else f"{timing.median_s / skew.median_s:.2f}"
            cells = [f"{1e3 * timing.min_s:.1f}", f"{1e3 * timing.median_s:.1f}", ratio]
        rows.append([f"L={length} {form}", *cells, f"{executables[form, length].compile_s:.1f}"])
    return table(["forward + backward", "min ms", "median ms", "of skew", "compile s"], rows)


def main(arguments: argparse.Namespace) -> Results:
    """Measures and prints."""
    lengths, block = arguments.lengths, arguments.block_size
    device = jax.devices()[0]
    print(f"{device.device_kind} ({device.platform}), block_size {block}\n")

    claims = [("gather", 2048), ("blockwise", 2048), ("blockwise", 4096), ("blockwise", 8192)]
    cases = dict.fromkeys([*itertools.product(FORMS, lengths), *claims])
    executables = {(form, length): compile_form(form, length, block) for form, length in cases}
    print(memory_table(executables, lengths))
    gather, at_2048, at_4096, at_8192 = (executables[case].temporary_bytes for case in claims)
    print(f"\nblockwise, L 4096 -> 8192: {at_8192 / at_4096:.2f} times (linear is 2; wanted: at most 2.2)")
    print(f"gather / blockwise at L=2048: {gather / at_2048:.0f} times (wanted: at least 50)\n")

    timings = {}
    for length in lengths:
        here = {form: executables[form, length] for form in FORMS}
        fitting = {form: it.run for form, it in here.items() if it.temporary_bytes <= arguments.fit_gb * 1e9}
        timings |= time_forms(fitting, length, arguments.repeats)
    print(f"Interleaved, {arguments.repeats} calls each, of forms whose temporaries fit {arguments.fit_gb:g} GB;")
    print("the paper has skew 6 times faster than gather at L=650.")
    print(time_table(executables, timings, lengths))
    return Results(executables, at_8192 / at_4096, gather / at_2048, timings)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=lambda x: [int(n) for n in x.split(",")], default=[650, 2048, 3500, 8192])
    parser.add_argument("--block_size", type=int, default=128, help="of blockwise and local (default 128)")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each form (default 5)")
    parser.add_argument("--fit_gb", type=float, default=8.0, help="forms with more temporaries are not timed")
    return parser.parse_args(argv)


if __name__ == "__main__":
    command_line = parse()
    raise_malloc_thresholds()
    main(command_line)
