"""Feature maps: what they compute, their names, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.test_vision import folder, tower  # noqa: F401  fixtures: a tiny CLIP folder and its tower
from tiltopt.errors import ConfigError, PotentialError, SurrogateError
from tiltopt.kinds import PARTS
from tiltopt.surrogates.blocks import (
    BINS,
    colour_histogram,
    cosines,
    latent_statistics,
    layout,
    opponent,
    spectrum,
)
from tiltopt.surrogates.features import FeatureMap, ImageFeatures, RawFeatures, make_features


def images(n: int) -> torch.Tensor:
    return torch.rand(n, 3, 40, 40, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["patch_stats", "patch_mean", "projection", "both"])
@pytest.mark.parametrize("prompted", [False, True])
def test_features_are_those_of_the_tower(folder, tower, kind: str, prompted: bool) -> None:  # noqa: F811
    features = make_features(folder, kind, prompted)
    assert isinstance(features, FeatureMap)
    x = images(3).requires_grad_(True)
    out = features(x, ["a cat", "a dog", "a cat"])
    assert out.shape == (3, features.dim)
    (gradient,) = torch.autograd.grad(out.sum(dim=1).square().sum(), x)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    reference = tower(images(3))
    unit = reference.projection / reference.projection.norm(dim=1, keepdim=True)
    stats = [reference.patch_mean, reference.patch_std]
    want = {
        "patch_stats": stats,
        "patch_mean": [reference.patch_mean],
        "projection": [unit],
        "both": [reference.patch_mean, unit],
    }[kind]
    if prompted:
        text = tower.text(["a cat", "a dog"])
        text = text / text.norm(dim=1, keepdim=True)
        want = [*want, text[[0, 1, 0]]]
    torch.testing.assert_close(out, torch.cat(want, dim=1), rtol=1e-4, atol=1e-5)


def test_ids_tell_maps_apart(tower) -> None:  # noqa: F811
    kinds = ("patch_stats", "patch_mean", "projection", "both", "patch_stats+projection")
    maps = [ImageFeatures(k, tower=tower, prompt_features=p) for k in kinds for p in (False, True)]
    assert len({m.id for m in maps} | {RawFeatures(8).id}) == 2 * len(kinds) + 1
    assert all(m.id.startswith(tower.id) for m in maps)


def test_refusals(tower, tmp_path) -> None:  # noqa: F811
    with pytest.raises(PotentialError, match=r"\[0, 1\].*decode"):
        ImageFeatures("projection", tower=tower)(images(2) * 2 - 1)
    with pytest.raises(PotentialError, match="one prompt per design: 2 designs, none"):
        ImageFeatures("projection", tower=tower, prompt_features=True)(images(2))
    for kind in ("pixels", "projection+projection", "", "projection+"):
        with pytest.raises(ConfigError, match=r"latent_stats, layout_2.*patch_mean, projection"):
            make_features(tmp_path, kind)
    with pytest.raises(SurrogateError, match="encoder=prior"):
        make_features(tmp_path, "latent_stats")
    with pytest.raises(SurrogateError, match="pass `tower`"):
        ImageFeatures("patch_mean")
    with pytest.raises(ConfigError, match="absent"):
        make_features(tmp_path / "absent")


def test_raw_features() -> None:
    raw = RawFeatures(6)
    x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(raw(x, ["p"] * 4), x.flatten(1))
    with pytest.raises(PotentialError, match="6 values"):
        raw(torch.zeros(2, 5))


class Halves:
    """An "autoencoder" whose latents are known: the mean of each colour over 8 x 8 pixels, and their sum."""

    encoder_id = "vae-test"
    event_shape = torch.Size((4, 5, 5))
    image_size = (40, 40)

    def encode_image(self, pictures: torch.Tensor) -> torch.Tensor:
        small = torch.nn.functional.avg_pool2d(pictures, 8)
        return torch.cat([small, small.sum(dim=1, keepdim=True)], dim=1)


class LookedInto(Halves):
    """The same with a "network" whose middle states are known."""

    fingerprint = "prior-test"

    def mid_states(self, z: torch.Tensor) -> torch.Tensor:
        return z.flatten(2).mean(2).sin()


def test_the_denoisers_block_is_what_the_prior_shows_of_the_encoded_picture() -> None:
    made = ImageFeatures("denoiser+layout_2", encoder=LookedInto())
    x = images(3)
    want = LookedInto().mid_states(Halves().encode_image(x))
    torch.testing.assert_close(made(x)[:, :4], want)
    assert made.blocks[0] == 4
    assert "prior-test/denoiser" in made.id
    with pytest.raises(SurrogateError, match="Halves; leave the block out"):
        ImageFeatures("denoiser", encoder=Halves())
    with pytest.raises(SurrogateError, match="encoder=prior"):
        make_features("embedded", "denoiser")


def test_latent_statistics_are_what_they_say() -> None:
    z = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    got = latent_statistics(z)
    a = z.numpy()
    for i in range(3):
        flat = a[i].reshape(2, -1)
        cov = np.cov(flat, bias=True)
        want = [*flat.mean(1), cov[0, 0], cov[1, 0], cov[1, 1]]
        coarse = a[i][:, :4].reshape(2, 2, 2, 2, 2).mean((2, 4))
        for scale in (a[i], coarse):
            want += list(np.sqrt(np.diff(scale, axis=2) ** 2 + 1e-4).mean((1, 2)))
            want += list(np.sqrt(np.diff(scale, axis=1) ** 2 + 1e-4).mean((1, 2)))
        np.testing.assert_allclose(got[i].numpy(), want, rtol=1e-10)
    assert got.shape[1] == 2 + 3 + 2 * 2 * 2, "two scales"
    with pytest.raises(SurrogateError, match="h, w >= 2"):
        latent_statistics(torch.zeros(1, 4, 1, 9))


def test_latent_parts_stand_beside_those_of_clip(tower) -> None:  # noqa: F811
    both = ImageFeatures("latent_stats+projection", tower=tower, encoder=Halves(), prompt_features=True)
    assert both.blocks == (4 + 10 + 2 * 4 * 2, tower.projection_dim, tower.projection_dim)
    x = images(3).requires_grad_(True)
    out = both(x, ["a cat"] * 3)
    assert out.shape == (3, both.dim)
    torch.testing.assert_close(out[:, : both.blocks[0]], latent_statistics(Halves().encode_image(images(3))))
    alone = ImageFeatures("latent_stats", encoder=Halves())
    (gradient,) = torch.autograd.grad(alone(x).sum(dim=1).square().sum(), x)
    assert torch.isfinite(gradient).all()
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    assert alone.id == "vae-test/latent_stats"
    assert both.id == f"vae-test/latent_stats+{tower.id}/projection+prompt"
    flat = torch.full((1, 3, 40, 40), 0.5).requires_grad_(True)  # no difference anywhere: the root must not blow up
    (gradient,) = torch.autograd.grad(alone(flat).sum(), flat)
    assert torch.isfinite(gradient).all()


def test_pictures_of_another_size_are_resized_for_the_encoder() -> None:
    alone = ImageFeatures("latent_stats", encoder=Halves())
    large = images(2).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(alone(large), alone(images(2)), atol=0.05, rtol=0.05)


def test_layout_is_what_a_plain_cosine_sum_says_and_the_bands_share_nothing() -> None:
    x = images(2).double()
    z = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for cells in (2, 4, 8):
        got = layout(x, z, cells)
        want = []
        for field in (opponent(x), z):
            pooled = torch.nn.functional.adaptive_avg_pool2d(field, cells).numpy()
            for c in range(pooled.shape[1]):
                for u in range(cells):
                    for v in range(cells):
                        if u < cells // 2 and v < cells // 2:
                            continue
                        i, j = np.arange(cells), np.arange(cells)
                        wave = np.cos(np.pi / cells * (i + 0.5) * u)[:, None] * np.cos(np.pi / cells * (j + 0.5) * v)
                        scale = np.sqrt((1 if u == 0 else 2) * (1 if v == 0 else 2)) / cells
                        want.append((pooled[:, c] * wave).sum((1, 2)) * scale)
        np.testing.assert_allclose(got.numpy(), np.stack(want, 1), atol=1e-12)


def test_the_brighter_half_is_one_number_of_the_layout() -> None:
    x = torch.full((2, 3, 32, 32), 0.5)
    x[1, :, :, 16:] = 0.9
    flat, right = layout(x, torch.zeros(2, 4, 8, 8), 2)
    assert flat.abs().max() < 1e-6
    assert (right.abs() > 1e-6).sum() == 1


def shares_of(histograms: torch.Tensor) -> list[torch.Tensor]:
    """Shares of the bins (n, BINS) for each of the three channels, from the cosine coefficients of their sums."""
    found = []
    for part in histograms.split(BINS - 1, dim=1):
        below = part @ cosines(BINS - 1, part)  # the basis is orthonormal
        below = torch.cat([torch.zeros_like(below[:, :1]), below, torch.ones_like(below[:, :1])], dim=1)
        found.append(below.diff(dim=1))
    return found


def test_colour_histograms_count_pixels() -> None:
    x = torch.zeros(1, 3, 4, 4)
    x[..., 2:, :] = 1.0  # half black, half white: no colour anywhere
    bright, red, blue = shares_of(colour_histogram(x))
    torch.testing.assert_close(bright[0, [0, -1]], torch.tensor([0.5, 0.5]))
    for colour in (red, blue):  # grey lies midway between the two middle bins
        torch.testing.assert_close(colour[0, BINS // 2 - 1 : BINS // 2 + 1], torch.tensor([0.5, 0.5]))
    noise = torch.rand(3, 3, 9, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = opponent(noise)[:, 0].flatten(1).numpy()
    edges = np.linspace(0, 1, BINS)
    want = np.stack([np.maximum(1 - np.abs(y - edge) * (BINS - 1), 0).mean(1) for edge in edges], 1)
    np.testing.assert_allclose(shares_of(colour_histogram(noise))[0].numpy(), want, atol=1e-12)


def test_a_colour_that_few_pictures_have_does_not_blow_up_among_few_of_them() -> None:
    """Sixteen pictures give the scale of every coefficient; seen from it, no other picture is an outlier."""
    generator = torch.Generator().manual_seed(2)
    x = 0.5 + 0.08 * torch.randn(400, 3, 12, 12, generator=generator)
    x[::40, 0, :3] += 0.4  # one in forty has a red stripe
    seen = colour_histogram(x.clamp(0, 1))
    few = seen[1:17]
    standardised = (seen - few.mean(0)) / few.std(0)
    assert standardised.abs().max() < 40  # a bin of its own: infinite


def test_the_spectrum_knows_which_way_stripes_run_and_where() -> None:
    stripes = (torch.arange(32) % 4 < 2).float()
    lying = stripes[:, None].expand(32, 32).expand(1, 3, 32, 32)
    standing = lying.mT
    along, down = spectrum(standing), spectrum(lying)
    assert (along - down).abs().max() > 3  # nats
    torch.testing.assert_close(spectrum(standing.mT), down)
    half = torch.full((1, 3, 32, 32), 0.5)
    half[..., 16:] = standing[..., 16:]
    assert spectrum(standing, where=True).abs().max() < 0.2 < spectrum(half, where=True).abs().max()


@pytest.mark.parametrize("kind", [*PARTS, "bank"])
def test_every_block_has_the_size_it_says_and_a_finite_gradient(kind: str, tower) -> None:  # noqa: F811
    made = ImageFeatures(kind, tower=tower, encoder=LookedInto())
    for x in (images(2), torch.full((2, 3, 40, 40), 0.5)):
        x = x.clone().requires_grad_(True)
        out = made(x)
        assert out.shape == (2, made.dim)
        assert sum(made.blocks) == made.dim
        (gradient,) = torch.autograd.grad(out.sin().sum(), x)
        assert torch.isfinite(gradient).all()
