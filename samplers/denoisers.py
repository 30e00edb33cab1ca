"""The networks of diffusers' pipelines behind one call: what each is shown, told and conditioned on.

A denoiser encodes prompts and answers at (x, t, embeddings); how its answer is read is the schedule's business. Text
goes through the pipeline's own towers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tiltopt.errors import PriorError
from tiltopt.samplers.chain import Schedule
from tiltopt.samplers.schedules import diffusion_schedule, flow_schedule

log = logging.getLogger(__name__)


class Denoiser:
    """One network and the text encoders that feed it.

    Args:
        network: the UNet or transformer.
        encoders: text encoders, none for an unconditional network.
        trained: side or (h, w) of the events it was trained at; None where the network's configuration says so.
    Attributes:
        channels: C of one event (C, h, w).
        sample_size: (h, w) that the network was trained at.
        patch: h and w are multiples of it.
        told: the network is told its guidance scale and has no second branch.
        over_pixels: its events are pictures; otherwise they need an autoencoder.
        largest: the most that h and w can be; None: any.
    """

    told = False
    over_pixels = False
    largest: int | None = None

    def __init__(self, network: Any, encoders: Sequence[Any] = (), trained: Any = None) -> None:
        self.network, self.encoders = network, tuple(encoders)
        self.call: Callable[..., Any] = network
        self.channels = int(network.config.in_channels)
        trained = network.config.sample_size if trained is None else trained
        self.sample_size: tuple[int, int] = (trained, trained) if isinstance(trained, int) else tuple(trained)
        self.patch = 1

    def schedule(self, scheduler: Any, num_steps: int, eta: float, renoise: bool, latent: torch.Size) -> Schedule:
        """The chain of this network under `scheduler`, for events of shape `latent`."""
        return diffusion_schedule(scheduler, num_steps, eta, renoise)

    def encode(self, prompts: Sequence[str]) -> Any:
        """B prompts -> a tensor, or a dict of tensors, with B independent rows; None where there is no text."""
        raise NotImplementedError

    def negative(self, prompt: str) -> Any:
        """The negative prompt, as `encode` gives it, with one row."""
        return self.encode([prompt])

    @property
    def middle(self) -> nn.Module | None:
        """Where the network is deepest: the middle block of a UNet, the middle layer of a transformer."""
        block = getattr(self.network, "mid_block", None)
        layers = getattr(self.network, "transformer_blocks", None)
        return block if block is not None else layers[len(layers) // 2] if layers else None

    def mid_states(self, x: Tensor, t: Tensor, embeds: Any, scale: float, pixels: tuple[int, int]) -> Tensor:
        """States of the middle (n, C, places) in one call that ends there; arguments as for a whole call.

        Raises:
            PriorError: a network without a middle that is known.
        """
        if self.middle is None:
            raise PriorError(
                f"the feature block `denoiser` knows the middle of UNets and transformers, got "
                f"{type(self.network).__name__}; leave the block out"
            )
        held: list[Any] = []

        def hold(_module: nn.Module, _inputs: Any, output: Any) -> None:
            held.append(output)
            raise _Reached

        handle, call, self.call = self.middle.register_forward_hook(hold), self.call, self.network
        try:
            self(x, t, embeds, scale, pixels)
        except _Reached:
            pass
        finally:
            handle.remove()
            self.call = call
        states = held[0][-1] if isinstance(held[0], tuple) else held[0]  # joint layers give text and picture
        return states.mT if states.ndim == 3 else states.flatten(2)

    def __call__(self, x: Tensor, t: Tensor, embeds: Any, scale: float, pixels: tuple[int, int]) -> Tensor:
        """One call without guidance.

        Args:
            x: (n, *event) in the network's precision.
            t: (n,) float32, the schedule's times.
            embeds: n rows.
            scale: the guidance scale, for a network that is told.
            pixels: height and width of the picture.
        """
        raise NotImplementedError


class _Reached(Exception):
    """The middle of the network was reached; the rest is not needed."""


class UNetDenoiser(Denoiser):
    """Stable Diffusion 1.x, 2.x, XL and LCM.

    Args:
        unet: UNet2DConditionModel with as many output as input channels.
        text: its text towers.
    """

    def __init__(self, unet: Any, text: TextTowers) -> None:
        if unet.config.in_channels != unet.config.out_channels:
            raise PriorError(
                f"expected a text-to-image UNet with equal input and output channels, got {unet.config.in_channels} "
                f"and {unet.config.out_channels} (an inpainting or variance-predicting model); use a plain one"
            )
        super().__init__(unet, text.encoders)
        self.text = text
        self.patch = 2 ** (len(unet.config.block_out_channels) - 1)
        self.width: int | None = getattr(unet.config, "time_cond_proj_dim", None)
        self.told = self.width is not None
        if text.pooled:
            needed = unet.add_embedding.linear_1.in_features
            pooled = text.encoders[-1].config.projection_dim
            if needed != 6 * unet.config.addition_time_embed_dim + pooled:
                raise PriorError("expected an SDXL base UNet (six size numbers); got another kind, such as a refiner")

    def encode(self, prompts: Sequence[str]) -> Any:
        return self.text.encode(prompts)

    def negative(self, prompt: str) -> Any:
        return self.text.negative(prompt)

    def __call__(self, x: Tensor, t: Tensor, embeds: Any, scale: float, pixels: tuple[int, int]) -> Tensor:
        n = len(x)
        options: dict[str, Any] = {}
        if self.text.pooled:
            height, width = (float(s) for s in pixels)
            ids = torch.tensor([height, width, 0.0, 0.0, height, width], device=x.device, dtype=x.dtype)
            options["added_cond_kwargs"] = {"text_embeds": embeds["pooled"], "time_ids": ids.expand(n, 6)}
            embeds = embeds["text"]
        if self.width is not None:
            options["timestep_cond"] = guidance_embedding(scale, self.width, x).to(x.dtype)
        return self.call(x, t, encoder_hidden_states=embeds, return_dict=False, **options)[0]


class PixelDenoiser(Denoiser):
    """An unconditional UNet over pixels (DDPMPipeline, DDIMPipeline); a learned variance is dropped."""

    over_pixels = True

    def __init__(self, unet: Any) -> None:
        super().__init__(unet)
        self.patch = 2 ** (len(unet.config.block_out_channels) - 1)

    def encode(self, prompts: Sequence[str]) -> None:
        return None

    def __call__(self, x: Tensor, t: Tensor, embeds: Any, scale: float, pixels: tuple[int, int]) -> Tensor:
        return self.call(x, t, return_dict=False)[0][:, : self.channels]


class PipelineText(Denoiser):
    """What the transformers below share: prompts go through `pipe.encode_prompt`, so adapters of the user count."""

    def __init__(self, pipe: Any, trained: Any = None) -> None:
        towers = [getattr(pipe, f"text_encoder{i}", None) for i in ("", "_2", "_3")]
        super().__init__(pipe.transformer, [tower for tower in towers if tower is not None], trained)
        self.pipe = pipe
        self.patch = int(getattr(pipe.transformer.config, "patch_size", 1))

    def encode(self, prompts: Sequence[str]) -> Any:
        unique = list(dict.fromkeys(prompts))
        rows = [unique.index(p) for p in prompts]
        with torch.no_grad():
            encoded = self.through_towers(unique, next(self.encoders[0].parameters()).device)
        return {name: tensor[rows] for name, tensor in encoded.items()}

    def through_towers(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """The pipeline's own encoding of different prompts."""
        raise NotImplementedError


class PixArtDenoiser(PipelineText):
    """PixArt-alpha and PixArt-Sigma: T5 with a mask; the learned variance is dropped. Captions are lower-cased."""

    def through_towers(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        text, mask, _, _ = self.pipe.encode_prompt(prompts, do_classifier_free_guidance=False, device=device)
        return {"text": text, "mask": mask}

    def __call__(self, x: Tensor, t: Tensor, embeds: Any, scale: float, pixels: tuple[int, int]) -> Tensor:
        added: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if self.network.config.use_additional_conditions:
            height, width = (float(s) for s in pixels)
            added["resolution"] = torch.tensor([[height, width]], device=x.device, dtype=x.dtype).expand(len(x), 2)
            added["aspect_ratio"] = torch.tensor([[height / width]], device=x.device, dtype=x.dtype).expand(len(x), 1)
        output = self.call(
            x,
            encoder_hidden_states=embeds["text"],
            encoder_attention_mask=embeds["mask"],
            timestep=t,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return output[:, : self.channels]


class SD3Denoiser(PipelineText):
    """Stable Diffusion 3 and 3.5: two CLIP towers and T5 (zeros where the pipeline has none); predicts the flow."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.largest = self.patch * int(self.network.config.pos_embed_max_size)

    def schedule(self, scheduler: Any, num_steps: int, eta: float, renoise: bool, latent: torch.Size) -> Schedule:
        tokens = latent[1] * latent[2] // self.patch**2
        return flow_schedule(scheduler, num_steps, eta, renoise=renoise, tokens=tokens)

    def through_towers(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        text, _, pooled, _ = self.pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, device=device
        )
        return {"text": text, "pooled": pooled}

    def __call__(self, x: Tensor, t: Tensor, embeds: Any, scale: float, pixels: tuple[int, int]) -> Tensor:
        return self.call(
            hidden_states=x,
            timestep=t,
            encoder_hidden_states=embeds["text"],
            pooled_projections=embeds["pooled"],
            return_dict=False,
        )[0]


class FluxDenoiser(PipelineText):
    """FLUX: CLIP and T5; latents are shown as rows of 2 x 2 patches; dev is told its guidance scale."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe, int(pipe.default_sample_size))
        self.channels, self.patch = self.channels // 4, 2
        self.told = bool(self.network.config.guidance_embeds)

    def schedule(self, scheduler: Any, num_steps: int, eta: float, renoise: bool, latent: torch.Size) -> Schedule:
        tokens = latent[1] * latent[2] // 4
        return flow_schedule(scheduler, num_steps, eta, renoise=renoise, tokens=tokens, linspace=True)

    def through_towers(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        length = 512 if self.told else 256  # schnell was trained on shorter prompts
        text, pooled, _ = self.pipe.encode_prompt(prompts, None, device=device, max_sequence_length=length)
        return {"text": text, "pooled": pooled}

    def __call__(self, x: Tensor, t: Tensor, embeds: Any, scale: float, pixels: tuple[int, int]) -> Tensor:
        n, channels, height, width = x.shape
        patches = nn.functional.pixel_unshuffle(x, 2).flatten(2).mT  # (n, h w / 4, 4 C)
        rows = torch.arange(height // 2, device=x.device, dtype=x.dtype)
        columns = torch.arange(width // 2, device=x.device, dtype=x.dtype)
        grid = torch.cartesian_prod(rows, columns)
        output = self.call(
            hidden_states=patches,
            timestep=t / 1000,
            guidance=torch.full((n,), scale, device=x.device, dtype=torch.float32) if self.told else None,
            pooled_projections=embeds["pooled"],
            encoder_hidden_states=embeds["text"],
            txt_ids=x.new_zeros(embeds["text"].shape[1], 3),
            img_ids=torch.cat([torch.zeros_like(grid[:, :1]), grid], 1),
            return_dict=False,
        )[0]
        folded = output.mT.reshape(n, 4 * channels, height // 2, width // 2)
        return nn.functional.pixel_shuffle(folded, 2)


@dataclass(frozen=True)
class TextTowers:
    """CLIP tokenizers and text encoders of a UNet, in the order in which their outputs are concatenated.

    Args:
        tokenizers: one per encoder.
        encoders: CLIPTextModel, for SDXL also a CLIPTextModelWithProjection as the last.
        pooled: False for Stable Diffusion (last hidden state of the one encoder), True for SDXL (penultimate hidden
            states of all, and the projected output of the last).
        zero_negative: an empty prompt is encoded as zeros when it serves as the negative (SDXL's convention).
    """

    tokenizers: tuple[Any, ...]
    encoders: tuple[Any, ...]
    pooled: bool = False
    zero_negative: bool = False

    def encode(self, prompts: Sequence[str]) -> Any:
        """B prompts -> (B, L, c), or {"text": (B, L, c), "pooled": (B, p)} when `pooled`. Rows are independent."""
        unique = list(dict.fromkeys(prompts))
        rows = [unique.index(p) for p in prompts]
        with torch.no_grad():
            outputs = [self._run(i, unique) for i in range(len(self.encoders))]
        text = torch.cat([hidden for hidden, _ in outputs], dim=-1)[rows]
        return {"text": text, "pooled": outputs[-1][1][rows]} if self.pooled else text

    def negative(self, prompt: str) -> Any:
        """The negative prompt, as `encode` gives it, with one row."""
        encoded = self.encode([prompt])
        if not (self.zero_negative and prompt == ""):
            return encoded
        return {k: torch.zeros_like(v) for k, v in encoded.items()} if self.pooled else torch.zeros_like(encoded)

    def _run(self, i: int, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """(hidden states, pooled output) of encoder i."""
        tokenizer, encoder = self.tokenizers[i], self.encoders[i]
        device = next(encoder.parameters()).device
        length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
        batch = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        for prompt, ids in zip(prompts, tokenizer(prompts)["input_ids"], strict=True):
            if len(ids) > length:
                log.warning("prompt of %d tokens cut to %d: %r", len(ids), length, prompt)
        mask = batch.attention_mask.to(device) if getattr(encoder.config, "use_attention_mask", False) else None
        out = encoder(batch.input_ids.to(device), attention_mask=mask, output_hidden_states=self.pooled)
        return (out.hidden_states[-2], out[0]) if self.pooled else (out[0], out[0])


def denoiser_of(pipe: Any) -> Denoiser:
    """The denoiser of a loaded pipeline, by what it is made of. The pipeline's modules are used, not copied.

    Raises:
        PriorError: its network is none of those above.
    """
    for i in ("", "_2", "_3"):
        if getattr(pipe, f"text_encoder{i}", None) is not None and getattr(pipe, f"tokenizer{i}", None) is None:
            raise PriorError(f"this {type(pipe).__name__} has text_encoder{i} and no tokenizer{i} for it; load both")
    name = type(getattr(pipe, "transformer", None)).__name__
    transformers = {
        "SD3Transformer2DModel": SD3Denoiser,
        "FluxTransformer2DModel": FluxDenoiser,
        "PixArtTransformer2DModel": PixArtDenoiser,
    }
    if name in transformers:
        return transformers[name](pipe)
    unet = getattr(pipe, "unet", None)
    if type(unet).__name__ == "UNet2DModel":
        return PixelDenoiser(unet)
    towers = [i for i in ("", "_2") if getattr(pipe, f"text_encoder{i}", None) is not None]
    if unet is None or not towers:
        raise PriorError(
            f"expected a pipeline of Stable Diffusion (1.x, 2.x, XL, 3), LCM, FLUX, PixArt or DDPM, got "
            f"{type(pipe).__name__}; for another network write a tiltopt.samplers.TorchPrior"
        )
    return UNetDenoiser(
        unet,
        TextTowers(
            tuple(getattr(pipe, f"tokenizer{i}") for i in towers),
            tuple(getattr(pipe, f"text_encoder{i}") for i in towers),
            pooled=getattr(unet.config, "addition_embed_type", None) == "text_time",
            zero_negative=bool(getattr(pipe.config, "force_zeros_for_empty_prompt", False)),
        ),
    )


def guidance_embedding(scale: float, width: int, like: Tensor) -> Tensor:
    """How a distilled UNet (LCM) is told its guidance scale: sinusoids of 1000 (scale - 1), (len(like), width)."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half, device=like.device))
    angles = 1000.0 * (scale - 1.0) * frequencies
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()]), (0, width % 2)).expand(len(like), width)
