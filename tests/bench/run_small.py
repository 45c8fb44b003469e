"""Runs the benchmark programs on the CPU at a small scale; exit code 1 if a program fails.

Programs in NOT_RUN are excluded. The figures of these runs mean nothing. Run it with: python tests/bench/run_small.py
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench_report import print_machine, print_table, say

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]

_TINY = "--device cpu --scale tiny"
COMMANDS: dict[str, tuple[str, ...]] = {
    "cancel": ("--rounds 1",),
    "checkpoint_cost": ("--rounds 1 --steps 60",),
    "cuda_flux": (_TINY,),
    "cuda_glm_image": (_TINY,),
    "cuda_group": ("--device cpu --ranks 2 --no-fleets --families flux",),
    "cuda_ltx2": (_TINY,),
    "cuda_qwen_image": (_TINY,),
    "cuda_stages": tuple(
        f"{_TINY} --family {family}"
        for family in (
            "flux2-dev",
            "hunyuan-video",
            "klein",
            "ltx-video",
            "qwen-image-edit-plus",
            "qwen-image-layered",
            "wan-a14b",
            "z-image",
        )
    ),
    "cuda_stream": (_TINY,),
    "cuda_wan": (_TINY,),
    "denoise_step": (_TINY,),
    "denoise_step_group": (f"{_TINY} --alone --ring 2",),
    "expert_swap": (_TINY,),
    "hops": ("--repeats 1",),
    "overhead": ("--requests 1 --steps 2",),
    "overload": ("--seconds 3",),
    "startup": ("--starts 1 --requests 1",),
    "step_pairs": (f"{_TINY} --before {ROOT} --pairs 1 --max-ratio 100 --work flux",),
    "store_cost": ("--requests 2 --claims 20 --idle-seconds 1",),
    "trace_cost": ("--pairs 1 --steps 2 --size 64",),
}
"""Arguments of each run, by program."""

NOT_RUN = {
    "attention": "needs a GPU",
    "autoscale_sim": "takes minutes; test_autoscale_sim.py covers it",
    "gemm_packages": "needs a GPU",
    "kernel_energy": "needs a GPU",
}
"""Programs that are not run, with the reason."""

LAUNCHERS = {"denoise_step_group": ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")}
"""Arguments of Python before the program, for programs that a launcher starts."""

LIMIT = 600.0
"""Seconds after which a run counts as failed."""

MAX_OUTPUT = 4000
"""Largest number of characters of output that are printed for a failed run."""


def programs() -> set[str]:
    """Names of the benchmark programs in this folder."""
    names = {path.stem for path in FOLDER.glob("*.py")}
    return {name for name in names if not name.startswith("bench_")} - {Path(__file__).stem}


def main() -> None:
    """Run the programs and print a table; the output of failed programs follows the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=sorted(COMMANDS), choices=sorted(COMMANDS), metavar="PROGRAM")
    args = parser.parse_args()
    print_machine("Small runs of the benchmark programs")
    errors: list[str] = []
    print_table(("run", "", "s"), run_all(args.only, errors))
    for error in errors:
        say(error)
    if errors:
        sys.exit(1)


def run_all(names: Sequence[str], errors: list[str]) -> Iterator[tuple[str, str, float]]:
    """Yield a row of the table after each run, and append the output of failed runs to `errors`."""
    for program in names:
        for arguments in COMMANDS[program]:
            began = time.monotonic()
            error = run(program, arguments)
            if error:
                errors.append(f"{program}.py {arguments}\n{error}")
            yield f"{program}.py {arguments}", "failed" if error else "ok", time.monotonic() - began


def run(program: str, arguments: str) -> str:
    """Run a program. Returns the end of its output if it failed, and otherwise an empty string."""
    command = [sys.executable, *LAUNCHERS.get(program, ()), str(FOLDER / f"{program}.py"), *arguments.split()]
    # A session of its own, so that a program that exceeds the limit ends together with its child processes.
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return f"did not end within {LIMIT:g} s"
    return f"exit code {process.returncode}\n{output[-MAX_OUTPUT:]}" if process.returncode else ""


if __name__ == "__main__":
    main()
