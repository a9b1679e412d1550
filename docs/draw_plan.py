"""Draws the picture of the README, a plan found on a mixed cluster: python docs/draw_plan.py"""

from __future__ import annotations

from pathlib import Path

from meshwright.report.plan_drawing import plan_svg
from meshwright.workflows.session import open_session, search_plan

HERE = Path(__file__).parent


def main() -> None:
    """Plan, and write plan.svg beside this file."""
    session = open_session(
        model="llama-2-7b",
        cluster=HERE.parent / "examples" / "clusters" / "a100-v100-t4.toml",
        profile=None,
        global_batch=64,
        sequence=1024,
        precision=None,
        optimizer="adamw",
    )
    svg = plan_svg(search_plan(session), session.cluster, session.model, standalone=True)
    (HERE / "plan.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
