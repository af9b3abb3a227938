"""Everything that needs a GPU, in one call of less than nine minutes: build, speed, tests,
sanitizer.

The most valuable stages come first, in case a call is interrupted: a build for this GPU alone, a
smoke test, the operation and the generator beside eager PyTorch, the tests, the sanitizer, and last
whatever torch.compile has to compile first. Each stage is a process with its own time limit and
saves its results when it ends, so a stage that fails or hangs does not affect the others. Stages
that are left out for lack of time can be run with `--stage` in another call. The folder of `--out`
gets log.txt with the output of every stage, gpu.json with the outcome of each, and a file for each
result.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch.utils.cpp_extension import CUDA_HOME

from .report import commit

ROOT = Path(__file__).parent.parent
TOTAL = 530  # seconds, for all stages together
PROCESSES = 12  # maximum number of test processes, which share the GPU
LEAST_SCENES = 8  # in a folder: with mirrored copies, enough for a batch of 16
KEY_SHAPES = ("128 × 256²", "256 × 128²", "512 × 64²", "1024 × 16²")
# torch.compile would compile before anything is timed.
NOT_COMPILED = ("--without", "torch.compile")
# Files of tests: with cases for each backend, of what is numbered or captured, of neither.
SHARED = ("modulate", "layers", "windows", "networks", "frozen")
OF_LAYOUTS = ("numbering", "graphs", "layout")
WITHOUT_GPU = ("benchmarks", "benchmarks_service", "cli", "cuda", "docs", "export", "house", "hub")
WITHOUT_GPU += ("launches", "packaging", "paint", "predictions", "service", "triton_watch", "waits")


@dataclass(frozen=True)
class Stage:
    """A command, in which {out} stands for the results' folder, and its time limit in seconds."""

    name: str
    what_for: str
    command: list
    seconds: int
    needs: str | None = None  # a program or a package; without it the stage is left out
    environment: dict = field(default_factory=dict)


def python(call):
    """The command that calls a function of this module."""
    return [sys.executable, "-c", f"from benchmarks import gpu; gpu.{call}"]


def measures(case, result, *options, dtype="bfloat16", seconds="0.2"):
    """The command that measures a case, and saves {result}-{dtype}.json."""
    command = [sys.executable, "-m", "benchmarks", "run", case, "--device", "cuda"]
    command += ["--dtype", dtype, "--seconds", seconds]
    return [*command, *options, "--json", f"{{out}}/{result}-{dtype}.json"]


def tests(only, *files):
    """The command that runs the tests of `files` that the -k expression `only` selects, in several
    processes if pytest-xdist is installed.
    """
    chosen = ["-k", only] if only else []
    return [*pytest(), *chosen, *(f"tests/test_{name}.py" for name in files)]


def pytest():
    """The command that runs tests, which says each one's outcome as soon as it ends."""
    several = importlib.util.find_spec("xdist") is not None
    processes = min(PROCESSES, os.cpu_count() or 1)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"]
    return command + ["-n", str(processes), "--dist", "worksteal"] * several


def tests_but(*files):
    """The command that runs all tests but those of `files` and of Triton's kernels."""
    left_out = [part for name in files for part in ("--ignore", f"tests/test_{name}.py")]
    return [*pytest(), "-k", "not triton", *left_out]


def sanitizer(tool, backend):
    """The stage that checks every kernel of a backend with a tool of compute-sanitizer."""
    program = "compute-sanitizer"
    looks_for = {"memcheck": "accesses outside of tensors", "racecheck": "races in shared memory"}
    return Stage(
        f"{tool} of {backend}",
        f"every kernel once: {looks_for[tool]}",
        [program, "--error-exitcode", "1", "--tool", tool, *python(f"exercise('{backend}')")],
        60 if backend == "cuda" else 150,  # Triton compiles each configuration first
        program,
        # Each tensor gets its own allocation, so that an access beyond its end is detected.
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )


def only(*texts):
    return [part for text in texts for part in ("--only", text)]


# Whole names, so that the problem without spectral norm, whose name begins alike, is left out.
GENERATOR, GENERATOR_AT_16 = only("COCO 256²"), only("COCO 256², batch 16")
STAGES = [
    Stage(
        "build",
        "the compiled libraries, in place, for this GPU alone",
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        150,
        environment={"FORCE_CUDA": "1"},
    ),
    Stage(
        "smoke",
        "which backends run, and whether each matches, forward and backward, on a few shapes",
        python("smoke()"),
        60,
    ),
    Stage(
        "modulate",
        "the operation on four shapes at batch 16",
        measures("modulate", "modulate", "--batch", "16", *only(*KEY_SHAPES), *NOT_COMPILED),
        60,
    ),
    Stage(
        "lookup",
        "the same with γ and β looked up in tables",
        measures("lookup", "lookup", "--batch", "16", *only(*KEY_SHAPES), *NOT_COMPILED),
        75,
    ),
    Stage(
        "generator",
        "the published generator at 256²",
        measures("generator", "generator", *GENERATOR, *NOT_COMPILED, seconds="3"),
        80,
    ),
    Stage(
        "generator at 16",
        "the published generator at 256², sixteen scenes at once",
        measures(
            "generator",
            "generator-batch-16",
            *("--batch", "16", *GENERATOR_AT_16, *NOT_COMPILED),
            seconds="3",
        ),
        120,
    ),
    Stage(
        "tests of cuda",
        "the suite on the CUDA kernels",
        tests("cuda", *SHARED),
        90,
    ),
    Stage(
        "tests of layouts",
        "numbering on the GPU, and steps captured in CUDA graphs",
        tests("", *OF_LAYOUTS),
        60,
    ),
    Stage(
        "tests of triton",
        "Triton's own tests and some of the suite's on its kernels: each configuration is"
        " compiled first",
        tests(
            "triton and (tiles or bits or training_and_affine or layouts_that_differ or"
            " the_other_dtypes or hashes or convolution)",
            *("triton", "modulate", "windows"),
        ),
        110,
    ),
    sanitizer("memcheck", "cuda"),
    sanitizer("racecheck", "cuda"),
    Stage(
        "tests of the rest",
        "all other tests, but for those of what has nothing to do with a GPU",
        tests_but(*SHARED, *OF_LAYOUTS, *WITHOUT_GPU),
        240,
    ),
    Stage(
        "modulate at 1",
        "the operation on four shapes, one image",
        measures("modulate", "modulate-batch-1", *only(*KEY_SHAPES), *NOT_COMPILED),
        60,
    ),
    Stage(
        "modulate float32",
        "the operation on four shapes at batch 16, in float32",
        measures(
            "modulate",
            "modulate",
            *("--batch", "16", *only(*KEY_SHAPES), *NOT_COMPILED),
            dtype="float32",
        ),
        60,
    ),
    Stage(
        "modulate everywhere",
        "the operation on all published shapes at batch 16",
        measures("modulate", "modulate-everywhere", "--batch", "16", *NOT_COMPILED),
        120,
    ),
    Stage(
        "lookup everywhere",
        "the same with γ and β looked up in tables",
        measures("lookup", "lookup-everywhere", "--batch", "16", *NOT_COMPILED),
        100,
    ),
    Stage(
        "discriminator",
        "the published discriminator in training",
        measures("discriminator", "discriminator", *NOT_COMPILED, seconds="3"),
        60,
    ),
    Stage(
        "decoder",
        "LivePortrait's decoder, converted",
        measures(
            "converted",
            "converted",
            *(*only("LivePortrait"), *NOT_COMPILED),
            dtype="float16",
            seconds="3",
        ),
        80,
    ),
    Stage(
        "spatial",
        "diffusers' decoders with norms of the latent, converted",
        measures("spatial", "spatial", *NOT_COMPILED, seconds="3"),
        100,
        "diffusers",
    ),
    sanitizer("memcheck", "triton"),
    sanitizer("racecheck", "triton"),
    Stage(
        "generator compiled",
        "the published generator beside torch.compile",
        measures(
            "generator",
            "generator-compiled",
            *(*GENERATOR, "--compile-mode", "reduce-overhead"),
            seconds="3",
        ),
        150,
    ),
    Stage(
        "modulate compiled",
        "the operation on four shapes at batch 16 beside torch.compile",
        measures("modulate", "modulate-compiled", "--batch", "16", *only(*KEY_SHAPES)),
        200,
    ),
    Stage(
        "decoder compiled",
        "LivePortrait's decoder beside torch.compile at its best",
        measures(
            "converted",
            "converted-compiled",
            *(*only("LivePortrait"), "--compile-mode", "max-autotune"),
            dtype="float16",
            seconds="3",
        ),
        300,
    ),
    Stage(
        "generator at 16 compiled",
        "sixteen scenes at once beside torch.compile at its best",
        measures(
            "generator",
            "generator-batch-16-compiled",
            *("--batch", "16", *GENERATOR_AT_16, "--compile-mode", "max-autotune"),
            seconds="3",
        ),
        400,
    ),
]
WIDTH = max(len(stage.name) for stage in STAGES)


def with_scenes(stages, labels=None, instances=None):
    """The stages, with every measurement on the scenes of these folders."""
    if labels is None:
        return stages
    options = ["--labels", str(labels.absolute())]
    options += [] if instances is None else ["--instances", str(instances.absolute())]
    return [
        replace(stage, command=[*stage.command, *options]) if "--json" in stage.command else stage
        for stage in stages
    ]


def plan(stages=STAGES):
    """The stages as text, for --dry-run."""
    lines = []
    for stage in stages:
        lines.append(f"{stage.name:{WIDTH}} at most {stage.seconds:3} s   {stage.what_for}")
        lines.append(f"{'':{WIDTH}} {' '.join(shown(stage))}")
    return "\n".join(
        [
            *lines,
            f"{'together':{WIDTH}} at most {TOTAL} s; a stage that starts late gets the time left",
        ]
    )


def shown(stage):
    """A stage's command as typed into a shell."""
    return [
        *(f"{name}={value}" for name, value in stage.environment.items()),
        *(
            "python" if part == sys.executable else f'"{part}"' if " " in part else part
            for part in stage.command
        ),
    ]


def run(out, stages=STAGES, total=TOTAL, say=print):
    """Runs the stages, and rewrites gpu.json after each. Returns whether all passed; a stage whose
    program or package is missing counts as passed.
    """
    began, ended = time.monotonic(), []
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    facts = {"device": device, "torch": torch.__version__, "commit": commit()}
    for stage in stages:
        limit = min(stage.seconds, total - (time.monotonic() - began))
        if stage.needs is not None and not is_installed(stage.needs):
            outcome, seconds = f"left out: {stage.needs} is not installed", 0.0
        elif limit <= 0:
            outcome, seconds = "left out: no time is left", 0.0
        else:
            start = time.monotonic()
            outcome = execute(stage, out, limit)
            seconds = round(time.monotonic() - start, 1)
        ended.append({**asdict(stage), "outcome": outcome, "took": seconds})
        (out / "gpu.json").write_text(json.dumps({"environment": facts, "stages": ended}, indent=1))
        say(f"{stage.name:{WIDTH}} {seconds:6.1f} s   {outcome}")
    return all(
        stage["outcome"] in ("passed", f"left out: {stage['needs']} is not installed")
        for stage in ended
    )


def execute(stage, out, limit):
    """Runs one stage, and returns its outcome."""
    command = [part.format(out=out) for part in stage.command]
    with open(out / "log.txt", "a") as log:
        log.write(f"\n==== {stage.name}: {' '.join(shown(stage))}\n")
        log.flush()
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            start_new_session=True,
            env=os.environ | for_all() | for_this_gpu() | stage.environment,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the process and its children
            process.wait()
            return f"stopped after {limit:.0f} s"
    return "passed" if code == 0 else f"failed with {code}"


def for_all():
    """The environment variables for every stage."""
    return {"PYTHONPATH": str(ROOT), "PATH": search_path()}


def search_path():
    """The search path for programs: PATH, and last the CUDA toolkit, which may not be on PATH."""
    toolkit = [str(Path(CUDA_HOME, "bin"))] if CUDA_HOME else []
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *toolkit])


def is_installed(name):
    """Whether there is a program or a package of this name."""
    program = shutil.which(name, path=search_path())
    return program is not None or importlib.util.find_spec(name) is not None


def for_this_gpu():
    """The environment variables for the shortest build: for this GPU alone, on all cores."""
    if not torch.cuda.is_available():
        return {}
    major, minor = torch.cuda.get_device_capability()
    cores = len(os.sched_getaffinity(0))
    return {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "MAX_JOBS": str(cores)}


def smoke(device="cuda", backends=("cuda", "triton")):
    """Compares each backend with the reference in float64, forward and backward, on a few shapes;
    then a small generator in each of its variants. Exits with a message if any fails or differs.
    """
    import spade_fast
    from spade_fast.cli import app

    from .cases.generator import generator
    from .cases.problem import BACKWARD, Settings
    from .measure import check

    app(["info"], standalone_mode=False)
    settings = Settings(device, quick=True, batch=2, without=NOT_COMPILED[1:])
    problems = [
        (backend, "modulate", plan)
        for backend in backends
        for plan in smoke_plans(settings, few=backend == "triton")
    ]
    problems += [(None, "generator", plan) for plan in list(generator(settings))[:2]]
    wrong = 0
    for backend, case, plan in problems:
        with spade_fast.use_backend(backend), torch.set_grad_enabled(plan.mode == BACKWARD):
            rows = check(case, plan.build()).values()
        # The larger limit for gradients is for networks of several leaky ReLUs.
        differs = [
            row for row in rows if not row.matches or (case == "modulate" and (row.excess or 0) > 1)
        ]
        words = "DIFFERS" if differs else "agrees"
        print(f"{backend or 'all backends'}: {case} {plan.name}, {plan.mode} {words}", flush=True)
        for row in differs:
            print(row, flush=True)
        wrong += len(differs)
    if wrong:
        raise SystemExit(f"{wrong} results failed or differ from the reference")


def smoke_plans(settings, few):
    """Plans of the operation on shapes that are not multiples of a tile, in one pass and in two,
    dense and with a table. few: bfloat16 only, for kernels that have to be compiled first.
    """
    from spade_fast import SemanticLayout

    from .cases.modulation import modulate_problem
    from .cases.problem import BACKWARD, FORWARD, plan_of

    labels = torch.arange(9).view(1, 3, 3).repeat(settings.batch, 1, 1)
    layout = SemanticLayout.from_labels(labels, 9).to(settings.device)
    for dtype in (torch.bfloat16,) if few else (torch.bfloat16, torch.float32):
        for size in (9, 260):
            for memory in (torch.contiguous_format, torch.channels_last):
                for has_table in (False, True):
                    windows = layout.windows((size, size), 3) if has_table else None
                    for mode in (FORWARD, BACKWARD):
                        name = f"33 × {size}² {memory} {'table' if has_table else 'dense'} {dtype}"
                        yield plan_of(
                            modulate_problem,
                            replace(settings, dtype=dtype),
                            *(name.replace("torch.", ""), mode, 33, size, memory, windows),
                        )


def exercise(backend):
    """Runs every kernel of a backend once, for the sanitizer: in both memory formats and two
    dtypes, dense and with a table, on sizes that are not multiples of a tile; and a layout's
    kernels.
    """
    import spade_fast

    with spade_fast.use_backend(backend):
        for dtype in (torch.float32, torch.bfloat16):
            for size in ((9, 7), (260, 259)):  # in one pass and in two
                for last in (False, True):
                    for has_table in (False, True):
                        exercise_modulation(dtype, size, last, has_table)
            exercise_layout(dtype)
    torch.cuda.synchronize()


def exercise_modulation(dtype, size, last, has_table):
    import spade_fast

    x = torch.randn(2, 33, *size, device="cuda", dtype=dtype)
    x = x.to(memory_format=torch.channels_last) if last else x
    tables = torch.randn(50, 66, device="cuda", dtype=dtype).chunk(2, dim=1)
    gamma, beta = tables if has_table else (torch.randn_like(x), torch.randn_like(x))
    index = torch.randint(50, (2, *size), device="cuda") if has_table else None
    tensors = [tensor.detach().requires_grad_() for tensor in (x, gamma, beta)]
    for norm, activation in (("instance", "leaky_relu"), ("batch", "silu"), (None, None)):
        arguments = {"index": index, "norm": norm, "activation": activation}
        y = spade_fast.spade_modulate(*tensors, **arguments)
        torch.autograd.grad(y, tensors, torch.randn_like(y))
        with torch.no_grad():
            spade_fast.spade_modulate(*tensors, **arguments)


def exercise_layout(dtype):
    """Finds and numbers a layout as networks do, and differentiates a layer that it conditions."""
    import spade_fast

    labels = torch.randint(5, (2, 1, 11, 9), device="cuda").repeat_interleave(4, 2)[:, 0]
    segmap = spade_fast.SemanticLayout.from_labels(labels, 5).to_segmap(dtype)
    layout = spade_fast.SemanticLayout.from_segmap(segmap)
    spade = spade_fast.SPADE(33, 5, 16).to("cuda", dtype)
    x = torch.randn(2, 33, 22, 9, device="cuda", dtype=dtype, requires_grad=True)
    with spade_fast.window_mode("always"):
        y = spade(x, layout, activation="leaky_relu")
        torch.autograd.grad(y, [x, *spade.parameters()], torch.randn_like(y))
    layout.avg_pool(3, 2, 1).patches(4, 2, 2)
