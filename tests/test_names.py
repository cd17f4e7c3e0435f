"""Names: everything that people call a sampler resolves, to the method, grid and options that it
stands for.
"""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import diffusers
import pytest
import torch

from alphabar.noising import NoiseSchedule
from alphabar.sampling import GRIDS, METHODS, Knot, Method, Sampler, make_sampler, resolve_method
from alphabar.sampling.names import ALIASES, SUFFIXES, all_names, key_of, resolve, resolve_settings
from alphabar.sampling.standalone import STANDALONE, StandaloneEntry
from alphabar.sampling.standalone.langevin import PredictorCorrector
from alphabar.sampling.standalone.repaint import RePaint
from alphabar.sampling.standalone.vq_diffusion import TokenSchedule

SCHEDULE = NoiseSchedule.scaled_linear(prediction="v_prediction")

# the seed table: the names of A1111 and k-diffusion, and the method that each is
A1111 = {
    "DPM++ 2M": "dpmpp_2m",
    "DPM++ 2M SDE": "dpmpp_2m_sde",
    "DPM++ 2S a": "dpmpp_2s_ancestral",
    "DPM++ SDE": "dpmpp_sde",
    "DPM2": "dpm_2",
    "DPM2 a": "dpm_2_ancestral",
    "DPM adaptive": "dpm_adaptive",
    "DPM fast": "dpm_fast",
    "Euler": "euler",
    "Euler a": "euler_ancestral",
    "Heun": "heun",
    "LMS": "lms",
    "DDIM": "ddim",
    "PLMS": "plms",
    "DEIS": "deis",
    "UniPC": "unipc",
    # later ones
    "DPM++ 3M SDE": "dpmpp_3m_sde",
    "DPM++ 2M SDE Heun": "dpmpp_2m_sde",
    "LCM": "lcm",
    "DDIM CFG++": "ddim_cfg_pp",
}
WITH_KARRAS = ["DPM++ 2M", "DPM++ 2M SDE", "DPM++ 2S a", "DPM++ SDE", "DPM2", "DPM2 a", "LMS"]
SHORT = {
    "k_euler_a": "Euler a", "k_euler": "Euler", "k_lms": "LMS", "k_heun": "Heun", "k_dpm_2": "DPM2", "k_dpm_2_a": "DPM2 a",
    "k_dpmpp_2s_a": "DPM++ 2S a", "k_dpmpp_2m": "DPM++ 2M", "k_dpmpp_sde": "DPM++ SDE", "k_dpmpp_2m_sde_ka": "DPM++ 2M SDE Karras",
    "k_dpm_fast": "DPM fast", "k_dpm_ad": "DPM adaptive", "k_lms_ka": "LMS Karras", "k_dpm_2_ka": "DPM2 Karras",
    "k_dpm_2_a_ka": "DPM2 a Karras", "k_dpmpp_2s_a_ka": "DPM++ 2S a Karras", "k_dpmpp_2m_ka": "DPM++ 2M Karras",
    "k_dpmpp_sde_ka": "DPM++ SDE Karras",
}  # fmt: skip

# the seed table: classes of diffusers
CLASSES = {
    "DDIMScheduler": "ddim",
    "DDIMInverseScheduler": "ddim_inverse",
    "DDPMScheduler": "ddpm",
    "DEISMultistepScheduler": "deis",
    "DPMSolverSinglestepScheduler": "dpm_solver_singlestep",
    "DPMSolverMultistepScheduler": "dpm_solver_multistep",
    "DPMSolverMultistepInverseScheduler": "dpm_solver_inverse",
    "HeunDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "dpm_2",
    "KDPM2AncestralDiscreteScheduler": "dpm_2_ancestral",
    "KarrasVeScheduler": "stochastic_karras_ve",
    "LMSDiscreteScheduler": "lms",
    "PNDMScheduler": "pndm",
    "IPNDMScheduler": "ipndm",
    "ScoreSdeVeScheduler": "score_sde_ve",
    "ScoreSdeVpScheduler": "score_sde_vp",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "VQDiffusionScheduler": "vq_diffusion",
    "UniPCMultistepScheduler": "unipc",
    "RePaintScheduler": "repaint",
    "DPMSolverSDEScheduler": "dpmpp_sde",
    "CMStochasticIterativeScheduler": "consistency",
    # others
    "EDMEulerScheduler": "euler",
    "EDMDPMSolverMultistepScheduler": "dpm_solver_multistep",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchHeunDiscreteScheduler": "flow_heun",
    "FlowMatchLCMScheduler": "lcm",
    "LCMScheduler": "lcm",
    "TCDScheduler": "tcd",
    "SASolverScheduler": "sa_solver",
    "UnCLIPScheduler": "ddpm",
    "DDIMParallelScheduler": "ddim",
    "DDPMParallelScheduler": "ddpm",
    "CogVideoXDDIMScheduler": "ddim",
    "CogVideoXDPMScheduler": "dpmpp_2m_sde",
}

# ComfyUI 0.36's KSampler.SAMPLERS and SCHEDULERS, comfy/samplers.py, in its order, and the method
# and options that each is
COMFYUI: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("euler", {}),
    "euler_cfg_pp": ("ddim_cfg_pp", {}),
    "euler_ancestral": ("euler_ancestral", {}),
    "euler_ancestral_cfg_pp": ("euler_ancestral_cfg_pp", {}),
    "heun": ("heun", {}),
    "heunpp2": ("heunpp2", {}),
    "exp_heun_2_x0": ("exp_heun_2_x0", {}),
    "exp_heun_2_x0_sde": ("exp_heun_2_x0_sde", {}),
    "dpm_2": ("dpm_2", {}),
    "dpm_2_ancestral": ("dpm_2_ancestral", {}),
    "lms": ("lms", {}),
    "dpm_fast": ("dpm_fast", {}),
    "dpm_adaptive": ("dpm_adaptive", {"final": "sigma_min"}),
    "dpmpp_2s_ancestral": ("dpmpp_2s_ancestral", {}),
    "dpmpp_2s_ancestral_cfg_pp": ("dpmpp_2s_ancestral_cfg_pp", {}),
    "dpmpp_sde": ("dpmpp_sde", {}),
    "dpmpp_sde_gpu": ("dpmpp_sde", {}),
    "dpmpp_2m": ("dpmpp_2m", {}),
    "dpmpp_2m_cfg_pp": ("dpmpp_2m_cfg_pp", {}),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", {}),
    "dpmpp_2m_sde_gpu": ("dpmpp_2m_sde", {}),
    "dpmpp_2m_sde_heun": ("dpmpp_2m_sde", {"solver_type": "heun"}),
    "dpmpp_2m_sde_heun_gpu": ("dpmpp_2m_sde", {"solver_type": "heun"}),
    "dpmpp_3m_sde": ("dpmpp_3m_sde", {}),
    "dpmpp_3m_sde_gpu": ("dpmpp_3m_sde", {}),
    "ddpm": ("ddpm", {}),
    "lcm": ("lcm", {}),
    "ipndm": ("ipndm", {}),
    "ipndm_v": ("ipndm_v", {}),
    "deis": ("deis", {}),
    "cfgpp_ud10_ab": ("cfgpp_ud10_ab", {}),
    "res_multistep": ("res_multistep", {}),
    "res_multistep_cfg_pp": ("res_multistep_cfg_pp", {}),
    "res_multistep_ancestral": ("res_multistep", {"eta": 1.0}),
    "res_multistep_ancestral_cfg_pp": ("res_multistep_ancestral_cfg_pp", {}),
    "gradient_estimation": ("gradient_estimation", {}),
    "gradient_estimation_cfg_pp": ("gradient_estimation_cfg_pp", {}),
    "er_sde": ("er_sde", {}),
    "seeds_2": ("seeds_2", {}),
    "seeds_3": ("seeds_3", {}),
    "sa_solver": ("sa_solver", {}),
    "sa_solver_pece": ("sa_solver_pece", {}),
    "ddim": ("ddim", {}),
    "uni_pc": ("unipc", {"order": 3, "solver_type": "bh1"}),
    "uni_pc_bh2": ("unipc", {"order": 3}),
}
COMFYUI_SCHEDULERS = (
    "simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "beta", "normal", "linear_quadratic", "kl_optimal",
)  # fmt: skip

SCHEDULERS = {  # A1111's labels and ComfyUI's names for grids
    "Karras": "karras",
    "Exponential": "exponential",
    "Polyexponential": "polyexponential",
    "SGM Uniform": "sgm_uniform",
    "Simple": "simple",
    "Normal": "normal",
    "DDIM Uniform": "ddim_uniform",
    "DDIM": "ddim_uniform",
    "Beta": "beta",
    "KL Optimal": "kl_optimal",
    "Align Your Steps": "align_your_steps",
    "AYS": "align_your_steps",
    "Uniform": "linspace",
    "linear_quadratic": "linear_quadratic",
    "trailing": "trailing",
}


@pytest.mark.parametrize(
    ("name", "method"),
    [*A1111.items(), *CLASSES.items(), *((name, method) for name, (method, _) in COMFYUI.items())],
)
def test_the_names_of_the_field(name: str, method: str) -> None:
    assert resolve(name)[0].name == method
    assert resolve(name.lower())[0].name == method
    assert resolve(f" {name.upper()} ")[0].name == method


@pytest.mark.parametrize("name", COMFYUI)
def test_every_sampler_and_scheduler_of_comfyui_is_a_method_a_grid_and_options(name: str) -> None:
    method, options = COMFYUI[name]
    entry, implied = resolve(name)
    assert (entry.name, implied) == (method, options)
    assert set(options) <= set(entry.options)
    for scheduler in COMFYUI_SCHEDULERS:
        assert resolve(f"{name}_{scheduler}") == (entry, options | {"grid": scheduler})
        assert scheduler in GRIDS
        if isinstance(entry, Method):
            sampler = Sampler(SCHEDULE, name, 4, scheduler)
            assert (sampler.method.name, sampler.grid) == (method, scheduler)
            assert options.items() <= dict(sampler.options).items()


@pytest.mark.parametrize("name", CLASSES)
def test_the_classes_are_those_of_diffusers(name: str) -> None:
    deprecated = ("KarrasVeScheduler", "ScoreSdeVpScheduler")
    assert name in deprecated or inspect.isclass(getattr(diffusers, name))


@pytest.mark.parametrize("name", WITH_KARRAS)
def test_karras_names(name: str) -> None:
    assert resolve(f"{name} Karras") == (resolve(name)[0], {"grid": "karras"})


@pytest.mark.parametrize(("short", "name"), SHORT.items())
def test_the_short_forms_of_a1111(short: str, name: str) -> None:
    assert resolve(short) == resolve(name)


@pytest.mark.parametrize(
    "name", ["sample_euler_ancestral", "sample_dpmpp_2m_sde", "sample_lms", "sample_dpm_fast"]
)
def test_the_functions_of_k_diffusion(name: str) -> None:
    assert resolve(name) == resolve(name.removeprefix("sample_"))


@pytest.mark.parametrize(("ending", "grid"), SCHEDULERS.items())
def test_schedulers(ending: str, grid: str) -> None:
    for name in ("DPM++ 2M", "Euler a", "dpmpp_2m_sde_gpu", "uni_pc", "DDIM", "k_dpm_2"):
        for joined in (f"{name} {ending}", f"{name}_{ending}".replace(" ", "_").lower()):
            entry, implied = resolve(joined)
            assert (entry, implied) == (resolve(name)[0], resolve(name)[1] | {"grid": grid})


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_is_an_ending(grid: str) -> None:
    assert resolve(f"dpmpp_2m_{grid}") == (METHODS["dpmpp_2m"], {"grid": grid})


def test_what_a_name_implies() -> None:
    assert resolve("DPM++ 2M SDE Heun Karras")[1] == {"solver_type": "heun", "grid": "karras"}
    assert resolve("uni_pc")[1] == {"order": 3, "solver_type": "bh1"}
    assert resolve("FlowMatchEulerDiscreteScheduler")[1] == {"grid": "flow", "end_shifted": True}
    assert resolve("DPM++ 2M AYS SDXL")[1] == {"grid": "align_your_steps", "variant": "sdxl"}
    assert resolve("DPM adaptive")[1] == {"final": "sigma_min"}  # as k-diffusion ends
    for implied in (implied for _, implied in map(resolve, [*A1111, *CLASSES, *COMFYUI, *ALIASES])):
        implied.clear()  # it is the caller's own
    assert resolve("uni_pc")[1]


# names of methods that are for one kind of schedule alone
FLOW, VP = NoiseSchedule.flow(), NoiseSchedule.variance_preserving()
OWN_SCHEDULES = {
    "flow_heun": FLOW,
    "FlowMatchHeunDiscreteScheduler": FLOW,
    "ScoreSdeVpScheduler": VP,
}


def test_no_two_meanings_of_one_name() -> None:
    entries = {**METHODS, **STANDALONE}
    meant: dict[str, set[str]] = {}
    for name, entry in entries.items():
        for called in (name, *entry.aliases):
            meant.setdefault(key_of(called), set()).add(name)
    for alias, (name, _) in ALIASES.items():
        meant.setdefault(key_of(alias), set()).add(name)
    assert {key: names for key, names in meant.items() if len(names) > 1} == {}
    assert not METHODS.keys() & STANDALONE.keys()


def test_what_names_imply_exists() -> None:
    entries = {**METHODS, **STANDALONE}
    implied = [(name, what) for name, entry in entries.items() for what in entry.aliases.values()]
    for name, what in [*implied, *ALIASES.values()]:
        settings = dict(what)
        grid = settings.pop("grid", None)
        entry = entries[name]
        options = entry.options | (
            inspect.signature(GRIDS[grid]).parameters if isinstance(grid, str) else {}
        )
        assert set(settings) <= set(options), name
    assert all(what.get("grid", "karras") in GRIDS for what in SUFFIXES.values())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_sampler_under_all_its_names(name: str) -> None:
    method = METHODS[name]
    assert method.documentation, "a formula's docstring is its documentation"
    assert method.source
    for called in [name, *all_names()[name]]:
        sampler = Sampler(OWN_SCHEDULES.get(called, SCHEDULE), called, steps=6)
        assert sampler.method == method
        assert pickle.loads(pickle.dumps(sampler)) == sampler
    assert resolve(method) == (method, {})


def test_unknown_names_list_the_nearest() -> None:
    cases = {
        "dpm2m": r"^unknown method 'dpm2m'; did you mean 'DPM2', 'DPM\+\+ 2M' or 'DPM2 a'\?$",
        "Eulr": r"^unknown method 'Eulr'; did you mean 'Euler' or 'Euler a'\?$",
        "DPM++ 2MM Karras": r"did you mean 'DPM\+\+ 2M karras', 'DPM\+\+ 3M karras' or ",
        "qqq": "^unknown method 'qqq'; known: cfgpp_ud10_ab, consistency, ddim, .*, vq_diffusion$",
        "": "^unknown method ''; known: ",
        "Karras": "^unknown method 'Karras'",
    }
    for name, message in cases.items():
        for make in (
            resolve,
            resolve_method,
            lambda name: Sampler(SCHEDULE, name),
            lambda name: make_sampler(SCHEDULE, name),
        ):
            with pytest.raises(ValueError, match=message):
                make(name)
    with pytest.raises(ValueError, match=r"^unknown method 5; known: "):
        resolve(5)


# what is said wins over what is implied


def test_settings() -> None:
    assert resolve_settings("DPM++ 2M Karras", 20)[2:] == ("karras", {})
    assert resolve_settings("DPM++ 2M Karras", 20, "exponential")[2:] == ("exponential", {})
    assert resolve_settings("DPM++ 2M Karras", 20, options={"rho": 5.0})[2:] == (
        "karras",
        {"rho": 5.0},
    )
    assert resolve_settings("dpmpp_2m", 20)[2] == "trailing"
    assert resolve_settings("lcm", 4)[2] == resolve_settings("LCMScheduler", 4)[2] == "lcm"
    assert resolve_settings("DPM++ 2M Karras", options={"sigmas": [5, 1, 0]})[1:] == (
        2,
        "sigmas",
        {"sigmas": (5.0, 1.0, 0.0)},
    )
    assert resolve_settings("uni_pc", 8, options={"order": 2}).options == {
        "order": 2,
        "solver_type": "bh1",
    }
    assert Sampler(SCHEDULE, "DPM++ 2M AYS SDXL", 10).timesteps == [
        999,
        845,
        730,
        587,
        443,
        310,
        193,
        116,
        53,
        13,
    ]


def test_options_of_a_methods_own_grid_stay_where_another_grid_has_them() -> None:
    formula = METHODS["ddim"].formula
    own = Method(
        "own",
        formula,
        order=1,
        source="",
        grid="linspace",
        grid_options={"rounded": True, "final": "sigma_min"},
    )
    assert resolve_settings(own, 5).options == {"rounded": True, "final": "sigma_min"}
    assert resolve_settings(own, 5, "karras").options == {"final": "sigma_min"}
    assert resolve_settings(own, 5, options={"final": "zero"}).options == {
        "rounded": True,
        "final": "zero",
    }
    assert resolve_settings(own, options={"timesteps": [5, 2]}).options == {
        "final": "sigma_min",
        "timesteps": (5.0, 2.0),
    }


BAD = [
    ({"etta": 1.0}, r"^unknown option of ddim on the trailing grid 'etta'; did you mean 'eta'\?$"),
    ({"rho": 7.0}, "^unknown option of ddim on the trailing grid 'rho'"),
    (
        {"grid": "karras", "eeta": 1.0},
        r"^unknown option of ddim on the karras grid 'eeta'; did you mean 'eta'\?$",
    ),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_unknown_options(number: int) -> None:
    options, message = BAD[number]
    with pytest.raises(ValueError, match=message):
        Sampler(SCHEDULE, "DDIM", 5, **options)


# samplers that are no table


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return -x


@pytest.mark.parametrize(
    "name", [called for entry in STANDALONE.values() for called in (entry.name, *entry.aliases)]
)
def test_samplers_without_a_table_are_made_by_name(name: str) -> None:
    entry = resolve(name)[0]
    assert isinstance(entry, StandaloneEntry)
    assert entry.documentation
    made = make_sampler(
        TokenSchedule(num_vec_classes=4) if name.startswith(("vq", "VQ")) else SCHEDULE,
        name,
        steps=20,
    )
    assert type(made) is entry.factory
    assert made.steps == (20 if "steps" in entry.options else None)
    assert made.name == entry.name
    schedule = made.schedule
    assert (
        type(Sampler(schedule, name, steps=20)) is type(Sampler(schedule, entry)) is entry.factory
    )
    with pytest.raises(
        ValueError,
        match=rf"^'{name}' has no table of fixed steps; make it with Sampler\(schedule, '{name}'\)$",
    ):
        resolve_method(name)
    with pytest.raises(ValueError, match=f"^unknown option of {entry.name} 'stepss'"):
        make_sampler(SCHEDULE, name, stepss=5)


def test_what_their_names_imply_arrives() -> None:
    assert (
        make_sampler(SCHEDULE, "DPM adaptive").final
        == make_sampler(SCHEDULE, "dpm_adaptive").final
        == "sigma_min"
    )
    assert make_sampler(SCHEDULE, "DPM adaptive", final="zero", rtol=0.01).rtol == 0.01
    assert make_sampler(SCHEDULE, "RePaintScheduler", 20) == RePaint(
        SCHEDULE, 20, eta=0.0, resample_clean=True, grid="leading"
    )
    assert make_sampler(SCHEDULE, "ScoreSdeVeScheduler", 20) == PredictorCorrector(
        SCHEDULE, 20, norm="batch"
    )


def test_make_sampler_makes_tables_too() -> None:
    assert make_sampler(SCHEDULE, "DPM++ 2M Karras", 12, rho=5.0) == Sampler(
        SCHEDULE, "DPM++ 2M Karras", 12, rho=5.0
    )
    assert make_sampler(SCHEDULE, "euler", sigmas=[5.0, 1.0]).steps == 2


def test_a_name_samples(shape: tuple[int, ...] = (2, 1, 4, 4)) -> None:
    for name in ("DPM++ 2M Karras", "DPM adaptive", "Euler a"):
        images = make_sampler(SCHEDULE, name, steps=5)(network, shape, seeds=0)
        assert images.shape == shape
        assert bool(images.isfinite().all())


def test_scheduler_config_names_the_grid() -> None:
    def flags(name: str, **options: Any) -> dict[str, Any]:
        return Sampler(SCHEDULE, name, 10, **options).to_diffusers(nearest=True)

    assert flags("DPM++ 2M Karras")["use_karras_sigmas"]
    assert flags("DPM++ 2M Exponential")["use_exponential_sigmas"]
    assert flags("DPM++ 2M Beta")["use_beta_sigmas"]
    assert flags("DPM++ 2M lu")["use_lu_lambdas"]
    assert flags("DPM++ 2M", final="sigma_min")["final_sigmas_type"] == "sigma_min"
    leading = flags("DPM++ 2M", grid="leading", steps_offset=1, drop_last=True)
    assert (leading["timestep_spacing"], leading["steps_offset"], leading["lower_order_final"]) == (
        "leading",
        1,
        False,
    )
    assert not any(value for key, value in leading.items() if key.startswith("use_"))


def test_an_inverse_runs_upwards() -> None:
    knots: tuple[Knot, ...] = Sampler(SCHEDULE, "DDIMInverseScheduler", 5).knots
    assert knots == Sampler(SCHEDULE, "ddim", 5, "leading").knots[::-1]
