"""Configs that are damaged, strange or hostile: a ValueError that names the file and says what is
wrong, or a schedule that samples.
"""

import inspect
import random
import resource
import time
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alphabar.noising import Discrete, NoiseSchedule
from alphabar.noising.curves import base as curves
from alphabar.noising.io.diffusers_keys import KNOWN_TO_CLASS, OTHERS, READERS
from alphabar.noising.io.files import CONFIG_NAME, EXACT_NAME
from alphabar.noising.utils.config_reading import MAX_BYTES, parse_json, read_json
from alphabar.sampling import Sampler
from config_mutations import configs, mutated, text_of

CONFIGS = configs()
SECONDS, MIB = 2.0, 200.0  # that reading one config and sampling on it may take


def outcome(rng: random.Random, folder: Path) -> str:
    """Read one damaged config and sample on it: 'refused' or 'accepted'; whatever else happens is
    raised.
    """
    own, config = rng.choice(CONFIGS)
    name = EXACT_NAME if own else CONFIG_NAME
    (folder / name).write_bytes(text_of(mutated(config, rng), rng))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            schedule = NoiseSchedule.from_pretrained(folder)
    except ValueError as error:
        assert name in str(error) and len(str(error)) < 1500
        return "refused"
    finally:
        (folder / name).unlink()
    assert schedule == NoiseSchedule.from_config(schedule.to_config())
    for method in ("euler", "ddim"):
        sampler = Sampler(schedule, method, min(3, schedule.num_train_timesteps))
        assert bool(sampler(lambda x, t: 0.5 * torch.tanh(x), (2, 3), seeds=0).isfinite().all()), (
            schedule
        )
    return "accepted"


@given(seed=st.integers(0, 2**32))
@settings(max_examples=300)
def test_a_damaged_config_is_refused_in_words_or_samples(tmp_path_factory: Any, seed: int) -> None:
    assert outcome(random.Random(seed), tmp_path_factory.getbasetemp()) in ("refused", "accepted")


@pytest.mark.slow
def test_ten_thousand_damaged_configs(tmp_path: Path) -> None:
    outcome(random.Random(0), tmp_path)
    counts = {"refused": 0, "accepted": 0}
    for seed in range(10_000):
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        counts[outcome(random.Random(f"config {seed}"), tmp_path)] += 1
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        assert time.perf_counter() - start < SECONDS and grown < MIB, seed
    assert min(counts.values()) > 500, counts  # neither everything refused nor everything accepted


# the files

FILES: dict[str, tuple[bytes, str]] = {
    "nan": (b'{"_class_name": "DDIMScheduler", "beta_end": NaN}', "NaN is no JSON"),
    "infinity": (b'{"_class_name": "DDIMScheduler", "beta_end": -Infinity}', "-Infinity is no JSON"),
    "overflow": (b'{"_class_name": "DDIMScheduler", "beta_end": 1e999}', "beta_end must be a "
                                                                         "finite number, got inf"),
    "twice": (b'{"_class_name": "DDIMScheduler", "beta_end": 0.1, "beta_end": 0.2}', "the key 'beta_end' is given twice"),
    "deep": (b'{"_class_name": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested too deeply"),
    "wide": (b'{"_class_name": ' + b"[]," * 20_000 + b"[]}", "20002 brackets and 20000 commas"),
    "digits": (b'{"_class_name": "DDIMScheduler", "beta_end": ' + b"9" * 5000 + b"}", "is not valid JSON"),
    "integer": (b'{"_class_name": "DDIMScheduler", "beta_end": ' + b"9" * 400 + b"}", "got an integer of 1329 bits"),
    "letters": (b'{"_class_name": "DDIMScheduler", "beta_schedule": "' + b"a" * 10**6 + b'"}', "... of 1000000 letters"),
    "bytes": (b"\xff\xfe{}", "is not valid JSON"),
    "empty": (b"", "is not valid JSON"),
    "list": (b"[]", "not a diffusers scheduler config"),
    "T": (b'{"_class_name": "DDIMScheduler", "num_train_timesteps": 100000000}', "must be at most 1000000, got 100000000"),
    "T ": (b'{"_class_name": "DDIMScheduler", "num_train_timesteps": "1000"}', "must be a whole number, got '1000'"),
    "flag": (b'{"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": "false"}', "must be true or false, got 'false'"),
    "class": (b'{"_class_name": ["DDIMScheduler"]}', "_class_name must be a word, got a list of 1"),
    "complex": (b'{"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": -0.1}', "betas must lie in"),
    "noise": (b'{"_class_name": "DDIMScheduler", "num_train_timesteps": 1000000}', "alpha is 0 and 0 at the last two of"),
    "count": (
        b'{"_class_name": "DDIMScheduler", "num_train_timesteps": 5, "trained_betas": [0.1, 0.2]}',
        "num_train_timesteps says 5, but there are 2 trained_betas",
    ),
    "prediction": (b'{"_class_name": "DDIMScheduler", "prediction_type": {"name": "karras"}}', "must be a word, got a dict"),
    "null": (b'{"_class_name": "DDIMScheduler", "prediction_type": null}', "prediction_type must be a word, got None"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_named(name: str, tmp_path: Path) -> None:
    content, words = FILES[name]
    (tmp_path / CONFIG_NAME).write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(ValueError) as caught:
        NoiseSchedule.from_pretrained(tmp_path)
    assert (
        CONFIG_NAME in str(caught.value)
        and words in str(caught.value)
        and len(str(caught.value)) < 1000
    )
    assert time.perf_counter() - start < SECONDS


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / CONFIG_NAME).open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(
        ValueError, match=rf"{CONFIG_NAME}' has {MAX_BYTES + 1} bytes, and no config has more"
    ):
        read_json(tmp_path / CONFIG_NAME)


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    path = NoiseSchedule.flow(3.0).save_pretrained(tmp_path) / EXACT_NAME
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert NoiseSchedule.from_pretrained(tmp_path) == NoiseSchedule.flow(3.0)
    assert parse_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


# values of a config that comes from a checkpoint, where anything may stand

FLOW = NoiseSchedule.flow(3.0).to_config()
STRANGE: dict[str, tuple[Any, str]] = {
    "a tensor for a number": ({"kind": "flow", "shift": torch.ones(())}, "must be a finite number, "
                                                                         "got a Tensor"),
    "a tensor of one number": ({"kind": "discrete", "trained_betas": torch.tensor([0.1]).expand(10**10)}, "at most 1000000"),
    "a tensor of rows": ({"kind": "discrete", "trained_betas": torch.ones(2, 2)}, "must be a list of numbers, got a Tensor"),
    "keys that are numbers": ({"kind": "flow", 1: 2}, "keys of text, got the key 1"),
    "a truth value": ({"kind": "flow", "shift": True}, "must be a finite number, got True"),
    "no kind": ({"shift": 1.0}, "unknown curve None"),
    "a kind that is a list": ({"kind": ["flow"]}, "unknown curve a list of 1"),
    "a part of a part": (
        {"kind": "truncated", "first": 0.0, "last": 0.5, "curve": {"kind": "truncated"}},
        "a part of a part of a curve is written as one part",
    ),
    "a part too short": (
        {"kind": "truncated", "first": 0.5, "last": 0.5 + 1e-12, "curve": {"kind": "flow"}},
        "too short for any step",
    ),
    "a range of nothing": ({"kind": "karras", "sigma_min": 1.0, "sigma_max": 1.0 + 1e-12}, "need 1e-12 <= sigma_min"),
    "a huge sigma": ({"kind": "variance_exploding", "sigma_max": 1e200}, "sigma_max <= 1e\\+12"),
    "a huge beta": ({"kind": "variance_preserving", "beta_max": 1e9}, "alpha is 0 and 0 at the "
                                                                      "last two of 1000"),
    "a huge rho": ({"kind": "karras", "rho": 1e9}, "rho must lie between"),
    "a huge shift": ({"kind": "cosine", "log_snr_shift": 1e9}, "log_snr_shift must lie between"),
    "a huge factor": ({"kind": "flow", "shift": 1e200}, "shift must lie between 1e-12 and 1e\\+12"),
    "no steps": ({"kind": "flow", "num_train_timesteps": 0}, "must be at least 1, got 0"),
    "too many steps": ({"kind": "cosine", "num_train_timesteps": 10**12}, "must be at most 1000000"),
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_strange_curves_are_refused(name: str) -> None:
    curve, words = STRANGE[name]
    with pytest.raises(ValueError, match=words):
        NoiseSchedule.from_config({"curve": curve, "prediction": "flow_prediction"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fingerprint": 7}, "fingerprint must be a word, got 7"),
        ({"version": "1"}, "version must be a whole number, got '1'"),
        ({"version": True}, "version must be a whole number, got True"),
        ({"prediction": ["v"]}, "expected the keys 'curve' and 'prediction'"),
        ({"prediction": {"name": "karras", "sigma_dat": 1.0}}, "unknown setting of prediction type "
                                                               "karras 'sigma_dat'; did you"),
        ({"prediction": {"name": "karras", "sigma_data": "1"}}, "must be a finite number, got '1'"),
        ({"prediction": {"name": "karras", 1: 1}}, "keys of text"),
        ({"prediction": {"name": "consistency", "sigma_min": 1e99}}, "sigma_min must be positive"),
        ({3: 4}, "keys of text, got the key 3"),
    ],
)  # fmt: skip
def test_strange_configs_are_refused(changes: dict[Any, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NoiseSchedule.from_config({**FLOW, **changes})


def test_an_unknown_key_of_our_own_is_told() -> None:
    with pytest.warns(
        UserWarning,
        match=r"unknown key of a noise schedule config 'predictions'; did you mean 'prediction'",
    ):
        assert NoiseSchedule.from_config({**FLOW, "predictions": "epsilon"}) == NoiseSchedule.flow(
            3.0
        )


@pytest.mark.parametrize("count", [10**6 + 1, 10**12])
def test_timesteps_are_bounded_before_anything_is_made(count: int) -> None:
    start = time.perf_counter()
    with pytest.raises(
        ValueError, match=f"num_train_timesteps must be at most {curves.MAX_TIMESTEPS}, got {count}"
    ):
        NoiseSchedule.linear(num_train_timesteps=count)
    with pytest.raises(ValueError, match="num_train_timesteps must be at most"):
        NoiseSchedule.flow(num_train_timesteps=count)
    with pytest.raises(ValueError, match="trained_betas must be at most"):
        Discrete(trained_betas=torch.tensor([0.1]).expand(count))
    assert time.perf_counter() - start < SECONDS


# keys that a class of diffusers does not read


def test_what_each_class_of_diffusers_reads() -> None:
    """The table is the signature of the classes that are installed; a new version that differs is
    seen here.
    """
    for name, known in KNOWN_TO_CLASS.items():
        taken = set(inspect.signature(getattr(diffusers, name).__init__).parameters)
        assert known == taken & (READERS.keys() - {"timestep_spacing", "_class_name"}), name
        assert taken - {"self", "kwargs"} <= READERS.keys() | OTHERS, name


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (
            {"_class_name": "HeunDiscreteScheduler", "rescale_betas_zero_snr": True},
            "rescale_betas_zero_snr",
        ),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "flow_shift": 3.0}, "flow_shift"),
        (
            {"_class_name": "FlowMatchHeunDiscreteScheduler", "use_dynamic_shifting": True},
            "use_dynamic_shifting",
        ),
        ({"_class_name": "DDIMScheduler", "use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"_class_name": "RePaintScheduler", "prediction_type": "v_prediction"}, "prediction_type"),
        (
            {"_class_name": "DDIMScheduler", "predicton_type": "v_prediction"},
            "did you mean 'prediction_type'",
        ),
    ],
)
def test_what_a_class_does_not_read_is_told_and_not_honoured(
    config: dict[str, Any], key: str
) -> None:
    with pytest.warns(UserWarning, match=key) as told:
        schedule = NoiseSchedule.from_diffusers(config)
    assert len(told) == 1
    assert schedule == NoiseSchedule.from_diffusers({"_class_name": config["_class_name"]})


def test_files_as_they_are_in_use_tell_nothing(recwarn: pytest.WarningsRecorder) -> None:
    """The scheduler of Stable Diffusion 1.5 says clip_sample, which PNDM does not know and which is
    no part of a schedule.
    """
    NoiseSchedule.from_diffusers(
        {
            "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
            "steps_offset": 1, "trained_betas": None, "clip_sample": False,
        }
    )  # fmt: skip
    for name in (
        "DDIMScheduler",
        "EulerDiscreteScheduler",
        "UniPCMultistepScheduler",
        "FlowMatchEulerDiscreteScheduler",
    ):
        NoiseSchedule.from_diffusers(
            dict(getattr(diffusers, name)().config) | {"_class_name": name}
        )
    assert [str(warning.message) for warning in recwarn] == []
