"""A configuration refuses what cannot work, in words that help, and comes back from JSON as it was."""

import json
from dataclasses import fields

import pytest
from transformers import AutoConfig, GenerationConfig, LlamaConfig, PreTrainedConfig, Qwen3Config

from hierbd3lm.configuration_hierbd3lm import NOISE_SCHEDULES, HierBD3LMConfig

from .tiny import TINY_TOKEN_IDS, make_config

SMALL_LLAMA = {
    "model_type": "llama",
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}


def make_llama_config(**overrides) -> HierBD3LMConfig:
    lengths = {"question_len": 8, "plan_len": 8, "execution_len": 16, "block_size": 4}
    return HierBD3LMConfig(**(TINY_TOKEN_IDS | lengths | {"backbone_config": dict(SMALL_LLAMA)} | overrides))


# --------------------------------------------------------------------------------------------------------------------
# Defaults and meanings
# --------------------------------------------------------------------------------------------------------------------


def test_defaults_are_the_published_lengths_on_a_qwen3():
    config = HierBD3LMConfig()
    assert (config.question_len, config.plan_len, config.execution_len) == (256, 256, 512)
    assert (config.plan_block_size, config.execution_block_size) == (16, 16)
    assert (config.noise, config.plan_clip, config.execution_clip) == ("loglinear", [0.0, 1.0], [0.0, 1.0])
    assert config.sequence_len == 1024
    assert isinstance(config.backbone_config, Qwen3Config)
    assert config.backbone_config.to_dict() == Qwen3Config(tie_word_embeddings=False).to_dict()


def test_block_size_sets_both_and_is_not_stored():
    config = make_config(block_size=2)
    assert (config.plan_block_size, config.execution_block_size) == (2, 2)
    assert not hasattr(config, "block_size") and "block_size" not in config.to_dict()


def test_block_sizes_may_differ():
    config = make_config(block_size=None, plan_block_size=8, execution_block_size=3)
    assert (config.plan_block_size, config.execution_block_size) == (8, 3)


def test_block_size_fills_the_one_that_is_not_given_if_the_other_agrees():
    config = make_config(block_size=4, plan_block_size=4)
    assert (config.plan_block_size, config.execution_block_size) == (4, 4)


@pytest.mark.parametrize("name", ["plan_block_size", "execution_block_size"])
def test_block_size_that_contradicts_another_raises(name):
    with pytest.raises(ValueError, match=f"`block_size` sets `{name}` too: got block_size=4 and {name}=8"):
        make_config(block_size=4, **{name: 8})


def test_backbone_dict_may_be_of_any_model_type():
    config = make_llama_config()
    assert isinstance(config.backbone_config, LlamaConfig)
    assert config.backbone_config.hidden_size == 16 and config.vocab_size == 30


def test_backbone_dict_without_model_type_is_a_qwen3_and_is_left_as_it_was():
    untyped = {name: value for name, value in SMALL_LLAMA.items() if name != "model_type"}
    given = dict(untyped)
    config = make_llama_config(backbone_config=given)
    assert isinstance(config.backbone_config, Qwen3Config) and config.backbone_config.hidden_size == 16
    assert given == untyped


def test_transformers_reads_sizes_from_the_backbone():
    config = make_config()
    assert config.get_text_config() is config.get_text_config(decoder=True) is config.backbone_config
    assert config.vocab_size == config.backbone_config.vocab_size == 40


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_travel_to_the_backbone(tied):
    config = make_llama_config(tie_word_embeddings=tied)
    assert config.tie_word_embeddings is config.backbone_config.tie_word_embeddings is tied


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_default_to_those_of_the_backbone(tied):
    config = make_llama_config(backbone_config=SMALL_LLAMA | {"tie_word_embeddings": tied})
    assert config.tie_word_embeddings is config.backbone_config.tie_word_embeddings is tied


def test_attention_implementation_reaches_the_backbone():
    config = make_config(attn_implementation="eager")
    assert config._attn_implementation == config.backbone_config._attn_implementation == "eager"


def test_both_auto_classes_find_their_code():
    model_class = "modeling_hierbd3lm.HierBD3LMForBlockDiffusion"
    assert make_config().auto_map == {
        "AutoConfig": "configuration_hierbd3lm.HierBD3LMConfig",
        "AutoModel": model_class,
        "AutoModelForCausalLM": model_class,
    }


# --------------------------------------------------------------------------------------------------------------------
# Validation
# --------------------------------------------------------------------------------------------------------------------

NOT_INTEGERS = (2.0, "8", True, None, [8])
# field -> (values, the accepted range as the message says it)
REFUSED = {
    "question_len": ((-1, *NOT_INTEGERS), "an integer >= 0"),
    "plan_len": ((1, -8, *NOT_INTEGERS), "0 or an integer >= 2"),
    "execution_len": ((1, 0, -8, *NOT_INTEGERS), "an integer >= 2"),
    "noise": (("linear", "", None, 1), "one of loglinear, square, cosine, log"),
    "sampling_eps": ((0, 1, -0.1, 1.5, float("nan"), "0.1", None, True), r"a number in \(0, 1\)"),
    "plan_clip": (
        ([-0.1, 1.0], [0.0, 1.1], [0.5, 0.5], [0.9, 0.1], [0.0], [0.0, 0.5, 1.0], 0.5, "01", None, [False, True]),
        "two numbers with 0 <= low < high <= 1",
    ),
    "tie_word_embeddings": ((1, 0, "yes"), "True or False"),
} | dict.fromkeys(TINY_TOKEN_IDS, ((-1, 40, *NOT_INTEGERS), r"an integer in \[0, 39\]"))
REFUSED["execution_clip"] = REFUSED["plan_clip"]
CASES = [(name, value, accepted) for name, (values, accepted) in REFUSED.items() for value in values]


def in_words(value) -> str:
    """The value as it stands in a message, with what a pattern would read as its own escaped."""
    return repr(value).replace("[", r"\[").replace("]", r"\]").replace(".", r"\.")


@pytest.mark.parametrize(("name", "value", "accepted"), CASES, ids=[f"{name}={value!r}" for name, value, _ in CASES])
def test_value_out_of_range_raises_with_field_range_and_value(name, value, accepted):
    with pytest.raises(ValueError, match=f"^`{name}` must be {accepted}, but got {in_words(value)}$"):
        make_config(**{name: value})


@pytest.mark.parametrize("name", ["plan_block_size", "execution_block_size"])
@pytest.mark.parametrize("value", [0, -4, 25, 4.0, "4", True])
def test_block_size_outside_its_segment_raises(name, value):
    message = rf"^`{name}` must be an integer in \[1, 24\], but got {in_words(value)}$"
    with pytest.raises(ValueError, match=message):
        make_config(block_size=None, **{"plan_block_size": 4, "execution_block_size": 4, name: value})


@pytest.mark.parametrize("name", ["plan_block_size", "execution_block_size"])
def test_block_size_must_divide_its_segment(name):
    with pytest.raises(ValueError, match=f"^`{name}` must divide the segment's length 24, but got 5$"):
        make_config(block_size=None, **{"plan_block_size": 4, "execution_block_size": 4, name: 5})


def test_bounds_themselves_are_accepted():
    config = make_config(
        question_len=0, plan_len=2, execution_len=2, block_size=2, plan_clip=[0, 1], mask_token_id=39, pad_token_id=0
    )
    assert config.sequence_len == 4 and config.mask_token_id == 39
    assert make_config(plan_block_size=24, execution_block_size=1, block_size=None).plan_block_size == 24


@pytest.mark.parametrize("noise", NOISE_SCHEDULES)
def test_every_noise_schedule_is_accepted(noise):
    assert make_config(noise=noise).noise == noise


SHARED = [(a, b) for i, a in enumerate(TINY_TOKEN_IDS) for b in list(TINY_TOKEN_IDS)[i + 1 :]]


@pytest.mark.parametrize("pair", SHARED, ids=["+".join(pair) for pair in SHARED])
def test_special_tokens_differ_but_for_pad_and_end(pair):
    shared = dict.fromkeys(pair, 7)
    if set(pair) == {"pad_token_id", "end_token_id"}:
        assert make_config(**shared).pad_token_id == 7
    else:
        first, second = pair
        named = f"`({first}` must differ from `{second}|{second}` must differ from `{first})`, but both are 7"
        with pytest.raises(ValueError, match=named):
            make_config(**shared)


def test_sequence_longer_than_the_positions_of_the_backbone_raises():
    make_config(question_len=256 - 48)
    message = r"must be at most the backbone's max_position_embeddings 256, but got 209 \+ 24 \+ 24 = 257"
    with pytest.raises(ValueError, match=message):
        make_config(question_len=256 - 47)


@pytest.mark.parametrize("value", ["qwen3", 3, ["model_type", "qwen3"]])
def test_backbone_of_another_kind_raises(value):
    with pytest.raises(ValueError, match="`backbone_config` must be a PreTrainedConfig, a dict or None, but got"):
        make_config(backbone_config=value)


def test_unknown_model_type_of_the_backbone_raises():
    message = "`backbone_config` must have a `model_type` that transformers knows, but got 'qwen33'"
    with pytest.raises(ValueError, match=message):
        make_config(backbone_config={"model_type": "qwen33"})


# --------------------------------------------------------------------------------------------------------------------
# Misspelt names
# --------------------------------------------------------------------------------------------------------------------

MISSPELT = {
    "plan_blok_size": "plan_block_size",
    "exec_block_size": "execution_block_size",
    "blocksize": "block_size",
    "plan_length": "plan_len",
    "execution_length": "execution_len",
    "sampling_epsilon": "sampling_eps",
    "execution_clipping": "execution_clip",
    "mask_tokn_id": "mask_token_id",
    "tie_word_embedding": "tie_word_embeddings",
    "backbone_cfg": "backbone_config",
}


@pytest.mark.parametrize(("name", "field"), MISSPELT.items(), ids=MISSPELT.keys())
def test_misspelt_field_raises_and_names_the_right_one(name, field):
    message = f"`{name}` must be a field of HierBD3LMConfig, but is none; did you mean `{field}`"
    with pytest.raises(ValueError, match=message):
        make_config(**{name: 4})
    with pytest.raises(ValueError, match=message):
        HierBD3LMConfig.from_dict(make_config().to_dict(), **{name: 4})


UNKNOWN_IN_BACKBONE = {
    "hiden_size": ({"hiden_size": 32}, "Qwen3Config, but got 'hiden_size'; did you mean `hidden_size`"),
    "llama": ({"model_type": "llama", "num_layer": 1}, "LlamaConfig, but got 'num_layer'; did you mean `num_hidden_"),
    "gpt2": ({"model_type": "gpt2", "n_layers": 1}, "GPT2Config, but got 'n_layers'; did you mean `n_layer`"),
    "far from any": ({"zzz": 1}, "Qwen3Config, but got 'zzz'$"),
    "rope": (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "facto": 4.0}},
        "RopeParameters, but got 'facto'; did you mean `factor`",
    ),
    "rope of a layer type": (
        {"model_type": "gemma3_text", "rope_parameters": {"full_attention": {"rope_type": "default", "rope_thet": 1}}},
        "RopeParameters, but got 'rope_thet'; did you mean `rope_theta`",
    ),
    "model type": ({"model_type": "qwen33"}, "'qwen33'; did you mean `qwen3`"),
}


@pytest.mark.parametrize(("backbone", "message"), UNKNOWN_IN_BACKBONE.values(), ids=UNKNOWN_IN_BACKBONE.keys())
def test_unknown_field_of_the_backbone_is_refused_and_the_nearest_is_named(backbone, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_config(backbone_config=backbone)
    make_config(backbone_config=Qwen3Config(vocab_size=40)).save_pretrained(tmp_path)
    if "model_type" not in backbone:
        with pytest.raises(ValueError, match=message):
            HierBD3LMConfig.from_pretrained(tmp_path, backbone_config=backbone)


@pytest.mark.parametrize("model_type", ["qwen3", "gpt2", "gemma3_text", "phi3", "ministral3", "deepseek_v3", "olmo3"])
def test_every_field_that_a_backbone_saves_is_accepted(model_type):
    saved = AutoConfig.for_model(model_type).to_dict() | {"vocab_size": 40}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = make_config(backbone_config=saved | ids).backbone_config
    assert config.to_dict() == AutoConfig.for_model(**(saved | ids)).to_dict()


def test_names_of_earlier_versions_of_transformers_are_accepted():
    rope = {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    config = make_config(backbone_config=SMALL_LLAMA | rope | {"torch_dtype": "bfloat16"})
    assert config.backbone_config.rope_parameters["rope_theta"] == 5e5
    assert config.backbone_config.rope_parameters["factor"] == 4.0


def test_a_backbone_with_attributes_of_another_tool_is_loaded(tmp_path):
    config = make_config()
    config.backbone_config.hiden_size = 3
    config.save_pretrained(tmp_path)
    assert HierBD3LMConfig.from_pretrained(tmp_path).backbone_config.hiden_size == 3


@pytest.mark.parametrize(("name", "value"), [("plan_block_size", 5), ("noise", "linear"), ("plan_blok_size", 4)])
def test_a_configuration_that_could_not_be_loaded_is_not_saved(name, value, tmp_path):
    config = make_config()
    setattr(config, name, value)
    with pytest.raises(ValueError, match=f"`{name}` must "):
        config.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_saved_configuration_with_a_misspelt_name_is_loaded_without_it(tmp_path, capture_warnings):
    make_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"plan_blok_size": 8}))
    config = HierBD3LMConfig.from_pretrained(tmp_path)
    assert not hasattr(config, "plan_blok_size") and config.plan_block_size == 4
    assert ["plan_blok_size" in line for line in capture_warnings] == [True]


def test_names_that_transformers_passes_are_accepted():
    stored = {field.name for field in fields(PreTrainedConfig)} | set(GenerationConfig().to_dict())
    stored |= {"quantization_config", "use_cache", "_name_or_path", "attn_implementation", "torch_dtype"}
    stored |= {f"{role}_token_id" for role in ("bos", "eos", "sep", "cls", "unk", "decoder_start")}
    loading = dict.fromkeys(("cache_dir", "device_map", "revision", "subfolder", "token", "trust_remote_code"))
    stored -= set(TINY_TOKEN_IDS)
    assert len(stored) > 60
    config = make_config(**dict.fromkeys(stored), num_labels=3)
    _, unused = HierBD3LMConfig.from_dict(config.to_dict(), return_unused_kwargs=True, **loading)
    assert unused == loading


def test_attribute_that_another_tool_adds_comes_back(tmp_path):
    config = make_config()
    config.eos_token_id = 7  # as the Trainer of transformers does
    config.some_tool_version = "1.2"
    config.save_pretrained(tmp_path)
    again = HierBD3LMConfig.from_pretrained(tmp_path)
    assert (again.eos_token_id, again.some_tool_version) == (7, "1.2")


# --------------------------------------------------------------------------------------------------------------------
# JSON
# --------------------------------------------------------------------------------------------------------------------

ROUND_TRIPS = {
    "defaults": lambda: HierBD3LMConfig(),
    "tiny": lambda: make_config(),
    "llama": lambda: make_llama_config(tie_word_embeddings=True),
    "nothing at its default": lambda: make_config(
        block_size=None,
        plan_block_size=8,
        execution_block_size=3,
        noise="cosine",
        sampling_eps=0.01,
        plan_clip=(0.45, 0.95),
        execution_clip=[0.3, 0.8],
        tie_word_embeddings=True,
        architectures=["HierBD3LMForBlockDiffusion"],
        dtype="bfloat16",
    ),
}


@pytest.mark.parametrize("make", ROUND_TRIPS.values(), ids=ROUND_TRIPS.keys())
def test_round_trip_through_a_folder_is_exact(tmp_path, make):
    config = make()
    config.save_pretrained(tmp_path)
    again = HierBD3LMConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert type(again.backbone_config) is type(config.backbone_config)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("use_diff", [True, False])
@pytest.mark.parametrize("make", ROUND_TRIPS.values(), ids=ROUND_TRIPS.keys())
def test_round_trip_through_a_string_is_exact(make, use_diff):
    config = make()
    text = config.to_json_string(use_diff=use_diff)
    assert HierBD3LMConfig.from_dict(json.loads(text)).to_dict() == config.to_dict()


def test_fields_given_on_loading_replace_those_of_the_file(tmp_path):
    make_llama_config(tie_word_embeddings=False).save_pretrained(tmp_path)
    config = HierBD3LMConfig.from_pretrained(
        tmp_path,
        plan_block_size=2,
        plan_clip=(0.3, 0.8),
        tie_word_embeddings=True,
        backbone_config={"hidden_size": 32},
    )
    assert (config.plan_block_size, config.execution_block_size, config.plan_clip) == (2, 4, [0.3, 0.8])
    assert config.backbone_config.tie_word_embeddings is True
    assert (config.backbone_config.hidden_size, config.backbone_config.num_attention_heads) == (32, 2)
    config = HierBD3LMConfig.from_pretrained(tmp_path, block_size=8)
    assert (config.plan_block_size, config.execution_block_size) == (8, 8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"plan_block_size": 3}, "`plan_block_size` must divide the segment's length 8, but got 3"),
        ({"block_size": 5}, "`plan_block_size` must divide the segment's length 8, but got 5"),
        ({"noise": "linear"}, "`noise` must be one of"),
    ],
)
def test_fields_given_on_loading_are_checked(tmp_path, given, message):
    make_llama_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        HierBD3LMConfig.from_pretrained(tmp_path, **given)


def test_loading_leaves_the_dict_as_it_was():
    given = make_config().to_dict()
    before = json.dumps(given, default=str)
    HierBD3LMConfig.from_dict(given, block_size=8, attn_implementation="eager")
    assert json.dumps(given, default=str) == before
