"""How a run behaves, by calculation: pure functions from specs to frozen results."""

from modelworks.plan.step import StepPrediction, flop_per_token, predict

__all__ = ["StepPrediction", "flop_per_token", "predict"]
