"""The UNet, trained to predict v in latent space from what the text encoder says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from sdcompile.models.tiny import scenes
from tiny_training import text
from tiny_training.muon import muon
from tiny_training.running import Average, Clock, load, save

DROPPED = 0.12  # of the captions: what guidance steers away from
# Shapes are decided where a latent's signal to noise is between about 0.01 and 0.4, so most draws come from there.
DECISIVE, DECISIVE_STEPS = 0.7, (480, 920)
BATCH = 40


def build() -> UNet2DConditionModel:
    """Convolutions at 16 x 16, self- and cross-attention at 8 x 8 and 4 x 4."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 96, 96),
        layers_per_block=1,
        cross_attention_dim=text.WIDTH,
        attention_head_dim=4,  # the number of heads: SD 1.x's reading of this name
        norm_num_groups=16,
    )


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def noised(latents: torch.Tensor, steps: torch.Tensor, noise: torch.Tensor) -> tuple:
    """The noised latents and the v to predict (Salimans and Ho 2022, appendix D)."""
    kept = scheduler().alphas_cumprod[steps].view(-1, 1, 1, 1)
    signal, spread = kept.sqrt(), (1 - kept).sqrt()
    return signal * latents + spread * noise, signal * noise - spread * latents


def draw_steps(rng: np.random.Generator, count: int) -> torch.Tensor:
    """Stratified time steps: most over `DECISIVE_STEPS`, the others over all of them."""
    even = (rng.permutation(count) + rng.random(count)) / count
    first, last = DECISIVE_STEPS
    decisive = rng.random(count) < DECISIVE
    return torch.from_numpy(np.where(decisive, first + (last - first) * even, 1000 * even).astype(np.int64))


class Batches:
    """Endless batches from the shards; captions are worded and dropped anew each time."""

    def __init__(self, shards: list, tokenizer, encoder, rng: np.random.Generator):
        self.rng = rng
        self.means = torch.cat([shard["mean"] for shard in shards])
        self.stds = torch.cat([shard["std"] for shard in shards])
        drawn = [scene for shard in shards for scene in shard["scenes"]]
        self.told = torch.stack([read(tokenizer, encoder, [scenes.caption(one, w) for one in drawn]) for w in range(3)])
        self.untold = read(tokenizer, encoder, [""])[0]

    def next(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (count, 4, 16, 16) and text states (count, 24, 128), some of them of no caption."""
        chosen = torch.from_numpy(self.rng.integers(0, len(self.means), size=count))
        wordings = torch.from_numpy(self.rng.choice(3, size=count, p=(0.6, 0.2, 0.2)))
        latents = self.means[chosen].float()
        latents = latents + self.stds[chosen].float() * torch.randn_like(latents)
        dropped = torch.from_numpy(self.rng.random(count) < DROPPED)
        told = torch.where(dropped[:, None, None], self.untold, self.told[wordings, chosen])
        return latents, told.float()


@torch.no_grad()
def read(tokenizer, encoder, captions: list[str]) -> torch.Tensor:
    """The encoder's states of captions, (captions, 24, 128) fp16."""
    parts = text.tokens(tokenizer, captions).split(256)
    return torch.cat([encoder(part).last_hidden_state.half() for part in parts])


class Exam:
    """Mean squared error of v over all time steps on scenes never trained on, always the same noise."""

    def __init__(self, shard: dict, tokenizer, encoder):
        generator = torch.Generator().manual_seed(0)
        latents = shard["mean"][::2].float()
        self.steps = torch.arange(len(latents)) * 1000 // len(latents)
        noise = torch.randn(latents.shape, generator=generator)
        self.noisy, self.wanted = noised(latents, self.steps, noise)
        captions = [scenes.caption(scene) for scene in shard["scenes"][::2]]
        self.told = read(tokenizer, encoder, captions).float()

    @torch.no_grad()
    def __call__(self, unet: UNet2DConditionModel) -> float:
        columns = (x.split(64) for x in (self.noisy, self.steps, self.told, self.wanted))
        errors = [
            (unet(noisy, steps, told).sample - wanted).square().mean((1, 2, 3))
            for noisy, steps, told, wanted in zip(*columns, strict=True)
        ]
        return float(torch.cat(errors).mean())


def train(
    folder: Path, tokenizer, encoder, shards: list, held: dict, minutes: float, seed: int = 4, lr: float = 2.5e-3
) -> UNet2DConditionModel:
    """Train on states of the finished text encoder until the clock ends; returns averaged weights."""
    torch.manual_seed(seed)
    unet = build().to(memory_format=torch.channels_last)
    average, optimiser = Average(unet, 0.999), muon([unet], lr)
    state, step, spent_s = load(folder / "diffusion.pt"), 0, 0.0
    if state:
        unet.load_state_dict(state["unet"])
        optimiser.load_state_dict(state["optimiser"])
        average.module.load_state_dict(state["average"])
        step, spent_s, average.age = state["step"], state["spent_s"], state["step"]
    torch.manual_seed(seed + step)
    batches = Batches(shards, tokenizer, encoder, np.random.default_rng(seed + step))
    exam = Exam(held, tokenizer, encoder)
    clock, losses = Clock("unet", minutes, spent_s, every_s=150), []

    def keep() -> None:
        save(
            folder / "diffusion.pt",
            {
                "unet": unet.state_dict(),
                "optimiser": optimiser.state_dict(),
                "average": average.module.state_dict(),
                "step": step,
                "spent_s": clock.spent_s,
            },
        )

    try:
        while clock.done < 1:
            latents, told = batches.next(BATCH)
            steps = draw_steps(batches.rng, BATCH)
            noisy, wanted = noised(latents, steps, torch.randn_like(latents))
            guess = unet(noisy.contiguous(memory_format=torch.channels_last), steps, told).sample
            loss = (guess - wanted).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            for group in optimiser.param_groups:
                group["lr"] = clock.rate(lr, step)
            optimiser.step()
            optimiser.zero_grad()
            average.update(unet)
            step += 1
            losses.append(float(loss.detach()))
            if clock.due():
                mean, told_loss = exam(average.module), np.mean(losses)
                clock.say(f"step {step}, loss {told_loss:.4f}, held out {mean:.4f}")
                losses.clear()
                keep()
    finally:  # Ctrl-C too
        keep()
    return average.module
