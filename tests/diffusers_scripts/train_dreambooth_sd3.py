"""The frame of diffusers' examples/dreambooth/train_dreambooth_sd3.py around random data."""

import argparse
import copy

import torch
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from diffusers.utils import check_min_version

check_min_version("0.30.0")

NOTHING = dict.fromkeys(
    f"{part}{end}" for part in ("text_encoder", "tokenizer") for end in ("", "_2", "_3")
)
NOTHING |= dict.fromkeys(("image_encoder", "feature_extractor"))


def log_validation(pipeline, args, accelerator):
    pipeline = pipeline.to(accelerator.device)
    return pipeline


def parse_args(input_args=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--pretrained_model_name_or_path", type=str, default=None, required=True)
    parser.add_argument("--revision", type=str, default=None)
    parser.add_argument("--output_dir", type=str, default="sd3-dreambooth")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--with_prior_preservation", default=False, action="store_true")
    parser.add_argument("--prior_loss_weight", type=float, default=1.0)
    parser.add_argument("--train_batch_size", type=int, default=4)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument(
        "--weighting_scheme",
        type=str,
        default="logit_normal",
        choices=["sigma_sqrt", "logit_normal", "mode", "cosmap"],
    )
    parser.add_argument("--logit_mean", type=float, default=0.0)
    parser.add_argument("--logit_std", type=float, default=1.0)
    parser.add_argument("--mode_scale", type=float, default=1.29)
    parser.add_argument("--precondition_outputs", type=int, default=1)
    if input_args is not None:
        args = parser.parse_args(input_args)
    else:
        args = parser.parse_args()
    return args


def main(args):
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps, cpu=True
    )
    noise_scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
        args.pretrained_model_name_or_path, subfolder="scheduler"
    )
    noise_scheduler_copy = copy.deepcopy(noise_scheduler)
    vae = AutoencoderKL.from_pretrained(
        args.pretrained_model_name_or_path, subfolder="vae"
    ).requires_grad_(False)
    transformer = SD3Transformer2DModel.from_pretrained(
        args.pretrained_model_name_or_path, subfolder="transformer"
    )
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-4)
    torch.manual_seed(0)
    rows = [
        {"pixel_values": p}
        for p in torch.randn(args.train_batch_size * 5, 3, args.resolution, args.resolution)
    ]
    train_dataloader = torch.utils.data.DataLoader(rows, batch_size=args.train_batch_size)
    transformer, optimizer, train_dataloader = accelerator.prepare(
        transformer, optimizer, train_dataloader
    )
    global_step = 0
    for step, batch in enumerate(train_dataloader):
        with accelerator.accumulate(transformer):
            model_input = vae.encode(batch["pixel_values"]).latent_dist.sample()
            model_input = (model_input - vae.config.shift_factor) * vae.config.scaling_factor

            # Sample noise that we'll add to the latents
            noise = torch.randn_like(model_input)
            bsz = model_input.shape[0]
            u = compute_density_for_timestep_sampling(
                weighting_scheme=args.weighting_scheme,
                batch_size=bsz,
                logit_mean=args.logit_mean,
                logit_std=args.logit_std,
                mode_scale=args.mode_scale,
            )
            indices = (u * noise_scheduler_copy.config.num_train_timesteps).long()
            timesteps = noise_scheduler_copy.timesteps[indices]
            sigmas = noise_scheduler_copy.sigmas[indices].view(-1, 1, 1, 1)
            noisy_model_input = (1.0 - sigmas) * model_input + sigmas * noise

            # Predict the noise residual
            model_pred = transformer(
                hidden_states=noisy_model_input,
                timestep=timesteps,
                encoder_hidden_states=torch.zeros(len(model_input), 4, 16),
                pooled_projections=torch.zeros(len(model_input), 16),
                return_dict=False,
            )[0]

            # Follow: Section 5 of https://huggingface.co/papers/2206.00364.
            if args.precondition_outputs:
                model_pred = model_pred * (-sigmas) + noisy_model_input
            weighting = compute_loss_weighting_for_sd3(
                weighting_scheme=args.weighting_scheme, sigmas=sigmas
            )
            target = model_input if args.precondition_outputs else noise - model_input
            losses = (weighting * (model_pred - target) ** 2).reshape(bsz, -1).mean(1)
            if args.with_prior_preservation:
                instance, prior = losses.chunk(2)
                loss = instance.mean() + args.prior_loss_weight * prior.mean()
            else:
                loss = losses.mean()

            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            global_step += 1
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        transformer=accelerator.unwrap_model(transformer),
        **NOTHING,
    )
    pipeline.save_pretrained(args.output_dir)
    log_validation(
        StableDiffusion3Pipeline.from_pretrained(args.output_dir, **NOTHING), args, accelerator
    )


if __name__ == "__main__":
    args = parse_args()
    main(args)
