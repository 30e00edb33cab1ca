"""Feature maps: what they compute, their names, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from tests.test_vision import folder, tower  # noqa: F401  fixtures: a tiny CLIP folder and its tower
from tiltopt.errors import ConfigError, PotentialError, SurrogateError
from tiltopt.surrogates.features import KINDS, CLIPFeatures, FeatureMap, RawFeatures, make_features


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
    maps = [CLIPFeatures(tower, k, p) for k in KINDS for p in (False, True)]
    assert len({m.id for m in maps} | {RawFeatures(8).id}) == 2 * len(KINDS) + 1
    assert all(m.id.startswith(tower.id) for m in maps)


def test_refusals(tower, tmp_path) -> None:  # noqa: F811
    with pytest.raises(PotentialError, match=r"\[0, 1\].*decode"):
        CLIPFeatures(tower)(images(2) * 2 - 1)
    with pytest.raises(PotentialError, match="one prompt per design: 2 designs, none"):
        CLIPFeatures(tower, prompt_features=True)(images(2))
    with pytest.raises(SurrogateError, match="patch_stats, patch_mean, projection, both"):
        make_features(tmp_path, "pixels")
    with pytest.raises(ConfigError, match="absent"):
        make_features(tmp_path / "absent")


def test_raw_features() -> None:
    raw = RawFeatures(6)
    x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(raw(x, ["p"] * 4), x.flatten(1))
    with pytest.raises(PotentialError, match="6 values"):
        raw(torch.zeros(2, 5))
