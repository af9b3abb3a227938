"""Everything that a GPU is needed for, in one call of less than nine minutes: build, tests,
sanitizer, speed.

Each stage is a process of its own with a time limit of its own, and what it found is saved when it
ends: one that fails or hangs takes nothing from the others, and what is left out for want of time
    is run by `--stage` in another call. DIR gets log.txt, what every
stage printed; gpu.json, how each ended; and the results by name.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .report import commit

ROOT = Path(__file__).parent.parent
TOTAL = 530  # seconds, for all stages together
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
BENCHMARKS = [sys.executable, "-m", "benchmarks"]


@dataclass(frozen=True)
class Stage:
    """One step: a command with {out} for DIR, and the seconds that it may take."""

    name: str
    what_for: str
    command: list
    seconds: int
    needs: str | None = None  # a program without which it is left out


EXERCISE = [sys.executable, "-c", "from benchmarks.gpu import exercise; exercise()"]
SANITIZER = ["compute-sanitizer", "--error-exitcode", "1", "--tool"]
ON_GPU = [*BENCHMARKS, "run", "--device", "cuda"]
STAGES = [
    Stage(
        "build",
        "the compiled libraries, in place",
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        90,
    ),
    Stage(
        "info",
        "which backends run, and why not the others",
        [sys.executable, "-c", "from spade_fast.cli import app; app(['info'])"],
        20,
    ),
    Stage(
        "tests of cuda",
        "the suite on the CUDA kernels",
        [
            *PYTEST,
            "-k",
            "cuda",
            "tests/test_modulate.py",
            "tests/test_layers.py",
            "tests/test_windows.py",
        ],
        90,
    ),
    Stage(
        "tests of layouts",
        "numbering on the GPU, and steps that are captured in CUDA graphs",
        [*PYTEST, "tests/test_numbering.py", "tests/test_graphs.py", "tests/test_layout.py"],
        45,
    ),
    Stage(
        "tests of triton",
        "those of its own and some of the suite's on the Triton kernels: each configuration is"
        " compiled first",
        [
            *PYTEST,
            "-k",
            "triton and (tiles or bits or training_and_affine or layouts_that_differ or"
            " the_other_dtypes)",
            "tests/test_triton.py",
            "tests/test_modulate.py",
            "tests/test_windows.py",
        ],
        110,
    ),
    *(
        Stage(
            f"modulate {dtype}",
            "the operation alone, on the published shapes at batch 16",
            [
                *ON_GPU,
                "modulate",
                "--batch",
                "16",
                "--dtype",
                dtype,
                "--seconds",
                "0.2",
                "--json",
                f"{{out}}/modulate-{dtype}.json",
            ],
            seconds,
        )
        for dtype, seconds in (("bfloat16", 110), ("float32", 60))
    ),
    Stage(
        "generator",
        "the published generator at 256²",
        [
            *ON_GPU,
            "generator",
            "--only",
            "COCO 256²",
            "--dtype",
            "bfloat16",
            "--seconds",
            "5",
            "--compile-mode",
            "reduce-overhead",
            "--json",
            "{out}/generator-bfloat16.json",
        ],
        80,
    ),
    Stage(
        "memcheck",
        "every kernel once: accesses outside of tensors",
        [*SANITIZER, "memcheck", *EXERCISE],
        45,
        SANITIZER[0],
    ),
    Stage(
        "racecheck",
        "every kernel once: races in shared memory",
        [*SANITIZER, "racecheck", *EXERCISE],
        45,
        SANITIZER[0],
    ),
    Stage(
        "lookup",
        "the operation with γ and β looked up in tables",
        [
            *ON_GPU,
            "lookup",
            "--batch",
            "16",
            "--dtype",
            "bfloat16",
            "--seconds",
            "0.2",
            "--json",
            "{out}/lookup-bfloat16.json",
        ],
        60,
    ),
    Stage(
        "generator at 16",
        "the published generator at 256², of sixteen scenes",
        [
            *ON_GPU,
            "generator",
            "--only",
            "COCO 256²",
            "--dtype",
            "bfloat16",
            "--seconds",
            "5",
            "--batch",
            "16",
            "--compile-mode",
            "max-autotune",
            "--json",
            "{out}/generator-batch-16-bfloat16.json",
        ],
        300,
    ),
    Stage(
        "decoder",
        "LivePortrait's decoder, converted",
        [
            *ON_GPU,
            "converted",
            "--only",
            "LivePortrait",
            "--dtype",
            "float16",
            "--seconds",
            "5",
            "--compile-mode",
            "max-autotune",
            "--json",
            "{out}/converted-float16.json",
        ],
        200,
    ),
]


def plan(stages=STAGES):
    """The stages as text, for --dry-run."""
    lines = []
    for stage in stages:
        lines.append(f"{stage.name:18} at most {stage.seconds:3} s   {stage.what_for}")
        lines.append(f"{'':18} {' '.join(shown(stage.command))}")
    return "\n".join(
        [*lines, f"{'together':18} at most {TOTAL} s; a stage that begins late gets what is left"]
    )


def shown(command):
    return [
        "python" if part == sys.executable else f'"{part}"' if " " in part else part
        for part in command
    ]


def run(out, stages=STAGES, total=TOTAL, say=print):
    """Runs the stages; returns whether each passed. gpu.json is written anew after each."""
    began, ended = time.monotonic(), []
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    facts = {"device": device, "torch": torch.__version__, "commit": commit()}
    for stage in stages:
        limit = min(stage.seconds, total - (time.monotonic() - began))
        if stage.needs is not None and shutil.which(stage.needs) is None:
            outcome, seconds = f"left out: {stage.needs} is not there", 0.0
        elif limit <= 0:
            outcome, seconds = "left out: no time is left", 0.0
        else:
            start = time.monotonic()
            outcome = execute(stage, out, limit)
            seconds = round(time.monotonic() - start, 1)
        ended.append({**asdict(stage), "outcome": outcome, "took": seconds})
        (out / "gpu.json").write_text(json.dumps({"environment": facts, "stages": ended}, indent=1))
        say(f"{stage.name:18} {seconds:6.1f} s   {outcome}")
    return all(
        stage["outcome"] in ("passed", f"left out: {stage['needs']} is not there")
        for stage in ended
    )


def execute(stage, out, limit):
    """Runs one stage; how it ended."""
    command = [part.format(out=out) for part in stage.command]
    with open(out / "log.txt", "a") as log:
        log.write(f"\n==== {stage.name}: {' '.join(shown(command))}\n")
        log.flush()
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and what it started
            process.wait()
            return f"stopped after {limit:.0f} s"
    return "passed" if code == 0 else f"failed with {code}"


def exercise():
    """Every kernel once, in both layouts, dense and with a table, on sizes that fit no tile: for
    the sanitizer.
    """
    import spade_fast

    for backend in ("cuda", "triton"):
        for table in (False, True):
            for size in ((9, 7), (260, 259)):  # in one pass and in two
                for last in (False, True):
                    x = torch.randn(2, 33, *size, device="cuda")
                    x = x.to(memory_format=torch.channels_last) if last else x
                    gamma, beta = (
                        torch.randn(50, 66, device="cuda").chunk(2, dim=1)
                        if table
                        else torch.randn(2, *x.shape, device="cuda")
                    )
                    index = torch.randint(50, (2, *size), device="cuda") if table else None
                    tensors = [
                        tensor.requires_grad_()
                        for tensor in (x.detach(), gamma.detach(), beta.detach())
                    ]
                    with spade_fast.use_backend(backend):
                        for norm, activation in (
                            ("instance", "leaky_relu"),
                            ("batch", "silu"),
                            (None, None),
                        ):
                            y = spade_fast.spade_modulate(
                                *tensors, index=index, norm=norm, activation=activation
                            )
                            torch.autograd.grad(y, tensors, torch.randn_like(y))
    torch.cuda.synchronize()
