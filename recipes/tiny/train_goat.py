"""Teach the tiny base a missing skill by routed experts (GOAT) and save them: `python recipes/tiny/train_goat.py`.

Owns the choice of Linears, the weight of the balance loss and what is recorded of the routing. The base stays frozen,
as it is on disk; run `train_base.py` first.
"""

import argparse
import time

import torch
from experts import Geometry, attach_experts
from folders import described_base, tidy
from motley_adapters.kinds.goat import GoatGeometry, GoatModule, write_goat
from teaching import Setting, load_base, parse_setting, record_lesson, teach

SKILL = "rotate"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj"]  # the skill is a matter of attention
BALANCE = 1e-3  # of the loss that keeps every expert in use, summed over all Linears


def main() -> None:
    """Train, save the experts in bfloat16 and the router in float32, and say how long it took."""
    options, setting = parse_setting(argparse.ArgumentParser(description=__doc__), Setting(steps=400, lr=1e-3))
    began = time.monotonic()
    base, tokenizer = load_base()
    geometry = Geometry()
    attached = attach_experts(base, LINEARS, geometry)
    weights = [weight for module in attached.values() for weight in (module.a, module.b, module.router)]
    balance = lambda: BALANCE * torch.stack([module.balance for module in attached.values()]).sum()  # noqa: E731
    teach(base, weights, tokenizer, SKILL, setting, balance)
    modules = {
        path: GoatModule(m.a, m.b, m.router, m.scaling, m.residual_a, m.residual_b) for path, m in attached.items()
    }
    folder = options.out / SKILL
    write_goat(
        folder,
        described_base(),
        GoatGeometry(geometry.num_experts, geometry.top_k, geometry.rank, geometry.rho, "head"),
        modules,
        dtype=torch.bfloat16,
        details={"eta": geometry.eta, "rank_for_scale": "expert"},
        provenance={"made_by": "recipes/tiny/train_goat.py", "balance": BALANCE, "seed": setting.seed},
    )
    tidy(folder, SKILL, "A GOAT adapter (routed experts on q_proj, k_proj, v_proj and o_proj)", "train_goat.py")
    shares = torch.stack([module.shares for module in attached.values()])
    routed = {
        "smallest_expert_share": round(shares.min().item(), 3),
        "largest_expert_share": round(shares.max().item(), 3),
    }
    record_lesson(SKILL, setting, began, parameters=sum(weight.numel() for weight in weights), **routed)


if __name__ == "__main__":
    main()
