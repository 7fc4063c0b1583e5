"""What a rank does in steps that it computes together with others."""

from __future__ import annotations

from sapwood.executor.joint import jointly
from sapwood.schema.step import IDLE_STEP, ScheduledTokens, StepPlan


class Model:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def take_part(self) -> None:
        self.calls.append("take part")

    def end_step(self) -> None:
        self.calls.append("end step")


def test_which_steps_are_joint() -> None:
    model = Model()

    def run(plan: StepPlan) -> str:
        model.calls.append("run")
        return f"step {plan.step}"

    joint = jointly(run, model, lambda result: f"idle {result.step}, {result.token_ids}")
    entry = ScheduledTokens(
        row=0, position=0, token_ids=[1], first_page=0, pages=[0], num_output=None
    )
    assert joint(StepPlan(step=4, starts=[], scheduled=[entry])) == "step 4"
    assert model.calls == ["run", "end step"]
    model.calls.clear()
    assert joint(IDLE_STEP) == "idle -1, []"
    assert model.calls == ["take part"], "no request of this rank is computed"
    model.calls.clear()
    # Rows that end are this rank's own affair: no other rank hears of such a plan.
    assert joint(StepPlan(step=5, starts=[], scheduled=[], ends=[0])) == "step 5"
    assert model.calls == ["run"]
