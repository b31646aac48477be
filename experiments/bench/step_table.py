"""What `ablab bench step` prints."""

from typing import Any

import typer

from ablab.experiments.text import Row, table


def show_step(found: dict[str, Any]) -> None:
    subjects = found["subjects"]
    windows = f"{found['windows']} windows of {found['steps']} steps"
    warm_up = f"after {found['warm_up']} to warm up"
    typer.echo(f"{found['device']}; {windows} {warm_up}; random tokens")
    for one in subjects:
        typer.echo(f"{one['name']}: {one['about']}")
    table([_row(one) for one in subjects])
    typer.echo("")
    table([_split_row(one) for one in subjects])
    for one in subjects:
        if one["longest"]:
            typer.echo(f"\n{one['name']}: the longest kernels of a step")
            table([_kernel_row(kernel) for kernel in one["longest"]])
    show_machine(found)
    if "ratio" in found:
        pair = f"{subjects[0]['name']} / {subjects[1]['name']}"
        typer.echo(f"{pair}: {found['ratio']:.3f} x tokens/s, same run, A B B A")


def show_machine(found: dict[str, Any]) -> None:
    """What its rates are of, and the clocks of the card."""
    on_gpu = found["subjects"][0]["mfu"] is not None
    peak = f", of {found['peak_tflops']:g} TFLOP/s" if on_gpu else ""
    reached = f"matrix products reach {found['matmul_tflops']:.3g} TFLOP/s in this run"
    typer.echo(f"\nMFU counts attention causally{peak}; {reached}")
    if found["clocks"]:
        clocks = [f"{name} {value:g}" for name, value in found["clocks"].items()]
        typer.echo(f"clocks under load: {', '.join(clocks)}")


def _row(one: dict[str, Any]) -> Row:
    return rates_of(one) | {
        "kernels/step": _number(one["kernels_per_step"]),
        "launches/step": _number(one["launches_per_step"]),
        "build s": f"{one['build_seconds']:.1f}",
        "first step s": f"{one['compile_seconds']:.1f}",
    }


def rates_of(one: dict[str, Any]) -> Row:
    """How fast a subject was, and in how much memory."""
    return {
        "what": one["name"],
        "tokens/s": f"{one['tokens_per_second']:,.0f}",
        "ms/step": f"{one['ms_per_step']:.2f}",
        "MFU": percent(one["mfu"]),
        "of matmul": percent(one["mfu_measured"]),
        "peak GiB": f"{one['peak_gib']:.2f}",
    }


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _split_row(one: dict[str, Any]) -> dict[str, str]:
    phases = {phase: f"{spent:.2f}" for phase, spent in one["split_ms"].items()}
    blind = {"ms of a step": "the profiler saw no kernel"}
    data = {"host: data": f"{one['host_data_ms']:.2f}"}
    return {"what": one["name"]} | (phases or blind) | data


def _kernel_row(one: dict[str, Any]) -> dict[str, str]:
    return {
        "phase": one["phase"],
        "ms": f"{one['ms']:.3f}",
        "times": f"{one['times']:g}",
        "kernel": one["kernel"][:100],
    }
