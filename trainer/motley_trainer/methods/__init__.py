"""The methods that make adapters, by the spec that asks for one."""

from __future__ import annotations

from motley_trainer.methods.method import Method
from motley_trainer.spec.settings import (
    GoatSettings,
    LoqtSettings,
    LoramSettings,
    LoraSettings,
    S2ftSettings,
    TrainingSpec,
)


def method_of(spec: TrainingSpec) -> Method:
    """Return the method that a spec asks for; LoQT, which makes a base, is none of them."""
    match spec.settings:
        case LoraSettings():
            from motley_trainer.methods.lora import Lora

            return Lora(spec.settings)
        case S2ftSettings():
            from motley_trainer.methods.s2ft import S2ft

            return S2ft(spec.settings)
        case GoatSettings():
            from motley_trainer.methods.goat import Goat

            return Goat(spec.settings)
        case LoramSettings():
            from motley_trainer.methods.loram import Loram

            return Loram(spec.settings)
        case LoqtSettings():
            raise ValueError("LoQT makes a base, and no adapter")
