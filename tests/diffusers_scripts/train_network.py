"""The frame of sd-scripts' train_network.py around random data and a tiny network."""

import argparse
import os
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler
from safetensors.torch import save_file


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 4, 1)

    def forward(self, x, timesteps):
        return self.conv(x) * (1 + timesteps.view(-1, 1, 1, 1) / 1000)

    def save_weights(self, file, dtype, metadata):
        save_file(self.state_dict(), file, metadata)


def noise_and_timesteps(args, noise_scheduler, latents):
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, 1000, latents.shape[:1])
    return noise, noise_scheduler.add_noise(latents, noise, timesteps), timesteps


def apply_masked_loss(loss, batch):
    mask = F.interpolate(batch["alpha_masks"].unsqueeze(1), size=loss.shape[2:], mode="area")
    return loss * mask


train_util = SimpleNamespace(
    get_noise_noisy_latents_and_timesteps=noise_and_timesteps,
    get_huber_threshold_if_needed=lambda args, timesteps, noise_scheduler: None,
    conditional_loss=lambda output, target, kind, how, c: F.mse_loss(output, target, reduction=how),
)


class NetworkTrainer:
    def get_tokenize_strategy(self, args):
        return None

    def call_unet(self, args, unet, noisy_latents, timesteps):
        return unet(noisy_latents, timesteps)

    def get_noise_scheduler(self, args, device):
        return DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            num_train_timesteps=1000,
            clip_sample=False,
        )

    def get_noise_pred_and_target(self, args, noise_scheduler, latents, batch, unet, is_train=True):
        noise, noisy_latents, timesteps = train_util.get_noise_noisy_latents_and_timesteps(
            args, noise_scheduler, latents
        )

        # ensure the hidden state will require grad
        if args.gradient_checkpointing:
            for x in noisy_latents:
                x.requires_grad_(True)
        with torch.set_grad_enabled(is_train):
            noise_pred = self.call_unet(args, unet, noisy_latents.requires_grad_(True), timesteps)
        if args.v_parameterization:
            target = noise_scheduler.get_velocity(latents, noise, timesteps)
        else:
            target = noise

        # differential output preservation
        if "preserved" in batch:
            target[batch["preserved"]] = noise_pred[batch["preserved"]].detach()
        return noise_pred, target, timesteps, None

    def process_batch(self, batch, unet, noise_scheduler, args, is_train=True):
        latents = batch["latents"]
        noise_pred, target, timesteps, weighting = self.get_noise_pred_and_target(
            args, noise_scheduler, latents, batch, unet, is_train=is_train
        )
        huber_c = train_util.get_huber_threshold_if_needed(args, timesteps, noise_scheduler)
        loss = train_util.conditional_loss(noise_pred, target, args.loss_type, "none", huber_c)
        if weighting is not None:
            loss = loss * weighting
        if args.masked_loss or ("alpha_masks" in batch and batch["alpha_masks"] is not None):
            loss = apply_masked_loss(loss, batch)
        loss = loss.mean(dim=(1, 2, 3)) * batch["loss_weights"]
        return loss.mean()

    def train(self, args):
        torch.manual_seed(args.seed or 0)
        tokenize_strategy = self.get_tokenize_strategy(args)
        assert tokenize_strategy is None
        steps = args.gradient_accumulation_steps
        accelerator = Accelerator(gradient_accumulation_steps=steps, cpu=True)
        network = Network()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
        count = args.train_batch_size * (2 * steps - 1)  # the last step is short
        rows = [
            {
                "latents": torch.randn(4, 8, 8),
                "loss_weights": torch.tensor(1.0 + i),
                "alpha_masks": torch.rand(16, 16) if args.masked_loss else torch.ones(16, 16),
            }
            for i in range(count)
        ]
        train_dataloader = torch.utils.data.DataLoader(rows, batch_size=args.train_batch_size)
        network, optimizer, train_dataloader = accelerator.prepare(
            network, optimizer, train_dataloader
        )
        metadata = {
            "ss_v2": "False",
            "ss_v_parameterization": str(args.v_parameterization),
            "ss_zero_terminal_snr": str(args.zero_terminal_snr),
            "ss_min_snr_gamma": str(args.min_snr_gamma),
        }
        global_step = 0
        noise_scheduler = self.get_noise_scheduler(args, accelerator.device)

        def save_model(ckpt_name, unwrapped_nw):
            os.makedirs(args.output_dir, exist_ok=True)
            ckpt_file = os.path.join(args.output_dir, ckpt_name)
            unwrapped_nw.save_weights(ckpt_file, torch.float32, metadata)
            if args.huggingface_repo_id is not None:
                raise NotImplementedError

        for step, batch in enumerate(train_dataloader):
            with accelerator.accumulate(network):
                loss = self.process_batch(batch, network, noise_scheduler, args, is_train=True)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                global_step += 1
        args.min_timestep = args.max_timestep = 400
        for batch in train_dataloader:
            loss = self.process_batch(batch, network, noise_scheduler, args, is_train=False)
            break
        save_model("last.safetensors", accelerator.unwrap_model(network))


def setup_parser():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pretrained_model_name_or_path", type=str, default=None)
    parser.add_argument("--output_dir", type=str, default=None)
    parser.add_argument("--huggingface_repo_id", type=str, default=None)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--resolution", type=str, default=None)
    parser.add_argument("--train_batch_size", type=int, default=1)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--masked_loss", action="store_true")
    parser.add_argument("--v_parameterization", action="store_true")
    parser.add_argument("--zero_terminal_snr", action="store_true")
    parser.add_argument("--noise_offset", type=float, default=None)
    parser.add_argument("--min_timestep", type=int, default=None)
    parser.add_argument("--max_timestep", type=int, default=None)
    parser.add_argument("--loss_type", type=str, default="l2", choices=["l1", "l2", "huber"])
    parser.add_argument("--huber_schedule", type=str, default="snr")
    parser.add_argument("--huber_c", type=float, default=0.1)
    parser.add_argument("--min_snr_gamma", type=float, default=None)
    parser.add_argument("--debiased_estimation_loss", action="store_true")
    return parser


if __name__ == "__main__":
    parser = setup_parser()
    args = parser.parse_args()
    NetworkTrainer().train(args)
