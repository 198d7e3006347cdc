"""Open the experiment trackers' runs before training, and close them whether it succeeds or fails.

transformers' own callbacks log the metrics. They would also open a run, but with defaults that use the network or the current
folder. Therefore this module opens the run, and the callback logs to it. Nothing leaves the machine unless the library's own
variable asks for it: `MLFLOW_TRACKING_URI`, `WANDB_MODE` or `TENSORBOARD_LOGGING_DIR`.

A tracker's server that is down costs the record, never the run: one warning, and training goes on without it.

Trackers record the metrics of each step, all of `SFTConfig` and the model's configuration. MLflow adds the names of the user and
the program, the others add the host name. None of them records the environment, the command line or any record's text.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lora_trainer.config import Tracker
from lora_trainer.errors import ConfigError, Interrupted
from lora_trainer.logs import adopt_library_loggers, get_logger
from lora_trainer.uris import expand_home

if TYPE_CHECKING:
    from transformers import TrainerCallback

PROJECT: Final = "lora-trainer"
"""Default name of the MLflow experiment and the W&B project. `MLFLOW_EXPERIMENT_NAME` and `WANDB_PROJECT` override it."""

# MLflow's own defaults, 7 retries and 120 s a request, would keep a GPU waiting for minutes
_MLFLOW_PATIENCE: Final[Mapping[str, str]] = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
_REFUSED: Final = (401, 403)

# modules that each tracker imports; without a server, MLflow stores runs in SQLite
_MODULES: Final[Mapping[Tracker, tuple[str, ...]]] = {
    "tensorboard": ("tensorboard",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "wandb": ("wandb",),
}


def require_installed(trackers: Sequence[Tracker]) -> None:
    """Raise a `ConfigError` that names every tracker whose library is not installed, without importing the libraries."""
    missing = {tracker: [module for module in _MODULES[tracker] if not _is_installed(module)] for tracker in trackers}
    problems = [
        f"logging.report_to: {tracker} is not installed ({', '.join(modules)} missing): pip install 'lora-trainer[trackers]'"
        for tracker, modules in missing.items()
        if modules
    ]
    if problems:
        raise ConfigError(problems)


def _is_installed(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    # W&B stores runs in a folder `wandb`. In the current folder, Python would take it for a namespace package without a file
    return spec is not None and spec.origin is not None


@contextmanager
def tracking(trackers: Sequence[Tracker], folder: Path, run_name: str) -> Iterator[list[TrainerCallback]]:
    """Open a run named `run_name` with each of `trackers`, in `folder/<tracker>`. Yield the callbacks that log to the runs.

    A tracker that cannot be reached has no callback. Raise `ConfigError` if one refuses the credentials.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(_OPEN[tracker](folder.absolute() / tracker, run_name)) for tracker in trackers]
        yield [callback for callback in opened if callback is not None]


@contextmanager
def _tensorboard(folder: Path, run_name: str) -> Iterator[TrainerCallback]:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    target = str(folder)
    if users := os.environ.get("TENSORBOARD_LOGGING_DIR"):
        # TensorBoard names a run after its folder, so add one below the user's, which may be a URI
        try:
            users = users if "://" in users else str(expand_home(users))
        except ValueError as error:
            raise ConfigError(f"TENSORBOARD_LOGGING_DIR: got '{users}'; {error}") from None
        target = f"{users.rstrip('/')}/{run_name}"
    # hide the steps of an interrupted attempt, because this one logs from the first step again
    writer = SummaryWriter(log_dir=target, purge_step=0)
    try:
        yield TensorBoardCallback(writer)
    finally:
        writer.close()


@contextmanager
def _mlflow(folder: Path, run_name: str) -> Iterator[TrainerCallback | None]:
    # opt out of MLflow's telemetry; the variable is read at import
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # without git installed, GitPython prints a long warning
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import mlflow
    from mlflow.exceptions import MlflowException
    from transformers.integrations import MLflowCallback

    adopt_library_loggers()
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    # MLflow writes its settings to the environment, where the next run would read them as the user's
    with _restored_environment("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID", *_MLFLOW_PATIENCE):
        for name, value in _MLFLOW_PATIENCE.items():
            os.environ.setdefault(name, value)
        offline = not os.environ.get("MLFLOW_TRACKING_URI")
        try:
            _start_mlflow_run(folder if offline else None, run_name)
        except MlflowException as error:
            if error.get_http_status_code() in _REFUSED:
                raise ConfigError(
                    f"logging.report_to: mlflow: {error}; check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
                    "or MLFLOW_TRACKING_TOKEN"
                ) from None
            _warn("tracker_unavailable", "mlflow", error)
            yield None
            return
        status = "FAILED"
        try:
            yield _guarded(MLflowCallback(), "mlflow", MlflowException)
            status = "FINISHED"
        except Interrupted:
            status = "KILLED"
            raise
        finally:
            try:
                mlflow.flush_async_logging()
                mlflow.end_run(status)
            except MlflowException as error:
                _warn("tracker_lost", "mlflow", error)
            if offline:
                mlflow.set_tracking_uri(None)


def _start_mlflow_run(folder: Path | None, run_name: str) -> None:
    """Start a run on the user's server, or in a database in `folder`."""
    import mlflow

    experiment_id = None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        found = mlflow.get_experiment_by_name(name)
        # the default artifact location is the current folder
        experiment_id = (
            found.experiment_id if found else mlflow.create_experiment(name, artifact_location=(folder / "artifacts").as_uri())
        )
    mlflow.start_run(run_name=run_name, experiment_id=experiment_id)


@contextmanager
def _wandb(folder: Path, run_name: str) -> Iterator[TrainerCallback | None]:
    # opt out of W&B's error reports; the variable is read when its service starts
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb
    from transformers.integrations import WandbCallback

    adopt_library_loggers()
    logging.getLogger("wandb").setLevel(logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    with _restored_environment("WANDB_CACHE_DIR"):
        # W&B's service logs to its cache folder, or to our stderr if that is read-only, as the image's home is
        os.environ.setdefault("WANDB_CACHE_DIR", str(folder / "cache"))
        try:
            wandb.init(
                project=os.environ.get("WANDB_PROJECT") or PROJECT,
                name=run_name,
                dir=os.environ.get("WANDB_DIR") or str(folder),
                mode=os.environ.get("WANDB_MODE") or "offline",
                settings=wandb.Settings(
                    # record neither output, which may quote data, nor the command line, which may contain private settings
                    console="off",
                    disable_code=True,
                    save_code=False,
                    disable_git=True,
                    x_disable_meta=True,
                    x_save_requirements=False,
                    # system metrics query the cloud's metadata server, even offline
                    x_disable_stats=True,
                    x_disable_machine_info=True,
                    silent=True,
                ),
            )
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise ConfigError(f"logging.report_to: wandb: {error}") from None
        except wandb.errors.CommError as error:
            _warn("tracker_unavailable", "wandb", error)
            wandb.teardown(exit_code=1)
            yield None
            return
        exit_code = 1
        try:
            yield _guarded(WandbCallback(), "wandb", wandb.errors.Error)
            exit_code = 0
        finally:
            wandb.finish(exit_code=exit_code)
            # stop W&B's service process, which would keep the first run's environment
            wandb.teardown(exit_code=exit_code)


def _guarded(callback: TrainerCallback, tracker: Tracker, *failures: type[Exception]) -> TrainerCallback:
    """Make the callback's first failure a warning and the end of its record."""
    lost = False

    def guard(handle: Callable[..., object]) -> Callable[..., object]:
        def handled(*arguments: object, **named: object) -> object:
            nonlocal lost
            if lost:
                return None
            try:
                return handle(*arguments, **named)
            except failures as error:
                lost = True
                _warn("tracker_lost", tracker, error)
                return None

        return handled

    for name in dir(callback):
        if name.startswith("on_"):
            setattr(callback, name, guard(getattr(callback, name)))
    return callback


def _warn(event: str, tracker: Tracker, error: Exception) -> None:
    get_logger().warning(event, tracker=tracker, problem=str(error)[:500], consequence="training goes on without this tracker")


@contextmanager
def _restored_environment(*names: str) -> Iterator[None]:
    """Restore the named environment variables after the block."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


_OPEN: Final[Mapping[Tracker, Callable[[Path, str], AbstractContextManager[TrainerCallback | None]]]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
}
