"""The frame of diffusers' examples/text_to_image/train_text_to_image.py around random data."""

import argparse
import math

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from diffusers.utils import check_min_version

check_min_version("0.30.0")


def log_validation(unet, args, accelerator):
    pipeline = StableDiffusionPipeline.from_pretrained(
        args.pretrained_model_name_or_path, unet=accelerator.unwrap_model(unet), safety_checker=None
    )
    pipeline = pipeline.to(accelerator.device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("a red square", num_inference_steps=2, height=16, width=16).images


def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--input_perturbation", type=float, default=0)
    parser.add_argument("--pretrained_model_name_or_path", type=str, default=None, required=True)
    parser.add_argument("--revision", type=str, default=None)
    parser.add_argument("--output_dir", type=str, default="sd-model-finetuned")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--max_train_steps", type=int, default=2)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--snr_gamma", type=float, default=None)
    parser.add_argument("--prediction_type", type=str, default=None)
    parser.add_argument("--noise_offset", type=float, default=0)
    parser.add_argument("--validation_prompts", type=str, default=None, nargs="+")
    args = parser.parse_args()
    return args


def main():
    args = parse_args()
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps, cpu=True
    )
    noise_scheduler = DDPMScheduler.from_pretrained(
        args.pretrained_model_name_or_path, subfolder="scheduler"
    )
    vae = AutoencoderKL.from_pretrained(args.pretrained_model_name_or_path, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(
        args.pretrained_model_name_or_path, subfolder="unet"
    )
    vae.requires_grad_(False)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    torch.manual_seed(0)
    count = args.train_batch_size * (
        args.max_train_steps * args.gradient_accumulation_steps - 1
    )  # the last step is short
    text = torch.randn(count, 16, 32)
    pixels = torch.randn(count, 3, args.resolution, args.resolution)
    rows = [{"pixel_values": p, "text": t} for p, t in zip(pixels, text, strict=True)]
    train_dataloader = torch.utils.data.DataLoader(rows, batch_size=args.train_batch_size)
    unet, optimizer, train_dataloader = accelerator.prepare(unet, optimizer, train_dataloader)
    global_step = 0
    num_update_steps_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
    for _ in range(math.ceil(args.max_train_steps / num_update_steps_per_epoch)):
        for step, batch in enumerate(train_dataloader):
            with accelerator.accumulate(unet):
                latents = (
                    vae.encode(batch["pixel_values"]).latent_dist.sample()
                    * vae.config.scaling_factor
                )

                # Sample noise that we'll add to the latents
                noise = torch.randn_like(latents)
                timesteps = torch.randint(
                    0, noise_scheduler.config.num_train_timesteps, (latents.shape[0],)
                ).long()
                noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)

                # Get the text embedding for conditioning
                encoder_hidden_states = batch["text"]

                # Get the target for loss depending on the prediction type
                if args.prediction_type is not None:
                    noise_scheduler.register_to_config(prediction_type=args.prediction_type)
                v = noise_scheduler.config.prediction_type == "v_prediction"
                target = noise_scheduler.get_velocity(latents, noise, timesteps) if v else noise
                model_pred = unet(noisy_latents, timesteps, encoder_hidden_states).sample
                losses = F.mse_loss(model_pred, target, reduction="none").mean((1, 2, 3))
                if args.snr_gamma is not None:
                    snr = compute_snr(noise_scheduler, timesteps)
                    losses = losses * snr.clamp(max=args.snr_gamma) / (snr + v)
                loss = losses.mean()

                # Gather the losses across all processes for logging
                accelerator.gather(loss.repeat(args.train_batch_size)).mean()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                global_step += 1
            if global_step >= args.max_train_steps:
                break
    if args.validation_prompts is not None:
        log_validation(unet, args, accelerator)
    pipeline = StableDiffusionPipeline.from_pretrained(
        args.pretrained_model_name_or_path, unet=accelerator.unwrap_model(unet), safety_checker=None
    )
    pipeline.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
