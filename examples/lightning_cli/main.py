"""Train from a YAML file: LightningCLI builds the network, the noising and the callbacks.

    python examples/lightning_cli/main.py fit --config examples/lightning_cli/config.yaml python
    examples/lightning_cli/main.py fit --config examples/lightning_cli/config.yaml
    --model.noising.weighting min_snr

``--print_config`` writes the whole configuration; ``--trainer.callbacks+=...`` adds a callback.
"""

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import ArgsType, LightningCLI
from torch.utils.data import DataLoader

from alphabar.training import DiffusionModule


class Squares(LightningDataModule):
    """Images in [-1, 1] of one bright square each; put your own LightningDataModule in its place.

    Args:
        count: images for training; an eighth of it for validation.
        size: height and width in pixels.
        batch_size: images in a batch.
    """

    def __init__(self, count: int = 512, size: int = 16, batch_size: int = 32) -> None:
        super().__init__()
        self.count, self.size, self.batch_size = count, size, batch_size

    def _loader(self, count: int, seed: int, shuffle: bool) -> DataLoader:
        side = self.size // 3
        corner = torch.randint(
            self.size - side, (count, 2), generator=torch.Generator().manual_seed(seed)
        )
        axis = torch.arange(self.size)
        inside = (axis >= corner[..., None]) & (axis < corner[..., None] + side)
        images = (inside[:, 0, :, None] & inside[:, 1, None, :]).float()[:, None] * 2 - 1
        rows = [{"images": image} for image in images]
        return DataLoader(rows, self.batch_size, shuffle=shuffle)  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.count, seed=0, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.count // 8, seed=1, shuffle=False)


def main(args: ArgsType = None) -> LightningCLI:
    return LightningCLI(DiffusionModule, LightningDataModule, subclass_mode_data=True, args=args)


if __name__ == "__main__":
    main()
