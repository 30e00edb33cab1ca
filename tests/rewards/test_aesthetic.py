"""Rewards that look through a CLIP model: the aesthetic head against a layered reference, CLIP score.

Set TILTOPT_AESTHETIC_HEAD to a copy of sac+logos+ava1-l14-linearMSE.pth to test the published file itself.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertTokenizer, CLIPTokenizer

from tests.fakes.tiny import tiny_clip
from tiltopt.errors import ConfigError, RewardError
from tiltopt.rewards import RewardOptionError, make_reward, validate
from tiltopt.rewards.aesthetic import PUBLISHED_HEAD, AestheticOptions, load_head
from tiltopt.rewards.differentiable import differentiable_names, make_differentiable
from tiltopt.rewards.images import to_tensor
from tiltopt.rewards.weights import load_tokenizer
from tiltopt.surrogates.features import make_features
from tiltopt.vision import CLIPVision

WIDTH = 16
PUBLISHED = (768, 1024, 128, 64, 16, 1)
NAMES = (0, 2, 4, 6, 7)  # dropout layers sit between
PROMPTS = ["a photo of a cat", "a photo of a dog", "a zebra"]


def layered(sizes: tuple[int, ...], seed: int) -> nn.Sequential:
    """The published architecture at other sizes, with seeded weights."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (into, out) in enumerate(itertools.pairwise(sizes)):
        linear = nn.Linear(into, out)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(out, into, generator=generator) / into**0.5)
            linear.bias.copy_(torch.randn(out, generator=generator))
        layers += [linear, nn.Dropout(0.2)] if i < len(sizes) - 3 else [linear]
    return nn.Sequential(*layers).double().eval()


def state_of(net: nn.Sequential) -> dict[str, Tensor]:
    return {f"layers.{key}": value.float() for key, value in net.state_dict().items()}


def save_head(path: Path, sizes: tuple[int, ...] = (WIDTH, 24, 12, 8, 4, 1), seed: int = 0) -> nn.Sequential:
    net = layered(sizes, seed).float().double()
    state = state_of(net)
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return net


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return str(tiny_clip(tmp_path_factory.mktemp("clip"), width=WIDTH))


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("head") / "head.pth"
    save_head(path)
    return str(path)


def pictures(n: int, side: int = 40) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(n)]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("sizes", [PUBLISHED, (8, 5, 4, 3, 2, 1), (8, 1)])
def test_collapsed_head_equals_the_layers(tmp_path, suffix, sizes):
    net = save_head(tmp_path / f"head{suffix}", sizes, seed=1)
    if sizes == PUBLISHED:
        assert {int(key.split(".")[1]) for key in state_of(net)} == set(NAMES)
    loaded = load_head(str(tmp_path / f"head{suffix}"))
    x = torch.randn(64, sizes[0], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.allclose(x @ loaded.weight + loaded.bias, net(x)[:, 0], rtol=0, atol=1e-12)


def test_plain_linear_head_is_read(tmp_path):
    torch.save({"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0])}, tmp_path / "linear.pth")
    loaded = load_head(str(tmp_path / "linear.pth"))
    assert loaded.weight.tolist() == [1.0, 2.0]
    assert loaded.bias.item() == 3.0


@pytest.mark.skipif("TILTOPT_AESTHETIC_HEAD" not in os.environ, reason="TILTOPT_AESTHETIC_HEAD is not set")
def test_the_published_file():
    path = os.environ["TILTOPT_AESTHETIC_HEAD"]
    state = torch.load(path, map_location="cpu", weights_only=True)
    assert [state[f"layers.{n}.weight"].shape for n in NAMES] == [
        (out, into) for into, out in itertools.pairwise(PUBLISHED)
    ]
    net = layered(PUBLISHED, 0)
    net.load_state_dict({key.removeprefix("layers."): value.double() for key, value in state.items()})
    x = torch.randn(256, 768, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = x / x.norm(dim=-1, keepdim=True)
    loaded = load_head(path)
    assert torch.allclose(unit @ loaded.weight + loaded.bias, net(unit)[:, 0], rtol=0, atol=1e-12)
    assert loaded.bias.item() == pytest.approx(5.2366, abs=1e-4)  # score of a zero embedding, computed from the file


def broken(change) -> dict[str, Tensor]:
    state = state_of(layered((8, 4, 4, 4, 4, 1), 0))
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"layers.2.weight": torch.zeros(4, 5)}), "layers that fit one another"),
        (lambda s: s.update({"layers.0.bias": torch.zeros(5)}), "layers that fit one another"),
        (lambda s: s.pop("layers.4.bias"), r"of which \[4\] are incomplete"),
        (lambda s: [s.pop("layers.7.weight"), s.pop("layers.7.bias")], "one number at the end"),
        (lambda s: s.update({"visual.proj": torch.zeros(2)}), "got 'visual.proj'"),
        (lambda s: s.clear(), "weight and a bias per layer"),
        (lambda s: s["layers.0.weight"].fill_(math.nan), "finite weights"),
    ],
)
def test_wrong_head_is_refused(tmp_path, change, message):
    torch.save(broken(change), tmp_path / "head.pth")
    with pytest.raises(RewardError, match=message):
        load_head(str(tmp_path / "head.pth"))


def test_head_files_that_are_not_tensors_are_refused_and_not_executed(tmp_path):
    flag = tmp_path / "executed"

    class Payload:
        def __reduce__(self):
            return Path.touch, (flag,)

    torch.save({"layers.0.weight": Payload()}, tmp_path / "evil.pth")
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("no")
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("a", "b")
    for name in ("evil.pth", "text.pth", "empty.pth", "text.safetensors", "zip.pth"):
        with pytest.raises(RewardError, match="cannot be read"):
            load_head(str(tmp_path / name))
    assert not flag.exists()


def test_aesthetic_is_the_head_on_the_unit_embedding(clip, head):
    images = pictures(3)
    net = save_head(Path(head))
    embedding = CLIPVision.load(clip)(to_tensor(images)).projection.double()
    expected = net(embedding / embedding.norm(dim=-1, keepdim=True))[:, 0]
    reward = make_reward("aesthetic", clip=clip, head=head, device="cpu")
    assert reward(images, PROMPTS) == pytest.approx(expected.tolist(), abs=1e-5)
    assert reward.unit == "points"


def test_half_precision_changes_the_model_and_little_else(clip):
    images = pictures(3)
    full = make_reward("clip", clip=clip, scale=1.0)(images, PROMPTS)
    half = make_reward("clip", clip=clip, scale=1.0, dtype="bfloat16")(images, PROMPTS)
    assert half != full
    assert half == pytest.approx(full, abs=0.05)  # bfloat16 has 8 bits: 0.4 % per operation, a dozen layers


def test_head_for_another_embedding_is_refused(clip, tmp_path):
    save_head(tmp_path / "wide.pth", (24, 12, 8, 6, 4, 1))
    with pytest.raises(RewardError, match=f"embeddings of size 24, but the CLIP model .* gives {WIDTH}"):
        make_reward("aesthetic", clip=clip, head=str(tmp_path / "wide.pth"))


@pytest.mark.parametrize(("name", "scale"), [("clip", 20.0), ("pick", 1.0)])
def test_text_image_rewards_are_scaled_cosines(clip, name, scale):
    images, tower = pictures(3), CLIPVision.load(clip)
    image, text = tower(to_tensor(images)).projection, tower.text(PROMPTS)
    expected = scale * torch.nn.functional.cosine_similarity(image, text)
    assert make_reward(name, clip=clip)(images, PROMPTS) == pytest.approx(expected.tolist(), abs=1e-5)
    assert make_reward(name, clip=clip, scale=3.0)(images, PROMPTS) == pytest.approx(
        (expected * 3.0 / scale).tolist(), abs=1e-5
    )


def test_a_reward_without_a_gradient_says_so():
    assert "jpeg_compressibility" not in differentiable_names()
    with pytest.raises(RewardOptionError, match="no gradient; expected one of aesthetic"):
        make_differentiable("jpeg_compressibility")
    with pytest.raises(ValueError, match="2 designs, 1 prompts"):
        make_differentiable("symmetry")(torch.rand(2, 3, 8, 8, generator=torch.Generator()), ["one"])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("aesthetic", {"head": "no/such.pth"}, "does not exist"),
        ("aesthetic", {"head": "https://example.org/head.pth"}, "download it"),
        ("aesthetic", {"head": "head.onnx"}, "file ending in"),
        ("aesthetic", {"head": "owner/repo/ava+logos-l14-reluMSE.pth"}, "ReLU"),
        ("aesthetic", {"clip": "./missing_folder"}, "does not exist"),
        ("aesthetic", {"clip": "tests/clip_typo"}, "does not exist"),
        ("aesthetic", {"clip": "/"}, "no config.json"),
        ("clip", {"dtype": "float8"}, "`dtype` must be one of"),
        ("clip", {"device": "gpu!"}, "`device`"),
        ("clip", {"scale": "20"}, "`reward.scale`: expected float, got '20'"),
    ],
)
def test_bad_options_are_refused_before_any_model_is_loaded(monkeypatch, name, options, message):
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr(CLIPVision, "load", functools.partial(pytest.fail, "a model was loaded"))
    for act in (lambda: validate(name, options), lambda: make_reward(name, **options)):
        with pytest.raises(RewardError, match=message) as caught:
            act()
        assert isinstance(caught.value, ConfigError)


def test_defaults_are_the_published_models_and_validate_without_them(monkeypatch):
    monkeypatch.setattr(CLIPVision, "load", functools.partial(pytest.fail, "a model was loaded"))
    for name in ("aesthetic", "clip", "pick"):
        validate(name, {})
    assert AestheticOptions(head="").head == AestheticOptions().head == PUBLISHED_HEAD


def test_a_head_that_cannot_be_fetched_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(
        RewardError, match=r"head\.pth of the hub repository owner/repo.*cache.*resolve/main/head\.pth.*set `head`"
    ):
        make_reward("aesthetic", head="owner/repo/head.pth")


def test_a_folder_that_is_no_clip_model_is_refused(tmp_path, head):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RewardError, match="no CLIP model"):
        make_reward("aesthetic", clip=str(tmp_path), head=head)


def test_a_clip_model_without_a_vocabulary_is_refused(tmp_path):
    """transformers would make an empty tokenizer, and every prompt the same."""
    folder = tiny_clip(tmp_path / "clip")
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ConfigError, match=r"has no tokenizer.*no vocabulary"):
        CLIPVision.load(folder).text(["a cat"])


@pytest.mark.parametrize(
    "load",
    [
        lambda: make_reward("clip", clip="nobody/nothing"),
        lambda: make_reward("pick", clip="nobody/nothing"),
        lambda: load_tokenizer(CLIPTokenizer, "nobody/nothing"),
        lambda: load_tokenizer(BertTokenizer, "nobody/nothing"),
    ],
)
def test_a_model_that_cannot_be_fetched_says_where_it_was_looked_for_and_how_to_place_it(load, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RewardError) as caught:
        load()
    said = str(caught.value)
    assert "\n" not in said
    for part in ("nobody/nothing", f"cache {constants.HF_HUB_CACHE}", "hf download nobody/nothing --local-dir FOLDER"):
        assert part in said


def test_rewards_of_one_model_share_it(clip, monkeypatch):
    first, second = make_reward("clip", clip=clip), make_reward("pick", clip=clip)
    images = pictures(1)
    assert first(images, ["x"])[0] == pytest.approx(20 * second(images, ["x"])[0], rel=1e-6)
    monkeypatch.setattr("transformers.CLIPModel.from_pretrained", lambda *a, **k: pytest.fail("loaded again"))
    make_reward("clip", clip=clip, scale=2.0)
    make_features(clip, "projection")  # and features share it with rewards
