"""Every prediction type learns, under every common objective, in the example that trains from
scratch.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alphabar.noising import PREDICTIONS
from test_examples import load

STEPS = 40
FALLS_TO = 0.6  # of the loss of the untrained network, on images and noise that it did not see
# the score is 1 / σ at its largest: weighted alike, its error is nearly all of the last few
# timesteps
FALLS_SLOWLY = {("score", "uniform"): 0.8}


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["gaussian", "offset"])
@pytest.mark.parametrize("weighting", ["uniform", "min_snr"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_falls(prediction: str, weighting: str, noise: str, tmp_path: Path) -> None:
    example = load("train_brightness")
    flags = f"--prediction_type {prediction} --loss_weighting {weighting} --noise {noise} --timestep_density stratified"
    flags += f" --max_steps {STEPS} --batch_size 16 --preview_every 1000 --num_samples 4 --sampling_steps 2"
    if prediction in ("karras", "consistency"):
        flags += " --sigma_data 0.5"
    if prediction not in ("epsilon", "score"):
        flags += " --rescale_betas_zero_snr"
    args = example.parse([*flags.split(), "--out", str(tmp_path)])
    (setting,) = example.settings(args)
    images = torch.stack([image["images"] for image in example.discs(64, seed=1, channels=1)])
    noised = setting.noising(images, step=10**6)
    torch.manual_seed(args.seed)
    untrained = example.make_network(args.channels)
    trained = example.make_network(args.channels)
    weights = torch.load(example.train(setting, args, tmp_path), weights_only=True)[
        "current_model_state"
    ]
    trained.load_state_dict(
        {k.removeprefix("network."): v for k, v in weights.items() if k.startswith("network.")}
    )
    with torch.no_grad():
        before, after = (
            noised.loss(net(noised.x, noised.timesteps)).item() for net in (untrained, trained)
        )
    print(
        f"{prediction} {weighting} {noise}: {before:.4f} -> {after:.4f}, ratio {after / before:.3f}"
    )
    assert after < FALLS_SLOWLY.get((prediction, weighting), FALLS_TO) * before
