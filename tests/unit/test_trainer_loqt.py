"""LoQT in the loop: when it merges, what begins anew, what it is equal to, and how it goes on after a stop."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build_model
from motley_trainer.data.batches import summed_loss
from motley_trainer.errors import DivergedError, SettingsError
from motley_trainer.job.checkpoint import Checkpoints
from motley_trainer.job.optimizers import WideAdamW, make_optimizer
from motley_trainer.job.reporting import JobCancelledError
from motley_trainer.methods.loqt import merges_to_json
from motley_trainer.spec.settings import LoqtDecomposition, LoqtSchedule, LoqtSettings, OptimizerSettings, Schedule
from small_loqts import SmallLoqt, linear_paths, small_model, whole_weights
from small_trainings import BINDING, VOCABULARY, random_data, stop_after
from torch import Tensor, nn

NEVER = LoqtSchedule.NEVER


# --- What is trained


@pytest.mark.parametrize("name", ["llama", "llama_tied", "llama_biased", "qwen2"])
def test_one_factor_of_each_linear_learns_and_all_that_is_no_matrix_of_one(name: str, tmp_path: Path) -> None:
    small = SmallLoqt.of(model=small_model(name))
    others = {name for name, _ in small.model.named_parameters() if not name.endswith("_proj.weight")}
    small.training = {"steps": 4}
    small.train(tmp_path)
    factors = {f"{path}.factor" for path in small.attached._adapted}
    assert small.attached.parameters.keys() == factors | others
    assert ("lm_head.weight" in others) == (name != "llama_tied")
    for parameter_name, parameter in small.attached.parameters.items():
        assert parameter.requires_grad, parameter_name
    for linear in small.attached._adapted.values():
        assert linear.factor.shape == linear.factor_shape
    before = dict(build_model(name, vocab_size=VOCABULARY).named_parameters())
    changed = {one for one in others if not torch.equal(small.attached.parameters[one], before[one])}
    assert {one for one in others - changed if "k_proj.bias" not in one} == set()  # whose gradient is none


def test_a_rank_that_is_not_asked_is_a_quarter_and_fits_every_side() -> None:
    assert SmallLoqt.of(rank=None).attach().facts()["rank"] == 16
    assert (
        SmallLoqt.of(model=small_model(num_key_value_heads=1, hidden_size=128), rank=None).attach().facts()["rank"]
        == 32
    )
    narrow = small_model(intermediate_size=8)
    assert SmallLoqt.of(model=narrow, rank=None).attach().facts()["rank"] == 8


def test_a_rank_above_a_side_is_refused_before_anything_is_changed() -> None:
    small = SmallLoqt.of(rank=33)  # k_proj and v_proj have 32 outputs
    with pytest.raises(SettingsError, match=r"loqt\.rank 33 .*k_proj, which is 32") as refused:
        small.attach()
    assert (refused.value.reason, refused.value.field) == ("RANK_TOO_LARGE", "loqt.rank")
    assert all(isinstance(small.model.get_submodule(path), nn.Linear) for path in linear_paths(small.model))


# --- Equal to what it should be


class GaLore:
    """One interval of GaLore, written out: Adam moments in the subspace of a weight's first gradient."""

    def __init__(self, gradient: Tensor, rank: int, scale: float, rate: float) -> None:
        self.is_right = gradient.shape[1] <= gradient.shape[0]
        left, _, right = torch.linalg.svd(gradient, full_matrices=False)
        self.rows = right[:rank] if self.is_right else left[:, :rank].T
        self.scale, self.rate, self.count = scale, rate, 0
        self.mean = self.square = torch.zeros(())

    def step(self, gradient: Tensor, betas: tuple[float, float] = (0.9, 0.999), epsilon: float = 1e-8) -> Tensor:
        """Return what is added to the weight."""
        low = gradient @ self.rows.T if self.is_right else self.rows @ gradient
        self.count += 1
        self.mean = betas[0] * self.mean + (1 - betas[0]) * low
        self.square = betas[1] * self.square + (1 - betas[1]) * low**2
        first, second = (1 - beta**self.count for beta in betas)
        # Adam of a gradient that LoQT has times `scale`; epsilon alone sees the difference.
        move = (self.mean / first) / ((self.square / second).sqrt() + epsilon / self.scale)
        return -self.rate * self.scale * (move @ self.rows if self.is_right else self.rows.T @ move)


def galore_weights(num_steps: int, rank: int, scale: float, rate: float) -> Iterator[dict[str, Tensor]]:
    """Train full weights by GaLore and the rest by AdamW, on the batches that LoQT sees."""
    model, data = small_model(), random_data()
    paths = linear_paths(model)
    model.requires_grad_(True)
    linears = {path: model.get_submodule(path).weight for path in paths}
    owned = {id(weight) for weight in linears.values()}
    others = [parameter for parameter in model.parameters() if id(parameter) not in owned]
    optimizer = torch.optim.AdamW(others, lr=rate, weight_decay=0.0)
    projected: dict[str, GaLore] = {}
    for step in range(num_steps):
        model.zero_grad()
        (batch,) = data.step(step, 4, 4)
        (summed_loss(model, batch) / batch.num_learned).backward()
        with torch.no_grad():
            for path, weight in linears.items():
                if step == 0:
                    projected[path] = GaLore(weight.grad, rank, scale, rate)
                else:
                    weight += projected[path].step(weight.grad)
        optimizer.step()
        yield {path: weight.detach().clone() for path, weight in linears.items()}


@pytest.mark.parametrize("decomposition", LoqtDecomposition)
def test_one_interval_without_quantizing_is_galore(decomposition: LoqtDecomposition) -> None:
    """The factor begins at zero; 20 steps after its subspace is chosen, weights are equal to 1e-4."""
    small = SmallLoqt.of("none", schedule=NEVER, decomposition=decomposition)
    small.optimizing = {"learning_rate": 1e-3, "max_gradient_norm": 0.0, "schedule": Schedule.CONSTANT}
    start = whole_weights(small.model, linear_paths(small.model))
    *_, wanted = galore_weights(21, 8, 0.5, 1e-3)
    deque(small.steps(21), maxlen=0)
    for path, linear in small.attached._adapted.items():
        torch.testing.assert_close(linear.merged(), wanted[path], rtol=1e-4, atol=1e-4)
        moved = (wanted[path] - start[path]).norm()
        assert float((linear.merged() - wanted[path]).norm()) < 0.01 * float(moved)


def test_rank_grows_by_one_interval_at_a_time() -> None:
    small = SmallLoqt.of("none", rank=4, merge_interval=2)
    start = whole_weights(small.model, linear_paths(small.model))
    for step in small.steps(8):
        if step % 2:  # the interval's only step that learns
            num_intervals = (step + 1) // 2
            for path, linear in small.attached._adapted.items():
                values = torch.linalg.svdvals((linear.merged() - start[path]).double())
                rank = int((values > 1e-5 * values[0]).sum())
                assert 4 * (num_intervals - 1) < rank <= 4 * num_intervals, (path, step)


# --- A merge


def test_factors_take_no_step_from_the_batch_of_a_merge_and_the_rest_does() -> None:
    small = SmallLoqt.of("nf4")
    for step in small.steps(3):
        factors = {path: linear.factor for path, linear in small.attached._adapted.items()}
        others = [
            one for one in small.attached.parameters.values() if all(one is not factor for factor in factors.values())
        ]
        if step % 2 == 0:
            assert all(factor.grad is None and factor not in small.optimizer.state for factor in factors.values())
        else:
            assert all(small.optimizer.state[factor]["step"] == 1 for factor in factors.values())
        assert all(small.optimizer.state[one]["step"] == step + 1 for one in others)


def test_moments_begin_anew_unless_they_are_kept_and_then_they_move_the_new_factor() -> None:
    after: dict[bool, dict[str, Tensor]] = {}
    for keeps in (False, True):
        small = SmallLoqt.of("nf4", keep_moments=keeps, compensation_steps=0)
        for _ in small.steps(3):  # the last is the merge, after one step of learning
            pass
        after[keeps] = {path: linear.factor.detach().clone() for path, linear in small.attached._adapted.items()}
        counts = {
            int(small.optimizer.state[linear.factor].get("step", 0)) for linear in small.attached._adapted.values()
        }
        assert counts == ({2} if keeps else {0})
    assert not any(factor.any() for factor in after[False].values())  # as it was chosen
    assert all(factor.any() for factor in after[True].values())


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_micro_batches_merge_as_one_batch_does(quantization: str) -> None:
    found = []
    for size in (4, 2):
        small = SmallLoqt.of(quantization, compensation_steps=0)
        small.training = {"micro_batch_size": size}
        for _ in small.steps(1):
            pass
        found.append({path: linear.frozen.expanded(torch.float32) for path, linear in small.attached._adapted.items()})
        assert small.attached._gathered == {}
    for path, one in found[0].items():
        other = found[1][path]
        is_rows = one.shape[0] < one.shape[1]
        spans = [factor.T @ factor if is_rows else factor @ factor.T for factor in (one, other)]
        lacks = (spans[0] - spans[1]).norm() / spans[0].norm()
        assert float(lacks) < (1e-3 if quantization == "none" else 0.2), path


def test_training_lowers_the_loss_and_what_is_settled_computes_the_same(tmp_path: Path) -> None:
    small = SmallLoqt.of("nf4")
    small.training = {"steps": 20}
    small.train(tmp_path)
    losses = [event["progress"]["loss"] for event in small.events if "progress" in event]
    assert losses[-1] < 0.6 * losses[0]
    (batch,) = small.data.step(0, 4, 4)
    with torch.no_grad():
        learned = summed_loss(small.model, batch)
        small.attached.settle()
        assert {type(small.model.get_submodule(path)) for path in linear_paths(small.model)} == {nn.Linear}
        torch.testing.assert_close(summed_loss(small.model, batch), learned, rtol=1e-4, atol=1e-3)


# --- Stopped and begun again


def all_of(folder: Path) -> dict[str, Tensor]:
    found = Checkpoints(folder, BINDING).latest()
    assert found is not None
    return dict(found.tensors)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("more", [{}, {"keep_moments": True}, {"is_8bit": True}], ids=str)
def test_a_training_that_is_begun_again_between_and_at_merges_gives_the_same_bits(
    tmp_path: Path, quantization: str, more: dict[str, Any]
) -> None:
    """Merges come before steps 3 and 6 (counted from 0): stopped after steps 2, 3, 4, 6 and 7."""
    settings = {name: value for name, value in more.items() if name != "is_8bit"}

    def make() -> SmallLoqt:
        small = SmallLoqt.of(quantization, merge_interval=3, **settings)
        small.training = {"steps": 9, "checkpoint_steps": 9}
        small.optimizing = {"has_8bit_moments": "is_8bit" in more}
        return small

    undisturbed = make()
    undisturbed.train(tmp_path / "undisturbed")
    told: list[Any] = []
    for stop in (2, 1, 1, 2, 1):
        stopped = make()
        with pytest.raises(JobCancelledError):
            stopped.train(tmp_path / "stopped", stop_after(stop))
        told += [merge for event in stopped.events if "merges" in event for merge in event["merges"]["merges"]]
    again = make()
    again.train(tmp_path / "stopped")
    told += [merge for event in again.events if "merges" in event for merge in event["merges"]["merges"]]
    wanted = merges_to_json(undisturbed.attached.merges)
    assert [merge for place, merge in enumerate(told) if merge not in told[:place]] == wanted  # each once at least
    one, other = all_of(tmp_path / "undisturbed"), all_of(tmp_path / "stopped")
    assert one.keys() == other.keys()
    assert {name for name in one if not torch.equal(one[name], other[name])} <= {"buffer.num_told"}
    assert again.attached.merges == undisturbed.attached.merges
    assert len(again.attached.merges) == 2


def test_a_checkpoint_of_a_merge_has_no_moments_of_factors(tmp_path: Path) -> None:
    small = SmallLoqt.of("nf4")
    small.training = {"steps": 3}
    tensors = small.train(tmp_path).tensors
    assert not any(name.startswith("exp_avg") and name.endswith(".factor") for name in tensors)
    assert "exp_avg.model.norm.weight" in tensors
    codes = [name for name in tensors if name.endswith("weight.codes")]
    assert len(codes) == len(small.attached._adapted)
    assert not any(name.endswith("_proj.weight") for name in tensors)  # no weight in full


def test_eight_bit_moments_are_bytes_and_go_down_with_the_loss(tmp_path: Path) -> None:
    small = SmallLoqt(model=small_model(hidden_size=128, num_hidden_layers=1))
    small.settings = LoqtSettings(rank=32, merge_interval=100)
    small.training, small.optimizing = {"steps": 12}, {"has_8bit_moments": True}
    tensors = small.train(tmp_path).tensors
    for name, parameter in small.attached.parameters.items():
        moments = [tensors[f"{part}.{name}"] for part in ("state1", "state2")]
        wanted = torch.uint8 if parameter.numel() >= 4096 else torch.float32
        assert {moment.dtype for moment in moments} == {wanted}, name
    losses = [event["progress"]["loss"] for event in small.events if "progress" in event]
    assert losses[-1] < 0.7 * losses[0]


def test_an_8_bit_optimizer_that_is_not_there_is_refused_by_its_field(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes.optim

    def step(self: object) -> None:
        raise NotImplementedError("no such step for CPUs")

    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "step", step)
    with pytest.raises(SettingsError, match="no 8-bit AdamW for the device cpu") as refused:
        make_optimizer([nn.Parameter(torch.zeros(4))], OptimizerSettings(has_8bit_moments=True))
    assert (refused.value.reason, refused.value.field) == ("NO_8BIT_OPTIMIZER", "loqt.optimizer")


def test_moments_of_a_bfloat16_base_are_wide_and_its_second_ones_move() -> None:
    small = SmallLoqt.of("nf4", model=small_model().bfloat16(), merge_interval=100)
    for _ in small.steps(4):
        pass
    assert isinstance(small.optimizer, WideAdamW)
    state = small.optimizer.state[small.attached.parameters["model.norm.weight"]]
    assert state["exp_avg_sq"].dtype == torch.float32
    for linear in small.attached._adapted.values():
        assert linear.factor.dtype == torch.bfloat16


def test_wide_adamw_is_adamw() -> None:
    one, other = (nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    wide = WideAdamW([one], lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1)
    own = torch.optim.AdamW([other], lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1)
    for step in range(5):
        for parameter, optimizer in ((one, wide), (other, own)):
            parameter.grad = torch.linspace(1, -2, 7) * (step - 1.5)
            optimizer.step()
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


# --- No number


@pytest.mark.parametrize("when", ["loss", "gradient"])
def test_no_number_at_a_merge_ends_the_training_and_the_last_checkpoint_is_good(
    tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = SmallLoqt.of("nf4", merge_interval=3)
    undisturbed.training = {"steps": 7, "checkpoint_steps": 2}
    undisturbed.train(tmp_path / "undisturbed")

    broken = SmallLoqt.of("nf4", merge_interval=3)
    broken.training = undisturbed.training
    real = type(broken.attach()).begin_step

    def begin_step(self: Any, step: int, num_batches: int) -> Any:
        begins_anew = real(self, step, num_batches)
        if step == 3:  # a merge
            at = broken.model.model.layers[1].mlp.down_proj
            if when == "loss":
                with torch.no_grad():
                    at.factor[0, 0] = float("nan")
            else:
                at.register_full_backward_hook(lambda module, of_x, of_y: (of_x[0] * float("nan"),))
        return begins_anew

    broken = SmallLoqt.of("nf4", merge_interval=3)
    broken.training = undisturbed.training
    with monkeypatch.context() as patched:
        patched.setattr(type(undisturbed.attached), "begin_step", begin_step)
        what = "at a merge, the loss is nan" if when == "loss" else "at a merge: the gradient of"
        with pytest.raises(DivergedError, match=what) as ended:
            broken.train(tmp_path / "broken")
    assert (ended.value.reason, ended.value.field) == ("LOSS_NOT_FINITE", "optimizer.learning_rate")
    if when == "gradient":
        assert "model.layers.1.mlp.up_proj" in ended.value.message or "gate_proj" in ended.value.message
    good = Checkpoints(tmp_path / "broken", BINDING).latest()
    assert good is not None
    assert good.step == 2
    again = SmallLoqt.of("nf4", merge_interval=3)
    again.training = undisturbed.training
    again.train(tmp_path / "broken")
    one, other = all_of(tmp_path / "undisturbed"), all_of(tmp_path / "broken")
    assert {name for name in one if not torch.equal(one[name], other[name])} <= {"buffer.num_told"}
