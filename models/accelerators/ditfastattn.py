"""DiTFastAttn: share or window self-attention as a searched plan says (Yuan et al., NeurIPS 2024, arXiv:2406.08552)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field, InstanceOf, PrivateAttr
from pydantic.json_schema import SkipJsonSchema

from models.accelerators.base import Accelerator
from models.errors import GuidanceRequired, PlanMismatch, cut
from models.networks.sites import attention
from models.reuse.plans import Recall, Reuse, Shared, StepPlan, Window
from models.reuse.sites import Sites
from models.search.attention_plan import Method, Plan
from models.spec import Family, ModelSpec, RunSpec


class DiTFastAttn(Accelerator):
    """Follow a plan: the name under which the model knows it, or in Python the `Plan` itself.

    Methods: `full`; `ast` returns the output of the last step that computed one; `wa-rs` attends in a band and adds the
    residual (full - band) of the last full step; `asc` computes the conditional row and gives it to its unconditional
    twin; `wa-rs+asc` both.
    """

    mode: Literal["ditfastattn"] = "ditfastattn"
    plan_: str | SkipJsonSchema[InstanceOf[Plan]] = Field(alias="plan", description="A plan's registered name.")
    _plan: Plan | None = PrivateAttr(None)

    families: ClassVar[tuple[Family, ...]] = ("dit",)
    claims: ClassVar[frozenset[str]] = frozenset({"attention"})
    title: ClassVar[str] = "Share self-attention across steps and guidance, or window it, as a searched plan says."
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.08552"

    def bind(self, model: ModelSpec, run: RunSpec) -> Self:
        """Look the plan up and hold it against the run: a plan fits one model, scheduler, step count and size."""
        plan = model.plans.get(self.plan_) if isinstance(self.plan_, str) else self.plan_
        if plan is None:
            known = ", ".join(model.plans) or "none"
            raise PlanMismatch(
                "acceleration.plan", f"{model.name} has no plan {cut(str(self.plan_))!r} (registered: {known})"
            )
        if plan.shares_guidance and not run.guided:
            raise GuidanceRequired(
                "acceleration.plan", "the plan shares attention across guidance, which this run has not"
            )
        facts = {
            "model": (plan.config_hash, model.config_hash),
            "blocks": (len(plan.table[0]), model.depth),
            "scheduler": (plan.scheduler, run.scheduler),
            "num_inference_steps": (plan.num_inference_steps, run.num_inference_steps),
            "steps": (len(plan.table), run.num_steps),
            "tokens": (plan.tokens, run.tokens),
            "guidance": (plan.guidance, run.guided),
        }
        for name, (wanted, given) in facts.items():
            if wanted != given:
                raise PlanMismatch("acceleration.plan", f"{name}: the plan is for {wanted}, the request has {given}")
        can = {"full", *possible(model.sites)}
        for method in sorted({method for row in plan.table for method in row} - can):
            raise PlanMismatch("acceleration.plan", f"the plan has {method}, which {model.name} cannot do")
        bound = self.model_copy()
        bound._plan = plan
        return bound

    def plan(self, step: int, num_steps: int) -> StepPlan:
        """The plan's row for this step. Bound accelerators only."""
        if self._plan is None:
            raise ValueError("bind the accelerator to a model first")
        return attention_plan(self._plan.table[step], self._plan.window)


def attention_plan(methods: Sequence[Method], window: int) -> StepPlan:
    """One method a block as a step plan; `window` is the half width of the bands, in tokens."""
    reuse = _reuse(window)
    return StepPlan({attention(k): reuse[method] for k, method in enumerate(methods) if method != "full"})


def possible(sites: Sites) -> tuple[Method, ...]:
    """The methods that the attentions of a network can do, but for the full one."""
    return tuple(method for method, reuse in _reuse(1).items() if reuse.name in sites.understands(attention(0)))


def _reuse(window: int) -> dict[Method, Reuse]:
    band = Window(window)
    return {"ast": Recall(), "wa-rs": band, "asc": Shared(), "wa-rs+asc": Shared(band)}
