"""What sampling costs at the true size of Stable Diffusion 1.5, with random weights: no download is needed.

    python -m benchmarks.gpu                              # on the GPU, about 20 minutes; every finished row is kept
    python -m benchmarks.gpu --size tiny --rows 1 2 --steps 3 --device cpu       # seconds; shows that it runs

Of each part (network, decoder, CLIP) and number of rows: seconds forward, and forward and backward, effective TFLOP/s,
their share of the fastest large matrix product, and memory beside what two rows predict. Of each lever: seconds and
memory of a whole look (network, decoder, CLIP, and back). A round of the loop in queries per hour, and what the
paper-scale UCB run would take. Last, because compilers are not everywhere, whether a compiled and a bfloat16 network
give the same numbers. A row that stands in the results is not measured again; one that fails says why there, is tried
anew by the next call, and stops no other. Operations are PyTorch's own count, a product and a sum being two.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Generator, Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tiltopt.online.optimizer import Optimizer
from tiltopt.online.settings.cost import cost
from tiltopt.online.settings.presets import preset
from tiltopt.online.settings.run import Settings
from tiltopt.samplers.diffusers_prior import DiffusersPrior
from tiltopt.samplers.micro_batch import is_out_of_memory
from tiltopt.samplers.work import peak_bytes, trial
from tiltopt.vision import CLIPVision, Preprocess

HERE = Path(__file__).parent
TOKENS = 77
SIZES: dict[str, dict[str, Any]] = {
    "sd15": {"unet": (320, 640, 1280, 1280), "vae": (128, 256, 512, 512), "text": 768, "layers": 12, "latent": 64,
             "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                        "num_attention_heads": 16, "image_size": 224, "patch_size": 14}},
    "tiny": {"unet": (32, 64), "vae": (32, 32), "text": 32, "layers": 1, "latent": 8,
             "vision": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
                        "image_size": 16, "patch_size": 8}},
}  # fmt: skip
LEVERS: dict[str, dict[str, Any]] = {
    "float32 decoder": {"vae_dtype": "float32"},
    "bfloat16 decoder": {},
    "channels_last": {"channels_last": True},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "vae_slicing": {"vae_slicing": True},
    "guidance_decoder": {"guidance_decoder": True},
}
"""Each beside bfloat16 throughout, and compiling after all that needs no compiler."""
REPEATS = 3


class Results:
    """A table of rows in a JSON file, written after each of them."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.content: dict[str, Any] = found if found.get("about") == about else {"about": about}

    def row(self, section: str, key: str, measure: Callable[[], Any]) -> None:
        """Measure a row unless it is there. One that runs out of memory or fails says so in its place."""
        rows, started = self.content.setdefault(section, {}), time.perf_counter()
        if key in rows and not (isinstance(rows[key], dict) and "failed" in rows[key]):
            return
        try:
            rows[key] = measure()
        except Exception as error:
            if is_out_of_memory(error):
                rows[key] = {"out_of_memory": True}
            else:
                traceback.print_exc()
                rows[key] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        if "out_of_memory" in str(rows[key]):  # what the traceback held is gone by now
            gc.collect()
            torch.cuda.empty_cache()
        print(f"{section} / {key}: {rows[key]} ({time.perf_counter() - started:.1f} s)", flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".part")
        partial.write_text(json.dumps(self.content, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.path)


class Machine:
    """The models of one size on one device."""

    def __init__(self, size: str, device: torch.device, steps: int) -> None:
        s = SIZES[size]
        self.device, self.steps, self.dtype = device, steps, "bfloat16" if device.type == "cuda" else "float32"
        with torch.random.fork_rng(devices=[]):  # else every GPU is woken
            torch.random.default_generator.manual_seed(0)
            self.pipe = _pipeline(s)
            self.tiny = _tiny_decoder(s)
            self.clip = _clip(s)
        self.tower = CLIPVision(
            self.clip.to(device, getattr(torch, self.dtype)),
            Preprocess(s["vision"]["image_size"], (s["vision"]["image_size"],) * 2), "random",
        )  # fmt: skip

    def prior(self, **levers: Any) -> DiffusersPrior:
        """Stable Diffusion with these levers; without any, half precision throughout on a GPU."""
        options: dict[str, Any] = {"dtype": self.dtype, "vae_dtype": self.dtype} | levers
        if options.pop("guidance_decoder", False):
            options["guidance_decoder"] = self.tiny
        for module in (self.pipe.unet, self.pipe.vae, self.tiny):  # levers of the row before
            module.disable_gradient_checkpointing()
            module.to(memory_format=torch.contiguous_format)
        self.pipe.vae.disable_slicing()
        return DiffusersPrior.from_pipeline(
            self.pipe, num_steps=self.steps, guidance_scale=7.5, device=self.device, **options
        )

    def part(self, name: str, rows: int, peak: float) -> dict[str, Any]:
        """One part on so many rows."""
        prior = self.prior()
        cond = prior.encode(["a cat"] * rows)
        x = prior.initial(rows, Generator().manual_seed(0))
        pictures = torch.rand(rows, 3, *prior.image_size, generator=Generator().manual_seed(0)).to(self.device)
        action, at = {
            "network": (lambda t: prior.reverse(prior.num_steps // 2, t, cond).x0, x),
            "decoder": (prior.decode, x),
            "clip": (lambda t: self.tower(t).projection, pictures),
        }[name]
        return self.timed(action, at, peak)

    def timed(self, action: Callable[[Tensor], Tensor], at: Tensor, peak: float) -> dict[str, Any]:
        """Seconds, operations and memory of `action`, without and with its gradient."""
        found: dict[str, Any] = {}
        for name, gradient in (("forward", False), ("forward_backward", True)):

            def run(gradient: bool = gradient) -> None:
                with torch.set_grad_enabled(gradient):
                    leaf = at.detach().requires_grad_(gradient)
                    out = action(leaf)
                    if gradient:
                        torch.autograd.grad(out.sum(), leaf)

            # a frame that a compiler meets while operations are counted is never compiled later
            with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
                run()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            seconds = fastest(run, self.device)
            rate = counter.get_total_flops() / seconds
            found[name] = {"seconds": seconds, "tflops": rate / 1e12, "share_of_peak": rate / peak}
            if self.device.type == "cuda":
                found[name]["peak_mib"] = torch.cuda.max_memory_allocated(self.device) / 2**20
        return found

    def look(self, rows: int, peak: float, **levers: Any) -> dict[str, Any]:
        """A whole look at so many rows: network, decoder, CLIP, and the gradient back through them."""
        prior = self.prior(**levers)
        cond = prior.encode(["a cat"] * rows)
        x = prior.initial(rows, Generator().manual_seed(0))

        def whole(t: Tensor) -> Tensor:
            return self.tower(prior.guidance_decode(prior.reverse(prior.num_steps // 2, t, cond).x0)).projection

        found = self.timed(whole, x, peak)["forward_backward"]
        found["seconds_per_row"] = found["seconds"] / rows
        return found

    def memory(self, rows: int) -> dict[str, float]:
        """What a look takes beyond the weights, in MiB, beside what one row and two predict."""
        prior = self.prior()
        look = lambda x0, prompts: self.tower(prior.decode(x0)).projection  # noqa: E731
        cond = prior.encode(["a cat"])
        one, two, all_ = (peak_bytes(prior, cond.select([0] * n), look, "full") for n in (1, 2, rows))
        return {"measured_mib": all_ / 2**20, "predicted_mib": (one + (rows - 1) * (two - one)) / 2**20}

    def same(self, rows: int, backend: str, **levers: Any) -> dict[str, float]:
        """Largest difference from the float32 network, over its largest number, and from the one without levers."""
        exact, plain = (self._answer(self.prior(dtype=dtype), rows) for dtype in ("float32", self.dtype))
        prior = self.prior(**levers)
        if backend:
            prior.denoiser.call = torch.compile(prior.denoiser.network, backend=backend)
        found, scale = self._answer(prior, rows), float(exact.abs().max())
        return {
            "from_float32": float((found - exact).abs().max()) / scale,
            "from_eager": float((found - plain).abs().max()) / scale,
        }

    def _answer(self, prior: DiffusersPrior, rows: int) -> Tensor:
        with torch.no_grad():
            x = prior.initial(rows, Generator().manual_seed(0))
            return prior.reverse(prior.num_steps // 2, x, prior.encode(["a cat"] * rows)).x0.float().cpu()

    def round(self, queries: int, particles: int, rows: int) -> dict[str, float]:
        """A tilted round of the loop, from Python, and how long its parts say that it takes."""
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            self.clip.save_pretrained(folder / "clip")
            self.pipe.tokenizer.save_pretrained(folder / "clip")
            config = {
                "initial_batch_size": 2 * queries, "rounds": 1, "batch_size": queries, "micro_batch": rows,
                "model": {"name": "linear"}, "reward": {"name": ""}, "free_reference_samples": 0,
                "prior": {"num_steps": self.steps, "guidance_scale": 7.5, "eta": 1.0},
                "features": {"path": str(folder / "clip"), "kind": "projection", "dtype": self.dtype},
                "sampler": {"num_particles": particles, "alpha": 1.0},
            }  # fmt: skip
            with Optimizer.create(folder / "run", config, prior=self.prior()) as optimizer:
                for query in optimizer.ask(2 * queries):
                    optimizer.tell(query.id, float(query.id % 7))
                started = time.perf_counter()
                optimizer.ask(queries)
                seconds = time.perf_counter() - started
        return {"seconds": seconds, "queries_per_hour": 3600 * queries / seconds}

    def paper(self, rows: int, **levers: Any) -> dict[str, float]:
        """Hours of the paper-scale UCB run (16 + 256 x 16 queries, 4 particles, 100 steps), at the rates of a look."""
        prior = self.prior(**levers)
        cond = prior.encode(["a cat"] * rows)
        look = lambda x0: self.tower(prior.guidance_decode(x0)).projection  # noqa: E731
        rates = trial(prior, cond, look, network_backward=True, looks_backward=True)
        work = cost(Settings.from_config(preset("aesthetic"))).work
        return {"hours": rates.seconds(work) / 3600, "network_evaluations": work.network}


def _pipeline(s: dict[str, Any]) -> StableDiffusionPipeline:
    """The published configuration of Stable Diffusion 1.5, or a toy of the same classes."""
    levels, depth = len(s["unet"]), len(s["vae"])
    unet = UNet2DConditionModel(
        sample_size=s["latent"], block_out_channels=s["unet"], cross_attention_dim=s["text"], attention_head_dim=8,
        layers_per_block=2, down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=s["vae"], layers_per_block=2, latent_channels=4, sample_size=8 * s["latent"],
        down_block_types=("DownEncoderBlock2D",) * depth, up_block_types=("UpDecoderBlock2D",) * depth,
    )  # fmt: skip
    tokenizer = _tokenizer()
    text = CLIPTextModel(CLIPTextConfig(**_text(s, tokenizer)))
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _tiny_decoder(s: dict[str, Any]) -> AutoencoderTiny:
    """TAESD's own configuration, with as many halvings as the decoder."""
    depth = len(s["vae"])
    return AutoencoderTiny(
        encoder_block_out_channels=(64,) * depth, decoder_block_out_channels=(64,) * depth,
        num_encoder_blocks=(1,) + (3,) * (depth - 1), num_decoder_blocks=(3,) * (depth - 1) + (1,),
    )  # fmt: skip


def _tokenizer() -> CLIPTokenizer:
    tokenizer = CLIPTokenizer.from_pretrained(str(resources.files("tiltopt.embedded") / "pipeline" / "tokenizer"))
    tokenizer.model_max_length = TOKENS
    return tokenizer


def _text(s: dict[str, Any], tokenizer: CLIPTokenizer) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer), "hidden_size": s["text"], "intermediate_size": 4 * s["text"],
        "num_hidden_layers": s["layers"], "num_attention_heads": max(1, s["text"] // 64),
        "max_position_embeddings": TOKENS, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "projection_dim": s["text"],
    }  # fmt: skip


def _clip(s: dict[str, Any]) -> CLIPModel:
    """CLIP ViT-L/14, or a toy of the same class."""
    vision = s["vision"] | {"projection_dim": s["text"]}
    return CLIPModel(CLIPConfig(text_config=_text(s, _tokenizer()), vision_config=vision, projection_dim=s["text"]))


def fastest(action: Callable[[], Any], device: torch.device) -> float:
    """Wall seconds of the fastest of several, after one that warms up."""
    seconds = []
    for _ in range(REPEATS + 1):
        _wait(device)
        begin = time.perf_counter()
        action()
        _wait(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_peak(device: torch.device, dtype: torch.dtype, n: int) -> float:
    """Operations per second of an n x n matrix product: what the device can do at best."""
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2.0 * n**3 / fastest(lambda: a @ a, device)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Parse, measure, print, keep; returns the content of the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="sd15")
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--lever-rows", type=int, default=16, help="rows at which levers are compared")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--queries", type=int, default=16, help="of the round of the loop")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="inductor", help="of torch.compile; '' leaves it out")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu.json")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    machine = Machine(args.size, device, args.steps)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    about = {"device": name, "torch": torch.__version__, "dtype": machine.dtype, "size": args.size, "steps": args.steps}
    results = Results(args.out, about)
    n = 8192 if device.type == "cuda" else 256
    results.row("peak", "tflops", lambda: matrix_peak(device, getattr(torch, machine.dtype), n) / 1e12)
    peak = 1e12 * results.content["peak"]["tflops"]
    rows = args.lever_rows
    for count in args.rows:
        for part in ("network", "decoder", "clip"):
            results.row(part, str(count), lambda part=part, count=count: machine.part(part, count, peak))  # type: ignore[misc]
        results.row("memory", str(count), lambda count=count: machine.memory(count))  # type: ignore[misc]
    for lever, options in LEVERS.items():
        results.row("levers", lever, lambda options=options: machine.look(rows, peak, **options))  # type: ignore[misc]
    results.row("paper_ucb", "true decoder", lambda: machine.paper(rows))
    results.row("paper_ucb", "tiny decoder", lambda: machine.paper(rows, guidance_decoder=True))
    results.row("loop_round", f"{args.queries} queries x 4", lambda: machine.round(args.queries, 4, rows))
    results.row("equality", "bfloat16", lambda: machine.same(2, "", dtype="bfloat16"))
    if args.backend:
        results.row("levers", "compile", lambda: machine.look(rows, peak, compile=True))
        results.row("equality", "compiled", lambda: machine.same(2, args.backend))
    return results.content


def failed(content: dict[str, Any]) -> list[str]:
    """Rows that failed for another reason than memory."""
    rows = ((f"{section} / {key}", row) for section, found in content.items() for key, row in found.items())
    return [name for name, row in rows if isinstance(row, dict) and "failed" in row]


if __name__ == "__main__":
    sys.exit(", ".join(f"{name} failed" for name in failed(main())) or 0)
