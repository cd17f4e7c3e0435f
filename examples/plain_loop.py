"""The smallest whole use of alphabar: a plain PyTorch loop, a preview, a saved schedule.

python examples/plain_loop.py --steps 400 --out runs/plain
"""

import argparse
from pathlib import Path

import torch
from diffusers import UNet2DModel
from torch import Tensor

from alphabar.noising import NoiseSchedule, Noising
from alphabar.sampling import Sampler
from alphabar.training.images import save_grid


def squares(count: int, seed: int) -> Tensor:
    """Return images in [-1, 1] of one bright square each, shape (count, 1, 16, 16)."""
    corner = torch.randint(1, 9, (count, 2), generator=torch.Generator().manual_seed(seed))
    axis = torch.arange(16)
    inside = (axis >= corner[..., None]) & (axis < corner[..., None] + 6)  # (count, 2, 16)
    return (inside[:, 0, :, None] & inside[:, 1, None, :]).float()[:, None] * 2 - 1


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps (400)")
    parser.add_argument("--out", type=Path, default=Path("runs/plain"), help="(runs/plain)")
    args = parser.parse_args(arguments)

    schedule = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()
    noising = Noising(schedule, timesteps="stratified", seed=0)

    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=16, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)

    loss = torch.zeros(())
    for step in range(args.steps):
        noised = noising(squares(32, seed=step), step=step)
        loss = noised.loss(network(noised.x, noised.timesteps))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step:4d}  loss {loss.item():.4f}")

    sampler = Sampler(schedule, "DPM++ 2M", steps=20)
    save_grid(sampler(network.eval(), (16, 1, 16, 16), seeds=range(16)), args.out / "squares.png")
    schedule.save_pretrained(args.out / "scheduler", sampler=sampler, nearest=True)
    return loss.item()


if __name__ == "__main__":
    main()
