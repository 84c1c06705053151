"""Adapter sites: nothing copied, all or nothing bound, the spec's paths and no others."""

from __future__ import annotations

import pytest
import torch
from architectures import build_model
from motley_bases.attention import register_attention
from motley_bases.describe import describe
from motley_bases.errors import UnboundSlotError, UnknownSiteError, UnsupportedBaseError
from motley_bases.generation import StoredGeneration
from motley_bases.linear import AdapterEmbedding, AdapterLinear, DeltaBinding, DeltaSites, attach
from motley_bases.probe import probe
from motley_bases.spec import BaseSpec
from motley_kernels.adapter_delta.types import DeltaBatch, DeltaUnit
from motley_kernels.errors import ShapeError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Q_PROJ = "model.layers.0.self_attn.q_proj"
V_PROJ = "model.layers.0.self_attn.v_proj"


class NoTokenizer(PreTrainedTokenizerBase):
    """A tokenizer that says nothing."""

    def __init__(self) -> None:
        super().__init__()


def described(name: str) -> tuple[PreTrainedModel, BaseSpec]:
    register_attention()
    model = build_model(name, vocab_size=40)
    return model, describe(
        model, NoTokenizer(), probe(model), StoredGeneration({}, ""), name=name, fingerprint="sha256:0"
    )


def unit(base: BaseSpec, path: str, rank: int = 2) -> DeltaUnit:
    num_inputs, num_outputs = base.linears[path]
    return DeltaUnit(torch.ones(rank, num_inputs), torch.ones(rank, num_outputs), 1.0)


@pytest.fixture
def llama() -> tuple[PreTrainedModel, BaseSpec, DeltaSites]:
    model, spec = described("llama")
    return model, spec, attach(model, spec)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "phi3", "gemma2"])
def test_sites_wrap_the_weights_and_copy_none(name: str) -> None:
    model, spec = described(name)
    before = {path: parameter.data_ptr() for path, parameter in model.named_parameters(remove_duplicate=False)}
    sites = attach(model, spec)
    after = {
        path.replace(".base.", "."): parameter for path, parameter in model.named_parameters(remove_duplicate=False)
    }
    assert {path: parameter.data_ptr() for path, parameter in after.items()} == before
    assert set(sites.tables) == {*spec.linears, spec.embedding_path}
    for path in spec.linears:
        site = model.get_submodule(path)
        assert isinstance(site, AdapterLinear)
        assert site.weight is site.base.weight
        assert site.bias is site.base.bias
        assert site.sees_sampled_rows == (path == "lm_head")
    assert isinstance(model.get_submodule(spec.embedding_path), AdapterEmbedding)


def test_a_linear_that_does_not_see_every_token_is_no_site_but_is_known() -> None:
    register_attention()
    model = build_model("llama", vocab_size=40)
    model.get_submodule("model").unused = nn.Linear(64, 64)
    spec = describe(model, NoTokenizer(), probe(model), StoredGeneration({}, ""), name="llama", fingerprint="sha256:0")
    assert "model.unused" in spec.other_modules
    assert "model.unused" not in spec.linears
    assert "model.unused" not in attach(model, spec).tables


def test_attaching_twice_is_an_error(llama: tuple[PreTrainedModel, BaseSpec, DeltaSites]) -> None:
    model, spec, _ = llama
    with pytest.raises(TypeError, match="attached"):
        attach(model, spec)


def test_an_unknown_path_binds_nothing(llama: tuple[PreTrainedModel, BaseSpec, DeltaSites]) -> None:
    _, spec, sites = llama
    with pytest.raises(UnknownSiteError, match="nowhere") as caught:
        sites.bind(3, {Q_PROJ: unit(spec, Q_PROJ), "nowhere": unit(spec, Q_PROJ)})
    assert caught.value.field == "nowhere"
    assert not any(table.units for table in sites.tables.values())
    sites.bind(3, {Q_PROJ: unit(spec, Q_PROJ)})


def test_a_unit_that_does_not_fit_binds_nothing(llama: tuple[PreTrainedModel, BaseSpec, DeltaSites]) -> None:
    _, spec, sites = llama
    assert spec.linears[Q_PROJ] != spec.linears[V_PROJ]
    with pytest.raises(ShapeError):
        sites.bind(3, {Q_PROJ: unit(spec, Q_PROJ), V_PROJ: unit(spec, Q_PROJ)})
    assert not any(table.units for table in sites.tables.values())


def test_a_taken_slot_is_an_error_and_keeps_what_it_had(llama: tuple[PreTrainedModel, BaseSpec, DeltaSites]) -> None:
    _, spec, sites = llama
    first = unit(spec, Q_PROJ)
    sites.bind(3, {Q_PROJ: first})
    with pytest.raises(ValueError, match="taken"):
        sites.bind(3, {V_PROJ: unit(spec, V_PROJ)})
    assert sites.tables[Q_PROJ].units == {3: first}
    assert not sites.tables[V_PROJ].units


def test_unbinding_detaches_one_slot_everywhere(llama: tuple[PreTrainedModel, BaseSpec, DeltaSites]) -> None:
    _, spec, sites = llama
    for slot in (1, 2):
        sites.bind(slot, {path: unit(spec, path) for path in (Q_PROJ, V_PROJ)})
    sites.unbind(1)
    sites.unbind(1)
    assert {path: set(table.units) for path, table in sites.tables.items() if table.units} == {Q_PROJ: {2}, V_PROJ: {2}}


def test_a_batch_without_adapters_counts_as_none(llama: tuple[PreTrainedModel, BaseSpec, DeltaSites]) -> None:
    _, spec, sites = llama
    sites.bind(1, {Q_PROJ: unit(spec, Q_PROJ)})
    used, unused = DeltaBatch.from_sets([((1, 1.0),)]), DeltaBatch.from_sets([()])
    sites.set_batch(used, unused)
    assert sites.binding.tokens is used
    assert sites.binding.sampled is None
    sites.set_batch(unused, used)
    assert sites.binding.tokens is None
    assert sites.binding.sampled is used


def test_a_batch_that_names_an_unbound_slot_is_refused(
    llama: tuple[PreTrainedModel, BaseSpec, DeltaSites],
) -> None:
    _, spec, sites = llama
    sites.bind(1, {Q_PROJ: unit(spec, Q_PROJ)})
    sites.bind(2, {})  # an adapter that changes nothing is bound all the same
    sound, unsound = DeltaBatch.from_sets([((1, 1.0), (2, 0.5))]), DeltaBatch.from_sets([((1, 1.0), (7, 0.5))])
    sites.set_batch(sound, sound)
    for views in ((unsound, sound), (sound, unsound)):
        with pytest.raises(UnboundSlotError, match=r"\[7\]"):
            sites.set_batch(*views)
    assert sites.binding.tokens is sound
    sites.unbind(1)
    with pytest.raises(UnboundSlotError, match=r"\[1\]"):
        sites.set_batch(sound, None)


def test_arrivals_reach_the_site_of_their_path(llama: tuple[PreTrainedModel, BaseSpec, DeltaSites]) -> None:
    _, spec, sites = llama
    awaited: list[str] = []
    arrivals = {V_PROJ: lambda: awaited.append(V_PROJ)}
    sites.bind(1, {path: unit(spec, path) for path in (Q_PROJ, V_PROJ)}, arrivals)
    for path in (Q_PROJ, V_PROJ):
        sites.tables[path].await_arrival(1)
    assert awaited == [V_PROJ]


@pytest.mark.parametrize(("name", "scale"), [("llama", 1.0), ("gemma3_text", 8.0)])
def test_the_output_scale_is_what_the_rows_are_multiplied_by(name: str, scale: float) -> None:
    model, spec = described(name)
    attach(model, spec)
    site = model.get_submodule(spec.embedding_path)
    assert isinstance(site, AdapterEmbedding)
    row = site.base.weight[5]
    torch.testing.assert_close(site(torch.tensor([5]))[0], row * site.output_scale)
    assert site.output_scale == scale


def test_the_scale_is_rounded_as_the_embedding_rounds_it() -> None:
    embedding = nn.Embedding(4, 48).to(torch.bfloat16)
    embedding.register_buffer("embed_scale", torch.tensor(48**0.5))
    assert AdapterEmbedding(embedding, DeltaBinding()).output_scale == float(torch.tensor(48**0.5).bfloat16())


def test_an_embedding_scaled_by_more_than_a_number_is_refused() -> None:
    embedding = nn.Embedding(4, 48)
    embedding.register_buffer("embed_scale", torch.ones(48))
    with pytest.raises(UnsupportedBaseError, match="one number"):
        AdapterEmbedding(embedding, DeltaBinding())
