"""Output layer and loss over a whole vocabulary: at once, and in chunks of tokens.

    python -m tests.bench.bench_loss --tokens 4096

One GPU, 35b-a3b's widths, bfloat16, the weight's gradient added to a float32 one. "at once" is what
training does: all logits, Transformer Engine's cross entropy, both products of the backward. A
chunk computes its gradients as soon as it has its losses, so the logits of one chunk are all that
exists. Every row is compared with "at once".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwen35_mcore.config.flavors import get_flavor
from tests.bench.common import RATE_TFLOPS, arguments, median_ms, peak_gib, report, start


def step(x_th: Tensor, weight_vh: Tensor, labels_t: Tensor, main: Tensor, chunk: int) -> Any:
    """Losses ``[t]`` and the gradient of x; the weight's is added to ``main``."""
    from megatron.core.extensions.transformer_engine import te_parallel_cross_entropy

    from qwen35_mcore.mcore.patches.accumulating_products import add_product

    losses, gradients = [], []
    for x, labels in zip(x_th.split(chunk), labels_t.split(chunk), strict=True):
        logits = (x @ weight_vh.t()).unsqueeze(1).requires_grad_()
        loss = te_parallel_cross_entropy(
            logits, labels.unsqueeze(1), torch.distributed.group.WORLD, False
        )
        (dlogits,) = torch.autograd.grad(loss.sum(), logits)
        gradients.append(dlogits.squeeze(1) @ weight_vh)
        add_product(x, dlogits.squeeze(1), main)
        losses.append(loss.detach().squeeze(1))
    return torch.cat(losses), torch.cat(gradients)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    args = parser.parse_args()
    start()
    flavor = get_flavor("35b-a3b")
    rows, hidden = flavor.vocab_size, flavor.hidden_size
    x = torch.randn(args.tokens, hidden, device="cuda").bfloat16()
    weight = (0.02 * torch.randn(rows, hidden, device="cuda")).bfloat16()
    labels = torch.randint(rows, (args.tokens,), device="cuda")
    main_grad = torch.zeros(rows, hidden, device="cuda")
    expected = step(x, weight, labels, main_grad, args.tokens)
    floor = 6 * args.tokens * rows * hidden / RATE_TFLOPS / 1e9
    for chunk in (args.tokens, args.tokens // 2, args.tokens // 4, args.tokens // 8):
        found = step(x, weight, labels, main_grad, chunk)
        before = torch.cuda.memory_allocated() / 2**30
        row = {
            "what": "at once" if chunk == args.tokens else f"chunks of {chunk}",
            "tokens": args.tokens,
            **median_ms(lambda chunk=chunk: step(x, weight, labels, main_grad, chunk)),
            "floor_ms": floor,
            "more_gib": peak_gib(lambda chunk=chunk: step(x, weight, labels, main_grad, chunk))
            - before,
            "loss_error": float((found[0] - expected[0]).abs().max()),
            "dx_error": float((found[1].float() - expected[1].float()).norm()
                              / expected[1].float().norm()),
        }  # fmt: skip
        report(row, args.json)


if __name__ == "__main__":
    main()
