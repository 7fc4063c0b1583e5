"""`sapwood kernels`: the implementations of the ops, and the suite that they have to pass."""

from __future__ import annotations

import click

DTYPES = ("float32", "bfloat16", "float16")


@click.group()
def kernels() -> None:
    """List and test the implementations of the ops: sapwood's, and those of other packages."""


@kernels.command("list")
def list_kernels() -> None:
    """List implementations in the order in which they are tried, and kinds of devices."""
    from sapwood.app.cli.stored import print_table
    from sapwood.kernels.accelerators import ACCELERATORS
    from sapwood.kernels.registry import IMPLEMENTATIONS, PLUGINS, kernel_names

    rows = [
        (name, "sapwood" if name in IMPLEMENTATIONS else f"an entry point of {PLUGINS}")
        for name in kernel_names()
    ]
    print_table([("KERNELS", "FROM"), *rows])
    devices = [("cpu", "here")] + [
        (name, ", ".join(ACCELERATORS.get(name).names()) or "none here")
        for name in ACCELERATORS.names()
    ]
    click.echo()
    print_table([("DEVICE", "FOUND"), *devices])


@kernels.command()
@click.option("--kernels", "name", default=None, help="The implementation; default: the fastest.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, xpu, …")
@click.option(
    "--dtype",
    "dtypes",
    type=click.Choice(DTYPES),
    multiple=True,
    default=("float32", "bfloat16"),
    show_default=True,
    help="Of weights and activations; may be given several times.",
)
@click.option("--only", multiple=True, help="This check alone; may be given several times.")
@click.pass_context
def test(
    ctx: click.Context,
    name: str | None,
    device: str,
    dtypes: tuple[str, ...],
    only: tuple[str, ...],
) -> None:
    """Compare every op of an implementation with the reference, on a device.

    Exits with 1 if a result differs by more than rounding explains, or an op fails.
    """
    from rich.console import Console

    from sapwood.app.cli.kernel_checks import check_kernels

    ctx.exit(0 if check_kernels(name, device, dtypes, only, Console()) else 1)
