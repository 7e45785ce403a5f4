"""One run, or with -m a sweep: python train.py [-m] key=value ..."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while there is nothing to save, Ctrl-C just ends it

import hydra
import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from clbench.config import check, explain, for_every_choice, register_resolvers, wandb_mode

register_resolvers()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    """A method and a strategy, taken through a stream."""
    settings = check(config)
    from hydra.core.hydra_config import HydraConfig

    from clbench import experiment, footprint, instantiation
    from clbench.interruption import Interruption, Stopped
    from clbench.recording.provenance import identity, made_by
    from clbench.recording.recorder import Recorder
    from clbench.recording.run_directory import RunDirectory
    from clbench.sweeping import composed_from
    from clbench.terminal import Display

    job = HydraConfig.get()
    directory = RunDirectory(hydra.utils.to_absolute_path(job.runtime.output_dir))
    alone = job.launcher._target_.endswith("BasicLauncher")
    display = Display(directory.path.name, alone=alone)
    try:
        with ExitStack() as inside:
            inside.enter_context(directory.lock())
            interruption = inside.enter_context(Interruption())
            inside.enter_context(display)
            if directory.finished(settings):
                return
            report = inside.enter_context(directory.reporting(identity(settings, [])))
            display.heading(directory.path.name)
            device = instantiation.device(settings["gpu"])
            footprint.reset_peak(device)
            read = instantiation.reader(settings)
            detector = instantiation.detector(settings).to(device)
            tasks = read(interruption.watching(display.progress))
            strategy = instantiation.strategy(settings, detector)
            strategy.check(tasks)
            about = {
                **identity(settings, [task.name for task in tasks]),
                "composed_from": composed_from(job, job.overrides.task),
            }
            directory.write_config(settings, made_by(device))
            report(about)
            mode, why = wandb_mode(settings["wandb"])
            if why:
                display.line(why)
            if mode == "disabled":
                recorder = Recorder()
            else:
                from clbench.recording.wandb import WandbRun

                recorder = WandbRun(
                    directory.path, {**settings["wandb"], "mode": mode}, settings, about["tasks"]
                )
            experiment.run(
                strategy,
                tasks,
                directory,
                display,
                device,
                about,
                interruption,
                recorder,
                evaluate=settings["evaluate"],
                maps=settings["maps"],
                checkpoint_s=settings["checkpoint_s"],
            )
    except Stopped as stopped:
        again = "the same command without overwrite=true" if settings["overwrite"] else "the same command"
        display.line(f"{stopped}: {again} continues here")
        stopped.hand_on()


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra hands its errors on, to be said in one line
    # argparse wants flags before what they are for: -m may stand anywhere.
    flags = [text for text in sys.argv[1:] if text in ("-m", "--multirun")]
    sys.argv[1:] = flags[:1] + for_every_choice([text for text in sys.argv[1:] if text not in flags])
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        folder = str(Path(__file__).parent.absolute() / "conf")
        print(f"error: {explain(error, sys.argv[1:], folder)}", file=sys.stderr)
        sys.exit(2)
    except yaml.YAMLError as error:  # in conf/, most likely in a conf/local.yaml of the user's own
        print(f"error: a config cannot be read: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
