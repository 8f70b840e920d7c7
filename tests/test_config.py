"""Configuration: what composes, what is refused and how, and what a run's identity is."""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from lra.compose import conf_dir, load, load_attentions, load_sweep
from lra.config import ModelConfig, TrainConfig
from lra.fit import check_fit
from lra.plan import plan
from lra.tasks import TASKS
from lra.tasks.listops import ListOps
from lra.typed import from_mapping
from models.attention import ATTENTIONS

ROOT = Path(__file__).parents[1]

CELLS = sorted(
    (path.stem, task.stem)
    for path in (conf_dir() / "protocol").glob("*.yaml")
    for task in path.with_suffix("").glob("*.yaml")
)


@pytest.fixture(autouse=True)
def path_of_imports(monkeypatch):
    """Keeps what `plugins=` adds to the import path out of other tests."""
    monkeypatch.setattr(sys, "path", sys.path.copy())


def message(*overrides, of=load):
    with pytest.raises(ValueError, match=r".") as error:
        of(overrides)
    return str(error.value)


@cache
def smoke():
    return load(["protocol=smoke", "attention=linear"])


# What composes


def test_every_protocol_runs_some_task_and_the_three_shipped_ones_run_listops():
    files = {path.stem for path in (conf_dir() / "protocol").glob("*.yaml")}
    assert {protocol for protocol, _ in CELLS} == files
    assert {("nystrom", "listops"), ("quick", "listops"), ("smoke", "listops")} <= set(CELLS)
    assert {task for _, task in CELLS} <= set(TASKS.names())


@pytest.mark.parametrize(("protocol", "task"), CELLS)
def test_every_protocol_composes_with_its_tasks_and_fits_every_attention(protocol, task):
    config = load([f"protocol={protocol}", f"task={task}"])
    assert config.protocol.name == protocol
    assert config.task["name"] == task
    assert config.modified == config.non_default == {}
    assert config.build_task().max_len <= config.model.max_len
    # No file is of a protocol and an attention.
    for name in ATTENTIONS.names():
        options = dataclasses.asdict(ATTENTIONS.get(name).Config())
        check_fit(dataclasses.replace(config, attention={"name": name} | options))


def test_without_overrides_the_run_is_listops_with_softmax_under_nystrom():
    config = load([])
    names = (config.task["name"], config.attention["name"], config.protocol.name, config.seed)
    assert names == ("listops", "softmax", "nystrom", 0)
    assert (config.tracker, config.wandb.mode) == ("wandb", "offline")
    assert (config.device, config.precision, config.micro_batches) == ("auto", "auto", "auto")


def test_nystroms_listops_is_that_of_the_published_code():
    config = load(["task=listops", "protocol=nystrom"])
    assert dataclasses.asdict(config.train) == {
        "steps": 5000,
        "batch_size": 32,
        "lr": 1e-4,
        "schedule": "one_cycle",
        "warmup_steps": 1000,
        "weight_decay": 0.0,
        "betas": (0.9, 0.999),
        "beta1_cycle": (0.95, 0.85),
        "eps": 1e-6,
        "clip_norm": 0.0,
        "clip_value": 0.0,
        "eval_every": 50,
        "tested": "best",
        "best_from": 0,
    }
    assert dataclasses.asdict(config.model) == {
        "layers": 2,
        "dim": 64,
        "heads": 2,
        "head_dim": 32,
        "ffn_dim": 128,
        "classifier_dims": (128,),
        "vocab_size": 32,
        "max_len": 2048,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "positions": "learned",
        "projection_bias": True,
        "norm_eps": 1e-5,
        "init": "normal",
        "pooling": "mean_all",
        "zero_is_padding": False,
        "nli_features": True,
    }
    task = config.build_task().config
    assert (task.num_train, task.num_val, task.num_test) == (96_000, 2_000, 2_000)
    assert (task.min_length, task.max_length, task.max_depth, task.max_args) == (500, 2000, 10, 10)


def test_options_of_an_attention_are_its_defaults_unless_its_paper_sets_others_for_the_task():
    configs = load_sweep(["attention=glob(*)"])
    assert [config.attention["name"] for config in configs] == ATTENTIONS.names()
    for config in configs:
        name, asked = config.attention["name"], config.attention_options
        options = dataclasses.asdict(ATTENTIONS.get(name).Config())
        changed = {key: value for key, value in asked.items() if value != options[key]}
        assert changed == ({"projections": 128} if name == "rfa" else {})
        assert config.modified == config.non_default == {}


def test_rfa_has_128_random_features_on_listops_unless_told_otherwise():
    config = load(["task=listops", "attention=rfa", "protocol=quick"])
    assert config.attention["projections"] == 128
    assert config.non_default == {}
    config = load(["task=listops", "attention=rfa", "attention.projections=64"])
    assert config.attention["projections"] == 64
    assert config.non_default == {"projections": 64}


def test_every_file_of_options_for_a_task_has_options_of_its_attention():
    files = list((conf_dir() / "task").rglob("*.yaml"))
    assert {path.relative_to(conf_dir() / "task").as_posix() for path in files} >= {
        "listops/rfa.yaml",
        "retrieval/rfa.yaml",
    }
    for path in files:
        values = OmegaConf.to_container(OmegaConf.load(path))
        assert set(values) == {"attention"}
        from_mapping(ATTENTIONS.get(path.stem).Config, values["attention"], "attention")


def test_the_encoder_refuses_an_attention_that_is_causal_alone_before_anything_starts():
    told = message("attention=rfa", "attention.gate=true")
    assert told == (
        "the encoder attends in both directions, but attention=rfa with these options has only "
        "these forms: causal."
    )


def test_what_an_attention_refuses_to_be_built_with_is_told_before_anything_starts():
    told = message("attention=rfa", "attention.pool=1,300", "model.heads=4", of=load_sweep)
    assert told == "attention.pool is 1: 4 heads need as many matrices."


def test_overrides_of_every_section_arrive():
    config = load(
        [
            "attention=linear",
            "attention.feature=relu",
            "protocol=smoke",
            "task.num_train=50",
            "model.layers=3",
            "train.lr=0.01",
            "train.betas=[0.8,0.9]",
            "seed=7",
            "device=cpu",
            "precision=fp32",
            "micro_batches=2",
            "tracker=none",
            "wandb.project=mine",
            "runs_dir=elsewhere",
        ]
    )
    assert config.attention == {"name": "linear", "feature": "relu"}
    assert config.build_task().config.num_train == 50
    assert (config.model.layers, config.train.lr, config.train.betas) == (3, 0.01, (0.8, 0.9))
    assert (config.seed, config.device, config.precision) == (7, "cpu", "fp32")
    assert (config.micro_batches, config.tracker) == (2, "none")
    assert (config.wandb.project, config.runs_dir) == ("mine", "elsewhere")


def test_the_order_of_overrides_does_not_matter():
    overrides = ["protocol=smoke", "attention=linear", "attention.feature=relu", "seed=3"]
    assert load(overrides) == load(overrides[::-1])


# What is marked as modified


def test_modified_lists_the_overridden_keys_of_the_protocol_and_nothing_else():
    config = load(
        [
            "train.lr=1e-3",
            "task.num_train=50",
            "model.layers=3",
            "model.dropout=0.1",  # the protocol's own value
            "attention=linear",
            "attention.feature=relu",
            "seed=3",
            "device=cpu",
            "precision=fp32",
            "micro_batches=2",
            "runs_dir=elsewhere",
            "tracker=none",
        ]
    )
    assert config.modified == {
        "train.lr": [1e-4, 1e-3],
        "task.num_train": [96_000, 50],
        "model.layers": [2, 3],
    }


def test_where_the_same_data_comes_from_is_no_departure_from_the_protocol():
    config = load(["task.source=official"])
    assert config.build_task().config.source == "official"
    assert config.modified == {}


def test_data_dir_may_begin_with_the_home_folder():
    assert load(["data_dir='~/data'"]).build_task().data_dir == Path.home() / "data"


def test_modified_compares_with_the_protocol_that_is_run():
    same = f"train.steps={load(['protocol=quick']).train.steps}"
    config = load(["protocol=quick", "train.lr=1e-4", same, "train.betas=[0.5,0.999]"])
    assert config.modified == {
        "train.lr": [1e-3, 1e-4],
        "train.betas": [[0.9, 0.999], [0.5, 0.999]],
    }


# What is refused


NAMES = {
    "task=listopz": ["Unknown task 'listopz'", "Did you mean listops?", "Allowed: "],
    "attention=sofmax": ["Unknown attention 'sofmax'", "Did you mean softmax?", "linear"],
    "protocol=quik": ["Unknown protocol 'quik'", "Did you mean quick?", "nystrom"],
}
KEYS = {
    "sed=1": ["Unknown key 'sed'", "Did you mean seed?"],
    "train.step=1": ["Unknown key 'train.step'", "Did you mean train.steps", "train.lr"],
    "wandb.mod=online": ["Unknown key 'wandb.mod'", "Did you mean wandb.mode"],
    "task.num_trian=5": ["Unknown key 'task.num_trian'", "Did you mean task.num_train"],
    "modle.dim=5": ["Unknown key 'modle.dim'"],
    "+train.extra=1": ["Unknown key 'train.extra'"],
    "task.name=other": ["Unknown key 'task.name'"],
    "protocol.name=other": ["Unknown key 'protocol.name'"],
    "attention.feature=relu": ["Unknown key 'attention.feature'"],
}
TYPES = {
    "train.steps=many": ["train.steps must be int, not str 'many'"],
    "train.batch_size=2.5": ["train.batch_size must be int, not float 2.5"],
    "train.eval_every=true": ["train.eval_every must be int, not bool True"],
    "train.lr=fast": ["train.lr must be float, not str 'fast'"],
    "train.betas=[0.9]": ["train.betas must be", "[0.9]"],
    "seed=": ["seed must be int"],
    "~data_dir": ["data_dir is not set"],
    "device=null": ["device must be str"],
    "micro_batches=some": ["micro_batches must be", "auto", "'some'"],
    "model.pooling=mean_al": ["model.pooling", "'mean_al'", "Did you mean mean_all"],
    "precision=fp61": ["precision", "'fp61'", "Allowed: auto, bf16, fp32"],
    "tracker=wandbb": ["tracker", "'wandbb'", "Did you mean wandb?"],
    "wandb.mode=ofline": ["wandb.mode", "'ofline'", "Did you mean offline"],
}
RANGES = {
    "train.steps=0": ["train: steps", "must be at least 1"],
    "train.lr=nan": ["train: lr must be positive"],
    "train.eps=-1": ["train: weight_decay, eps, clip_norm and clip_value must be finite and not"],
    "train.best_from=5001": ["train: best_from=5001 must lie in [0, steps], that is up to"],
    "train.betas=[0.9,1]": ["train: betas and beta1_cycle must lie in [0, 1)"],
    "task.num_test=0": ["task: num_train, num_val and num_test must be at least 1"],
    "train.warmup_steps=-1": ["train: warmup_steps must not be negative"],
    "model.dropout=1": ["model: dropout must lie in [0, 1)"],
    "model.attention_dropout=-0.1": ["model: attention_dropout must lie in [0, 1)"],
    "model.layers=0": ["model: layers", "must be at least 1"],
}
RUN_RANGES = {
    "micro_batches=0": ["micro_batches must be auto or at least 1"],
    "seed=-1": ["seed must not be negative"],
    "time_limit_minutes=-1": ["time_limit_minutes must not be negative"],
    "checkpoint_seconds=-1": ["checkpoint_seconds must not be negative"],
    "runs_at_once=0": ["runs_at_once must be at least 1"],
}
DISAGREEMENTS = {
    "model.max_len=1998": ["model.max_len is 1998", "listops", "1999 tokens"],
    "model.vocab_size=15": ["model.vocab_size is 15", "listops", "16 token ids"],
}


@pytest.mark.parametrize(
    "mistakes",
    [
        pytest.param(NAMES, id="names"),
        pytest.param(KEYS, id="keys"),
        pytest.param(TYPES, id="types"),
        pytest.param(RANGES, id="ranges"),
        pytest.param(RUN_RANGES, id="ranges of the run"),
        pytest.param(DISAGREEMENTS, id="disagreements"),
        pytest.param({"train.warmup_steps=5000": ["warmup_steps must be below steps"]}, id="=="),
        pytest.param({"train.lr=0": ["train: lr must be positive"]}, id="zero"),
        pytest.param({"task.num_train=x": ["task.num_train must be int, not str 'x'"]}, id="task"),
        pytest.param({"listops": ["Cannot read 'listops'", "key=value"]}, id="no assignment"),
        pytest.param({"a=b=c": ["Cannot read 'a=b=c'", "key=value"]}, id="two assignments"),
    ],
)
def test_every_mistake_of_a_call_is_a_line_that_says_what_is_wrong_and_what_is_allowed(mistakes):
    lines = message(*mistakes).splitlines()
    untold = [
        override
        for override, parts in mistakes.items()
        if not any(all(part in line for part in parts) for line in lines)
    ]
    assert untold == []
    assert len(lines) == len(mistakes)


def test_an_interpolation_that_leads_nowhere_is_told():
    text = message("runs_dir=${nothing}")
    assert "'nothing'" in text
    assert "runs_dir" in text


def test_the_longest_example_and_the_last_token_id_just_fit():
    load(["model.max_len=1999", "model.vocab_size=16"])


def test_an_option_of_an_attention_is_checked_like_a_key():
    text = message("attention=linear", "attention.feature=rellu")
    assert text.startswith("attention.feature: Unknown value 'rellu'. Did you mean relu")
    text = message("attention=linear", "attention.featur=relu")
    assert text.startswith("Unknown key 'attention.featur'. Did you mean attention.feature?")


def test_a_task_without_settings_under_a_protocol_is_told():
    # The group of the protocol's tasks is asked for a task that it does not have.
    from hydra.core.config_store import ConfigStore

    load([])
    store = ConfigStore.instance()
    store.store(group="task", name="unheard", node={"name": "unheard"})
    try:
        text = message("task=unheard")
    finally:
        del store.repo["task"]["unheard.yaml"]
    assert "nystrom" in text
    assert "'unheard'" in text
    assert "listops" in text


def test_an_unknown_name_hides_no_unknown_key():
    text = message("attention=sofmax", "train.lrr=1")
    assert "Did you mean softmax?" in text
    assert "train.lrr" in text


def test_an_unknown_key_hides_no_value_of_the_wrong_type():
    text = message("sed=1", "train.steps=many")
    assert "Did you mean seed?" in text
    assert "train.steps must be int" in text


def test_wrong_values_of_run_task_and_attention_are_told_at_once():
    text = message(
        "train.steps=many", "task.num_train=some", "attention=linear", "attention.feature=rellu"
    )
    assert "train.steps must be int" in text
    assert "task.num_train must be int" in text
    assert "Did you mean relu" in text


# Sweeps


def test_a_sweep_is_every_combination_in_order():
    configs = load_sweep(["attention=softmax,linear", "seed=0,1", "protocol=smoke"])
    runs = [(config.attention["name"], config.seed) for config in configs]
    assert runs == [("softmax", 0), ("softmax", 1), ("linear", 0), ("linear", 1)]
    assert {config.protocol.name for config in configs} == {"smoke"}


def test_the_files_of_a_sweep_are_composed_once_for_runs_that_share_them(monkeypatch):
    compose, composed = hydra.compose, []

    def counted(*arguments, **named):
        composed.append(arguments)
        return compose(*arguments, **named)

    monkeypatch.setattr(hydra, "compose", counted)
    configs = load_sweep(["protocol=smoke", "attention=softmax,linear", "seed=0,1", "train.lr=1,2"])
    assert len(composed) == 2
    told = [(config.attention["name"], config.seed, config.train.lr) for config in configs]
    assert told == list(itertools.product(["softmax", "linear"], [0, 1], [1.0, 2.0]))


def test_a_glob_takes_the_names_that_match():
    expected = [name for name in ATTENTIONS.names() if name.startswith("l")]
    configs = load_sweep(["attention=glob(l*)"])
    assert [config.attention["name"] for config in configs] == expected


def test_a_glob_that_matches_nothing_is_told():
    assert "glob(zz*)" in message("attention=glob(zz*)", of=load_sweep)


def test_a_range_of_seeds_is_a_sweep():
    assert [config.seed for config in load_sweep(["seed=range(4,6)"])] == [4, 5]


def test_load_refuses_a_sweep_and_says_what_to_type():
    text = message("seed=0,1")
    assert "2 runs" in text
    assert "lra train -m" in text


def test_one_bad_combination_refuses_the_whole_sweep_and_is_told_once():
    lines = message("attention=softmax,cosfomer", "seed=0,1", of=load_sweep).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("Unknown attention 'cosfomer'. Did you mean cosformer")


def test_an_option_that_only_some_attentions_have_refuses_the_sweep():
    text = message("attention=softmax,linear", "attention.feature=relu", of=load_sweep)
    assert text.startswith("Unknown key 'attention.feature'")


def test_wrong_values_of_several_combinations_are_told_at_once():
    text = message("train.steps=many,6000", "model.dim=64,wide", of=load_sweep)
    assert "'many'" in text
    assert "'wide'" in text


def test_the_test_set_may_validate_only_where_the_last_step_is_tested():
    legacy = ("task=text", "task.validation=legacy")
    assert "add train.tested=last" in message(*legacy)
    config = load([*legacy, "train.tested=last"])
    assert config.build_task().validation_is_test
    assert config.modified == {
        "task.validation": ["tenth", "legacy"],
        "train.tested": ["best", "last"],
    }
    assert load([*legacy, "protocol=google"]).train.tested == "last"


def test_an_attention_without_masks_is_refused_where_black_pixels_are_masked(monkeypatch):
    unmasked = dataclasses.replace(ATTENTIONS.get("softmax").capabilities, key_mask="none")
    monkeypatch.setattr("lra.fit.capabilities", lambda *_: unmasked)
    told = message("task=image")
    assert "attention=softmax with these options takes no masks" in told
    assert load(["task=image", "model.zero_is_padding=false"]).modified


def test_an_attention_is_checked_at_the_length_it_will_have(monkeypatch):
    lengths = []

    def note(*_, max_len, **__):
        lengths.append(max_len)

    monkeypatch.setattr("lra.fit.build_attention", note)
    load(["task=image", "protocol=google"])
    load(["task=image", "protocol=nystrom"])
    assert lengths == [1025, 1024]  # with a CLS vector, and without


# Identity


OTHER_MODEL = {
    "layers": 3,
    "dim": 17,
    "heads": 3,
    "head_dim": 9,
    "ffn_dim": 33,
    "classifier_dims": (17,),
    "vocab_size": 33,
    "max_len": 65,
    "dropout": 0.25,
    "attention_dropout": 0.25,
    "positions": "sinusoidal",
    "projection_bias": False,
    "norm_eps": 0.25,
    "init": "xavier",
    "pooling": "mean_all",
    "zero_is_padding": True,
    "nli_features": False,
}
OTHER_TRAIN = {
    "steps": 21,
    "batch_size": 17,
    "lr": 0.25,
    "schedule": "another",
    "warmup_steps": 5,
    "weight_decay": 0.25,
    "betas": (0.9, 0.98),
    "beta1_cycle": None,
    "eps": 0.25,
    "clip_norm": 0.25,
    "clip_value": 0.25,
    "eval_every": 6,
    "tested": "last",
    "best_from": 7,
}


def identity(config):
    return config.identity("fp32", "cpu")


def replaced(config, section, name, value):
    part = getattr(config, section)
    assert getattr(part, name) != value
    return dataclasses.replace(config, **{section: dataclasses.replace(part, **{name: value})})


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        *(("model", name, value) for name, value in OTHER_MODEL.items()),
        *(("train", name, value) for name, value in OTHER_TRAIN.items()),
    ],
)
def test_every_setting_of_model_and_training_is_part_of_the_identity(section, name, value):
    changed = replaced(smoke(), section, name, value)
    assert changed.folder("fp32", "cpu") != smoke().folder("fp32", "cpu")


def test_no_setting_of_model_and_training_is_forgotten_in_the_test_above():
    assert OTHER_MODEL.keys() == {field.name for field in dataclasses.fields(ModelConfig)}
    assert OTHER_TRAIN.keys() == {field.name for field in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize(
    "option",
    [field.name for field in dataclasses.fields(ListOps.Config) if field.name != "source"],
)
def test_every_option_of_the_task_is_part_of_the_identity(option):
    options = smoke().task
    changed = dataclasses.replace(smoke(), task=options | {option: options[option] + 1})
    assert changed.folder("fp32", "cpu") != smoke().folder("fp32", "cpu")


@pytest.mark.parametrize(
    "change",
    [
        ["attention=softmax"],
        ["attention=linear", "attention.feature=relu"],
        ["attention=linear", "protocol=quick"],
        ["attention=linear", "train.lr=2e-3"],
        ["attention=linear", "model.dropout=0.2"],
        ["attention=linear", "task.data_seed=1"],
    ],
)
def test_overrides_that_change_the_result_change_the_folder(change):
    changed = load(["protocol=smoke", *change]).folder("fp32", "cpu")
    assert changed.name != smoke().folder("fp32", "cpu").name


def test_precision_and_kind_of_device_are_part_of_the_identity():
    config = smoke()
    folders = {
        config.folder(precision, device)
        for precision in ("fp32", "bf16")
        for device in ("cpu", "cuda")
    }
    assert len(folders) == 4


def test_no_setting_outside_task_attention_protocol_model_and_train_is_part_of_the_identity():
    config = load(
        [
            "protocol=smoke",
            "attention=linear",
            "seed=7",
            "device=cpu",
            "precision=fp32",
            "micro_batches=2",
            "time_limit_minutes=5",
            "reuse=never",
            "tracker=none",
            "wandb.mode=online",
            "wandb.project=mine",
            "wandb.entity=me",
            "data_dir=my_data",
            "cache_dir=my_cache",
            "runs_dir=my_runs",
            "checkpoint_seconds=5",
            "runs_at_once=2",
            "keep_checkpoint=true",
            "activation_checkpointing=true",
            "compile=true",
        ]
    )
    assert identity(config) == identity(smoke())
    unchanged = {"task", "attention", "protocol", "model", "train", "plugins"}
    unchanged |= {"modified", "non_default", "tune", "trial_of"}
    for field in dataclasses.fields(config):
        if field.name not in unchanged:
            assert getattr(config, field.name) != getattr(smoke(), field.name), field.name


def test_a_number_means_the_same_setting_however_it_is_written():
    plain = load(["protocol=smoke", "train.weight_decay=1", "task.num_train=50"])
    point = load(["protocol=smoke", "train.weight_decay=1.0e0", "task.num_train=5_0"])
    assert plain.folder("fp32", "cpu") == point.folder("fp32", "cpu")


def test_the_folder_says_protocol_task_attention_seed_and_hash():
    config = load(["protocol=smoke", "attention=linear", "seed=12", "runs_dir=some/where"])
    folder = config.folder("fp32", "cpu").as_posix()
    assert re.fullmatch(r"some/where/smoke/listops/linear/s12-[0-9a-f]{8}", folder)


def test_folders_of_two_seeds_share_the_hash():
    first = dataclasses.replace(smoke(), seed=1).folder("fp32", "cpu")
    second = dataclasses.replace(smoke(), seed=2).folder("fp32", "cpu")
    assert first != second
    assert first.name.removeprefix("s1-") == second.name.removeprefix("s2-")


# Attentions alone, as `lra check` reads them


def test_an_attention_alone_has_the_options_that_are_given_and_no_others():
    assert load_attentions(["attention=rfa"]) == [("rfa", {})]
    assert load_attentions(["attention=rfa", "attention.gate=true", "attention.tau=2"]) == [
        ("rfa", {"gate": True, "tau": 2})
    ]


def test_several_attentions_are_every_combination():
    assert load_attentions(["attention=linear", "attention.feature=relu,elu+1"]) == [
        ("linear", {"feature": "relu"}),
        ("linear", {"feature": "elu+1"}),
    ]
    names = [name for name, _ in load_attentions(["attention=glob(*)"])]
    assert names == ATTENTIONS.names()


def test_mistakes_in_an_attention_alone_are_told_at_once():
    told = message("attention=cosfromer", "seed=1", "~task", of=load_attentions).splitlines()
    assert len(told) == 3
    assert "'~task': write KEY=VALUE." in told
    assert any(line.startswith("Unknown key 'seed'. Allowed: attention,") for line in told)
    assert any("Did you mean cosformer" in line for line in told)
    assert "Did you mean attention.tau?" in message(
        "attention=rfa", "attention.tu=1", of=load_attentions
    )
    assert message("plugins=[]", of=load_attentions).startswith("Name an attention: attention=")


# Plugins: in processes of their own, so that this one's registry stays as it is

PLUGIN = '''
"""An attention from outside."""

from dataclasses import dataclass

from models.attention import register_attention
from models.attention.softmax import Softmax


@register_attention("mine")
class Mine(Softmax):
    """Softmax under another name."""

    @dataclass(frozen=True)
    class Config:
        gamma: float = 1.0
'''

SCRIPT = """
import json, sys
from lra.compose import load, load_sweep

def attempt(*overrides):
    try:
        return [[c.attention, c.folder("fp32", "cpu").name] for c in load_sweep(overrides)]
    except ValueError as error:
        return str(error)

print(json.dumps([attempt(*overrides) for overrides in json.loads(sys.argv[1])]))
"""


def attempt(cwd, *calls, paths=()):
    """Returns for each list of overrides the attentions and folders of its runs, or the error."""
    # -P: as for the command `lra`, the current directory is not on the path by itself.
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, json.dumps(calls)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [ROOT, *paths]))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def install(folder, points):
    """Makes ``folder`` look like a place where a package with entry points is installed."""
    info = folder / "plugged-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[lra.attention]\n{points}\n")


@pytest.fixture(scope="module")
def plugged(tmp_path_factory):
    """What calls give from one process, with a plugin beside it and another one installed."""
    folder, site = tmp_path_factory.mktemp("plugin"), tmp_path_factory.mktemp("site")
    (folder / "my_attention.py").write_text(PLUGIN)
    (site / "their_attention.py").write_text(PLUGIN.replace('"mine"', '"theirs"'))
    install(site, "theirs = their_attention\nruin = not_installed_anywhere")
    plugin = ["protocol=smoke", "plugins=[my_attention]"]
    calls = {
        "without": ["attention=mine"],
        "installed": ["attention=theirs"],
        "broken": ["attention=ruin"],
        "default": [*plugin, "attention=mine"],
        "integer": [*plugin, "attention=mine", "attention.gamma=2"],
        "float": [*plugin, "attention=mine", "attention.gamma=2.0"],
        "wrong": [*plugin, "attention=mine", "attention.gamma=much"],
        "typo": [*plugin, "attention=mnie"],
        "glob": [*plugin, "attention=glob(min*)"],
    }
    return dict(zip(calls, attempt(folder, *calls.values(), paths=[site]), strict=True))


def test_a_plugin_in_the_current_directory_adds_an_attention_with_typed_options(plugged):
    [[attention, _]] = plugged["default"]
    assert attention == {"name": "mine", "gamma": 1.0}
    assert plugged["wrong"] == "attention.gamma must be float, not str 'much'."
    assert "Did you mean mine?" in plugged["typo"]
    assert [run[0]["name"] for run in plugged["glob"]] == ["mine"]


def test_without_its_plugin_the_attention_is_unknown(plugged):
    assert plugged["without"].startswith("Unknown attention 'mine'")


def test_an_option_of_a_plugin_changes_the_folder(plugged):
    assert plugged["default"][0][1] != plugged["float"][0][1]


def test_an_option_written_as_an_integer_is_the_same_run_as_the_float(plugged):
    assert plugged["integer"][0][1] == plugged["float"][0][1]


def test_an_installed_package_adds_an_attention(plugged):
    [[attention, _]] = plugged["installed"]
    assert attention == {"name": "theirs", "gamma": 1.0}


def test_a_broken_package_costs_nothing_but_its_own_attention(plugged):
    assert "not_installed_anywhere" in plugged["broken"]
    assert isinstance(plugged["installed"], list)


def test_a_plugin_that_is_not_there_is_told_by_name():
    text = message("plugins=[not_installed_anywhere]")
    assert text.startswith("plugins: cannot import 'not_installed_anywhere'")


def test_a_plugin_that_is_no_python_is_told_by_name(tmp_path, monkeypatch):
    (tmp_path / "ill_written_plugin.py").write_text("this is no Python\n")
    monkeypatch.chdir(tmp_path)
    assert "ill_written_plugin" in message("plugins=[ill_written_plugin]")


@pytest.mark.parametrize(
    "override",
    [
        "plugins=not_installed_anywhere",
        "plugins=null",
        "plugins=[not_installed_anywhere",
        "plugins=[not_installed_anywhere],[other]",
        "+plugins=[not_installed_anywhere]",
    ],
)
def test_plugins_that_are_no_list_of_modules_are_one_message(override):
    text = message(override)
    assert "plugins" in text
    assert "'n'" not in text  # no name is taken apart into letters


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed=range(0,1000000000000)", "more than 10,000 values"),
        ("seed=shuffle(range(1000000000000))", "more than 10,000 values"),
        ("train.lr=range(0,1,1e-300)", "more than 10,000 values"),
        ("seed=range(0,5,0)", "range(0,5,0)"),
        ("seed=" + "[" * 5000, "Cannot read"),
        ("seed=${seed}", "seed"),
        ("runs_dir=caf\udce9", r"'runs_dir=caf\udce9' is not UTF-8"),
        ("runs_dir=~nobody-of-this-name/runs", "~nobody-of-this-name"),
        ("cache_dir=~nobody-of-this-name/runs", "~nobody-of-this-name"),
    ],
)
def test_values_without_end_or_home_are_one_message(override, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        plan([override])


def test_more_runs_than_anybody_wants_are_refused_before_they_are_composed():
    with pytest.raises(ValueError, match="make 1,000,000 runs; at most 10,000"):
        load_sweep(["seed=range(1000)", "model.dim=range(1000)"])
