"""The autoencoder: 64 x 64 x 3 pictures to 16 x 16 x 4 latents and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from sdcompile.models.tiny import scenes
from tiny_training.muon import muon
from tiny_training.running import Average, Clock, load, save

# The factor of SD 1.x. `normalise` makes it true, and a compiler that forgets it gets nonsense.
SCALING_FACTOR = 0.18215
POOL = 6144


def build() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=SCALING_FACTOR,
    )


def pictures(count: int, seed: int, split: str = "train") -> torch.Tensor:
    """Drawn scenes as (count, 3, 64, 64) uint8."""
    rng = np.random.default_rng(seed)
    drawn = [scenes.draw(scenes.sample_scene(rng, split), rng) for _ in range(count)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()


def signed(batch: torch.Tensor) -> torch.Tensor:
    """uint8 pictures as floats in [-1, 1], channels last in memory."""
    return (batch.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def psnr_db(pictures_u8: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
    """Per picture, of the decoded floats in [-1, 1] against the uint8 originals, peak 255."""
    levels = (decoded.clamp(-1, 1) + 1) * 127.5
    return 10 * torch.log10(255**2 / (levels - pictures_u8.float()).square().mean((1, 2, 3)))


@torch.no_grad()
def reconstruction_db(vae: AutoencoderKL, held: torch.Tensor) -> torch.Tensor:
    decoded = [vae.decode(vae.encode(signed(b)).latent_dist.mode()).sample for b in held.split(64)]
    return psnr_db(held, torch.cat(decoded))


def _crops(batch: torch.Tensor, rng: np.random.Generator, size: int = 32) -> torch.Tensor:
    """A crop of each picture, on the grid of the latents: twice the steps in the same time."""
    corners = rng.integers(0, (64 - size) // 4 + 1, size=(len(batch), 2)) * 4
    return torch.stack([b[:, y : y + size, x : x + size] for b, (y, x) in zip(batch, corners, strict=True)])


def train(folder: Path, minutes: float, seed: int = 1, lr: float = 3e-3) -> AutoencoderKL:
    """Train encoder and decoder together; the first half of the time on crops."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vae = build().to(memory_format=torch.channels_last)
    average = Average(vae, 0.997)
    optimiser = muon([vae], lr)
    pool, held = pictures(POOL, seed), pictures(128, seed + 1, "held_out")
    state, step, spent_s = load(folder / "vae.pt"), 0, 0.0
    if state:
        vae.load_state_dict(state["vae"])
        average.module.load_state_dict(state["average"])
        average.age = state["step"]
        optimiser.load_state_dict(state["optimiser"])
        step, spent_s = state["step"], state["spent_s"]
        rng = np.random.default_rng(seed + step)
    clock = Clock("vae", minutes, spent_s)

    def keep() -> None:
        save(
            folder / "vae.pt",
            {
                "vae": vae.state_dict(),
                "average": average.module.state_dict(),
                "optimiser": optimiser.state_dict(),
                "step": step,
                "spent_s": clock.spent_s,
            },
        )

    while clock.done < 1:
        small = clock.done < 0.5
        chosen = pool[torch.from_numpy(rng.integers(0, len(pool), size=32 if small else 16))]
        target = signed(_crops(chosen, rng) if small else chosen)
        posterior = vae.encode(target).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        error = decoded - target
        fit = error.abs().mean() + 4 * error.square().mean()
        loss = fit + 6e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = clock.rate(lr, step)
        optimiser.step()
        optimiser.zero_grad()
        average.update(vae)
        step += 1
        if clock.due():
            db = reconstruction_db(average.module, held[:64]).mean()
            clock.say(
                f"step {step}, loss {loss:.4f}, latent std {posterior.mean.std():.2f}"
                f" (noise {posterior.std.mean():.3f}), held out {db:.2f} dB"
            )
            keep()
    keep()
    return average.module


@torch.no_grad()
def normalise(vae: AutoencoderKL, seed: int = 3) -> AutoencoderKL:
    """Give each latent channel mean 0 and standard deviation 1 / SCALING_FACTOR, pictures unchanged.

    Exact: a shift and a scale of each channel fold into the 1 x 1 convolutions on both sides of the
    latents. Diffusion learns faster when no channel is fainter than the others.
    """
    sample = pictures(1024, seed).split(64)
    latents = torch.cat([vae.encode(signed(batch)).latent_dist.mode() for batch in sample])
    shift = latents.mean((0, 2, 3))
    scale = 1 / (SCALING_FACTOR * latents.std((0, 2, 3)))
    before, after = vae.quant_conv, vae.post_quant_conv
    before.weight[:4] *= scale[:, None, None, None]
    before.bias[:4] = (before.bias[:4] - shift) * scale
    before.bias[4:] += 2 * scale.log()  # the other four outputs are log variances
    after.bias += after.weight[:, :, 0, 0] @ shift
    after.weight /= scale[None, :, None, None]
    return vae


@torch.no_grad()
def encoded(vae: AutoencoderKL, seed: int, count: int, split: str = "train") -> dict:
    """Scenes drawn and encoded: scaled latents `mean` and `std` (count, 4, 16, 16) fp16, and scenes."""
    rng = np.random.default_rng(seed)
    drawn, means, stds = [], [], []
    while len(drawn) < count:
        batch = [scenes.sample_scene(rng, split) for _ in range(64)]
        images = np.stack([scenes.draw(scene, rng) for scene in batch]).transpose(0, 3, 1, 2)
        posterior = vae.encode(signed(torch.from_numpy(images))).latent_dist
        drawn += batch
        means.append((posterior.mean * SCALING_FACTOR).half())
        stds.append((posterior.std * SCALING_FACTOR).half())
    return {"scenes": drawn, "mean": torch.cat(means), "std": torch.cat(stds)}


def shards(vae: AutoencoderKL, folder: Path, count: int, seed: int = 10, size: int = 2048) -> list:
    """`count` shards of encoded training scenes, made once and kept in `folder`."""
    found = []
    for index in range(count):
        path = folder / "latents" / f"{index:03d}.pt"
        shard = load(path)
        if shard is None:
            shard = encoded(vae, seed + index, size)
            save(path, shard)
        found.append(shard)
    return found
