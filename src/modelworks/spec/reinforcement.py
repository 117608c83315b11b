"""What reinforcement with checkable answers is told: the tasks, what a reply is worth, and how it is learnt from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from modelworks.spec.fields import Duration, PositiveFloat, PositiveInt, Section

_NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class TasksSpec(Section):
    """Arithmetic that is made up, for `data.source = "tasks"` without `data.files`."""

    operations: Annotated[list[Literal["+", "-", "*"]], Field(min_length=1)] = ["+", "-"]
    """One of them is drawn for each pair of neighbours; `*` binds closer."""
    terms: Annotated[int, Field(ge=2, le=8)] = 2
    """How many numbers a problem has."""
    digits: Annotated[int, Field(ge=1, le=9)] = 2
    """How many digits a number has at most."""
    count: PositiveInt = 10_000
    """How many problems are drawn; those that come twice are left out."""
    prompt: str = "What is {problem}? Write the result between <answer> and </answer>."
    """What the user says, with `{problem}` where it stands."""

    @model_validator(mode="after")
    def _states_the_problem(self) -> TasksSpec:
        if "{problem}" not in self.prompt:
            raise ValueError(f"tasks.prompt = {self.prompt!r} is not accepted: one with {{problem}} in it is")
        return self


class RewardsSpec(Section):
    """What a reply is worth: the weighted sum of values from 0 to 1, of those that its task has."""

    answer: _NonNegativeFloat = 1.0
    """Weight of the right answer, for tasks that have one."""
    tests: _NonNegativeFloat = 1.0
    """Weight of passing the tests, for tasks that have some."""
    format: _NonNegativeFloat = 0.1
    """Weight of an answer that stands between the marks, once, with nothing behind it; for tasks that have an answer.
    """
    marks: list[str] = ["<answer>", "</answer>"]
    """What the answer stands between. Without marks, it is the reply's last number, or else the whole reply."""
    tests_time: Duration = 5.0
    """How long a reply's code and its tests may run."""

    @model_validator(mode="after")
    def _usable(self) -> RewardsSpec:
        if len(self.marks) not in (0, 2) or not all(self.marks):
            raise ValueError(f"rewards.marks = {self.marks} is not accepted: an opening and a closing one are, or none")
        if not self.marks and self.format:
            raise ValueError("rewards.format is not accepted above 0 without rewards.marks")
        if not self.tests_time:
            raise ValueError("rewards.tests_time = 0 is not accepted: more is")
        return self


class GrpoSpec(Section):
    """Group relative policy optimization (Shao et al. 2024, DeepSeekMath, arXiv:2402.03300, section 4.1): several
    replies to each prompt, of which those that are worth more than the others become likelier."""

    group: Annotated[int, Field(ge=2)] = 8
    """Replies to each prompt; a step has `train.global_batch` of them in all."""
    max_new_tokens: PositiveInt = 64
    """A reply is cut after so many."""
    temperature: PositiveFloat = 1.0
    """What logits are divided by, when replies are drawn and when their tokens' probabilities are reckoned."""
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2
    clip_high: PositiveFloat = 0.2
    """A token's probability gains nothing beyond 1 - `clip_low` and 1 + `clip_high` times what it was when it was drawn
    (Schulman et al. 2017, arXiv:1707.06347, eq. 7; two bounds as in DAPO, Yu et al. 2025, arXiv:2503.14476, eq. 10)."""
    kl: _NonNegativeFloat = 0.0
    """Weight of the divergence from the network without its adapter (DeepSeekMath, eq. 4)."""
    divide_by_deviation: bool = True
    """Whether a reply's advantage, its reward less the group's mean, is divided by the group's standard deviation
    (DeepSeekMath); not in Dr. GRPO (Liu et al. 2025, arXiv:2503.20783), since it weighs easy and hard prompts more."""
    mean_over: Literal["replies", "tokens", "room"] = "replies"
    """What the loss of tokens is a mean over: `replies`, each reply's mean (DeepSeekMath, eq. 3); `tokens`, all of the
    step (DAPO); `room`, `max_new_tokens` for each reply, so that long ones don't weigh less (Dr. GRPO)."""
    updates: PositiveInt = 1
    """Optimizer updates with the replies of a step."""
    engine: Literal["llama.cpp", "trainer"] = "llama.cpp"
    """What draws replies: llama.cpp, as it serves models, with the network's weights of that moment; or the network
    that is trained, for those that llama.cpp doesn't load."""
