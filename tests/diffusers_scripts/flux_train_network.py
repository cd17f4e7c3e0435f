"""The frame of sd-scripts' flux_train_network.py around random data and a tiny network."""

import torch
import train_network
from diffusers import FlowMatchEulerDiscreteScheduler


class FluxNetworkTrainer(train_network.NetworkTrainer):
    def get_noise_scheduler(self, args, device):
        shift = args.discrete_flow_shift
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)

    def get_noise_pred_and_target(self, args, noise_scheduler, latents, batch, unet, is_train=True):
        weight_dtype = torch.float32
        # Sample noise that we'll add to the latents
        noise = torch.randn_like(latents)
        bsz = latents.shape[0]
        sigmas = torch.rand(bsz).view(-1, 1, 1, 1)
        noisy_model_input = ((1 - sigmas) * latents + sigmas * noise).to(weight_dtype)
        timesteps = sigmas.flatten() * 1000

        # pack latents and get img_ids
        with torch.set_grad_enabled(is_train):
            model_pred = self.call_unet(args, unet, noisy_model_input, timesteps)
        weighting = None if sigmas is None else torch.ones(bsz, 1, 1, 1)

        # flow matching loss: this is different from SD3
        target = noise - latents
        return model_pred, target, timesteps, weighting


def setup_parser():
    parser = train_network.setup_parser()
    schemes = ["sigma_sqrt", "logit_normal", "mode", "cosmap", "none"]
    parser.add_argument("--weighting_scheme", type=str, default="none", choices=schemes)
    parser.add_argument("--logit_mean", type=float, default=0.0)
    parser.add_argument("--logit_std", type=float, default=1.0)
    parser.add_argument("--mode_scale", type=float, default=1.29)
    parser.add_argument(
        "--timestep_sampling",
        choices=["sigma", "uniform", "sigmoid", "shift", "flux_shift"],
        default="sigma",
    )
    parser.add_argument("--sigmoid_scale", type=float, default=1.0)
    parser.add_argument("--model_prediction_type", default="sigma_scaled")
    parser.add_argument("--discrete_flow_shift", type=float, default=3.0)
    return parser


if __name__ == "__main__":
    parser = setup_parser()
    args = parser.parse_args()
    FluxNetworkTrainer().train(args)
