"""What is written as a diffusers config loads there into the same sampler, or is refused; and a
class name is that class.

The oracle is diffusers itself: the class is loaded from the config, set to as many steps, and run
as a pipeline runs it, its first x scaled by its ``init_noise_sigma``, with the same network, start
and draws as ours.
"""

from __future__ import annotations

import inspect
import json
import logging
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import schedulers as peers
from torch import Tensor

import test_agreement_diffusers as agreement
from alphabar.noising import NoiseSchedule
from alphabar.noising.io.files import CONFIG_NAME
from alphabar.sampling import GRIDS, METHODS, Sampler
from alphabar.sampling.interop.diffusers_classes import CLASSES, FLAGS, class_named, read_config
from alphabar.sampling.names import all_names
from alphabar.training.previews.diffusers_pipelines import differences_of
from test_agreement_diffusers import BETAS, DRAWS, RELATIVE, START, Network, network, ours

SAME = 1e-4
SCHEDULES = {
    "epsilon": NoiseSchedule.scaled_linear(),
    "v": NoiseSchedule.scaled_linear(prediction="v_prediction"),
    "zero_snr": NoiseSchedule.scaled_linear(prediction="v_prediction").zero_terminal_snr(),
    "sample": NoiseSchedule.linear(prediction="sample"),
    "cosine": NoiseSchedule.squaredcos_cap_v2(prediction="v_prediction"),
    "flow": NoiseSchedule.flow(),
    "flow_shifted": NoiseSchedule.flow(shift=3.0),
}
EPSILON = SCHEDULES["epsilon"]
TWICE = ("Heun", "KDPM2", "DPMSolverSDE", "FlowMatchHeun")
"""Classes with two evaluations in a step of ours."""


@pytest.fixture(autouse=True)
def our_brownian_path(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "diffusers.schedulers.scheduling_dpmsolver_sde.BrownianTreeNoiseSampler"
    monkeypatch.setattr(path, lambda *_, **__: agreement.Path())
    diffusers.logging.set_verbosity_error()


def as_a_pipeline(
    scheduler: Any, steps: int, monkeypatch: pytest.MonkeyPatch, net: Network = network
) -> Tensor:
    kind = type(scheduler)
    evaluations, i = (2 if kind.__name__.startswith(TWICE) else 1), 0
    monkeypatch.setattr(
        sys.modules[kind.__module__],
        "randn_tensor",
        lambda *_, **__: DRAWS[i // evaluations][0],
        raising=False,
    )
    scheduler.set_timesteps(steps)
    x = START * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for i, t in enumerate(scheduler.timesteps):  # noqa: B007 (read in the draw)
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(net(scaled, t), t, x).prev_sample
    return x.double()


def from_its_start(
    sampler: Sampler, monkeypatch: pytest.MonkeyPatch, net: Network = network
) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(agreement, "START", START * sampler.init_noise_scale)
        return ours(sampler, net)


def loaded(schedule: NoiseSchedule, config: dict[str, Any]) -> Any:
    whole = json.loads(json.dumps(schedule.to_diffusers(config)))
    kind = getattr(diffusers, whole["_class_name"])
    unread = set(whole) - set(inspect.signature(kind).parameters) - {"_class_name"}
    assert not unread, f"{kind.__name__} does not read {unread}"
    return kind.from_config(whole)


def distance(mine: Tensor, their: Tensor) -> float:
    value = float((mine - their).abs().max() / their.abs().max())
    return value if value == value else float("inf")


def written(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> float | None:
    """How far what is written is from the sampler; None where it is refused."""
    try:
        config = sampler.to_diffusers()
    except ValueError as error:
        assert "nearest=True" in str(error) or "diffusers" in str(error)
        return None
    scheduler = loaded(sampler.schedule, config)
    return distance(
        from_its_start(sampler, monkeypatch), as_a_pipeline(scheduler, sampler.steps, monkeypatch)
    )


def built(schedule: NoiseSchedule, method: str, grid: str, steps: int) -> Sampler | None:
    try:
        return Sampler(schedule, method, steps, grid)
    except ValueError:  # no such combination
        return None


# every method on every grid: the same samples, or a refusal


def outcomes(
    schedule: NoiseSchedule, pairs: Any, steps: int, monkeypatch: pytest.MonkeyPatch
) -> Counter[str]:
    counts: Counter[str] = Counter()
    for method, grid in pairs:
        sampler = built(schedule, method, grid, steps)
        if sampler is None:
            continue
        apart = written(sampler, monkeypatch)
        assert apart is None or apart < SAME, (method, grid, sampler.to_diffusers(), apart)
        counts["refused" if apart is None else "same"] += 1
    return counts


SOME = [
    *((method, ["trailing", "leading", "karras"][i % 3]) for i, method in enumerate(METHODS)),
    *(
        (["dpm_solver_multistep", "euler_ancestral", "unipc"][i % 3], grid)
        for i, grid in enumerate(GRIDS)
    ),
]


@pytest.mark.parametrize("name", ["epsilon", "zero_snr", "flow"])
def test_some_pairs_load_into_the_same_sampler_or_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = outcomes(SCHEDULES[name], SOME if name == "epsilon" else SOME[::3], 10, monkeypatch)
    assert counts["same"] >= {"epsilon": 8, "zero_snr": 1, "flow": 0}[name]
    assert counts["refused"] > 4


def test_a_class_that_only_draws_as_lcm_does_has_no_boundary_condition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flow = SCHEDULES["flow"]
    # c_skip is 1.2e-3 at the last level
    assert written(Sampler(flow, "lcm", 10, "karras"), monkeypatch) is None
    assert (
        written(Sampler(flow, "lcm", 10, "karras", timestep_scaling=1e9), monkeypatch) or 1
    ) < SAME


@pytest.mark.slow
@pytest.mark.parametrize("steps", [10, 7])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_pair_loads_into_the_same_sampler_or_is_refused(
    name: str, steps: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [(method, grid) for method in METHODS for grid in GRIDS]
    counts = outcomes(SCHEDULES[name], pairs, steps, monkeypatch)
    with capsys.disabled():
        print(
            f"\n{name}, {steps} steps: {counts['same']} the same, {counts['refused']} refused of "
            f"{counts.total()}"
        )
    assert counts.total() > 1000


# what a class can say, it says

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "DDIMScheduler": [{"final": "sigma_min", "steps_offset": 1}, {"eta": 1.0}],
    "DDPMScheduler": [{"variance_type": "fixed_large"}],
    "EulerDiscreteScheduler": [
        {"sigma_max": 10.0, "grid": "karras"},
        {"steps_offset": 1, "grid": "leading"},
    ],
    "DPMSolverMultistepScheduler": [
        {"order": 3, "solver_type": "heun"},
        {"order": 3, "euler_at_final": True},
        {"algorithm": "sde-dpmsolver++"},
        {"algorithm": "dpmsolver", "final": "stay"},
        {"algorithm": "sde-dpmsolver", "final": "sigma_min"},
        {"lower_order_final": False, "final": "stay", "grid": "leading"},
        {"lambda_min": -2.0},
    ],
    "DPMSolverSinglestepScheduler": [{"order": 3}, {"solver_type": "heun"}, {"order": 1}],
    "DEISMultistepScheduler": [{"order": 3}, {"order": 1, "lower_order_final": False}],
    "UniPCMultistepScheduler": [
        {"order": 3},
        {"order": 3, "lower_order_final": False, "final": "sigma_min"},
        {"solver_type": "bh1", "final": "stay"},
        {"disable_corrector": (0, 1)},
    ],
    "SASolverScheduler": [{"predictor_order": 3, "corrector_order": 4}, {"predict_x0": False}],
    "PNDMScheduler": [{"final": "zero"}],
    "LCMScheduler": [{"original_steps": 25}, {"timestep_scaling": 5.0}],
    "TCDScheduler": [{"original_steps": 25}],
    "DPMSolverMultistepInverseScheduler": [{"order": 3, "algorithm": "dpmsolver"}],
}
NEVER = {
    (name, grid) for name, kind in CLASSES.items() if kind.cut for grid in ("exponential", "beta")
}
"""Rounding errors decide which whole times they show."""
WRITTEN = [name for name, kind in CLASSES.items() if kind.written]


def of_class(name: str) -> NoiseSchedule:
    return SCHEDULES["flow_shifted" if name.startswith("FlowMatch") else "epsilon"]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if "KDPM2" in name else ()) for name in WRITTEN],
)
def test_a_sampler_by_class_name_is_written_as_that_class(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, schedule = CLASSES[name], of_class(name)
    cases: list[dict[str, Any]] = [
        {},
        *({"grid": grid} for grid in kind.lays),
        *VARIANTS.get(name, []),
    ]
    for case in cases:
        for steps in (10, 8) if not case else (10,):
            stepping = kind.strides and case.get("grid") in ("linspace", "trailing")
            if (name, case.get("grid")) in NEVER or (
                stepping and (case["grid"] == "linspace" or name[:4] == "PNDM")
            ):
                continue
            if name == "PNDMScheduler" and steps == 8:
                continue  # half of its stride is no timestep
            if "KDPM2" in name and case.get("grid", "karras") != "karras":
                continue  # which take a second to set their timesteps
            sampler = Sampler(schedule, name, steps, **case)
            config = sampler.to_diffusers()
            assert config["_class_name"] == name or case.get("eta") == 1.0, case
            apart = written(sampler, monkeypatch)
            assert apart is not None and apart < RELATIVE, (case, steps, apart)


# a class name is the class with its defaults


# which need other schedules or other loops: in test_agreement_classes and the files of their
# samplers
OF_THEIR_OWN = {*("CMStochasticIterativeScheduler", "CogVideoXDPMScheduler", "UnCLIPScheduler")}


def default_pair(name: str, prediction: str) -> tuple[NoiseSchedule, Any]:
    """A schedule, and the class with default options on it, clipping aside: that is an argument of
    a run of ours.
    """
    keys: dict[str, Any] = {"prediction_type": prediction, **BETAS}
    schedule = NoiseSchedule.scaled_linear(prediction=prediction)
    if name.startswith("FlowMatch"):
        keys, schedule = {"shift": 3.0}, NoiseSchedule.flow(shift=3.0)
    if name.startswith("EDM"):
        keys, schedule = {}, NoiseSchedule.karras()
    keys |= {"clip_sample": False, "snr_shift_scale": 1.0}
    peer = getattr(peers, name)
    return schedule, peer(
        **{k: v for k, v in keys.items() if k in inspect.signature(peer).parameters}
    )


@pytest.mark.parametrize("name", sorted(set(CLASSES) - OF_THEIR_OWN))
def test_a_class_name_is_the_class_with_its_defaults(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def net(x: Tensor, t: Any) -> Tensor:
        return network(x, t, unit=2.0 if name.startswith("EDM") else 1000)

    for steps in (7,) if "KDPM2" in name else (7, 20):
        for prediction in set(CLASSES[name].predictions) & {"epsilon", "v_prediction"} or {
            "flow_prediction"
        }:
            schedule, scheduler = default_pair(name, prediction)
            their = as_a_pipeline(scheduler, steps, monkeypatch, net)
            assert (
                distance(from_its_start(Sampler(schedule, name, steps), monkeypatch, net), their)
                < RELATIVE
            )


def test_the_defaults_of_the_table_are_those_of_the_classes() -> None:
    for name, kind in CLASSES.items():
        theirs = {
            k: p.default for k, p in inspect.signature(getattr(peers, name)).parameters.items()
        }
        for key, said in kind.keys.items():
            default = theirs[key]
            assert said.default == (tuple(default) if isinstance(default, list) else default), (
                name,
                key,
            )
        if kind.spaced:
            assert theirs["timestep_spacing"] == kind.spacing, name
        elif not name.startswith(("LCM", "TCD")):
            assert "timestep_spacing" not in theirs, name
        assert {FLAGS[g] for g in kind.lays if g in FLAGS} <= set(theirs) or name.startswith(
            "EDM"
        ), name
        assert set(kind.off) <= set(theirs), name
        if kind.switch:
            assert theirs[kind.switch[0]] is kind.switch[1], name


def test_every_class_name_is_in_the_table_or_says_all_itself() -> None:
    named = {name for names in all_names().values() for name in names if name.endswith("Scheduler")}
    alone = {"IPNDM", "KarrasVe", "RePaint", "ScoreSdeVe", "ScoreSdeVp", "VQDiffusion"}
    assert named - set(CLASSES) == {f"{name}Scheduler" for name in alone}
    assert len(named) == 36


def test_what_is_said_wins_over_the_class() -> None:
    sampler = Sampler(EPSILON, "DEISMultistepScheduler", 10, order=3)
    assert (
        sampler.grid,
        dict(sampler.options).get("order", 3),
        sampler.method_options["order"],
    ) == ("linspace", 3, 3)
    trailing = Sampler(EPSILON, "DEISMultistepScheduler", 10, "trailing", final="zero")
    assert trailing.table.steps == Sampler(EPSILON, "deis", 10, "trailing", order=2).table.steps
    karras = Sampler(EPSILON, "DPMSolverMultistepScheduler Karras", 10)
    assert karras == Sampler(EPSILON, "DPMSolverMultistepScheduler", 10, "karras")
    assert all(t.is_integer() for t in karras.timesteps), "as with use_karras_sigmas"
    assert Sampler(
        EPSILON, "EulerDiscreteScheduler", 10, init_noise="marginal"
    ).init_noise_scale == pytest.approx(1.0)
    assert Sampler(EPSILON, "DEISMultistepScheduler", sigmas=[10.0, 1.0]).steps == 2
    assert class_named("DPM++ 2M") is None and class_named("ddimscheduler") == "DDIMScheduler"


def test_the_start_of_the_euler_family() -> None:
    """x is σ z in place of the marginal's sqrt(α² + σ²) z: of α z no noise, which a pipeline leaves
    out.
    """
    sampler = Sampler(EPSILON, "EulerDiscreteScheduler", 5)
    scheduler = peers.EulerDiscreteScheduler(**BETAS)
    scheduler.set_timesteps(5)
    expected = float(scheduler.init_noise_sigma) / (1 + float(scheduler.sigmas[0]) ** 2) ** 0.5
    assert sampler.init_noise_scale == pytest.approx(expected, rel=1e-6)
    noise, seen = torch.ones(1, 2), []
    sampler(lambda x, t: seen.append(x) or x, noise)  # type: ignore[func-returns-value]
    assert seen[0] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="init_noise must be one of marginal, sigma"):
        Sampler(EPSILON, "euler", 5, init_noise="noise")


# refusals, and the nearest


def test_a_refusal_names_the_nearest_class_and_what_differs(tmp_path: Path) -> None:
    sampler = Sampler(EPSILON, "DPM++ 2M Karras", 10)
    with pytest.raises(
        ValueError,
        match=r"DPMSolverMultistepScheduler, differs: .* times up to 0\.\d+ away \(rounding='nearest' is what",
    ):
        EPSILON.save_pretrained(tmp_path, sampler=sampler)
    assert not (tmp_path / CONFIG_NAME).exists()
    rounded = Sampler(EPSILON, "DPM++ 2M Karras", 10, rounding="nearest")
    EPSILON.save_pretrained(tmp_path, sampler=rounded)
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["use_karras_sigmas"] is True


def test_the_nearest_is_written_where_it_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    schedule = SCHEDULES["zero_snr"]
    sampler = Sampler(schedule, "dpmpp_2m", 20)
    with caplog.at_level(logging.WARNING, logger="alphabar"):
        schedule.save_pretrained(tmp_path, sampler=sampler, nearest=True)
    assert "names DPMSolverMultistepScheduler, which is not dpmpp_2m, 20 steps" in caplog.text
    assert "starts at alpha = 0.00024 in the place of 0" in caplog.text
    caplog.clear()
    EPSILON.save_pretrained(tmp_path, sampler=Sampler(EPSILON, "dpmpp_2m", 20), nearest=True)
    assert not caplog.text, "nothing differs"


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (
            ("ddim", 10, "trailing"),
            {"eta": 0.5},
            r"eta=0\.5 is an argument of step\(\) in DDIMScheduler",
        ),
        (("tcd", 4), {"eta": 0.7}, r"eta=0\.7 is an argument of its step\(\)"),
        (("lms", 10, "leading"), {"order": 2}, r"order=2 is an argument of its step\(\)"),
        (("euler", None), {"timesteps": [900, 300]}, "a config does not hold timesteps"),
        (("euler", None), {"sigmas": [10.0, 1.0]}, "a config does not hold sigmas"),
        (
            ("heun", 10, "trailing"),
            {},
            r"starts it from 0\.99767 of the noise \(init_noise='sigma' does so too\)",
        ),
        (("euler", 10, "trailing"), {"final": "sigma_min", "init_noise": "sigma"}, "x / alpha"),
        (("ddim", 10, "linspace"), {"rounded": True}, "steps by T // N"),
        (("dpm_solver_multistep", 10, "beta"), {"rounding": "down"}, "rounding errors decide"),
        (("dpmpp_2s_ancestral", 10), {}, "its method is"),
        (
            ("sa_solver", 10, "trailing"),
            {"tau": 0.5, "final": "sigma_min"},
            r"tau=0\.5 is no option of it",
        ),
        (("ddim_cfg_pp", 10), {}, "its method is"),
    ],
    ids=str,
)
def test_what_differs_is_put_in_words(arguments: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Sampler(EPSILON, *arguments, **options).to_diffusers()


@pytest.mark.parametrize("name", ["epsilon", "flow"])
def test_the_nearest_of_a_method_that_no_class_has_runs_and_draws_noise_where_it_does(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = SCHEDULES[name]
    has_a_class = {method for kind in CLASSES.values() for method in kind.methods}
    for method in METHODS.keys() - (
        has_a_class if name == "epsilon" else {"dpm_2", "dpm_2_ancestral"}
    ):
        sampler = built(schedule, method, METHODS[method].grid, 6)
        try:
            config = sampler.to_diffusers(nearest=True) if sampler else {}
        except ValueError as error:
            assert "no scheduler class of diffusers is near" in str(error)
            assert METHODS[method].inverse or name == "flow", method
            continue
        if sampler is None:
            continue
        scheduler, drawn = loaded(schedule, config), []
        with monkeypatch.context() as patch:
            patch.setitem(globals(), "DRAWS", Counting(drawn))
            assert as_a_pipeline(scheduler, 6, monkeypatch).isfinite().all()
        ancestral = drawn or config["_class_name"] == "DPMSolverSDEScheduler"
        assert bool(ancestral) == (sampler.table.draws > 0), (method, config)


class Counting(list[Any]):
    """Draws that note that they were drawn."""

    def __init__(self, drawn: list[int]) -> None:
        super().__init__(DRAWS)
        self.drawn = drawn

    def __getitem__(self, i: Any) -> Any:
        self.drawn.append(i)
        return super().__getitem__(i)


def test_sampler_and_schedule_must_be_of_one_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the sampler is made for"):
        EPSILON.save_pretrained(tmp_path, sampler=Sampler(SCHEDULES["v"], "ddim", 10))
    with pytest.raises(ValueError, match="sampler must be a Sampler, got str"):
        EPSILON.save_pretrained(tmp_path, sampler="ddim")
    with pytest.raises(ValueError, match="karras curve"):
        Sampler(NoiseSchedule.karras(), "euler", 10).to_diffusers()


def test_a_reading_is_in_the_terms_of_a_sampler() -> None:
    reading = read_config(
        {"_class_name": "UniPCMultistepScheduler", "solver_order": 3, "use_karras_sigmas": True}
    )
    assert (reading.method, reading.grid, reading.of_method["order"]) == ("unipc", "karras", 3)
    assert reading.of_grid == {"rounding": "nearest", "final": "zero"}
    with pytest.raises(ValueError, match="unknown scheduler class 'DDIMSchedulr'; did you mean"):
        read_config({"_class_name": "DDIMSchedulr"})


def test_a_pipeline_that_takes_eta_is_given_it() -> None:
    class Pipeline:
        def __call__(self, eta: float) -> None: ...

    sampler = Sampler(EPSILON, "ddim", 10, eta=0.5)
    assert differences_of(sampler, Pipeline()) == ()
    assert differences_of(sampler)
