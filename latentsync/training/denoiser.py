"""The demo model's U-Net, trained in latents of several looks of every clip, which are renewed in turn."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from latentsync.alignment import fixed_mask
from latentsync.corpus import RESOLUTION, ClipSet, load_clips
from latentsync.sampling import cumulative_alphas, interpolate_ends
from latentsync.settings import TRAIN_STEPS
from latentsync.training import autoencoder, lips, listener
from latentsync.training.looks import plain_look, random_look, random_mouth, random_people, render
from latentsync.training.sound import Windows, draw_sound, draw_windows, segments_of, tokens_of
from latentsync.training.state import load_state, load_weights, save_state
from latentsync.unet import UNet, UNetConfig, fold_frames, unfold_frames
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
REFRESH_STEPS = 2000  # after which one more random look is made, or the oldest replaced
SEGMENTS, WINDOWS_PER_SEGMENT = 4, 10
LEARNING_RATE, LISTENER_RATE = 3e-4, 1e-4
UNHEARD = 0.1  # share of windows without audio, so that guidance has a branch to start from
UNSEEN = 0.1  # share of windows without a reference, where the sound alone says how the mouth is
ELSEWHEN = 0.9  # share of windows of which another moment is shown than what is heard
STARTS = 0.5  # share of windows that are as sampling starts: pure noise, the same for all frames
EARLIEST = 850  # timestep at which sampling may start, from 7 steps on
START_WEIGHT = 0.2  # of their loss, in clean latents
SHARED_NOISE = 0.5  # share of the other windows, of earlier timesteps, whose frames all have the same noise
SNR_CAP = 5.0  # min-SNR weighting (Hang et al. 2023)
VISIBLE_WEIGHT = 0.15  # of the loss where the mask shows the face anyway
MOUTH_WEIGHT = 3.0  # of the loss around the lips
MOUTH = (slice(9, 14), slice(4, 12))  # rows, columns of the 16 × 16 latents
LIP_WEIGHT = 0.1  # of the loss of the mouth's shape, beside that of the noise
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


@dataclass(frozen=True)
class Examples:
    """What a step learns from: b windows of f frames.

    clean, masked, reference: latents (b, c, f, 16, 16); noise and timestep (b,) that are added to the clean ones; start
    (b,): one where there is noise alone; mel (s, 80, 3000) and the windows' places in it, segment (b,) and rows
    (b, f, 10); heard (b,): zero where it is not.
    """

    clean: Tensor
    masked: Tensor
    reference: Tensor
    noise: Tensor
    timestep: Tensor
    start: Tensor
    mel: Tensor
    segment: Tensor
    rows: Tensor
    heard: Tensor


def shown_frames(windows: Windows) -> Tensor:
    """The first and last frame of what is shown of every window, (b, 2).

    Cheeks and jaw tell what a mouth says. A network that always sees them at the moment that it hears goes by them, and
    repeats what the old mouth said when it is to dub. So they are mostly of another window.
    """
    ends = [0, -1]
    elsewhen = torch.rand(len(windows.frames), 1, device=windows.frames.device) < ELSEWHEN
    return torch.where(elsewhen, windows.reference[:, ends], windows.frames[:, ends])


def draw_examples(data: ClipSet, pool: LatentPool, looks: int, rng: np.random.Generator, batch: int) -> Examples:
    """`batch` random windows in random ones of the first `looks` looks.

    Noise that all frames share gives away what is in motion: the difference of two noisy frames is that of the clean
    ones. A network that has seen it at late timesteps takes the pure noise that sampling starts from for a face at
    rest. So it is shown just that as well, and shared noise on faces only after the start.
    """
    device = data.frames.device
    sound = draw_sound(data, rng, segments_of(batch, WINDOWS_PER_SEGMENT), augment=True)
    windows = draw_windows(data, sound, rng, WINDOWS_PER_SEGMENT)
    b, f = windows.frames.shape
    look, shown = torch.randint(looks, (b, 1), device=device), shown_frames(windows)
    clean = pool.target[look, windows.frames].transpose(1, 2).float()
    masked, reference = (
        interpolate_ends(*part[look, shown].float().unbind(1), f).transpose(1, 2)
        for part in (pool.masked, pool.reference)
    )
    seen = torch.rand(b, 1, 1, 1, 1, device=device) >= UNSEEN
    start, shared = (torch.rand(b, device=device) < share for share in (STARTS, SHARED_NOISE))
    late, any_of_all = (torch.randint(first, TRAIN_STEPS, (b,), device=device) for first in (EARLIEST, 0))
    timestep = torch.where(start, late, any_of_all)
    one = torch.randn_like(clean[:, :, :1]).expand_as(clean)
    own = torch.where(start | shared & (timestep < EARLIEST), 0.0, 0.5).view(b, 1, 1, 1, 1)
    return Examples(
        clean=clean,
        masked=masked,
        reference=torch.where(seen, reference, masked),
        noise=(1 - own).sqrt() * one + own.sqrt() * torch.randn_like(clean),
        timestep=timestep,
        start=start.float(),
        mel=sound.mel,
        segment=windows.segment,
        rows=windows.rows,
        heard=(torch.rand(b, device=device) >= UNHEARD).float(),
    )


def captured(update: Callable[[Examples], Tensor], examples: Examples) -> Callable[[Examples], Tensor]:
    """`update` as one CUDA graph: its thousands of small kernels take longer to launch one by one than to run.

    It is run a few times on the examples for that. What the function returns is overwritten by its next call.
    """
    held = Examples(*(getattr(examples, field.name).clone() for field in fields(Examples)))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            update(held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = update(held)

    def replay(examples: Examples) -> Tensor:
        for field in fields(Examples):
            getattr(held, field.name).copy_(getattr(examples, field.name))
        graph.replay()
        return found

    return replay


def loss_weights(mask: Tensor) -> Tensor:
    """Where the loss counts, (16, 16), mean one, by the fixed mask (128, 128)."""
    hidden = 1 - nn.functional.avg_pool2d(mask[None], 8)[0]
    weights = VISIBLE_WEIGHT + hidden
    weights[MOUTH] *= MOUTH_WEIGHT
    return weights / weights.mean()


def train(
    prepared: Path,
    state: Path,
    seconds: float,
    device: torch.device,
    batch: int = SEGMENTS * WINDOWS_PER_SEGMENT,
    lip_weight: float = LIP_WEIGHT,
) -> None:
    """Train U-Net and audio encoder for `seconds`; continue from `state/denoiser.pt` where it exists.

    Takes the autoencoder and the encoder to begin with from `state/autoencoder.pt` and `state/listener.pt`.
    batch: windows a step, a multiple of 10; lip_weight: of the loss of the mouth's shape, from 0.
    """
    began = time.time()
    segments_of(batch, WINDOWS_PER_SEGMENT)  # before the minute until the first step
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
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        [
            {"params": list(unet.parameters()), "base": LEARNING_RATE},
            {"params": list(encoder.parameters()), "base": LISTENER_RATE},
        ],
        weight_decay=0.01, fused=on_gpu, capturable=on_gpu,
    )  # fmt: skip
    average = copy.deepcopy(nn.ModuleDict({"unet": unet, "encoder": encoder})).requires_grad_(False)
    modules = {"unet": unet, "encoder": encoder, "average": average}
    step = load_state(state / "denoiser.pt", modules, optimizer)
    if step == 0:  # an imported model's encoder may have listened on since
        load_weights(state / "listener.pt", {"encoder": encoder})
        average["encoder"].load_state_dict(encoder.state_dict())
    for group in optimizer.param_groups:  # in a tensor, as a graph reads it anew
        group["lr"] = torch.zeros((), device=device)
    # The passes are in bfloat16 throughout; the weights that are learnt, and their average, keep float32.
    working = copy.deepcopy(unet).to(kind)
    mask = torch.from_numpy(fixed_mask(RESOLUTION).copy()).to(device)
    pool = empty_pool(LOOKS if on_gpu else 2, data)
    looks = min(FIRST_LOOKS, len(pool.target))  # those that there are
    for k in range(looks):
        encode_look(pool, k, vae, data, rng, mask, scale)
    spread = float(pool.target[0].std())
    print(f"denoiser: latents ready after {time.time() - began:.0f} s, std {spread:.3f}", flush=True)
    reader = lips.train_reader(pool.target[:looks], data, lips.STEPS if on_gpu else 50)

    alphas = cumulative_alphas().to(device)
    snr = alphas / (1 - alphas)
    capped = snr.clamp(max=SNR_CAP) / snr
    weights, shown = loss_weights(mask), latent_mask(mask, LATENT_SIDE)

    learnt, used = list(unet.parameters()), list(working.parameters())
    live = [*learnt, *encoder.parameters()]
    followers = list(average.parameters())  # in the order of `live`

    def update(given: Examples) -> Tensor:
        """One step; returns the losses of the noise and of the mouths' shape, (2,)."""
        b, f = given.rows.shape[:2]
        with torch.autocast(device.type, torch.bfloat16):
            shapes = reader(fold_frames(given.clean)).float().unflatten(0, (b, f))
            tokens = tokens_of(encoder(given.mel), given.segment, given.rows) * given.heard[:, None, None, None]
        a = alphas[given.timestep][:, None, None, None, None]
        start = given.start[:, None, None, None, None]
        noisy = torch.lerp(a.sqrt() * given.clean + (1 - a).sqrt() * given.noise, given.noise, start)
        noise = (noisy - a.sqrt() * given.clean) / (1 - a).sqrt()  # whose removal leaves the clean latents
        x = torch.cat([noisy, shown.expand(b, 1, f, -1, -1), given.masked, given.reference], dim=1)
        audio = working.encode_audio(tokens.to(kind))
        out, _ = working.full(fold_frames(x).to(kind), given.timestep, audio, f)
        out = unfold_frames(out.float(), b)
        per_window = (weights * (out - noise).square()).mean((1, 2, 3, 4))
        estimate = (noisy - (1 - a).sqrt() * out) / a.sqrt()  # of the clean latents
        with torch.autocast(device.type, torch.bfloat16):
            read = reader(fold_frames(estimate))
        off = lips.shape_loss(read.float().unflatten(0, (b, f)), shapes)
        # By its root, a step counts the same for the noise whenever it is taken; the first one decides most. And nobody
        # knows how a mouth moves that is not heard.
        off = (given.heard * torch.lerp(alphas[given.timestep].sqrt(), torch.ones_like(off), given.start) * off).mean()
        importance = torch.lerp(capped[given.timestep], START_WEIGHT / snr[given.timestep], given.start)
        loss = (importance * per_window).mean()
        for parameter in (*live, *used):
            parameter.grad = None
        (loss + lip_weight * off).backward()
        for master, weight in zip(learnt, used, strict=True):
            master.grad = weight.grad.float()
        nn.utils.clip_grad_norm_(live, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(used, learnt)
        return torch.stack([loss.detach(), off.detach()])

    if on_gpu:
        update = captured(update, draw_examples(data, pool, looks, rng, batch))
        print(f"denoiser: captured after {time.time() - began:.0f} s", flush=True)
    first, saved = step, time.time()
    losses = []
    while (elapsed := time.time() - began) < seconds or step == first:
        for group in optimizer.param_groups:
            group["lr"].fill_(group["base"] * min(1, (step - first + 1) / 200) * max(0.03, 1 - elapsed / seconds))
        losses.append(update(draw_examples(data, pool, looks, rng, batch)).clone())
        step += 1
        decay = min(EMA, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(followers, live, 1 - decay)
        if (step - first) % REFRESH_STEPS == 0:
            renewed = looks if looks < len(pool.target) else 1 + (step - first) // REFRESH_STEPS % (looks - 1)
            encode_look(pool, renewed, vae, data, rng, mask, scale)
            looks = max(looks, renewed + 1)
        if step % 200 == 0 or step == first + 1:
            mean, mean_off = torch.stack(losses).mean(0).tolist()
            losses.clear()
            print(f"denoiser step {step} loss {mean:.4f}, lips {mean_off:.4f}, {time.time() - began:.0f} s", flush=True)
        if time.time() - saved > SAVE_SECONDS:
            save_state(state / "denoiser.pt", modules, optimizer, step)
            saved = time.time()
    save_state(state / "denoiser.pt", modules, optimizer, step)
    print(f"denoiser: {step - first} steps", flush=True)
