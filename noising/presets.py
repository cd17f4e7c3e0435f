"""Presets: the noise schedules of published models, how they were trained, how they are sampled.

A preset is data. Its schedule is that of the model's ``scheduler_config.json``, i.e. the one that
its pipeline samples with. What it was trained with is a density of noise levels and a weighting.
On a flow the density has a shift of its own, because the two shifts may rightly differ: Lumina 2 is
trained with Flux's line and sampled with 6 (Alpha-VLLM/Lumina-Image-2.0, issue 42).

``None`` stands for what is not published. :meth:`Noising.preset` then says so, and trains with what
the pipeline samples with. To add a model, add an entry; ``docs/presets.md`` lists them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .curves.base import Curve
from .curves.continuous import Flow
from .curves.shifts import TokenLine, empirical_token_shift
from .curves.truncated import Truncated, times_at_levels, truncate
from .io.diffusers import from_diffusers
from .prediction import Prediction, resolve_prediction
from .timesteps import NoiseLevelTimesteps, Timesteps, WithinNoiseLevels, resolve_timesteps
from .timesteps.importance import LossSecondMoment
from .timesteps.shaped import ShapedTimesteps
from .utils.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a model was trained with.

    Args:
        timesteps: an item of ``TIMESTEPS``; None: not published.
        weighting: an item of ``WEIGHTINGS``.
        shift: the shift of the density on a flow: a number, or a function of the image tokens;
            1: published, none; None: not published, or not a flow.
        source: paper and section, or repository and file.

    >>> Training(timesteps="logit_normal", shift=TokenLine(), source="").shift(256)
    1.648...
    """

    timesteps: str | None = None
    weighting: str = "uniform"
    shift: float | TokenLine | None = None
    source: str = "not published"


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """What a model's published pipeline samples with.

    Args:
        scheduler: its scheduler_config.json.
        steps: its default number of steps.
        guidance_scale: its default guidance scale.
        tokens: image tokens at its default size, for a shift that depends on them.
        even: the pipeline gives the scheduler σ = 1 ... 1 / steps, before the shift.
        shift: a function of (tokens, steps) in place of the scheduler's own.
        method: a name of a sampler, where it is not the scheduler's.
        source: repository and file.

    >>> PRESETS["sd3"].pipeline.steps
    28
    """

    scheduler: Mapping[str, Any] = field(repr=False)
    steps: int
    guidance_scale: float
    tokens: int | None = None
    even: bool = False
    shift: Callable[[int, int], float] | None = None
    method: str | None = None
    source: str


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published model: its schedule, its training and its pipeline.

    Args:
        model: the model in words.
        training: what it was trained with.
        pipeline: what its pipeline samples with.
        noise_levels: the least and the largest σ of an expert, after the shift.
        whole: the preset that an expert is a part of.
        distilled: the model is made for the pipeline's few steps.
        note: what else a user should know.

    >>> PRESETS["wan2.2/high"].noise_levels
    (0.875, 1.0)
    """

    model: str
    training: Training
    pipeline: Pipeline
    noise_levels: tuple[float, float] | None = None
    whole: str | None = None
    distilled: bool = False
    note: str = ""

    @property
    def only_training_takes_tokens(self) -> bool:
        """Whether the shift of the training depends on image tokens and the pipeline's does not."""
        return isinstance(self.training.shift, TokenLine) and self.pipeline.tokens is None

    def path(self, tokens: int | None = None, steps: int | None = None) -> tuple[Curve, Prediction]:
        """Return the curve and the prediction type.

        Args:
            tokens: image tokens, for a shift that depends on them; by default those of the
                pipeline's default size.
            steps: sampling steps, for a shift that depends on them (FLUX.2).

        Raises:
            ValueError: if tokens are given and the shift does not depend on them.

        >>> PRESETS["flux"].path(tokens=256)[0].shift
        1.648...
        """
        pipeline = self.pipeline
        tokens = pipeline.tokens if tokens is None else tokens
        curve, prediction = from_diffusers(pipeline.scheduler, tokens)
        if pipeline.shift is not None and isinstance(curve, Flow) and tokens is not None:
            curve = replace(curve, shift=pipeline.shift(tokens, steps or pipeline.steps))
        if self.noise_levels is not None:
            curve = truncate(curve, *times_at_levels(curve, *self.noise_levels))
        return curve, resolve_prediction(prediction)

    def density(
        self, name: str, curve: Curve, tokens: int | None = None, shift: float | None = None
    ) -> Timesteps:
        """Return the density of times that the model was trained with.

        Warns where it is not published, or its shift is not.

        Args:
            name: the name of the preset, for the warning.
            curve: the curve of :meth:`path`.
            tokens: as in :meth:`path`.
            shift: a shift of the training's own.

        Raises:
            ValueError: if a shift is given and the curve is not a flow.

        >>> preset = PRESETS["lumina2"]
        >>> preset.density("lumina2", preset.path()[0]).shift
        3.158...
        """
        told, own = self.training, self.training.shift if shift is None else shift
        if shift is not None and not curve.is_flow:
            raise ValueError(
                f"a training shift is for flows, and {name!r} is {curve.kind}; leave it out"
            )
        lacks = ["density"] if told.timesteps is None else []
        lacks += ["shift"] if curve.is_flow and own is None else []
        if lacks:
            means = {
                "density": "training times are uniform",
                "shift": "the shift is the pipeline's; shift= sets another",
            }
            warnings.warn(
                f"not published of {name}: the {' and the '.join(lacks)} of its training; here "
                + ", ".join(means[word] for word in lacks),
                stacklevel=3,
            )
        if isinstance(own, TokenLine):
            own = own(self.pipeline.tokens or own.max_tokens if tokens is None else tokens)
        density = resolve_timesteps(told.timesteps or "uniform")
        whole = curve.curve if isinstance(curve, Truncated) else curve
        if own is not None and own != getattr(whole, "shift", None):
            density = NoiseLevelTimesteps(density=density, shift=own)
        return self.limited(density)

    def limited(self, density: Timesteps) -> Timesteps:
        """Return a density of the whole schedule, limited to the noise levels of an expert.

        A density that is within noise levels already, and any one if the preset is no expert, stays
        as it is. Of k times for a sample and of importance sampling, the inner density is limited.

        >>> from alphabar.noising import UniformTimesteps
        >>> PRESETS["wan2.2/high"].limited(UniformTimesteps()).low
        0.875
        """
        if self.noise_levels is None or isinstance(density, WithinNoiseLevels):
            return density
        if isinstance(density, LossSecondMoment | ShapedTimesteps):  # must be outermost
            return replace(density, density=self.limited(density.density))
        low, high = self.noise_levels
        return WithinNoiseLevels(density=density, low=low, high=high)


PRESETS: Registry[Preset] = Registry("preset")
"""The presets by name; ``PRESETS.add(name, Preset(...))`` adds one."""

# -- the numbers -----------------------------------------------------------------------------------

_SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
_SD |= {"num_train_timesteps": 1000, "steps_offset": 1, "set_alpha_to_one": False}
_DDPM = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
_DDPM |= {"num_train_timesteps": 1000}
_FLUX = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5}
_FLUX |= {"max_shift": 1.15, "num_train_timesteps": 1000}
_LTX = {"base_image_seq_len": 1024, "max_image_seq_len": 4096, "base_shift": 0.95}
_LTX |= {"max_shift": 2.05, "shift_terminal": 0.1, "num_train_timesteps": 1000}


def _flow(shift: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift, **more}


def _unipc(shift: float) -> dict[str, Any]:
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    return {"_class_name": "UniPCMultistepScheduler", "num_train_timesteps": 1000, **flow}


def _cogvideox(scale: float) -> dict[str, Any]:
    zero = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    ends = {"set_alpha_to_one": True, "timestep_spacing": "trailing"}
    name = {"_class_name": "CogVideoXDDIMScheduler", "snr_shift_scale": scale}
    betas = {key: value for key, value in _SD.items() if key != "steps_offset"}
    return name | betas | zero | ends


_EDM = {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
_EDM |= {"sigma_data": 0.5, "num_train_timesteps": 1000, "prediction_type": "epsilon"}
_UNIFORM = Training(
    timesteps="uniform",
    source="CompVis/stable-diffusion, configs/stable-diffusion/v1-inference.yaml; 2112.10752, §3.2",
)
_REVERSED = "Its network takes 1 - σ as the time and returns x_0 - ε; the pipeline converts both."
_SD3 = Preset(
    model="Stable Diffusion 3",
    training=Training(
        timesteps="logit_normal", shift=3.0, source="2403.03206, §5.3.2 (1024 x 1024) and table 1"
    ),
    pipeline=Pipeline(
        scheduler=_flow(3.0, num_train_timesteps=1000),
        steps=28,
        guidance_scale=7.0,
        source="huggingface/diffusers, StableDiffusion3Pipeline; Stability-AI/sd3.5, sd3_infer.py",
    ),
    note="Its pretraining at 256 x 256 has no shift.",
)
_FLUX_TRAINING = Training(
    timesteps="logit_normal",
    shift=TokenLine(),
    source="2506.15742, §3 (logit-normal, shifted by the resolution); Nerogar/OneTrainer, pull "
    "request 1516 (Black Forest Labs: the line of the scheduler)",
)
_WAN_TRAINING = Training(
    timesteps="logit_normal",
    shift=2.0,
    source="2503.20314 (logit-normal); Wan-Video/Wan2.1, issue 291 (2 at 480p, larger above)",
)
_WAN22 = Preset(
    model="Wan 2.2 T2V A14B, both experts",
    training=Training(source="not published; Wan-Video/Wan2.2, issues 15 and 47"),
    pipeline=Pipeline(
        scheduler=_unipc(3.0),
        steps=50,
        guidance_scale=5.0,
        source="huggingface/diffusers, scripts/convert_wan_to_diffusers.py",
    ),
    note="Wan-Video/Wan2.2, wan/configs/wan_t2v_A14B.py, samples with shift 12 in 40 steps, "
    "guidance 4 above σ = 0.875 and 3 below.",
)
_BOUNDARY = "The boundary is σ after the shift (timestep / 1000): {}, boundary = {:g}."
_T2V, _I2V = "wan/configs/wan_t2v_A14B.py", "wan/configs/wan_i2v_A14B.py"
_WAN22_I2V = replace(
    _WAN22,
    model="Wan 2.2 I2V A14B, both experts",
    note="Wan-Video/Wan2.2, wan/configs/wan_i2v_A14B.py, samples with shift 5 in 40 steps, "
    "guidance 3.5.",
)


def _expert(whole: Preset, name: str, low: float, high: float, file: str) -> Preset:
    model = whole.model.replace("both experts", f"the {'low' if low == 0 else 'high'} noise expert")
    note = _BOUNDARY.format(f"Wan-Video/Wan2.2, {file}", high if low == 0 else low)
    return replace(whole, model=model, whole=name, noise_levels=(low, high), note=note)


_TABLE: dict[str, Preset] = {
    "sd15": Preset(
        model="Stable Diffusion 1.5",
        training=_UNIFORM,
        pipeline=Pipeline(
            scheduler={
                "_class_name": "PNDMScheduler",
                "prediction_type": "epsilon",
                "skip_prk_steps": True,
                "timestep_spacing": "leading",
                **_SD,
            },
            steps=50,
            guidance_scale=7.5,
            source="huggingface/diffusers, StableDiffusionPipeline and its single-file loader",
        ),
    ),
    "sd21": Preset(
        model="Stable Diffusion 2.1, 768 (v)",
        training=Training(
            timesteps="uniform",
            source="Stability-AI/stablediffusion, configs/stable-diffusion/v2-inference-v.yaml",
        ),
        pipeline=Pipeline(
            scheduler={
                "_class_name": "DDIMScheduler",
                "prediction_type": "v_prediction",
                "clip_sample": False,
                "timestep_spacing": "leading",
                **_SD,
            },
            steps=50,
            guidance_scale=7.5,
            source="huggingface/diffusers, loaders/single_file_utils.py",
        ),
        note="The base model (512) predicts epsilon.",
    ),
    "sdxl": Preset(
        model="Stable Diffusion XL 1.0",
        training=Training(timesteps="uniform", source="2307.01952, §2 and appendix"),
        pipeline=Pipeline(
            scheduler={
                "_class_name": "EulerDiscreteScheduler",
                "prediction_type": "epsilon",
                "interpolation_type": "linear",
                "timestep_spacing": "leading",
                **{k: v for k, v in _SD.items() if k != "set_alpha_to_one"},
            },
            steps=50,
            guidance_scale=5.0,
            source="huggingface/diffusers, loaders/single_file_utils.py",
        ),
        note="The last stage of its training has offset noise of 0.05.",
    ),
    "kolors": Preset(
        model="Kolors",
        training=Training(source="not published"),
        pipeline=Pipeline(
            scheduler={
                "_class_name": "EulerDiscreteScheduler",
                "prediction_type": "epsilon",
                "beta_schedule": "scaled_linear",
                "beta_start": 0.00085,
                "beta_end": 0.014,
                "num_train_timesteps": 1100,
                "steps_offset": 1,
                "timestep_spacing": "leading",
            },
            steps=50,
            guidance_scale=5.0,
            source="Kwai-Kolors/Kolors, scheduler_config.json; huggingface/diffusers, "
            "KolorsPipeline",
        ),
    ),
    "playground-v2.5": Preset(
        model="Playground v2.5",
        training=Training(weighting="uniform", source="2402.17245, §2.1: EDM, without numbers"),
        pipeline=Pipeline(
            scheduler=_EDM
            | {"_class_name": "EDMDPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++"}
            | {"solver_order": 2, "solver_type": "midpoint", "final_sigmas_type": "zero"},
            steps=50,
            guidance_scale=3.0,
            source="huggingface/diffusers, loaders/single_file_utils.py; the model's card",
        ),
    ),
    "sd3": _SD3,
    "sd3.5": replace(
        _SD3,
        model="Stable Diffusion 3.5",
        training=Training(source="not published; 2403.03206 is of SD3"),
        note="",
    ),
    "flux": Preset(
        model="FLUX.1 dev",
        training=_FLUX_TRAINING,
        pipeline=Pipeline(
            scheduler=_flow(3.0, use_dynamic_shifting=True, **_FLUX),
            steps=28,
            guidance_scale=3.5,
            tokens=4096,
            even=True,
            source="black-forest-labs/FLUX.1-dev, scheduler_config.json; huggingface/diffusers, "
            "FluxPipeline",
        ),
        note="The guidance is an input of the network.",
    ),
    "flux-schnell": Preset(
        model="FLUX.1 schnell",
        distilled=True,
        training=Training(source="distilled; not published"),
        pipeline=Pipeline(
            scheduler=_flow(1.0, use_dynamic_shifting=False, **_FLUX),
            steps=4,
            guidance_scale=0.0,
            even=True,
            source="black-forest-labs/flux, src/flux/cli.py (4 steps, no shift)",
        ),
    ),
    "flux2": Preset(
        model="FLUX.2 dev",
        training=replace(
            _FLUX_TRAINING,
            source="Nerogar/OneTrainer, pull request 1516 (Black Forest Labs: the line of FLUX.1)",
        ),
        pipeline=Pipeline(
            scheduler=_flow(3.0, use_dynamic_shifting=True, **_FLUX),
            steps=50,
            guidance_scale=4.0,
            tokens=4096,
            even=True,
            shift=empirical_token_shift,
            source="huggingface/diffusers, scripts/convert_flux2_to_diffusers.py and "
            "Flux2Pipeline.compute_empirical_mu",
        ),
        note="Sampled with a shift by tokens and steps that is larger than that of training.",
    ),
    "qwen-image": Preset(
        model="Qwen-Image",
        training=Training(
            timesteps="logit_normal", source="2508.02324 (logit-normal; shift not published)"
        ),
        pipeline=Pipeline(
            scheduler=_flow(
                1.0,
                **_FLUX
                | {"max_image_seq_len": 8192, "max_shift": 0.9, "shift_terminal": 0.02}
                | {"use_dynamic_shifting": True},
            ),
            steps=50,
            guidance_scale=4.0,
            tokens=4096,
            even=True,
            source="Qwen/Qwen-Image, scheduler_config.json, as in aigc-apps/VideoX-Fun and "
            "bghira/SimpleTuner",
        ),
    ),
    "sana": Preset(
        model="Sana",
        training=Training(
            timesteps="logit_normal",
            shift=3.0,
            source="NVlabs/Sana, configs/sana_config/1024ms; 2410.10629",
        ),
        pipeline=Pipeline(
            scheduler={
                "_class_name": "DPMSolverMultistepScheduler",
                "algorithm_type": "dpmsolver++",
                "solver_order": 2,
                "solver_type": "midpoint",
                "num_train_timesteps": 1000,
                "prediction_type": "flow_prediction",
                "use_flow_sigmas": True,
                "flow_shift": 3.0,
            },
            steps=20,
            guidance_scale=4.5,
            source="huggingface/diffusers, scripts/convert_sana_to_diffusers.py and SanaPipeline",
        ),
    ),
    "lumina2": Preset(
        model="Lumina-Image 2.0",
        training=Training(
            timesteps="logit_normal",
            shift=TokenLine(),
            source="Alpha-VLLM/Lumina-Image-2.0, issue 42 (the line of Flux) and transport/",
        ),
        pipeline=Pipeline(
            scheduler=_flow(6.0, num_train_timesteps=1000),
            steps=30,
            guidance_scale=4.0,
            even=True,
            source="Alpha-VLLM/Lumina-Image-2.0, issue 42; huggingface/diffusers, Lumina2Pipeline",
        ),
        note=_REVERSED,
    ),
    "z-image-turbo": Preset(
        model="Z-Image Turbo",
        distilled=True,
        training=Training(source="distilled; not published"),
        pipeline=Pipeline(
            scheduler=_flow(3.0, num_train_timesteps=1000, use_dynamic_shifting=False),
            steps=8,
            guidance_scale=0.0,
            even=True,
            source="Tongyi-MAI/Z-Image-Turbo, scheduler_config.json; huggingface/diffusers, "
            "ZImagePipeline",
        ),
        note=_REVERSED,
    ),
    "auraflow": Preset(
        model="AuraFlow",
        training=Training(source="not published"),
        pipeline=Pipeline(
            scheduler=_flow(1.73, num_train_timesteps=1000),
            steps=50,
            guidance_scale=3.5,
            source="comfyanonymous/ComfyUI, comfy/supported_models.py; huggingface/diffusers, "
            "AuraFlowPipeline",
        ),
    ),
    "pixart": Preset(
        model="PixArt-α and PixArt-Σ",
        training=Training(
            timesteps="uniform", source="PixArt-alpha/PixArt-alpha, diffusion/iddpm.py; 2310.00426"
        ),
        pipeline=Pipeline(
            scheduler={
                "_class_name": "DPMSolverMultistepScheduler",
                "algorithm_type": "dpmsolver++",
                "solver_order": 2,
                "prediction_type": "epsilon",
                "timestep_spacing": "linspace",
                **_DDPM,
            },
            steps=20,
            guidance_scale=4.5,
            source="huggingface/diffusers, scripts/convert_pixart_alpha_to_diffusers.py",
        ),
        note="The network has a second half, the learned variance, which the loss leaves out.",
    ),
    "dit": Preset(
        model="DiT",
        training=Training(
            timesteps="uniform", source="facebookresearch/DiT, diffusion/__init__.py; 2212.09748"
        ),
        pipeline=Pipeline(
            scheduler={
                "_class_name": "DDIMScheduler",
                "prediction_type": "epsilon",
                "clip_sample": False,
                **_DDPM,
            },
            steps=50,
            guidance_scale=4.0,
            source="huggingface/diffusers, scripts/convert_dit_to_diffusers.py; "
            "facebookresearch/DiT, sample.py (clip_denoised=False)",
        ),
        note="The network has a second half, the learned variance, which the loss leaves out.",
    ),
    "ddpm-cifar10": Preset(
        model="DDPM, CIFAR-10",
        training=Training(timesteps="uniform", source="2006.11239, §4 and eq. 14"),
        pipeline=Pipeline(
            scheduler={
                "_class_name": "DDPMScheduler",
                "prediction_type": "epsilon",
                "clip_sample": True,
                "variance_type": "fixed_large",
                **_DDPM,
            },
            steps=1000,
            guidance_scale=1.0,
            source="google/ddpm-cifar10-32, scheduler_config.json; 2006.11239, §4",
        ),
    ),
    "edm": Preset(
        model="EDM",
        training=Training(
            timesteps="lognormal_sigma:mean=-1.2,std=1.2", source="2206.00364, table 1"
        ),
        pipeline=Pipeline(
            scheduler=_EDM,
            steps=18,
            guidance_scale=1.0,
            method="heun",
            source="2206.00364, table 1 and §3 (CIFAR-10: 18 steps of Heun)",
        ),
        note="The loss of F is unweighted: that is EDM's weighting of x_0.",
    ),
    "edm2": Preset(
        model="EDM2",
        training=Training(
            timesteps="lognormal_sigma:mean=-0.4,std=1.0",
            weighting="learned_uncertainty:weighting=edm",
            source="2312.02696, table 6 and eq. 21; NVlabs/edm2, training/training_loop.py",
        ),
        pipeline=Pipeline(
            scheduler=_EDM,
            steps=32,
            guidance_scale=1.0,
            method="heun",
            source="NVlabs/edm2, generate_images.py (32 steps of Heun)",
        ),
    ),
    "svd": Preset(
        model="Stable Video Diffusion",
        training=Training(
            timesteps="lognormal_sigma:mean=0.7,std=1.6",
            source="pixeli99/SVD_Xtend, train_svd.py; its paper, 2311.15127, trains with EDM",
        ),
        pipeline=Pipeline(
            scheduler={
                "_class_name": "EulerDiscreteScheduler",
                "prediction_type": "v_prediction",
                "sigma_min": 0.002,
                "sigma_max": 700.0,
                "use_karras_sigmas": True,
                "timestep_type": "continuous",
                "timestep_spacing": "leading",
                "interpolation_type": "linear",
                **{k: v for k, v in _SD.items() if k != "set_alpha_to_one"},
            },
            steps=25,
            guidance_scale=3.0,
            source="huggingface/diffusers, tests/pipelines/stable_video_diffusion",
        ),
        note="The guidance rises from 1 at the first frame to 3 at the last.",
    ),
    "wan2.1": Preset(
        model="Wan 2.1",
        training=_WAN_TRAINING,
        pipeline=replace(_WAN22.pipeline),
        note="The shift of sampling is 3 for 480p and 5 for 720p (diffusers, WanPipeline).",
    ),
    "wan2.2": _WAN22,
    "wan2.2/high": _expert(_WAN22, "wan2.2", 0.875, 1.0, _T2V),
    "wan2.2/low": _expert(_WAN22, "wan2.2", 0.0, 0.875, _T2V),
    "wan2.2-i2v": _WAN22_I2V,
    "wan2.2-i2v/high": _expert(_WAN22_I2V, "wan2.2-i2v", 0.9, 1.0, _I2V),
    "wan2.2-i2v/low": _expert(_WAN22_I2V, "wan2.2-i2v", 0.0, 0.9, _I2V),
    "wan2.2-ti2v": replace(
        _WAN22,
        model="Wan 2.2 TI2V 5B",
        pipeline=replace(_WAN22.pipeline, scheduler=_unipc(5.0)),
        note="",
    ),
    "hunyuanvideo": Preset(
        model="HunyuanVideo",
        training=Training(
            timesteps="logit_normal",
            shift=1.0,
            source="2412.03603 (logit-normal); Tencent-Hunyuan/HunyuanVideo, issue 35 (the shift "
            "is of sampling alone)",
        ),
        pipeline=Pipeline(
            scheduler=_flow(7.0, num_train_timesteps=1000),
            steps=50,
            guidance_scale=6.0,
            even=True,
            source="huggingface/diffusers, scripts/convert_hunyuan_video_to_diffusers.py and "
            "HunyuanVideoPipeline",
        ),
        note="The guidance is an input of the network.",
    ),
    "ltx": Preset(
        model="LTX-Video",
        training=Training(
            timesteps="logit_normal",
            shift=TokenLine(1024, 4096, 0.95, 2.05),
            source="2501.00103; Lightricks/LTX-2, ltx_trainer/timestep_samplers.py",
        ),
        pipeline=Pipeline(
            scheduler=_flow(1.0, use_dynamic_shifting=True, **_LTX),
            steps=50,
            guidance_scale=3.0,
            tokens=7392,
            even=True,
            source="huggingface/diffusers, scripts/convert_ltx_to_diffusers.py and LTXPipeline",
        ),
        note="Past 4096 tokens the shift grows with the exponential of the tokens (Lightricks/"
        "LTX-2, issue 291): give tokens=4096 for a clamped one. Its trainer also stretches the "
        "density between the percentiles 0.5 and 99.9, and draws a tenth of the times uniformly.",
    ),
    "cogvideox-2b": Preset(
        model="CogVideoX 2B",
        training=Training(
            timesteps="stratified",
            source="2408.06072 (v, zero terminal SNR, explicit uniform sampling)",
        ),
        pipeline=Pipeline(
            scheduler=_cogvideox(3.0),
            steps=50,
            guidance_scale=6.0,
            source="huggingface/diffusers, scripts/convert_cogvideox_to_diffusers.py and "
            "CogVideoXPipeline",
        ),
        note="The SNR is divided by 3.",
    ),
}
_TABLE["ltx2"] = replace(
    _TABLE["ltx"],
    model="LTX-2",
    pipeline=replace(
        _TABLE["ltx"].pipeline,
        steps=30,
        tokens=6144,
        source="huggingface/diffusers, scripts/convert_ltx2_to_diffusers.py and LTX2Pipeline",
    ),
)
_TABLE["cogvideox"] = replace(
    _TABLE["cogvideox-2b"],
    model="CogVideoX 5B",
    pipeline=replace(_TABLE["cogvideox-2b"].pipeline, scheduler=_cogvideox(1.0)),
    note="",
)
for _name, _preset in _TABLE.items():
    PRESETS.add(_name, _preset)
