"""Checkpoints and safetensors files, damaged at random: values of other types, huge sizes, headers
that lie, archives cut off.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel

from alphabar.noising import NoiseSchedule
from alphabar.training.networks import network_config

SCHEDULE = NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr()


def small_network() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip


def small_checkpoint() -> dict[str, Any]:
    """What a DiffusionModule with ScheduleCheckpoint and EMA saves, without an optimizer."""
    network = small_network()
    state = {f"network.{name}": value.clone() for name, value in network.state_dict().items()}
    return {
        "state_dict": state,
        "current_model_state": {name: value.clone() for name, value in state.items()},
        "noise_schedule": SCHEDULE.to_config(),
        "network": network_config(network),
        "sample_shape": [1, 8, 8],
        "hyper_parameters": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    }


def shown_as(count: int) -> torch.Tensor:
    return torch.tensor([0.01]).expand(count)


VALUES: list[Callable[[], Any]] = [
    lambda: None, list, dict, lambda: "text", lambda: "x" * 10_000, lambda: 0, lambda: -1, lambda: 7, lambda: 10**5,
    lambda: 10**9, lambda: 10**30, lambda: 1e300, lambda: float("nan"), lambda: True, lambda: [-1, 8, 8], lambda: ["a"],
    lambda: [1, 10**6, 10**6], lambda: [10**12], lambda: [1, 8, 8], lambda: {1: 2}, lambda: {"a": {"b": {"c": 1}}},
    lambda: torch.zeros(()), lambda: torch.zeros(3), lambda: torch.full((2, 2), torch.nan), lambda: shown_as(10**10),
    lambda: torch.zeros(0), lambda: torch.ones(2, dtype=torch.int64), lambda: torch.zeros(2).to_sparse(), lambda: (1, 2),
    lambda: torch.zeros(1, dtype=torch.complex64), lambda: {"curve": {"kind": "discrete", "trained_betas": shown_as(10**10)},
                                                            "prediction": "epsilon"},
]  # fmt: skip


def mutated_checkpoint(rng: random.Random) -> bytes:
    """Return a checkpoint with a damage in its values or in its bytes."""
    checkpoint = small_checkpoint()
    for _ in range(rng.choice((1, 1, 2))):
        holder: Any = checkpoint
        while True:
            key = rng.choice(list(holder))
            if not isinstance(holder[key], dict) or not holder[key] or rng.random() < 0.3:
                break
            holder = holder[key]
        damage = rng.choice(("drop", "replace", "replace", "replace", "rename", "scale"))
        if damage == "drop":
            del holder[key]
        elif damage == "replace":
            holder[key] = rng.choice(VALUES)()
        elif damage == "rename":
            holder[rng.choice((1, "bogus", (1, 2)))] = holder.pop(key)
        elif isinstance(holder[key], torch.Tensor):
            holder[key] = holder[key] * rng.choice((torch.nan, torch.inf, 1e30, 0.0))
        elif isinstance(holder[key], int) and not isinstance(holder[key], bool):
            holder[key] = holder[key] * rng.choice((-1, 2, 1000, 10**6))
        if not checkpoint:
            break
    return damaged_bytes(saved(checkpoint), rng)


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    damage = rng.random()
    if damage < 0.08:
        return content[: rng.randrange(len(content))]
    if damage < 0.16:
        return changed_bytes(content, rng)
    if damage < 0.2:
        return packed(content)
    return content


def changed_bytes(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 10, 100))):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def packed(content: bytes, more: bytes = b"") -> bytes:
    """Return the archive with its entries compressed, and ``more`` in place of the values."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, more if more and name.endswith(".pkl") else old.read(name))
    return out.getvalue()


class Runs:
    """A pickle of this writes a file where it is run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


class Asks:
    """A pickle of this asks for memory."""

    def __reduce__(self) -> Any:
        return bytearray, (10**12,)


def running(path: Path) -> list[bytes]:
    """Files that would write ``path`` if any code in them ran."""
    plain, archive = pickle.dumps(Runs(path), protocol=2), io.BytesIO()
    torch.save({"state_dict": Runs(path)}, archive)
    return [plain, archive.getvalue(), packed(saved({}), plain)]


def mutated_safetensors(rng: random.Random, content: bytes) -> bytes:
    """Return a safetensors file with a damage in its header or in its bytes."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    damage = rng.choice(
        ("length", "offsets", "shape", "dtype", "metadata", "drop", "cut", "bytes", "text")
    )
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry = copy.deepcopy(header[name])
    if damage == "length":
        wrong = rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, 10**8))
        return struct.pack("<Q", wrong) + content[8:]
    if damage == "cut":
        return content[: rng.randrange(len(content))]
    if damage == "bytes":
        return changed_bytes(content, rng)
    if damage == "text":
        text = rng.choice(
            (
                "[]",
                "{",
                "null",
                '{"a": NaN}',
                '{"a": 1, "a": 2}',
                "[" * 5000 + "]" * 5000,
                "{}" + " " * 1000,
            )
        )
        return struct.pack("<Q", len(text)) + text.encode() + data
    if damage == "offsets":
        a, b = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            ([a, b + 8], [a - 4, b], [b, a], [-1, b], [a], ["a", b], [0, 2**60], None, [a, 1e400])
        )
    elif damage == "shape":
        entry["shape"] = rng.choice(
            ([], [-1], [2**40, 2**40], ["a"], None, [1.5], entry["shape"][::-1], [0], [10**30])
        )
    elif damage == "dtype":
        entry["dtype"] = rng.choice(("F64", "X", None, 3, "BOOL", "f32", "F8_E4M3"))
    header[name] = entry
    if damage == "metadata":
        said = header["__metadata__"]
        key = rng.choice(list(said))
        said[key] = rng.choice(
            (
                "",
                "{",
                "NaN",
                "[]",
                "7",
                '{"a": 1}',
                "[1, -8, 8]",
                "[1, 1000000, 1000000]",
                "x" * 10_000,
                3,
                None,
                {},
            )
        )
    elif damage == "drop":
        del header[rng.choice(list(header))]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data
