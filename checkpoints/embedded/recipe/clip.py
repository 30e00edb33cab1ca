"""Train the miniature CLIP: a contrastive loss that knows which captions are true, and pictures without a shape.

Caption j is a positive for picture i if its noun, its background and its style, as far as it says them, are all true
of i. Patch-shuffled copies of the pictures, with the right colours and textures and no shape, stand among the
negatives of every caption, and the softmax of such a copy over the captions is drawn to the uniform one. So the
network must look at the shape. `--freeze-text` continues the image tower alone: text states, and with them every
denoiser that was trained on them, stay valid.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

from tiltopt.embedded.recipe.common import (
    Clock,
    cosine,
    load_state,
    log,
    parser,
    pixels,
    save_state,
    stream,
    torch_stream,
    training_options,
    with_article,
)
from tiltopt.embedded.recipe.compose import Pool
from tiltopt.embedded.recipe.glyphs import ANIMALS, load
from tiltopt.embedded.recipe.judge import shuffle_patches
from tiltopt.embedded.recipe.tokenizer import save as save_tokenizer

TOWER = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "projection_dim": 128}


def processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})


def new_clip(tokenizer: CLIPTokenizer, seed: int) -> CLIPModel:
    """Random weights that depend on `seed` alone."""
    ids = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    length = tokenizer.model_max_length
    text = {**TOWER, **ids, "vocab_size": len(tokenizer), "num_hidden_layers": 3, "max_position_embeddings": length}
    vision = {**TOWER, "image_size": 64, "patch_size": 8, "num_hidden_layers": 5}
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(seed)
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=TOWER["projection_dim"]))


def text_encoder(clip: CLIPModel) -> CLIPTextModel:
    """The text tower of `clip` as a model of its own."""
    out = CLIPTextModel(clip.config.text_config)
    wanted = out.state_dict()
    state = clip.text_model.state_dict()
    out.load_state_dict({k if k in wanted else f"text_model.{k}": v for k, v in state.items()})
    return out


class Towers:
    """Unit-norm embeddings of pictures in [0, 1] and of token ids."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.mean = torch.tensor(processor().image_mean).view(1, 3, 1, 1)
        self.std = torch.tensor(processor().image_std).view(1, 3, 1, 1)

    def images(self, x: Tensor) -> Tensor:
        device = self.model.device
        out = self.model.vision_model(pixel_values=((x - self.mean) / self.std).to(device)).pooler_output
        return F.normalize(self.model.visual_projection(out).float(), dim=-1)

    def texts(self, ids: Tensor) -> Tensor:
        out = self.model.text_model(input_ids=ids.to(self.model.device)).pooler_output
        return F.normalize(self.model.text_projection(out).float(), dim=-1)

    def tokens(self, captions: list[str]) -> Tensor:
        length = self.tokenizer.model_max_length
        out = self.tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return out.input_ids


class Truth:
    """Which caption of a pool is true of which of its pictures."""

    def __init__(self, pool: Pool) -> None:
        self.codes = {k: torch.from_numpy(np.asarray(v)) for k, v in pool.codes.items()}

    def __call__(self, index: np.ndarray) -> Tensor:
        """(n, n) bool; row = picture, column = caption. A code of 0 says nothing."""
        c = {k: v[index] for k, v in self.codes.items()}
        noun = (c["nouns"][:, None, :] == c["noun"][None, :, None]).any(-1)
        phrase = (c["phrases"][:, None, :] == c["phrase"][None, :, None]).any(-1) | (c["phrase"] == 0)[None]
        style = (c["style"][:, None] == c["style_said"][None]) | (c["style_said"] == 0)[None]
        return noun & phrase & style


def contrast(images: Tensor, shuffled: Tensor, texts: Tensor, true: Tensor, scale: Tensor) -> Tensor:
    """Multi-positive contrastive loss with shapeless negatives.

    Args:
        images: (n, d) unit-norm; shuffled: (m, d); texts: (n, d).
        true: (n, n) bool, picture × caption, True on the diagonal.
        scale: factor on the cosines.
    """
    target = true.float()
    per_image = torch.log_softmax(scale * images @ texts.T, 1)
    per_text = torch.log_softmax(scale * texts @ torch.cat([images, shuffled]).T, 1)[:, : len(images)]
    loss = (
        -(per_image * target).sum(1).div(target.sum(1)).mean() - (per_text * target.T).sum(1).div(target.sum(0)).mean()
    )
    if len(shuffled):
        loss = loss - 0.25 * torch.log_softmax(scale * shuffled @ texts.T, 1).mean()
    return loss / 2


@torch.no_grad()
def zero_shot(towers: Towers, images: Tensor, nouns: list[str]) -> dict[str, float]:
    """Top-1 and top-5 of 'a photo of a ...' over the fifty animals, and top-1 on patch-shuffled copies."""
    texts = towers.texts(towers.tokens([f"a photo of {with_article(a)}" for a in ANIMALS]))
    keep = [i for i, n in enumerate(nouns) if n in ANIMALS]
    x, y = images[keep], torch.tensor([ANIMALS.index(nouns[i]) for i in keep])

    def ranks(pictures: Tensor) -> Tensor:
        return torch.cat([(towers.images(p) @ texts.T).topk(5).indices.cpu() for p in pictures.split(256)])

    top = ranks(x) == y[:, None]
    out = {
        "pictures": float(len(keep)),
        "top1": top[:, 0].float().mean().item(),
        "top5": top.any(1).float().mean().item(),
    }
    for patch in (8, 16):
        mixed = ranks(shuffle_patches(x, patch, torch_stream("evaluate", patch)))
        out[f"shuffled_{patch}"] = (mixed[:, 0] == y).float().mean().item()
    return out


class Run:
    """A training run of the CLIP."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.pool = Pool.open(options.work / "pools" / options.pool)
        self.tokenizer = CLIPTokenizer.from_pretrained(options.init or options.work / "tokenizer")
        model = CLIPModel.from_pretrained(options.init) if options.init else new_clip(self.tokenizer, options.seed)
        if options.device == "cpu":
            model.set_attn_implementation("eager")
        self.model = model.to(options.device).train()
        self.towers, self.truth = Towers(self.model, self.tokenizer), Truth(self.pool)
        locked = ("text_model", "text_projection") if options.freeze_text else ()
        named = [(n, p.requires_grad_(not n.startswith(locked))) for n, p in self.model.named_parameters()]
        named = [(n, p) for n, p in named if p.requires_grad]
        decay = [p for n, p in named if p.ndim >= 2 and "embedding" not in n]
        rest = [p for n, p in named if not (p.ndim >= 2 and "embedding" not in n)]
        groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98), fused=True)
        self.step, spent, self.path = 0, 0.0, options.work / "clip" / "state.pt"
        if (state := load_state(self.path)) is not None:
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.step, spent = state["step"], state["seconds"]
        self.clock = Clock(options.steps, options.minutes, spent)
        self.ids = torch.cat(
            [self.towers.tokens(self.pool.captions[i : i + 5000]) for i in range(0, len(self.pool.captions), 5000)]
        )
        self.locked_texts = self._locked_texts() if options.freeze_text else None

    @torch.no_grad()
    def _locked_texts(self) -> Tensor:
        distinct, row = torch.unique(self.ids, dim=0, return_inverse=True)
        return torch.cat([self.towers.texts(part) for part in distinct.split(512)])[row]

    def pictures(self, index: np.ndarray, rng: np.random.Generator) -> Tensor:
        """(n, 3, 64, 64) in [0, 1]; now and then softened, as decoded latents are."""
        x = pixels(self.pool.images[index])
        if rng.random() < 0.35:
            soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear", align_corners=False)
            x = torch.lerp(x, soft, float(rng.uniform(0.3, 0.9)))
        return x

    def update(self, progress: float) -> float:
        """One optimiser step; returns the loss."""
        options, key = self.options, ("clip", self.options.seed, self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = options.lr * min(1.0, (self.step + 1) / 80) * cosine(progress, 0.01)
        rng, generator = stream(*key), torch_stream(*key)
        index = np.sort(rng.choice(len(self.pool.images), options.batch, replace=False))
        x = self.pictures(index, rng)
        few = x[torch.randperm(len(x), generator=generator)[: int(len(x) * options.shuffled)]]
        mixed = shuffle_patches(few, int(rng.choice([4, 8, 16])), generator)
        with torch.autocast(self.model.device.type, torch.bfloat16):
            z = self.towers.images(torch.cat([x, mixed]))
            t = self.towers.texts(self.ids[index]) if self.locked_texts is None else self.locked_texts[index]
        scale = self.model.logit_scale.exp().clamp(max=60)
        loss = contrast(z[: len(x)], z[len(x) :], t, self.truth(index).to(z.device), scale)
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in self.optimiser.param_groups for p in g["params"]], 1.0)
        self.optimiser.step()
        self.step += 1
        return loss.item()

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict()}
        save_state(self.path, step=self.step, seconds=self.clock.seconds(), **state)


def train(options: argparse.Namespace) -> Run:
    """Run, or go on with, the training; writes the CLIPModel folder work/clip/model."""
    run = Run(options)
    saved, began = time.monotonic(), run.step
    while (progress := run.clock.progress(run.step)) < 1 and run.step - began < (options.stop_after or float("inf")):
        loss = run.update(progress)
        if run.step % options.log_every == 0:
            log(
                "clip",
                step=run.step,
                seconds=int(run.clock.seconds()),
                loss=loss,
                scale=run.model.logit_scale.exp().item(),
            )
        if time.monotonic() - saved > options.save_every:
            run.save()
            saved = time.monotonic()
    run.save()
    out = options.work / "clip" / "model"
    run.model.save_pretrained(out)
    processor().save_pretrained(out)
    save_tokenizer(run.tokenizer, out)
    held_out = Pool.open(options.work / "pools" / options.held_out)
    nouns = [g.noun for g in load(options.work / "glyphs.npz")[1]]
    shown = [nouns[g] for g in held_out.codes["glyph"][:2000]]
    log(
        "clip",
        zero_shot=json.dumps(zero_shot(Towers(run.model.eval(), run.tokenizer), pixels(held_out.images[:2000]), shown)),
    )
    return run


def arguments() -> argparse.ArgumentParser:
    out = parser(__doc__)
    training_options(out, steps=1_500, batch=192, lr=1e-3)
    out.add_argument("--init", type=Path, help="start from this CLIPModel folder (its tokenizer is used, too)")
    out.add_argument("--freeze-text", action="store_true", help="train the image tower alone")
    out.add_argument("--shuffled", type=float, default=0.25, help="patch-shuffled copies per picture")
    out.add_argument("--held-out", default="held_out", help="pool of pictures never trained on")
    out.add_argument("--log-every", type=int, default=25)
    out.add_argument("--stop-after", type=int, help="pause after this many steps of this call")
    return out


if __name__ == "__main__":
    train(arguments().parse_args())
