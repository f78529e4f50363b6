"""Training of the demo model's U-Net, on latents of several augmented renderings of every clip, renewed in turn."""

import copy
import logging
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
from latentsync.training.augmentation import no_augmentation, random_augmentation, random_blends, random_mouth, render
from latentsync.training.sound import Windows, draw_sound, draw_windows, gather_tokens, segment_count
from latentsync.training.state import load_state, load_weights, save_state
from latentsync.unet import UNet, UNetConfig, fold_frames, unfold_frames
from latentsync.vae import latent_mask

log = logging.getLogger(__name__)

LATENTS = autoencoder.CONFIG["latent_channels"]
CONFIG = {  # in the format of the released configuration
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
MAX_RENDERINGS, FIRST_RENDERINGS = 6, 3  # of every clip: at most, and at the beginning
SAVE_SECONDS = 120.0  # between two writes of the state, so that an interrupted run is not lost
REFRESH_STEPS = 2000  # after which another random rendering is added, or replaces the oldest
SEGMENTS, WINDOWS_PER_SEGMENT = 4, 10
LEARNING_RATE, LISTENER_RATE = 3e-4, 1e-4
NO_AUDIO_SHARE = 0.1  # share of windows without audio, for the uncond branch of guidance
NO_REFERENCE_SHARE = 0.1  # share of windows without a reference, where only the audio determines the mouth
OTHER_MOMENT_SHARE = 0.9  # share of windows whose conditioning shows another moment than the audio
PURE_NOISE_SHARE = 0.5  # share of windows as at the start of sampling: pure noise, the same for all frames
MIN_START_TIMESTEP = 850  # timestep at which sampling may start, from 7 steps on
START_WEIGHT = 0.2  # of the loss of these windows, in clean latents
SHARED_NOISE_SHARE = 0.5  # share of the other windows, at lower timesteps, whose frames all have the same noise
SNR_CAP = 5.0  # min-SNR weighting (Hang et al. 2023)
VISIBLE_WEIGHT = 0.15  # of the loss in the visible part of the mask
MOUTH_WEIGHT = 3.0  # of the loss around the lips
MOUTH = (slice(9, 14), slice(4, 12))  # rows, columns of the 16 × 16 latents
LIP_WEIGHT = 0.1  # of the loss of the mouth's shape relative to that of the noise
EMA = 0.999


@dataclass(frozen=True)
class LatentPool:
    """Scaled latents of every rendering, (renderings, n, c, 16, 16) bfloat16.

    reference is the target with another expression, so that it shows the person and not the mouth's shape.
    """

    target: Tensor
    masked: Tensor
    reference: Tensor


def empty_pool(renderings: int, data: ClipSet) -> LatentPool:
    """An uninitialised pool for so many renderings of all clips."""
    shape = (renderings, len(data.frames), LATENTS, LATENT_SIDE, LATENT_SIDE)
    device = data.frames.device
    return LatentPool(*(torch.empty(shape, dtype=torch.bfloat16, device=device) for _ in fields(LatentPool)))


@torch.no_grad()
def encode_rendering(
    pool: LatentPool, k: int, vae: AutoencoderKL, data: ClipSet, rng: np.random.Generator, mask: Tensor, scale: float
) -> None:
    """Render and encode all clips into slot k: unchanged for k = 0, else each clip augmented anew. mask: (128, 128)."""
    device = data.frames.device
    clip_of = data.clip_of()
    augmentation = (no_augmentation if k == 0 else random_augmentation)(len(data.starts), device)
    mouth = random_mouth(data.mouths())
    blends = random_blends(data, rng) if k > 0 else None
    for begin in range(0, len(data.frames), 512):
        part = slice(begin, begin + 512)
        frames, of_frames = data.frames[part], augmentation[clip_of[part]]
        if blends is not None:
            frames = (frames + blends[clip_of[part]]).clamp(0, 255)
        x = render(frames, of_frames)
        reference = render(frames, of_frames, mouth[clip_of[part]])
        for latents, pixels in ((pool.target, x), (pool.masked, x * mask), (pool.reference, reference)):
            pixels = pixels.to(vae.dtype, memory_format=torch.channels_last)
            latents[k, part] = vae.encode(pixels).latent_dist.mode() * scale


@dataclass(frozen=True)
class Examples:
    """The batch of a step: b windows of f frames.

    clean, masked, reference: latents (b, c, f, 16, 16); noise, of the shape of clean, and timestep (b,); start (b,): 1
    for pure noise, else 0; mel (s, 80, 3000) and the windows' positions in it, segment (b,) and rows (b, f, 10);
    with_audio (b,): 1, or 0 for windows without audio.
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
    with_audio: Tensor


def conditioning_frames(windows: Windows) -> Tensor:
    """The first and last frames whose latents are each window's conditioning, (b, 2).

    Cheeks and jaw reveal what a mouth says. A network that always sees them at the moment of the audio follows them,
    and repeats the old speech when it should dub. So they are mostly of another window.
    """
    ends = [0, -1]
    other_moment = torch.rand(len(windows.frames), 1, device=windows.frames.device) < OTHER_MOMENT_SHARE
    return torch.where(other_moment, windows.reference[:, ends], windows.frames[:, ends])


def draw_examples(data: ClipSet, pool: LatentPool, renderings: int, rng: np.random.Generator, batch: int) -> Examples:
    """Draw `batch` random windows in random ones of the first `renderings`.

    Noise shared by all frames reveals motion: the difference of two noisy frames is that of the clean ones. A network
    trained so at high timesteps takes the pure noise at the start of sampling for a face at rest. So part of the
    windows are pure noise, and noise on faces is shared only at lower timesteps.
    """
    device = data.frames.device
    sound = draw_sound(data, rng, segment_count(batch, WINDOWS_PER_SEGMENT), augment=True)
    windows = draw_windows(data, sound, rng, WINDOWS_PER_SEGMENT)
    b, f = windows.frames.shape
    rendering, ends = torch.randint(renderings, (b, 1), device=device), conditioning_frames(windows)
    clean = pool.target[rendering, windows.frames].transpose(1, 2).float()
    pairs = (part[rendering, ends].float() for part in (pool.masked, pool.reference))
    masked, reference = (interpolate_ends(pair[:, 0], pair[:, 1], f).transpose(1, 2) for pair in pairs)
    with_reference = torch.rand(b, 1, 1, 1, 1, device=device) >= NO_REFERENCE_SHARE
    start, shared = (torch.rand(b, device=device) < share for share in (PURE_NOISE_SHARE, SHARED_NOISE_SHARE))
    start_timestep, any_timestep = (
        torch.randint(first, TRAIN_STEPS, (b,), device=device) for first in (MIN_START_TIMESTEP, 0)
    )
    timestep = torch.where(start, start_timestep, any_timestep)
    shared_noise = torch.randn_like(clean[:, :, :1]).expand_as(clean)
    own_share = torch.where(start | shared & (timestep < MIN_START_TIMESTEP), 0.0, 0.5).view(b, 1, 1, 1, 1)
    return Examples(
        clean=clean,
        masked=masked,
        reference=torch.where(with_reference, reference, masked),
        noise=(1 - own_share).sqrt() * shared_noise + own_share.sqrt() * torch.randn_like(clean),
        timestep=timestep,
        start=start.float(),
        mel=sound.mel,
        segment=windows.segment,
        rows=windows.rows,
        with_audio=(torch.rand(b, device=device) >= NO_AUDIO_SHARE).float(),
    )


def capture_step(update: Callable[[Examples], Tensor], examples: Examples) -> Callable[[Examples], Tensor]:
    """Capture `update` as one CUDA graph: its thousands of small kernels take longer to launch than to run.

    Runs it a few times on the examples. The result of the returned function is overwritten by its next call.
    """
    static = Examples(*(getattr(examples, field.name).clone() for field in fields(Examples)))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            update(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = update(static)

    def replay(examples: Examples) -> Tensor:
        for field in fields(Examples):
            getattr(static, field.name).copy_(getattr(examples, field.name))
        graph.replay()
        return result

    return replay


def loss_weights(mask: Tensor) -> Tensor:
    """Spatial weights of the noise loss (16, 16), with mean 1, from the fixed mask (128, 128)."""
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
    """Train U-Net and audio encoder for `seconds`, continuing from `state/denoiser.pt` if it exists.

    The autoencoder is that of `state/autoencoder.pt`, the initial audio encoder that of `state/listener.pt`.
    batch: windows per step, a multiple of 10; lip_weight: weight of the loss of the mouth's shape, from 0.
    """
    started = time.time()
    segment_count(batch, WINDOWS_PER_SEGMENT)  # raises its error before a minute of preparation
    data = load_clips(prepared, device)
    torch.manual_seed(int(started))
    rng = np.random.default_rng(int(started))
    vae = AutoencoderKL.from_config(autoencoder.CONFIG)
    scale = load_weights(state / "autoencoder.pt", {"vae": vae})["scaling_factor"]
    # On processors without bfloat16 units it would take minutes.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    vae = vae.eval().requires_grad_(False).to(device, dtype, memory_format=torch.channels_last)
    encoder = listener.new_encoder()
    load_weights(state / "listener.pt", {"encoder": encoder})
    encoder.to(device)
    unet = UNet(UNetConfig.from_dict(CONFIG)).to(device, memory_format=torch.channels_last)
    for name, parameter in unet.named_parameters():
        if "motion_modules" in name and "temporal_transformer.proj_out" in name:
            nn.init.zeros_(parameter)  # starts without temporal layers
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        [
            {"params": list(unet.parameters()), "base": LEARNING_RATE},
            {"params": list(encoder.parameters()), "base": LISTENER_RATE},
        ],
        weight_decay=0.01,
        fused=on_gpu,
        capturable=on_gpu,
    )
    average = copy.deepcopy(nn.ModuleDict({"unet": unet, "encoder": encoder})).requires_grad_(False)
    modules = {"unet": unet, "encoder": encoder, "average": average}
    step = load_state(state / "denoiser.pt", modules, optimizer)
    if step == 0:  # the encoder of an imported model may have been trained since by `listener`
        load_weights(state / "listener.pt", {"encoder": encoder})
        average["encoder"].load_state_dict(encoder.state_dict())
    for group in optimizer.param_groups:  # a tensor, which a captured graph reads at every replay
        group["lr"] = torch.zeros((), device=device)
    # The passes run in bfloat16; the master weights and their average stay float32.
    working = copy.deepcopy(unet).to(dtype)
    mask = torch.from_numpy(fixed_mask(RESOLUTION).copy()).to(device)
    pool = empty_pool(MAX_RENDERINGS if on_gpu else 2, data)
    renderings = min(FIRST_RENDERINGS, len(pool.target))  # in the pool so far
    for k in range(renderings):
        encode_rendering(pool, k, vae, data, rng, mask, scale)
    std = float(pool.target[0].std())
    log.info("denoiser: latents ready after %.0f s, std %.3f", time.time() - started, std)
    reader = lips.train_reader(pool.target[:renderings], data, lips.STEPS if on_gpu else 50)

    alphas = cumulative_alphas().to(device)
    snr = alphas / (1 - alphas)
    capped = snr.clamp(max=SNR_CAP) / snr
    weights, small_mask = loss_weights(mask), latent_mask(mask, LATENT_SIDE)

    unet_parameters, working_parameters = list(unet.parameters()), list(working.parameters())
    parameters = [*unet_parameters, *encoder.parameters()]
    average_parameters = list(average.parameters())  # in the order of `parameters`

    def update(examples: Examples) -> Tensor:
        """Run one step; returns the losses of the noise and of the mouths' shape, (2,)."""
        b, f = examples.rows.shape[:2]
        with torch.autocast(device.type, torch.bfloat16):
            shapes = reader(fold_frames(examples.clean)).float().unflatten(0, (b, f))
            tokens = gather_tokens(encoder(examples.mel), examples.segment, examples.rows)
            tokens = tokens * examples.with_audio[:, None, None, None]
        a = alphas[examples.timestep][:, None, None, None, None]
        start = examples.start[:, None, None, None, None]
        noisy = torch.lerp(a.sqrt() * examples.clean + (1 - a).sqrt() * examples.noise, examples.noise, start)
        noise = (noisy - a.sqrt() * examples.clean) / (1 - a).sqrt()  # its removal leaves the clean latents
        x = torch.cat([noisy, small_mask.expand(b, 1, f, -1, -1), examples.masked, examples.reference], dim=1)
        audio = working.encode_audio(tokens.to(dtype))
        out, _ = working.full(fold_frames(x).to(dtype), examples.timestep, audio, f)
        out = unfold_frames(out.float(), b)
        per_window = (weights * (out - noise).square()).mean((1, 2, 3, 4))
        estimate = (noisy - (1 - a).sqrt() * out) / a.sqrt()  # of the clean latents
        with torch.autocast(device.type, torch.bfloat16):
            estimated_shapes = reader(fold_frames(estimate))
        lip_loss = lips.shape_loss(estimated_shapes.float().unflatten(0, (b, f)), shapes)
        # Weighted by √alpha, so that its gradient relative to the noise's is the same at all timesteps, and in full at
        # the start, which decides most. Without audio the shape is not determined.
        lip_weights = torch.lerp(alphas[examples.timestep].sqrt(), torch.ones_like(lip_loss), examples.start)
        lip_loss = (examples.with_audio * lip_weights * lip_loss).mean()
        importance = torch.lerp(capped[examples.timestep], START_WEIGHT / snr[examples.timestep], examples.start)
        loss = (importance * per_window).mean()
        for parameter in (*parameters, *working_parameters):
            parameter.grad = None
        (loss + lip_weight * lip_loss).backward()
        for master, weight in zip(unet_parameters, working_parameters, strict=True):
            master.grad = weight.grad.float()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(working_parameters, unet_parameters)
        return torch.stack([loss.detach(), lip_loss.detach()])

    run_step: Callable[[Examples], Tensor] = update
    if on_gpu:
        run_step = capture_step(update, draw_examples(data, pool, renderings, rng, batch))
        log.info("denoiser: captured after %.0f s", time.time() - started)
    first, saved = step, time.time()
    losses = []
    while (elapsed := time.time() - started) < seconds or step == first:
        for group in optimizer.param_groups:
            group["lr"].fill_(group["base"] * min(1, (step - first + 1) / 200) * max(0.03, 1 - elapsed / seconds))
        losses.append(run_step(draw_examples(data, pool, renderings, rng, batch)).clone())
        step += 1
        decay = min(EMA, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(average_parameters, parameters, 1 - decay)
        if (step - first) % REFRESH_STEPS == 0:
            renewed = renderings
            if renderings == len(pool.target):
                renewed = 1 + (step - first) // REFRESH_STEPS % (renderings - 1)
            encode_rendering(pool, renewed, vae, data, rng, mask, scale)
            renderings = max(renderings, renewed + 1)
        if step % 200 == 0 or step == first + 1:
            means = torch.stack(losses).mean(0).tolist()
            losses.clear()
            log.info("denoiser step %d loss %.4f, lips %.4f, %.0f s", step, *means, time.time() - started)
        if time.time() - saved > SAVE_SECONDS:
            save_state(state / "denoiser.pt", modules, optimizer, step)
            saved = time.time()
    save_state(state / "denoiser.pt", modules, optimizer, step)
    log.info("denoiser: %d steps", step - first)
