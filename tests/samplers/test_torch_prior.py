"""A denoiser of one's own: every prediction against the exact chain, a DDPMPipeline, and bad input."""

from __future__ import annotations

import functools
import math
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from tests.contracts.priors import PriorContract, seeded, two_modes
from tests.fakes import tiny
from tiltopt.errors import PriorError
from tiltopt.samplers import DAS, TorchPrior
from tiltopt.samplers.analytic import MixturePrior, Quadratic
from tiltopt.samplers.chain import amplitudes, exploding, flow, preserving
from tiltopt.samplers.diffusers_prior import as_prior
from tiltopt.types import Conditioning

ABAR = torch.cumprod(1 - torch.linspace(1e-3, 0.2, 60, dtype=torch.float64), 0)
SIGMAS = torch.logspace(-2, 1.5, 60, dtype=torch.float64)
TIMES = torch.linspace(1 / 60, 1, 60, dtype=torch.float64)


class Net(nn.Module):
    """A small network over (n, 2, 3) that looks at x, t and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny.randomise(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6)), 0, 0.5)

    def forward(self, x: Tensor, t: Tensor, embeds: Tensor | None = None) -> Tensor:
        assert t.dtype == torch.int64
        assert t.shape == (len(x),)
        shift = 0.1 * (t.to(x.dtype) / 60)[:, None, None]
        if embeds is not None:
            shift = shift + embeds.to(x.dtype)[:, None, None]
        return self.inner(x.flatten(1)).view_as(x) + shift


def lengths(prompts: Any) -> Tensor:
    return torch.tensor([len(p) / 10 for p in prompts])


class TestUnconditional(PriorContract):
    @pytest.fixture
    def prior(self) -> TorchPrior:
        return TorchPrior(Net(), alphas_cumprod=ABAR, event_shape=(2, 3), prediction="v", num_steps=5)

    @pytest.fixture
    def prior64(self) -> TorchPrior:
        options: dict[str, Any] = {"alphas_cumprod": ABAR, "event_shape": (2, 3), "num_steps": 5}
        return TorchPrior(Net().double(), prediction="v", dtype=torch.float64, **options)


class TestConditionalWithDecoder(PriorContract):
    @pytest.fixture
    def prior(self) -> TorchPrior:
        return TorchPrior(
            Net(), sigmas=SIGMAS, event_shape=(2, 3), prediction="edm", num_steps=4, encode_cond=lengths,
            decode=lambda x: x.flatten(1).tanh(),
        )  # fmt: skip


def exact(kind: str, table: Tensor) -> Any:
    """The exact network of two modes, in units of `kind`; t indexes the table."""
    data = two_modes()

    def model(x: Tensor, t: Tensor) -> Tensor:
        level = float(table[int(t[0])])
        if kind in ("edm", "sample_sigmas", "epsilon_sigmas"):
            a, b = amplitudes("exploding", level)
        elif kind == "flow":
            a, b = 1 - level, level
        else:
            a, b = level**0.5, (1 - level) ** 0.5
        two = preserving([0.5, 1.0]) if b > 0 else None
        assert two is not None
        object.__setattr__(two, "a", (a, 1.0))
        object.__setattr__(two, "b", (b, 0.0))
        x0 = MixturePrior(data, chain=two, dtype=torch.float64).reverse(0, x, Conditioning(("",) * len(x))).x0
        eps = (x - a * x0) / b
        return {"epsilon": eps, "epsilon_sigmas": eps, "v": a * eps - b * x0, "flow": eps - x0}.get(kind, x0)

    return model


@pytest.mark.parametrize(
    ("kind", "table"),
    [
        ("epsilon", ABAR),
        ("v", ABAR),
        ("sample", ABAR),
        ("edm", SIGMAS),
        ("edm", SIGMAS.flip(0)),
        ("edm", torch.cat([SIGMAS.flip(0), torch.zeros(1)])),
        ("sample_sigmas", SIGMAS),
        ("epsilon_sigmas", SIGMAS),
        ("flow", TIMES),
    ],
)
@pytest.mark.parametrize("num_steps", [7, 60])
def test_every_prediction_is_the_exact_chain(kind: str, table: Tensor, num_steps: int) -> None:
    named = {"alphas_cumprod": table} if table is ABAR else {"sigmas": table}
    options: dict[str, Any] = {"event_shape": (2,), "num_steps": num_steps, "eta": 0.7, "dtype": torch.float64}
    prior = TorchPrior(exact(kind, table), prediction=kind.split("_")[0], **named, **options)  # type: ignore[arg-type]
    levels = table[[int(t) for t in prior.schedule.times]].tolist()
    build, clean = (preserving, 1.0) if table is ABAR else (flow if kind == "flow" else exploding, 0.0)
    chain = build([*levels, clean], 0.7)
    assert prior.chain == chain
    assert levels[0] == (min if table is ABAR else max)(table.tolist())  # from the noisiest level on
    truth = MixturePrior(two_modes(), chain=chain, dtype=torch.float64)
    x, cond = prior.initial(4, seeded(0)), prior.encode(["", "", "", ""])
    torch.testing.assert_close(x, truth.initial(4, seeded(0)))
    for k in range(num_steps):
        ours, theirs = prior.reverse(k, x, cond), truth.reverse(k, x, cond)
        torch.testing.assert_close(ours.x0, theirs.x0, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-6, atol=1e-8)
        x = ours.mean


def test_a_sampler_tilts_it() -> None:
    """log Z and mean of an exact epsilon network under SMC, within 4 standard errors of the tilted data."""
    potential, runs = Quadratic(torch.tensor([[3.0, 0.0], [0.0, 0.5]]), torch.tensor([0.5, 0.5])), 16
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.06, 300, dtype=torch.float64), 0)
    options: dict[str, Any] = {"event_shape": (2,), "num_steps": 300, "dtype": torch.float64}
    prior = TorchPrior(exact("epsilon", abar), alphas_cumprod=abar, **options)
    samples = DAS(tempering="exp", gamma=0.03, gradient="x0").sample(
        prior, potential, prior.encode([""] * runs), num_particles=256, generators=[seeded(i) for i in range(runs)]
    )
    target, log_z = two_modes().tilt(potential)
    z = samples.log_z.double().exp()
    assert abs(float(z.mean() - log_z.exp())) < 4 * float(z.std()) / runs**0.5
    first = (samples.log_w.double().exp().unsqueeze(-1) * samples.x0.double()).sum(1)
    assert bool(((first.mean(0) - target.mean).abs() < 4 * first.std(0) / runs**0.5).all())


def ddpm(clip: bool = False) -> Any:
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=40, clip_sample=clip, beta_end=0.3)
    return diffusers.DDPMPipeline(unet=tiny.randomise(unet, 1), scheduler=scheduler)


def test_an_unconditional_ddpm_wrapped_by_hand_is_the_ddpm() -> None:
    """All T steps: mean and deviation of every kernel are DDPMScheduler's own."""
    pipe = ddpm()
    prior = TorchPrior(
        lambda x, t: pipe.unet(x, t).sample,
        alphas_cumprod=pipe.scheduler.alphas_cumprod,
        event_shape=(3, 8, 8),
        num_steps=40,
        decode=lambda x: (x / 2 + 0.5).clamp(0, 1),
    )
    same = as_prior(pipe, num_steps=40)
    x, cond = prior.initial(2, seeded(0)), prior.encode(["", ""])
    pipe.scheduler.set_timesteps(40)
    with torch.no_grad():
        for k, t in enumerate(pipe.scheduler.timesteps):
            assert prior.schedule.times[k] == same.schedule.times[k] == float(t)
            said = pipe.unet(x, t).sample
            step = pipe.scheduler.step(said, t, x, generator=seeded(k))
            noise = torch.randn(x.shape, generator=seeded(k))
            for ours in (prior, same):
                mean, x0 = ours.reverse(k, x, cond)
                if k < 39:  # DDPMScheduler floors its last variance at 1e-20
                    torch.testing.assert_close(
                        mean + ours.std(k) * noise, step.prev_sample, rtol=1e-4, atol=1e-4 * float(x.abs().max())
                    )
                scale = float(x0.abs().max())
                torch.testing.assert_close(x0, step.pred_original_sample, rtol=1e-4, atol=1e-4 * scale)
            x = step.prev_sample
    assert prior.decode(x).shape == same.decode(x).shape == (2, 3, 8, 8)


def test_the_fingerprint_follows_weights_and_levels() -> None:
    def make(net: Net, num_steps: int = 5) -> str:
        return TorchPrior(net, alphas_cumprod=ABAR, event_shape=(2, 3), num_steps=num_steps).fingerprint

    net, other = Net(), Net()
    with torch.no_grad():
        other.inner[0].weight[0, 0] += 1e-3
    assert make(net) == make(Net())
    assert len({make(net), make(other), make(net, 6)}) == 3


def test_the_fingerprint_follows_what_functions_compute_with() -> None:
    """A function has the weights of the modules that it names, wherever these lie."""
    nets = [Net(), Net()]
    with torch.no_grad():
        nets[1].inner[0].weight[0, 0] += 1e-3

    class Pipe:
        def __init__(self, unet: Net) -> None:
            self.unet = unet

    def make(model: Any = nets[0], **options: Any) -> str:
        options = {"alphas_cumprod": ABAR, "event_shape": (2, 3), "num_steps": 5} | options
        return TorchPrior(model, **options).fingerprint

    def closed(net: Any) -> Any:
        return lambda x, t: net(x, t)

    def through(pipe: Pipe) -> Any:
        return lambda x, t: pipe.unet(x, t)

    for way in (closed, lambda net: net.forward, lambda net: functools.partial(net), lambda net: through(Pipe(net))):
        assert make(way(nets[0])) != make(way(nets[1]))
        assert make(way(nets[0])) == make(way(nets[0]))
    assert make(decode=nets[0].inner) != make(decode=nets[1].inner)
    assert make(encode_cond=closed(nets[0])) != make(encode_cond=closed(nets[1]))
    assert make(eta=0.5) != make()


@pytest.mark.parametrize(
    ("embeds", "message"),
    [
        (torch.zeros(3, 4), r"2 rows, one a prompt, got shape \(3, 4\)"),
        ({"text": (torch.zeros(2, 4), torch.zeros(1))}, r"got shape \(1,\)"),
        ("two", "got str"),
    ],
)
def test_embeddings_have_a_row_for_each_prompt(embeds: Any, message: str) -> None:
    prior = TorchPrior(Net(), alphas_cumprod=ABAR, event_shape=(2, 3), num_steps=4, encode_cond=lambda p: embeds)
    with pytest.raises(PriorError, match=message):
        prior.encode(["a", "b"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either `alphas_cumprod` or `sigmas`"),
        ({"alphas_cumprod": ABAR, "sigmas": SIGMAS}, "either `alphas_cumprod` or `sigmas`"),
        ({"alphas_cumprod": ABAR, "prediction": "eps"}, "`prediction` must be one of epsilon, v"),
        ({"alphas_cumprod": ABAR, "prediction": "edm"}, "needs `sigmas`"),
        ({"sigmas": SIGMAS, "prediction": "v"}, "variance-preserving"),
        ({"alphas_cumprod": ABAR.flip(0)}, "must fall"),
        ({"alphas_cumprod": SIGMAS.flip(0)}, "must fall within"),
        ({"alphas_cumprod": torch.tensor([0.9, math.nan])}, "finite"),
        ({"alphas_cumprod": torch.ones(2, 2)}, "vector"),
        ({"sigmas": -SIGMAS, "num_steps": 1}, "1 .. 0"),
        ({"sigmas": SIGMAS, "prediction": "flow"}, "<= 1 for a flow"),
        ({"alphas_cumprod": ABAR, "num_steps": 61}, "1 .. 60"),
        ({"alphas_cumprod": ABAR, "eta": 2.0}, "eta"),
        ({"alphas_cumprod": torch.tensor([0.9, 0.0]), "num_steps": 2}, "without signal"),
    ],
)
def test_impossible_arguments_are_refused(options: dict, message: str) -> None:
    with pytest.raises(PriorError, match=message):
        TorchPrior(Net(), **({"event_shape": (2, 3), "num_steps": 4} | options))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda x, t: x[:, :1], r"shape of x, \(2, 2, 3\), got \(2, 1, 3\)"),
        (lambda x, t: {"sample": x}, r"got dict; a diffusers UNet.*\.sample"),
    ],
)
def test_a_model_that_answers_in_another_shape_is_told(model: Any, message: str) -> None:
    prior = TorchPrior(model, alphas_cumprod=ABAR, event_shape=(2, 3), num_steps=4)
    with pytest.raises(PriorError, match=message):
        prior.reverse(0, prior.initial(2, seeded(0)), prior.encode(["", ""]))


def test_a_decoder_that_changes_shape_or_breaks_is_told() -> None:
    def make(decode: Any) -> TorchPrior:
        return TorchPrior(Net(), alphas_cumprod=ABAR, event_shape=(2, 3), num_steps=4, decode=decode)

    x = torch.ones(2, 2, 3)
    with pytest.raises(PriorError, match=r"one design per event, a tensor \(2, ...\), got \(12,\)"):
        make(lambda x: x.flatten()).decode(x)
    with pytest.raises(PriorError, match="got list"):
        make(lambda x: list(x)).decode(x)
    with pytest.raises(PriorError, match="finite designs"):
        make(lambda x: x / 0 - x / 0).decode(x)
    growing = make(lambda x: torch.ones(len(x), len(x)))
    assert growing.decode(x).shape == (2, 2)
    with pytest.raises(PriorError, match=r"one shape, \(2,\) so far, got \(3, 3\)"):
        growing.decode(torch.ones(3, 2, 3))
