"""Plans as people read them."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from gemmary.plan.planned import Plan

__all__ = ["show", "show_all", "size", "span"]

_WIDTH = 120


def size(count: float) -> str:
    """Bytes as people say them."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def span(seconds: float) -> str:
    """Seconds as people say them."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def _console() -> Console:
    out = Console()
    out.width = max(out.width, _WIDTH)
    return out


def _table(*columns: str) -> Table:
    table = Table(*columns, box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def show(plan: Plan) -> None:
    """One plan, whole."""
    out, job, time = _console(), plan.job, plan.time
    how = f"compiled by libtpu in {plan.compile_seconds:.0f} s" if plan.compiled else f"by arithmetic: {plan.why}"
    out.print(
        f"[bold]{job.name}[/], a step of {job.kind}, on {job.slices} x {job.topology} = {job.chips} chips ({how})"
    )
    layout = ", ".join(f"{axis} {count}" for axis, count in job.mesh.items() if count > 1)
    parts = f", in {job.accumulate} parts" if job.accumulate > 1 else ""
    again = f"; made again: {job.remat}" if job.trains else ""
    out.print(f"mesh: {layout or 'one chip'}; {job.rows} rows of {job.length} = {job.tokens:,} tokens{parts}{again}")
    for line in plan.replicated:
        out.print(line, style="dim")
    memory = _table("memory of a chip", "")
    kinds = {
        "parameters": plan.memory.parameters,
        "optimizer": plan.memory.optimizer,
        "gradients": plan.memory.gradients,
    }
    kinds |= {"activations" if job.trains else "cache": plan.memory.activations, "temporaries": plan.memory.temporaries}
    for name, count in kinds.items():
        memory.add_row(name, size(count))
    verdict = "[green]fits[/]" if plan.fits else "[red]does not fit[/]"
    memory.add_row(f"total: {verdict}", f"{size(plan.memory.total)} of {size(plan.memory.available)}")
    out.print(memory)
    _show_traffic(out, plan)
    extra = plan.made_again / plan.model_flops if plan.model_flops else 0.0
    out.print(
        f"products of a chip: {plan.model_flops / 1e12:.2f} TFLOP of the model, {extra:.1%} more made again or in whole blocks"
    )
    out.print(
        f"[bold]a step: {span(time.total)}[/], bound by {time.bound} (products {span(time.compute)}, memory {span(time.memory)}, "
        f"collectives that nothing hides {span(time.exposed)}); {job.tokens / time.total:,.0f} tokens/s"
        + (f", [bold]MFU {plan.mfu:.1%}[/]" if job.trains else "")
    )
    _show_budget(out, plan)


def _show_traffic(out: Console, plan: Plan) -> None:
    if not plan.sent:
        return
    table = _table("collectives of a chip", "along", "runs", "bytes", "time", "not hidden")
    for part in plan.sent[:12]:
        where = f"{part.axes} (between slices)" if part.crosses_slices else part.axes
        table.add_row(part.kind, where, str(part.count), size(part.bytes), span(part.seconds), span(part.exposed))
    out.print(table)


def _show_budget(out: Console, plan: Plan) -> None:
    spent = plan.spent
    if spent is None:
        return
    out.print(
        f"{spent.tokens / 1e12:g}T tokens: {spent.steps:,.0f} steps, [bold]{spent.days:.1f} days[/], {spent.chip_hours:,.0f} chip-hours, "
        f"{spent.megawatt_hours:,.0f} MWh, [bold]{spent.tonnes:,.0f} tCO2eq[/] "
        f"({spent.watts:.0f} W a chip, PUE {spent.pue}, {spent.grid} {spent.kilograms_per_kwh} kg/kWh)"
    )
    for what, source in spent.sources.items():
        out.print(f"{what}: {source}", style="dim")


def show_all(plans: list[Plan]) -> None:
    """Layouts beside one another, the best first."""
    table = _table("layout", "made again", "parts", "memory", "a step", "MFU", "bound by", "days")
    for plan in plans:
        job = plan.job
        table.add_row(
            f"data={job.data} model={job.model}", job.remat, str(job.accumulate),
            size(plan.memory.total) if plan.fits else f"[red]{size(plan.memory.total)}[/]", span(plan.time.total), f"{plan.mfu:.1%}",
            plan.time.bound, f"{plan.spent.days:.1f}" if plan.spent else "",
        )  # fmt: skip
    out = _console()
    first = plans[0].job
    out.print(
        f"[bold]{first.name}[/] on {first.slices} x {first.topology}: {first.rows} rows of {first.length} tokens a step"
    )
    out.print(table)
