"""The command line of the suite: `python -m benchmarks`."""

import dataclasses
import functools
import gc
import itertools
import json as notation
import shutil
from collections import deque
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import Progress

from spade_fast.progress import progress_bar

from . import cuda_proofs, report
from . import gpu as on_gpu
from . import launches as counted
from . import layouts as drawn
from . import proofs as compiled
from . import service as served
from . import shares as predicted
from . import summary as committed
from .cases import CASES
from .cases.problem import VARIANTS, Settings
from .measure import measure
from .painting import save_painting
from .picture import save_picture
from .tables import console_of_any_width

app = typer.Typer(
    help="Check that spade_fast matches plain PyTorch, and measure its speed beside eager PyTorch,"
    " torch.compile, plain instance norm and the convolutions alone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
RIVALS = ("torch.compile", "ONNX Runtime")
COMPILE_MODES = {mode: mode for mode in ("default", "reduce-overhead", "max-autotune")}
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@app.command("list")
def list_cases(
    quick: Annotated[
        bool, typer.Option("--quick", help="List the problems of `run --quick`.")
    ] = False,
):
    """List the cases of `run` and, below each, the names of its problems for `run --only`."""
    for name, case in CASES.items():
        typer.echo(f"{name}: {' '.join(case.__doc__.split())}")
        for problem in names_of_problems(case(Settings(quick=quick))):
            typer.echo(f"    {problem}")


@app.command()
def run(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help=f"One or more of {', '.join(CASES)}.")
    ],
    quick: Annotated[
        bool, typer.Option("--quick", help="A few small problems of each case, about a minute.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Measure only problems whose name contains this, such as '128 × 256²'; in a case"
            " with a problem of exactly this name, only that one. May be given several times; the"
            " problems are measured in that order.",
        ),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Leave out variants whose name begins with this, such as torch.compile. May be"
            " given several times.",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Seconds of timing for each problem.")] = 10,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}.")] = "float32",
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Folder of PNGs of COCO-Stuff classes. If it has too few, mirrored copies follow."
            " Without a folder, scenes are drawn."
        ),
    ] = None,
    instances: Annotated[
        Path | None,
        typer.Option(help="Folder of PNGs of instance numbers, named like the label PNGs."),
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, help="How many images or scenes are computed at once.")
    ] = 1,
    scenes: Annotated[
        int,
        typer.Option(
            min=1, help="How many scenes to measure networks on. Each round takes the next scene."
        ),
    ] = 1,
    compile_mode: Annotated[
        str, typer.Option(help=f"torch.compile's mode for networks: {', '.join(COMPILE_MODES)}.")
    ] = "default",
    json: Annotated[
        Path | None, typer.Option(help="Write all measurements to this JSON file.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a chart to this file.")] = None,
):
    """Check the cases, then time them, and print a table.

    Exits with 1 if a variant of spade_fast or of eager PyTorch does not match.
    """
    check_scenes(labels, instances, -(-scenes * batch // 2))
    if any("eager".startswith(text) for text in without or ()):
        raise typer.BadParameter(
            "eager cannot be left out: every variant is compared with it", param_hint="--without"
        )
    for text in without or ():
        if not any(name.startswith(text) for name in VARIANTS):
            raise typer.BadParameter(
                f"no variant's name begins with {text!r}; the names are: {'; '.join(VARIANTS)}",
                param_hint="--without",
            )
    compile_mode = choose("--compile-mode", compile_mode, COMPILE_MODES)
    settings = Settings(
        check_device(device),
        choose("--dtype", dtype, DTYPES),
        quick,
        labels,
        instances,
        scenes,
        batch,
        compile_mode,
        tuple(without or ()),
    )
    plans = choose_plans({name: choose("NAME", name, CASES) for name in names}, settings, only)
    for option, path in (("--json", json), ("--plot", plot)):
        if path is not None:
            check_folder(option, path)
    facts = report.environment(settings)  # before measuring: the commit may have changed by the end
    rows, console = [], console_of_any_width()
    with Progress(console=console, transient=True) as progress:
        tasks = {}
        while plans:
            case, plan = plans.popleft()  # data that problems share is freed with the last of them
            if case not in tasks:
                tasks[case] = progress.add_task(case, total=None)
            task = tasks[case]
            progress.update(task, description=f"{case} {plan.name} {plan.mode}")
            gc.collect()  # a problem and its functions are a reference cycle with whole networks
            problem = plan.build()
            del plan
            rows += measure(
                case,
                problem,
                settings.device,
                min(seconds, 2) if quick else seconds,
                functools.partial(progress.advance, task),
            )
            torch.compiler.reset()
            del problem
            if json is not None:
                report.save_json(
                    json, facts, rows
                )  # after each problem, so that an interrupted run keeps its measurements
    show(console, report.tables(rows), rows, facts)
    if plot is not None and any(row.times for row in rows):
        report.save_chart(plot, facts, rows)
    elif plot is not None:
        console.print(f"{plot} was not drawn: nothing was timed", markup=False)
    exit_unless_right(rows)


@app.command()
def service(
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Small images, at most three layouts and 2 seconds for each server."
        ),
    ] = False,
    seconds: Annotated[float, typer.Option(min=0, help="Seconds of requests to each server.")] = 60,
    clients: Annotated[
        int, typer.Option(min=1, help="Threads that send requests at the same time.")
    ] = 8,
    layouts: Annotated[int, typer.Option(min=1, help="How many drawn scenes to request.")] = 6,
    cache: Annotated[
        str, typer.Option(help="Size of the service's cache, such as 256MB.")
    ] = "256MB",
    json: Annotated[
        Path | None, typer.Option(help="Write all measurements to this JSON file.")
    ] = None,
):
    """Check, then time, a service with many clients, beside two rivals.

    The service loads other weights halfway through.

    The rivals are the published network behind a lock, and that network in ONNX Runtime.

    Exits with 1 if an image of the service or of eager PyTorch does not match.
    """
    try:
        served.bytes_of("cache", cache)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--cache") from None
    if json is not None:
        check_folder("--json", json)
    load = served.Load(seconds, clients, layouts, cache)
    if quick:
        load = served.Load(min(seconds, 2), clients, min(layouts, 3), cache, size=64)
    facts = report.environment(Settings()) | {"onnxruntime": served.version()}
    rows, console = [], console_of_any_width()
    inputs = served.Inputs(load)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(served.SERVERS))
        for variant in served.SERVERS:
            progress.update(task, description=variant)
            rows.append(served.measured(variant, inputs))
            progress.advance(task)
            if json is not None:
                report.save_json(json, facts, rows)
    show(console, served.table(rows), rows, facts)
    exit_unless_right(rows)


@app.command()
def proofs(
    capability: Annotated[
        list[int], typer.Option(help="Compute capability of a GPU, such as 90.")
    ] = list(compiled.CAPABILITIES),
    dtype: Annotated[list[str], typer.Option(help=f"{'; '.join(compiled.DTYPES)}.")] = list(
        compiled.DTYPES
    ),
    activation: Annotated[
        list[str], typer.Option(help=f"{', '.join(compiled.ACTIVATIONS)}.")
    ] = list(compiled.ACTIVATIONS),
    pairs: Annotated[
        bool,
        typer.Option(
            "--pairs", help="Compile a few configurations, which have each pair of names."
        ),
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Write all proofs to this JSON file.")] = None,
):
    """Compile every configuration of the Triton kernels without a GPU, and check the result.

    Exits with 1 if a check fails. --capability, --dtype and --activation may be given several
    times.
    """
    for option, names, choices in (
        ("--dtype", dtype, compiled.DTYPES),
        ("--activation", activation, compiled.ACTIVATIONS),
    ):
        for name in names:
            choose(option, name, choices)
    if json is not None:
        check_folder("--json", json)
    found = compiled.prove(capability, dtype, activation, pairs)
    if json is not None:
        json.write_text(notation.dumps([dataclasses.asdict(proof) for proof in found]))
    conclude(compiled, found)


@app.command("cuda-proofs")
def prove_cuda(
    capability: Annotated[
        list[int],
        typer.Option(help="Compute capability of a GPU, such as 90. May be given several times."),
    ] = list(compiled.CAPABILITIES),
):
    """Compile the CUDA kernels with nvcc, without a GPU, and check the result.

    With capability 90, it also predicts the kernels' shares of an H200's copy bandwidth.

    Exits with 1 if a check fails, with 2 if nvcc is missing.
    """
    if shutil.which("nvcc") is None:
        typer.echo("nvcc is not on PATH", err=True)
        raise typer.Exit(2)
    found = cuda_proofs.prove(capability)
    if predicted.CAPABILITY in capability:
        launch = counted.model(counted.count_all(counted.CALIBRATING)).launch
        predictions = predicted.shares(found, launch)
        console = console_of_any_width()
        console.print(predicted.table(predictions))
        console.print(predicted.table_of_operations(predictions))
        console.print(predicted.CAPTION)
    conclude(cuda_proofs, found)


@app.command()
def launches(
    only: Annotated[
        str, typer.Option(metavar="TEXT", help="Count only paths whose name contains this.")
    ] = "",
    operators: Annotated[
        int,
        typer.Option(min=0, help="How many of the operators with the most launches to list, too."),
    ] = 0,
):
    """Count a GPU's launches, and the host's waits for it, without a GPU.

    Exits with 1 if a count exceeds its limit.
    """
    names = [name for name in counted.PATHS if only in name]
    if not names:
        raise typer.BadParameter(
            f"no path's name contains {only!r}; the names are: {'; '.join(counted.PATHS)}",
            param_hint="--only",
        )
    everything = counted.count_all([*names, *counted.CALIBRATING])
    found = {name: everything[name] for name in names}
    console = console_of_any_width()
    console.print(counted.table(found))
    console.print(counted.CAPTION)
    console.print(*counted.predicted(everything, names), sep="\n")
    for name, counts in found.items() if operators else ():
        most = counts.operators.most_common(operators)
        words = ", ".join(f"{operator} {number}" for operator, number in most)
        console.print(f"{name}: {words}", highlight=False)
    if excesses := counted.excesses(found):
        for words in excesses:
            typer.echo(words)
        raise typer.Exit(1)


@app.command()
def gpu(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("gpu-results"),
    stage: Annotated[
        list[str] | None, typer.Option(help="Run only this stage. May be given several times.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="As for `run`; used by every stage that measures.")
    ] = None,
    instances: Annotated[Path | None, typer.Option(help="As for `run`.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would be done.")
    ] = False,
):
    """Build, test, sanitize and measure on this machine's GPU, in under nine minutes.

    Exits with 1 if a stage fails, with 2 if there is no GPU.
    """
    known = {one.name: one for one in on_gpu.STAGES}
    stages = [choose("--stage", name, known) for name in stage] if stage else on_gpu.STAGES
    check_scenes(labels, instances, on_gpu.LEAST_SCENES)
    stages = on_gpu.with_scenes(stages, labels, instances)
    if dry_run:
        typer.echo(on_gpu.plan(stages))
        return
    if not torch.cuda.is_available():
        typer.echo(
            f"there is no CUDA GPU here (torch {torch.__version__}); --dry-run lists what would be"
            " done",
            err=True,
        )
        raise typer.Exit(2)
    out.mkdir(parents=True, exist_ok=True)
    if not on_gpu.run(out.absolute(), stages, say=typer.echo):
        raise typer.Exit(1)


@app.command()
def summary():
    """Print the table of committed measurements in Markdown."""
    typer.echo(committed.summary())


@app.command()
def painting(
    file: Annotated[Path, typer.Argument(help="PNG to write.")],
    steps: Annotated[int, typer.Option(min=1, help="How many steps to train the generator.")] = 140,
):
    """Train the small generator of `spade-fast paint`, and draw its images below their labels."""
    check_folder("FILE", file)
    save_painting(file, steps, functools.partial(progress_bar, words="Training"))


@app.command()
def layouts(
    folder: Annotated[Path, typer.Argument(help="Where to write label/ and instance/.")],
    count: Annotated[int, typer.Option(min=1, help="How many scenes to draw.")] = 13,
):
    """Draw label and instance PNGs that resemble real ones, for `run --labels --instances`."""
    label_folder, instance_folder = drawn.save_scenes(folder, count)
    typer.echo(f"--labels {label_folder} --instances {instance_folder}")


@app.command()
def picture(
    file: Annotated[Path, typer.Argument(help="PNG to write.")],
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Folder of PNGs of COCO-Stuff classes. Without a folder, the scene is drawn."
        ),
    ] = None,
    instances: Annotated[
        Path | None,
        typer.Option(help="Folder of PNGs of instance numbers, named like the label PNGs."),
    ] = None,
    scene: Annotated[int, typer.Option(min=0, help="Number of the scene, counted from 0.")] = 0,
    size: Annotated[
        int, typer.Option(min=16, help="Height and width to resize the scene to.")
    ] = 256,
):
    """Draw a picture of why windows make γ and β cheap.

    It shows a label map, some of its windows, and the few pixels that are computed.
    """
    check_folder("FILE", file)
    check_scenes(labels, instances, scene + 1)
    save_picture(
        file,
        *(
            drawn.draw_scene(scene)
            if labels is None
            else drawn.load_scenes(labels, instances)[scene]
        ),
        size,
    )


def show(console, tables, rows, facts):
    """Prints the tables of measured rows, the failures, and the facts of the environment."""
    console.print(tables)
    for row in rows:
        if row.failure:
            console.print(
                f"{row.case} {row.problem} {row.mode}, {row.variant} failed: {row.failure}",
                markup=False,
            )
    for key, value in facts.items():
        console.print(f"{key}: {value}", highlight=False, markup=False)


def exit_unless_right(rows):
    if not all(row.matches for row in rows if row.variant not in RIVALS):
        raise typer.Exit(1)


def conclude(module, proofs):
    """Prints the table of proofs and their failures. Exits with 1 if there are any."""
    console_of_any_width().print(module.table(proofs))
    failures = [f"{proof}: {failure}" for proof in proofs for failure in proof.failures]
    for failure in failures:
        typer.echo(failure)
    if failures:
        raise typer.Exit(1)


def choose_plans(cases, settings, only):
    """The pairs of case and Plan to measure, in the order of `only`. No problem is built."""
    plans = {name: list(case(settings)) for name, case in cases.items()}
    chosen = {}
    for text in only or [""]:
        found = {
            id(plan): (name, plan) for name, own in plans.items() for plan in matching(own, text)
        }
        if not found:
            names = "; ".join(names_of_problems(itertools.chain(*plans.values())))
            raise typer.BadParameter(
                f"no problem's name contains {text!r}; the names are: {names}", param_hint="--only"
            )
        chosen |= found  # a plan that is already there keeps its place
    return deque(chosen.values())


def matching(plans, text):
    """The plans with this name or, if there is none, those whose name contains it."""
    exact = [plan for plan in plans if plan.name == text]
    return exact or [plan for plan in plans if text in plan.name]


def names_of_problems(plans):
    """Each name once: many problems have a plan for forward and one with backward."""
    return list(dict.fromkeys(plan.name for plan in plans))


def choose(parameter, name, choices):
    if name not in choices:
        raise typer.BadParameter(
            f"{name!r} should be one of {', '.join(choices)}", param_hint=parameter
        )
    return choices[name]


def check_folder(option, path):
    """Raises unless the folder of a file to write exists."""
    if not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"{path} should be in a folder that exists", param_hint=option)


def check_scenes(labels, instances, count):
    if labels is None and instances is not None:
        raise typer.BadParameter("it should come with --labels", param_hint="--instances")
    for option, folder in (("--labels", labels), ("--instances", instances)):
        if folder is not None and not folder.is_dir():
            raise typer.BadParameter(f"{folder} should be a folder that exists", param_hint=option)
    if labels is not None and (there := len(list(labels.glob("*.png")))) < count:
        raise typer.BadParameter(
            f"{labels} has {there} PNGs; it should have at least {count}", param_hint="--labels"
        )


def check_device(name):
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(
            f"{name!r} cannot be used: {str(error).splitlines()[0]}", param_hint="--device"
        ) from None
    return name
