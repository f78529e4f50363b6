"""The demo model's U-Net, trained in latents of several looks of every clip, which are renewed in turn."""

import copy
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from latentsync.alignment import fixed_mask
from latentsync.sampling import ddim_scheduler
from latentsync.training import autoencoder, lips, listener
from latentsync.training.data import (
    RESOLUTION,
    ClipSet,
    Windows,
    draw_sound,
    draw_windows,
    load_clips,
    plain_look,
    random_look,
    random_mouth,
    random_people,
    render,
    tokens_of,
)
from latentsync.training.state import load_state, load_weights, save_state
from latentsync.unet import UNet, UNetConfig, frames_first, windows_first
from latentsync.vae import latent_mask

LATENTS = autoencoder.CONFIG["latent_channels"]
CONFIG = {  # in the words of the released configuration
    "in_channels": 3 * LATENTS + 1,
    "out_channels": LATENTS,
    "block_out_channels": [96, 128, 160],
    "down_block_types": ["CrossAttnDownBlock3D"] * 3,
    "up_block_types": ["CrossAttnUpBlock3D"] * 3,
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": listener.DIMS.n_audio_state,
    "norm_num_groups": 16,
    "motion_module_kwargs": {"num_attention_heads": 4},
}
LATENT_SIDE = RESOLUTION // 2 ** (len(autoencoder.CONFIG["block_out_channels"]) - 1)  # of the latents
LOOKS, FIRST_LOOKS = 6, 3  # renderings of every clip: most, and how many it begins with
SAVE_SECONDS = 120.0  # between two writes of the state, so that a run that is cut off is not lost
REFRESH_STEPS = 800  # after which one more random look is made, or the oldest replaced
SEGMENTS, WINDOWS_PER_SEGMENT = 4, 10
LEARNING_RATE, LISTENER_RATE = 3e-4, 1e-4
UNHEARD = 0.1  # share of windows without audio, so that guidance has a branch to start from
UNSEEN = 0.1  # share of windows without a reference, where the sound alone says how the mouth is
ELSEWHEN = 0.75  # share of windows whose masked faces are not of the moment that is heard either
STILL = 0.5  # share of windows of which one moment is shown throughout
SHARED_NOISE = 0.7  # share of windows whose frames all have the same noise, as sampling starts from
SNR_CAP = 5.0  # min-SNR weighting (Hang et al. 2023)
VISIBLE_WEIGHT = 0.15  # of the loss where the mask shows the face anyway
MOUTH_WEIGHT = 3.0  # of the loss around the lips
MOUTH = (slice(9, 14), slice(4, 12))  # rows, columns of the 16 × 16 latents
LIP_WEIGHT = 0.05  # of the loss of the mouth's shape, beside that of the noise
EMA = 0.999


@dataclass(frozen=True)
class LatentPool:
    """Scaled latents of every look, (looks, n, c, 16, 16) bfloat16.

    reference is the target with another expression, so that it tells who speaks, and not how the mouth is.
    """

    target: Tensor
    masked: Tensor
    reference: Tensor


def empty_pool(looks: int, data: ClipSet) -> LatentPool:
    """Room for `looks` looks of all clips."""
    shape = (looks, len(data.frames), LATENTS, LATENT_SIDE, LATENT_SIDE)
    device = data.frames.device
    return LatentPool(*(torch.empty(shape, dtype=torch.bfloat16, device=device) for _ in fields(LatentPool)))


@torch.no_grad()
def encode_look(
    pool: LatentPool, k: int, vae: AutoencoderKL, data: ClipSet, rng: np.random.Generator, mask: Tensor, scale: float
) -> None:
    """Render and encode all clips into slot k: the plain look for 0, else a new random one a clip. mask: (128, 128)."""
    device = data.frames.device
    clip_of = data.clip_of()
    look = (plain_look if k == 0 else random_look)(len(data.starts), device)
    mouth = random_mouth(data.mouths())
    people = random_people(data, rng) if k > 0 else None
    for begin in range(0, len(data.frames), 512):
        part = slice(begin, begin + 512)
        frames, its_look = data.frames[part], look[clip_of[part]]
        if people is not None:
            frames = (frames + people[clip_of[part]]).clamp(0, 255)
        x = render(frames, its_look)
        other = render(frames, its_look, mouth[clip_of[part]])
        for latents, pixels in ((pool.target, x), (pool.masked, x * mask), (pool.reference, other)):
            pixels = pixels.to(vae.dtype, memory_format=torch.channels_last)
            latents[k, part] = vae.encode(pixels).latent_dist.mode() * scale


def draw_moments(windows: Windows) -> tuple[Tensor, Tensor]:
    """Which frames the masked faces and the references are, (b, f) each.

    Cheeks and jaw tell what a mouth says. A network that always sees them at the moment that it hears goes by them, and
    repeats what the old mouth said when it is to dub; so both are mostly of another window, as in dubbing, and often
    stand still, as `hold_still` has it.
    """
    b, f = windows.frames.shape
    still, elsewhen = (torch.rand(b, 1, device=windows.frames.device) < share for share in (STILL, ELSEWHEN))
    reference = torch.where(still, windows.reference[:, f // 2 : f // 2 + 1], windows.reference)
    return torch.where(elsewhen, reference, windows.frames), reference


def loss_weights(mask: Tensor) -> Tensor:
    """Where the loss counts, (16, 16), mean one, by the fixed mask (128, 128)."""
    hidden = 1 - nn.functional.avg_pool2d(mask[None], 8)[0]
    weights = VISIBLE_WEIGHT + hidden
    weights[MOUTH] *= MOUTH_WEIGHT
    return weights / weights.mean()


def train(
    prepared: Path, state: Path, seconds: float, device: torch.device, batch: int = SEGMENTS * WINDOWS_PER_SEGMENT
) -> None:
    """Train U-Net and audio encoder for `seconds`; continue from `state/denoiser.pt` where it exists.

    Takes the autoencoder and the encoder to begin with from `state/autoencoder.pt` and `state/listener.pt`.
    batch: windows a step, a multiple of 10.
    """
    began = time.time()
    data = load_clips(prepared, device)
    torch.manual_seed(int(began))
    rng = np.random.default_rng(int(began))
    vae = AutoencoderKL.from_config(autoencoder.CONFIG)
    scale = load_weights(state / "autoencoder.pt", {"vae": vae})["scaling_factor"]
    # Processors without bfloat16 units would take minutes.
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    vae = vae.eval().requires_grad_(False).to(device, kind, memory_format=torch.channels_last)
    encoder = listener.new_encoder()
    load_weights(state / "listener.pt", {"encoder": encoder})
    encoder.to(device)
    unet = UNet(UNetConfig.from_dict(CONFIG)).to(device, memory_format=torch.channels_last)
    for name, parameter in unet.named_parameters():
        if "motion_modules" in name and "temporal_transformer.proj_out" in name:
            nn.init.zeros_(parameter)  # starts as a network of single frames
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        [
            {"params": list(unet.parameters()), "base": LEARNING_RATE},
            {"params": list(encoder.parameters()), "base": LISTENER_RATE},
        ],
        lr=LEARNING_RATE, weight_decay=0.01, fused=fused,
    )  # fmt: skip
    average = copy.deepcopy(nn.ModuleDict({"unet": unet, "encoder": encoder})).requires_grad_(False)
    modules = {"unet": unet, "encoder": encoder, "average": average}
    step = load_state(state / "denoiser.pt", modules, optimizer)
    if step == 0:  # an imported model's encoder may have listened on since
        load_weights(state / "listener.pt", {"encoder": encoder})
        average["encoder"].load_state_dict(encoder.state_dict())
    # The passes are in bfloat16 throughout; the weights that are learnt, and their average, keep float32.
    working = copy.deepcopy(unet).to(kind)
    mask = torch.from_numpy(fixed_mask(RESOLUTION).copy()).to(device)
    pool = empty_pool(LOOKS if device.type == "cuda" else 2, data)
    looks = min(FIRST_LOOKS, len(pool.target))  # those that there are
    for k in range(looks):
        encode_look(pool, k, vae, data, rng, mask, scale)
    spread = float(pool.target[0].std())
    print(f"denoiser: latents ready after {time.time() - began:.0f} s, std {spread:.3f}", flush=True)
    reader = lips.train_reader(pool.target[:looks], data, lips.STEPS if device.type == "cuda" else 50)

    alphas = ddim_scheduler().alphas_cumprod.to(device)
    snr = alphas / (1 - alphas)
    importance = snr.clamp(max=SNR_CAP) / snr
    weights, shown = loss_weights(mask), latent_mask(mask, LATENT_SIDE)

    def loss_of(x: Tensor, timestep: Tensor, tokens: Tensor, noise: Tensor, shapes: Tensor) -> tuple[Tensor, Tensor]:
        """The losses of the noise and of the mouths' shape, of all windows and of each, (b,)."""
        b, f = tokens.shape[:2]
        out, _ = working.full(x.to(kind), timestep, working.encode_audio(tokens.to(kind)), f)
        out = out.float()
        per_window = (weights * (windows_first(out, b) - noise).square()).mean((1, 2, 3, 4))
        a = alphas[timestep].repeat_interleave(f)[:, None, None, None]
        estimate = (x[:, :LATENTS] - (1 - a).sqrt() * out) / a.sqrt()  # of the clean latents
        with torch.autocast(device.type, torch.bfloat16):
            read = reader(estimate)
        off = lips.shape_loss(read.float().unflatten(0, (b, f)), shapes)
        # By its root, a step counts the same for the noise whenever it is taken.
        return (importance[timestep] * per_window).mean(), alphas[timestep].sqrt() * off

    learnt, used = list(unet.parameters()), list(working.parameters())
    live = [*learnt, *encoder.parameters()]
    followers = list(average.parameters())  # in the order of `live`
    first, saved = step, time.time()
    losses = []
    while (elapsed := time.time() - began) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * min(1, (step - first + 1) / 200) * max(0.03, 1 - elapsed / seconds)
        sound = draw_sound(data, rng, batch // WINDOWS_PER_SEGMENT, augment=True)
        windows = draw_windows(data, sound, rng, WINDOWS_PER_SEGMENT)
        b, f = windows.frames.shape
        look = torch.randint(looks, (b, 1), device=device)
        clean = pool.target[look, windows.frames].transpose(1, 2).float()  # (b, c, f, h, w)
        seen_then, reference_then = draw_moments(windows)
        masked = pool.masked[look, seen_then].transpose(1, 2).float()
        reference = pool.reference[look, reference_then].transpose(1, 2).float()
        seen = torch.rand(b, 1, 1, 1, 1, device=device) >= UNSEEN
        reference = torch.where(seen, reference, masked)
        timestep = torch.randint(1000, (b,), device=device)
        one = torch.randn_like(clean[:, :, :1]).expand_as(clean)
        own = torch.where(torch.rand(b, 1, 1, 1, 1, device=device) < SHARED_NOISE, 0.0, 0.5)
        noise = (1 - own).sqrt() * one + own.sqrt() * torch.randn_like(clean)
        a = alphas[timestep][:, None, None, None, None]
        noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
        x = torch.cat([noisy, shown.expand(b, 1, f, -1, -1), masked, reference], dim=1)
        heard = (torch.rand(b, device=device) >= UNHEARD).float()
        with torch.autocast(device.type, torch.bfloat16):
            shapes = reader(frames_first(clean)).float().unflatten(0, (b, f))
            tokens = tokens_of(encoder(sound.mel), windows) * heard[:, None, None, None]
        loss, off = loss_of(frames_first(x), timestep, tokens, noise, shapes)
        off = (heard * off).mean()  # nobody knows how a mouth moves that is not heard
        (loss + LIP_WEIGHT * off).backward()
        for master, weight in zip(learnt, used, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        nn.utils.clip_grad_norm_(live, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        decay = min(EMA, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_copy_(used, learnt)
            torch._foreach_lerp_(followers, live, 1 - decay)
        losses.append(torch.stack([loss.detach(), off.detach()]))
        if (step - first) % REFRESH_STEPS == 0:
            renewed = looks if looks < len(pool.target) else 1 + (step - first) // REFRESH_STEPS % (looks - 1)
            encode_look(pool, renewed, vae, data, rng, mask, scale)
            looks = max(looks, renewed + 1)
        if step % 200 == 0 or step == first + 1:
            mean, mean_off = torch.stack(losses).mean(0).tolist()
            losses.clear()
            print(
                f"denoiser step {step} loss {mean:.4f}, lips {mean_off:.4f}, {time.time() - began:.0f} s", flush=True
            )
        if time.time() - saved > SAVE_SECONDS:
            save_state(state / "denoiser.pt", modules, optimizer, step)
            saved = time.time()
    save_state(state / "denoiser.pt", modules, optimizer, step)
    print(f"denoiser: {step - first} steps", flush=True)
