"""The frame of diffusers' examples/text_to_image/train_text_to_image_lora.py around random data."""

import argparse
import os

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import check_min_version, convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

check_min_version("0.30.0")


def log_validation(pipeline, args, accelerator):
    pipeline = pipeline.to(accelerator.device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("a red square", num_inference_steps=2, height=16, width=16).images


def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pretrained_model_name_or_path", type=str, default=None, required=True)
    parser.add_argument("--revision", type=str, default=None)
    parser.add_argument("--output_dir", type=str, default="sd-model-finetuned-lora")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--prediction_type", type=str, default=None)
    parser.add_argument("--noise_offset", type=float, default=0)
    parser.add_argument("--validation_prompt", type=str, default=None)
    parser.add_argument("--rank", type=int, default=4)
    args = parser.parse_args()
    return args


def main():
    args = parse_args()
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps, cpu=True
    )
    os.makedirs(args.output_dir, exist_ok=True)
    noise_scheduler = DDPMScheduler.from_pretrained(
        args.pretrained_model_name_or_path, subfolder="scheduler"
    )
    unet = UNet2DConditionModel.from_pretrained(
        args.pretrained_model_name_or_path, subfolder="unet"
    )
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=args.rank, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    optimizer = torch.optim.AdamW((p for p in unet.parameters() if p.requires_grad), lr=1e-4)
    torch.manual_seed(0)
    count = args.train_batch_size * 5
    text = torch.randn(count, 16, 32)
    latents_of_all = torch.randn(count, 4, args.resolution // 2, args.resolution // 2)
    rows = [{"latents": x, "text": t} for x, t in zip(latents_of_all, text, strict=True)]
    train_dataloader = torch.utils.data.DataLoader(rows, batch_size=args.train_batch_size)
    unet, optimizer, train_dataloader = accelerator.prepare(unet, optimizer, train_dataloader)
    global_step = 0
    for step, batch in enumerate(train_dataloader):
        with accelerator.accumulate(unet):
            latents = batch["latents"]

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
            loss = F.mse_loss(unet(noisy_latents, timesteps, encoder_hidden_states).sample, target)

            # Gather the losses across all processes for logging
            accelerator.gather(loss.repeat(args.train_batch_size)).mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            global_step += 1
    unet = accelerator.unwrap_model(unet)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(args.output_dir, unet_lora_layers=layers)

    # Final inference
    if args.validation_prompt is not None:
        pipeline = StableDiffusionPipeline.from_pretrained(
            args.pretrained_model_name_or_path, safety_checker=None
        )
        pipeline.load_lora_weights(args.output_dir)
        log_validation(pipeline, args, accelerator)


if __name__ == "__main__":
    main()
