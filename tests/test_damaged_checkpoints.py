"""Damaged, strange and hostile checkpoints: one clear line, nothing run, no memory that the file
does not have; or finite samples.
"""

from __future__ import annotations

import json
import random
import resource
import struct
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from alphabar.noising import NoiseSchedule
from alphabar.sampling import Sampler
from alphabar.training import inspect_path, load_checkpoint
from alphabar.training.checkpoints.safetensors import NETWORK_KEY, OWN_KEY, SHAPE_KEY, read_header
from alphabar.training.cli import main
from alphabar.training.networks import build_network, network_config
from checkpoint_mutations import (
    SCHEDULE,
    Asks,
    mutated_checkpoint,
    mutated_safetensors,
    packed,
    running,
    saved,
    shown_as,
    small_checkpoint,
    small_network,
)

SECONDS, MIB = 2.0, 200.0


def grown_since(start: int) -> float:
    """MiB that this process has taken at most since then."""
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024


def outcome(path: Path, rng: random.Random) -> str:
    """Load and inspect one file: 'refused', or 'accepted' where it samples finitely; whatever else
    happens is raised.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert str(path.name) in str(inspect_path(path))
        except ValueError as error:
            assert len(str(error)) < 2000
        try:
            loaded = load_checkpoint(path, weights=rng.choice((None, "raw", "ema")))
        except ValueError as error:
            assert 10 < len(str(error)) < 2000
            return "refused"
    samples = Sampler(loaded.schedule, "euler", min(3, loaded.schedule.num_train_timesteps))(
        loaded.network, (1, *loaded.sample_shape), seeds=0
    )
    finite = all(bool(w.isfinite().all()) for w in loaded.network.state_dict().values())
    if bool(samples.isfinite().all()):
        return "accepted"
    huge = any(
        float(w.abs().max()) > 1e6 for w in loaded.network.state_dict().values() if w.numel()
    )
    assert not finite or huge, "weights of a trained network that sample NaN"
    return "NaN in the weights"  # which alphabar sample tells after the fact


@pytest.fixture(scope="module")
def average(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    network = small_network()
    said = {
        OWN_KEY: SCHEDULE.to_config(),
        NETWORK_KEY: network_config(network),
        SHAPE_KEY: [1, 8, 8],
    }
    path = tmp_path_factory.mktemp("average") / "a.safetensors"
    weights = {f"network.{name}": value for name, value in network.state_dict().items()}
    save_file(weights, path, {key: json.dumps(value) for key, value in said.items()})
    return path.read_bytes()


def mutation(seed: int, average: bytes, folder: Path) -> str:
    rng = random.Random(f"checkpoint {seed}")
    if seed % 2:
        path = folder / "a.ckpt"
        path.write_bytes(mutated_checkpoint(rng))
    else:
        path = folder / "a.safetensors"
        path.write_bytes(mutated_safetensors(rng, average))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    try:
        found = outcome(path, rng)
    except Exception as error:
        raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    assert grown_since(before) < MIB, seed
    assert time.perf_counter() - start < SECONDS, seed
    return found


def test_damaged_checkpoints(average: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(saved(small_checkpoint()))
    # the undamaged one; and diffusers is imported
    assert outcome(tmp_path / "a.ckpt", random.Random(0)) == "accepted"
    (tmp_path / "a.safetensors").write_bytes(average)
    assert outcome(tmp_path / "a.safetensors", random.Random(3)) == "accepted"
    for seed in range(60):
        mutation(seed, average, tmp_path)


@pytest.mark.slow
def test_three_hundred_damaged_checkpoints_and_as_many_safetensors(
    average: bytes, tmp_path: Path
) -> None:
    (tmp_path / "a.ckpt").write_bytes(saved(small_checkpoint()))
    outcome(tmp_path / "a.ckpt", random.Random(0))
    counts = Counter(mutation(seed, average, tmp_path) for seed in range(600))
    assert counts["refused"] > 200 and counts["accepted"] > 50, counts


# what the command says

CONFIG = network_config(small_network())
assert CONFIG is not None
STRANGE: dict[str, tuple[dict[str, Any], str]] = {
    "a list of weights": ({"state_dict": [1, 2]}, "must be a mapping of weights by name, got a "
                                                  "list of 2"),
    "no weights": ({"state_dict": None}, "must be a mapping of weights by name, got None"),
    "keys of numbers": ({"state_dict": {1: torch.ones(1)}}, "must have keys of text, got the key 1"),
    "values for weights": ({"state_dict": {"network.w": "text"}}, "network.w in state_dict of"),
    "weights of another": ({"state_dict": {"network.w": torch.ones(1)}}, "has more parameters than "
                                                                         "the 1 weights"),
    "a negative shape": ({"sample_shape": [1, -8, 8]}, "has one to four positive sizes, at most "
                                                       "16777216 numbers in all, got [1, -8, 8]"),
    "a huge shape": ({"sample_shape": [1, 10**6, 10**6]}, "at most 16777216 numbers in all"),
    "a large shape": ({"sample_shape": [1, 4096, 4096]}, "the network was made for sides of 8"),
    "a text for a shape": ({"sample_shape": "1x8x8"}, "has one to four positive sizes, at most "
                                                      "16777216 numbers in all, got '1x8x8'"),
    "texts in a shape": ({"sample_shape": ["1", 8, 8]}, "a size of sample_shape must be a whole "
                                                        "number, got '1'"),
    "a tensor for a shape": ({"sample_shape": torch.ones(3)}, "in all, got a Tensor"),
    "another channel": ({"sample_shape": [3, 8, 8]}, "the network takes 1 channels, and the "
                                                     "sample_shape is (3, 8, 8)"),
    "a text for a network": ({"network": "UNet2DModel"}, "must be a mapping of settings, got "
                                                         "'UNet2DModel'"),
    "a truth for a number": ({"network": {**CONFIG, "norm_num_groups": True}}, "norm_num_groups of the network's config must be a number"),
    "a word for a number": ({"network": {**CONFIG, "norm_num_groups": "4"}}, "norm_num_groups of the network's config must be a number"),
    "a negative number": ({"network": {**CONFIG, "norm_num_groups": -4}}, "norm_num_groups of the network's config must not be negative"),
    "words for sides": ({"network": {**CONFIG, "sample_size": ["8", "8"]}}, "sample_size of the network's config must be"),
    "too few dimensions": ({"sample_shape": [1, 8]}, "a sample of UNet2DModel has 3 dimensions, "
                                                     "and the sample_shape is (1, 8)"),
    "truths for numbers": ({"network": {**CONFIG, "block_out_channels": [True, 8]}}, "block_out_channels of the network's config must be"),
    "a huge network": ({"network": {**CONFIG, "block_out_channels": [10**5]}}, "it has more parameters than the"),
    "a deep network": ({"network": {**CONFIG, "layers_per_block": 10**6}}, "it has more parameters than the"),
    "a wide network": ({"network": {**CONFIG, "block_out_channels": [10**12]}}, "and no network has more than 1048576"),
    "a long network": ({"network": {**CONFIG, "block_out_channels": [8] * 10**5}}, "has 100000 entries"),
    "words in a network": ({"network": {**CONFIG, "block_out_channels": "eight"}}, "no UNet2DModel can be made of the network config"),
    "a tensor in a network": ({"network": {**CONFIG, "in_channels": torch.ones(1)}}, "must be a number or a word, got a Tensor"),
    "another class": ({"network": {**CONFIG, "_class_name": "os"}}, "unknown diffusers model 'os'"),
    "no class": ({"network": {**CONFIG, "_class_name": None}}, "unknown diffusers model None"),
    "betas without end": (
        {"noise_schedule": {"curve": {"kind": "discrete", "trained_betas": shown_as(10**10)}, "prediction": "epsilon"}},
        "must have at most 1000000 numbers, got 10000000000",
    ),
    "weights without end": (
        {"state_dict": {"network.conv_in.weight": shown_as(10**10)}},
        "shows 10000000000 numbers of 4 bytes",
    ),
    "a schedule of text": ({"noise_schedule": "flow"}, "not a noise schedule config"),
    "a bytearray": ({"more": Asks()}, "holds a bytearray, and only plain values and tensors are "
                                      "loaded"),
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_strange_checkpoints_are_told_in_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, words = STRANGE[name]
    path = tmp_path / "a.ckpt"
    path.write_bytes(saved({**small_checkpoint(), **changes}))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    assert (
        main(
            [
                "sample",
                str(path),
                "--steps",
                "2",
                "--num_images",
                "1",
                "--out",
                str(tmp_path / "x.png"),
            ]
        )
        == 2
    )
    try:
        assert main(["inspect", str(path)]) == (2 if "more" in changes else 0)
    except SystemExit as stop:  # what it cannot read of the schedule is a contradiction
        assert stop.code == 1 and "noise_schedule" in changes
    error = capsys.readouterr().err.splitlines()
    assert error[0].startswith("alphabar sample: ") and words in error[0]
    assert not (tmp_path / "x.png").exists()
    assert grown_since(before) < MIB and time.perf_counter() - start < 2 * SECONDS


def test_nothing_in_a_file_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    proof = tmp_path / "ran"
    for content in running(proof):
        (tmp_path / "a.ckpt").write_bytes(content)
        for command in (["sample"], ["inspect"]):
            assert main([*command, str(tmp_path / "a.ckpt")]) == 2
            assert capsys.readouterr().err.count("\n") == 1
    assert not proof.exists()


def test_archives_that_unpack_to_more_than_they_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.ckpt").write_bytes(packed(saved({}), bytes(1 << 28)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(["inspect", str(tmp_path / "a.ckpt")]) == 2
    assert "is an archive that unpacks to more than its" in capsys.readouterr().err
    assert grown_since(before) < 50


def test_the_weights_that_sample_nan_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = small_checkpoint()
    checkpoint["state_dict"]["network.conv_in.bias"].fill_(torch.nan)
    (tmp_path / "a.ckpt").write_bytes(saved(checkpoint))
    assert (
        main(["sample", str(tmp_path / "a.ckpt"), "--steps", "2", "--out", str(tmp_path / "x.png")])
        == 2
    )
    assert "alphabar sample: the samples hold NaN or infinity" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_an_error_of_alphabar_itself_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("a mistake of ours")

    monkeypatch.setattr("alphabar.training.cli.inspect.inspect_path", broken)
    with pytest.raises(KeyError, match="a mistake of ours"):
        main(["inspect", "a.ckpt"])


def test_a_config_is_not_believed_before_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of 40 GB, of which the file has the weights of none, takes no memory and little
    time.
    """
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="it has more parameters than the"):
        build_network({**(CONFIG or {}), "block_out_channels": [100_000]}, {"w": torch.ones(1)})
    assert time.perf_counter() - start < SECONDS and grown_since(before) < MIB
    linear = nn.Linear(2, 2)  # the hook that counted is gone
    assert linear.weight.shape == (2, 2)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
         "the tensor 'b' begins at 4, and what is before it ends at 8"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, "begins at 4"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, "of shape [3] has 8 bytes"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, "has no shape and no place"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, "has no place"),
        ({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, "ends at"),
        ({"a": {"dtype": "??", "shape": [2], "data_offsets": [0, 8]}}, "has the dtype '??'"),
        ({"a": 7}, "must be a mapping of settings, got 7"),
        ({"__metadata__": {"a": 7}}, "metadata a must be a word, got 7"),
        ({"__metadata__": []}, "the metadata must be a mapping of settings, got a list of 0"),
    ],
)  # fmt: skip
def test_headers_that_lie(tmp_path: Path, header: dict[str, Any], words: str) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(12))
    with pytest.raises(ValueError, match="is damaged, or no safetensors file") as caught:
        read_header(path)
    assert words in str(caught.value)


def test_a_header_longer_than_its_file_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for length in (2**63, 10**8, 100):
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(
            ValueError, match=f"its header would have {length} bytes, of a file of 10"
        ):
            read_header(path)


def test_a_checkpoint_of_the_example_says_its_schedule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fine-tuning example's checkpoints had another key for it, and are still read."""
    flow = NoiseSchedule.flow(3.0)
    for key in ("noise_schedule", "schedule"):
        torch.save(
            {"place": {"step": 3}, key: flow.to_config(), "objective": {}}, tmp_path / "a.pt"
        )
        assert main(["inspect", str(tmp_path / "a.pt")]) == 0
        said = capsys.readouterr().out
        assert f"trained with: {flow}" in said and f"key {key}" in said
    torch.save({"schedule": "cosine"}, tmp_path / "a.pt")  # of another tool
    assert inspect_path(tmp_path / "a.pt").schedule is None
