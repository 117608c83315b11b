"""How the rotary embedding of a network is stretched over more positions than it was first trained on.

The keys are those of the ``rope_scaling`` table in a Hugging Face ``config.json``, so that a published table can be
copied as it stands; `model.rotary` computes what they mean. A change of the base alone is `ModelSpec.rope_base`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from modelworks.spec.fields import Fraction, PositiveFloat, PositiveInt, Section

RopeType = Literal["linear", "ntk", "dynamic", "yarn", "yarn_log", "llama3"]
_YARN = (
    "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "extrapolation_factor", "truncate",
)  # fmt: skip
_NEEDED: dict[str, tuple[str, ...]] = {
    "linear": (),
    "ntk": (),
    "dynamic": ("original_max_position_embeddings",),
    "yarn": ("original_max_position_embeddings",),
    "yarn_log": ("original_max_position_embeddings",),
    "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
"""The fields that a kind cannot do without, beside `factor`."""
USED: dict[str, tuple[str, ...]] = {
    kind: (*needed, *(_YARN if kind.startswith("yarn") else ())) for kind, needed in _NEEDED.items()
}
"""The fields that mean something to a kind, beside `rope_type` and `factor`."""


def _whole(value: Any) -> Any:
    """8192.0 as 8192: older run specs wrote every number of this table with a point."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class RopeScalingSpec(Section):
    """Context extension of the rotary embedding.

    ========  =======================================================================================================
    linear    Positions are divided by `factor` (Chen et al. 2023, arXiv:2306.15595).
    ntk       The base is multiplied so that the slowest frequency is divided by `factor` ("NTK-aware").
    dynamic   As `ntk`, by as much as the sequence at hand is longer than the original context.
    yarn      Fast frequencies stay, slow ones are divided by `factor`, with a ramp between; cosine and sine are
              multiplied by the attention factor (Peng et al. 2023, arXiv:2309.00071). With ``attention_factor = 1``
              this is "NTK-by-parts".
    yarn_log  As `yarn`, the ramp between the frequencies' logarithms (a choice of Grok-2's code in SGLang).
    llama3    As `yarn` with another ramp and without the attention factor (Llama 3.1's release).
    ========  =======================================================================================================
    """

    rope_type: RopeType
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    """How many times longer the context becomes."""
    original_max_position_embeddings: Annotated[PositiveInt, BeforeValidator(_whole)] | None = None
    """The context that the network was first trained on, in tokens."""
    attention_factor: PositiveFloat | None = None
    """What cosine and sine are multiplied with; unset for `0.1 ln(factor) + 1`, or by `mscale` where that is given."""
    beta_fast: PositiveFloat | None = None
    """Frequencies that turn more often than this over the original context stay as they are; 32 if unset."""
    beta_slow: PositiveFloat | None = None
    """Frequencies that turn less often are divided by the whole factor; 1 if unset."""
    mscale: PositiveFloat | None = None
    mscale_all_dim: PositiveFloat | None = None
    """With `mscale`, the attention factor is `(0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1)`
    (DeepSeek-V3)."""
    extrapolation_factor: Fraction | None = None
    """How much of the unstretched frequencies remains where they would remain whole; 1 if unset (Grok-2)."""
    truncate: bool | None = None
    """Whether the ramp begins and ends at whole dimensions; true if unset."""
    low_freq_factor: PositiveFloat | None = None
    high_freq_factor: PositiveFloat | None = None
    """Llama 3's counterparts of `beta_slow` and `beta_fast`."""

    @model_validator(mode="before")
    @classmethod
    def _older_name(cls, values: Any) -> Any:
        """`type` is what `rope_type` was called before."""
        if isinstance(values, dict) and "type" in values and "rope_type" not in values:
            return {"rope_type" if key == "type" else key: value for key, value in values.items()}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> RopeScalingSpec:
        kind = self.rope_type
        for field in _NEEDED[kind]:
            if getattr(self, field) is None:
                raise ValueError(f"rope_scaling.{field} is missing: rope_type = {kind!r} needs it")
        for field in type(self).model_fields:
            if field not in ("rope_type", "factor", *USED[kind]) and getattr(self, field) is not None:
                accepted = ", ".join(("factor", *USED[kind]))
                raise ValueError(
                    f"rope_scaling.{field} means nothing to rope_type = {kind!r}: of the fields, {accepted} do"
                )
        for low, high in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
            least, most = getattr(self, low), getattr(self, high)
            least, most = (self.slow, self.fast) if low == "beta_slow" else (least, most)
            if least is not None and most is not None and least >= most:
                raise ValueError(f"rope_scaling.{high} = {most} is not accepted: it should be above {low} = {least}")
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError("rope_scaling.mscale and rope_scaling.mscale_all_dim are accepted together only")
        return self

    @property
    def fast(self) -> float:
        """`beta_fast`, or its default."""
        return 32.0 if self.beta_fast is None else self.beta_fast

    @property
    def slow(self) -> float:
        """`beta_slow`, or its default."""
        return 1.0 if self.beta_slow is None else self.beta_slow

    @property
    def extrapolated(self) -> float:
        """`extrapolation_factor`, or its default."""
        return 1.0 if self.extrapolation_factor is None else self.extrapolation_factor
