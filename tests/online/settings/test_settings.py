"""Settings refuse what cannot work, by name, and survive a round trip; the command line reaches them."""

from __future__ import annotations

import re

import pytest

from tiltopt.errors import ConfigError
from tiltopt.online.direct.settings import DirectSettings
from tiltopt.online.seeds import derive, generator, query_seed
from tiltopt.online.settings.commandline import parse
from tiltopt.online.settings.presets import PRESETS, preset
from tiltopt.online.settings.prompts import BUILT_IN, SIMPLE_ANIMALS, fill, load_prompts, prompt_of
from tiltopt.online.settings.renamed import translated
from tiltopt.online.settings.run import BUDGET, Settings, differences


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"sed": 1}, "seed"),
        ({"sampler": {"alpha": 0}}, "sampler.alpha"),
        ({"sampler": {"alpha": -1.0}}, "sampler.alpha"),
        ({"sampler": {"alpha": 0.1, "budget_nats": 8.0}}, "sampler.alpha"),
        ({"sampler": {"budget_nats": 0}}, "sampler.budget_nats"),
        ({"sampler": {"alpha": float("nan")}}, "sampler.alpha"),
        ({"sampler": {"num_particles": 0}}, "sampler.num_particles"),
        ({"sampler": {"budget_nats": -2}}, "sampler.budget_nats"),
        ({"sampler": {"target_kl": 2}}, "sampler.target_kl"),
        ({"prior": {"num_steps": 0}}, "prior.num_steps"),
        ({"prior": {"eta": 1.5}}, "prior.eta"),
        ({"prior": {"dtype": "int8"}}, "prior.dtype"),
        ({"prior": 3}, "prior"),
        ({"rounds": 1.5}, "rounds"),
        ({"rounds": True}, "rounds"),
        ({"rounds": -1}, "rounds"),
        ({"batch_size": 0}, "batch_size"),
        ({"initial_batch_size": 1}, "initial_batch_size"),
        ({"prompts": ""}, "prompts"),
        ({"prompt_template": "no place"}, "prompt_template"),
        ({"good_prompt_fraction": 2.0}, "good_prompt_fraction"),
        ({"acquisition": {"beta": -1}}, "acquisition.beta"),
        ({"reward": {"timeout_s": 0}}, "reward.timeout_s"),
        ({"tracker": "mlflow"}, "tracker"),
    ],
)
def test_impossible_settings_name_their_key(config: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"`{key}`")):
        Settings.from_config(config)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_survives_a_round_trip(name: str) -> None:
    settings = Settings.from_config(preset(name))
    assert Settings.from_config(settings.to_dict()) == settings
    assert differences(settings, settings) == []


def test_differences_name_the_keys() -> None:
    old = Settings.from_config(preset("jpeg"))
    new = Settings.from_config({**old.to_dict(), "seed": 7, "sampler": {**old.to_dict()["sampler"], "alpha": 1.0}})
    assert differences(old, new) == ["sampler.alpha: 0.1 -> 1.0", "seed: 0 -> 7"]


def test_a_run_has_a_price_or_a_budget() -> None:
    """The default and the demo a budget, the published experiments their price; one by hand takes the other's place."""

    def of(*words: str) -> tuple[float | None, float | None]:
        sampler = Settings.from_config(parse(list(words))).sampler
        return sampler.alpha, sampler.budget_nats

    assert (Settings().sampler.alpha, Settings().sampler.budget_nats) == (None, BUDGET)
    assert Settings.from_config({"sampler": {"alpha": 0.3}}).sampler.budget_nats is None
    demo, paper = "--config=config/ucb.py:demo", "--config=config/ucb.py:aesthetic"
    assert of(demo) == (None, BUDGET)
    assert of(paper) == (0.005, None)
    assert of(demo, "--config.sampler.alpha=.1") == (0.1, None)
    assert of(paper, "--config.sampler.budget_nats=9") == (None, 9.0)
    assert of(paper, "--config.sampler.alpha=None") == (None, BUDGET)
    with pytest.raises(ConfigError, match=r"expected one of alpha .* and sampler\.budget_nats"):
        of(demo, "--config.sampler.alpha=.1", "--config.sampler.budget_nats=9")
    with pytest.raises(ConfigError, match=r"`sampler.target_kl` is called `sampler.budget_nats` now"):
        of(demo, "--config.sampler.target_kl=2")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"alpha": 0.02, "target_kl": None}, (0.02, None)),
        ({"alpha": 0.02, "target_kl": 1.5}, (None, 1.5)),
        ({"alpha": None, "target_kl": 1.5}, (None, 1.5)),
    ],
)
def test_the_price_of_an_older_run_is_translated(old: dict, new: tuple) -> None:
    sampler = Settings.from_config(translated({"sampler": old})).sampler
    assert (sampler.alpha, sampler.budget_nats) == new


def test_the_command_line_overrides_known_keys_and_passes_options_on() -> None:
    arguments = ["--config=config/ucb.py:demo", "--config.sampler.num_particles=8", "--config.reward.timeout_s", "3"]
    settings = Settings.from_config(
        parse([*arguments, "--config.reward.quality=90", "--config.acquisition.adapt=false"])
    )
    assert settings.sampler.num_particles == 8
    assert settings.reward.timeout_s == 3.0
    assert settings.reward.options["quality"] == 90
    assert settings.acquisition.adapt is False


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no configuration was given"),
        (["--config=config/ucb.py:demox"], "unknown preset 'demox': expected one of demo"),
        (["--config=config/nothing.py"], "does not exist. Shipped: .*config/ucb.py"),
        (["--config=config/ucb.py", "--config.prior.num_step=3"], "Did you mean `prior.num_steps`"),
        (["--config=config/ucb.py", "--config.round=3"], "Did you mean `rounds`"),
        (["--config=config/ucb.py", "--config.rounds.x=3"], "unknown configuration key `rounds.x`"),
        (["--config=config/ucb.py:dem"], "Did you mean `demo`"),
        (["--config=config/das.py:dem"], "Did you mean `demo`"),
        (["--config=config/ubc.py:demo"], "does not exist. Did you mean `ucb`"),
        (["--config=config/ucb.py", "--config.rounds=many"], "`rounds`: expected an integer, got 'many'"),
        (["--config=config/ucb.py", "--config.seed=1.5"], "`seed`: expected an integer, got '1.5'"),
        (["--config=config/ucb.py", "--config.prior.eta=a"], "`prior.eta`: expected a number, got 'a'"),
        (["--config=config/ucb.py", "stray"], "unexpected argument 'stray'"),
        (["--config=config/ucb.py", "--verbose=1"], "unexpected argument"),
        (["--config=config/ucb.py", "--config.rounds"], "needs a value"),
    ],
)
def test_a_bad_command_line_gets_one_line(arguments: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        parse(arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["ucb", "bootstrap", "gp", "thompson", "greedy"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_config_file_takes_every_preset(file: str, name: str) -> None:
    config = parse([f"--config=config/{file}.py:{name}"])
    assert config.is_locked
    assert Settings.from_config(config).acquisition.name == (
        "mean" if "evaluate" in name or file == "greedy" else config.acquisition.name
    )


def test_prompts_are_asked_equally_often_and_depend_on_the_number_alone() -> None:
    settings = Settings(seed=3)
    asked = [prompt_of(settings, n) for n in range(1, 81)]
    assert sorted(asked[:40]) == sorted(asked[40:]) == sorted(fill("a {}", a) for a in SIMPLE_ANIMALS)
    assert asked[:40] != asked[40:]
    assert asked[17] == prompt_of(settings, 18)
    assert [prompt_of(Settings(seed=4), n) for n in range(1, 41)] != asked[:40]
    assert "an ant" in asked


def test_good_prompts_take_their_share() -> None:
    settings = Settings(good_prompt_template="A good {}.", good_prompt_fraction=0.25)
    share = sum(prompt_of(settings, n).startswith("A good") for n in range(1, 801)) / 800
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 800) ** 0.5


def test_a_prompt_file_is_used_as_it_is(tmp_path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# mine\na red house\n\n  a blue door \n")
    assert load_prompts(str(file)) == ("a red house", "a blue door")
    assert {prompt_of(Settings(prompts=str(file)), n) for n in (1, 2)} == {"a red house", "a blue door"}
    (tmp_path / "empty.txt").write_text("#\n")
    with pytest.raises(ConfigError, match="at least one prompt"):
        load_prompts(str(tmp_path / "empty.txt"))
    with pytest.raises(ConfigError, match="none of these"):
        load_prompts("no_such_list")


def test_the_lists_are_the_published_ones() -> None:
    assert len(BUILT_IN["simple_animals"]) == 40
    assert len(BUILT_IN["held_out_animals"]) == 10
    assert len(set(BUILT_IN["all_animals"])) == 50
    assert set(BUILT_IN["demo_animals"]) <= set(BUILT_IN["simple_animals"])
    assert len(BUILT_IN["demo_animals"]) == preset("demo").batch_size


def test_seeds_are_named_and_do_not_collide() -> None:
    seeds = {query_seed(s, r, i) for s in range(5) for r in range(20) for i in range(50)}
    assert len(seeds) == 5 * 20 * 50
    assert all(0 <= s < 2**63 for s in seeds)
    assert derive(0, "a", 1) != derive(0, "a1") != derive(0, "a/1", 1)
    assert generator(1, "x").initial_seed() == derive(1, "x")


@pytest.mark.parametrize("source", ["ucb.py:demo", "das.py:demo"])
def test_a_picture_may_be_wider_than_high(source: str) -> None:
    def size(text: str) -> object:
        config = parse(["--config", f"config/{source}", f"--config.prior.size={text}"])
        settings = (Settings if source.startswith("ucb") else DirectSettings).from_config(config)
        assert type(settings).from_config(settings.to_dict()) == settings
        return settings.prior.arguments()["size"]

    assert [size(text) for text in ("0", "512", "(512, 768)", "[512,768]")] == [None, 512, (512, 768), (512, 768)]
    for wrong in ("(512,)", "(512, 0)", "(1, 2, 3)", "(5.5, 4)", "-1"):
        with pytest.raises(ConfigError, match=r"`prior.size`: expected a number of pixels, \(height, width\)"):
            size(wrong)


def test_none_takes_a_presets_number_back() -> None:
    demo = ["--config", "config/ucb.py:demo"]
    assert Settings.from_config(parse(demo)).sampler.options["kappa"] == 20.0
    assert Settings.from_config(parse([*demo, "--config.sampler.kappa=None"])).sampler.options["kappa"] is None
    with pytest.raises(ConfigError, match=r"`rounds`: expected int, at least 0, got None"):
        Settings.from_config(parse([*demo, "--config.rounds=None"]))
