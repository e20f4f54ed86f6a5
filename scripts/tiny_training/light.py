"""A light decoder for the same latents: TAESD's format, distilled from the trained autoencoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from tiny_training.autoencoder import SCALING_FACTOR, pictures, psnr_db, signed
from tiny_training.muon import muon
from tiny_training.running import Average, Clock, load, save


def build() -> AutoencoderTiny:
    """Works on scaled latents, as TAESD does: its scaling_factor is 1."""
    return AutoencoderTiny(
        latent_channels=4,
        encoder_block_out_channels=(16, 16, 16),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(1, 1, 2),
        num_decoder_blocks=(4, 1, 0),
        scaling_factor=1.0,
    )


@torch.no_grad()
def reconstruction_db(light: AutoencoderTiny, vae: AutoencoderKL, held: torch.Tensor) -> torch.Tensor:
    """Of pictures encoded by the full encoder and decoded by the light decoder, per picture."""
    latents = vae.encode(signed(held)).latent_dist.mode() * SCALING_FACTOR
    return psnr_db(held, light.decode(latents).sample)


def train(folder: Path, vae: AutoencoderKL, minutes: float, seed: int = 5, lr: float = 2e-3):
    """Train the light decoder on crops, and a light encoder beside it so that the format is whole."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    light = build().to(memory_format=torch.channels_last)
    state = load(folder / "light.pt")
    if state:
        light.load_state_dict(state)
        return light.eval()
    average, optimiser = Average(light, 0.997), muon([light], lr)
    pool, held = pictures(4096, seed), pictures(64, seed + 1, "held_out")
    with torch.no_grad():
        modes = [vae.encode(signed(batch)).latent_dist.mode() for batch in pool.split(64)]
    latents = torch.cat(modes) * SCALING_FACTOR
    clock, step = Clock("light", minutes), 0
    while clock.done < 1:
        chosen = rng.integers(0, len(pool), size=32)
        corners = rng.integers(0, 9, size=(32, 2))
        images, codes = [], []
        for index, (y, x) in zip(chosen, corners, strict=True):
            images.append(pool[index, :, 4 * y : 4 * y + 32, 4 * x : 4 * x + 32])
            codes.append(latents[index, :, y : y + 8, x : x + 8])
        target, code = signed(torch.stack(images)), torch.stack(codes)
        # A little noise, because a sampler never lands exactly on an encoded picture.
        decoded = light.decode(code + 0.04 * torch.randn_like(code)).sample
        error = decoded - target
        loss = error.abs().mean() + 4 * error.square().mean()
        loss = loss + 0.1 * (light.encode(target).latents - code).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(light.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = clock.rate(lr, step)
        optimiser.step()
        optimiser.zero_grad()
        average.update(light)
        step += 1
        if clock.due() or clock.done == 1:
            db = reconstruction_db(average.module, vae, held).mean()
            clock.say(f"step {step}, loss {loss:.4f}, held out {db:.2f} dB")
    save(folder / "light.pt", average.module.state_dict())
    return average.module
