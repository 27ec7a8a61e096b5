"""`lemo train`."""

import json
import os
import sys
from contextlib import ExitStack, nullcontext, redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from lemo_hf.cli.options import AsJson
from lemo_hf.progress import Estimated
from lemo_hf.storage.outputs import check_output, only_run

if TYPE_CHECKING:
    from lemo_hf.cli.train_look import Found
    from lemo_hf.cli.train_sections import Run
    from lemo_hf.cli.train_settings import Settings

# Settings of any section are left for `read_settings`, which knows their names.
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}


def train(
    context: typer.Context,
    config: Annotated[
        str | None,
        typer.Option(help="YAML file, or packaged preset such as llama3-8b-64k.yaml."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="model.name: Hub id or directory.")] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="data.dataset: Hub id, directory, or file; repeatable for files."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="data.tokens: tokens a row.")] = None,
    retention: Annotated[
        float | None, typer.Option(help="lemo.retention: share that each layer keeps, in (0, 1].")
    ] = None,
    output: Annotated[str | None, typer.Option(help="training.output_dir.")] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Train all parameters: ignore the section lora.")
    ] = False,
    dense: Annotated[
        bool, typer.Option("--dense", help="Train without LeMo: ignore the section lemo.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint in the output.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove the run in the output and start over.")
    ] = False,
    memory_gib: Annotated[
        float | None,
        typer.Option(
            help="Memory of the GPU, to which row length, recomputation and offload are fitted."
        ),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Write report.html into the output; see lemo report.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check model and data, print the settings, and stop."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model with settings from a YAML file; each is also a flag, --section.key value,
    which wins.

    Sections: model, data, lora (peft's LoraConfig) or full: true, lemo (LeMoConfig), training
    (transformers' TrainingArguments). Works under accelerate launch -m lemo_hf.cli train.
    """
    from lemo_hf.cli.train_card import PRESET, plan_for_card
    from lemo_hf.cli.train_look import look
    from lemo_hf.cli.train_settings import check_preset, dump, read_settings

    options = [name for parameter in context.command.params for name in parameter.opts]
    if config is None and memory_gib is not None:
        config = PRESET
    settings = read_settings(config, context.args, options)
    datasets = dataset[0] if dataset and len(dataset) == 1 else dataset
    for section, key, value, flag in (
        ("model", "name", model, "--model"),
        ("data", "dataset", datasets, "--dataset"),
        ("data", "tokens", tokens, "--tokens"),
        ("lemo", "retention", retention, "--retention"),
        ("training", "output_dir", output, "--output"),
    ):
        if value is not None:
            settings.set(section, key, value, flag)
    if full:
        _refuse_flags(settings, "lora", "--full trains all parameters, without LoRA")
        settings.values.pop("lora", None)
        settings.full = True
    if dense:
        _refuse_flags(settings, "lemo", "--dense trains without LeMo")
        settings.values["lemo"] = False
    check_preset(settings)
    planned = None
    if memory_gib is not None:
        hidden = as_json or os.environ.get("RANK", "0") != "0"
        with Estimated(desc="planned steps", unit="step", leave=False, disable=hidden) as bar:
            found, planned = plan_for_card(settings, memory_gib, bar)
        run = settings.build()
    else:
        run = settings.build()
        found = look(run)
    asked = dump(run, settings)
    if dry_run and as_json:
        facts = [*filter(None, (*found.facts, planned))]
        print(json.dumps({"found": facts, "settings": yaml.safe_load(asked)}))
        return
    if dry_run:
        for fact in filter(None, (*found.facts, planned)):
            print(f"# {fact}")
        print(asked, end="")
        return
    from lemo_hf.cli.train_folder import check_same, check_settings_file, starting_point
    from lemo_hf.cli.train_replaced import put_back

    check_output(run.training.output_dir, "training.output_dir", directory=True)
    # Trainer and LeMo print on stdout, which is the result's alone with --json.
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        put_back(run.training)
        check_settings_file(run.training.output_dir)
        checkpoint = starting_point(run.training, resume, overwrite, run.reads)
        if checkpoint is not None:
            check_same(checkpoint, asked)
        if planned is not None and run.training.process_index == 0:
            print(planned)
        trainer, metrics = _fine_tune(
            run, found, asked, checkpoint, overwrite, report, progress=not as_json
        )
    if not trainer.is_world_process_zero():
        return
    wrote = [run.training.output_dir] if trainer.has_results else []
    if report:  # the callback's page, and what was evaluated since
        from lemo_hf.report.page import write_report

        wrote.append(write_report(run.training.output_dir))
    if as_json:
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        result = {"output": run.training.output_dir, "steps": trainer.state.global_step}
        print(json.dumps({**result, "losses": losses, "metrics": metrics}))
        return
    for name, value in metrics.items():
        print(f"{name}: {value:,.4g}" if isinstance(value, float) else f"{name}: {value}")
    for path in wrote:
        print(f"Wrote {path}")


def _refuse_flags(settings: "Settings", section: str, why: str) -> None:
    """Refuse flags of a section that is ignored; a file's section may well be there."""
    for name, source in settings.sources.items():
        if name.startswith(f"{section}."):
            raise ValueError(f"{why}, and {source} sets it: give one of them.")


def _fine_tune(
    run: "Run",
    found: "Found",
    asked: str,
    checkpoint: str | None,
    overwrite: bool,
    report: bool,
    progress: bool,
) -> tuple[Any, dict[str, float]]:
    """Train, evaluate and save. Returns the Trainer and its metrics."""
    from lemo_hf.cli.train_folder import starting_point, write_first_settings
    from lemo_hf.cli.train_replaced import replaced
    from lemo_hf.cli.train_trainer import make_trainer

    args, main = run.training, run.training.process_index == 0
    if not progress:
        args.disable_tqdm = True
    trainer = make_trainer(run, found, asked, main and progress)
    _check_drop_last(trainer)
    if report:
        from lemo_hf.report.callback import ReportCallback

        trainer.add_callback(ReportCallback())
    with ExitStack() as held:
        if main:
            held.enter_context(only_run(args.output_dir))
            if checkpoint is None:
                # Another run may have ended meanwhile.
                starting_point(args, False, overwrite, run.reads)
            if overwrite:
                held.enter_context(replaced(args.output_dir, trainer))
            write_first_settings(args.output_dir, asked)
            _print_plan(run, trainer, found)
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        if not trainer.state.global_step:
            raise ValueError(
                f"{run.data.dataset}: no step was made, since no row has a label within "
                f"data.tokens={run.data.tokens:,}: nothing was trained or saved. Give longer rows "
                "by --tokens, or other rows."
            )
        if trainer.finished and main:
            print(
                f"No step is left: the run in {args.output_dir} was finished at step "
                f"{trainer.state.global_step:,}. More training.max_steps or "
                "training.num_train_epochs go on."
            )
        return trainer, trainer.write_results(metrics)


def _check_drop_last(trainer: Any) -> None:
    """Raises ValueError if the rows are fewer than a batch, which is left out."""
    args, rows = trainer.args, trainer.train_dataset
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and hasattr(rows, "__len__") and len(rows) < batch:
        raise ValueError(
            f"no step would be made: training.dataloader_drop_last leaves out a batch that is not "
            f"whole, and {len(rows):,} rows are fewer than one of {batch:,}: leave it out, give "
            "more rows, or a lower training.per_device_train_batch_size."
        )


def _print_plan(run: "Run", trainer: Any, found: "Found") -> None:
    """Print what is about to be trained, and on what."""
    from rich.console import Console
    from rich.table import Table

    from lemo_hf.report.callback import parameter_counts

    args = run.training
    trained, total = parameter_counts(trainer.model)
    what = "all parameters" if run.lora is None else f"LoRA r={run.lora.r}"
    step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    lengths = f"of {run.data.tokens:,} tokens"
    if found.form is not None:
        lengths = f"of at most {run.data.tokens:,} tokens, labels on "
        lengths += "the answers alone" if run.data.answers_only else "all of them"
    sparse = "off: every token in every layer" if run.lemo is None else "on, see below"
    if run.lemo is not None and _only_finishes(run, trainer, step, found):
        kept = run.lemo.finish_retention
        how = "is dense" if kept == 1 else f"keeps {kept:.0%} of the blocks"
        sparse = (
            f"the only step of this run {how} (the finish): take at least 2 steps to see LeMo's"
        )
    table = Table(show_header=False, box=None)
    for name, value in (
        ("model", f"{run.model.name}, {total:,} parameters, {trainer.model.dtype}"),
        ("trained", f"{what}: {trained:,} parameters ({trained / total:.2%})"),
        ("data", f"{_rows(trainer.train_dataset)} {lengths}, {step} a step"),
        ("evaluation", _rows(trainer.eval_dataset, ", dense")),
        ("LeMo", sparse),
        ("output", args.output_dir),
    ):
        table.add_row(f"[bold]{name}[/]", value)
    Console().print(table)


def _only_finishes(run: "Run", trainer: Any, step: int, found: "Found") -> bool:
    """Whether the run has one step, which is its finish."""
    answers = found.form is not None and run.data.answers_only  # which have none, unless asked for
    if run.lemo is None or not run.lemo.finish or (answers and run.lemo.dense_finish is None):
        return False
    if run.training.max_steps > 0:
        return run.training.max_steps == 1
    return len(trainer.train_dataset) * run.training.num_train_epochs <= step


def _rows(dataset: Any, how: str = "") -> str:
    if dataset is None:
        return "none"
    return f"{len(dataset):,} rows{how}" if hasattr(dataset, "__len__") else "a stream of rows"
