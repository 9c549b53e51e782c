"""What the layer pattern does: one tiny model with GatedDeltaNet (GDN) and attention mixed in ways.

    python examples/layer_pattern.py          (on a CPU about a minute)

Each model learns to go on with a random tune: every token is the one four places before it.
"""

from __future__ import annotations

import argparse
import math
import time

import torch

import qwen35_mcore as qwen35

GDN, ATTENTION = "linear_attention", "full_attention"
PATTERNS = {
    "3 GDN, 1 attention": (GDN, GDN, GDN, ATTENTION),
    "attention first": (ATTENTION, GDN, GDN, GDN),
    "GDN alone": (GDN,) * 4,
    "attention alone": (ATTENTION,) * 4,
}
SEQUENCES, LENGTH, TUNE = 16, 32, 4


def tunes(vocab_size: int) -> torch.Tensor:
    """``[SEQUENCES, LENGTH + 1]`` tokens on the GPU, or on the CPU where there is none."""
    tune = torch.randint(vocab_size, (SEQUENCES, TUNE), device="cuda")
    return tune.repeat(1, LENGTH // TUNE + 1)[:, : LENGTH + 1]


def train(pattern: tuple[str, ...], steps: int, decoder: str) -> tuple[float, float]:
    """The loss behind the first tune after so many steps, and milliseconds a step."""
    model_config = qwen35.get_flavor(
        "tiny-dense", layer_types=pattern, vocab_size=64, mtp_num_hidden_layers=0
    )
    config = qwen35.transformer_config(model_config, transformer_impl="local")
    torch.manual_seed(0)
    model = qwen35.build_model(model_config, config, decoder=decoder).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    positions = torch.arange(LENGTH, device="cuda").expand(SEQUENCES, -1)
    started = time.monotonic()
    for _ in range(steps):
        tokens = tunes(model_config.vocab_size)
        losses = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous())
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    return float(losses[:, TUNE:].mean()), (time.monotonic() - started) / steps * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--decoder", choices=("gpt", "hybrid"), default="gpt")
    args = parser.parse_args()
    qwen35.initialize_model_parallel()
    print(f"{'pattern':20} {'loss':>6} {'ms a step':>10}   a guess has {math.log(64):.2f}")
    for name, pattern in PATTERNS.items():
        loss, ms = train(pattern, args.steps, args.decoder)
        print(f"{name:20} {loss:6.2f} {ms:10.0f}", flush=True)


if __name__ == "__main__":
    main()
