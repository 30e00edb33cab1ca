"""A pipeline of diffusers seen as a Markov chain with Gaussian kernels."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from tiltopt.digest import content_digest, weights_digest
from tiltopt.errors import PriorError
from tiltopt.notebook import Shown
from tiltopt.samplers.denoisers import Denoiser, denoiser_of
from tiltopt.samplers.loading import DTYPES, add_lora, load_decoder, load_pipeline, torch_dtype
from tiltopt.samplers.prior import Prior, Reverse, check_prompts
from tiltopt.types import Conditioning

ENCODING = ("encoder", "quant_conv")
"""The parts of an autoencoder that make latents of pictures."""


class DiffusersPrior(Shown):
    """A diffusion model of diffusers as a `Prior`: Gaussian chain with eta, classifier-free guidance, decoder.

    With network output e(x, t, c), prompt c and negative prompt n, guidance takes
    e = e(x, t, n) + guidance_scale (e(x, t, c) - e(x, t, n)) in one batched call; scale 1 calls the network on c alone.
    A network with a guidance embedding (LCM, FLUX dev) is told the scale instead; an unconditional one has none.
    The kernels are those of `GaussianChain`.

    Precision: network and text encoders compute in `dtype`; latents, guidance arithmetic and everything after are
    float32 (float64 if `dtype` is); the VAE decodes in `vae_dtype`, float32 unless told otherwise (in float16 the
    VAE of SDXL overflows).

    Args:
        denoiser: the network, see `tiltopt.samplers.denoisers`.
        vae: AutoencoderKL or AutoencoderTiny; None for a model over pixels.
        scheduler: any diffusers scheduler of the network's family; only its configuration is used.
        num_steps: K, the number of kernels.
        eta: in [0, 1]; 0 makes every kernel deterministic.
        renoise: the kernels of a consistency model (LCM): x0 noised anew; `eta` then means nothing.
        guidance_scale: >= 0.
        negative_prompt: encoded once.
        dtype: of the network and the text encoders: "float32", "bfloat16", "float16" or "float64".
        vae_dtype: of the decoder.
        device: where the modules live and compute.
        offload: what drawing does not need stays on the CPU and computes there: text encoders, of which a prompt is
            shown to each once per call of `encode`, and the encoder of the VAE.
        size: width and height in pixels (a number or a pair (height, width)); None for what the network was trained at.
        gradient_checkpointing: recompute network and VAE activations in the backward pass: less memory, more time.
        channels_last: memory format of the convolutions; faster on CUDA with half precision.
        compile: torch.compile the network; the first call takes minutes.
        tf32: let CUDA round float32 products to TensorFloat-32, in the whole process.
        vae_slicing: decode one picture at a time. vae_tiling: decode in overlapping tiles, which changes pixels.
        guidance_decoder: a small autoencoder (AutoencoderTiny) of the same latents, as a module or a folder, for
            `guidance_decode`.
        name: shown in `describe()`.
    Raises:
        PriorError: the parts do not fit, cannot be expressed as the chain, or a number is out of range.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        vae: Any,
        scheduler: Any,
        *,
        num_steps: int = 50,
        eta: float = 1.0,
        renoise: bool = False,
        guidance_scale: float = 5.0,
        negative_prompt: str = "",
        dtype: str = "float32",
        vae_dtype: str = "float32",
        device: str | torch.device = "cpu",
        offload: bool = False,
        size: int | tuple[int, int] | None = None,
        gradient_checkpointing: bool = False,
        channels_last: bool = False,
        compile: bool = False,
        tf32: bool = False,
        vae_slicing: bool = False,
        vae_tiling: bool = False,
        guidance_decoder: Any = None,
        name: str = "",
    ) -> None:
        self.dtype, self.vae_dtype = torch_dtype(dtype, "dtype"), torch_dtype(vae_dtype, "vae_dtype")
        if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
            raise PriorError(f"`guidance_scale` must be a number >= 0 (1 turns guidance off), got {guidance_scale}")
        self.denoiser, self.vae = denoiser, vae
        self.guidance_scale, self.name, self.negative_prompt = float(guidance_scale), name, negative_prompt
        self.latent_dtype = torch.float64 if dtype == "float64" else torch.float32
        self.image_size, self.event_shape = self._sizes(size)
        self.schedule = denoiser.schedule(scheduler, num_steps, eta, renoise, self.event_shape)
        self.chain = self.schedule.chain
        self.num_steps = self.chain.num_steps
        self.offload, self._channels_last, self.gradient_checkpointing = offload, channels_last, False
        self.guidance_vae = None
        if guidance_decoder is not None:
            is_path = isinstance(guidance_decoder, (str, Path))
            self.guidance_vae = load_decoder(guidance_decoder) if is_path else guidance_decoder
            self._check_guidance_decoder()
        self._prepare(gradient_checkpointing, channels_last, vae_slicing, vae_tiling)
        if tf32:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self.to(device)
        if compile:
            denoiser.call = torch.compile(denoiser.network)

    @classmethod
    def from_pipeline(cls, pipe: Any, **options: Any) -> DiffusersPrior:
        """The prior of a loaded pipeline. Its modules are used, not copied: their precision and device change, and
        adapters that were loaded into them stay in effect. `options` are those of the constructor."""
        denoiser, vae = denoiser_of(pipe), getattr(pipe, "vae", None)
        if vae is None and not denoiser.over_pixels:
            raise PriorError(f"this {type(pipe).__name__} denoises latents and has no autoencoder (vae) to decode them")
        return cls(denoiser, vae, pipe.scheduler, **options)

    @property
    def branches(self) -> int:
        """Rows that the network is shown per latent: 2 where guidance has a second branch."""
        return 1 if self.denoiser.told or self.guidance_scale == 1.0 or not self.denoiser.encoders else 2

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """B prompts -> Conditioning; `embeds` is a tensor or a dict of tensors with B rows, or None."""
        checked = check_prompts(prompts)
        return Conditioning(checked, self._on_device(self.denoiser.encode(checked)))

    def initial(self, n: int, generator: Generator) -> Tensor:
        """n draws of N(0, I), (n, *event), times the chain's first standard deviation (1 but for EDM); drawn on the
        generator's device."""
        noise = torch.randn(n, *self.event_shape, generator=generator, device=generator.device, dtype=self.latent_dtype)
        scale = self.chain.initial_std
        return (noise if scale == 1.0 else scale * noise).to(self.device)

    def std(self, k: int) -> float:
        """Standard deviation of kernel k, in latent units."""
        return self.chain.std[k]

    def reverse(self, k: int, x: Tensor, cond: Conditioning) -> Reverse:
        """Mean of kernel k and the estimate of the clean latent, both (n, *event); one network call.

        Args:
            k: step, 0 .. K-1.
            x: (n, *event), latents at step k.
            cond: n rows, from `encode(...)` and `repeat`.
        """
        if cond.embeds is None and self.denoiser.encoders:
            raise PriorError("`cond` holds no embeddings; make it with `prior.encode(prompts)`")
        if len(cond) != len(x):
            raise PriorError(f"`cond` must have one row per latent, got {len(cond)} rows for {len(x)} latents")
        shown = self.schedule.prediction.network_input(x, self.chain.b[k])
        mean, x0 = self.schedule.step(k, self.predict(shown, self.schedule.times[k], cond.embeds), x)
        return Reverse(mean, x0)

    def predict(self, x: Tensor, time: float, embeds: Any, *, guidance_scale: float | None = None) -> Tensor:
        """The guided network output at any training time, (n, *event) in the dtype of x.

        Args:
            x: (n, *event), what the network is shown (`Prediction.network_input`).
            time: in the schedule's units; may lie between two training levels.
            embeds: what `encode` gave, n rows.
            guidance_scale: None for the prior's own.
        """
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        if self.denoiser.told:
            return self.network(x, time, embeds, guidance_scale=scale)
        if scale == 1.0 or embeds is None:
            return self.network(x, time, embeds)
        both = zip_map(lambda a, b: torch.cat([a.expand(len(x), *a.shape[1:]), b]), self.negative, embeds)
        negative, positive = self.network(torch.cat([x, x]), time, both).chunk(2)
        return negative + scale * (positive - negative)

    def network(self, x: Tensor, time: float, embeds: Any, *, guidance_scale: float = 1.0) -> Tensor:
        """One network call without guidance: (n, *event) in the dtype of x, in units of the prediction type.

        `guidance_scale` matters only to a network with a guidance embedding (LCM, FLUX dev).
        """
        inputs = x.to(self.dtype)
        if self._channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        t = torch.full((len(x),), time, device=x.device, dtype=torch.float32)
        return self.denoiser(inputs, t, embeds, guidance_scale, self.image_size).to(x.dtype)

    def decode(self, x0: Tensor) -> Tensor:
        """Pictures (n, 3, H, W) in [0, 1] of clean latents (n, *event), in the dtype of x0.

        Values are clamped; the gradient passes through the clamp unchanged, so that a saturated pixel still says in
        which direction the reward lies. For drift only: weights use values.
        """
        return self._decode(self.vae, x0)

    def guidance_decode(self, x0: Tensor) -> Tensor:
        """`decode` by the small autoencoder where there is one: for looks on the way, never for the last."""
        return self._decode(self.guidance_vae or self.vae, x0)

    def encode_image(self, images: Tensor) -> Tensor:
        """Clean latents (n, *event) of pictures (n, 3, H, W) in [0, 1]: the mean of the encoder's distribution."""
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, *self.image_size):
            raise PriorError(
                f"`images` must be (n, 3, {self.image_size[0]}, {self.image_size[1]}), got {list(images.shape)}"
            )
        if self.vae is None:
            return (images * 2 - 1).to(self.device, self.latent_dtype)
        place = next(self.vae.encoder.parameters()).device
        out = self.vae.encode((images * 2 - 1).to(place, self.vae_dtype))
        latents = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latents
        return _from_vae(latents, self.vae.config).to(self.device, self.latent_dtype)

    def mid_states(self, z: Tensor) -> Tensor:
        """What the network's middle makes of clean latents z (n, *event), (n, 4 C), differentiable.

        The latents are brought to the last two noise levels of the chain by noise that is always the same, and shown to
        the network under the negative prompt: mean and standard deviation of its C middle channels over the picture,
        at either level.

        Raises:
            PriorError: a network without a middle that is known.
        """
        source = torch.Generator().manual_seed(0)
        found = []
        for k in (max(self.num_steps - 2, 0), self.num_steps - 1):
            noise = torch.randn(self.event_shape, generator=source, dtype=torch.float64).to(z)
            x = self.chain.a[k] * z + self.chain.b[k] * noise
            shown = self.schedule.prediction.network_input(x, self.chain.b[k]).to(self.device, self.dtype)
            t = torch.full((len(z),), self.schedule.times[k], device=self.device, dtype=torch.float32)
            rows = self.negative
            if rows is not None:
                rows = zip_map(lambda a, _: a.expand(len(z), *a.shape[1:]), rows, rows)
            states = self.denoiser.mid_states(shown, t, rows, self.guidance_scale, self.image_size).to(z.dtype)
            found += [states.mean(2), (states.var(2, correction=0) + 1e-8).sqrt()]
        return torch.cat(found, dim=1)

    @cached_property
    def encoder_id(self) -> str:
        """ "vae-" and a digest of the autoencoder's weights: names what `encode_image` computes."""
        if self.vae is None:
            return "pixels"
        config = self.vae.config
        numbers = (config.scaling_factor, getattr(config, "shift_factor", None), list(self.image_size))
        return f"vae-{weights_digest(self.vae, repr(numbers))}"

    @cached_property
    def fingerprint(self) -> str:
        """12 hexadecimal digits over every weight (adapters with their scales included), noise schedule and size.

        Two priors of one fingerprint draw the same pictures from the same settings; a run may refuse to go on with
        another. Read once: adapters that are loaded later are not in it.
        """
        modules = [m for m in (self.denoiser.network, *self.denoiser.encoders, self.vae) if m is not None]
        adapters = [
            f"{inner.scaling} {inner.active_adapters} {inner.disable_adapters}"
            for module in modules
            for inner in module.modules()
            if isinstance(getattr(inner, "scaling", None), dict)  # a layer of PEFT
        ]
        levels = json.dumps([self.chain.a, self.chain.b, self.schedule.times])
        latent = tuple(self.event_shape[1:])
        size = [] if latent == self.denoiser.sample_size else [f"size {latent}"]
        return content_digest(modules, levels, repr(self.schedule.prediction), *adapters, *size)

    def to(self, device: str | torch.device) -> DiffusersPrior:
        """Moves the modules and encodes the negative prompt there; returns self."""
        self.device = torch.device(device)
        idle = torch.device("cpu") if self.offload else self.device
        places = [(self.denoiser.network, self.dtype, self.device)]
        places += [(module, self.dtype, idle) for module in self.denoiser.encoders]
        for vae in (self.vae, self.guidance_vae):
            for name, part in vae.named_children() if vae is not None else ():
                places.append((part, self.vae_dtype, idle if name in ENCODING else self.device))
        for module, dtype, place in places:
            module.to(place)
            if any(p.dtype != dtype for p in module.parameters()):
                module.to(dtype)
        self.negative = self._on_device(self.denoiser.negative(self.negative_prompt))
        return self

    def about(self) -> dict[str, object]:
        return {
            "name": self.name or None,
            "steps": self.num_steps,
            "eta": f"{self.chain.eta:g}",
            "guidance": f"{self.guidance_scale:g}",
            "events": "x".join(map(str, self.event_shape)),
            "images": "x".join(map(str, self.image_size)),
            "device": self.device,
        }

    def use(self, *, vae_dtype: str | None = None, gradient_checkpointing: bool | None = None) -> None:
        """Change levers of a prior that is loaded; None leaves one as it is."""
        if vae_dtype is not None and torch_dtype(vae_dtype, "vae_dtype") != self.vae_dtype:
            self.vae_dtype = torch_dtype(vae_dtype, "vae_dtype")
            self.to(self.device)
        if gradient_checkpointing is not None:
            self._checkpoint(gradient_checkpointing)

    def _checkpoint(self, wanted: bool) -> None:
        if wanted != self.gradient_checkpointing:
            for module in (self.denoiser.network, self.vae, self.guidance_vae):
                if module is not None:
                    (module.enable_gradient_checkpointing if wanted else module.disable_gradient_checkpointing)()
        self.gradient_checkpointing = wanted

    def describe(self) -> dict[str, Any]:
        """What a run record needs to know of this prior; JSON types only."""
        return {
            "name": self.name,
            "num_steps": self.num_steps,
            "eta": self.chain.eta,
            "renoise": self.chain.renoise,
            "guidance_scale": self.guidance_scale,
            "negative_prompt": self.negative_prompt,
            "prediction_type": self.schedule.prediction.kind,
            "event_shape": list(self.event_shape),
            "image_size": list(self.image_size),
            "dtype": str(self.dtype).removeprefix("torch."),
            "vae_dtype": str(self.vae_dtype).removeprefix("torch."),
            "device": str(self.device),
            "network_parameters": sum(p.numel() for p in self.denoiser.network.parameters()),
        }

    def _decode(self, vae: Any, x0: Tensor) -> Tensor:
        if vae is None:
            return _StraightThroughClamp.apply(x0 / 2 + 0.5)
        latents = _to_vae(x0, vae.config)
        pixels = vae.decode(latents.to(self.vae_dtype), return_dict=False)[0]
        return _StraightThroughClamp.apply(pixels.to(x0.dtype) / 2 + 0.5)

    def _on_device(self, embeds: Any) -> Any:
        return None if embeds is None else zip_map(lambda a, _: a.to(self.device), embeds, embeds)

    def _sizes(self, size: int | tuple[int, int] | None) -> tuple[tuple[int, int], torch.Size]:
        """(height, width) in pixels, and the shape of one event."""
        factor = 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)
        if self.vae is not None:
            made = self.vae.config.latent_channels
            if made != self.denoiser.channels:
                raise PriorError(
                    f"the autoencoder and the network do not fit: the network denoises {self.denoiser.channels} "
                    f"channels, the autoencoder decodes {made}; load the one that the model was trained with"
                )
        latent = self.denoiser.sample_size
        if size is not None:
            pixels = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
            step, largest = factor * self.denoiser.patch, self.denoiser.largest
            if len(pixels) != 2 or any(type(p) is not int or p < 1 or p % step for p in pixels):
                raise PriorError(
                    f"`size` must be positive multiples of {step} pixels, one or (height, width), got {size!r}"
                )
            latent = (pixels[0] // factor, pixels[1] // factor)
            if largest is not None and max(latent) > largest:
                raise PriorError(f"`size` can be {largest * factor} pixels at most with this network, got {size!r}")
        image = (latent[0] * factor, latent[1] * factor)
        return image, torch.Size((self.denoiser.channels, *latent))

    def _check_guidance_decoder(self) -> None:
        if self.vae is None:
            raise PriorError("`guidance_decoder`: this model is over pixels and decodes nothing; leave it out")
        config: Any = getattr(self.guidance_vae, "config", None)
        if not (hasattr(config, "latent_channels") and hasattr(config, "block_out_channels")):
            raise PriorError(
                "`guidance_decoder` must be an AutoencoderTiny or the folder of one, got "
                f"{type(self.guidance_vae).__name__}; a function is for DAS(guidance_decoder=...)"
            )
        small, large = (2 ** (len(c.block_out_channels) - 1) for c in (config, self.vae.config))
        if config.latent_channels != self.denoiser.channels or small != large:
            raise PriorError(
                f"`guidance_decoder` must decode {self.denoiser.channels} channels at {large} pixels per latent, "
                f"got one for {config.latent_channels} at {small}"
            )

    def _prepare(self, checkpointing: bool, channels_last: bool, slicing: bool, tiling: bool) -> None:
        """Modules in inference mode, without parameter gradients; optional memory settings."""
        network = self.denoiser.network
        decoders = [vae for vae in (self.vae, self.guidance_vae) if vae is not None]
        for module in (network, *decoders, *self.denoiser.encoders):
            module.requires_grad_(False)
            module.eval()
        if channels_last:
            for module in (network, *decoders):
                module.to(memory_format=torch.channels_last)
        self._checkpoint(checkpointing)
        if self.vae is not None and slicing:
            self.vae.enable_slicing()
        if self.vae is not None and tiling:
            self.vae.enable_tiling()


def load_prior(
    path: str | Path,
    *,
    num_steps: int,
    variant: str | None = None,
    lora: str | Path | None = None,
    **options: Any,
) -> DiffusersPrior:
    """Loads a pipeline of diffusers as a prior; `tiltopt.samplers.loading.SUPPORTED` lists the classes.

    Weights come from safetensors only; the safety checker is not loaded. HF_HUB_OFFLINE=1 keeps the hub out.

    Args:
        path: "embedded" (the miniature pipeline that ships with the package), a folder, or a hub id
            such as "stable-diffusion-v1-5/stable-diffusion-v1-5".
        num_steps: K, the number of kernels.
        variant: of the weight files, for example "fp16".
        lora: folder, file or hub id of a LoRA of the same base model; needs peft.
        options: the further keyword arguments of `DiffusersPrior`: eta=1.0, guidance_scale=5.0, negative_prompt="",
            dtype="float32", device="cpu", renoise, vae_dtype, offload, size, gradient_checkpointing,
            channels_last, compile, tf32, vae_slicing, vae_tiling, guidance_decoder.
    Raises:
        PriorError: nothing can be loaded from `path`, or it cannot serve as a prior.
    """
    torch_dtype(options.get("dtype", "float32"), "dtype")
    pipe = load_pipeline(path, dtype=options.get("dtype", "float32"), variant=variant)
    if lora is not None:
        add_lora(pipe, lora)
    return DiffusersPrior.from_pipeline(pipe, num_steps=num_steps, name=str(path), **options)


def as_prior(source: Any, **options: Any) -> Any:
    """A prior from whatever one has.

    Args:
        source: a `Prior`, which comes back as it is; a loaded pipeline of diffusers, whose modules are used as they
            stand, in their precision, on their device, with the adapters loaded into them (`load_lora_weights`); or
            what `load_prior` takes.
        options: for a pipeline or a path, those of `DiffusersPrior`; num_steps=50 unless given.
    Raises:
        PriorError: it is none of these, or cannot serve as a prior.
    """
    if isinstance(source, Prior):
        if options:
            raise PriorError(f"a prior that is made already takes no options, got {', '.join(options)}")
        return source
    options.setdefault("num_steps", 50)
    if isinstance(source, (str, Path)):
        return load_prior(source, **options)
    if getattr(source, "scheduler", None) is None:
        raise PriorError(
            f"expected a Prior, a pipeline of diffusers, or a path, got {type(source).__name__}; wrap a denoiser of "
            "your own in tiltopt.samplers.TorchPrior"
        )
    network = denoiser_of(source).network
    names = {dtype: name for name, dtype in DTYPES.items()}
    first = next(network.parameters())
    options = {"dtype": names[first.dtype], "device": first.device} | options
    if getattr(source, "vae", None) is not None:
        options = {"vae_dtype": names[next(source.vae.parameters()).dtype]} | options
    return DiffusersPrior.from_pipeline(source, **options)


class _StraightThroughClamp(torch.autograd.Function):
    """Clamp to [0, 1] in value, identity in gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.clamp(0.0, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def _to_vae(x0: Tensor, config: Any) -> Tensor:
    """Latents of the chain in the autoencoder's own units."""
    moments = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if moments[0] is not None and moments[1] is not None:  # per channel: Playground 2.5
        mean, std = (torch.tensor(m, device=x0.device, dtype=x0.dtype).view(1, -1, 1, 1) for m in moments)
        return x0 * std / config.scaling_factor + mean
    return x0 / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)


def _from_vae(latents: Tensor, config: Any) -> Tensor:
    """The inverse of `_to_vae`."""
    moments = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if moments[0] is not None and moments[1] is not None:
        mean, std = (torch.tensor(m, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1) for m in moments)
        return (latents - mean) * config.scaling_factor / std
    return (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor


def zip_map(fn: Callable[[Tensor, Tensor], Tensor], a: Any, b: Any) -> Any:
    """`fn` on two tensors, or on the entries of two dicts of tensors with equal keys."""
    return {k: fn(a[k], b[k]) for k in a} if isinstance(a, dict) else fn(a, b)
