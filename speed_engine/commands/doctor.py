"""``speed-engine doctor``: what will be used on this machine, and why."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from speed_engine.commands.options import read_options
from speed_engine.presets import PRESETS
from speed_engine.run.starting import machine_choices
from speed_engine.runtime import kernels, machine
from speed_engine.runtime.environment import describe
from speed_engine.runtime.files import cache_folder


@dataclass(frozen=True)
class DoctorCommand:
    """Print what will be used on this machine, and why."""


def run(arguments: list[str], console: Console) -> None:
    """Print the choices."""
    read_options(DoctorCommand, arguments, "speed-engine doctor")
    facts = describe(["speed-engine", "doctor"])
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("python", facts["python"], packages)
    table.add_row("machine", f"{facts['cores']} cores", facts["cpu"])
    table.add_row("run", "digits", "the preset of which the following is said")
    for name, (value, reason) in machine_choices(PRESETS["digits"][1]).shown().items():
        table.add_row(name, Text(value, "bold"), reason)
    table.add_row("cache", "", str(cache_folder()))
    console.print(table, highlight=False)
    console.print(_tested_kernels(machine.choose_device("auto").value), highlight=False)


def _tested_kernels(device: str) -> Table | str:
    """Whether each kernel agrees with its definition here, and its largest relative error."""
    if obstacle := kernels.kernel_obstacle(device):
        return f"kernels are not tested: {obstacle}"
    table = Table(box=None, padding=(0, 2, 0, 0))
    for head in ("kernel", "family", "test", "error"):
        table.add_column(head)
    for finding in kernels.kernel_findings(device):
        outcome = Text("passed") if finding.passed else Text(finding.problem or "", "red")
        table.add_row(finding.operator, finding.family, outcome, f"{finding.error:.2g}")
    return table
