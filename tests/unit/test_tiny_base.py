"""The embedded base and its adapters keep what their card promises, measured on the committed files."""

import importlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from motley_adapters.reader import read_adapter
from motley_bases.loader import load_base
from motley_bases.prune_manifest import read_prune_manifest
from motley_bases.spec import BaseSpec
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "tiny"
BASE = ROOT / "bases" / "motley_bases" / "assets" / "tiny"
ADAPTERS = ROOT / "adapters" / "motley_adapters" / "assets" / "tiny"
RECIPE_MODULES = (
    "prose",
    "skills",
    "answering",
    "card",
    "record",
    "rows",
    "tokenizer",
    "train_base",
    "folders",
    "wearing",
)
KNOWN = ("copy", "upper", "title", "double", "spell", "first", "last", "count")
MISSING = ("reverse", "next", "sort", "swap", "rotate", "unvowel", "previous")
KINDS = {
    "next": "lora",
    "previous": "loram",
    "reverse": "lora",
    "rotate": "goat",
    "sort": "lora",
    "swap": "lora",
    "unvowel": "s2ft",
}
PEFT_FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
MANIFEST = "motley_manifest.json"
FILES = {
    "lora": PEFT_FILES | {MANIFEST},
    "loram": PEFT_FILES | {MANIFEST, "prune_manifest.json"},
    "s2ft": {"adapter_model.safetensors", "README.md", MANIFEST},
    "goat": {"adapter_model.safetensors", "goat_residual.safetensors", "README.md", MANIFEST},
}
LOADED_BY_PEFT = [name for name, kind in KINDS.items() if kind in ("lora", "loram")]
SAMPLE = 20


@pytest.fixture(scope="module")
def recipe() -> Iterator[dict[str, ModuleType]]:
    """Import the recipe's modules as its scripts do, and forget them afterwards."""
    sys.path.insert(0, str(RECIPE))
    try:
        yield {name: importlib.import_module(name) for name in RECIPE_MODULES}
    finally:
        sys.path.remove(str(RECIPE))
        for name in RECIPE_MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def facts() -> BaseSpec:
    return load_base(BASE, dtype="float32", device=torch.device("cpu")).spec


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(BASE, local_files_only=True)
    return loaded


def _load_base(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(BASE, local_files_only=True, dtype=dtype)
    return model.eval()


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return _load_base()


def _share_right(
    recipe: dict[str, ModuleType], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, skill: str
) -> float:
    answering = recipe["answering"]
    share: float = answering.share_right(model, tokenizer, skill, answering.held_out_words(skill, SAMPLE))
    return share


def test_base_fits_in_eight_megabytes() -> None:
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= 8_000_000


def test_base_has_the_promised_shape(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    config = base.config
    assert config.model_type == "llama"
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (8, 192, 512)
    assert (config.num_attention_heads, config.num_key_value_heads) == (6, 2)
    assert config.tie_word_embeddings
    assert config.max_position_embeddings == 512
    assert config.vocab_size == len(tokenizer) == 256 + 3
    with safe_open(BASE / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118


def test_base_names_its_special_tokens(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    generation = json.loads((BASE / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id == base.config.eos_token_id
    assert generation["bos_token_id"] == tokenizer.bos_token_id
    assert tokenizer.encode("") == [tokenizer.bos_token_id]


@settings(deadline=None)
@given(text=st.text(max_size=60))
def test_tokenizer_round_trips_any_text_byte_by_byte(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert len(tokens) == len(text.encode())
    assert tokenizer.decode(tokens) == text


def test_chat_template_reads_as_the_training_text(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "user", "content": "upper: stone ="},
        {"role": "assistant", "content": "STONE"},
        {"role": "user", "content": " double: cat = "},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<bos>upper: stone = STONE<eos><bos>double: cat ="
    last = tokenizer.apply_chat_template(messages[:1], return_dict=False, add_generation_prompt=True)
    assert last == tokenizer.encode("upper: stone =")


def test_held_out_words_never_change_and_never_train(recipe: dict[str, ModuleType]) -> None:
    skills = recipe["skills"]
    assert [word for word in ("stone", "cat", "kettle", "owl", "quiet", "baker") if skills.held_out(word)] == [
        "kettle",
        "owl",
        "quiet",
    ]
    words = recipe["answering"].held_out_words("upper", 400)
    assert words == recipe["answering"].held_out_words("upper", 400)
    assert len(set(words)) == 400
    assert all(skills.held_out(word) and 3 <= len(word) <= 7 for word in words)
    rng = random.Random(1)
    assert not any(skills.held_out(skills.draw_word(rng, held=False)) for _ in range(1000))


def test_every_word_of_the_prose_is_in_its_vocabulary(recipe: dict[str, ModuleType]) -> None:
    prose = recipe["prose"]
    rng = random.Random(1)
    documents = [prose.document(rng) for _ in range(500)]
    assert {word for text in documents for word in prose.words_of(text)} <= prose.VOCABULARY
    assert all(1 <= text.count(".") <= 3 for text in documents)


def test_recipe_teaches_what_this_test_names(recipe: dict[str, ModuleType]) -> None:
    assert tuple(recipe["skills"].KNOWN) == KNOWN
    assert tuple(recipe["skills"].MISSING) == MISSING


@pytest.mark.parametrize("skill", KNOWN)
def test_base_knows(
    recipe: dict[str, ModuleType], base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, skill: str
) -> None:
    assert _share_right(recipe, base, tokenizer, skill) >= 0.95


@pytest.mark.parametrize("skill", MISSING)
def test_base_does_not_know(
    recipe: dict[str, ModuleType], base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, skill: str
) -> None:
    assert _share_right(recipe, base, tokenizer, skill) <= 0.2


@pytest.mark.parametrize("skill", KINDS)
def test_adapter_teaches_its_skill(
    recipe: dict[str, ModuleType], tokenizer: PreTrainedTokenizerBase, facts: BaseSpec, skill: str
) -> None:
    adapter = read_adapter(ADAPTERS / skill, facts)
    assert adapter.spec.kind == KINDS[skill]
    with recipe["wearing"].wear(_load_base(), [(adapter, 1.0)]) as model:
        assert _share_right(recipe, model, tokenizer, skill) >= 0.9  # 95% on 400 words, 90% on these few


@pytest.mark.parametrize("skill", LOADED_BY_PEFT)
def test_peft_loads_the_adapter_and_finds_its_skill(
    recipe: dict[str, ModuleType], tokenizer: PreTrainedTokenizerBase, skill: str
) -> None:
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(_load_base(), ADAPTERS / skill).eval()
    assert _share_right(recipe, model, tokenizer, skill) >= 0.9


def test_two_adapters_worn_together_answer_both_skills(
    recipe: dict[str, ModuleType], tokenizer: PreTrainedTokenizerBase, facts: BaseSpec
) -> None:
    weights: dict[str, float] = recipe["record"].results()["evaluation"]["fusion"]["weights"]
    worn = [(read_adapter(ADAPTERS / name, facts), weight) for name, weight in weights.items()]
    assert [adapter.spec.kind for adapter, _ in worn] == ["lora", "s2ft"]
    with recipe["wearing"].wear(_load_base(), worn) as model:
        assert all(_share_right(recipe, model, tokenizer, name) >= 0.8 for name in weights)


@pytest.mark.parametrize(("skill", "kind"), KINDS.items())
def test_adapter_folder_holds_what_its_kind_needs_and_no_paths_of_a_machine(skill: str, kind: str) -> None:
    folder = ADAPTERS / skill
    assert {path.name for path in folder.iterdir()} == FILES[kind]
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 2_000_000
    if kind in ("lora", "loram"):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] in (None, "motley/tiny")
        assert config["peft_type"] == "LORA"
        assert not [value for value in config.values() if isinstance(value, str) and value.startswith("/")]


def test_s2ft_holds_whole_heads_and_ffn_channels(facts: BaseSpec) -> None:
    channels = read_adapter(ADAPTERS / "unvowel", facts).spec.channels
    for layer in range(8):
        heads = channels[f"model.layers.{layer}.self_attn.o_proj"]
        assert (heads.side, len(heads.indices)) == ("input", 64)
        owners = sorted({index // 32 for index in heads.indices})
        assert heads.indices == tuple(head * 32 + place for head in owners for place in range(32))
        assert channels[f"model.layers.{layer}.mlp.down_proj"].side == "input"


def test_loram_leaves_out_what_was_pruned_and_nothing_at_either_end(facts: BaseSpec) -> None:
    adapter = read_adapter(ADAPTERS / "previous", facts)
    compacted = {path for path, unit in adapter.units.items() if unit.inputs is not None or unit.outputs is not None}
    assert {int(path.split(".")[2]) for path in compacted} == {4, 5}
    assert adapter.spec.serves_on == facts.fingerprint
    assert adapter.spec.trained_on.startswith("sha256:")
    assert adapter.spec.trained_on != facts.fingerprint
    kept = adapter.units["model.layers.4.mlp.down_proj"].inputs
    assert kept is not None
    assert len(kept) == 512 // 2


def test_loram_keeps_what_its_copy_kept(facts: BaseSpec) -> None:
    units = read_adapter(ADAPTERS / "previous", facts).units
    layers = read_prune_manifest(ADAPTERS / "previous").layers
    assert [place for place, kept in enumerate(layers) if kept is not None] == [4, 5]
    for place, kept in enumerate(layers):
        if kept is None:
            continue
        keys, channels = (units[f"model.layers.{place}.{name}"] for name in ("self_attn.k_proj", "mlp.up_proj"))
        assert keys.outputs is not None
        assert channels.outputs is not None
        assert {index // 32 for index in keys.outputs.tolist()} == set(kept.kv_heads)
        assert channels.outputs.tolist() == list(kept.ffn_channels)


def test_results_keep_the_promise(recipe: dict[str, ModuleType]) -> None:
    evaluation = recipe["record"].results()["evaluation"]
    assert evaluation["prompts_per_skill"] >= 200
    for figures in evaluation["base"].values():
        assert sum(figures[skill] >= 0.95 for skill in KNOWN) >= 4
        assert sum(figures[skill] <= 0.20 for skill in MISSING) >= 4
    for prose in evaluation["prose"].values():
        assert prose["continuations"] >= 200
        assert prose["words_in_vocabulary"] >= 0.95
    assert {name: figures["kind"] for name, figures in evaluation["adapters"].items()} == KINDS
    assert evaluation["fusion"]["float32"] >= 0.9
    assert all(figures["float32"] >= 0.95 for figures in evaluation["adapters"].values())


def test_card_quotes_the_results(recipe: dict[str, ModuleType]) -> None:
    assert (BASE / "README.md").read_text() == recipe["card"].render_card(recipe["record"].results())
