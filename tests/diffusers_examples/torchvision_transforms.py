"""The transforms of torchvision that the example scripts of diffusers use on PIL images, in plain torch and PIL."""

from enum import Enum

import numpy as np
import torch
from PIL import Image


class InterpolationMode(Enum):
    NEAREST = Image.Resampling.NEAREST
    BILINEAR = Image.Resampling.BILINEAR
    BICUBIC = Image.Resampling.BICUBIC
    LANCZOS = Image.Resampling.LANCZOS


class Compose:
    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, image):
        for transform in self.transforms:
            image = transform(image)
        return image


class Lambda:
    def __init__(self, function):
        self.function = function

    def __call__(self, image):
        return self.function(image)


class Resize:
    """Resize the shorter side."""

    def __init__(self, size, interpolation=InterpolationMode.BILINEAR):
        self.size, self.interpolation = size, interpolation

    def __call__(self, image):
        factor = self.size / min(image.size)
        size = tuple(max(self.size, int(side * factor)) for side in image.size)
        return image.resize(size, self.interpolation.value)


class CenterCrop:
    def __init__(self, size):
        self.size = size

    def corner(self, width, height):
        return (width - self.size) // 2, (height - self.size) // 2

    def __call__(self, image):
        left, top = self.corner(*image.size)
        return image.crop((left, top, left + self.size, top + self.size))


class RandomCrop(CenterCrop):
    def corner(self, width, height):
        left = torch.randint(0, width - self.size + 1, ())
        top = torch.randint(0, height - self.size + 1, ())
        return int(left), int(top)


class RandomHorizontalFlip:
    def __init__(self, p=0.5):
        self.p = p

    def __call__(self, image):
        flip = float(torch.rand(())) < self.p
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image


class PILToTensor:
    def __call__(self, image):
        pixels = np.array(image)
        return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1).contiguous()


class ConvertImageDtype:
    """Scale whole numbers to [0, 1]."""

    def __init__(self, dtype):
        self.dtype = dtype

    def __call__(self, image):
        return image.to(self.dtype) / torch.iinfo(image.dtype).max


class ToTensor:
    def __call__(self, image):
        return ConvertImageDtype(torch.float32)(PILToTensor()(image))


class Normalize:
    def __init__(self, mean, std):
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, image):
        return (image - self.mean) / self.std
