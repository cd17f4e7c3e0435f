"""What run.py changes: (file, pytest arguments) -> pairs of a text that stands once in the file,
and the mistake.

A test selection is some paths, or some paths and ``-k words``. Keep texts short and the tests near,
so that a run takes minutes.
"""

from __future__ import annotations

CURVES, SHIFTS = "tests/test_curves.py", "tests/test_shifts.py"
WEIGHTING, METHODS = "tests/test_weighting.py", "tests/test_methods_order.py"
GRIDS, PEERS = "tests/test_grids.py", "tests/test_agreement_diffusers.py"
SAMPLER, LOOPS = "tests/test_sampler.py", "tests/test_previews_in_loops.py"


def of(*methods: str) -> str:
    """The measurements of these methods."""
    return f"{METHODS} -k (point_mass or local_order or weak_order or every_variant) and ({' or '.join(methods)})"


MUTATIONS: dict[tuple[str, str], list[tuple[str, str]]] = {
    # noising
    ("noising/curves/betas.py", CURVES): [
        ("torch.linspace(start**0.5, end**0.5, n", "torch.linspace(start, end, n"),
        ("_times(n) + 0.008) / 1.008", "_times(n) + 0.008) / 1.0"),
        ("math.expm1(-12 / n)", "math.expm1(-11 / n)"),
        ("torch.linspace(-6, 6, n", "torch.linspace(-5, 6, n"),
        ("distance.abs() + 1e-6).log()", "distance.abs() + 1e-3).log()"),
        ("_laplace_log_snr(n)).sqrt())", "_laplace_log_snr(n)))"),
    ],
    ("noising/curves/discrete.py", CURVES): [
        ("scale = alpha[0] / (alpha[0] - alpha[-1])", "scale = 1 / (alpha[0] - alpha[-1])"),
        ("torch.sqrt(one_minus * (1 + rescaled))", "torch.sqrt(one_minus * (1 - rescaled))"),
        ("torch.cumsum(torch.log1p(-curve.betas()), 0)", "torch.cumsum(-curve.betas(), 0)"),
        ("(1 - f) * table.alpha[k], alpha)", "f * table.alpha[k], alpha)"),
        ("k = t.floor().clamp(0", "k = t.round().clamp(0"),
        ("on_table = t == nearest", "on_table = t < 0"),
        (
            "f = torch.where(to_zero, (1 - alpha / table.alpha[k])",
            "f = torch.where(to_zero, (alpha / table.alpha[k])",
        ),
    ],
    ("noising/curves/discrete.py", "tests/test_timesteps.py"): [
        (".ceil()\n            .long()", ".floor()\n            .long()")
    ],
    ("noising/curves/discrete.py", SHIFTS): [
        ('require_factor("factor", factor) ** 2', 'require_factor("factor", factor)'),
        ("torch.hypot(alpha, math.sqrt(scale) * sigma)", "torch.hypot(alpha, scale * sigma)"),
        (
            "snr_shift_scale=before, rescaled_snr",
            "snr_shift_scale=self.snr_shift_scale, rescaled_snr",
        ),
    ],
    ("noising/curves/continuous.py", CURVES): [
        ("return (1 - t) / (1 + (self.shift - 1) * t)", "return (1 - t) / (1 + self.shift * t)"),
        ("- 0.5 * t * self.beta_min", "- 0.25 * t * self.beta_min"),
        (
            "log_alpha.exp(), -torch.expm1(2 * log_alpha)\n",
            "log_alpha.exp(), -torch.expm1(log_alpha)\n",
        ),
        ("return 2 / (r + (r**2 + 4).sqrt())", "return 2 / (r + (r**2 + 2).sqrt())"),
        (
            "(2 / math.pi) * torch.atan((-0.5 * value).exp())",
            "(2 / math.pi) * torch.atan((-value).exp())",
        ),
        (
            "return index / (self.num_train_timesteps - 1)",
            "return index / self.num_train_timesteps",
        ),
    ],
    ("noising/curves/continuous.py", f"{PEERS} -k edm"): [
        (
            "return 0.25 * t.to(evaluation_dtype(t)).log()",
            "return 0.5 * t.to(evaluation_dtype(t)).log()",
        ),
        ("** 2 + self.sigma_data**2).rsqrt()", "** 2 + self.sigma_data).rsqrt()"),
    ],
    (
        "noising/curves/continuous.py",
        "tests/test_timesteps.py tests/test_noising.py tests/test_curves.py",
    ): [("((low + u * (high - low)) ** self.rho)", "((low + u * high) ** self.rho)")],
    ("noising/curves/shifts.py", "tests/test_grids.py tests/test_curves.py"): [
        ("shift * sigma / (1 + (shift - 1) * sigma)", "shift * sigma / (1 + shift * sigma)")
    ],
    ("noising/curves/shifts.py", SHIFTS): [
        ("mu = base_shift + (tokens - base_tokens)", "mu = base_shift + tokens"),
        ("return sides[0] * sides[1]", "return sides[0] ** 2"),
        ('700.0)) if kind == "exponential"', '700.0)) if kind == "linear"'),
    ],
    ("noising/prediction.py", "tests/test_prediction.py"): [
        ("return -sigma, alpha", "return sigma, alpha"),
        ("return -1.0, 1.0", "return 1.0, -1.0"),
        ("return 0.0, -1.0 / sigma", "return 0.0, -sigma"),
        ("return (sigma * out - c1 * x_t) /", "return (sigma * out + c1 * x_t) /"),
        ("return (c0 * x_t - alpha * out) /", "return (c0 * x_t - sigma * out) /"),
        (
            "return sigma / (d * norm), -(alpha * d) / norm",
            "return sigma / (d * norm), -alpha / norm",
        ),
    ],
    ("noising/weighting/base.py", WEIGHTING): [
        ("det**2) / det**2", "det**2) / det"),
        (
            "return weight.clamp(min=self.floor) if self.floor else weight",
            "return weight + self.floor",
        ),
    ],
    ("noising/weighting/schemes.py", WEIGHTING): [
        (
            "return minimum(alpha2, self.gamma * sigma2)",
            "return minimum(alpha2, self.gamma * (alpha2 + sigma2))",
        ),
        ("self.gamma / (alpha2 + self.gamma * sigma2)", "self.gamma / (alpha2 + sigma2)"),
        ("math.exp(-self.bias))", "math.exp(self.bias))"),
        ("(self.k * sigma2 + alpha2)) ** self.gamma", "(self.k * sigma2 + alpha2))"),
        ("return alpha2.sqrt() * sigma2.sqrt()", "return alpha2.sqrt() * sigma2"),
        ("return alpha2 + sigma2 / self.sigma_data**2", "return alpha2 + sigma2 / self.sigma_data"),
        ("** 2 / (alpha2 + sigma2)", "** 2 / (2 * alpha2 + sigma2)"),
        (
            "return alpha2 + self.strength * (alpha2 + sigma2)",
            "return alpha2 + self.strength * alpha2",
        ),
    ],
    ("noising/weighting/trainer_compat.py", WEIGHTING): [
        (
            "return minimum(alpha2 + sigma2, self.gamma * sigma2)",
            "return minimum(alpha2, self.gamma * sigma2)",
        ),
        ("alpha2 / CAP**0.5)", "alpha2 / CAP)"),
        ("(2 * sigma2 + alpha2)) ** self.gamma", "(sigma2 + alpha2)) ** self.gamma"),
        ("(CAP / (CAP + 1)))", "1.0)"),
    ],
    ("noising/timesteps/densities.py", "tests/test_timesteps.py"): [
        (
            "u - self.scale * (torch.sin(0.5 * math.pi * u) ** 2 - u)",
            "u - self.scale * (torch.sin(0.5 * math.pi * u) - u)",
        ),
        ("return sine / (sine + cosine)", "return sine / (sine + 2 * cosine)"),
        ("return beta_quantile(u, self.a, self.b)", "return beta_quantile(u, self.b, self.a)"),
        ("return -2 * (self.mean + self.std", "return -(self.mean + self.std"),
    ],
    ("noising/losses.py", "tests/test_losses.py"): [
        ("return within * (d - 0.5 * within)", "return within * (d - within)"),
        ("return d**2 / ((d**2 + c**2).sqrt() + c)", "return d**2 / ((d**2 + c**2).sqrt() - c)"),
    ],
    ("noising/curves/truncated.py", SHIFTS): [
        ("((1 - u) * self.first + u * self.last)", "(u * self.first + (1 - u) * self.last)"),
        ("index + int(self.first)\n", "index\n"),
    ],
    ("noising/io/diffusers.py", "tests/test_pretrained.py"): [
        ('config["rescale_betas_zero_snr"] = zero', 'config["rescale_betas_zero_snr"] = False'),
        ('"beta_end": curve.beta_end,', '"beta_end": curve.beta_start,'),
        ("-torch.expm1(log_alpha_bar.diff(", "-torch.expm1(0.5 * log_alpha_bar.diff("),
        ('"flow_shift": curve.shift, "prediction_type"', '"flow_shift": 1.0, "prediction_type"'),
        ('"timestep_spacing": ("trailing",', '"timestep_spacing": ("leading",'),
        (
            "shift=shift, num_train_timesteps=config.get",
            "shift=1.0, num_train_timesteps=config.get",
        ),
        ("_DISCRETE_DEFAULTS | _DEFAULTS.get(name, {}) | said", "_DISCRETE_DEFAULTS | said"),
    ],
    # sampling: methods
    (
        "sampling/methods/steps.py",
        of("ddim", "ddpm", "euler_ancestral") + " or posterior or beta_tilde",
    ): [
        ("math.sqrt(max(n.sigma**2 - r**2, 0.0)) / s.sigma", "max(n.sigma - r, 0.0) / s.sigma"),
        ("(n.alpha - keep * s.alpha) * D", "(s.alpha - keep * n.alpha) * D"),
        (
            "return n.sigma * math.sqrt(max(1 - ratio**2, 0.0))",
            "return n.sigma * max(1 - ratio**2, 0.0)",
        ),
    ],
    ("sampling/methods/steps.py", f"{PEERS} -k dpmpp_2m_sde"): [
        ("math.expm1(-2 * eta *", "math.expm1(-eta *")
    ],
    ("sampling/methods/euler.py", f"{PEERS} -k DDPM or DDIM or zero_terminal"): [
        ("beta = 1 - (s.alpha / n.alpha) ** 2", "beta = 1 - s.alpha / n.alpha"),
        ("at = Knot(n.timestep, s.alpha", "at = Knot(s.timestep, s.alpha"),
    ],
    ("sampling/methods/steps.py", f"{PEERS} -k DDPM or DDIM or zero_terminal"): [
        (
            "r = eta * posterior_std(s, n)\n    return",
            "r = eta**2 * posterior_std(s, n)\n    return",
        )
    ],
    ("sampling/methods/dpm_solver.py", f"{METHODS} -k third_order_blocks"): [
        (
            "(r2 - r1)\n    return m[0] + (phi_2(H) / whole) * D1 + (phi_3",
            "(r2 - r1)\n    return m[0] + (phi_2(H) / whole) * D1 + 0.5 * (phi_3",
        ),
        ("D2 = 2.0 * (slope[1] - slope[0]) / (r2 - r1)", "D2 = (slope[1] - slope[0]) / (r2 - r1)"),
    ],
    ("sampling/methods/dpm_solver.py", "tests/test_agreement_classes.py -k end_of_an_inversion"): [
        ("1 if euler_at_final and i == steps - 1 else order", "order")
    ],
    ("sampling/methods/dpm_solver.py", f"{PEERS} -k DPMSolver"): [
        ("return min(order, steps - i) if lower_order_final", "return order if lower_order_final"),
        (
            "[value, *past[: order - 2]] if order > 1 else []\n    if n.sigma",
            "[value] if order > 1 else []\n    if n.sigma",
        ),
        (
            "E = weighted_mean(m, lambdas, h, -h, solver_type)",
            "E = weighted_mean(m, lambdas, h, h, solver_type)",
        ),
        ("drift = 2 * (n.sigma - n.alpha", "drift = (n.sigma - n.alpha"),
        ("        orders[-1] = 1\n", "        pass\n"),
        ("lower_order_final and steps < 15", "lower_order_final and steps < 25"),
        (
            'return m[0] + (0.5 if solver_type == "midpoint"',
            'return m[0] + (0.5 if solver_type == "heun"',
        ),
    ],
    ("sampling/methods/heun.py", of("heun")): [("0.5 * (e + e_n)", "0.4 * e + 0.6 * e_n")],
    ("sampling/methods/heun.py", f"{METHODS} -k straight_path"): [
        ("(0.5 * whole_n * gone)", "(0.5 * whole * gone)")
    ],
    ("sampling/methods/churn.py", f"{PEERS} -k churn or karras_ve"): [
        ("math.sqrt(2) - 1)", "math.sqrt(2))"),
        ("math.sqrt((1 + gamma) ** 2 - 1)", "math.sqrt((1 + gamma) - 1)"),
        ("if s_tmin <= s.sigma_ve <= s_tmax", "if s_tmin <= s.sigma_ve"),
    ],
    ("sampling/methods/dpm2.py", of("dpm_2", "dpmpp_2s", "dpmpp_sde")): [
        ("ratio: float = 0.5", "ratio: float = 0.4"),
        ("(D_m - D) / (2 * r)", "(D_m - D) / r"),
        ("math.sqrt(max(n.sigma**2 - r**2, 0.0)))", "n.sigma)"),
    ],
    ("sampling/methods/dpm2.py", f"{METHODS} -k test_eta and dpmpp_2s"): [
        (
            "r = check_eta(eta) * posterior_std(s, n)\n    d = ancestral",
            "r = posterior_std(s, n)\n    d = ancestral",
        )
    ],
    ("sampling/methods/adams.py", of("deis", "gradient", "plms", "pndm")): [
        ("-n.half_log_snr, rate=1.0)", "-n.half_log_snr, rate=0.9)"),
        ("mean = 0.5 * (value + _combined", "mean = 0.6 * (value + _combined"),
    ],
    ("sampling/methods/adams.py", f"{PEERS} -k PNDM or ipndm or LMS"): [
        ("[1 / 6, 1 / 3, 1 / 3, 1 / 6]", "[1 / 3, 1 / 6, 1 / 6, 1 / 3]"),
        ("return [x_n, value]", "return [x_n, mean]"),
        ("v3 = stage(v2, m)", "v3 = stage(v1, m)"),
        ("4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)", "4: (55 / 24, -58 / 24, 36 / 24, -9 / 24)"),
    ],
    ("sampling/methods/unipc.py", of("unipc")): [
        ("return [0.5] * len(ratios)", "return [0.4] * len(ratios)"),
        ("h_phi = h_phi / hh - 1 / factorial", "h_phi = h_phi / hh + 1 / factorial"),
        ("[*residuals, corrected - values[0]]", "[*residuals, corrected]"),
    ],
    ("sampling/methods/unipc.py", f"{PEERS} -k UniPC or unipc"): [
        ('hh if solver_type == "bh1"', 'hh if solver_type == "bh2"'),
        ("i - 1 not in disable_corrector", "i not in disable_corrector"),
        (
            "return min(order, steps - j, history + 1) if lower_order_final",
            "return min(order, history + 1) if lower_order_final",
        ),
        ("alone = n.sigma == 0 or s.alpha == 0", "alone = s.alpha == 0"),
    ],
    ("sampling/methods/sa_solver.py", f"{PEERS} -k SASolver"): [
        ("return tau**2 if", "return tau if"),
        ("span = h if corrector else nodes[0] - nodes[1]", "span = h"),
        ("steps - i + 2 if lower_order_final", "steps - i if lower_order_final"),
    ],
    ("sampling/methods/sa_solver.py", "tests/test_agreement_classes.py -k noise_prediction"): [
        ("(1 + eta) * n.sigma * w", "n.sigma * w"),
        ("math.sqrt(eta) * n.sigma", "eta * n.sigma"),
    ],
    ("sampling/methods/exponential.py", of("res_multistep", "seeds")): [
        (
            "D + (phi_2(H) / -math.expm1(-H) / r_2) * (D2 - D)",
            "D + (phi_2(H) / -math.expm1(-H)) * (D2 - D)",
        ),
        ("math.exp(-stretch) * self.gathered", "self.gathered"),
    ],
    ("sampling/methods/consistency.py", f"{PEERS} -k LCM or TCD or consistency"): [
        ("c_skip = sigma_data**2 / (scaled", "c_skip = sigma_data / (scaled"),
        ("c_out = scaled / math.sqrt(", "c_out = scaled / ("),
        ("up = n.alpha / low.alpha", "up = low.alpha / n.alpha"),
        ("(1 - eta) * (trace.time(n) - t_min)", "eta * (trace.time(n) - t_min)"),
    ],
    ("sampling/methods/cfg_pp.py", "tests/test_comfyui_methods.py"): [
        (
            "(n.alpha * -math.expm1(-h) / (2 * r)) * (D - past[0])",
            "(n.alpha * -math.expm1(-h) / r) * (D - past[0])",
        ),
        ("first_order_update(x, U, s, n) + n.alpha * (D - U)", "first_order_update(x, D, s, n)"),
        ("x_n = n.alpha * D + n.sigma * e_u", "x_n = n.alpha * D + n.sigma * s.sigma * e_u"),
    ],
    ("sampling/methods/adams.py", "tests/test_comfyui_methods.py"): [
        ("(gamma - 1) * (e - past[0])", "(gamma - 1) * (past[0] - e)")
    ],
    ("sampling/methods/exponential.py", "tests/test_comfyui_methods.py"): [
        ("H = 1 + eta\n        weights", "H = 1 - eta\n        weights")
    ],
    ("sampling/kernel.py", "tests/test_comfyui_methods.py tests/test_sampler.py"): [
        ("new = beside[kind]() if kind in beside else None", "new = None")
    ],
    # sampling: grids
    ("sampling/grids/sigmas.py", "tests/test_grids_diffusers.py"): [
        (
            "(low ** (1 / rho) - high ** (1 / rho))) ** rho",
            "(low ** (1 / rho) - high ** (1 / rho))) ** (rho + 1)",
        ),
        (
            "beta_quantile(1 - _ramp(points), alpha, beta)",
            "beta_quantile(1 - _ramp(points), alpha, 1.0)",
        ),
        ("for k in (knots[0], knots[-2]))", "for k in (knots[0], knots[-1]))"),
    ],
    ("sampling/grids/sigmas.py", GRIDS): [
        ("levels(steps + drop_last), ratio", "levels(steps), ratio"),
        ("u * math.atan(low) + (1 - u) * math.atan(high)", "u * low + (1 - u) * math.atan(high)"),
        ("* (log_low / eps_s - log_high) / (eps_s - 1)", "* (log_low / eps_s - log_high) / eps_s"),
        ("1 - threshold_noise * points / m", "1 - threshold_noise"),
        ("u * math.log(high / low))", "u * math.log(high))"),
        ("high = terminal_sigma if math.isinf(top)", "high = 80.0 if math.isinf(top)"),
    ],
    ("sampling/grids/timesteps.py", "tests/test_grids_diffusers.py"): [
        (
            "index = stride * _from_the_top(points) + offset",
            "index = stride * _from_the_top(points)",
        ),
        ("return values.round() if rounded", "return values.floor() if rounded"),
        ("(position.round() if schedule.curve.is_discrete else position) - 1", "position - 1"),
        ("(1 - shift_terminal) / (1 - sigma[-1])", "shift_terminal / (1 - sigma[-1])"),
        ("1 / count if end is None", "0.0 if end is None"),
        ("torch.sin(0.5 * math.pi * u) ** 2)", "torch.sin(0.5 * math.pi * u))"),
        ("* (count // original_steps) - 1", "* (count // original_steps)"),
    ],
    # sampling: guidance, clipping, kernel, table
    ("sampling/guidance.py", SAMPLER): [
        (
            "guided = torch.lerp(unconditional, out, guidance_scale)",
            "guided = torch.lerp(out, unconditional, guidance_scale)",
        ),
        (
            "(out.std(axes, keepdim=True) / guided.std(axes",
            "(unconditional.std(axes, keepdim=True) / guided.std(axes",
        ),
        (
            "torch.lerp(guided, rescaled, guidance_rescale)",
            "torch.lerp(rescaled, guided, guidance_rescale)",
        ),
    ],
    ("sampling/clipping.py", "tests/test_clipping.py"): [
        ("(change(x0) - x0) / q", "(change(x0) - x0) * q"),
        ("(p / knot.input_scale) * x", "p * x"),
        (".clamp(1.0, self.max_value)", ".clamp(0.0, self.max_value)"),
    ],
    ("noising/levels.py", "tests/test_noising.py"): [
        ("c0 * sigma - c1 * alpha, fraction", "c0 * sigma + c1 * alpha, fraction"),
        ("index - int(curve.t_min) if curve.t_min else index", "index"),
        ("self.weighting is weighting and", ""),
    ],
    (
        "noising/utils/compiled.py",
        "tests/test_counter.py tests/test_noise.py tests/test_noising.py",
    ): [
        ("aim[k] = c0 * clean[k] + c1 * flat[k]", "aim[k] = c0 * clean[k] - c1 * flat[k]"),
        ("block += (count + 3) // 4", "block += count // 4"),
        ("int64(first + at // 4)", "int64(at // 4)"),
        (
            "k0, k1 = uint32(k0 + _W0), uint32(k1 + _W1)",
            "k0, k1 = uint32(k0 + _W1), uint32(k1 + _W0)",
        ),
    ],
    ("sampling/table.py", "tests/test_every_table.py"): [
        ("rest = [r - share * c for", "rest = [r + share * c for")
    ],
    ("sampling/kernel.py", SAMPLER): [
        ("total.add_(basis[k], alpha=c)", "total.add_(basis[k], alpha=abs(c))"),
        ("total, rest = basis[k] * c", "total, rest = basis[k].mul_(c)"),
        ("else new.to(dtype))", "else new.half().to(dtype))"),
        ("torch.mul(basis[k], factor)", "basis[k].mul_(factor)"),
    ],
    ("sampling/kernel.py", "tests/test_one_pass.py"): [
        ("combined.append([(at[k], c) for", "combined.append([(k, c) for"),
        ("if i == 0 and waiting:", "if i == 0 and False:"),
        ("given = [one if one.is_contiguous() else one.contiguous()", "given = [one"),
    ],
    ("sampling/inference.py", "tests/test_running.py"): [
        ("kept[0] != kind or kept[1]._version", "kept[0] != kind"),
        ("if t is None or time != knot.timestep or t._version:", "if t is None:"),
        ("step=self.drawn), self.shape[1:]", "step=0), self.shape[1:]"),
    ],
    ("sampling/serving/continuous.py", "tests/test_continuous.py"): [
        ("self._registers[:, row] = 0", "pass"),
        ("self._at[row] = self._at[end]", "pass"),
        ("before = results[:first] if first == places[0] else []", "before = []"),
    ],
    ("sampling/serving/captured.py", "tests/test_captured.py"): [
        ("self._noise.rewind()", "pass"),
        (
            "copy.deepcopy((dict(conditioning or {}), unconditional))",
            "(dict(conditioning or {}), unconditional)",
        ),
    ],
    ("sampling/tracing.py", f"{METHODS} -k birth or brownian or (point_mass and dpmpp)"): [
        ("(abs(draw.end - draw.start) ** 0.5) * z", "abs(draw.end - draw.start) * z"),
        ("return total / abs(b - a) ** 0.5", "return total"),
        ("(knot.sigma / det) * out - (c1 / det) * x", "(knot.sigma / det) * out + (c1 / det) * x"),
    ],
    ("sampling/table.py", f"{METHODS} -k birth or brownian or (point_mass and dpmpp)"): [
        ("if defect > ROUNDINGS * rounding", "if defect > 1e9"),
        ("if not math.isfinite(sum(", "if math.isinf(sum("),
    ],
    # training loops
    ("training/loops/loop.py", f"{LOOPS} -k precision or half or autocast or fabric"): [
        ("own = None if mixed or mode.sharded else single_dtype(inner)", "own = None"),
        ("self.autocast or ambient_autocast(device)", "self.autocast or nullcontext"),
        ("autocast=accelerator.autocast,", ""),
        ("convert_input=strategy.precision.convert_input,", "convert_input=lambda value: value,"),
    ],
    ("training/previews/rounds.py", f"{LOOPS} -k steps or time"): [
        ("while busy and not self.stopped:", "while False:"),
        ("            watching = True\n", "            pass\n"),
        ("return [*lacking, True].index(True)", "return drawn"),
    ],
    ("training/loops/wrappers.py", "tests/test_model_ema.py"): [
        ("return unwrapped(inner.module)", "return network")
    ],
    ("training/previews/previews.py", f"{LOOPS} -k autocast or averages"): [
        ("return torch.autocast(model.device.type, enabled=False)", "return torch.enable_grad()"),
        ('self.weights or ("ema" if ema is not None else "raw")', 'self.weights or "raw"'),
    ],
    ("training/fitting/tables.py", "tests/test_fitted_previews.py"): [
        ("            if table is not None:\n", "            if False:\n"),
        ("return own < known", "return True"),
        ("return step - last >= self.refit_every", "return True"),
        ("and step >= GROWTH * last and step > last", ""),
        ("credit - cost if credit >= cost else credit", "credit"),
        ("made.guidance_scale == self.guidance_scale", "True"),
        ("self._tried[weights] = step", "pass"),
    ],
    ("training/fitting/ranks.py", f"{LOOPS} -k fit"): [
        ("any_rank([error is not None]", "any_rank([False]"),
        ("first + self.share + k * self.shares", "first + k"),
    ],
    ("training/publishing/settings.py", f"{LOOPS} -k settings or picture or json or infotext"): [
        ('if settings["schedule"] != schedule.fingerprint:', "if False:"),
        ("            unsaved.append(name)", "            pass"),
        ('settings["steps"], settings["grid"], **', 'settings["steps"], None, **'),
    ],
    ("training/ema/averages.py", "tests/test_model_ema.py"): [
        ("torch._foreach_lerp_(old, new, 1 - keep)", "torch._foreach_lerp_(old, new, keep)"),
        ("if step - before < self.every_n_steps:", "if step - before < 1:"),
        ("average.profile(step - self.start_step, step - before)", "average.profile(step, 1)"),
        ('self.step = int(state["step"])', "pass"),
        ("weight.requires_grad or name in known", "True"),
    ],
    ("training/ema/model.py", "tests/test_model_ema.py"): [
        ("        if lacking:", "        if False:"),
        ("        if not pairs:", "        if False:"),
    ],
    ("training/checkpoints/accelerate_states.py", "tests/test_model_ema.py"): [
        ("if found.fingerprint == own.fingerprint:", "if False:"),
        ('if on_mismatch == "error":', "if False:"),
        ('if on_mismatch != "ignore":', "if True:"),
        ("except Exception as error:  #", "except KeyError as error:  #"),
    ],
    # callbacks: policy
    ("callbacks/previews/triggers.py", "tests/test_callbacks_previewing.py"): [
        ("step > 0 and step % n == 0", "step % n == 0"),
        ("return step in self.extra_steps or", "return"),
        ("trainer.current_epoch + 1 >= int", "trainer.current_epoch >= int"),
        ("if len(given) > 1:", "if len(given) > 2:"),
    ],
    ("callbacks/previews/triggers.py", "tests/test_callbacks_parts.py"): [
        ("(epoch + 1) % n == 0", "epoch % n == 0"),
        ("trainer.global_step >= trainer.max_steps", "trainer.global_step > trainer.max_steps"),
    ],
    ("training/loops/isolation.py", "tests/test_callbacks_parts.py"): [
        ("torch.set_rng_state(states[2])", "pass"),
        ("np.random.set_state(states[1])", "pass"),
        ("random.setstate(states[0])", "pass"),
        ("module.training = training", "module.training = True"),
        ("            module.training = False\n", "            pass\n"),
    ],
    ("training/loops/collectives.py", "tests/test_callbacks_parts.py"): [
        ("raise error if error is not None else AgreedError(words)", "return result"),
        ("(OSError if is_os_error else ValueError)(text)", "ValueError(text)"),
        ("raise AgreedError(words) from error", "return"),
    ],
    # files
    ("noising/utils/atomic.py", "tests/test_pretrained.py"): [
        ("Path(temporary).unlink(missing_ok=True)", "pass"),
        ("os.chmod(temporary, 0o666 & ~_umask())", "pass"),
    ],
    # training
    ("training/flags/flows.py", "tests/test_arguments_peers.py -k densities or tokens"): [
        ('"max_tokens": 8192, "max_shift": 0.9', '"max_tokens": 8192'),
        ('{"max_tokens": 6400}', "{}"),
        ("mean=-mean / 2, std=std / 2", "mean=-mean / 2, std=std"),
        ("(0.0, 1.0) if cut else share", "share"),
        ("(sides[-1] // 16)", "(sides[0] // 16)"),
    ],
    ("noising/utils/bisection.py", "tests/test_timesteps.py tests/test_grids_given.py"): [
        ("torch.where(below, high, middle)", "torch.where(below, middle, high)")
    ],
}
