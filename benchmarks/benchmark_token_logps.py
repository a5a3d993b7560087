"""Time and memory of scoring tokens with a frozen output head, beside other projects.

    python benchmarks/benchmark_token_logps.py
    python benchmarks/benchmark_token_logps.py --shapes 4096x4096x128256 --output h200.json

A shape is NxDxV: N packed positions, of which the second half is scored, as a pair's completions
are. Every implementation gets the same positions, does with the others what its project does, and
returns values and gradient. On 64 scored rows, spread over all, both are compared with float64:
where they are wrong, no speed is printed and the exit code is 1. Peers that are not installed are
left out; Liger, Cut Cross-Entropy and PyTorch's chunked head run on CUDA only.
"""

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from _operations import Row, measure, parse_options, run_table
from torch import Tensor

from lowmem_dpo_kernels import token_logps, twins
from lowmem_dpo_kernels.token_logps import resolve_implementation

SHAPES = {
    "quick": ["64x32x1000"],
    "cpu": ["512x512x128256", "1024x512x128256"],
    "cuda": [  # heads of Llama 3.1 8B, Qwen2.5 0.5B, Gemma 2 2B and Qwen2.5 7B
        f"{2 * num_scored}x{head}"
        for head in ("4096x128256", "896x151936", "2304x256000", "3584x152064")
        for num_scored in (1024, 4096, 16384)
    ],
}
TRL_CHUNK_TOKENS = 8192
NUM_CHECKED = 64


@dataclass(frozen=True)
class Case:
    """One head to score: N positions, T of them scored."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    rows: Tensor  # [T]
    targets: Tensor  # [T]

    def everywhere(self) -> Tensor:
        """Targets of all N positions, -100 where none is scored."""
        return torch.full_like(self.hidden[:, 0], -100, dtype=torch.int64).scatter(
            0, self.rows, self.targets
        )


Implementation = Callable[[Case], Tensor]


def ours(case: Case) -> Tensor:
    """This repository's kernel, on the path it chooses."""
    return token_logps(case.hidden, case.rows, case.weight, case.targets)


def ours_torch(case: Case) -> Tensor:
    """This repository's kernel without Triton."""
    return token_logps(case.hidden, case.rows, case.weight, case.targets, implementation="torch")


def ours_fused(case: Case) -> Tensor:
    """This repository's kernel with its products in Triton."""
    return token_logps(case.hidden, case.rows, case.weight, case.targets, implementation="fused")


def twin(case: Case) -> Tensor:
    """Materialised fp32 logits and autograd."""
    return twins.token_logps(case.hidden, case.rows, case.weight, case.targets)


def plain(case: Case) -> Tensor:
    """Materialised logits in the model's dtype, fp32 log-softmax and autograd."""
    logits = F.linear(case.hidden[case.rows], case.weight)
    return logits.float().log_softmax(-1).gather(1, case.targets[:, None])[:, 0]


def trl(case: Case) -> Tensor:
    """TRL scores the labelled positions on CUDA and all positions elsewhere."""
    from trl.kernels import ChunkedLogProbFunction

    on_cuda = case.hidden.is_cuda
    hidden = case.hidden[case.rows] if on_cuda else case.hidden
    targets = case.targets if on_cuda else case.everywhere().clamp(min=0)
    settings = (1.0, TRL_CHUNK_TOKENS, None, 1.0, ())  # temperature, width, cap, scale, outputs
    logps = ChunkedLogProbFunction.apply(hidden, case.weight, None, targets, *settings)[0]
    return logps if on_cuda else logps[case.rows]


def liger(case: Case) -> Tensor:
    """Liger's fused head; it recomputes logits where losses are not reduced."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss = liger_fused_linear_cross_entropy(
        case.hidden[case.rows], case.weight, case.targets, reduction="none"
    )
    return -loss


def cut_cross_entropy(case: Case, impl: str = "cce") -> Tensor:
    """Apple's Cut Cross-Entropy; it skips small gradients by default."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(
        case.hidden[case.rows], case.weight, case.targets, reduction="none", impl=impl
    )


def cut_cross_entropy_exact(case: Case) -> Tensor:
    """The same without skipping."""
    return cut_cross_entropy(case, "cce_exact")


def torch_linear_cross_entropy(case: Case) -> Tensor:
    """PyTorch's own chunked head."""
    return -F.linear_cross_entropy(
        case.hidden[case.rows],
        case.weight,
        case.targets,
        reduction="none",
        options=torch.nn.LinearCrossEntropyOptions(),
    )


def implementations(device: torch.device) -> dict[str, Implementation]:
    """What can run here, ours first."""
    found: dict[str, Implementation] = {"ours": ours}
    if device.type == "cuda":
        found["ours (torch)"] = ours_torch
        with contextlib.suppress(ValueError):
            resolve_implementation("fused", device)
            found["ours (fused)"] = ours_fused
    found |= {"twin": twin, "plain": plain}
    if importlib.util.find_spec("trl"):
        found["trl"] = trl
    if device.type == "cuda":
        if importlib.util.find_spec("liger_kernel"):
            found["liger"] = liger
        if importlib.util.find_spec("cut_cross_entropy"):
            found["cut_cross_entropy"] = cut_cross_entropy
            found["cut_cross_entropy exact"] = cut_cross_entropy_exact
        if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # from torch 2.13
            found["torch linear_cross_entropy"] = torch_linear_cross_entropy
    return found


def make_case(shape: str, dtype: torch.dtype, device: torch.device) -> Case:
    """Seeded numbers with logits of a few nats; hidden requires a gradient, the head does not."""
    num_tokens, dim, vocabulary = map(int, shape.split("x"))
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(num_tokens, dim, generator=generator, device=device).to(dtype)
    weight = torch.empty(vocabulary, dim, dtype=dtype, device=device)
    weight.normal_(std=3 * dim**-0.5, generator=generator)
    rows = torch.arange(num_tokens // 2, num_tokens, device=device)
    targets = torch.randint(vocabulary, rows.shape, generator=generator, device=device)
    return Case(hidden.requires_grad_(), weight, rows, targets)


def step(implementation: Implementation, case: Case) -> tuple[Tensor, Tensor]:
    """Log-probs [T] and the gradient of their sum [N, D]."""
    logps = implementation(case)
    (grad,) = torch.autograd.grad(logps.sum(), case.hidden)
    return logps.detach(), grad


def errors(case: Case, logps: Tensor, grad: Tensor) -> tuple[float, float]:
    """Errors of some scored rows: largest of a log-prob (nats), relative of the gradient.

    Rows are worked on in blocks, the last of them not full: those checked are spread over all.
    """
    some = torch.linspace(0, len(case.rows) - 1, NUM_CHECKED, device=logps.device).long()
    rows, targets = case.rows[some], case.targets[some]
    hidden = case.hidden.detach()[rows].double()
    # In float64 the whole head would not fit beside a large one: slice by slice.
    parts = case.weight.split(8192)
    exact_logps = torch.cat([hidden @ part.double().T for part in parts], 1).log_softmax(-1)
    exact_grad = case.weight[targets].double()
    for part, some_logps in zip(parts, exact_logps.split(8192, 1), strict=True):
        exact_grad -= some_logps.exp() @ part.double()
    logps_error = logps[some] - exact_logps.gather(1, targets[:, None])[:, 0]
    grad_error = (grad[rows] - exact_grad).norm() / exact_grad.norm()
    return logps_error.abs().max().item(), grad_error.item()


def is_right(logps_error: float, grad_error: float, dtype: torch.dtype) -> bool:
    """Half logits may be rounded to their type (some peers do so); nothing else is forgiven."""
    logps_limit, grad_limit = (1e-3, 1e-3) if dtype == torch.float32 else (0.2, 0.05)
    return logps_error <= logps_limit and grad_error <= grad_limit


def rows_of(shape: str, dtype: torch.dtype, options: argparse.Namespace) -> Iterator[Row]:
    """Every implementation on one shape."""
    case = make_case(shape, dtype, options.device)
    for name, implementation in implementations(options.device).items():

        def run(implementation: Implementation = implementation) -> tuple[Tensor, Tensor]:
            return step(implementation, case)

        def check(run: Callable[[], tuple[Tensor, Tensor]] = run) -> tuple[dict[str, float], bool]:
            logps_error, grad_error = errors(case, *run())
            found = {"logps_error": logps_error, "grad_error": grad_error}
            return found, is_right(logps_error, grad_error, dtype)

        yield measure(name, dtype, check, run, options)


def main(arguments: list[str] | None = None) -> int:
    """Run every implementation on every shape and dtype."""
    form = "NxDxV, such as 512x512x128256 (positions x hidden x vocabulary)"
    options = parse_options(arguments, __doc__, SHAPES, form, r"\d+x\d+x\d+", repeats=3)
    return run_table(
        "token_logps",
        ("ms", "peak_mib"),
        options,
        options.dtypes or ["float32", "bfloat16"],
        lambda shape, dtype: rows_of(shape, dtype, options),
    )


if __name__ == "__main__":
    sys.exit(main())
