"""How a run behaves, by calculation: pure functions from specs to frozen results."""

from modelworks.plan.step import StepPrediction, predict

__all__ = ["StepPrediction", "predict"]
