"""Settings: where they come from, what is refused and in which words, and that the shipped files say what is true."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from liftlm.config import LiftConfig, SegmentsConfig, load_config, parse_config, to_yaml
from liftlm.errors import ConfigError
from liftlm.storage import canonical_json

CONFIGS = Path(__file__).parent.parent / "configs"


def write(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key → value; a second, naive reading of a tree of dictionaries."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {key: value for name in tree for key, value in leaves(tree[name], f"{prefix}.{name}".strip(".")).items()}


def refusal(*overrides: str, path: Path | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    error = caught.value
    assert error.exit_code == 2
    assert error.message.endswith((".", "?")) and error.message.count("\n") == 0 and error.next_step.endswith(".")
    return error


# --- where settings come from -----------------------------------------------------------------------------------------


def test_overrides_come_before_the_file_and_the_file_before_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "training: {epochs: 7, learning_rate: 0.5}\nseed: 3\n")
    config = load_config(path, ["training.epochs=9", "adapter.rank=4"])
    assert (config.training.epochs, config.training.learning_rate, config.seed, config.adapter.rank) == (9, 0.5, 3, 4)
    assert config.training.batch_tokens == LiftConfig().training.batch_tokens
    assert load_config(path).training.epochs == 7
    assert load_config() == LiftConfig()


def test_the_last_of_two_overrides_counts() -> None:
    assert load_config(None, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("text", ["", "# nothing\n", "training:\n", "training:\nmodel: null\n", "\ufeffseed: 0\n"])
def test_files_that_set_nothing(text: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    assert load_config(path) == LiftConfig()
    assert load_config(path, ["training.epochs=4"]).training.epochs == 4


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("0.0001", 1e-4), ("1.0e-4", 1e-4), ("1", 1.0), ("2E-3", 2e-3)]
)
def test_numbers_as_people_write_them(text: str, value: float, tmp_path: Path) -> None:
    assert load_config(None, [f"training.learning_rate={text}"]).training.learning_rate == value
    assert load_config(write(tmp_path, f"training:\n  learning_rate: {text}\n")).training.learning_rate == value


def test_target_modules_are_a_yaml_list(tmp_path: Path) -> None:
    wanted = ("q_proj", "v_proj")
    assert load_config(None, ["adapter.target_modules=[q_proj, v_proj]"]).adapter.target_modules == wanted
    path = write(tmp_path, "adapter:\n  target_modules:\n  - q_proj\n  - v_proj\n")
    assert load_config(path).adapter.target_modules == wanted
    assert load_config(None, ["adapter.target_modules=all-linear"]).adapter.target_modules == "all-linear"


def test_values_may_hold_equals_signs_and_spaces() -> None:
    assert load_config(None, ["model.name=a=b c"]).model.name == "a=b c"
    assert load_config(None, [" seed = 5"]).seed == 5


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("training.epoch", "training.epochs"),
        ("training.learning_rat", "training.learning_rate"),
        ("answering.max_tokens", "answering.max_new_tokens"),
        ("epochs", "training.epochs"),
        ("segment_tokens", "segments.segment_tokens"),
        ("model.learning_rate", "training.learning_rate"),
        ("per_sentence", "tasks.per_sentence"),
        ("tasks.writers", "tasks.writer"),
        ("base_url", "tasks.llm.base_url"),
        ("tasks.llm.max_tokens", "tasks.llm.budget_tokens"),
        ("trainning", "training"),
        ("trainning.epochs", "training"),
        ("Seed", "seed"),
    ],
)
def test_unknown_setting_with_the_nearest_one(key: str, meant: str, tmp_path: Path) -> None:
    for error in (refusal(f"{key}=1"), refusal(path=write(tmp_path, yaml.safe_dump(nested(key, 1))))):
        assert error.message.startswith("Unknown setting")
        assert error.message.endswith(f"did you mean '{meant}'?")
    assert str(tmp_path) in error.message


def nested(key: str, value: Any) -> Any:
    first, _, rest = key.partition(".")
    return {first: nested(rest, value) if rest else value}


@pytest.mark.parametrize("key", ["xylophone", "training.xylophone", "a.b.c.d", "training..epochs", "."])
def test_unknown_setting_like_no_other(key: str) -> None:
    error = refusal(f"{key}=1")
    assert error.message.startswith("Unknown setting") and "mean" not in error.message
    assert "lift config" in error.next_step


@pytest.mark.parametrize("text", ["1: 2", "null: 3", "training: {1: 2}", "true: 1"])
def test_keys_that_are_not_names(text: str, tmp_path: Path) -> None:
    assert refusal(path=write(tmp_path, text)).message.startswith("Unknown setting")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.epochs=two", "integer"),
        ("training.epochs=1.5", "integer"),
        ("training.epochs=yes", "integer"),
        ("training.epochs='3'", "integer"),
        ("training.epochs=", "integer"),
        ("training.epochs=[1]", "integer"),
        ("seed.x=1", "integer"),
        ("segments.segment_tokens=64.0", "integer"),
        ("model.threads=true", "integer"),
        ("training.learning_rate=fast", "number"),
        ("training.learning_rate=yes", "number"),
        ("training.learning_rate=.nan", "finite"),
        ("training.learning_rate=.inf", "finite"),
        ("training.gradient_checkpointing=perhaps", "boolean"),
        ("model.name=12", "string"),
        ("model.name=2024-01-01", "string"),
        ("model.name=null", "string"),
        ("model.name=''", "at least 1"),
        ("adapter.target_modules=q_proj", "'all-linear' or a list"),
        ("adapter.target_modules=[]", "'all-linear' or a list"),
        ("adapter.target_modules=[1]", "'all-linear' or a list"),
        ("training=5", "group of settings"),
        ("training=[1]", "group of settings"),
        ("adapter.kind=gated", "'lora', 'full', 'gated-memory' or 'prefix'"),
        ("answering.strength_with_text=2", "less than or equal to 1"),
        ("tasks.show=all", "'passage', 'retrieve' or 'truncate'"),
        ("tasks.teacher_weight=1.5", "less than or equal to 1"),
        ("adapter.initialization=zero", "'pissa' or 'olora'"),
        ("answering.context=all", "'none', 'truncate', 'retrieve' or 'recite'"),
        ("tasks.writer=gpt", "'none', 'extractive', 'self' or 'llm'"),
        ("tasks.per_sentence=0", "greater than or equal to 1"),
        ("tasks.per_sentence=2.0", "integer"),
        ("tasks.mix=1.5", "less than or equal to 1"),
        ("tasks.mix=-0.1", "greater than or equal to 0"),
        ("tasks.mix=half", "number"),
        ("tasks.first_epoch=-1", "greater than or equal to 0"),
        ("tasks.reading=yes", "number"),
        ("tasks.reading=1.01", "less than or equal to 1"),
        ("tasks.passage_characters=0", "greater than or equal to 1"),
        ("tasks.llm=5", "group of settings"),
        ("tasks.llm.concurrency=0", "greater than or equal to 1"),
        ("tasks.llm.base_url=5", "string"),
        ("tasks.llm.budget_tokens=0", "greater than or equal to 1"),
        ("training.epochs=0", "greater than or equal to 1"),
        ("training.learning_rate=0", "greater than 0"),
        ("training.warmup_fraction=1.1", "less than or equal to 1"),
        ("training.beta2=1", "less than 1"),
        ("adapter.dropout=1", "less than 1"),
        ("adapter.rank=-3", "greater than or equal to 1"),
        ("answering.top_p=0", "greater than 0"),
        ("model.window=4", "greater than or equal to 16"),
        ("segments.segment_tokens=1", "greater than or equal to 2"),
        ("seed=-1", "greater than or equal to 0"),
        ("seed=4294967296", "less than 4294967296"),
    ],
)
def test_wrong_type_or_out_of_range(override: str, words: str, tmp_path: Path) -> None:
    key, _, value = override.partition("=")
    error = refusal(override)
    assert key.removesuffix(".x") in error.message and words in error.message, error.message
    again = refusal(path=write(tmp_path, yaml.safe_dump(nested(key, yaml.safe_load(value)))))
    assert key.removesuffix(".x") in again.message and words in again.message and str(tmp_path) in again.message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["segments.overlap_tokens=2048"], ["segments.overlap_tokens (2048)", "segments.segment_tokens (2048)"]),
        (["segments.segment_tokens=64", "segments.overlap_tokens=100"], ["(100)", "(64)"]),
        (["segments.stride_tokens=3000"], ["segments.stride_tokens (3000)", "(2048)", "skip"]),
        (["segments.stride_tokens=768", "segments.overlap_tokens=768"], ["(768)", "1280", "one of the two"]),
        (["tasks.first_epoch=3", "training.epochs=3"], ["tasks.first_epoch (3)", "training.epochs (3)"]),
        (["tasks.writer=self", "tasks.answers=short"], ["tasks.answers=short", "extractive or llm"]),
        (["tasks.writer=self", "tasks.answers=mixed"], ["tasks.answers=mixed", "extractive or llm"]),
        (["tasks.first_epoch=1", "training.epochs=1"], ["tasks.first_epoch (1)", "training.epochs (1)"]),
    ],
)
def test_contradictory_settings(overrides: list[str], words: list[str]) -> None:
    error = refusal(*overrides)
    assert error.message.startswith("Contradictory settings")
    assert all(word in error.message for word in words), error.message


@pytest.mark.parametrize("override", ["nonsense", "training.epochs", "=3", " =3", ""])
def test_override_that_is_not_key_value(override: str) -> None:
    assert "not of the form key=value" in refusal(override).message


@pytest.mark.parametrize("value", ["{", "[1", "a: b: c", "2024-13-45", "!!python/object:os.system x", "'"])
def test_value_that_is_not_yaml(value: str, tmp_path: Path) -> None:
    assert "not valid YAML" in refusal(f"model.name={value}").message
    error = refusal(path=write(tmp_path, f"seed: {value}\n"))
    assert "not valid YAML" in error.message and str(tmp_path) in error.message


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "3", "just words", "'training.epochs=3'"])
def test_file_that_is_not_a_mapping(text: str, tmp_path: Path) -> None:
    assert "not a mapping" in refusal(path=write(tmp_path, text)).message


def test_setting_below_a_value(tmp_path: Path) -> None:
    error = refusal("training.epochs=2", path=write(tmp_path, "training: 5\n"))
    assert "'training' has no settings below it" in error.message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "does not exist" in refusal(path=tmp_path / "none.yaml").message
    assert "cannot be read" in refusal(path=tmp_path).message
    (tmp_path / "latin.yaml").write_bytes(b"model: {name: caf\xe9}\n")
    assert "cannot be read" in refusal(path=tmp_path / "latin.yaml").message
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "latin.yaml"):
        assert str(path) in refusal(path=path).message


def test_plain_data_is_named_by_its_origin() -> None:
    assert parse_config({"seed": 4}, "entry 12ab").seed == 4
    with pytest.raises(ConfigError, match="in entry 12ab cannot be"):
        parse_config({"seed": datetime.date(2024, 1, 1)}, "entry 12ab")


# --- segments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("segment", "overlap"), [(2048, 768), (1024, 384), (64, 24), (10, 3), (3, 1), (2, 0)])
def test_overlap_is_three_eighths_where_only_the_segment_is_given(segment: int, overlap: int) -> None:
    assert load_config(None, [f"segments.segment_tokens={segment}"]).segments.overlap_tokens == overlap


def test_the_authors_stride_of_768_is_an_overlap_of_1280() -> None:
    segments = load_config(None, ["segments.stride_tokens=768"]).segments
    assert (segments.segment_tokens, segments.overlap_tokens) == (2048, 1280)
    assert load_config(None, ["segments.stride_tokens=768", "segments.overlap_tokens=1280"]).segments == segments
    assert load_config(None, ["segments.stride_tokens=2048"]).segments.overlap_tokens == 0


@settings(deadline=None)
@given(st.integers(2, 10**6), st.data())
def test_within_keeps_short_segments_and_shares_of_shortened_ones(segment: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, segment - 1))
    limit = data.draw(st.integers(2, 2 * 10**6))
    cut = SegmentsConfig(segment_tokens=segment, overlap_tokens=overlap).within(limit)
    assert cut.segment_tokens == min(segment, limit)
    # the share that is shared, to within the one token that rounding down may lose
    assert 0 <= overlap * cut.segment_tokens - cut.overlap_tokens * segment < segment


def test_resolved_states_everything_and_leaves_the_rest_alone() -> None:
    config = load_config(None, ["segments.stride_tokens=768", "training.epochs=5", "seed=7"])
    used = config.resolved(1025, reserved=1)
    assert used.model.window == 1025
    assert used.segments == SegmentsConfig(segment_tokens=1024, overlap_tokens=640, stride_tokens=None)
    assert used.training == config.training and used.adapter == config.adapter and used.seed == 7
    assert used.resolved(1025, reserved=1) == used
    # both ways of writing the same cut are the same recipe, so the library finds one by the other
    assert (
        used.recipe()
        == load_config(None, ["segments.overlap_tokens=1280", "training.epochs=5", "seed=7"])
        .resolved(1025, reserved=1)
        .recipe()
    )


# --- recipe, freezing, round trip -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "model.window=512",
        "model.device=cpu",
        "model.dtype=float32",
        "model.threads=1",
        "model.name=other",
        "training.micro_batch_tokens=100",
        "training.gradient_checkpointing=true",
        "training.checkpoint_seconds=1",
        "tasks.llm.base_url=http://localhost:1/v1",
        "tasks.llm.model=other",
        "tasks.llm.temperature=0",
        "answering.context=none",
        "answering.strength_with_text=1",
        "answering.max_new_tokens=5",
        "answering.temperature=1",
        "answering.top_p=0.5",
        "answering.top_k=3",
        "answering.batch_tokens=5",
    ],
)
def test_recipe_leaves_out_what_does_not_change_an_adapter(override: str) -> None:
    assert load_config(None, [override]) != LiftConfig()
    assert load_config(None, [override]).recipe() == LiftConfig().recipe()


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "segments.segment_tokens=1024",
        "segments.overlap_tokens=0",
        "tasks.writer=none",
        "tasks.writer=self",
        "tasks.writer=llm",
        "tasks.per_sentence=2",
        "tasks.answers=short",
        "tasks.mix=0.5",
        "tasks.reading=0.5",
        "tasks.passage_characters=999",
        "tasks.show=truncate",
        "tasks.teacher_weight=0.5",
        "tasks.teacher_tokens=4",
        "tasks.sentences_together=2",
        "tasks.requests=7",
        "adapter.initialization=pissa",
        "adapter.kind=full",
        "adapter.rank=8",
        "adapter.alpha=8",
        "adapter.dropout=0.1",
        "adapter.target_modules=[q_proj]",
        "training.epochs=9",
        "training.learning_rate=1e-5",
        "training.batch_tokens=64",
        "training.schedule=constant",
        "training.warmup_fraction=0.5",
        "training.weight_decay=0",
        "training.beta1=0.5",
        "training.beta2=0.5",
        "training.eps=1e-6",
        "training.max_grad_norm=2",
    ],
)
def test_recipe_holds_what_changes_an_adapter(override: str) -> None:
    assert load_config(None, [override]).recipe() != LiftConfig().recipe()


def test_recipe_holds_when_tasks_join() -> None:
    recipes = [load_config(None, ["training.epochs=9", f"tasks.first_epoch={epoch}"]).recipe() for epoch in (0, 1)]
    assert recipes[0] != recipes[1]


def test_recipe_of_full_training_ignores_lora_settings() -> None:
    full = load_config(None, ["adapter.kind=full"])
    assert full.recipe() == load_config(None, ["adapter.kind=full", "adapter.rank=4", "adapter.dropout=0.5"]).recipe()


def test_recipe_without_tasks_ignores_settings_of_tasks() -> None:
    none = load_config(None, ["tasks.writer=none"])
    assert none.recipe() == load_config(None, ["tasks.writer=none", "tasks.mix=0.5", "tasks.reading=1"]).recipe()
    assert load_config(None, ["tasks.writer=none", "tasks.first_epoch=9"]).tasks.first_epoch == 9, "contradicts nothing"


def test_recipe_of_an_llm_holds_what_is_written_and_not_how() -> None:
    llm = ["tasks.writer=llm", "tasks.llm.base_url=http://localhost:1/v1", "tasks.llm.model=m"]
    recipe = load_config(None, llm).recipe()
    for same in (
        "base_url=http://localhost:2/v1",
        "api_key_variable=KEY",
        "concurrency=2",
        "timeout_seconds=1",
        "attempts=1",
    ):
        assert load_config(None, [*llm, f"tasks.llm.{same}"]).recipe() == recipe, same
    for other in ("model=n", "temperature=0", "budget_tokens=1000"):
        assert load_config(None, [*llm, f"tasks.llm.{other}"]).recipe() != recipe, other


def test_a_default_that_is_written_out_is_the_same_recipe() -> None:
    """Regression: the default 64 of a float and the 64.0 read from a file gave two library ids."""
    written = load_config(CONFIGS / "default.yaml")
    assert canonical_json(written.recipe()) == canonical_json(LiftConfig().recipe())
    assert to_yaml(written) == to_yaml(LiftConfig())


def test_frozen() -> None:
    config = LiftConfig()
    with pytest.raises(ValidationError):
        config.seed = 1
    with pytest.raises(ValidationError):
        config.training.epochs = 1
    assert hash(config) == hash(LiftConfig())


POSITIVE = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)
BELOW_ONE = st.floats(min_value=0, max_value=1, exclude_max=True)
COUNT = st.integers(1, 10**12)
NAME = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
TREES = st.fixed_dictionaries(
    {},
    optional={
        "model": st.fixed_dictionaries(
            {},
            optional={
                "name": NAME,
                "window": st.none() | st.integers(16, 10**7),
                "device": NAME,
                "dtype": st.sampled_from(["auto", "float32", "bfloat16", "float16"]),
            },
        ),
        "segments": st.one_of(
            st.fixed_dictionaries({"segment_tokens": st.integers(2, 10**6)}),
            st.integers(2, 10**6).flatmap(
                lambda size: (
                    st.fixed_dictionaries({"segment_tokens": st.just(size), "overlap_tokens": st.integers(0, size - 1)})
                    | st.fixed_dictionaries({"segment_tokens": st.just(size), "stride_tokens": st.integers(1, size)})
                )
            ),
        ),
        "tasks": st.fixed_dictionaries(
            {},
            optional={
                "writer": st.sampled_from(["none", "extractive", "self", "llm"]),
                "per_sentence": COUNT,
                "answers": st.sampled_from(["auto", "sentence"]),
                "mix": st.none() | st.just(1.0) | BELOW_ONE,
                "reading": BELOW_ONE,
                "llm": st.fixed_dictionaries({}, optional={"base_url": st.none() | NAME, "temperature": POSITIVE}),
            },
        ),
        "adapter": st.fixed_dictionaries(
            {},
            optional={
                "kind": st.sampled_from(["lora", "full"]),
                "rank": COUNT,
                "alpha": POSITIVE,
                "dropout": BELOW_ONE,
                "target_modules": st.just("all-linear") | st.lists(NAME, min_size=1),
            },
        ),
        "training": st.fixed_dictionaries(
            {},
            optional={
                "epochs": COUNT,
                "learning_rate": POSITIVE,
                "schedule": st.sampled_from(["constant", "linear", "cosine"]),
                "beta2": BELOW_ONE,
                "eps": POSITIVE,
                "gradient_checkpointing": st.booleans(),
            },
        ),
        "answering": st.fixed_dictionaries({}, optional={"temperature": POSITIVE, "top_k": st.integers(0, 10**6)}),
        "seed": st.integers(0, 2**32 - 1),
    },
)


@settings(deadline=None)
@given(TREES)
def test_to_yaml_is_read_back_as_the_same_config(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]
) -> None:
    config = LiftConfig.model_validate(tree)
    path = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path) == config
    given_values = leaves(yaml.safe_load(to_yaml(config)))
    for key, value in leaves(tree).items():
        assert given_values[key] == value, key


# --- the files in configs/ --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.y*ml")), ids=lambda path: path.name)
def test_every_shipped_file_is_valid(path: Path) -> None:
    config = load_config(path)
    assert load_config(path, ["seed=5"]).seed == 5
    written = leaves(yaml.safe_load(path.read_text(encoding="utf-8")))
    read = leaves(config.model_dump(mode="json"))
    assert {key: read[key] for key in written} == written
    assert path.read_text(encoding="utf-8").startswith("#"), "a shipped file says what it is for"


def test_default_yaml_lists_every_setting_with_its_default_and_a_comment() -> None:
    path = CONFIGS / "default.yaml"
    assert load_config(path) == LiftConfig()
    assert list(leaves(yaml.safe_load(path.read_text(encoding="utf-8")))) == settings_of(LiftConfig)
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#") and not line.endswith(":"):
            assert line.partition("  # ")[2].strip(), f"no comment: {line}"


def settings_of(branch: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in branch.model_fields.items():
        if isinstance(field.default, BaseModel):
            names += settings_of(type(field.default), f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def test_forms_of_answers_that_are_the_same_tasks_are_one_recipe() -> None:
    def recipe(writer: str, answers: str) -> dict[str, Any]:
        return load_config(None, [f"tasks.writer={writer}", f"tasks.answers={answers}"]).recipe()

    assert recipe("extractive", "mixed") == recipe("extractive", "auto")
    assert recipe("self", "sentence") == recipe("self", "auto")
    assert recipe("llm", "mixed") != recipe("llm", "auto") != recipe("llm", "short")
    assert recipe("extractive", "short") != recipe("extractive", "auto") != recipe("extractive", "sentence")
