"""A Stable Diffusion pipeline (1.x, 2.x, XL, LCM) seen as a Markov chain with Gaussian kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from tiltopt.digest import weights_digest
from tiltopt.errors import PriorError
from tiltopt.samplers.chain import DDIMChain
from tiltopt.samplers.latent import StraightThroughClamp, guidance_embedding, torch_dtype, zip_map
from tiltopt.samplers.loading import load_pipeline
from tiltopt.samplers.prior import Reverse
from tiltopt.samplers.text import TextTowers, check_prompts
from tiltopt.types import Conditioning


class DiffusersPrior:
    """A latent diffusion model of diffusers as a `Prior`: DDIM chain with eta, classifier-free guidance, VAE decoder.

    With network output e(x, t, c), prompt c and negative prompt n, guidance takes
    e = e(x, t, n) + guidance_scale (e(x, t, c) - e(x, t, n)) in one batched call; scale 1 calls the network on c alone.
    A UNet with a guidance embedding (LCM) is told the scale instead. The kernels are those of `DDIMChain`.

    Precision: UNet and text encoders compute in `dtype`; latents, guidance arithmetic and everything after are float32
    (float64 if `dtype` is); the VAE decodes in `vae_dtype`, float32 unless told otherwise (in float16 the
    VAE of SDXL overflows).

    Args:
        unet: UNet2DConditionModel with as many output as input channels.
        vae: AutoencoderKL or AutoencoderTiny.
        text_encoder: CLIPTextModel; a sequence of two for SDXL.
        tokenizer: its tokenizer; a sequence of two for SDXL.
        scheduler: any diffusers scheduler with a variance-preserving schedule; only its configuration is used.
        num_steps: K, the number of kernels.
        eta: in [0, 1]; 0 makes every kernel deterministic.
        guidance_scale: >= 0.
        negative_prompt: encoded once.
        dtype: of the UNet and the text encoders: "float32", "bfloat16", "float16" or "float64".
        vae_dtype: of the decoder.
        device: where the modules live and compute.
        size: width and height in pixels (a number or a pair (height, width)); None for what the UNet was trained at.
        gradient_checkpointing: recompute UNet and VAE activations in the backward pass: less memory, more time.
        channels_last: memory format of the convolutions; faster on CUDA with half precision.
        compile: torch.compile the UNet; the first call takes minutes.
        zero_negative: an empty negative prompt is zeros (SDXL's force_zeros_for_empty_prompt).
        name: shown in `describe()`.
    Raises:
        PriorError: the parts cannot be expressed as the chain, or a number is out of range.
    """

    def __init__(
        self,
        unet: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: Any,
        *,
        num_steps: int = 50,
        eta: float = 1.0,
        guidance_scale: float = 5.0,
        negative_prompt: str = "",
        dtype: str = "float32",
        vae_dtype: str = "float32",
        device: str | torch.device = "cpu",
        size: int | tuple[int, int] | None = None,
        gradient_checkpointing: bool = False,
        channels_last: bool = False,
        compile: bool = False,
        zero_negative: bool = False,
        name: str = "",
    ) -> None:
        self.dtype, self.vae_dtype = torch_dtype(dtype, "dtype"), torch_dtype(vae_dtype, "vae_dtype")
        if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
            raise PriorError(f"`guidance_scale` must be a number >= 0 (1 turns guidance off), got {guidance_scale}")
        if unet.config.in_channels != unet.config.out_channels:
            raise PriorError(
                f"expected a text-to-image UNet with equal input and output channels, got {unet.config.in_channels} "
                f"and {unet.config.out_channels} (an inpainting or variance-predicting model); use a plain one"
            )
        self.chain = DDIMChain.from_scheduler(scheduler, num_steps, eta)
        self.unet, self.vae = unet, vae
        encoders = tuple(text_encoder) if isinstance(text_encoder, (list, tuple)) else (text_encoder,)
        tokenizers = tuple(tokenizer) if isinstance(tokenizer, (list, tuple)) else (tokenizer,)
        self._xl = getattr(unet.config, "addition_embed_type", None) == "text_time"
        self.text = TextTowers(tokenizers, encoders, pooled=self._xl, zero_negative=zero_negative)
        self.num_steps, self.guidance_scale, self.name = self.chain.num_steps, float(guidance_scale), name
        self.negative_prompt = negative_prompt
        self.latent_dtype = torch.float64 if dtype == "float64" else torch.float32
        self.event_shape = self._event_shape(size)
        self._prepare(gradient_checkpointing, channels_last)
        self.to(device)
        self._call: Callable[..., Any] = torch.compile(unet) if compile else unet

    @classmethod
    def from_pipeline(cls, pipe: Any, **options: Any) -> DiffusersPrior:
        """The prior of a loaded StableDiffusionPipeline, StableDiffusionXLPipeline or LatentConsistencyModelPipeline.

        The pipeline's modules are used, not copied: their precision and device change. `options` are those of the
        constructor.
        """
        towers = [i for i in ("", "_2") if getattr(pipe, f"text_encoder{i}", None) is not None]
        if not towers or getattr(pipe, "unet", None) is None or getattr(pipe, "vae", None) is None:
            raise PriorError(
                f"expected a pipeline with a UNet, a VAE and a CLIP text encoder, got {type(pipe).__name__}; "
                "use a Stable Diffusion 1.x, 2.x, XL or LCM pipeline"
            )
        options.setdefault("zero_negative", bool(getattr(pipe.config, "force_zeros_for_empty_prompt", False)))
        encoders = [getattr(pipe, f"text_encoder{i}") for i in towers]
        tokenizers = [getattr(pipe, f"tokenizer{i}") for i in towers]
        return cls(pipe.unet, pipe.vae, encoders, tokenizers, pipe.scheduler, **options)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """B prompts -> Conditioning whose `embeds` is (B, L, c), for SDXL {"text": (B, L, c), "pooled": (B, p)}."""
        checked = check_prompts(prompts)
        return Conditioning(checked, self.text.encode(checked))

    def initial(self, n: int, generator: Generator) -> Tensor:
        """n draws of N(0, I), (n, *event), drawn on the generator's device."""
        noise = torch.randn(n, *self.event_shape, generator=generator, device=generator.device, dtype=self.latent_dtype)
        return noise.to(self.device)

    def std(self, k: int) -> float:
        """Standard deviation of kernel k, in latent units."""
        return self.chain.std[k]

    def reverse(self, k: int, x: Tensor, cond: Conditioning) -> Reverse:
        """Mean of kernel k and the estimate of the clean latent, both (n, *event); one UNet call.

        Args:
            k: step, 0 .. K-1.
            x: (n, *event), latents at step k.
            cond: n rows, from `encode(...)` and `repeat`.
        """
        if cond.embeds is None:
            raise PriorError("`cond` holds no embeddings; make it with `prior.encode(prompts)`")
        if len(cond) != len(x):
            raise PriorError(f"`cond` must have one row per latent, got {len(cond)} rows for {len(x)} latents")
        mean, x0 = self.chain.step(k, self.predict(x, float(self.chain.timesteps[k]), cond.embeds), x)
        return Reverse(mean, x0)

    def predict(self, x: Tensor, timestep: float, embeds: Any, *, guidance_scale: float | None = None) -> Tensor:
        """The guided network output at any training timestep, (n, *event) in the dtype of x.

        Args:
            x: (n, *event), variance-preserving latents.
            timestep: 0 .. T-1, may lie between two training timesteps.
            embeds: what `encode` gave, n rows.
            guidance_scale: None for the prior's own.
        """
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        if self.distilled is not None:
            return self.network(x, timestep, embeds, guidance_scale=scale)
        if scale == 1.0:
            return self.network(x, timestep, embeds)
        both = zip_map(lambda a, b: torch.cat([a.expand(len(x), *a.shape[1:]), b]), self.negative, embeds)
        negative, positive = self.network(torch.cat([x, x]), timestep, both).chunk(2)
        return negative + scale * (positive - negative)

    def network(self, x: Tensor, timestep: float, embeds: Any, *, guidance_scale: float = 1.0) -> Tensor:
        """One UNet call without guidance: (n, *event) in the dtype of x, in units of the prediction type.

        `guidance_scale` matters only to a UNet with a guidance embedding (LCM).
        """
        n = len(x)
        options: dict[str, Any] = {}
        if self._xl:
            height, width = (float(s) for s in self.image_size)
            ids = torch.tensor([height, width, 0.0, 0.0, height, width], device=x.device, dtype=self.dtype)
            options["added_cond_kwargs"] = {"text_embeds": embeds["pooled"], "time_ids": ids.expand(n, 6)}
            embeds = embeds["text"]
        if self.distilled is not None:
            options["timestep_cond"] = guidance_embedding(guidance_scale, self.distilled, x).to(self.dtype)
        inputs = x.to(self.dtype)
        if self._channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        t = torch.full((n,), timestep, device=x.device, dtype=torch.float32)
        output = self._call(inputs, t, encoder_hidden_states=embeds, return_dict=False, **options)[0]
        return output.to(x.dtype)

    def decode(self, x0: Tensor) -> Tensor:
        """Pictures (n, 3, H, W) in [0, 1] of clean latents (n, *event), in the dtype of x0.

        Values are clamped; the gradient passes through the clamp unchanged, so that a saturated pixel still says in
        which direction the reward lies. For drift only: weights use values.
        """
        config = self.vae.config
        latents = x0 / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        pixels = self.vae.decode(latents.to(self.vae_dtype), return_dict=False)[0]
        return StraightThroughClamp.apply(pixels.to(x0.dtype) / 2 + 0.5)

    def encode_image(self, images: Tensor) -> Tensor:
        """Clean latents (n, *event) of pictures (n, 3, H, W) in [0, 1]: the mean of the encoder's distribution."""
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, *self.image_size):
            raise PriorError(
                f"`images` must be (n, 3, {self.image_size[0]}, {self.image_size[1]}), got {list(images.shape)}"
            )
        out = self.vae.encode((images * 2 - 1).to(self.device, self.vae_dtype))
        latents = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latents
        config = self.vae.config
        return ((latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor).to(
            self.latent_dtype
        )

    @cached_property
    def encoder_id(self) -> str:
        """ "vae-" and a digest of the autoencoder's weights: names what `encode_image` computes."""
        config = self.vae.config
        numbers = (config.scaling_factor, getattr(config, "shift_factor", None), list(self.image_size))
        return f"vae-{weights_digest(self.vae, repr(numbers))}"

    def to(self, device: str | torch.device) -> DiffusersPrior:
        """Moves the modules and encodes the negative prompt there; returns self."""
        self.device = torch.device(device)
        for module, dtype in ((self.vae, self.vae_dtype), *((m, self.dtype) for m in (self.unet, *self.text.encoders))):
            module.to(self.device)
            if next(module.parameters()).dtype != dtype:
                module.to(dtype)
        self.negative = self.text.negative(self.negative_prompt)
        return self

    def describe(self) -> dict[str, Any]:
        """What a run record needs to know of this prior; JSON types only."""
        return {
            "name": self.name,
            "num_steps": self.num_steps,
            "eta": self.chain.eta,
            "guidance_scale": self.guidance_scale,
            "negative_prompt": self.negative_prompt,
            "prediction_type": self.chain.prediction_type,
            "event_shape": list(self.event_shape),
            "image_size": list(self.image_size),
            "dtype": str(self.dtype).removeprefix("torch."),
            "vae_dtype": str(self.vae_dtype).removeprefix("torch."),
            "device": str(self.device),
            "unet_parameters": sum(p.numel() for p in self.unet.parameters()),
        }

    def _event_shape(self, size: int | tuple[int, int] | None) -> torch.Size:
        """Shape of one latent; sets `image_size` (height, width) in pixels."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        if size is None:
            trained = self.unet.config.sample_size
            latent = (trained, trained) if isinstance(trained, int) else tuple(trained)
        else:
            pixels = (size, size) if isinstance(size, int) else tuple(size)
            step = factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
            if len(pixels) != 2 or any(p < 1 or p % step for p in pixels):
                raise PriorError(f"`size` must be positive multiples of {step} pixels, got {size}")
            latent = (pixels[0] // factor, pixels[1] // factor)
        self.image_size = (latent[0] * factor, latent[1] * factor)
        return torch.Size((self.unet.config.in_channels, *latent))

    def _prepare(self, gradient_checkpointing: bool, channels_last: bool) -> None:
        """Modules in inference mode, without parameter gradients; optional memory settings."""
        for module in (self.unet, self.vae, *self.text.encoders):
            module.requires_grad_(False)
            module.eval()
        self._channels_last = channels_last
        if channels_last:
            self.unet.to(memory_format=torch.channels_last)
            self.vae.to(memory_format=torch.channels_last)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            self.vae.enable_gradient_checkpointing()
        self.distilled = getattr(self.unet.config, "time_cond_proj_dim", None)
        if self._xl:
            needed = self.unet.add_embedding.linear_1.in_features
            pooled = self.text.encoders[-1].config.projection_dim
            if needed != 6 * self.unet.config.addition_time_embed_dim + pooled:
                raise PriorError("expected an SDXL base UNet (six size numbers); got another kind, such as a refiner")


def load_prior(path: str | Path, *, num_steps: int, variant: str | None = None, **options: Any) -> DiffusersPrior:
    """Loads a Stable Diffusion pipeline (1.x, 2.x, XL, LCM) as a prior.

    Weights come from safetensors only; the safety checker is not loaded. HF_HUB_OFFLINE=1 keeps the hub out.

    Args:
        path: "embedded" (the miniature pipeline that ships with the package), a folder, or a hub id
            such as "stable-diffusion-v1-5/stable-diffusion-v1-5".
        num_steps: K, the number of kernels.
        variant: of the weight files, for example "fp16".
        options: the further keyword arguments of `DiffusersPrior`: eta=1.0, guidance_scale=5.0, negative_prompt="",
            dtype="float32", device="cpu", vae_dtype, size, gradient_checkpointing, channels_last, compile.
    Raises:
        PriorError: nothing can be loaded from `path`, or it cannot serve as a prior.
    """
    torch_dtype(options.get("dtype", "float32"), "dtype")
    pipe = load_pipeline(path, dtype=options.get("dtype", "float32"), variant=variant)
    return DiffusersPrior.from_pipeline(pipe, num_steps=num_steps, name=str(path), **options)
